"""The ledger: a record for every step that was ever drawn, on disk before the step's mask is.

`privacy_ledger.jsonl` is append-only. Each line stands alone (unit, N, q, sigma, clip, sampling, delta ...), so epsilon
can be recomputed from this one file, and carries a checksum over itself and the line before, so a line that was
changed, dropped or moved shows. A last line cut short by a kill counts as one step; damage anywhere else is refused.

Guarantee: at any moment the ledger holds at least every noisy sum that ever reached a parameter, a file or the screen.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from cli import UserError, fail, sync_folder
from privacy import accounting

FILE_NAME = "privacy_ledger.jsonl"
# A resumed run must agree with the ledger on these, unless --resume_changed names them.
FIXED = ("unit", "N", "q", "sigma", "clip", "sampling", "steps_per_epoch", "delta", "world_size", "noise_source")
TYPES = {"step": int, "attempt": int, "unit": str, "N": int, "q": float, "sigma": float, "clip": float, "sampling": str,
         "steps_per_epoch": int, "delta": float, "world_size": int, "noise_source": str, "checksum": str}


def checksum(previous: str, record: Mapping) -> str:
    """Digest of a record (without its own checksum) chained to the one before."""
    body = json.dumps({key: record[key] for key in record if key != "checksum"}, sort_keys=True)
    return hashlib.sha256(f"{previous}\n{body}".encode()).hexdigest()[:16]


@dataclass
class LedgerState:
    """What a ledger holds. `size` is the length in bytes of its whole lines."""

    records: list[dict] = field(default_factory=list)
    torn: bool = False
    size: int = 0

    @property
    def charged(self) -> int:
        """Steps that privacy was paid for."""
        return len(self.records) + self.torn

    @property
    def last_checksum(self) -> str:
        return self.records[-1]["checksum"] if self.records else ""

    @property
    def attempts(self) -> int:
        return self.records[-1]["attempt"] if self.records else 0


def check_record(record: object, previous: LedgerState) -> str | None:
    """Why `record` cannot follow `previous`, or None."""
    if not isinstance(record, dict) or set(record) != set(TYPES):
        return f"its keys are not {', '.join(TYPES)}"
    for key, kind in TYPES.items():
        allowed = (int, float) if kind is float else kind
        if not isinstance(record[key], allowed) or isinstance(record[key], bool):
            return f"{key} is {record[key]!r}, wanted {kind.__name__}"
    if record["checksum"] != checksum(previous.last_checksum, record):
        return "its checksum does not follow from the line before"
    if not (record["step"] >= 1 and record["attempt"] >= max(1, previous.attempts) and record["N"] >= 1
            and 0 < record["q"] <= 1 and 0 <= record["sigma"] < math.inf and 0 < record["clip"] < math.inf
            and record["sampling"] in ("poisson", "shuffle") and record["steps_per_epoch"] >= 1
            and 0 < record["delta"] < 1 and record["world_size"] >= 1
            and record["noise_source"] in ("os", "secure", "seeded")):
        return "a value is out of range"
    return None


def read_ledger(path: str) -> LedgerState:
    """Read and check a whole ledger. Raises UserError with file:line for damage that a kill cannot explain."""
    state = LedgerState()
    try:
        with open(path, "rb") as handle:
            content = handle.read()
    except OSError as error:
        fail(f"{path}: the privacy ledger cannot be read ({error.strerror}); without it nobody knows what was spent")
    *lines, rest = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        problem = check_record(record, state)
        if problem is not None:
            fail(f"{path}:{number}: damaged: {problem}; restore the ledger, its epsilon cannot be trusted")
        state.records.append(record)
        state.size += len(line) + 1
    state.torn = bool(rest)
    return state


class Ledger:
    """The ledger of a run, open for appending, with the settings that every record of this attempt carries."""

    def __init__(self, work_dir: str, settings: Mapping, resume: bool, changed: tuple[str, ...] = (),
                 flag: str = "--work_dir"):
        """settings: the FIXED keys. resume: continue the folder's ledger, which must agree with `settings` except in
        `changed`. Raises UserError where it is missing or differs, or where a new run finds one."""
        self.path = os.path.join(work_dir, FILE_NAME)
        self.settings = {key: settings[key] for key in FIXED}
        exists = os.path.exists(self.path)
        if exists and os.path.getsize(self.path) and not resume:  # an empty one is of a run that never drew a step
            fail(f"{flag} {work_dir}: holds {FILE_NAME} of an earlier run; continue it with --resume, "
                 "or choose another folder (deleting it would forget privacy already spent)")
        if resume and not exists:
            fail(f"--resume: {self.path} is missing: nobody knows what the run has spent; restore it or start in a new "
                 "folder")
        self.state = read_ledger(self.path) if exists else LedgerState()
        if self.state.records:
            self.compare(self.state.records[-1], changed)
        self.attempt = self.state.attempts + 1
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        sync_folder(work_dir)
        if self.state.torn:
            self.mend()

    def compare(self, last: Mapping, changed: tuple[str, ...]) -> None:
        if last["unit"] != self.settings["unit"]:  # no epsilon of one unit says anything about the other
            fail(f"--resume: {self.path} counts for one {last['unit']}, this run for one {self.settings['unit']}: "
                 "no epsilon holds for both; start in a new folder")
        differing = [key for key in FIXED if last[key] != self.settings[key] and key not in changed]
        if differing:
            what = ", ".join(f"{key} {last[key]} there, {self.settings[key]} here" for key in differing)
            fail(f"--resume: {self.path} is of a run with other settings: {what}; "
                 f"if that is meant, say so with --resume_changed {' '.join(differing)}")

    def mend(self) -> None:
        """Write a whole record over a torn last line, so that lines may follow it. The torn step stays charged, with
        the settings of the line before it."""
        last = self.state.records[-1] if self.state.records else self.settings
        self.write({**last, "step": last.get("step", 0) + 1, "attempt": max(1, self.state.attempts)})
        self.state.torn = False

    def charge(self, step: int) -> None:
        """Append the record of `step` and flush it to disk. On return, and only then, may the step's mask be drawn.

        Raises UserError where the disk refuses; the ledger then holds what it held before.
        """
        self.write({**self.settings, "step": step, "attempt": self.attempt})

    def write(self, record: dict) -> None:
        record = {key: record[key] for key in TYPES if key != "checksum"}
        record["checksum"] = checksum(self.state.last_checksum, record)
        line = json.dumps(record).encode() + b"\n"
        before = os.fstat(self.handle).st_size
        try:
            written = os.pwrite(self.handle, line, self.state.size)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.ftruncate(self.handle, self.state.size + len(line))  # a torn line may have been the longer one
            os.fsync(self.handle)
        except OSError as error:
            with contextlib.suppress(OSError):  # failing here too leaves a record too many, never one too few
                os.ftruncate(self.handle, before)  # a torn line that could not be mended stays torn: it counts
            raise UserError(f"{self.path}: {error.strerror}: step {record['step']} was not drawn; make room and "
                            "--resume")
        self.state.records.append(record)
        self.state.size += len(line)

    def close(self) -> None:
        os.close(self.handle)


def phases(state: LedgerState) -> list[accounting.Phase]:
    """The Poisson steps of a ledger, grouped by (sigma, q). A torn line is charged like the record before it."""
    counts = Counter((record["sigma"], record["q"]) for record in state.records if record["sampling"] == "poisson")
    if state.torn and state.records and state.records[-1]["sampling"] == "poisson":
        counts[state.records[-1]["sigma"], state.records[-1]["q"]] += 1
    return [accounting.Phase(sigma, q, steps) for (sigma, q), steps in counts.items()]


def participations(state: LedgerState) -> Counter:
    """sigma -> how often any one unit can have taken part in shuffled steps: once in every epoch of every attempt.

    A resumed attempt shuffles afresh, so an epoch that it shares with the attempt before counts twice.
    """
    epochs = {(record["attempt"], (record["step"] - 1) // record["steps_per_epoch"], record["sigma"])
              for record in state.records if record["sampling"] == "shuffle"}
    counts = Counter(sigma for _, _, sigma in epochs)
    if state.torn and state.records and state.records[-1]["sampling"] == "shuffle":
        counts[state.records[-1]["sigma"]] += 1
    return counts


def noise_sources(state: LedgerState) -> set[str]:
    """Where the noise of the charged steps came from, over all attempts."""
    return {record["noise_source"] for record in state.records}


def spent(state: LedgerState) -> list[accounting.Phase]:
    """Everything that a ledger charges. A full participation is a step with q = 1: it composes with Poisson steps."""
    return phases(state) + [accounting.Phase(sigma, 1.0, count) for sigma, count in participations(state).items()]


def epsilons(state: LedgerState, delta: float) -> tuple[float, float]:
    """(PRV upper bound, RDP) of everything in the ledger, at `delta`."""
    return accounting.epsilon_prv(spent(state), delta), accounting.epsilon_rdp(spent(state), delta)
