"""Tokenizers of other models than GPT-2: what tokenizer.json says, by the `tokenizers` library.

Two forms of BPE are read, for they lose no character: byte-level (Llama 3, Qwen, SmolLM) and SentencePiece's with byte
fallback (Llama 2, Mistral). As in transformers, a special token that stands in a text is that token, and the tokens
that a text gets in front and behind are those of the file's post_processor. Which tokens are special is also said in
tokenizer_config.json and special_tokens_map.json, and which ids end a text in generation_config.json or config.json.

transformers 5 builds the tokenizers of some classes anew and does not look at all of tokenizer.json: LlamaTokenizer
puts no second space before a text that begins with one. Here tokenizer.json decides.
"""

import json
import os
from collections.abc import Iterator

import tokenizers

from base.errors import fail
from base.files import read_object

TOKENIZER_CONFIG, SPECIAL_MAP = "tokenizer_config.json", "special_tokens_map.json"
GENERATION_CONFIG, MODEL_CONFIG = "generation_config.json", "config.json"
# What belongs to tokenizer.json, for an export.
COMPANIONS = (TOKENIZER_CONFIG, SPECIAL_MAP, "added_tokens.json", "chat_template.jinja", GENERATION_CONFIG)
KINDS = ("bos", "eos", "pad", "unk")
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))  # SentencePiece's tokens of single bytes
ALPHABET = frozenset(tokenizers.pre_tokenizers.ByteLevel.alphabet())
CURE = "AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER) of transformers writes all files anew"


class JsonTokenizer:
    """A corpus.tokenizer.Tokenizer.

    special: kind (of KINDS) -> id, for the kinds that the folder names
    """

    cut_at_spaces = False

    def __init__(self, content: dict, path: str, names: dict[str, str], end_ids: list[int]) -> None:
        """content: of tokenizer.json at `path`. names: kind -> token. end_ids: of the model's configuration."""
        self._whole = _load(content, path)
        after = without_space_first(content)
        self._after = self._whole if after == content else _load(after, path)
        vocab = self._whole.get_vocab(with_added_tokens=True)
        _check_lossless(content, vocab, path)
        for kind, token in names.items():
            if token not in vocab:
                fail(
                    f"{path}: does not hold {token!r}, which the files beside it name as {kind}_token; wanted the "
                    f"files of one tokenizer: {CURE}"
                )
        added = {token.content for token in self._whole.get_added_tokens_decoder().values()}
        for library in [self._whole] if self._after is self._whole else [self._whole, self._after]:
            library.no_truncation()
            library.no_padding()
            library.add_special_tokens(
                [
                    tokenizers.AddedToken(token, special=True, normalized=False)
                    for token in names.values()
                    if token not in added
                ]
            )
        self.special = {kind: vocab[token] for kind, token in names.items()}
        self.vocab_size: int = max(vocab.values()) + 1
        self.begin_of_text: int | None = self.special.get("bos")
        self.end_of_text: int | None = self.special.get("eos", end_ids[0] if end_ids else None)
        self.ends = frozenset([*end_ids, *([] if self.end_of_text is None else [self.end_of_text])])
        # What the post_processor puts around a text, whatever the text is.
        inside = self._whole.encode("a", add_special_tokens=False).ids
        around = self._whole.encode("a").ids
        begin = next(n for n in range(len(around)) if around[n : n + len(inside)] == inside)
        self.prefix = tuple(around[:begin])
        self.suffix = tuple(around[begin + len(inside) :])

    def encode(self, text: str, after: bool = False) -> list[int]:
        text.encode("utf-8")
        return (self._after if after else self._whole).encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str], after: bool = False) -> list[list[int]]:
        for text in texts:
            text.encode("utf-8")
        library = self._after if after else self._whole
        return [encoding.ids for encoding in library.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary [0, {self.vocab_size})")
        return self._whole.decode(ids, skip_special_tokens=False)

    def decode_generated(self, ids: list[int]) -> str:
        end = next((n for n, token in enumerate(ids) if token in self.ends), len(ids))
        self.decode(ids[end:])  # refuses ids outside the vocabulary
        return self._whole.decode(ids[:end], skip_special_tokens=True)

    def tokens(self) -> dict[str, int]:
        return self._whole.get_vocab(with_added_tokens=True)


def from_folder(content: dict, path: str) -> JsonTokenizer:
    """The tokenizer of a tokenizer.json, its content, and of the files beside it. UserError for what is damaged, does
    not belong together, or is no BPE of the two forms."""
    folder = os.path.dirname(path)
    return JsonTokenizer(content, path, special_tokens(folder), end_ids(folder))


def special_tokens(folder: str) -> dict[str, str]:
    """kind -> token, as transformers finds them: special_tokens_map.json counts before tokenizer_config.json where the
    latter has no added_tokens_decoder, as older versions wrote it."""
    config = _beside(folder, TOKENIZER_CONFIG)
    older = {} if "added_tokens_decoder" in config else _beside(folder, SPECIAL_MAP)
    found = {}
    for kind in KINDS:
        value = older.get(f"{kind}_token", config.get(f"{kind}_token"))
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str) and value:
            found[kind] = value
        elif value is not None and value != "":
            fail(f"{os.path.join(folder, TOKENIZER_CONFIG)}: {kind}_token is {json.dumps(value)[:40]}, wanted a text")
    return found


