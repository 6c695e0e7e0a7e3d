"""The privacy plan: the one object that owns the sampler, the clipping norm, the noise, the divisor and the accounting.

Guarantees, for the unit and relation that it reports (add or remove one unit):
  - every unit is included in a step independently with probability q (Poisson sampling);
  - the released gradient of a step is (sum of the included units' gradients, each of norm <= C, + N(0, sigma^2 S^2 I))
    / B, B = the expected batch size, a public constant; an empty draw is released like any other. S = C (1 + kappa):
    by at most S one unit moves the sum as float64 has it, see privacy.clipping.rounding_share;
  - the step's record is on disk before its mask is drawn, and a step is drawn only while the budget permits it.
Nothing else may sample, scale or count: a step is open_step(), sums from the clipping engine, release().
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cli import UserError
from distributed import World
from privacy import accounting
from privacy.clipping import ClippingRule
from privacy.ledger import Ledger, epsilons, noise_sources, spent
from privacy.noise import NoiseSource
from privacy.sampling import PoissonSampler, ShuffleSampler

RELATIONS = {
    "poisson": "add or remove one {unit}",
    "shuffle": "add or remove one {unit}, its place in the order left empty (zero-out)",
}
SEEDED_WARNING = "seeded noise: whoever knows the seed can subtract it; the epsilon holds only against the others"


def relation(unit: str, samplings: Iterable[str]) -> str:
    """When two data sets are neighbours, for steps drawn by these samplers: a run that changed it is under both."""
    return " and ".join(sorted({RELATIONS[sampling].format(unit=unit) for sampling in samplings}))


@dataclass(frozen=True)
class PlanSettings:
    """What a run promises. Public constants, all of them."""

    unit: str  # "example" or "author"
    N: int  # units in the training data
    batch: int  # expected units a step, over all ranks
    steps: int  # logical steps of the whole run
    clip: float  # C, the largest norm of one unit's gradient
    sigma: float  # noise multiplier; 0 trains without privacy
    delta: float
    target_epsilon: float | None = None  # the budget; None: sigma and steps set what is spent
    sampling: str = "poisson"
    clipping: str = "flat"
    noise_source: str = "os"
    seed: int | None = None  # of noise_source "seeded" alone
    rounding: float = 0.0  # kappa, the share of C that rounding may move the sum by

    @property
    def sensitivity(self) -> float:
        """S: the most by which one unit moves the clipped sum, rounding included."""
        return self.clip * (1 + self.rounding)

    @property
    def private(self) -> bool:
        return self.sigma > 0

    @property
    def q(self) -> float:
        return self.batch / self.N

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.N / self.batch)

    @property
    def strict_delta(self) -> float:
        return 1 / (10 * self.N)

    def ledger_entries(self, world_size: int) -> dict:
        return {"unit": self.unit, "N": self.N, "q": self.q, "sigma": self.sigma, "clip": self.clip,
                "sampling": self.sampling, "steps_per_epoch": self.steps_per_epoch, "delta": self.delta,
                "world_size": world_size, "noise_source": self.noise_source}


def choose_sigma(target_epsilon: float, delta: float, N: int, batch: int, steps: int, sampling: str) -> float:
    """The smallest noise multiplier whose reported epsilon after `steps` steps stays within the target."""
    if sampling == "shuffle":
        return accounting.calibrate_sigma_shuffle(target_epsilon, delta, math.ceil(steps / math.ceil(N / batch)))
    return accounting.calibrate_sigma(target_epsilon, delta, batch / N, steps)


class PrivacyPlan:
    """A run's promise, kept step by step."""

    def __init__(self, settings: PlanSettings, world: World, ledger: Ledger | None, done: int = 0):
        """ledger: open on rank 0, None on the others. done: steps that the model to be trained has behind it."""
        if (ledger is not None) != world.is_main:
            raise ValueError("rank 0, and no other, holds the ledger")
        self.settings, self.world, self.ledger = settings, world, ledger
        self.clipping_rule = ClippingRule(settings.clipping, settings.clip)
        seed = settings.seed if settings.noise_source == "seeded" else None
        mask_source = NoiseSource(settings.noise_source, "mask", world.rank, seed)
        if settings.sampling == "poisson":
            self.sampler = PoissonSampler(settings.N, settings.q, world, mask_source)
        else:
            self.sampler = ShuffleSampler(settings.N, settings.batch, world, mask_source)
        self.noise = NoiseSource(settings.noise_source, "noise", world.rank, seed, world.device)
        self.dropout = NoiseSource(settings.noise_source, "dropout", world.rank, seed)
        self.open: int | None = None
        self.permitted = self.count_permitted(done) if ledger is not None else 0

    # ---------------------------------------------------------------- a step

    def count_permitted(self, done: int) -> int:
        """How many more steps this attempt may draw. The budget counts what earlier attempts were charged."""
        settings, state = self.settings, self.ledger.state
        if settings.target_epsilon is None or not settings.private:
            return settings.steps
        if settings.sampling == "poisson":
            return accounting.permitted_steps(settings.target_epsilon, settings.delta, spent(state),
                                              settings.q, settings.sigma, settings.steps)
        epochs = accounting.permitted_steps(settings.target_epsilon, settings.delta, spent(state), 1.0,
                                            settings.sigma, math.ceil(settings.steps / settings.steps_per_epoch))
        return max(0, epochs * settings.steps_per_epoch - done % settings.steps_per_epoch)

    def open_step(self, step: int) -> Tensor | None:
        """Charge step `step` (counted from 1) and draw it: the included units of this rank, int64.

        None, on every rank, where the budget permits no further step. Raises UserError, on every rank, where the
        ledger cannot be written: the step is then not drawn.
        """
        assert self.open is None, "open_step() before the step before was released"
        error, word = None, torch.zeros(1, device=self.world.device)
        if self.ledger is not None:
            try:
                if self.permitted < 1:
                    word.fill_(1)
                else:
                    self.ledger.charge(step)
                    self.permitted -= 1
            except UserError as failure:
                error = failure
                word.fill_(2)
        word = int(self.world.broadcast(word))
        if word == 2:
            raise error or UserError(f"rank 0 could not write the ledger record of step {step}: the step was not drawn")
        if word == 1:
            return None
        self.open = step
        return self.sampler.draw(step)

    def seed_dropout(self) -> None:
        """Seed torch for this rank's dropout masks in the open step.

        Masks are drawn for a whole micro-batch, so one more unit gives the others other masks: with masks that anyone
        could draw again from a public seed, the sum would move by more than C. While they are secret, each unit's mask
        has one law with and without the other units, the step is a mixture over masks, and C bounds it for each of
        them.
        """
        assert self.open is not None, "seed_dropout() without open_step()"
        self.dropout.begin_step(self.open)
        self.dropout.seed_torch()

    def release(self, sums: Tensor, coordinates: int) -> Tensor:
        """Turn the ranks' clipped sums into the released gradient, and sum what else the step carries.

        sums (P + extra,) float64 (float32 without privacy), changed in place; its first `coordinates` = P entries are
        the gradient, the rest is summed over the ranks and nothing more. Returns the gradient, sum/B, in float32.

        Each coordinate gets its noise from one rank alone (the ranks share them out), before the one all-reduce: every
        coordinate of the sum carries N(0, sigma^2 S^2) once, whatever the world size, and every rank holds the same
        bits. Nothing is rounded to float32 before the noise is in.
        """
        assert self.open is not None, "release() without open_step()"
        if self.settings.private:
            assert sums.dtype == torch.float64
            self.noise.begin_step(self.open)
            size, rank = self.world.size, self.world.rank
            own = sums[coordinates * rank // size:coordinates * (rank + 1) // size]
            self.noise.add_normal_(own, self.settings.sigma * self.settings.sensitivity)
        self.world.all_reduce(sums)
        self.open = None
        return sums[:coordinates].div_(self.settings.batch).float()

    def noise_norm(self, coordinates: int) -> float:
        """Root mean square norm of the noise alone in a released gradient: sigma S sqrt(P)/B; 0 without privacy."""
        settings = self.settings
        return settings.sigma * settings.sensitivity * math.sqrt(coordinates) / settings.batch

    # ---------------------------------------------------------------- what was spent

    def epsilon(self, delta: float | None = None) -> tuple[float, float]:
        """(PRV upper bound, RDP) spent so far, at `delta` (by default the plan's). Rank 0 alone knows."""
        if not self.settings.private:
            return math.inf, math.inf
        return epsilons(self.ledger.state, delta or self.settings.delta)

    def report(self, disclosed: list[str]) -> dict:
        """The content of privacy.json. Rank 0 alone knows."""
        settings, records = self.settings, self.ledger.state.records
        sources = noise_sources(self.ledger.state) or {settings.noise_source}
        samplings = {record["sampling"] for record in records} or {settings.sampling}
        prv, rdp = self.epsilon()
        strict_prv, strict_rdp = self.epsilon(settings.strict_delta)
        return {
            "unit": settings.unit, "relation": relation(settings.unit, samplings),
            "N": settings.N, "q": settings.q, "expected_batch": settings.batch, "sigma": settings.sigma,
            "clip": settings.clip, "clipping": settings.clipping, "rounding": settings.rounding,
            "steps_charged": self.ledger.state.charged, "ledger_checksum": self.ledger.state.last_checksum,
            "attempts": self.ledger.state.attempts, "delta": settings.delta,
            "epsilon_prv": finite_or_text(prv), "epsilon_rdp": finite_or_text(rdp),
            "delta_strict": settings.strict_delta, "epsilon_prv_strict": finite_or_text(strict_prv),
            "epsilon_rdp_strict": finite_or_text(strict_rdp), "target_epsilon": settings.target_epsilon,
            "sampling": settings.sampling, "noise_source": " and ".join(sorted(sources)),
            "warning": SEEDED_WARNING if "seeded" in sources and settings.private else None,
            "disclosed": disclosed,
        }


def finite_or_text(value: float) -> float | str:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else str(value)
