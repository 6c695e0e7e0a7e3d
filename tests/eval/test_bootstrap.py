"""The paired bootstrap against a plain resampling that scores every drawn test set anew, and its error rate."""

import contextlib
import itertools
import math

import numpy as np
import pytest

import caption_metrics
import java
import measure_scores
import ngrams
from bootstrap import Metric, compare, draw_test_sets

REFERENCES = [
    ["Zizzi is a coffee shop near Burger King .", "Near Burger King is a coffee shop called Zizzi ."],
    ["The Mill is a cheap English pub in the riverside area .", "The Mill serves cheap English food by the river ."],
    ["Cotto is a highly rated Italian place .", "Italian food at Cotto is rated highly by its customers ."],
    ["The Punter is not family friendly .", "Leave the kids at home when you go to The Punter ."],
    ["Blue Spice costs more than £30 .", "Expect to pay over £30 at Blue Spice , a restaurant ."],
    ["The Eagle has an average customer rating and serves fast food .", "Fast food of average quality : The Eagle ."],
    ["Aromi is a French pub in the city centre .", "In the city centre there is a French pub named Aromi ."],
]
FIRST = [
    "Zizzi is a coffee shop near Burger King .",
    "The Mill is a cheap pub in the riverside area .",
    "Cotto is highly rated .",
    "The Punter is not family friendly .",
    "Blue Spice is a restaurant that costs over £30 .",
    "The Eagle serves fast food of average quality .",
    "Aromi is a French pub .",
]
SECOND = [
    "Zizzi is near Burger King and it is a coffee shop .",
    "The Mill is an English pub .",
    "Cotto is an Italian place with a high rating by its customers .",
    "The Punter is for adults .",
    "Blue Spice costs more than £30 .",
    "The Eagle is average .",
    "There is a French pub in the city centre , Aromi , which is a pub .",
]
SAMPLES, SEED = 120, 3


@pytest.fixture(scope="module")
def scored(meteor):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(java, "Meteor", lambda patience: contextlib.nullcontext(meteor))  # it takes seconds to start
        return measure_scores.score_systems(REFERENCES, [FIRST, SECOND], patience=200)


def plain_scores(
    draw: np.ndarray, outputs: list[str], tokens: list[str], groups: list[list[str]], meteor: java.Meteor
) -> list[float]:
    """The five scores of one drawn test set, from the drawn texts.

    What weighs n-grams, NIST's information and CIDEr's document frequencies, is the whole test set's, as it is stated.
    """
    references, texts = [REFERENCES[i] for i in draw], [outputs[i] for i in draw]
    drawn = ngrams.References(references)
    bleu = ngrams.bleu_score(ngrams.bleu_statistics(drawn, texts).sum(axis=0))
    drawn.totals = ngrams.References(REFERENCES).totals
    nist = ngrams.nist_score(ngrams.nist_statistics(drawn, texts).sum(axis=0))
    drawn_groups, drawn_tokens = [groups[i] for i in draw], [tokens[i] for i in draw]
    rows = [" ".join(map(repr, map(float, row))) for row in meteor.statistics(drawn_groups, drawn_tokens)]
    *_, total = meteor.ask([" ||| ".join(["EVAL", *rows])], len(rows) + 1)
    rouge = caption_metrics.rouge_l_segments(drawn_groups, drawn_tokens).mean()
    cider = caption_metrics.cider_segments(groups, tokens)[draw].mean()
    return [float(bleu), float(nist), float(total), float(rouge), float(cider)]


def test_is_a_plain_resampling(scored, meteor):
    """Differences, interval and p-value, with METEOR's jar scoring each drawn test set anew."""
    first, second = scored
    comparisons = compare(first, second, SAMPLES, SEED)
    flat, *outputs = java.tokenize_ptb([list(itertools.chain.from_iterable(REFERENCES)), FIRST, SECOND], patience=200)
    groups = [flat[2 * i : 2 * i + 2] for i in range(len(REFERENCES))]
    differences = []
    for counts in np.concatenate(list(draw_test_sets(len(FIRST), SAMPLES, SEED))):
        draw = np.repeat(np.arange(len(FIRST)), counts.astype(int))
        assert len(draw) == len(FIRST)
        pair = [plain_scores(draw, texts, tokens, groups, meteor)
                for texts, tokens in zip((FIRST, SECOND), outputs, strict=True)]
        differences.append([one - other for one, other in zip(*pair, strict=True)])
    for comparison, row in zip(comparisons, zip(*differences, strict=True), strict=True):
        ordered, mean = sorted(row), sum(row) / SAMPLES
        for bound, share in ((comparison.low, 0.025), (comparison.high, 0.975)):
            place = share * (SAMPLES - 1)
            below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
            assert bound == pytest.approx(below + (place - math.floor(place)) * (above - below), abs=1e-10)
        as_far = sum(abs(value - mean) >= abs(comparison.difference) for value in row)
        assert comparison.p_value == pytest.approx((as_far + 1) / (SAMPLES + 1))
        assert comparison.difference == pytest.approx(comparison.first - comparison.second)


def test_same_seed_same_answer(scored):
    first, second = scored
    assert compare(first, second, 150, 1) == compare(first, second, 150, 1) != compare(first, second, 150, 2)


def test_a_system_against_itself(scored):
    for comparison in compare(scored[0], scored[0], 150, 0):
        assert (comparison.difference, comparison.low, comparison.high, comparison.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_blocks_do_not_change_the_draws():
    """More test sets than one block holds: the same draws as one by one, each of as many segments as the test set."""
    segments, samples = 50_000, 200  # a block holds 80 of them
    blocks = list(draw_test_sets(segments, samples, seed=5))
    assert len(blocks) > 1 and sum(map(len, blocks)) == samples
    generator = np.random.default_rng(5)
    for counts in itertools.chain.from_iterable(blocks):
        assert np.array_equal(counts, generator.multinomial(segments, np.full(segments, 1 / segments)))
        assert counts.sum() == segments


def mean_metric(scores: np.ndarray) -> list[Metric]:
    return [Metric("mean", caption_metrics.mean_statistics(scores), caption_metrics.mean_score)]


@pytest.mark.parametrize("shift, least, most", [(0.0, 0.01, 0.11), (0.5, 0.9, 1.0)])
def test_error_rate_and_power(shift, least, most):
    """Of 300 pairs of equal systems about 5 % differ at p < 0.05; of pairs half a deviation apart nearly all do.

    At 80 segments the bootstrap is slightly liberal, 0.05 to 0.06; over 300 trials the rate has a standard deviation of
    0.013, so [0.01, 0.11] is three to four of them wide on each side. Two systems' segments share half of their
    variance; their difference has deviation 1, a shift of 0.5 is 4.5 standard errors over 80 segments, and a z-test at
    1.96 finds it with probability 0.994.
    """
    generator = np.random.default_rng(11)
    found = 0
    for trial in range(300):
        common, one, other = generator.normal(scale=math.sqrt(0.5), size=(3, 80))
        (comparison,) = compare(mean_metric(common + one + shift), mean_metric(common + other), 199, trial)
        found += comparison.p_value < 0.05
    assert least <= found / 300 <= most
