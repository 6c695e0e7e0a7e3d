"""A table of results: every run of a task, from the data to its row, and the table and the plot of all rows.

    bash scripts/e2e_table.sh --help         (or webnlg_table.sh, dart_table.sh, author_table.sh)

What a task runs is in tasks.py. A run works in the folder RUNS/RUN, keeps its commands there in commands.txt, and ends
with the file RESULTS/DATE_NAME/rows/RUN.json. The same command continues a table that was stopped: finished steps are
skipped, a training continues from its last checkpoint, and a folder with other commands or data is refused.
"""

import argparse
import datetime
import difflib
import glob
import importlib.util
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import NoReturn

from base.errors import fail
from base.files import atomic_write
from base.flags import Parser
from base.signals import on_request, stays_ignored
from row import ROOT, from_root, output_of, write_row
from tasks import TASKS, AnyTask, Run

EPILOG = """\
Several values stand in one word: --epsilon "3 8 inf". Flags after -- go to every training and override its
defaults, such as -- --lr 0.002 --max_epoch 5. The same command continues what was stopped or killed. Other seeds or
budgets under the same --name add rows."""
FORMS = {  # of a word of an option: what it must match, and what is wanted
    "epsilon": (r"inf|published|\d+(\.\d+)?", "a number, inf or published"),
    "method": ("lora|full", "lora or full"),
    "seeds": (r"\d+", "whole numbers"),
    "batch": (r"[1-9]\d*", "a whole number above 0"),
    "nproc": (r"[1-9]\d*", "a whole number above 0"),
    "length_penalty": (r"\d+(\.\d+)?", "a number"),
    "name": ("[A-Za-z0-9.-]+", "letters, digits, dots and hyphens"),
}
PATHS = ("data", "test", "vocab", "train_file", "mirror", "runs", "results")


class Stopped(BaseException):
    """A signal asked this command to stop."""


class Options(Parser):
    def error(self, message: str) -> NoReturn:
        super().error(re.sub(r"argument (\S+): expected one argument", r"\1: wants a value after it", message))


def parse(task: AnyTask, words: list[str]) -> argparse.Namespace:
    """The options, each checked by itself. Paths become relative to the repository's root, the later working folder."""
    own, extra = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = Options(
        prog=f"bash scripts/{task.name}_table.sh",
        description=task.title,
        epilog=EPILOG,
        usage=f"%(prog)s [OPTIONS] [MODEL...] [-- FLAGS OF {task.script}]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "models",
        metavar="MODEL",
        nargs="*",
        help=f"{' '.join(task.models)}, or a folder in Hugging Face's layout "
        f"(default: {' '.join(task.default_models)})",
    )
    add(
        "--epsilon",
        metavar="E",
        default=task.epsilons,
        help="one or more of: a number (the noise is chosen for it), inf (no privacy), 0 (the model as it is)"
        f"{', published (noise multiplier 0.6, for E2E epsilon 5.43)' * bool(task.scores)}; default {task.epsilons}",
    )
    add("--method", metavar="M", default=task.methods, help=f"one or both of: lora, full (default {task.methods})")
    add("--seeds", metavar="S", default=task.seeds, help=f"one or more (default {task.seeds})")
    add("--nproc", metavar="N", help="processes (default: the GPUs, or the cores where there is none)")
    add(
        "--batch",
        metavar="B",
        default=str(task.batch),
        help=f"logical batch, of expected authors where these are the unit (default {task.batch}); accumulation keeps "
        "it, whatever the number of processes",
    )
    for name, metavar, default, text in task.options:
        add(f"--{name}", metavar=metavar, default=default, help=text)
    add("--mirror", metavar="DIR", help="where to copy data, vocabulary and checkpoints from, in place of downloading")
    add("--name", default=task.name, help=f"of the table (default {task.name})")
    add("--results", metavar="DIR", help="where results go (default results)")
    add("--runs", metavar="DIR", help="where trainings go (default trained_models/table_NAME)")
    add("--dry-run", action="store_true", help="print the commands")
    args, unknown = parser.parse_known_intermixed_args(own)
    if unknown:
        fail(f"{unknown[0].partition('=')[0]}: unknown flag; see --help")
    for name in ("epsilon", "method", "seeds"):
        setattr(args, name, getattr(args, name).replace(",", " ").split() or [""])
    for name, (form, wanted) in FORMS.items():
        value: list[str] | str | None = getattr(args, name, None)
        for word in value if isinstance(value, list) else [value] if value is not None else []:
            if not re.fullmatch(form, word):
                fail(f"--{name} {word}: expected {wanted}")
    for name in PATHS:
        if getattr(args, name, None) is not None:
            setattr(args, name, from_root(getattr(args, name)))
    args.batch, args.extra = int(args.batch), extra
    args.results, args.runs = args.results or "results", args.runs or f"trained_models/table_{args.name}"
    args.models = [word if word in task.models else from_root(word) for word in args.models or task.default_models]
    args.nproc = count_processes(args.batch, args.nproc)
    return args


