"""Fine-tune GPT-2 on texts that have authors, with differential privacy for each author with everything they wrote.

One process, on a GPU where there is one, else on the CPU:
    python src/fine-tune-dp.py --output_dir scratch --model_name gpt2 --per_device_train_batch_size 1024 \
        --target_epsilon 8 --per_sample_max_grad_norm 1.0 --max_grad_norm 0 --num_train_epochs 3 --learning_rate 3e-4 \
        --lr_scheduler_type constant --lora_dim 4 --lora_alpha 32 --enable_lora --eval_strategy steps --eval_steps 45
Many: the same after `python -m torch.distributed.run --nproc_per_node 16`, with --per_device_train_batch_size 64: a
step has per_device_train_batch_size x gradient_accumulation_steps x processes authors, in expectation.

A flag that Hugging Face's TrainingArguments have too has their meaning and default: AdamW is torch's, and biases and
layer norms do not decay. Texts get no special token, as in the published example; a text's first token is not scored.

Leaves in --output_dir: model.{step}.pt, args.json, metrics.jsonl, privacy_ledger.jsonl, privacy.json.
"""

import math
import os
import sys
from argparse import Namespace
from collections.abc import Callable

import numpy as np
import torch

from base import distributed
from base.distributed import World
from base.errors import UserError, fail, run_main
from base.flags import Parser, check_least, check_positive, check_range
from corpus.author_cache import Source, describe_left_out, digest_vocab, open_cache, prepare_cache
from corpus.authors import AuthorTexts, Corpus, split_authors
from corpus.examples import count_shared
from optimizer import schedule
from run import setup
from run.loop import Trainer
from run.setup import SWITCH
from weights.checkpoint import Loaded, latest_resumable, load_model, model_path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CHECKPOINTS = os.path.join(ROOT, "pretrained_checkpoints")
MODEL_NAMES = {"gpt2": "gpt2.sm", "gpt2-medium": "gpt2.md", "gpt2-large": "gpt2.lg", "gpt2-xl": "gpt2.xl"}
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical", "passive")
QUANTILES = {"min": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "90 %": 0.9, "99 %": 0.99, "max": 1.0}
# Flags of Hugging Face's Trainer that steer nothing here.
WITHOUT_EFFECT = (
    "remove_unused_columns",
    "label_names",
    "prediction_loss_only",
    "eval_accumulation_steps",
    "per_device_eval_batch_size",
    "dataloader_num_workers",
)
FLAGS = setup.FlagNames(
    batch="--per_device_train_batch_size x --gradient_accumulation_steps x processes",
    steps="--max_steps",
    folder="--output_dir",
)


