"""Ledgers in words: the settings of one, and several runs read for one statement, with what the files beside them say
of data and origin."""

import os
from collections import Counter
from collections.abc import Iterable

from base.errors import fail
from base.files import read_object
from privacy.composition import Account, Composition
from privacy.ledger import LABEL_COUNTS, LedgerState, read_ledger
from run import provenance
from run.log import read_args

# What the records of a ledger can differ in.
SETTINGS = ("mechanism", "unit", "N", "q", "sigma", "clip", "sampling", "world_size", "delta")
STEPS = (
    "{steps} steps of sampling {sampling}, N {N}, q {q:.8g} (expected batch {batch:.6g}), sigma {sigma:g}, C {clip:g}, "
    "delta {delta:.6g}, {world_size} processes"
)
COUNTS = "{steps} histogram of the labels of N {N} units, sigma {sigma:g}, of which a unit is {clip:g} at most"
WANTED = "what the run wrote; restore it, or remove it"


def settings_lines(state: LedgerState) -> list[str]:
    """The settings, and where attempts differ from each other, each with the steps that it was charged."""
    groups = Counter(tuple(record[key] for key in SETTINGS) for record in state.records)
    lines = []
    for values, steps in groups.items():
        of = dict(zip(SETTINGS, values, strict=True))
        form = COUNTS if of["mechanism"] == LABEL_COUNTS else STEPS
        lines.append(form.format(batch=of["N"] * of["q"], steps=steps, **of))
    return lines


def read_accounts(files: Iterable[tuple[str, str | None]]) -> tuple[list[Account], list[str]]:
    """(the runs with a record, each file once; a line for each run). files: (ledger, privacy.json or None)."""
    accounts: list[Account] = []
    lines: list[str] = []
    seen: dict[tuple[int, int], str] = {}
    for ledger, report_path in files:
        state = read_ledger(ledger)
        found = os.stat(ledger)
        first = seen.setdefault((found.st_dev, found.st_ino), ledger)
        if first != ledger or any(account.name == ledger for account in accounts):
            lines.append(f"ledger        {ledger}: is the file {first}, counted once")
            continue
        if not state.records:
            if state.torn:
                fail(f"{ledger}: its only line is cut short: one step was charged, its sigma and q are not known")
            lines.append(f"ledger        {ledger}: nothing was drawn")
            continue
        report = provenance.checked(read_object(report_path, WANTED), report_path) if report_path else {}
        before = tuple(report.get("initial_weights", ()))
        data = digest_beside(ledger)
        accounts.append(Account(ledger, state, data, report.get("run"), before))
        said = f"training file sha256 {data[:12]}" if data else "training file not known"
        lines.append(f"ledger        {ledger}: {state.charged} steps charged, {said}")
    return accounts, lines


def digest_beside(ledger: str) -> str | None:
    """The sha256 of the training file, by the args.json beside a ledger."""
    digest = read_args(os.path.dirname(ledger)).get("train_sha256")
    return digest if isinstance(digest, str) else None


def describe_composition(composition: Composition) -> list[str]:
    """The lines before the table."""
    lines = [
        f"unit          one {composition.unit}",
        f"relation      {composition.relation}",
        f"steps charged {composition.steps} in {len(composition.accounts)} runs",
    ]
    if (number := len(composition.by_data)) > 1:
        lines.append(
            f"data          of {number} different training files: whoever is in one of them alone has the smaller "
            "epsilon of that one; whoever may be in all has that of all runs together"
        )
    return lines + [f"note          {words}" for words in composition.remarks]
