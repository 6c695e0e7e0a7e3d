"""The budget file of a data set: what its runs may disclose together, reserved before it is spent.

`budget.jsonl` is append-only, chained by checksums, and written as the ledger is (base/chain.py). Its lines:
  create   unit, the training file's sha256, and the limit: epsilon at delta
  reserve  a run takes `uses` more, before it draws the first step that needs them
  close    from here on the run draws no step
  release  what the closed run's ledger charges: from here on this counts, in place of what it had reserved
  void     a last line cut short: its writer was killed before it drew anything for it

Guarantee: at any moment the composition of all that counts is no less than all that the runs have drawn, and a run
reserves only while that composition, the PRV upper bound, stays within the limit.
  - A transaction holds the file's lock. Without locks, one that was overtaken takes its line back and fails.
  - A run draws a step when its record is in its ledger, and after that its reservation was still seen open. A release
    closes the reservation before it reads the ledger. So either the run sees the closing and does not draw, or the
    release reads the record: whatever the machines' locks are worth.
  - A run that was killed, or whose ledger is gone, counts with all that it reserved.
"""

import contextlib
import json
import math
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from base.chain import Overtaken, append, digest, mend, read_chain
from base.errors import fail
from base.files import check_file, check_format, lock, sync_folder
from privacy import accounting
from privacy.allocation import Share
from privacy.composition import Cost, phases_of
from privacy.ledger import NAMES
from privacy.plan import relation

FORMAT = 1
KINDS: dict[str, dict[str, type]] = {  # kind -> its keys beside format, kind and checksum
    "create": {"unit": str, "data": str, "epsilon": float, "delta": float},
    "reserve": {"reservation": str, "ledger": str, "uses": list},
    "close": {"reservation": str},
    "release": {"reservation": str, "uses": list},
    "void": {"text": str},
}
PATIENCE = 120.0  # seconds to wait for another's transaction, which computes an epsilon or two
CREATE = "python src/privacy_budget.py create"


def pack(cost: Cost) -> list[list]:
    """A cost as a record has it: [[mechanism, sampler, sigma, q, uses], ...]; of random allocation, an epoch is a use,
    and [steps taken, steps of an epoch] stands in place of q."""
    items = sorted(cost.items(), key=str)
    return [
        [*key, list(share) if isinstance(share, tuple) else share, count] for (*key, share), count in items if count
    ]


def unpack(uses: list) -> Cost | None:
    """The reverse; None for what no run writes."""
    cost: Cost = Counter()
    for entry in uses:
        if not isinstance(entry, list) or len(entry) != 5:
            return None
        mechanism, sampling, sigma, q, count = entry
        if (
            mechanism not in NAMES["mechanism"]
            or sampling not in NAMES["sampling"]
            or type(sigma) not in (int, float)
            or type(count) is not int
            or not (0 <= sigma < math.inf and 0 < count <= accounting.MOST_STEPS)
            or (share := unpack_share(q)) is None
        ):
            return None
        cost[mechanism, sampling, float(sigma), share] += count
    return cost


def unpack_share(q: object) -> Share | None:
    """The share that stands in place of q, or q; None for what is neither."""
    if isinstance(q, list):
        whole = len(q) == 2 and all(type(value) is int for value in q) and 1 <= q[0] <= q[1]
        return (q[0], q[1]) if whole else None
    return float(q) if isinstance(q, (int, float)) and not isinstance(q, bool) and 0 < q <= 1 else None


@dataclass
class Reservation:
    """What a run reserved. ledger: the real path of its ledger; counted: what stands for the run in the total."""

    name: str
    ledger: str
    counted: Cost = field(default_factory=Counter)
    open: bool = True
    released: bool = False  # `counted` is what its ledger charges


