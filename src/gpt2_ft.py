"""Fine-tune GPT-2 on token files, with differential privacy for each example.

One process, on a GPU where there is one, else on the CPU:
    python src/gpt2_ft.py --train_data data/e2e/train.jsonl --valid_data data/e2e/valid.jsonl --model_card gpt2.sm \
        --init_checkpoint pretrained_checkpoints/gpt2-pytorch_model.bin --lora_dim 4 --lora_alpha 32 \
        --train_batch_size 128 --target_epsilon 8 --lr 0.0004 --scheduler constant --correct_bias --max_epoch 20 \
        --work_dir trained_models/e2e
Many: the same after `torchrun --nproc_per_node=16`, with --train_batch_size 8: the logical batch is
train_batch_size x grad_acc x processes.

Leaves in --work_dir: model.{step}.pt, args.json, metrics.jsonl, privacy_ledger.jsonl, privacy.json; with
--average also average.{step}.pt.
"""

import base.early  # noqa: F401  # isort: skip  # before torch, which takes seconds

import sys
from dataclasses import dataclass

from base import distributed
from base.distributed import World
from base.errors import fail, run_main
from base.files import check_file
from base.flags import SettingsParser, flag, spelled
from corpus.examples import Examples, check_scored, count_shared, describe_cut, read_examples
from optimizer import schedule
from run import setup
from run.settings import DEFAULT_DELTA, SHARED, Optimizer, Settings, TokenData, noise_flags
from run.task import Task
from weights.checkpoint import says_shape

DEFAULT_SIGMA = 0.5


@dataclass(frozen=True, kw_only=True)
class Published:
    """Flags of the published commands that are refused, or accepted without effect."""

    fp16: bool = flag(False, "refused: use --bf16")
    valid_batch_size: int | None = flag(
        help="accepted; validation batches are bounded by --micro_batch_tokens", least=1, may_change=True
    )
    eval_epoch: int | None = flag(
        help="accepted; --eval_interval says when to evaluate, as in the published code", may_change=True
    )


def parse(words: list[str]) -> Settings:
    sections = {"data": TokenData, **SHARED, "published": Published}
    changes = {"noise_multiplier": spelled(help=f"sigma (default {DEFAULT_SIGMA}); 0 trains without privacy")}
    parser = SettingsParser(sections, changes, unit="example", description=__doc__.splitlines()[0])
    return Settings(*parser.parse_settings(words))


def check(settings: Settings) -> None:
    """Raise UserError for mistakes that show before any file is read."""
    settings.check()
    privacy, loop = settings.privacy, settings.loop
    if settings.extra.fp16:
        fail("--fp16: refused, its loss scaling may skip a step, which privacy accounting cannot allow; use --bf16")
    if len(given := noise_flags(privacy)) > 1:
        fail(f"{' and '.join(given)}: give one of them, the other follows")
    if settings.optimizer.scheduler == "cycle":
        cycle_points(settings.optimizer)
    elif loop.max_step is None and loop.max_epoch is None:
        fail("--max_epoch: give it or --max_step, the run has no end otherwise")


def cycle_points(optimizer: Optimizer) -> list[tuple[int, float]]:
    """The points of --scheduler cycle."""
    given = f"--i_steps {optimizer.i_steps} --i_lrs {optimizer.i_lrs}"
    try:
        steps = [int(step) for step in optimizer.i_steps.split(",")]
        rates = [float(rate) for rate in optimizer.i_lrs.split(",")]
    except ValueError:
        fail(f"{given}: expected numbers separated by commas")
    if len(steps) != len(rates) or steps != sorted(set(steps)) or min(rates) < 0 or steps[-1] < 1:
        fail(f"{given}: expected as many rates as steps, and ascending steps that end above 0")
    return list(zip(steps, rates, strict=True))


def read_data(data: TokenData, vocabulary: int) -> tuple[Examples, Examples, dict]:
    """(training examples, validation examples, the files' digests)."""
    files = (data.train_data, data.valid_data)
    for path, name in zip(files, ("--train_data", "--valid_data"), strict=True):
        check_file(path, name)
    train = read_examples(data.train_data, "--train_data", vocabulary, data.seq_len, data.obj)
    valid = read_examples(data.valid_data, "--valid_data", vocabulary, data.seq_len)
    for examples, path, name in zip((train, valid), files, ("--train_data", "--valid_data"), strict=True):
        check_scored(examples, f"{name} {path}", data.seq_len)
    setup.check_validation("--valid_data", data.valid_data, valid.sha256, train.sha256)
    return train, valid, {"train_sha256": train.sha256, "valid_sha256": valid.sha256}


def make_task(settings: Settings, train: Examples, valid: Examples, digests: dict, world: World) -> Task:
    optimizer = settings.optimizer
    points = cycle_points(optimizer) if optimizer.scheduler == "cycle" else []
    last_point = points[-1][0] if points else 0
    steps = setup.count_steps(settings, len(train), world, default=last_point)
    return Task(
        unit="example",
        data=train,
        valid=valid,
        longest=settings.data.seq_len,
        steps=steps,
        lr=schedule(optimizer.scheduler, optimizer.lr, steps, optimizer.warmup_step, points),
        delta=settings.privacy.target_delta or DEFAULT_DELTA,
        disclosed=[
            "N, and on the terminal how many training examples were cut at --seq_len, not privatised",
            setup.VALIDATION_LOSS,
        ],
        digests=digests,
    )


def main() -> int:
    settings = parse(sys.argv[1:])
    world = distributed.start(settings.loop.platform, settings.loop.local_rank, settings.loop.collective_timeout)
    with world.raise_if_any_failed():
        check(settings)
        if not noise_flags(settings.privacy):
            settings = settings.changed(privacy={"noise_multiplier": DEFAULT_SIGMA})
        path, card = settings.model.init_checkpoint, settings.model.model_card
        if path is not None and "model_card" not in settings.given.explicit and says_shape(path):
            card = None
        loaded = setup.load_weights(settings, world, path, card)
        train, valid, digests = read_data(settings.data, loaded.model.config.vocab_size)
        task = make_task(settings, train, valid, digests, world)
        setup.check_task(settings, task, world)
    trainer = setup.build_trainer(settings, task, world, loaded)
    say = trainer.display.say
    if loaded.path is None:
        say("no --init_checkpoint: training starts from random weights")
    for examples, kind in ((train, "training"), (valid, "validation")):
        if words := describe_cut(examples, kind, settings.data.seq_len):
            say(words + (": the validation loss is of what is left" if examples is valid else ""))
    if world.is_main:
        setup.warn_of_shared(trainer, "examples", count_shared(valid, train), len(valid))
    if settings.extra.valid_batch_size is not None:
        say("--valid_batch_size has no effect: validation batches are bounded by --micro_batch_tokens")
    if settings.extra.eval_epoch is not None:
        say("--eval_epoch has no effect, as in the published code: --eval_interval says when to evaluate")
    if settings.optimizer.scheduler == "dev_perf":
        say("--scheduler dev_perf: a constant learning rate, as in the published code")
    setup.announce(trainer)
    status = trainer.run()
    world.close()
    return status


if __name__ == "__main__":
    run_main(main, lasting=True)
