"""The accountant against exact arithmetic at the corners of its domain: never below the truth, never without an answer.

delta is a decreasing function of epsilon, so a reported epsilon is sound where the exact delta there, or any lower
bound of it, is not above the run's delta. Rounding has no share in it: the accountant's own is on the safe side.
"""

import itertools
import math
import random
import signal
import warnings

import pytest
from mpmath import mp, mpf

from base.errors import UserError
from helpers import exact_accounting as exact
from helpers.calibration import calibrate_sigma
from privacy import accounting, sampled_gaussian
from privacy.accounting import Phase

SIGMAS = (1e-300, 1e-160, 1e-150, 1e-20, 1e-3, 0.01, 0.05, 0.1, 0.3, 1.0, 3.0, 30.0, 1e3, 1e8, 1e155, 1e300)
QS = (5e-324, 1e-300, 1e-20, 5e-17, 1e-9, 1e-4, 0.01, 0.5, 1 - 1e-9, 1 - 2**-53, 1.0)
STEPS = (1, 2, 1000, 10**6, 10**9, 10**15)
DELTAS = (1e-300, 1e-100, 1e-20, 1e-12, 1e-7, 1e-3, 0.3, 0.9, 1 - 1e-9, 1 - 2**-53)
DOMAIN = [(Phase(sigma, q, steps), delta) for sigma, q, steps, delta in itertools.product(SIGMAS, QS, STEPS, DELTAS)]
SECONDS = 20  # for an epsilon, beside other work on a slow machine; it takes 1.5 on a quiet one


class TooLong(Exception):
    pass


@pytest.fixture
def limit():
    """limit(seconds, function, *arguments): its value, or TooLong."""
    def stop(number: int, frame: object) -> None:
        raise TooLong

    def run(seconds: int, function, *arguments):
        signal.alarm(seconds)
        try:
            return function(*arguments)
        finally:
            signal.alarm(0)

    before = signal.signal(signal.SIGALRM, stop)
    yield run
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def easy(phases: list[Phase]) -> bool:
    """Whether full participation in every step has an epsilon that a float holds, by a wide margin."""
    return sum(phase.steps / phase.sigma / phase.sigma for phase in phases) < 1e300


