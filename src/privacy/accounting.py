"""Epsilon of a run, and the noise or the number of steps that an epsilon allows: numbers only, no tensors.

Relation: add or remove one unit. Every function here returns an upper bound of the true epsilon, never an estimate, for
any sigma, q and delta that a float holds and up to MOST_STEPS steps in a phase. The work is bounded, too: an epsilon
takes at most MOST_PHASES times RDP and three PRV grids (see sampled_gaussian), a search MOST_TRIES epsilons.

`epsilon_bound` returns the smallest of these sound bounds and names it:
  prv       the PRV upper bound. Its error term is Opacus's 0.01; less in proportion below an RDP epsilon of 0.5 (as
            far as FINE_POINTS reach), more in proportion above 16, and more where the grid would pass MAX_POINTS. Left
            out where the grid cannot be trusted: an error term of 1, a span beyond what exp() holds, rounding that may
            take half of delta.
  rdp       Renyi DP of the sampled Gaussian (Mironov, Talwar and Zhang 2019).
  gaussian  the analytic Gaussian mechanism (Balle and Wang 2018) without amplification: exact where every q is 1, and
            sound for any q, since sampling cannot add to what full participation discloses.
  sampling  epsilon 0, where delta is not below the probability that the unit is drawn at all.
  pld       in place of prv where a phase is of random allocation: the privacy loss on a grid (privacy.loss_grid).
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import erfcx, ndtr

from base.errors import fail
from privacy import allocation, loss_grid
from privacy.allocation import Allocated, AnyPhase
from privacy.sampled_gaussian import ORDERS, ROUNDING, Phase, prv_epsilon, rdp_curve, rdp_epsilon

MOST_STEPS = 10**15  # of a phase; a float still counts them one by one
MOST_PHASES = 32
MOST_TRIES, MODEL_TRIES = 20, 10  # epsilons that a search computes; those beyond the latter halve the bracket
SIGMA_RANGE = (0.01, 1e6)  # where calibration searches
TOLERANCE = 0.002  # a calibrated epsilon lies between (1 - TOLERANCE) target and target


@dataclass(frozen=True)
class Bound:
    """An upper bound of epsilon and its origin: "prv", "pld", "rdp", "gaussian", "sampling"; "none": no steps, or no
    noise."""

    epsilon: float
    method: str


def check_delta(delta: float) -> None:
    """UserError unless 0 < delta < 1."""
    if not 0 < delta < 1:  # also false for NaN
        fail(f"delta {delta}: wanted a number above 0 and below 1, such as 1e-5")


def check_steps(steps: float) -> None:
    """UserError unless `steps` is a whole number from 0 to MOST_STEPS."""
    if not 0 <= steps <= MOST_STEPS or steps != int(steps):
        fail(f"steps {steps}: wanted a whole number of 0 or more, at most {MOST_STEPS:g}")


def merge(phases: Sequence[AnyPhase]) -> tuple[AnyPhase, ...]:
    """The same mechanism in a canonical form: one phase per (sigma, q), all full-participation phases as one Gaussian,
    one phase per kind of epoch under random allocation.

    Raises UserError for a phase that is none. Order and splitting never change an epsilon, to the last bit. Beyond
    MOST_PHASES, the phases that are left disclose a little more (_coarser).
    """
    total: dict[AnyPhase, int] = {}
    for phase in phases:
        if not (0 <= phase.sigma < math.inf):
            fail(f"noise multiplier sigma {phase.sigma}: wanted a finite number of 0 or more")
        if not 0 <= phase.q <= 1:
            fail(f"sampling probability q {phase.q}: wanted a number from 0 to 1; is the batch larger than the data?")
        check_steps(phase.steps)
        if phase.steps and phase.q:
            sigma = float(phase.sigma)
            key: AnyPhase = Phase(sigma, float(phase.q), 1)
            if isinstance(phase, Allocated):
                key = _epoch(sigma, phase.t, phase.taken)
            total[key] = total.get(key, 0) + int(phase.steps)
    fine, ratio = total, 1.01
    while len(total) > MOST_PHASES:
        total, ratio = _coarser(fine, ratio), ratio**1.3
    ordered = sorted(total.items(), key=lambda item: (item[0].amplified, item[0].sigma, item[0].q, str(item[0])))
    full = [(phase.sigma, steps) for phase, steps in ordered if not phase.amplified and phase.sigma > 0]
    merged = [replace(phase, steps=steps) for phase, steps in ordered if phase.amplified or not phase.sigma]
    if full:
        # n releases with sigma are one with sigma / sqrt(n): the mu of Gaussian DP add in squares.
        merged.append(Phase(1 / math.hypot(*(math.sqrt(steps) / sigma for sigma, steps in full)), 1.0, 1))
    return tuple(merged)


def _epoch(sigma: float, t: int, taken: int) -> AnyPhase:
    """One epoch, or a step that discloses no less, where there is no grid for it."""
    if t == 1 or sigma < allocation.SIGMA_RANGE[0]:
        return Phase(sigma, 1.0, 1)  # it surely takes part
    return Allocated(min(sigma, allocation.SIGMA_RANGE[1]), t, taken, 1)


def _coarser(total: dict[AnyPhase, int], ratio: float) -> dict[AnyPhase, int]:
    """Every sigma rounded down and every q up to a power of `ratio`, which can only disclose more: less noise is more
    with some added, a smaller q is a larger one after a coin of the unit's own. Of an epoch, fewer steps to choose from
    disclose more, too: the mean of fewer independent variables is spread wider, and so is what that mean has a larger
    share in. So the steps taken go down, and their share q up, until epochs of any lengths are few kinds."""
    found: dict[AnyPhase, int] = {}
    base = math.log(ratio)
    for phase, steps in total.items():
        sigma, q = phase.sigma, phase.q
        if sigma > 0:
            sigma = min(sigma, math.exp(math.floor(math.log(sigma) / base) * base))
        q = max(q, min(1.0, math.exp(math.ceil(math.log(q) / base) * base)))
        key: AnyPhase = Phase(sigma, q, 1)
        if isinstance(phase, Allocated):
            taken = max(1, min(phase.taken, math.floor(math.exp(math.floor(math.log(phase.taken) / base) * base))))
            key = _epoch(sigma, max(taken, math.floor(taken / q)), taken)
        found[key] = found.get(key, 0) + steps
    return found


def bound_name(phases: Sequence[AnyPhase]) -> str:
    """What computes the close bound of these phases' epsilon: "PRV", or "PLD" where one is of random allocation."""
    return "PLD" if any(isinstance(phase, Allocated) for phase in phases) else "PRV"


