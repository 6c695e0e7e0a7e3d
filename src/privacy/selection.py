"""Private selection: the price of the best of a random number of trials (Papernot and Steinke 2022, arXiv:2110.03620).

A trial draws its hyper-parameters at random, trains, and gives (model, score). K trials are run, K drawn at random and
kept secret, and the best alone is released: neither K nor anything of the other trials. With Q a trial:
  truncated negative binomial K (theorem 2), shape eta > -1 and gamma in (0, 1): if Q has RDP r(a) at every order a,
      r'(a) = r(a) + (1 + eta) min over b of ((1 - 1/b) r(b) + log(1/gamma) / b) + log E[K] / (a - 1)
  Poisson K of mean mu (theorem 6): if Q is (e, d)-DP for e = log(1 + 1/(a - 1)),
      r'(a) = r(a) + mu d + log(mu) / (a - 1)
Shape 1 is the geometric distribution, 0 the logarithmic one. The score has to be a function of the released model, of
public data, or of other noisy releases that the trial's own price counts.

Trials that cost different amounts have the largest RDP of any of them, at each order: the draw does not look at data.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from base.errors import fail
from privacy import accounting
from privacy.allocation import AnyPhase
from privacy.sampled_gaussian import ORDERS, epsilon_of_curve

MOST_MEAN = 10_000.0
BITS = 2**53  # of a draw's uniform number


@dataclass(frozen=True)
class Trials:
    """The distribution of the number K of trials. mean: E[K]; shape: eta of the truncated negative binomial (Papernot
    and Steinke 2022, definition 1); None: Poisson."""

    mean: float
    shape: float | None = None

    def check(self) -> None:
        """UserError for parameters that are out of range."""
        least = "1 or more" if self.shape is None else "above 1"
        if not (1 <= self.mean <= MOST_MEAN) or (self.shape is not None and self.mean == 1):
            fail(f"--mean {self.mean:g}: expected a number of trials {least}, at most {MOST_MEAN:g}")
        if self.shape is not None and not 0 <= self.shape <= 1000:
            fail(f"--shape {self.shape:g}: expected a number from 0 to 1000")

    def __str__(self) -> str:
        if self.shape is None:
            return f"Poisson, mean {self.mean:g}"
        return f"truncated negative binomial, shape {self.shape:g}, mean {self.mean:g}"

    @property
    def gamma(self) -> float:
        """gamma of the negative binomial, by bisection: the mean falls from infinity to 1 as it rises from 0 to 1."""
        low, high = -700.0, 0.0  # of log gamma
        while low < (middle := (low + high) / 2) < high:
            low, high = (middle, high) if self.mean_at(middle) > self.mean else (low, middle)
        return math.exp(low)  # the end whose mean is not below: it costs more

    def mean_at(self, log_gamma: float) -> float:
        """E[K] of the negative binomial: eta (1 - gamma) / (gamma (1 - gamma^eta)), of which eta = 0 is the limit."""
        shape, rest = self.shape or 0.0, -math.expm1(log_gamma)  # 1 - gamma
        if rest == 0:
            return 1.0
        if shape * -log_gamma < 1e-12:
            return rest * math.exp(-log_gamma) / -log_gamma
        return shape * rest * math.exp(-log_gamma) / -math.expm1(shape * log_gamma)

    def draw(self) -> int:
        """A number of trials, by inversion of 53 bits of the operating system's entropy. Poisson's may be 0."""
        left = (secrets.randbelow(BITS) + 0.5) / BITS
        count, chance = self.first()
        while left > chance and chance > 0:
            left -= chance
            count += 1
            chance *= self.ratio(count)
        return count

    def first(self) -> tuple[int, float]:
        """(the smallest number, its probability)."""
        if self.shape is None:
            return (0, math.exp(-self.mean)) if self.mean < 700 else self.far()
        gamma = self.gamma
        if self.shape == 0:
            return 1, (1 - gamma) / -math.log(gamma)
        return 1, self.shape * (1 - gamma) / math.expm1(-self.shape * math.log(gamma))

    def far(self) -> tuple[int, float]:
        """A Poisson number so far below a large mean that nothing below it is ever drawn, and its probability."""
        count = math.floor(self.mean - 12 * math.sqrt(self.mean))
        return count, math.exp(count * math.log(self.mean) - self.mean - math.lgamma(count + 1))

    def ratio(self, count: int) -> float:
        """P(count) / P(count - 1)."""
        if self.shape is None:
            return self.mean / count
        return (1 - self.gamma) * (count - 1 + self.shape) / count


def selected_curve(rdp: np.ndarray, trials: Trials) -> np.ndarray:
    """RDP at each of ORDERS of the best of a random number of trials, each with `rdp` at ORDERS."""
    penalty = math.log(trials.mean) / (ORDERS - 1)
    if trials.shape is not None:
        log_gamma = math.log(trials.gamma)
        return rdp + penalty + (1 + trials.shape) * np.min((1 - 1 / ORDERS) * rdp - log_gamma / ORDERS)
    # d of theorem 6: delta of a trial at each order's epsilon, by Balle et al. (2020), theorem 21, at the best order
    epsilons = np.log1p(1 / (ORDERS - 1))[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        log_delta = (ORDERS - 1) * (rdp - epsilons + np.log1p(-1 / ORDERS)) - np.log(ORDERS)
        delta = np.minimum(1.0, np.exp(np.nanmin(np.where(np.isinf(rdp), np.inf, log_delta), axis=1)))
        return rdp + penalty + trials.mean * delta


def selection_epsilon(trial_phases: Sequence[Sequence[AnyPhase]], trials: Trials, delta: float) -> float:
    """Epsilon at `delta` of the best of a random number of trials. trial_phases: what each possible trial discloses."""
    accounting.check_delta(delta)
    trials.check()
    worst = np.max([accounting.curve(phases) for phases in trial_phases], axis=0)
    if not np.isfinite(worst).any():
        return math.inf
    return epsilon_of_curve(selected_curve(worst, trials), math.log(delta))
