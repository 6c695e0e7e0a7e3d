"""The oracle of the clipping tests: units as lists of texts, the clipped sum by a plain loop of autograd over units.

Nothing here shares code with the engines, the losses or the batching of src/: a text is run alone, without padding, and
its loss is written out token by token.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from corpus.examples import Examples
from families import family_of
from helpers.processes import ROOT
from language_model import LanguageModel, Shape
from losses import MicroBatch
from model import GPT2Config, LoRAConfig
from optimizer import FlatParameters
from privacy import unit_gradients as layers
from privacy.clipping import BookKeeping, ClippingRule
from privacy.opacus_engine import OpacusEngine
from weights.checkpoint import load_model

CONFIG = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=37, n_positions=208)
# Sums of under 1e5 products in float64, 1e5 * 2**-53 ~ 1e-11, that cancel by no more than a factor of 10. And a squared
# norm from Gram matrices is raised by 2^17 2^-53 (sizes/norm)^2, of which a factor takes half: 7e-12 times up to 100.
FLOAT64 = 1e-9
RULES = ("flat", "per_layer", "automatic")
# name -> (class, TRAFFIC_COST): at 0 the ghost norm is never the cheaper one, at infinity always
ENGINES = {"ghost": (BookKeeping, math.inf), "materialise": (BookKeeping, 0),
           "chosen": (BookKeeping, layers.TRAFFIC_COST), "opacus": (OpacusEngine, layers.TRAFFIC_COST)}


@dataclass(frozen=True)
class Text:
    """ids: context and completion; first: the first scored token, len(ids) where nothing is scored."""

    ids: tuple[int, ...]
    first: int


Unit = list[Text]
Gradients = dict[str, Tensor]


def draw_units(count: int, rows: int = 1, shortest: int = 2, longest: int = 14, tokens: int = CONFIG.vocab_size,
               seed: int = 1) -> list[Unit]:
    """Random units of 1 to `rows` texts of `shortest` to `longest` tokens, of which there are `tokens` different."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    units = []
    for _ in range(count):
        unit = []
        for _ in range(integer(1, rows)):
            length = integer(shortest, longest)
            unit.append(Text(tuple(integer(0, tokens - 1) for _ in range(length)), integer(1, length - 1)))
        units.append(unit)
    return units


def pack(units: list[Unit], rows: int = 1, dtype: torch.dtype = torch.float64) -> MicroBatch:
    """The units as one micro-batch of `rows` rows a unit; absent texts become rows with nothing scored."""
    T = max(len(text.ids) - 1 for unit in units for text in unit)
    ids = torch.zeros(len(units) * rows, T, dtype=torch.int64)
    positions, targets, weights, counts = [], [], [], []
    for u, unit in enumerate(units):
        before = len(positions)
        for r, text in enumerate(unit):
            row = u * rows + r
            ids[row, :len(text.ids) - 1] = torch.tensor(text.ids[:-1])
            for t in range(text.first, len(text.ids)):
                positions.append(row * T + t - 1)
                targets.append(text.ids[t])
                weights.append(1 / ((len(text.ids) - text.first) * len(unit)))
        counts.append(len(positions) - before)
    tokens = sum(len(text.ids) for unit in units for text in unit)
    return MicroBatch(ids, torch.tensor(positions, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64),
                      torch.tensor(weights, dtype=dtype), counts, rows, tokens)


def text_loss(logits: Tensor, text: Text, smoothing: float) -> Tensor:
    """Mean over the scored tokens; logits (T, V) of the text's own positions."""
    total = logits.sum() * 0
    for t in range(text.first, len(text.ids)):
        log_p = logits[t - 1].log_softmax(0)
        total = total - (1 - smoothing) * log_p[text.ids[t]] - smoothing * log_p.mean()
    return total / max(1, len(text.ids) - text.first)


def unit_loss(model: LanguageModel, unit: Unit, smoothing: float) -> Tensor:
    return sum(text_loss(model(torch.tensor([text.ids[:-1]]))[0], text, smoothing) for text in unit) / len(unit)


def gradients_of(model: LanguageModel, loss: Tensor) -> Gradients:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def unit_gradients(model: LanguageModel, units: list[Unit], smoothing: float = 0.0) -> tuple[Tensor, list[Gradients]]:
    """(losses (U,), every unit's gradient by parameter), one autograd pass a unit."""
    losses, gradients = [], []
    for unit in units:
        losses.append(unit_loss(model, unit, smoothing))
        gradients.append(gradients_of(model, losses[-1]))
    return torch.stack(losses).detach(), gradients


def norm(gradient: Gradients) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))


