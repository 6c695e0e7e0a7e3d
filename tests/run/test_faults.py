"""Kills at every point of a step, signals, dead ranks, full disks: what a run leaves is true and can be continued.

Every run here draws its noise from a seed, so that a resumed run can be compared with the uninterrupted one bit for
bit.
"""

import errno
import os
import pathlib
import random
import signal
import subprocess
import time

import pytest

from helpers.interrupted_runs import (
    CHARGE,
    DRAW,
    NOISE,
    SUM,
    UPDATE,
    check_charged,
    check_resumed,
    counted,
    counter,
    interrupted,
    kill,
    reference,
)
from helpers.small_runs import STEPS, contents, flags, ledger, metrics, read, start_ranks, train

REPAIR = "privacy.ledger:Ledger.repair_torn_line"
STEP_POINTS = (CHARGE, "os:write", DRAW, "privacy.clipping:BookKeeping.accumulate", "torch:Tensor.backward", NOISE,
               SUM, UPDATE, "run.loop:Trainer.after_step", "run.log:WorkDir.append_metrics")
FILE_POINTS = ("run.loop:Trainer.save", "weights.checkpoint:write", "os:fsync", "os:replace", "base.files:sync_folder",
               "os:unlink",
               "run.log:WorkDir.write_json", "run.loop:evaluate", "run.loop:Trainer.close_report")
TEARS = ("os:write", "torch:save")


def kill_and_resume(work: pathlib.Path, size: int, rank: int, point: str, when: str, nth: int) -> bool:
    """Whether the run came to the point, and was killed there."""
    ranks = interrupted(work, size, {rank: [kill(point, when, nth)]})
    if ranks[rank].status == 0:
        return False
    assert ranks[rank].status == -signal.SIGKILL, ranks[rank].stderr
    for other in ranks:
        if other is not ranks[rank]:
            assert other.status == 0 or (other.status == 2 and "another rank died" in other.error), other.stderr
    check_resumed(work, size)
    return True


# ------------------------------------------------------------------ kills


# In step 4, when a checkpoint of step 2 exists; and in step 1, when none does.
@pytest.mark.parametrize("point, when, nth", [
    (CHARGE, "before", 1), (CHARGE, "after", 1), ("os:write", "tear", 1), (UPDATE, "after", 1),
    (CHARGE, "before", 4), ("os:write", "tear", 4), (CHARGE, "after", 4), (DRAW, "after", 4),
    ("torch:Tensor.backward", "after", 4),
    (NOISE, "before", 4), (NOISE, "after", 4), (SUM, "after", 4), (UPDATE, "before", 4), (UPDATE, "after", 4),
    ("torch:save", "tear", 3), ("os:replace", "before", 5), ("os:replace", "after", 5), ("torch:save", "tear", 4),
    ("os:replace", "after", 6), ("os:unlink", "before", 1), ("run.log:WorkDir.write_json", "before", 3),
])
def test_killed_in_one_process(tmp_path, point, when, nth):
    assert kill_and_resume(tmp_path / "run", 1, 0, point, when, nth)


@pytest.mark.parametrize("rank, point, when, nth", [
    (0, CHARGE, "before", 4), (0, CHARGE, "after", 4), (1, DRAW, "after", 4), (1, NOISE, "after", 4),
    (0, SUM, "before", 4),
    (0, UPDATE, "after", 4), (1, UPDATE, "before", 4), (0, "os:replace", "after", 5),
    (1, "run.loop:Trainer.save", "before", 2),
])
def test_killed_on_two_ranks(tmp_path, rank, point, when, nth):
    assert kill_and_resume(tmp_path / "run", 2, rank, point, when, nth)


def test_killed_again_and_again(tmp_path):
    """Killed in every attempt at another place: what is charged adds up, the result does not change."""
    work = tmp_path / "run"
    for attempt, fault in enumerate([kill("os:write", "tear", 1), kill(DRAW, "after", 1), kill(UPDATE, "after", 3),
                                     kill("os:write", "tear", 2), kill("torch:save", "tear", 2)]):
        assert interrupted(work, 1, {0: [fault]}, resume=attempt > 0)[0].status == -signal.SIGKILL
    check_resumed(work, 1)
    # a torn one; one drawn; 1, 2, 3; 3 and a torn one after it; 3, 4, torn checkpoint of 4; 3 to 6
    assert [record["step"] for record in ledger(work)] == [1, 1, 1, 2, 3, 3, 4, 3, 4, 3, 4, 5, 6]


