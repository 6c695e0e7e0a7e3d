"""What the training scripts do before their first step: the flags that they share, and the way from flags to a run."""

import argparse
import importlib.util
import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch

import checkpoint
import distributed
import provenance
import training
from batching import PublicLengths, TightCut, choose_lengths
from cli import UserError, check_least, check_positive, check_range, fail
from distributed import World
from fast_linear import BLOCK_ROWS
from model import SLOTS, GPT2Config, GPT2LMModel, LoRAConfig
from optimizer import AdamW, FlatParameters
from privacy.clipping import BookKeeping, Ordinary, rounding_share
from privacy.company import check_company, check_ranks_compute_alike
from privacy.ledger import Ledger
from privacy.plan import PlanSettings, PrivacyPlan, choose_sigma
from run_log import WorkDir

# Padded tokens of a micro-batch where --micro_batch_tokens is not given; measured in scripts/benchmark_training.py.
DEFAULT_TOKENS = {"cpu": 2048, "cuda": 16384}
# Settings that change how a run goes about its work, not what it computes: a resumed run may differ in them.
# Data and vocabulary are compared by their digests, wherever the files lie.
FREE = ("resume", "resume_changed", "job", "grad_engine", "micro_batch_tokens", "padded_lengths",
        "collective_timeout", "local_rank", "tensorboard",
        # of gpt2_ft.py
        "train_data", "valid_data", "log_interval", "eval_interval", "eval_epoch", "save_interval", "valid_batch_size",
        "work_dir", "platform",
        # of fine-tune-dp.py
        "resume_from_checkpoint", "logging_steps", "eval_strategy", "eval_steps", "save_steps", "log_level",
        "disable_tqdm", "dry_run", "output_dir", "cache_dir", "train_file", "eval_file", "vocab", "without_effect",
        "remove_unused_columns", "label_names", "prediction_loss_only", "eval_accumulation_steps",
        "per_device_eval_batch_size", "dataloader_num_workers")
DEFAULT_DELTA = 1e-5  # of an epsilon for examples
MOST_EPOCHS = 1e6  # more is a slip of the finger, and no number of steps
MOST_STEPS = 10**9  # likewise: 11 days at a millisecond each
# C. Gradients and the squares of their coordinates are float32, whose normal numbers lie between 2^-126 and 2^128;
# smaller ones lose their digits, and some kernels flush them to 0. A unit's squared norm must be right to 2^-20 of itself
# where it is about C^2.
#   Least: the squares of 2^31 coordinates lose up to 2^-95, and per_layer shares C^2 out among up to 2^10 parameters:
#   C = 2^-20 has a margin of 2^25. (Gram matrices are float64 and lose nothing.)
#   Most: the square of the sum of 2^31 units of norm C is below 2^127 where C is below 2^32.
CLIP_RANGE = (1e-6, 1e8)
# sigma C, the standard deviation of the noise. Least: draws down to 2^-24 of it are normal numbers above 2^-102.
# Most: its square summed over 2^31 coordinates, as for the norm of a released gradient, is below 2^127 below 2^48. The
# largest C with the largest sigma that --target_epsilon chooses stays within.
NOISE_RANGE = (1e-30, 1.1e14)

# What every run shows beside the model, as privacy.json lists it. Nothing here has noise.
DISCLOSED = (
    "training loss and throughput of every log line, and the sums of both in optimizer.{step}.pt, not privatised",
    "args.json: the digest of the training file, by which a guess of the whole file can be checked",
    "train_runtime and peak_memory_bytes, which follow from what was drawn, not privatised")
# The same words whatever the data are. How much of the validation data is training data, too, is an exact count of
# private data: one unit more moves it, and "none" is a figure like any other. It is said on the terminal alone.
VALIDATION_LOSS = ("validation loss, of data that is not protected at all; how much of it is training data, too, is "
                   "said on the terminal alone, not privatised")


def boolean(text: str) -> bool:
    """True for true, yes, 1 and the like, as Hugging Face's argument parser takes them."""
    for value, words in ((True, ("true", "yes", "t", "y", "1")), (False, ("false", "no", "f", "n", "0"))):
        if text.lower() in words:
            return value
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


