"""A corpus of authors' texts, tokenised once, in parallel, into a memory map.

A line of a corpus is {"author": "...", "content": "..."}; author_name() says which names are one author. The cache of a
corpus is a folder named by the digest of what went into it (the file, the vocabulary, the length), so a changed file or
vocabulary has another folder. It is made aside and renamed: whole or not there.

Shapes: n texts, A authors.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import sys
import unicodedata
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import Connection

import numpy as np
from tqdm import tqdm

from base import signals
from base.errors import fail
from base.files import atomic_write, check_file, decode_line, is_text, open_text
from corpus.authors import Corpus
from corpus.tokenizer import Tokenizer, load_tokenizer, vocabulary_files

PSEUDO_AUTHORS = ("[deleted]", "AutoModerator")
FORMAT = 2  # of the cache; another number makes every older cache void
CHUNK = 1 << 23  # bytes of the corpus that a process tokenises at a time
CACHED_WORDS = 1 << 18  # these cover 98 % of the words of an English corpus, in about 70 MB a process
PROCESSES = 8  # most that tokenise at once: with some 120 MB each they stay under 1 GB on a machine of many cores
# Splits a text without changing a token: a space behind something that is no space always begins a new piece of GPT-2's
# pre-tokenisation, so the tokens of a text are those of its words, one after the other.
WORDS = re.compile(r"(?<=\S)(?= )")
# Characters that show nothing, beside white space and those of the categories Cc and Cf: Unicode's
# Default_Ignorable_Code_Point, and the blank Braille pattern.
BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]")


# ------------------------------------------------------------------ from a file to tokens


class WordTokens(dict):
    """word -> its ids, encoded when first met.

    A dictionary answers faster than a tokenizer. The first L tokens of a text lie in its first L words, so the rest is
    never encoded. On texts of 1,400 characters cut to 128 tokens this takes 0.07 ms a text, the tokenizer alone 0.70 ms
    (one core).
    """

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
    vocab: str  # folder of the vocabulary
    length: int  # longer texts are cut to so many tokens
    author_field: str = "author"
    content_field: str = "content"


Part = tuple[int, int, int, bytes]  # offset, bytes, first line's number, sha256


def scan(path: str, flag: str) -> tuple[str, list[Part]]:
    """(sha256 of the file, its parts of about CHUNK bytes), in one pass."""
    check_file(path, flag)
    open_text(path, flag).close()  # a UserError for a file that cannot be opened
    digest, parts, offset, line = hashlib.sha256(), [], 0, 1
    with open(path, "rb") as handle:
        while block := handle.read(CHUNK):
            block += handle.readline()
            digest.update(block)
            parts.append((offset, len(block), line, hashlib.sha256(block).digest()))
            offset, line = offset + len(block), line + block.count(b"\n")
    return digest.hexdigest(), parts


def read_record(line: str, source: Source, where: str) -> tuple[str | None, str]:
    """(author, content) of one line; None for a record without an author. UserError where it is no record."""
    wanted = f'wanted {{"{source.author_field}": "...", "{source.content_field}": "..."}}'
    try:
        record = json.loads(line)
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
            fail(f"{where}: {name!r} holds half of a surrogate pair, which is not text; correct or remove the line")
    if not content.strip():
        fail(f"{where}: {source.content_field!r} is empty; remove the line")
    return author, content


def author_name(written: str | None) -> str | None:
    """The name under which an author counts; None for none. One person must not be two units, so names that no reader
    can tell apart are one: in either Unicode form (NFC, NFD), with other white space, or with characters that show
    nothing."""
    if written is None or (written.isascii() and written.isprintable() and " " not in written):
        return written or None
    shown = "".join(
        letter
        for letter in written
        if letter.isspace() or not (unicodedata.category(letter) in ("Cc", "Cf") or BLANK.match(letter))
    )
    return " ".join(unicodedata.normalize("NFC", shown).split()) or None


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
    pieces, lengths, authors = [], [], []
    counts: Counter[str] = Counter()
    for number, line in enumerate(lines, start=line_number):
        written, content = read_record(decode_line(line, source.path, number), source, f"{source.path}:{number}")
        author = author_name(written)
        counts["records"] += 1
        if author is None or author in PSEUDO_AUTHORS:
            counts["without_author" if author is None else "pseudo_author"] += 1
            continue
        ids, cut = words.first(content, source.length)
        if len(ids) < 2:
            counts["too_short"] += 1  # a single token: nothing predicts it
            continue
        counts["cut"] += cut
        counts["respelled"] += author != written
        pieces.append(ids)
        lengths.append(len(ids))
        authors.append(author)
    dtype = token_type(words.tokenizer.vocab_size)
    tokens: np.ndarray = np.fromiter(chain.from_iterable(pieces), dtype=dtype, count=sum(lengths))
    return tokens, np.array(lengths, dtype=np.int32), authors, counts


def token_type(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def work(parts: list[Part], source: Source) -> Iterator[tuple | Exception]:
    """tokenise() of every part, or the error that it met."""
    words = WordTokens(load_tokenizer(source.vocab))
    for part in parts:
        try:
            yield tokenise(part, source, words)
        except Exception as error:  # raised by write_cache(), in file order
            yield error


def serve(parts: list[Part], source: Source, out: Connection, others: list[Connection]) -> None:
    """A tokenising process: send the results of its parts to `out`. others: the parent's ends of pipes."""
    for number in (*signals.URGENT, *signals.WARNINGS):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)  # the script's handlers would raise SystemExit somewhere in here
    for connection in others:  # open here, they would hide that the parent is gone
        connection.close()
    try:
        for result in work(parts, source):
            out.send(result)
    except BrokenPipeError:  # the parent has ended
        pass


