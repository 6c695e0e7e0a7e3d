"""Set-up of a run: from a training script's settings and data to a Trainer."""

import dataclasses
import json
import platform
import sys

import torch

from averages import Average
from base import distributed
from base.distributed import World
from base.errors import UserError, fail
from base.products import BLOCK_ROWS
from corpus.batching import PublicLengths, TightCut, choose_lengths
from language_model import Shape
from optimizer import AdamW, FlatParameters
from privacy.budget import pack
from privacy.clipping import BookKeeping, NonPrivate, rounding_share
from privacy.company import check_company, check_ranks_compute_alike, check_ranks_round_alike
from privacy.ledger import Ledger, NoLedger
from privacy.plan import Course, PlanSettings, PrivacyPlan, choose_sigma
from run import loop, provenance, spending
from run.log import ARGS, NoWorkDir, WorkDir
from run.resume import (
    FORMAT,
    check_ledger_is_whole,
    check_ranks_agree,
    is_restarted,
    load_position,
    open_ledger,
    steps_without_noise,
)
from run.settings import DEFAULT_TOKENS, MOST_STEPS, Settings
from run.task import Engine, Learner, Position, Task
from weights.checkpoint import Loaded, load_model

# Noise beyond so many times C is warned of. The published command has 2.9 (393,216 parameters, sigma 0.6, batch 128).
LOUD = 5.0
# What every run discloses beside the model, without noise; privacy.json lists it.
DISCLOSED = (
    "training loss and throughput of every log line, and the sums of both in optimizer.{step}.pt, not privatised",
    "args.json: the digest of the training file, by which a guess of the whole file can be checked",
    "train_runtime and peak_memory_bytes, which follow from what was drawn, not privatised",
)
# This text does not depend on the data. The number of validation texts that are training texts is an exact count of
# private data, also where it is 0: one more unit changes it. So it is printed on the terminal and written to no file.
VALIDATION_LOSS = (
    "validation loss, of data that is not protected at all; how much of it is training data, too, is "
    "said on the terminal alone, not privatised"
)


def check_validation(flag: str, path: str, sha256: str, train_sha256: str) -> None:
    """Raise UserError where the validation data are the training file: their loss is disclosed without noise."""
    if sha256 == train_sha256:
        fail(
            f"{flag} {path}: is the training file (same sha256), and validation data are not protected at all; give "
            "other data"
        )


def base_dtype(settings: Settings, world: World) -> str:
    """--base_dtype, or what it is where it is not given."""
    model = settings.model
    return model.base_dtype or ("bf16" if model.lora_config().adapts and world.device.type == "cuda" else "float32")


def load_weights(settings: Settings, world: World, path: str | None, card: str | None) -> Loaded:
    """The model of a run, from the checkpoint `path`; None draws new weights with the run's seed."""
    torch.manual_seed(settings.loop.random_seed)
    model, longest, flag = settings.model, settings.data.seq_len, settings.flag_of("init_checkpoint")
    loaded = load_model(
        path, card, model.lora_config(), model.base_checkpoint, flag, base_dtype(settings, world) == "bf16"
    )
    if longest > loaded.model.config.n_positions:
        fail(f"{settings.flag_of('seq_len')} {longest}: {loaded.model.config.limit}")
    return loaded


def epochs_to_steps(epochs: float, N: int, batch: int) -> int:
    """The number of logical steps in which every unit is expected to be used `epochs` times; at least 1."""
    return max(1, round(epochs * N / batch))


def logical_batch(settings: Settings, world: World) -> int:
    """Expected units of a step, over all ranks."""
    return settings.loop.train_batch_size * settings.loop.grad_acc * world.size


def count_steps(settings: Settings, N: int, world: World, default: int = 0) -> int:
    """Logical steps of the run: the lesser of max_step and max_epoch passes over N units; without both, `default`."""
    loop = settings.loop
    limits = [] if loop.max_step is None else [loop.max_step]
    if loop.max_epoch is not None:
        limits.append(epochs_to_steps(loop.max_epoch, N, logical_batch(settings, world)))
    return min(limits, default=default)


def check_task(settings: Settings, task: Task, world: World) -> None:
    """Raise UserError for mistakes that show only beside the size of the data."""
    batch, flag_of = logical_batch(settings, world), settings.flag_of
    if batch > task.N:
        fail(
            f"{flag_of('train_batch_size')} x {flag_of('grad_acc')} x processes = {batch} is larger than the training "
            f"data ({task.N} {task.unit}s): lower one of them"
        )
    if not 1 <= task.steps <= MOST_STEPS:
        fail(f"{flag_of('max_step')} {task.steps}: expected at least one step, at most {MOST_STEPS:g}")


