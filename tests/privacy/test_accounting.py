"""Epsilons against dp_accounting (privacy loss distributions, RDP), Opacus, mpmath and the reference values."""

import itertools
import json
import math
import random
import time
import warnings

import mpmath
import numpy as np
import pytest
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.special import logsumexp

from base.errors import UserError
from helpers.calibration import calibrate_sigma, calibrate_sigma_shuffle
from privacy import accounting, sampled_gaussian
from privacy.accounting import Phase

E2E = Phase(sigma=0.6, q=128 / 42061, steps=6572)
# What a ledger can hold: one mechanism; a resumed run with other noise; another q; a shuffled epoch (q = 1).
MIXED = {
    "e2e": [E2E],
    "few steps": [Phase(0.6, 0.003, 7)],
    "one step": [Phase(0.6, 128 / 42061, 1)],
    "large q": [Phase(2.0, 0.6, 30)],
    "nearly all": [Phase(3.0, 0.98, 10)],
    "much noise": [Phase(30.0, 0.1, 300)],
    "little noise": [Phase(0.3, 0.003, 30)],
    "two sigmas": [Phase(0.6, 0.003, 900), Phase(0.8, 0.003, 2000)],
    "three phases": [Phase(0.7, 0.004, 500), Phase(1.1, 0.002, 1500), Phase(0.9, 0.01, 40)],
    "shuffled epoch": [Phase(0.9, 0.003, 1000), Phase(4.0, 1.0, 2)],
}


def pld_epsilons(phases: list[Phase], deltas: list[float]) -> list[float]:
    """Google's accountant, both directions of the relation: upper bounds within 0.1 % of the truth.

    Its "connect the dots" errs by the square of the interval: 1e-5 where full participation has an exact value.
    """
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    total = None
    for phase in phases:
        part = pld.from_gaussian_mechanism(
            phase.sigma, pessimistic_estimate=True, value_discretization_interval=1e-4, sampling_prob=phase.q
        ).self_compose(phase.steps)
        total = part if total is None else total.compose(part)
    return [total.get_epsilon_for_delta(delta) for delta in deltas]


def opacus_prv(phases: list[Phase], delta: float) -> float:
    accountant = PRVAccountant()
    accountant.history = [(phase.sigma, phase.q, phase.steps) for phase in phases]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return accountant.get_epsilon(delta)


# --- against the oracles ---


def test_reference_values(shared):
    reference = json.loads((shared / "reference" / "accounting.json").read_text())
    e2e = reference["e2e"]
    for row in e2e["rows"]:
        phases = [Phase(e2e["sigma"], e2e["q"], row["steps"])]
        bound = accounting.epsilon_bound(phases, row["delta"])
        assert bound.method == "prv"
        assert bound.epsilon == pytest.approx(row["opacus_prv"], abs=2e-6)
        assert bound.epsilon > row["pld_pessimistic"] and bound.epsilon > row["prv_accountant_estimate"]
        assert accounting.epsilon_rdp(phases, row["delta"]) == pytest.approx(row["opacus_rdp"], abs=2e-6)
    not_amplified = e2e["no_amplification_20_epochs_delta_1e-5"]
    assert accounting.epsilon_shuffle(0.6, 20, 1e-5) == pytest.approx(not_amplified, abs=0.005)
    reddit = reference["reddit"]
    for row in reddit["rows"]:
        sigma = calibrate_sigma(8, 1 / row["N"], reddit["batch"] / row["N"], row["steps"])
        # Above what the true epsilon needs; above Opacus's by at most 0.5 % of epsilon in sigma (elasticity -3.6).
        assert row["sigma_pld"] < sigma < row["sigma_opacus_prv"] * (1 + 0.005 / 3.6)
    spot = reddit["spot"]
    phases, delta = [Phase(spot["sigma"], reddit["batch"] / spot["N"], spot["steps"])], 1 / spot["N"]
    assert accounting.epsilon_prv(phases, delta) == pytest.approx(spot["opacus_prv"], abs=1e-5)
    assert accounting.epsilon_rdp(phases, delta) == pytest.approx(spot["opacus_rdp"], abs=1e-5)
    plain = reddit["no_amplification_3_epochs"]
    assert accounting.epsilon_shuffle(plain["sigma"], 3, delta) == pytest.approx(plain["epsilon"], abs=0.005)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("delta", [1e-5, 1e-7])
