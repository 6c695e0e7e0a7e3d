"""The bounds of an audit against brute force, quadrature and simulation."""

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import binom, norm

from base.errors import UserError
from privacy import auditing
from privacy.accounting import epsilon_gaussian
from privacy.auditing import (
    Evidence,
    audit,
    gaussian_lower_bound,
    gaussian_p_value,
    lower_bound,
    numbers_of_guesses,
    p_value,
    sampled_gaussian_llr,
)

# ------------------------------------------------------------------ the bound


def exact_p_value(m: int, guesses: int, right: int, odds: Fraction, delta: Fraction) -> Fraction:
    """Theorem 5.2 of Steinke et al. (2023) in whole numbers; odds = exp(epsilon)."""
    accuracy = odds / (1 + odds)
    mass = [math.comb(guesses, k) * accuracy**k * (1 - accuracy) ** (guesses - k) for k in range(guesses + 1)]
    alpha = max((sum(mass[right - i:right]) / i for i in range(1, right + 1)), default=Fraction(0))
    return min(Fraction(1), sum(mass[right:]) + 2 * m * delta * alpha)


@pytest.mark.parametrize("m, guesses", [(1, 1), (20, 7), (50, 50), (400, 40)])
@pytest.mark.parametrize("delta", ["0.00001", "0.003"])
def test_p_value_is_the_theorem(m, guesses, delta):
    for right in range(guesses + 1):
        for odds in ("1", "1.5", "4", "30"):
            exact = float(exact_p_value(m, guesses, right, Fraction(odds), Fraction(delta)))
            assert p_value(m, guesses, right, math.log(float(odds)), float(delta)) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("guesses, right", [(1000, 620), (1000, 999), (5000, 2501), (5000, 4400)])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 2.0, 6.0])
