"""The histogram of labels of private data: its sensitivity, its noise, its charge, and who may not have it."""

import functools
import json
import math
import random
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import kstest

import generate
from base.errors import UserError
from helpers.author_runs import VOCAB, flags, material, train
from helpers.ledgers import pld_epsilon
from helpers.processes import LAUNCHER
from helpers.small_runs import ledger, server
from privacy import label_counts as counting
from privacy.label_counts import SCALE, contribution, noisy_counts, totals
from privacy.ledger import LABEL_COUNTS
from privacy.randomness import NoiseSource
from run import label_counts
from run.label_counts import Private, count, read_table, shared_out

FIELDS = ("stars", "category")
MIXES = [(str(stars), category) for stars in (1, 5) for category in ("food", "books")]


@functools.cache
def corpus():
    """train.jsonl of 40 authors with stars and a category; domain.jsonl; one text is of a category outside it."""
    folder, draw = material() / "labels", random.Random(0)
    folder.mkdir()
    lines = [{"author": f"author {n}", "content": " ".join(draw.choices("the place serves cheap food".split(), k=9)),
              "stars": draw.choice([1, 5]), "category": draw.choice(["food", "food", "books"])}
             for n in range(40) for _ in range(draw.randint(1, 5))]
    lines[3]["category"] = "unheard of"
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "domain.jsonl").write_text("".join(
        json.dumps({"stars": int(stars), "category": category}) + "\n" for stars, category in MIXES))
    return folder, lines


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A private run with public fields."""
    work = tmp_path_factory.mktemp("trained") / "run"
    train(flags(work, train_file=corpus()[0] / "train.jsonl", prompt_fields="stars, category", sequence_len=40,
                max_steps=3))
    return work


def words(work, output, **changed: object) -> list[str]:
    folder = corpus()[0]
    values = {"init_checkpoint": work, "vocab": VOCAB, "num_samples": 20, "max_new_tokens": 4, "output": output,
              "label_counts": "private", "train_file": folder / "train.jsonl", "label_domain": folder / "domain.jsonl",
              "label_noise_multiplier": 3.0, "target_epsilon": 100.0, **changed}
    return [word for name, value in values.items() if value is not None for word in (
        [f"--{name}"] if value is True else [f"--{name}", str(value)])]


def run_here(monkeypatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    generate.main()


# ------------------------------------------------------------------ sensitivity


@pytest.mark.parametrize("counts", [{0: 1}, {2: 1000}, {0: 3, 1: 4}, {0: 1, 1: 1, 2: 1}, {0: 10**9, 3: 1}, {}])
def test_a_contribution_is_the_histogram_cut_to_norm_one(counts):
    found = contribution(counts, 4)
    norm = math.sqrt(sum(value**2 for value in counts.values()))
    want = [counts.get(cell, 0) / max(1, norm) for cell in range(4)]
    assert sum(int(value) ** 2 for value in found) <= SCALE**2  # exactly: whole numbers
    np.testing.assert_allclose(found / SCALE, want, atol=1 / SCALE)


def written(path, lines) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_unit_changes_the_total_by_one_at_most(tmp_path):
    """Neighbouring files: every author left out in turn, from the file on; then one with a thousand texts, whose name
    has two spellings. Without the author the total is that of the others, exactly."""
    args = {"author_field": "author", "content_field": "content", "unit_field": None}

    def total(lines) -> np.ndarray:
        private = Private("", written(tmp_path / "t.jsonl", lines), "", 1.0, None)
        return count(private, args, FIELDS, MIXES)

    _, lines = corpus()
    many = [{"author": "author\u200b 99" if n % 2 else "author 99", "content": "x", "stars": 1 + n % 2 * 4,
             "category": "food"} for n in range(1000)]
    whole, moved = total([*lines, *many]), []
    for author in [*dict.fromkeys(line["author"] for line in lines), "author 99"]:
        rest = [line for line in [*lines, *many] if line["author"].replace("\u200b", "") != author]
        moved.append(math.sqrt(sum(int(value) ** 2 for value in whole - total(rest))) / SCALE)
    assert max(moved) <= 1 and moved[-1] > 1 - 1e-5 and len(moved) == 41
    assert totals([("a", 0)] * 1000, 2).tolist() == [SCALE, 0]
    # a text outside the domain is nobody's, and a line without an author neither
    assert total([{**lines[0], "category": "unheard of"}, {**lines[0], "author": None}]).tolist() == [0] * 4


def test_lines_are_units_where_the_training_has_them_so(tmp_path):
    lines = [{"prompt": "", "completion": "x", "stars": 1, "category": "food"}] * 3
    private = Private("", written(tmp_path / "t.jsonl", lines), "", 1.0, None)
    found = count(private, {"author_field": "author", "content_field": "content", "unit_field": None}, FIELDS, MIXES)
    assert found.tolist() == [3 * SCALE, 0, 0, 0]


def test_the_noise_is_gaussian_of_its_scale():
    """20,000 cells; Kolmogorov-Smirnov has p below 1e-6 at 0.9 of the scale, and a fixed seed."""
    total = np.arange(20_000) * SCALE
    found = noisy_counts(total, 3.0, NoiseSource("seeded", "noise", seed=1)) - np.arange(20_000)
    assert kstest(found / 3.0, "norm").pvalue > 1e-3
    assert kstest(found / 2.7, "norm").pvalue < 1e-6
    with pytest.raises(ValueError, match="expected a number above 0"):
        noisy_counts(total, 0.0)


# ------------------------------------------------------------------ the charge


def test_the_charge_is_on_disk_before_the_noise_is_drawn(trained, tmp_path, monkeypatch, capsys):
    """The record, its price by another accountant, the report and the card; a kill between charge and file pays again;
    --resume draws nothing new; the texts have the fields."""
    work = shutil.copytree(trained, tmp_path / "run")
    before, output = ledger(work), tmp_path / "s.jsonl"
    with monkeypatch.context() as patch:
        def killed(*arguments):
            assert len(ledger(work)) == len(before) + 1
            raise KeyboardInterrupt

        patch.setattr(label_counts, "noisy_counts", killed)
        with pytest.raises(KeyboardInterrupt):
            run_here(patch, words(work, output))
    run_here(monkeypatch, words(work, output))
    records = ledger(work)
    assert len(records) == len(before) + 2 and not (tmp_path / "s.jsonl.journal.0").exists()
    last = records[-1]
    assert (last["mechanism"], last["q"], last["sigma"], last["clip"], last["noise_source"]) == (
        LABEL_COUNTS, 1.0, 3.0, 1.0, "os")
    report = json.loads((work / "privacy.json").read_text())
    want = pld_epsilon(records, last["delta"])
    assert want * 0.99 <= report["epsilon_prv"] <= want * 1.03 and report["steps_charged"] == len(records)
    assert report["epsilon_prv"] > pld_epsilon(before, last["delta"])
    assert report["public_fields"] == ["stars", "category"]
    run = server().start("src/privacy_report.py", [work, "--card", tmp_path / "card.md"])
    assert run.wait() == 0, run.stdout + run.stderr  # the report agrees with the ledger
    assert "2 histogram of the labels of N" in run.stdout and "public context: the fields stars, category" in run.stdout
    shown = (tmp_path / "card.md").read_text()
    assert "the field stars: taken for public" in shown and "2 histograms of labels with q 1" in shown

    texts = [json.loads(line) for line in open(output)]
    assert len(texts) == 20 and all(one["prompt"] == "stars: {stars} | category: {category}\n".format(**one["fields"])
                                    for one in texts)
    assert {tuple(one["fields"].values()) for one in texts} <= set(MIXES)
    with pytest.raises(UserError, match="holds labels that were drawn and paid for"):
        run_here(monkeypatch, words(work, output))
    mixes, weights, _ = read_table(f"{output}.labels.jsonl", "", FIELDS, True)
    assert Counter(tuple(one["fields"].values()) for one in texts) == Counter(
        dict(zip(mixes, shared_out(weights, 20), strict=True))) - Counter()
    run_here(monkeypatch, words(work, tmp_path / "again.jsonl", label_counts=f"{output}.labels.jsonl", train_file=None,
                                label_domain=None, label_noise_multiplier=None, target_epsilon=None))
    assert (tmp_path / "again.jsonl").read_bytes() == output.read_bytes()
    assert len(ledger(work)) == len(records)
    capsys.readouterr()


def test_a_run_goes_on_after_its_labels(trained, tmp_path, monkeypatch):
    work = shutil.copytree(trained, tmp_path / "run")
    run_here(monkeypatch, words(work, tmp_path / "s.jsonl"))
    train([*flags(work, train_file=corpus()[0] / "train.jsonl", prompt_fields="stars, category", sequence_len=40,
                  max_steps=5, resume=True), "--resume_changed", "max_steps", "steps"])
    assert [record["mechanism"] for record in ledger(work)] == ["gaussian"] * 3 + [LABEL_COUNTS] + ["gaussian"] * 2
    run = server().start("src/privacy_report.py", [work])
    assert run.wait() == 0, run.stdout


def test_the_budget_is_never_passed(trained, tmp_path, monkeypatch):
    work = shutil.copytree(trained, tmp_path / "run")
    spent = json.loads((work / "privacy.json").read_text())["epsilon_prv"]
    before = (work / "privacy_ledger.jsonl").read_bytes()
    for target in (spent + 0.01, None):  # the run itself has none
        with pytest.raises(UserError, match=r"--label_noise_multiplier 3: brings epsilon from .* to "):
            run_here(monkeypatch, words(work, tmp_path / "s.jsonl", target_epsilon=target))
    args = json.loads((work / "args.json").read_text())
    (work / "args.json").write_text(json.dumps({**args, "target_epsilon": spent + 0.01}))
    with pytest.raises(UserError, match="that is beyond"):
        run_here(monkeypatch, words(work, tmp_path / "s.jsonl", target_epsilon=None))
    assert (work / "privacy_ledger.jsonl").read_bytes() == before and not (tmp_path / "s.jsonl.labels.jsonl").exists()
    run_here(monkeypatch, words(work, tmp_path / "s.jsonl", target_epsilon=None, label_noise_multiplier=5000))


def test_a_label_s_table_is_what_was_drawn_from(trained, tmp_path, monkeypatch):
    """Where the noise leaves no count above 0, too: what --resume reads is what the first call got."""
    work, output = shutil.copytree(trained, tmp_path / "run"), str(tmp_path / "labels.jsonl")
    folder = corpus()[0]
    private = Private(str(work), str(folder / "train.jsonl"), str(folder / "domain.jsonl"), 3.0, 1000.0)
    monkeypatch.setattr(label_counts, "noisy_counts", lambda *_: np.array([-1.0, -0.5, 0.0, -7.0]))
    first = label_counts.private_weights(private, FIELDS, output, False, lambda mixes: None)
    assert first == (MIXES, [1.0] * 4)
    assert label_counts.private_weights(private, FIELDS, output, True, lambda mixes: None) == first


MISTAKES = [
    ({"label_domain": None}, "--label_counts private: needs --label_domain; the labels' domain is a public list"),
    ({"label_noise_multiplier": None}, "needs --label_noise_multiplier"),
    ({"label_noise_multiplier": 0}, "--label_noise_multiplier 0: expected a number above 0"),
    ({"train_file": None}, "needs --train_file"),
    ({"train_file": "nowhere"}, "--train_file nowhere: cannot be read"),
    ({"train_file": "table.jsonl"}, "--train_file table.jsonl: is not the file that .* was trained on"),
    ({"label_domain": "table.jsonl"}, "table.jsonl:1: .* wanted no count: the domain is a public list"),
    ({"label_domain": "double.jsonl"}, r"double.jsonl:2: 1 \| food stands in an earlier line"),
    ({"prompts": "table.jsonl"}, "--label_counts: means nothing with --prompts"),
    ({"prompt_fields": "stars"}, "--prompt_fields stars: .* was trained with stars, category"),
    ({"init_checkpoint": "tiny"}, "was trained without --prompt_fields"),
    ({"init_checkpoint": "tiny", "prompt_fields": "stars,category"}, "is no folder of a private training"),
    ({"label_counts": "table.jsonl"}, "--train_file: means nothing without --label_counts private"),
    ({"budget": "file"}, "has a share of the budget file"),
    ({"resume": True}, "--resume: nothing to resume, there is no s.jsonl.labels.jsonl"),
    ({"label_domain": "long.jsonl"}, r"--label_counts: stars: 1 .*: the prompt has \d+ tokens, and beside"),
    ({"output": "table.jsonl", "label_domain": "table.jsonl"}, "--output table.jsonl: is the input itself"),
]


@pytest.mark.parametrize("changed, expected", MISTAKES, ids=[expected[:45] for _, expected in MISTAKES])
def test_mistakes(trained, tmp_path, monkeypatch, changed, expected):
    monkeypatch.chdir(tmp_path)
    values, work = dict(changed), shutil.copytree(trained, tmp_path / "run")
    if values.pop("budget", None):
        args = json.loads((work / "args.json").read_text())
        (work / "args.json").write_text(json.dumps({**args, "budget": "file", "reservation": "1234"}))
    if values.get("init_checkpoint") == "tiny":
        values["init_checkpoint"] = material() / "tiny"
    written(tmp_path / "table.jsonl", [{"stars": 1, "category": "food", "count": 2}])
    written(tmp_path / "double.jsonl", [{"stars": 1, "category": "food"}] * 2)
    written(tmp_path / "long.jsonl", [{"stars": 1, "category": "food " * 200}])
    before = (work / "privacy_ledger.jsonl").read_bytes()
    with pytest.raises(UserError, match=expected):
        run_here(monkeypatch, words(work, values.pop("output", "s.jsonl"), **values))
    assert (work / "privacy_ledger.jsonl").read_bytes() == before and not (tmp_path / "s.jsonl").exists()


TABLES = [
    ([{"stars": 1, "category": "food", "count": 2.5}], "count is 2.5"),
    ([{"stars": 1, "category": "food", "weight": -1}], "weight is -1"),
    ([{"stars": 1, "category": "food", "count": 10**400}], "wanted a whole number from 0 to 1e+15"),
    ([{"stars": 1, "category": "food", "weight": 1e308}], "wanted a number from 0 to 1e+15"),
    ([{"stars": 1, "category": "food"}], "wanted one of 'count' and 'weight'"),
    ([{"stars": 1, "count": 2}], "'category' of --prompt_fields is null"),
    ([{"stars": 1, "category": "a|b", "count": 2}], "'category' of --prompt_fields is \"a|b\""),
    ([{"stars": 1, "category": "food", "count": 2, "city": "x"}], "'city' is none of the --prompt_fields"),
    ([{"stars": 1, "category": "food", "count": 0}], "names no mix"),
    ([{"stars": 1, "category": "food", "count": 1}, {"stars": 5, "category": "food", "weight": 1}],
     "counts and weights"),
    ([3], "wanted an object"),
]


@pytest.mark.parametrize("lines, expected", TABLES, ids=[expected for _, expected in TABLES])
def test_tables_that_are_none(tmp_path, lines, expected):
    with pytest.raises(UserError) as caught:
        read_table(written(tmp_path / "t.jsonl", lines), "--label_counts", FIELDS, True)
    assert expected in str(caught.value)


def test_shares_are_whole_and_close():
    assert shared_out([1, 1, 2], 8) == [2, 2, 4] and shared_out([1, 1, 1], 4) == [2, 1, 1]
    assert shared_out([-3.0, 0.0, 5.0], 6) == [0, 0, 6] and shared_out([-1.0, -2.0], 4) == [2, 2]
    weights = np.random.default_rng(0).random(50).tolist()
    found = shared_out(weights, 777)
    assert sum(found) == 777
    assert max(abs(n - 777 * w / sum(weights)) for n, w in zip(found, weights, strict=True)) < 1


def test_the_noise_is_not_torch_s():
    """Two calls differ though torch's generator is at the same place."""
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(counting.noisy_counts(np.zeros(4, np.int64), 1.0).tolist())
    assert drawn[0] != drawn[1]