# --- the bounds ---


def epsilon_gaussian(mu: float, delta: float) -> float:
    """Exact epsilon at `delta` of a Gaussian mechanism with sensitivity / standard deviation = mu, to ROUNDING.

    Balle and Wang (2018), theorem 8: delta = Phi(mu/2 - eps/mu) - exp(eps) Phi(-mu/2 - eps/mu). With y = eps/mu - mu/2
    this is exp(-y^2/2) (erfcx(y/sqrt 2) - erfcx((y + mu)/sqrt 2)) / 2, in which nothing overflows however large epsilon
    is. The end of the bracket whose delta is not above `delta` is returned.
    """
    check_delta(delta)
    if not mu >= 0:
        fail(f"mu {mu}: wanted a number of 0 or more")
    if mu == 0:
        return 0.0
    if mu == math.inf:
        return math.inf
    log_delta = math.log(delta) - ROUNDING

    def is_met(y: float) -> bool:
        left, right = y / math.sqrt(2), (y + mu) / math.sqrt(2)
        if delta > 0.5:  # 1 - delta is exact, and the sum of what is left has no cancellation
            return ndtr(y) + math.exp(-y * y / 2) * erfcx(right) / 2 >= (1 - delta) * (1 + ROUNDING)
        if mu > 1e-3:
            gap = erfcx(left) - erfcx(right)
        else:  # the difference loses its digits; -erfcx' is convex, so the trapezium is an upper bound, by mu^2/12
            slopes = (2 / math.sqrt(math.pi) - 2 * x * erfcx(x) for x in (left, right))
            gap = sum(slopes) * mu / math.sqrt(8)
        return -y * y / 2 + math.log(gap / 2) <= log_delta

    low, high = max(-mu / 2, -10.0), 40.0  # epsilon = 0 or delta = 1 - 1e-23; delta = 1e-349
    if is_met(low):
        return mu * (low + mu / 2)
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if is_met(middle) else (middle, high)
    return mu * (high + mu / 2) * (1 + 1e-14)  # mu and the product are rounded


def chance_of_a_draw(phases: tuple[AnyPhase, ...]) -> float:
    """The probability that a unit is drawn in any step: 1 - prod (1 - q)^steps, which rounds to 0 for a small q."""
    if any(phase.q == 1 for phase in phases):
        return 1.0
    return -math.expm1(sum(phase.steps * math.log1p(-phase.q) for phase in phases))


# --- epsilon ---