# add_argument(name, **SWITCH): a flag that takes "true" or "false" behind it, or nothing for true.
SWITCH = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("privacy and execution")
    group.add_argument("--target_epsilon", type=float,
                       help="budget: noise is chosen, and training ends, so that it is kept")
    group.add_argument("--target_delta", type=float, help="delta of the reported epsilon, a public constant")
    group.add_argument("--sampling", choices=("poisson", "shuffle"),
                       help="poisson (default with noise): what the accountants price; shuffle (default without): "
                            "every unit once an epoch, reported without amplification")
    group.add_argument("--clipping", choices=("flat", "per_layer", "automatic"), default="flat",
                       help="how a unit's gradient is bounded by C (default flat)")
    group.add_argument("--noise_source", choices=("os", "secure", "seeded"), default="os",
                       help="os (default): a generator seeded by the operating system; secure: a cryptographic stream; "
                            "seeded: for tests, whoever knows --noise_seed can subtract the noise")
    group.add_argument("--noise_seed", type=int, help="the seed of --noise_source seeded")
    group.add_argument("--grad_engine", choices=("book_keeping", "opacus"), default="book_keeping",
                       help="how the clipped sum is computed; opacus = by Opacus's GradSampleModule and, with several "
                            "processes, its DistributedDataParallel, as the paper's code does, for comparison")
    group.add_argument("--bf16", **SWITCH, help="matrix products in bfloat16; norms, sums and noise stay float64")
    group.add_argument("--micro_batch_tokens", type=int, help="padded tokens of a physical batch; changes nothing but "
                       f"speed and memory (default {DEFAULT_TOKENS['cpu']} on CPU, {DEFAULT_TOKENS['cuda']} on a GPU)")
    group.add_argument("--resume", action="store_true",
                       help="continue the run in the work folder from its last checkpoint")
    group.add_argument("--resume_changed", nargs="+", default=(), metavar="NAME",
                       help="settings in which the resumed run may differ from the folder's (world_size, lr, ...)")
    group.add_argument("--lora_target", nargs="+", choices=SLOTS, default=("query", "value"),
                       help="parts of the fused projection that get an adapter (default query value)")
    group.add_argument("--tensorboard", action="store_true",
                       help="write event files into the work folder's tensorboard/; needs the package tensorboard")
    group.add_argument("--collective_timeout", type=float, default=600, metavar="SECONDS",
                       help="how long ranks wait for one another before the job ends (default 600)")


@dataclass(frozen=True)
class FlagNames:
    """What the calling script names the flags that this file has to complain about."""

    batch: str = "--train_batch_size x --grad_acc x processes"
    steps: str = "--max_step"
    folder: str = "--work_dir"


@dataclass(frozen=True)
class Request:
    """What a script asks for, with its own flags' names already translated. Public constants and settings alone."""

    unit: str
    N: int
    longest: int  # tokens of the longest text that may come
    batch: int  # expected units a step, over all ranks
    steps: int
    clip: float
    sigma: float | None  # None: chosen for target_epsilon
    delta: float
    target_epsilon: float | None
    betas: tuple[float, float]
    adam_eps: float
    weight_decay: float
    correct_bias: bool
    no_decay_bias: bool
    smoothing: float
    grad_clip: float
    random_seed: int
    lr: Callable[[int], float]
    log_interval: int
    eval_interval: int
    save_interval: int
    rows_per_unit: int = 1  # the most texts that a unit contributes to a step
    torch_eps: bool = False  # Adam's, see AdamW
    last_step: int | None = None  # end there, of the `steps` that are planned
    show_bar: bool = True
    show_progress: bool = True
    resumable: bool = True
    flags: FlagNames = FlagNames()


def check_validation(flag: str, path: str, sha256: str, train_sha256: str) -> None:
    """Raise UserError where the validation data are the training file: their loss is shown without noise."""
    if sha256 == train_sha256:
        fail(f"{flag} {path}: is the training file (same sha256), and validation data are not protected at all; give "
             "other data")


