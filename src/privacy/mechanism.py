"""The mechanism: how a step's clipped sum is released, and what the accountant prices for it.

A mechanism is a class with the methods of GaussianMechanism, an entry of MECHANISMS, and a name in
privacy.ledger.NAMES. The class that adds the noise also gives the phases for the accountant, so the two cannot differ.
The sampler counts how often a unit takes part (privacy.sampling).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from base.distributed import World
from privacy import accounting, attack_risk
from privacy.accounting import Phase
from privacy.randomness import NoiseSource
from privacy.sampling import Uses


class GaussianMechanism:
    """Adds N(0, sigma^2 S^2) to every coordinate of the sum and divides by the expected batch B, a public constant.

    S is the sensitivity: the most by which one unit changes the sum.
    """

    def __init__(self, sigma: float, sensitivity: float, batch: float, world: World, source: NoiseSource):
        """source: this rank's, for buffers on the world's device. sigma 0 adds no noise."""
        self.std, self.batch, self.world, self.source = sigma * sensitivity, batch, world, source

    def release(self, step: int, sums: Tensor, coordinates: int) -> Tensor:
        """The released gradient of `step`, from the ranks' clipped sums. Collective.

        sums (P + extra,) float64 (float32 without noise), changed in place. Its first `coordinates` = P entries are the
        gradient. The rest is summed over the ranks, without noise. Returns the gradient, sum/B, in float32.

        One rank alone adds the noise of a coordinate, before the one all-reduce: every coordinate of the sum has
        N(0, sigma^2 S^2) once, whatever the world size, and every rank holds the same bits. Nothing is rounded to
        float32 before the noise is added.
        """
        if self.std > 0:
            assert sums.dtype == torch.float64
            self.source.begin_step(step)
            size, rank = self.world.size, self.world.rank
            own = sums[coordinates * rank // size : coordinates * (rank + 1) // size]
            self.source.add_normal_(own, self.std)
        self.world.all_reduce(sums)
        return sums[:coordinates].div_(self.batch).float()

    def noise_norm(self, coordinates: int) -> float:
        """Root mean square norm of the noise alone in a released gradient: sigma S sqrt(P)/B; 0 without noise."""
        return self.std * math.sqrt(coordinates) / self.batch

    @staticmethod
    def phases(uses: Uses) -> list[Phase]:
        """The phases that the accountant prices for a sampler's uses: compositions of sampled Gaussian mechanisms."""
        return [Phase(sigma, q, count) for (sigma, q), count in uses.items()]

    @staticmethod
    def smallest_sigma(target_epsilon: float, delta: float, q: float, uses: int, amplified: bool) -> float:
        """The smallest noise multiplier whose epsilon after `uses` uses stays within the target.

        q, uses, amplified: of the sampler. Where it is not amplified, q is 1 and the result is exact.
        """
        if amplified:
            return accounting.calibrate_sigma(target_epsilon, delta, q, uses)
        return accounting.calibrate_sigma_shuffle(target_epsilon, delta, uses)

    @staticmethod
    def permitted_uses(
        target_epsilon: float, delta: float, spent: Sequence[Phase], sigma: float, q: float, wanted: int
    ) -> int:
        """The largest n <= wanted for which n more uses after `spent` stay within the target."""
        return accounting.permitted_steps(target_epsilon, delta, spent, q, sigma, wanted)

    @staticmethod
    def smallest_sigma_for_advantage(target_advantage: float, q: float, uses: int) -> float:
        """The smallest noise multiplier whose membership advantage after `uses` uses stays within the target."""
        return attack_risk.calibrate_sigma(target_advantage, q, uses)

    @staticmethod
    def permitted_uses_for_advantage(
        target_advantage: float, spent: Sequence[Phase], sigma: float, q: float, wanted: int
    ) -> int:
        """As permitted_uses, of the membership advantage."""
        return attack_risk.permitted_steps(target_advantage, spent, q, sigma, wanted)


MECHANISMS = {"gaussian": GaussianMechanism}
