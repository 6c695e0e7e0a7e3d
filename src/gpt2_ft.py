"""Fine-tune GPT-2 on token files, with differential privacy for each example.

One process, on a GPU where there is one, else on the CPU:
    python src/gpt2_ft.py --train_data data/e2e/train.jsonl --valid_data data/e2e/valid.jsonl --model_card gpt2.sm \
        --init_checkpoint pretrained_checkpoints/gpt2-pytorch_model.bin --lora_dim 4 --lora_alpha 32 \
        --train_batch_size 128 --target_epsilon 8 --lr 0.0004 --scheduler constant --correct_bias --max_epoch 20 \
        --work_dir trained_models/e2e
Many: the same after `torchrun --nproc_per_node=16`, with --train_batch_size 8: the logical batch is
train_batch_size x grad_acc x processes.

Leaves in --work_dir: model.{step}.pt, args.json, metrics.jsonl, privacy_ledger.jsonl, privacy.json.
"""

import math
import sys
from argparse import Namespace

import torch

import distributed
import run_setup
from checkpoint import load_model
from cli import Parser, UserError, check_file, check_least, check_positive, check_range, fail, run_main
from data_utils import count_shared, read_examples
from model import MODEL_CARDS
from optimizer import SCHEDULES, schedule

DEFAULT_SIGMA = 0.5


def parse(argv: list[str]) -> Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--train_data", required=True, help="token file of the training examples")
    add("--valid_data", required=True, help="token file of the validation examples, which are not protected at all")
    add("--train_batch_size", type=int, default=8, help="expected examples of a process in one accumulation step")
    add("--valid_batch_size", type=int, help="accepted; validation batches are bounded by --micro_batch_tokens")
    add("--grad_acc", type=int, default=1, help="accumulation steps of a logical batch")
    add("--noise_multiplier", type=float, help=f"sigma (default {DEFAULT_SIGMA}); 0 trains without privacy")
    add("--max_grad_norm", type=float, default=1.0, help="C, the norm to which each example's gradient is clipped")
    add("--clip", type=float, default=0.0, help="bound on the norm of the released gradient; 0 = none")
    add("--seq_len", type=int, default=512, help="longest example in tokens; longer ones are cut")
    add("--model_card", default="gpt2.md",
        help=f"{', '.join(MODEL_CARDS)}, or a folder or file in Hugging Face's layout")
    add("--init_checkpoint",
        help="weights to start from: a file, or a folder (its newest model.{step}.pt, PEFT's or Hugging Face's file)")
    add("--base_checkpoint", help="the frozen weights under an adapter-only --init_checkpoint, if not where it says")
    add("--fp16", action="store_true", help="refused: use --bf16")
    add("--platform", default="local", help="local (the launcher's environment, or one process) or k8s (Open MPI's)")
    add("--local_rank", "--local-rank", type=int, help="set by torch.distributed.launch")
    add("--random_seed", type=int, default=10, help="seeds initialisation, and dropout where there is no noise")
    add("--lr", type=float, default=1e-5)
    add("--weight_decay", type=float, default=0.01)
    add("--correct_bias", action="store_true", help="Adam's bias corrections")
    add("--adam_epislon", "--adam_epsilon", type=float, default=1e-6)
    add("--no_decay_bias", action="store_true", help="no weight decay on biases and layer norms")
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.98)
    add("--scheduler", choices=SCHEDULES, default="linear")
    add("--max_step", type=int, help="logical steps of the run")
    add("--max_epoch", type=float, help="expected passes over the data; the smaller of the two ends the run")
    add("--warmup_step", type=int, default=0)
    add("--i_steps", default="0", help="cycle: steps, separated by commas")
    add("--i_lrs", default="0.00025", help="cycle: learning rates at those steps")
    add("--log_interval", type=int, default=100)
    add("--eval_interval", type=int, default=2000)
    add("--save_interval", type=int, default=500)
    add("--eval_epoch", type=int, help="accepted; --eval_interval says when to evaluate, as in the published code")
    add("--work_dir", default="gpt2_model")
    add("--lora_dim", type=int, default=0, help="rank of the adapters; 0 trains the whole model")
    add("--lora_alpha", type=float, default=128)
    add("--lora_dropout", type=float, default=0.0)
    add("--obj", choices=("clm", "jlm"), default="clm", help="score the completion, or context and completion")
    add("--label_smooth", type=float, default=0.0)
    run_setup.add_shared_flags(parser)
    return parser.parse_args(argv)


def check(args: Namespace) -> None:
    """Raise UserError for what can be known to be wrong before any file is read."""
    run_setup.check_shared_flags(args)
    if args.fp16:
        fail("--fp16: refused, its loss scaling may skip a step, which privacy accounting cannot allow; use --bf16")
    if args.noise_multiplier is not None and args.target_epsilon is not None:
        fail("--noise_multiplier and --target_epsilon: give one of them, the other follows")
    check_least(args, train_batch_size=1, valid_batch_size=1, grad_acc=1, seq_len=2, max_step=1, warmup_step=0,
                log_interval=1, eval_interval=1, save_interval=1, lora_dim=0, random_seed=0)
    check_range(args, lr=(0, math.inf), weight_decay=(0, math.inf), adam_epislon=(0, math.inf), adam_beta1=(0, 1),
                adam_beta2=(0, 1), lora_dropout=(0, 1), label_smooth=(0, 1), clip=(0, math.inf),
                noise_multiplier=(0, math.inf))
    check_positive(args, lora_alpha=math.inf, max_epoch=run_setup.MOST_EPOCHS)
    run_setup.check_noise(args, "max_grad_norm")
    if args.scheduler == "cycle":
        cycle_points(args)
    elif args.max_step is None and args.max_epoch is None:
        fail("--max_epoch: give it or --max_step, the run has no end otherwise")


