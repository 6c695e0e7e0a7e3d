"""What an attacker can do: against exact arithmetic, dp_accounting's profiles, riskcal and a Monte Carlo attack."""

import functools
import math
import time

import mpmath
import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from base.errors import UserError
from helpers.exact_accounting import one_step
from helpers.processes import ROOT
from privacy import accounting, attack_risk, loss_grid
from privacy.accounting import Phase
from privacy.attack_risk import ADDED, REMOVED, WORSE
from run.risk_words import percent, up

RATES = np.array([1e-6, 1e-4, 0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 0.999])
E2E = [Phase(0.6, 128 / 42061, 6572)]
MIXED = {
    "E2E command": E2E,
    "authors": [Phase(0.4717, 1024 / 304279, 891)],
    "three phases": [Phase(0.8, 0.02, 40), Phase(1.0, 0.05, 60), Phase(2.0, 1.0, 3)],
    "one step": [Phase(1.0, 0.3, 1)],
    "rare and large": [Phase(0.4, 0.01, 50)],
    "nearly all": [Phase(20.0, 0.9, 100)],
}


@functools.cache
def profiles(name: str):
    """dp_accounting's composed loss, an upper bound of delta."""
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    parts = [pld.from_gaussian_mechanism(phase.sigma, sampling_prob=phase.q).self_compose(phase.steps)
             for phase in MIXED[name]]
    return functools.reduce(lambda left, right: left.compose(right), parts)


SLOW = ("E2E command", "authors", "rare and large")  # dp_accounting takes up to half a minute for these
BY_NAME = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MIXED]


