"""The runs that weights come from: what those spent adds to the epsilon of a run that trains the weights further.

An account says what one run spent: the entries TYPES, and those of OPTIONAL that are known. A report is a run's account
with `initial_weights`, the accounts of the runs before it, the earliest first. It is in privacy.json, of a run or
beside exported weights, and under `privacy` in the weights themselves, so the chain survives folders that are moved or
deleted. The random name `run`, drawn at a run's first start, identifies it: two runs with the same settings have equal
ledgers.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from typing import Any

from base.errors import fail
from base.files import read_object
from privacy import attack_risk
from privacy.ledger import FILE_NAME, LedgerState, check_none_was_kept, noise_sources, read_ledger
from privacy.plan import epsilons, finite_or_text, relation, spent
from weights.checkpoint import Loaded

REPORT_NAME = "privacy.json"
# epsilon_prv and epsilon_rdp are at `delta`; infinity is a text.
TYPES = {
    "unit": (str,),
    "relation": (str,),
    "steps_charged": (int,),
    "delta": (float,),
    "epsilon_prv": (float, int, str),
    "epsilon_rdp": (float, int, str),
    "noise_source": (str,),
}
# ledger_checksum: of the last record, a digest of all; folder: where the run's files were seen.
OPTIONAL = {"run": (str,), "ledger_checksum": (str,), "folder": (str,)}


def excerpt(report: dict) -> dict:
    """The entries of a privacy.json that make a report as defined above."""
    return {
        **{key: report[key] for key in (*OPTIONAL, *TYPES) if key in report},
        "initial_weights": report.get("initial_weights", []),
    }


def checked(report: Any, where: str) -> dict:
    """excerpt(report). Raises UserError, which begins with `where`, where `report` is not a report."""
    before = report.get("initial_weights", []) if isinstance(report, dict) else None
    for account in [report, *before] if isinstance(before, list) else [None]:
        if not isinstance(account, dict) or not all(
            type(account.get(key)) in kinds
            for key, kinds in (TYPES | OPTIONAL).items()
            if key in TYPES or key in account
        ):
            fail(
                f"{where}: does not say what its run spent; wanted {', '.join(TYPES)}, as a run or an export writes "
                "them: restore it, or remove it where it is of something else"
            )
    return excerpt(report)


def accounts(report: dict) -> list[dict]:
    """The accounts of all runs of a report, the earliest first. A last run without charged steps is left out."""
    own = {key: value for key, value in report.items() if key != "initial_weights"}
    return [*report["initial_weights"], *([own] if own["steps_charged"] else [])]


def account_of(state: LedgerState) -> dict:
    """The account of a ledger that has a record, at the last record's delta."""
    last = state.records[-1]
    prv, rdp = epsilons(state, last["delta"])
    return {
        "ledger_checksum": state.last_checksum,
        "unit": last["unit"],
        "relation": relation(last["unit"], {record["sampling"] for record in state.records}),
        "steps_charged": state.charged,
        "delta": last["delta"],
        "epsilon_prv": finite_or_text(prv),
        "epsilon_rdp": finite_or_text(rdp),
        "noise_source": " and ".join(sorted(noise_sources(state))),
    }


def identity(account: dict) -> str | None:
    """What identifies a run: its name; for runs of older versions, which have none, their folder."""
    return account.get("run") or account.get("folder") or account.get("ledger_checksum")


def merged(lists: Iterable[list[dict]]) -> list[dict]:
    """Every run once, at its first place. Of two accounts of a run the one with more steps counts, else the first."""
    found: dict[str | None, dict] = {}
    for account in (account for part in lists for account in part):
        other = found.setdefault(name := identity(account), account)
        less, more = sorted((account, other), key=lambda one: one["steps_charged"])
        found[name] = {**less, **more}
    return list(found.values())


def folders(path: str) -> list[str]:
    """The real folders in which a file lies: under its own name, and under each that a symbolic link to it has."""
    found = [os.path.realpath(os.path.dirname(os.path.abspath(path)))]
    while os.path.islink(path):
        path = os.path.join(found[-1], os.readlink(path))
        found.append(os.path.realpath(os.path.dirname(path)))
    return list(dict.fromkeys(found))


def of_folder(folder: str, inside: dict | None) -> list[dict]:
    """The accounts of the runs that a folder of weights names. inside: the report in the weights."""
    path, ledger = os.path.join(folder, REPORT_NAME), os.path.join(folder, FILE_NAME)
    wanted = "the report of a run or of exported weights: restore it, or remove it where it is of something else"
    report = checked(read_object(path, wanted), path) if os.path.exists(path) else None
    check_none_was_kept(ledger)
    state = read_ledger(ledger) if os.path.exists(ledger) else LedgerState()
    # The ledger is the best source for what was spent, unless it lost records: then the report counts more steps.
    if state.records and state.charged >= (report or {}).get("steps_charged", 0):
        before = report or {"initial_weights": []}
        if report is None and inside and inside.get("ledger_checksum") in {one["checksum"] for one in state.records}:
            before = inside  # killed between the first checkpoint and the first report
        report = {**account_of(state), **{key: before[key] for key in ("run", "initial_weights") if key in before}}
    return accounts({"folder": folder, **report}) if report else []


