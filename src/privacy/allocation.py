"""What random allocation discloses: every unit takes part in one step of each epoch, drawn uniformly, independently of
the other units. Numbers only, no tensors.

P is the output of an epoch of t steps with the unit, Q without it. The dominating pair (Feldman and Shenfeld 2025,
arXiv:2502.08202; Chua et al. 2024, arXiv:2412.16802) is, for noise sigma, P = 1/t sum_i N(e_i, sigma^2 I) and
Q = N(0, sigma^2 I) over t coordinates, so the likelihood ratio P/Q is a mean of independent lognormals of mean 1,

    S = (Y_1 + ... + Y_t) / t,   Y_i = exp(Z_i / sigma - 1 / (2 sigma^2)),   Z_i standard normal under Q.

Where an epoch stops after `taken` of its t steps, the unit can have been in these alone: the other Y_i are 1.

delta(epsilon) of a composition is E_Q[(prod S - exp(epsilon))_+] where the unit is removed and E_Q[(1 - exp(epsilon)
prod S)_+] where it is added. Both are convex in each S, and in each Y. So a variable may be replaced by one that is
spread wider and has the same mean: delta can only rise. Here, after every sum, each value goes to the two points of a
grid around it, its mean kept. The grid is uniform in log S.

Shapes: n points of a grid.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp, ndtr

from privacy.sampled_gaussian import ORDERS, Phase

WIDTH = 0.02  # of the grid of log S, unless its points are too many, or the spreading would show (see _width)
POINTS = 4096  # the most of a grid: their pairs take some 0.1 s
SHARE = 0.003  # of the variance of S: the most that spreading adds
TAIL = 1e-18  # share of the mass under Q, or of the mean, that is cut off at either end of a grid: see Ratio.trimmed()
SIGMA_RANGE = (0.05, 1e6)  # below it exp() overflows, above it the values of a grid would be equal
REACH = 9.0  # standard deviations of Z on the first grid: 1e-19 lie beyond
ROUNDING = 1e-12  # of the masses: what float64 may take from sums of positive numbers, many times over


@dataclass(frozen=True, eq=False)
class Ratio:
    """A variable of mean 1, or a sum of such, as it is distributed under Q: `mass` at the points exp(width k), k from
    `first` on; `zero` at 0; and beyond all numbers the part `infinite` of its mean, which is the mass under P there."""

    width: float
    first: int
    mass: np.ndarray  # (n,)
    zero: float
    infinite: float

    @property
    def values(self) -> np.ndarray:
        return np.exp(self.width * (self.first + np.arange(len(self.mass))))

    def plus(self, other: "Ratio") -> "Ratio":
        """The sum of independent variables.

        exp(width i) + exp(width (i + d)) lies above exp(width (i + d)) by log(1 + exp(-width d)), whatever i is. So all
        pairs of points that are d apart go up by as many points, and share out their mass alike. Only distances that
        occur are looked at: the two grids may lie far apart.
        """
        width, gap = self.width, other.first - self.first
        apart = np.arange(gap - len(self.mass) + 1, gap + len(other.mass))  # of a point of `other` above one of `self`
        rise = np.log1p(np.exp(-width * np.abs(apart))) / width
        whole = rise.astype(np.int64)
        up = np.expm1(width * (rise - whole)) / math.expm1(width)
        begin, end = np.maximum(0, gap - apart), np.minimum(len(self.mass), len(other.mass) + gap - apart)
        start = self.first + begin + np.maximum(apart, 0) + whole
        first = int(start.min())
        found = np.zeros(int((start + end - begin).max()) - first + 1)
        for lower, n, i, j, share in zip(start - first, end - begin, begin, begin + apart - gap, up, strict=True):
            pairs = self.mass[i : i + n] * other.mass[j : j + n]
            upper = pairs * share
            found[lower + 1 : lower + 1 + n] += upper
            found[lower : lower + n] += pairs - upper
        zero = self.zero * other.zero
        for one, chance in ((self, other.zero), (other, self.zero)):  # sums with 0; below the grid to 0 and its first
            place = one.first - first + np.arange(len(one.mass))
            mass = one.mass * chance
            kept = mass * np.exp(width * np.minimum(place, 0))
            np.add.at(found, np.maximum(place, 0), kept)
            zero += float((mass - kept).sum())
        return Ratio(width, first, found, zero, self.infinite + other.infinite).trimmed()

    def trimmed(self) -> "Ratio":
        """The same on fewer points. Points at the lower end that hold TAIL of the mass together, and at the upper end
        TAIL of the mean, are cut off. Mass below goes to 0 and to the first point, its mean kept. Mass above goes to
        the last point, and the rest of its mean counts as infinite."""
        values = self.values
        mean = self.mass * values
        low = int(np.searchsorted(np.cumsum(self.mass), TAIL * self.mass.sum()))
        high = len(values) - 1 - int(np.searchsorted(np.cumsum(mean[::-1]), TAIL * mean.sum()))
        kept, share = self.mass[low : high + 1].copy(), float(mean[:low].sum()) / values[low]
        kept[0] += share
        kept[-1] += self.mass[high + 1 :].sum()
        zero = self.zero + float(self.mass[:low].sum()) - share
        beyond = float(np.dot(self.mass[high + 1 :], values[high + 1 :] - values[high]))
        return Ratio(self.width, self.first + low, kept, max(0.0, zero), self.infinite + beyond)


def _width(sigma: float, steps: int) -> float:
    """The width of the grid for a mean of `steps` Y: each sum adds up to width^2 / 4 to the variance of log S, most of
    it in the last two."""
    variance = math.expm1(min(50.0, 1 / sigma**2)) / steps
    reach = (1 / sigma + 2 * REACH) / sigma
    return max(min(WIDTH, math.sqrt(2 * SHARE * variance)), reach / POINTS)


def lognormal(sigma: float, width: float) -> Ratio:
    """One Y, spread onto the grid cell by cell: exact in mass and mean.

    Of a cell from a to b with the mass q under Q and p under P, its mean being p / q, the point b gets
    (p - a q) / (b - a).
    """
    first, last = (math.floor((side * (0.5 / sigma + REACH)) / sigma / width) for side in (-1, 1))
    logs = width * np.arange(first, last + 2)
    under_q, under_p = _cells(logs * sigma + 0.5 / sigma), _cells(logs * sigma - 0.5 / sigma)
    grid = np.exp(logs)
    up = np.clip((under_p[1:-1] / grid[:-1] - under_q[1:-1]) / math.expm1(width), 0, under_q[1:-1])
    mass = np.append(under_q[1:-1] - up, 0.0) + np.append(0.0, up)
    # Below the grid: to 0, and to the first point what keeps the mean. Above: to the last point, the rest to infinity.
    low = under_p[0] / grid[0]
    mass[0] += low
    mass[-1] += under_q[-1]
    beyond = float(under_p[-1] - grid[-1] * under_q[-1])
    return Ratio(width, first, mass, max(0.0, float(under_q[0] - low)), max(0.0, beyond))


def _cells(edges: np.ndarray) -> np.ndarray:
    """(n + 1,) standard normal probabilities below, between and above `edges` (n,), each to its last digits."""
    lower, upper = ndtr(edges), ndtr(-edges)
    inner = np.where(edges[1:] < 0, np.diff(lower), -np.diff(upper))
    return np.concatenate([lower[:1], inner, upper[-1:]])


@functools.lru_cache(maxsize=256)
def one_epoch(sigma: float, t: int, taken: int) -> tuple[np.ndarray, np.ndarray, float]:
    """(values (n,), mass (n,), infinite) of S after the first `taken` of an epoch's t steps; values are ascending."""
    total, power, left = None, lognormal(sigma, _width(sigma, taken)), taken
    while True:
        if left & 1:
            total = power if total is None else total.plus(power)
        left >>= 1
        if not left:
            break
        power = power.plus(power)
    assert total is not None, "an epoch of no step"
    values, mass = np.append(0.0, total.values), np.append(total.zero, total.mass)
    return (values + (t - taken)) / t, mass, total.infinite / t


