"""The privacy plan: the one object that owns the sampler, the clipping norm, the noise, the divisor and the accounting.

Guarantees, for Poisson sampling and the relation "add or remove one unit":
  - every unit is included in a step independently with probability q (Poisson sampling);
  - the released gradient of a step is (sum of the included units' gradients, each of norm <= C, + N(0, sigma^2 S^2 I))
    / B, B = the expected batch size, a public constant; an empty draw is released like any other. S = C (1 + kappa):
    one unit changes the float64 sum by at most S (privacy.clipping.rounding_share);
  - the step's record is on disk before its mask is drawn, and a step is drawn only while the budget permits it.
Nothing else samples, adds noise, divides or counts steps. A step is open_step(), sums from the clipping engine,
release().
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from base.distributed import World
from base.errors import UserError
from privacy import accounting, attack_risk
from privacy.allocation import AnyPhase
from privacy.clipping import ClippingRule
from privacy.ledger import Ledger, LedgerState, NoLedger, noise_sources
from privacy.mechanism import MECHANISMS
from privacy.randomness import NoiseSource
from privacy.sampled_gaussian import Phase
from privacy.sampling import SAMPLERS, Uses, steps_per_epoch

SEEDED_WARNING = "seeded noise: whoever knows the seed can subtract it; the epsilon holds only against the others"
EARLIER_WARNING = (
    "{count} steps are of ledger format 1: the noise did not pay for all that rounding may do to their sums, and if "
    "they were drawn with --bf16 their epsilon is not proven"
)


def relation(unit: str, samplings: Iterable[str]) -> str:
    """When two data sets are neighbours, for steps drawn by these samplers. A run that changed its sampler has both."""
    return " and ".join(sorted({SAMPLERS[sampling].relation.format(unit=unit) for sampling in samplings}))


def uses(state: LedgerState) -> list[tuple[str, str, Uses]]:
    """(mechanism, sampler, uses of a unit) of everything that a ledger charges. KeyError for an unknown sampler."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in state.charges:
        groups.setdefault((record["mechanism"], record["sampling"]), []).append(record)
    return [(mechanism, sampling, SAMPLERS[sampling].charged(group)) for (mechanism, sampling), group in groups.items()]


def spent(state: LedgerState) -> list[AnyPhase]:
    """Everything that a ledger charges, as phases for the accountant. KeyError for an unknown mechanism or sampler."""
    return [phase for mechanism, _, counted in uses(state) for phase in MECHANISMS[mechanism].phases(counted)]


def participations(state: LedgerState) -> Counter:
    """sigma -> how often any one unit can have taken part in steps that are priced without amplification."""
    found: Counter = Counter()
    for _, sampling, counted in uses(state):
        if not SAMPLERS[sampling].amplified:
            found.update({use.sigma: count for use, count in counted.items()})
    return found


def epsilons(state: LedgerState, delta: float) -> tuple[float, float]:
    """(PRV upper bound, RDP) of everything in the ledger, at `delta`."""
    phases = spent(state)
    return accounting.epsilon_prv(phases, delta), accounting.epsilon_rdp(phases, delta)


def warnings(state: LedgerState) -> list[str]:
    """What a reader of the epsilon of a ledger is to be told."""
    earlier = sum(record["format"] == 1 and record["sigma"] > 0 for record in state.records)
    return [SEEDED_WARNING] * ("seeded" in noise_sources(state)) + [EARLIER_WARNING.format(count=earlier)] * (
        earlier > 0
    )


class Hold(Protocol):
    """A share of a data set's budget that the run reserved before its first step."""

    def check(self, undone: str) -> None:
        """Raise UserError where it does not hold any more. undone: the words for what then stops."""

    def settle(self, charged: Callable[[], Counter]) -> Any:
        """Give back what was not used: all but charged(), which is called when no step can be drawn any more."""


@dataclass(frozen=True)
class PlanSettings:
    """The constants that a run's epsilon follows from. All are public."""

    unit: str  # "example" or "author"
    N: int  # units in the training data
    batch: int  # expected units a step, over all ranks
    steps: int  # logical steps of the whole run
    clip: float  # C, the largest norm of one unit's gradient
    sigma: float  # noise multiplier; 0 trains without privacy
    delta: float
    target_epsilon: float | None = None  # the budget; both None: sigma and steps set what is spent
    target_advantage: float | None = None  # the budget, of membership advantage
    mechanism: str = "gaussian"
    sampling: str = "poisson"
    clipping: str = "flat"
    noise_source: str = "os"
    seed: int | None = None  # of noise_source "seeded" alone
    rounding: float = 0.0  # kappa: rounding changes the sum by at most kappa C

    @property
    def sensitivity(self) -> float:
        """S: the most by which one unit changes the clipped sum, rounding included."""
        return self.clip * (1 + self.rounding)

    @property
    def private(self) -> bool:
        return self.sigma > 0

    @property
    def amplified(self) -> bool:
        """Whether a unit takes part in a step with a probability below 1, which lowers epsilon."""
        return SAMPLERS[self.sampling].amplified

    @property
    def q(self) -> float:
        return self.batch / self.N

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.N, self.batch)

    @property
    def strict_delta(self) -> float:
        return 1 / (10 * self.N)

    @property
    def course(self) -> "Course":
        return Course(self.N, self.batch, self.steps, self.sampling, self.mechanism)

    def cost(self, steps: int, done: int = 0) -> Counter:
        """{(mechanism, sampler, sigma, share): uses} of `steps` steps after step `done`."""
        planned = self.course.uses(self.sigma, steps, done)
        return Counter({(self.mechanism, self.sampling, use.sigma, use.share): count for use, count in planned.items()})

    def ledger_entries(self, world_size: int) -> dict:
        """The MUST_MATCH keys of a ledger's records."""
        return {
            "unit": self.unit,
            "N": self.N,
            "q": self.q,
            "sigma": self.sigma,
            "clip": self.clip,
            "mechanism": self.mechanism,
            "sampling": self.sampling,
            "steps_per_epoch": self.steps_per_epoch,
            "delta": self.delta,
            "world_size": world_size,
            "noise_source": self.noise_source,
        }


