"""The checks of a run's folder, new or continued: equal settings, a whole ledger, equal flags on all ranks; and the
load of the checkpoint that a run continues from."""

import json
import os

from averages import Average
from base import distributed
from base.errors import UserError, fail
from base.files import check_format
from optimizer import AdamW
from privacy.ledger import Ledger
from privacy.plan import PlanSettings
from run import provenance
from run.log import ARGS, WorkDir
from run.settings import Settings
from run.task import Position
from weights import average_file, checkpoint
from weights.checkpoint import Loaded

# Of args.json. Format 1 has no entry "format", and has "without_effect". A flag that a file lacks did not exist when
# the run began: it had its default.
FORMAT = 2
# Entries of args.json beside the flags in which a resumed run may differ. (The ledger compares sigma and world_size.)
MAY_CHANGE = {"reservation", "padded_lengths", "job", "versions", "without_effect", "format", "sigma", "world_size"}


def open_ledger(work: WorkDir, settings: Settings, plan: PlanSettings, recorded: dict, world_size: int) -> Ledger:
    """On rank 0: open the run's ledger. Raises UserError where a resumed run differs from it or from args.json."""
    loop, flag, entries = settings.loop, settings.flag_of("work_dir"), plan.ledger_entries(world_size)
    unknown = [name for name in loop.resume_changed if name not in {*recorded, *entries}]
    if unknown:
        fail(f"--resume_changed {unknown[0]}: no setting has this name; give names that --resume reports as different")
    if not loop.resume and (found := checkpoint.numbered_checkpoints(work.path)):
        fail(
            f"{flag} {work.path}: holds {os.path.basename(found[-1][1])} of an earlier run; continue it with --resume, "
            "or choose another folder"
        )
    ledger = Ledger(work.path, entries, loop.resume, loop.resume_changed, flag)
    for name in ("target_epsilon", "target_advantage"):
        if (target := getattr(plan, name)) is not None and (count := steps_without_noise(ledger)):
            fail(
                f"--{name} {target:g}: {ledger.path} charges {count} steps without noise, epsilon is infinite and "
                "meets no target; start in a new folder, or give --noise_multiplier"
            )
    if loop.resume and ledger.state.charged:  # a run that was killed before its first step may differ
        # A run from before the flag --base_dtype held float32; where it is not given, what it stands for is recorded.
        defaults = json.loads(json.dumps({**settings.given.defaults, "base_dtype": "float32"}))
        compare(work, recorded, defaults, {*loop.resume_changed, *settings.given.may_change, *MAY_CHANGE})
    return ledger


def compare(work: WorkDir, recorded: dict, defaults: dict, may_change: set[str]) -> None:
    """Raise UserError where the folder's args.json differs from `recorded`, except in `may_change`.
    defaults: of flags that may be absent from the file."""
    before = work.read_json(ARGS)
    check_format(before.get("format"), FORMAT, work.file(ARGS))
    before, recorded = {**defaults, **before}, json.loads(json.dumps(recorded))
    differing = [key for key in sorted({*before, *recorded} - may_change) if before.get(key) != recorded.get(key)]
    if differing:
        what = ", ".join(f"{key} {before.get(key)!r} there, {recorded.get(key)!r} here" for key in differing[:4])
        fail(
            f"--resume: {work.path} is of a run with other settings: {what}; if that is meant, say so with "
            f"--resume_changed {' '.join(differing)}"
        )


def steps_without_noise(ledger: Ledger) -> int:
    """How many of the charged steps had no noise, over all attempts."""
    return sum(record["sigma"] == 0 for record in ledger.state.records)


def is_restarted(work_dir: str) -> bool:
    """Whether `work_dir` holds a run of the job that this process belongs to. Then torchrun has restarted the job, with
    its first command line, after a rank or a machine was lost."""
    job, path = distributed.job_name(), os.path.join(work_dir, ARGS)
    if job is None or not os.path.exists(path):
        return False
    try:
        with open(path, encoding="utf-8") as handle:
            return json.load(handle).get("job") == job
    except (OSError, ValueError, AttributeError, RecursionError):
        return False  # then the folder is another run's, and refused


def check_ledger_is_whole(work: WorkDir, ledger: Ledger, position: Position) -> None:
    """Raise UserError where the checkpoint or privacy.json counts steps that the ledger lacks."""
    charged, done = ledger.state.charged, position.done
    if charged < done:
        fail(
            f"--resume: {ledger.path} records {charged} steps, the checkpoint has {done} behind it: "
            "records are missing; restore the ledger"
        )
    reported = work.read_json("privacy.json").get("steps_charged") if os.path.exists(work.file("privacy.json")) else 0
    if not isinstance(reported, int) or charged < reported:
        fail(
            f"--resume: {ledger.path} records {charged} steps, privacy.json reports {reported}: "
            "records are missing; restore the ledger"
        )
    last = (position.report or {}).get("ledger_checksum")  # "" where nothing was charged
    if last and last not in {record["checksum"] for record in ledger.state.records}:
        fail(
            f"--resume: {ledger.path} lacks the record {last}, its last one at the checkpoint of step {done}: it is "
            "another run's, or lost records; restore the ledger"
        )


def check_ranks_agree(world: distributed.World, recorded: dict) -> None:
    """Raise UserError, on every rank, where the processes have different flags or files. q, C or the noise could then
    differ among them, and rank 0's report would be wrong."""
    first, *others = world.gather({name: value for name, value in recorded.items() if name != "local_rank"})
    with world.raise_if_any_failed():
        for rank, other in enumerate(others, start=1):
            differing = [
                f"{name} {first.get(name)!r} on rank 0, {other.get(name)!r} on rank {rank}"
                for name in sorted({*first, *other})
                if first.get(name) != other.get(name)
            ]
            if differing:
                raise UserError(f"the processes differ: {'; '.join(differing[:4])}; give all the same flags and files")


def load_position(work_dir: str, loaded: Loaded, optimizer: AdamW, average: Average | None = None) -> Position:
    """Load parameters, optimizer and average from the newest checkpoint of `work_dir`; returns the run's position.
    UserError where the frozen weights of `loaded` are not those that the checkpoint's adapters were trained on, or
    where the average that the checkpoint holds is another one.

    A run that was killed before its first checkpoint starts again from its initial weights; its ledger keeps what it
    spent.
    """
    step = checkpoint.latest_resumable(work_dir)
    if step is None:
        return Position()
    # the parameters are views: this fills the flat buffer
    state = checkpoint.load_resumable(work_dir, step, loaded.model)
    before, now = ((base or {}).get("fingerprint") for base in (state["base"], loaded.base))
    if before not in (None, now):
        fail(
            f"--resume {checkpoint.model_path(work_dir, step)}: its adapters were trained on other frozen weights than "
            f"{loaded.path} holds now; restore that file, or start in a new folder"
        )
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        fail(f"--resume {checkpoint.optimizer_path(work_dir, step)}: {error}")
    if average is not None and average.begun(step):
        average_file.load_average(work_dir, step, loaded.model, average)
    report = state["privacy"]
    if report is not None:
        report = provenance.checked(report, f"--resume {checkpoint.model_path(work_dir, step)}: its entry 'privacy'")
    return Position(step, state.get("progress"), report)