@dataclass(frozen=True)
class Allocated:
    """`steps` epochs of t steps, of each of which `taken` steps were taken; sigma times the sensitivity is the noise.

    What the accountant composes, as it does privacy.sampled_gaussian.Phase: an epoch counts as one step, and q is the
    probability that a unit takes part in those `taken` steps at all.
    """

    sigma: float
    t: int
    taken: int
    steps: int

    @property
    def q(self) -> float:
        return self.taken / self.t

    @property
    def amplified(self) -> bool:
        return True

    @property
    def share(self) -> tuple[int, int]:
        return self.taken, self.t

    def rdp(self) -> np.ndarray:
        """Upper bound of the RDP of one epoch at each of ORDERS: that of a Gaussian in which the unit surely takes part
        once."""
        return ORDERS / 2 / self.sigma / self.sigma

    def rough_rdp(self) -> np.ndarray:
        """About the RDP of one epoch, P against Q, at each of ORDERS; what is beyond the grid is left out."""
        values, mass, _ = one_epoch(self.sigma, self.t, self.taken)
        inside = (values > 0) & (mass > 0)
        log_mass, logs = np.log(mass[inside]), np.log(values[inside])
        return np.maximum(logsumexp(log_mass + np.outer(ORDERS, logs), axis=1), 0) / (ORDERS - 1)

    def masses(self, t: np.ndarray, removed: bool) -> tuple[np.ndarray, float, float]:
        """One epoch's privacy loss on the points t, as privacy.loss_grid.step_masses() gives it."""
        values, mass, infinite = one_epoch(self.sigma, self.t, self.taken)
        grid = np.exp(t)
        below, above = values < grid[0], values >= grid[-1]
        inside = ~(below | above)
        place = np.searchsorted(grid, values[inside], side="right") - 1
        up = (values[inside] - grid[place]) / (grid[place + 1] - grid[place])
        under_q = np.bincount(place, mass[inside] * (1 - up), len(t))
        under_q += np.bincount(place + 1, mass[inside] * up, len(t))
        if removed:  # log S under P, which is S times the mass under Q
            found = under_q * grid
            found[0] += np.dot(mass[below], values[below])
            beyond = infinite + float(np.dot(mass[above], values[above]))
        else:  # -log S under Q
            found = under_q[::-1].copy()
            found[0] += mass[above].sum()
            beyond = float(mass[below].sum())
        return found[:-1], beyond + float(found[-1]), ROUNDING


AnyPhase = Phase | Allocated
Share = float | tuple[int, int]  # q, or the steps taken of an epoch and all of its steps


def use_of(sigma: float, share: Share) -> AnyPhase:
    """The phase of one step, or of one epoch, of that `share`."""
    return Allocated(sigma, share[1], share[0], 1) if isinstance(share, tuple) else Phase(sigma, share, 1)
