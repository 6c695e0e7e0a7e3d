"""GPT-2's byte-level BPE (Radford et al., 2019, section 2.2; Sennrich et al., 2016) from encoder.json and vocab.bpe.

The same two files are vocab.json and merges.txt to Hugging Face, whose tokenizer.json holds both. The work is done by
the `tokenizers` library. This module reads the files strictly and gives the ids of OpenAI's encoder: in particular the
characters `<|endoftext|>` inside a text are text, and only `.end_of_text` is the special token.
"""

import json
import os
from typing import NoReturn

import tokenizers

from base.errors import fail
from base.files import read_lines, read_object

END_OF_TEXT = "<|endoftext|>"
KEEPS_IDS = (None, "ByteLevel", "TemplateProcessing")  # post-processors that add nothing but special tokens
ADDED = "added_tokens.json"  # beside them: tokens that transformers finds in a text before the merges are looked at
DOWNLOAD = "bash scripts/download_vocab.sh fetches GPT-2's own"
# What tokenizer.json must say, for the ids to be those of OpenAI's encoder: the entries of "model" and of the whole.
PLAIN_BPE = {
    "dropout": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}
# A byte is written as a printable character in both files; these 256 characters are the alphabet.
ALPHABET = frozenset(tokenizers.pre_tokenizers.ByteLevel.alphabet())


class GPT2Tokenizer:
    """A corpus.tokenizer.Tokenizer; vocab_size is 50257 for GPT-2, end_of_text 50256. No token is put around a text."""

    cut_at_spaces = True
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
        """vocab: symbol -> id, whole and without gaps. merges: pairs of symbols, the one to merge first comes first."""
        # No special token is registered: the library would otherwise find <|endoftext|> inside a text.
        self._bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
        self._bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        self._bpe.decoder = tokenizers.decoders.ByteLevel()
        self.vocab_size: int = len(vocab)
        self.end_of_text: int = vocab[END_OF_TEXT]
        self.begin_of_text: int = self.end_of_text
        self.ends = frozenset([self.end_of_text])

    def encode(self, text: str, after: bool = False) -> list[int]:
        text.encode("utf-8")
        return self._bpe.encode(text).ids

    def encode_batch(self, texts: list[str], after: bool = False) -> list[list[int]]:
        for text in texts:
            text.encode("utf-8")
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(texts)]

    def decode(self, ids: list[int]) -> str:
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary [0, {self.vocab_size})")
        return self._bpe.decode(ids, skip_special_tokens=False)

    def decode_generated(self, ids: list[int]) -> str:
        return self.decode(ids).split(END_OF_TEXT)[0]

    def tokens(self) -> dict[str, int]:
        return self._bpe.get_vocab()


def read_pair(vocab_path: str, merges_path: str) -> GPT2Tokenizer:
    """The tokenizer of OpenAI's two files. UserError, with the file (and the line), where one is damaged, or does not
    belong to the other, and where tokens were added beside them."""
    vocab = _read_vocab(vocab_path)
    merges = _read_merges(merges_path, vocab, os.path.basename(vocab_path))
    beside = os.path.join(os.path.dirname(vocab_path), ADDED)
    if os.path.isfile(beside) and (added := read_object(beside, "a JSON object of token: id").keys() - {END_OF_TEXT}):
        _refuse_added(beside, sorted(added))
    return GPT2Tokenizer(vocab, merges)


def is_gpt2_form(content: dict) -> bool:
    """Whether a tokenizer.json does what OpenAI's encoder does, and names no token beside <|endoftext|>."""
    model, split, after = (content.get(key) for key in ("model", "pre_tokenizer", "post_processor"))
    split = split if isinstance(split, dict) else {"type": split}
    after = after if isinstance(after, dict) else {"type": after}
    added = content.get("added_tokens") or []
    return (
        isinstance(model, dict)
        and model.get("type", "BPE") == "BPE"
        and all(model.get(key) in allowed for key, allowed in PLAIN_BPE.items())
        and content.get("normalizer") is None
        and split.get("type") == "ByteLevel"
        and bool(split.get("use_regex", True))
        and not split.get("add_prefix_space")
        and after.get("type") in KEEPS_IDS
        and not after.get("special_tokens")
        and all(isinstance(one, dict) and one.get("content") == END_OF_TEXT for one in added)
    )


