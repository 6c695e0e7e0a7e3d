"""Texts that have authors: read, tokenised once in parallel into a memory map, split by author, drawn by author.

A line of a corpus is {"author": "...", "content": "..."}; the unit is the author, with every text of that author.
The cache of a corpus is a folder named by the digest of what went into it (the file, the vocabulary, the length), so a
changed file or vocabulary has another folder. It is made aside and renamed: whole or not there.

Shapes: n texts, A authors, U drawn authors, K texts that an author contributes to a step at the most.
"""

import hashlib
import json
import multiprocessing
import os
import re
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np
from torch import Tensor
from tqdm import tqdm

from batching import Cut, collate
from cli import UserError, atomic_write, check_file, fail, is_text, open_text
from losses import MicroBatch
from tokenizer import Tokenizer, load_tokenizer

PSEUDO_AUTHORS = ("[deleted]", "AutoModerator")
FORMAT = 1  # of the cache; another number makes every older cache void
CHUNK = 1 << 23  # bytes of the corpus that a process tokenises at a time
CACHED_WORDS = 1 << 18  # 98 % of an English corpus's words are among so many; about 70 MB a process
PROCESSES = 8  # that tokenise, at the most: with some 120 MB each they stay under 1 GB on a machine of many cores
# Where a text can be cut without changing a token: a space behind something that is no space always begins a new piece
# of GPT-2's pre-tokenisation, so a text's tokens are those of the words that this splits it into, one after the other.
WORDS = re.compile(r"(?<=\S)(?= )")


# ------------------------------------------------------------------ from a file to tokens


