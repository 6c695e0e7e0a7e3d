"""Plot runs from their metrics.jsonl: training and validation loss, and the privacy spent, against steps.

    python scripts/plot_run.py trained_models/a trained_models/b --out runs.png
"""

import argparse
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "src"))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cli import fail, read_lines, run_main


def read_metrics(folder: str) -> list[dict]:
    """The records of a run's metrics.jsonl."""
    path, records = os.path.join(folder, "metrics.jsonl"), []
    for number, line in read_lines(path):
        try:
            records.append(json.loads(line))
        except ValueError:
            fail(f"{path}:{number}: not a line of JSON; is this a run's metrics.jsonl?")
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
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="plot runs from their metrics.jsonl", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--out", default="runs.png", help="PNG to write (default runs.png)")
    args = parser.parse_args()
    draw({os.path.basename(os.path.normpath(run)): read_metrics(run) for run in args.runs}, args.out)
    print(f"plot: {args.out}")


if __name__ == "__main__":
    run_main(main)
