"""Audit the privacy of training: a lower bound of epsilon from one run with canaries, beside the epsilon it claims.

    python src/privacy_audit.py --train_data data/e2e/train.jsonl --model_card gpt2.md \
        --init_checkpoint pretrained_checkpoints/gpt2-medium-pytorch_model.bin --train_batch_size 128 \
        --noise_multiplier 0.6 --max_grad_norm 1.0 --seq_len 512 --lora_dim 4 --lora_alpha 32 --label_smooth 0.1 \
        --lr 0.0004 --correct_bias --adam_beta2 0.999 --max_epoch 1 --canaries 1000 --canary_kind gradient \
        --work_dir trained_models/audit
Many processes: the same after `torchrun --nproc_per_node=2`, with --train_batch_size 64.

It is the run of src/gpt2_ft.py with --canaries more units, each in the data by the toss of a coin (src/canaries.py);
after it the coins are guessed, from every released gradient (gradient) or from the last model and the first (text),
and the number of right guesses gives the bound (src/privacy/auditing.py), which holds with 95 % confidence. Above the
claim, the claim is refuted: status 1. Below it, nothing was found wrong; it does not prove the claim.

Leaves in --work_dir, beside a run's files: audit.json (bound, claim, guesses), audit_scores.npz (scores, coins),
audit.png.
"""

import math
import os
import sys
import time
from argparse import Namespace

import numpy as np
import torch

import canaries
import distributed
import run_setup
from checkpoint import load_model
from cli import (Parser, UserError, atomic_write, check_least, check_positive, check_range, fail,
                 run_main)
from data_utils import read_examples
from model import MODEL_CARDS
from optimizer import schedule
from privacy.auditing import FEWEST, Audit, audit
from privacy.plan import finite_or_text


def parse(argv: list[str]) -> Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--canaries", type=int, default=1000, metavar="M", help="each in the data by a fair coin (default 1000)")
    add("--canary_kind", choices=("gradient", "text"), default="gradient",
        help="gradient (default): directions of their own, seen in every released gradient; text: random rare tokens, "
             "seen in the trained model's loss")
    add("--guesses", type=int, nargs="+", metavar="R",
        help="numbers of guesses to try, fixed beforehand; each takes its share of the 5 %% (default M, M/4, M/16 ...)")
    add("--plot", metavar="PNG", help="the plot (default audit.png in --work_dir)")
    add("--train_data", required=True, help="token file of the training examples")
    add("--train_batch_size", type=int, default=8, help="expected units of a process in one accumulation step")
    add("--grad_acc", type=int, default=1, help="accumulation steps of a logical batch")
    add("--noise_multiplier", type=float, help="sigma; or give --target_epsilon")
    add("--max_grad_norm", type=float, default=1.0, help="C, the norm to which each unit's gradient is clipped")
    add("--seq_len", type=int, default=512, help="longest example in tokens; longer ones are cut")
    add("--model_card", default="gpt2.md",
        help=f"{', '.join(MODEL_CARDS)}, or a folder or file in Hugging Face's layout")
    add("--init_checkpoint",
        help="weights to start from: a file, or a folder (its newest model.{step}.pt, PEFT's or Hugging Face's file)")
    add("--base_checkpoint", help="the frozen weights under an adapter-only --init_checkpoint, if not where it says")
    add("--platform", default="local", help="local (the launcher's environment, or one process) or k8s (Open MPI's)")
    add("--local_rank", "--local-rank", type=int, help="set by torch.distributed.launch")
    add("--random_seed", type=int, default=10, help="seeds initialisation")
    add("--lr", type=float, default=1e-5, help="constant")
    add("--weight_decay", type=float, default=0.01)
    add("--correct_bias", action="store_true", help="Adam's bias corrections")
    add("--adam_epislon", "--adam_epsilon", type=float, default=1e-6)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.98)
    add("--max_step", type=int, help="logical steps of the run")
    add("--max_epoch", type=float, help="expected passes over the data; the smaller of the two ends the run")
    add("--log_interval", type=int, default=100)
    add("--work_dir", default="privacy_audit")
    add("--lora_dim", type=int, default=0, help="rank of the adapters; 0 trains the whole model")
    add("--lora_alpha", type=float, default=128)
    add("--lora_dropout", type=float, default=0.0)
    add("--label_smooth", type=float, default=0.0)
    run_setup.add_shared_flags(parser)
    return parser.parse_args(argv)


