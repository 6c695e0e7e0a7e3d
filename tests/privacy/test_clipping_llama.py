"""The clipping engines on Llamas against the loop of autograd: RMSNorm, grouped heads, norms of queries and keys, own
and tied heads, every bias, adapters on every projection; sensitivity; refusals. As test_clipping.py for GPT-2."""

import math

import pytest
import torch
from torch import nn

from helpers.clipping_oracle import (
    ENGINES,
    FLOAT64,
    alone_from,
    check_all,
    clipped,
    clipped_sum,
    difference,
    distance,
    draw_units,
    make_engine,
    make_model,
    norm,
    pack,
    run_engine,
    sums_of,
    unit_gradients,
)
from helpers.llamas import LLAMA3, tiny_config
from llama import RMSNorm
from model import LoRAConfig
from optimizer import FlatParameters
from privacy import unit_gradients as layers
from privacy.clipping import BookKeeping, ClippingRule, NonPrivate

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch's remark on Opacus's hooks

FULL, ALL = LoRAConfig(), LoRAConfig(3, 8.0, targets=("all",))
QWEN3 = tiny_config()
BIASED = tiny_config(model_type="llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
                     rope_parameters=LLAMA3)
ONE_HEAD_OF_KEYS = tiny_config(model_type="mistral", num_key_value_heads=1)
MODES = {
    "qwen3, own head": (QWEN3, FULL), "llama, tied, every bias": (BIASED, FULL), "one head of keys":
    (ONE_HEAD_OF_KEYS, FULL), "qwen2": (tiny_config(model_type="qwen2", tie_word_embeddings=True), FULL),
    "all parts": (QWEN3, ALL), "all parts by rslora": (BIASED, LoRAConfig(2, 8.0, targets=("all",), rslora=True)),
    "q v": (QWEN3, LoRAConfig(3, 8.0)), "rank above the width": (QWEN3, LoRAConfig(20, 32.0, targets=("k", "down"))),
    "bottleneck": (QWEN3, LoRAConfig(bottleneck=3))}
TWO = {"full": (QWEN3, FULL), "tied": (BIASED, FULL), "lora": (QWEN3, ALL)}


def model_of(mode: str, dtype: torch.dtype = torch.float64):
    config, lora = {**MODES, **TWO}[mode]
    return make_model(lora, config, dtype)


@pytest.mark.parametrize("mode", MODES)
def test_engines_equal_the_loop(mode, monkeypatch):
    check_all(model_of(mode), draw_units(4), monkeypatch, smoothing=0.1)


@pytest.mark.parametrize("mode", TWO)
@pytest.mark.parametrize("rows, shortest, longest", [(3, 2, 14), (1, 60, 90)])
def test_several_texts_and_lengths(mode, rows, shortest, longest, monkeypatch):
    check_all(model_of(mode), draw_units(3, rows, shortest, longest, seed=rows), monkeypatch, rows, rules=("flat",))


@pytest.mark.parametrize("mode", TWO)
@pytest.mark.parametrize("positions, rows_of_a_part", [(1, 2048), (9, 7)])
def test_products_formed_alone(mode, positions, rows_of_a_part, monkeypatch):
    """All units, or the long ones among short ones. A text of few positions is raised by their float32 rounding, 2^-24
    each, over and above what float64 does: that much the sum may differ."""
    alone_from(monkeypatch, positions)
    monkeypatch.setattr(layers, "ALONE_ROWS", rows_of_a_part)
    model, units = model_of(mode), draw_units(6, 1, 4, 14, seed=3)
    for rule in (ClippingRule("flat", 0.02), ClippingRule("automatic", 1.0)):
        expected = clipped_sum(unit_gradients(model, units, 0.1)[1], rule)
        for name in ("ghost", "materialise", "chosen"):
            _, found = run_engine(name, model, rule, [pack(units)], monkeypatch, 0.1)
            assert distance(found, expected) < 14 * 2**-24 * 20 + FLOAT64


def test_repeated_tokens(monkeypatch):
    for mode in ("full", "tied"):
        check_all(model_of(mode), draw_units(4, 2, 5, 20, 2), monkeypatch, 2, rules=("flat",))


def test_ordinary_training_is_the_plain_sum():
    for mode in TWO:
        model, units = model_of(mode), draw_units(5, 2)
        gradients = unit_gradients(model, units, 0.1)[1]
        flat = FlatParameters(model)
        NonPrivate(model, flat, 0.1).accumulate(pack(units, 2))
        assert distance(sums_of(flat), {name: sum(g[name] for g in gradients) for name in gradients[0]}) < FLOAT64


@pytest.mark.parametrize("mode", TWO)
@pytest.mark.parametrize("name", ENGINES)
def test_float32_and_bf16_norms_are_of_what_is_summed(mode, name, monkeypatch):
    """A clipped unit contributes C up to float32 rounding, under bf16 autocast too, and nearly in its direction."""
    exact, model = model_of(mode), model_of(mode, torch.float32)
    units, rule = draw_units(2, 2, 5, 40), ClippingRule("flat", 1e-3)
    for unit in units:
        truth = clipped(unit_gradients(exact, [unit])[1][0], rule)
        for bf16, error in ((False, 1e-4), (True, 0.2)):  # bfloat16 has 8 bits: 0.4 % a rounding, dozens of roundings
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                losses, sums = run_engine(name, model, rule, [pack([unit], 2, torch.float32)], monkeypatch)
            assert losses.dtype == torch.float32 and all(g.dtype == torch.float64 for g in sums.values())
            assert norm(sums) == pytest.approx(rule.C, rel=1e-5)
            assert norm(difference(sums, truth)) < error * rule.C