def test_a_point_that_is_never_reached_is_no_kill(tmp_path):
    """The negative control of all of the above."""
    assert not kill_and_resume(tmp_path / "run", 1, 0, UPDATE, "before", STEPS + 1)


def test_a_ledger_written_after_its_step_is_caught(tmp_path):
    """The mutant that charges a step when it is over: a kill between draw and charge breaks check_charged."""
    work = tmp_path / "run"
    with pytest.raises(AssertionError):
        interrupted(work, 1, {0: [["late_ledger", {}], kill(NOISE, "after", 4)]})


@pytest.mark.slow
@pytest.mark.parametrize("point", [*STEP_POINTS, *FILE_POINTS])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_call(tmp_path, point, when):
    """At the first call, the second ... until the run ends unharmed."""
    for nth in range(1, 200):
        if not kill_and_resume(tmp_path / f"run{nth}", 1, 0, point, when, nth):
            break
    assert nth > 1


@pytest.mark.slow
@pytest.mark.parametrize("point", TEARS)
def test_torn_at_every_call(tmp_path, point):
    for nth in range(1, 200):
        if not kill_and_resume(tmp_path / f"run{nth}", 1, 0, point, "tear", nth):
            break
    assert nth == (STEPS if point == "os:write" else 2 * (STEPS // 2)) + 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("point", [*STEP_POINTS, *FILE_POINTS])
def test_killed_at_every_point_on_two_ranks(tmp_path, point, when, rank):
    """In the first step and after the first checkpoint; a point that only rank 0 comes to kills only rank 0."""
    reached = [kill_and_resume(tmp_path / f"run{nth}", 2, rank, point, when, nth) for nth in (1, 4)]
    only_main = point.startswith(("os:", "privacy.ledger", "run.log", "base.files", "weights.checkpoint"))
    seldom = point in ("run.loop:Trainer.save", "run.loop:evaluate", "run.loop:Trainer.close_report", "os:unlink")
    assert reached == ([False, False] if only_main and rank else [True, not seldom])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_killed_at_a_hundred_random_times(tmp_path, size):
    """One to three kills a run, at any time of an attempt's life, of one rank or of all.

    A rank whose partner is killed ends by itself; only one that still waits for its partner to appear is killed after
    it, as a launcher does.
    """
    draw = random.Random(size)
    reference(size)
    begin = time.monotonic()
    train(flags(tmp_path / "measured"), size)
    whole, kills, number = time.monotonic() - begin, 0, 0
    while kills < 100:
        number += 1
        work = tmp_path / f"run{number}"
        for attempt in range(draw.randint(1, 3)):
            joined = [tmp_path / f"joined{number}.{attempt}.{rank}" for rank in range(size)]
            faults = {rank: [["count", {"point": "run.setup:build_trainer", "file": str(joined[rank])}],
                             *(counted(work) if rank == 0 else [])] for rank in range(size)}
            ranks = start_ranks(flags(work, resume=(work / "privacy_ledger.jsonl").exists() or None), size, faults)
            time.sleep(draw.uniform(0, whole))
            for rank in draw.choice([ranks, ranks[:1], ranks[-1:]]):
                rank.kill()
            if not all(path.exists() for path in joined):
                time.sleep(1)
                for rank in ranks:
                    rank.kill()
            statuses = [rank.wait(30) for rank in ranks]
            check_charged(work)
            kills += any(statuses)
        check_resumed(work, size)


def test_a_torn_line_of_metrics_is_dropped(tmp_path):
    """A resumed run leaves a file of whole lines."""
    work = tmp_path / "run"
    interrupted(work, 1, {0: [kill(CHARGE, "before", 5)]})
    path = work / "metrics.jsonl"
    whole = path.read_bytes().splitlines(True)
    path.write_bytes(b"".join(whole)[:-20])
    check_resumed(work, 1)
    assert path.read_bytes().startswith(b"".join(whole[:-1])) and [one["step"] for one in metrics(work)] == [2, 6, 6]


# ------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("size, rank", [(1, 0), (2, 1)])
def test_asked_to_stop(tmp_path, number, size, rank):
    """The step under way is finished and saved, on all ranks, whichever was asked; then it is resumed. What comes right
    after the first signal, from a scheduler and a launcher at once, is the same request."""
    work, again = tmp_path / "run", NOISE
    ranks = interrupted(work, size, {rank: [kill(DRAW, "after", 3, number), kill(again, "after", 3, number)]})
    assert [other.status for other in ranks] == [128 + number] * size, ranks[0].stderr
    assert f"{signal.Signals(number).name}: stopped after step 3; continue with --resume" in ranks[0].stdout
    assert not any(other.stderr for other in ranks)
    assert (work / "model.3.pt").exists() and read(work)["steps_charged"] == 3
    check_resumed(work, size)
    assert read(work)["steps_charged"] == STEPS  # nothing was done twice


@pytest.mark.parametrize("size, rank", [(1, 0), (2, 1)])
@pytest.mark.parametrize("step, changed", [(4, {"eval_interval": 4}), (STEPS, {})])
def test_asked_to_stop_during_an_evaluation(tmp_path, step, changed, size, rank):
    """It ends at once, without a figure; what it would have said last is left to --resume."""
    work = tmp_path / "run"
    ranks = interrupted(work, size, {rank: [kill("run.loop:evaluate", "before", 1, signal.SIGTERM)]}, **changed)
    assert [other.status for other in ranks] == [128 + signal.SIGTERM] * size, ranks[0].stderr
    assert f"SIGTERM: stopped after step {step}; continue with --resume" in ranks[0].stdout
    assert (work / f"model.{step}.pt").exists() and read(work)["steps_charged"] == step
    assert "train_runtime" not in read(work) and not [line for line in metrics(work) if "valid_loss" in line]
    check_resumed(work, size)
    assert read(work)["steps_charged"] == STEPS and read(work)["eval_loss"] == metrics(work)[-1]["valid_loss"]


def test_asked_twice(tmp_path):
    """A later signal ends the process at once."""
    ranks = start_ranks(flags(tmp_path / "run"), 1, {0: [
        kill(DRAW, "after", 3, signal.SIGTERM), ["sleep", {"point": NOISE, "seconds": 5.2, "nth": 3}],
        kill(NOISE, "after", 3, signal.SIGTERM)]})
    assert ranks[0].wait() == -signal.SIGTERM
    check_resumed(tmp_path / "run", 1)


def test_interrupted_while_loading(tmp_path):
    ranks = interrupted(tmp_path / "run", 1, {0: [kill("run.setup:build_trainer", "before", 1, signal.SIGINT)]})
    assert ranks[0].status == 130 and not ranks[0].stderr and not (tmp_path / "run").exists()


# ------------------------------------------------------------------ ranks that die or hang


def test_a_rank_that_hangs_ends_the_job(tmp_path):
    begin = time.monotonic()
    ranks = start_ranks(flags(tmp_path / "run", collective_timeout=4), 2,
                        {1: [["sleep", {"point": DRAW, "seconds": 60, "nth": 3}]]})
    assert ranks[0].wait() == 2 and "another rank died or did not answer in time" in ranks[0].error
    assert time.monotonic() - begin < 30
    ranks[1].kill()  # as the launcher does
    ranks[1].wait()
    check_resumed(tmp_path / "run", 2)


# ------------------------------------------------------------------ disks


def stopped_at_two(work: pathlib.Path, size: int = 1) -> dict[str, bytes]:
    """A run that was killed in step 4, with its checkpoint of step 2; the checkpoint's files."""
    interrupted(work, size, {0: [kill(CHARGE, "before", 4)]})
    return {name: content for name, content in contents(work).items() if name.endswith(".pt")}


@pytest.mark.parametrize("size", [1, 2])
def test_no_room_for_the_checkpoint(tmp_path, size):
    """A file cannot grow beyond 3000 bytes: the ledger can, the checkpoint cannot. The one before is intact."""
    work = tmp_path / "run"
    before = stopped_at_two(work, size)
    ranks = interrupted(work, size, {0: [["file_limit", {"size": 3000, "point": CHARGE}]]}, resume=True)
    assert [rank.status for rank in ranks] == [2] * size
    assert "the checkpoint of step 4 could not be written (File too large); the one before is intact" in ranks[0].error
    assert {name: content for name, content in contents(work).items() if name.endswith((".pt", ".partial"))} == before
    check_resumed(work, size)


@pytest.mark.parametrize("size", [1, 2])
def test_no_room_for_the_ledger(tmp_path, size):
    """The step whose record does not fit is not drawn; what was written of the record is taken back."""
    work = tmp_path / "run"
    before = stopped_at_two(work, size)
    whole = (work / "privacy_ledger.jsonl").read_bytes()
    limit = len(whole) + len(whole) // 3 * 3 // 2  # half of the second record after it
    ranks = interrupted(work, size, {0: [["file_limit", {"size": limit, "point": CHARGE}]]}, resume=True,
                        save_interval=100, log_interval=100)
    assert [rank.status for rank in ranks] == [2] * size
    assert "step 4 was not drawn; make room and --resume" in ranks[0].error
    assert [record["step"] for record in ledger(work)] == [1, 2, 3, 3]
    assert (work / "privacy_ledger.jsonl").read_bytes().endswith(b"\n")
    assert counter(work, "drawn").stat().st_size == 4
    assert {name: content for name, content in contents(work).items() if name.endswith(".pt")} == before
    check_resumed(work, size)


def test_no_room_to_mend_a_torn_ledger(tmp_path):
    """The torn line stays torn, and stays charged."""
    work = tmp_path / "run"
    interrupted(work, 1, {0: [kill("os:write", "tear", 4)]})
    torn = (work / "privacy_ledger.jsonl").read_bytes()
    assert not torn.endswith(b"\n")
    ranks = interrupted(work, 1, {0: [["file_limit", {"size": len(torn) + 5, "point": REPAIR}]]}, resume=True)
    assert ranks[0].status == 2 and "privacy_ledger.jsonl" in ranks[0].error
    assert check_charged(work) == 4
    check_resumed(work, 1)
    assert read(work)["steps_charged"] == 4 + 4


@pytest.mark.parametrize("point, nth, words", [
    ("os:write", 3, "step 3 was not drawn"), ("os:fsync", 1, "No space left on device"),
    ("os:fsync", 4, "step 1 was not drawn"), ("os:replace", 3, "the checkpoint of step 2 could not be written"),
    ("os:replace", 4, "the checkpoint of step 2 could not be written"),
])
def test_a_device_that_fails(tmp_path, point, nth, words):
    """ENOSPC from any call: one line, status 2, and the run can go on."""
    work = tmp_path / "run"
    ranks = interrupted(work, 1, {0: [["error", {"point": point, "nth": nth, "number": errno.ENOSPC}]]})
    assert ranks[0].status == 2 and words in ranks[0].error
    check_resumed(work, 1)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("pages, words", [
    (1, "args.json"),  # the lock's page, and none for this file
    (2, "step 1 was not drawn"), (3, "metrics.jsonl"),
    # optimizer, model, privacy.json
    *((pages, "the checkpoint of step 2 could not be written") for pages in (4, 5, 6)),
])
def test_a_full_disk(small_disk, tmp_path, pages, words):
    """With room for a few pages of 4 kB only, the run says what it could not write; with room again it goes on."""
    ballast, work = small_disk / "ballast", small_disk / "run"
    free = os.statvfs(small_disk)
    ballast.write_bytes(bytes((free.f_bavail - pages) * free.f_bsize))
    work.mkdir()
    ranks = interrupted(work, 1, {})
    assert ranks[0].status == 2 and words in ranks[0].error, ranks[0].stdout + ranks[0].stderr
    assert "No space left on device" in ranks[0].error
    assert not [name for name in contents(work) if name.endswith(".partial")]
    ballast.unlink()
    check_resumed(work, 1)
