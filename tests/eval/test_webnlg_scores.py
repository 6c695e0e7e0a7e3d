"""eval/webnlg/webnlg_scores.py against nltk, the METEOR jar on files, TER's paper and chrF++ by its definition."""

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

import java
import webnlg_scores
from helpers.corpora import random_corpus, write_lines
from segments import Segments, UserError, load_segments


def tokenized(seed: int = 1, count: int = 30) -> Segments:
    """Random texts as gpt2_decode.py --tokenize writes them; one to five references each."""
    def split(text: str) -> str:
        return " ".join("".join(c if c.isalnum() else f" {c} " for c in text).split())

    references, outputs = random_corpus(seed, count, shortest=5)
    return Segments([""] * count, [[*map(split, group)] for group in references], [*map(split, outputs)])


@pytest.fixture
def scores(meteor):
    return lambda segments: webnlg_scores.score(segments, meteor.statistics(segments.references, segments.outputs))[0]


def chrf(references: list[list[str]], outputs: list[str]) -> float:
    """chrF++ by its definition (Popović, 2017): of each text the reference with the best F; then, from counts over all
    texts, an F with beta 2 for each of 6 orders of characters and 2 of words, and their mean."""
    def grams(text: str) -> list[Counter]:
        letters, words = "".join(text.split()), text.split()
        return [*(Counter(letters[i:i + n] for i in range(len(letters) - n + 1)) for n in range(1, 7)),
                *(Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1)) for n in (1, 2))]

    def mean_f(counts: list[tuple[int, int, int]]) -> float:
        total = 0.0
        for output, reference, hits in counts:
            precision, recall = (hits / size if size else 1e-16 for size in (output, reference))
            total += 5 * precision * recall / (4 * precision + recall) if hits else 0.0
        return total / len(counts)

    sums = [(0, 0, 0)] * 8
    for group, output in zip(references, outputs, strict=True):
        pairs = [[(sum(o.values()), sum(r.values()), sum((o & r).values())) for o, r in zip(grams(output), grams(text))]
                 for text in group]
        best = max(pairs, key=mean_f)
        sums = [tuple(map(sum, zip(total, one))) for total, one in zip(sums, best)]
    return mean_f(sums)


def edits(output: list[str], reference: list[str]) -> int:
    """Levenshtein's distance of words."""
    row = [*range(len(reference) + 1)]
    for i, word in enumerate(output, start=1):
        left, row = row, [i]
        for j, other in enumerate(reference, start=1):
            row.append(min(left[j - 1] + (word != other), left[j] + 1, row[-1] + 1))
    return row[-1]


