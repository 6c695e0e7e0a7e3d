"""The cache of tokenised texts: what is read, what it holds, what interrupts it."""

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import string
import sys
from collections import defaultdict

import numpy as np
import pytest

from base.errors import UserError
from corpus import author_cache, records
from corpus.author_cache import open_cache, prepare_cache
from corpus.records import Source, WordTokens, unit_name
from corpus.tokenizer import load_tokenizer
from helpers.processes import ROOT

VOCAB = ROOT / "vocab" / "demo"


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prose(draw: random.Random, words: int) -> str:
    return " ".join("".join(draw.choices(string.ascii_lowercase, k=draw.randint(1, 7))) for _ in range(words))


def some_records(count: int, authors: int, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    return [{"author": f"a{draw.randrange(authors)}", "content": prose(draw, draw.randint(2, 30)), "other": 1}
            for _ in range(count)]


def source(path, length=16, **fields) -> Source:
    return Source(str(path), "--train_file", str(VOCAB), length, **fields)


def texts_by_author(corpus) -> dict[int, list[tuple]]:
    """key of the author -> the token lists of their texts, in file order."""
    found = {}
    for a, key in enumerate(corpus.keys):
        starts, lengths = (array[corpus.first[a]:corpus.first[a + 1]] for array in (corpus.starts, corpus.lengths))
        found[int(key)] = [tuple(corpus.tokens[i:i + n].tolist()) for i, n in zip(starts, lengths)]
    return found


# ------------------------------------------------------------------ tokens


@pytest.mark.parametrize("length", [2, 7, 300])
def test_the_first_tokens_of_a_text_are_the_tokenizers(length):
    """Also with doubled, leading, trailing and exotic spaces, where words are cut; a wrong cut changes some token."""
    tokenizer = load_tokenizer(str(VOCAB))
    words = WordTokens(tokenizer)
    draw = random.Random(1)
    alphabet = ["the", "near", "it's", "I'll", "a", "\u00e9t\u00e9", "12", "...", "?!", "\U0001f600", "\u4e2d\u6587"]
    spaces = [" "] * 6 + ["  ", "   ", "\n", " \n", "\n ", "\t", "\u00a0", "\u2003 ", "\x1c ", "\u200b ", "\x85 ",
                          "\r\n", ""]
    for _ in range(2000):
        text = "".join(draw.choice(spaces) + draw.choice(alphabet) for _ in range(draw.randint(0, 12)))
        text += draw.choice(spaces)
        whole = tokenizer.encode(text)
        assert words.first(text, length) == (whole[:length], len(whole) > length), repr(text)


def test_a_space_begins_a_piece_after_every_character():
    """The one fact that WORDS rests on, for every character that could be a space to somebody."""
    tokenizer = load_tokenizer(str(VOCAB))
    for code in itertools.chain(range(1, 0x3100), range(0xfe00, 0x10000)):
        text = f"a{chr(code)} b"
        pieces = records.WORDS.split(text)
        assert sum((tokenizer.encode(piece) for piece in pieces), []) == tokenizer.encode(text), hex(code)


def test_a_full_memory_of_words_changes_nothing(monkeypatch):
    tokenizer = load_tokenizer(str(VOCAB))
    text = prose(random.Random(0), 50)
    monkeypatch.setattr(records, "CACHED_WORDS", 3)
    words = WordTokens(tokenizer)
    assert words.first(text, 1000)[0] == tokenizer.encode(text) and len(words) == 3


# ------------------------------------------------------------------ the cache


@pytest.mark.parametrize("processes, chunk", [(1, 1 << 23), (2, 2000), (3, 1)])
def test_the_cache_holds_the_corpus(tmp_path, monkeypatch, processes, chunk):
    """Every author's texts, cut, in order, however many processes made it; what is left out is counted."""
    monkeypatch.setattr(author_cache, "CHUNK", chunk)
    others = [(None, "nobody"), ("", "nobody"), ("[deleted]", "gone"), ("AutoModerator", "a bot"), ("short", "!"),
              ("\u00e9\u4e2d", "the last line here")]
    lines = some_records(300, 40) + [{"author": author, "content": content} for author, content in others]
    path = write(tmp_path / "train.jsonl", lines)
    path.write_text(path.read_text().rstrip("\n"))  # the last line without its end
    corpus = open_cache(prepare_cache(source(path), None, processes))
    tokenizer, expected, cut = load_tokenizer(str(VOCAB)), defaultdict(list), 0
    for record in lines[:300] + lines[305:]:
        ids = tokenizer.encode(record["content"])
        cut += len(ids) > 16
        expected[author_cache.name_key(record["author"])].append(tuple(ids[:16]))
    assert texts_by_author(corpus) == expected
    wanted = {"records": 306, "without_author": 2, "pseudo_author": 2, "too_short": 1, "cut": cut}
    assert {name: corpus.facts[name] for name in wanted} == wanted
    assert 0 < cut < 300


@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5, 6])
def test_a_full_disk_leaves_no_cache(tmp_path, monkeypatch, nth):
    """ENOSPC from each write or flush of a file or folder: one line that names the cure, nothing is left behind."""
    path, left, real = write(tmp_path / "train.jsonl", some_records(50, 9)), [nth], os.fsync

    def fsync(handle):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="--cache_dir .*No space left on device.*make room"):
        prepare_cache(source(path), str(tmp_path / "cache"), 1)
    assert left == [0] and not list((tmp_path / "cache").iterdir())
    assert len(open_cache(prepare_cache(source(path), str(tmp_path / "cache"), 1)).first) == 10


