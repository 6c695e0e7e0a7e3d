"""Epsilon of a run, and the noise or the number of steps that an epsilon allows: numbers only, no tensors.

Relation: add or remove one unit. Every function here returns an upper bound of the true epsilon, never an estimate.

The tight bound is the privacy random variable (PRV) accountant of Gopi, Lee and Wutschitz (2021), "Numerical
composition of differential privacy", with the grid and the error terms of Opacus's PRVAccountant. The discretisation
and the composition are our own: Opacus's are several times slower, too slow for every log line and for calibration (the
measured ratio is printed by tests/test_accounting.py), and take differences of 1 - tail, which loses the tail that a
small delta is made of. The same tests hold them to Opacus's values and to dp_accounting's.

`epsilon_bound` returns the smallest of four sound bounds and names it:
  prv       the PRV upper bound. Its error term is Opacus's 0.01; less in proportion below an RDP epsilon of 0.5 (as
            far as FINE_POINTS reach), more in proportion above 16, and more where the grid would pass MAX_POINTS. Left
            out where the grid cannot be trusted: an error term of 1, a span beyond what exp() holds, rounding noise of
            delta / 20.
  rdp       Renyi DP of the sampled Gaussian (Mironov, Talwar and Zhang 2019), computed by Opacus.
  gaussian  the analytic Gaussian mechanism (Balle and Wang 2018) without amplification: exact where every q is 1, and
            sound for any q, since sampling cannot add to what full participation discloses.
  sampling  epsilon 0, where delta is not below the probability that the unit is drawn at all.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from opacus.accountants import RDPAccountant
from opacus.accountants.analysis.prv import DiscretePRV, Domain
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
from scipy import fft
from scipy.special import erfcx, ndtr

from cli import fail

MAX_POINTS = 2**22  # of the PRV grid: about 1 s and 0.4 GB, at 10^6 steps; an E2E run needs 0.7 million and 0.1 s
FINE_POINTS = 2**21  # spent at the most on an error term below Opacus's
MAX_SPAN = 700.0  # of the PRV grid in nats: exp() overflows at 709
SIGMA_RANGE = (0.01, 1e6)  # where calibration searches
TOLERANCE = 0.002  # a calibrated epsilon lies between (1 - TOLERANCE) target and target

# Opacus's orders end at 1.1 and 63 and it warns where the best one is at an end; these carry on at both ends, so that
# its epsilons stay as they are wherever its own best order was an inner one.
ORDERS = [1.001, 1.002, 1.005, 1.01, 1.02, 1.05, *RDPAccountant.DEFAULT_ALPHAS]
ORDERS += [72, 80, 96, 128, 192, 256, 384, 512, 768, 1024]


@dataclass(frozen=True)
class Phase:
    """`steps` releases of a sum over units drawn with probability q, with noise of sigma times the sensitivity."""

    sigma: float
    q: float
    steps: int


@dataclass(frozen=True)
class Bound:
    """An upper bound of epsilon and its origin: "prv", "rdp", "gaussian", "sampling"; "none": no steps, or no noise."""

    epsilon: float
    method: str


def check_delta(delta: float) -> None:
    """UserError unless 0 < delta < 1."""
    if not 0 < delta < 1:  # also false for NaN
        fail(f"delta {delta}: wanted a number above 0 and below 1, such as 1e-5")


def _merge(phases: Sequence[Phase]) -> tuple[Phase, ...]:
    """The same mechanism in a canonical form: one phase per (sigma, q), all full-participation phases as one Gaussian.

    Raises UserError for a phase that is none. Order and splitting never change an epsilon, to the last bit.
    """
    total: dict[tuple[float, float], int] = {}
    for phase in phases:
        if not (0 <= phase.sigma < math.inf):
            fail(f"noise multiplier sigma {phase.sigma}: wanted a finite number of 0 or more")
        if not 0 <= phase.q <= 1:
            fail(f"sampling probability q {phase.q}: wanted a number from 0 to 1; is the batch larger than the data?")
        if phase.steps < 0 or phase.steps != int(phase.steps):
            fail(f"steps {phase.steps}: wanted a whole number of 0 or more")
        if phase.steps and phase.q:
            key = (float(phase.sigma), float(phase.q))
            total[key] = total.get(key, 0) + int(phase.steps)
    full = [(sigma, steps) for (sigma, q), steps in sorted(total.items()) if q == 1 and sigma > 0]
    merged = [Phase(sigma, q, steps) for (sigma, q), steps in sorted(total.items()) if q < 1 or sigma == 0]
    if full:
        # n releases with sigma are one with sigma / sqrt(n): the mu of Gaussian DP add in squares.
        merged.append(Phase(1 / math.hypot(*(math.sqrt(steps) / sigma for sigma, steps in full)), 1.0, 1))
    return tuple(merged)


# --- the three bounds ---


def epsilon_gaussian(mu: float, delta: float) -> float:
    """Exact epsilon at `delta` of a Gaussian mechanism with sensitivity / standard deviation = mu.

    Balle and Wang (2018), theorem 8: delta = Phi(mu/2 - eps/mu) - exp(eps) Phi(-mu/2 - eps/mu). With y = eps/mu - mu/2
    this is exp(-y^2/2) (erfcx(y/sqrt 2) - erfcx((y + mu)/sqrt 2)) / 2, in which nothing overflows however large epsilon
    is. The end of the bracket whose delta is not above `delta` is returned.
    """
    check_delta(delta)
    if not mu >= 0:
        fail(f"mu {mu}: wanted a number of 0 or more")
    if mu == 0:
        return 0.0
    if mu > 1e150:  # mu^2 overflows
        return math.inf
    mu = max(mu, 1e-6)  # below it the difference loses its digits; epsilon grows with mu, so this stays a bound

    def log_delta(y: float) -> float:
        gap = erfcx(y / math.sqrt(2)) - erfcx((y + mu) / math.sqrt(2))
        return -y * y / 2 + math.log(gap / 2)

    low, high = max(-mu / 2, -10.0), 40.0  # epsilon = 0 or delta = 1 - 1e-23; delta = 1e-349
    if log_delta(low) <= math.log(delta):
        return mu * (low + mu / 2)
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return mu * (high + mu / 2)
        if log_delta(middle) > math.log(delta):
            low = middle
        else:
            high = middle


@functools.lru_cache(maxsize=4096)
def _rdp_per_step(sigma: float, q: float) -> np.ndarray:
    """RDP of one step at each of ORDERS; infinite where Opacus's series has no value, or takes millions of terms.

    The latter is so for broken orders near q = 1/2 under much noise; the Gaussian bound is as good there.
    """
    slow = 0 < q < 1 and sigma > 10 and sigma * abs(math.log(1 / q - 1)) < 8
    rdp = np.full(len(ORDERS), np.inf)
    for index, order in enumerate(ORDERS):
        if slow and order != int(order):
            continue
        try:
            rdp[index] = compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=float(order))
        except (ValueError, OverflowError, ZeroDivisionError):
            continue
    rdp = np.where(np.isnan(rdp), np.inf, np.maximum(rdp, 0))
    rdp.setflags(write=False)  # it is shared by all callers of the cache
    return rdp


def _epsilon_rdp(phases: tuple[Phase, ...], delta: float) -> float:
    rdp = sum(phase.steps * _rdp_per_step(phase.sigma, phase.q) for phase in phases)
    if not np.isfinite(rdp).any():
        return math.inf
    with warnings.catch_warnings():
        # "Optimal order is the smallest/largest alpha": the bound is looser there, and as sound.
        warnings.simplefilter("ignore", UserWarning)
        epsilon, _ = get_privacy_spent(orders=ORDERS, rdp=rdp, delta=delta)
    return max(0.0, float(epsilon))


def _tail(phase: Phase, t: np.ndarray) -> np.ndarray:
    """P(Y > t) of one step's privacy loss Y under the data set with the unit (Gopi et al. 2021, proposition B.4).

    Y = log(1 - q + q exp(z)), z the Gaussian's log-likelihood ratio, is above t where z > log((exp(t) - 1 + q) / q).
    """
    q, sigma = phase.q, phase.sigma
    with np.errstate(divide="ignore"):
        live = t > np.log1p(-q)
    z = np.log(np.where(live, np.expm1(t) + q, 1.0)) - np.log(q)
    upper = q * ndtr(0.5 / sigma - z * sigma) + (1 - q) * ndtr(-0.5 / sigma - z * sigma)
    return np.where(live, upper, 1.0)


def _mean(phase: Phase, span: float) -> float:
    """E[Y | |Y| < span], by the trapezoidal rule over the Gaussian's own variable, where it converges geometrically."""
    q, sigma = phase.q, phase.sigma
    x = np.linspace(-20 * sigma, 1 + 20 * sigma, 8001)
    density = (1 - q) * np.exp(-((x / sigma) ** 2) / 2) + q * np.exp(-(((x - 1) / sigma) ** 2) / 2)
    exponent = (2 * x - 1) / (2 * sigma**2)
    with np.errstate(over="ignore", divide="ignore"):
        loss = np.where(exponent > 30, np.log(q) + exponent, np.log1p(q * np.expm1(np.minimum(exponent, 30))))
    density[np.abs(loss) >= span] = 0
    return float(np.dot(density, np.where(density > 0, loss, 0)) / density.sum())