@pytest.mark.parametrize("name", [name for name in BY_NAME if name is not BY_NAME[1]])
def test_equals_dp_accounting_in_both_directions(name):
    """delta at many epsilons, of each direction alone, and the power that follows. Both are upper bounds, from other
    grids: the difference is what spreading adds. It adds at most FINENESS^2 / 4, 4e-4, to the relative variance of a
    step's loss, which changes a probability by half as much times the density of a normal, at the most 0.24: 5e-5.
    Where large losses are rare, most losses lie within a width of one value, and it is more."""
    most = 1e-3 if name == "rare and large" else 5e-5
    total, risk = profiles(name), attack_risk.attack_risk(MIXED[name])
    places = np.unique(np.linspace(len(risk.loss) // 2, np.searchsorted(risk.loss, 12) - 1, 60).astype(int))
    t = risk.loss[places]
    theirs = {REMOVED: total._pmf_remove, ADDED: (total._pmf_remove if total._symmetric else total._pmf_add)}
    for direction, pmf in theirs.items():
        delta = np.array(pmf.get_delta_for_epsilon(t))
        assert np.all(np.abs(risk.delta(direction)[places] - delta) < most)
    # Power by their numbers: delta below epsilon 0 is that of the other direction, turned.
    t = np.linspace(-12, 12, 2401)
    half, delta = t[1200:], {}
    for direction, other in ((REMOVED, ADDED), (ADDED, REMOVED)):
        turned = -np.expm1(-half) + np.exp(-half) * np.array(theirs[other].get_delta_for_epsilon(half))
        delta[direction] = np.append(turned[:0:-1], theirs[direction].get_delta_for_epsilon(half))
    delta[WORSE] = np.maximum(delta[REMOVED], delta[ADDED])
    for direction, found in delta.items():
        power = np.minimum(1, [np.min(found + np.exp(t) * rate) for rate in RATES])
        # Between steps of 0.01 in t theirs is a chord: too high by 0.01^2 / 8 of the slope, or half a step of it where
        # the density of the loss is that of a point (`added`, near its largest loss).
        assert np.all(risk.power(RATES, direction) < power + most) and np.all(
            risk.power(RATES, direction) > power - most - 1e-4), direction
    assert risk.power(RATES).max() <= 1 and np.all(np.diff(risk.power(RATES)) > 0)
    assert np.all(risk.power(RATES) >= np.maximum(risk.power(RATES, REMOVED), risk.power(RATES, ADDED)) - 1e-12)


@pytest.mark.parametrize("name", BY_NAME)
def test_equals_riskcal(name):
    """The same figures by riskcal 1.5.1 from dp_accounting's losses. Its curve pairs the losses of the two directions,
    which dp_accounting rounds each on its own, and comes out too low where false positives are few and steps are many
    (at the E2E command's 1e-4 below 1e-4 itself, which flipping a coin attains): there it is no more than a lower
    bound."""
    analysis = pytest.importorskip("riskcal.analysis")
    total, risk = profiles(name), attack_risk.attack_risk(MIXED[name])
    assert risk.advantage == pytest.approx(analysis.get_advantage_from_pld(total), abs=5e-5)
    for prior in (0.1, 0.5, 0.8):
        assert risk.guess(prior) == pytest.approx(1 - analysis.get_bayes_risk_from_pld(total, prior), abs=5e-5)
    theirs = 1 - analysis.get_beta_from_pld(total, RATES)
    assert np.all(risk.power(RATES) > theirs - 1e-5)
    assert np.all(risk.power(RATES)[3:] < theirs[3:] + 0.0015)
    for baseline in (0.01, 0.1):  # reconstruction is bounded by the power where false positives are as many
        beta = analysis.get_beta_from_pld(total, baseline)
        assert risk.reconstruction(baseline) == pytest.approx(1 - beta, abs=2e-3)


def test_the_anchor_and_its_time():
    """At epsilon 5.43, 1 % of false positives find at most 8.7 % of the members; epsilon alone would permit 99.6 %."""
    attack_risk._attack_risk.cache_clear()
    started = time.process_time()
    found = attack_risk.figures(E2E, 1e-5)
    assert time.process_time() - started < 3
    assert found["tpr"]["0.01"] == pytest.approx(0.0869, abs=1e-4)
    permitted = float(attack_risk.permitted_by_epsilon(5.4253, 1e-5, np.array([0.01]))[0])
    assert 0.9956 < permitted < 0.9957
    # and the documents say what the terminal prints
    tpr = [percent(found["tpr"][rate]) for rate in ("0.001", "0.01", "0.05")]
    page = (ROOT / "docs" / "risk.md").read_text()
    others = (up(found["advantage"]), percent(found["guess"]), up(found["posterior"]))
    for words in (f"| {tpr[1]} |", f"| {tpr[0]}, {tpr[2]} |", *(f"| {figure} |" for figure in others)):
        assert words in page, words
    for name in ("PRIVACY.md", "README.md"):
        assert f"finds at most {tpr[1]} of" in (text := " ".join((ROOT / name).read_text().split())) or (
            f"find at most {tpr[1]} of" in text), name


@pytest.mark.parametrize("phases", [
    [Phase(1.0, 1.0, 1)], [Phase(2.0, 1.0, 20)], [Phase(3.0, 1.0, 2), Phase(5.0, 1.0, 7)], [Phase(100.0, 1.0, 1)],
    [Phase(0.3, 1.0, 1)]])
def test_full_participation_is_exact(phases):
    """Power Phi(Phi^-1(a) + mu), advantage 2 Phi(mu/2) - 1 (Dong et al. 2022): the Gaussian's, to rounding."""
    mu, risk = math.sqrt(sum(phase.steps / phase.sigma**2 for phase in phases)), attack_risk.attack_risk(phases)
    exact = ndtr(ndtri(RATES) + mu)
    for direction in (WORSE, REMOVED, ADDED):
        found = risk.power(RATES, direction)
        assert np.all(found >= np.minimum(1, exact)) and found == pytest.approx(exact, abs=1e-11)
    assert 0 <= risk.advantage - (2 * ndtr(mu / 2) - 1) < 1e-11
    for prior in (0.2, 0.5, 0.9):
        t = math.log((1 - prior) / prior)
        best = 1 - prior + prior * (ndtr(mu / 2 - t / mu) - math.exp(t) * ndtr(-mu / 2 - t / mu))
        assert -1e-15 <= risk.guess(prior) - best < 1e-5  # a chord of the grid
    # A member's loss is N(mu^2/2, mu^2): above y in one case of 1000.
    y = mu * mu / 2 + mu * ndtri(0.999)
    assert risk.posterior(0.5, 0.001) >= 1 / (1 + math.exp(-y))
    assert risk.posterior(0.5, 0.001) <= 1 / (1 + math.exp(-(y + 0.8 * mu + 0.02)))


@pytest.mark.parametrize("sigma, q", [(1.0, 0.3), (0.6, 0.003), (0.25, 0.01), (5.0, 1e-4), (20.0, 0.9), (0.05, 0.5)])
def test_one_step_is_never_below_exact_arithmetic(sigma, q):
    """A grid's points are exact but for rounding, upwards: of both directions, at losses of either sign."""
    risk = attack_risk.attack_risk([Phase(sigma, q, 1)])
    with mpmath.workdps(40):
        for index in np.linspace(1, len(risk.loss) - 2, 41).astype(int):
            t = float(risk.loss[index])
            for direction in (REMOVED, ADDED):
                exact = float(one_step(sigma, q, mpmath.mpf(t), direction == REMOVED))
                assert exact <= risk.delta(direction)[index] <= exact + 1e-9, (t, direction)


@pytest.mark.parametrize("name", MIXED)
def test_the_worse_direction_bounds_both(name):
    """And is the concave hull of both curves: a line of slope 1 beyond which no point of either lies."""
    risk = attack_risk.attack_risk(MIXED[name])
    worse, removed, added = (risk.power(RATES, way) for way in (WORSE, REMOVED, ADDED))
    assert np.all(worse >= np.maximum(removed, added) - 1e-12) and np.all(worse <= RATES + risk.advantage + 1e-12)
    assert np.all(np.diff(worse) / np.diff(RATES) >= 0) and np.all(np.diff(np.diff(worse) / np.diff(RATES)) <= 1e-6)


@pytest.mark.parametrize("direction", [REMOVED, ADDED])
def test_mass_moves_up_alone(direction):
    """The masses of a step on a coarse grid: all of it is there, and P's share of exp(-Y) is what the interval held;
    what is above the grid is infinite, what is below goes to its first point."""
    phase, t = Phase(0.7, 0.2, 1), np.arange(-20, 21) * 0.05
    mass, infinite, moved = loss_grid.step_masses(phase, t, direction)
    assert mass.sum() + infinite == pytest.approx(1, abs=1e-14) and mass.min() >= 0 and 0 < moved < 1e-12
    better_mass, better_infinite, _ = loss_grid.step_masses(phase, np.arange(-200, 201) * 0.005, direction)
    fine = np.arange(-200, 200) * 0.005
    # E[(1 - exp(t - y))_+] of the coarse masses is not below that of the fine ones, and equal at the coarse points
    for place in (-0.1, 0.0, 0.2, 0.5):
        coarse = float(mass @ np.maximum(0, -np.expm1(place - t[:-1]))) + infinite
        better = float(better_mass @ np.maximum(0, -np.expm1(place - fine))) + better_infinite
        assert coarse >= better - 1e-12
        assert coarse == pytest.approx(better, abs=0.02)


@pytest.mark.parametrize("name", ["three phases", "rare and large"])
def test_what_is_above_the_grid_counts_as_found(monkeypatch, name):
    """A grid that ends within the losses: the bound is looser and still one."""
    whole = attack_risk.attack_risk(MIXED[name])
    monkeypatch.setattr(loss_grid, "_span", lambda phases: 3.0)
    monkeypatch.setattr(attack_risk, "_gaussian", lambda mu, t: np.ones_like(t))
    attack_risk._attack_risk.cache_clear()
    short = attack_risk.attack_risk(MIXED[name])
    attack_risk._attack_risk.cache_clear()
    assert short.loss[-1] == 3
    for direction in (REMOVED, ADDED):
        at = np.interp(np.exp(short.loss), np.exp(whole.loss), whole.delta(direction))
        assert np.all(short.delta(direction) >= at - 1e-4) and short.delta(direction)[-1] > 1e-3


def draw(phases: list[Phase], member: bool, trials: int, generator: np.random.Generator, noise: float = 1.0):
    """(trials,) log-likelihood ratios P to Q of an attacker who sees each step's noisy sum. noise: the factor of sigma
    by which the run that is attacked falls short."""
    total = np.zeros(trials)
    for phase in phases:
        for _ in range(phase.steps):
            seen = noise * phase.sigma * generator.standard_normal(trials)
            if member:
                seen += generator.random(trials) < phase.q
            total += np.log1p(phase.q * np.expm1((seen - 0.5) / phase.sigma**2))
    return total


PHASES = [Phase(0.7, 0.1, 20), Phase(1.5, 0.3, 10), Phase(4.0, 1.0, 5)]


@pytest.mark.parametrize("noise, exceeds", [(1.0, False), (0.85, True)])
def test_a_monte_carlo_attack(noise, exceeds):
    """The best attack, drawn: it attains the bound to its standard error, and does not pass it; with 15 % too little
    noise it does. Thresholds are taken from one half of the non-members and tried on the other."""
    generator, trials = np.random.default_rng(0), 200_000
    absent, tried = draw(PHASES, False, trials, generator, noise), draw(PHASES, False, trials, generator, noise)
    present = draw(PHASES, True, trials, generator, noise)
    risk, beyond = attack_risk.attack_risk(PHASES), []
    for direction in (REMOVED, ADDED):
        sign = 1 if direction == REMOVED else -1
        for rate in (0.001, 0.01, 0.05, 0.2, 0.5):
            null, other = (tried, present) if direction == REMOVED else (present, tried)
            chosen = absent if direction == REMOVED else draw(PHASES, True, trials, generator, noise)
            threshold = np.quantile(sign * chosen, 1 - rate)
            false, true = np.mean(sign * null > threshold), np.mean(sign * other > threshold)
            bound = float(risk.power(false, direction))
            error = 4 * math.sqrt(true * (1 - true) / trials) + 8 * math.sqrt(false / trials) * (bound / false) ** 0.5
            beyond.append(true > bound + error)
            if not exceeds:
                assert bound - error < true < bound + error, (direction, rate, true, bound)
    assert any(beyond) == exceeds


def test_corners():
    nothing = attack_risk.attack_risk([])
    assert nothing.advantage == pytest.approx(0, abs=1e-11) and nothing.power(RATES) == pytest.approx(RATES, abs=1e-11)
    assert nothing.guess(0.3) == pytest.approx(0.7)
    bare = attack_risk.attack_risk([Phase(0.0, 0.1, 3)])
    assert bare.advantage == 1 and np.all(bare.power(RATES) == 1) and bare.posterior(0.5, 1e-5) == 1
    assert attack_risk.attack_risk([Phase(1e-160, 0.3, 10)]).advantage == pytest.approx(1 - 0.7**10)  # whether drawn
    whole = attack_risk.attack_risk([Phase(0.8, 0.02, 80), Phase(1.0, 0.1, 5)])
    split = attack_risk.attack_risk([Phase(0.8, 0.02, 30), Phase(1.0, 0.1, 5), Phase(0.8, 0.02, 50)])
    assert np.array_equal(whole.power(RATES), split.power(RATES))
    for phases in ([Phase(1e-5, 0.1, 100)], [Phase(1e6, 1e-9, 1)], [Phase(3, 1e-6, 10**9)], [Phase(1, 0.5, 10**15)],
                   [Phase(0.5 + i / 100, 0.01, 100) for i in range(40)]):
        started, risk = time.process_time(), attack_risk.attack_risk(phases)
        assert time.process_time() - started < 20 and 0 < risk.advantage <= 1
        assert np.all(risk.power(RATES) >= RATES) and np.all(np.diff(risk.power(RATES)) >= 0)


@pytest.mark.parametrize("prior", [0, 1, -0.1, 1.5, math.nan])
def test_a_prior_is_between_0_and_1(prior):
    with pytest.raises(UserError, match="prior"):
        attack_risk.attack_risk(E2E).guess(prior)


@pytest.mark.parametrize("q, uses", [(128 / 42061, 6572), (0.1, 50), (1.0, 20)])
@pytest.mark.parametrize("target", [0.02, 0.3])
def test_calibration_for_an_advantage(target, q, uses):
    started = time.process_time()
    sigma = attack_risk.sigma_for(target, lambda sigma: [Phase(sigma, q, uses)], "these steps")
    assert time.process_time() - started < 15
    assert 0.995 * target <= attack_risk.advantage([Phase(sigma, q, uses)]) <= target
    if q == 1:
        assert 2 * ndtr(math.sqrt(uses) / sigma / 2) - 1 == pytest.approx(target, rel=0.003)


def test_permitted_steps_of_an_advantage():
    def more(count: int) -> list[Phase]:
        return [Phase(1.0, 0.02, count)]

    spent = [Phase(0.8, 0.02, 40)]
    count = attack_risk.permitted_steps(0.2, spent, more, 5000)
    assert 0 < count < 5000
    assert attack_risk.advantage([*spent, Phase(1.0, 0.02, count)]) <= 0.2
    assert attack_risk.advantage([*spent, Phase(1.0, 0.02, count + 1)]) > 0.2
    assert attack_risk.permitted_steps(0.01, spent, more, 5000) == 0
    for target in (0, 1, math.nan):
        with pytest.raises(UserError, match="target advantage"):
            attack_risk.permitted_steps(target, spent, more, 5)


def test_the_quick_bound_is_one():
    for phases in (*MIXED.values(), [Phase(50.0, 0.01, 100)]):
        merged = accounting.merge(phases)
        assert attack_risk._quick(merged) >= attack_risk.advantage(phases) - 1e-9