def check_shared_flags(args: argparse.Namespace) -> None:
    """Raise UserError for shared flags that are out of range, contradict each other or mean nothing."""
    check_least(args, micro_batch_tokens=1)
    check_positive(args, target_epsilon=math.inf)
    if args.target_delta is not None and not 0 < args.target_delta < 1:
        fail(f"--target_delta {args.target_delta:g}: expected a number between 0 and 1")
    if args.noise_source == "seeded" and args.noise_seed is None:
        fail("--noise_source seeded: needs --noise_seed")
    if args.noise_seed is not None and args.noise_source != "seeded":
        fail(f"--noise_seed {args.noise_seed}: means nothing with --noise_source {args.noise_source}")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        fail("--tensorboard: the package tensorboard is not installed; pip install tensorboard, or leave the flag out")
    if args.resume_changed and not args.resume:
        fail("--resume_changed: means nothing without --resume")


def check_noise(args: argparse.Namespace, clip: str) -> None:
    """Raise UserError for a C, the flag `clip`, or a noise of sigma C that float32 cannot hold."""
    check_range(args, **{clip: CLIP_RANGE})
    sigma, (low, high) = args.noise_multiplier, NOISE_RANGE
    if sigma and not low <= (deviation := sigma * getattr(args, clip)) <= high:
        fail(f"--noise_multiplier {sigma:g}: times --{clip} {getattr(args, clip):g} it gives noise with a standard "
             f"deviation of {deviation:g}; expected {low:g} to {high:g}, which float32 holds")


def lora_config(args: argparse.Namespace) -> LoRAConfig:
    """The adapter that the flags ask for."""
    return LoRAConfig(args.lora_dim, args.lora_alpha, args.lora_dropout,
                      tuple(slot in args.lora_target for slot in SLOTS))


def epochs_to_steps(epochs: float, N: int, batch: int) -> int:
    """Logical steps of `epochs` expected uses of every unit, one at least."""
    return max(1, round(epochs * N / batch))


def choose_cut(request: Request, args: argparse.Namespace, world: World, config: GPT2Config,
               valid: training.Data | None) -> PublicLengths:
    """How a private run's draws are cut. The lengths to pad to come from validation data, which no run protects."""
    budget = args.micro_batch_tokens or DEFAULT_TOKENS[world.device.type]
    # On the average half a block of rows is filler, in the blocks of the transformer and in the head.
    head = config.vocab_size / (config.n_layer * (4 * config.n_embd + 2 * config.inner))  # its work over theirs
    lengths = choose_lengths(None if valid is None else valid.inputs, max(1, request.longest - 1),
                             request.batch / world.size, budget, BLOCK_ROWS[world.device.type] / 2 * (1 + head),
                             request.rows_per_unit)
    return PublicLengths(lengths, budget)


def plan_settings(request: Request, args: argparse.Namespace, world: World) -> PlanSettings:
    """The plan of a request; rank 0 chooses the noise multiplier where there is a target, and tells the others."""
    sampling = args.sampling or ("shuffle" if request.sigma == 0 else "poisson")
    sigma, error = torch.zeros(1, dtype=torch.float64), None
    if request.sigma is not None:
        sigma.fill_(request.sigma)
    elif world.is_main:
        try:
            sigma.fill_(choose_sigma(request.target_epsilon, request.delta, request.N, request.batch, request.steps,
                                     sampling))
        except UserError as failure:
            error = UserError(f"--target_epsilon: {failure}")
    world.agree(error)
    return PlanSettings(
        unit=request.unit, N=request.N, batch=request.batch, steps=request.steps, clip=request.clip,
        sigma=world.broadcast(sigma).item(), delta=request.delta, target_epsilon=request.target_epsilon,
        sampling=sampling, clipping=args.clipping, noise_source=args.noise_source, seed=args.noise_seed,
        rounding=rounding_share(request.batch, max(1, request.longest - 1), request.rows_per_unit))


