"""Tokenizers: which one a folder holds, and whether it is the model's.

GPT-2's (corpus/gpt2_tokenizer.py) is encoder.json and vocab.bpe, the same two files as vocab.json and merges.txt, or a
tokenizer.json of that form. Any other tokenizer.json is read by corpus/json_tokenizer.py.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import Protocol

from base.errors import fail
from base.files import check_pointer, folder_below, read_object
from corpus import gpt2_tokenizer, json_tokenizer
from corpus.json_tokenizer import COMPANIONS

WHOLE = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
# What a folder of a vocabulary holds: OpenAI's names, Hugging Face's for the same two files, or both in one.
FORMS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"), (WHOLE,))
VOCAB_HELP = "folder of encoder.json and vocab.bpe, of vocab.json and merges.txt, or of tokenizer.json"
CHAT_TEMPLATE_HELP = "refused for now: write what the template would add into the texts"


class Tokenizer(Protocol):
    """Text to ids and back.

    vocab_size     every id is in [0, vocab_size)
    begin_of_text  the bos token; None where there is none
    end_of_text    the eos token, which ends a text that is learned; None where there is none
    ends           all ids that end a generated text
    prefix, suffix ids that transformers puts before and behind a text of its own
    cut_at_spaces  whether the tokens of a text are those of its words (records.WORDS), one after the other
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def begin_of_text(self) -> int | None: ...
    @property
    def end_of_text(self) -> int | None: ...
    @property
    def ends(self) -> frozenset[int]: ...
    @property
    def prefix(self) -> tuple[int, ...]: ...
    @property
    def suffix(self) -> tuple[int, ...]: ...
    @property
    def cut_at_spaces(self) -> bool: ...

    def encode(self, text: str, after: bool = False) -> list[int]:
        """Ids of `text`, without prefix and suffix; [] for the empty text. after: the text continues another one, so
        no space is put before it. UnicodeEncodeError for a lone surrogate, which no UTF-8 text holds."""

    def encode_batch(self, texts: list[str], after: bool = False) -> list[list[int]]:
        """The same for many texts, on all cores (TOKENIZERS_PARALLELISM=false: on one)."""

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens by name; bytes that are not UTF-8 become U+FFFD. ValueError for an id outside
        [0, vocab_size)."""

    def decode_generated(self, ids: list[int]) -> str:
        """The text of what a model generated: up to the first of `ends`, without special tokens."""

    def tokens(self) -> dict[str, int]:
        """token -> id, of the whole vocabulary."""


def vocabulary_files(folder: str) -> tuple[str, ...]:
    """The files of the vocabulary in `folder`: tokenizer.json where it is there and not GPT-2's, or else of the first
    of FORMS that is there. UserError where none is."""
    paths = [tuple(os.path.join(folder, name) for name in form) for form in FORMS]
    there = [[path for path in form if os.path.isfile(path)] for form in paths]
    whole = os.path.join(folder, WHOLE)
    complete = [form for form, found in zip(paths, there, strict=True) if len(found) == len(form)]
    if complete and complete[0] is not paths[0] and there[-1] and not gpt2_tokenizer.is_gpt2_form(read_whole(whole)):
        return (whole,)  # vocab.json and merges.txt beside it do not say how a text is cut into words
    if complete:
        return complete[0]
    begun = next((form for form, found in zip(paths, there, strict=True) if found), paths[0])
    absent = next(path for path in begun if not os.path.isfile(path))
    below = folder_below(folder, [name for form in FORMS for name in form])
    instead = f"run bash scripts/download_vocab.sh, or {f'give {below}' if below else 'name another folder'}"
    if os.path.isfile(os.path.join(folder, SENTENCEPIECE)):
        instead = f"{SENTENCEPIECE} alone is not read: {json_tokenizer.CURE}"
    wanted = " or ".join(" and ".join(form) for form in FORMS)
    fail(f"--vocab {folder}: {absent} does not exist; wanted {wanted}: {instead}")


def read_whole(path: str) -> dict:
    return read_object(path, "what save_pretrained() of a tokenizer writes")


def load_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of the files in `folder` (vocabulary_files).

    Raises UserError, naming the file (and the line), when one is missing, damaged, or does not belong to the other, and
    for a kind of tokenizer that is not read.
    """
    files = vocabulary_files(folder)
    for path in files:
        check_pointer(path)
    if len(files) == 2:
        return gpt2_tokenizer.read_pair(*files)
    content = read_whole(files[0])
    if gpt2_tokenizer.is_gpt2_form(content):
        return gpt2_tokenizer.from_whole(content, files[0])
    return json_tokenizer.from_folder(content, files[0])