def spent_before(loaded: Loaded) -> list[dict]:
    """The accounts of all runs that the weights of a model come from, those of its frozen weights first. Raises
    UserError for a ledger or report that is damaged."""
    found = []
    for path, inside in loaded.files:
        if inside is not None:
            inside = checked(inside, f"{path}: its entry 'privacy'")
            found.append(accounts(inside))
        found += [of_folder(folder, inside) for folder in folders(path)]
    return merged(found)


def ledger_of(loaded: Loaded, report: dict | None) -> tuple[str, LedgerState] | None:
    """(path, state) of the whole ledger that a report of these weights was made from; None where it is not there."""
    if report is None:
        return None
    wanted = (report.get("ledger_checksum"), report["steps_charged"])
    for path in dict.fromkeys(folder for name, _ in loaded.files for folder in folders(name)):
        ledger = os.path.join(path, FILE_NAME)
        if os.path.exists(ledger):
            state = read_ledger(ledger)
            if state.records and (state.last_checksum, state.charged) == wanted:
                return ledger, state
    return None


def spent_report(loaded: Loaded) -> dict | None:
    """The report for exported weights: that of the last run that trained them; None where no run with a ledger did."""
    found = spent_before(loaded)
    return {**found[-1], "initial_weights": found[:-1]} if found else None


def begin(spent: list[dict], report: dict | None, work_dir: str, resume: bool, seed: int | None) -> dict:
    """{"run", "initial_weights"} of the run that starts, or goes on, in `work_dir`.

    spent: the accounts of its initial weights. report: of the checkpoint that it continues from; None without one.
    seed: of its noise, so that a seeded run gets the same name again. What the run itself spent is not included.
    """
    report = report or {"initial_weights": []}
    own = {report.get("run"), os.path.realpath(work_dir) if resume else None}
    found = [account for account in spent if identity(account) not in own]
    before = merged([report["initial_weights"], found])
    secret = os.urandom(32) if seed is None else str(seed).encode()
    name = hashlib.sha256(b"run" + secret + json.dumps(before).encode()).hexdigest()[:16]
    return {"run": report.get("run", name), "initial_weights": before}


def describe(account: dict) -> str:
    """A line for `disclosed` and for the screen."""
    epsilon = account["epsilon_prv"]
    shown = epsilon if isinstance(epsilon, str) else f"{epsilon:.4f}"
    return (
        f"initial weights of {account.get('folder') or 'run ' + str(identity(account))}, whose own ledger charges "
        f"{account['steps_charged']} steps: not counted here; epsilon {shown} at delta {account['delta']:.3g} for "
        f"one {account['unit']}, which adds to this run's where it saw the same data"
    )


def by_ledger(report: dict, state: LedgerState) -> dict:
    """The entries of privacy.json that the ledger decides, by the ledger; of those that older reports lack, those that
    this one has."""
    last = state.last_step
    prv, rdp = epsilons(state, last["delta"])
    strict = 1 / (10 * last["N"])
    strict_prv, strict_rdp = epsilons(state, strict)
    expected = {key: last[key] for key in ("unit", "N", "q", "sigma", "clip", "sampling", "delta")}
    expected["noise_source"] = " and ".join(sorted(noise_sources(state)))
    expected |= {"steps_charged": state.charged, "epsilon_prv": finite_or_text(prv), "epsilon_rdp": finite_or_text(rdp)}
    # Keys beyond those that every report has.
    optional = {
        "attempts": state.attempts,
        "ledger_checksum": state.last_checksum,
        "delta_strict": strict,
        "epsilon_prv_strict": finite_or_text(strict_prv),
        "epsilon_rdp_strict": finite_or_text(strict_rdp),
    }
    return expected | {key: value for key, value in optional.items() if key in report}


def disagreements(report: dict, state: LedgerState) -> list[str]:
    """The differences between privacy.json and the ledger, a line each."""

    def same(left: object, right: object) -> bool:
        if isinstance(left, bool) or isinstance(right, bool):
            return left is right
        if isinstance(left, (int, float)) and isinstance(right, (int, float)):
            # Another machine's rounding moves an epsilon in its ninth digit.
            return math.isclose(left, right, rel_tol=1e-6)
        return left == right

    different = [
        f"{key}: {report.get(key, 'missing')} in {REPORT_NAME}, {value} by the ledger"
        for key, value in by_ledger(report, state).items()
        if not same(report.get(key), value)
    ]
    if "attack_risk" in report and not same_risk(report["attack_risk"], state):
        different.append(f"attack_risk: other figures in {REPORT_NAME} than by the ledger")
    return different


def same_risk(found: object, state: LedgerState) -> bool:
    """Whether the figures of a report are those of the ledger. Another machine's rounding adds up to a millionth."""
    if not isinstance(found, dict) or not isinstance(prior := found.get("prior"), float) or not 0 < prior < 1:
        return False

    def same(left: Any, right: Any) -> bool:
        if isinstance(right, dict):
            return (
                isinstance(left, dict)
                and left.keys() == right.keys()
                and all(same(left[key], value) for key, value in right.items())
            )
        return isinstance(left, (int, float)) and abs(left - right) <= 1e-6

    return same(found, attack_risk.figures(spent(state), state.records[-1]["delta"], prior))
