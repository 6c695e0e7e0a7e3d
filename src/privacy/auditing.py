"""What one training run with canaries shows about epsilon from below: numbers only, no tensors.

Steinke, Nasr and Jagielski (2023), "Privacy Auditing with One (1) Training Run", arXiv:2305.08846. Each of m canaries
was put into the data by a fair coin of its own; an adversary that sees what was released guesses the coins of r of
them and has v right. Were the mechanism (epsilon, delta)-DP for one canary added or removed, that many right guesses
would have a probability of at most `p_value`; `lower_bound` turns this round.

Guarantee: whatever the scores are, the bound of `audit` is above a true epsilon at `delta` in at most 1 - confidence of
all runs. Bad scores make it low, never wrong.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from base.errors import fail

FEWEST = 16  # guesses worth trying: fewer bound no epsilon above log(16 / log(1 / 0.05)) = 1.7
TOLERANCE = 1e-4  # of a lower bound, on the safe side


@dataclass(frozen=True)
class Guesses:
    """What a number of guesses came to."""

    made: int
    right: int
    epsilon: float  # lower bound at the confidence that is left to this one of all numbers tried


@dataclass(frozen=True)
class Audit:
    """The lower bound at `confidence` for all `tried` numbers of guesses together; `best` is the one that gave it."""

    epsilon: float
    delta: float
    confidence: float
    best: Guesses
    tried: tuple[Guesses, ...]


def sampled_gaussian_llr(x: np.ndarray, q: float, sigma: float, size: float = 1.0) -> np.ndarray:
    """Log-likelihood ratio of x ~ (1-q) N(0, sigma^2) + q N(size, sigma^2) against N(0, sigma^2), entry by entry.

    x is what a step released along a canary's direction and `size` what the canary adds there when it is drawn, both in
    units of C. Steps are independent, so a run's score is the sum over them.
    """
    exponent = size * (2 * x - size) / (2 * sigma**2)
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log1p(-q), np.log(q) + exponent)


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


def lower_bound(m: int, guesses: int, right: int, delta: float, level: float) -> float:
    """The largest epsilon, to TOLERANCE and not above it, whose p-value is at most `level`; 0 where none is refuted."""
    low, high = 0.0, 1.0
    if p_value(m, guesses, right, low, delta) > level:
        return 0.0
    while p_value(m, guesses, right, high, delta) <= level:
        low, high = high, 2 * high
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        if p_value(m, guesses, right, middle, delta) <= level:
            low = middle
        else:
            high = middle
    return low


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
    """The lower bound that guessing by score gives.

    scores (m,) float: higher speaks for inclusion. included (m,) bool, the coins. counts: the numbers of guesses to
    try, by default numbers_of_guesses(m); each gets an equal share of 1 - confidence (Bonferroni), so the best of
    them holds. two_sided: half of the guesses are "in" for the highest scores and half "out" for the lowest.
    Otherwise all are "in": where a unit seldom takes part, not to be seen says little. Ties are broken by the
    canary's number, which is independent of its coin.
    """
    m = len(scores)
    if not 0 < delta < 1:
        fail(f"delta {delta}: wanted a number above 0 and below 1")
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite")
    counts = numbers_of_guesses(m) if counts is None else counts
    order = np.argsort(-scores, kind="stable")
    hits = np.concatenate([[0], np.cumsum(included[order])])  # hits[k]: included ones among the k highest
    tried = []
    for made in counts:
        top = made - made // 2 if two_sided else made
        right = int(hits[top])
        if two_sided:
            right += made // 2 - int(hits[m] - hits[m - made // 2])
        tried.append(Guesses(made, right, lower_bound(m, made, right, delta, (1 - confidence) / len(counts))))
    best = max(tried, key=lambda one: one.epsilon)
    return Audit(best.epsilon, delta, confidence, best, tuple(tried))
