"""The prompts of generate.py: a file of texts or token ids, mixes of public fields, or the start token; and the text of
what was generated after one.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from base.errors import fail
from base.files import is_text, read_lines
from corpus.records import field_values, prefix_of
from corpus.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """What a sample continues. text: as it stands in the output; has_text: whether the ids hold more than a start;
    fields: the public fields in front of it."""

    text: str
    ids: tuple[int, ...]
    has_text: bool
    fields: Mapping[str, str] = field(default_factory=dict)


def start_token(tokenizer: Tokenizer) -> int | None:
    return tokenizer.end_of_text if tokenizer.begin_of_text is None else tokenizer.begin_of_text


def text_prompt(text: str, where: str, tokenizer: Tokenizer, fields: Mapping[str, str] | None = None) -> Prompt:
    """A text's prompt, with the tokens that corpus/records.py gives a prompt. fields: in front of it."""
    fields = fields or {}
    text = prefix_of(tuple(fields), tuple(fields.values())) + text
    begin, ids = start_token(tokenizer), (*tokenizer.prefix, *(tokenizer.encode(text) if text else ()))
    if ids:
        return Prompt(text, ids, bool(text), fields)
    if begin is None:
        fail(f"{where}: is empty, and the vocabulary has no start token; give a text")
    return Prompt(text, (begin,), False, fields)


def mix_prompts(names: Sequence[str], mixes: Sequence[Sequence[str]], tokenizer: Tokenizer, limit: int) -> list[Prompt]:
    """A prompt for each mix of public fields. limit: tokens that one may have."""
    found = []
    for mix in mixes:
        one = text_prompt("", "--label_counts", tokenizer, dict(zip(names, mix, strict=True)))
        check_length(one, f"--label_counts: {one.text.strip()}", limit)
        found.append(one)
    return found


def check_length(prompt: Prompt, where: str, limit: int) -> None:
    if len(prompt.ids) > limit:
        fail(
            f"{where}: the prompt has {len(prompt.ids)} tokens, and beside --max_new_tokens the model has room for "
            f"{limit}; shorten it, or generate fewer"
        )


def read_prompts(path: str | None, names: Sequence[str], tokenizer: Tokenizer, limit: int) -> list[Prompt]:
    """The prompts of a file, or without one the start token. names: public fields, which every line of .jsonl then has.
    limit: tokens that a prompt may have."""
    if path is None:
        if not tokenizer.prefix and start_token(tokenizer) is None:
            fail("--prompts: not given, and the vocabulary has no start token; give a file of prompts")
        return [text_prompt("", "--prompts", tokenizer)]
    found = []
    for number, line in read_lines(path, "--prompts"):
        where = f"{path}:{number}"
        if path.endswith(".jsonl"):
            one = prompt_of_record(line, where, names, tokenizer)
        else:
            one = text_prompt(line, where, tokenizer)
        check_length(one, where, limit)
        found.append(one)
    if not found:
        fail(f"--prompts {path}: is empty, wanted a prompt a line")
    return found


def prompt_of_record(line: str, where: str, names: Sequence[str], tokenizer: Tokenizer) -> Prompt:
    """The prompt of a line of JSON."""
    wanted = 'wanted {"prompt": "..."} or {"context": [ids]}'
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or ("prompt" in record) == ("context" in record):
        fail(f"{where}: {wanted}, got {line[:60]!r}")
    if "prompt" in record:
        if not isinstance(record["prompt"], str) or not is_text(record["prompt"]):
            fail(f"{where}: the prompt is no text; {wanted}, got {line[:60]!r}")
        fields = dict(zip(names, field_values(record, names, where), strict=True))
        return text_prompt(record["prompt"], where, tokenizer, fields)
    ids = record["context"]
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        fail(f"{where}: the context is no list of token ids; {wanted}, got {line[:60]!r}")
    if not ids:
        fail(f"{where}: the context is empty, wanted one token at least; remove the line or encode with --add_bos")
    if wrong := [token for token in ids if not 0 <= token < tokenizer.vocab_size]:
        fail(f"{where}: token id {wrong[0]} is outside the vocabulary of {tokenizer.vocab_size} tokens; is it another?")
    return Prompt(tokenizer.decode(ids), tuple(ids), True)


def stops(given: Sequence[str], tokenizer: Tokenizer) -> Callable[[Sequence[int]], bool] | None:
    """Whether the text of tokens holds one of --stop, where the newest token can have ended it. A token but a special
    one has a byte at least, so the text lies in as many tokens as it has bytes."""
    if not given:
        return None
    window = max(len(text.encode()) for text in given) + 4

    def stopped(tokens: Sequence[int]) -> bool:
        text = tokenizer.decode(list(tokens[-window:]))
        return any(one in text for one in given)

    return stopped


def text_of(tokens: list[int], prompt: Prompt, tokenizer: Tokenizer, stop: Sequence[str]) -> str:
    """The generated text: up to an end token, cut before a stop."""
    body = tokens[:-1] if tokens[-1] in tokenizer.ends else tokens
    text = tokenizer.decode_generated(body)
    if prompt.has_text and not tokenizer.cut_at_spaces:  # alone, such tokens lose the space at their begin
        before, whole = tokenizer.decode(list(prompt.ids)), tokenizer.decode([*prompt.ids, *body])
        text = whole.removeprefix(before) if whole.startswith(before) else text
    ends = [place for one in stop if (place := text.find(one)) >= 0]
    return text[: min(ends)] if ends else text
