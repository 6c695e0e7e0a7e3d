r"""Try settings of a training script, and say what the trials and the choice among them disclose together.

    python scripts/sweep.py src/gpt2_ft.py --out sweeps/lr --grid lr=1e-4,4e-4 --grid lora_dim=4,16 --dry-run -- FLAGS
    python scripts/sweep.py src/gpt2_ft.py --out sweeps/lr --random 12 --range lr=1e-4:1e-2:log -- FLAGS
    python scripts/sweep.py src/gpt2_ft.py --out sweeps/best --select poisson --mean 10 --validation public \
        --grid lr=1e-4,4e-4,1e-3 -- FLAGS

FLAGS are those of every trial. Without --select every trial is kept, and the total is the composition of their ledgers.
With --select a random number of trials is run and the best alone is kept (Papernot and Steinke 2022): the others, and
their number, must never be seen. --resume, with the same command, continues after a kill.

Leaves in --out: a folder a trial, sweep.json, table.md, sweep.png; with --select: best/, table.md, selection.json.
"""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from typing import Any

from tqdm import tqdm

import start  # noqa: F401  puts src/ and scripts/tables on the path
from base.errors import fail, run_main
from base.files import atomic_write, lock, read_lines, read_object
from privacy import accounting
from privacy.budget import pack, read_budget, unpack
from privacy.composition import Cost, compose, cost_of, phases_of
from privacy.ledger import FILE_NAME, read_ledger
from privacy.selection import Trials, selection_epsilon
from run.composed import describe_composition, read_accounts
from sweep_space import FREE, SCORES, SCRIPTS, Space, check, choice, parse, read_space
from sweep_table import draw, shown, table

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
FORMAT = 1
STATE, SECRET = "sweep.json", "private"
WANTED = "the state of a sweep; restore it, or choose another --out"


