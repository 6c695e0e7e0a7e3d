"""Canaries of a privacy audit: additional units of a training run. A fair coin decides for each if it is in the data.

Units 0 .. n-1 are the examples and n .. n+m-1 the canaries. N = n + m and q are public. The plan draws all units alike.
A drawn canary that is not in the data adds nothing. So flipping one coin adds or removes one unit, the relation of the
plan's epsilon.

  gradient  canary k's gradient is RAW C along a coordinate of its own; the run's clipping rule leaves C of it. The
            coordinates are those that the examples' own gradients move least: the adversary knows all but the coins.
  text      canary k is an example: a token that the data never use, behind a context. Where the embedding is trained,
            all canaries share the context, and the adversary watches each token's own row of the embedding. Where it is
            frozen, each has a context of its own, and the adversary sees the first and the last model's loss.

Shapes: m canaries, U canaries of a micro-batch, P trained coordinates, n trained tensors, D width, T tokens of a
context.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from base.device import read_back, upload
from base.distributed import World
from corpus.batching import Cut
from corpus.examples import Examples
from language_model import LanguageModel
from losses import MicroBatch, unit_losses
from optimizer import FlatParameters
from privacy.auditing import Evidence
from privacy.clipping import BookKeeping, ClippingRule
from privacy.plan import PlanSettings, PrivacyPlan
from privacy.unit_gradients import Lookup, unless_all

RAW = 10.0  # norm of a gradient canary before clipping, in units of C
CHUNK = 2**16  # gradient canaries of a micro-batch
PROBE = 512  # examples whose gradients show the quiet coordinates
LONGEST_CONTEXT = 32  # tokens of a text canary before its own, where the context is shared
CONTEXTS, TOKENS = 200, 2  # shared contexts that are compared, by the gradients of so many tokens behind each
OWN_CONTEXT = 8  # tokens of a context that is not shared


def toss_coins(m: int, world: World) -> np.ndarray:
    """(m,) bool: fair coins from the operating system's entropy, the same on every rank."""
    coins = torch.from_numpy(np.unpackbits(np.frombuffer(os.urandom(-(-m // 8)), np.uint8))[:m].copy())
    return world.broadcast(coins).numpy().astype(bool)


def rare_tokens(train: Examples, vocab_size: int) -> np.ndarray:
    """The ids that `train` never uses; where these are fewer than a quarter of the vocabulary, that quarter which it
    uses least."""
    counts = np.bincount(train.tokens, minlength=vocab_size)
    return np.argsort(counts, kind="stable")[: max(int((counts == 0).sum()), -(-len(counts) // 4))]


def text_canaries(m: int, train: Examples, model: LanguageModel, rule: ClippingRule, world: World) -> Examples:
    """m examples of one scored token each. The same on every rank.

    The tokens are distinct rare_tokens(). Where m is larger than their number, each comes again behind another context.
    Such a token has a high loss, so that clipping leaves C of its gradient (Panda et al., 2025, arXiv:2503.06808: new
    tokens; Mitchell and Andrew, 2026, arXiv:2606.10481: outliers). Where the embedding is trained, the token's own row
    has a part of the gradient that no other canary moves, `own_sizes`. It is large behind few contexts: of CONTEXTS
    beginnings of random examples the best are taken. A frozen embedding has no such part. There, a shared context would
    leave only what D numbers tell of all canaries; each has random ones of the rare tokens.
    """
    rare = rare_tokens(train, model.config.vocab_size)
    rounds, draw = -(-m // len(rare)), np.random.default_rng()
    contexts = torch.zeros(m, LONGEST_CONTEXT + 1, dtype=torch.int64)  # the number of tokens, then they
    tokens = torch.from_numpy(draw.permutation(rare)).repeat(rounds)[:m]
    if world.is_main and model.lm_head.weight.requires_grad:
        found = beginnings(train, max(CONTEXTS, rounds), draw)
        for _ in range(rounds - len(found)):  # a small data set
            found.append(torch.from_numpy(draw.choice(rare, OWN_CONTEXT)))
        found.sort(key=lambda context: -own_size(model, rule, context, tokens[:TOKENS]))
        for rows, context in zip(contexts.split(len(rare)), found, strict=False):
            rows[:, 0], rows[:, 1 : len(context) + 1] = len(context), context
    elif world.is_main:
        contexts[:, 0] = OWN_CONTEXT
        contexts[:, 1 : OWN_CONTEXT + 1] = torch.from_numpy(draw.choice(rare, (m, OWN_CONTEXT)))
    contexts, tokens = world.broadcast(contexts), world.broadcast(tokens)
    texts = [torch.cat([row[1 : row[0] + 1], token[None]]) for row, token in zip(contexts, tokens, strict=True)]
    lengths = np.array([len(text) for text in texts])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Examples(torch.cat(texts).numpy().astype(np.int32), starts, lengths - 1, 0, 0)


def beginnings(train: Examples, count: int, draw: np.random.Generator) -> list[Tensor]:
    """Contexts (T,) int64: `count` random examples, each cut at a random place before its last token; each once."""
    units = draw.integers(len(train), size=count)
    ends = draw.integers(1, np.minimum(train.lengths[units] - 1, LONGEST_CONTEXT) + 1)
    found = {
        tuple(train.tokens[start : start + end].tolist()) for start, end in zip(train.starts[units], ends, strict=True)
    }
    return [torch.tensor(context) for context in sorted(found)]


def own_sizes(model: LanguageModel, rule: ClippingRule, context: Tensor, tokens: Tensor) -> Tensor:
    """(k,) float64: the norm of what clipping leaves in a token's own row of the embedding, in units of C, of the
    gradient of the loss of each of `tokens` (k,) behind `context` (T,)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    column = next(k for k, parameter in enumerate(trained) if parameter is model.lm_head.weight)
    losses = -torch.log_softmax(model(upload(context[None], trained[0].device))[0, -1], 0)
    norms_sq, own = [], []
    for token in tokens.tolist():
        grads = torch.autograd.grad(losses[token], trained, retain_graph=True)
        norms_sq.append(torch.stack([grad.double().square().sum() for grad in grads]))
        own.append(grads[column][token].double().norm())
    factors, finite = rule.factors(torch.stack(norms_sq))
    return read_back("canaries", torch.where(finite, factors[:, column] * torch.stack(own) / rule.C, 0.0))


def own_size(model: LanguageModel, rule: ClippingRule, context: Tensor, tokens: Tensor) -> float:
    """The mean of own_sizes()."""
    return own_sizes(model, rule, context, tokens).mean().item()


@dataclass
class CanaryBatch:
    """Drawn gradient canaries that are in the data, in place of a MicroBatch."""

    canaries: Tensor  # (U,) int64, their numbers
    tokens: int = 0
    texts: int = 0

    def to(self, device: torch.device) -> "CanaryBatch":
        return CanaryBatch(upload(self.canaries, device))


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
        ends = torch.tensor([parameter.numel() for _, parameter in flat.named]).cumsum(0)
        # the tensor of each
        self.columns = torch.searchsorted(upload(ends, flat.grad.device), self.coordinates, right=True)
        row = torch.zeros(1, len(flat.named))
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
        gradient.add(factors.gather(1, columns).squeeze(1), unless_all(finite))
        return rows.new_zeros(len(where))


def evidence_of(m: int, settings: PlanSettings) -> Evidence:
    """Of m canaries, for the claim that these settings make."""
    allocated = settings.sampling == "allocation"
    return Evidence(m, settings.q, settings.sigma, settings.steps_per_epoch if allocated else None)


class GradientAdversary:
    """Observes every released gradient, and nothing before its release; scores the gradient canaries by it.

    wrap_engine() and observe() are for the run's Task.
    scores (m,) float64: log-likelihood ratio of "in the data" against "not", for the claimed q and sigma.
    """

    def __init__(self, m: int, examples: Examples, world: World):
        self.examples, self.world, self.m = examples, world, m

    def wrap_engine(self, engine: BookKeeping, flat: FlatParameters, plan: PrivacyPlan, cut: Cut) -> CanaryEngine:
        """The run's engine with canaries in the coordinates that its examples move least."""
        quiet = quiet_coordinates(engine, flat, self.examples, self.m, cut, self.world)
        self.engine, self.settings = CanaryEngine(engine, flat, plan.clipping_rule, quiet), plan.settings
        self.evidence = evidence_of(self.m, plan.settings)
        return self.engine

    def observe(self, grad: Tensor) -> None:
        """Score by a released gradient (P,)."""
        settings = self.settings
        x = read_back("canaries", grad[self.engine.coordinates]).double().numpy() * (settings.batch / settings.clip)
        self.evidence.add(np.arange(self.m), x, self.engine.size)

    @property
    def scores(self) -> np.ndarray:
        return self.evidence.scores


class TextAdversary:
    """Observes every released gradient, and nothing before its release; scores the text canaries by their tokens' own
    rows of the embedding, for which it knows contexts and model.

    wrap_engine() and observe() are for the run's Task.
    scores (m,) float64: log-likelihood ratio of "in the data" against "not", for the claimed q and sigma. The gradient
    of the loss of token v at the state h (D,) is (p_v - 1) h in row v, the head's part. A canary's gradient has its
    size in its own row; where its token also stands in a context, this is not exact and lowers the score's worth.
    """

    def __init__(self, texts: Examples, model: LanguageModel, rule: ClippingRule):
        self.model, self.m = model, len(texts)
        ends = texts.starts[1:] - 1
        self.tokens = torch.from_numpy(texts.tokens[ends].astype(np.int64))
        groups: dict[bytes, list[int]] = {}
        for k, (start, end) in enumerate(zip(texts.starts, ends, strict=False)):
            groups.setdefault(texts.tokens[start:end].tobytes(), []).append(k)
        self.groups = [  # context (T,), canaries behind it, norm of what each adds to its own row, in units of C
            (context, torch.tensor(members), own_size(model, rule, context, self.tokens[members[:TOKENS]]))
            for members in groups.values()
            for context in [
                torch.from_numpy(texts.tokens[texts.starts[members[0]] : ends[members[0]]].astype(np.int64))
            ]
        ]

    def wrap_engine(self, engine: BookKeeping, flat: FlatParameters, plan: PrivacyPlan, cut: Cut) -> BookKeeping:
        """The run's engine as it is."""
        self.span, self.settings = flat.slices[id(self.model.lm_head.weight)], plan.settings
        self.evidence = evidence_of(self.m, plan.settings)
        return engine

    @torch.no_grad()
    def observe(self, grad: Tensor) -> None:
        """Score by a released gradient (P,), before the model is changed by it."""
        settings, rows = self.settings, grad[self.span].view_as(self.model.lm_head.weight)
        for context, members, size in self.groups:
            state = self.model.transformer(upload(context[None], grad.device))[0, -1]
            tokens = upload(self.tokens[members], grad.device)
            chances = torch.softmax(self.model.lm_head(state), 0)[tokens].double()
            x = -(rows[tokens].double() @ state.double()) / state.double().norm()
            x, chances = read_back("canaries", torch.stack([x, chances])).numpy()
            x = x * (settings.batch / settings.clip)
            # Other units move the row of token v by about p_v. Without labels: what a line in p_v explains of x goes.
            line = np.stack([np.ones_like(x), chances], 1)
            x = x - line @ np.linalg.lstsq(line, x, rcond=None)[0] + settings.q * size / 2
            self.evidence.add(members.numpy(), x, size)

    @property
    def scores(self) -> np.ndarray:
        return self.evidence.scores


@torch.no_grad()
def text_losses(model: LanguageModel, texts: Examples, device: torch.device, cut: Cut) -> np.ndarray:
    """(m,) float64: the loss of each text canary, nats a token, without label smoothing."""
    model.eval()
    losses = [
        read_back("canaries", unit_losses(model, batch.to(device))).double()
        for batch in texts.micro_batches(torch.arange(len(texts)), cut)
    ]
    model.train()
    found = np.empty(len(texts))
    found[np.argsort(texts.inputs, kind="stable")] = torch.cat(losses).numpy()  # as micro_batches() orders them
    return found
