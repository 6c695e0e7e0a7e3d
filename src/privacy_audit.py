"""Audit the privacy of training: a lower bound of epsilon from one run with canaries, beside the claimed epsilon.

    python src/privacy_audit.py --train_data data/e2e/train.jsonl --model_card gpt2.md \
        --init_checkpoint pretrained_checkpoints/gpt2-medium-pytorch_model.bin --train_batch_size 128 \
        --noise_multiplier 0.6 --max_grad_norm 1.0 --seq_len 512 --lora_dim 4 --lora_alpha 32 --label_smooth 0.1 \
        --lr 0.0004 --correct_bias --adam_beta2 0.999 --max_epoch 1 --canaries 1000 --canary_kind gradient \
        --work_dir trained_models/audit
Many processes: the same after `torchrun --nproc_per_node=2`, with --train_batch_size 64.

The run is that of src/gpt2_ft.py with --canaries additional units. A fair coin decides for each whether it is in the
data (src/run/canaries.py). After the run the coins are guessed from every released gradient; for text canaries of a run
that does not train the embedding, from the first and the last model. The number of right guesses gives two bounds, each
with 95 % confidence (src/privacy/auditing.py): that of Steinke et al. (2023), and the Gaussian bound, which assumes
more. One of them, which is chosen before the run, decides: where it is above the claim, it refutes the claim, status 1.
A bound below the claim does not prove the claim.

Leaves in --work_dir, beside a run's files: audit.json (bound, claim, guesses), audit_scores.npz (scores, coins),
audit.png.
"""

import base.early  # noqa: F401  # isort: skip  # before torch, which takes seconds

import os
import sys
import time
from dataclasses import dataclass

import numpy as np

from base import distributed
from base.distributed import World
from base.errors import fail, run_main
from base.files import atomic_write
from base.flags import SettingsParser, flag, spelled
from corpus.examples import Examples, check_scored, read_examples
from optimizer import schedule
from privacy.auditing import FEWEST, Audit, audit
from privacy.clipping import ClippingRule
from privacy.plan import PlanSettings, finite_or_text
from run import canaries, setup
from run.loop import Trainer
from run.settings import DEFAULT_DELTA, MOST_STEPS, SHARED, Settings, TokenData, noise_flags
from run.task import Task
from weights.checkpoint import Loaded


@dataclass(frozen=True, kw_only=True)
class Canaries:
    """The canaries, and how they are guessed."""

    canaries: int = flag(1000, "each in the data by a fair coin (default 1000)", least=FEWEST, metavar="M")
    canary_kind: str = flag(
        "gradient",
        "gradient (default): one direction each; text: tokens that the data never use. Both are observed in every "
        "released gradient; text in the trained model's loss where the embedding is frozen",
        choices=("gradient", "text"),
    )
    guesses: tuple[int, ...] | None = flag(
        help="numbers of guesses, chosen beforehand; each takes its share of the 5 %% (default M, M/4, M/16 ...)",
        nargs="+",
        metavar="R",
    )
    plot: str | None = flag(help="the plot (default audit.png in --work_dir)", metavar="PNG")


CHANGES = {
    "work_dir": spelled(default="privacy_audit"),
    "noise_multiplier": spelled(help="sigma; or give --target_epsilon"),
    "lr": spelled(help="constant"),
    "random_seed": spelled(help="seeds initialisation"),
}
# No validation, and a checkpoint at the end alone.
PRESET = {"valid_data": "", "scheduler": "constant", "eval_interval": None, "save_interval": MOST_STEPS}
# An adversary observes the whole released gradient, which no rank has with --shard.
LEFT_OUT = (
    *("obj", "no_decay_bias", "warmup_step", "i_steps", "i_lrs", "clip", "average", "mechanism", "budget", "plan_only"),
    "shard",
)


def parse(words: list[str]) -> Settings:
    sections = {"data": TokenData, **SHARED, "canaries": Canaries}
    parser = SettingsParser(sections, CHANGES, PRESET, LEFT_OUT, unit="unit", description=__doc__.splitlines()[0])
    return Settings(*parser.parse_settings(words))