def check(phases: list[Phase], delta: float) -> accounting.Bound:
    """An answer, no warning, and not below what one step, or the tests of exact_accounting, disclose."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound, rdp = accounting.epsilon_bound(phases, delta), accounting.epsilon_rdp(phases, delta)
    where = (phases, delta, bound)
    assert 0 <= bound.epsilon and rdp >= 0, where
    assert bound.epsilon < math.inf or not easy(phases), where
    if bound.epsilon > 1e9:  # exp(epsilon) has too many digits
        return bound
    triples = [(phase.sigma, phase.q, phase.steps) for phase in phases]
    with mp.workdps(exact.digits_for(delta)):
        epsilon = mpf(bound.epsilon)
        for removed in (True, False):
            for sigma, q, steps in triples:
                assert exact.one_step(sigma, q, epsilon, removed) <= delta, (where, removed)
                if len(triples) == 1 and 1 < steps and steps * q < 30:
                    assert exact.sum_of_draws(sigma, q, steps, epsilon, removed) <= delta, (where, removed)
            assert exact.largest_draw(triples, epsilon, removed) <= delta, (where, removed)
    return bound


# --- the whole domain ---


def test_corners_are_answered_in_time_and_never_below_the_truth(limit):
    for phase, delta in random.Random(1).sample(DOMAIN, 60):
        limit(SECONDS, accounting.epsilon_bound, [phase], delta)
        check([phase], delta)


@pytest.mark.slow
@pytest.mark.parametrize("sigma", SIGMAS)
def test_every_corner(limit, sigma):
    for phase, delta in DOMAIN:
        if phase.sigma == sigma:
            limit(SECONDS, accounting.epsilon_bound, [phase], delta)
            check([phase], delta)


@pytest.mark.slow
def test_random_places(limit):
    draw = random.Random(7)

    def size(low: float, high: float) -> float:
        return 10 ** draw.uniform(low, high)

    for _ in range(400):
        wide = draw.random() < 0.4
        phases = [Phase(size(-300, 300) if wide else size(-2, 2), min(1.0, size(-320 if wide else -15, 0.02)),
                        int(size(0, 9))) for _ in range(draw.choice([1, 1, 1, 2, 5]))]
        delta = size(-300 if wide else -15, -0.01)
        limit(SECONDS, accounting.epsilon_bound, phases, delta)
        check(phases, delta)


def test_noise_that_no_float_can_square(limit):
    """The command of the report: --noise_multiplier 1e-160, after one step."""
    for sigma in (5e-324, 1e-300, 1e-160):
        for q in (8 / 40, 1.0):
            assert limit(SECONDS, accounting.epsilon_bound, [Phase(sigma, q, 1)], 1e-5).epsilon == math.inf
            assert limit(SECONDS, accounting.epsilon_rdp, [Phase(sigma, q, 1)], 1e-5) == math.inf
    # What fits is finite: mu^2 / 2 and a little more.
    assert accounting.epsilon_prv([Phase(1e-153, 1.0, 1)], 1e-5) == pytest.approx(0.5e306)


def test_a_small_chance_of_a_draw_is_a_chance():
    """1 - (1 - q)^n is n q, not 0, for q below 2^-53: delta does not cover it, and what is drawn is seen."""
    for q, steps, delta in ((5e-17, 1000, 1e-15), (1e-17, 1, 1e-20), (1e-300, 10**9, 1e-300), (1e-30, 10**6, 1e-25)):
        assert check([Phase(0.01, q, steps)], delta).epsilon > 4000
        assert accounting.epsilon_bound([Phase(0.01, q, steps)], 1.01 * steps * q).epsilon == 0


def test_searches_end_in_time(limit):
    """Noise and steps for targets at the corners; what is found is within the target."""
    targets = (1e-300, 1e-3, 0.5, 8.0, 1e4, 1e300)
    for target, delta, q, steps in random.Random(3).sample(
            list(itertools.product(targets, DELTAS, QS, (1, 1000, 10**6, 10**15))), 25):
        try:
            sigma = limit(3 * SECONDS, calibrate_sigma, target, delta, q, steps)
            assert accounting.epsilon_prv([Phase(sigma, q, steps)], delta) <= target
        except UserError as error:
            assert "next to no privacy" in str(error) or "no noise multiplier" in str(error)
        count = limit(3 * SECONDS, accounting.permitted_steps, target, delta, [],
                          lambda count: [Phase(0.7, q, count)], steps)
        assert accounting.epsilon_prv([Phase(0.7, q, count)], delta) <= target


# --- closed forms and quadrature ---


def test_the_oracle_itself():
    """At q = 1 n steps are one Gaussian with sqrt(n) / sigma, in both directions; the tests stay below it."""
    with mp.workdps(30):
        for epsilon in (mpf(-1), mpf(0), mpf(1) / 3, mpf(4)):
            for removed in (True, False):
                for steps in (1, 2):
                    truth = exact.gaussian_delta(mp.sqrt(steps) / mpf(2), epsilon)
                    assert abs(exact.more_steps(2.0, 1.0, steps, epsilon, removed) - truth) < mpf(10) ** -25
                    assert 0 < exact.largest_draw([(2.0, 1.0, steps)], mpf(1), removed)
                    assert exact.largest_draw([(2.0, 1.0, steps)], epsilon, removed) <= truth
        # One step: the sum is all that there is to see, up to the thresholds tried.
        truth = exact.one_step(1.0, 0.2, mpf(1) / 2, True)
        assert truth / 2 < exact.sum_of_draws(1.0, 0.2, 1, mpf(1) / 2, True) <= truth


@pytest.mark.parametrize("sigma, q", [(0.3, 0.01), (1.0, 0.5), (5.0, 0.9), (0.7, 1e-6), (2.0, 1.0), (0.15, 1e-3)])
@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps_by_quadrature(sigma, q, steps):
    """Not below the truth in either direction; where PRV answers, above it by no more than its error terms, of which
    rounding is a large one at a delta of 1e-11."""
    for delta in (0.1, 1e-3, 1e-7, 1e-11) if steps == 1 else (1e-3, 1e-7):
        bound = accounting.epsilon_bound([Phase(sigma, q, steps)], delta)
        if bound.method == "sampling":
            continue
        slack = 0.0101 * max(1, accounting.epsilon_rdp([Phase(sigma, q, steps)], delta) / 16)
        with mp.workdps(25):
            exact_delta = [exact.more_steps(sigma, q, steps, mpf(bound.epsilon), removed) for removed in (True, False)]
            assert max(exact_delta) <= delta
            if bound.method in ("prv", "gaussian") and bound.epsilon > slack:
                assert exact.more_steps(sigma, q, steps, mpf(bound.epsilon - slack),
                                        True) >= (0.99 if delta > 1e-11 else 0.2) * delta


@pytest.mark.parametrize("steps, delta", [(10**4, 1e-9), (10**6, 1e-6), (10**7, 2.2e-8), (10**7, 2.4e-8),
                                          (10**7, 2.6e-8), (10**7, 2.8e-8), (10**8, 1e-6)])
def test_the_grid_of_many_steps(steps, delta):
    """The PRV bound where the composition is known: q = 1, mu = 3. Even without its error term it is not below the
    truth, for the rounding of the spectrum's power, which grows with the steps, is paid for in delta."""
    phases = (Phase(math.sqrt(steps) / 3, 1.0, steps),)
    span = 3 + sampled_gaussian.rdp_epsilon(phases, math.log(delta / 4000))
    spread = math.sqrt(steps * math.log(12000 / delta) / 2)
    error = max(0.01 * sampled_gaussian.rdp_epsilon(phases, math.log(delta)) / 16, 0.01,
                2 * span * spread / sampled_gaussian.MAX_POINTS)
    found = sampled_gaussian.prv_epsilon(phases, delta)
    # What rounding may take is at most half of delta.
    assert accounting.epsilon_gaussian(3.0, delta) <= found - error
    assert found <= accounting.epsilon_gaussian(3.0, 0.49 * delta) + 1.001 * error


