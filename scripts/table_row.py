"""One row of a table of results, as JSON: what a finished run left behind, and with what it was made.

    python scripts/table_row.py --task e2e --run trained_models/table_e2e/RUN --model gpt2.md --method lora \
        --epsilon 8 --seed 110 --processes 16 --out results/2026-01-31_e2e/rows/RUN.json

RUN holds privacy.json and args.json (unless nothing was trained), scores.json (task e2e) and commands.txt. e2e_table.sh
and author_table.sh call this after each run; results_tables.py makes tables of the rows.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, os.path.join(ROOT, "src"))

from cli import Parser, atomic_write, fail, open_text, read_object, run_main
from privacy.ledger import FILE_NAME, read_ledger
from privacy_report import disagreements
from results_tables import E2E_SHA256

PACKAGES = ("torch", "opacus", "numpy", "tokenizers")
WANTED = "what the run wrote; do the run again under another name"


def output_of(*command: str) -> str | None:
    """The standard output of a command; None where there is no such command, or it failed."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> dict:
    """The commit of this checkout, and whether its files differ from it."""
    return {"hash": output_of("git", "rev-parse", "HEAD"),
            "modified": bool(output_of("git", "status", "--porcelain", "--untracked-files=no"))}


def hardware() -> dict:
    """Each machine's GPUs, where processes use them, or the processor's name and cores; memory in bytes."""
    gpus = None
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all"):
        gpus = output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    processor = platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open_text("/proc/cpuinfo") as handle:
            names = [line.split(":", 1)[1].strip() for line in handle if line.startswith("model name")]
        processor = names[0] if names else processor
    return {"machines": int(os.environ.get("SLURM_JOB_NUM_NODES") or 1), "cores": len(os.sched_getaffinity(0)),
            "device": gpus.splitlines()[0] if gpus else processor, "gpus": len(gpus.splitlines()) if gpus else 0,
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "load": round(os.getloadavg()[0], 2)}


def main() -> None:
    parser = Parser(description="one row of a table of results, as JSON")
    add = parser.add_argument
    add("--task", required=True, choices=("e2e", "author"))
    add("--run", required=True, help="folder of the run")
    add("--model", required=True, help="name of the model")
    add("--method", required=True, choices=("lora", "full", "none"), help="none: the model was not trained")
    add("--epsilon", required=True, help="what was asked for: published, a number, inf or 0")
    add("--seed", required=True, type=int)
    add("--processes", required=True, type=int)
    add("--out", required=True, help="file to write")
    args = parser.parse_args()

    row = {name: getattr(args, name) for name in ("task", "model", "method", "epsilon", "seed", "processes")}
    trained = args.epsilon != "0"
    if trained or args.task == "author":
        report, settings = (read_object(os.path.join(args.run, name), WANTED) for name in ("privacy.json", "args.json"))
        if "train_runtime" not in report:
            fail(f"{args.run}: its training has not come to an end; continue it with --resume")
        state = read_ledger(os.path.join(args.run, FILE_NAME)) if trained else None
        if state and state.records and (differing := disagreements(report, state)):
            fail(f"{args.run}/privacy.json: disagrees with the ledger beside it: {differing[0]}; {WANTED}")
        row["privacy"] = report
        left_out = {"versions", "without_effect", "job"}
        if report.get("epsilon_prv") != "inf" and settings.get("train_sha256") != E2E_SHA256:
            left_out.add("train_sha256")  # rows are published, and a private file's digest tells a right guess of it
        row["settings"] = {name: settings[name] for name in settings if name not in left_out}
    if args.task == "e2e":
        scores = read_object(os.path.join(args.run, "scores.json"), WANTED)
        row |= {"scores": scores["scores"], "signature": scores.get("signature")}
    with open_text(os.path.join(args.run, "commands.txt")) as handle:
        row["commands"] = handle.read().splitlines()
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}
    row |= {"commit": commit(), "hardware": hardware(), "versions": versions,
            "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    with atomic_write(args.out) as handle:
        json.dump(row, handle, indent=1)
        handle.write("\n")
    print(f"row: {args.out}")


if __name__ == "__main__":
    run_main(main)