def _epsilon_prv(phases: tuple[Phase, ...], delta: float) -> float:
    """The PRV upper bound, or infinity where the grid cannot be trusted (see the head of this file)."""
    steps = sum(phase.steps for phase in phases)
    delta_error = delta / 1000
    # Gopi et al. (2021), remark 5.6, as Opacus has it: the sum of steps leaves the span with at most delta_error / 4.
    span = 3 + max(
        _epsilon_rdp(phases, delta_error / 4),
        *(_epsilon_rdp((Phase(phase.sigma, phase.q, 1),), delta_error / (8 * steps)) for phase in phases),
    )
    if span > MAX_SPAN:
        return math.inf
    # Theorem 5.5: a grid of width h adds at most h sqrt(steps log(12 / delta_error) / 2) to epsilon.
    spread = math.sqrt(steps * math.log(12 / delta_error) / 2)
    rough = _epsilon_rdp(phases, delta)
    error = 0.01 * max(min(1.0, rough / 0.5), rough / 16)
    error = max(min(0.01, 2 * span * spread / FINE_POINTS), error, 2 * span * spread / MAX_POINTS)
    if error >= 1:  # beyond what remark 5.6 is known to cover
        return math.inf
    width = error / spread
    half = fft.next_fast_len(math.ceil(span / width) + 1, real=True)
    points = (np.arange(-half, half)) * width  # (2 half,): 0 is a point, so a circular convolution keeps its place

    edges = np.append(points, half * width) - width / 2
    product, shift = None, 0.0
    for phase in phases:
        tail = _tail(phase, edges)
        mass = tail[:-1] - tail[1:]
        mass /= mass.sum()
        offset = _mean(phase, half * width) - float(np.dot(points, mass))
        if abs(offset) >= width / 2:
            return math.inf
        shift += phase.steps * offset
        spectrum = _power(fft.rfft(fft.ifftshift(mass)), phase.steps)
        product = spectrum if product is None else product * spectrum
    mass = fft.fftshift(fft.irfft(product, n=2 * half))

    # What rounding took below zero stands for what it took elsewhere; twice that is put on top of delta_error.
    noise = -2 * float(mass[mass < 0].sum())
    if not noise <= delta / 20:
        return math.inf
    domain = Domain(t_min=points[0] + shift, t_max=points[-1] + shift, size=2 * half)
    try:
        _, _, upper = DiscretePRV(mass, domain).compute_epsilon(delta, delta_error + noise, error)
    except (ValueError, RuntimeError):
        return math.inf
    return max(0.0, float(upper)) if math.isfinite(upper) else math.inf


