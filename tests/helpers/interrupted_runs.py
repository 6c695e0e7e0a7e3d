"""Runs of gpt2_ft.py that are broken off on purpose and resumed, with their draws counted across the attempts."""

import functools
import os
import pathlib
import signal

from helpers.small_runs import STEPS, equal, flags, ledger, material, metrics, read, start_ranks, train, weights

DRAW, CHARGE = "privacy.sampling:PoissonSampler.draw", "privacy.ledger:Ledger.charge"
NOISE, SUM = "privacy.randomness:NoiseSource.add_normal_", "base.distributed:World.all_reduce"
UPDATE = "optimizer:AdamW.step"


@functools.cache
def reference(size: int) -> dict:
    """The weights of the run that nothing interrupts."""
    work = material() / f"reference{size}"
    train(flags(work), size)
    return weights(work)


def kill(point: str, when: str, nth: int, number: int = signal.SIGKILL) -> list:
    if when == "tear":
        return ["tear", {"point": point, "nth": nth}]
    return ["signal", {"point": point, "when": when, "nth": nth, "number": int(number)}]


def counter(work: pathlib.Path, what: str) -> pathlib.Path:
    """The file that counts a run's calls: not on its disk, which may be full."""
    return material() / f"{str(work).replace('/', '_')}.{what}"


def counted(work: pathlib.Path) -> list:
    """Counts the masks drawn and the sums noised by rank 0, across attempts."""
    return [["count", {"point": point, "file": str(counter(work, what))}]
            for point, what in ((DRAW, "drawn"), (NOISE, "noised"))]


def check_charged(work: pathlib.Path) -> int:
    """The ledger holds at least as many steps as masks were drawn and sums noised; returns how many it holds."""
    path = work / "privacy_ledger.jsonl"
    content = path.read_bytes() if path.exists() else b""
    charged = content.count(b"\n") + (not content.endswith(b"\n") and content != b"")
    for name in ("drawn", "noised"):
        count = counter(work, name)
        assert charged >= (count.stat().st_size if count.exists() else 0)
    return charged


def interrupted(work: pathlib.Path, size: int, faults: dict[int, list], resume: bool = False, **changed) -> list:
    """A run with faults; every rank has ended, and what the ledger holds was checked."""
    faults = {rank: [*(counted(work) if rank == 0 else []), *faults.get(rank, [])] for rank in range(size)}
    ranks = start_ranks(flags(work, resume=resume or None, **changed), size, faults)
    for rank in ranks:
        rank.status = rank.wait()
    check_charged(work)
    return ranks


def check_resumed(work: pathlib.Path, size: int) -> None:
    """--resume ends well; ranks agree; weights are the uninterrupted run's; the report counts every draw."""
    if not (work / "privacy_ledger.jsonl").exists():  # killed before there was anything to continue
        train(flags(work), size, {0: counted(work)})
    else:
        dumps = {rank: [["dump", {"file": str(counter(work, f"rank{rank}"))}], *(counted(work) if rank == 0 else [])]
                 for rank in range(size)}
        train(flags(work, resume=True), size, dumps)
        assert len({counter(work, f"rank{rank}").read_bytes() for rank in range(size)}) == 1
    charged = check_charged(work)
    assert read(work)["steps_charged"] == charged == len(ledger(work))
    assert equal(weights(work), reference(size))
    assert [record["step"] for record in metrics(work) if "loss" in record][-1] == STEPS
    assert not [name for name in os.listdir(work) if name.endswith(".partial") and not name.startswith("privacy")
                and not name.startswith("args")]
