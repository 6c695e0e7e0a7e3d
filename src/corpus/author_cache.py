"""A corpus of texts, tokenised once, in parallel, into a memory map.

corpus/records.py says what a line is. The cache of a corpus is a folder named by the digest of what went into it (the
file, the vocabulary, the length, the fields), so a changed file or vocabulary has another folder. It is made aside and
renamed: whole or not there.

Shapes: n texts, A authors, or other units.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from itertools import chain
from multiprocessing.connection import Connection

import numpy as np
from tqdm import tqdm

from base import signals
from base.errors import fail
from base.files import atomic_write, check_file, decode_line, open_text
from corpus.authors import Corpus
from corpus.records import (
    PSEUDO_AUTHORS,
    Source,
    WordTokens,
    check_tokenizer,
    pair_ids,
    prefix_of,
    read_record,
    text_ids,
    with_form,
)
from corpus.tokenizer import digest_vocab, load_tokenizer

FORMAT = 2  # of the cache; another number makes every older cache void
CHUNK = 1 << 23  # bytes of the corpus that a process tokenises at a time
PROCESSES = 8  # most that tokenise at once: with some 120 MB each they stay under 1 GB on a machine of many cores


# ------------------------------------------------------------------ from a file to tokens


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


def tokenise(part: Part, source: Source, words: WordTokens) -> tuple:
    """(ids (sum of lengths,), lengths and first scored tokens (n,) int32, units, counts of what was left out or cut) of
    a part of a file."""
    offset, size, line_number, sha256 = part
    with open(source.path, "rb") as handle:
        handle.seek(offset)
        content = handle.read(size)
    if hashlib.sha256(content).digest() != sha256:
        fail(f"{source.flag} {source.path}: changed while it was read; start again when nothing writes to it any more")
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    pieces, lengths, scored, units = [], [], [], []
    counts: Counter[str] = Counter()
    for number, line in enumerate(lines, start=line_number):
        record = read_record(decode_line(line, source.path, number), source, f"{source.path}:{number}")
        counts["records"] += 1
        if record.unit is None or (source.unit_field is None and record.unit in PSEUDO_AUTHORS):
            counts["without_author" if record.unit is None else "pseudo_author"] += 1
            continue
        before = prefix_of(source.prompt_fields, record.fields) + (record.texts[0] if source.pairs else "")
        if source.pairs or source.prompt_fields:
            ids, first, cut = pair_ids(before, record.texts[-1], source.length, words)
        else:
            ids, first, cut = text_ids(record.texts[0], source.length, words)
        if len(ids) <= first:
            counts["too_short"] += 1  # a single token, which nothing predicts, or a prompt that leaves no room
            continue
        counts["cut"] += cut
        counts["respelled"] += record.respelled
        pieces.append(ids)
        lengths.append(len(ids))
        scored.append(first)
        units.append(record.unit)
    dtype = token_type(words.tokenizer.vocab_size)
    tokens: np.ndarray = np.fromiter(chain.from_iterable(pieces), dtype=dtype, count=sum(lengths))
    return tokens, np.array(lengths, dtype=np.int32), np.array(scored, dtype=np.int32), units, counts


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


def prepare_cache(source: Source, cache_dir: str | None, processes: int | None = None) -> str:
    """The folder of the corpus's cache, made where it is not there. cache_dir None: beside the file. processes None:
    one for each core, up to PROCESSES.

    Raises UserError with file:line for a line that is no record.
    """
    sha256, parts = scan(source.path, source.flag)
    source = with_form(source)
    fields: list = [source.author_field, source.content_field, source.unit_field, source.pairs]
    fields += [list(source.prompt_fields)] * bool(source.prompt_fields)
    made_of = [FORMAT, sha256, digest_vocab(source.vocab), source.length, *fields]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    name = f"{os.path.splitext(os.path.basename(source.path))[0]}-{key[:20]}"
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
    keys: list[int] = []
    owners, lengths, scored = [], [], []
    tokenizer = load_tokenizer(source.vocab)
    check_tokenizer(tokenizer, source)
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
            ids, part_lengths, part_scored, units, counts = result
            out.write(ids.tobytes())
            lengths.append(part_lengths)
            scored.append(part_scored)
            if source.owner_field is None:  # lines that are alike are units of their own
                owners.append(np.arange(len(units), dtype=np.int64) + len(keys))
                keys += map(name_key, units)
            else:
                owners.append(np.array([numbers.setdefault(unit, len(numbers)) for unit in units], dtype=np.int64))
            facts.update(counts)
            bar.update(size)
    keys += map(name_key, numbers)
    if not keys:
        left_out = f" ({describe_left_out(facts, source.unit, source.pairs)})" if facts["records"] else ""
        what = "text with an author" if source.unit == "author" else f"text of a {source.unit}"
        fail(f"{source.flag} {source.path}: holds no {what}{left_out}")
    lengths, owners = np.concatenate(lengths), np.concatenate(owners)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    order = np.argsort(owners, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(keys)))])
    index = {"starts": starts[order], "lengths": lengths[order], "first": first, "keys": np.array(keys, np.uint64)}
    if source.pairs or source.prompt_fields:
        index["scored"] = np.concatenate(scored)[order]
    with atomic_write(os.path.join(folder, "index.npz"), "wb") as out:
        np.savez(out, **index)
    with atomic_write(os.path.join(folder, "facts.json")) as out:
        named = {"unit": source.unit, "pairs": source.pairs}
        json.dump({"sha256": sha256, "vocab_size": tokenizer.vocab_size, **named, **facts}, out)


def open_cache(folder: str) -> Corpus:
    """The corpus in a cache. Its tokens stay on disk: the pages in use are shared by all processes of a machine."""
    try:
        with open(os.path.join(folder, "facts.json"), encoding="utf-8") as handle:
            facts = json.load(handle)
        with np.load(os.path.join(folder, "index.npz"), allow_pickle=False) as index:
            arrays = {name: index[name] for name in ("starts", "lengths", "first", "keys")}
            scored = index.get("scored")
        tokens = np.memmap(os.path.join(folder, "tokens.bin"), dtype=token_type(facts["vocab_size"]), mode="r")
    except (OSError, ValueError, KeyError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        fail(
            f"{folder}: a damaged cache, or one that this machine does not see or cannot map ({why}); remove the "
            "folder, or name one with --cache_dir that all machines share"
        )
    if len(tokens) != arrays["lengths"].sum(dtype=np.int64):
        fail(f"{folder}: a damaged cache (tokens.bin is not as long as index.npz says); remove the folder")
    return Corpus(tokens, **arrays, facts=facts, scored=scored)


def describe_left_out(facts: dict, unit: str = "author", pairs: bool = False) -> str:
    owner = f"{facts['without_author']} records without {'an author' if unit == 'author' else f'a {unit}'}, "
    pseudo = f"{facts['pseudo_author']} of {' and '.join(PSEUDO_AUTHORS)}, "
    short = f"{facts['too_short']} {'whose prompts leave no room' if pairs else 'of a single token'}"
    alike = f"; {facts['respelled']} texts have {'an author' if unit == 'author' else f'a {unit}'} whose name holds "
    alike += "needless spaces, characters that show nothing or another Unicode form, and count under the plain name"
    left_out = f"left out: {'' if unit == 'line' else owner}{pseudo if unit == 'author' else ''}{short}"
    return left_out + (alike if facts["respelled"] else "")