@dataclass(frozen=True)
class Course:
    """The steps of a run, as far as their price follows from public constants."""

    N: int
    batch: int
    steps: int
    sampling: str = "poisson"
    mechanism: str = "gaussian"

    def uses(self, sigma: float, steps: int, done: int = 0) -> Uses:
        """The uses of a unit in one attempt that takes `steps` steps after step `done`."""
        return SAMPLERS[self.sampling].planned(sigma, self.N, self.batch, steps, done)

    def phases(self, sigma: float, steps: int | None = None, done: int = 0) -> list[AnyPhase]:
        """What they disclose, for the accountant. steps None: all of them."""
        return MECHANISMS[self.mechanism].phases(self.uses(sigma, self.steps if steps is None else steps, done))

    @property
    def words(self) -> str:
        """For messages: what a noise multiplier was sought for."""
        return f"{self.steps} steps of {self.batch} of {self.N} units, {self.sampling} sampling"


def choose_sigma(course: Course, delta: float, target_epsilon: float | None, target_advantage: float | None) -> float:
    """The smallest noise multiplier with which the run stays within the one target that is given."""
    if target_advantage is not None:
        return attack_risk.sigma_for(target_advantage, course.phases, course.words)
    assert target_epsilon is not None
    return accounting.sigma_for(target_epsilon, delta, course.phases, course.words)


