"""The clipping engines against a loop of autograd (clipping_oracle.py), in float64; sensitivity; independence; faults.

Both engines, and the book-keeping one with either way to a norm forced on every layer, pass the same tests.
"""

import itertools
import math

import pytest
import torch
from torch import nn

import loralib
from helpers.clipping_oracle import (
    CONFIG,
    ENGINES,
    FLOAT64,
    RULES,
    Text,
    check_all,
    clipped,
    clipped_sum,
    difference,
    distance,
    draw_units,
    make_engine,
    make_model,
    median_norm,
    norm,
    pack,
    run_engine,
    sums_of,
    unit_gradients,
)
from model import SLOTS, GPT2Config, LoRAConfig
from optimizer import FlatParameters
from privacy import unit_gradients as layers
from privacy.clipping import BookKeeping, ClippingRule, NonPrivate

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch's remark on Opacus's hooks

FULL = LoRAConfig()
LORA = LoRAConfig(3, 8.0)
ENABLE = [parts for count in (1, 2, 3) for parts in itertools.combinations(SLOTS, count)]
MODES = {"full": FULL, "rank 1": LoRAConfig(1, 8.0), "rank above the width": LoRAConfig(20, 32.0),
         **{"lora " + "".join(part[0] for part in on): LoRAConfig(3, 8.0, 0.0, on) for on in ENABLE},
         "all parts": LoRAConfig(3, 8.0, 0.0, ("all",)), "mlp": LoRAConfig(2, 8.0, 0.0, ("attn_out", "mlp_out"), True),
         "bottleneck": LoRAConfig(bottleneck=3), "bottleneck above the width": LoRAConfig(bottleneck=20)}


# ------------------------------------------------------------------ against the loop


@pytest.mark.parametrize("mode", MODES)
def test_engines_equal_the_loop(mode, monkeypatch):
    check_all(make_model(MODES[mode]), draw_units(5), monkeypatch, smoothing=0.1)


@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_units_of_several_texts(lora, rows, monkeypatch):
    """One to `rows` texts a unit; the missing ones are rows of padding."""
    check_all(make_model(lora), draw_units(5, rows, seed=rows), monkeypatch, rows)


@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("shortest, longest", [(2, 2), (2, 3), (30, 40), (2, 201)])
def test_lengths(lora, shortest, longest, monkeypatch):
    """1 to 200 positions a text: on both sides of where the ghost norm becomes the dearer one."""
    units = draw_units(4, 1, shortest, longest, seed=3)
    if longest > 100:
        units += [draw_units(1, 1, 201, 201)[0], draw_units(1, 1, 2, 2)[0]]
    check_all(make_model(lora), units, monkeypatch, rules=("flat",), smoothing=0.05)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_repeated_tokens(tokens, monkeypatch):
    """Positions that share an entry of the embedding add up before the norm, and meet the head's rows."""
    check_all(make_model(FULL), draw_units(4, 2, 5, 20, tokens), monkeypatch, 2)


@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
def test_one_unit_and_units_without_a_scored_token(lora, monkeypatch):
    model, units = make_model(lora), draw_units(4)
    check_all(model, units[:1], monkeypatch)
    unscored = [Text((3, 1, 4), 3)]
    expected = clipped_sum(unit_gradients(model, units)[1], ClippingRule("flat", 0.5))
    for name in ENGINES:
        rule = ClippingRule("flat", 0.5)
        losses, sums = run_engine(name, model, rule, [pack([unscored, *units, unscored])], monkeypatch)
        assert losses[0] == losses[-1] == 0 and distance(sums, expected) < FLOAT64
        losses, sums = run_engine(name, model, rule, [pack([unscored, unscored])], monkeypatch)
        assert losses.tolist() == [0, 0] and not any(g.any() for g in sums.values())