def test_the_rounding_of_many_steps_is_paid_for(monkeypatch):
    """A transform that errs by 4 u (u = 2^-53), a shift of the distribution, 10^7 times: the bound without its error
    term still is not below the truth."""
    transform = sampled_gaussian.fft.rfft

    def adverse(values):
        spectrum = transform(values)
        spectrum[1:] += 4j * sampled_gaussian.UNIT
        return spectrum

    monkeypatch.setattr(sampled_gaussian.fft, "rfft", adverse)
    phases = (Phase(math.sqrt(10**7) / 3, 1.0, 10**7),)
    for delta in (8e-8, 9e-8, 1e-7, 1.1e-7, 1.2e-7):
        span = 3 + sampled_gaussian.rdp_epsilon(phases, math.log(delta / 4000))
        spread = math.sqrt(10**7 * math.log(12000 / delta) / 2)
        error = 2 * span * spread / sampled_gaussian.MAX_POINTS
        found = sampled_gaussian._on_a_grid(phases, delta, span, spread, error, removed=True) - error
        assert accounting.epsilon_gaussian(3.0, delta) <= found < math.inf


@pytest.mark.parametrize("sigma, q, steps, delta", [
    (30.0, 1e-5, 10**6, 1e-7), (300.0, 3e-5, 10**6, 1e-9), (3.0, 1e-6, 10**7, 1e-9), (0.8, 1e-6, 10**6, 1e-7),
    (1.0, 1e-8, 10**9, 1e-6), (0.5, 1e-12, 10**9, 1e-4), (0.05, 1e-8, 10**6, 1e-6), (1e-3, 1e-5, 10**6, 1e-9),
])
def test_a_million_steps_and_more(sigma, q, steps, delta):
    check([Phase(sigma, q, steps)], delta)


@pytest.mark.parametrize("sigma, q", [(0.1, 0.01), (0.3, 1e-12), (0.6, 0.003), (1.0, 0.999), (8.0, 0.5), (1e3, 1e-3)])
def test_rdp_of_one_step(sigma, q):
    """Equal to 50 digits' arithmetic, from above, however little a step discloses."""
    found = sampled_gaussian.rdp_per_step(sigma, q)
    with mp.workdps(45):
        for order in (1.001, 1.05, 1.5, 2.7, 10.9, 2, 3, 17, 63, 256):
            ours = found[list(sampled_gaussian.ORDERS).index(order)]
            truth = exact.moment(sigma, q, order) / (mpf(order) - 1)
            assert truth <= ours <= truth * (1 + mpf(3) / 10**10), (order, ours, truth)


