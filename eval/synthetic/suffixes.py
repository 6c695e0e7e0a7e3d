"""The longest span that a text shares with any text of a corpus, exactly, in memory linear in the number of words.

A suffix array (Manber and Myers, 1993) of corpus and texts together, made by doubling prefixes. In its order, the
corpus suffix that shares most with a suffix is the nearest one before it or the nearest one behind it. Behind each text
stands a separator of its own, so no span runs over the end of a text.

Shapes: n words of corpus and texts with their separators, S texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spans:
    """The longest copied span of each of S texts, all (S,) int64. Of spans of one length the first counts.

    lengths: in words, 0 where no word of the text stands in the corpus
    starts: where it begins in the text
    sources: the corpus text that holds it, -1 where the length is 0
    """

    lengths: np.ndarray
    starts: np.ndarray
    sources: np.ndarray


def suffix_array(words: np.ndarray) -> np.ndarray:
    """(n,) int64: the positions of `words` (n,) whole numbers in the order of the suffixes that begin there.

    Takes O(n log n log L) time, L the longest repeated span, and a fixed number of arrays of length n.
    """
    rank = np.unique(words, return_inverse=True)[1].astype(np.int64)
    n, step = len(rank), 1
    while True:
        behind = np.zeros(n, np.int64)  # 0: nothing stands there, which sorts first
        behind[: max(0, n - step)] = rank[step:] + 1
        key = rank * (n + 1) + behind
        order = np.argsort(key, kind="stable")
        key = key[order]
        new = np.concatenate([[0], np.cumsum(key[1:] != key[:-1])])
        rank[order] = new
        if new[-1] == n - 1:
            return order
        step *= 2


def common_prefixes(words: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(k,) int64: how many words are the same from positions `one` and `other` (k,) on. Two different positions differ
    before the end of `words`, because each text ends in a separator of its own."""
    lengths, going = np.zeros(len(one), np.int64), np.arange(len(one))
    while len(going):
        going = going[words[one[going] + lengths[going]] == words[other[going] + lengths[going]]]
        lengths[going] += 1
    return lengths


def longest_spans(corpus: Sequence[np.ndarray], texts: Sequence[np.ndarray]) -> Spans:
    """corpus, texts: arrays of whole numbers >= 0, one for each word, equal where the words are equal."""
    both = [*corpus, *texts]
    ends = np.cumsum([len(text) + 1 for text in both])
    words = np.empty(ends[-1], np.int64)
    owner = np.repeat(np.arange(len(both)), np.diff(ends, prepend=0))
    is_end = np.zeros(len(words), bool)
    is_end[ends - 1] = True
    words[~is_end] = np.concatenate([np.asarray(text, np.int64) for text in both])
    words[is_end] = -1 - np.arange(len(both))

    order = suffix_array(words)
    of_corpus = owner[order] < len(corpus)
    place, n = np.arange(len(order)), len(order)
    before = np.maximum.accumulate(np.where(of_corpus, place, -1))
    behind = np.minimum.accumulate(np.where(of_corpus, place, n)[::-1])[::-1]
    asked = ~of_corpus & ~is_end[order]
    positions = order[asked]
    best, source = np.zeros(len(positions), np.int64), np.full(len(positions), -1)
    for nearest in (before[asked], behind[asked]):
        there = (nearest >= 0) & (nearest < n)
        found = order[nearest[there]]
        lengths = np.zeros(len(positions), np.int64)
        lengths[there] = common_prefixes(words, positions[there], found)
        sources = np.full(len(positions), -1)
        sources[there] = owner[found]
        longer = lengths > best
        best[longer], source[longer] = lengths[longer], sources[longer]

    spans = Spans(*(np.full(len(texts), value, np.int64) for value in (0, 0, -1)))
    text = owner[positions] - len(corpus)
    start = positions - (ends - [len(one) + 1 for one in both])[owner[positions]]
    for k in np.lexsort((-start, best)):  # ascending: what is written last is the longest, and of those the first
        if best[k]:
            spans.lengths[text[k]], spans.starts[text[k]], spans.sources[text[k]] = best[k], start[k], source[k]
    return spans