def cycle_points(args: Namespace) -> list[tuple[int, float]]:
    """The points of --scheduler cycle."""
    try:
        steps, rates = [int(s) for s in args.i_steps.split(",")], [float(r) for r in args.i_lrs.split(",")]
    except ValueError:
        fail(f"--i_steps {args.i_steps} --i_lrs {args.i_lrs}: expected numbers separated by commas")
    if len(steps) != len(rates) or steps != sorted(set(steps)) or min(rates) < 0 or steps[-1] < 1:
        fail(f"--i_steps {args.i_steps} --i_lrs {args.i_lrs}: expected as many rates as steps, "
             "the steps growing to above 0")
    return list(zip(steps, rates))


def count_steps(args: Namespace, N: int, batch: int) -> int:
    """Logical steps of the run: the lesser of max_step and max_epoch passes over N examples; cycle ends at its last
    point."""
    limits = [] if args.max_step is None else [args.max_step]
    if args.max_epoch is not None:
        limits.append(run_setup.epochs_to_steps(args.max_epoch, N, batch))
    return min(limits) if limits else cycle_points(args)[-1][0]


def main() -> int:
    args = parse(sys.argv[1:])
    world = distributed.start(args.platform, args.local_rank, args.collective_timeout)
    error = None
    try:
        check(args)
        torch.manual_seed(args.random_seed)
        loaded = load_model(args.init_checkpoint, args.model_card, run_setup.lora_config(args), args.base_checkpoint)
        config = loaded.model.config
        if args.seq_len > config.n_positions:
            fail(f"--seq_len {args.seq_len}: the model has {config.n_positions} positions")
        check_file(args.train_data, "--train_data")
        check_file(args.valid_data, "--valid_data")
        train = read_examples(args.train_data, "--train_data", config.vocab_size, args.seq_len, args.obj)
        valid = read_examples(args.valid_data, "--valid_data", config.vocab_size, args.seq_len)
        digests = {"train_sha256": train.sha256, "valid_sha256": valid.sha256}
        run_setup.check_validation("--valid_data", args.valid_data, digests["valid_sha256"], digests["train_sha256"])
        batch = args.train_batch_size * args.grad_acc * world.size
        steps = count_steps(args, len(train), batch)
        sigma = args.noise_multiplier
        if sigma is None and args.target_epsilon is None:
            sigma = DEFAULT_SIGMA
        points = cycle_points(args) if args.scheduler == "cycle" else ()
        request = run_setup.Request(
            unit="example", N=len(train), longest=args.seq_len, batch=batch, steps=steps,
            clip=args.max_grad_norm, sigma=sigma,
            delta=run_setup.DEFAULT_DELTA if args.target_delta is None else args.target_delta,
            target_epsilon=args.target_epsilon, betas=(args.adam_beta1, args.adam_beta2), adam_eps=args.adam_epislon,
            weight_decay=args.weight_decay, correct_bias=args.correct_bias, no_decay_bias=args.no_decay_bias,
            smoothing=args.label_smooth, grad_clip=args.clip, random_seed=args.random_seed,
            lr=schedule(args.scheduler, args.lr, steps, args.warmup_step, points), log_interval=args.log_interval,
            eval_interval=args.eval_interval, save_interval=args.save_interval)
        run_setup.check_request(request)
    except UserError as mistake:
        error = mistake
    world.agree(error)

    recorded = {**vars(args), **digests}
    disclosed = ["N, and on the terminal how many training examples were cut at --seq_len, not privatised",
                 run_setup.VALIDATION_LOSS]
    trainer = run_setup.build_trainer(request, args, world, loaded, train, valid, args.work_dir, disclosed, recorded)
    say = trainer.display.say
    if loaded.path is None:
        say("no --init_checkpoint: training starts from random weights")
    if train.cut:
        say(f"{train.cut} training examples were longer than --seq_len {args.seq_len} and were cut"
            + (f"; {train.unscored} of them have no scored token left" if train.unscored else ""))
    if world.is_main:
        run_setup.warn_of_shared(trainer, "examples", count_shared(valid, train), len(valid))
    if args.valid_batch_size is not None:
        say("--valid_batch_size has no effect: validation batches are bounded by --micro_batch_tokens")
    if args.eval_epoch is not None:
        say("--eval_epoch has no effect, as in the published code: --eval_interval says when to evaluate")
    if args.scheduler == "dev_perf":
        say("--scheduler dev_perf: a constant learning rate, as in the published code")
    run_setup.announce(trainer)
    status = trainer.run()
    world.close()
    return status


if __name__ == "__main__":
    run_main(main)