def check_request(request: Request) -> None:
    """Raise UserError for what only the data's size shows to be wrong."""
    flags = request.flags
    if request.batch > request.N:
        fail(f"{flags.batch} = {request.batch} is larger than the training data ({request.N} {request.unit}s): "
             "lower one of them")
    if not 1 <= request.steps <= MOST_STEPS:
        fail(f"{flags.steps} {request.steps}: expected at least one step, at most {MOST_STEPS:g}")


def open_folder(work: WorkDir, settings: PlanSettings, world: World, recorded: dict, args: argparse.Namespace,
                flag: str) -> Ledger:
    """On rank 0: the run's ledger, and args.json with everything that a resumed run must agree with."""
    entries = settings.ledger_entries(world.size)
    unknown = [name for name in args.resume_changed if name not in {*recorded, *entries}]
    if unknown:
        fail(f"--resume_changed {unknown[0]}: no setting has this name; wanted some of those that --resume says differ")
    if not args.resume and (found := checkpoint.numbered_checkpoints(work.path)):
        fail(f"{flag} {work.path}: holds {os.path.basename(found[-1][1])} of an earlier run; continue it "
             "with --resume, or choose another folder")
    ledger = Ledger(work.path, entries, args.resume, tuple(args.resume_changed), flag)
    if settings.target_epsilon is not None and (count := steps_without_noise(ledger)):
        fail(f"--target_epsilon {settings.target_epsilon:g}: {ledger.path} charges {count} steps without noise, "
             "epsilon is infinite and meets no target; start in a new folder, or give --noise_multiplier")
    recorded = json.loads(json.dumps(recorded))
    if args.resume and ledger.state.charged:  # a run that was killed before its first step has nothing to agree with
        before = work.read_json("args.json")
        # the ledger compares the last two
        named = set(args.resume_changed) | set(FREE) | {"versions", "sigma", "world_size"}
        differing = [key for key in sorted({*before, *recorded} - named) if before.get(key) != recorded.get(key)]
        if differing:
            what = ", ".join(f"{key} {before.get(key)!r} there, {recorded.get(key)!r} here" for key in differing[:4])
            fail(f"--resume: {work.path} is of a run with other settings: {what}; if that is meant, say so with "
                 f"--resume_changed {' '.join(differing)}")
    work.write_json("args.json", recorded)
    return ledger


def steps_without_noise(ledger: Ledger) -> int:
    """How many steps were charged without noise, by any attempt."""
    return sum(record["sigma"] == 0 for record in ledger.state.records)


def is_restarted(work_dir: str) -> bool:
    """Whether `work_dir` holds a run of the very job that this process belongs to: torchrun has started it again, with
    the command line of the first start, after a rank or a machine was lost."""
    job, path = distributed.job_name(), os.path.join(work_dir, "args.json")
    if job is None or not os.path.exists(path):
        return False
    try:
        with open(path, encoding="utf-8") as handle:
            return json.load(handle).get("job") == job
    except (OSError, ValueError, AttributeError, RecursionError):
        return False  # then the folder is another run's, and refused


def check_ledger_is_whole(work: WorkDir, ledger: Ledger, done: int, report: dict | None) -> None:
    """Raise UserError where the folder knows of steps that its ledger lacks. done, report: of the checkpoint that the
    run goes on from."""
    charged = ledger.state.charged
    if charged < done:
        fail(f"--resume: {ledger.path} records {charged} steps, the checkpoint has {done} behind it: "
             "records are missing; restore the ledger")
    reported = work.read_json("privacy.json").get("steps_charged") if os.path.exists(work.file("privacy.json")) else 0
    if not isinstance(reported, int) or charged < reported:
        fail(f"--resume: {ledger.path} records {charged} steps, privacy.json reports {reported}: "
             "records are missing; restore the ledger")
    last = (report or {}).get("ledger_checksum")  # "" where nothing was charged
    if last and last not in {record["checksum"] for record in ledger.state.records}:
        fail(f"--resume: {ledger.path} lacks the record {last}, its last one at the checkpoint of step {done}: it is "
             "another run's, or lost records; restore the ledger")