class WordTokens(dict):
    """word -> its ids, encoded when first met. A dictionary answers faster than a tokenizer, and a text's first L
    tokens lie in its first L words: the rest is never encoded. On texts of 1,400 characters cut to 128 tokens this
    takes 0.07 ms a text, the tokenizer alone 0.70 ms (one core)."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(self.tokenizer.encode(word))
        if len(self) < CACHED_WORDS:
            self[word] = ids
        return ids

    def first(self, text: str, length: int) -> tuple[list[int], bool]:
        """(the first `length` ids of `text`, whether there were more)."""
        words = WORDS.split(text, maxsplit=length)
        ids = list(chain.from_iterable(map(self.__getitem__, words[:length])))
        return ids[:length], len(words) > length or len(ids) > length


@dataclass(frozen=True)
class Source:
    """What a cache is made of."""

    path: str
    flag: str
    vocab: str  # folder of encoder.json and vocab.bpe
    length: int  # longer texts are cut to so many tokens
    author_field: str = "author"
    content_field: str = "content"


Part = tuple[int, int, int, bytes]  # offset, bytes, first line's number, sha256


def scan(path: str, flag: str) -> tuple[str, list[Part]]:
    """(sha256 of the file, its parts of about CHUNK bytes), in one pass."""
    check_file(path, flag)
    open_text(path, flag).close()  # its words for what cannot be opened
    digest, parts, offset, line = hashlib.sha256(), [], 0, 1
    with open(path, "rb") as handle:
        while block := handle.read(CHUNK):
            block += handle.readline()
            digest.update(block)
            parts.append((offset, len(block), line, hashlib.sha256(block).digest()))
            offset, line = offset + len(block), line + block.count(b"\n")
    return digest.hexdigest(), parts


def read_record(line: bytes, source: Source, where: str) -> tuple[str | None, str]:
    """(author, content) of one line; None for a record without an author. UserError where it is no record."""
    wanted = f'wanted {{"{source.author_field}": "...", "{source.content_field}": "..."}}'
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        fail(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8")
    except (ValueError, RecursionError):
        fail(f"{where}: not a line of JSON, {wanted}")
    if not isinstance(record, dict):
        fail(f"{where}: not a JSON object, {wanted}")
    for name in (source.author_field, source.content_field):
        if name not in record:
            fail(f"{where}: has no {name!r}, {wanted}; --author_field and --content_field name the fields")
    author, content = record[source.author_field], record[source.content_field]
    for name, value in ((source.author_field, "" if author is None else author), (source.content_field, content)):
        if not isinstance(value, str):
            fail(f"{where}: {name!r} is {json.dumps(value)[:60]}, wanted a string")
        if not is_text(value):
            fail(f"{where}: {name!r} holds half of a surrogate pair, which is not text; mend or remove the line")
    if not content.strip():
        fail(f"{where}: {source.content_field!r} is empty; remove the line")
    return author or None, content


def tokenise(part: Part, source: Source, words: WordTokens) -> tuple:
    """(ids (sum of lengths,), lengths (n,) int32, authors, counts of what was left out or cut) of a part of a file."""
    offset, size, line_number, sha256 = part
    with open(source.path, "rb") as handle:
        handle.seek(offset)
        content = handle.read(size)
    if hashlib.sha256(content).digest() != sha256:
        fail(f"{source.flag} {source.path}: changed while it was read; start again when nothing writes to it any more")
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    pieces, lengths, authors, counts = [], [], [], Counter()
    for number, line in enumerate(lines, start=line_number):
        author, content = read_record(line, source, f"{source.path}:{number}")
        counts["records"] += 1
        if author is None or author in PSEUDO_AUTHORS:
            counts["without_author" if author is None else "pseudo_author"] += 1
            continue
        ids, cut = words.first(content, source.length)
        if len(ids) < 2:
            counts["too_short"] += 1  # a single token: nothing predicts it
            continue
        counts["cut"] += cut
        pieces.append(ids)
        lengths.append(len(ids))
        authors.append(author)
    dtype = token_type(words.tokenizer.vocab_size)
    ids = np.fromiter(chain.from_iterable(pieces), dtype=dtype, count=sum(lengths))
    return ids, np.array(lengths, dtype=np.int32), authors, counts


def token_type(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


worker_state: dict = {}  # of a tokenising process: what it was started with


def start_worker(source: Source) -> None:
    worker_state["tokenise"] = partial(tokenise, source=source, words=WordTokens(load_tokenizer(source.vocab)))


def work(part: Part) -> tuple | UserError:
    try:
        return worker_state["tokenise"](part)
    except UserError as error:
        return error  # to be raised in file order by the parent


def tokenised_parts(parts: list[Part], source: Source, processes: int) -> Iterator[tuple | UserError]:
    """tokenise() of every part, in order, on several processes where there are several parts."""
    if len(parts) < 2 or processes < 2:
        start_worker(source)
        yield from map(work, parts)
        return
    # Forked, so that they start at once: they only parse and count, and touch neither the GPU nor the process group.
    with multiprocessing.get_context("fork").Pool(min(processes, len(parts)), start_worker, (source,)) as pool:
        yield from pool.imap(work, parts)


# ------------------------------------------------------------------ the cache


@dataclass
class Corpus:
    """A tokenised corpus, its texts ordered by author.

    tokens  (sum of lengths,) uint16 or int32, a memory map in file order
    starts, lengths  (n,) int64 and int32, by author
    first   (A + 1,) int64: the texts of author a are first[a] .. first[a + 1] - 1
    keys    (A,) uint64, a digest of each author's name
    facts   "sha256" of the file, "vocab_size", and counts: "records", "without_author", "pseudo_author", "too_short",
            "cut"
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    first: np.ndarray
    keys: np.ndarray
    facts: dict

    @property
    def texts(self) -> int:
        return len(self.starts)

    def authors_texts(self, authors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(indices of all texts of `authors`, how many each of them has)."""
        sizes = np.diff(self.first)[authors]
        return spread(self.first[authors], sizes), sizes

    def by_author(self, authors: np.ndarray, samples: int, seed: int) -> "AuthorTexts":
        """These authors as units."""
        texts, sizes = self.authors_texts(authors)
        first = np.concatenate([[0], np.cumsum(sizes)])
        keys = self.keys[authors]
        return AuthorTexts(self.tokens, self.starts[texts], self.lengths[texts], first, keys, samples, seed)

    def by_text(self, authors: np.ndarray) -> "AuthorTexts":
        """Every text of these authors as a unit of its own, for evaluation."""
        texts, sizes = self.authors_texts(authors)
        keys = np.repeat(self.keys[authors], sizes)
        return AuthorTexts(self.tokens, self.starts[texts], self.lengths[texts], np.arange(len(texts) + 1), keys, 1, 0)


def spread(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (sizes[0] of them), starts[1], ...: (sum of sizes,) int64."""
    return np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())


def name_key(author: str) -> int:
    return int.from_bytes(hashlib.sha256(author.encode()).digest()[:8], "little")