def test_never_below_the_truth_and_close_to_it(name, delta):
    """From an independent accountant's value (less what that may be above the truth) to it plus our own error terms."""
    phases = MIXED[name]
    # delta_error and the rounding noise take a little more than a thousandth of delta.
    truth, most = pld_epsilons(phases, [delta, 0.998 * delta])
    epsilon = accounting.epsilon_prv(phases, delta)
    assert 0.999 * truth <= epsilon
    assert epsilon <= most + 0.0101 * max(1, accounting.epsilon_rdp(phases, delta) / 16)
    # Negative control: accounting for 10 % more noise than there was, or for half the sampling rate, is seen.
    for wrong in (
        [Phase(phase.sigma * 1.1, phase.q, phase.steps) for phase in phases],
        [Phase(phase.sigma, phase.q / 2, phase.steps) for phase in phases],
    ):
        assert accounting.epsilon_prv(wrong, delta) < 0.999 * truth


@pytest.mark.parametrize("name", ["e2e", "two sigmas", "three phases", "large q", "shuffled epoch"])
def test_equals_opacus_prv(name):
    # Same grid and error terms. Opacus loses digits of the tail (1 - cdf); at this delta that is below 1e-5 in epsilon.
    ours = sampled_gaussian.prv_epsilon(accounting.merge(MIXED[name]), 1e-5)
    assert ours == pytest.approx(opacus_prv(MIXED[name], 1e-5), abs=2e-5)


def exact_rdp(sigma: float, q: float, order: float) -> float:
    """RDP of one step by quadrature over z ~ N(0, sigma^2).

    log E[(1 - q + q exp((2 z - 1) / (2 sigma^2)))^order] / (order - 1)
    """
    z = np.linspace(-30 * sigma, order + 30 * sigma, 200_001)
    ratio = (2 * z - 1) / (2 * sigma**2)
    if q < 1:
        ratio = np.logaddexp(np.log1p(-q), np.log(q) + ratio)
    log_integrand = order * ratio - z**2 / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
    return (logsumexp(log_integrand) + math.log(z[1] - z[0])) / (order - 1)