class Sweep:
    """The trials of one command. `folder` holds them; with --select it is a part of --out, removed at the end."""

    def __init__(self, args: Any, words: list[str], space: Space):
        self.args, self.words, self.space = args, words, space
        self.script = os.path.basename(args.script)
        self.trials = None if args.select is None else Trials(args.mean, args.shape)
        self.folder = args.out if self.trials is None else os.path.join(args.out, SECRET)
        self.prices: dict[tuple, dict] = {}
        self.taken: set[tuple[str, str]] = set()  # (flag, value) that the training script has accepted
        self.state: dict = {}

    # ------------------------------------------------------------ what a trial costs

    def command(self, point: dict[str, str], more: list[str]) -> list[str]:
        launcher = shlex.split(self.args.launcher) if self.args.launcher else [sys.executable]
        chosen = [word for name, value in point.items() for word in (f"--{name}", value)]
        return [*launcher, self.args.script, *self.words, *chosen, *more]

    def plan(self, point: dict[str, str]) -> dict:
        """What the training script says that it would draw; its own error where it cannot run. Nothing is written.

        It is asked for every value of every flag, and for every combination of those that its price may depend on.
        """
        key = tuple((name, value) for name, value in point.items() if name not in FREE)
        if key not in self.prices or not self.taken.issuperset(point.items()):
            status, said, wrong = ask(
                self.command(point, ["--plan_only", *self.into(os.path.join(self.folder, "trial")), *self.budget])
            )
            lines = [line for line in said.splitlines() if line.startswith("{")]
            if status or not lines:
                fail(f"{self.args.script}: {last_error(wrong)}")
            self.prices[key] = json.loads(lines[-1])
            self.taken.update(point.items())
        return self.prices[key]

    def into(self, place: str) -> list[str]:
        """The flag of a trial's folder."""
        return [f"--{SCRIPTS[self.script]}", place]

    @property
    def budget(self) -> list[str]:
        return ["--budget", self.args.budget] if self.args.budget else []

    def cost(self, point: dict[str, str]) -> Cost:
        return unpack(self.plan(point)["uses"]) or Counter()

    def check_range(self) -> None:
        """UserError where --select could draw a trial that costs more than what was priced."""
        for name in self.space.ranges if self.trials else ():
            if name not in FREE:
                fail(f"--range {name}: changes what a trial costs, and --select prices every trial; use --grid {name}")

    def price(self, points: list[dict[str, str]], delta: float) -> float:
        """Epsilon of all: of every point composed, or of the best of a random number of them."""
        costs = [self.cost(point) for point in points]
        if self.trials is not None:
            return selection_epsilon([phases_of(cost) for cost in costs], self.trials, delta)
        return accounting.epsilon_prv(phases_of(sum(costs, Counter())), delta)

    # ------------------------------------------------------------ the state

    def settings(self) -> dict:
        """What a continued sweep must have in common with the one that began."""
        args = self.args
        return {
            "format": FORMAT,
            "script": self.script,
            "flags": self.words,
            "grid": self.space.grid,
            "ranges": {name: list(span) for name, span in self.space.ranges.items()},
            "random": args.random,
            "select": None if self.trials is None else str(self.trials),
            "score": args.score,
            "validation": args.validation,
            "launcher": args.launcher,
        }

    def write(self) -> None:
        with atomic_write(os.path.join(self.folder, STATE)) as handle:
            json.dump(self.state, handle, indent=1)

    def read(self) -> None:
        """Take up the state that --resume continues."""
        if not os.path.exists(self.folder) and os.path.exists(os.path.join(self.args.out, "table.md")):
            fail(f"--resume: {self.args.out} holds a selection that is done; see its table.md")
        path, settings = os.path.join(self.folder, STATE), json.loads(json.dumps(self.settings()))
        if not os.path.exists(path):
            fail(f"--resume: {path} is not there: no trial has begun; leave --resume out")
        self.state = read_object(path, WANTED, "--resume")
        differing = [key for key in settings if self.state.get(key) != settings[key]]
        if differing:
            fail(f"--resume: {path} is of another sweep: {differing[0]} is {self.state.get(differing[0])!r} there")

    def begin(self, points: list[dict[str, str]]) -> None:
        """Write a new state. points: the trials, unless --select draws them."""
        os.makedirs(self.folder, mode=0o777 if self.trials is None else 0o700, exist_ok=self.trials is None)
        if self.trials is not None:
            points = [self.space.draw() for _ in range(self.trials.draw())]
        self.state = {**self.settings(), "trials": [{"values": point} for point in points], "best": None, "kept": -1}
        self.write()

    # ------------------------------------------------------------ trials

    def place(self, number: int) -> str:
        """A trial's folder. With --select all have the same: its name is in the files of the best."""
        return os.path.join(self.folder, "trial" if self.trials else f"{number + 1:04d}")

    def run_all(self) -> None:
        total, secret = len(self.state["trials"]), self.trials is not None
        if secret:
            print("running       the trials, without a word of how many are done: their number is secret", flush=True)
        bar = tqdm(total=total, desc="trials", unit="trial", disable=secret or not sys.stderr.isatty())
        with bar:
            for number, trial in enumerate(self.state["trials"]):
                if "uses" not in trial:
                    self.run_one(number, trial)
                if secret:
                    self.keep(number)
                    continue
                chosen = " ".join(f"{name}={value}" for name, value in trial["values"].items())
                bar.clear()
                print(f"trial {number + 1} of {total}: {chosen}: {self.args.score} {shown(trial['score'])}", flush=True)
                bar.update()

    def run_one(self, number: int, trial: dict) -> None:
        """Run or resume a trial, and put its score and uses into the state. UserError where it drew nothing."""
        place = self.place(number)
        ledger, output = os.path.join(place, FILE_NAME), f"{place}.txt"
        resumed = os.path.exists(ledger) and os.path.getsize(ledger) > 0
        if not resumed and self.trials is not None:
            shutil.rmtree(place, ignore_errors=True)  # of an attempt that drew nothing
        more = [*self.into(place), *self.budget]
        with open(output, "w", encoding="utf-8") as handle:
            status = wait(self.command(trial["values"], [*more, *(["--resume"] if resumed else [])]), handle)
        if status < 0 or status >= 128:
            fail(
                f"{place}: the trial was ended by signal {status % 128 if status > 0 else -status}; continue, --resume"
            )
        state = read_ledger(ledger) if os.path.exists(ledger) else None
        if status and (state is None or not state.records):
            with open(output, encoding="utf-8") as handle:
                fail(f"{self.args.script}: {last_error(handle.read())}")
        trial["score"] = None if status else read_score(place, self.args.score)
        trial["uses"] = pack(cost_of(state)) if state is not None else []
        if self.trials is not None and trial["score"] is not None:
            best = self.state["best"]
            if best is None or trial["score"] < self.state["trials"][best]["score"]:
                self.state["best"] = number
        self.write()

    def keep(self, number: int) -> None:
        """With --select: keep the folder of the best so far, and no other. A kill may come between any two lines."""
        place, best = self.place(number), os.path.join(self.folder, "best")
        if number <= self.state["kept"]:
            return  # the folder there is a later trial's
        if self.state["best"] == number and os.path.exists(place):
            shutil.rmtree(best, ignore_errors=True)
            os.rename(place, best)
        shutil.rmtree(place, ignore_errors=True)
        self.state["kept"] = number
        self.write()

    # ------------------------------------------------------------ the end

    def finish_composed(self, delta: float) -> None:
        """Publish the table of all trials, and the epsilon of their ledgers composed."""
        places = [self.place(number) for number in range(len(self.state["trials"]))]
        ledgers = [(os.path.join(place, FILE_NAME), os.path.join(place, "privacy.json")) for place in places]
        accounts, _ = read_accounts(
            [(path, report if os.path.exists(report) else None) for path, report in ledgers if os.path.exists(path)]
        )
        composition = compose(accounts)
        bound = accounting.epsilon_bound(composition.phases, delta)
        rows = [
            {**trial, "name": os.path.basename(place), "epsilon": self.alone(trial, delta)}
            for trial, place in zip(self.state["trials"], places, strict=True)
        ]
        flags, score = self.space.flags, self.args.score
        lines = [table(rows, flags, score)]
        lines += [f"{line}\n" for line in describe_composition(composition) if not line.startswith("note")]
        name = f"{accounting.bound_name(composition.phases)} upper bound"
        lines.append(f"epsilon       {bound.epsilon:.4f} at delta {delta:g} ({name}) of all trials together\n")
        lines.append(f"the choice    {choice(score, self.args.validation)}\n")
        self.publish(lines)
        if any(row["score"] is not None for row in rows):
            path = os.path.join(self.args.out, "sweep.png")
            draw(
                path, rows, flags, score, f"{len(rows)} trials, epsilon {bound.epsilon:.3f} at delta {delta:g} together"
            )
            print(f"plot          {path}")

    def alone(self, trial: dict, delta: float) -> str:
        """Epsilon of one trial."""
        return f"{accounting.epsilon_prv(phases_of(unpack(trial['uses']) or Counter()), delta):.4f}"

    def finish_selected(self, planned: list[dict[str, str]], delta: float) -> None:
        """Publish the best alone. The price is of what trials may cost, and of what each of them did: one that was
        killed repeats steps."""
        spent = [unpack(trial["uses"]) or Counter() for trial in self.state["trials"]]
        assert self.trials is not None
        phases = [phases_of(cost) for cost in (*map(self.cost, planned), *spent)]
        epsilon = selection_epsilon(phases, self.trials, delta)
        text = (
            f"epsilon {epsilon:.4f} at delta {delta:g} (RDP) of the best of a random number of trials ({self.trials}; "
            "Papernot and Steinke 2022); their number and all other trials are deleted and must stay unknown"
        )
        kept, best = os.path.join(self.folder, "best"), os.path.join(self.args.out, "best")
        if self.state["best"] is None:
            self.publish([f"no trial gave a score: nothing is chosen\n{text}\n"])
        else:
            trial = self.state["trials"][self.state["best"]]
            if os.path.exists(kept):
                warn_in_report(os.path.join(kept, "privacy.json"), text)
            row = {**trial, "name": "best", "epsilon": self.alone(trial, delta)}
            result = {"values": trial["values"], "score": trial["score"], "score_name": self.args.score}
            price = {"epsilon": epsilon, "delta": delta, "trials": str(self.trials)}
            self.publish([table([row], self.space.flags, self.args.score), f"{text}\n"])
            with atomic_write(os.path.join(self.args.out, "selection.json")) as handle:
                json.dump({"format": FORMAT, **result, **price}, handle, indent=1)
            if os.path.exists(kept):
                forget_times(kept)
                os.rename(kept, best)
        shutil.rmtree(self.folder)

    def publish(self, lines: list[str]) -> None:
        with atomic_write(os.path.join(self.args.out, "table.md")) as handle:
            handle.writelines(lines)
        print("".join(lines), end="", flush=True)