@pytest.mark.parametrize("name, number", [("fork", errno.EAGAIN), ("fork", errno.ENOMEM), ("pipe", errno.EMFILE)])
@pytest.mark.parametrize("nth", [1, 2])
def test_where_no_process_can_be_added_one_tokenises(tmp_path, monkeypatch, capsys, name, number, nth):
    """No more processes, memory or open files, for the first or the second: not the fault of --cache_dir. Semaphores,
    which need /dev/shm, are not used."""
    left, real = [nth], getattr(os, name)

    def refuse(*arguments):
        left[0] -= 1
        if left[0] < 1:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    monkeypatch.setattr(author_cache, "CHUNK", 1000)
    path = write(tmp_path / "train.jsonl", some_records(50, 9))
    usual = texts_by_author(open_cache(prepare_cache(source(path), str(tmp_path / "several"), 2)))
    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", None)
    monkeypatch.setattr(os, name, refuse)
    alone = texts_by_author(open_cache(prepare_cache(source(path), str(tmp_path / "one"), 2)))
    assert alone == usual
    err = capsys.readouterr().err
    assert err.count("WARNING") == 1 and f"no more can be started ({os.strerror(number)})" in err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_dies_is_told(tmp_path, monkeypatch, number):
    """As where no memory is left: the system kills one, and nobody waits for what it would have said. A handler of the
    script's, here one that does nothing, is not the process's."""
    path, real = write(tmp_path / "train.jsonl", some_records(200, 9)), author_cache.read_record

    def killed(line, source, where):
        if where.endswith(":100"):
            os.kill(os.getpid(), number)
        return real(line, source, where)

    monkeypatch.setattr(author_cache, "CHUNK", 500)
    monkeypatch.setattr(author_cache, "read_record", killed)
    with handled(signal.SIGTERM, lambda *_: None), handled(signal.SIGALRM, give_up):
        signal.alarm(60)
        with pytest.raises(UserError, match=f"--train_file .*that tokenised it ended with status -{number}.*memory"):
            prepare_cache(source(path), None, 2)
        signal.alarm(0)
    assert not multiprocessing.active_children() and os.listdir(tmp_path / ".author_cache") == []


@contextlib.contextmanager
def handled(number, handler):
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def give_up(number, frame):
    raise AssertionError("hangs")


@pytest.mark.slow
def test_many_corpora_one_after_the_other_are_tokenised(tmp_path, monkeypatch):
    """One of some 100 pools of multiprocessing's never ended."""
    monkeypatch.setattr(author_cache, "CHUNK", 1 << 12)
    path = write(tmp_path / "train.jsonl", some_records(500, 9))
    with handled(signal.SIGTERM, lambda number, frame: sys.exit(128 + number)), handled(signal.SIGALRM, give_up):
        signal.alarm(600)
        for _ in range(300):
            shutil.rmtree(prepare_cache(source(path), None, 2))
        signal.alarm(0)