def test_the_terms_left_out_are_nothing(guesses, right, epsilon):
    """All v terms of the maximum, by logarithms of factorials."""
    accuracy = 1 / (1 + math.exp(-epsilon))
    k = np.arange(guesses + 1)
    log_mass = [math.lgamma(guesses + 1) - math.lgamma(i + 1) - math.lgamma(guesses - i + 1) for i in k]
    mass = np.exp(log_mass + k * math.log(accuracy) + (guesses - k) * math.log1p(-accuracy))
    alpha = (np.cumsum(mass[:right][::-1]) / np.arange(1, right + 1)).max()
    expected = min(1.0, mass[right:].sum() + 2 * 10**5 * 1e-6 * alpha)
    assert p_value(10**5, guesses, right, epsilon, 1e-6) == pytest.approx(expected, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("guesses, right, delta", [(100, 70, 1e-5), (100, 100, 1e-3), (2000, 1500, 1e-4),
                                                   (30, 30, 1e-9)])
def test_the_bound_is_the_last_epsilon_refuted(guesses, right, delta):
    bound = lower_bound(1000, guesses, right, delta, 0.05)
    assert bound > 0
    below, above = np.linspace(0, bound, 40), bound + np.linspace(1.1 * auditing.TOLERANCE, 3, 40)
    assert max(p_value(1000, guesses, right, epsilon, delta) for epsilon in below) <= 0.05
    assert min(p_value(1000, guesses, right, epsilon, delta) for epsilon in above) > 0.05
    assert lower_bound(1000, guesses, guesses // 2, delta, 0.05) == 0


def randomised_response(epsilon: float, delta: float, m: int, draw: np.random.Generator):
    """(scores, coins): each coin is told outright with probability delta, else with accuracy e^eps / (1 + e^eps).
    What is told scores +-2, the rest +-1, times a random size below 1.1, so that different numbers of guesses are
    different sets."""
    coins = draw.random(m) < 0.5
    told = draw.random(m) < delta
    said = np.where(told | (draw.random(m) < 1 / (1 + math.exp(-epsilon))), coins, ~coins)
    return (2 * said - 1) * np.where(told, 2, 1) * draw.uniform(1, 1.1, m), coins


@pytest.fixture
def remembered(monkeypatch):
    """The bounds remember their answers: thousands of simulated audits ask for the same few."""
    monkeypatch.setattr(auditing, "lower_bound", functools.cache(lower_bound))
    monkeypatch.setattr(auditing, "gaussian_lower_bound", functools.cache(gaussian_lower_bound))


def share_above(truth: float, epsilon: float, delta: float, claimed_delta: float, m: int, runs: int, **options):
    """Share of audits of randomised response at (epsilon, delta) whose bound at claimed_delta is above `truth`."""
    draw = np.random.default_rng(1)
    found = [audit(*randomised_response(epsilon, delta, m, draw), claimed_delta, two_sided=True, **options).epsilon
             for _ in range(runs)]
    return float(np.mean(np.array(found) > truth))


RUNS = 2000
SLACK = 3.5 * math.sqrt(0.05 * 0.95 / RUNS)  # of a share of 0.05: below it but for one time in 4,000


@pytest.mark.parametrize("epsilon, delta", [(0.5, 1e-9), (1.0, 1e-9), (3.0, 1e-9), (1.0, 0.004), (3.0, 0.01)])
def test_randomised_response_is_seldom_refuted(remembered, epsilon, delta):
    assert share_above(epsilon, epsilon, delta, delta, 256, RUNS) <= 0.05 + SLACK


def test_simulated_audits_can_refute(remembered):
    """Negative controls: a larger epsilon than claimed, a delta left out, numbers of guesses tried and not paid for."""
    assert share_above(1.0, 1.8, 1e-9, 1e-9, 256, 300) > 0.9
    assert share_above(1.0, 1.0, 0.15, 1e-9, 256, 300) > 0.5  # and with the delta that it has:
    assert share_above(1.0, 1.0, 0.15, 0.15, 256, 300) <= 0.05
    counts = numbers_of_guesses(256)
    unpaid = share_above(1.0, 1.0, 1e-9, 1e-9, 256, RUNS, counts=counts, confidence=1 - 0.05 * len(counts))
    assert unpaid > 0.05 + SLACK


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0])
def test_the_bound_is_tight_for_randomised_response(epsilon):
    """With 20,000 guesses, three deviations of the share of right ones are 0.03 to 0.05 of epsilon."""
    bound = audit(*randomised_response(epsilon, 0, 20000, np.random.default_rng(2)), 1e-9, True, counts=[20000]).epsilon
    assert 0.9 * epsilon < bound < epsilon + 0.05


# ------------------------------------------------------------------ the Gaussian bound


def exact_gaussian_p_value(m: int, guesses: int, right: int, mu: float) -> float:
    """By quadrature over the density of the threshold, the (guesses + 1)-th largest of m; each guess is right or wrong
    with the folded densities' own masses above it."""
    def integrand(t: float) -> float:
        good, bad = math.erfc((t - mu / 2) / math.sqrt(2)) / 2, math.erfc((t + mu / 2) / math.sqrt(2)) / 2
        density = (math.exp(-((t - mu / 2) ** 2) / 2) + math.exp(-((t + mu / 2) ** 2) / 2)) / math.sqrt(2 * math.pi)
        ways = math.exp(math.lgamma(m + 1) - math.lgamma(guesses + 1) - math.lgamma(m - guesses))
        hits = sum(math.comb(guesses, k) * good**k * bad ** (guesses - k) for k in range(right, guesses + 1))
        return ways * hits * density * (1 - good - bad) ** (m - guesses - 1)

    return quad(integrand, 0, mu / 2 + 12, limit=200, epsabs=1e-9)[0]


