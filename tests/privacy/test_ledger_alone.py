"""The ledger's file is one run's alone: whoever else writes, moves or replaces it ends the run, and no record is lost.

Runs draw their noise from a seed, so that what goes on can be compared with the uninterrupted run bit for bit.
"""

import errno
import json
import os
import pathlib
import shutil
import signal
import time

import pytest

from base import errors
from helpers.interrupted_runs import (
    CHARGE,
    DRAW,
    UPDATE,
    check_charged,
    check_resumed,
    counted,
    counter,
    interrupted,
    kill,
)
from helpers.ledgers import SETTINGS, make
from helpers.small_runs import (
    STEPS,
    Run,
    contents,
    equal,
    flags,
    ledger,
    material,
    read,
    server,
    start_ranks,
    train,
    weights,
)
from privacy.ledger import Ledger, read_ledger
from privacy.plan import epsilons
from run.log import WorkDir

NAME = "privacy_ledger.jsonl"
NO_LOCKS = ["error", {"point": "fcntl:flock", "nth": 0, "number": errno.ENOLCK}]


def shell(command: str, nth: int = 4, point: str = UPDATE, when: str = "before") -> list:
    """A fault: a command at the nth call. At the fourth update step 4 is charged and drawn; the checkpoint is of 2."""
    return ["shell", {"point": point, "when": when, "nth": nth, "command": command}]