def choose_public_lengths(settings: Settings, task: Task, world: World, config: Shape) -> PublicLengths:
    """How a private run cuts its draws. The padded lengths come from the validation data, which no run protects."""
    budget = settings.loop.micro_batch_tokens or DEFAULT_TOKENS[world.device.type]
    # On average half a block of rows is padding, in the transformer and in the head. head: the head's work over that of
    # the transformer.
    head = config.vocab_size / config.block_outputs
    lengths = choose_lengths(
        None if task.valid is None else task.valid.inputs,
        max(1, task.longest - 1),
        logical_batch(settings, world) / world.size,
        budget,
        BLOCK_ROWS[world.device.type] / 2 * (1 + head),
        task.rows_per_unit,
    )
    return PublicLengths(lengths, budget)


def make_plan_settings(settings: Settings, task: Task, world: World) -> PlanSettings:
    """The settings of the privacy plan. Rank 0 computes the noise multiplier of a target for all ranks."""
    privacy, batch = settings.privacy, logical_batch(settings, world)
    given = privacy.noise_multiplier
    sampling = privacy.sampling or ("shuffle" if given == 0 else "poisson")
    sigma = torch.zeros(1, dtype=torch.float64)
    with world.raise_if_any_failed():
        if given is not None:
            sigma.fill_(given)
        elif world.is_main:
            course = Course(task.N, batch, task.steps, sampling, privacy.mechanism)
            try:
                sigma.fill_(choose_sigma(course, task.delta, privacy.target_epsilon, privacy.target_advantage))
            except UserError as failure:
                fail(f"--target_{'epsilon' if privacy.target_advantage is None else 'advantage'}: {failure}")
    return PlanSettings(
        unit=task.unit,
        N=task.N,
        batch=batch,
        steps=task.steps,
        clip=privacy.max_grad_norm,
        sigma=world.broadcast(sigma).item(),
        delta=task.delta,
        target_epsilon=privacy.target_epsilon,
        target_advantage=privacy.target_advantage,
        mechanism=privacy.mechanism,
        sampling=sampling,
        clipping=privacy.clipping,
        noise_source=privacy.noise_source,
        seed=privacy.noise_seed,
        rounding=rounding_share(batch, max(1, task.longest - 1), task.rows_per_unit),
    )