def check_ranks_agree(world: World, recorded: dict) -> None:
    """Raise UserError, on every rank, where processes were started with other flags or read other files: q, C or the
    noise would differ among them, and nothing that rank 0 reports would hold."""
    own = {name: value for name, value in recorded.items() if name != "local_rank"}
    error, (first, *others) = None, world.gather(own)
    for rank, other in enumerate(others, start=1):
        differing = [f"{name} {first.get(name)!r} on rank 0, {other.get(name)!r} on rank {rank}"
                     for name in sorted({*first, *other}) if first.get(name) != other.get(name)]
        if differing:
            error = UserError(f"the processes differ: {'; '.join(differing[:4])}; give all the same flags and files")
            break
    world.agree(error)


def build_trainer(request: Request, args: argparse.Namespace, world: World, loaded: checkpoint.Loaded,
                  data: training.Data, valid: training.Data | None, work_dir: str, disclosed: list[str],
                  recorded: dict) -> training.Trainer:
    """From a checked request to a Trainer. Collective: every rank calls it; an error on one rank ends all.

    A run that torchrun restarts continues as by --resume (is_restarted), or is refused where it cannot.
    """
    check_ranks_agree(world, recorded)
    # TF32, which some machines switch on by an environment variable, would round the norms to 10 bits.
    torch.set_float32_matmul_precision("highest")
    restarted = world.gather(world.is_main and not args.resume and is_restarted(work_dir))[0]
    if restarted and not request.resumable:
        mistake = UserError(f"{request.flags.folder} {work_dir}: begun by this job, {distributed.job_name()}, and "
                            "started again, which cannot continue; start it in another folder")
        mistake.on_every_rank = True
        raise mistake
    if restarted:
        args = argparse.Namespace(**{**vars(args), "resume": True})
    cut = choose_cut(request, args, world, loaded.model.config, valid)
    settings = plan_settings(request, args, world)
    if args.grad_engine == "opacus" and not settings.private:
        mistake = UserError("--grad_engine opacus: computes a clipped sum, and a run without noise clips nothing; give "
                            "--target_epsilon or --noise_multiplier, or leave the flag out")
        mistake.on_every_rank = True
        raise mistake
    model = loaded.model.to(world.device)
    model.freeze_for_training()
    flat = FlatParameters(model, extra=training.EXTRA, no_decay_bias=request.no_decay_bias,
                          sums=torch.float64 if settings.private else torch.float32)
    for parameter in model.parameters():  # every rank starts from rank 0's
        parameter.data.copy_(world.broadcast(parameter.data))
    optimizer = AdamW(flat, request.betas, request.adam_eps, request.weight_decay, request.correct_bias,
                      request.torch_eps)

    work = ledger = plan = error = before = report = None
    done, origin = 0, {"initial_weights": []}
    try:
        if world.is_main:
            spent = provenance.spent_before(loaded)  # what it refuses, it refuses before anything is written
            work = WorkDir(work_dir, must_exist=args.resume, flag=request.flags.folder)
            recorded = {**recorded, "sigma": settings.sigma, "delta": settings.delta, "N": settings.N,
                        "steps": settings.steps, "expected_batch": settings.batch, "sampling": settings.sampling,
                        "padded_lengths": list(cut.lengths), "world_size": world.size, "job": distributed.job_name(),
                        "versions": {"python": platform.python_version(), "torch": torch.__version__}}
            ledger = open_folder(work, settings, world, recorded, args, request.flags.folder)
        if args.resume:
            done, before, report = training.resume(work_dir, model, optimizer)
        if ledger is not None:
            if args.resume:
                check_ledger_is_whole(work, ledger, done, report)
            origin = provenance.begin(spent, report, work_dir, args.resume, args.noise_seed)
        if args.tensorboard and work is not None:
            work.open_board(done)
        plan = PrivacyPlan(settings, world, ledger, done)
        disclosed = [*DISCLOSED, *disclosed, *map(provenance.describe, origin["initial_weights"])]
    except (UserError, OSError) as failure:
        error = failure if isinstance(failure, UserError) else UserError(
            f"{request.flags.folder} {failure.filename or work_dir}: {failure.strerror}")
    world.agree(error)
    if len(set(world.gather(done))) > 1:
        error = UserError(f"--resume: the ranks found checkpoints of different steps in {work_dir}: "
                          "all machines must see the same folder")
    world.agree(error)
    engine = build_engine(args.grad_engine, model, flat, plan, request.smoothing, world)
    if settings.private and args.bf16:
        check_company(engine, model, flat, cut, world)
        if world.size > 1:
            check_ranks_compute_alike(engine, model, flat, cut, world)

    options = training.LoopOptions(
        steps=request.steps, steps_per_epoch=request.N / request.batch, lr=request.lr, grad_clip=request.grad_clip,
        bf16=args.bf16, cut=cut if settings.private else TightCut(cut.token_budget),
        log_interval=request.log_interval, eval_interval=request.eval_interval, save_interval=request.save_interval,
        random_seed=request.random_seed, last_step=request.last_step, show_bar=request.show_bar,
        show_progress=request.show_progress)
    trainer = training.Trainer(world, loaded, flat, engine, optimizer, plan, data, valid, work, options, disclosed,
                               done, before)
    trainer.facts.update(origin)
    if restarted:
        trainer.display.say(f"{work_dir}: begun by this job, {distributed.job_name()}, and started again: continued as "
                            "by --resume", important=True)
    return trainer


