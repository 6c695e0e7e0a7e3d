"""GPT-2's byte-level BPE (Radford et al., 2019, section 2.2; Sennrich et al., 2016) from encoder.json and vocab.bpe.

The work is done by the `tokenizers` library. This file reads the two files strictly and gives the ids of OpenAI's
encoder: in particular the characters `<|endoftext|>` inside a text are text, and only `.end_of_text` is the special
token.
"""

import json
import os

import tokenizers

from base.errors import fail
from base.files import read_lines

END_OF_TEXT = "<|endoftext|>"
# A byte is written as a printable character in both files; these 256 characters are the alphabet.
ALPHABET = frozenset(tokenizers.pre_tokenizers.ByteLevel.alphabet())


class Tokenizer:
    """Text to ids and back.

    Attributes:
        vocab_size: number of ids, 50257 for GPT-2; every id is in [0, vocab_size).
        end_of_text: id of <|endoftext|>, 50256 for GPT-2.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
        """vocab: symbol -> id, whole and without gaps. merges: pairs of symbols, the one to merge first comes first."""
        # No special token is registered: the library would otherwise find <|endoftext|> inside a text.
        self._bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
        self._bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        self._bpe.decoder = tokenizers.decoders.ByteLevel()
        self.vocab_size: int = len(vocab)
        self.end_of_text: int = vocab[END_OF_TEXT]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; [] for the empty text. UnicodeEncodeError for a lone surrogate, which no UTF-8 text holds."""
        text.encode("utf-8")
        return self._bpe.encode(text).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The same for many texts, on all cores (TOKENIZERS_PARALLELISM=false: on one)."""
        for text in texts:
            text.encode("utf-8")
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(texts)]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. ValueError for an id outside [0, vocab_size)."""
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary [0, {self.vocab_size})")
        return self._bpe.decode(ids, skip_special_tokens=False)


def load_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of `folder`/encoder.json and `folder`/vocab.bpe, GPT-2's own or another in the same format.

    Raises UserError, naming the file (and the line), when one is missing, damaged, or does not belong to the other.
    """
    vocab_path, merges_path = os.path.join(folder, "encoder.json"), os.path.join(folder, "vocab.bpe")
    for path in (vocab_path, merges_path):
        if not os.path.isfile(path):
            fail(f"--vocab {folder}: {path} does not exist; run bash scripts/download_vocab.sh, or name another folder")
    vocab = _read_vocab(vocab_path)
    return Tokenizer(vocab, _read_merges(merges_path, vocab))


def _read_vocab(path: str) -> dict[str, int]:
    """symbol -> id; the ids are 0..n-1, and every byte and <|endoftext|> have one."""
    text = "\n".join(line for _, line in read_lines(path))
    try:
        vocab = json.loads(text)
    except (ValueError, RecursionError) as error:
        fail(f"{path}: is not JSON ({error}); fetch it again")
    if not isinstance(vocab, dict) or not all(type(number) is int for number in vocab.values()):
        fail(f"{path}: is not a JSON object of symbol: id; fetch it again")
    if sorted(vocab.values()) != list(range(len(vocab))):
        fail(f"{path}: the ids of its {len(vocab)} symbols are not 0..{len(vocab) - 1}, each once; fetch it again")
    # Without one of these the library would drop a byte from the text in silence.
    missing = sorted((ALPHABET | {END_OF_TEXT}) - vocab.keys())
    if missing:
        fail(f"{path}: has no id for {missing[0]!r} ({len(missing)} symbols missing); fetch it again")
    return vocab


def _read_merges(path: str, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges in order of rank; both parts and the whole of each are symbols of `vocab`."""
    merges = []
    for number, line in read_lines(path):
        if number == 1:
            if not line.startswith("#version"):
                fail(f"{path}:1: wanted a line that begins with #version, got {line[:40]!r}; fetch it again")
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            fail(f"{path}:{number}: wanted two symbols and one space, got {line[:40]!r}; fetch it again")
        for symbol in (*parts, "".join(parts)):
            if symbol not in vocab:
                fail(f"{path}:{number}: {symbol!r} is not in encoder.json beside it; fetch both files again")
        merges.append((parts[0], parts[1]))
    expected = len(vocab) - len(ALPHABET) - 1
    if len(merges) != expected:
        fail(f"{path}: has {len(merges)} merges where encoder.json beside it wants {expected}; fetch both files again")
    return merges