def waiting(work: pathlib.Path, go: pathlib.Path, faults: list) -> Run:
    """A run that has charged and drawn step 4, and waits before its update until there is a file `go`."""
    (run,) = start_ranks(flags(work), 1, {0: [*faults, shell(f"until [ -e {go} ]; do sleep 0.1; done")]})
    deadline = time.monotonic() + 30
    while not (work / NAME).exists() or len(ledger(work)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return run


def drawn(work: pathlib.Path) -> int:
    """Masks that the runs of a folder drew on rank 0."""
    return counter(work, "drawn").stat().st_size


# ------------------------------------------------------------------ a second run


def test_a_second_run_is_refused_though_the_lock_file_is_gone(tmp_path):
    """A cleaning, or a tool that copies folders, takes .lock away; the ledger's own lock is still held."""
    work = tmp_path / "run"
    first = waiting(work, tmp_path / "go", counted(work))
    before = (work / NAME).read_bytes()
    (work / ".lock").unlink()
    (second,) = start_ranks(flags(work, resume=True))
    assert second.wait() == 2 and f"another run is writing there: it holds {NAME}" in second.error
    assert (work / NAME).read_bytes() == before
    (tmp_path / "go").touch()
    assert first.wait() == 0, first.stderr  # that .lock is gone harms nobody
    assert drawn(work) == len(ledger(work)) == read(work)["steps_charged"] == STEPS


def test_where_there_are_no_locks_the_run_says_so_and_watches_its_ledger(tmp_path):
    """Two runs in one folder, as on a file system without locks: the first ends at its next write, all is charged."""
    work = tmp_path / "run"
    first = waiting(work, tmp_path / "go", [NO_LOCKS, *counted(work)])
    (second,) = train(flags(work, resume=True), 1, {0: [NO_LOCKS, *counted(work)]})
    saved = contents(work)
    (tmp_path / "go").touch()
    assert first.wait() == 2
    assert f"{NAME}: holds " in first.error and "step 4 was not logged" in first.error
    assert "end whatever else writes there, and --resume" in first.error
    assert contents(work) == saved and check_charged(work) == 8 == drawn(work) == read(work)["steps_charged"]
    assert [record["step"] for record in ledger(work)] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert read_ledger(str(work / NAME)).charged == 8 and equal(weights(work), weights(reference()))
    for run in (first, second):
        assert run.stdout.count("has no locks") == 1 and "WARNING: the file system of" in run.stdout


def reference() -> pathlib.Path:
    work = material() / "alone"
    if not work.exists():
        train(flags(work))
    return work


def test_where_a_folder_cannot_be_synced_the_run_says_so(tmp_path):
    """EINVAL, which the first sync gives: that of the ledger's folder."""
    fault = ["error", {"point": "os:fsync", "nth": 1, "number": errno.EINVAL}]
    (run,) = train(flags(tmp_path / "run"), 1, {0: [fault]})
    assert run.stdout.count("cannot sync a folder") == 1 and equal(weights(tmp_path / "run"), weights(reference()))


def test_where_a_ledger_cannot_be_synced_nothing_is_drawn(tmp_path):
    fault = ["error", {"point": "os:fsync", "nth": 0, "number": errno.EINVAL}]
    (run,) = start_ranks(flags(tmp_path / "run"), 1, {0: [*counted(tmp_path / "run"), fault]})
    assert run.wait() == 2 and f"{NAME}: Invalid argument: step 1 was not drawn" in run.error
    assert not counter(tmp_path / "run", "drawn").exists()


def test_a_lock_that_cannot_be_had_for_another_reason_is_no_lock(tmp_path):
    for nth, words in ((1, "Input/output error"), (2, "Input/output error")):  # .lock, the ledger
        fault = ["error", {"point": "fcntl:flock", "nth": nth, "number": errno.EIO}]
        (rank,) = start_ranks(flags(tmp_path / str(nth)), 1, {0: [fault]})
        assert rank.wait() == 2 and words in rank.error and not (tmp_path / str(nth) / "args.json").exists()


def test_a_second_writer_finds_what_the_first_wrote_and_the_first_stops(tmp_path, monkeypatch):
    """Neither writes over the other's records; what one was not charged, it does not draw."""
    monkeypatch.setattr("privacy.ledger.lock", lambda handle: False)
    first = Ledger(str(tmp_path), SETTINGS, resume=False)
    first.charge(1)
    second = Ledger(str(tmp_path), SETTINGS, resume=True)
    second.charge(2)
    both = (tmp_path / NAME).read_bytes()
    for step in (2, 3):
        with pytest.raises(errors.UserError, match=f"{NAME}: holds .* bytes .*step {step} was not drawn; what this run "
                                                "charged is still in it"):
            first.charge(step)
        assert (tmp_path / NAME).read_bytes() == both
    second.charge(3)
    assert (tmp_path / NAME).read_bytes().startswith(both)
    assert [record["attempt"] for record in ledger(tmp_path)] == [1, 2, 2] and len(os.listdir(tmp_path)) == 1
    assert read_ledger(str(tmp_path / NAME)).charged == 3


# ------------------------------------------------------------------ at the same moment


@pytest.mark.parametrize("before, part, after, left", [
    (b"", 1.0, b"", "mine"),  # negative control: nobody else, the step is drawn
    (b"other\n", 1.0, b"", "other"),  # between the check and the write: the record is taken back
    (b"", 0.5, b"", ""),  # a full disk: what was written of the record is taken back
    (b"", 0.5, b"other\n", "half, other"), (b"other\n", 1.0, b"more\n", "other, mine, more"),  # not the last: it stays
])
def test_what_another_writes_at_the_same_moment_is_never_cut(tmp_path, monkeypatch, before, part, after, left):
    opened = Ledger(str(tmp_path), SETTINGS, resume=False)
    opened.charge(1)
    whole, write = (tmp_path / NAME).read_bytes(), os.write

    def other(content: bytes) -> None:
        with open(tmp_path / NAME, "ab") as handle:
            handle.write(content)

    def beside(handle: int, line: bytes) -> int:
        other(before)
        written = write(handle, line[:round(part * len(line))])
        other(after)
        return written

    monkeypatch.setattr(os, "write", beside)
    record = opened.chained({**SETTINGS, "step": 2, "attempt": 1})
    mine = json.dumps(record).encode() + b"\n"
    if left == "mine":
        opened.charge(2)
    else:
        with pytest.raises(errors.UserError, match="step 2 was not drawn"):
            opened.charge(2)
    parts = {"mine": mine, "half": mine[:round(len(mine) / 2)], "other": b"other\n", "more": b"more\n", "": b""}
    assert (tmp_path / NAME).read_bytes() == whole + b"".join(parts[name] for name in left.split(", "))


def test_a_last_line_that_is_still_being_written_is_not_mended(tmp_path, monkeypatch):
    """Without locks, what looks torn may be another run's record that comes in parts."""
    whole = pathlib.Path(make(tmp_path)).read_bytes()
    half = len(whole) - 50
    os.truncate(tmp_path / NAME, half)

    def slow(path: str, handle: int):
        state = read_ledger(path, handle)
        (tmp_path / NAME).write_bytes(whole)
        return state

    monkeypatch.setattr("privacy.ledger.read_ledger", slow)
    with pytest.raises(errors.UserError, match="grows while it is read: another run is writing there"):
        Ledger(str(tmp_path), SETTINGS, resume=True)
    assert (tmp_path / NAME).read_bytes() == whole


def test_killed_while_a_torn_line_is_mended(tmp_path):
    """The torn step stays charged."""
    work = tmp_path / "run"
    interrupted(work, 1, {0: [kill("os:write", "tear", 4)]})
    assert interrupted(work, 1, {0: [kill("os:pwrite", "tear", 1)]}, resume=True)[0].status == -signal.SIGKILL
    assert check_charged(work) == 4
    check_resumed(work, 1)
    assert read(work)["steps_charged"] == 4 + 4


# ------------------------------------------------------------------ a ledger that is taken away


TAKEN = {
    "renamed": "mv {ledger} {work}/elsewhere", "removed": "rm {ledger}",
    "emptied": ": > {ledger}", "cut": "truncate -s -1 {ledger}",
    "an older one put in its place": "head -n 2 {ledger} > {work}/old && mv {work}/old {ledger}",
    "an older one written into it": "head -n 2 {ledger} > {work}/old && cat {work}/old > {ledger}",
    "another one's put in its place": "sed 's/1.0/2.0/' {ledger} > {work}/other && mv {work}/other {ledger}",
}


@pytest.mark.parametrize("how", TAKEN)
def test_a_ledger_taken_away_under_a_run(tmp_path, how):
    """The run ends before it draws again, what it charged is kept aside, and nothing goes on before it is put back."""
    work = tmp_path / "run"
    command = TAKEN[how].format(ledger=work / NAME, work=work)
    (rank,) = interrupted_without_a_look(work, [shell(command, nth=3)])
    assert rank.wait() == 2 and f"{work / NAME}: " in rank.error
    assert "step 4 was not drawn; what this run charged is in" in rank.error and drawn(work) == 3
    kept = work / f"{NAME}.kept"
    assert [json.loads(line)["step"] for line in kept.read_text().splitlines()] == [1, 2, 3]
    for arguments in (flags(work), flags(work, resume=True)):
        (refused,) = start_ranks(arguments)
        assert refused.wait() == 2
        assert f"{NAME}.kept: holds what a run charged" in refused.error or "of an earlier run" in refused.error
    report = server().start("src/privacy_report.py", [work])
    assert report.wait() == 2 and f"{NAME}.kept: holds what a run charged" in report.error
    kept.replace(work / NAME)
    check_resumed(work, 1)
    assert read(work)["steps_charged"] == 3 + 4 == drawn(work)


def interrupted_without_a_look(work: pathlib.Path, faults: list, **changed) -> list:
    """A run whose ledger is not looked at when it has ended."""
    return start_ranks(flags(work, **changed), 1, {0: [*counted(work), *faults]})


def test_a_ledger_taken_away_before_the_first_step(tmp_path):
    work = tmp_path / "run"
    (rank,) = interrupted_without_a_look(work, [shell(f"rm {work / NAME}", nth=1, point=CHARGE)])
    assert rank.wait() == 2 and "step 1 was not drawn; nothing was charged yet: start the run again" in rank.error
    assert not (work / f"{NAME}.kept").exists() and not counter(work, "drawn").exists()
    train(flags(work))


def test_a_copy_of_the_whole_ledger_is_not_the_run_s_file_either(tmp_path):
    """As a tool leaves it that copies and renames: all records are there, and the next ones would not be."""
    work = tmp_path / "run"
    copy = f"cp {work / NAME} {work}/copy && mv {work}/copy {work / NAME}"
    (rank,) = interrupted_without_a_look(work, [shell(copy, nth=3)])
    assert rank.wait() == 2 and "is no longer the file that this run has written to" in rank.error
    assert "what this run charged is still in it" in rank.error and not (work / f"{NAME}.kept").exists()
    assert drawn(work) == 3 == check_charged(work)
    check_resumed(work, 1)


def test_no_checkpoint_is_written_where_another_run_may_be(tmp_path):
    work = tmp_path / "run"
    (rank,) = interrupted_without_a_look(work, [shell(f"echo x >> {work / NAME}", nth=4)], log_interval=100)
    assert rank.wait() == 2 and "the checkpoint of step 4 was not written" in rank.error
    assert sorted(name for name in os.listdir(work) if name.endswith(".pt")) == ["model.2.pt", "optimizer.2.pt"]


def test_no_report_stands_beside_a_ledger_that_lacks_its_steps(tmp_path):
    """After the last step, too."""
    work = tmp_path / "run"
    cut = f"head -n 2 {work / NAME} > {work}/old && mv {work}/old {work / NAME}"
    (rank,) = interrupted_without_a_look(work, [shell(cut, nth=1, point="run.loop:Trainer.close_report")])
    assert rank.wait() == 2 and "privacy.json was not written" in rank.error
    assert "epsilon" not in rank.stdout.splitlines()[-1]
    assert len((work / f"{NAME}.kept").read_text().splitlines()) == STEPS


def test_a_folder_that_is_gone(tmp_path):
    (rank,) = interrupted_without_a_look(tmp_path / "run", [shell(f"rm -r {tmp_path}/run", nth=3)])
    assert rank.wait() == 2 and "step 4 was not drawn" in rank.error and "this run charged 3 steps" in rank.error


def test_what_another_rank_is_told(tmp_path):
    """Every rank stops where rank 0 finds its ledger changed."""
    work = tmp_path / "run"
    ranks = start_ranks(flags(work), 2, {0: [*counted(work), shell(f"rm {work / NAME}", nth=3)]})
    assert [rank.wait() for rank in ranks] == [2, 2] and drawn(work) == 3
    assert f"{NAME}.kept" in ranks[0].error and "another rank died" not in ranks[1].stderr


# ------------------------------------------------------------------ between two runs


def test_a_ledger_that_lost_records_between_two_runs(tmp_path):
    """As many records as the checkpoint has steps are not enough: those done again were charged, too. The checkpoint
    knows after which record it was made."""
    work = tmp_path / "run"
    interrupted(work, 1, {0: [kill(CHARGE, "after", 4)]})
    old = (work / NAME).read_bytes()
    interrupted(work, 1, {0: [kill(DRAW, "after", 2, signal.SIGTERM)]}, resume=True)
    assert [record["step"] for record in ledger(work)] == [1, 2, 3, 4, 3, 4] and (work / "model.4.pt").exists()
    new = (work / NAME).read_bytes()
    (work / "privacy.json").unlink()  # which remembers the number, where it has not been put back with the ledger
    (work / NAME).write_bytes(old)
    (rank,) = start_ranks(flags(work, resume=True))
    last = json.loads(new.splitlines()[-1])["checksum"]
    assert rank.wait() == 2
    assert f"{NAME} lacks the record {last}, its last one at the checkpoint of step 4" in rank.error
    (work / NAME).write_bytes(new)
    check_resumed(work, 1)


def test_the_lock_ends_with_the_ledger(tmp_path):
    """Also where the ledger turns out not to be this run's."""
    make(tmp_path)
    for settings, resume in (({}, False), ({"sigma": 9.0}, True)):
        with pytest.raises(errors.UserError, match="earlier run|other settings"):
            make(tmp_path, resume=resume, **settings)
    held = Ledger(str(tmp_path), SETTINGS, resume=True)
    for resume in (True, False):
        with pytest.raises(errors.UserError, match="another run is writing there"):
            make(tmp_path, resume=resume)
    assert epsilons(read_ledger(held.path), 1e-5)[0] > 0  # reading needs no lock
    held.close()
    make(tmp_path, steps=(4,), resume=True)


# ------------------------------------------------------------------ other files


def test_the_log_cuts_no_line_that_another_is_writing(tmp_path):
    """A torn last line is dropped before the first line of a run, and then no more."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    work = WorkDir(str(tmp_path))
    work.append_metrics({"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    with open(path, "ab") as handle:
        handle.write(b'{"other": ')
    work.append_metrics({"step": 3})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"other": {"step": 3}\n'


def test_a_folder_that_was_copied_while_a_run_went_on(tmp_path):
    """A copy is a run of its own, with its own ledger and lock; neither sees the other."""
    work = tmp_path / "run"
    first = waiting(work, tmp_path / "go", [])
    shutil.copytree(work, tmp_path / "copy")
    train(flags(tmp_path / "copy", resume=True))
    (tmp_path / "go").touch()
    assert first.wait() == 0 and len(ledger(work)) == STEPS and len(ledger(tmp_path / "copy")) == STEPS + 2


def test_the_copies_of_two_runs_are_both_asked_for(tmp_path):
    """Both lost their ledger. The first copy back in its place leaves the charges of the second still to be counted."""
    for steps in ((1, 2), (1, 2, 3)):
        lost = Ledger(str(tmp_path), SETTINGS, resume=False)
        for step in steps:
            lost.charge(step)
        os.unlink(tmp_path / NAME)
        with pytest.raises(errors.UserError, match="what this run charged is in"):
            lost.charge(9)
        lost.close()
        if len(steps) == 2:
            (tmp_path / f"{NAME}.kept").rename(tmp_path / "aside")
    (tmp_path / f"{NAME}.kept").rename(tmp_path / f"{NAME}.kept.123")  # as keep() names the second one
    (tmp_path / "aside").rename(tmp_path / NAME)
    with pytest.raises(errors.UserError, match=f"{NAME}.kept.123: holds what a run charged"):
        read_ledger(str(tmp_path / NAME))
    with pytest.raises(errors.UserError, match=f"{NAME}.kept.123: holds what a run charged"):
        Ledger(str(tmp_path), SETTINGS, resume=True)
    (tmp_path / f"{NAME}.kept.123").rename(tmp_path / f"{NAME}.kept.123.partial")  # which a kill may leave
    assert read_ledger(str(tmp_path / NAME)).charged == 2