def count_processes(batch: int, given: str | None) -> int:
    """`given`, or the largest divisor of `batch` up to the number of GPUs, or of cores where there is no GPU."""
    if given is not None:
        if batch % int(given):
            fail(
                f"--nproc {given}: does not divide the logical batch of {batch}, which would change, and the noise "
                "with it; choose a divisor, or another --batch"
            )
        return int(given)
    visible, gpus = os.environ.get("CUDA_VISIBLE_DEVICES"), []
    if visible != "":
        gpus = [line for line in (output_of("nvidia-smi", "-L") or "").splitlines() if line.startswith("GPU")]
        gpus = [word for word in visible.split(",") if word] if gpus and visible else gpus
    processes = len(gpus) or len(os.sched_getaffinity(0))
    return next(count for count in range(processes, 0, -1) if batch % count == 0)


def check(task: AnyTask, args: argparse.Namespace) -> None:
    """UserError for a mistake that only the file system or the task shows."""
    for model in args.models:
        if model not in task.models and not os.path.isdir(model):
            fail(
                f"{model}: no such model or folder; wanted {', '.join(task.models)} or a folder in Hugging Face's "
                "layout"
            )
    task.check(args)
    for flag, word in itertools.product(task.reserved.split(), args.extra):
        if word.partition("=")[0] == flag:
            fail(f"{flag} after --: this script sets it; use {task.instead}")


