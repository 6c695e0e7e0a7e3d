"""What one training run with canaries shows about epsilon from below: numbers only, no tensors.

Each of m canaries was put into the data by a fair coin of its own. An adversary that sees what was released guesses the
coins of r of them and has v right. Two bounds follow:

  2023      Steinke, Nasr and Jagielski (2023), "Privacy Auditing with One (1) Training Run", arXiv:2305.08846, theorem
            5.2. It assumes nothing. Were the mechanism (epsilon, delta)-DP for one canary added or removed, v right
            guesses would have a probability of at most `p_value`.
  Gaussian  Xiang et al. (2025), "Tight Privacy Audit in One Run", arXiv:2509.08704: the guesses that are made are those
            of the highest of m scores, so order statistics say how good they can be. It assumes that the run tells of a
            canary at most what a Gaussian mechanism of some mu tells, and of each independently of the others. Then v
            right guesses would have a probability of at most `gaussian_p_value`; mu gives epsilon at any delta.

Guarantee: whatever the scores are, each bound of `audit` is above a true epsilon at `delta` in at most 1 - confidence
of all runs that meet its assumption. Bad scores make it low, never wrong.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import betainc, betaincinv, ndtr
from scipy.stats import binom

from base.errors import fail
from privacy.accounting import epsilon_gaussian

FEWEST = 16  # guesses worth trying: fewer bound no epsilon above log(16 / log(1 / 0.05)) = 1.7
TOLERANCE = 1e-4  # of a lower bound, of epsilon or mu, on the safe side
THRESHOLDS = 1000  # steps of the sum over the threshold of the guesses that are made


@dataclass(frozen=True)
class Guesses:
    """What a number of guesses came to. The bounds hold at the confidence that is left to it of all numbers tried."""

    made: int
    right: int
    epsilon: float  # the bound of 2023
    mu: float  # the Gaussian bound
    epsilon_gaussian: float  # epsilon at delta of a Gaussian mechanism of that mu


@dataclass(frozen=True)
class Audit:
    """The lower bounds at `confidence` for all `tried` numbers of guesses together."""

    delta: float
    confidence: float
    tried: tuple[Guesses, ...]

    @property
    def best(self) -> Guesses:
        """What gave the bound of 2023."""
        return max(self.tried, key=lambda one: one.epsilon)

    @property
    def best_gaussian(self) -> Guesses:
        """What gave the Gaussian bound."""
        return max(self.tried, key=lambda one: one.mu)

    @property
    def epsilon(self) -> float:
        return self.best.epsilon


def sampled_gaussian_llr(x: np.ndarray, q: float, sigma: float, size: float = 1.0) -> np.ndarray:
    """Log-likelihood ratio of x ~ (1-q) N(0, sigma^2) + q N(size, sigma^2) against N(0, sigma^2), entry by entry.

    x is what a step released along a canary's direction and `size` what the canary adds there when it is drawn, both in
    units of C. Steps are independent, so a run's score is the sum over them.
    """
    exponent = size * (2 * x - size) / (2 * sigma**2)
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log1p(-q), np.log(q) + exponent)


class Evidence:
    """The log-likelihood ratio of "in the data" against "not" of each of m canaries, from what the steps released.

    Under Poisson sampling steps are independent: the sum of sampled_gaussian_llr(). Under random allocation a canary is
    in one step of each epoch of t: the sum over epochs of log((sum over steps of exp(e) + t - steps) / t), e the
    log-likelihood ratio of a step in which it surely is.
    """

    def __init__(self, m: int, q: float, sigma: float, t: int | None = None):
        """t: steps of an epoch of random allocation; None: Poisson sampling with q."""
        self.q, self.sigma, self.t = q, sigma, t
        self.epochs = np.zeros(m)  # of whole epochs, or of steps
        self.epoch = np.full(m, -np.inf)  # log of the sum over the steps of the epoch under way
        self.steps = np.zeros(m)

    def add(self, members: np.ndarray, x: np.ndarray, size: float) -> None:
        """One step: x (k,) along the directions of canaries `members` (k,), see sampled_gaussian_llr()."""
        if self.t is None:
            self.epochs[members] += sampled_gaussian_llr(x, self.q, self.sigma, size)
            return
        self.epoch[members] = np.logaddexp(self.epoch[members], size * (2 * x - size) / (2 * self.sigma**2))
        self.steps[members] += 1
        if self.steps[members[0]] == self.t:
            self.epochs[members] = self.scores[members]
            self.epoch[members], self.steps[members] = -np.inf, 0

    @property
    def scores(self) -> np.ndarray:
        """(m,) float64."""
        if self.t is None:
            return self.epochs
        with np.errstate(divide="ignore"):
            return self.epochs + np.logaddexp(self.epoch, np.log(self.t - self.steps)) - np.log(self.t)


def p_value(m: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Under (epsilon, delta)-DP, a bound on the chance that `right` or more of `guesses` about m canaries are right.

    Theorem 5.2 with W ~ Binomial(r, 1 / (1 + exp(-epsilon))), the guesses of randomised response:
        P[W >= v] + 2 m delta max over 1 <= i <= v of P[v - i <= W < v] / i
    """
    if right <= 0:
        return 1.0
    accuracy = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, accuracy))
    # P[v - i <= W < v] / i is the mean of W's i masses below v. They rise and then fall as i grows, so ten deviations
    # below W's mean, where nothing is left to be added, the mean has passed its largest value.
    spread = math.sqrt(guesses * accuracy * (1 - accuracy))
    lowest = max(0, min(right - 1, math.floor(guesses * accuracy - 10 * spread) - 10))
    below = np.cumsum(binom.pmf(np.arange(right - 1, lowest - 1, -1), guesses, accuracy))
    return min(1.0, tail + 2 * m * delta * float((below / np.arange(1, len(below) + 1)).max()))