class Masks:
    """Stands in for dropout: records the masks of the engine's pass, replays to the loop the rows of one unit."""

    def __init__(self, monkeypatch):
        self.drawn, self.replay, real = [], None, nn.functional.dropout

        def dropout(x, p, training=True):
            if self.replay is not None:
                return x * self.replay.pop(0)[:len(x)]
            self.drawn.append(real(torch.ones_like(x), p, True))
            return x * self.drawn[-1]

        monkeypatch.setattr(nn.functional, "dropout", dropout)

    def of_unit(self, u: int, rows: int) -> None:
        self.replay = [mask[u * rows:(u + 1) * rows] for mask in self.drawn]


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("rows", [1, 3])
def test_dropout_with_the_same_masks(name, rows, monkeypatch):
    model, units = make_model(LoRAConfig(3, 8.0, 0.4, ("query", "key"))), draw_units(4, rows)
    masks, batch = Masks(monkeypatch), pack(units, rows)
    rule = ClippingRule("flat", 0.2)
    _, sums = run_engine(name, model, rule, [batch], monkeypatch)
    assert len(masks.drawn) == CONFIG.n_layer
    weights = batch.weights.split(batch.counts)
    gradients = []
    for u in range(len(units)):
        masks.of_unit(u, rows)
        start = u * rows * batch.ids.shape[1]
        own = (batch.positions >= start) & (batch.positions < start + rows * batch.ids.shape[1])
        logits = model(batch.ids[u * rows:(u + 1) * rows]).flatten(0, 1)[batch.positions[own] - start]
        values = nn.functional.cross_entropy(logits, batch.targets[own], reduction="none")
        loss = (values * weights[u]).sum()
        gradients.append(dict(zip(sums, torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))))
    assert distance(sums, clipped_sum(gradients, rule)) < FLOAT64


@pytest.mark.parametrize("trained", ["everything", "adapters and biases"])
def test_linear_layers_that_this_gpt2_does_not_use(trained, monkeypatch):
    """nn.Linear, and one adapter over all outputs in either layout; with and without base weights."""
    model = make_model(LORA)
    transformer = model.transformer
    transformer.h[0].mlp.c_fc = nn.Linear(16, 64)
    one = {"lora_alpha": 4, "enable_lora": (True,)}
    transformer.h[1].mlp.c_fc = loralib.MergedLinear(16, 64, r=2, **one)
    transformer.h[1].mlp.c_proj = loralib.MergedLinear(64, 16, r=5, fan_in_fan_out=True, bias=False, **one)
    model.double().requires_grad_(True)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    if trained != "everything":
        loralib.mark_only_lora_as_trainable(model)
        for layer in model.modules():
            if isinstance(layer, nn.Linear | loralib.MergedLinear) and layer.bias is not None:
                layer.bias.requires_grad_(True)
    check_all(model, draw_units(4, 2), monkeypatch, 2, smoothing=0.1)


def test_ordinary_training_is_the_plain_sum(monkeypatch):
    for lora in (FULL, LORA):
        model, units = make_model(lora), draw_units(5, 2)
        gradients = unit_gradients(model, units, 0.1)[1]
        flat = FlatParameters(model)
        NonPrivate(model, flat, 0.1).accumulate(pack(units, 2))
        assert distance(sums_of(flat), {name: sum(g[name] for g in gradients) for name in gradients[0]}) < FLOAT64


def test_the_norms_choose_the_cheaper_way(monkeypatch):
    """The published rule S^2 (P + Q) against S P Q, with the price of memory traffic: both ways occur in one model."""
    ways = set()
    real = layers.Outer.__init__

    def choose(self, target, p, q):
        real(self, target, p, q)
        ways.add(((p.shape[1], p.shape[2], q.shape[2]), "ghost" if self.grads is None else "materialise"))

    monkeypatch.setattr(layers.Outer, "__init__", choose)
    model = make_model(LORA)
    batches = [pack(draw_units(2, 1, length, length)) for length in (6, 90)]
    run_engine("chosen", model, ClippingRule("flat", 1.0), batches, monkeypatch)
    for (S, P, Q), way in ways:
        assert way == ("ghost" if S * S * (P + Q) < layers.TRAFFIC_COST * P * Q else "materialise")
    assert {way for _, way in ways} == {"ghost", "materialise"}