@pytest.mark.parametrize("name", MIXED)
def test_rdp(name):
    """Equal to quadrature, to Opacus, and not above dp_accounting (whose bound is looser at broken orders)."""
    dp_accounting = pytest.importorskip("dp_accounting")
    phases, delta = MIXED[name], 1e-6
    epsilon = accounting.epsilon_rdp(phases, delta)
    orders = [order for order in sampled_gaussian.ORDERS if order >= 1.1]
    exact = min(
        sum(phase.steps * exact_rdp(phase.sigma, phase.q, order) for phase in phases)
        + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)  # Balle et al. (2020), theorem 21
        for order in orders
    )
    assert epsilon == pytest.approx(exact, rel=1e-6)
    theirs, opacus = dp_accounting.rdp.RdpAccountant(orders), RDPAccountant()
    for phase in phases:
        event = dp_accounting.PoissonSampledDpEvent(phase.q, dp_accounting.GaussianDpEvent(phase.sigma))
        theirs.compose(event, phase.steps)
        opacus.history.append((phase.sigma, phase.q, phase.steps))
    assert 0.99 * theirs.get_epsilon(delta) < epsilon <= theirs.get_epsilon(delta) * (1 + 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        default, order = opacus.get_privacy_spent(delta=delta)
    if 1.1 < order < 63:  # else Opacus itself asks for more orders
        assert epsilon == pytest.approx(default, rel=1e-9)
    assert epsilon <= default * (1 + 1e-9)


@pytest.mark.parametrize("mu", [1e-3, 0.1, 1.0, math.sqrt(20) / 0.6, 100.0, 1e4])
@pytest.mark.parametrize("delta", [0.1, 1e-5, 1e-12, 1e-100])
def test_analytic_gaussian(mu, delta):
    """delta(epsilon) evaluated with 80 digits is at most delta, and above it for an epsilon a millionth smaller."""
    with mpmath.workdps(80):

        def exact_delta(epsilon):
            epsilon, m = mpmath.mpf(epsilon), mpmath.mpf(mu)
            return mpmath.ncdf(m / 2 - epsilon / m) - mpmath.exp(epsilon) * mpmath.ncdf(-m / 2 - epsilon / m)

        epsilon = accounting.epsilon_gaussian(mu, delta)
        assert exact_delta(epsilon) <= delta * (1 + 1e-9)
        assert epsilon == 0 or exact_delta(epsilon * (1 - 1e-6)) > delta


def test_full_participation_is_exact():
    # q = 1: n steps are one Gaussian mechanism with mu = sqrt(n) / sigma.
    assert accounting.epsilon_bound([Phase(3.0, 1.0, 10)], 1e-5).method == "gaussian"
    exact = accounting.epsilon_gaussian(math.sqrt(10) / 3, 1e-5)
    assert accounting.epsilon_prv([Phase(3.0, 1.0, 10)], 1e-5) == pytest.approx(exact, rel=1e-12)
    assert accounting.epsilon_shuffle(3.0, 10, 1e-5) == pytest.approx(exact, rel=1e-12)
    assert exact < opacus_prv([Phase(3.0, 1.0, 10)], 1e-5)


def test_sampling_alone_can_be_enough():
    """A unit drawn with probability 1e-6 in the whole run: delta 1e-5 covers all that it could disclose."""
    assert accounting.epsilon_bound([Phase(0.5, 1e-9, 1000)], 1e-5) == accounting.Bound(0.0, "sampling")
    assert accounting.epsilon_prv([Phase(0.5, 1e-9, 1000)], 1e-7) > 0


# --- shape of the answers ---


def test_order_and_splitting_change_nothing():
    whole = [Phase(0.6, 0.003, 900), Phase(0.8, 0.01, 200), Phase(2.0, 1.0, 2)]
    parts = [Phase(2.0, 1.0, 1), Phase(0.8, 0.01, 150), *[Phase(0.6, 0.003, 100)] * 9, Phase(0.8, 0.01, 50),
             Phase(2.0, 1.0, 1), Phase(5.0, 0.5, 0), Phase(0.0, 0.5, 0), Phase(0.0, 0.0, 5)]
    for function in (accounting.epsilon_prv, accounting.epsilon_rdp):
        assert function(whole, 1e-6) == function(parts, 1e-6)


def test_monotone():
    def ascending(values):
        assert all(left < right for left, right in itertools.pairwise(values)), values

    prv = accounting.epsilon_prv
    ascending([prv([Phase(0.6, 0.003, steps)], 1e-5) for steps in (1, 2, 5, 20, 100, 700, 5000, 20000)])
    ascending([prv([Phase(sigma, 0.003, 3000)], 1e-5) for sigma in (60, 12, 3, 1, 0.6, 0.4, 0.3, 0.2, 0.1)])
    ascending([prv([Phase(1.0, q, 300)], 1e-5) for q in (0.001, 0.004, 0.02, 0.1, 0.3, 0.8, 1.0)])
    ascending([prv([E2E], delta) for delta in (1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12, 1e-14)])


def test_nothing_and_no_noise():
    for function in (accounting.epsilon_prv, accounting.epsilon_rdp):
        assert function([], 1e-5) == 0
        assert function([Phase(0.0, 0.1, 0)], 1e-5) == 0
        assert function([E2E, Phase(0.0, 0.003, 1)], 1e-5) == math.inf
    assert accounting.epsilon_shuffle(0.0, 1, 1e-5) == math.inf
    assert accounting.epsilon_shuffle(0.5, 0, 1e-5) == 0


def test_extremes_are_answered():
    """10^6 steps, deltas beyond the grid's rounding noise, epsilons beyond exp(): an upper bound, named."""
    million = accounting.epsilon_bound([Phase(1.0, 0.001, 10**6)], 1e-6)
    # Opacus on its own, larger grid: estimate 6.6943, upper bound 6.7045.
    assert million.method == "prv" and 6.6943 < million.epsilon < 6.75
    tiny_delta = accounting.epsilon_bound([E2E], 1e-15)
    assert tiny_delta.method == "rdp" and tiny_delta.epsilon == accounting.epsilon_rdp([E2E], 1e-15)
    loud = accounting.epsilon_bound([Phase(0.05, 0.9, 1000)], 1e-5)
    assert loud.method in ("rdp", "gaussian")
    assert 1e5 < loud.epsilon <= accounting.epsilon_gaussian(math.sqrt(1000) / 0.05, 1e-5)
    assert accounting.epsilon_bound([Phase(1e-200, 0.5, 3)], 1e-5).epsilon == math.inf


def test_random_settings_never_give_nonsense():
    draw = random.Random(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60):
            phases = [
                Phase(10 ** draw.uniform(-2, 4), min(1.0, 10 ** draw.uniform(-7, 0.1)), int(10 ** draw.uniform(0, 4.5)))
                for _ in range(draw.choice([1, 1, 2, 4]))
            ]
            delta = 10 ** draw.uniform(-14, -0.01)
            bound, rdp = accounting.epsilon_bound(phases, delta), accounting.epsilon_rdp(phases, delta)
            assert 0 <= bound.epsilon <= rdp, (phases, delta)
            assert bound.epsilon < math.inf, (phases, delta)


@pytest.mark.parametrize(
    "phases, delta",
    [([E2E], delta) for delta in (0.0, 1.0, -1e-5, math.nan)]
    + [([Phase(sigma, 0.1, 1)], 1e-5) for sigma in (-0.1, math.nan, math.inf)]
    + [([Phase(1.0, q, 1)], 1e-5) for q in (1.1, -0.1, math.nan)]
    + [([Phase(1.0, 0.1, steps)], 1e-5) for steps in (-1, 1.5)],
)
def test_refused_in_words(phases, delta):
    for function in (accounting.epsilon_prv, accounting.epsilon_rdp):
        with pytest.raises(UserError, match="wanted") as error:
            function(phases, delta)
        assert "\n" not in str(error.value)


# --- calibration and the budget ---


CALIBRATIONS = [
    (8.0, 1e-5, 128 / 42061, 6572), (3.0, 1e-5, 128 / 42061, 6572), (8.0, 1 / 420610, 128 / 42061, 6572),
    (0.1, 1e-5, 0.003, 6572), (0.01, 1e-5, 0.003, 500), (0.001, 1e-5, 0.003, 100), (40.0, 1e-5, 0.003, 6572),
    (1000.0, 1e-5, 0.01, 3000), (8.0, 1e-5, 1.0, 20), (8.0, 1e-5, 0.003, 1), (2.0, 1e-5, 0.999, 50),
    (5.0, 1e-13, 0.003, 1000),
]


@pytest.mark.parametrize("target, delta, q, steps", CALIBRATIONS)
def test_calibration(target, delta, q, steps):
    started = time.process_time()
    sigma = calibrate_sigma(target, delta, q, steps)
    assert time.process_time() - started < 5
    assert 0.995 * target <= accounting.epsilon_prv([Phase(sigma, q, steps)], delta) <= target
    # The smallest: what is a hundredth smaller does not do.
    assert accounting.epsilon_prv([Phase(sigma * 0.99, q, steps)], delta) > target


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.5, 8.0])
def test_calibration_for_a_million_steps(target):
    test_calibration(target, 1e-6, 0.001, 10**6)


