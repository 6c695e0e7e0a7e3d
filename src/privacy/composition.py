"""Several ledgers as one statement: the phases of all their charged steps, composed.

Composition holds for any runs of one unit and one relation, also where a run was chosen by the results of an earlier
one. Two ledgers with the same content are two runs, unless they are one file: runs with the same settings write the
same records, and so do the two continuations of a folder that was copied. What only looks like a copy is therefore
counted again. That is safe: it can only count too much.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from base.errors import fail
from privacy.allocation import AnyPhase, Share, use_of
from privacy.ledger import LedgerState, noise_sources
from privacy.mechanism import MECHANISMS
from privacy.plan import relation, uses

Cost = Counter[tuple[str, str, float, Share]]  # (mechanism, sampler, sigma, share) -> uses of a unit


def cost_of(state: LedgerState) -> Cost:
    """Everything that a ledger charges. KeyError for an unknown mechanism or sampler."""
    cost: Cost = Counter()
    for mechanism, sampling, counted in uses(state):
        cost.update({(mechanism, sampling, use.sigma, use.share): count for use, count in counted.items()})
    return cost


def phases_of(cost: Cost) -> list[AnyPhase]:
    """The phases for the accountant."""
    return [
        phase
        for (mechanism, _, sigma, share), count in sorted(cost.items(), key=str)
        for phase in MECHANISMS[mechanism].phases(Counter({use_of(sigma, share): count}))
    ]


def composed_phases(states: Iterable[LedgerState]) -> list[AnyPhase]:
    """All steps that several ledgers charge, as phases for the accountant."""
    return phases_of(sum((cost_of(state) for state in states), Counter()))


@dataclass(frozen=True)
class Account:
    """A run of a composition. data: the digest of its training file, run: its name, before: the accounts of the runs
    that its initial weights come from (run/provenance.py); None and () where nothing tells."""

    name: str
    state: LedgerState
    data: str | None = None
    run: str | None = None
    before: tuple[dict, ...] = ()

    @property
    def unit(self) -> str:
        return self.state.records[-1]["unit"]

    @property
    def samplings(self) -> set[str]:
        return {record["sampling"] for record in self.state.records}


@dataclass(frozen=True)
class Composition:
    """Runs whose steps are one statement."""

    accounts: Sequence[Account]
    remarks: list[str] = field(default_factory=list)  # what a reader has to know, a line each

    @property
    def unit(self) -> str:
        return self.accounts[0].unit

    @property
    def relation(self) -> str:
        return relation(self.unit, self.accounts[0].samplings)

    @property
    def phases(self) -> list[AnyPhase]:
        return composed_phases(account.state for account in self.accounts)

    @property
    def steps(self) -> int:
        return sum(account.state.charged for account in self.accounts)

    @property
    def by_data(self) -> dict[str, list[Account]]:
        """digest -> its runs. Runs whose digest is unknown stand in every group: they may be of any data."""
        known = dict.fromkeys(account.data for account in self.accounts if account.data is not None)
        return {data: [account for account in self.accounts if account.data in (data, None)] for data in known}

    @property
    def statements(self) -> list[tuple[str, list[AnyPhase]]]:
        """(of whom, phases) of each statement: one, or where the data differ one for each data set, too."""
        unit, groups = self.unit, self.by_data
        if len(groups) < 2:
            return [(f"of all runs together, for one {unit}", self.phases)]
        alone = [
            (
                f"for one {unit} that is in no data but those of sha256 {data[:12]}: {len(part)} of the runs",
                composed_phases(account.state for account in part),
            )
            for data, part in groups.items()
        ]
        return [(f"of all runs together, for one {unit} that may be in all of the data", self.phases), *alone]


def compose(accounts: Sequence[Account]) -> Composition:
    """The composition of runs that have a record each. UserError where they count for different units, or differ in
    when two data sets are neighbours."""
    first = accounts[0]
    for other in accounts[1:]:
        if other.unit != first.unit:
            fail(
                f"{other.name}: counts for one {other.unit}, {first.name} for one {first.unit}: no epsilon holds for "
                "both; name runs of one unit"
            )
        if relation(other.unit, other.samplings) != relation(first.unit, first.samplings):
            fail(
                f"{other.name}: holds where you {relation(other.unit, other.samplings)}, {first.name} where you "
                f"{relation(first.unit, first.samplings)}: no epsilon holds for both; name runs of one relation"
            )
    return Composition(accounts, remarks(accounts))


def remarks(accounts: Sequence[Account]) -> list[str]:
    """What the composition cannot decide by itself."""
    found = []
    for place, account in enumerate(accounts):
        mine = [record["checksum"] for record in account.state.records]
        for other in accounts[:place]:
            theirs = [record["checksum"] for record in other.state.records]
            shared = sum(a == b for a, b in zip(mine, theirs, strict=False))  # a chain: once they differ they stay so
            if account.run is not None and account.run == other.run:
                found.append(
                    f"{account.name}: is run {account.run}, as {other.name} is; their {shared} common records are "
                    "counted twice, since a copy that was continued writes the same records; where one is a mere copy, "
                    "name the other alone"
                )
            elif shared == min(len(mine), len(theirs)):
                found.append(
                    f"{account.name}: has the {shared} records of {other.name}; both are counted, since runs with the "
                    "same settings write the same; where one is a copy, name one of them"
                )
        if account.data is None and len(accounts) > 1:
            found.append(f"{account.name}: its training file is not known; counted as of the same data as the others")
    if sum("seeded" in noise_sources(account.state) for account in accounts) > 1:
        found.append("several runs have seeded noise: those of one seed share it, and for them no composition holds")
    named = {account.run for account in accounts} - {None}
    for account in accounts:
        for before in account.before:
            if before.get("run") not in named:
                found.append(
                    f"{account.name}: starts from the weights of {before.get('folder') or before.get('run')}, which "
                    f"is not among the runs named and not counted ({before.get('steps_charged')} steps); name it, too, "
                    "where it saw the same data"
                )
    return found