def digest_vocab(folder: str) -> str:
    digest = hashlib.sha256()
    try:
        for name in ("encoder.json", "vocab.bpe"):
            with open(os.path.join(folder, name), "rb") as handle:
                digest.update(handle.read())
    except OSError:
        load_tokenizer(folder)  # its words for a file that is missing
        raise
    return digest.hexdigest()


def prepare_cache(source: Source, cache_dir: str | None, processes: int | None = None) -> str:
    """The folder of the corpus's cache, made where it is not there. cache_dir None: beside the file. processes None:
    one for each core, up to PROCESSES.

    Raises UserError with file:line for a line that is no record.
    """
    sha256, parts = scan(source.path, source.flag)
    key = json.dumps([FORMAT, sha256, digest_vocab(source.vocab), source.length, source.author_field,
                      source.content_field])
    name = f"{os.path.splitext(os.path.basename(source.path))[0]}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
    cache_dir = cache_dir or os.path.join(os.path.dirname(os.path.abspath(source.path)), ".author_cache")
    folder = os.path.join(cache_dir, name)
    if os.path.isdir(folder):
        return folder
    # Not by the process id: in containers that share a disk, and after a kill, another one may have had the same.
    aside = f"{folder}.{secrets.token_hex(8)}.partial"
    try:
        os.makedirs(aside)
    except OSError as error:
        fail(f"--cache_dir {cache_dir}: cannot be written ({error.strerror}); name another folder for the tokens")
    try:
        write_cache(aside, source, sha256, parts, processes or min(PROCESSES, len(os.sched_getaffinity(0))))
        os.rename(aside, folder)
    except OSError as error:
        if not os.path.isdir(folder):  # else another run was quicker, with the same content
            fail(f"--cache_dir {cache_dir}: cannot be written ({error.strerror}); make room or name another folder")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def write_cache(folder: str, source: Source, sha256: str, parts: list, processes: int) -> None:
    facts: Counter = Counter(records=0, without_author=0, pseudo_author=0, too_short=0, cut=0)
    numbers: dict[str, int] = {}  # author -> number, by first appearance
    owners, lengths = [], []
    vocab_size = load_tokenizer(source.vocab).vocab_size
    bar = tqdm(desc=f"tokenise {source.path}", total=sum(size for _, size, *_ in parts), unit="B", unit_scale=True,
               disable=not sys.stderr.isatty())
    with atomic_write(os.path.join(folder, "tokens.bin"), "wb") as out, bar:
        for (_, size, *_), result in zip(parts, tokenised_parts(parts, source, processes)):
            if isinstance(result, UserError):
                raise result
            ids, part_lengths, authors, counts = result
            out.write(ids.tobytes())
            lengths.append(part_lengths)
            owners.append(np.array([numbers.setdefault(author, len(numbers)) for author in authors], dtype=np.int64))
            facts.update(counts)
            bar.update(size)
    if not numbers:
        left_out = f" ({describe_left_out(facts)})" if facts["records"] else ""
        fail(f"{source.flag} {source.path}: holds no text with an author{left_out}")
    lengths, owners = np.concatenate(lengths), np.concatenate(owners)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    order = np.argsort(owners, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(numbers)))])
    keys = np.array([name_key(author) for author in numbers], dtype=np.uint64)
    with atomic_write(os.path.join(folder, "index.npz"), "wb") as out:
        np.savez(out, starts=starts[order], lengths=lengths[order], first=first, keys=keys)
    with atomic_write(os.path.join(folder, "facts.json")) as out:
        json.dump({"sha256": sha256, "vocab_size": vocab_size, **facts}, out)


def open_cache(folder: str) -> Corpus:
    """The corpus in a cache. Its tokens stay on disk: the pages in use are shared by all processes of a machine."""
    try:
        with open(os.path.join(folder, "facts.json"), encoding="utf-8") as handle:
            facts = json.load(handle)
        with np.load(os.path.join(folder, "index.npz"), allow_pickle=False) as index:
            arrays = {name: index[name] for name in ("starts", "lengths", "first", "keys")}
        tokens = np.memmap(os.path.join(folder, "tokens.bin"), dtype=token_type(facts["vocab_size"]), mode="r")
    except (OSError, ValueError, KeyError) as error:
        fail(f"{folder}: a damaged cache, or one that this machine does not see ({type(error).__name__}); remove the "
             "folder, or name one with --cache_dir that all machines share")
    if len(tokens) != arrays["lengths"].sum(dtype=np.int64):
        fail(f"{folder}: a damaged cache (tokens.bin is not as long as index.npz says); remove the folder")
    return Corpus(tokens, **arrays, facts=facts)