def check(settings: Settings) -> None:
    """Raise UserError for mistakes that show before any file is read."""
    if settings.loop.resume:
        fail("--resume: refused, the coins and scores of an audit are not kept; start it again in another --work_dir")
    settings.check()
    privacy, loop, audited = settings.privacy, settings.loop, settings.extra
    if len(noise_flags(privacy)) != 1:
        fail(
            "--noise_multiplier and --target_epsilon (or --target_advantage): give one of them, an audit needs a claim "
            "to compare with"
        )
    if privacy.noise_multiplier == 0:
        fail("--noise_multiplier 0: such a run claims nothing that could be audited; expected a number above 0")
    for made in audited.guesses or ():
        if not 1 <= made <= audited.canaries:
            fail(f"--guesses {made}: expected a number from 1 to --canaries {audited.canaries}")
    if audited.plot and not os.path.isdir(os.path.dirname(audited.plot) or "."):
        fail(f"--plot {audited.plot}: the folder does not exist")
    if loop.max_step is None and loop.max_epoch is None:
        fail("--max_epoch: give it or --max_step, the run has no end otherwise")
    longest = canaries.OWN_CONTEXT + 1
    if audited.canary_kind == "text" and settings.data.seq_len < longest:
        fail(f"--seq_len {settings.data.seq_len}: a text canary may have {longest} tokens; expected at least so many")


def read_data(settings: Settings, loaded: Loaded) -> Examples:
    """The examples among which the canaries are planted."""
    loaded.model.freeze_for_training()
    trained = sum(parameter.numel() for parameter in loaded.model.parameters() if parameter.requires_grad)
    audited, data = settings.extra, settings.data
    if audited.canary_kind == "gradient" and audited.canaries > trained:
        fail(f"--canaries {audited.canaries}: each gradient canary needs its own coordinate, the run trains {trained}")
    train = read_examples(data.train_data, "--train_data", loaded.model.config.vocab_size, data.seq_len)
    check_scored(train, f"--train_data {data.train_data}", data.seq_len)
    return train


def make_task(
    settings: Settings,
    data: canaries.CanaryData,
    adversary: canaries.GradientAdversary | canaries.TextAdversary | None,
    world: World,
) -> Task:
    audited, optimizer = settings.extra, settings.optimizer
    steps = setup.count_steps(settings, len(data), world)
    return Task(
        unit="example",
        data=data,
        valid=None,
        longest=settings.data.seq_len,
        steps=steps,
        lr=schedule(optimizer.scheduler, optimizer.lr, steps),
        delta=settings.privacy.target_delta or DEFAULT_DELTA,
        disclosed=[
            f"a privacy audit with {audited.canaries} {audited.canary_kind} canaries among the {len(data)} units: "
            "no model to be used"
        ],
        digests={"train_sha256": data.examples.sha256},
        resumable=False,
        wrap_engine=None if adversary is None else adversary.wrap_engine,
        observe=None if adversary is None else adversary.observe,
    )


BOUND = "the bound of 2023 (arXiv:2305.08846, theorem 5.2) assumes nothing"
GAUSSIAN = (
    "the Gaussian bound (arXiv:2509.08704) assumes that the run tells of a canary what a Gaussian mechanism tells, "
    "{one}, and of each canary independently of the others, {each}"
)


def assumption(kind: str, plan: PlanSettings) -> tuple[bool, str]:
    """(whether the Gaussian bound's assumption is proven where the claim holds, the assumption in words).

    Gradient canaries have a coordinate each, in which a step adds noise of its own. Given the earlier steps, whatever
    is released follows from independent views of the canaries, one each. Where a canary is in every step, or in steps
    that an adversary may know, the view is sqrt(its steps) times C / (sigma C) Gaussian. Gradients of texts overlap.
    """
    gaussian, own = plan.q == 1 or not plan.amplified, kind == "gradient"
    one = "as is exact here" if gaussian else "which is an approximation where q < 1"
    each = "as is proven for gradient canaries" if own else "which is not proven for text canaries"
    return gaussian and own, GAUSSIAN.format(one=one, each=each)