def gaussian_p_value(m: int, guesses: int, right: int, mu: float) -> float:
    """Under independent mu-Gaussian views, a bound on the chance that `right` or more of `guesses` about m canaries are
    right.

    The view of a canary is N(0, 1) where it is out and N(mu, 1) where it is in, or tells less; no two views depend on
    each other. With a = |view - mu/2|, the best guess is right with probability 1 / (1 + exp(-mu a)). Given all views,
    the guesses are independent. So no adversary has, in distribution, more right ones than one that guesses the r
    canaries with the largest a. Let t be the next largest a. Then the r are independent draws of a above t:
        P[a > t] = Phi(mu/2 - t) + Phi(-mu/2 - t)  ~  Beta(r + 1, m - r)
        P[right | a > t] = Phi(mu/2 - t) / P[a > t]
    and the right ones are Binomial(r, P[right | a > t]). A step of the sum over t takes its larger end, where guesses
    are better.
    """
    if right <= 0:
        return 1.0
    if guesses == m:
        return float(betainc(right, m - right + 1, ndtr(mu / 2)))  # P[Binomial(m, .) >= right]

    def share_above(t):
        return ndtr(mu / 2 - t) + ndtr(-mu / 2 - t)

    beta = guesses + 1, m - guesses
    low, high = (
        brentq(lambda t, share=share: share_above(t) - share, 0, 50) for share in betaincinv(*beta, [1 - 1e-9, 1e-9])
    )
    t = np.linspace(low, high, THRESHOLDS + 1)
    share = share_above(t)
    mass = -np.diff(betainc(*beta, share), prepend=1.0)  # of [0, low], then of each step
    chance = betainc(right, guesses - right + 1, ndtr(mu / 2 - t) / share)
    return min(1.0, float(mass @ chance + betainc(*beta, share[-1])))  # beyond `high` every guess counts as right


def largest_refuted(p: Callable[[float], float], level: float) -> float:
    """The largest x >= 0, to TOLERANCE and not above it, with p(x) <= level; 0 where there is none. p must not fall."""
    low, high = 0.0, 1.0
    if p(low) > level:
        return 0.0
    while p(high) <= level:
        low, high = high, 2 * high
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if p(middle) <= level else (low, middle)
    return low


def lower_bound(m: int, guesses: int, right: int, delta: float, level: float) -> float:
    """The largest epsilon whose p-value is at most `level`; 0 where none is refuted."""
    return largest_refuted(lambda epsilon: p_value(m, guesses, right, epsilon, delta), level)


def gaussian_lower_bound(m: int, guesses: int, right: int, level: float) -> float:
    """The largest mu whose p-value is at most `level`; 0 where none is refuted."""
    return largest_refuted(lambda mu: gaussian_p_value(m, guesses, right, mu), level)


def numbers_of_guesses(m: int) -> list[int]:
    """The numbers of guesses that are tried, fixed before any score is seen: m, m/4, m/16 and so on down to FEWEST."""
    found: list[int] = []
    while not found or m >= FEWEST:
        found.append(m)
        m //= 4
    return found


def audit(
    scores: np.ndarray,
    included: np.ndarray,
    delta: float,
    two_sided: bool,
    confidence: float = 0.95,
    counts: Sequence[int] | None = None,
) -> Audit:
    """The lower bounds that guessing by score gives.

    scores (m,) float: higher speaks for inclusion. included (m,) bool, the coins. counts: the numbers of guesses to
    try, by default numbers_of_guesses(m). Each gets an equal share of 1 - confidence (Bonferroni), so the best of them
    holds, for each of the two bounds. two_sided: half of the guesses are "in" for the highest scores and half "out" for
    the lowest. Otherwise all are "in": where a unit seldom takes part, not to be seen says little. Ties are broken by
    the canary's number, which is independent of its coin.
    """
    m = len(scores)
    if not 0 < delta < 1:
        fail(f"delta {delta}: wanted a number above 0 and below 1")
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite")
    counts = numbers_of_guesses(m) if counts is None else counts
    order = np.argsort(-scores, kind="stable")
    hits = np.concatenate([[0], np.cumsum(included[order])])  # hits[k]: included ones among the k highest
    tried, level = [], (1 - confidence) / len(counts)
    for made in counts:
        top = made - made // 2 if two_sided else made
        right = int(hits[top])
        if two_sided:
            right += made // 2 - int(hits[m] - hits[m - made // 2])
        mu = gaussian_lower_bound(m, made, right, level)
        tried.append(Guesses(made, right, lower_bound(m, made, right, delta, level), mu, epsilon_gaussian(mu, delta)))
    return Audit(delta, confidence, tuple(tried))
