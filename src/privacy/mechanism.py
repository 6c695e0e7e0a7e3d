"""The mechanism: how a step's clipped sum is released, and what the accountant prices for it.

A mechanism is a class with the methods of GaussianMechanism, an entry of MECHANISMS, and a name in
privacy.ledger.NAMES. The class that adds the noise also gives the phases for the accountant, so the two cannot differ.
The sampler counts how often a unit takes part (privacy.sampling).
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from base.distributed import World
from privacy.allocation import AnyPhase
from privacy.ledger import LABEL_COUNTS
from privacy.randomness import NoiseSource
from privacy.sampling import Uses


class GaussianMechanism:
    """Adds N(0, sigma^2 S^2) to every coordinate of the sum and divides by the expected batch B, a public constant.

    S is the sensitivity: the most by which one unit changes the sum.
    """

    def __init__(self, sigma: float, sensitivity: float, batch: float, world: World, source: NoiseSource):
        """source: this rank's, for buffers on the world's device. sigma 0 adds no noise."""
        self.std, self.batch, self.world, self.source = sigma * sensitivity, batch, world, source

    def release(self, step: int, sums: Tensor, coordinates: int, sharded: bool = False) -> Tensor:
        """The released gradient of `step`, from the ranks' clipped sums. Collective.

        sums (P + extra,) float64 (float32 without noise), changed in place. Its first `coordinates` = P entries are the
        gradient. The rest is summed over the ranks, without noise. Returns the gradient, sum/B, in float32.

        sharded: sums is (ranks x n + extra,), n = P/ranks rounded up, with zeros after the gradient, and each rank
        gets its own n entries of the gradient alone.

        One rank alone adds the noise of a coordinate, before the one reduction: every coordinate of the sum has
        N(0, sigma^2 S^2) once, whatever the world size, and every rank that gets it holds the same bits. Nothing is
        rounded to float32 before the noise is added.
        """
        if self.std > 0:
            assert sums.dtype == torch.float64
            self.source.begin_step(step)
            own = sums[self.world.share(coordinates)]
            self.source.add_normal_(own, self.std)
        if sharded:
            padded = self.world.share_length(coordinates) * self.world.size
            self.world.all_reduce(sums[padded:])
            summed = self.world.reduce_scatter(sums[:padded])
        else:
            summed = self.world.all_reduce(sums)[:coordinates]
        return summed.div_(self.batch).float()

    def noise_norm(self, coordinates: int) -> float:
        """Root mean square norm of the noise alone in a released gradient: sigma S sqrt(P)/B; 0 without noise."""
        return self.std * math.sqrt(coordinates) / self.batch

    @staticmethod
    def phases(uses: Uses) -> list[AnyPhase]:
        """What the accountant prices for a sampler's uses."""
        return [replace(use, steps=count) for use, count in uses.items()]


# A histogram of labels has the same noise and price: one use of every unit, with q = 1.
MECHANISMS = {"gaussian": GaussianMechanism, LABEL_COUNTS: GaussianMechanism}
