"""A run's share of its data set's budget file: reserved before the first step, released after the last.

args.json names the run's reservation. It is written before the reservation, and both before the first step. So a
reservation belongs to a ledger that lies where it did, beside an args.json that names it. Where that is not so, the
ledger was moved, removed or is another run's, and the reservation counts in full.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from base.errors import UserError, fail
from base.files import lock, read_object
from privacy.budget import (
    CREATE,
    BudgetState,
    Hold,
    Reservation,
    Transaction,
    new_name,
    pack,
    read_budget,
    release,
    transaction,
)
from privacy.composition import Cost, cost_of, phases_of
from privacy.ledger import FILE_NAME, Ledger, LedgerState, read_ledger
from privacy.plan import Hold as AnyHold
from privacy.plan import PrivacyPlan, relation
from run.log import ARGS, read_args
from run.provenance import REPORT_NAME


def named_in(folder: str) -> str | None:
    """The reservation that a folder's args.json names; None where it names none, or there is none."""
    name = read_args(folder).get("reservation")
    return name if isinstance(name, str) else None


def real_ledger(folder: str) -> str:
    return os.path.join(os.path.realpath(folder), FILE_NAME)


def check_budget(state: BudgetState, unit: str, data: str) -> None:
    """Raise UserError where a budget is of another unit or of other data."""
    if state.unit != unit:
        fail(
            f"--budget {state.path}: is for one {state.unit}, this run for one {unit}: no epsilon holds for both; name "
            f"a budget of this unit ({CREATE} --unit {unit})"
        )
    if state.data != data:
        fail(
            f"--budget {state.path}: is of other data (sha256 {state.data[:12]} there, {data[:12]} of the training "
            f"file); name the budget of this file, or {CREATE} one"
        )


def choose_name(path: str | None, folder: str, unit: str, data: str, resume: bool) -> str | None:
    """The name of the run's reservation, which args.json has to hold before it is made; None without a budget.

    A resumed run keeps its reservation. One that was moved or copied gets another, and a run that starts in a folder
    whose first step was never drawn first releases what was reserved there. Nothing else is written.
    """
    if path is None and not resume:
        return None
    name, ledger = named_in(folder), os.path.join(folder, FILE_NAME)
    size = os.path.getsize(ledger) if os.path.exists(ledger) else None
    begun = resume and bool(size)
    if path is None:
        if begun and name is not None:
            fail(f"--resume: the run in {folder} reserved {name} in a budget; name that file with --budget")
        return None
    state = read_budget(path, "--budget")
    check_budget(state, unit, data)
    if name is None:
        return new_name()
    held = state.reservations.get(name)
    if held is None:
        if begun:
            fail(
                f"--budget {path}: does not hold the reservation {name} of the run in {folder}: it is another file, or "
                "lost lines; name the file that the run began with, or restore it"
            )
        return name if resume else new_name()
    if resume and held.ledger == real_ledger(folder):
        return name
    if not resume and size == 0 and held.ledger == real_ledger(folder):
        release_all(path, [folder])
    return new_name()


@dataclass(frozen=True)
class Granted:
    """What a run got. total: epsilon of all runs, this one included; short: it got less than it had planned."""

    hold: Hold
    total: float
    state: BudgetState
    short: bool


def reserve(path: str, name: str, plan: PrivacyPlan, data: str, last: int, done: int) -> Granted:
    """Reserve what the run may draw after step `done` up to `last`, beyond what it holds already, and bind the plan to
    it. Where the total would pass the limit nothing is reserved: a run that has some of its reservation left goes on
    within that, for any other UserError is raised.
    """
    ledger, coming = os.path.realpath(plan.ledger.path), plan.to_come(last, done)
    unit, (key,) = plan.settings.unit, coming
    charged = cost_of(plan.state)
    with transaction(path, "--budget") as opened:
        state = opened.state
        check_budget(state, unit, data)
        check_relation(state, {sampling for _, sampling, _, _ in {**charged, **coming}})
        held = state.reservations.get(name, Reservation(name, ledger, open=False))
        more = charged + coming - held.counted
        total = state.total(more)
        short = total > state.epsilon and bool(more)
        if short:
            if held.counted[key] <= charged[key] or charged - held.counted:
                refuse(state, plan, more, total)
            more, total = Counter(), state.total()
        if more or not held.open:
            opened.write("reserve", reservation=name, ledger=ledger, uses=pack(more))
        hold = Hold(path, name, opened.locked)
        plan.bind(hold, state.reservations[name].counted[key] - charged[key], done)
    hold.check("no step was drawn")
    return Granted(hold, total, state, short)


