"""What the samples give away of the texts that were trained on: copied spans, duplicates, nearest texts, secrets.

Every figure stands beside the same one of held-out texts, from the same source, which no training saw: texts of one
domain share spans without any leak. The longer a corpus, the longer the spans that it shares by chance; so the private
texts are taken twice, all of them, and as many as are held out.

Shapes: S samples, T texts of a corpus.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from attacks import Share, exposures, ranks
from suffixes import Spans, longest_spans
from texts import Secret, words

SHINGLE = 3  # words; the unit of near duplicates
NEAR = 0.8  # texts that share such a part of their shingles are near duplicates
BLOCK = 256  # samples compared at once, which bounds the memory
EDGE = "\0"  # no word: the edge of a text


class Vocabulary(dict):
    """word or shingle -> its number, given when first met."""

    def __missing__(self, word: object) -> int:
        self[word] = len(self)
        return self[word]


def numbered(texts: Sequence[str], vocabulary: Vocabulary) -> list[np.ndarray]:
    return [np.array([vocabulary[word] for word in words(text)], np.int64) for text in texts]


def shingle_matrix(texts: Sequence[str], vocabulary: Vocabulary) -> list[list[int]]:
    """The different shingles of each text, with its edges, so that the shortest text has one."""
    rows = []
    for text in texts:
        split = [EDGE, *words(text), EDGE]
        found = {tuple(split[i : i + SHINGLE]) for i in range(max(1, len(split) - SHINGLE + 1))}
        rows.append([vocabulary[shingle] for shingle in found])
    return rows


def as_sparse(rows: list[list[int]], width: int) -> csr_matrix:
    starts = np.cumsum([0, *map(len, rows)])
    columns = np.concatenate([np.array(row, np.int64) for row in rows]) if rows else np.zeros(0, np.int64)
    return csr_matrix((np.ones(len(columns), np.float32), columns, starts), shape=(len(rows), width))


@dataclass(frozen=True)
class Nearest:
    """Of each sample: the corpus text with the largest Jaccard index of shingles (S,), and that index (S,)."""

    texts: np.ndarray
    likeness: np.ndarray


def nearest(samples: Sequence[str], corpus: Sequence[str]) -> Nearest:
    vocabulary = Vocabulary()
    ours, theirs = shingle_matrix(samples, vocabulary), shingle_matrix(corpus, vocabulary)
    sizes = np.array([len(row) for row in theirs], np.float64)
    left, right = as_sparse(ours, len(vocabulary)), as_sparse(theirs, len(vocabulary)).T.tocsr()
    texts, likeness = [], []
    for start in range(0, len(ours), BLOCK):
        shared = (left[start : start + BLOCK] @ right).toarray()
        own = np.array([len(row) for row in ours[start : start + BLOCK]], np.float64)
        index = shared / (own[:, None] + sizes - shared)
        texts.append(index.argmax(axis=1))
        likeness.append(index.max(axis=1))
    return Nearest(np.concatenate(texts), np.concatenate(likeness))


def spans_of(samples: Sequence[str], corpus: Sequence[str]) -> Spans:
    """The longest span, in words, that each sample copies from a text of the corpus."""
    vocabulary = Vocabulary()
    return longest_spans(numbered(corpus, vocabulary), numbered(samples, vocabulary))


def span_figures(spans: Spans) -> dict:
    median, high = np.quantile(spans.lengths, [0.5, 0.95])
    return {
        "mean": float(spans.lengths.mean()),
        "median": float(median),
        "0.95": float(high),
        "longest": int(spans.lengths.max()),
    }


def duplicate_figures(samples: Sequence[str], corpus: Sequence[str], near: Nearest) -> dict:
    """Exact duplicates: the same words in the same order. Near ones include them."""
    known = {tuple(words(text)) for text in corpus}
    exact = sum(tuple(words(sample)) in known for sample in samples)
    return {
        "exact": Share(exact, len(samples)).as_json(),
        "near": Share(int((near.likeness >= NEAR).sum()), len(samples)).as_json(),
    }


def compare(samples: Sequence[str], corpora: dict[str, Sequence[str]]) -> tuple[dict, dict[str, tuple[Spans, Nearest]]]:
    """(figures of copies for each corpus by its name, the spans and nearest texts for each)."""
    figures, found = {}, {}
    for name, corpus in corpora.items():
        spans, near = spans_of(samples, corpus), nearest(samples, corpus)
        copied = {"spans": span_figures(spans), "duplicates": duplicate_figures(samples, corpus, near)}
        figures[name], found[name] = {"texts": len(corpus), **copied}, (spans, near)
    return figures, found


# ------------------------------------------------------------------ planted secrets


def recovered(secrets: Sequence[Secret], predictions: Sequence[Sequence[int]]) -> np.ndarray:
    """(K,) bool: whether a search behind each secret's context begins with all of its tokens."""
    pairs = zip(secrets, predictions, strict=True)
    return np.array([list(found[: len(secret.tokens)]) == secret.tokens for secret, found in pairs])


def longest_in_samples(secrets: Sequence[Secret], samples: Sequence[Sequence[int]]) -> np.ndarray:
    """(K,) int64: how many of each secret's tokens stand in one sample, one after the other and in order."""
    return longest_spans([np.array(one) for one in samples], [np.array(one.tokens) for one in secrets]).lengths


def secret_figures(
    secrets: Sequence[Secret], losses: np.ndarray, found: np.ndarray | None, samples: Sequence[Sequence[int]] | None
) -> dict:
    """Figures for each kind, of planted secrets beside those that were not. losses (K, R + 1): each secret, then its
    rivals behind the same context. found (K,): what a search recovered. samples: their tokens."""
    figures: dict = {}
    exposure, rank = exposures(losses), ranks(losses)
    said = None if samples is None else longest_in_samples(secrets, samples)
    for kind in dict.fromkeys(secret.kind for secret in secrets):
        figures[kind] = {}
        for name, planted in (("planted", True), ("not planted", False)):
            chosen = [k for k, secret in enumerate(secrets) if secret.kind == kind and secret.planted == planted]
            if not chosen:
                continue
            row: dict = {
                "secrets": len(chosen),
                "rivals": losses.shape[1] - 1,
                "exposure": {"mean": float(exposure[chosen].mean()), "median": float(np.median(exposure[chosen]))},
                "ranks": rank[chosen].tolist(),
                "first": Share(int((rank[chosen] == 1).sum()), len(chosen)).as_json(),
            }
            if found is not None:
                row["recovered"] = Share(int(found[chosen].sum()), len(chosen)).as_json()
            if said is not None:
                row["in_samples"] = said[chosen].tolist()
            figures[kind][name] = row
    return figures