def clipped(gradient: Gradients, rule: ClippingRule) -> Gradients:
    """One unit's gradient under the three definitions, written out."""
    whole = norm(gradient)
    if rule.kind == "flat":
        return {name: g * min(1.0, rule.C / whole) if whole else g for name, g in gradient.items()}
    if rule.kind == "automatic":
        return {name: g * rule.C / (whole + 0.01) for name, g in gradient.items()}
    part = rule.C / math.sqrt(len(gradient))
    return {name: g * min(1.0, part / float(g.norm())) if g.any() else g for name, g in gradient.items()}


def clipped_sum(gradients: list[Gradients], rule: ClippingRule) -> Gradients:
    parts = [clipped(gradient, rule) for gradient in gradients]
    return {name: sum(part[name] for part in parts) for name in parts[0]}


# ------------------------------------------------------------------ models and engines under test


def make_model(lora: LoRAConfig = LoRAConfig(), config: Shape = CONFIG, dtype: torch.dtype = torch.float64,
               seed: int = 0, spread: float = 0.3) -> LanguageModel:
    """Every parameter random, so that no zero (lora_B, biases) hides a wrong term; frozen as for training."""
    model = family_of(config)(config, lora).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread)
    model.freeze_for_training()
    return model.train()


def make_engine(name: str, model: LanguageModel, rule: ClippingRule, smoothing: float = 0.0):
    """(engine, its flat buffer) over a copy of `model`, on which the oracle has left nothing."""
    model = copy.deepcopy(model)
    flat = FlatParameters(model)
    return ENGINES[name][0](model, flat, rule, smoothing), flat


def run_engine(name: str, model: LanguageModel, rule: ClippingRule, batches: list[MicroBatch], monkeypatch,
               smoothing: float = 0.0) -> tuple[Tensor, Gradients]:
    """(losses, the clipped sum by parameter) of engine `name` over the micro-batches."""
    monkeypatch.setattr(layers, "TRAFFIC_COST", ENGINES[name][1])
    engine, flat = make_engine(name, model, rule, smoothing)
    losses = torch.cat([engine.accumulate(batch) for batch in batches])
    return losses, sums_of(flat)


def alone_from(monkeypatch, positions: int = 1, entries: int = 1) -> None:
    """Let units of so many positions form products of so many entries alone, as with real sizes on a CPU."""
    monkeypatch.setattr(layers, "ALONE_POSITIONS", positions)
    monkeypatch.setattr(layers, "ALONE_ENTRIES", entries)


def sums_of(flat: FlatParameters) -> Gradients:
    return {name: flat.grad_of(parameter).detach().clone() for name, parameter in flat.named}


def distance(ours: Gradients, expected: Gradients) -> float:
    """The largest relative error of a parameter's sum; a parameter whose sum is zero counts beside the largest sum."""
    assert ours.keys() == expected.keys()
    least = 1e-3 * max(float(g.norm()) for g in expected.values()) or 1.0
    return max(float((ours[name].double() - expected[name].double()).norm()) / max(float(expected[name].norm()), least)
               for name in expected)


def difference(left: Gradients, right: Gradients) -> Gradients:
    return {name: left[name].double() - right[name].double() for name in left}


def demo_model(lora: bool):
    """The demo's checkpoint, with adapters that are not zero."""
    torch.manual_seed(1)
    model = load_model(str(ROOT / "pretrained_checkpoints/demo"), None, LoRAConfig(4 if lora else 0, 32.0)).model
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.freeze_for_training()
    return model.train()


def as_examples(units: list[np.ndarray]) -> Examples:
    """Texts of token ids; the second half of each is scored."""
    lengths = np.array([len(unit) for unit in units])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Examples(np.concatenate(units).astype(np.int32), starts, np.maximum(1, lengths // 2), 0, 0)


def median_norm(gradients) -> float:
    """A clipping norm that some units exceed and others do not."""
    return sorted(norm(gradient) for gradient in gradients)[len(gradients) // 2]


def check_all(model, units, monkeypatch, rows=1, smoothing=0.0, engines=tuple(ENGINES), rules=RULES):
    """Every engine under every rule against the loop, for the losses and for every parameter's sum."""
    expected_losses, gradients = unit_gradients(model, units, smoothing)
    C = median_norm(gradients)
    assert C > 1e-3 and sum(norm(g) > C for g in gradients) >= len(units) // 2 - 1
    for kind in rules:
        rule = ClippingRule(kind, C)
        expected = clipped_sum(gradients, rule)
        for name in engines:
            losses, sums = run_engine(name, model, rule, [pack(units, rows)], monkeypatch, smoothing)
            torch.testing.assert_close(losses, expected_losses, rtol=FLOAT64, atol=FLOAT64)
            assert distance(sums, expected) < FLOAT64, f"{name}, {kind}"