class PrivacyPlan:
    """Charges, draws and releases the steps of a run, and says what they spent."""

    def __init__(self, settings: PlanSettings, world: World, ledger: Ledger, done: int = 0):
        """ledger: open on rank 0, NoLedger on the others. done: steps that the initial model was trained for."""
        if isinstance(ledger, NoLedger) == world.is_main:
            raise ValueError("rank 0, and no other, holds the ledger")
        self.settings, self.world, self.ledger = settings, world, ledger
        self.clipping_rule = ClippingRule(settings.clipping, settings.clip)
        seed = settings.seed if settings.noise_source == "seeded" else None
        masks = NoiseSource(settings.noise_source, "mask", world.rank, seed)
        self.sampler = SAMPLERS[settings.sampling](settings.N, settings.batch, world, masks)
        noise = NoiseSource(settings.noise_source, "noise", world.rank, seed, world.device)
        self.mechanism = MECHANISMS[settings.mechanism](
            settings.sigma, settings.sensitivity, settings.batch, world, noise
        )
        self.dropout = NoiseSource(settings.noise_source, "dropout", world.rank, seed)
        self.open: int | None = None
        self.hold: Hold | None = None
        self.permitted = self.count_permitted(done) if world.is_main else 0

    @property
    def state(self) -> LedgerState:
        """What the ledger holds. Rank 0 alone knows."""
        return self.ledger.state

    # ---------------------------------------------------------------- a step

    def count_permitted(self, done: int) -> int:
        """How many more steps this attempt may draw. The budget counts what earlier attempts were charged."""
        settings = self.settings
        if not settings.private or settings.target_epsilon is settings.target_advantage is None:
            return settings.steps

        def more(steps: int) -> list[AnyPhase]:
            return settings.course.phases(settings.sigma, steps, done)

        permitted, before = settings.steps, spent(self.state)
        if settings.target_epsilon is not None:
            permitted = accounting.permitted_steps(settings.target_epsilon, settings.delta, before, more, permitted)
        if settings.target_advantage is not None:
            permitted = attack_risk.permitted_steps(settings.target_advantage, before, more, permitted)
        return permitted

    def to_come(self, last: int, done: int) -> Counter:
        """PlanSettings.cost of the steps after `done`, up to `last` or to where the run's own budget ends."""
        return self.settings.cost(max(0, min(last - done, self.permitted)), done)

    def bind(self, hold: Hold, left: int, done: int) -> None:
        """From now on draw only while `hold` holds, and no more than `left` uses."""
        settings, self.hold = self.settings, hold
        low, high = 0, self.permitted
        while low < high:  # the most steps that `left` uses permit
            middle = (low + high + 1) // 2
            wanted = settings.course.uses(settings.sigma, middle, done).total()
            low, high = (middle, high) if wanted <= left else (low, middle - 1)
        self.permitted = low

    def open_step(self, step: int) -> Tensor | None:
        """Charge step `step` (counted from 1) and draw it: the included units of this rank, int64.

        None, on every rank, where the budget permits no further step. Raises UserError, on every rank, where the
        ledger cannot be written: the step is then not drawn.
        """
        assert self.open is None, "open_step() before the step before was released"
        error: UserError | None = None
        verdict = torch.zeros(1)  # of rank 0: 0 charged, 1 no budget left, 2 not written; the device is not waited for
        if self.world.is_main:
            try:
                if self.permitted < 1:
                    verdict.fill_(1)
                else:
                    self.ledger.charge(step)
                    if self.hold is not None:  # after the record, never before: see privacy.budget
                        self.hold.check(f"step {step} was not drawn")
                    self.permitted -= 1
            except UserError as failure:
                error = failure
                verdict.fill_(2)
        outcome = int(self.world.broadcast(verdict))
        if outcome == 2:
            raise error or UserError(f"rank 0 could not write the ledger record of step {step}: the step was not drawn")
        if outcome == 1:
            return None
        self.open = step
        return self.sampler.draw(step)

    def seed_dropout(self) -> None:
        """Seed torch for this rank's dropout masks in the open step.

        Masks are drawn for a whole micro-batch, so one more unit changes the masks of the others. With masks from a
        public seed the sum could change by more than C. With secret masks, a unit's mask has the same distribution
        with and without the other units. A step is then a mixture over masks, and C bounds it for each of them.
        """
        assert self.open is not None, "seed_dropout() without open_step()"
        self.dropout.begin_step(self.open)
        self.dropout.seed_torch()

    def release(self, sums: Tensor, coordinates: int, sharded: bool = False) -> Tensor:
        """The released gradient of the open step, or this rank's share of it, from the ranks' clipped sums (see the
        mechanism's release())."""
        assert self.open is not None, "release() without open_step()"
        grad = self.mechanism.release(self.open, sums, coordinates, sharded)
        self.open = None
        return grad

    def noise_norm(self, coordinates: int) -> float:
        """Root mean square norm of the noise alone in a released gradient; 0 without privacy."""
        return self.mechanism.noise_norm(coordinates)

    # ---------------------------------------------------------------- what was spent

    def epsilon(self, delta: float | None = None) -> tuple[float, float]:
        """(PRV upper bound, RDP) spent so far, at `delta` (by default the plan's). Rank 0 alone knows."""
        if not self.settings.private:
            return math.inf, math.inf
        return epsilons(self.state, delta or self.settings.delta)

    @property
    def bound_name(self) -> str:
        """What the first epsilon is called: "PRV" or "PLD". Rank 0 alone knows."""
        return accounting.bound_name(spent(self.state))

    def attack_risk(self) -> dict:
        """What an attacker can do with what was released so far (attack_risk.figures). Rank 0 alone knows."""
        phases = spent(self.state) if self.settings.private else [Phase(0.0, 1.0, 1)]
        return attack_risk.figures(phases, self.settings.delta)

    def report(self, disclosed: list[str]) -> dict:
        """The content of privacy.json. Rank 0 alone knows."""
        settings, records = self.settings, self.state.records
        sources = noise_sources(self.state) or {settings.noise_source}
        told = warnings(self.state) or [SEEDED_WARNING] * ("seeded" in sources)
        samplings = {record["sampling"] for record in records} or {settings.sampling}
        prv, rdp = self.epsilon()
        strict_prv, strict_rdp = self.epsilon(settings.strict_delta)
        return {
            "unit": settings.unit,
            "relation": relation(settings.unit, samplings),
            "N": settings.N,
            "q": settings.q,
            "expected_batch": settings.batch,
            "sigma": settings.sigma,
            "clip": settings.clip,
            "clipping": settings.clipping,
            "rounding": settings.rounding,
            "steps_charged": self.state.charged,
            "ledger_checksum": self.state.last_checksum,
            "attempts": self.state.attempts,
            "delta": settings.delta,
            "epsilon_prv": finite_or_text(prv),
            "epsilon_rdp": finite_or_text(rdp),
            "delta_strict": settings.strict_delta,
            "epsilon_prv_strict": finite_or_text(strict_prv),
            "epsilon_rdp_strict": finite_or_text(strict_rdp),
            "target_epsilon": settings.target_epsilon,
            "target_advantage": settings.target_advantage,
            "attack_risk": self.attack_risk(),
            "sampling": settings.sampling,
            "noise_source": " and ".join(sorted(sources)),
            "warning": ("; ".join(told) or None) if settings.private else None,
            "disclosed": disclosed,
        }


def finite_or_text(value: float) -> float | str:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else str(value)
