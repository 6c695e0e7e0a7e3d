"""Random allocation's price: against closed forms, quadrature, Monte Carlo, and the accountant of its authors."""

import math

import numpy as np
import pytest
from scipy.special import ndtr

from helpers.processes import ROOT
from privacy import accounting, loss_grid
from privacy.accounting import epsilon_gaussian
from privacy.allocation import Allocated, Ratio
from privacy.sampled_gaussian import Phase


def epsilon(sigma: float, t: int, steps: int, delta: float) -> float:
    whole, rest = divmod(steps, t)
    part = [Allocated(sigma, t, rest, 1)] if rest else []
    return accounting.epsilon_prv([Allocated(sigma, t, t, whole), *part], delta)


def delta_at(sigma: float, t: int, taken: int, at: float, removed: bool) -> float:
    """delta at epsilon `at` of one epoch in one direction."""
    phases = (Allocated(sigma, t, taken, 1),)
    loss = loss_grid.grid(phases)
    loss = np.arange(-2000, 2001) * (at / math.ceil(at / (loss[-1] / 2000)))  # `at` is one of the points
    found = loss_grid.deltas(phases, loss, loss_grid.REMOVED if removed else loss_grid.ADDED)
    return float(found[np.argmin(np.abs(loss - at))])


def price(sigma: float, x: np.ndarray) -> np.ndarray:
    """E[(Y - x)_+] of a lognormal Y of mean 1 with deviation 1 / sigma (Black and Scholes), for any x."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.log(np.maximum(x, 1e-300)) * sigma
    inside = ndtr(0.5 / sigma - z) - x * ndtr(-0.5 / sigma - z)
    return np.where(x <= 0, 1 - x, inside)


def exact_of_two(sigma: float, epsilon: float) -> tuple[float, float]:
    """delta of one epoch of two steps, removed and added: one Y by quadrature, the other in closed form."""
    z = np.linspace(-12, 12 + 1 / sigma, 400_001)
    weight = np.exp(-z * z / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    y = np.exp(z / sigma - 0.5 / sigma**2)
    removed = float(weight @ price(sigma, 2 * math.exp(epsilon) - y)) / 2
    # E[(1 - e S)_+] = E[(e S - 1)_+] - e + 1, with e S - 1 = e (Y_1 + Y_2 - 2 / e) / 2
    e = math.exp(epsilon)
    added = e / 2 * float(weight @ price(sigma, 2 / e - y)) - e + 1
    return removed, added


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("epochs", [1, 7])
def test_an_epoch_of_one_step_is_the_gaussian_mechanism(sigma, epochs):
    true = epsilon_gaussian(math.sqrt(epochs) / sigma, 1e-5)
    assert true <= epsilon(sigma, 1, epochs, 1e-5) <= true * 1.005


@pytest.mark.parametrize("sigma, at", [(0.5, 3.0), (0.8, 1.0), (2.0, 0.2)])
def test_two_steps_by_quadrature(sigma, at):
    removed, added = exact_of_two(sigma, at)
    assert 1e-7 < added <= removed
    # the epsilon of the worse direction's exact delta is the one that delta was computed for
    assert at <= epsilon(sigma, 2, 2, removed) <= at * 1.005 + 1e-4
    for direction, exact in ((True, removed), (False, added)):
        assert exact * (1 - 1e-9) <= delta_at(sigma, 2, 2, at, direction) <= exact * 1.02


def sampled_deltas(sigma: float, t: int, steps: int, at: float, count: int) -> dict[bool, tuple[float, float]]:
    """removed -> (delta, its standard error) by drawing S, from P where the unit is removed and from Q else."""
    generator = np.random.default_rng(5)
    y = np.exp(generator.standard_normal((count, steps), dtype=np.float32) / sigma - 0.5 / sigma**2)
    under_q = (y.sum(1) + t - steps) / t
    # P: the unit's own step is shifted by 1, which multiplies its Y by exp(1 / sigma^2); none, where it comes later
    here = generator.random(count) < steps / t
    under_p = under_q + here * y[:, 0] * math.expm1(1 / sigma**2) / t
    removed, added = np.maximum(1 - math.exp(at) / under_p, 0), np.maximum(1 - math.exp(at) * under_q, 0)
    return {name: (found.mean(), found.std() / math.sqrt(count)) for name, found in ((True, removed), (False, added))}


@pytest.mark.parametrize("sigma, t, taken, at", [(0.6, 100, 100, 1.0), (0.8, 50, 20, 0.15), (0.5, 30, 29, 1.5)])
def test_an_epoch_whole_or_in_part_by_drawing_it(sigma, t, taken, at):
    for removed, (delta, error) in sampled_deltas(sigma, t, taken, at, 200_000).items():
        assert delta - 5 * error <= delta_at(sigma, t, taken, at, removed) <= 1.01 * delta + 5 * error
        if removed:  # the negative control: twice as many steps to choose from would be seen
            assert delta_at(sigma, 2 * t, taken, at, removed) < delta - 5 * error


@pytest.mark.parametrize("sigma, t, epochs", [
    (1.0, 10, 1), *(pytest.param(*case, marks=pytest.mark.slow)
                    for case in ((0.7, 20, 3), (0.45, 329, 2), (0.6, 329, 1), (1.0, 100, 1)))])
def test_the_accountant_of_its_authors(sigma, t, epochs):
    """Their bracket of the true epsilon (PLD_accounting 2.0, Feldman and Shenfeld 2026) holds ours."""
    api = pytest.importorskip("PLD_accounting.random_allocation_api")
    upper, lower = api.gaussian_allocation_epsilon_range(
        delta=1e-5, sigma=sigma, num_steps=t, num_epochs=epochs, epsilon_accuracy=-1.0)
    assert lower <= epsilon(sigma, t, t * epochs, 1e-5) <= upper


def test_grids_far_apart_are_summed_at_once():
    """The grid of many steps and of one more, at a large sigma: 100,000 points lie between them."""
    width, mass = 1e-4, np.array([0.25, 0.5, 0.2])
    low, high = Ratio(width, 0, mass, 0.05, 1e-30), Ratio(width, 10**5, mass, 0.05, 1e-30)
    for one, other in ((low, high), (high, low)):
        total = one.plus(other)
        assert len(total.mass) < 100
        assert total.mass.sum() + total.zero == pytest.approx(1, abs=1e-12)
        mean = float(low.values @ mass + high.values @ mass)
        assert total.mass @ total.values + total.infinite == pytest.approx(mean, rel=1e-12)
        # convex functions of the sum rise, if by little: that of each pair of values, 0 among them, is no larger
        a, b = np.append(low.values, 0), np.append(high.values, 0)
        chance = np.append(mass, 0.05)[:, None] * np.append(mass, 0.05)
        for strike in (0.5, 2e4, 22026.5, 22027.46):
            exact = float((np.maximum(a[:, None] + b - strike, 0) * chance).sum())
            found = float(total.mass @ np.maximum(total.values - strike, 0))
            assert exact * (1 - 1e-9) <= found <= exact + 0.3


def test_epochs_of_many_lengths_cost_a_little_more(monkeypatch):
    """More kinds of epochs than the accountant composes: those that stand for them have no more steps to choose from,
    and no smaller share of the epoch."""
    phases = [Allocated(1.0, 20 + k, 20 + k - k % 3, 1 + k % 2) for k in range(40)]
    bound = accounting.epsilon_prv(phases, 1e-5)
    monkeypatch.setattr(accounting, "MOST_PHASES", 100)
    apart = accounting.epsilon_prv(phases, 1e-5)
    assert apart <= bound < 1.05 * apart
    for most in (8, 1):
        monkeypatch.setattr(accounting, "MOST_PHASES", most)
        merged = accounting.merge(phases)
        assert len(merged) <= most and sum(phase.steps for phase in merged) == sum(phase.steps for phase in phases)
    for t, taken in ((1000, 1000), (1000, 7), (333, 332), (10**6, 123_457)):
        (found,) = accounting._coarser({Allocated(1.0, t, taken, 1): 1}, 1.3)
        assert isinstance(found, Allocated) and found.taken <= taken and found.q >= taken / t and found.sigma <= 1


def test_the_figures_of_the_document():
    """Two epochs of E2E at sigma 0.45, by random allocation and by Poisson sampling."""
    allocated, poisson = epsilon(0.45, 329, 658, 1e-5), accounting.epsilon_prv([Phase(0.45, 128 / 42061, 658)], 1e-5)
    text = " ".join((ROOT / "docs" / "e2e.md").read_text(encoding="utf-8").split())
    assert f"two epochs with sigma 0.45 cost {allocated:.2f} in place of {poisson:.2f}." in text
