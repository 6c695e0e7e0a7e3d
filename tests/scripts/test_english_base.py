"""The corpus of the english base: each source's format, E2E's form, the vocabulary, and nothing of E2E in it."""

import gzip
import hashlib
import io
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import tarfile

import pytest

import english_sources
import make_english_corpus as corpus
from base.errors import UserError
from corpus.tokenizer import load_tokenizer
from english_sources import PACKAGES, Package
from helpers.processes import ROOT

# ---------------------------------------------------------------- the sources' formats


def deb(files: dict[str, bytes]) -> bytes:
    """A .deb with these files, as deb(5) describes it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
    made = b"!<arch>\n"
    for name, content in members.items():
        made += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        made += content + b"\n" * (len(content) % 2)
    return made


def dictd(entries: dict[str, str]) -> tuple[str, bytes]:
    """(index, text) of a dictionary of dictd."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(value: int) -> str:
        return (number(value // 64) if value >= 64 else "") + digits[value % 64]

    index, text = [], b""
    for headword, entry in entries.items():
        index.append(f"{headword}\t{number(len(text))}\t{number(len(entry.encode()))}")
        text += entry.encode()
    return "\n".join([*sorted(index), index[-1].replace("\t", "other\t", 1)]) + "\n", text


def compress(text: bytes) -> bytes:
    """compress(1), with its magic: its codes are forgotten at the end, as at the end of a window of the Bible's."""
    table = {bytes([value]): value for value in range(256)}
    bits, width, group, known = "", 9, 0, 257

    def put(code):
        nonlocal bits, group
        bits = f"{code:0{width}b}" + bits
        group += 1

    def fill():
        nonlocal bits, group
        while group % 8:
            put(0)
        group = 0

    word = b""
    for value in text:
        letter = bytes([value])
        if word + letter in table:
            word += letter
            continue
        put(table[word])
        if known < 1 << 16:
            table[word + letter] = known
            known += 1
            if known - 1 == 1 << width and width < 16:
                fill()
                width += 1
        word = letter
    put(table[word])
    known += 1
    if known - 1 == 1 << width:
        fill()
        width += 1
    put(256)
    fill()
    return b"\x1f\x9d\x90" + int(bits, 2).to_bytes(-(-len(bits) // 8), "little")


LONG = " ".join(f"And {n} begat {n * n % 977} ; and he saw it ." for n in range(1500)).encode()


@pytest.mark.parametrize("text", [b"abababababa", b"a", LONG[:700], LONG])
def test_lzw_is_that_of_gzip(text):
    coded = compress(text)
    oracle = subprocess.run(["gzip", "-dc"], input=coded, capture_output=True)
    assert oracle.stdout == text, oracle.stderr  # the encoder of this test is right
    assert english_sources.lzw(coded[3:]) == text
    if len(text) > 10:
        with pytest.raises(ValueError, match="entries"):
            english_sources.lzw(b"\xff" * len(coded))


def bible(*windows: bytes) -> bytes:
    coded = [compress(window)[3:] for window in windows]
    starts = [92 + 4 * len(coded) + sum(map(len, coded[:number])) for number in range(len(coded))]
    head = b"EC02Compressed Data File".ljust(84, b"\0") + struct.pack(">II", 65536, len(coded))
    return head + struct.pack(f">{len(coded)}I", *starts) + b"".join(coded)


def test_the_chapters_of_the_bible():
    data = bible(b"Holy Bible, Textfile 930105.\nGe1:1 In the beginning.\nGe1:2 And [the] ea", b"rth.\nGe2:1 Thus.\n"
                 b"1Sa3:1 And the child.\n")
    found = list(english_sources.bible_documents({"usr/lib/bible.data": data}))
    assert found == ["In the beginning. And the earth.", "Thus.", "And the child."]


GCIDE = [
    ('Davenport \\Dav"en*port\\, n. [From the name of the original\n   maker. --Encyc. Dict.]\n   A kind of small'
     ' writing table, generally somewhat ornamental.\n   [1913 Webster]\n\n         A much battered davenport in one'
     ' of the windows, at\n         which sat a lady writing.                --A. B.\n'
     '                                                  Edwards.\n   [1913 Webster]\n',
     "Davenport: A kind of small writing table, generally somewhat ornamental. A much battered davenport in one of the "
     "windows, at which sat a lady writing."),
    ("Daviesia \\Daviesia\\ n.\n   a genus of Australasian shrubs having small yellow pods.\n\n   Syn: genus {Davi"
     "esia}.\n        [WordNet 1.5]\n", "Daviesia: a genus of Australasian shrubs having small yellow pods."),
    ("Daw \\Daw\\ (d[add]), n. [OE. dawe; akin to OHG. t[=a]ha. Cf. {Caddow}.] (Zool.)\n   A European bird of the Crow"
     " family ({Corvus monedula}), often\n   nesting in C[ae]sar's towers; a jackdaw.\n   [1913 Webster]\n",
     "Daw: A European bird of the Crow family (Corvus monedula), often nesting in Caesar's towers; a jackdaw."),
    ('Dawdle \\Daw"dle\\ (d[add]"d\'l), v. i. [imp. & p. p. {Dawdled}; p.\n   pr. & vb. n. {Dawdling}.]\n   1. To waste'
     " time in trifling employment. [Obs.] --B. Jonson.\n      [1913 Webster]\n\n   (a) (Naut.) To be slow -- called"
     " also\n       {daddle}.\n", "Dawdle: To waste time in trifling employment. To be slow - called also daddle."),
    ("Dawe \\Dawe\\, n. [See {Day}.]\n   Day. [Obs.] --Chaucer.\n", ""),  # no sentence is left
    ("no headword of this dictionary\n", ""),
]
FOLDOC = [
    ("GECOM%%%gecom\n\n   <language> A language for the {GE-255}, like {report\n   writer (http://x.org/a.html)}.\n"
     "\n   [{Jargon File}]\n\n   (1996-09-15)\n", "GECOM: A language for the GE-255, like report writer."),
    ("gedanken\n\n   /g*-dahn'kn/ Ungrounded; impractical; not well-thought-out.\n\n   x = y + 1; z[2] = 0x7f;\n\n"
     "   Mail <a@b.org> or http://a.b/c for more of it.\n",
     "gedanken: Ungrounded; impractical; not well-thought-out. Mail or for more of it."),
    ("geef\n\n   {mung}.\n", ""),
]
DEVIL = [
    ("FORMA PAUPERIS.  [Latin]  In the character of a poor person -- a\nmethod by which a litigant loses his case.\n\n"
     '    When _Adam_ long ago in court\n' + " " * 60 + "G.J.\n",
     "Forma pauperis: In the character of a poor person -- a method by which a litigant loses his case. When Adam long "
     "ago in court"),
    ("FORK, n.  An instrument used for putting dead animals into the mouth.\n",
     "Fork: An instrument used for putting dead animals into the mouth."),
    ("                              PREFACE\n", ""),
]


@pytest.mark.parametrize("clean, entry, wanted", [
    *((english_sources.clean_gcide, *case) for case in GCIDE),
    *((english_sources.clean_foldoc, *case) for case in FOLDOC),
    *((english_sources.clean_devil, *case) for case in DEVIL),
])
def test_an_entry_without_its_mark_up(clean, entry, wanted):
    assert clean(entry) == wanted


def test_entries_of_dictd_come_once_and_without_those_about_the_dictionary():
    entries = {"00-database-info": "the licence\n", "é": "é: one\n", "b": "b: " + "two " * 100, "a": "a: three\n"}
    index, text = dictd(entries)  # the last entry has two headwords
    assert list(english_sources.dictd_entries(index, text)) == list(entries.values())[1:]


WORDNET = b"""  1 This software and database is being provided to you
00003553 03 n 02 whole 0 unit_of 0 001 @ 00002684 n 0000 | many parts; "how big is it?"; "the team is a unit"
00003993 03 n 01 congener 0 001 @ 00003553 n 0000 | a whole of the same kind; "It is mine"- J. Donne
"""


def test_a_synset_is_its_words_its_gloss_and_its_examples():
    files = {f"usr/share/wordnet/data.{part}": b"" for part in ("verb", "adv")}
    adjective = b"00001740 00 a 01 able(p) 0 000 | having the means  \n"
    found = english_sources.wordnet_documents(
        {**files, "usr/share/wordnet/data.noun": WORDNET, "usr/share/wordnet/data.adj": adjective})
    assert list(found) == [
        "whole, unit of: many parts. How big is it? The team is a unit.",
        "congener: a whole of the same kind. It is mine.",
        "able: having the means.",
    ]


# ---------------------------------------------------------------- E2E's form

TRIPLES = [
    {"subject": "Aarhus_Airport", "property": "cityServed", "object": '"Aarhus, Denmark"'},
    {"subject": "Aarhus", "property": "leaderName", "object": "Jacob_Bundsgaard"},
    {"subject": "Aarhus_Airport", "property": "elevationAboveTheSeaLevel_(in_metres)", "object": "25.0"},
]


def test_facts_as_e2e_writes_them():
    assert corpus.facts(TRIPLES) == (
        "name : Aarhus Airport | city served : Aarhus , Denmark | elevation above the sea level : 25.0 | "
        "name : Aarhus | leader name : Jacob Bundsgaard")


@pytest.mark.parametrize("text, wanted", [
    ("It isn't 25.0 m, or £20-25; it's 'Café X' (the best!).",
     "It isn 't 25.0 m , or £ 20 - 25 ; it 's 'Café X ' ( the best ! ) ."),
    ("  two  spaces\n", "two spaces"),
])
def test_texts_as_e2e_spaces_them(text, wanted):
    assert corpus.tokenised(text) == wanted


def test_the_form_is_that_of_e2e_s_own_lines(shared):
    """E2E's texts, their spaces taken out where punctuation stands, get the same spaces back."""
    lines = (shared / "data/e2e/valid.txt").read_text(encoding="utf-8").splitlines()
    same = 0
    for line in lines:
        context, _, text = line.strip().partition("||")
        for part in (context.replace(" | ", " "), text):
            joined = re.sub(r"(?<=\w) ([.,;:!?])", r"\1", part)
            same += corpus.tokenised(joined) == " ".join(part.split())
    assert same >= 0.97 * 2 * len(lines)


# ---------------------------------------------------------------- the whole program


def entry(number: int) -> str:
    word = f"word{chr(97 + number % 26)}{chr(97 + number // 26 % 26)}"
    return f"{word} \\{word}\\, n.\n   A kind of thing that is number {number} of all these things.\n   [WordNet 1.5]\n"


def write_webnlg(path: pathlib.Path) -> None:
    texts = [{"comment": "good", "lex": "Aarhus Airport serves Aarhus, Denmark."}, {"comment": "bad", "lex": "no"}]
    record = {"category": "Airport", "lexicalisations": texts, "modifiedtripleset": TRIPLES}
    path.write_text(json.dumps({"entries": [{"1": record}, {"2": record}]}))


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A function that runs the program on a package and a WebNLG of its own; the folder that it makes."""
    index, text = dictd({f"w{number}": entry(number) for number in range(400)})
    content = deb({"usr/share/dictd/gcide.index": index.encode(), "usr/share/dictd/gcide.dict.dz": gzip.compress(text)})
    reader = PACKAGES[0].documents
    package = Package("small", "1:2", hashlib.sha256(content).hexdigest(), reader)
    (tmp_path / package.file).write_bytes(content)
    for name in ("train", "dev"):
        write_webnlg(tmp_path / f"{name}.json")
    forms = "".join(json.dumps(one) + "\n" for one in corpus.read_webnlg(str(tmp_path / "train.json"))).encode()
    monkeypatch.setattr(corpus, "FORM_SHA256", dict.fromkeys(corpus.WEBNLG, hashlib.sha256(forms).hexdigest()))
    monkeypatch.setattr(corpus, "read_packages", lambda folder, read=corpus.read_packages: read(folder, (package,)))

    def run(name: str = "out", *flags: str) -> pathlib.Path:
        words = ["--text", tmp_path, "--webnlg", tmp_path, "--out", tmp_path / name, "--size", 300, "--block", 16,
                 "--held_out", 20, *flags]
        monkeypatch.setattr(sys, "argv", ["make_english_corpus", *map(str, words)])
        corpus.main()
        return tmp_path / name

    return run


def ids_of(path: pathlib.Path) -> list[list[int]]:
    return [one["context"] + one["completion"] for one in map(json.loads, path.read_text().splitlines())]


def test_the_blocks_hold_every_document_once(made):
    out = made()
    tokenizer = load_tokenizer(str(out / "vocab"))
    assert tokenizer.vocab_size == 300 and tokenizer.end_of_text == 299
    documents = []
    for part, least in (("train", 379), ("valid", 19)):
        blocks = ids_of(out / f"text_{part}.jsonl")
        assert {len(block) for block in blocks} == {16}
        ids = [token for block in blocks for token in block]
        text = "".join("\n" if token == 299 else tokenizer.decode([token]) for token in ids)
        documents += text.strip().split("\n")
        assert len(text.strip().split("\n")) >= least  # the rest of the last block is left out
    expected = [english_sources.clean_gcide(entry(number)) for number in range(400)]
    assert len(set(documents) & set(expected)) >= 398 and documents != sorted(documents)
    report = json.loads((out / "corpus.json").read_text())
    counted = report["text_train"]
    assert counted["documents"] == 380 and counted["scored_tokens"] == 15 * counted["blocks"]
    texts = [tokenizer.decode([token for token in block[1:] if token != 299])
             for block in ids_of(out / "text_train.jsonl")]
    assert counted["scored_bytes"] == sum(len(text.encode()) for text in texts)


def test_the_forms_are_those_that_gpt2_encode_writes(made, tmp_path, monkeypatch):
    import gpt2_encode

    out = made()
    words = ["--vocab", out / "vocab", "--input", out / "form_train_formatted.jsonl", "--output", tmp_path / "x.jsonl",
             "--add_bos", "--add_eos"]
    monkeypatch.setattr(sys, "argv", ["gpt2_encode.py", *map(str, words)])
    gpt2_encode.main()
    assert (tmp_path / "x.jsonl").read_text() == (out / "form_train.jsonl").read_text()
    mixed = ids_of(out / "mixed_train.jsonl")
    assert mixed[:2] == ids_of(out / "form_train.jsonl") and mixed[2] in ids_of(out / "text_train.jsonl")
    assert len(mixed) == 3


def test_the_same_input_gives_the_same_bytes_and_texts_come_back(made):
    first, second = made("first"), made("second")
    for name in ("vocab/encoder.json", "vocab/vocab.bpe", "text_train.jsonl", "mixed_train.jsonl", "corpus.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    tokenizer = load_tokenizer(str(first / "vocab"))
    for text in ["", "A kind of thing", "\n\n", " Café £ 20 - 25 北京 🙂", "<|endoftext|>"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.end_of_text not in tokenizer.encode(text)


def test_it_reads_nothing_but_what_it_was_given(made, tmp_path):
    """Every file that is opened for reading while it runs lies in --text and --webnlg, here one folder: nothing of
    E2E's can come in. (Files of Python's own are modules.)"""
    opened, watching = [], [False]

    def watch(event, arguments):
        if watching[0] and event == "open" and isinstance(arguments[0], str):
            opened.append((arguments[0], arguments[1]))

    sys.addaudithook(watch)  # stays for good; idle afterwards
    watching[0] = True
    try:
        made()
    finally:
        watching[0] = False
    read = {path for path, mode in opened if mode is None or "r" in mode}
    others = [path for path in read if not path.endswith((".py", ".pyc")) and not path.startswith(str(tmp_path))]
    assert len(read) >= 3 and others == []


@pytest.mark.parametrize("spoil, words", [
    (lambda at: os.unlink(at / "small_1%3a2_all.deb"), ["No such file", "apt-get download small=1:2"]),
    (lambda at: (at / "small_1%3a2_all.deb").write_bytes(b"!<arch>\n"), ["has the sha256", "fetch it again"]),
    (lambda at: (at / "train.json").write_text('{"entries": [{"1": {}}]}'), ["train.json", "modifiedtripleset"]),
    (lambda at: (at / "train.json").write_text('{"entries": []}'), ["train.json", "holds no text"]),
    (lambda at: (at / "dev.json").write_text((at / "dev.json").read_text().replace("serves", "has")),
     ["dev.json", "WebNLG 2017"]),
])
def test_other_files_are_refused(made, tmp_path, spoil, words):
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        made()
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, word", [(b"PK", "no Debian package"), (deb({})[:8], "holds no data.tar")])
def test_what_is_no_package_is_refused(content, word):
    with pytest.raises(UserError, match=word):
        english_sources.unpack(content, "x.deb")


# ---------------------------------------------------------------- nothing of E2E's


def spans(text: str, size: int = 8) -> set[str]:
    """The runs of `size` words, without case and punctuation."""
    words = re.findall(r"[^\W_]+", text.lower())
    return {" ".join(words[start : start + size]) for start in range(len(words) - size + 1)}


@pytest.mark.slow
def test_the_real_corpus_holds_nothing_of_e2e(shared, tmp_path):
    """No line of E2E's, and no run of 8 words of any of its texts and facts, in any document and in WebNLG's form."""
    packages = ROOT / "trained_models/english_pretraining/packages"
    if not all((packages / package.file).exists() for package in PACKAGES):
        packages = tmp_path
        for package in PACKAGES:
            got = subprocess.run(["apt-get", "download", f"{package.name}={package.version}"], cwd=packages,
                                 capture_output=True)
            if got.returncode or not (packages / package.file).exists():
                pytest.skip(f"no {package.name} {package.version} can be downloaded here")
    documents, _ = corpus.read_packages(str(packages))
    forms = {part: corpus.read_webnlg(str(shared / "data/webnlg" / file)) for part, file in corpus.WEBNLG.items()}
    corpus.check_forms(forms)
    base = documents + [one[key] for examples in forms.values() for one in examples for key in one]
    lines = [line.strip().split("||", 1) for part in ("train", "valid", "test")
             for line in (shared / f"data/e2e/{part}.txt").read_text(encoding="utf-8").splitlines()]
    e2e = {text for line in lines for text in line}
    found = set().union(*map(spans, e2e))
    assert not e2e & set(base)
    assert not {span for text in base for span in spans(text)} & found
    assert spans(lines[0][1] + " of") & found  # the test can fail
    assert len(documents) > 240_000 and sum(map(len, documents)) > 40e6  # and there is much to look at
    letters = "".join(documents)
    assert all(letters.count(mark) < 300 for mark in "[]{}\\"), "mark-up was left"