def tokenised_parts(parts: list[Part], source: Source, processes: int) -> Generator[tuple | Exception]:
    """tokenise() of every part, in order, on several processes where there are several parts.

    Process k of P takes the parts k, k + P, k + 2 P, ... and has a pipe of its own. Nothing is shared, so the death of
    one is seen at once and can block nobody. multiprocessing's Pool waits for ever for a worker that died, and now and
    then for its own end (a signal that comes before a wait for a lock does not interrupt that wait).
    """
    count, started, pipes = min(processes, len(parts)), [], []
    try:
        if count > 1:
            try:
                # Forked, so that they start at once: they only parse and count, and touch neither the GPU nor the ranks
                context = multiprocessing.get_context("fork")
                for k in range(count):
                    receiver, sender = context.Pipe(duplex=False)
                    pipes.append(receiver)
                    with sender:
                        arguments = (parts[k::count], source, sender, pipes)
                        worker = context.Process(target=serve, args=arguments, daemon=True)
                        worker.start()
                    started.append(worker)
            except OSError as error:  # no more processes or open files
                for worker in started:
                    worker.kill()
                why = error.strerror or error
                print(f"WARNING: one process tokenises {source.path}, no more can be started ({why})", file=sys.stderr)
        if len(started) < max(count, 2):
            yield from work(parts, source)
            return
        for number in range(len(parts)):
            try:
                yield pipes[number % count].recv()
            except EOFError:
                started[number % count].join()
                status = started[number % count].exitcode
                fail(
                    f"{source.flag} {source.path}: a process that tokenised it ended with status {status}; was it "
                    "killed, or was no memory left? Start again"
                )
    finally:
        for receiver in pipes:
            receiver.close()
        for worker in started:
            worker.kill()  # at the end all are done, and after an error what they do is of no use
            worker.join()


# ------------------------------------------------------------------ the cache


def name_key(author: str) -> int:
    return int.from_bytes(hashlib.sha256(author.encode()).digest()[:8], "little")


def digest_vocab(folder: str) -> str:
    digest = hashlib.sha256()
    try:
        for path in vocabulary_files(folder):
            with open(path, "rb") as handle:
                digest.update(handle.read())
    except OSError:
        load_tokenizer(folder)  # a UserError for a file that is missing
        raise
    return digest.hexdigest()


def prepare_cache(source: Source, cache_dir: str | None, processes: int | None = None) -> str:
    """The folder of the corpus's cache, made where it is not there. cache_dir None: beside the file. processes None:
    one for each core, up to PROCESSES.

    Raises UserError with file:line for a line that is no record.
    """
    sha256, parts = scan(source.path, source.flag)
    key = json.dumps(
        [FORMAT, sha256, digest_vocab(source.vocab), source.length, source.author_field, source.content_field]
    )
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
    facts: Counter = Counter(records=0, without_author=0, pseudo_author=0, too_short=0, cut=0, respelled=0)
    numbers: dict[str, int] = {}  # author -> number, by first appearance
    owners, lengths = [], []
    vocab_size = load_tokenizer(source.vocab).vocab_size
    bar = tqdm(
        desc=f"tokenise {source.path}",
        total=sum(size for _, size, *_ in parts),
        unit="B",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
    )
    results = contextlib.closing(tokenised_parts(parts, source, processes))
    with atomic_write(os.path.join(folder, "tokens.bin"), "wb") as out, bar, results as found:
        for (_, size, *_), result in zip(parts, found, strict=True):
            if isinstance(result, Exception):
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
        why = getattr(error, "strerror", None) or type(error).__name__
        fail(
            f"{folder}: a damaged cache, or one that this machine does not see or cannot map ({why}); remove the "
            "folder, or name one with --cache_dir that all machines share"
        )
    if len(tokens) != arrays["lengths"].sum(dtype=np.int64):
        fail(f"{folder}: a damaged cache (tokens.bin is not as long as index.npz says); remove the folder")
    return Corpus(tokens, **arrays, facts=facts)


def describe_left_out(facts: dict) -> str:
    alike = f"; {facts['respelled']} texts have an author whose name holds needless spaces, characters that show "
    alike += "nothing or another Unicode form, and count under the plain name"
    return (
        f"left out: {facts['without_author']} records without an author, {facts['pseudo_author']} of "
        f"{' and '.join(PSEUDO_AUTHORS)}, {facts['too_short']} of a single token{alike if facts['respelled'] else ''}"
    )
