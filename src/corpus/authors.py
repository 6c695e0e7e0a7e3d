"""Texts that have authors: the corpus, its split by author, and the draws of each author's texts.

The unit is the author, with every text of that author. Any other unit that a field names (a patient, a conversation)
stands in the author's place, and a line does where it is the unit. What reads a corpus from its file is
corpus/author_cache.py.

Shapes: n texts, A authors, U drawn authors, K texts that an author contributes to a step at the most.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from corpus.batching import Cut, collate
from losses import MicroBatch


@dataclass
class Corpus:
    """A tokenised corpus, its texts ordered by author.

    tokens  (sum of lengths,) uint16 or int32, a memory map in file order
    starts, lengths  (n,) int64 and int32, by author
    first   (A + 1,) int64: the texts of author a are first[a] .. first[a + 1] - 1
    keys    (A,) uint64, a digest of each author's name
    facts   "sha256" of the file, "vocab_size", "unit" (the word for it), "pairs" (of prompt and completion), and
            counts: "records", "without_author", "pseudo_author", "too_short", "cut", "respelled"
    scored  (n,) int32, by author: the first scored token of each text; None: the second token of each
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    first: np.ndarray
    keys: np.ndarray
    facts: dict
    scored: np.ndarray | None = None

    @property
    def texts(self) -> int:
        return len(self.starts)

    def authors_texts(self, authors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(indices of all texts of `authors`, how many each of them has)."""
        sizes = np.diff(self.first)[authors]
        return spread(self.first[authors], sizes), sizes

    def by_author(self, authors: np.ndarray, samples: int, seed: int) -> "AuthorTexts":
        """These authors as units."""
        texts, sizes = self.authors_texts(authors)
        first = np.concatenate([[0], np.cumsum(sizes)])
        keys = self.keys[authors]
        return self.units(texts, first, keys, samples, seed)

    def by_text(self, authors: np.ndarray) -> "AuthorTexts":
        """Every text of these authors as a unit of its own, for evaluation."""
        texts, sizes = self.authors_texts(authors)
        keys = np.repeat(self.keys[authors], sizes)
        return self.units(texts, np.arange(len(texts) + 1), keys, 1, 0)

    def units(self, texts: np.ndarray, first: np.ndarray, keys: np.ndarray, samples: int, seed: int) -> "AuthorTexts":
        scored = None if self.scored is None else self.scored[texts]
        return AuthorTexts(self.tokens, self.starts[texts], self.lengths[texts], first, keys, samples, seed, scored)


def scramble(label: str, numbers: np.ndarray) -> np.ndarray:
    """A pseudo-random uint64 for each of `numbers` (uint64), a function of `label` and the number alone: the output
    function of SplitMix64 (Steele, Lea and Flood, 2014) at a place that the label's digest chooses."""
    base = np.uint64(int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little"))
    z = base + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def split_authors(keys: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training authors, held-out authors), ascending.

    Each is held out with probability `fraction`, by the digest of the name and the seed, whoever else is there. A fixed
    number of held-out authors would not do: one who is added would push another one into the training data, and
    neighbouring data would differ by two authors.
    """
    held_out = scramble(f"held out {seed}", keys) < fraction * 2.0**64
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def spread(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (sizes[0] of them), starts[1], ...: (sum of sizes,) int64."""
    return np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())


@dataclass
class AuthorTexts:
    """Units that are authors, each with one text or more. Fields as in Corpus; the texts are renumbered from 0.

    samples: K, the texts that an author contributes to a step, or all where there are fewer, drawn without replacement.
    seed: of the draws of texts. They are no secret of the privacy plan, which decides which *authors* take part.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    first: np.ndarray
    keys: np.ndarray
    samples: int
    seed: int
    scored: np.ndarray | None = None
    used: np.ndarray = field(init=False)  # (n,) bool: texts that a step of this process drew; never written anywhere

    def __post_init__(self):
        self.used = np.zeros(len(self.starts), dtype=bool)

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def sizes(self) -> np.ndarray:
        """(A,) int64, texts of each author."""
        return np.diff(self.first)

    def draw(self, units: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The texts of `units` (U,) in `step`: (texts by author, how many of each author (U,)).

        A function of seed, step and the author's own texts: the same whatever rank, process or attempt draws, and
        whichever other authors there are. Otherwise an author who is added would change the contributions of others
        too, and the sum would move by more than C, for the seed is public.
        """
        sizes = self.sizes[units]
        texts = spread(self.first[units], sizes)
        owners = np.repeat(np.arange(len(units)), sizes)
        place = np.arange(len(texts)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # of a text among its author's
        numbers = self.keys[units][owners] + place.astype(np.uint64)
        order = np.lexsort((scramble(f"texts {self.seed} {step}", numbers), owners))
        return texts[order][place < self.samples], np.minimum(sizes, self.samples)

    @property
    def inputs(self) -> np.ndarray:
        """(n,) of each text: tokens for which a state is computed, all but the last."""
        return np.maximum(self.lengths - 1, 1)

    def micro_batches(self, units: Tensor, cut: Cut, step: int = 0) -> Iterator[MicroBatch]:
        """Cut `units` (int64) into micro-batches: authors with equally many texts go together, so that no row is empty,
        shortest first; an author's length is that of the longest text drawn."""
        if not len(units):
            return
        texts, counts = self.draw(units.numpy(), step)
        self.used[texts] = True
        begins = np.cumsum(counts) - counts
        longest = np.maximum.reduceat(self.inputs[texts], begins)
        for K in np.unique(counts):
            alike = np.flatnonzero(counts == K)
            alike = alike[np.argsort(longest[alike], kind="stable")]
            for group, T in cut.groups(longest[alike], int(K)):
                rows = texts[(begins[alike[group]][:, None] + np.arange(K)).ravel()]
                # A text's first token is predicted from nothing.
                first_scored = np.ones(len(rows), dtype=np.int64) if self.scored is None else self.scored[rows]
                yield collate(self.tokens, self.starts[rows], self.lengths[rows], first_scored, T, int(K))

    def never_used(self, q: float, steps: int, independent: bool) -> float:
        """Texts that `steps` steps with probability q are expected to leave unused.

        independent: units are drawn independently in each step (Poisson), not once an epoch.
        """
        sizes = self.sizes
        share = np.minimum(self.samples / sizes, 1.0)
        if independent:
            kept = (1 - q * share) ** steps
        else:
            epochs, rest = divmod(q * steps, 1)
            kept = (1 - share) ** epochs * (1 - rest * share)
        return float((sizes * kept).sum())
