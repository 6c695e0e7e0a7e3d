"""METEOR, ROUGE-L and CIDEr as the COCO caption evaluation computes them, from statistics a segment contributes once.

All three see PTB-tokenized, lower-cased texts without punctuation. ROUGE-L (Lin 2004) and CIDEr (Vedantam et al. 2015)
are means over segments, as in pycocoevalcap, which CIDEr comes from; METEOR (Denkowski and Lavie 2014) is a function
of sums over segments of the statistics that its jar gives.

Shapes: N segments, ... any leading shape of sums.
"""

from collections.abc import Sequence

import numpy as np
from pycocoevalcap.cider.cider import Cider

# METEOR 1.5's settings for English, of its default task (Denkowski and Lavie 2014, table 2).
METEOR_ALPHA, METEOR_BETA, METEOR_GAMMA, METEOR_DELTA = 0.85, 0.2, 0.6, 0.75
METEOR_MATCHERS = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase

ROUGE_BETA = 1.2  # how much more recall counts than precision

# Columns of METEOR's statistics; "test" is the output.
TEST_LENGTH, REFERENCE_LENGTH, TEST_FUNCTION_WORDS, REFERENCE_FUNCTION_WORDS = range(4)
TEST_CONTENT, REFERENCE_CONTENT, TEST_FUNCTION, REFERENCE_FUNCTION = (slice(4 + i, 20, 4) for i in range(4))
CHUNKS, TEST_MATCHES, REFERENCE_MATCHES = range(20, 23)


def is_perfect(sums: np.ndarray) -> np.ndarray:
    """Whether every word of both sides is matched, in one chunk: (..., 23) -> (...) bool."""
    test = sums[..., TEST_CONTENT].sum(axis=-1) + sums[..., TEST_FUNCTION].sum(axis=-1)
    reference = sums[..., REFERENCE_CONTENT].sum(axis=-1) + sums[..., REFERENCE_FUNCTION].sum(axis=-1)
    whole = (test == sums[..., TEST_LENGTH]) & (reference == sums[..., REFERENCE_LENGTH])
    return whole & (sums[..., CHUNKS] == 1)


def summable_statistics(statistics: np.ndarray) -> np.ndarray:
    """METEOR's statistics, ready to be summed over segments: the one chunk of a perfect segment counts as no break."""
    summable = statistics.copy()
    summable[is_perfect(statistics), CHUNKS] = 0.0
    return summable


def meteor_score(sums: np.ndarray) -> np.ndarray:
    """METEOR of sums of `summable_statistics`: (..., 23) -> (...).

    With P, R the weighted precision and recall: F = 1 / ((1-alpha)/P + alpha/R), times 1 - gamma * frag^beta, where
    frag is chunks over matched words (Denkowski and Lavie 2014, section 2). No match at all scores 0.
    """

    def weighted(content: slice, function: slice) -> np.ndarray:
        both = METEOR_DELTA * sums[..., content] + (1 - METEOR_DELTA) * sums[..., function]
        return both @ METEOR_MATCHERS

    def weighted_length(length: int, function_words: int) -> np.ndarray:
        content_words = sums[..., length] - sums[..., function_words]
        return METEOR_DELTA * content_words + (1 - METEOR_DELTA) * sums[..., function_words]

    test, reference = weighted(TEST_CONTENT, TEST_FUNCTION), weighted(REFERENCE_CONTENT, REFERENCE_FUNCTION)
    # A mean of 1/P and 1/R that needs no P or R of zero; where nothing matches it is infinite and F is 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = (1 - METEOR_ALPHA) * weighted_length(TEST_LENGTH, TEST_FUNCTION_WORDS) / test
        inverse = inverse + METEOR_ALPHA * weighted_length(REFERENCE_LENGTH, REFERENCE_FUNCTION_WORDS) / reference
        breaks = 2 * sums[..., CHUNKS] / (sums[..., TEST_MATCHES] + sums[..., REFERENCE_MATCHES])
        breaks = np.where(is_perfect(sums), 0.0, breaks)
        score = (1 - METEOR_GAMMA * breaks**METEOR_BETA) / inverse
    return np.where((test > 0) & (reference > 0), score, 0.0)


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence. Memory grows with the longer one, time with the product of both.

    A row of the usual table is the running maximum of the row above, or of its diagonal plus one where words agree.
    """
    if len(first) > len(second):
        first, second = second, first
    numbers: dict[str, int] = {}
    words = np.array([numbers.setdefault(word, len(numbers)) for word in second])
    row = np.zeros(len(second) + 1, dtype=np.int64)
    for word in first:
        agree = words == numbers.get(word, -1)
        row[1:] = np.maximum.accumulate(np.maximum(row[1:], row[:-1] + agree))
    return int(row[-1])


def rouge_l(references: Sequence[str], output: str) -> float:
    """ROUGE-L of a segment as pycocoevalcap computes it, from the best precision and the best recall over references;
    its own table takes 20 GB for 30,000 words."""
    words = output.split(" ")
    groups = [reference.split(" ") for reference in references]
    common = [common_subsequence(group, words) for group in groups]
    precision = max(common) / len(words)
    recall = max(count / len(group) for count, group in zip(common, groups, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def rouge_l_segments(references: Sequence[Sequence[str]], outputs: Sequence[str]) -> np.ndarray:
    """ROUGE-L of each segment: (N,) float64."""
    return np.array([rouge_l(group, output) for group, output in zip(references, outputs, strict=True)])


def cider_segments(references: Sequence[Sequence[str]], outputs: Sequence[str]) -> np.ndarray:
    """CIDEr of each segment, its document frequencies counted over the references of all segments: (N,) float64.

    References without a single word have no n-gram that could agree: all scores are 0.
    """
    if not any(reference.split() for group in references for reference in group):
        return np.zeros(len(outputs))
    return np.asarray(Cider().compute_score(*as_captions(references, outputs))[1], dtype=np.float64)


def as_captions(references: Sequence[Sequence[str]], outputs: Sequence[str]) -> tuple[dict, dict]:
    """Segments in pycocoevalcap's form."""
    return {i: list(group) for i, group in enumerate(references)}, {i: [output] for i, output in enumerate(outputs)}


def mean_statistics(scores: np.ndarray) -> np.ndarray:
    """Segment scores with their count, to be summed for a mean: (N,) -> (N, 2)."""
    return np.stack([scores, np.ones_like(scores)], axis=-1)


def mean_score(sums: np.ndarray) -> np.ndarray:
    """Mean of sums of `mean_statistics`: (..., 2) -> (...)."""
    return sums[..., 0] / sums[..., 1]
