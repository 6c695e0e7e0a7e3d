"""The budget file under kills, spoiled ledgers and several processes: its total never under-counts."""

import json
import multiprocessing
import os
import pathlib
import re
import shutil
from collections import Counter

import pytest

from base.errors import UserError
from helpers.budgets import CREATED, GIVEN, KEY, STEPS, Killed, budget_file, chained, counted, run
from helpers.small_runs import ledger
from privacy.budget import Hold, Transaction, read_budget, transaction
from privacy.ledger import Ledger, read_ledger
from privacy.sampling import PoissonSampler
from run.spending import release_all

# ------------------------------------------------------------------ kills


def crash(monkeypatch, name: str, nth: int, part: float) -> None:
    """Kill at the nth call of os.write, os.pwrite, os.fsync, os.replace: after `part` of what it does."""
    original, calls = getattr(os, name), [0]

    def dying(*arguments):
        calls[0] += 1
        if calls[0] != nth:
            return original(*arguments)
        if part:
            if "write" in name:
                arguments = (arguments[0], arguments[1][:round(part * len(arguments[1]))], *arguments[2:])
            original(*arguments)
        raise Killed

    monkeypatch.setattr(os, name, dying)


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["write", "fsync", "replace", "pwrite"])
def test_killed_at_every_write_the_total_never_under_counts(tmp_path, name, part):
    """... neither when it is killed, nor when it is resumed and killed again, nor after a release; and in the end what
    the ledger charges counts."""
    died, nth = True, 0
    while died:
        nth += 1
        folder = tmp_path / str(nth)
        folder.mkdir()
        path, drawn, died = budget_file(folder), Counter(), False
        records = folder / "run/privacy_ledger.jsonl"
        for attempt in range(2):  # the second is killed, too, if it comes so far
            with pytest.MonkeyPatch.context() as patch:
                if name == "pwrite" and attempt == 0:
                    crash(patch, "write", nth, 0.5)
                else:
                    crash(patch, name, nth if attempt == 0 else max(1, nth - 2), part)
                try:
                    run(folder / "run", path, resume=records.exists() and records.stat().st_size > 0, drawn=drawn)
                except Killed:
                    died = died or attempt == 0
            assert_counts(path, drawn)
        release_all(path)
        assert_counts(path, drawn)
        run(folder / "run", path, resume=records.stat().st_size > 0, drawn=drawn)
        assert_counts(path, drawn)
        state = read_budget(path)
        assert all(held.released for held in state.reservations.values())
        charged = read_ledger(str(records)).charged
        assert state.counted == Counter({KEY: charged}) and charged >= drawn[KEY] > 0
    assert nth > (1 if name == "replace" else 6)


def assert_counts(path: str, drawn: Counter) -> None:
    total = counted(path)
    assert all(total[key] >= count for key, count in drawn.items()), (total, drawn)


# ------------------------------------------------------------------ ledgers that are not what they were


@pytest.mark.parametrize("spoil, words", [
    (lambda work: os.unlink(work / "privacy_ledger.jsonl"), "cannot be opened"),
    (lambda work: os.rename(work, work.parent / "moved"), "cannot be opened"),
    (lambda work: os.unlink(work / "args.json"), "args.json does not name this reservation"),
    (lambda work: (work / "args.json").write_text('{"reservation": "other"}'), "does not name this reservation"),
    (lambda work: (work / "args.json").write_text("{"), "not JSON"),
    (lambda work: (work / "privacy_ledger.jsonl").write_text("x\n"), ":1: damaged"),
    (lambda work: (work / "privacy_ledger.jsonl.kept").touch(), "holds what a run charged"),
    (lambda work: os.truncate(work / "privacy_ledger.jsonl", 0), "records 0 steps, .* reports 2: records are missing"),
    (lambda work: (work / "privacy.json").write_text('{"steps_charged": 1, "ledger_checksum": "f"}'),
     "lacks the record f"),
    (lambda work: None, "released; 2 uses"),  # the control
])
def test_a_run_whose_ledger_is_not_what_it_was_counts_in_full(tmp_path, spoil, words):
    path, work = budget_file(tmp_path), tmp_path / "run"
    plan = run(work, path, end=False)
    records = (work / "privacy_ledger.jsonl").read_bytes().splitlines(True)
    (work / "privacy_ledger.jsonl").write_bytes(b"".join(records[:2]))
    (work / "privacy.json").write_text(json.dumps(
        {"steps_charged": 2, "ledger_checksum": plan.state.records[1]["checksum"]}))
    spoil(work)
    (line,) = release_all(path)
    assert re.search(words, line), line
    assert counted(path)[KEY] == (2 if "released" in words else STEPS)


def test_a_copied_or_moved_folder_gets_a_reservation_of_its_own(tmp_path):
    path, drawn = budget_file(tmp_path), Counter()
    run(tmp_path / "run", path, last=2, end=False, drawn=drawn)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for name in ("run", "copy"):
        run(tmp_path / name, path, resume=True, done=2, drawn=drawn, end=False)
    assert drawn[KEY] == 6 and counted(path)[KEY] == 4 + 4  # the copy's first two are counted again
    assert len(read_budget(path).reservations) == 2


