"""Canaries of a privacy audit: additional units of a training run. A fair coin decides for each if it is in the data.

Units 0 .. n-1 are the examples and n .. n+m-1 the canaries. N = n + m and q are public. The plan draws all units alike.
A drawn canary that is not in the data adds nothing. So flipping one coin adds or removes one unit, the relation of the
plan's epsilon.

  gradient  canary k's gradient is RAW C along a coordinate of its own; the run's clipping rule leaves C of it. The
            coordinates are those that the examples' own gradients move least: the adversary knows all but the coins.
  text      canary k is an example: random rare tokens as the completion of random rare tokens.

Shapes: m canaries, U canaries of a micro-batch, P trained coordinates, n trained tensors.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from base.distributed import World
from corpus.batching import Cut
from corpus.examples import Examples
from language_model import LanguageModel
from losses import MicroBatch, unit_losses
from optimizer import FlatParameters
from privacy.auditing import sampled_gaussian_llr
from privacy.clipping import BookKeeping, ClippingRule
from privacy.plan import PrivacyPlan
from privacy.unit_gradients import Lookup

RAW = 10.0  # norm of a gradient canary before clipping, in units of C
CHUNK = 2**16  # gradient canaries of a micro-batch
PROBE = 512  # examples whose gradients show the quiet coordinates
CONTEXT, COMPLETION = 8, 8  # tokens of a text canary


def toss_coins(m: int, world: World) -> np.ndarray:
    """(m,) bool: fair coins from the operating system's entropy, the same on every rank."""
    coins = torch.from_numpy(np.unpackbits(np.frombuffer(os.urandom(-(-m // 8)), np.uint8))[:m].copy())
    return world.broadcast(coins).numpy().astype(bool)


def text_canaries(m: int, train: Examples, vocabulary: int, world: World) -> Examples:
    """m examples of CONTEXT + COMPLETION tokens, each drawn from the rare ones: those that `train` never uses, or where
    they are fewer than a quarter of the vocabulary, that quarter which it uses least. The same on every rank."""
    counts = np.bincount(train.tokens, minlength=vocabulary)
    rare = np.argsort(counts, kind="stable")[: max(int((counts == 0).sum()), -(-vocabulary // 4))]
    length = CONTEXT + COMPLETION
    drawn = torch.from_numpy(np.random.default_rng().choice(rare, m * length))
    tokens = world.broadcast(drawn).numpy().astype(np.int32)
    return Examples(tokens, np.arange(m + 1) * length, np.full(m, CONTEXT), 0, 0)


@dataclass
class CanaryBatch:
    """Drawn gradient canaries that are in the data, in place of a MicroBatch."""

    canaries: Tensor  # (U,) int64, their numbers
    tokens: int = 0
    texts: int = 0

    def to(self, device: torch.device) -> "CanaryBatch":
        return CanaryBatch(self.canaries.to(device))


class CanaryData:
    """The run's data: `examples`, then the canaries."""

    def __init__(self, examples: Examples, coins: np.ndarray, texts: Examples | None):
        """coins (m,) bool. texts: the text canaries; None: they are gradient canaries."""
        self.examples, self.coins, self.texts = examples, torch.from_numpy(coins), texts

    def __len__(self) -> int:
        return len(self.examples) + len(self.coins)

    def micro_batches(self, units: Tensor, cut: Cut, step: int = 0) -> Iterator[MicroBatch | CanaryBatch]:
        is_canary = units >= len(self.examples)
        canaries = units[is_canary] - len(self.examples)
        canaries = canaries[self.coins[canaries]]
        yield from self.examples.micro_batches(units[~is_canary], cut, step)
        if self.texts is not None:
            yield from self.texts.micro_batches(canaries, cut, step)
        elif len(canaries):
            yield from map(CanaryBatch, canaries.split(CHUNK))


def quiet_coordinates(
    engine: BookKeeping, flat: FlatParameters, examples: Examples, m: int, cut: Cut, world: World
) -> Tensor:
    """(m,) int64, ascending: the coordinates in which the sum of the first PROBE examples' clipped gradients is
    smallest. The same on every rank; `flat.grad` is left at zero."""
    flat.sums.zero_()
    for batch in examples.micro_batches(torch.arange(min(PROBE, len(examples))), cut):
        engine.accumulate(batch.to(world.device))
    quiet = flat.grad.abs().argsort(stable=True)[:m].sort().values
    flat.sums.zero_()
    return world.broadcast(quiet)


class CanaryEngine:
    """The run's gradient engine, which also clips gradient canaries by its rule and adds them to the same sum."""

    def __init__(self, engine: BookKeeping, flat: FlatParameters, rule: ClippingRule, coordinates: Tensor):
        """coordinates (m,) int64, distinct: the direction of each canary."""
        self.engine, self.flat, self.rule, self.coordinates = engine, flat, rule, coordinates
        ends = torch.tensor([parameter.numel() for _, parameter in flat.named], device=flat.grad.device).cumsum(0)
        self.columns = torch.searchsorted(ends, self.coordinates, right=True)  # the tensor of each
        row = torch.zeros(1, len(flat.named), device=flat.grad.device)
        row[0, 0] = (RAW * rule.C) ** 2
        # Of a clipped canary, in units of C: per_layer leaves 1/sqrt n.
        self.size = RAW * rule.factors(row)[0][0, 0].item()

    @torch.no_grad()
    def accumulate(self, batch: MicroBatch | CanaryBatch) -> Tensor:
        """Add the clipped gradients of the batch's units to `flat.grad`; return their losses, (U,), 0 for a canary."""
        if not isinstance(batch, CanaryBatch):
            with torch.enable_grad():
                return self.engine.accumulate(batch)
        where, columns = self.coordinates[batch.canaries], self.columns[batch.canaries][:, None]
        rows = self.flat.grad.new_full((len(where), 1, 1), RAW * self.rule.C)
        gradient = Lookup(self.flat.grad[:, None], where[:, None], rows)
        norms_sq = rows.new_zeros(len(where), len(self.flat.named)).scatter_(1, columns, gradient.norm_sq()[:, None])
        factors, finite = self.rule.factors(norms_sq)
        gradient.add(factors.gather(1, columns).squeeze(1), None if bool(finite.all()) else finite)
        return rows.new_zeros(len(where))


class Adversary:
    """Observes every released gradient, and nothing before its release; scores the gradient canaries by it.

    wrap_engine() and observe() are for the run's Task.
    scores (m,) float64: log-likelihood ratio of "in the data" against "not", for the claimed q and sigma.
    """

    def __init__(self, m: int, examples: Examples, world: World):
        self.examples, self.world, self.scores = examples, world, np.zeros(m)

    def wrap_engine(self, engine: BookKeeping, flat: FlatParameters, plan: PrivacyPlan, cut: Cut) -> CanaryEngine:
        """The run's engine with canaries in the coordinates that its examples move least."""
        quiet = quiet_coordinates(engine, flat, self.examples, len(self.scores), cut, self.world)
        self.engine, self.settings = CanaryEngine(engine, flat, plan.clipping_rule, quiet), plan.settings
        return self.engine

    def observe(self, grad: Tensor) -> None:
        """Score by a released gradient (P,)."""
        settings = self.settings
        x = grad[self.engine.coordinates].double().cpu().numpy() * (settings.batch / settings.clip)
        self.scores += sampled_gaussian_llr(x, settings.q, settings.sigma, self.engine.size)


@torch.no_grad()
def text_losses(model: LanguageModel, texts: Examples, device: torch.device, cut: Cut) -> np.ndarray:
    """(m,) float64: the loss of each text canary, nats a token, without label smoothing."""
    model.eval()
    losses = [
        unit_losses(model, batch.to(device)).double().cpu()  # all are of one length, so they keep their order
        for batch in texts.micro_batches(torch.arange(len(texts)), cut)
    ]
    model.train()
    return torch.cat(losses).numpy()
