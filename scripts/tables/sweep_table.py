"""The table and the parallel-coordinates plot of a sweep (scripts/sweep.py)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from base.files import atomic_write
from base.markdown import markdown

Trial = Mapping[str, Any]  # values: flag -> text; score: a number, None where it failed; epsilon: a text; name


def shown(score: float | None) -> str:
    return "failed" if score is None else f"{score:.5g}"


def table(trials: Sequence[Trial], flags: Sequence[str], score: str) -> str:
    """A line a trial, the best score first."""
    ordered = sorted(trials, key=lambda trial: math.inf if trial["score"] is None else trial["score"])
    lines = [
        [trial["name"], *(trial["values"].get(flag, "-") for flag in flags), shown(trial["score"]), trial["epsilon"]]
        for trial in ordered
    ]
    return markdown(["trial", *flags, score, "epsilon alone"], lines)


def positions(values: Sequence[str]) -> tuple[list[float], list[tuple[float, str]]]:
    """(place in [0, 1] of each value on its axis, (place, label) of the axis's ticks). Numbers that span a factor of
    ten or more are placed by their logarithm; what is no number, by its order."""
    try:
        numbers = [float(value) for value in values]
        if not all(map(math.isfinite, numbers)):
            raise ValueError
    except ValueError:
        names = sorted(set(values))
        numbers, ticks = [float(names.index(value)) for value in values], [(float(i), n) for i, n in enumerate(names)]
    else:
        if min(numbers) > 0 and max(numbers) >= 10 * min(numbers):
            ticks = [(math.log(float(value)), value) for value in dict.fromkeys(values)]
            numbers = [math.log(number) for number in numbers]
        else:
            ticks = [(float(value), value) for value in dict.fromkeys(values)]
    low, high = min(numbers), max(numbers)
    width = high - low or 1.0
    if len(ticks) > 8:
        ticks = [min(ticks), max(ticks)]
    offset = 0.0 if high > low else 0.5
    return [(number - low) / width + offset for number in numbers], [
        ((at - low) / width + offset, n) for at, n in ticks
    ]


def draw(path: str, trials: Sequence[Trial], flags: Sequence[str], score: str, title: str) -> None:
    """A line for each trial with a score over an axis for each flag and one for the score; the best is the darkest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    trials = [trial for trial in trials if trial["score"] is not None]
    columns = [[str(trial["values"].get(flag, "-")) for trial in trials] for flag in flags]
    columns.append([f"{trial['score']:.5g}" for trial in trials])
    placed = [positions(column) for column in columns]
    figure, axes = pyplot.subplots(figsize=(2.2 * len(columns) + 1.5, 4.8), layout="constrained")
    palette = pyplot.get_cmap("viridis")
    order = sorted(range(len(trials)), key=lambda index: -trials[index]["score"])  # the best is drawn last, on top
    for rank, index in enumerate(order):
        colour = palette(0.9 * (1 - rank / max(1, len(order) - 1)))
        axes.plot(range(len(columns)), [where[index] for where, _ in placed], "o-", color=colour, linewidth=1.5)
    for column, (_, ticks) in enumerate(placed):
        axes.axvline(column, color="0.6", linewidth=0.8, zorder=0)
        for place, label in ticks:
            axes.annotate(label, (column, place), textcoords="offset points", xytext=(5, 3), fontsize=8)
    axes.set_xticks(range(len(columns)), [*flags, f"{score} (lower is better)"])
    axes.set_yticks([])
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=120)
    pyplot.close(figure)
