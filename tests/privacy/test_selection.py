"""Private selection, against dp_accounting's RepeatAndSelectDpEvent, sums of the distributions, and exact RDP."""

import itertools
import math

import numpy as np
import pytest

from base.errors import UserError
from privacy import accounting
from privacy.accounting import Phase
from privacy.sampled_gaussian import ORDERS
from privacy.selection import Trials, selected_curve, selection_epsilon

DISTRIBUTIONS = [Trials(10), Trials(1), Trials(300), Trials(10, 1.0), Trials(10, 0.0), Trials(50, 0.5),
                 Trials(1.5, 3.0)]


@pytest.mark.parametrize("trials", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("sigma, q, steps", [(1.0, 0.01, 500), (2.0, 0.2, 30), (0.6, 0.003, 6572), (4.0, 1.0, 3)])
def test_epsilon_is_dp_accounting_s(trials, sigma, q, steps):
    """Within 1 %: the two differ in how they compute the RDP of broken orders; never below by more than rounding."""
    dp = pytest.importorskip("dp_accounting")
    event = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(sigma)), steps)
    shape = math.inf if trials.shape is None else trials.shape
    accountant = dp.rdp.RdpAccountant(list(ORDERS))
    accountant.compose(dp.dp_event.RepeatAndSelectDpEvent(event, trials.mean, shape))
    ours = selection_epsilon([[Phase(sigma, q, steps)]], trials, 1e-5)
    assert ours == pytest.approx(accountant.get_epsilon(1e-5), rel=0.01)
    assert ours >= accounting.epsilon_rdp([Phase(sigma, q, steps)], 1e-5)


@pytest.mark.parametrize("trials", DISTRIBUTIONS, ids=str)
def test_the_distribution_has_its_mean(trials):
    """By summing it: its first probability and the ratios are all that a draw uses."""
    count, chance = trials.first()
    total, mean = chance, count * chance
    while count < trials.mean or (total < 1 - 1e-12 and chance > 1e-18):
        count += 1
        chance *= trials.ratio(count)
        total += chance
        mean += count * chance
    assert total == pytest.approx(1, abs=1e-6) and mean == pytest.approx(trials.mean, rel=1e-4)


def test_draws_are_of_the_distribution():
    """Of 2,000 draws the mean lies within 5 standard errors; one fixed number would not vary."""
    for trials, deviation in ((Trials(10), math.sqrt(10)), (Trials(10, 1.0), math.sqrt(90))):
        drawn = [trials.draw() for _ in range(2000)]
        assert abs(np.mean(drawn) - 10) < 5 * deviation / math.sqrt(2000) and len(set(drawn)) > 5
        assert min(drawn) >= (0 if trials.shape is None else 1)


@pytest.mark.parametrize("trials", [Trials(3), Trials(3, 1.0), Trials(3, 0.0)], ids=str)
def test_never_below_the_truth_where_it_can_be_computed(trials):
    """Randomised response of a bit as the trial, its bit as the score: the best of K is 1 unless all are 0, so
    P(best = 0) = E[(1 - p)^K], and the RDP of both sides is exact at each order. The bound has to be above."""
    p = {True: 0.6, False: 0.4}
    count, chance = trials.first()
    generating = dict.fromkeys(p, 0.0)
    while count < 3000 and chance > 1e-300:
        for side, one in p.items():
            generating[side] += chance * (1 - one) ** count
        count += 1
        chance *= trials.ratio(count)

    def renyi(a: tuple[float, float], b: tuple[float, float]) -> np.ndarray:
        parts = [ORDERS * math.log(x) + (1 - ORDERS) * math.log(y) for x, y in zip(a, b)]
        return np.logaddexp(*parts) / (ORDERS - 1)

    single, best = ({side: (1 - values[side], values[side]) for side in p} for values in
                    ({side: 1 - one for side, one in p.items()}, generating))
    rdp = np.max([renyi(single[a], single[b]) for a, b in itertools.permutations(p)], axis=0)
    truth = np.max([renyi(best[a], best[b]) for a, b in itertools.permutations(p)], axis=0)
    assert (selected_curve(rdp, trials) >= truth * (1 - 1e-9)).all()


def test_trials_of_different_cost_have_that_of_the_largest():
    cheap, dear = [Phase(4.0, 0.01, 100)], [Phase(1.0, 0.01, 100)]
    trials = Trials(10)
    assert selection_epsilon([cheap, dear, cheap], trials, 1e-5) == selection_epsilon([dear], trials, 1e-5)
    assert selection_epsilon([cheap], trials, 1e-5) < selection_epsilon([dear], trials, 1e-5)
    assert selection_epsilon([dear, [Phase(0.0, 0.01, 1)]], trials, 1e-5) == math.inf


@pytest.mark.parametrize("trials, words", [
    (Trials(0.5), "--mean 0.5"), (Trials(math.nan), "--mean nan"), (Trials(1, 1.0), "--mean 1"),
    (Trials(1e5), "--mean 100000"), (Trials(10, -0.5), "--shape -0.5"), (Trials(10, math.nan), "--shape nan")])
def test_what_is_no_distribution(trials, words):
    with pytest.raises(UserError, match=words):
        selection_epsilon([[Phase(1.0, 0.1, 1)]], trials, 1e-5)
