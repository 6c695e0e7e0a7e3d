"""Fine-tune GPT-2 on texts, with differential privacy for each author: all texts of one author, or of another unit.

One process, on a GPU where there is one, else on the CPU:
    python src/fine-tune-dp.py --output_dir scratch --model_name gpt2 --per_device_train_batch_size 1024 \
        --target_epsilon 8 --per_sample_max_grad_norm 1.0 --max_grad_norm 0 --num_train_epochs 3 --learning_rate 3e-4 \
        --lr_scheduler_type constant --lora_dim 4 --lora_alpha 32 --enable_lora --eval_strategy steps --eval_steps 45
Many: the same after `python -m torch.distributed.run --nproc_per_node 16`, with --per_device_train_batch_size 64: a
step has per_device_train_batch_size x gradient_accumulation_steps x processes authors, in expectation.

Flags of Hugging Face's TrainingArguments keep their meaning and default: AdamW is torch's, and biases and layer norms
do not decay. As in the published example, GPT-2's texts get no special token, and a text's first token is not scored.
Of a prompt and a completion the completion alone is scored, with <|endoftext|> behind it (corpus/records.py).

Leaves in --output_dir: model.{step}.pt, args.json, metrics.jsonl, privacy_ledger.jsonl, privacy.json; with
--average also average.{step}.pt.
"""

import base.early  # noqa: F401  # isort: skip  # before torch, which takes seconds

import dataclasses
import os
import sys
from dataclasses import dataclass

import torch

from base import distributed
from base.distributed import World
from base.errors import fail, run_main
from base.flags import REQUIRED, SettingsParser, flag, spelled
from base.markdown import table_line
from optimizer import HUGGING_FACE_SCHEDULES, hugging_face_schedule
from run import setup, texts
from run.loop import Trainer
from run.settings import SHARED, Settings, noise_flags
from run.task import Task
from run.texts import PUBLIC_CONTEXT, ROOT, AuthorData, Texts
from weights.checkpoint import latest_resumable, model_path

CHECKPOINTS = os.path.join(ROOT, "pretrained_checkpoints")
MODEL_NAMES = {"gpt2": "gpt2.sm", "gpt2-medium": "gpt2.md", "gpt2-large": "gpt2.lg", "gpt2-xl": "gpt2.xl"}
COLUMNS = "Model (HF),Fine-tuning Method,DP,GPUs,Epochs,Train Loss,Eval Loss,epsilon,Run Time [s]".split(",")


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """Flags of Hugging Face's Trainer and of the published example that the shared classes do not have."""

    disable_dp: bool = flag(
        False, "train without privacy; --target_epsilon and the like then have no effect", boolean=True
    )
    enable_lora: bool = flag(False, "train adapters of rank --lora_dim, not the whole model", boolean=True)
    eval_strategy: str = flag(
        "no",
        "when to evaluate beside the end (default no)",
        names=("eval_strategy", "evaluation_strategy"),
        choices=("no", "steps", "epoch"),
        may_change=True,
    )
    log_level: str = flag(
        "passive",
        "warning and above: warnings and results alone are printed",
        choices=("debug", "info", "warning", "error", "critical", "passive"),
        may_change=True,
    )
    disable_tqdm: bool = flag(False, "no progress bar on a terminal", boolean=True, may_change=True)
    dry_run: bool = flag(
        False,
        "stop after two of the run's steps, everything logged; they are charged, and --resume_from_checkpoint "
        "continues from there",
        boolean=True,
        may_change=True,
    )
    resume_from_checkpoint: str | None = flag(
        help="continue the run in --output_dir from its last checkpoint: true, that folder or that checkpoint; the "
        "same as --resume",
        may_change=True,
        nargs="?",
        const="true",
    )


@dataclass(frozen=True, kw_only=True)
class WithoutEffect:
    """Flags that steer Hugging Face's Trainer alone."""

    remove_unused_columns: bool = flag(False, boolean=True, may_change=True)
    label_names: tuple[str, ...] | None = flag(nargs="+", may_change=True)
    prediction_loss_only: bool = flag(False, boolean=True, may_change=True)
    eval_accumulation_steps: int | None = flag(may_change=True)
    per_device_eval_batch_size: int | None = flag(
        help="evaluation batches are bounded by --micro_batch_tokens", may_change=True
    )
    dataloader_num_workers: int | None = flag(
        help="1,024 authors are cut from a memory map in 7 ms, without workers", may_change=True
    )