def build_trainer(settings: Settings, task: Task, world: World, loaded: Loaded) -> loop.Trainer:
    """The Trainer of checked settings. Collective: every rank calls it, and an error on one rank ends all.

    A run that torchrun restarts (is_restarted) continues as with --resume, or is refused where the task cannot resume.
    """
    recorded = {**settings.given.values, "base_dtype": base_dtype(settings, world), **task.digests}
    check_ranks_agree(world, recorded)
    # TF32, which some machines switch on by an environment variable, would round the norms to 10 bits.
    torch.set_float32_matmul_precision("highest")
    folder, flag = settings.loop.work_dir, settings.flag_of("work_dir")
    restarted = world.gather(world.is_main and not settings.loop.resume and is_restarted(folder))[0]
    if restarted and not task.resumable:
        fail(
            f"{flag} {folder}: begun by this job, {distributed.job_name()}, and started again, which cannot continue; "
            "start it in another folder",
            on_every_rank=True,
        )
    if restarted:
        settings = settings.changed(loop={"resume": True})
        recorded["resume"] = True
    lengths = choose_public_lengths(settings, task, world, loaded.model.config)
    planned = make_plan_settings(settings, task, world)
    if settings.privacy.grad_engine == "opacus" and not planned.private:
        fail(
            "--grad_engine opacus: computes a clipped sum, and a run without noise clips nothing; give "
            "--target_epsilon, --target_advantage or --noise_multiplier, or leave the flag out",
            on_every_rank=True,
        )
    if settings.loop.plan_only:
        print_plan(planned, task, world)
    flat, optimizer = prepare_parameters(settings, world, loaded, planned.private)
    rule = settings.optimizer.average
    average = None if rule is None else Average(rule, flat, planned.steps)
    cut = lengths if planned.private else TightCut(lengths.token_budget)
    resumes = settings.loop.resume

    work: WorkDir = NoWorkDir(folder)
    ledger: Ledger = NoLedger()
    position = Position()
    reservation: str | None = None
    origin: dict = {"initial_weights": []}
    with world.raise_if_any_failed():
        if world.is_main:
            spent = provenance.spent_before(loaded)  # refuses damaged reports before anything is written
            reservation = spending.choose_name(
                settings.privacy.budget, folder, task.unit, task.digests.get("train_sha256", ""), resumes
            )
            work = WorkDir(folder, must_exist=resumes, flag=flag)
            recorded |= {
                "sigma": planned.sigma,
                "delta": planned.delta,
                "N": planned.N,
                "steps": planned.steps,
                "expected_batch": planned.batch,
                "sampling": planned.sampling,
                "padded_lengths": list(lengths.lengths),
                "world_size": world.size,
                "job": distributed.job_name(),
                "reservation": reservation,
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
            }
            ledger = open_ledger(work, settings, planned, recorded, world.size)
        if resumes:
            position = load_position(folder, loaded, optimizer, average)
        if world.is_main:
            if resumes:
                check_ledger_is_whole(work, ledger, position)
            # not before: a --resume that is refused leaves the run's own settings there
            work.write_json(ARGS, {"format": FORMAT, **recorded})
            origin = provenance.begin(spent, position.report, folder, resumes, settings.privacy.noise_seed)
        if settings.loop.tensorboard:
            work.open_tensorboard(position.done)
        plan = PrivacyPlan(planned, world, ledger, position.done)
    if len(set(world.gather(position.done))) > 1:
        fail(
            f"--resume: the ranks found checkpoints of different steps in {folder}: all machines must see the same "
            "folder",
            on_every_rank=True,
        )
    engine = build_engine(settings, loaded, flat, plan, world)
    low = "--bf16" if settings.loop.bf16 else "--base_dtype bf16" if recorded["base_dtype"] == "bf16" else None
    if planned.private and low:
        check_company(engine, loaded.model, flat, lengths, world, low)
    if planned.private and settings.loop.bf16:
        if world.size > 1:
            check_ranks_compute_alike(engine, loaded.model, flat, lengths, world)
    elif planned.private and world.size > 1 and world.device.type == "cpu":  # on GPUs kernels may add in any order
        check_ranks_round_alike(engine, loaded.model, flat, lengths, world)
    if task.wrap_engine is not None:
        engine = task.wrap_engine(engine, flat, plan, cut)

    disclosed = [*DISCLOSED, *task.disclosed, *map(provenance.describe, origin["initial_weights"])]
    learner = Learner(loaded, flat, engine, optimizer, cut, average)
    trainer = loop.Trainer(
        world, settings, dataclasses.replace(task, disclosed=disclosed), learner, plan, work, position
    )
    trainer.facts.update(origin if rule is None else {**origin, "average": rule})
    with world.raise_if_any_failed():
        if world.is_main and reservation is not None:  # last of all, so that whatever fails before reserves nothing
            reserve(trainer, reservation)
    if restarted:
        trainer.display.say(
            f"{folder}: begun by this job, {distributed.job_name()}, and started again: continued as by --resume",
            important=True,
        )
    return trainer


def print_plan(planned: PlanSettings, task: Task, world: World) -> None:
    """Print the plan as a line of JSON, on rank 0, and end the process. Its uses are as in a budget file."""
    steps = min(task.steps, task.last_step or task.steps)
    if world.is_main:
        plan = {name: getattr(planned, name) for name in ("unit", "N", "batch", "sigma", "delta", "target_epsilon")}
        print(
            json.dumps(
                {**plan, "steps": steps, "validated": task.valid is not None, "uses": pack(planned.cost(steps))}
            ),
            flush=True,
        )
    world.close()
    sys.exit(0)


def reserve(trainer: loop.Trainer, name: str) -> None:
    """Reserve the run's share of --budget, on rank 0, and say what is left."""
    path, digests = trainer.settings.privacy.budget, trainer.task.digests
    assert path is not None
    share = spending.reserve(path, name, trainer.plan, digests.get("train_sha256", ""), trainer.last, trainer.done)
    say = trainer.display.say
    say(f"budget {path}: {spending.describe(share.state)}, this run included")
    if share.short:
        say(
            f"WARNING: the budget has no room for every step to come: the run ends within what it has reserved, after "
            f"{trainer.plan.permitted} steps at the most",
            important=True,
        )
    if not share.hold.locked:
        say(
            f"WARNING: the file system of {path} has no locks: start one run after the other; a run that finds its "
            "reservation overwritten draws no further step",
            important=True,
        )


def prepare_parameters(settings: Settings, world: World, loaded: Loaded, private: bool) -> tuple[FlatParameters, AdamW]:
    """(the trained parameters in one buffer on their device, with rank 0's values on every rank; their optimizer)."""
    model, chosen = loaded.model.to(world.device), settings.optimizer
    model.freeze_for_training()
    sums = torch.float64 if private else torch.float32
    sharers = world if settings.loop.shard == "optimizer" else None
    flat = FlatParameters(model, loop.EXTRA, chosen.no_decay_bias, sums, sharers)
    for parameter in model.parameters():  # every rank starts from rank 0's
        world.broadcast(parameter.data)
    betas = (chosen.adam_beta1, chosen.adam_beta2)
    return flat, AdamW(flat, betas, chosen.adam_epsilon, chosen.weight_decay, chosen.correct_bias, chosen.torch_eps)


