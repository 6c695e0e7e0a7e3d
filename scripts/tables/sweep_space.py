"""What a sweep (scripts/sweep.py) tries, and which flags and scores it takes."""

import argparse
import itertools
import math
import os
import secrets
import sys
from dataclasses import dataclass

from base.errors import fail
from base.flags import Parser
from privacy.selection import Trials

SCRIPTS = {"gpt2_ft.py": "work_dir", "fine-tune-dp.py": "output_dir"}  # the flag of a trial's folder
SCORES = {  # column of metrics.jsonl -> what it reads beside the released model
    "valid_loss": "validation",
    "valid_ppl": "validation",
    "average_valid_loss": "validation",  # of --average: as private as the last iterate
    "average_valid_ppl": "validation",
    "grad_norm": "noise",  # of the released gradient: its trial's own price covers it
    "loss": "training",
    "train_loss": "training",
}
# Flags that change nothing of what a trial costs. All others are priced anew for each value.
FREE = set(
    "lr learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon adam_epislon correct_bias no_decay_bias "
    "warmup_step warmup_steps scheduler lr_scheduler_type label_smooth lora_dim lora_alpha lora_dropout lora_target "
    "adapter_dim clip max_grad_norm per_sample_max_grad_norm clipping average".split()
)
OURS = ("work_dir", "output_dir", "resume", "plan_only", "budget", "dry_run", "resume_from_checkpoint")


@dataclass(frozen=True)
class Space:
    """What is tried: the values of each flag of a grid, and (low, high, by logarithm) of each range."""

    grid: dict[str, list[str]]
    ranges: dict[str, tuple[float, float, bool]]

    @property
    def flags(self) -> list[str]:
        return [*self.grid, *self.ranges]

    def all(self) -> list[dict[str, str]]:
        """Every point of the grid."""
        return [dict(zip(self.grid, point, strict=True)) for point in itertools.product(*self.grid.values())]

    def draw(self) -> dict[str, str]:
        """A point, uniform in each flag, from the operating system's entropy."""
        point = {name: secrets.choice(values) for name, values in self.grid.items()}
        for name, (low, high, by_logarithm) in self.ranges.items():
            share = secrets.randbelow(2**53) / 2**53
            value = low * (high / low) ** share if by_logarithm else low + share * (high - low)
            point[name] = f"{value:.6g}"
        return point


def read_space(grids: list[str], ranges: list[str]) -> Space:
    """The values of --grid and --range. UserError for one that is malformed, or a flag that is given twice."""
    grid: dict[str, list[str]] = {}
    for text in grids:
        name, _, values = text.partition("=")
        grid[name.lstrip("-")] = found = [value for value in values.split(",") if value]
        if not name or not found or len(set(found)) < len(found):
            fail(f"--grid {text}: wanted FLAG=VALUE,VALUE,... with different values, such as lr=1e-4,4e-4")
    spans: dict[str, tuple[float, float, bool]] = {}
    for text in ranges:
        name, _, values = text.partition("=")
        parts = values.split(":")
        try:
            low, high = map(float, parts[:2])
        except ValueError:
            low = high = math.nan
        by_logarithm = parts[2:] == ["log"]
        if not (name and low < high < math.inf and parts[2:] in ([], ["log"]) and (low > 0 or not by_logarithm)):
            fail(f"--range {text}: wanted FLAG=LOW:HIGH, or FLAG=LOW:HIGH:log with LOW above 0")
        spans[name.lstrip("-")] = (low, high, by_logarithm)
    space = Space(grid, spans)
    if not space.flags:
        fail("--grid: give it or --range, there is nothing to try")
    if len(set(space.flags)) < len(grids) + len(ranges):
        fail(f"--grid and --range: {' '.join(space.flags)} are given twice; give each flag once")
    return space


def choice(score: str, validation: str) -> str:
    """A sentence: whether the choice of a trial by its score is covered by the total."""
    reads = SCORES[score]
    if reads == "training":
        return f"by {score} is NOT private: it is a loss of the training data, without noise"
    if reads == "validation" and validation == "private":
        return f"by {score} is NOT private: it reads validation data that were not said to be public (--validation)"
    return f"by {score} is covered by the total: it reads released models and noisy releases, and public data alone"


