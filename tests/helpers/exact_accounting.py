"""The oracle of the accountant's corners: deltas of the sampled Gaussian with as many digits as it takes, by mpmath.

P is the output with the unit, Q without it. `removed`: P against Q; else Q against P. All deltas here are exact or
lower bounds of the true one, so an epsilon at which one of them is above the run's delta is below the truth.
"""

import math

import mpmath
from mpmath import mp, mpf
from scipy.optimize import brentq
from scipy.stats import norm

Triple = tuple[float, float, int]  # sigma, q, steps


def digits_for(delta: float) -> int:
    """Digits that leave 40 to a delta after differences of numbers near 1."""
    return 40 + max(0, math.ceil(-math.log10(delta)))


def above(x: mpf) -> mpf:
    """P(Z > x) of a standard normal. Beyond 1e5 it is below 10^-(2 10^9), or as close to 1."""
    return mpf(x < 0) if abs(x) > 1e5 else mpmath.ncdf(-x)


def gaussian_delta(mu: mpf, epsilon: mpf) -> mpf:
    """Balle and Wang (2018), theorem 8."""
    return above(epsilon / mu - mu / 2) - mp.exp(epsilon) * above(epsilon / mu + mu / 2)


def one_step(sigma: float, q: float, epsilon: mpf, removed: bool) -> mpf:
    """E[(1 - exp(epsilon - Y))_+], Y the privacy loss, in closed form; epsilon may be negative."""
    sigma, q, epsilon = mpf(sigma), mpf(q), mpf(epsilon)
    sign = 1 if removed else -1
    ratio = mp.expm1(sign * epsilon) + q  # q exp(x) where the loss is epsilon, x the Gaussian's log-likelihood ratio
    if ratio <= 0:
        return -mp.expm1(epsilon) if removed else mpf(0)
    x = sigma**2 * mp.log(ratio / q) + mpf(1) / 2
    under_q = above(sign * x / sigma)
    under_p = (1 - q) * under_q + q * above(sign * (x - 1) / sigma)
    return under_p - mp.exp(epsilon) * under_q if removed else under_q - mp.exp(epsilon) * under_p


def more_steps(sigma: float, q: float, steps: int, epsilon: mpf, removed: bool) -> mpf:
    """delta_n(epsilon) = E[delta_(n-1)(epsilon - Y)], Y one step's loss, by quadrature over the Gaussian's variable."""
    if steps == 1:
        return one_step(sigma, q, epsilon, removed)
    s, p = mpf(sigma), mpf(q)

    def integrand(z: mpf) -> mpf:
        loss = mp.log(1 - p + p * mp.exp((z - mpf(1) / 2) / s**2))
        density = mpmath.npdf(z, 0, s)
        if removed:
            density = (1 - p) * density + p * mpmath.npdf(z, 1, s)
        return density * more_steps(sigma, q, steps - 1, epsilon - (loss if removed else -loss), removed)

    turn = mpf(1) / 2 + s**2 * mp.log(max(1 / p - 1, mpf("0.01")))
    places = {k * s for k in range(-12, 13, 2)} | {1 + k * s for k in range(-12, 13, 2)} | {turn}
    return mpmath.quad(integrand, sorted(places))


def largest_draw(phases: list[Triple], epsilon: mpf, removed: bool) -> mpf:
    """Lower bound: the adversary looks whether any step's log-likelihood ratio is above a threshold, the best tried."""
    sizes = {mpf(place) / mpf(sigma) ** 2 + mpf(k) / mpf(sigma)
             for sigma, _, _ in phases for place in (0, 0.5, 1) for k in range(-9, 10, 3)}
    sizes |= {epsilon - mp.log(mpf(q)) + k for _, q, _ in phases for k in range(-2, 3)}
    best = mpf(0)
    for size in sizes:
        none_q = none_p = mpf(0)  # log-probability that no step is above
        for sigma, q, steps in phases:
            place = mpf(sigma) ** 2 * size + mpf(1) / 2
            # (above, not above): a difference from 1 would lose the digits that exp(epsilon) asks for
            in_q = above(place / sigma), above(-place / sigma)
            shifted = above((place - 1) / sigma), above((1 - place) / sigma)
            in_p = [(1 - mpf(q)) * one + mpf(q) * other for one, other in zip(in_q, shifted)]
            none_q, none_p = (total + steps * (mp.log1p(-over) if over < 0.5 else mp.log(under))
                              for total, (over, under) in ((none_q, in_q), (none_p, in_p)))
        if removed:
            found = -mp.expm1(none_p) + mp.exp(epsilon) * mp.expm1(none_q)
        else:
            found = mp.exp(none_q) - mp.exp(epsilon) * mp.exp(none_p)
        best = max(best, found)
    return best


def sum_of_draws(sigma: float, q: float, steps: int, epsilon: mpf, removed: bool) -> mpf:
    """Lower bound: the adversary adds up the steps' outputs. Under Q the sum is N(0, n sigma^2), under P a binomial
    number of participations is added. Close to the truth where sigma is large. Wants n q of at most some dozens."""
    spread, p = mp.sqrt(steps) * mpf(sigma), mpf(q)
    counts = range(max(0, int(steps * q - 12 * math.sqrt(steps * q)) - 5),
                   min(steps, int(steps * q + 12 * math.sqrt(steps * q)) + 25) + 1)
    chances = [mpmath.binomial(steps, k) * p**k * (1 - p) ** (steps - k) for k in counts]
    # An upper bound of the chance of all other counts: rounding, times exp(epsilon), must not pass for a disclosure.
    rest = mpf(0) if len(counts) == steps + 1 else max(mpf(0), 1 - sum(chances)) + mpf(10) ** (3 - mp.dps)
    best = mpf(0)
    for z in [mpf(k) / 2 for k in range(-12, 25)] + [1 / spread + mpf(k) for k in range(-3, 4)]:
        if removed:
            under_p = sum(chance * above(z - k / spread) for chance, k in zip(chances, counts))
            best = max(best, under_p - mp.exp(epsilon) * above(z))
        else:  # what the chances leave out counts as below
            under_p = rest + sum(chance * above(k / spread - z) for chance, k in zip(chances, counts))
            best = max(best, above(-z) - mp.exp(epsilon) * under_p)
    return best


def moment(sigma: float, q: float, order: float) -> mpf:
    """(order - 1) RDP of one step: log E[(1 - q + q exp(x))^order] under Q; a whole order by the binomial sum."""
    s, p = mpf(sigma), mpf(q)
    if order == int(order):
        return mp.log(sum(mpmath.binomial(int(order), k) * p**k * (1 - p) ** (int(order) - k)
                          * mp.exp(mpf(k * k - k) / (2 * s**2)) for k in range(int(order) + 1)))
    turn = mpf(1) / 2 + s**2 * mp.log(1 / p - 1)
    places = {start + k * s for start in (0, order) for k in range(-24, 25, 4)} | {turn, turn - s, turn + s}
    return mp.log(mpmath.quad(lambda z: mpmath.npdf(z, 0, s) * (1 - p + p * mp.exp((z - mpf(1) / 2) / s**2)) ** order,
                              sorted(places)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Balle and Wang (2018), theorem 8, solved for epsilon."""
    return brentq(lambda e: norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu) - delta, 0, 400)