# The flags of the shared classes as Hugging Face's TrainingArguments and the published example have them.
CHANGES = {
    "init_checkpoint": spelled(
        "model_name",
        default="gpt2",
        help=f"{', '.join(MODEL_NAMES)} (under pretrained_checkpoints/), a checkpoint file, or a folder of a run, of "
        "Hugging Face's or PEFT's (default gpt2); of an average its file, average.{step}.pt",
    ),
    "base_checkpoint": spelled(
        help="the frozen weights of an adapter-only --model_name (default: those that it names)"
    ),
    "lora_dim": spelled(help="rank of the adapters"),
    "lora_alpha": spelled(default=32),
    "lr": spelled("learning_rate", default=5e-5),
    "scheduler": spelled("lr_scheduler_type", choices=HUGGING_FACE_SCHEDULES),
    "warmup_step": spelled("warmup_steps"),
    "weight_decay": spelled(default=0.0),
    "adam_beta2": spelled(default=0.999),
    "adam_epsilon": spelled("adam_epsilon", default=1e-8),
    "clip": spelled("max_grad_norm", default=1.0, help="bound on the released gradient's norm; 0 = none (default 1)"),
    "noise_multiplier": spelled(help="sigma; exactly one of it, --target_epsilon and --target_advantage is given"),
    "max_grad_norm": spelled("per_sample_max_grad_norm"),
    "work_dir": spelled("output_dir", default=REQUIRED),
    "train_batch_size": spelled("per_device_train_batch_size"),
    "grad_acc": spelled("gradient_accumulation_steps"),
    "max_epoch": spelled("num_train_epochs", default=3.0, help="expected uses of every author (default 3)"),
    "max_step": spelled(
        "max_steps", default=-1, least=None, help="logical steps of the run, in place of --num_train_epochs"
    ),
    "random_seed": spelled(
        "seed", default=42, help="seeds the held-out split, the draws of texts and dropout, never the noise"
    ),
    "log_interval": spelled("logging_steps", default=500),
    "eval_interval": spelled("eval_steps", default=None, help="default: --logging_steps"),
    "save_interval": spelled("save_steps"),
}
PRESET = {"model_card": None, "correct_bias": True, "no_decay_bias": True, "torch_eps": True}
LEFT_OUT = ("i_steps", "i_lrs", "label_smooth", "platform")


def parse(words: list[str]) -> Settings:
    sections = {
        "data": AuthorData,
        **SHARED,
        "Hugging Face's Trainer": HuggingFace,
        "accepted, without effect": WithoutEffect,
    }
    parser = SettingsParser(sections, CHANGES, PRESET, LEFT_OUT, unit="author", description=__doc__.splitlines()[0])
    *settings, _ = parser.parse_settings(words)  # of WithoutEffect only the names matter: see describe()
    return Settings(*settings)


def check(settings: Settings) -> None:
    """Raise UserError for mistakes that show before any file is read."""
    settings.check()
    model, privacy, loop, extra = settings.model, settings.privacy, settings.loop, settings.extra
    max_step = -1 if loop.max_step is None else loop.max_step
    if not extra.disable_dp and len(given := noise_flags(privacy)) != 1:
        shown = " and ".join(given or ["--noise_multiplier and --target_epsilon and --target_advantage"])
        fail(f"{shown}: give exactly one of them, or --disable_dp")
    texts.check(settings)
    if extra.enable_lora and model.lora_dim == 0:
        fail("--enable_lora: --lora_dim is 0, expected a rank of at least 1, such as --lora_dim 4")
    if model.lora_dim and not extra.enable_lora:
        fail(f"--lora_dim {model.lora_dim}: trains adapters only with --enable_lora; give it, or leave --lora_dim out")
    if max_step == 0 or max_step < -1:
        fail(f"--max_steps {max_step}: expected at least one step, or -1 for --num_train_epochs")
    if loop.eval_interval is not None and extra.eval_strategy != "steps":
        fail(
            f"--eval_steps {loop.eval_interval}: means nothing with --eval_strategy {extra.eval_strategy}; give "
            "--eval_strategy steps, or leave it out"
        )
    if settings.optimizer.warmup_step and settings.optimizer.scheduler == "constant":
        fail("--warmup_steps: --lr_scheduler_type constant has no warm-up; use constant_with_warmup")


def translated(settings: Settings) -> Settings:
    """The checked settings, those of Hugging Face's flags written into the shared classes."""
    loop, extra = settings.loop, settings.extra
    by_steps = (loop.max_step or 0) > 0
    # With "epoch", main() sets the interval: only the data show how many steps an epoch has.
    eval_interval = (loop.eval_interval or loop.log_interval) if extra.eval_strategy == "steps" else 0
    changes = {
        "resume": loop.resume or resume_asked(extra.resume_from_checkpoint, loop.work_dir),
        "eval_interval": 1 if extra.dry_run else eval_interval,
        "log_interval": 1 if extra.dry_run else loop.log_interval,
        "max_step": loop.max_step if by_steps else None,
        "max_epoch": None if by_steps else loop.max_epoch,
        "show_bar": not extra.disable_tqdm,
        "show_progress": extra.log_level not in ("warning", "error", "critical"),
    }
    privacy = {"noise_multiplier": 0.0, "target_epsilon": None, "target_advantage": None} if extra.disable_dp else {}
    return settings.changed(loop=changes, privacy=privacy)