def check_relation(state: BudgetState, samplings: set[str]) -> None:
    """Raise UserError where the budget's runs have another relation than these samplers."""
    own = relation(state.unit, samplings)
    if others := state.relations - {own}:
        fail(
            f"--budget {state.path}: its runs hold where you {min(others)}, this run where you {own}: no epsilon holds "
            "for both; choose the same --sampling, or another budget"
        )


def refuse(state: BudgetState, plan: PrivacyPlan, more: Cost, total: float) -> None:
    """Raise the UserError of a run that has no room. total: epsilon, `more` included."""
    steps = sum(phase.steps for phase in phases_of(more))
    fail(
        f"--budget {state.path}: {steps} more uses with sigma {plan.settings.sigma:g} would bring the total to epsilon "
        f"{total:.4f} at delta {state.delta:g}, beyond its limit {state.epsilon:g} ({state.total():.4f} is spent or "
        "reserved); take fewer steps or more noise, or release what dead runs reserved (src/privacy_budget.py release)"
    )


def settle(hold: AnyHold, ledger: Ledger) -> str:
    """Release what a finished run reserved and did not use. Returns the line to print: a warning where that failed."""

    def charged() -> Cost:
        ledger.check("nothing was released")
        return cost_of(whole_ledger(ledger.path))

    try:
        state = hold.settle(charged)
    except (UserError, OSError) as error:  # the run itself is done, and its reservation counts in full
        return f"WARNING: what the run reserved and did not use was not released: {error}"
    return f"budget {state.path}: {describe(state)}"


def describe(state: BudgetState) -> str:
    runs = len(state.reservations)
    return (
        f"epsilon {state.total():.4f} of {state.epsilon:g} at delta {state.delta:g} (PRV upper bound) is spent or "
        f"reserved by {runs} run{'s' * (runs != 1)}"
    )


# ---------------------------------------------------------------- runs that ended without a release


def whole_ledger(path: str) -> LedgerState:
    """The ledger at `path`; UserError where it, or the report beside it, shows that records are missing."""
    state, folder = read_ledger(path), os.path.dirname(path)
    if state.torn and not state.records:
        fail(f"{path}: its only line is cut short: one step was charged, its sigma and q are not known")
    report = os.path.join(folder, REPORT_NAME)
    said = read_object(report, "what the run wrote; restore it") if os.path.exists(report) else {}
    last, steps = said.get("ledger_checksum") or "", said.get("steps_charged", 0)
    if not isinstance(steps, int) or steps > state.charged:
        fail(f"{path}: records {state.charged} steps, {report} reports {steps}: records are missing")
    if last and last not in {record["checksum"] for record in state.records}:
        fail(f"{path}: lacks the record {last}, which {report} names: records are missing, or it is another run's")
    return state


def release_all(path: str, folders: Sequence[str] = ()) -> list[str]:
    """Release what runs that have ended reserved and did not use: those in `folders`, or all. A line for each.

    A run that holds its ledger's lock is running. Where there are no locks, only runs that are named are released: one
    that still runs then draws no further step.
    """
    wanted, lines = {real_ledger(folder) for folder in folders}, []
    with transaction(path) as opened:
        for held in list(opened.state.reservations.values()):
            if held.released or (wanted and held.ledger not in wanted):
                continue
            lines.append(f"{os.path.dirname(held.ledger)}: {release_one(opened, held, bool(wanted))}")
        missing = wanted - {held.ledger for held in opened.state.reservations.values()}
    if missing:
        fail(f"{path}: no run in {os.path.dirname(min(missing))} has reserved there; see src/privacy_budget.py show")
    return lines


def release_one(opened: Transaction, held: Reservation, named: bool) -> str:
    """Release a reservation where that is sound. Returns what was done, in words."""
    folder = os.path.dirname(held.ledger)
    try:
        handle = os.open(held.ledger, os.O_RDWR)
    except OSError as error:
        return f"counted in full: {FILE_NAME} cannot be opened ({error.strerror})"
    try:
        if named_in(folder) != held.name:
            return f"counted in full: {ARGS} does not name this reservation, so the ledger may be another run's"
        if not lock(handle) and not named:
            return "counted in full: its file system has no locks, so it may be running; name it if it has ended"
        whole_ledger(held.ledger)  # before anything is closed
        release(opened, held.name, lambda: cost_of(whole_ledger(held.ledger)))
    except BlockingIOError:
        return "counted in full: it is running"
    except UserError as error:
        return f"counted in full: {error}"
    finally:
        os.close(handle)
    return f"released; {sum(held.counted.values())} uses of a unit count"