def test_calibrated_noise_is_enough_by_an_independent_accountant():
    for target in (1.0, 8.0):
        sigma = calibrate_sigma(target, 1e-5, 0.003, 2000)
        assert pld_epsilons([Phase(sigma, 0.003, 2000)], [1e-5])[0] <= target
        # Negative control: 10 % less noise is not.
        assert pld_epsilons([Phase(0.9 * sigma, 0.003, 2000)], [1e-5])[0] > 1.001 * target


@pytest.mark.parametrize("target, participations", [(8.0, 20), (0.05, 1), (500.0, 3)])
def test_calibration_for_shuffling(target, participations):
    sigma = calibrate_sigma_shuffle(target, 1e-5, participations)
    assert 0.995 * target <= accounting.epsilon_shuffle(sigma, participations, 1e-5) <= target


@pytest.mark.parametrize(
    "arguments, words",
    [((target, 1e-5, 0.1, 10), "finite number above 0") for target in (0, -1, math.inf, math.nan)]
    + [((8, delta, 0.1, 10), "delta") for delta in (0, 1, math.nan)]
    + [((8, 1e-5, q, 10), "batch larger") for q in (1.5, math.nan)]
    + [
     ((8, 1e-5, 0, 10), "1 or more"), ((8, 1e-5, 0.1, 0), "1 or more"), ((8, 1e-5, 0.1, 2.5), "a whole number"),
     ((1e9, 1e-5, 0.1, 10), "next to no privacy"),
     ((1e-5, 1e-9, 0.5, 10**4), "no noise multiplier"), ((1.0, 1e-5, 1e-9, 100), "next to no privacy"),
    ],
)
def test_calibration_refused_in_words(arguments, words):
    with pytest.raises(UserError, match=words):
        calibrate_sigma(*arguments)
    with pytest.raises(UserError):
        calibrate_sigma_shuffle(-1, 1e-5, 3)