def check(args: Namespace) -> None:
    """Raise UserError for what can be known to be wrong before any file is read."""
    if args.resume:
        fail("--resume: refused, the coins and scores of an audit are not kept; start it again in another --work_dir")
    run_setup.check_shared_flags(args)
    if (args.noise_multiplier is None) == (args.target_epsilon is None):
        fail("--noise_multiplier and --target_epsilon: give one of them, an audit needs a claim to compare with")
    if args.noise_multiplier == 0:
        fail("--noise_multiplier 0: such a run claims nothing that could be audited; expected a number above 0")
    check_least(args, canaries=FEWEST)
    for made in args.guesses or ():
        if not 1 <= made <= args.canaries:
            fail(f"--guesses {made}: expected a number from 1 to --canaries {args.canaries}")
    if args.plot and not os.path.isdir(os.path.dirname(args.plot) or "."):
        fail(f"--plot {args.plot}: the folder does not exist")
    check_least(args, train_batch_size=1, grad_acc=1, seq_len=2, max_step=1, log_interval=1, lora_dim=0, random_seed=0)
    check_range(args, lr=(0, math.inf), weight_decay=(0, math.inf), adam_epislon=(0, math.inf), adam_beta1=(0, 1),
                adam_beta2=(0, 1), lora_dropout=(0, 1), label_smooth=(0, 1), noise_multiplier=(0, math.inf))
    check_positive(args, lora_alpha=math.inf, max_epoch=run_setup.MOST_EPOCHS)
    run_setup.check_noise(args, "max_grad_norm")
    if args.max_step is None and args.max_epoch is None:
        fail("--max_epoch: give it or --max_step, the run has no end otherwise")
    if args.canary_kind == "text" and args.seq_len < canaries.CONTEXT + canaries.COMPLETION:
        fail(f"--seq_len {args.seq_len}: a text canary has {canaries.CONTEXT + canaries.COMPLETION} tokens")