def test_a_run_is_not_resumed_beside_its_budget(tmp_path):
    path = budget_file(tmp_path)
    run(tmp_path / "run", path, last=2, end=False)
    with pytest.raises(UserError, match="reserved .* in a budget; name that file with --budget"):
        run(tmp_path / "run", None, resume=True, done=2)
    os.unlink(path)
    budget_file(tmp_path)
    with pytest.raises(UserError, match="does not hold the reservation .* of the run in .*: it is another file"):
        run(tmp_path / "run", path, resume=True, done=2)


# ------------------------------------------------------------------ several processes


def contend(path: str, folder: str) -> None:
    for number in range(4):
        work = pathlib.Path(folder, f"{os.getpid()}-{number}")
        try:
            run(work, path, end=False)
        except UserError as error:
            assert "beyond its limit" in str(error)


def test_parallel_runs_reserve_one_after_the_other(tmp_path):
    """12 runs of three processes, and room for five: five get it, whoever comes first."""
    path = budget_file(tmp_path, 10.0)
    limit = next(n for n in range(1, 12) if read_budget(path).total(Counter({KEY: STEPS * (n + 1)})) > 10.0)
    processes = [multiprocessing.get_context("fork").Process(target=contend, args=(path, str(tmp_path)))
                 for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    state = read_budget(path)
    assert len(state.reservations) == limit and state.counted == Counter({KEY: STEPS * limit})
    assert state.total() <= 10.0 and 1 < limit < 12


def test_without_locks_one_that_was_overtaken_takes_its_line_back(tmp_path, monkeypatch):
    monkeypatch.setattr("privacy.budget.lock", lambda handle: False)
    path = budget_file(tmp_path, 6.0)
    (tmp_path / "run").mkdir()
    with transaction(path) as first, transaction(path) as second:  # both see an empty budget
        first.write("reserve", reservation="a", ledger="x", uses=[[*KEY, 4]])
        before = open(path).read()
        with pytest.raises(UserError, match="another process wrote there at the same moment, without a lock"):
            second.write("reserve", reservation="b", ledger="y", uses=[[*KEY, 4]])
    assert open(path).read() == before and counted(path) == Counter({KEY: 4})


@pytest.mark.parametrize("spoil, words", [
    (lambda path: os.unlink(path), "cannot be opened any more"),
    (lambda path: open(path, "r+").truncate(os.path.getsize(path) - 1), "no longer holds this run's reservation"),
    (lambda path: open(path, "w").write(chained(CREATED)), "no longer holds this run's reservation"),
    (lambda path: release_all(path, [os.path.join(os.path.dirname(path), "run")]), "was released"),
    (lambda path: None, None),  # the control
])
@pytest.mark.parametrize("locked", [True, False])
def test_a_run_that_lost_its_reservation_draws_no_further_step(tmp_path, monkeypatch, spoil, words, locked):
    """The file is moved, cut or replaced under the run, or another releases the run as dead: a machine whose locks this
    one does not see."""
    monkeypatch.setattr("privacy.budget.lock", lambda handle: locked)
    monkeypatch.setattr("run.spending.lock", lambda handle: False)
    path, drawn, steps = budget_file(tmp_path), Counter(), []
    charge = Ledger.charge

    def disturbed(self, step):
        if step == 3:
            spoil(path)
        steps.append(step)
        charge(self, step)

    monkeypatch.setattr(Ledger, "charge", disturbed)
    if words is None:
        run(tmp_path / "run", path, drawn=drawn)
        assert drawn[KEY] == STEPS
        return
    with pytest.raises(UserError, match=f"--budget {path}: .*{words}.*; step 3 was not drawn"):
        run(tmp_path / "run", path, drawn=drawn)
    assert drawn[KEY] == 2 and steps == [1, 2, 3]
    if words == "was released":
        assert counted(path)[KEY] >= 2


@pytest.mark.parametrize("moment", ["close", "release"])
def test_released_while_it_draws_no_step_is_lost(tmp_path, monkeypatch, moment):
    """A machine that releases a live run, stopped between its two lines: a step that the run draws meanwhile is read,
    or is not drawn."""
    path, drawn, work = budget_file(tmp_path), Counter(), tmp_path / "run"
    run(work, path, last=2, end=False, drawn=drawn)
    (held,) = read_budget(path).reservations.values()
    live = Ledger(str(work), GIVEN.ledger_entries(1), resume=True)
    hold = Hold(path, held.name, locked=True)
    monkeypatch.setattr("run.spending.lock", lambda handle: False)
    write = Transaction.write

    def draws(self, kind, **entries):
        if kind == moment:
            live.charge(3)
            try:
                hold.check("step 3 was not drawn")
            except UserError:
                pass
            else:
                drawn[KEY] += 1
        write(self, kind, **entries)

    monkeypatch.setattr(Transaction, "write", draws)
    release_all(path, [str(work)])
    live.close()
    assert counted(path)[KEY] >= drawn[KEY] == (3 if moment == "close" else 2)


def test_the_reservation_is_on_disk_before_the_first_step_is_drawn(tmp_path, monkeypatch):
    """The record is on disk before the first mask is drawn, and the ledger's record before that."""
    path, seen = budget_file(tmp_path), []
    draw = PoissonSampler.draw

    def looked(self, step):
        seen.append((counted(path)[KEY], len(ledger(tmp_path / "run"))))
        return draw(self, step)

    monkeypatch.setattr(PoissonSampler, "draw", looked)
    run(tmp_path / "run", path)
    assert seen == [(STEPS, step) for step in range(1, STEPS + 1)]