def _power(base: np.ndarray, exponent: int) -> np.ndarray:
    """base ** exponent for a whole exponent >= 1, by squaring: four times as fast as numpy's complex power."""
    result = None
    while True:
        if exponent & 1:
            result = base.copy() if result is None else result * base
        exponent >>= 1
        if not exponent:
            return result
        base = base * base


# --- epsilon ---


@functools.lru_cache(maxsize=4096)
def _bound(phases: tuple[Phase, ...], delta: float) -> Bound:
    if not phases:
        return Bound(0.0, "none")
    if any(phase.sigma == 0 for phase in phases):
        return Bound(math.inf, "none")
    if 1 - math.prod((1 - phase.q) ** phase.steps for phase in phases) < delta * (1 - 1e-6):
        return Bound(0.0, "sampling")
    mu = math.hypot(*(math.sqrt(phase.steps) / phase.sigma for phase in phases))
    bounds = [Bound(epsilon_gaussian(mu, delta), "gaussian")]
    if any(phase.q < 1 for phase in phases):
        bounds += [Bound(_epsilon_prv(phases, delta), "prv"), Bound(_epsilon_rdp(phases, delta), "rdp")]
    return min(bounds, key=lambda bound: bound.epsilon)


def epsilon_bound(phases: Sequence[Phase], delta: float) -> Bound:
    """The headline: the least of the sound bounds at `delta` of all `phases` composed, and which one it is.

    0 where nothing was released, infinite where something was without noise. Repeated calls are answered from memory.
    """
    check_delta(delta)
    return _bound(_merge(phases), float(delta))


