"""Both training scripts with --budget: reserved before the first draw, released after the last, killed between."""

import json
import os
import pathlib
import signal
import time
from collections import Counter

import pytest

from helpers import author_runs
from helpers.interrupted_runs import CHARGE, DRAW, UPDATE, counted, counter, kill
from helpers.small_runs import STEPS, contents, flags, ledger, material, read, server, start_ranks, train
from privacy.budget import read_budget

KEY = ("gaussian", "poisson", 0.8, 0.2)
OS = {"noise_source": None, "noise_seed": None}


def create(path: pathlib.Path, epsilon: float = 50, data: pathlib.Path | None = None, unit: str = "example") -> None:
    made = server().start("src/privacy_budget.py", ["create", path, "--train_data", data or material() / "train.jsonl",
                                                    "--epsilon", epsilon, "--delta", 1e-5, "--unit", unit])
    assert made.wait() == 0, made.stderr


def run_flags(work: pathlib.Path, **changed: object) -> list[str]:
    return flags(work, **{"budget": work.parent / "budget.jsonl", **OS, **changed})


def total(path: pathlib.Path) -> Counter:
    return read_budget(str(path)).counted


def test_reserved_before_the_first_draw_and_released_after_the_last(tmp_path):
    """Two ranks; the file as the first mask is drawn holds all that the run may spend."""
    path = tmp_path / "budget.jsonl"
    create(path)
    copy = ["shell", {"point": DRAW, "when": "before", "nth": 1, "command": f"cp {path} {tmp_path}/at_draw"}]
    ranks = train(run_flags(tmp_path / "run", train_batch_size=4), 2, {0: [copy]})
    assert total(tmp_path / "at_draw") == total(path) == Counter({KEY: STEPS})
    states = [next(iter(read_budget(str(file)).reservations.values())) for file in (tmp_path / "at_draw", path)]
    assert [(held.open, held.released) for held in states] == [(True, False), (False, True)]
    assert read(tmp_path / "run", "args.json")["reservation"] == states[0].name
    epsilon = read(tmp_path / "run")["epsilon_prv"]
    assert f"epsilon {epsilon:.4f} of 50 at delta 1e-05 (PRV upper bound) is spent or reserved by 1 run" in \
        ranks[0].stdout.splitlines()[-2]


@pytest.mark.parametrize("point, when, nth", [
    ("os:write", "tear", 1), ("os:write", "after", 1), (CHARGE, "after", 1), (UPDATE, "after", 4),
    ("os:write", "tear", 8), ("os:write", "tear", 9)])  # the reservation, 6 steps, the closing, the release
def test_killed_the_total_never_under_counts(tmp_path, point, when, nth):
    path, work = tmp_path / "budget.jsonl", tmp_path / "run"
    create(path)
    (rank,) = start_ranks(run_flags(work), 1, {0: [*counted(work), kill(point, when, nth)]})
    assert rank.wait() == -signal.SIGKILL, rank.stderr
    drawn = counter(work, "drawn")

    def check() -> None:
        assert total(path)[KEY] >= (drawn.stat().st_size if drawn.exists() else 0)

    check()
    assert (total(path)[KEY] == STEPS) == (nth > 1 or when == "after")
    train(run_flags(work, resume=bool(ledger(work)) or None), 1, {0: counted(work)})
    check()
    assert total(path) == Counter({KEY: len(ledger(work))})


def test_two_runs_at_once_and_room_for_one(tmp_path):
    """The second is refused while the first runs, since what is reserved counts; and again when it is done."""
    path = tmp_path / "budget.jsonl"
    create(path, 7)
    go = tmp_path / "go"
    wait = ["shell", {"point": UPDATE, "when": "before", "nth": 2, "command": f"until [ -e {go} ]; do sleep 0.1; done"}]
    (first,) = start_ranks(run_flags(tmp_path / "a"), 1, {0: [wait]})
    deadline = time.monotonic() + 30
    while not (tmp_path / "a/privacy_ledger.jsonl").exists() or len(ledger(tmp_path / "a")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    released = server().start("src/privacy_budget.py", ["release", path])
    assert released.wait() == 0 and "counted in full: it is running" in released.stdout
    for ended in (False, True):
        if ended:
            go.touch()
            assert first.wait() == 0, first.stderr
        (second,) = start_ranks(run_flags(tmp_path / "b"))
        assert second.wait() == 2 and "beyond its limit 7" in second.error and not ledger(tmp_path / "b")
    assert total(path) == Counter({KEY: STEPS})


@pytest.mark.parametrize("unit", ["author", "patient"])
def test_other_units(tmp_path, unit):
    path, data = tmp_path / "budget.jsonl", tmp_path / "train.jsonl"
    data.write_text((author_runs.material() / "train.jsonl").read_text().replace('"author":', f'"{unit}":'))
    more = {} if unit == "author" else {"unit_field": unit}
    create(path, data=data, unit=unit)
    author_runs.train(author_runs.flags(tmp_path / "run", budget=path, train_file=data, **more, **OS))
    assert sum(total(path).values()) == author_runs.STEPS


@pytest.mark.parametrize("made, changed, words", [
    ("absent", {}, "no such budget; make one with python src/privacy_budget.py create"),
    ("author", {}, "is for one author, this run for one example"),
    ("other", {}, "is of other data"), ("damaged", {}, "budget.jsonl:1: damaged"), ("empty", {}, "holds no budget"),
    ("pipe", {}, "is a pipe or a device"),
    ("sound", {"noise_multiplier": 0}, "no limit holds a run without noise"),
    ("sound", {"noise_source": "seeded", "noise_seed": 1}, "refused with --noise_source seeded"),
])
def test_what_is_no_budget_for_a_run_reserves_nothing(tmp_path, made, changed, words):
    path = tmp_path / "budget.jsonl"
    if made == "empty":
        path.touch()
    elif made == "pipe":
        os.mkfifo(path)
    elif made != "absent":
        create(path, unit="author" if made == "author" else "example",
               data=material() / "valid.jsonl" if made == "other" else None)
    if made == "damaged":
        path.write_text(path.read_text().replace("50.0", "60.0"))
    before = contents(tmp_path) if made != "pipe" else {}
    (rank,) = start_ranks(run_flags(tmp_path / "run", **changed))
    assert rank.wait() == 2 and words in rank.error
    after = contents(tmp_path) if made != "pipe" else {}
    assert before == after


def test_the_plan_is_printed_and_nothing_is_written(tmp_path):
    """Two ranks; with a target the noise is that of the run."""
    target = {"noise_multiplier": None, "target_epsilon": 3}
    ranks = train(flags(tmp_path / "run", plan_only=True, train_batch_size=4, **target), 2)
    plan = json.loads(ranks[0].stdout.splitlines()[-1])
    train(flags(tmp_path / "real", **target))
    records = ledger(tmp_path / "real")
    assert plan["uses"] == [["gaussian", "poisson", records[0]["sigma"], 0.2, len(records)]]
    assert (plan["N"], plan["batch"], plan["delta"]) == (40, 8, 1e-5) and not (tmp_path / "run").exists()
