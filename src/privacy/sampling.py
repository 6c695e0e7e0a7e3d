"""Which units take part in a step, and how often that lets one unit take part in a run.

Every unit belongs to one rank alone (unit u to rank u mod world size), so no unit can enter a step twice.

A sampler is a class with the methods of PoissonSampler, an entry of SAMPLERS, and a name in privacy.ledger.NAMES. The
class that draws also counts the uses of a unit, which the mechanism prices, so the two cannot differ. A use is a step
in which a unit takes part with probability q, independently of all other uses.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from base.distributed import World
from privacy.randomness import NoiseSource

Uses = Counter[tuple[float, float]]  # (sigma, q) -> uses


class PoissonSampler:
    """Includes every unit independently with probability q, as the accountants assume.

    Each rank draws for its own units with its own key. An empty draw is a draw like any other. Each step is a use.
    """

    relation = "add or remove one {unit}"  # when two data sets are neighbours
    amplified = True  # q of a use may be below 1

    def __init__(self, N: int, batch: int, world: World, source: NoiseSource):
        """N units, of which `batch` are expected in a step; source: this rank's, of masks."""
        self.own = torch.arange(N)[world.rank :: world.size]
        self.q, self.source = batch / N, source

    def draw(self, step: int) -> Tensor:
        """The units of this rank in `step` (counted from 1), int64."""
        self.source.begin_step(step)
        return self.own[self.source.uniform(len(self.own)) < self.q]

    @staticmethod
    def planned(N: int, batch: int, steps: int, done: int = 0) -> tuple[float, int]:
        """(q, uses) of an attempt that takes the steps after `done` up to `steps`."""
        return batch / N, steps - done

    @staticmethod
    def permitted(uses: int, N: int, batch: int, done: int) -> int:
        """How many steps `uses` more uses permit after `done` steps."""
        return uses

    @staticmethod
    def charged(records: Iterable[Mapping]) -> Uses:
        """The uses in a ledger's records, all of this sampler."""
        return Counter((record["sigma"], record["q"]) for record in records)


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
    def planned(N: int, batch: int, steps: int, done: int = 0) -> tuple[float, int]:
        per_epoch = steps_per_epoch(N, batch)
        return 1.0, math.ceil(steps / per_epoch) - done // per_epoch if steps > done else 0

    @staticmethod
    def permitted(uses: int, N: int, batch: int, done: int) -> int:
        """Whole epochs. A resumed attempt pays again for the epoch that it begins in, of which less is left."""
        per_epoch = steps_per_epoch(N, batch)
        return max(0, uses * per_epoch - done % per_epoch)

    @staticmethod
    def charged(records: Iterable[Mapping]) -> Uses:
        """One use for every epoch of every attempt.

        A resumed attempt shuffles afresh, so an epoch that it shares with the attempt before counts twice.
        """
        epochs = {
            (record["attempt"], (record["step"] - 1) // record["steps_per_epoch"], record["sigma"])
            for record in records
        }
        return Counter((sigma, 1.0) for _, _, sigma in epochs)


def steps_per_epoch(N: int, batch: int) -> int:
    """Steps until every unit was in a batch once: on average (Poisson), or exactly (shuffling)."""
    return math.ceil(N / batch)


SAMPLERS: dict[str, type[PoissonSampler] | type[ShuffleSampler]] = {
    "poisson": PoissonSampler,
    "shuffle": ShuffleSampler,
}