def _refuse_added(path: str, tokens: list[str]) -> NoReturn:
    more = f" and {len(tokens) - 3} more" if len(tokens) > 3 else ""
    fail(
        f"{path}: adds {', '.join(map(repr, tokens[:3]))}{more} to the vocabulary, and in a text that is text here; "
        f"wanted a vocabulary of merges alone: {DOWNLOAD}"
    )


def from_whole(content: dict, path: str) -> GPT2Tokenizer:
    """The tokenizer of a tokenizer.json of GPT-2's form. UserError where its vocabulary or its merges are damaged."""
    model = content["model"]
    vocab, rows = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(rows, list):
        fail(f"{path}: has no vocab or merges; fetch it again")
    for one in content.get("added_tokens") or []:
        if vocab.setdefault(END_OF_TEXT, one.get("id")) != one.get("id"):
            fail(f"{path}: {END_OF_TEXT} is {vocab[END_OF_TEXT]} in vocab, {one.get('id')} in added_tokens; {DOWNLOAD}")
    _check_vocab(vocab, path)
    merges = []
    for number, entry in enumerate(rows):
        pair = entry.split(" ") if isinstance(entry, str) else entry
        where = f"{path}: merge {number}"
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            fail(f"{where}: wanted two symbols, got {str(entry)[:40]!r}; fetch it again")
        merges.append(_known(pair, vocab, where, "its vocab"))
    _check_count(merges, vocab, path, "its vocab")
    return GPT2Tokenizer(vocab, merges)


def _read_vocab(path: str) -> dict[str, int]:
    """symbol -> id; the ids are 0..n-1, and every byte and <|endoftext|> have one."""
    text = "\n".join(line for _, line in read_lines(path))
    try:
        vocab = json.loads(text)
    except (ValueError, RecursionError) as error:
        fail(f"{path}: is not JSON ({error}); fetch it again")
    _check_vocab(vocab, path)
    return vocab


def _check_vocab(vocab: object, path: str) -> None:
    if not isinstance(vocab, dict) or not all(type(number) is int for number in vocab.values()):
        fail(f"{path}: is not a JSON object of symbol: id; fetch it again")
    if sorted(vocab.values()) != list(range(len(vocab))):
        fail(f"{path}: the ids of its {len(vocab)} symbols are not 0..{len(vocab) - 1}, each once; fetch it again")
    # Without one of these the library would drop a byte from the text in silence.
    missing = sorted((ALPHABET | {END_OF_TEXT}) - vocab.keys())
    if missing:
        fail(f"{path}: has no id for {missing[0]!r} ({len(missing)} symbols missing); fetch it again")


def _read_merges(path: str, vocab: dict[str, int], beside: str) -> list[tuple[str, str]]:
    """The merges in order of rank; both parts and the whole of each are symbols of `vocab`, the file `beside`."""
    merges = []
    for number, line in read_lines(path):
        if number == 1:
            if not line.startswith("#version"):
                fail(f"{path}:1: wanted a line that begins with #version, got {line[:40]!r}; fetch it again")
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            fail(f"{path}:{number}: wanted two symbols and one space, got {line[:40]!r}; fetch it again")
        merges.append(_known(parts, vocab, f"{path}:{number}", f"{beside} beside it"))
    _check_count(merges, vocab, path, f"{beside} beside it")
    return merges


def _known(parts: list[str], vocab: dict[str, int], where: str, beside: str) -> tuple[str, str]:
    for symbol in (*parts, "".join(parts)):
        if symbol not in vocab:
            fail(f"{where}: {symbol!r} is not in {beside}; fetch both again")
    return parts[0], parts[1]


def _check_count(merges: list[tuple[str, str]], vocab: dict[str, int], path: str, beside: str) -> None:
    """UserError where `vocab` has symbols that no merge makes, or a symbol is made twice."""
    expected = len(vocab) - len(ALPHABET) - 1
    if len(merges) == expected:
        return
    surplus = sorted(vocab.keys() - ALPHABET - {END_OF_TEXT} - {a + b for a, b in merges}, key=vocab.__getitem__)
    more = f" and {len(surplus) - 3} more" if len(surplus) > 3 else ""
    symbols = f"{len(surplus)} symbol{'s' * (len(surplus) > 1)}"
    named = f": it has {symbols} more than the merges make: {', '.join(map(repr, surplus[:3]))}{more}"
    fail(
        f"{path}: has {len(merges)} merges where {beside} wants {expected}{named if surplus else ''}; wanted both "
        f"whole, without added tokens: {DOWNLOAD}"
    )
