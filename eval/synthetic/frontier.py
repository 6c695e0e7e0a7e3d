"""MAUVE: how close two sets of texts are in the space of a language model's states.

Pillutla et al. (2021), arXiv:2102.01454: embed the texts, cluster all embeddings, and take the area under the curve of
both Kullback-Leibler divergences to mixtures of the two histograms. It needs --embedder: a folder with a model and its
tokenizer in Hugging Face's layout, and the package transformers. Values of different embedders, numbers of texts or
clusters are not comparable.
"""

import importlib.util
import os
from collections.abc import Sequence

import numpy as np
from scipy.cluster.vq import kmeans2

from segments import UserError

SCALE = 5.0  # the paper's c
MIXTURES = 100
CLUSTER_SHARE = 10  # a cluster for so many texts of a side, as the authors' package has
LONGEST = 256  # tokens of a text that are embedded


def area_under_frontier(p: np.ndarray, q: np.ndarray) -> float:
    """MAUVE of two histograms (k,) that sum to 1: from nearly 0 (disjoint) to 1 (equal)."""

    def kl(a: np.ndarray, b: np.ndarray) -> float:
        there = a > 0
        return float((a[there] * np.log(a[there] / b[there])).sum())

    mixed = [(weight * p + (1 - weight) * q) for weight in np.linspace(1e-6, 1 - 1e-6, MIXTURES)]
    x = np.exp([-SCALE * kl(q, r) for r in mixed] + [-np.inf])  # falls from 1 as the weight of p rises
    y = np.exp([-SCALE * kl(p, r) for r in mixed] + [0.0])
    x, y = np.concatenate([[1.0], x]), np.concatenate([[0.0], y])
    return float(-((y[1:] + y[:-1]) / 2 * np.diff(x)).sum())


def mauve(one: np.ndarray, other: np.ndarray, seed: int = 0) -> float:
    """MAUVE of embeddings (n, D) and (m, D): unit vectors, in their main directions, clustered by k-means."""
    both = np.concatenate([one, other]).astype(np.float64)
    both /= np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-12)
    centred = both - both.mean(axis=0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    kept = int(np.searchsorted(np.cumsum(sizes**2), 0.9 * (sizes**2).sum())) + 1  # 90 % of the variance, as theirs
    points = centred @ directions[:kept].T
    clusters = max(2, min(len(one), len(other)) // CLUSTER_SHARE)
    _, labels = kmeans2(points, clusters, minit="++", rng=np.random.default_rng(seed))
    first, second = (
        np.bincount(part, minlength=clusters) / len(part) for part in (labels[: len(one)], labels[len(one) :])
    )
    return area_under_frontier(first, second)


class Embedder:
    """A model in a folder; its state behind the last token embeds a text. UserError where it cannot be had."""

    def __init__(self, folder: str):
        if not os.path.isfile(os.path.join(folder, "config.json")):
            raise UserError(
                f"--embedder {folder}: holds no config.json; want a folder with a model in Hugging Face's layout, or "
                "leave it out: MAUVE is not computed then"
            )
        if importlib.util.find_spec("transformers") is None:
            raise UserError("--embedder: needs the package transformers; pip install transformers, or leave it out")
        import torch
        import transformers

        self.torch = torch
        try:
            with_files = {"local_files_only": True}
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **with_files)
            self.model = transformers.AutoModel.from_pretrained(folder, **with_files).eval()
        except Exception as error:  # whatever transformers raises: this folder cannot be used
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--embedder {folder}: cannot be loaded ({reason}); want a model and its tokenizer"
            ) from None

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(n, D) float32."""
        rows = []
        with self.torch.inference_mode():
            for text in texts:
                ids = self.tokenizer(text, truncation=True, max_length=LONGEST)["input_ids"]
                if not ids:
                    raise UserError(f"--embedder: its tokenizer makes no token of {text[:60]!r}; remove that text")
                rows.append(self.model(self.torch.tensor([ids])).last_hidden_state[0, -1].float().numpy())
        return np.stack(rows)
