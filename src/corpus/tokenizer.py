"""GPT-2's byte-level BPE (Radford et al., 2019, section 2.2; Sennrich et al., 2016) from encoder.json and vocab.bpe.

The same two files are vocab.json and merges.txt to Hugging Face, whose tokenizer.json holds both. The work is done by
the `tokenizers` library. This file reads the files strictly and gives the ids of OpenAI's
encoder: in particular the characters `<|endoftext|>` inside a text are text, and only `.end_of_text` is the special
token.
"""

import json
import os
from typing import NoReturn

import tokenizers

from base.errors import fail
from base.files import check_pointer, folder_below, read_lines, read_object

END_OF_TEXT = "<|endoftext|>"
WHOLE = "tokenizer.json"
# What a folder of a vocabulary holds: OpenAI's names, Hugging Face's for the same two files, or both in one.
FORMS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"), (WHOLE,))
VOCAB_HELP = "folder of encoder.json and vocab.bpe, of vocab.json and merges.txt, or of tokenizer.json"
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


def vocabulary_files(folder: str) -> tuple[str, ...]:
    """The files of the vocabulary in `folder`: of the first of FORMS that is there. UserError where none is."""
    paths = [tuple(os.path.join(folder, name) for name in form) for form in FORMS]
    there = [[path for path in form if os.path.isfile(path)] for form in paths]
    for form, found in zip(paths, there, strict=True):
        if len(found) == len(form):
            return form
    begun = next((form for form, found in zip(paths, there, strict=True) if found), paths[0])
    absent = next(path for path in begun if not os.path.isfile(path))
    below = folder_below(folder, [name for form in FORMS for name in form])
    instead = f"run bash scripts/download_vocab.sh, or {f'give {below}' if below else 'name another folder'}"
    wanted = " or ".join(" and ".join(form) for form in FORMS)
    fail(f"--vocab {folder}: {absent} does not exist; wanted {wanted}: {instead}")


def load_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of the files in `folder` (FORMS), GPT-2's own or another in the same format.

    Raises UserError, naming the file (and the line), when one is missing, damaged, or does not belong to the other, and
    where they make other ids than OpenAI's encoder would.
    """
    files = vocabulary_files(folder)
    for path in files:
        check_pointer(path)
    if len(files) == 1:
        return Tokenizer(*_read_whole(files[0]))
    vocab = _read_vocab(files[0])
    merges = _read_merges(files[1], vocab, os.path.basename(files[0]))
    beside = os.path.join(folder, ADDED)
    if os.path.isfile(beside) and (added := read_object(beside, "a JSON object of token: id").keys() - {END_OF_TEXT}):
        _refuse_added(beside, sorted(added))
    return Tokenizer(vocab, merges)


def _refuse_added(path: str, tokens: list[str]) -> NoReturn:
    more = f" and {len(tokens) - 3} more" if len(tokens) > 3 else ""
    fail(
        f"{path}: adds {', '.join(map(repr, tokens[:3]))}{more} to the vocabulary, and in a text that is text here; "
        f"wanted a vocabulary of merges alone: {DOWNLOAD}"
    )


def _read_whole(path: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) of a tokenizer.json."""
    content = read_object(path, "what save_pretrained() of a GPT-2's tokenizer writes")
    model, split, after = (content.get(key) for key in ("model", "pre_tokenizer", "post_processor"))
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        fail(f"{path}: its model is no BPE, wanted a GPT-2's; {DOWNLOAD}")
    for key, allowed in PLAIN_BPE.items():
        if model.get(key) not in allowed:
            fail(f"{path}: its model has {key} {str(model[key])[:40]!r}, wanted a GPT-2's without it; {DOWNLOAD}")
    if content.get("normalizer") is not None:
        fail(f"{path}: has a normalizer, which changes texts; wanted a GPT-2's without one; {DOWNLOAD}")
    split = split if isinstance(split, dict) else {"type": split}
    if split.get("type") != "ByteLevel" or not split.get("use_regex", True) or split.get("add_prefix_space"):
        fail(
            f"{path}: its pre_tokenizer is {str(split)[:120]}, wanted ByteLevel without add_prefix_space, as GPT-2's; "
            + DOWNLOAD
        )
    after = after if isinstance(after, dict) else {"type": after}
    if after.get("special_tokens") or after.get("type") not in KEEPS_IDS:
        fail(f"{path}: its post_processor, {after.get('type')}, adds tokens to a text; wanted a GPT-2's; {DOWNLOAD}")
    vocab, rows = model.get("vocab"), model.get("merges")
    added = content.get("added_tokens") or []
    if (
        not isinstance(vocab, dict)
        or not isinstance(rows, list)
        or not isinstance(added, list)
        or not all(isinstance(one, dict) for one in added)
    ):
        fail(f"{path}: has no vocab or merges, or added_tokens that are no objects; fetch it again")
    others = [str(one.get("content")) for one in added if one.get("content") != END_OF_TEXT]
    if others:
        _refuse_added(path, others)
    for one in added:
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
    return vocab, merges


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