def write_results(
    settings: Settings, trainer: Trainer, result: Audit, scores: np.ndarray, coins: np.ndarray, seconds: float
) -> bool:
    """audit_scores.npz, audit.json, the plot and three lines; returns whether the claim is refuted."""
    plan, audited, work = trainer.plan, settings.extra, trainer.work
    best, gaussian = result.best, result.best_gaussian
    claim, claim_rdp = plan.epsilon()
    proven, assumed = assumption(audited.canary_kind, plan.settings)
    decisive = gaussian.epsilon_gaussian if proven else best.epsilon
    refuted = decisive > claim
    with atomic_write(work.file("audit_scores.npz"), "wb") as handle:
        np.savez_compressed(handle, scores=scores.astype(np.float32), coins=coins)
    work.write_json(
        "audit.json",
        {
            "canaries": audited.canaries,
            "canary_kind": audited.canary_kind,
            "included": int(coins.sum()),
            "confidence": result.confidence,
            "delta": result.delta,
            "epsilon_lower": best.epsilon,
            "guesses_made": best.made,
            "guesses_right": best.right,
            "gaussian": {
                "epsilon_lower": gaussian.epsilon_gaussian,
                "mu_lower": gaussian.mu,
                "guesses_made": gaussian.made,
                "guesses_right": gaussian.right,
                "assumption": assumed,
            },
            "decides": "gaussian" if proven else "2023",
            "epsilon_claimed": finite_or_text(claim),
            "epsilon_claimed_rdp": finite_or_text(claim_rdp),
            "refuted": refuted,
            "tried": [vars(one) for one in result.tried],
            "N": plan.settings.N,
            "q": plan.settings.q,
            "sigma": plan.settings.sigma,
            "clip": plan.settings.clip,
            "steps_charged": plan.ledger.state.charged,
            "world_size": trainer.world.size,
            "seconds": round(seconds, 3),
        },
    )
    draw(result, scores, coins, claim, audited.canary_kind, audited.plot or work.file("audit.png"))
    deciding = "the Gaussian bound" if proven else "the bound of 2023"
    tried = f"{len(result.tried)} numbers of guesses tried"
    for bound, one, reference in (
        (f"epsilon >= {best.epsilon:.4f}", best, BOUND),
        (f"epsilon >= {gaussian.epsilon_gaussian:.4f} (mu >= {gaussian.mu:.4f})", gaussian, assumed),
    ):
        trainer.display.say(
            f"{bound} with {result.confidence:.0%} confidence ({one.right} of {one.made} guesses right; {tried}): "
            f"{reference}",
            important=True,
        )
    trainer.display.say(
        f"claimed: epsilon <= {claim:.4f}, all at delta {result.delta:.3g}; {deciding} "
        f"decides: {'the claim is REFUTED' if refuted else 'no contradiction'}",
        important=True,
    )
    return refuted


def draw(result: Audit, scores: np.ndarray, coins: np.ndarray, claim: float, kind: str, path: str) -> None:
    """Scores of the included and the excluded canaries; lower bound against number of guesses, beside the claim."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    bins = np.histogram_bin_edges(scores, bins=60)
    for chosen, name in ((coins, "in the data"), (~coins, "not in the data")):
        left.hist(scores[chosen], bins, alpha=0.55, label=f"{name} ({chosen.sum()})")
    left.set(title=f"{len(scores)} {kind} canaries", ylabel="canaries", yscale="log", xlabel="score")
    made = [one.made for one in result.tried]
    for bounds, name in (
        ([one.epsilon for one in result.tried], "lower bound of 2023"),
        ([one.epsilon_gaussian for one in result.tried], "Gaussian lower bound"),
    ):
        right.plot(made, bounds, "o-", label=f"{name}, {result.confidence:.0%} for all")
    right.axhline(claim, color="C3", label=f"claim {claim:.2f} (PRV upper bound)")
    right.set(title=f"epsilon at delta {result.delta:.3g}", xlabel="guesses", xscale="log", ylim=(0, None))
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, dpi=110, format="png")


def main() -> int:
    started, settings = time.monotonic(), parse(sys.argv[1:])
    world = distributed.start(settings.loop.platform, settings.loop.local_rank, settings.loop.collective_timeout)
    audited = settings.extra
    with world.raise_if_any_failed():
        check(settings)
        loaded = setup.load_weights(settings, world, settings.model.init_checkpoint, settings.model.model_card)
        train = read_data(settings, loaded)
    m, text = audited.canaries, audited.canary_kind == "text"
    coins = canaries.toss_coins(m, world)
    rule = ClippingRule(settings.privacy.clipping, settings.privacy.max_grad_norm)
    texts = canaries.text_canaries(m, train, loaded.model, rule, world) if text else None
    adversary: canaries.GradientAdversary | canaries.TextAdversary | None = None
    if texts is None:
        adversary = canaries.GradientAdversary(m, train, world)
    elif loaded.model.lm_head.weight.requires_grad:
        adversary = canaries.TextAdversary(texts, loaded.model, rule)
    with world.raise_if_any_failed():
        task = make_task(settings, canaries.CanaryData(train, coins, texts), adversary, world)
        setup.check_task(settings, task, world)
    trainer = setup.build_trainer(settings, task, world, loaded)
    cut = trainer.learner.cut
    by_loss = adversary is None and world.is_main
    before = canaries.text_losses(trainer.model, texts, world.device, cut) if by_loss else None
    trainer.display.say(
        f"audit: {m} {audited.canary_kind} canaries, {coins.sum()} of them in the data, among {task.N} units"
    )
    setup.announce(trainer)
    status = trainer.run()
    if status == 0 and world.is_main:
        if adversary is not None:
            scores = adversary.scores
        else:
            scores = before - canaries.text_losses(trainer.model, texts, world.device, cut)
        plan = trainer.plan.settings
        result = audit(scores, coins, plan.delta, text or plan.q == 1, counts=audited.guesses)
        status = int(write_results(settings, trainer, result, scores, coins, time.monotonic() - started))
    world.close()
    return status


if __name__ == "__main__":
    run_main(main, lasting=True)