def parse(argv: list[str]) -> Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output_dir", required=True, help="folder of everything that the run writes")
    add(
        "--model_name",
        default="gpt2",
        help=f"{', '.join(MODEL_NAMES)} (under pretrained_checkpoints/), a checkpoint "
        "file, or a folder of a run, of Hugging Face's or PEFT's (default gpt2)",
    )
    add("--base_checkpoint", help="the frozen weights under an adapter-only --model_name, if not where it says")
    add(
        "--train_file",
        default=os.path.join(ROOT, "data", "reddit", "train.jsonl"),
        help="JSON lines with an author and a content (default data/reddit/train.jsonl of the repository)",
    )
    add(
        "--eval_file",
        help="held-out texts in the same form, not protected at all; without it, authors of --train_file are held out",
    )
    add("--eval_fraction", type=float, help="chance of an author to be held out, without --eval_file (default 0.02)")
    add("--author_field", default="author", help="name of the author's field")
    add("--content_field", default="content", help="name of the text's field")
    add(
        "--vocab",
        default=os.path.join(ROOT, "vocab"),
        help="folder of encoder.json and vocab.bpe (default: the repository's)",
    )
    add("--cache_dir", help="where the tokenised texts are kept (default: .author_cache beside the file)")
    add("--sequence_len", type=int, default=128, help="longest text in tokens; longer ones are cut (default 128)")
    add(
        "--samples_per_author",
        type=int,
        default=1,
        metavar="K",
        help="texts that a drawn author contributes, drawn afresh in each step (default 1)",
    )
    add(
        "--per_device_train_batch_size",
        type=int,
        default=8,
        help="expected authors of a process in one accumulation step",
    )
    add("--gradient_accumulation_steps", type=int, default=1, help="accumulation steps of a logical batch")
    add("--num_train_epochs", type=float, default=3.0, help="expected uses of every author (default 3)")
    add("--max_steps", type=int, default=-1, help="logical steps of the run, in place of --num_train_epochs")
    add("--learning_rate", type=float, default=5e-5)
    add("--lr_scheduler_type", choices=SCHEDULERS, default="linear")
    add("--warmup_steps", type=int, default=0)
    add("--weight_decay", type=float, default=0.0)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_epsilon", type=float, default=1e-8)
    add(
        "--max_grad_norm",
        type=float,
        default=1.0,
        help="bound on the norm of the released gradient; 0 = none (default 1)",
    )
    add(
        "--per_sample_max_grad_norm",
        type=float,
        default=1.0,
        help="C, the norm to which each author's gradient is clipped",
    )
    add("--noise_multiplier", type=float, help="sigma; exactly one of it and --target_epsilon is given")
    add("--disable_dp", **SWITCH, help="train without privacy; --target_epsilon and the like then have no effect")
    add("--enable_lora", **SWITCH, help="train adapters of rank --lora_dim, not the whole model")
    add("--lora_dim", type=int, default=0, help="rank of the adapters")
    add("--lora_alpha", type=float, default=32)
    add("--lora_dropout", type=float, default=0.0)
    add(
        "--eval_strategy",
        "--evaluation_strategy",
        choices=("no", "steps", "epoch"),
        default="no",
        help="when to evaluate beside the end (default no)",
    )
    add("--eval_steps", type=int, help="default: --logging_steps")
    add("--logging_steps", type=int, default=500)
    add("--save_steps", type=int, default=500)
    add(
        "--log_level",
        choices=LOG_LEVELS,
        default="passive",
        help="warning and above: warnings and results alone are printed",
    )
    add("--disable_tqdm", **SWITCH, help="no progress bar on a terminal")
    add(
        "--seed", type=int, default=42, help="seeds the held-out split, the draws of texts and dropout, never the noise"
    )
    add(
        "--dry_run",
        **SWITCH,
        help="stop after two of the run's steps, everything logged; they are charged, and "
        "--resume_from_checkpoint continues from there",
    )
    add(
        "--resume_from_checkpoint",
        nargs="?",
        const="true",
        help="continue the run in --output_dir from its last "
        "checkpoint: true, that folder or that checkpoint; the same as --resume",
    )
    add("--local_rank", "--local-rank", type=int, help="set by torch.distributed.launch")
    group = parser.add_argument_group("accepted, without effect", "these steer Hugging Face's Trainer alone")
    group.add_argument("--remove_unused_columns", **SWITCH)
    group.add_argument("--label_names", nargs="+")
    group.add_argument("--prediction_loss_only", **SWITCH)
    group.add_argument("--eval_accumulation_steps", type=int)
    group.add_argument(
        "--per_device_eval_batch_size", type=int, help="evaluation batches are bounded by --micro_batch_tokens"
    )
    group.add_argument(
        "--dataloader_num_workers", type=int, help="1,024 authors are cut from a memory map in 7 ms, without workers"
    )
    setup.add_shared_flags(parser)
    args = parser.parse_args(argv)
    args.without_effect = [name for name in WITHOUT_EFFECT if any(word.split("=")[0] == f"--{name}" for word in argv)]
    return args


def check(args: Namespace) -> None:
    """Raise UserError for what can be known to be wrong before any file is read."""
    if args.resume_from_checkpoint is not None:
        args.resume = resume_asked(args.resume_from_checkpoint, args.output_dir) or args.resume
    setup.check_shared_flags(args)
    if not args.disable_dp and (args.noise_multiplier is None) == (args.target_epsilon is None):
        fail("--noise_multiplier and --target_epsilon: give exactly one of them, or --disable_dp")
    check_least(
        args,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        sequence_len=2,
        samples_per_author=1,
        warmup_steps=0,
        logging_steps=1,
        eval_steps=1,
        save_steps=1,
        lora_dim=0,
        seed=0,
    )
    check_range(
        args,
        learning_rate=(0, math.inf),
        weight_decay=(0, math.inf),
        adam_epsilon=(0, math.inf),
        adam_beta1=(0, 1),
        adam_beta2=(0, 1),
        lora_dropout=(0, 1),
        max_grad_norm=(0, math.inf),
        eval_fraction=(0, 1),
        noise_multiplier=(0, math.inf),
    )
    check_positive(args, lora_alpha=math.inf, num_train_epochs=setup.MOST_EPOCHS)
    setup.check_noise(args, "per_sample_max_grad_norm")
    if args.eval_file is not None and args.eval_fraction is not None:
        fail("--eval_fraction: means nothing with --eval_file, which holds all held-out texts")
    if args.enable_lora and args.lora_dim == 0:
        fail("--enable_lora: --lora_dim is 0, expected a rank of at least 1, such as --lora_dim 4")
    if args.lora_dim and not args.enable_lora:
        fail(f"--lora_dim {args.lora_dim}: trains adapters only with --enable_lora; give it, or leave --lora_dim out")
    if args.max_steps == 0 or args.max_steps < -1:
        fail(f"--max_steps {args.max_steps}: expected at least one step, or -1 for --num_train_epochs")
    if args.eval_steps is not None and args.eval_strategy != "steps":
        fail(
            f"--eval_steps {args.eval_steps}: means nothing with --eval_strategy {args.eval_strategy}; give "
            "--eval_strategy steps, or leave it out"
        )
    if args.warmup_steps and args.lr_scheduler_type == "constant":
        fail("--warmup_steps: --lr_scheduler_type constant has no warm-up; use constant_with_warmup")