def ask(command: list[str]) -> tuple[int, str, str]:
    """(status, standard output, standard error) of a command."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def wait(command: list[str], output: Any) -> int:
    """Run a trial to its end and return its status. Whatever ends this process asks the trial to save and end first."""
    child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return child.wait()
    except BaseException:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise


def last_error(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()] or ["the trial ended without a word"]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1]).removeprefix("error: ")


def read_score(folder: str, name: str) -> float | None:
    """The last value of a column of a trial's metrics.jsonl; None for one that is no finite number."""
    path = os.path.join(folder, "metrics.jsonl")
    found = [json.loads(line) for _, line in read_lines(path)]
    values = [record[name] for record in found if name in record]
    if not values:
        fail(f"--score {name}: {path} has no such column; name one of those it has")
    value = values[-1]
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def take(handle: int, folder: str) -> None:
    """Lock the sweep's folder, where there are locks."""
    try:
        lock(handle)
    except BlockingIOError:
        fail(f"--out {folder}: another sweep is running there; wait for its end")


def warn_in_report(path: str, text: str) -> None:
    """Add to what the best trial's privacy.json says to be disclosed: its own epsilon does not pay for the choice."""
    report = read_object(path, "the trial's report")
    words = f"chosen by private selection, which its own epsilon does not pay for: {text}"
    if words not in report.get("disclosed", []):
        report["disclosed"] = [*report.get("disclosed", []), words]
        with atomic_write(path) as handle:
            json.dump(report, handle, indent=1)
            handle.write("\n")