def draw(result: Audit, scores: np.ndarray, coins: np.ndarray, claim: float, kind: str, path: str) -> None:
    """Scores of the included and the excluded canaries; lower bound against number of guesses, beside the claim."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    bins = np.histogram_bin_edges(scores, bins=60)
    for chosen, name in ((coins, "in the data"), (~coins, "not in the data")):
        left.hist(scores[chosen], bins, alpha=0.55, label=f"{name} ({chosen.sum()})")
    left.set(title=f"{len(scores)} {kind} canaries", ylabel="canaries", yscale="log",
             xlabel="log-likelihood ratio" if kind == "gradient" else "loss before - after [nats a token]")
    made = [one.made for one in result.tried]
    right.plot(made, [one.epsilon for one in result.tried], "o-", label=f"lower bound, {result.confidence:.0%} for all")
    right.axhline(claim, color="C3", label=f"claim {claim:.2f} (PRV upper bound)")
    right.set(title=f"epsilon at delta {result.delta:.3g}", xlabel="guesses", xscale="log", ylim=(0, None))
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, dpi=110, format="png")


def main() -> int:
    args = parse(sys.argv[1:])
    world = distributed.start(args.platform, args.local_rank, args.collective_timeout)
    started, error = time.monotonic(), None
    try:
        check(args)
        torch.manual_seed(args.random_seed)
        loaded = load_model(args.init_checkpoint, args.model_card, run_setup.lora_config(args), args.base_checkpoint)
        config = loaded.model.config
        if args.seq_len > config.n_positions:
            fail(f"--seq_len {args.seq_len}: the model has {config.n_positions} positions")
        loaded.model.freeze_for_training()
        trained = sum(parameter.numel() for parameter in loaded.model.parameters() if parameter.requires_grad)
        if args.canary_kind == "gradient" and args.canaries > trained:
            fail(f"--canaries {args.canaries}: each gradient canary needs its own coordinate, the run trains {trained}")
        train = read_examples(args.train_data, "--train_data", config.vocab_size, args.seq_len)
        N, batch = len(train) + args.canaries, args.train_batch_size * args.grad_acc * world.size
        limits = [] if args.max_step is None else [args.max_step]
        if args.max_epoch is not None:
            limits.append(run_setup.epochs_to_steps(args.max_epoch, N, batch))
        request = run_setup.Request(
            unit="example", N=N, longest=args.seq_len, batch=batch, steps=min(limits),
            clip=args.max_grad_norm, sigma=args.noise_multiplier,
            delta=run_setup.DEFAULT_DELTA if args.target_delta is None else args.target_delta,
            target_epsilon=args.target_epsilon, betas=(args.adam_beta1, args.adam_beta2), adam_eps=args.adam_epislon,
            weight_decay=args.weight_decay, correct_bias=args.correct_bias, no_decay_bias=False,
            smoothing=args.label_smooth, grad_clip=0.0, random_seed=args.random_seed,
            lr=schedule("constant", args.lr, min(limits)), log_interval=args.log_interval,
            eval_interval=0, save_interval=min(limits), resumable=False)
        run_setup.check_request(request)
    except UserError as mistake:
        error = mistake
    world.agree(error)

    m, text = args.canaries, args.canary_kind == "text"
    coins = canaries.toss_coins(m, world)
    texts = canaries.text_canaries(m, train, config.vocab_size, world) if text else None
    recorded = {**vars(args), "train_sha256": train.sha256}
    disclosed = [f"a privacy audit with {m} {args.canary_kind} canaries among the {N} units: no model to be used"]
    trainer = run_setup.build_trainer(request, args, world, loaded, canaries.CanaryData(train, coins, texts), None,
                                      args.work_dir, disclosed, recorded)
    plan, cut = trainer.plan, trainer.options.cut
    if text:
        before = canaries.text_losses(trainer.model, texts, world.device, cut) if world.is_main else None
    else:
        quiet = canaries.quiet_coordinates(trainer.engine, trainer.flat, train, m, cut, world)
        trainer.engine = canaries.CanaryEngine(trainer.engine, trainer.flat, plan.clipping_rule, quiet)
        adversary = canaries.Adversary(plan, trainer.engine)
    say = trainer.display.say
    say(f"audit: {m} {args.canary_kind} canaries, {coins.sum()} of them in the data, among {N} units")
    run_setup.announce(trainer)
    status = trainer.run()
    if status == 0 and world.is_main:
        scores = before - canaries.text_losses(trainer.model, texts, world.device, cut) if text else adversary.scores
        result = audit(scores, coins, plan.settings.delta, text or plan.settings.q == 1, counts=args.guesses)
        claim, claim_rdp = plan.epsilon()
        refuted, best = result.epsilon > claim, result.best
        with atomic_write(trainer.work.file("audit_scores.npz"), "wb") as handle:
            np.savez_compressed(handle, scores=scores.astype(np.float32), coins=coins)
        trainer.work.write_json("audit.json", {
            "canaries": m, "canary_kind": args.canary_kind, "included": int(coins.sum()),
            "confidence": result.confidence, "delta": result.delta, "epsilon_lower": result.epsilon,
            "epsilon_claimed": finite_or_text(claim), "epsilon_claimed_rdp": finite_or_text(claim_rdp),
            "refuted": refuted,
            "guesses_made": best.made, "guesses_right": best.right,
            "tried": [vars(one) for one in result.tried], "N": N, "q": plan.settings.q, "sigma": plan.settings.sigma,
            "clip": plan.settings.clip, "steps_charged": plan.ledger.state.charged, "world_size": world.size,
            "seconds": round(time.monotonic() - started, 3)})
        draw(result, scores, coins, claim, args.canary_kind, args.plot or trainer.work.file("audit.png"))
        say(f"epsilon >= {result.epsilon:.4f} with 95 % confidence ({best.right} of {best.made} guesses right; "
            f"{len(result.tried)} numbers of guesses tried), claimed <= {claim:.4f}, both at delta {result.delta:.3g}: "
            + ("the claim is REFUTED" if refuted else "no contradiction"), important=True)
        status = int(refuted)
    world.close()
    return status


if __name__ == "__main__":
    run_main(main)