@pytest.mark.parametrize("mode", TWO)
@pytest.mark.parametrize("name, kind", [("chosen", "flat"), ("ghost", "per_layer"), ("materialise", "automatic"),
                                        ("opacus", "flat")])
@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_one_more_unit_moves_the_sum_by_c(mode, kind, name, dtype, rounding, monkeypatch):
    """D against D and a unit with a huge gradient: never more than C, and exactly C for it."""
    model, C = model_of(mode, dtype), 0.5
    rule, units = ClippingRule(kind, C), draw_units(4, 2)
    with_it, without = pack(units, 2, dtype), pack(units[:-1], 2, dtype)
    with_it.weights[-with_it.counts[-1]:] *= 1e8
    moved = norm(difference(run_engine(name, model, rule, [with_it], monkeypatch)[1],
                            run_engine(name, model, rule, [without], monkeypatch)[1]))
    assert moved <= C * (1 + rounding)
    assert moved == pytest.approx(C, rel=rounding)


def test_an_own_head_has_its_norm_and_no_cross_term(monkeypatch):
    """Alone, every unit that is clipped contributes C: too small a norm would let it contribute more."""
    model, rule = model_of("full"), ClippingRule("flat", 1e-3)
    assert not model.tied and model.lm_head.weight is not model.embedding.weight
    monkeypatch.setattr(BookKeeping, "add_cross_term", lambda self: pytest.fail("a cross term of two parameters"))
    for unit in draw_units(4, 1, 5, 30, tokens=2):
        size = norm(run_engine("chosen", model, rule, [pack([unit])], monkeypatch)[1])
        assert size == pytest.approx(rule.C, rel=1e-9)


@pytest.mark.parametrize("name", ["ghost", "materialise", "opacus"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_units_without_a_finite_gradient_give_nothing(mode, name, monkeypatch):
    monkeypatch.setattr(layers, "TRAFFIC_COST", ENGINES[name][1])
    model, units, rule = model_of(mode), draw_units(4, 2), ClippingRule("flat", 0.3)
    good = [units[0], units[2]]
    expected = clipped_sum(unit_gradients(model, good)[1], rule)
    for value in (math.nan, math.inf, 1e200):
        engine, flat = make_engine(name, model, rule)
        batch = pack(units, 2)
        batch.weights[[sum(batch.counts[:u]) for u in (1, 3)]] = value
        engine.accumulate(batch)
        assert distance(sums_of(flat), expected) < FLOAT64


# ------------------------------------------------------------------ refusals


class Doubled(RMSNorm):
    def forward(self, x):
        return super().forward(2 * x)


@pytest.mark.parametrize("words, change", [
    (r"layers\.0\.self_attn\.q_proj and transformer\.layers\.1\.self_attn\.q_proj share a parameter",
     lambda body: setattr(body.layers[1].self_attn.q_proj, "weight", body.layers[0].self_attn.q_proj.weight)),
    (r"layers\.0\.input_layernorm and transformer\.norm share a parameter",
     lambda body: setattr(body.norm, "weight", body.layers[0].input_layernorm.weight)),
    (r"layers\.0\.self_attn\.q_norm and transformer\.layers\.0\.self_attn\.k_norm share a parameter",
     lambda body: setattr(body.layers[0].self_attn.k_norm, "weight", body.layers[0].self_attn.q_norm.weight)),
    (r"transformer\.norm \(Doubled\) has trainable parameters and no per-unit gradient rule",
     lambda body: setattr(body, "norm", Doubled(16, 1e-5).double())),
    (r"transformer\.extra \(RMSNorm\) has trainable parameters",
     lambda body: setattr(body, "extra", nn.RMSNorm(16).double())),
    (r"transformer\.embed_tokens: an embedding with padding_idx",
     lambda body: setattr(body.embed_tokens, "padding_idx", 0))])
def test_what_has_no_rule_is_refused_by_name(words, change):
    model = make_model(FULL, QWEN3)
    change(model.transformer)
    with pytest.raises(ValueError, match=words):
        BookKeeping(model, FlatParameters(model), ClippingRule("flat", 1.0))


def test_an_own_head_that_is_the_embedding_s_tensor_is_refused():
    model = make_model(FULL, QWEN3)
    model.lm_head.weight = model.embedding.weight
    with pytest.raises(ValueError, match=r"transformer\.embed_tokens and lm_head share a parameter"):
        BookKeeping(model, FlatParameters(model), ClippingRule("flat", 1.0))


def test_a_block_that_stands_twice_is_refused_when_it_runs():
    """Shared layers, as in ALBERT: one module in two places has no second name, but runs twice."""
    model = make_model(FULL, QWEN3)
    model.transformer.layers[1] = model.transformer.layers[0]
    engine = BookKeeping(model, FlatParameters(model), ClippingRule("flat", 1.0))
    with pytest.raises(RuntimeError, match="ran twice in one micro-batch"):
        engine.accumulate(pack(draw_units(2)))
