"""What scripts/benchmarks/benchmark_training.py times does the same work: all ways to clip give one clipped sum."""


import numpy as np
import pytest
import torch

from benchmark_variants import GhostClipping, YuArithmetic, pad_to, untie
from corpus.batching import TightCut
from corpus.examples import Examples
from model import GPT2Config, GPT2LMModel, LoRAConfig
from optimizer import FlatParameters
from privacy.clipping import BookKeeping, ClippingRule
from privacy.opacus_engine import OpacusEngine

CONFIG = GPT2Config(32, 2, 4, vocab_size=97, n_positions=64)


def clipped_sum(engine_of, lora: bool, prepare=None, seq_len: int | None = None,
                sums: torch.dtype = torch.float64) -> torch.Tensor:
    torch.manual_seed(0)
    model = GPT2LMModel(CONFIG, LoRAConfig(4, 32) if lora else LoRAConfig())
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
