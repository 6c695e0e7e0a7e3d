"""gpt2_decode.py: the cut, the grouping, every flag, and what it refuses."""

import json

import pytest

from helpers.processes import ROOT, assert_user_error, run_script
from segments import load_segments

SCRIPT = ROOT / "src" / "gpt2_decode.py"
END_OF_TEXT = 256  # in the vocabulary below


@pytest.fixture
def vocab(tmp_path):
    """A vocabulary of single bytes in GPT-2's format: the id of a byte is the byte.

    Bytes that Latin-1 prints stand for themselves in it, the others for the characters from U+0100 on.
    """
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in shown]
    symbols = {chr(byte if byte in shown else 256 + hidden.index(byte)): byte for byte in range(256)}
    folder = tmp_path / "vocab"
    folder.mkdir()
    (folder / "encoder.json").write_text(json.dumps(symbols | {"<|endoftext|>": END_OF_TEXT}))
    (folder / "vocab.bpe").write_text("#version: 0.2\n")
    return folder


def ids(text: str) -> list[int]:
    """Tokens of a text in which $ stands for <|endoftext|>."""
    return [END_OF_TEXT if byte == ord("$") else byte for byte in text.encode()]


class Job:
    """A folder with inputs of gpt2_decode.py, and a way to run it."""

    def __init__(self, folder, vocab, examples, predictions):
        self.folder = folder
        self.arguments = ["--vocab", vocab, "--sample_file", self.write("sample.jsonl", predictions),
                          "--input_file", self.write("input.jsonl", examples),
                          "--output_ref_file", folder / "ref", "--output_pred_file", folder / "pred"]

    def write(self, name, records):
        path = self.folder / name
        path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records), encoding="utf-8")
        return path

    def run(self, *flags):
        return run_script(SCRIPT, *self.arguments, *flags)

    def read(self, name):
        return (self.folder / name).read_bytes().decode("utf-8")


EXAMPLES = [
    {"context": "b", "completion": "The B, it's £5.", "cate": True},
    {"context": "a", "completion": "An A.", "cate": False},
    {"context": "b", "completion": " B-side \n\n never seen", "cate": True},
    {"context": "a", "completion": "A_a<|endoftext|> never seen", "cate": False},
    {"context": "b", "completion": "Two\nlines", "cate": True},
]
PREDICTIONS = [
    {"id": 0, "predict": ids(" early")},
    {"id": 4, "predict": ids(" Café B!\none\u2028line$ after")},
    {"id": 2, "predict": ids("\n\n all is after the blank line")},
    {"id": 1, "predict": ids(" An A \n\n after$")},
    {"id": 0, "predict": ids(" Café B!\none\u2028line$ after")},
    {"id": 3, "predict": ids("$ after")},
]


@pytest.fixture
def job(tmp_path, vocab):
    return Job(tmp_path, vocab, EXAMPLES, PREDICTIONS)


def test_e2e(job):
    done = job.run()
    assert done.returncode == 0, done.stderr
    assert job.read("ref") == "The B, it's £5.\nB-side\nTwo lines\n\nAn A.\nA_a\n\n"
    assert job.read("pred") == "Café B! one line\n\n"  # in the order of contexts; a's last prediction is empty
    assert "2 contexts, 5 references" in done.stdout and "1 of the predictions are empty" in done.stdout


def test_tokenize_and_lower(job):
    assert job.run("--tokenize", "--lower").returncode == 0
    assert job.read("ref") == "the b , it ' s £ 5 .\nb - side\ntwo lines\n\nan a .\na_a\n\n"
    assert job.read("pred") == "café b ! one line\n\n"


@pytest.mark.parametrize("ref_type", ["webnlg", "dart"])
def test_parallel_references(job, ref_type):
    done = job.run("--ref_type", ref_type, "--ref_num", 3)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (job.folder / "ref").iterdir()) == ["reference0", "reference1", "reference2"]
    assert job.read("ref/reference0") == "The B, it's £5.\nAn A.\n"
    assert job.read("ref/reference1") == "B-side\nA_a\n"
    assert job.read("ref/reference2") == "Two lines\nAn A.\n"  # a has two: its first stands in
    assert job.read("pred") == "Café B! one line\n\n"
    assert job.run("--ref_type", ref_type).returncode == 0  # again, with the default of four
    assert job.read("ref/reference3") == "The B, it's £5.\nAn A.\n"
    said = job.run("--ref_type", ref_type, "--ref_num", 2).stdout
    assert "1 of the references are beyond" in said and f"webnlg_scores.py {job.folder}/ref {job.folder}/pred" in said
    assert sorted(path.name for path in (job.folder / "ref").iterdir()) == ["reference0", "reference1"]  # of this call