def parse(description: str) -> tuple[argparse.Namespace, list[str]]:
    """(flags of the sweep, those of every trial, which follow "--")."""
    parser = Parser(description=description, usage="%(prog)s SCRIPT --out DIR ... -- FLAGS OF EACH TRIAL")
    add = parser.add_argument
    add("script", metavar="SCRIPT", help="src/gpt2_ft.py or src/fine-tune-dp.py")
    add("--out", required=True, metavar="DIR", help="where the trials go")
    add("--grid", action="append", default=[], metavar="FLAG=A,B", help="values to try; may be repeated")
    add("--range", action="append", default=[], metavar="FLAG=LOW:HIGH[:log]", help="for --random and --select")
    add("--random", type=int, metavar="N", help="N random trials in place of the whole grid")
    add("--select", choices=("poisson", "tnb"), help="private selection: a random number of trials, the best is kept")
    add("--mean", type=float, help="with --select: mean number of trials")
    add("--shape", type=float, help="with --select tnb: 1 geometric (default), 0 logarithmic")
    add("--score", default="valid_loss", help="column of metrics.jsonl, the lower the better (default valid_loss)")
    add("--validation", choices=("public", "private"), default="private", help="what the validation data are")
    add("--delta", type=float, help="of the total (default: the trials')")
    add("--budget", metavar="FILE", help="a budget file: every trial reserves there")
    add("--launcher", metavar="WORDS", help="in place of python, such as 'torchrun --nproc_per_node=2'")
    add("--dry-run", action="store_true", help="print what it would cost; nothing is run or written")
    add("--resume", action="store_true", help="continue after a kill")
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    return parser.parse_args(words[:at]), words[at + 1 :]


def check(args: argparse.Namespace, words: list[str], space: Space) -> None:
    """Raise UserError for what shows before any trial is priced; set args.shape and args.validation to what holds."""
    script = os.path.basename(args.script)
    if script not in SCRIPTS or not os.path.exists(args.script):
        fail(f"{args.script}: is no training script; wanted src/gpt2_ft.py or src/fine-tune-dp.py")
    given = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    for name in (*given, *space.flags):
        if name in OURS:
            fail(f"--{name}: each trial gets its own; leave it out" + " (--budget goes before --)" * (name == "budget"))
    for name in space.flags:
        if name in given:
            fail(f"--{name}: is tried, and given to every trial; give it once")
    if "seeded" in words or any(word.endswith("=seeded") for word in words):
        fail("--noise_source seeded: trials of one seed share their noise, and no total holds; leave it out")
    if args.score not in SCORES:
        fail(f"--score {args.score}: no such column; wanted one of {', '.join(SCORES)}")
    if args.random is not None and args.random < 1:
        fail(f"--random {args.random}: expected at least 1 trial")
    if space.ranges and args.random is None and args.select is None:
        fail("--range: a grid has values only; give --random N or --select")
    held_out = script == "fine-tune-dp.py" and "eval_file" not in given
    public = args.validation == "public" and not held_out
    if args.select is None:
        args.validation = "public" if public else "private"
        if args.mean is not None or args.shape is not None:
            fail("--mean and --shape: go with --select")
        return
    if args.mean is None:
        fail("--select: needs --mean, the mean number of trials")
    if args.shape is not None and args.select == "poisson":
        fail(f"--shape {args.shape:g}: goes with --select tnb")
    args.shape = (1.0 if args.shape is None else args.shape) if args.select == "tnb" else None
    Trials(args.mean, args.shape).check()
    for name in ("random", "budget"):
        if getattr(args, name) is not None:
            why = "draws its number of trials" if name == "random" else "is no composition, which a budget counts"
            fail(f"--{name}: private selection {why}; leave it out")
    if "tensorboard" in (*given, *space.flags):
        fail("--tensorboard: its files hold the hours of the best trial, which tell how many others ran; leave it out")
    reads = SCORES[args.score]
    if reads == "training" or (reads == "validation" and not public):
        what = (
            "authors of --train_file are held out" if held_out and args.validation == "public" else "it is not private"
        )
        reason = "training data without noise" if reads == "training" else f"validation data: {what}"
        cure = "" if reads == "training" else "say --validation public where the validation data are, "
        fail(
            f"--score {args.score}: reads {reason}, so no choice by it is private; {cure}choose --score grad_norm, or "
            "leave --select out"
        )
