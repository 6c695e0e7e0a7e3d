"""How like real text the samples are: lengths, n-grams, diversity, and MAUVE where a model for it is given.

All figures but MAUVE take equally many texts of each side: divergences and distinct-n depend on how many there are. The
yardstick beside each is the same figure of real texts that are not those which it is compared with.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics import BLEU
from scipy.spatial.distance import jensenshannon
from scipy.stats import ks_2samp

Words = Sequence[str]
ORDERS = (1, 2, 3)
SELF_BLEU_TEXTS = 150  # self-BLEU takes the square of so many comparisons


def ngrams(texts: Sequence[Words], order: int) -> Counter[tuple[str, ...]]:
    """How often each n-gram of `order` words stands in the texts; none runs over the end of a text."""
    return Counter(tuple(text[i : i + order]) for text in texts for i in range(len(text) - order + 1))


def distinct(texts: Sequence[Words], order: int) -> float:
    """Distinct n-grams over all n-grams (Li et al., 2016, arXiv:1510.03055); 0 where there is none."""
    counted = ngrams(texts, order)
    return len(counted) / max(1, counted.total())


def divergence(one: Sequence[Words], other: Sequence[Words], order: int) -> float:
    """The Jensen-Shannon divergence of their n-grams in bits, from 0 (the same shares) to 1 (none in common)."""
    counted = ngrams(one, order), ngrams(other, order)
    if not all(counted):
        return 0.0 if not any(counted) else 1.0
    keys = list(counted[0] | counted[1])
    return float(jensenshannon(*([found[key] for key in keys] for found in counted), base=2) ** 2)


def self_bleu(texts: Sequence[str], seed: int = 0) -> float:
    """The mean BLEU of a text against all others (Zhu et al., 2018, arXiv:1802.01886), from 0 to 1; high is uniform.

    Of SELF_BLEU_TEXTS texts drawn by `seed`. Sentence BLEU of sacrebleu: 13a tokens, exponential smoothing, and only
    the orders that a text has.
    """
    if len(texts) < 2:
        return 0.0
    drawn = np.random.default_rng(seed).permutation(len(texts))[:SELF_BLEU_TEXTS]
    chosen, metric = [texts[k] for k in drawn], BLEU(effective_order=True)
    scores = [metric.sentence_score(text, chosen[:k] + chosen[k + 1 :]).score for k, text in enumerate(chosen)]
    return float(np.mean(scores)) / 100


def lengths(one: Sequence[Words], other: Sequence[Words]) -> dict:
    """The lengths in words of `one`, and the Kolmogorov-Smirnov distance to those of `other`, from 0 to 1."""
    counts = np.array([len(text) for text in one])
    low, median, high = np.quantile(counts, [0.05, 0.5, 0.95])
    return {
        "mean": float(counts.mean()),
        "quantiles": {"0.05": float(low), "0.5": float(median), "0.95": float(high)},
        "distance": float(ks_2samp(counts, [len(text) for text in other]).statistic),
    }