@pytest.mark.parametrize("ref_type", ["e2e", "webnlg"])
def test_the_scorers_read_whatever_a_model_generates(job, ref_type):
    """Every byte that UTF-8 allows alone, at the start, inside and at the end; a byte-order mark."""
    texts = [f"{mark}A{mark}, b{mark}" for mark in [*map(chr, range(128)), *"\x85\u2028\ufeff"] if mark != "$"]
    examples = [{"context": str(i), "completion": text} for i, text in enumerate(texts)]
    job.write("input.jsonl", examples)
    job.write("sample.jsonl", [{"id": i, "predict": ids(text)} for i, text in enumerate(texts)])
    done = job.run("--ref_type", ref_type)
    assert done.returncode == 0, done.stderr
    found = load_segments(str(job.folder / "ref"), str(job.folder / "pred"))
    assert found.outputs == [group[0] for group in found.references] and len(found.outputs) == len(texts)


@pytest.mark.parametrize("keep, references, predictions", [
    ("seen", "The B, it's £5.\nB-side\nTwo lines\n\n", "Café B! one line\n"),
    ("unseen", "An A.\nA_a\n\n", "\n"),
])
def test_filter(job, keep, references, predictions):
    assert job.run("--filter", keep).returncode == 0
    assert (job.read("ref"), job.read("pred")) == (references, predictions)


def test_groups_from_a_file(job):
    """Numbers may join different contexts and part equal ones; groups come in order of first appearance."""
    unique = job.write("unique.txt", ["7", "7", "3", "3", "3"])
    assert job.run("--ref_unique_file", unique).returncode == 0
    assert job.read("ref") == "The B, it's £5.\nAn A.\n\nB-side\nA_a\nTwo lines\n\n"
    assert job.read("pred") == "Café B! one line\n\n"


@pytest.mark.parametrize("name, line, record, words", [
    ("sample.jsonl", 2, "not json", ["sample.jsonl:2", "not JSON"]),
    ("sample.jsonl", 3, {"id": 5, "predict": []}, ["sample.jsonl:3", "id 5", "4"]),
    ("sample.jsonl", 1, {"id": -1, "predict": []}, ["sample.jsonl:1", "id -1"]),
    ("sample.jsonl", 1, {"id": 0, "predict": [1, 300]}, ["sample.jsonl:1", "token 300", "257"]),
    ("sample.jsonl", 1, {"id": 0, "predict": [1, 2.5]}, ["sample.jsonl:1", "whole numbers"]),
    ("sample.jsonl", 1, {"id": 0}, ["sample.jsonl:1", "predict"]),
    ("sample.jsonl", 1, "[]", ["sample.jsonl:1", "predict"]),
    ("input.jsonl", 1, {"context": "b"}, ["input.jsonl:1", "completion"]),
    ("input.jsonl", 5, {"context": "b", "completion": "\n\n cut"}, ["input.jsonl:5", "empty"]),
    ("input.jsonl", 2, {"context": "new", "completion": "x"}, ["input.jsonl:4", "no prediction"]),
    ("input.jsonl", 2, {"context": "b", "completion": "\ud800"}, ["input.jsonl:2", "surrogate"]),
])
def test_bad_files(job, name, line, record, words):
    records = list(PREDICTIONS if name == "sample.jsonl" else EXAMPLES)
    if words[-1] == "no prediction":  # context a is line 4 alone, whose prediction is then taken away
        job.write("sample.jsonl", [p for p in PREDICTIONS if p["id"] != 3])
    records[line - 1] = record
    job.write(name, records)
    assert_user_error(job.run(), *words)
    assert not (job.folder / "ref").exists() and not (job.folder / "pred").exists()


def test_bad_flags(job):
    assert_user_error(job.run("--ref_num", 3), "--ref_num", "e2e")
    assert_user_error(job.run("--ref_type", "dart", "--ref_num", 0), "--ref_num 0")
    assert_user_error(job.run("--output_pred_file", job.folder / "ref"), "--output_pred_file")
    assert_user_error(job.run("--ref_unique_file", job.write("unique.txt", ["1", "2"])), "2 lines", "5")
    assert_user_error(job.run("--ref_unique_file", job.write("unique.txt", ["1", "x"])), "unique.txt:2")
    assert_user_error(job.run("--vocab", job.folder / "none"), "--vocab")
    assert_user_error(job.run("--output_pred_file", job.folder / "pred.TSV"), "--output_pred_file", "tables", ".txt")
    job.write("input.jsonl", [{k: v for k, v in example.items() if k != "cate"} for example in EXAMPLES])
    assert_user_error(job.run("--filter", "seen"), "input.jsonl:1", "cate")
    job.write("input.jsonl", [example | {"cate": True} for example in EXAMPLES])
    assert_user_error(job.run("--filter", "unseen"), "--filter unseen", "none")
    (job.folder / "ref").write_text("kept")
    assert_user_error(job.run("--ref_type", "webnlg"), "ref", "folder")
    assert job.read("ref") == "kept" and not (job.folder / "pred").exists()