def resume_asked(value: str, output_dir: str) -> bool:
    """Whether --resume_from_checkpoint asks to continue; UserError for any checkpoint but the last of --output_dir."""
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    step = latest_resumable(output_dir) if os.path.isdir(output_dir) else None
    allowed = [output_dir] if step is None else [output_dir, model_path(output_dir, step)]
    if os.path.realpath(value) not in map(os.path.realpath, allowed):
        fail(
            f"--resume_from_checkpoint {value}: a run continues in its own folder, where its ledger is, from its last "
            f"checkpoint; expected true or {' or '.join(allowed)}; to start from other weights use --model_name"
        )
    return True


def resolve_model(name: str) -> tuple[str, str | None]:
    """(checkpoint file or folder, card or None) of --model_name."""
    if name not in MODEL_NAMES:
        if os.path.exists(name):
            return name, None
        fail(
            f"--model_name {name}: no such model, file or folder; known are {', '.join(MODEL_NAMES)} "
            f"(under {CHECKPOINTS})"
        )
    places = [
        os.path.join(CHECKPOINTS, name),
        *(os.path.join(CHECKPOINTS, f"{name}-{ending}") for ending in ("pytorch_model.bin", "model.safetensors")),
    ]
    for place in places:
        if os.path.exists(place):
            return place, MODEL_NAMES[name]
    fail(
        f"--model_name {name}: not at {', '.join(places)}; run bash scripts/download_pretrained_checkpoints.sh {name} "
        f"or give a file or folder; known are {', '.join(MODEL_NAMES)}"
    )


def load(args: Namespace) -> Loaded:
    path, card = resolve_model(args.model_name)
    loaded = load_model(path, card, setup.lora_config(args), args.base_checkpoint, flag="--model_name")
    if args.sequence_len > loaded.model.config.n_positions:
        fail(f"--sequence_len {args.sequence_len}: the model has {loaded.model.config.n_positions} positions")
    return loaded


def open_corpus(path: str, flag: str, args: Namespace, world: World) -> Corpus:
    """The tokenised texts of a file. Collective: one process of each machine makes the cache where there is none."""
    source = Source(path, flag, args.vocab, args.sequence_len, args.author_field, args.content_field)
    error = folder = None
    if world.local_rank == 0:
        try:
            folder = prepare_cache(source, args.cache_dir)
        except UserError as mistake:
            error = mistake
    world.agree(error)
    folders = [folder for folder in world.gather(folder) if folder]
    if len({os.path.basename(folder) for folder in folders}) > 1:
        fail(f"{flag} {path}: the machines of this job hold different files, or different vocabularies in {args.vocab}")
    error = opened = None
    try:
        opened = open_cache(folder or folders[0])
    except UserError as mistake:
        error = mistake
    world.agree(error)
    return opened


