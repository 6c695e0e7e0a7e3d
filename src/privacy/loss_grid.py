"""What steps disclose together, from their privacy losses on a grid: numbers only, no tensors.

P is the output with the unit, Q without it. `removed` is P against Q, `added` Q against P. delta(t) is the largest
P(S) - exp(t) Q(S) of any event S, or Q(S) - exp(t) P(S).

delta is computed from the privacy loss Y of one step, or of one epoch, on a grid. Every rounding goes up:
  - The mass between two points goes to these two, so that its share of P and of Q = E_P[exp(-Y)] stay what they are
    ("connect the dots", Doroshenko et al. 2022). delta of a sum of losses, E[(1 - exp(t) prod exp(-Y))_+], is convex in
    each exp(-Y), so spreading one while its mean is kept can but raise it.
  - Mass below the grid goes up to its first point, mass above it to an infinite loss. What a circular convolution
    carries from above the grid to its lower end is bounded (Chernoff) and added to the infinite loss.
  - What rounding of float64 can change, in the masses and in the transforms, is bounded and added to delta.
"""

import math
from typing import Any

import numpy as np
from scipy.special import ndtr

from privacy.allocation import Allocated, AnyPhase
from privacy.sampled_gaussian import MAX_SPAN, MAX_WORK, ORDERS, UNIT, Phase, compose_on_a_grid

REMOVED, ADDED = "removed", "added"
TAIL = 1e-12  # mass of the composed loss outside the grid, about; it goes to the infinite loss
FINENESS = 0.04  # width of the grid, in standard deviations of one step's loss
LEAST_POINTS, MOST_POINTS = 2**12, 2**18
SLACK = 1e-12  # added to sums and closed forms of numbers up to 1, whose rounding it covers many times over


def grid(phases: tuple[AnyPhase, ...], fineness: float = FINENESS) -> np.ndarray:
    """(n,) losses, ascending, the same upwards and downwards, 0 in the middle: for deltas() of these phases."""
    span = _span(phases)
    half = _points(phases, span, fineness) // 2
    return np.arange(-half, half + 1) * (span / half)


def _span(phases: tuple[AnyPhase, ...]) -> float:
    """A loss that the sum of the steps' losses, and that of any step, exceeds with a probability of about TAIL.

    P(Y > y) <= exp((order - 1) (RDP - y)); RDP is the larger for P against Q (Mironov et al. 2019), and tails below are
    smaller than those above by exp(-y). Only the fineness hangs on it: what is outside is counted from the grid.
    """

    def quantile(rdp: Any, log_tail: float) -> float:
        return float(np.min(rdp - log_tail / (ORDERS - 1)))

    log_tail = math.log(TAIL)
    total = sum(phase.steps * phase.rough_rdp() for phase in phases)
    single = (quantile(p.rough_rdp(), log_tail - math.log(p.steps)) for p in phases)
    return min(MAX_SPAN, max(quantile(total, log_tail), *single))


