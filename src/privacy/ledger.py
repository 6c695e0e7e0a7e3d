"""The ledger: a record for every step that was ever drawn, on disk before the step's mask is drawn.

`privacy_ledger.jsonl` is append-only. Each line holds all settings (unit, N, q, sigma, clip, sampling, delta ...), so
epsilon can be recomputed from this one file. Each line has a checksum over itself and the line before, which detects
lines that were changed, dropped or moved. A last line cut short by a kill counts as one step; damage anywhere else is
refused. One run at a time writes there. A run that finds its file changed by another ends.

Each record has a format number. The formats so far, whose records may follow each other in one file:
  1  has no entry "format"; the mechanism, of which it has no entry either, is "gaussian".
  2  names both.
To add a key, give FORMAT the next number. Put the key into TYPES, the new format's keys into KEYS, and the key's value
in records of earlier formats into ABSENT.

Guarantee: at any moment the ledger holds at least every noisy sum that ever reached a parameter, a file or the screen.
"""

import contextlib
import glob
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from base.chain import Overtaken, append, digest, mend, read_chain
from base.errors import fail
from base.files import atomic_write, check_file, check_format, lock, sync_folder

FILE_NAME = "privacy_ledger.jsonl"
KEPT = (
    ".kept"  # suffix of the copy that a run leaves where its ledger was removed or replaced; a second one: .{process}
)
# A resumed run must have the ledger's values of these, unless --resume_changed names them.
MUST_MATCH = (
    "unit",
    "N",
    "q",
    "sigma",
    "clip",
    "mechanism",
    "sampling",
    "steps_per_epoch",
    "delta",
    "world_size",
    "noise_source",
)
FORMAT = 2  # of the records that are written
TYPES = {
    "format": int,
    "step": int,
    "attempt": int,
    "unit": str,
    "N": int,
    "q": float,
    "sigma": float,
    "clip": float,
    "mechanism": str,
    "sampling": str,
    "steps_per_epoch": int,
    "delta": float,
    "world_size": int,
    "noise_source": str,
    "checksum": str,
}
KEYS = {1: set(TYPES) - {"format", "mechanism"}, 2: set(TYPES)}  # format -> the keys of its records
ABSENT = {"format": 1, "mechanism": "gaussian"}  # key -> its value in records whose format does not have it
LABEL_COUNTS = "label-counts"  # the mechanism of a record that is no step: a histogram of labels (label_counts.py)
NAMES = {  # key -> its permitted values
    "mechanism": ("gaussian", LABEL_COUNTS),
    "sampling": ("poisson", "shuffle", "allocation"),
    "noise_source": ("os", "secure", "seeded"),
}


def written(record: Mapping) -> dict:
    """A record as the file has it: with the keys of its format alone."""
    keys = KEYS[record.get("format", ABSENT["format"])]
    return {key: record[key] for key in record if key in keys}


def checksum(previous: str, record: Mapping) -> str:
    """Digest of a record (without its checksum) and of the checksum before it."""
    return digest(previous, written(record))


def encode(record: Mapping) -> bytes:
    """The line of a record, which has its checksum already."""
    return json.dumps(written(record)).encode() + b"\n"


@dataclass
class LedgerState:
    """What a ledger holds. `records` have all keys of TYPES; `size` is the length in bytes of the whole lines."""

    records: list[dict] = field(default_factory=list)
    torn: bool = False
    size: int = 0

    @property
    def charged(self) -> int:
        """The number of steps that epsilon counts."""
        return len(self.records) + self.torn

    @property
    def charges(self) -> list[dict]:
        """The records to be priced: a torn line is charged like the one before it, as the first of an attempt."""
        if not self.torn or not self.records:
            return self.records
        return [*self.records, {**self.records[-1], "attempt": self.attempts + 1}]

    @property
    def last_step(self) -> dict:
        """The last record that is a step of the training; the last one where none is."""
        steps = [record for record in self.records if record["mechanism"] != LABEL_COUNTS]
        return (steps or self.records)[-1]

    @property
    def last_checksum(self) -> str:
        return self.records[-1]["checksum"] if self.records else ""

    @property
    def attempts(self) -> int:
        return self.records[-1]["attempt"] if self.records else 0