@functools.lru_cache(maxsize=4096)
def _without_a_grid(phases: tuple[AnyPhase, ...], delta: float) -> Bound:
    """The least of all bounds but the PRV's: some milliseconds of work."""
    if not phases:
        return Bound(0.0, "none")
    if any(phase.sigma == 0 for phase in phases):
        return Bound(math.inf, "none")
    if chance_of_a_draw(phases) < delta * (1 - 1e-6):
        return Bound(0.0, "sampling")
    mu = math.hypot(*(math.sqrt(phase.steps) / phase.sigma for phase in phases))
    bounds = [Bound(epsilon_gaussian(mu, delta), "gaussian")]
    if any(phase.amplified for phase in phases):
        bounds.append(Bound(rdp_epsilon(phases, math.log(delta)), "rdp"))
    return min(bounds, key=lambda bound: bound.epsilon)


@functools.lru_cache(maxsize=4096)
def _bound(phases: tuple[AnyPhase, ...], delta: float) -> Bound:
    quick = _without_a_grid(phases, delta)
    if not 0 < quick.epsilon < math.inf or not any(phase.amplified for phase in phases):
        return quick
    sampled = tuple(phase for phase in phases if isinstance(phase, Phase))
    if sampled == phases:
        close = Bound(prv_epsilon(sampled, delta), "prv")
    else:
        close = Bound(loss_grid.epsilon(phases, delta), "pld")
    return min(close, quick, key=lambda bound: bound.epsilon)


def epsilon_bound(phases: Sequence[AnyPhase], delta: float) -> Bound:
    """The headline: the least of the sound bounds at `delta` of all `phases` composed, and which one it is.

    0 where nothing was released, infinite where something was without noise. Repeated calls are answered from memory.
    """
    check_delta(delta)
    return _bound(merge(phases), float(delta))


def epsilon_prv(phases: Sequence[AnyPhase], delta: float) -> float:
    """The PRV upper bound of epsilon at `delta`, or the smaller sound bound that `epsilon_bound` names in its place."""
    return epsilon_bound(phases, delta).epsilon


def epsilon_rdp(phases: Sequence[AnyPhase], delta: float) -> float:
    """The RDP epsilon at `delta`, over ORDERS: Opacus's where its own orders hold the best one."""
    check_delta(delta)
    merged = merge(phases)
    if not merged:
        return 0.0
    return math.inf if any(phase.sigma == 0 for phase in merged) else rdp_epsilon(merged, math.log(delta))


def curve(phases: Sequence[AnyPhase]) -> np.ndarray:
    """RDP of all `phases` composed, at each of ORDERS; infinite where something was without noise."""
    merged = merge(phases)
    if any(phase.sigma == 0 for phase in merged):
        return np.full(len(ORDERS), math.inf)
    return rdp_curve(merged)


def epsilon_shuffle(sigma: float, participations: int, delta: float) -> float:
    """Epsilon at `delta` where every unit takes part in `participations` steps: no amplification, mu = sqrt(E) / sigma.

    Sound for shuffling, and for any other order in which a unit is used at most that often.
    """
    check_delta(delta)
    (merged,) = merge([Phase(sigma, 1.0, participations)]) or (None,)
    if merged is None:
        return 0.0
    return math.inf if merged.sigma == 0 else epsilon_gaussian(1 / merged.sigma, delta)


# --- what an epsilon allows ---


def _check_target(target_epsilon: float, delta: float) -> None:
    check_delta(delta)
    if not 0 < target_epsilon < math.inf:
        fail(f"target epsilon {target_epsilon}: wanted a finite number above 0")


Function = Callable[[float], float]
Measure = Callable[[tuple[AnyPhase, ...]], float]  # of merged phases


def _next_place(tried: list[tuple[float, float]], quick: Function, target: float, low: float, high: float) -> float:
    """Where to look for the place in (low, high) at which epsilon meets the target, or NaN.

    tried: (place, epsilon) so far. Up to two of them, quick(place), an upper bound that costs little, times its ratio
    to epsilon at the last place is taken for epsilon, and halved upon; then the secant of the logarithms.
    """
    known = [(math.log(place), math.log(epsilon)) for place, epsilon in tried if 0 < epsilon < math.inf][-2:]
    if len(tried) < 2:
        ratio = tried[-1][1] / quick(tried[-1][0]) if known else 1.0
        falls = quick(high) < quick(low)
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if (quick(middle) * ratio <= target) == falls else (middle, high)
        return high
    if len(known) < 2 or known[0][1] == known[1][1]:
        return math.nan
    (left, first), (right, second) = known
    return math.exp(min(700.0, right + (math.log(target) - second) * (right - left) / (second - first)))


