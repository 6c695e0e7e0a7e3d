"""The plots of privacy_report.py --plan."""

from collections.abc import Sequence

from base.files import atomic_write
from privacy import accounting
from privacy.allocation import AnyPhase
from run import risk_words
from run.batch_plan import Row


def draw(
    path: str,
    by_steps: list,
    by_sigma: list,
    stairs: list,
    sigma: float,
    delta: float,
    strict: float,
    title: str,
    phases: Sequence[AnyPhase],
) -> None:
    """Write the PNG: epsilon against steps, sigma against epsilon, and the attack risk of `phases`, the whole run. The
    rows are those of the printed tables.

    stairs: (step, epsilon from there on) of the shuffled run.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right, risk) = pyplot.subplots(1, 3, figsize=(18, 4.8), layout="constrained")
    names = [
        f"PRV, delta {delta:g}",
        f"RDP, delta {delta:g}",
        f"PRV, delta {strict:.3g} = 1/(10 N)",
        f"shuffled, delta {delta:g}",
    ]
    styles = [("tab:blue", "-"), ("tab:orange", "--"), ("tab:green", "-."), ("tab:red", ":")]
    for column, (name, (colour, line)) in enumerate(zip(names, styles, strict=True), start=1):
        if column < 4:
            left.plot([row[0] for row in by_steps], [row[column] for row in by_steps], line, color=colour, label=name)
        else:
            left.plot(*zip(*stairs, strict=True), line, color=colour, label=name, drawstyle="steps-post")
        right.plot([row[column] for row in by_sigma], [row[0] for row in by_sigma], line, color=colour, label=name)
    left.set(xlabel="steps", ylabel="epsilon", yscale="log", title=f"epsilon spent at sigma = {sigma:.4g}")
    right.set(xlabel="epsilon", ylabel="sigma", xscale="log", title="noise that the whole run needs")
    right.axhline(sigma, color="grey", linewidth=0.8)
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    risk_words.draw_curve(risk, phases, accounting.epsilon_prv(phases, delta), delta)
    figure.suptitle(title)
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=120)
    pyplot.close(figure)


def draw_batches(path: str, rows: Sequence[Row], title: str) -> None:
    """Write the PNG: noise against batch, of an update and of the mean of all; and what it takes, sigma and steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    batches = [row.course.batch for row in rows]
    for values, name, colour in (
        ([row.update for row in rows], "an update, sigma/batch", "tab:blue"),
        ([row.mean for row in rows], "the mean of all updates, sigma/(batch sqrt(steps))", "tab:orange"),
    ):
        left.plot(batches, values, "o-", color=colour, label=name)
        least = min(values)
        left.plot(batches[values.index(least)], least, "*", color=colour, markersize=15, label=f"least: {least:.3g}")
    left.set(xlabel="batch", ylabel="noise in a coordinate, in units of C", xscale="log", yscale="log", title="noise")
    right.plot(batches, [row.sigma for row in rows], "o-", color="tab:green", label="sigma")
    right.set(xlabel="batch", ylabel="sigma", xscale="log", title="what it takes")
    steps = right.twinx()
    steps.plot(batches, [row.course.steps for row in rows], "s--", color="grey", label="steps")
    steps.set(ylabel="steps", yscale="log")
    steps.yaxis.set_major_formatter("{x:g}")
    steps.yaxis.set_minor_formatter(NullFormatter())
    for axes in (left, right):
        axes.set_xticks(batches, map(str, batches))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    right.legend(handles=[*right.get_lines(), *steps.get_lines()], loc="upper center", fontsize=8)
    figure.suptitle(title)
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=120)
    pyplot.close(figure)