def end_ids(folder: str) -> list[int]:
    """The ids that end a text, by generation_config.json, or else config.json; [] where neither names one."""
    for name in (GENERATION_CONFIG, MODEL_CONFIG):
        value = _beside(folder, name).get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(one) is not int or one < 0 for one in values):
            fail(
                f"{os.path.join(folder, name)}: eos_token_id is {json.dumps(value)[:40]}, wanted an id or a list of ids"
            )
        if values:
            return values
    return []


def without_space_first(content: dict) -> dict:
    """A tokenizer.json that takes a text for the continuation of another: it puts no space before it."""

    def changed(step: object) -> object:
        if isinstance(step, list):
            return [changed(one) for one in step if not (isinstance(one, dict) and one.get("type") == "Prepend")]
        if not isinstance(step, dict):
            return step
        inner = {key: changed(value) if isinstance(value, list) else value for key, value in step.items()}
        if step.get("type") == "Metaspace":
            inner.pop("add_prefix_space", None)
            return {**inner, "prepend_scheme": "never"}
        return {**inner, "add_prefix_space": False} if step.get("type") == "ByteLevel" else inner

    normalizer = content.get("normalizer")
    if isinstance(normalizer, dict) and normalizer.get("type") == "Prepend":
        normalizer = None
    return {**content, "normalizer": changed(normalizer), "pre_tokenizer": changed(content.get("pre_tokenizer"))}


def _beside(folder: str, name: str) -> dict:
    path = os.path.join(folder, name)
    return read_object(path, f"what transformers writes; {CURE}") if os.path.isfile(path) else {}


def _load(content: dict, path: str) -> tokenizers.Tokenizer:
    model = content.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE":
        what = "a Unigram model, another form of SentencePiece," if kind == "Unigram" else f"of type {kind},"
        fail(f"{path}: its model is {what} which is no BPE; wanted a byte-level BPE, or one with byte fallback")
    if model.get("dropout"):
        fail(f"{path}: its model has dropout {str(model['dropout'])[:40]!r}, so a text's tokens are random; remove it")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            fail(f"{path}: its model has {key} {str(model[key])[:40]!r}; wanted a BPE without marks of words")
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises no narrower class
        fail(f"{path}: cannot be read by tokenizers {tokenizers.__version__} ({' '.join(str(error).split())[:120]})")


def _steps(step: object) -> Iterator[str]:
    """The types of all steps of a normalizer or pre_tokenizer."""
    if isinstance(step, dict):
        yield str(step.get("type"))
        for inner in step.values():
            yield from _steps(inner)
    elif isinstance(step, list):
        for inner in step:
            yield from _steps(inner)


def _check_lossless(content: dict, vocab: dict[str, int], path: str) -> None:
    """UserError where a text could lose characters, or become unk."""
    byte_level = "ByteLevel" in {*_steps(content.get("normalizer")), *_steps(content.get("pre_tokenizer"))}
    if not byte_level and not content["model"].get("byte_fallback"):
        fail(
            f"{path}: is neither byte-level (pre_tokenizer ByteLevel) nor has it byte_fallback, so characters would be "
            "lost; wanted one of the two"
        )
    missing = sorted((ALPHABET if byte_level else BYTES) - vocab.keys())
    if missing:
        fail(f"{path}: has no id for {missing[0]!r} ({len(missing)} of 256 bytes missing); fetch it again")