def digest_vocab(folder: str) -> str:
    """sha256 of what decides a text's ids: the files of GPT-2's vocabulary, or tokenizer.json with the special tokens
    that the files beside it name."""
    digest = hashlib.sha256()
    try:
        for path in vocabulary_files(folder):
            with open(path, "rb") as handle:
                digest.update(handle.read())
    except OSError:
        load_tokenizer(folder)  # a UserError for a file that is missing
        raise
    if not has_gpt2_form(folder):
        special = [json_tokenizer.special_tokens(folder), json_tokenizer.end_ids(folder)]
        digest.update(json.dumps(special, sort_keys=True).encode())
    return digest.hexdigest()


def has_gpt2_form(folder: str) -> bool:
    """Whether the vocabulary in `folder` is of GPT-2's form, without special tokens of its own."""
    files = vocabulary_files(folder)
    return len(files) == 2 or gpt2_tokenizer.is_gpt2_form(read_whole(files[0]))


def companion_files(folder: str) -> list[str]:
    """The files of the vocabulary in `folder`, and those that say which tokens are special and how a chat is written.
    Of GPT-2's form, the vocabulary alone."""
    own = [] if has_gpt2_form(folder) else [os.path.join(folder, name) for name in COMPANIONS]
    return [*vocabulary_files(folder), *filter(os.path.isfile, own)]


# ------------------------------------------------------------------ beside a model


def own_vocabulary(*places: str | None) -> str | None:
    """The first of a model's folders that holds a vocabulary; None where none does. A file counts as its folder."""
    return next((folder for folder in folders(places) if holds(folder, (*FORMS, (SENTENCEPIECE,)))), None)


def folders(places: Iterable[str | None]) -> Iterator[str]:
    for place in places:
        if place is not None:
            yield place if os.path.isdir(place) else os.path.dirname(place) or "."


def holds(folder: str, forms: Iterable[tuple[str, ...]]) -> bool:
    """Whether all files of one of the forms are there."""
    return any(all(os.path.isfile(os.path.join(folder, name)) for name in form) for form in forms)


def foreign_vocabulary(*places: str | None) -> str | None:
    """own_vocabulary() where it is a tokenizer.json of another form than GPT-2's; None else."""
    folder = own_vocabulary(*places)
    if folder is None or not os.path.isfile(os.path.join(folder, WHOLE)) or has_gpt2_form(folder):
        return None
    return folder


def check_vocabulary_fits(folder: str, vocab_size: int, rows: int, model: str, *places: str | None) -> str:
    """A sentence on the model's rows beyond the vocabulary in `folder`; "" where there is none. UserError where that
    vocabulary is not the model's.

    vocab_size: of `folder`. rows: ids of the model. model: the flag and value that name it. places: its folders or
    files, as for own_vocabulary().
    """
    own = own_vocabulary(*places)
    if vocab_size > rows:
        fail(f"--vocab {folder}: has {vocab_size} ids, {model} only {rows}; give the vocabulary of the model")
    if own is not None and holds(own, FORMS) and not os.path.samefile(own, folder):
        mine, given = ({n: token for token, n in load_tokenizer(where).tokens().items()} for where in (own, folder))
        differing = sorted(n for n in mine.keys() & given.keys() if mine[n] != given[n])
        if differing:
            n = differing[0]
            fail(
                f"--vocab {folder}: id {n} is {given[n]!r}, in the vocabulary beside {model} it is {mine[n]!r}; leave "
                "--vocab out to take the model's"
            )
    ends = next(filter(None, map(json_tokenizer.end_ids, folders(places))), [])
    beyond = [n for n in ends if vocab_size <= n < rows]
    if beyond:
        fail(
            f"--vocab {folder}: has {vocab_size} ids, and the configuration of {model} ends a text by {beyond[0]}; "
            "give the vocabulary of the model"
        )
    if vocab_size == rows:
        return ""
    if own is None:
        return f"WARNING: --vocab {folder} has {vocab_size} ids, the model {rows}: is it the model's?"
    return (
        f"--vocab {folder} has {vocab_size} ids, the model {rows}: its rows from {vocab_size} on are padding, no text "
        f"holds them, and gpt2_beam.py --vocab_size {vocab_size} never predicts them"
    )
