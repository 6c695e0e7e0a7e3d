"""Which units take part in a step.

Every unit belongs to one rank alone (unit u to rank u mod world size), so no unit can enter a step twice.
"""

import torch
from torch import Tensor

from base.distributed import World
from privacy.noise import NoiseSource


class PoissonSampler:
    """Includes every unit independently with probability q: what the accountants price.

    Each rank draws for its own units with its own key. An empty draw is a draw like any other.
    """

    def __init__(self, N: int, q: float, world: World, source: NoiseSource):
        self.own = torch.arange(N)[world.rank :: world.size]
        self.q, self.source = q, source

    def draw(self, step: int) -> Tensor:
        """The included units of this rank, int64, ascending."""
        self.source.begin_step(step)
        return self.own[self.source.uniform(len(self.own)) < self.q]


class ShuffleSampler:
    """Every unit once an epoch, in a fresh order; the last batch of an epoch is what remains. No amplification is
    claimed.

    Rank 0 draws the order and hands it to the others; each takes its share of the step's batch.
    """

    def __init__(self, N: int, batch: int, world: World, source: NoiseSource):
        self.N, self.batch, self.world, self.source = N, batch, world, source
        self.steps_per_epoch = -(-N // batch)
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.int64)

    def draw(self, step: int) -> Tensor:
        """This rank's share of the units of `step` (counted from 1), int64."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        if epoch != self.epoch:
            self.source.begin_step(epoch + 1)
            order = self.source.permutation(self.N) if self.world.is_main else torch.empty(self.N, dtype=torch.int64)
            self.epoch, self.order = epoch, self.world.broadcast(order)
        batch = self.order[position * self.batch : (position + 1) * self.batch]
        return batch[self.world.rank :: self.world.size]
