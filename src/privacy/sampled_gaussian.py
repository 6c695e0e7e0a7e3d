"""Two bounds of what steps of the sampled Gaussian disclose together, RDP and PRV: numbers only, no tensors.

P is the output with the unit, Q without it; a step draws the unit with probability q. (epsilon, delta) has to hold for
P against Q (the unit is removed) and for Q against P (added). RDP is the larger for P against Q at every order
(Mironov, Talwar and Zhang 2019, theorem 5). For compositions we know of no proof which direction is the worse, so the
PRV bound is the larger of the two.

PRV is the privacy random variable accountant of Gopi, Lee and Wutschitz (2021), "Numerical composition of differential
privacy", with the grid and the error terms of Opacus's PRVAccountant. The code is our own: Opacus's is several times
slower, too slow for every log line and for calibration (tests/privacy/test_accounting.py prints the measured ratio),
takes differences of 1 - tail, which loses the tail that a small delta is made of, does not count the rounding of many
steps, and knows one of the two directions.

Work: RDP has at most NODES nodes and 1,023 terms an order; a grid MAX_POINTS points, and MAX_WORK over all phases.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import fft
from scipy.special import gammaln, logsumexp, ndtr

MAX_POINTS = 2**21  # of a PRV grid: about 0.6 s and 0.2 GB, at 10^6 steps; an E2E run needs 0.7 million and 0.2 s
MAX_WORK = 2**22  # points of a PRV grid times phases
FINE_POINTS = 2**20  # spent at the most on an error term below Opacus's
COARSE = 8.0  # the direction that is rarely the worse is first tried with an error term so much larger
MAX_SPAN = 690.0  # of the PRV grid in nats: exp() overflows at 709
NODES = 4096  # of the quadrature of a broken order's RDP; sigma of 0.09 and more need no more
UNIT = 2.0**-53  # relative rounding of float64
ROUNDING = 1e-10  # relative, of RDP and of the Gaussian's delta: what float64 may take from them, several times over

# Opacus's orders end at 1.1 and 63 and it warns where the best one is at an end; these carry on at both ends, so that
# its epsilons stay as they are wherever its own best order was an inner one.
WHOLE = np.array([*range(2, 11), *range(12, 64), 72, 80, 96, 128, 192, 256, 384, 512, 768, 1024.0])
BROKEN = np.array([1.001, 1.002, 1.005, 1.01, 1.02, 1.05, *(tenths / 10 for tenths in range(11, 110) if tenths % 10)])
ORDERS = np.concatenate([BROKEN, WHOLE])


@dataclass(frozen=True)
class Phase:
    """`steps` releases of a sum over units drawn with probability q, with noise of sigma times the sensitivity."""

    sigma: float
    q: float
    steps: int

    @property
    def amplified(self) -> bool:
        return self.q < 1

    @property
    def share(self) -> float:
        """What of the steps a unit takes part in, as budget files have it."""
        return self.q

    def rdp(self) -> np.ndarray:
        """RDP of one step at each of ORDERS (rdp_per_step)."""
        return rdp_per_step(self.sigma, self.q)

    rough_rdp = rdp  # where an estimate will do


# --- RDP ---


def _loss(q: float, x: np.ndarray) -> np.ndarray:
    """The privacy loss log(1 - q + q exp(x)), to its last digits also where it is close to 0 or to log(1 - q)."""
    with np.errstate(divide="ignore"):
        inner = np.log1p(q * np.expm1(np.clip(x, -1, 30)))
        return np.where((x < -1) | (x > 30), np.logaddexp(np.log1p(-q), np.log(q) + x), inner)


def _log_excess(order: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """log of r^order - 1 - order (r - 1), r = exp(loss): above 0 by Bernoulli, and of the size of loss^2 near 0."""
    scaled = order * loss
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        series = 1 + (order + 1) * loss / 3 + (order**2 + order + 1) * loss**2 / 12
        near = 2 * np.log(np.abs(loss)) + np.log(order * (order - 1) / 2 * series)
        plain = np.log(np.expm1(scaled) - order * np.expm1(loss))
        large = scaled + np.log1p((order - 1) * np.exp(-scaled) - order * np.exp(loss - scaled))
    return np.where(np.abs(scaled) < 1e-3, near, np.where(scaled > 1, large, plain))


@functools.lru_cache(maxsize=1)
def _log_binomials() -> tuple[np.ndarray, np.ndarray]:
    """(k (1023,), log of `order` over k (whole orders, 1023)) for k from 2 on, -inf where k is above the order."""
    k, order = np.arange(2, WHOLE[-1] + 1), WHOLE[:, None]
    left = np.maximum(order - k, 0)
    return k, np.where(k <= order, gammaln(order + 1) - gammaln(k + 1) - gammaln(left + 1), -np.inf)


@functools.lru_cache(maxsize=4096)
def rdp_per_step(sigma: float, q: float) -> np.ndarray:
    """RDP of one step at each of ORDERS, P against Q: log A / (order - 1), A the order's moment of exp(loss) under Q.

    Mironov et al. (2019), section 3.3, but as log1p(A - 1) from terms above 0, so that steps that disclose next to
    nothing, of which there may be many, are not rounded to nothing:
      any order      A - 1 <= q (exp(order (order - 1) / (2 sigma^2)) - 1), by convexity: close where sigma is small
      whole orders   A - 1 = sum over k >= 2 of C(order, k) q^k (1-q)^(order-k) (exp(k (k - 1) / (2 sigma^2)) - 1)
      broken orders  A - 1 = E[r^order - 1 - order (r - 1)], since E[r] = 1, by the trapezoidal rule. It errs by
                     exp(y^2 / (2 sigma^2) - 2 pi y / width) for an integrand that is analytic up to a distance y from
                     the real line, here below pi sigma^2, where r has a zero: the width below makes that exp(-40).
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if q == 1:
            return ORDERS / 2 / sigma / sigma
        moments = _loss(q, ORDERS * (ORDERS - 1) / 2 / sigma / sigma)  # log A

        k, binomials = _log_binomials()
        exponent = k * (k - 1) / 2 / sigma / sigma
        terms = binomials + k * np.log(q) + (WHOLE[:, None] - k) * np.log1p(-q) + np.log(-np.expm1(-exponent))
        terms = np.where(np.isneginf(binomials), -np.inf, terms + exponent)
        whole = np.logaddexp(0, logsumexp(terms, axis=1))
        moments[len(BROKEN) :] = np.fmin(moments[len(BROKEN) :], whole)

        reach = min(0.9 * math.pi * sigma * sigma, 7 * sigma)  # y
        width = 2 * math.pi * reach / (40 + (reach / sigma) ** 2 / 2)
        if BROKEN[-1] + 24 * sigma < NODES * width:
            z = np.arange(-12 * sigma, BROKEN[-1] + 12 * sigma, width)
            density = np.log(width / sigma / math.sqrt(2 * math.pi)) - (z / sigma) ** 2 / 2
            loss = _loss(q, (z - 0.5) / sigma / sigma)
            broken = np.logaddexp(0, logsumexp(density + _log_excess(BROKEN[:, None], loss), axis=1))
            moments[: len(BROKEN)] = np.fmin(moments[: len(BROKEN)], broken)
        rdp = moments / (ORDERS - 1) * (1 + ROUNDING)
    rdp.setflags(write=False)  # it is shared by all callers of the cache
    return rdp