ALIKE = ["Zo\u00eb M", "Zoe\u0308 M", "Zo\u00eb  M", " Zo\u00eb M\n", "Zo\u00eb\u00a0M", "\ufeffZo\u00eb M",
         "Zo\u00eb M\u200b",
         "Zo\u00ad\u00eb M", "Zoe\u200d\u0308 M", "Zo\u00eb\ufe0f M", "Zo\u00eb M\x00", "\u202aZo\u00eb M\u202c",
         "Zo\u00eb\t\u3000M", "Zo\u00eb \u2065M", "Zo\u00eb M\ufff0"]


def test_names_that_look_alike_are_one_author(tmp_path):
    """Else one person has several units, and epsilon holds for each of them alone."""
    others = ["Zo\u00eb", "zo\u00eb m", "Zoe M", "Zo\u00ebM", "Z\u00f6e M"]
    nameless = ["", None, " ", "\u200b", "\u3164 \x00", "\u2800"]
    path = write(tmp_path / "train.jsonl", [{"author": author, "content": "the food is good"}
                                            for author in ALIKE + others + nameless + ["[deleted] "]])
    corpus = open_cache(prepare_cache(source(path), None))
    assert sorted(np.diff(corpus.first).tolist(), reverse=True) == [len(ALIKE)] + [1] * len(others)
    facts = corpus.facts
    assert (facts["without_author"], facts["pseudo_author"], facts["respelled"]) == (len(nameless), 1, len(ALIKE) - 1)
    assert f"; {len(ALIKE) - 1} texts have an author" in author_cache.describe_left_out(facts)


@pytest.mark.parametrize("name", ["spez", "John Smith", "Zo\u00eb", "\u4e2d\u6587", "a-b_c.d", "\U0001f600"])
def test_a_plain_name_is_as_it_is_written(name):
    assert unit_name(name) == name


def test_a_corpus_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    """After its digest, before its texts: the digest would be of what the run does not train on."""
    path, real = write(tmp_path / "train.jsonl", some_records(50, 9)), author_cache.write_cache

    def write_cache(*arguments):
        path.write_text(path.read_text().replace("a", "b", 1))
        real(*arguments)

    monkeypatch.setattr(author_cache, "write_cache", write_cache)
    with pytest.raises(UserError, match="train.jsonl: changed while it was read"):
        prepare_cache(source(path), str(tmp_path / "cache"), 1)
    assert not list((tmp_path / "cache").iterdir())


def test_a_second_start_tokenises_nothing_and_a_change_makes_it_anew(tmp_path, monkeypatch):
    path = write(tmp_path / "train.jsonl", some_records(50, 9))
    made = []
    original = author_cache.write_cache
    monkeypatch.setattr(author_cache, "write_cache", lambda *arguments: (made.append(1), original(*arguments)))
    first = prepare_cache(source(path), None)
    assert prepare_cache(source(path), None) == first and len(made) == 1
    os.utime(path)
    assert prepare_cache(source(path), None) == first and len(made) == 1  # the content counts, not its date

    write(path, some_records(50, 9)[:-1])
    assert prepare_cache(source(path), None) != first and len(made) == 2
    other = tmp_path / "vocab"
    other.mkdir()
    for name in ("encoder.json", "vocab.bpe"):
        (other / name).write_bytes((VOCAB / name).read_bytes() + (b"\n" if name == "encoder.json" else b""))
    changes = (Source(str(path), "", str(other), 16), source(path, length=17), source(path, content_field="author"))
    folders = {first, *(prepare_cache(change, None) for change in changes)}
    assert len(folders) == 4 and len(made) == 5


def test_a_cache_is_whole_or_not_there(tmp_path, monkeypatch):
    path = write(tmp_path / "train.jsonl", some_records(50, 9))
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(author_cache.np, "savez", full_disk)
    with pytest.raises(UserError, match="--cache_dir .*No space left on device"):
        prepare_cache(source(path), None)
    assert os.listdir(tmp_path / ".author_cache") == []
    monkeypatch.undo()
    folder = prepare_cache(source(path), None)
    with open(os.path.join(folder, "tokens.bin"), "r+b") as handle:
        handle.truncate(100)
    with pytest.raises(UserError, match="damaged cache"):
        open_cache(folder)