def build_engine(name: str, model: GPT2LMModel, flat: FlatParameters, plan: PrivacyPlan,
                 smoothing: float, world: World) -> training.Engine:
    """The gradient engine; the clipping norm comes from the plan. Collective."""
    if not plan.settings.private:
        return Ordinary(model, flat, smoothing)
    if name == "opacus":
        from privacy.opacus_engine import OpacusEngine
        return OpacusEngine(model, flat, plan.clipping_rule, smoothing, world)
    return BookKeeping(model, flat, plan.clipping_rule, smoothing)


def warn_of_shared(trainer: training.Trainer, what: str, shared: int, of: int) -> None:
    """Say that validation data are training data, too (`what`: the plural of what is counted)."""
    if shared:
        trainer.display.say(f"WARNING: {shared} of the {of} validation {what} are training {what}, too: the validation "
                            "loss is not one of unseen data, and validation data are not protected at all (the count "
                            "itself has no noise)", important=True)


def announce(trainer: training.Trainer) -> None:
    """Say once, before the first step, what the run will spend."""
    plan, settings, say = trainer.plan, trainer.plan.settings, trainer.display.say
    say(f"{settings.N} {settings.unit}s, expected batch {settings.batch} (q = {settings.q:.6g}), "
        f"{settings.steps} steps, {trainer.flat.size} trained parameters, {trainer.world.size} process(es) on "
        f"{trainer.world.device.type}")
    charged = plan.ledger.state.charged if plan.ledger else 0
    if trainer.done or charged:
        say(f"resumed after step {trainer.done}; {charged} steps charged so far")
    if plan.ledger is not None and not plan.ledger.locked:
        say(f"WARNING: the file system of {plan.ledger.path} has no locks: nothing keeps a second run out of this "
            "folder, but the length of that file; start none", important=True)
    if not settings.private:
        say("noise multiplier 0: ordinary training without clipping or noise; epsilon = inf", important=True)
        return
    say(f"noise multiplier {settings.sigma:.6g}, clipping {settings.clipping} to {settings.clip:g}, "
        f"{settings.sampling} sampling, noise from {settings.noise_source}, delta {settings.delta:.3g}")
    if plan.ledger and (count := steps_without_noise(plan.ledger)):
        say(f"WARNING: {count} of the steps charged so far had no noise: epsilon is infinite, whatever noise follows",
            important=True)
    for words in trainer.disclosed:
        if words.startswith("initial weights"):
            say(f"WARNING: {words}", important=True)
    if settings.noise_source == "seeded":
        say("WARNING: --noise_source seeded: anyone who knows the seed can subtract the noise. For tests only.",
            important=True)
    if settings.sampling == "shuffle":
        say("shuffled batches: epsilon is reported without amplification by sampling", important=True)