class Priced(Protocol):
    """A phase of any sampler: how many releases, and the RDP of one at each of ORDERS."""

    @property
    def steps(self) -> int: ...

    def rdp(self) -> np.ndarray: ...


def rdp_curve(phases: Sequence[Priced]) -> np.ndarray:
    """RDP of all steps at each of ORDERS, for the worse of both directions. Every sigma is above 0."""
    with np.errstate(over="ignore"):
        return sum((phase.steps * phase.rdp() for phase in phases), np.zeros(len(ORDERS)))


def rdp_epsilon(phases: Sequence[Priced], log_delta: float) -> float:
    """The epsilon of rdp_curve()."""
    return epsilon_of_curve(rdp_curve(phases), log_delta)


def epsilon_of_curve(rdp: np.ndarray, log_delta: float) -> float:
    """Balle et al. (2020), theorem 21, at the best of ORDERS."""
    epsilon = rdp + np.log1p(-1 / ORDERS) - (log_delta + np.log(ORDERS)) / (ORDERS - 1)
    return max(0.0, float(epsilon.min()))


# --- PRV ---


def _outside(phase: Phase, t: np.ndarray, removed: bool) -> np.ndarray:
    """P(Y <= t) for t below 0, P(Y > t) for the others: of one step's privacy loss Y, to the last digits of its tails.

    removed: Y = log(1 - q + q exp(x)) under P, x the Gaussian's log-likelihood ratio, is above t where x is above
    log((exp(t) - 1 + q) / q) (Gopi et al. 2021, proposition B.4). Else the negative of that under Q.
    """
    q, sigma = phase.q, phase.sigma
    side = np.where(t < 0, -1.0, 1.0)
    with np.errstate(divide="ignore", over="ignore"):
        if not removed:
            return ndtr(side * (0.5 / sigma + np.log1p(np.maximum(np.expm1(-t) / q, -1)) * sigma))
        live = t > np.log1p(-q)
        x = np.log(np.where(live, np.expm1(t) + q, 1.0)) - np.log(q)
    outside = q * ndtr(side * (0.5 / sigma - x * sigma)) + (1 - q) * ndtr(side * (-0.5 / sigma - x * sigma))
    return np.where(live, outside, 0.0)