@pytest.mark.parametrize("m, guesses", [(2, 1), (20, 7), (50, 49), (300, 30)])
@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0, 3.0])
def test_gaussian_p_value_is_an_integral(m, guesses, mu):
    """Never below it, and above by what a step of the sum takes too much: a thousandth part of what the accuracy of a
    guess changes over all thresholds."""
    for right in sorted({1, guesses // 2, 3 * guesses // 4, guesses}):
        exact, found = exact_gaussian_p_value(m, guesses, right, mu), gaussian_p_value(m, guesses, right, mu)
        assert exact - 1e-8 <= found <= exact + 0.02 * min(1, exact + 0.05)


def test_all_guesses_are_a_binomial():
    for right in range(41):
        assert gaussian_p_value(40, 40, right, 0.8) == pytest.approx(binom.sf(right - 1, 40, norm.cdf(0.4)), abs=1e-12)


@pytest.mark.parametrize("m, guesses, right", [(100, 100, 70), (100, 25, 24), (2000, 125, 110), (10**6, 3200, 2600)])
def test_the_gaussian_bound_is_the_last_mu_refuted(m, guesses, right):
    bound = gaussian_lower_bound(m, guesses, right, 0.05)
    assert bound > 0
    below, above = np.linspace(0, bound, 40), bound + np.linspace(1.1 * auditing.TOLERANCE, 3, 40)
    assert max(gaussian_p_value(m, guesses, right, mu) for mu in below) <= 0.05
    assert min(gaussian_p_value(m, guesses, right, mu) for mu in above) > 0.05
    assert gaussian_lower_bound(m, guesses, guesses // 2, 0.05) == 0


def gaussian_views(mu: float, m: int, draw: np.random.Generator):
    """(scores, coins) of the Gaussian mechanism itself: N(0, 1) or N(mu, 1)."""
    coins = draw.random(m) < 0.5
    return draw.normal(size=m) + mu * coins, coins


def views_of_one_strength(mu: float, m: int, draw: np.random.Generator):
    """(scores, coins): each canary alone has the view of a Gaussian mechanism, but all have one and the same strength
    a = |view - mu/2|, and so the same accuracy 1 / (1 + exp(-mu a)). The assumption of independence does not hold."""
    coins = draw.random(m) < 0.5
    a = abs(draw.normal(mu / 2))
    said = np.where(draw.random(m) < 1 / (1 + math.exp(-mu * a)), coins, ~coins)
    return (2 * said - 1) * draw.uniform(1, 1.1, m), coins


def gaussian_share_above(views, mu: float, claimed: float, m: int, runs: int, two_sided: bool = True, **options):
    """(share of audits whose mu is above `claimed`, share whose bound of 2023 is above the claimed epsilon)."""
    draw, delta = np.random.default_rng(4), 1e-5
    found = [audit(*views(mu, m, draw), delta, two_sided, **options) for _ in range(runs)]
    above = [one.best_gaussian.mu > claimed for one in found]
    return np.mean(above), np.mean([one.epsilon > epsilon_gaussian(claimed, delta) for one in found])


@pytest.mark.parametrize("mu, m, two_sided", [(0.0, 256, True), (0.4, 256, True), (1.0, 1024, True),
                                              (1.0, 256, False), (2.5, 256, True)])
def test_gaussian_views_are_seldom_refuted(remembered, mu, m, two_sided):
    shares = gaussian_share_above(gaussian_views, mu, mu, m, RUNS, two_sided)
    assert max(shares) <= 0.05 + SLACK


def test_the_gaussian_bound_can_refute(remembered):
    """Negative controls: a larger mu than claimed, numbers of guesses tried and not paid for, dependent canaries; the
    bound of 2023 holds for these, too."""
    assert gaussian_share_above(gaussian_views, 1.3, 1.0, 1024, 300)[0] > 0.9
    counts = numbers_of_guesses(256)
    unpaid = gaussian_share_above(gaussian_views, 1.0, 1.0, 256, RUNS, counts=counts, confidence=1 - 0.05 * len(counts))
    assert unpaid[0] > 0.05 + SLACK
    dependent = gaussian_share_above(views_of_one_strength, 1.0, 1.0, 1024, RUNS)
    assert dependent[0] > 0.2 and dependent[1] <= 0.05 + SLACK


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.0])
def test_the_gaussian_bound_is_tight(mu):
    """20,000 canaries, half of the guesses made: three deviations of a guess's accuracy are below 0.03 of mu or so."""
    scores, coins = gaussian_views(mu, 20000, np.random.default_rng(5))
    assert 0.85 * mu < audit(scores, coins, 1e-5, True, counts=[10000]).best_gaussian.mu < mu + 0.01


@pytest.mark.parametrize("two_sided", [False, True])
def test_guesses_are_those_of_a_plain_loop(two_sided):
    draw = np.random.default_rng(3)
    scores = draw.normal(size=101).round(1)  # rounded: there are ties
    coins = draw.random(101) < 1 / (1 + np.exp(-4 * scores))
    result = audit(scores, coins, 1e-5, two_sided)
    ranked = sorted(range(101), key=lambda canary: (-scores[canary], canary))
    assert [one.made for one in result.tried] == [101, 25]
    for one in result.tried:
        low = one.made // 2 if two_sided else 0
        right = sum(coins[canary] for canary in ranked[:one.made - low])
        right += sum(not coins[canary] for canary in ranked[101 - low:])
        assert one.right == right and one.epsilon == lower_bound(101, one.made, right, 1e-5, 0.05 / 2)
        assert one.mu == gaussian_lower_bound(101, one.made, right, 0.05 / 2)
        assert one.epsilon_gaussian == epsilon_gaussian(one.mu, 1e-5)
    assert max(one.epsilon for one in result.tried) > 0 and max(one.mu for one in result.tried) > 0
    assert result.best in result.tried and result.epsilon == max(one.epsilon for one in result.tried)
    assert result.best_gaussian.mu == max(one.mu for one in result.tried)


def test_what_no_audit_takes():
    with pytest.raises(UserError, match="delta 0"):
        audit(np.zeros(20), np.ones(20, bool), 0.0, True)
    with pytest.raises(ValueError, match="finite"):
        audit(np.array([math.nan] * 20), np.ones(20, bool), 1e-5, True)


@pytest.mark.parametrize("q, sigma, size", [(0.003, 0.6, 1.0), (0.3, 2.0, 0.25), (1.0, 1.0, 1.0), (0.5, 0.5, 10.0)])
def test_the_score_is_the_log_likelihood_ratio(q, sigma, size):
    x = np.linspace(-3, 3, 25)
    expected = np.log((1 - q) * norm.pdf(x, 0, sigma) + q * norm.pdf(x, size, sigma)) - norm.logpdf(x, 0, sigma)
    assert np.allclose(sampled_gaussian_llr(x, q, sigma, size), expected, rtol=1e-9, atol=1e-12)
    assert np.isfinite(sampled_gaussian_llr(np.array([-1e6, 1e6]), q, sigma, size)).all()


def test_evidence_under_random_allocation():
    """Whole epochs and one under way, against the densities themselves: a canary is in one step of an epoch, each
    equally likely, those that were not yet taken included."""
    draw = np.random.default_rng(3)
    t, sigma, size, members = 4, 0.8, 0.9, np.array([0, 2, 1])
    x = draw.normal(size=(t + 2, 3))
    evidence = Evidence(3, 0.25, sigma, t)
    for step in x:
        evidence.add(members, step, size)

    def ratio(epoch: np.ndarray) -> np.ndarray:
        likely = [np.prod([norm.pdf(row, size * (place == i), sigma) for i, row in enumerate(epoch)], axis=0)
                  for place in range(t)]
        return np.mean(likely, axis=0) / np.prod(norm.pdf(epoch, 0, sigma), axis=0)

    expected = np.empty(3)
    expected[members] = np.log(ratio(x[:t])) + np.log(ratio(x[t:]))
    assert np.allclose(evidence.scores, expected, rtol=1e-12)
