"""What attackers find: membership inference from losses, and the exposure of planted secrets. Numbers only.

Carlini et al. (2022), "Membership inference attacks from first principles", arXiv:2112.03570, for judging an attack by
its true positives at few false ones; Carlini et al. (2019), "The secret sharer", arXiv:1802.08232, for exposure.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, norm

FALSE_POSITIVES = (0.01, 0.001)
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Share:
    """A share of `of` trials with its exact interval (Clopper and Pearson, 1934) at CONFIDENCE."""

    found: int
    of: int

    @property
    def value(self) -> float:
        return self.found / self.of

    @property
    def interval(self) -> tuple[float, float]:
        tail, found, of = (1 - CONFIDENCE) / 2, self.found, self.of
        low = float(beta.ppf(tail, found, of - found + 1)) if found else 0.0
        return low, float(beta.ppf(1 - tail, found + 1, of - found)) if found < of else 1.0

    def as_json(self) -> dict:
        return {"value": self.value, "found": self.found, "of": self.of, "interval": list(self.interval)}


def true_positives(members: np.ndarray, others: np.ndarray, rate: float) -> Share | None:
    """The members above the lowest threshold at which at most `rate` of the others are; None where these are fewer than
    1/rate, so that such a rate cannot be seen. members, others: scores (m,), (n,); higher speaks for a member.

    The interval holds for this threshold. That the others place the threshold by chance, too, is left out.
    """
    allowed = math.floor(rate * len(others) * (1 + 1e-12))
    if allowed < 1:
        return None
    threshold = -np.partition(-others, allowed)[allowed] if allowed < len(others) else -math.inf
    return Share(int((members > threshold).sum()), len(members))


def area(members: np.ndarray, others: np.ndarray) -> tuple[float, float, float]:
    """(the area under the ROC curve, low, high): the chance that a member scores above another, ties by half.

    The interval is DeLong's (1988), from the variance of the placements of both groups.
    """

    def placements(scores: np.ndarray, among: np.ndarray) -> np.ndarray:
        among = np.sort(among)
        return (np.searchsorted(among, scores) + np.searchsorted(among, scores, side="right")) / (2 * len(among))

    ours, theirs = placements(members, others), placements(others, members)
    value = float(ours.mean())
    deviation = math.sqrt(sum(part.var(ddof=1) / len(part) if len(part) > 1 else 0.25 for part in (ours, theirs)))
    half = float(norm.ppf((1 + CONFIDENCE) / 2)) * deviation
    return value, max(0.0, value - half), min(1.0, value + half)


def curve(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(false-positive rates, true-positive rates), ascending from 0 to 1: the ROC curve at all its thresholds."""
    thresholds = np.unique(np.concatenate([members, others]))[::-1]
    rates = [
        1 - np.searchsorted(np.sort(scores), thresholds, side="left") / len(scores) for scores in (others, members)
    ]
    return np.concatenate([[0.0], rates[0]]), np.concatenate([[0.0], rates[1]])


def membership(members: np.ndarray, others: np.ndarray) -> dict:
    """One attack's figures, as JSON: the area, true positives at FALSE_POSITIVES, and a curve of at most 200 points."""
    value, low, high = area(members, others)
    false, true = curve(members, others)
    kept = np.unique(np.searchsorted(false, np.concatenate([[0], np.geomspace(1e-4, 1, 199)]), side="right") - 1)
    found = {str(rate): true_positives(members, others, rate) for rate in FALSE_POSITIVES}
    return {
        "members": len(members),
        "others": len(others),
        "area": {"value": value, "interval": [low, high]},
        "true_positives": {rate: share and share.as_json() for rate, share in found.items()},
        "curve": {"false": false[kept].round(6).tolist(), "true": true[kept].round(6).tolist()},
    }


def ranks(losses: np.ndarray) -> np.ndarray:
    """(K,) int64: the rank of each secret's loss, 1 for the lowest, among losses (K, R + 1), the secret's own first.
    A tie counts against the attacker."""
    return 1 + (losses[:, 1:] <= losses[:, :1]).sum(axis=1)


def exposures(losses: np.ndarray) -> np.ndarray:
    """(K,) float64: log2(R + 1) - log2(rank), in bits. A secret that the model never saw has 1.44 in the mean, and
    x or more with chance 2^-x."""
    return math.log2(losses.shape[1]) - np.log2(ranks(losses))