@dataclass
class BudgetState:
    """What a budget file holds. size: bytes of the whole lines; torn: what follows them."""

    path: str
    unit: str = ""
    data: str = ""
    epsilon: float = math.nan
    delta: float = math.nan
    reservations: dict[str, Reservation] = field(default_factory=dict)
    last_checksum: str = ""
    size: int = 0
    torn: bytes = b""

    @property
    def counted(self) -> Cost:
        """All that counts: reserved by runs that are not released, and charged by those that are."""
        return sum((one.counted for one in self.reservations.values()), Counter())

    def total(self, more: Cost | None = None) -> float:
        """Epsilon, the PRV upper bound, of all that counts and of `more`, at the budget's delta."""
        return accounting.epsilon_prv(phases_of(self.counted + (more or Counter())), self.delta)

    @property
    def relations(self) -> set[str]:
        """When two data sets are neighbours, for the runs so far: none, or one."""
        samplings = (
            {sampling for _, sampling, _, _ in one.counted} for one in self.reservations.values() if one.counted
        )
        return {relation(self.unit, found) for found in samplings}

    def problem(self, record: object, where: str) -> str | None:
        """Why `record` cannot follow, or None. UserError for an unknown format."""
        if not isinstance(record, dict):
            return "it is not an object"
        if record.get("format") is None:
            return "it has no format"
        check_format(record["format"], FORMAT, where)
        kind = record.get("kind")
        keys = KINDS.get(kind) if isinstance(kind, str) else None
        if keys is None or set(record) != {"format", "kind", "checksum", *keys}:
            return "its keys are not those of a budget's record"
        for key, wanted in keys.items():
            allowed = (int, float) if wanted is float else (wanted,)
            if type(record[key]) not in allowed:
                return f"{key} is {record[key]!r}, wanted {wanted.__name__}"
        if record["checksum"] != digest(self.last_checksum, record):
            return "its checksum does not follow from the line before"
        if (record["kind"] == "create") != (not self.unit):
            return "a budget has one line of its creation, the first"
        held = self.reservations.get(record.get("reservation", ""))
        if record["kind"] == "create" and not (
            names_unit(record["unit"]) and 0 < record["epsilon"] < math.inf and 0 < record["delta"] < 1
        ):
            return "a value is out of range"
        if "uses" in keys and unpack(record["uses"]) is None:
            return "its uses are out of range"
        if record["kind"] in ("close", "release") and (held is None or held.open != (record["kind"] == "close")):
            return f"it is no {record['kind']} of a reservation that can have one"
        if record["kind"] == "reserve" and held is not None and held.ledger != record["ledger"]:
            return "its reservation is of another ledger"
        return None

    def add(self, record: dict) -> None:
        """Take in a record that problem() accepts."""
        kind, name = record["kind"], record.get("reservation", "")
        if kind == "create":
            self.unit, self.data = record["unit"], record["data"]
            self.epsilon, self.delta = float(record["epsilon"]), float(record["delta"])
        elif kind == "reserve":
            held = self.reservations.setdefault(name, Reservation(name, record["ledger"]))
            held.counted += unpack(record["uses"]) or Counter()
            held.open, held.released = True, False
        elif kind == "close":
            self.reservations[name].open = False
        elif kind == "release":
            self.reservations[name].counted = unpack(record["uses"]) or Counter()
            self.reservations[name].released = True
        self.last_checksum = record["checksum"]


def read_budget(path: str, flag: str = "", opened: int | None = None) -> BudgetState:
    """Read and check a whole budget file. UserError, which names `flag`, where it cannot be read, is damaged, or holds
    no line of its creation."""
    where, state = f"{flag} {path}".strip(), BudgetState(path)

    def accept(record: object, place: str) -> str | None:
        problem = state.problem(record, place)
        if problem is None and isinstance(record, dict):
            state.add(record)
        return problem

    if opened is None and not os.path.exists(path):
        fail(f"{where}: no such budget; make one with {CREATE} {path} --train_data FILE --epsilon 8 --delta 1e-5")
    state.size, state.torn = read_chain(
        path,
        opened,
        accept,
        unreadable="the budget cannot be read ({}); without it nobody knows what is left",
        damaged="restore the budget file, its total cannot be trusted",
    )
    if not state.unit:
        fail(f"{where}: holds no budget; is its creation cut short? Remove it, and {CREATE} it again")
    return state


def names_unit(unit: str) -> bool:
    """Whether a run can have this unit: example, author, line, or any field that --unit_field takes."""
    return bool(unit.strip()) and unit.isprintable()


def create_budget(path: str, unit: str, data: str, epsilon: float, delta: float) -> None:
    """Write a new budget file. data: the sha256 of the training file. Raises UserError where there is a file."""
    check_file(path)
    try:
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        fail(f"{path}: is there already; a budget is created once, show it or name another file")
    try:
        record = {"format": FORMAT, "kind": "create", "unit": unit, "data": data, "epsilon": epsilon, "delta": delta}
        append(handle, encode(record, ""), 0)
        sync_folder(os.path.dirname(path))
    finally:
        os.close(handle)


def encode(record: dict, previous: str) -> bytes:
    """The line of a record, which gets its checksum."""
    return json.dumps({**record, "checksum": digest(previous, record)}).encode() + b"\n"