def epsilon_prv(phases: Sequence[Phase], delta: float) -> float:
    """The PRV upper bound of epsilon at `delta`, or the smaller sound bound that `epsilon_bound` names in its place."""
    return epsilon_bound(phases, delta).epsilon


def epsilon_rdp(phases: Sequence[Phase], delta: float) -> float:
    """Opacus's RDP epsilon at `delta`, over ORDERS."""
    check_delta(delta)
    merged = _merge(phases)
    if not merged:
        return 0.0
    return math.inf if any(phase.sigma == 0 for phase in merged) else _epsilon_rdp(merged, delta)


def epsilon_shuffle(sigma: float, participations: int, delta: float) -> float:
    """Epsilon at `delta` where every unit takes part in `participations` steps: no amplification, mu = sqrt(E) / sigma.

    Sound for shuffling, and for any other order in which a unit is used at most that often.
    """
    check_delta(delta)
    (merged,) = _merge([Phase(sigma, 1.0, participations)]) or (None,)
    if merged is None:
        return 0.0
    return math.inf if merged.sigma == 0 else epsilon_gaussian(1 / merged.sigma, delta)


# --- what an epsilon allows ---


def _check_target(target_epsilon: float, delta: float) -> None:
    check_delta(delta)
    if not 0 < target_epsilon < math.inf:
        fail(f"target epsilon {target_epsilon}: wanted a finite number above 0")


def _smallest_sigma(epsilon: Callable[[float], float], target: float, guess: float, words: str) -> float:
    """The smallest sigma of SIGMA_RANGE with epsilon(sigma) <= target, to TOLERANCE; epsilon falls as sigma rises.

    Regula falsi on log epsilon against log sigma (nearly a straight line), halved where it would crawl (Illinois).
    """
    least, most = SIGMA_RANGE
    sigma = min(max(guess, least), most)
    low = high = None  # (log sigma, log epsilon / target): above the target, not above it
    factor = 1.05
    while low is None or high is None:
        gap = _log_ratio(epsilon(sigma), target)
        if gap <= 0:
            high = (math.log(sigma), gap)
            if gap >= -TOLERANCE / 2:
                return sigma
            if sigma <= least:
                fail(f"{words}: noise multiplier {least:g} already meets it, which is next to no privacy; "
                     "lower the target or the delta")
            following = max(sigma / factor, least)
        else:
            low = (math.log(sigma), gap)
            if sigma >= most:
                fail(f"{words}: no noise multiplier up to {most:g} meets it; raise the target or take fewer steps")
            following = min(sigma * factor, most)
        sigma, factor = following, min(factor**2, 10.0)
    weights = [1.0, 1.0]
    for _ in range(100):
        # Aim a little below the target, so that a good guess ends the search from its permitted side.
        left, right = weights[0] * (low[1] + TOLERANCE / 2), weights[1] * (high[1] + TOLERANCE / 2)
        place = low[0] + (high[0] - low[0]) * left / (left - right) if left < math.inf else low[0]
        if not low[0] < place < high[0]:
            place = (low[0] + high[0]) / 2
        if not low[0] < place < high[0] or high[0] - low[0] < 1e-5:
            break  # the bound jumps over the target here: the permitted side is the answer
        gap = _log_ratio(epsilon(math.exp(place)), target)
        if gap > 0:
            low, weights = (place, gap), [1.0, weights[1] / 2]
        else:
            high, weights = (place, gap), [weights[0] / 2, 1.0]
            if gap >= -TOLERANCE:
                break
    return math.exp(high[0])


