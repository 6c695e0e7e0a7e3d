"""What scripts/benchmarks/benchmark_training.py times does the same work: all ways to clip give one clipped sum."""

import argparse
import dataclasses

import numpy as np
import pytest
import torch

import benchmark_training
from benchmark_variants import LLAMAS, GhostClipping, YuArithmetic, needed, pad_to, random_model, untie
from corpus.batching import TightCut
from corpus.examples import Examples
from model import GPT2Config, GPT2LMModel, LoRAConfig
from optimizer import FlatParameters
from privacy.clipping import BookKeeping, ClippingRule
from privacy.opacus_engine import OpacusEngine

CONFIG = GPT2Config(32, 2, 4, vocab_size=97, n_positions=64)
SMALL = dataclasses.replace(LLAMAS["llama-135m"], hidden_size=32, head_dim=8, num_attention_heads=4, vocab_size=97,
                            num_key_value_heads=2, intermediate_size=48, num_hidden_layers=2)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(LLAMAS, "small", SMALL)


def clipped_sum(engine_of, lora: bool, prepare=None, seq_len: int | None = None,
                sums: torch.dtype = torch.float64, card: str | None = None) -> torch.Tensor:
    torch.manual_seed(0)
    model = random_model(card, lora) if card else GPT2LMModel(CONFIG, LoRAConfig(4, 32) if lora else LoRAConfig())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.freeze_for_training()
    if prepare is not None:
        prepare(model)
    flat = FlatParameters(model, sums=sums)
    engine = engine_of(model, flat)
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 30, 6)
    tokens = rng.integers(0, CONFIG.vocab_size, lengths.sum()).astype(np.int32)
    examples = Examples(tokens, np.concatenate([[0], np.cumsum(lengths)]), np.maximum(1, lengths // 2), 0, 0)
    for batch in examples.micro_batches(torch.arange(6), TightCut(2048)):
        engine.accumulate(batch if seq_len is None else pad_to(batch, seq_len))
    return flat.grad.clone()


C = 0.05  # below most units' norms, so that clipping happens


@pytest.mark.parametrize("lora", [True, False])
def test_every_way_of_a_llama_gives_the_same_sum(lora):
    rule = ClippingRule("flat", C)

    def of(engine, **options):
        return clipped_sum(engine, lora, card="small", **options)

    ours = of(lambda model, flat: BookKeeping(model, flat, rule, 0.1))
    others = [of(lambda model, flat: OpacusEngine(model, flat, rule, 0.1))]
    if lora:  # as above
        others.append(of(lambda model, flat: GhostClipping(model, flat, C, 0.1), prepare=untie, sums=torch.float32))
    for other in others:
        assert (other - ours).norm() < 1e-5 * ours.norm()


@pytest.mark.parametrize("variant", ["book_keeping", "ordinary", "opacus", "ghost", "plain"])
@pytest.mark.parametrize("task", ["author_full", "author_lora"])
def test_a_llama_has_every_variant(task, variant):
    """Steps are made, of as many parameters and tokens as ours has."""
    options = argparse.Namespace(model_card="small", units=4, length=12, micro_batch_tokens=None, bf16=False,
                                 seq_len=16, clock="cpu", part=None)
    step = benchmark_training.build(variant, task, options, torch.device("cpu"))
    assert step.seconds(torch.device("cpu"), step.batches) > 0
    assert step.tokens == 4 * 13 and sum(batch.units for batch in step.batches) == step.units == 4
    # 2 layers of q, o 32 x 32, k, v 32 x 16, three of the MLP 32 x 48; the head 32 x 97; passes of 4 x 12 positions
    once = 4 * 12 * (2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 97)
    assert step.multiply_adds == needed("small", 48, 48, "lora" in task) == (2 if "lora" in task else 3) * once


@pytest.mark.parametrize("lora", [True, False])
def test_every_way_gives_the_same_sum(lora):
    rule = ClippingRule("flat", C)
    ours = clipped_sum(lambda model, flat: BookKeeping(model, flat, rule, 0.1), lora)
    others = {
        "opacus": clipped_sum(lambda model, flat: OpacusEngine(model, flat, rule, 0.1), lora),
        "published": clipped_sum(lambda model, flat: YuArithmetic(model, flat, rule, 0.1), lora, seq_len=40)}
    if lora:  # where the whole model trains, the head of ghost clipping is untied: another model
        others["ghost"] = clipped_sum(lambda model, flat: GhostClipping(model, flat, C, 0.1), lora, prepare=untie,
                                      sums=torch.float32)
    # float32: some 2,000 terms in another order, each rounded to 2^-24 of itself, over sums that cancel in part
    for name, other in others.items():
        assert (other - ours).norm() < 1e-5 * ours.norm(), name
    unclipped = clipped_sum(lambda model, flat: OpacusEngine(model, flat, ClippingRule("flat", 1e6), 0.1), lora)
    assert (unclipped - ours).norm() > 0.1 * ours.norm()
