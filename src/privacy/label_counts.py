"""A histogram of public labels over the units of private data, with Gaussian noise.

A unit's own histogram h counts its texts by label. It counts as h / max(1, norm(h)), in fixed point: one text counts 1
in its cell, and a unit of any number of texts has a Euclidean norm of 1 at the most. Sums of whole numbers do not
round, so a unit that is added or removed changes the total by at most that. What is released is the total plus
N(0, sigma^2) in each cell: the mechanism that DP-SGD uses, once, with every unit taking part (q = 1).
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from base.distributed import World
from privacy.ledger import LABEL_COUNTS
from privacy.mechanism import MECHANISMS
from privacy.randomness import NoiseSource

SCALE = 1 << 20  # the fixed point's 1
NOISE_SOURCE = "os"
CLIP = 1.0  # the largest norm of a unit's histogram


def contribution(counts: Mapping[int, int], cells: int) -> np.ndarray:
    """A unit's histogram, cell -> count, as it is summed: (cells,) int64 of norm SCALE at the most. Each entry is
    c SCALE / norm rounded down, of exact whole numbers."""
    square = sum(count * count for count in counts.values())
    found = np.zeros(cells, np.int64)
    for cell, count in counts.items():
        found[cell] = math.isqrt(count * count * SCALE * SCALE // square)
    return found


def totals(labels: Iterable[tuple[object, int]], cells: int) -> np.ndarray:
    """The sum of all units' contributions, (cells,) int64. labels: (unit, cell) of each text, in any order."""
    units: dict[object, Counter[int]] = {}
    for unit, cell in labels:
        units.setdefault(unit, Counter())[cell] += 1
    found = np.zeros(cells, np.int64)
    for counts in units.values():
        found += contribution(counts, cells)
    return found


def noisy_counts(total: np.ndarray, sigma: float, source: NoiseSource | None = None) -> np.ndarray:
    """What is released of totals(): (cells,) float64, in texts. Call it when the ledger holds the charge.
    source: of tests; None: a fresh one of NOISE_SOURCE."""
    if not sigma > 0:
        raise ValueError(f"sigma={sigma}: expected a number above 0")
    mechanism = MECHANISMS[LABEL_COUNTS](sigma, SCALE, SCALE, World(), source or NoiseSource(NOISE_SOURCE, "noise"))
    return mechanism.release(1, torch.from_numpy(total.astype(np.float64)), len(total)).double().numpy()