def resume_asked(value: str | None, output_dir: str) -> bool:
    """Whether --resume_from_checkpoint asks to continue; UserError for any checkpoint but the last of --output_dir."""
    if value is None:
        return False
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


def make_task(settings: Settings, texts: Texts, world: World) -> Task:
    N, data, optimizer, unit = len(texts.train), settings.data, settings.optimizer, texts.unit
    steps = setup.count_steps(settings, N, world)
    return Task(
        unit=unit,
        data=texts.train,
        valid=texts.valid,
        longest=data.seq_len,
        rows_per_unit=data.samples_per_author,
        steps=steps,
        lr=hugging_face_schedule(optimizer.scheduler, optimizer.lr, steps, optimizer.warmup_step),
        delta=settings.privacy.target_delta or 1 / N,
        disclosed=[
            setup.VALIDATION_LOSS,
            "train_loss, the mean training loss, not privatised",
            f"held_out and contributions: numbers of {unit}s, of texts and of texts never used, quantiles of texts "
            f"per {unit}, not privatised",
            *([PUBLIC_CONTEXT.format(fields=", ".join(data.public_fields))] if data.public_fields else []),
        ],
        digests=texts.digests,
        last_step=2 if settings.extra.dry_run else None,
    )


def say_ignored(settings: Settings, trainer: Trainer) -> None:
    """Say which of the given flags have no effect."""
    say = trainer.display.say
    ignored = [field.name for field in dataclasses.fields(WithoutEffect) if field.name in settings.given.explicit]
    if ignored:
        say(f"accepted, without effect: {' '.join('--' + name for name in ignored)}")
    for name in ("target_epsilon", "target_advantage", "noise_multiplier"):
        if settings.extra.disable_dp and name in settings.given.explicit:
            say(f"--disable_dp: --{name} {settings.given.values[name]:g} has no effect", important=True)


def table(settings: Settings, trainer: Trainer, report: dict) -> str:
    """The run as a row of the published example's table of results."""

    def number(value: object, form: str) -> str:
        return "-" if value is None else value if isinstance(value, str) else format(value, form)

    world = trainer.world
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    cells = [
        os.path.basename(os.path.normpath(str(settings.model.init_checkpoint))),
        "LoRA" if settings.extra.enable_lora else "Adapter" if settings.model.adapter_dim else "Full",
        "Yes" if trainer.plan.settings.private else "No",
        f"{world.size}x{device}",
        f"{trainer.epochs:.3g}",
        number(report["train_loss"], ".2f"),
        number(report["eval_loss"], ".2f"),
        number(report["final_epsilon_prv"], ".2f"),
        number(report["train_runtime"], ".0f"),
    ]
    return "".join(map(table_line, (COLUMNS, ["---"] * len(COLUMNS), cells))).rstrip()


def main() -> int:
    settings = parse(sys.argv[1:])
    world = distributed.start("local", settings.loop.local_rank, settings.loop.collective_timeout)
    with world.raise_if_any_failed():
        check(settings)
        settings = translated(settings)
        place, card = resolve_model(str(settings.model.init_checkpoint))
        loaded = setup.load_weights(settings, world, place, card)
    data = texts.open_texts(settings, loaded, place, world)
    with world.raise_if_any_failed():
        if settings.extra.eval_strategy == "epoch" and not settings.extra.dry_run:
            epoch = setup.epochs_to_steps(1, len(data.train), setup.logical_batch(settings, world))
            settings = settings.changed(loop={"eval_interval": epoch})
        task = make_task(settings, data, world)
        setup.check_task(settings, task, world)
    trainer = setup.build_trainer(settings, task, world, loaded)
    trainer.facts["held_out"] = data.held_out
    trainer.facts["public_fields"] = list(settings.data.public_fields)
    texts.describe(settings, trainer, data)
    say_ignored(settings, trainer)
    setup.announce(trainer)
    resumed = trainer.done > 0
    status = trainer.run()
    if status == 0:
        trainer.facts["contributions"] = texts.contributions(data, trainer, resumed, world)
        trainer.facts["train_loss"] = trainer.train_loss  # as the published example reports it
        if world.is_main:
            report = trainer.write_report()
            numbers = {name: report[name] for name in ("train_loss", *trainer.summary())}
            trainer.work.append_metrics({**trainer.head(), **numbers})
            trainer.display.say(table(settings, trainer, report), important=True)
    world.close()
    return status


if __name__ == "__main__":
    run_main(main, lasting=True)
