"""The quickstart's table and plot, from what its runs left behind: scores.json, privacy.json, metrics.jsonl.

    python scripts/quickstart_table.py quickstart_runs untuned dp_epsilon3 dp_epsilon8 non_private

Writes table.md and quickstart.png into the first folder.
"""

import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "src"))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cli import Parser, atomic_write, fail, run_main

METRICS = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")


def read_run(folder: str) -> dict:
    """Scores, privacy (None for a model that was not trained here) and metrics of one run."""
    def load(name: str, lines: bool = False):
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            return None
        try:
            with open(path, encoding="utf-8") as handle:
                return [json.loads(line) for line in handle] if lines else json.load(handle)
        except (ValueError, RecursionError) as error:
            fail(f"{path}: not JSON ({error}); run scripts/quickstart.sh again")

    scores = load("scores.json")
    if not isinstance(scores, dict) or "scores" not in scores:
        fail(f"{folder}: holds no scores.json of eval/e2e/measure_scores.py --json; run scripts/quickstart.sh")
    privacy, metrics = load("privacy.json"), load("metrics.jsonl", lines=True) or []
    if privacy and not metrics:
        fail(f"{folder}: holds a privacy.json and no metrics.jsonl; run scripts/quickstart.sh again")
    return {"scores": scores["scores"], "privacy": privacy, "metrics": metrics}


def row(name: str, run: dict) -> list[str]:
    privacy = run["privacy"]
    if privacy is None:
        spent = ["0 (no training)", "-", "-"]
    else:
        private = privacy["epsilon_prv"] != "inf"
        spent = [f"{privacy['epsilon_prv']:.2f}" if private else "inf", f"{privacy['delta']:.0e}" if private else "-",
                 f"{run['metrics'][-1]['seconds']:.0f}"]
    return [name, *(f"{run['scores'][metric]:.4f}" for metric in METRICS), *spent]


def markdown(rows: list[list[str]]) -> str:
    header = ["model", *METRICS, "epsilon", "delta", "training [s]"]
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in [header, *rows]]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines) + "\n"


def draw(runs: dict[str, dict], path: str) -> None:
    """Training loss and epsilon spent against steps, and the scores side by side."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for index, (name, run) in enumerate(runs.items()):
        logged = [record for record in run["metrics"] if record.get("loss") is not None]
        steps, colour = [record["step"] for record in logged], f"C{index}"
        if logged:
            left.plot(steps, [record["loss"] for record in logged], label=name, color=colour)
        if logged and run["privacy"]["epsilon_prv"] != "inf":
            middle.plot(steps, [record["epsilon"] for record in logged], label=f"{name} (PRV upper bound)", color=colour)
        # NIST and CIDEr have other ranges: every score as a share of the best of these runs
        best = [max(other["scores"][metric] for other in runs.values()) or 1.0 for metric in METRICS]
        width = 0.8 / len(runs)
        right.bar([k + (index - (len(runs) - 1) / 2) * width for k in range(len(METRICS))],
                  [run["scores"][metric] / top for metric, top in zip(METRICS, best)], width, label=name, color=colour)
    left.set(title="training loss", xlabel="step", ylabel="nats per scored token")
    middle.set(title="privacy spent", xlabel="step", ylabel="epsilon", ylim=(0, None))
    right.set(title="test scores", ylabel="share of the best", ylim=(0, 1.35))
    right.set_xticks(range(len(METRICS)), METRICS)
    for axes in (left, middle, right):
        axes.legend(fontsize=8, loc="best" if axes is not right else "upper left", ncols=1 if axes is not right else 2)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="where the runs are, and where table.md and quickstart.png go")
    parser.add_argument("runs", nargs="+", help="names of the runs' folders in it")
    args = parser.parse_args()
    folder, runs = args.folder, {name: read_run(os.path.join(args.folder, name)) for name in args.runs}
    table = markdown([row(name, run) for name, run in runs.items()])
    with atomic_write(os.path.join(folder, "table.md")) as handle:
        handle.write(table)
    draw(runs, os.path.join(folder, "quickstart.png"))
    print(table, end="")
    reports = [run["privacy"] for run in runs.values() if run["privacy"] and run["privacy"]["epsilon_prv"] != "inf"]
    for private in reports[:1]:  # the unit and the rest are the same for all of them
        print(f"\nunit: one {private['unit']}; relation: {private['relation']}; sampler: {private['sampling']}; "
              f"plot: {os.path.join(folder, 'quickstart.png')}")


if __name__ == "__main__":
    run_main(main)