# ------------------------------------------------------------------ precision


@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", ENGINES)
def test_float32_and_bf16_norms_are_of_what_is_summed(lora, name, monkeypatch):
    """A clipped unit contributes C up to float32 rounding, under bf16 autocast too, and nearly in its direction."""
    exact = make_model(lora)
    model = make_model(lora, dtype=torch.float32)
    units, rule = draw_units(3, 2, 5, 60), ClippingRule("flat", 1e-3)
    for unit in units:
        truth = clipped(unit_gradients(exact, [unit])[1][0], rule)
        for bf16, error in ((False, 1e-4), (True, 0.15)):  # bfloat16 has 8 bits: 0.4 % a rounding, dozens of roundings
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                losses, sums = run_engine(name, model, rule, [pack([unit], 2, torch.float32)], monkeypatch)
            assert losses.dtype == torch.float32 and all(g.dtype == torch.float64 for g in sums.values())
            assert norm(sums) == pytest.approx(rule.C, rel=1e-5)
            assert norm(difference(sums, truth)) < error * rule.C


# ------------------------------------------------------------------ neighbours


@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_one_more_unit_moves_the_sum_by_c(lora, kind, name, dtype, rounding, monkeypatch):
    """D against D and a unit with a huge gradient: never more than C, and exactly C for it."""
    model, C = make_model(lora, dtype=dtype), 0.5
    rule, units = ClippingRule(kind, C), draw_units(5, 2)
    with_it, without = pack(units, 2, dtype), pack(units[:-1], 2, dtype)
    with_it.weights[-with_it.counts[-1]:] *= 1e8
    moved = norm(difference(run_engine(name, model, rule, [with_it], monkeypatch)[1],
                            run_engine(name, model, rule, [without], monkeypatch)[1]))
    assert moved <= C * (1 + rounding)
    assert moved == pytest.approx(C, rel=rounding)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_one_more_unit_moves_the_sum_by_c_under_autocast_and_dropout(kind, name, bf16, dropout, monkeypatch):
    """As above for adapters, with the same masks for the units of both data sets. The whole model has no dropout."""
    for lora in (LoRAConfig(3, 8.0, dropout), *([FULL] if bf16 and not dropout else [])):
        model, C, masks = make_model(lora, dtype=torch.float32), 0.5, Masks(monkeypatch)
        rule, units = ClippingRule(kind, C), draw_units(5, 2)
        with_it, without = pack(units, 2, torch.float32), pack(units[:-1], 2, torch.float32)
        assert with_it.ids.shape[1] == without.ids.shape[1]
        with_it.weights[-with_it.counts[-1]:] *= 1e8
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            more = run_engine(name, model, rule, [with_it], monkeypatch)[1]
            assert len(masks.drawn) == (CONFIG.n_layer if dropout else 0)
            masks.replay = list(masks.drawn) if dropout else None
            moved = norm(difference(more, run_engine(name, model, rule, [without], monkeypatch)[1]))
        monkeypatch.undo()
        assert moved == pytest.approx(C, rel=1e-5)


@pytest.mark.parametrize("kind", RULES)
def test_no_unit_contributes_more_than_c(kind, monkeypatch):
    """Units of all sizes, alone: flat gives min(|g|, C), the others never more than C."""
    for lora in (FULL, LORA):
        model, units = make_model(lora), draw_units(6, 1, 2, 40)
        gradients = unit_gradients(model, units)[1]
        for scale in (1e-6, 0.5, 1.0, 2.0, 1e6):
            rule = ClippingRule(kind, scale * median_norm(gradients))
            for unit, gradient in zip(units, gradients):
                size = norm(run_engine("chosen", model, rule, [pack([unit])], monkeypatch)[1])
                assert size <= rule.C * (1 + 1e-12)
                if kind == "flat":
                    assert size == pytest.approx(min(norm(gradient), rule.C), rel=FLOAT64)
                if kind == "automatic":
                    assert size == pytest.approx(rule.C * norm(gradient) / (norm(gradient) + 0.01), rel=FLOAT64)


