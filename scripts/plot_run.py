"""Plot runs from their metrics.jsonl: training and validation loss, and the privacy spent, against steps.

    python scripts/plot_run.py trained_models/a trained_models/b --out runs.png
"""

import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "src"))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cli import Parser, atomic_write, fail, read_lines, run_main


def read_metrics(folder: str) -> list[dict]:
    """The records of a run's metrics.jsonl."""
    path, records = os.path.join(folder, "metrics.jsonl"), []
    for number, line in read_lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            fail(f"{path}:{number}: not an object with a step; is this a run's metrics.jsonl?")
        records.append(record)
    if not records:
        fail(f"{path}: is empty; the run has logged nothing yet")
    return records


def series(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the records that have a number under `name`."""
    having = [record for record in records if isinstance(record.get(name), (int, float))]
    return [record["step"] for record in having], [record[name] for record in having]


def draw(runs: dict[str, list[dict]], path: str) -> None:
    figure, (losses, privacy) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for index, (name, records) in enumerate(runs.items()):
        colour = f"C{index}"
        losses.plot(*series(records, "loss"), color=colour, alpha=0.6, label=f"{name}, training")
        losses.plot(*series(records, "valid_loss"), color=colour, marker="o", linestyle="--", label=f"{name}, held out")
        steps, epsilons = series(records, "epsilon")
        if steps:
            privacy.plot(steps, epsilons, color=colour, label=f"{name} (PRV upper bound)")
    losses.set(title="loss", xlabel="step", ylabel="nats a token")
    privacy.set(title="privacy spent", xlabel="step", ylabel="epsilon", ylim=(0, None))
    for axes in (losses, privacy):
        if axes.lines:
            axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=110)


def main() -> None:
    parser = Parser(description="plot runs from their metrics.jsonl")
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--out", default="runs.png", help="PNG to write (default runs.png)")
    args = parser.parse_args()
    draw({os.path.basename(os.path.normpath(run)): read_metrics(run) for run in args.runs}, args.out)
    print(f"plot: {args.out}")


if __name__ == "__main__":
    run_main(main)