class Transaction:
    """A budget file, read and locked: what is decided by `state` still holds when it is written."""

    def __init__(self, path: str, flag: str):
        """Waits for other transactions. Raises UserError as read_budget() does, or after PATIENCE seconds."""
        self.path = path
        if not os.path.exists(path):
            read_budget(path, flag)
        check_file(path, flag)
        try:
            self.handle = os.open(path, os.O_RDWR | os.O_APPEND)
        except OSError as error:
            fail(f"{flag} {path}: cannot be written ({error.strerror})".strip())
        try:
            self.locked = self.wait(flag)
            held, there = os.fstat(self.handle), os.stat(path)
            if (held.st_dev, held.st_ino) != (there.st_dev, there.st_ino):
                fail(f"{flag} {path}: was replaced while this process waited for it; start again".strip())
            self.state = read_budget(path, flag, self.handle)
            if self.state.torn:
                self.void()
        except BaseException:
            self.close()
            raise

    def wait(self, flag: str) -> bool:
        """Take the lock; False where there are no locks."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return lock(self.handle)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    fail(f"{flag} {self.path}: another process holds it for {PATIENCE:.0f} s; end that one".strip())
                time.sleep(0.05)

    def void(self) -> None:
        """Write a whole line over a torn one. Whoever was writing it has drawn nothing for it: its line was not on
        disk."""
        record = {"format": FORMAT, "kind": "void", "text": self.state.torn.decode(errors="replace")}
        line = encode(record, self.state.last_checksum)
        try:
            mend(self.path, self.handle, line, self.state.size)
        except Overtaken:
            fail(f"{self.path}: grows while it is read: another process writes there without a lock; start again")
        except OSError as error:
            fail(f"{self.path}: {error.strerror}: its last line is cut short and could not be repaired; make room")
        self.take(line)
        self.state.torn = b""

    def write(self, kind: str, **entries: object) -> None:
        """Append a record and flush it to disk. Raises UserError where it is not there."""
        line = encode({"format": FORMAT, "kind": kind, **entries}, self.state.last_checksum)
        try:
            append(self.handle, line, self.state.size)
        except Overtaken:
            fail(f"{self.path}: another process wrote there at the same moment, without a lock; start again")
        except OSError as error:
            fail(f"{self.path}: {error.strerror}; nothing was {kind}d; make room, and start again")
        self.take(line)

    def take(self, line: bytes) -> None:
        """Count a line that is on disk."""
        self.state.add(json.loads(line))
        self.state.size += len(line)

    def close(self) -> None:
        os.close(self.handle)


@contextlib.contextmanager
def transaction(path: str, flag: str = "") -> Iterator[Transaction]:
    """A Transaction, closed at the end. flag: the one that names the file, for messages."""
    opened = Transaction(path, flag)
    try:
        yield opened
    finally:
        opened.close()


def new_name() -> str:
    """A reservation's, drawn from the operating system's entropy: two runs with equal settings have two."""
    return secrets.token_hex(8)


class Hold:
    """The open reservation of a run, watched by the run that has it."""

    def __init__(self, path: str, name: str, locked: bool):
        """locked: the file system has locks, and a file that is as it was needs no reading."""
        self.path, self.name, self.locked = path, name, locked
        self.seen: tuple[int, ...] | None = None

    def check(self, undone: str) -> None:
        """Raise UserError unless the file at the path holds the reservation, open. undone: the words for what then
        stops. The file is opened anew, as the ledger's is: so another machine's writing shows."""
        problem = ""
        try:
            check_file(self.path)
            with open(self.path, "rb", buffering=0) as there:
                found = os.fstat(there.fileno())
                seen = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
                if seen == self.seen and self.locked:
                    return
                state = read_budget(self.path, "--budget", there.fileno())
        except OSError as error:
            problem = f"cannot be opened any more ({error.strerror})"
        else:
            held = state.reservations.get(self.name)
            if held is None:
                problem = f"no longer holds this run's reservation {self.name}"
            elif not held.open:
                problem = f"this run's reservation {self.name} was released"
            self.seen = seen
        if problem:
            fail(f"--budget {self.path}: {problem}; {undone}; put it right, and --resume")

    def settle(self, charged: Callable[[], Cost]) -> BudgetState:
        """Release what was reserved and not used. charged(): reads what the run's ledger charges; it is called when no
        step can be drawn any more."""
        with transaction(self.path, "--budget") as opened:
            release(opened, self.name, charged)
            return opened.state


def release(opened: Transaction, name: str, charged: Callable[[], Cost]) -> None:
    """Close the reservation, then read what its ledger charges, then count that in its place. In this order: a step
    whose record is not read is not drawn. Where charged() raises, all that was reserved keeps counting."""
    if opened.state.reservations[name].open:
        opened.write("close", reservation=name)
    opened.write("release", reservation=name, uses=pack(charged()))