def test_the_tied_embedding_needs_its_cross_term(monkeypatch):
    """Negative control: with |E|^2 + |H|^2 alone some units contribute more than C."""
    model, rule = make_model(FULL), ClippingRule("flat", 1e-3)
    units = draw_units(12, 1, 5, 30, tokens=2)

    def largest() -> float:
        return max(norm(run_engine("chosen", model, rule, [pack([unit])], monkeypatch)[1]) for unit in units)

    assert largest() == pytest.approx(rule.C, rel=1e-9)
    monkeypatch.setattr(BookKeeping, "add_cross_term", lambda self: None)
    assert largest() > 1.01 * rule.C


# ------------------------------------------------------------------ batch independence


@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("name", ENGINES)
def test_a_unit_does_not_see_the_others(lora, kind, name, monkeypatch):
    """The sum over any cut and any order is the sum of what the units give alone."""
    model, units = make_model(lora), draw_units(7, 1, 2, 25)
    rule = ClippingRule(kind, median_norm(unit_gradients(model, units)[1]))
    alone = [run_engine(name, model, rule, [pack([unit])], monkeypatch)[1] for unit in units]
    expected = {key: sum(part[key] for part in alone) for key in alone[0]}
    for cut in ([7], [1, 6], [3, 4]):
        left = list(reversed(units)) if cut == [3, 4] else list(units)
        batches = []
        for size in cut:
            batches.append(pack(left[:size]))
            left = left[size:]
        assert distance(run_engine(name, model, rule, batches, monkeypatch)[1], expected) < FLOAT64


# ------------------------------------------------------------------ faults


def poison(model, engine_model, rows: list[int], value: float) -> None:
    """From the first block on, the states of these rows are `value`."""
    def hook(module, inputs, output):
        factor = torch.ones(len(output), 1, 1, dtype=output.dtype)
        factor[rows] = value
        return output * factor

    engine_model.transformer.h[0].register_forward_hook(hook)


@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("name", ["ghost", "materialise", "opacus"])
@pytest.mark.parametrize("where", ["forward nan", "forward inf", "weight nan", "weight inf", "weight overflow"])
def test_units_without_a_finite_gradient_give_nothing(lora, kind, name, where, monkeypatch):
    """The others give what they gave; overflow of the squared norm counts as infinite."""
    monkeypatch.setattr(layers, "TRAFFIC_COST", ENGINES[name][1])
    model, units, rule = make_model(lora), draw_units(5, 2), ClippingRule(kind, 0.3)
    good = [units[0], units[2], units[4]]
    expected = clipped_sum(unit_gradients(model, good)[1], rule)
    batch = pack(units, 2)
    engine, flat = make_engine(name, model, rule)
    place, value = where.split()
    size = {"nan": math.nan, "inf": math.inf, "overflow": 1e200}[value]
    if place == "forward":
        poison(model, engine.model, [2, 3, 6, 7], size)
    else:
        starts = [sum(batch.counts[:u]) for u in (1, 3)]
        batch.weights[starts] = size
    engine.accumulate(batch)
    assert distance(sums_of(flat), expected) < FLOAT64
    engine.accumulate(pack(good, 2)) if place == "weight" else None  # nothing is left over from the bad units
    assert all(g.isfinite().all() for g in sums_of(flat).values())


