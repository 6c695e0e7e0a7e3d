"""The noise for a target, of the two kinds of phases that most tests have."""

from privacy import accounting
from privacy.sampled_gaussian import Phase


def calibrate_sigma(target: float, delta: float, q: float, steps: int) -> float:
    """sigma_for() `steps` steps with q."""
    words = f"{steps} steps with q = {q:.4g}"
    return accounting.sigma_for(target, delta, lambda sigma: [Phase(sigma, q, steps)], words)


def calibrate_sigma_shuffle(target: float, delta: float, participations: int) -> float:
    """sigma_for() `participations` uses of a unit, not amplified."""
    return calibrate_sigma(target, delta, 1.0, participations)