class Table:
    """The runs of one command."""

    def __init__(self, task: AnyTask, args: argparse.Namespace, command: list[str]):
        self.task, self.args, self.command = task, args, shlex.join(command)
        self.mirror = ["--mirror", args.mirror] if args.mirror else []
        found = sorted(glob.glob(f"{glob.escape(args.results)}/????-??-??_{glob.escape(args.name)}"))
        self.folder = found[-1] if found else f"{args.results}/{datetime.date.today()}_{args.name}"

    def split_batch(self, largest: int) -> tuple[int, int]:
        """(batch of a process, at most `largest`; accumulation steps); times the processes, the logical batch."""
        share = self.args.batch // self.args.nproc
        per_device = next(size for size in range(largest, 0, -1) if share % size == 0)
        return per_device, share // per_device

    def launch(self, script: str) -> list[str]:
        """The command that starts a script on all processes; the variable LAUNCHER replaces all but the script."""
        words = ["python"]
        if self.args.nproc > 1:
            words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.args.nproc}"]
        return [*(os.environ.get("LAUNCHER", "").split() or words), script]

    def start(self, *words: str) -> None:
        """Print a command and, unless this is a dry run, run it; exit with its status where it fails. A signal to this
        script is passed on, so that a training writes its checkpoint."""
        print(shlex.join(words), flush=True)
        if self.args.dry_run:
            return
        env = {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **os.environ}
        if stays_ignored(signal.SIGHUP):  # torchrun's agent would heed it all the same
            env.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
        # a terminal sends SIGINT to both; the command gets one signal, from here
        child = subprocess.Popen(
            [env["PYTHON"] if words[0] == "python" else words[0], *words[1:]],
            env=env,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
        try:
            status = child.wait()
        except Stopped:
            child.terminate()
            child.wait()
            raise
        if status:
            sys.exit(status if status > 0 else 128 - status)

    def keep(self, path: str, lines: list[str]) -> None:
        """Write `lines`, which say what the folder of `path` is made of; UserError where `path` has other lines."""
        lines = [f"{line}\n" for line in lines]
        if os.path.exists(path):
            with open(path, encoding="utf-8") as handle:
                before = handle.readlines()
            if before != lines:
                sys.stderr.writelines(difflib.unified_diff(before, lines, "there", "now", n=0))
                fail(
                    f"{os.path.dirname(path)}: was begun with other data or commands, see above; choose another --name"
                )
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with atomic_write(path) as handle:
            handle.writelines(lines)

    def runs(self) -> Iterator[Run]:
        args = self.args
        for model, epsilon in itertools.product(args.models, args.epsilon):
            untrained = epsilon == "0"  # then nothing else varies
            for method, seed in [("none", args.seeds[0])] if untrained else itertools.product(args.method, args.seeds):
                name = f"{os.path.basename(model)}-{method}-epsilon_{epsilon}-seed_{seed}"
                yield Run(model, method, epsilon, int(seed), f"{args.runs}/{name}")

    def make(self, run: Run) -> None:
        """Do the steps of a run that are not done, and write its row."""
        said, steps = self.task.steps(self, run)
        row = f"{self.folder}/rows/{os.path.basename(run.folder)}.json"
        if not self.args.dry_run:
            print(f"\n== {os.path.basename(run.folder)}")
            self.keep(f"{run.folder}/commands.txt", [*said, *(shlex.join(step.command) for step in steps)])
            if os.path.exists(row):
                print(f"{row}: already there (another --name would run it anew)")
                return
        for step in steps:
            if self.args.dry_run:
                self.start(*step.command)
            elif not step.is_done():
                self.start(*step.command, *(["--resume"] if step.is_begun() else []))
        if self.args.dry_run:
            return
        facts = {
            "task": self.task.name,
            "model": os.path.basename(run.model),
            "method": run.method,
            "epsilon": run.epsilon,
            "seed": run.seed,
            "processes": self.args.nproc,
        }
        scored = bool(self.task.scores)
        write_row(row, run.folder, facts, trained=run.epsilon != "0" or not scored, scored=scored)

    def make_all(self) -> None:
        """Make every run that has no row yet, then the plot and the table of all rows, also those of earlier calls."""
        dry = self.args.dry_run
        if not dry:
            if importlib.util.find_spec("torch") is None:
                fail(
                    f"PYTHON={sys.executable}: has no torch; pip install -r requirements.txt, or name another Python "
                    "by this variable"
                )
            os.makedirs(f"{self.folder}/rows", exist_ok=True)
            on_request(stop)
        self.task.prepare(self)
        folders = []
        for run in self.runs():
            self.make(run)
            folders.append(run.folder)
        if not dry:
            self.note_command()
            rows = sorted(glob.glob(f"{glob.escape(self.folder)}/rows/*.json"))
            folders = [f"{self.args.runs}/{os.path.basename(row).removesuffix('.json')}" for row in rows]
            folders = [folder for folder in folders if os.path.exists(f"{folder}/metrics.jsonl")]
            print()
        if folders:
            self.start("python", "scripts/plot_run.py", *folders, "--out", f"{self.folder}/plot.png")
        self.start("python", "scripts/results_tables.py", self.folder)

    def note_command(self) -> None:
        """Add this command to the table's command.txt, once."""
        with open(f"{self.folder}/command.txt", "a+", encoding="utf-8") as handle:
            handle.seek(0)
            if f"{self.command}\n" not in handle.readlines():
                handle.write(f"{self.command}\n")


def stop(number: int) -> NoReturn:
    raise Stopped(number)


def main(words: list[str] | None = None) -> int:
    """words: a task and its options (default: this program's arguments)."""
    words = sys.argv[1:] if words is None else words
    if not words or words[0] not in TASKS:
        fail(f"{' '.join(words[:1])}: no table; wanted {', '.join(TASKS)}, as in scripts/e2e_table.sh")
    task = TASKS[words[0]]
    args = parse(task, words[1:])
    os.chdir(ROOT)
    check(task, args)
    try:
        Table(task, args, ["bash", f"scripts/{task.name}_table.sh", *words[1:]]).make_all()
    except Stopped as error:
        print(f"{signal.Signals(error.args[0]).name}: stopped; the same command goes on from here", file=sys.stderr)
        return 128 + error.args[0]
    return 0
