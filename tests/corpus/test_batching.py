"""How a logical batch is cut into micro-batches: never beyond the budget, nothing lost, and no cut is cheaper."""

import itertools

import numpy as np
import pytest
import torch

from corpus.batching import START_COST, TightCut, groups_within
from corpus.examples import Examples


def price(lengths: np.ndarray, slices: list[slice], budget: int) -> float:
    """Padded tokens, and what every slice costs beside them; infinite where one passes the budget."""
    total = 0.0
    for part in slices:
        rows, longest = part.stop - part.start, int(lengths[part.stop - 1])
        if rows > 1 and rows * longest > budget:
            return float("inf")
        total += rows * longest + START_COST * budget
    return total


def every_cut(n: int) -> list[list[slice]]:
    """All 2^(n-1) ways to cut n rows into consecutive slices."""
    cuts = []
    for chosen in itertools.product((False, True), repeat=n - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(chosen) if cut), n]
        cuts.append([slice(a, b) for a, b in itertools.pairwise(bounds)])
    return cuts


@pytest.mark.parametrize("budget", [1, 30, 64, 200, 2000])
@pytest.mark.parametrize("seed", range(4))
def test_no_cut_is_cheaper(budget, seed):
    lengths = np.sort(np.random.default_rng(seed).integers(1, 60, 9))
    found = groups_within(lengths, budget)
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(9))
    assert price(lengths, found, budget) == min(price(lengths, cut, budget) for cut in every_cut(9))


def test_a_draw_of_the_e2e_length_is_hardly_padded():
    """Filling every micro-batch to the budget leaves more padding: the check can fail."""
    lengths = np.sort(np.clip(np.random.default_rng(0).normal(53, 16, 128).round().astype(np.int64), 20, 115))

    def padded(slices: list[slice]) -> int:
        return sum(int(lengths[part.stop - 1]) * (part.stop - part.start) for part in slices)

    filled, start = [], 0
    for end in range(1, 129):
        if end == 128 or lengths[end] * (end + 1 - start) > 2048:
            filled.append(slice(start, end))
            start = end
    assert padded(groups_within(lengths, 2048)) < 1.1 * lengths.sum() < padded(filled)


def test_micro_batches_hold_every_drawn_example_once():
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 40, 50)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    examples = Examples(np.arange(lengths.sum(), dtype=np.int32), starts, np.ones(50, np.int64), 0, 0)
    drawn = torch.from_numpy(np.flatnonzero(rng.random(50) < 0.5))
    batches = list(examples.micro_batches(drawn, TightCut(100)))
    assert all(batch.ids.numel() <= 100 or len(batch.ids) == 1 for batch in batches)
    first_tokens = sorted(int(row[0]) for batch in batches for row in batch.ids)
    assert first_tokens == [int(starts[i]) for i in drawn]  # every token of the data is another one
    assert sum(batch.tokens for batch in batches) == int(lengths[drawn.numpy()].sum())
    assert not list(examples.micro_batches(torch.empty(0, dtype=torch.int64), TightCut(100)))