def test_what_a_killed_run_left_aside_is_no_obstacle(tmp_path):
    """Also not where the killed process had our number, as in containers it often has."""
    path = write(tmp_path / "train.jsonl", some_records(50, 9))
    folder = prepare_cache(source(path), None)
    os.rename(folder, f"{folder}.{os.getpid()}.partial")
    assert prepare_cache(source(path), None) == folder and open_cache(folder).texts == 50


def test_a_machine_of_many_cores_tokenises_with_few_processes(tmp_path, monkeypatch):
    """Each has its own memory of words: 96 of them would take more than 10 GB."""
    asked = []
    monkeypatch.setattr(author_cache.os, "sched_getaffinity", lambda _: set(range(96)))
    monkeypatch.setattr(author_cache, "CHUNK", 100)
    monkeypatch.setattr(author_cache, "tokenised_parts", lambda parts, source, processes: (
        asked.append((len(parts), processes)), author_cache.work(parts, source))[-1])
    prepare_cache(source(write(tmp_path / "train.jsonl", some_records(50, 9))), None)
    (parts, processes), = asked
    assert parts > 20 and processes == author_cache.PROCESSES


BAD = {
    "not JSON": ("{", "not a line of JSON"),
    "a list": ("[1]", "not a JSON object"),
    "no author": ('{"content": "x y"}', "has no 'author'"),
    "no content": ('{"author": "x"}', "has no 'content'"),
    "author is a number": ('{"author": 3, "content": "x y"}', "'author' is 3, wanted a string"),
    "content is null": ('{"author": "x", "content": null}', "'content' is null, wanted a string"),
    "empty": ('{"author": "x", "content": ""}', "'content' is empty"),
    "blank": ('{"author": "x", "content": " \\n"}', "'content' is empty"),
    "half a pair": ('{"author": "x", "content": "a\\ud800b"}', "half of a surrogate pair"),
    "an empty line": ("", "not a line of JSON"),
    "carriage returns": ('{"author": "x", "content": "a b"}\r{"author": "y", "content": "a b"}', "carriage returns"),
    "NUL": ('{"author": "x", "content": "a\0b"}', "holds NUL"),
    "a joined file": ('\ufeff{"author": "x", "content": "a b"}', "byte-order mark"),
}


@pytest.mark.parametrize("line, words", BAD.values(), ids=BAD)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_line_is_named(tmp_path, monkeypatch, line, words, processes):
    """With the file and the line's number, the first of them, also where another process meets it; nothing is left."""
    monkeypatch.setattr(author_cache, "CHUNK", 300)
    good = [json.dumps(record) for record in some_records(40, 5)]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([*good[:20], line, *good[20:], "{", ""]), encoding="utf-8", newline="\n")
    with pytest.raises(UserError) as caught:
        prepare_cache(source(path), None, processes)
    assert f"{path}:21: " in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path / ".author_cache") == []


def test_a_byte_order_mark_is_no_text(tmp_path):
    plain = write(tmp_path / "plain.jsonl", some_records(9, 3))
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n"))
    one, other = (open_cache(prepare_cache(source(path), None)) for path in (plain, tmp_path / "marked.jsonl"))
    assert texts_by_author(one) == texts_by_author(other)


def test_files_that_cannot_be_used(tmp_path):
    empty = write(tmp_path / "empty.jsonl", [])
    deleted = write(tmp_path / "deleted.jsonl", [{"author": "[deleted]", "content": "x y"}])
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"author": "x", "content": "caf\xe9"}\n')
    cases = ((tmp_path / "absent.jsonl", "--train_file"), (tmp_path, "--train_file"),
             (empty, "holds no text with an author"), (deleted, "1 of .deleted. and AutoModerator"),
             (latin, "latin.jsonl:1: not UTF-8"))
    for path, words in cases:
        with pytest.raises(UserError, match=words):
            prepare_cache(source(path), None)
    good = write(tmp_path / "good.jsonl", some_records(3, 2))
    with pytest.raises(UserError, match="--cache_dir"):
        prepare_cache(source(good), str(good))
    with pytest.raises(UserError, match="encoder.json"):
        prepare_cache(Source(str(good), "", str(tmp_path), 16), None)
