"""BLEU and NIST as mteval-v13a computes them, from statistics a segment contributes once.

Papineni et al. (2002), "BLEU: a method for automatic evaluation of machine translation"; Doddington (2002), "Automatic
evaluation of machine translation quality using n-gram co-occurrence statistics". Both metrics are a function of sums
over segments, so this module has two halves: `*_statistics` counts each segment, `*_score` turns sums into a score.
A score over any subset or resample of segments needs only its rows of the statistics.

Shapes: N segments, ... any leading shape of sums.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

BLEU_ORDER = 4
NIST_ORDER = 5
# The NIST penalty is 1/2 for an output two thirds as long as its references.
NIST_BETA = math.log(2) / math.log(1.5) ** 2
# The floors by which the challenge's script keeps BLEU defined: for hits of zero, for a total or a length that is not
# positive.
LEAST_HITS = 1e-15
LEAST_TOTAL = 1e-9
LEAST_LENGTH = 1e-5

ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
SYMBOL = re.compile(r"([ -&(-+/:-@\[-`{-~])")  # ASCII punctuation but ' , - .
POINT_AFTER_TEXT = re.compile(r"([^0-9])([.,])")
POINT_BEFORE_TEXT = re.compile(r"([.,])([^0-9])")
DASH_AFTER_DIGIT = re.compile(r"([0-9])(-)")

Ngrams = Counter[tuple[str, ...]]


def tokenize_13a(text: str) -> list[str]:
    """Split a text as mteval-v13a does and lower-case its tokens.

    An empty text is one empty token, as in the challenge's script: an empty output is one word without a match.
    """
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in ENTITIES:
        text = text.replace(entity, character)
    text = SYMBOL.sub(r" \1 ", f" {text} ")
    text = POINT_AFTER_TEXT.sub(r"\1 \2 ", text)
    text = POINT_BEFORE_TEXT.sub(r" \1 \2", text)
    text = DASH_AFTER_DIGIT.sub(r"\1 \2 ", text)
    return [token.lower() for token in text.split()] or [""]


def count_ngrams(tokens: Sequence[str], order: int) -> Ngrams:
    """Count the n-grams of length 1..order."""
    return Counter(tuple(tokens[i : i + n]) for n in range(1, order + 1) for i in range(len(tokens) - n + 1))


def merge_references(counted: Sequence[Ngrams]) -> Ngrams:
    """The most often that each n-gram stands in any one reference: what an output's hits are clipped to."""
    merged: Ngrams = Counter()
    for ngrams in counted:
        merged |= ngrams
    return merged


def closest_length(lengths: Sequence[int], length: int) -> int:
    """The reference length closest to an output's; of two as close, the shorter."""
    return min(lengths, key=lambda candidate: (abs(candidate - length), candidate))


class References:
    """The tokenized references of all segments, counted once for every output that is scored against them.

    texts: the references of each segment, at least one each.
    """

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        tokens = [[tokenize_13a(reference) for reference in references] for references in texts]
        self.lengths = [[len(reference) for reference in references] for references in tokens]
        counted = [[count_ngrams(reference, NIST_ORDER) for reference in references] for references in tokens]
        self.merged = [merge_references(references) for references in counted]
        self.segment_totals: list[Ngrams] = []
        for references, lengths in zip(counted, self.lengths, strict=True):
            totals: Ngrams = Counter({(): sum(lengths)})  # the 0-gram is the history of every word
            for ngrams in references:
                totals.update(ngrams)
            self.segment_totals.append(totals)
        self.totals: Ngrams = Counter()
        for totals in self.segment_totals:
            self.totals.update(totals)


def bleu_statistics(references: References, outputs: Sequence[str]) -> np.ndarray:
    """(N, 9) float64: clipped hits of orders 1..4, n-grams of orders 1..4, closest reference length.

    An output of fewer than n tokens contributes length - n + 1 <= 0 n-grams, negative counts included: so the
    challenge's script counts, and its scores are what is reproduced here.
    """
    rows = []
    for merged, lengths, text in zip(references.merged, references.lengths, outputs, strict=True):
        tokens = tokenize_13a(text)
        hits = [0] * BLEU_ORDER
        for ngram, count in count_ngrams(tokens, BLEU_ORDER).items():
            hits[len(ngram) - 1] += min(count, merged[ngram])
        totals = [len(tokens) - n for n in range(BLEU_ORDER)]
        rows.append([*hits, *totals, closest_length(lengths, len(tokens))])
    return np.array(rows, dtype=np.float64)


def bleu_score(sums: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    """BLEU of sums of `bleu_statistics`: (..., 9) -> (...). smoothing is added to hits and totals; 1 gives sentBLEU."""
    hits, totals = sums[..., :BLEU_ORDER], sums[..., BLEU_ORDER : 2 * BLEU_ORDER]
    precision = np.maximum(hits + smoothing, LEAST_HITS) / np.maximum(totals + smoothing, LEAST_TOTAL)
    length, reference_length = totals[..., 0], sums[..., -1]
    # The penalty is exp(1 - r/c) where the output is not longer than its reference, else 1.
    brevity = np.minimum(0.0, 1.0 - reference_length / np.where(length > 0, length, LEAST_LENGTH))
    return np.exp(np.log(precision).mean(axis=-1) + brevity)


def nist_statistics(references: References, outputs: Sequence[str], each_alone: bool = False) -> np.ndarray:
    """(N, 11) float64: information of the clipped hits of orders 1..5, n-grams of orders 1..5, mean reference length.

    The information of w1..wn is log2(count(w1..wn-1) / count(w1..wn)) over the pooled references of all segments
    (Doddington 2002, eq. 2), or with each_alone of the segment's own references.
    """
    rows = []
    for index, text in enumerate(outputs):
        tokens, merged, lengths = tokenize_13a(text), references.merged[index], references.lengths[index]
        pooled = references.segment_totals[index] if each_alone else references.totals
        information = [0.0] * NIST_ORDER
        for ngram, count in count_ngrams(tokens, NIST_ORDER).items():
            hits = min(count, merged[ngram])
            if hits:
                information[len(ngram) - 1] += hits * math.log2(pooled[ngram[:-1]] / pooled[ngram])
        totals = [len(tokens) - n for n in range(NIST_ORDER)]
        rows.append([*information, *totals, sum(lengths) / len(lengths)])
    return np.array(rows, dtype=np.float64)


def nist_score(sums: np.ndarray) -> np.ndarray:
    """NIST of sums of `nist_statistics`: (..., 11) -> (...). An order without n-grams in the outputs adds nothing."""
    information, totals = sums[..., :NIST_ORDER], sums[..., NIST_ORDER : 2 * NIST_ORDER]
    terms = np.divide(information, totals, out=np.zeros_like(information), where=totals != 0)
    ratio = np.minimum(1.0, totals[..., 0] / sums[..., -1])
    return terms.sum(axis=-1) * np.exp(-NIST_BETA * np.log(ratio) ** 2)
