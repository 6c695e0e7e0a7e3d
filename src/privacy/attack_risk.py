"""What an attacker can do with all that a run released: upper bounds from its phases, numbers only, no tensors.

P is the output with the unit, Q without it. An attacker who calls at most a share `a` of those who are not members
members (the false-positive rate) finds at most the share power(a) of the members (the true-positive rate):

    power(a) = max {P(S) : Q(S) <= a} = min over t of delta(t) + exp(t) a,   delta(t) = max over S of P(S) - exp(t) Q(S)

(Neyman and Pearson; Dong, Roth and Su 2022, proposition 6), so a curve follows from upper bounds of delta at any set of
t, negative ones included, and is itself an upper bound. `removed` is P against Q as above, `added` Q against P; the
worse of both takes the larger delta at each t, which is the concave hull of both curves (Dong et al., definition F.1).

delta is computed from the privacy loss Y of one step on a grid. Every rounding goes up:
  - The mass between two points goes to these two, so that its share of P and of Q = E_P[exp(-Y)] stay what they are
    ("connect the dots", Doroshenko et al. 2022). delta of a sum of losses, E[(1 - exp(t) prod exp(-Y))_+], is convex in
    each exp(-Y), so spreading one while its mean is kept can but raise it.
  - Mass below the grid goes up to its first point, mass above it to an infinite loss. What a circular convolution
    carries from above the grid to its lower end is bounded (Chernoff) and added to the infinite loss.
  - What rounding of float64 can change, in the masses and in the transforms, is bounded and added to delta.
The result is the least of this, of the Gaussian without amplification, and of the chance that the unit is drawn at all.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import log_ndtr, ndtr, ndtri

from base.errors import fail
from privacy import accounting
from privacy.accounting import Phase
from privacy.sampled_gaussian import MAX_SPAN, MAX_WORK, ORDERS, UNIT, compose_on_a_grid, rdp_per_step

FALSE_ALARMS = (0.001, 0.01, 0.05)  # false-positive rates of every report
CURVE = (1e-5, 1e-4, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)  # and of its curve
BASELINES = (1e-6, 1e-4, 0.01)  # chances to guess a unit without the model, of every report
PRIOR = 0.5
WORSE, REMOVED, ADDED = "worse", "removed", "added"
TAIL = 1e-12  # of the composed loss outside the grid; it goes to the infinite loss
FINENESS = 0.04  # width of the grid, in standard deviations of one step's loss
LEAST_POINTS, MOST_POINTS = 2**12, 2**18
SLACK = 1e-12  # added to sums and closed forms of numbers up to 1, whose rounding it covers many times over


@dataclass(frozen=True, eq=False)
class AttackRisk:
    """Upper bounds of what an attacker can do. A result is sound whichever direction of the relation is meant."""

    loss: np.ndarray  # (n,) t, ascending, the same upwards and downwards; 0 is one of them
    removed: np.ndarray  # (n,) upper bound of delta(t), P against Q
    added: np.ndarray  # (n,) of Q against P
    mu: float  # of one Gaussian release that discloses at least as much; infinite: none does

    def delta(self, direction: str = WORSE) -> np.ndarray:
        """(n,) upper bound of delta at each t of `loss`."""
        both = {REMOVED: self.removed, ADDED: self.added}
        return both[direction] if direction in both else np.maximum(self.removed, self.added)

    def power(self, false_positive: float | Sequence[float] | np.ndarray, direction: str = WORSE) -> np.ndarray:
        """The largest true-positive rate at each false-positive rate, from 0 to 1."""
        rates = np.asarray(false_positive, dtype=float)
        delta, factor = self.delta(direction), np.exp(self.loss)
        found = np.array([np.min(delta + factor * rate) for rate in np.atleast_1d(rates)])
        with np.errstate(invalid="ignore"):
            gaussian = np.nan_to_num(ndtr(ndtri(rates) + self.mu), nan=1.0)  # -inf + inf: nothing is known
        return np.minimum(np.minimum(found.reshape(rates.shape), gaussian + SLACK), 1.0)

    def _at(self, t: float) -> float:
        """Upper bound of delta(t) of the worse direction: delta is convex in exp(t), so it lies below a chord. At
        exp(t) = 0 it is 1."""
        delta = self.delta()
        if t >= self.loss[-1]:
            return float(delta[-1])
        if t <= self.loss[0]:
            return 1 - math.exp(t - self.loss[0]) * (1 - float(delta[0])) + SLACK
        above = int(np.searchsorted(self.loss, t))
        low, high = self.loss[above - 1], self.loss[above]
        share = math.expm1(t - low) / math.expm1(high - low)
        return min(1.0, float((1 - share) * delta[above - 1] + share * delta[above]) + SLACK)

    @property
    def advantage(self) -> float:
        """The largest true-positive rate less false-positive rate: delta at epsilon 0."""
        return self._at(0.0)

    def guess(self, prior: float) -> float:
        """How often the best guess, member or not, is right on average where members are a share `prior`: 1 less the
        Bayes risk."""
        check_prior(prior)
        return min(1.0, (1 - prior) + prior * self._at(math.log1p(-prior) - math.log(prior)))

    def posterior(self, prior: float, delta: float) -> float:
        """The largest probability of membership, `prior` before, after seeing what was released, up to an event of
        probability `delta`: prior exp(y) / (1 - prior + prior exp(y)), the loss being above y in at most `delta` cases.

        P(Y > y) <= delta(t) / (1 - exp(t - y)) for every t < y, since the loss counts with at least that weight there.
        """
        check_prior(prior)
        accounting.check_delta(delta)
        found = self.delta()
        small = found < delta
        if not small.any():
            return 1.0
        y = float(np.min(self.loss[small] - np.log1p(-found[small] / delta)))  # where the right side is `delta`
        return 1 / (1 + math.exp(min(700.0, math.log1p(-prior) - math.log(prior) - y)))

    def reconstruction(self, baseline: float) -> float:
        """The largest chance to reconstruct a unit (to any criterion, an attribute or all of it) with the model, where
        it is `baseline` without: reconstruction robustness (Balle et al. 2022; Kulynych et al. 2025, as in riskcal)."""
        return float(self.power(baseline))


def check_prior(prior: float) -> None:
    """UserError unless 0 < prior < 1."""
    if not 0 < prior < 1:  # also false for NaN
        fail(f"prior {prior:g}: wanted a number above 0 and below 1, such as 0.5")


def permitted_by_epsilon(epsilon: float, delta: float, false_positive: np.ndarray) -> np.ndarray:
    """The true-positive rates that (epsilon, delta) alone would permit (Kairouz, Oh and Viswanath 2015)."""
    if not epsilon < math.inf:
        return np.ones_like(false_positive)
    with np.errstate(over="ignore"):
        steep = np.exp(np.float64(epsilon)) * false_positive + delta
    return np.minimum(np.minimum(steep, 1 - math.exp(-epsilon) * (1 - delta - false_positive)), 1.0)


def figures(phases: Sequence[Phase], delta: float, prior: float = PRIOR) -> dict:
    """The figures of a report, all from 0 to 1. tpr, tpr_removed, tpr_added, curve: false-positive rate -> the largest
    true-positive rate, of the worse direction where none is named; posterior: up to an event of probability `delta`;
    reconstruction: chance without the model -> the largest with it."""
    risk = attack_risk(phases)

    def rates(at: Sequence[float], direction: str = WORSE) -> dict[str, float]:
        return {f"{rate:g}": float(found) for rate, found in zip(at, risk.power(at, direction), strict=True)}

    return {
        "advantage": risk.advantage,
        "tpr": rates(FALSE_ALARMS),
        "tpr_removed": rates(FALSE_ALARMS, REMOVED),
        "tpr_added": rates(FALSE_ALARMS, ADDED),
        "curve": rates(CURVE),
        "prior": prior,
        "guess": risk.guess(prior),
        "posterior": risk.posterior(prior, delta),
        "reconstruction": {f"{chance:g}": risk.reconstruction(chance) for chance in BASELINES},
    }


def attack_risk(phases: Sequence[Phase]) -> AttackRisk:
    """The risk of all `phases` composed. Repeated calls are answered from memory."""
    return _attack_risk(accounting.merge(phases))


@functools.lru_cache(maxsize=8)
def _attack_risk(phases: tuple[Phase, ...]) -> AttackRisk:
    if not phases:  # nothing was released
        t = np.array([-1.0, 0.0, 1.0])
        return AttackRisk(t, _least(t), _least(t), 0.0)
    if any(phase.sigma == 0 for phase in phases):
        t = np.array([-1.0, 0.0, 1.0])
        return AttackRisk(t, np.ones(3), np.ones(3), math.inf)
    mu = math.hypot(*(math.sqrt(phase.steps) / phase.sigma for phase in phases))
    sampled = any(phase.q < 1 for phase in phases)
    span = _span(phases) if sampled else min(MAX_SPAN, mu * (mu / 2 + 8))
    half = _points(phases, span) // 2 if sampled else LEAST_POINTS
    t = np.arange(-half, half + 1) * (span / half)
    bounds = [_gaussian(mu, t), _drawn(accounting.chance_of_a_draw(phases), t)]
    removed = added = np.minimum(*bounds)
    if sampled:
        above, below = (_on_the_grid(phases, t, direction) for direction in (REMOVED, ADDED))
        # delta of one direction at t is 1 - exp(t) + exp(t) times that of the other at -t.
        removed = np.minimum(removed, np.minimum(above, _turned(below, t)))
        added = np.minimum(added, np.minimum(below, _turned(above, t)))
    removed, added = (np.clip(np.maximum(delta, _least(t)), 0.0, 1.0) for delta in (removed, added))
    for array in (t, removed, added):
        array.setflags(write=False)  # they are shared by all callers of the cache
    return AttackRisk(t, removed, added, mu)


def _least(t: np.ndarray) -> np.ndarray:
    """No delta is smaller: that of equal P and Q."""
    return np.maximum(-np.expm1(t), 0.0)


def _turned(delta: np.ndarray, t: np.ndarray) -> np.ndarray:
    """delta at t of the other direction. The points are the same upwards and downwards."""
    return -np.expm1(t) + np.exp(t) * delta[::-1] + SLACK


def _gaussian(mu: float, t: np.ndarray) -> np.ndarray:
    """delta at t of a Gaussian release (Balle and Wang 2018, theorem 8), both directions: exact, and SLACK."""
    if not mu < math.inf:
        return np.ones_like(t)
    return ndtr(mu / 2 - t / mu) - np.exp(np.minimum(0.0, t + log_ndtr(-mu / 2 - t / mu))) + SLACK


def _drawn(chance: float, t: np.ndarray) -> np.ndarray:
    """delta at t where the output is the same but for an event of probability `chance`, that the unit is drawn."""
    return np.where(t >= 0, chance, _least(t) + np.exp(np.minimum(t, 0)) * chance) + SLACK


# --- a target ---


def advantage(phases: Sequence[Phase]) -> float:
    """The membership advantage of all `phases` composed, an upper bound."""
    return attack_risk(phases).advantage


def _quick(phases: tuple[Phase, ...]) -> float:
    """An upper bound of the advantage that costs little: sqrt(1 - exp(-KL)) and sqrt(KL / 2) (Bretagnolle and Huber,
    Pinsker), KL at most RDP at any order above 1; or the Gaussian without amplification."""
    if not phases or any(phase.sigma == 0 for phase in phases):
        return float(bool(phases))
    kl = float(sum(phase.steps * rdp_per_step(phase.sigma, phase.q)[0] for phase in phases))
    mu = math.hypot(*(math.sqrt(phase.steps) / phase.sigma for phase in phases))
    return min(math.sqrt(kl / 2), math.sqrt(-math.expm1(-kl)), math.erf(mu / math.sqrt(8)) * (1 + SLACK))


def check_advantage(target: float) -> None:
    """UserError unless 0 < target < 1."""
    if not 0 < target < 1:
        fail(f"target advantage {target:g}: wanted a number above 0 and below 1, such as 0.1")


def calibrate_sigma(target: float, q: float, uses: int) -> float:
    """The smallest noise multiplier, to 0.2 % in the advantage, for which `uses` steps with q keep the membership
    advantage within the target; with q = 1 for uses of a unit that are not amplified."""
    check_advantage(target)
    accounting.check_steps(uses, 1, purpose=" to calibrate the noise for")
    return accounting.smallest_sigma(
        lambda sigma: advantage([Phase(sigma, q, uses)]),
        lambda sigma: _quick(accounting.merge([Phase(sigma, q, uses)])),
        target,
        target * (1 - accounting.TOLERANCE / 2),
        f"target advantage {target:g} over {uses} steps with q = {q:.4g}",
    )


def permitted_steps(target: float, spent: Sequence[Phase], q: float, sigma: float, wanted: int) -> int:
    """The largest n <= wanted for which `spent` and n more steps of (sigma, q) keep the advantage within the target."""
    check_advantage(target)
    return accounting.most_steps(_attack_advantage, _quick, target, spent, Phase(sigma, q, wanted))


def _attack_advantage(phases: tuple[Phase, ...]) -> float:
    return _attack_risk(phases).advantage


# --- the grid ---


def _span(phases: tuple[Phase, ...]) -> float:
    """A loss that the sum of the steps' losses, and that of any step, exceeds with a probability of about TAIL.

    P(Y > y) <= exp((order - 1) (RDP - y)); RDP is the larger for P against Q (Mironov et al. 2019), and tails below are
    smaller than those above by exp(-y). Only the fineness hangs on it: what is outside is counted from the grid.
    """

    def quantile(rdp: Any, log_tail: float) -> float:
        return float(np.min(rdp - log_tail / (ORDERS - 1)))

    log_tail = math.log(TAIL)
    total = sum(phase.steps * rdp_per_step(phase.sigma, phase.q) for phase in phases)
    single = (quantile(rdp_per_step(p.sigma, p.q), log_tail - math.log(p.steps)) for p in phases)
    return min(MAX_SPAN, max(quantile(total, log_tail), *single))


def _points(phases: tuple[Phase, ...], span: float) -> int:
    """How many points: the spreading adds at most width^2 / 4 to the variance of each step's loss, which is about twice
    its mean, RDP at order 1."""
    steps = sum(phase.steps for phase in phases)
    spread = math.sqrt(2 * sum(p.steps * rdp_per_step(p.sigma, p.q)[0] for p in phases) / steps)
    wanted = 2 * span / (FINENESS * spread) if spread > 0 else math.inf
    most = min(MOST_POINTS, MAX_WORK // len(phases))
    return 1 << math.ceil(math.log2(min(most, max(LEAST_POINTS, wanted))))


def _on_the_grid(phases: tuple[Phase, ...], t: np.ndarray, direction: str) -> np.ndarray:
    """(n,) upper bound of delta at each t of the composed privacy loss of one direction."""
    span = float(t[-1])
    steps, parts = [], []  # mass (2 half,) of all points but the last
    infinite = noise = 0.0
    for phase in phases:
        mass, beyond, moved = step_masses(phase, t, direction)
        if beyond >= 0.5:
            return np.ones_like(t)
        steps.append(phase.steps)
        parts.append(mass / (1 - beyond))
        infinite -= phase.steps * math.log1p(-beyond)
        # (1 - exp(t - y))_+ has a slope of at most 1 in y: mass times the way that rounding moved it bounds the change.
        noise += phase.steps * (moved + 8 * UNIT * span)
    infinite = -math.expm1(-infinite) + _beyond(phases, parts, t)
    composed, rounding = compose_on_a_grid(parts, steps)
    composed = np.append(composed, 0.0).clip(min=0)  # what reached the last point is counted as infinite
    above, weighted = (np.cumsum(part[::-1])[::-1] for part in (composed, composed * np.exp(-t)))
    return above - np.exp(t) * weighted + infinite + noise + rounding + SLACK


def _beyond(phases: tuple[Phase, ...], parts: list[np.ndarray], t: np.ndarray) -> float:
    """Upper bound of the composed mass from the last point on: E[exp(exponent (Y - span))] at the best of some."""
    span, log_least = float(t[-1]), 0.0
    total = sum(phase.steps * rdp_per_step(phase.sigma, phase.q) for phase in phases)
    order = ORDERS[np.argmin(total - math.log(TAIL) / (ORDERS - 1))]
    for exponent in np.minimum((order - 1) * np.array([0.5, 0.8, 1.0, 1.25, 2.0]), 700 / span):  # exp() holds 709
        growth = np.expm1(exponent * t[:-1])
        moments = [phase.steps * math.log1p(float(mass @ growth)) for phase, mass in zip(phases, parts, strict=True)]
        log_least = min(log_least, sum(moments) * (1 + math.copysign(1e-9, sum(moments))) - exponent * span)
    return math.exp(log_least)


def step_masses(phase: Phase, t: np.ndarray, direction: str) -> tuple[np.ndarray, float, float]:
    """One step's privacy loss on the points t: (mass (n - 1,) of all but the last, infinite mass, bound of rounding).

    Both masses are of P for `removed`, of Q for `added`, whose losses are the negatives. The bound is of mass times the
    way by which rounding may have moved it downwards.
    """
    q, sigma, half = phase.q, phase.sigma, len(t) // 2
    width = float(t[half + 1])
    # Y = log(1 - q + q exp(x)) is above t where x, the Gaussian's log-likelihood ratio, is above this:
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        ratio = np.expm1(t) / q
        x = t.copy() if q == 1 else np.log1p(np.maximum(ratio, -1))
        moved = 4 * UNIT * (1 + np.abs(ratio) / np.maximum(1 + ratio, 1e-300)) * (q < 1) + UNIT * np.abs(x)
    masses, errors, outside = [], [], []
    for mean in (0.5 / sigma, -0.5 / sigma):  # of z under Q, under the Gaussian that is drawn
        z = x * sigma + mean
        side = np.where(np.arange(len(t)) < half, 1.0, -1.0)
        tail = ndtr(side * z)  # below t for those below 0, above t for the others: to its last digits
        below_zero = float(ndtr(z[half]))
        with np.errstate(over="ignore", invalid="ignore"):
            density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
            error = 4 * UNIT * (1 + z * z) * tail + density * (
                sigma * moved + 4 * UNIT * (np.abs(x) * sigma + abs(mean))
            )
        errors.append(np.nan_to_num(error, nan=0.0, posinf=1.0))
        masses.append(np.append(np.diff(np.append(tail[:half], below_zero)), -np.diff(tail[half:])))
        outside.append((float(tail[0]), float(tail[-1])))
    under_q, drawn = masses
    under_p = (1 - q) * under_q + q * drawn
    error_q, error_p = errors[0], (1 - q) * errors[0] + q * errors[1]
    (below_q, above_q), (below_drawn, above_drawn) = outside
    main, other, low, high, start = under_p, under_q, (1 - q) * below_q + q * below_drawn, 0.0, t[:-1]
    high, error, other_error = (1 - q) * above_q + q * above_drawn, error_p, error_q
    if direction == ADDED:  # the same with the two exchanged, and read from above
        main, other, low, high, start = under_q[::-1], under_p[::-1], above_q, below_q, t[:-1]
        error, other_error = error_q[::-1], error_p[::-1]
    # a at the lower end and main - a at the upper one, so that exp(-Y) has the mean other / main.
    scale = np.exp(start)
    lower = np.clip((other * scale - main * math.exp(-width)) / -math.expm1(-width), 0.0, main)
    mass = np.append(lower, 0.0) + np.append(0.0, main - lower)
    mass[0] += low
    way = width / -math.expm1(-width)
    either = (
        (other_error[:-1] + other_error[1:]) * scale + error[:-1] + error[1:] + 4 * UNIT * (2 + np.abs(start)) * main
    )
    return mass[:-1], high + float(mass[-1]), 2 * way * float(either.sum())