def build_engine(settings: Settings, loaded: Loaded, flat: FlatParameters, plan: PrivacyPlan, world: World) -> Engine:
    """The gradient engine, with the plan's clipping rule. Collective."""
    smoothing, recompute = settings.optimizer.label_smooth, settings.loop.recompute
    if not plan.settings.private:
        return NonPrivate(loaded.model, flat, smoothing, recompute)
    if settings.privacy.grad_engine == "opacus":
        from privacy.opacus_engine import OpacusEngine

        return OpacusEngine(loaded.model, flat, plan.clipping_rule, smoothing, world, recompute)
    return BookKeeping(loaded.model, flat, plan.clipping_rule, smoothing, recompute)


def warn_of_shared(trainer: loop.Trainer, what: str, shared: int, of: int) -> None:
    """Warn where validation data are training data too. what: the plural of what is counted, shared of `of`."""
    if shared:
        trainer.display.say(
            f"WARNING: {shared} of the {of} validation {what} are training {what}, too: the validation "
            "loss is not one of unseen data, and validation data are not protected at all (the count "
            "itself has no noise)",
            important=True,
        )


def announce_noise(trainer: loop.Trainer) -> None:
    """Say how large a step's noise is beside what it could teach. Both are public: neither looks at the data."""
    plan, settings, name = trainer.plan, trainer.plan.settings, trainer.settings.flag_of
    noise, d = plan.noise_norm(trainer.learner.flat.size), trainer.learner.flat.size
    trainer.display.say(
        f"norm of a step's noise {noise:.3g} (sigma C sqrt({d})/{settings.batch}), of its signal at most "
        f"C = {settings.clip:g}, with {settings.batch} {settings.unit}s drawn"
    )
    if noise > LOUD * settings.clip:
        trainer.display.say(
            f"WARNING: a step's noise is {noise / settings.clip:.3g} times the most that its signal can have: raise "
            f"{name('train_batch_size')}, {name('grad_acc')} or the number of processes (their product, the batch, is "
            f"{settings.batch}; the published command has 8 over 16 processes, 128), or train fewer parameters",
            important=True,
        )


def announce(trainer: loop.Trainer) -> None:
    """Print, before the first step, the settings that epsilon follows from, and warnings."""
    plan, settings, say = trainer.plan, trainer.plan.settings, trainer.display.say
    say(
        f"{settings.N} {settings.unit}s, expected batch {settings.batch} (q = {settings.q:.6g}), "
        f"{settings.steps} steps, {trainer.learner.flat.size} trained parameters, {trainer.world.size} process(es) on "
        f"{trainer.world.device.type}"
    )
    charged = plan.ledger.state.charged
    if trainer.done or charged:
        say(f"resumed after step {trainer.done}; {charged} steps charged so far")
    if not plan.ledger.locked:
        say(
            f"WARNING: the file system of {plan.ledger.path} has no locks: nothing keeps a second run out of this "
            "folder, but the length of that file; start none",
            important=True,
        )
    if not plan.ledger.synced:
        say(
            f"WARNING: the file system of {plan.ledger.path} cannot sync a folder: a power cut may take the file away "
            "that counts what this run spends; look for it before you use a checkpoint",
            important=True,
        )
    if not settings.private:
        say("noise multiplier 0: non-private training without clipping or noise; epsilon = inf", important=True)
        return
    say(
        f"noise multiplier {settings.sigma:.6g}, clipping {settings.clipping} to {settings.clip:g}, "
        f"{settings.sampling} sampling, noise from {settings.noise_source}, delta {settings.delta:.3g}"
    )
    announce_noise(trainer)
    if count := steps_without_noise(plan.ledger):
        say(
            f"WARNING: {count} of the steps charged so far had no noise: epsilon is infinite, whatever noise follows",
            important=True,
        )
    for words in trainer.task.disclosed:
        if words.startswith("initial weights"):
            say(f"WARNING: {words}", important=True)
    if settings.noise_source == "seeded":
        say(
            "WARNING: --noise_source seeded: anyone who knows the seed can subtract the noise. For tests only.",
            important=True,
        )
    if not settings.amplified:
        say(f"{settings.sampling} sampling: epsilon is reported without amplification by sampling", important=True)
