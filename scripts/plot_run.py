"""Draw runs over each other from their metrics.jsonl: training and validation loss, privacy spent, gradient norms.

    python scripts/plot_run.py trained_models/a trained_models/b --out runs.png

The gradient norm is that of the released, noisy gradient, which costs no privacy. The dashed line is the norm of the
noise alone. Where the two are close, a step carries little signal. Beside the validation loss the dashed line is that
of the average of iterates (--average). An unfinished run can be drawn. Of a step that a
resumed run repeated, the last record counts.
"""

import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

import start  # noqa: F401  puts src/ on the path
from base.errors import fail, run_main
from base.files import atomic_write, read_lines
from base.flags import Parser

PANELS = {
    "loss": "training loss [nats per scored token]",
    "valid_loss": "validation loss [nats per scored token]",
    "epsilon": "epsilon spent (PRV upper bound)",
    "grad_norm": "norm of the released gradient",
}
# What is drawn dashed in a panel, and its name.
BESIDE = {"valid_loss": ("average_valid_loss", "average of iterates"), "grad_norm": ("noise_norm", "noise alone")}
FORMATS = (".png", ".pdf", ".svg")


def read_metrics(folder: str) -> list[dict]:
    """The records of a run's metrics.jsonl, merged by step."""
    path = os.path.join(folder, "metrics.jsonl")
    lines, points = list(read_lines(path)), dict[int, dict]()
    for number, line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines) > 1:
                break  # an incomplete last line
            fail(f"{path}:{number}: not a line of JSON; is this a run's metrics.jsonl?")
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            fail(f"{path}:{number}: has no whole number as step; is this a run's metrics.jsonl?")
        points = {step: point for step, point in points.items() if step <= record["step"]}
        known = {name: value for name, value in record.items() if value is not None}
        points.setdefault(record["step"], {}).update(known)
    if not points:
        fail(f"{path}: is empty; the run has logged nothing yet")
    return list(points.values())


def read_delta(folder: str) -> float | None:
    """The delta of the run's epsilon; None where its args.json does not say."""
    try:
        with open(os.path.join(folder, "args.json"), encoding="utf-8") as handle:
            return json.load(handle)["delta"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def series(points: list[dict], name: str, against: str) -> tuple[list[float], list[float]]:
    """(places, values) of the points that have a number under `name`."""
    having = [point for point in points if all(type(point.get(key)) in (int, float) for key in (name, against))]
    return [point[against] for point in having], [point[name] for point in having]


def label_runs(folders: list[str]) -> list[str]:
    """A name for each of several different absolute paths: as many last parts as make all names different."""
    parts = [folder.split(os.sep) for folder in folders]
    depth = 1
    while len({tuple(part[-depth:]) for part in parts}) < len(parts):
        depth += 1
    return [os.sep.join(part[-depth:]) for part in parts]


def draw(runs: dict[str, list[dict]], deltas: set[float | None], against: str) -> plt.Figure:
    """One panel for each of PANELS that any run has numbers for, one colour for each run."""
    shown = [name for name in PANELS if any(series(points, name, against)[0] for points in runs.values())]
    rows, columns = (2, 2) if len(shown) == 4 else (1, max(1, len(shown)))
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    size = (5.2 * columns, 3.7 * rows + 0.5)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout=layout, squeeze=False, sharex=True)
    palette = plt.get_cmap("tab10" if len(runs) <= 10 else "turbo")
    colours = [palette(i if len(runs) <= 10 else i / (len(runs) - 1)) for i in range(len(runs))]
    for axes, name in zip(grid.flat, shown, strict=False):
        for colour, points in zip(colours, runs.values(), strict=True):
            places, values = series(points, name, against)
            marker = "o" if len(places) <= 25 else ""
            axes.plot(places, values, color=colour, linewidth=1.4, marker=marker, markersize=3.5)
            if name in BESIDE:
                places, values = series(points, BESIDE[name][0], against)
                if any(values):
                    darker = [0.6 * part for part in colour[:3]]  # and on top, so that it shows where the two are close
                    axes.plot(places, values, color=darker, linewidth=1.2, linestyle="--", zorder=3)
        axes.set_title(PANELS[name], fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if name == "epsilon":
            axes.set_ylim(0, None)
            known = {delta for delta in deltas if delta is not None}
            if len(known) == len(deltas) == 1:
                axes.set_title(f"{PANELS[name]}, delta {known.pop():g}", fontsize=10)
        if name == "grad_norm":
            values = [value for line in axes.lines for value in line.get_ydata()]
            if max(values) > 5 * min(values) > 0:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
        if any(line.get_linestyle() == "--" for line in axes.lines):
            axes.legend([Line2D([], [], color="0.3", linestyle="--")], [BESIDE[name][1]], fontsize=8, frameon=False)
    for axes in grid[-1]:
        axes.set_xlabel("seconds of training" if against == "seconds" else against)
    handles = [Line2D([], [], color=colour, linewidth=2) for colour in colours]
    figure.legend(
        handles, list(runs), loc="outside upper center", ncols=min(len(runs), 2 * columns), fontsize=9, frameon=False
    )
    return figure


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument(
        "--against", choices=("step", "epoch", "seconds"), default="step", help="the horizontal axis (default step)"
    )
    parser.add_argument("--out", default="runs.png", help=f"file to write: {', '.join(FORMATS)} (default runs.png)")
    args = parser.parse_args()
    form = os.path.splitext(args.out)[1].lower()
    if form not in FORMATS:
        fail(f"--out {args.out}: expected a name that ends in {', '.join(FORMATS)}")
    if not os.path.isdir(os.path.dirname(args.out) or "."):
        fail(f"--out {args.out}: there is no folder {os.path.dirname(args.out)}; make it first")
    folders = list(dict.fromkeys(map(os.path.abspath, args.runs)))
    runs = dict(zip(label_runs(folders), map(read_metrics, folders), strict=True))
    private = [any(type(point.get("epsilon")) in (int, float) for point in points) for points in runs.values()]
    deltas = {read_delta(folder) for folder, is_private in zip(folders, private, strict=True) if is_private}
    figure = draw(runs, deltas, args.against)
    with atomic_write(args.out, "wb") as handle:
        figure.savefig(handle, format=form[1:], dpi=120)
    print(f"plot: {args.out}")


if __name__ == "__main__":
    run_main(main)