def test_factors_of_hostile_norms():
    """No squared norm that overflowed, vanished or cancelled gives a factor that is not finite or not deserved."""
    norms_sq = torch.tensor([[0.0, 0.0], [1e-45, 0.0], [3e38, 3e38], [math.inf, 1.0], [math.nan, 1.0], [-math.inf, 1.0],
                             [1.0, -math.inf], [math.inf, -math.inf], [4.0, -1e-9]])
    for kind in RULES:
        factors, finite = ClippingRule(kind, 0.5).factors(norms_sq)
        assert finite.tolist() == [True, True, False, False, False, False, False, False, True]
        assert factors.isfinite().all() and (factors[~finite] == 0).all() and (factors[finite] > 0).all()
    with pytest.raises(ValueError, match="flat, per_layer, automatic"):
        ClippingRule("mean", 0.5).factors(norms_sq)


# ------------------------------------------------------------------ refusals


def rebuilt(change) -> tuple:
    """A whole model after `change(model)`, and its flat buffer."""
    model = make_model(FULL)
    change(model)
    return model, FlatParameters(model)


def set_linear(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)
    model.transformer.h[0].extra = Doubled(4, 4).double()


def set_padding(model):
    model.transformer.wte.padding_idx = 0


@pytest.mark.parametrize("words, change", [
    (r"transformer\.h\.1\.extra \(Bilinear\) has trainable parameters",
     lambda model: setattr(model.transformer.h[1], "extra", nn.Bilinear(2, 2, 2).double())),
    (r"transformer\.h\.0\.extra \(Doubled\) has trainable parameters", set_linear),
    (r"transformer \(Transformer\) has trainable parameters",
     lambda model: setattr(model.transformer, "gain", nn.Parameter(torch.ones(3, dtype=torch.float64)))),
    (r"h\.0\.mlp\.c_fc and transformer\.h\.1\.mlp\.c_fc share a parameter",
     lambda model: setattr(model.transformer.h[1].mlp.c_fc, "weight", model.transformer.h[0].mlp.c_fc.weight)),
    (r"h\.0\.ln_1 and transformer\.ln_f share a parameter",
     lambda model: setattr(model.transformer.ln_f, "weight", model.transformer.h[0].ln_1.weight)),
    (r"transformer\.wte: an embedding with padding_idx", set_padding),
    (r"transformer\.wpe: an embedding with padding_idx, max_norm",
     lambda model: setattr(model.transformer.wpe, "max_norm", 1.0)),
    (r"transformer\.ln_f: a layer norm is trained with both",
     lambda model: model.transformer.ln_f.bias.requires_grad_(False)),
])
def test_what_has_no_rule_is_refused_by_name(words, change):
    model, flat = rebuilt(change)
    with pytest.raises(ValueError, match=words):
        BookKeeping(model, flat, ClippingRule("flat", 1.0))


def test_a_frozen_stranger_is_no_obstacle_and_a_layer_run_twice_is_one(monkeypatch):
    model, flat = rebuilt(lambda model: setattr(model.transformer.h[1], "extra",
                                                nn.Bilinear(2, 2, 2).double().requires_grad_(False)))
    engine = BookKeeping(model, flat, ClippingRule("flat", 1.0))
    engine.accumulate(pack(draw_units(2)))
    mlp = model.transformer.h[0].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: forward(forward(x)))
    with pytest.raises(RuntimeError, match="ran twice"):
        engine.accumulate(pack(draw_units(2)))
    monkeypatch.setattr(mlp, "forward", lambda x: forward(x).detach())
    with pytest.raises(RuntimeError, match="3 trained modules got no gradient"):
        engine.accumulate(pack(draw_units(2)))
    monkeypatch.setattr(mlp, "forward", forward)
    engine.accumulate(pack(draw_units(2)))  # a failed pass leaves nothing behind


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
def test_larger_models_equal_the_loop(seed, monkeypatch):
    config = GPT2Config(n_embd=48, n_layer=4, n_head=4, vocab_size=211, n_positions=256)
    for lora in (FULL, LoRAConfig(4, 32.0), LoRAConfig(8, 16.0, 0.0, SLOTS)):
        model = make_model(lora, config, seed=seed)
        check_all(model, draw_units(8, 4, 2, 120, 211, seed), monkeypatch, 4, smoothing=0.1)