def _points(phases: tuple[AnyPhase, ...], span: float, fineness: float) -> int:
    """How many points: the spreading adds at most width^2 / 4 to the variance of each step's loss, which is about twice
    its mean, RDP at order 1."""
    steps = sum(phase.steps for phase in phases)
    spread = math.sqrt(2 * sum(p.steps * p.rough_rdp()[0] for p in phases) / steps)
    wanted = 2 * span / (fineness * spread) if spread > 0 else math.inf
    most = min(MOST_POINTS, MAX_WORK // len(phases))
    return 1 << math.ceil(math.log2(min(most, max(LEAST_POINTS, wanted))))


def deltas(phases: tuple[AnyPhase, ...], t: np.ndarray, direction: str) -> np.ndarray:
    """(n,) upper bound of delta at each t of the composed privacy loss of one direction. t: of grid()."""
    span = float(t[-1])
    steps, parts = [], []  # mass (2 half,) of all points but the last
    log_finite = noise = 0.0  # log of the mass of all finite losses
    for phase in phases:
        mass, beyond, moved = masses(phase, t, direction)
        if beyond >= 0.5:
            return np.ones_like(t)
        steps.append(phase.steps)
        parts.append(mass / (1 - beyond))
        log_finite += phase.steps * math.log1p(-beyond)
        # (1 - exp(t - y))_+ has a slope of at most 1 in y: mass times the way that rounding moved it bounds the change.
        noise += phase.steps * (moved + 8 * UNIT * span)
    infinite = -math.expm1(log_finite) + _beyond(phases, parts, t)
    composed, rounding = compose_on_a_grid(parts, steps)
    composed = np.append(composed, 0.0).clip(min=0)  # what reached the last point is counted as infinite
    above, weighted = (np.cumsum(part[::-1])[::-1] for part in (composed, composed * np.exp(-t)))
    return above - np.exp(t) * weighted + infinite + noise + rounding + SLACK


def epsilon(phases: tuple[AnyPhase, ...], delta: float) -> float:
    """Upper bound of epsilon at `delta`: the least t >= 0 with both directions' deltas() within it, or infinity."""
    t = grid(phases, FINENESS / 8)
    found = np.maximum(deltas(phases, t, REMOVED), deltas(phases, t, ADDED))[len(t) // 2 :]
    t = t[len(t) // 2 :]
    met = int(np.argmax(found <= delta))
    if not found[met] <= delta:
        return math.inf
    if met == 0:
        return 0.0
    # delta is convex in exp(t), so it lies below the chord.
    share = (found[met - 1] - delta) / (found[met - 1] - found[met])
    return min(float(t[met]), float(t[met - 1] + math.log1p(share * math.expm1(t[met] - t[met - 1])))) * (1 + 1e-14)


def _beyond(phases: tuple[AnyPhase, ...], parts: list[np.ndarray], t: np.ndarray) -> float:
    """Upper bound of the composed mass from the last point on (Chernoff): E[exp(exponent (Y - span))], the least at
    some exponents."""
    span, log_least = float(t[-1]), 0.0
    total = sum(phase.steps * phase.rough_rdp() for phase in phases)
    order = ORDERS[np.argmin(total - math.log(TAIL) / (ORDERS - 1))]
    for exponent in np.minimum((order - 1) * np.array([0.5, 0.8, 1.0, 1.25, 2.0]), 700 / span):  # exp() holds 709
        growth = np.expm1(exponent * t[:-1])
        moments = [phase.steps * math.log1p(float(mass @ growth)) for phase, mass in zip(phases, parts, strict=True)]
        log_least = min(log_least, sum(moments) * (1 + math.copysign(1e-9, sum(moments))) - exponent * span)
    return math.exp(log_least)


def masses(phase: AnyPhase, t: np.ndarray, direction: str) -> tuple[np.ndarray, float, float]:
    """step_masses() of one step, or of one epoch of random allocation."""
    if isinstance(phase, Allocated):
        return phase.masses(t, direction == REMOVED)
    return step_masses(phase, t, direction)


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
    below_p, above_p = ((1 - q) * a + q * b for a, b in ((below_q, below_drawn), (above_q, above_drawn)))
    if direction == REMOVED:
        main, low, high, error = under_p, below_p, above_p, error_p
        other, other_error = under_q, error_q
    else:  # the two exchanged, and read from above
        main, low, high, error = under_q[::-1], above_q, below_q, error_q[::-1]
        other, other_error = under_p[::-1], error_p[::-1]
    # Of the mass `main` between two points, `lower` goes to the lower one and the rest to the upper one, so that
    # exp(-Y) has the mean other / main.
    scale = np.exp(t[:-1])
    lower = np.clip((other * scale - main * math.exp(-width)) / -math.expm1(-width), 0.0, main)
    mass = np.append(lower, 0.0) + np.append(0.0, main - lower)
    mass[0] += low
    way = width / -math.expm1(-width)
    either = (
        (other_error[:-1] + other_error[1:]) * scale + error[:-1] + error[1:] + 4 * UNIT * (2 + np.abs(t[:-1])) * main
    )
    return mass[:-1], high + float(mass[-1]), 2 * way * float(either.sum())