def split(args: Namespace, corpus: Corpus, evaluation: Corpus | None) -> tuple[AuthorTexts, AuthorTexts | None, dict]:
    """(training units, held-out texts or None, what the report says of the split)."""
    A = len(corpus.keys)
    if A < 2:
        fail(
            f"--train_file {args.train_file}: all {corpus.texts} texts are by one author; author-level privacy wants "
            "many"
        )
    if evaluation is not None:
        setup.check_validation("--eval_file", args.eval_file, evaluation.facts["sha256"], corpus.facts["sha256"])
        chosen, held = np.arange(A), len(evaluation.keys)
        held_out = evaluation.by_text(np.arange(held))
        facts = {"by": "file", "file_sha256": evaluation.facts["sha256"]}
    else:
        fraction = 0.02 if args.eval_fraction is None else args.eval_fraction
        chosen, rest = split_authors(corpus.keys, fraction, args.seed)
        if len(chosen) < 2:
            fail(f"--eval_fraction {fraction:g}: leaves {len(chosen)} of {A} authors to train on; give a smaller one")
        held_out, held = corpus.by_text(rest) if len(rest) else None, len(rest)
        facts = {"by": "author", "fraction": fraction, "seed": args.seed}
    train = corpus.by_author(chosen, args.samples_per_author, args.seed)
    return train, held_out, {**facts, "authors": held, "texts": 0 if held_out is None else len(held_out)}


def learning_rate(args: Namespace, steps: int) -> Callable[[int], float]:
    """--lr_scheduler_type with Hugging Face's formulas: as optimizer.schedule, but that cosine falls to 0 over what the
    warm-up leaves, and inverse_sqrt without warm-up has a time scale of 10,000 steps."""
    name, lr, warmup = args.lr_scheduler_type, args.learning_rate, args.warmup_steps
    if name == "cosine":
        rising, falling = schedule("constant", lr, steps, warmup), schedule("cosine", lr, max(1, steps - warmup))
        return lambda t: rising(t) if t < warmup else falling(t - warmup)
    if name == "inverse_sqrt":
        scale = warmup or 10_000
        return lambda t: lr * t / warmup if t < warmup else lr * math.sqrt(scale / (t + scale - warmup))
    return schedule("constant" if name == "constant_with_warmup" else name, lr, steps, warmup)


def make_request(args: Namespace, N: int, world: World) -> setup.Request:
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * world.size
    steps = args.max_steps if args.max_steps > 0 else setup.epochs_to_steps(args.num_train_epochs, N, batch)
    every = {"no": 0, "steps": args.eval_steps or args.logging_steps, "epoch": setup.epochs_to_steps(1, N, batch)}
    log_interval, eval_interval = (1, 1) if args.dry_run else (args.logging_steps, every[args.eval_strategy])
    return setup.Request(
        unit="author",
        N=N,
        longest=args.sequence_len,
        rows_per_unit=args.samples_per_author,
        batch=batch,
        steps=steps,
        clip=args.per_sample_max_grad_norm,
        sigma=0.0 if args.disable_dp else args.noise_multiplier,
        delta=1 / N if args.target_delta is None else args.target_delta,
        target_epsilon=None if args.disable_dp else args.target_epsilon,
        betas=(args.adam_beta1, args.adam_beta2),
        adam_eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        correct_bias=True,
        torch_eps=True,
        no_decay_bias=True,
        smoothing=0.0,
        grad_clip=args.max_grad_norm,
        random_seed=args.seed,
        lr=learning_rate(args, steps),
        log_interval=log_interval,
        eval_interval=eval_interval,
        save_interval=args.save_steps,
        last_step=2 if args.dry_run else None,
        show_bar=not args.disable_tqdm,
        show_progress=args.log_level not in ("warning", "error", "critical"),
        flags=FLAGS,
    )


def describe(
    trainer: Trainer, args: Namespace, corpus: Corpus, train: AuthorTexts, valid: AuthorTexts | None, held_out: dict
) -> None:
    """Say what is trained on what."""
    say, facts = trainer.display.say, corpus.facts
    say(
        f"{args.train_file}: {facts['records']} records; {describe_left_out(facts)}; {corpus.texts} texts "
        f"by {len(corpus.keys)} authors; {facts['cut']} cut to {args.sequence_len} tokens"
    )
    say(
        f"held out: {held_out['texts']} texts of {held_out['authors']} authors, by {held_out['by']}"
        + (f", seed {held_out['seed']}" if held_out["by"] == "author" else "")
    )
    if trainer.world.is_main and valid is not None:
        authors = np.unique(valid.keys)
        setup.warn_of_shared(trainer, "authors", np.isin(authors, train.keys).sum(), len(authors))
        setup.warn_of_shared(trainer, "texts", count_shared(valid, train), len(valid))
    vocab_size = trainer.model.config.vocab_size
    if facts["vocab_size"] != vocab_size:
        say(
            f"WARNING: --vocab {args.vocab} has {facts['vocab_size']} ids, the model {vocab_size}: is it the model's "
            "own?",
            important=True,
        )
    if args.without_effect:
        say(f"accepted, without effect: {' '.join('--' + name for name in args.without_effect)}")
    for name in ("target_epsilon", "noise_multiplier"):
        if args.disable_dp and getattr(args, name) is not None:
            say(f"--disable_dp: --{name} {getattr(args, name):g} has no effect", important=True)