def describe_left_out(facts: dict) -> str:
    return (f"left out: {facts['without_author']} records without an author, {facts['pseudo_author']} of "
            f"{' and '.join(PSEUDO_AUTHORS)}, {facts['too_short']} of a single token")


# ------------------------------------------------------------------ draws


def scramble(label: str, numbers: np.ndarray) -> np.ndarray:
    """A uint64 for each of `numbers` (uint64), as good as random and a function of `label` and the number alone:
    the output function of SplitMix64 (Steele, Lea and Flood, 2014) at a place that the label's digest chooses."""
    base = np.uint64(int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little"))
    z = base + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def split_authors(keys: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training authors, held-out authors), ascending. Each is held out with probability `fraction`, by the digest of
    the name and the seed: whoever else is there. (Of a fixed count, an author who is added would push another one into
    the training data, and neighbouring data would differ by two authors.)"""
    held_out = scramble(f"held out {seed}", keys) < fraction * 2.0**64
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


@dataclass
class AuthorTexts:
    """Units that are authors, each with one text or more. Fields as in Corpus; the texts are renumbered from 0.

    samples: K, the texts that an author contributes to a step, or all where there are fewer, drawn without replacement.
    seed: of the draws of texts. They are no secret of the privacy plan, which decides which *authors* take part.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    first: np.ndarray
    keys: np.ndarray
    samples: int
    seed: int
    used: np.ndarray = field(init=False)  # (n,) bool: texts that a step of this process drew; never written anywhere

    def __post_init__(self):
        self.used = np.zeros(len(self.starts), dtype=bool)

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def sizes(self) -> np.ndarray:
        """(A,) int64, texts of each author."""
        return np.diff(self.first)

    def draw(self, units: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The texts of `units` (U,) in `step`: (texts by author, how many of each author (U,)).

        A function of seed, step and the author's own texts: the same whatever rank, process or attempt draws, and
        whichever other authors there are. (The seed is public: were a draw to shift when an author is added, the
        others' contributions would change too, and the sum move by more than C.)
        """
        sizes = self.sizes[units]
        texts = spread(self.first[units], sizes)
        owners = np.repeat(np.arange(len(units)), sizes)
        place = np.arange(len(texts)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # of a text among its author's
        numbers = self.keys[units][owners] + place.astype(np.uint64)
        order = np.lexsort((scramble(f"texts {self.seed} {step}", numbers), owners))
        return texts[order][place < self.samples], np.minimum(sizes, self.samples)

    @property
    def inputs(self) -> np.ndarray:
        """(n,) of each text: tokens for which a state is computed, all but the last."""
        return np.maximum(self.lengths - 1, 1)

    def micro_batches(self, units: Tensor, cut: Cut, step: int = 0) -> Iterator[MicroBatch]:
        """Cut `units` (int64) into micro-batches: authors with equally many texts go together, so that no row is empty,
        shortest first; an author's length is that of the longest text drawn."""
        if not len(units):
            return
        texts, counts = self.draw(units.numpy(), step)
        self.used[texts] = True
        begins = np.cumsum(counts) - counts
        longest = np.maximum.reduceat(self.inputs[texts], begins)
        for K in np.unique(counts):
            alike = np.flatnonzero(counts == K)
            alike = alike[np.argsort(longest[alike], kind="stable")]
            for group, T in cut.groups(longest[alike], int(K)):
                rows = texts[(begins[alike[group]][:, None] + np.arange(K)).ravel()]
                first_scored = np.ones(len(rows), dtype=np.int64)  # a text's first token is predicted from nothing
                yield collate(self.tokens, self.starts[rows], self.lengths[rows], first_scored, T, int(K))

    def never_used(self, q: float, steps: int, amplified: bool) -> float:
        """Texts that `steps` steps with probability q are expected to leave unused.

        amplified: authors are drawn independently in each step (Poisson), not once an epoch.
        """
        sizes = self.sizes
        share = np.minimum(self.samples / sizes, 1.0)
        kept = (1 - q * share) ** steps if amplified else (1 - share) ** (q * steps)
        return float((sizes * kept).sum())
