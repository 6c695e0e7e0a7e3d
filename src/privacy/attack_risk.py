"""What an attacker can do with all that a run released: upper bounds from its phases, numbers only, no tensors.

P is the output with the unit, Q without it. A membership attack with a false-positive rate of at most a (non-members
that it takes for members) has a true-positive rate (members that it finds) of at most power(a), which is 1 less Dong,
Roth and Su's trade-off function at a:

    power(a) = max {P(S) : Q(S) <= a} = min over t of delta(t) + exp(t) a,   delta(t) = max over S of P(S) - exp(t) Q(S)

(Neyman and Pearson; Dong, Roth and Su 2022, proposition 6), so a curve follows from upper bounds of delta at any set of
t, negative ones included, and is itself an upper bound. `removed` is P against Q as above, `added` Q against P; the
worse of both takes the larger delta at each t, which is the concave hull of both curves (Dong et al., definition F.1).

delta is the least of three bounds: that on a grid of privacy losses (privacy.loss_grid), that of the Gaussian without
amplification, and the chance that the unit is drawn at all.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import log_ndtr, ndtr, ndtri

from base.errors import fail
from privacy import accounting
from privacy.allocation import AnyPhase
from privacy.loss_grid import ADDED, REMOVED, SLACK, deltas, grid
from privacy.sampled_gaussian import MAX_SPAN

FALSE_POSITIVES = (0.001, 0.01, 0.05)  # false-positive rates of every report
CURVE = (1e-5, 1e-4, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)  # and of its curve
BASELINES = (1e-6, 1e-4, 0.01)  # chances to guess a unit without the model, of every report
PRIOR = 0.5
WORSE = "worse"
POINTS = 2**12  # of the grid of a Gaussian release, whose delta has a closed form


@dataclass(frozen=True, eq=False)
class AttackRisk:
    """Upper bounds of what an attacker can do. A method without a direction bounds both directions of the relation."""

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


def figures(phases: Sequence[AnyPhase], delta: float, prior: float = PRIOR) -> dict:
    """The figures of a report, all from 0 to 1. tpr, tpr_removed, tpr_added, curve: false-positive rate -> the largest
    true-positive rate, of the worse direction where none is named; posterior: up to an event of probability `delta`;
    reconstruction: chance without the model -> the largest with it."""
    risk = attack_risk(phases)

    def rates(at: Sequence[float], direction: str = WORSE) -> dict[str, float]:
        return {f"{rate:g}": float(found) for rate, found in zip(at, risk.power(at, direction), strict=True)}

    return {
        "advantage": risk.advantage,
        "tpr": rates(FALSE_POSITIVES),
        "tpr_removed": rates(FALSE_POSITIVES, REMOVED),
        "tpr_added": rates(FALSE_POSITIVES, ADDED),
        "curve": rates(CURVE),
        "prior": prior,
        "guess": risk.guess(prior),
        "posterior": risk.posterior(prior, delta),
        "reconstruction": {f"{chance:g}": risk.reconstruction(chance) for chance in BASELINES},
    }


def attack_risk(phases: Sequence[AnyPhase]) -> AttackRisk:
    """The risk of all `phases` composed. Repeated calls are answered from memory."""
    return _attack_risk(accounting.merge(phases))


@functools.lru_cache(maxsize=8)
def _attack_risk(phases: tuple[AnyPhase, ...]) -> AttackRisk:
    if not phases:  # nothing was released
        t = np.array([-1.0, 0.0, 1.0])
        return AttackRisk(t, _least(t), _least(t), 0.0)
    if any(phase.sigma == 0 for phase in phases):
        t = np.array([-1.0, 0.0, 1.0])
        return AttackRisk(t, np.ones(3), np.ones(3), math.inf)
    mu = math.hypot(*(math.sqrt(phase.steps) / phase.sigma for phase in phases))
    sampled = any(phase.amplified for phase in phases)
    t = grid(phases) if sampled else np.arange(-POINTS, POINTS + 1) * (min(MAX_SPAN, mu * (mu / 2 + 8)) / POINTS)
    bounds = [_gaussian(mu, t), _drawn(accounting.chance_of_a_draw(phases), t)]
    removed = added = np.minimum(*bounds)
    if sampled:
        above, below = (deltas(phases, t, direction) for direction in (REMOVED, ADDED))
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


def advantage(phases: Sequence[AnyPhase]) -> float:
    """The membership advantage of all `phases` composed, an upper bound."""
    return attack_risk(phases).advantage


def _quick(phases: tuple[AnyPhase, ...]) -> float:
    """An upper bound of the advantage that costs little: sqrt(1 - exp(-KL)) and sqrt(KL / 2) (Bretagnolle and Huber,
    Pinsker), KL at most RDP at any order above 1; or the Gaussian without amplification."""
    if not phases or any(phase.sigma == 0 for phase in phases):
        return float(bool(phases))
    kl = float(sum(phase.steps * phase.rdp()[0] for phase in phases))
    mu = math.hypot(*(math.sqrt(phase.steps) / phase.sigma for phase in phases))
    return min(math.sqrt(kl / 2), math.sqrt(-math.expm1(-kl)), math.erf(mu / math.sqrt(8)) * (1 + SLACK))


def check_advantage(target: float) -> None:
    """UserError unless 0 < target < 1."""
    if not 0 < target < 1:
        fail(f"target advantage {target:g}: wanted a number above 0 and below 1, such as 0.1")


def sigma_for(target: float, phases: Callable[[float], Sequence[AnyPhase]], words: str) -> float:
    """The smallest noise multiplier, to 0.2 % in the advantage, for which phases(sigma) keep the membership advantage
    within the target. words: what is wanted, for messages."""
    check_advantage(target)
    return accounting.smallest_sigma(
        lambda sigma: advantage(phases(sigma)),
        lambda sigma: _quick(accounting.merge(phases(sigma))),
        target,
        target * (1 - accounting.TOLERANCE / 2),
        f"target advantage {target:g} over {words}",
    )


def permitted_steps(target: float, spent: Sequence[AnyPhase], more: accounting.More, wanted: int) -> int:
    """The largest n <= wanted for which `spent` and more(n) keep the advantage within the target."""
    check_advantage(target)
    return accounting.most_steps(lambda phases: _attack_risk(phases).advantage, _quick, target, spent, more, wanted)
