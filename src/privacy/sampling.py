"""Which units take part in a step, and what that lets one unit disclose.

Every unit belongs to one rank alone (unit u to rank u mod world size), so no unit can enter a step twice.

A sampler is a class with the methods of PoissonSampler, an entry of SAMPLERS, and a name in privacy.ledger.NAMES. The
class that draws also counts the uses of a unit, which the mechanism prices, so the two cannot differ.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from base.distributed import World
from privacy.allocation import Allocated
from privacy.randomness import NoiseSource
from privacy.sampled_gaussian import Phase

# A use is a phase of one step, or of one epoch, each independent of all others.
Uses = Counter[Phase | Allocated]


def own_units(N: int, world: World) -> Tensor:
    """The units of this rank, int64."""
    return torch.arange(N)[world.rank :: world.size]


class PoissonSampler:
    """Includes every unit independently with probability q, as the accountants assume.

    Each rank draws for its own units with its own key. An empty draw is a draw like any other. Each step is a use.
    """

    relation = "add or remove one {unit}"  # when two data sets are neighbours
    amplified = True  # q of a use may be below 1

    def __init__(self, N: int, batch: int, world: World, source: NoiseSource):
        """N units, of which `batch` are expected in a step; source: this rank's, of masks."""
        self.own = own_units(N, world)
        self.q, self.source = batch / N, source

    def draw(self, step: int) -> Tensor:
        """The units of this rank in `step` (counted from 1), int64."""
        self.source.begin_step(step)
        return self.own[self.source.uniform(len(self.own)) < self.q]

    @staticmethod
    def planned(sigma: float, N: int, batch: int, steps: int, done: int = 0) -> Uses:
        """The uses of one attempt that takes `steps` steps after step `done`; more steps are never fewer uses."""
        return Counter({Phase(sigma, batch / N, 1): steps})

    @staticmethod
    def charged(records: Iterable[Mapping]) -> Uses:
        """The uses in a ledger's records, all of this sampler."""
        return Counter(Phase(record["sigma"], record["q"], 1) for record in records)


class ShuffleSampler:
    """Every unit once an epoch, in a fresh order; the last batch of an epoch is what remains. No amplification is
    claimed: each epoch is a use with q = 1.

    Rank 0 draws the order and broadcasts it. Each rank takes its share of the step's batch.
    """

    relation = "add or remove one {unit}, its place in the order left empty (zero-out)"
    amplified = False

    def __init__(self, N: int, batch: int, world: World, source: NoiseSource):
        self.N, self.batch, self.world, self.source = N, batch, world, source
        self.steps_per_epoch = steps_per_epoch(N, batch)
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.int64)

    def draw(self, step: int) -> Tensor:
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        if epoch != self.epoch:
            self.source.begin_step(epoch + 1)
            order = self.source.permutation(self.N) if self.world.is_main else torch.empty(self.N, dtype=torch.int64)
            self.epoch, self.order = epoch, self.world.broadcast(order)
        batch = self.order[position * self.batch : (position + 1) * self.batch]
        return batch[self.world.rank :: self.world.size]

    @staticmethod
    def planned(sigma: float, N: int, batch: int, steps: int, done: int = 0) -> Uses:
        """A use for each epoch that the attempt begins or goes on in."""
        per_epoch = steps_per_epoch(N, batch)
        return Counter({Phase(sigma, 1.0, 1): math.ceil((done % per_epoch + steps) / per_epoch) if steps else 0})

    @staticmethod
    def charged(records: Iterable[Mapping]) -> Uses:
        """One use for every epoch of every attempt.

        A resumed attempt shuffles afresh, so an epoch that it shares with the attempt before counts twice.
        """
        return Counter(Phase(sigma, 1.0, 1) for sigma, _, _, _ in _epochs(records))


class AllocationSampler:
    """Every unit in one step of each epoch, drawn uniformly and independently of the other units (random allocation).

    Each rank draws for its own units with its own key, an epoch at a time, before the epoch's first step. Each epoch of
    each attempt is a use, of which the attempt's steps count (privacy.allocation).
    """

    relation = "add or remove one {unit}"
    amplified = True

    def __init__(self, N: int, batch: int, world: World, source: NoiseSource):
        self.own = own_units(N, world)
        self.t, self.source = steps_per_epoch(N, batch), source
        self.epoch, self.places = -1, torch.empty(0, dtype=torch.int64)

    def draw(self, step: int) -> Tensor:
        epoch, position = divmod(step - 1, self.t)
        if epoch != self.epoch:
            self.source.begin_step(epoch + 1)
            self.epoch, self.places = epoch, (self.source.uniform(len(self.own)) * self.t).long()
        return self.own[self.places == position]

    @staticmethod
    def planned(sigma: float, N: int, batch: int, steps: int, done: int = 0) -> Uses:
        """A use for each epoch that the attempt begins or goes on in, of the steps that it takes there."""
        t = steps_per_epoch(N, batch)
        first = min(steps, -done % t)  # steps left of the epoch that an earlier attempt began
        whole, rest = divmod(steps - first, t)
        uses: Uses = Counter({Allocated(sigma, t, t, 1): whole})
        uses.update(Allocated(sigma, t, taken, 1) for taken in (first, rest) if taken)
        return uses

    @staticmethod
    def charged(records: Iterable[Mapping]) -> Uses:
        """A resumed attempt allocates afresh: what is left of the epoch that it begins in is a use of its own."""
        uses: Uses = Counter()
        for (sigma, t, _, _), taken in _epochs(records).items():
            whole, rest = divmod(taken, t)  # more records than steps: a line that was repaired at the epoch's end
            uses[Allocated(sigma, t, t, 1)] += whole
            uses[Allocated(sigma, t, rest, 1)] += rest > 0
        return +uses


def _epochs(records: Iterable[Mapping]) -> Counter[tuple[float, int, int, int]]:
    """(sigma, steps an epoch, attempt, epoch) -> steps charged."""
    return Counter(
        (
            record["sigma"],
            record["steps_per_epoch"],
            record["attempt"],
            (record["step"] - 1) // record["steps_per_epoch"],
        )
        for record in records
    )


def steps_per_epoch(N: int, batch: int) -> int:
    """Steps until every unit was in a batch once: on average (Poisson), or exactly."""
    return math.ceil(N / batch)


SAMPLERS: dict[str, type[PoissonSampler] | type[ShuffleSampler] | type[AllocationSampler]] = {
    "poisson": PoissonSampler,
    "shuffle": ShuffleSampler,
    "allocation": AllocationSampler,
}
