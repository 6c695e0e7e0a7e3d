"""Paired bootstrap over segments: is the difference between two systems' scores more than the luck of the test set?

Koehn (2004), "Statistical significance tests for machine translation evaluation", for the resampling; Riezler and
Maxwell (2005), "On some pitfalls in automatic evaluation and significance testing for MT", for the p-value.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Metric:
    """A metric of a system.

    statistics: (N, K) float64, what each of N segments contributes. score: from sums over segments (..., K) to (...).
    """

    name: str
    statistics: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]

    def total(self) -> float:
        """The score of all segments."""
        return float(self.score(self.statistics.sum(axis=0)))


@dataclass(frozen=True)
class Comparison:
    """One metric of two systems: the difference is the first's score minus the second's."""

    name: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float


def draw_test_sets(segments: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield (b, segments) float64: how often each segment stands in each of `samples` test sets drawn with replacement.

    b is as many test sets as fit in some tens of megabytes; the draws do not depend on it.
    """
    generator, block = np.random.default_rng(seed), max(1, 4_000_000 // segments)
    for start in range(0, samples, block):
        size = min(block, samples - start)
        yield generator.multinomial(segments, np.full(segments, 1 / segments), size=size).astype(np.float64)


def compare(first: Sequence[Metric], second: Sequence[Metric], samples: int, seed: int) -> list[Comparison]:
    """Compare two systems metric by metric on the same resampled test sets.

    low and high bound 95 % of the resampled differences. p_value is two-sided: the share of resampled differences that
    lie at least as far from their own mean as the observed difference lies from zero, the observed one counted among
    them, so that it is never below 1 / (samples + 1).
    """
    pairs = list(zip(first, second, strict=True))
    blocks = []
    for counts in draw_test_sets(len(first[0].statistics), samples, seed):
        blocks.append(
            [one.score(counts @ one.statistics) - other.score(counts @ other.statistics) for one, other in pairs]
        )
    comparisons = []
    for row, (one, other) in zip(np.concatenate(blocks, axis=1), pairs, strict=True):  # row: (samples,)
        observed = one.total() - other.total()
        low, high = np.quantile(row, [0.025, 0.975])
        as_far = np.count_nonzero(np.abs(row - row.mean()) >= abs(observed))
        p_value = (as_far + 1) / (samples + 1)
        comparisons.append(Comparison(one.name, one.total(), other.total(), observed, float(low), float(high), p_value))
    return comparisons