def forget_times(folder: str) -> None:
    """Give all in a folder the present time: how long ago a trial ended tells of how many came after it."""
    for place, folders, files in os.walk(folder):
        for name in (".", *folders, *files):
            os.utime(os.path.join(place, name))


def main() -> None:
    args, words = parse(__doc__.splitlines()[0])
    space = read_space(args.grid, args.range)
    check(args, words, space)
    sweep = Sweep(args, words, space)
    sweep.check_range()
    if args.delta is not None:
        accounting.check_delta(args.delta)
    if args.resume:
        sweep.read()
    elif os.path.exists(args.out) and (not os.path.isdir(args.out) or os.listdir(args.out)):
        fail(f"--out {args.out}: is not empty; continue that sweep with --resume, or name another folder")
    if sweep.trials is not None:
        points = [{**space.draw(), **point} for point in space.all()]
    elif args.resume:
        points = [trial["values"] for trial in sweep.state["trials"]]
    else:
        points = space.all() if args.random is None else [space.draw() for _ in range(args.random)]
    quiet = not sys.stderr.isatty()
    plans = [sweep.plan(point) for point in tqdm(points, desc="pricing", unit="trial", leave=False, disable=quiet)]
    if SCORES[args.score] == "validation" and not all(plan["validated"] for plan in plans):
        fail(f"--score {args.score}: the trials have no validation data; give them, or another --score")
    delta = args.delta or min(plan["delta"] for plan in plans)
    planned = sweep.price(points, delta)
    how = f"{len(points)} trials composed" if sweep.trials is None else f"the best of a random number, {sweep.trials}"
    print(f"planned       epsilon {planned:.4f} at delta {delta:g}: {how}", flush=True)
    if args.dry_run:
        singles = [accounting.epsilon_prv(phases_of(sweep.cost(point)), delta) for point in points]
        print(f"a trial       epsilon {min(singles):.4f} to {max(singles):.4f} alone")
        print(f"the choice    {choice(args.score, args.validation)}")
    if args.budget:
        state, more = read_budget(args.budget, "--budget"), sum(map(sweep.cost, points), Counter())
        if not args.resume and (total := state.total(more)) > state.epsilon:
            fail(
                f"--budget {args.budget}: the trials would bring the total to epsilon {total:.4f} at delta "
                f"{state.delta:g}, beyond its limit {state.epsilon:g}; try fewer"
            )
    if args.dry_run:
        return
    if not args.resume:
        sweep.begin(points)
    holder = os.open(os.path.join(sweep.folder, STATE + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        take(holder, args.out)
        sweep.run_all()
        if sweep.trials is None:
            sweep.finish_composed(delta)
        else:
            sweep.finish_selected(points, delta)
    except SystemExit:  # of a signal
        print("stopped: the same command with --resume continues", file=sys.stderr)
        raise
    finally:
        os.close(holder)


if __name__ == "__main__":
    run_main(main)
