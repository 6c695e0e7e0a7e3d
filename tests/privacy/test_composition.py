"""Several ledgers as one statement, against dp_accounting on the raw records; which are refused, and what is said."""

import json
import os
import re
import shutil
import sys

import pytest

import privacy_report
from base.errors import run_main
from helpers.ledgers import make, pld_epsilon
from helpers.small_runs import ledger
from privacy.composition import composed_phases
from privacy.ledger import read_ledger
from privacy.plan import spent


@pytest.fixture
def report(capsys, monkeypatch):
    """report(ARGUMENTS...) -> (status, standard output, standard error) of the script, inside this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["src/privacy_report.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_main(privacy_report.main)
        return ended.value.code or 0, *capsys.readouterr()

    return run


def folder(path, data="d" * 64, run=None, before=(), steps=(1, 2, 3), **settings):
    """A training folder with three charged steps. data: the digest in its args.json; run, before: of privacy.json."""
    os.makedirs(path)
    make(path, steps, **{"noise_source": "os", **settings})
    if data is not None:
        (path / "args.json").write_text(json.dumps({"train_sha256": data}))
    if run is not None:
        (path / "privacy.json").write_text(json.dumps({
            "run": run, "initial_weights": list(before), "unit": "example", "relation": "x", "steps_charged": 3,
            "delta": 1e-5, "epsilon_prv": 1.0, "epsilon_rdp": 1.0, "noise_source": "os"}))
    return path


def account(run: str, folder: str) -> dict:
    return {"run": run, "folder": folder, "unit": "example", "relation": "x", "steps_charged": 7, "delta": 1e-5,
            "epsilon_prv": 1.0, "epsilon_rdp": 1.0, "noise_source": "os"}


def printed(output: str, delta: str = "1e-05") -> list[float]:
    """Every table's epsilon PRV at a delta."""
    return [float(value) for value in re.findall(rf"^ *{delta} +([\d.]+|inf) ", output, re.M)]


def test_the_composition_is_an_upper_bound_by_an_independent_accountant(report, tmp_path):
    runs = [folder(tmp_path / "a"), folder(tmp_path / "b", sigma=1.2, q=0.05),
            folder(tmp_path / "c", sigma=2.0)]
    records = [record for run in runs for record in ledger(run)]
    truth = pld_epsilon(records, 1e-5)
    for order in (runs, runs[::-1], [run / "privacy_ledger.jsonl" for run in runs]):
        status, out, _ = report(*order)
        (epsilon,) = printed(out)
        assert status == 0 and 0.999 * truth < epsilon < truth + 0.012
    assert "9 in 3 runs" in out and "note" not in out and "add or remove one example" in out


def test_composed_phases_are_those_of_each_ledger(tmp_path):
    states = [read_ledger(make(tmp_path / name, **changes)) for name, changes in
              ((os.makedirs(tmp_path / name) or name, changes) for name, changes in
               (("a", {}), ("b", {"sampling": "shuffle"}), ("c", {"sigma": 3.0})))]
    together = composed_phases(states)
    apart = [phase for state in states for phase in spent(state)]
    assert sorted(map(repr, together)) == sorted(map(repr, apart))
    twice = composed_phases([states[0], states[0]])
    assert [(phase.sigma, phase.steps) for phase in twice] == [(0.8, 6)]


def test_one_file_by_several_names_counts_once_and_copies_count_twice(report, tmp_path):
    one = folder(tmp_path / "one", run="r1")
    os.symlink(one, tmp_path / "link")
    os.makedirs(tmp_path / "hard")
    os.link(one / "privacy_ledger.jsonl", tmp_path / "hard/privacy_ledger.jsonl")
    shutil.copytree(one, tmp_path / "copy")
    folder(tmp_path / "twin", run="r2")
    single = printed(report(one)[1])
    same = report(one, one, one / "privacy.json", tmp_path / "link", tmp_path / "hard")[1]
    assert printed(same) == single and same.count("counted once") == 4
    for name, words in (("copy", "is run r1, as"), ("twin", "runs with the same settings write the same")):
        out = report(one, tmp_path / name)[1]
        assert printed(out)[0] > single[0] and words in out and "3" in out


@pytest.mark.parametrize("changed, words", [
    ({"unit": "author"}, "counts for one author, .* for one example"),
    ({"sampling": "shuffle"}, "holds where you add or remove one example, its place"),
])
def test_runs_of_another_unit_or_relation_are_refused(report, tmp_path, changed, words):
    status, out, err = report(folder(tmp_path / "a"), folder(tmp_path / "b", **changed))
    assert status == 2 and re.search(words, err) and err.count("\n") == 1 and not printed(out)


def test_other_data_are_said(report, tmp_path):
    a, b = folder(tmp_path / "a", sigma=1.0), folder(tmp_path / "b", "e" * 64, sigma=1.5)
    unknown = folder(tmp_path / "c", None, sigma=4.0)
    alone = [printed(report(run)[1])[0] for run in (a, b)]
    out = report(a, b)[1]
    together, *each = printed(out)
    assert each == alone and together > max(alone)
    assert "of 2 different training files" in out and "sha256 dddddddddddd: 1 of the runs" in out
    out = report(a, unknown)[1]
    assert len(printed(out)) == 1 and "its training file is not known; counted as of the same data" in out
    # in both groups
    assert [value > one for value, one in zip(printed(report(a, b, unknown)[1])[1:], alone)] == [True, True]


def test_runs_that_others_start_from_are_asked_for(report, tmp_path):
    first = folder(tmp_path / "first", run="r1", sigma=1.0)
    second = folder(tmp_path / "second", run="r2", before=[account("r1", str(first))], sigma=2.0)
    third = folder(tmp_path / "third", run="r3", before=[account("r1", "x"), account("r2", "y")], sigma=3.0)
    assert f"starts from the weights of {first}, which is not among the runs named" in report(second, third)[1]
    assert "note" not in report(first, second, third)[1]


@pytest.mark.parametrize("spoil, words", [
    (lambda run: os.truncate(run / "privacy_ledger.jsonl", 30), "its only line is cut short"),
    (lambda run: (run / "privacy_ledger.jsonl").write_text("x\n"), ":1: damaged"),
    (lambda run: (run / "privacy_ledger.jsonl").unlink(), "holds no privacy_ledger.jsonl"),
    (lambda run: (run / "args.json").write_text("["), "args.json: not JSON"),
    (lambda run: (run / "privacy.json").write_text("{}"), "does not say what its run spent"),
])
def test_what_cannot_be_read_is_refused(report, tmp_path, spoil, words):
    run = folder(tmp_path / "b", run="r")
    spoil(run)
    status, out, err = report(folder(tmp_path / "a"), run)
    assert status == 2 and words in err and err.count("\n") == 1 and not printed(out)


def test_an_empty_ledger_adds_nothing_and_a_torn_line_a_step(report, tmp_path):
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b", steps=())
    out = report(a, b)[1]
    assert printed(out) == printed(report(a)[1]) and "nothing was drawn" in out
    assert report(b, b)[0] == 0
    torn = folder(tmp_path / "torn", sigma=1.0)
    os.truncate(torn / "privacy_ledger.jsonl", os.path.getsize(torn / "privacy_ledger.jsonl") - 5)
    assert "6 in 2 runs" in report(a, torn)[1]


def test_seeded_runs_share_their_noise(report, tmp_path):
    a, b = folder(tmp_path / "a", noise_source="seeded"), folder(tmp_path / "b", sigma=2.0, noise_source="seeded")
    out = report(a, b)[1]
    assert "those of one seed share it, and for them no composition holds" in out