def check_record(record: object, previous: LedgerState, where: str) -> str | None:
    """Why `record` cannot follow `previous`, or None. UserError, which begins with `where`, for an unknown format."""
    number = check_format(record.get("format"), FORMAT, where) if isinstance(record, dict) else FORMAT
    if not isinstance(record, dict) or set(record) != KEYS[number]:
        return f"its keys are not {', '.join(key for key in TYPES if key in KEYS[number])}"
    for key, kind in TYPES.items():
        if key not in record:
            continue
        allowed = (int, float) if kind is float else kind
        if not isinstance(record[key], allowed) or isinstance(record[key], bool):
            return f"{key} is {record[key]!r}, wanted {kind.__name__}"
    if record["checksum"] != checksum(previous.last_checksum, record):
        return "its checksum does not follow from the line before"
    if not (
        record["step"] >= 1
        and record["attempt"] >= max(1, previous.attempts)
        and record["N"] >= 1
        and 0 < record["q"] <= 1
        and 0 <= record["sigma"] < math.inf
        and 0 < record["clip"] < math.inf
        and record["steps_per_epoch"] >= 1
        and 0 < record["delta"] < 1
        and record["world_size"] >= 1
        and all(record[key] in names for key, names in NAMES.items() if key in record)
    ):
        return "a value is out of range"
    return None


def check_none_was_kept(path: str) -> None:
    """Raise UserError where a run has left a copy of its ledger, because the file at `path` was removed or changed."""
    found = [f"{path}{KEPT}", *sorted(glob.glob(f"{glob.escape(path)}{KEPT}.*"))]
    kept = [name for name in found if os.path.exists(name) and not name.endswith(".partial")]
    if kept:
        fail(
            f"{kept[0]}: holds what a run charged whose {os.path.basename(path)} was taken away or changed; put it "
            f"into the place of {path}, or remove it where that one holds all its lines"
        )


def read_ledger(path: str, opened: int | None = None) -> LedgerState:
    """Read and check a whole ledger, `opened` where it is. Raises UserError with file:line for damage that a kill
    cannot explain."""
    check_none_was_kept(path)
    state = LedgerState()

    def accept(record: object, where: str) -> str | None:
        problem = check_record(record, state, where)
        if problem is None and isinstance(record, dict):
            state.records.append({**ABSENT, **record})
        return problem

    state.size, rest = read_chain(
        path,
        opened,
        accept,
        unreadable="the privacy ledger cannot be read ({}); without it nobody knows what was spent",
        damaged="restore the ledger, its epsilon cannot be trusted",
    )
    state.torn = bool(rest)
    return state