def smallest_sigma(epsilon: Function, quick: Function, target: float, aim: float, words: str) -> float:
    """The smallest sigma of SIGMA_RANGE with epsilon(sigma) <= target, to TOLERANCE; epsilon falls as sigma rises.

    quick(sigma): an upper bound of epsilon(sigma), see _next_place. aim: a number a little below the target.
    """
    low, high = SIGMA_RANGE  # above the target, within it
    if epsilon(low) <= target:
        fail(
            f"{words}: noise multiplier {low:g} already meets it, which is next to no privacy; "
            "lower the target or the delta"
        )
    if quick(high) > target and epsilon(high) > target:
        fail(f"{words}: no noise multiplier up to {high:g} meets it; raise the target or take fewer steps")
    tried: list[tuple[float, float]] = []
    while len(tried) < MOST_TRIES and high / low > 1 + 1e-4:  # closer: the bound jumps over the target between them
        sigma = _next_place(tried, quick, aim, low, high)
        if len(tried) >= MODEL_TRIES or not low < sigma < high:
            sigma = math.sqrt(low * high)
        tried.append((sigma, epsilon(sigma)))
        if tried[-1][1] > target:
            low = sigma
        else:
            high = sigma
            if tried[-1][1] >= target * (1 - TOLERANCE):
                break
    return high


def sigma_for(target_epsilon: float, delta: float, phases: Callable[[float], Sequence[AnyPhase]], words: str) -> float:
    """The smallest noise multiplier for which phases(sigma) stay within the target, to 0.5 % in epsilon.

    epsilon_prv at the answer is never above the target. UserError where that needs a sigma outside SIGMA_RANGE. Where
    the bound itself has a step (MAX_SPAN ends the PRV grid near an epsilon of 490) the answer is the step's lower side.
    words: what is wanted, for messages.
    """
    _check_target(target_epsilon, delta)
    if not (known := merge(phases(1.0))):
        fail(f"{words}: wanted 1 or more steps in which a unit may be drawn, to calibrate the noise for")
    rough = any(phase.amplified for phase in known)  # else the bound is exact
    return smallest_sigma(
        lambda sigma: epsilon_prv(phases(sigma), delta),
        lambda sigma: _without_a_grid(merge(phases(sigma)), delta).epsilon,
        target_epsilon,
        target_epsilon * (1 - TOLERANCE / 2 if rough else 1 - 1e-9),
        f"target epsilon {target_epsilon:g} at delta {delta:g} over {words}",
    )


More = Callable[[int], Sequence[AnyPhase]]  # number of steps -> what they add


def permitted_steps(target_epsilon: float, delta: float, spent: Sequence[AnyPhase], more: More, wanted: int) -> int:
    """The largest n <= wanted for which `spent` and more(n), the phases of n more steps, stay within the target.

    0 where `spent` alone is at or above it. Epsilon grows with n, so all smaller n are permitted as well. Exact up to
    two million steps, to a millionth beyond; where the bound jumps, to a ten-thousandth, or what MOST_TRIES found.
    """
    _check_target(target_epsilon, delta)
    return most_steps(
        lambda phases: _bound(phases, float(delta)).epsilon,
        lambda phases: _without_a_grid(phases, float(delta)).epsilon,
        target_epsilon,
        spent,
        more,
        wanted,
    )


def most_steps(
    measure: Measure, quick: Measure, target: float, spent: Sequence[AnyPhase], more: More, wanted: int
) -> int:
    """The largest n <= wanted for which `measure` of `spent` and more(n) is not above the target.

    measure, quick: of merged phases, both growing with steps; quick is an upper bound that costs little (_next_place).
    """
    check_steps(wanted)

    def phases(count: float) -> tuple[AnyPhase, ...]:
        return merge([*spent, *more(math.floor(count))])

    low, high = 0, int(wanted)  # permitted, not permitted
    if measure(phases(high)) <= target:
        return high
    if measure(phases(low)) > target:
        return low
    tried: list[tuple[float, float]] = []
    while len(tried) < MOST_TRIES and high - low > max(1, low // (10**6 if len(tried) < MODEL_TRIES else 10**4)):
        place = _next_place(tried, lambda count: quick(phases(count)), target, max(low, 1), high)
        count = (low + high) // 2
        if len(tried) < MODEL_TRIES and not math.isnan(place):
            count = min(max(math.floor(place), low + 1), high - 1)
        tried.append((count, measure(phases(count))))
        low, high = (count, high) if tried[-1][1] <= target else (low, count)
    return low