@pytest.mark.parametrize("sigma, q", [(0.05, 0.01), (0.02, 0.9), (1e-4, 1e-9)])
def test_rdp_where_there_is_little_noise(sigma, q):
    """Broken orders then have a bound instead: above the truth, below full participation, close at orders near 1."""
    found = sampled_gaussian.rdp_per_step(sigma, q)
    with mp.workdps(30):
        for order, close in ((1.001, 1.1), (1.5, math.inf), (2, 1 + 1e-9), (17, 1 + 1e-9)):
            ours = found[list(sampled_gaussian.ORDERS).index(order)]
            truth = exact.moment(sigma, q, order) / (mpf(order) - 1)
            assert truth <= ours <= order / (2 * sigma**2) * (1 + 1e-9) and ours <= close * truth


def test_steps_that_disclose_next_to_nothing_add_up():
    """q = 1e-8 and 10^12 steps: each one's A - 1 is below the last digit of 1, all together are not."""
    phases = [Phase(1.0, 1e-8, 10**12)]
    with mp.workdps(40):
        at_two = 10**12 * exact.moment(1.0, 1e-8, 2)
    found = 10**12 * sampled_gaussian.rdp_per_step(1.0, 1e-8)[list(sampled_gaussian.ORDERS).index(2)]
    assert found == pytest.approx(float(at_two), rel=1e-9) and found > 1e-4
    # The limit is Gaussian with mu = q sqrt(n (e - 1)), to the accountant's looseness.
    limit = accounting.epsilon_gaussian(1e-8 * math.sqrt(10**12 * math.expm1(1)), 1e-5)
    assert limit < accounting.epsilon_prv(phases, 1e-5) < 10 * limit


@pytest.mark.parametrize("mu", [1e-300, 1e-12, 1e-5, 1e-3, 0.5, 30.0, 1e4, 1e12, 1e150])
@pytest.mark.parametrize("delta", [1e-300, 1e-12, 0.3, 0.5, 0.75, 1 - 1e-9, 1 - 2**-53])
def test_the_gaussian_near_both_ends_of_delta(mu, delta):
    epsilon = accounting.epsilon_gaussian(mu, delta)
    with mp.workdps(exact.digits_for(delta) + 320):
        assert exact.gaussian_delta(mpf(mu), mpf(epsilon)) <= delta
        if epsilon > 0:
            least = min(mpf(epsilon) * (1 - mpf(1) / 10**6), mpf(epsilon) - mpf(mu) / 10**6)
            assert exact.gaussian_delta(mpf(mu), least) > delta


# --- many phases ---


def test_beyond_the_most_phases_a_little_more_is_reported(monkeypatch):
    phases = [Phase(0.8 + 0.01 * k, 0.003 + 1e-5 * (k % 7), 20 + k) for k in range(40)]
    bound = accounting.epsilon_prv(phases, 1e-5)
    monkeypatch.setattr(accounting, "MOST_PHASES", 100)
    apart = accounting.epsilon_prv(phases, 1e-5)
    assert apart < bound < 1.05 * apart
    sigmas = [phase.sigma for phase in accounting.merge(phases)]
    monkeypatch.setattr(accounting, "MOST_PHASES", 8)
    merged = accounting.merge(phases)
    assert len(merged) <= 8 and sum(phase.steps for phase in merged) == sum(phase.steps for phase in phases)
    assert min(phase.sigma for phase in merged) <= min(sigmas)


def test_a_hundred_thousand_phases(limit):
    draw = random.Random(2)
    phases = [Phase(draw.uniform(0.5, 3), draw.uniform(1e-4, 0.01), 1) for _ in range(10**5)]
    bound = limit(SECONDS, accounting.epsilon_bound, phases, 1e-6)
    worst = accounting.epsilon_rdp([Phase(0.5, 0.01, 10**5)], 1e-6)
    assert 20 < bound.epsilon < worst  # 23 by RDP without any made one