def _mean(phase: Phase, span: float, removed: bool) -> float:
    """E[Y | |Y| < span], by the trapezoidal rule over the Gaussian's own variable, where it converges geometrically."""
    q, sigma = phase.q, phase.sigma
    x = np.linspace(-20 * sigma, 1 + 20 * sigma, 8001)
    density = np.exp(-((x / sigma) ** 2) / 2)
    if removed:
        density = (1 - q) * density + q * np.exp(-(((x - 1) / sigma) ** 2) / 2)
    loss = _loss(q, (x - 0.5) / sigma / sigma)
    density[np.abs(loss) >= span] = 0
    mean = np.dot(density, np.where(density > 0, loss, 0)) / density.sum()
    return float(mean if removed else -mean)


def prv_epsilon(phases: tuple[Phase, ...], delta: float) -> float:
    """The PRV upper bound of both directions, or infinity where a grid cannot be trusted (see privacy.accounting)."""
    steps = sum(phase.steps for phase in phases)
    log_error = math.log(delta) - math.log(1000)  # delta_error = delta / 1000
    # Gopi et al. (2021), remark 5.6, as Opacus has it: the sum of steps leaves the span with at most delta_error / 4.
    span = 3 + max(
        rdp_epsilon(phases, log_error - math.log(4)),
        *(rdp_epsilon((Phase(phase.sigma, phase.q, 1),), log_error - math.log(8 * steps)) for phase in phases),
    )
    if not span <= MAX_SPAN:
        return math.inf
    # Theorem 5.5: a grid of width h adds at most h sqrt(steps log(12 / delta_error) / 2) to epsilon.
    spread = math.sqrt(steps * (math.log(12) - log_error) / 2)
    rough = rdp_epsilon(phases, math.log(delta))
    error = 0.01 * max(min(1.0, rough / 0.5), rough / 16)
    most = min(MAX_POINTS, MAX_WORK // len(phases))
    error = max(min(0.01, 2 * span * spread / FINE_POINTS), error, 2 * span * spread / most)
    if error >= 1:  # beyond what remark 5.6 is known to cover
        return math.inf
    epsilon = _on_a_grid(phases, delta, span, spread, error, removed=True)
    if epsilon < math.inf and epsilon < _on_a_grid(phases, delta, span, spread, min(0.99, COARSE * error), False):
        epsilon = max(epsilon, _on_a_grid(phases, delta, span, spread, error, removed=False))
    return epsilon


def _on_a_grid(
    phases: tuple[Phase, ...], delta: float, span: float, spread: float, error: float, removed: bool
) -> float:
    """One direction's upper bound of epsilon, or infinity: the composed loss on a grid over (-span, span) whose width
    adds `error` to epsilon."""
    width = error / spread
    half = fft.next_fast_len(math.ceil(span / width) + 1, real=True)
    points = (np.arange(-half, half)) * width  # (2 half,): 0 is a point, so a circular convolution keeps its place

    edges = np.append(points, half * width) - width / 2
    shift, masses = 0.0, []
    for phase in phases:
        outside = _outside(phase, edges, removed)
        mass = np.abs(np.diff(outside)) / (1 - outside[0] - outside[-1])
        mass[half] = 0
        offset = _mean(phase, half * width, removed) - float(np.dot(points, mass))
        if abs(offset) >= width / 2:
            return math.inf
        shift += phase.steps * offset
        masses.append(mass)
    mass, noise = compose_on_a_grid(masses, [phase.steps for phase in phases])
    # Point 0 stands for a loss of `shift`: turned round, the points are losses from -span to span.
    turn = round(shift / width)
    mass, shift = np.roll(mass, turn), shift - turn * width

    target = delta - delta / 1000 - noise
    if not target > delta / 2:
        return math.inf
    error += 4 * UNIT * span * sum(phase.steps for phase in phases)  # of the shift
    # delta at each point from just below -1, where epsilon + error is no longer above 0: d1 - exp(t) d2.
    first = max(math.floor((-1 - shift) / width) + half, 0)
    t, mass = points[first:] + shift, mass[first:]
    d1, d2 = np.cumsum(mass[::-1])[::-1], np.cumsum((mass * np.exp(-t))[::-1])[::-1]
    met = np.searchsorted(np.exp(t) * d2 - d1, -target)
    if met == 0:
        return 0.0
    if met == len(t) or not (d1[met] > target and d2[met] > 0):
        return math.inf
    return max(0.0, math.log((d1[met] - target) / d2[met]) + error)


def compose_on_a_grid(masses: list[np.ndarray], steps: list[int]) -> tuple[np.ndarray, float]:
    """(mass of the sum, bound of rounding) of losses on a circle of points, the middle one 0.

    masses: (2 half,) of one step of each phase; the mass at 0 is 1 less the others, whatever stands there. Changed in
    place. The sum's is (2 half,) likewise, and may lie below 0 by rounding. The bound is of what rounding changes in
    delta, a sum of the masses with weights that rise from 0 to 1 and end there. Frequency f of the spectrum is off by
    the transform's 4 u of its input's norm, in each step, and by 4 u of the logarithm (u = 2^-53). The spectrum of the
    weights is at most a quarter / f of the points, for either sign of f. The transform back leaves noise at every
    point: what it took below zero stands for what it took elsewhere.
    """
    half = len(masses[0]) // 2
    log_size, angle = np.zeros(half + 1), np.zeros(half + 1)
    rounding = 0.0
    for mass, count in zip(masses, steps, strict=True):
        # The transform less 1 is small where the masses beside 0 are, and keeps its digits.
        mass[half] = 0
        mass[half] = -mass.sum()
        rounding += count * math.sqrt(np.dot(mass, mass))
        spectrum = fft.rfft(fft.ifftshift(mass))
        real, imaginary = spectrum.real, spectrum.imag
        log_size = log_size + count * _log_size(real, imaginary)
        angle = angle + count * np.arctan2(imaginary, 1 + real)
    product = np.exp(log_size + 1j * angle)
    composed = np.roll(fft.irfft(product, n=2 * half), half)
    size = np.abs(product[1:]) / np.arange(1, len(product))
    logarithm = np.abs(np.maximum(log_size[1:], -700)) + np.abs(angle[1:])
    noise = 4 * UNIT * float(rounding * size.sum() + np.dot(logarithm, size))
    return composed, noise - 2 * float(composed[composed < 0].sum())


def _log_size(real: np.ndarray, imaginary: np.ndarray) -> np.ndarray:
    """log |1 + real + i imaginary|, to the last digits also where that is close to 1."""
    squared = real * (2 + real) + imaginary * imaginary
    with np.errstate(divide="ignore"):
        return np.where(squared < -0.5, np.log(np.hypot(1 + real, imaginary)), np.log1p(np.maximum(squared, -0.5)) / 2)