def test_each_score_is_its_oracle_s(scores, tmp_path):
    from nltk.translate.bleu_score import corpus_bleu

    segments = tokenized()
    found = scores(segments)
    lower = [[text.lower().split() for text in group] for group in segments.references]
    outputs = [text.lower().split() for text in segments.outputs]
    assert found["BLEU"] == pytest.approx(corpus_bleu(lower, outputs), rel=1e-12)
    assert found["chrF++"] == pytest.approx(chrf(segments.references, segments.outputs), rel=1e-9)
    # the jar as the challenge starts it: a file of outputs, one of all references, an empty line where there are fewer
    most = max(map(len, segments.references))
    files = [write_lines(tmp_path / "out", segments.outputs),
             write_lines(tmp_path / "ref", [text for group in segments.references
                                            for text in (group + [""] * most)[:most]])]
    command = [java.find_java(), "-Xmx2G", "-jar", java.METEOR_JAR, *files, "-l", "en", "-norm", "-r", str(most)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert found["METEOR"] == pytest.approx(float(said.stdout.split("Final score:")[1]), abs=1e-12), said.stderr
    # no shift makes an output of different words better, where no word stands elsewhere in the reference
    outputs = ["a b c d e", "f g x i", "k l"]
    groups = [["a b x d e", "a b c d e f g"], ["f g h i j j j"], ["k l", "m"]]
    best = [min(edits(out.split(), text.split()) for text in group) for out, group in zip(outputs, groups)]
    mean = [sum(len(text.split()) for text in group) / len(group) for group in groups]
    assert scores(Segments([], groups, outputs))["TER"] == pytest.approx(sum(best) / sum(mean), rel=1e-12)


def test_ter_of_its_paper(scores):
    """Snover et al. (2006), section 2: one shift, two substitutions and one insertion over 13 words."""
    reference = "SAUDI ARABIA denied THIS WEEK information published in the AMERICAN new york times"
    output = "THIS WEEK THE SAUDIS denied information published in the new york times"
    found = scores(Segments([], [[reference]], [output]))
    assert found["TER"] == pytest.approx(4 / 13, rel=1e-12)
    perfect = scores(Segments([], [[reference.lower()]], [reference]))  # case counts for chrF++ alone
    assert (perfect["BLEU"], perfect["TER"]) == pytest.approx((1, 0)) and perfect["chrF++"] < 1 < 1 + perfect["METEOR"]


def write_folder(folder, groups: list[list[str]], filler=lambda group: group[0]):
    folder.mkdir()
    for i in range(max(map(len, groups))):
        write_lines(folder / f"reference{i}", [group[i] if i < len(group) else filler(group) for group in groups])
    return folder


def test_a_folder_of_references(tmp_path):
    """What fills a group up counts for nothing, whether it is the first reference again or an empty line."""
    segments = tokenized()
    output = write_lines(tmp_path / "out.txt", segments.outputs)
    for name, filler in (("repeated", lambda group: group[0]), ("empty", lambda group: "")):
        folder = write_folder(tmp_path / name, segments.references, filler)
        assert load_segments(str(folder), str(output)).references == [
            [group[0], *(text for text in group[1:] if text != group[0])] for group in segments.references]
    for file, content, words in (("reference0", "\n" * 30, ["reference0:1", "no reference"]),
                                 ("reference1", "a\n", ["reference1: 1 lines", "has 30"]),
                                 ("reference1", None, ["holds reference0, reference2"]),
                                 ("reference0", None, ["holds reference2", "reference0, reference1"])):
        (folder / file).unlink() if content is None else (folder / file).write_text(content)
        with pytest.raises(UserError) as caught:
            load_segments(str(folder), str(output))
        assert all(word in str(caught.value) for word in words)


def test_the_script(tmp_path, scores, meteor, monkeypatch, capsys):
    """Several sets in one call, the table, the JSON, and a note on texts that nobody has split."""
    monkeypatch.setattr(java, "Meteor", lambda patience: contextlib.nullcontext(meteor))  # runs already
    sets = {"all": tokenized(), "seen": tokenized(2, 9)}
    sets["seen"].references[3][0] += " end."
    sets["long"] = Segments([""], [["a b"]], ["c d e f g"])  # five edits, two words
    files = [path for name, one in sets.items() for path in (
        write_folder(tmp_path / name, one.references), write_lines(tmp_path / f"{name}.txt", one.outputs))]
    monkeypatch.setattr(sys, "argv", ["webnlg_scores.py", *map(str, files), "--json", str(tmp_path / "scores.json")])
    webnlg_scores.main()
    done = capsys.readouterr()
    first, second = done.err.splitlines()
    assert first.startswith("note: seen: 'end.' of reference") and second.startswith("note: long: TER above 1: ")
    record = json.loads((tmp_path / "scores.json").read_text())
    head, *lines = [line.split() for line in done.out.splitlines()]
    for line, (name, one) in zip(lines, sets.items(), strict=True):
        found = dict(zip(["set", *head], line, strict=True))
        expected = scores(Segments([], [[*dict.fromkeys(group)] for group in one.references], one.outputs))
        assert record["scores"][name] == pytest.approx(expected, rel=1e-12)
        assert {key: found[key] for key in expected} == {key: f"{value:.4f}" for key, value in expected.items()}
        assert record["signature"][name]["segments"] == len(one.outputs) and found["set"] == name
    assert "version:2" in record["signature"]["all"]["BLEU"] and "meteor-1.5" in record["signature"]["all"]["METEOR"]
