"""What an attacker can do, for people: lines for the terminal, and the curve of a plot. The numbers are those of
privacy.attack_risk, rounded up, since they are upper bounds."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from base.files import atomic_write
from privacy import attack_risk
from privacy.allocation import AnyPhase
from privacy.attack_risk import ADDED, REMOVED, permitted_by_epsilon


def up(value: float, digits: int = 4) -> str:
    """A number from 0 to 1, rounded up to so many significant digits."""
    if value <= 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return f"{min(1.0, math.ceil(value / unit * (1 - 1e-12)) * unit):.{digits}g}"


def percent(value: float) -> str:
    """A share as a percentage, rounded up to three significant digits."""
    return f"{float(up(value, 3)) * 100:.3g} %"


def exact_percent(rate: float | str) -> str:
    """A share that was chosen, not bounded, as a percentage."""
    return f"{float(rate) * 100:g} %"


def lines(phases: Sequence[AnyPhase], delta: float, prior: float) -> list[str]:
    """Lines of the terminal, each with its label: upper bounds for every attack, whatever else the attacker knows."""
    found = attack_risk.figures(phases, delta, prior)
    rows = [
        f"attack risk   with {exact_percent(rate)} false positives an attacker finds at most {percent(worst)} of the "
        f"members (unit removed {percent(found['tpr_removed'][rate])}, added {percent(found['tpr_added'][rate])})"
        for rate, worst in found["tpr"].items()
    ]
    rows.append(f"advantage     at most {up(found['advantage'])}: true-positive less false-positive rate")
    rows.append(
        f"prior {prior:<7g} a guess, member or not, is right at most {percent(found['guess'])} of the time "
        f"({percent(max(prior, 1 - prior))} without the model); the probability of membership rises to at most "
        f"{up(found['posterior'])}, but for an event of probability {delta:.3g}"
    )
    rows += [
        f"reconstructed what is guessed with a chance of {exact_percent(chance)} without the model is reconstructed "
        f"with at most {percent(most)}"
        for chance, most in found["reconstruction"].items()
    ]
    return rows


def draw_curve(axes: Any, phases: Sequence[AnyPhase], epsilon: float, delta: float) -> None:
    """The curve into matplotlib's axes, beside the diagonal and beside what epsilon alone would permit."""
    rates = np.concatenate([np.geomspace(1e-6, 0.01, 60), np.linspace(0.01, 1, 120)[1:]])
    risk = attack_risk.attack_risk(phases)
    axes.plot(rates, risk.power(rates), color="tab:blue", label="any attack, at most")
    for direction, style in ((REMOVED, ":"), (ADDED, "-.")):
        axes.plot(rates, risk.power(rates, direction), style, color="tab:blue", alpha=0.6, label=f"unit {direction}")
    permitted = permitted_by_epsilon(epsilon, delta, rates)
    axes.plot(rates, permitted, "--", color="tab:red", label=f"epsilon {epsilon:.3g} alone would permit")
    axes.plot(rates, rates, color="grey", linewidth=0.8, label="guessing")
    axes.set(xlabel="false-positive rate", ylabel="true-positive rate", xscale="log", yscale="log", title="attack risk")
    axes.set(xlim=(1e-4, 1), ylim=(1e-4, 1.1))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)


def write_plot(path: str, phases: Sequence[AnyPhase], epsilon: float, delta: float) -> None:
    """Write the curve alone as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4.8), layout="constrained")
    draw_curve(axes, phases, epsilon, delta)
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=120)
    pyplot.close(figure)