def contributions(train: AuthorTexts, trainer: Trainer, resumed: bool, world: World) -> dict:
    """What authors gave, for privacy.json. Collective.

    Which texts were used tells who took part, the secret that amplification by sampling rests on: that list is kept in
    memory alone, so a resumed run does not know it for the steps before, and reports the expectation.
    """
    used = world.all_reduce(torch.tensor([float(train.used.sum())], dtype=torch.float64, device=world.device)).item()
    settings = trainer.plan.settings
    expected = train.never_used(settings.q, trainer.done, settings.sampling == "poisson")
    return {
        "texts": len(train.starts),
        "samples_per_author": train.samples,
        "texts_per_author": {name: float(np.quantile(train.sizes, share)) for name, share in QUANTILES.items()},
        "texts_never_used": None if resumed else len(train.starts) - int(used),
        "texts_never_used_expected": round(expected, 1),
    }


def table(args: Namespace, trainer: Trainer, report: dict) -> str:
    """The run as a row of the published example's table of results."""

    def number(value: object, form: str) -> str:
        return "-" if value is None else value if isinstance(value, str) else format(value, form)

    world = trainer.world
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    cells = [
        os.path.basename(os.path.normpath(args.model_name)),
        "LoRA" if args.enable_lora else "Full",
        "Yes" if trainer.plan.settings.private else "No",
        f"{world.size}x{device}",
        f"{trainer.done / trainer.options.steps_per_epoch:.3g}",
        number(report["train_loss"], ".2f"),
        number(report["eval_loss"], ".2f"),
        number(report["final_epsilon_prv"], ".2f"),
        number(report["train_runtime"], ".0f"),
    ]
    head = [
        "Model (HF)",
        "Fine-tuning Method",
        "DP",
        "GPUs",
        "Epochs",
        "Train Loss",
        "Eval Loss",
        "epsilon",
        "Run Time [s]",
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), cells))


def main() -> int:
    args = parse(sys.argv[1:])
    world = distributed.start("local", args.local_rank, args.collective_timeout)
    error = loaded = None
    try:
        check(args)
        torch.manual_seed(args.seed)
        loaded = load(args)
    except UserError as mistake:
        error = mistake
    world.agree(error)
    corpus = open_corpus(args.train_file, "--train_file", args, world)
    evaluation = None if args.eval_file is None else open_corpus(args.eval_file, "--eval_file", args, world)
    try:
        if corpus.facts["vocab_size"] > loaded.model.config.vocab_size:
            fail(
                f"--vocab {args.vocab}: has {corpus.facts['vocab_size']} ids, --model_name {args.model_name} only "
                f"{loaded.model.config.vocab_size}; give the vocabulary of the model"
            )
        train, valid, held_out = split(args, corpus, evaluation)
        request = make_request(args, len(train), world)
        setup.check_request(request)
    except UserError as mistake:
        error = mistake
    world.agree(error)

    recorded = {
        **vars(args),
        "train_sha256": corpus.facts["sha256"],
        "vocab_sha256": digest_vocab(args.vocab),
        "eval_sha256": None if evaluation is None else evaluation.facts["sha256"],
    }
    disclosed = [
        setup.VALIDATION_LOSS,
        "train_loss, the mean training loss, not privatised",
        "held_out and contributions: numbers of authors, of texts and of texts never used, quantiles of texts "
        "per author, not privatised",
    ]
    trainer = setup.build_trainer(request, args, world, loaded, train, valid, args.output_dir, disclosed, recorded)
    trainer.facts["held_out"] = held_out
    describe(trainer, args, corpus, train, valid, held_out)
    setup.announce(trainer)
    resumed = trainer.done > 0
    status = trainer.run()
    if status == 0:
        trainer.facts["contributions"] = contributions(train, trainer, resumed, world)
        trainer.facts["train_loss"] = trainer.train_loss  # as the published example reports it
        if world.is_main:
            report = trainer.write_report()
            trainer.work.append_metrics(
                {**trainer.head(), **{name: report[name] for name in ("train_loss", *trainer.summary())}}
            )
            trainer.display.say(table(args, trainer, report), important=True)
    world.close()
    return status


if __name__ == "__main__":
    run_main(main)
