"""One row of a table of results, as JSON: what a finished run left behind, and with what it was made."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess

from base.errors import fail
from base.files import atomic_write, open_text, read_object
from privacy.ledger import FILE_NAME, read_ledger
from run.provenance import disagreements

ROOT = os.path.realpath(os.path.join(os.path.dirname(__file__), "..", ".."))
E2E_SHA256 = "dbc41b098ac523651894eabb7fe140f272445efe3bb4654d4666f2a1976c86b2"  # data/e2e/train.jsonl
PACKAGES = ("torch", "opacus", "numpy", "tokenizers")
WANTED = "what the run wrote; do the run again under another name"


def from_root(path: str) -> str:
    """A path that the user gave, relative to the repository's root where it lies below it."""
    path = os.path.realpath(path)
    return os.path.relpath(path, ROOT) if path == ROOT or path.startswith(ROOT + os.sep) else path


def output_of(*command: str) -> str | None:
    """The standard output of a command; None where the command is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> dict:
    """The commit of this checkout, and whether its files differ from it."""
    return {
        "hash": output_of("git", "rev-parse", "HEAD"),
        "modified": bool(output_of("git", "status", "--porcelain", "--untracked-files=no")),
    }


def hardware() -> dict:
    """The machines, and of this one: GPUs where processes use them, processor, cores, memory in bytes, load."""
    gpus = None
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all"):
        gpus = output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    processor = platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open_text("/proc/cpuinfo") as handle:
            names = [line.split(":", 1)[1].strip() for line in handle if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "machines": int(os.environ.get("SLURM_JOB_NUM_NODES") or 1),
        "cores": len(os.sched_getaffinity(0)),
        "device": gpus.splitlines()[0] if gpus else processor,
        "gpus": len(gpus.splitlines()) if gpus else 0,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": round(os.getloadavg()[0], 2),
    }


def write_row(path: str, folder: str, facts: dict, trained: bool, scored: bool) -> None:
    """Write the row of the run in `folder`: `facts`, commands.txt, commit, hardware and versions; privacy.json and
    args.json where it was `trained`; scores.json where it was `scored`."""
    row = dict(facts)
    if trained:
        report, settings = (read_object(os.path.join(folder, name), WANTED) for name in ("privacy.json", "args.json"))
        if "train_runtime" not in report:
            fail(f"{folder}: its training has not come to an end; continue it with --resume")
        ledger = os.path.join(folder, FILE_NAME)
        state = read_ledger(ledger) if os.path.exists(ledger) else None
        if state and state.records and (differing := disagreements(report, state)):
            fail(f"{folder}/privacy.json: disagrees with the ledger beside it: {differing[0]}; {WANTED}")
        row["privacy"] = report
        left_out = {"versions", "without_effect", "job"}
        if report.get("epsilon_prv") != "inf" and settings.get("train_sha256") != E2E_SHA256:
            left_out.add(
                "train_sha256"
            )  # with the digest of a private file, anyone could verify a guess of its content
        row["settings"] = {name: settings[name] for name in settings if name not in left_out}
    if scored:
        found = read_object(os.path.join(folder, "scores.json"), WANTED)
        row |= {"scores": found["scores"], "signature": found.get("signature")}
    with open_text(os.path.join(folder, "commands.txt")) as handle:
        row["commands"] = handle.read().splitlines()
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}
    row |= {
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    with atomic_write(path) as handle:
        json.dump(row, handle, indent=1)
        handle.write("\n")
    print(f"row: {path}")