def steps_of(sigma: float, q: float):
    """What n steps add."""
    return lambda count: [Phase(sigma, q, count)]


@pytest.mark.parametrize(
    "spent", [[], [Phase(0.6, 0.003, 500)], [Phase(0.9, 0.01, 50), Phase(0.7, 0.003, 40)], [Phase(5.0, 1.0, 2)]]
)
def test_permitted_steps(spent):
    target, delta, q, sigma = 3.0, 1e-5, 0.003, 0.7
    count = accounting.permitted_steps(target, delta, spent, steps_of(sigma, q), 10**5)
    assert 0 < count < 10**5
    assert accounting.epsilon_prv([*spent, Phase(sigma, q, count)], delta) <= target
    assert accounting.epsilon_prv([*spent, Phase(sigma, q, count + 1)], delta) > target
    assert accounting.permitted_steps(target, delta, spent, steps_of(sigma, q), count + 1) == count
    assert accounting.permitted_steps(target, delta, spent, steps_of(sigma, q), count) == count
    assert accounting.permitted_steps(target, delta, spent, steps_of(sigma, q), 5) == 5


def test_permitted_steps_at_the_ends():
    assert accounting.permitted_steps(3.0, 1e-5, [Phase(0.6, 0.003, 9000)], steps_of(0.6, 0.003), 100) == 0
    assert accounting.permitted_steps(3.0, 1e-5, [], steps_of(0.0, 0.003), 100) == 0
    assert accounting.permitted_steps(3.0, 1e-5, [], steps_of(0.6, 0.003), 0) == 0
    assert accounting.permitted_steps(30.0, 1e-5, [], steps_of(1.0, 1.0), 10**6) == _largest_full(30.0, 1e-5)
    # What calibration gave for a number of steps permits them all.
    sigma = calibrate_sigma(3.0, 1e-5, 0.003, 700)
    assert accounting.permitted_steps(3.0, 1e-5, [], steps_of(sigma, 0.003), 700) == 700


def _largest_full(target: float, delta: float) -> int:
    return max(n for n in range(1, 200) if accounting.epsilon_gaussian(math.sqrt(n), delta) <= target)


def test_fast_enough_for_every_log_line():
    """What a run asks at each of 40 log lines: PRV and RDP at two deltas of a growing ledger; and Opacus's time."""
    started = time.process_time()
    for line in range(1, 41):
        for delta in (1.01e-5, 2.4e-6):
            phases = [Phase(0.61, 0.003, 164 * line)]
            accounting.epsilon_prv(phases, delta), accounting.epsilon_rdp(phases, delta)
    each = (time.process_time() - started) / 80
    started = time.process_time()
    opacus_prv([E2E], 1e-5)
    theirs = time.process_time() - started
    print(f"\nPRV and RDP of an E2E run, CPU time: {each * 1000:.0f} ms; Opacus's PRV alone {theirs * 1000:.0f} ms")
    assert each < 0.3