def _log_ratio(epsilon: float, target: float) -> float:
    return math.log(epsilon / target) if epsilon > 0 else -math.inf


def calibrate_sigma(target_epsilon: float, delta: float, q: float, steps: int) -> float:
    """The smallest noise multiplier, to 0.5 % in epsilon, for which `steps` steps with q stay within the target.

    epsilon_prv at the answer is never above the target. UserError where that needs a sigma outside SIGMA_RANGE. Where
    the bound itself has a step (MAX_SPAN ends the PRV grid near an epsilon of 490) the answer is the step's lower side.
    """
    _check_target(target_epsilon, delta)
    if not 0 < q <= 1:
        fail(f"sampling probability q {q}: wanted a number above 0 and up to 1; is the batch larger than the data?")
    if steps != int(steps) or steps < 1:
        fail(f"steps {steps}: wanted a whole number of 1 or more to calibrate the noise for")
    # First guess: the central limit of Bu, Dong, Long and Su (2020), mu = q sqrt(steps (exp(1 / sigma^2) - 1)).
    mu = _largest_mu(target_epsilon, delta)
    guess = 1 / math.sqrt(math.log1p((mu / q) ** 2 / steps))
    words = f"target epsilon {target_epsilon:g} at delta {delta:g} over {steps} steps with q = {q:.4g}"
    return _smallest_sigma(lambda sigma: epsilon_prv([Phase(sigma, q, steps)], delta), target_epsilon, guess, words)


def calibrate_sigma_shuffle(target_epsilon: float, delta: float, participations: int) -> float:
    """The smallest noise multiplier for which `participations` uses of a unit, not amplified, stay within target."""
    _check_target(target_epsilon, delta)
    if participations != int(participations) or participations < 1:
        fail(f"participations {participations}: wanted a whole number of 1 or more to calibrate the noise for")
    guess = math.sqrt(participations) / _largest_mu(target_epsilon, delta)
    words = f"target epsilon {target_epsilon:g} at delta {delta:g} over {participations} participations, not amplified"
    return _smallest_sigma(lambda sigma: epsilon_shuffle(sigma, participations, delta), target_epsilon, guess, words)


def _largest_mu(target_epsilon: float, delta: float) -> float:
    """The mu of Gaussian DP whose epsilon at `delta` is the target: where the searches start, no bound itself."""
    low, high = 1e-6, 2 * math.sqrt(2 * target_epsilon) + 20
    for _ in range(50):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if epsilon_gaussian(middle, delta) <= target_epsilon else (low, middle)
    return low


def permitted_steps(
    target_epsilon: float, delta: float, spent: Sequence[Phase], q: float, sigma: float, wanted: int
) -> int:
    """The largest n <= wanted for which `spent` and n more steps of (sigma, q) stay within the target at `delta`.

    0 where `spent` alone is at or above it. Epsilon grows with n, so all smaller n are permitted as well.
    """
    _check_target(target_epsilon, delta)
    if wanted != int(wanted) or wanted < 0:
        fail(f"steps {wanted}: wanted a whole number of 0 or more")

    def over(count: int) -> float:
        return epsilon_prv([*spent, Phase(sigma, q, count)], delta) - target_epsilon

    low, high = 0, int(wanted)  # low is permitted, high is not
    excess_high = over(high)
    if excess_high <= 0:
        return high
    excess_low = over(0)
    if excess_low > 0:
        return 0
    halve = excess_high == math.inf
    while high - low > 1:
        # Regula falsi and halving in turn: the first is quick on a smooth curve, the second on any.
        share = 0.5 if halve else excess_low / (excess_low - excess_high)
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        excess = over(middle)
        halve = not halve if excess < math.inf and excess_high < math.inf else True
        if excess <= 0:
            low, excess_low = middle, excess
        else:
            high, excess_high = middle, excess
    return low