class Ledger:
    """The ledger of a run, open for appending, with the settings that every record of this attempt carries.

    The file belongs to this run alone: it is locked, and before each write the run checks that the file at its path is
    as the last write left it. Where another has written, no further step is drawn, and no record is removed.
    """

    def __init__(
        self, work_dir: str, settings: Mapping, resume: bool, changed: tuple[str, ...] = (), flag: str = "--work_dir"
    ):
        """settings: the MUST_MATCH keys. resume: continue the folder's ledger, which must equal `settings` except in
        `changed`. Raises UserError where it is missing or differs, where a new run finds one, or where another run has
        it locked."""
        self.path = os.path.join(work_dir, FILE_NAME)
        self.settings = {key: settings[key] for key in MUST_MATCH}
        check_none_was_kept(self.path)
        check_file(self.path)
        try:
            self.handle = os.open(self.path, os.O_RDWR | os.O_APPEND | (0 if resume else os.O_CREAT), 0o644)
        except FileNotFoundError:
            fail(
                f"--resume: {self.path} is missing: nobody knows what the run has spent; restore it or start in a new "
                "folder"
            )
        try:
            self.locked = lock(self.handle)  # False: there are no locks, and check() alone notices another run
            if not resume and os.fstat(self.handle).st_size:  # an empty one is of a run that never drew a step
                fail(
                    f"{flag} {work_dir}: holds {FILE_NAME} of an earlier run; continue it with --resume, "
                    "or choose another folder (deleting it would forget privacy already spent)"
                )
            self.state = read_ledger(self.path, self.handle)
            if self.state.records:
                self.compare(self.state.last_step, changed)
            self.attempt = self.state.attempts + 1
            self.synced = sync_folder(work_dir)  # False: its name on the disk may not survive a power cut
            if self.state.torn:
                self.repair_torn_line()
        except BlockingIOError:
            os.close(self.handle)
            fail(f"{flag} {work_dir}: another run is writing there: it holds {FILE_NAME}; wait for its end, or stop it")
        except BaseException:
            os.close(self.handle)
            raise

    def compare(self, last: Mapping, changed: tuple[str, ...]) -> None:
        if last["unit"] != self.settings["unit"]:  # no epsilon of one unit says anything about the other
            fail(
                f"--resume: {self.path} counts for one {last['unit']}, this run for one {self.settings['unit']}: "
                "no epsilon holds for both; start in a new folder"
            )
        differing = [key for key in MUST_MATCH if last[key] != self.settings[key] and key not in changed]
        if differing:
            what = ", ".join(f"{key} {last[key]} there, {self.settings[key]} here" for key in differing)
            data = " (the training data have changed, or are others)" if "N" in differing else ""
            fail(
                f"--resume: {self.path} is of a run with other settings: {what}{data}; "
                f"if that is meant, say so with --resume_changed {' '.join(differing)}"
            )

    def repair_torn_line(self) -> None:
        """Write a whole record over a torn last line, so that lines may follow it. The torn step stays charged, with
        the settings of the line before it."""
        last = self.state.records[-1] if self.state.records else self.settings
        record = self.chained({**last, "step": last.get("step", 0) + 1, "attempt": max(1, self.state.attempts)})
        line = encode(record)
        try:
            mend(self.path, self.handle, line, self.state.size)
        except Overtaken:
            fail(f"{self.path}: grows while it is read: another run is writing there; wait for its end, or stop it")
        except OSError as error:  # what could not be repaired stays torn: it counts
            fail(
                f"{self.path}: {error.strerror}: its last line is cut short and could not be repaired; make room and "
                "--resume"
            )
        self.add(record, line)
        self.state.torn = False

    def charge(self, step: int) -> None:
        """Append the record of `step` and flush it to disk. On return, and only then, may the step's mask be drawn.

        Raises UserError where the disk refuses, and where the file is not as this run left it.
        """
        record = self.chained({**self.settings, "step": step, "attempt": self.attempt})
        undone = f"step {step} was not drawn"
        self.check(undone)
        line = encode(record)
        try:
            append(self.handle, line, self.state.size)
        except Overtaken:
            fail(f"{self.path}: another run or program wrote there at the same moment; {undone}; {self.keep()}")
        except OSError as error:
            fail(f"{self.path}: {error.strerror}: {undone}; make room and --resume")
        self.add(record, line)

    def chained(self, record: Mapping) -> dict:
        """The next record: the keys of TYPES in their order, with its checksum."""
        record = {**record, "format": FORMAT}
        record = {key: record[key] for key in TYPES if key != "checksum"}
        return {**record, "checksum": checksum(self.state.last_checksum, record)}

    def add(self, record: dict, line: bytes) -> None:
        self.state.records.append(record)
        self.state.size += len(line)

    def check(self, undone: str) -> None:
        """Raise UserError where the file at the path is not as this run left it. undone: the words for what then stops.

        The file is opened anew: on a network's file system, only opening it shows what another machine wrote.
        """
        try:
            check_file(self.path)  # opened, a pipe would wait for who writes
            held = os.fstat(self.handle)
            with open(self.path, "rb", buffering=0) as there:
                present = os.fstat(there.fileno())
        except OSError as error:
            problem = f"cannot be opened any more ({error.strerror})"
        else:
            if (present.st_dev, present.st_ino) != (held.st_dev, held.st_ino):
                problem = "is no longer the file that this run has written to"
            elif present.st_size != self.state.size:
                problem = f"holds {present.st_size} bytes where this run left {self.state.size}"
            else:
                return
        fail(f"{self.path}: {problem}: another run or program has changed it; {undone}; {self.keep()}")

    def keep(self) -> str:
        """Write this run's records to a copy, unless the file still holds them. Returns the words for the cure."""
        if not self.state.records:
            return "nothing was charged yet: start the run again"
        records = b"".join(encode(record) for record in self.state.records)
        with contextlib.suppress(OSError):
            if holds(self.path, records):
                return "what this run charged is still in it: end whatever else writes there, and --resume"
        kept = self.path + KEPT
        try:
            if os.path.exists(kept) and not holds(kept, records):  # of another run, in a folder that both wrote to
                kept += f".{os.getpid()}"
            with atomic_write(kept, "wb") as handle:
                handle.write(records)
        except OSError:
            return f"this run charged {len(self.state.records)} steps; restore the ledger that holds them"
        return f"what this run charged is in {kept}: put that into its place, and --resume"

    def close(self) -> None:
        os.close(self.handle)


def holds(path: str, records: bytes) -> bool:
    """Whether a file begins with these records."""
    with open(path, "rb") as there:
        return there.read(len(records)) == records


class NoLedger(Ledger):
    """The ledger on every rank but the first: it holds nothing and writes nothing."""

    def __init__(self) -> None:
        self.path, self.locked, self.synced, self.state = "", True, True, LedgerState()

    def charge(self, step: int) -> None:
        raise RuntimeError("rank 0 alone charges a step")

    def check(self, undone: str) -> None:
        pass


def noise_sources(state: LedgerState) -> set[str]:
    """Where the noise of the charged steps came from, over all attempts."""
    return {record["noise_source"] for record in state.records}
