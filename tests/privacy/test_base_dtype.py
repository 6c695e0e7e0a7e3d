"""Frozen matrices in bfloat16: what is computed is, bit for bit, what float32 matrices of the same numbers give."""

import copy

import numpy as np
import pytest
import torch

from corpus.batching import PublicLengths
from helpers.clipping_oracle import CONFIG, as_examples, make_model
from helpers.llamas import tiny_config
from language_model import LanguageModel, LoRAConfig
from losses import token_losses
from optimizer import FlatParameters
from privacy.clipping import BookKeeping, ClippingRule, NonPrivate
from privacy.opacus_engine import OpacusEngine
from run.loop import autocast
from weights.building import frozen_matrices

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch's remark on Opacus's hooks
ALL = LoRAConfig(3, 8.0, 0.2, targets=("all",))
QWEN3, BIASED = tiny_config(), tiny_config(model_type="llama", attention_bias=True, mlp_bias=True,
                                           tie_word_embeddings=True)
ENGINES = {"book_keeping": lambda *rest: BookKeeping(*rest, ClippingRule("flat", 0.5), 0.1),
           "opacus": lambda *rest: OpacusEngine(*rest, ClippingRule("flat", 0.5), 0.1),
           "ordinary": lambda *rest: NonPrivate(*rest, 0.1)}


def pair_of(config) -> tuple[LanguageModel, LanguageModel]:
    """(matrices in bfloat16, the same numbers in float32); every other parameter is the same and has all its digits."""
    held = make_model(ALL, config, torch.float32)
    for parameter in frozen_matrices(held):
        parameter.data = parameter.data.bfloat16()
    wide = copy.deepcopy(held)
    for parameter in wide.parameters():
        parameter.data = parameter.data.float()
    return held, wide


def results(model: LanguageModel, engine: str, bf16: bool) -> list[torch.Tensor]:
    """Losses and sums of two micro-batches, and the losses of an evaluation."""
    rng = np.random.default_rng(0)
    data = as_examples([rng.integers(0, model.config.vocab_size, length) for length in (5, 9, 9, 14, 30, 31)])
    batches = list(data.micro_batches(torch.arange(6), PublicLengths((16, 32), 64)))
    flat = FlatParameters(model, sums=torch.float32 if engine == "ordinary" else torch.float64)
    runner = ENGINES[engine](model, flat)
    torch.manual_seed(0)
    with autocast(torch.device("cpu"), bf16):
        found = [runner.accumulate(batch) for batch in batches]
        with torch.no_grad():
            found += [token_losses(model.eval(), batch, 0.0, False, False) for batch in batches]
            found += [model(batch.ids) for batch in batches]
    return [*found, flat.sums]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("config", [CONFIG, QWEN3, BIASED], ids=["gpt2", "qwen3", "llama tied"])
def test_the_bits_are_those_of_float32_matrices_of_the_same_numbers(config, engine, bf16):
    """Dropout too. Norms of units, sums and adapters are float32 and float64: their bits would show what is not."""
    held, wide = pair_of(config)
    assert {value.dtype for name, value in held.named_parameters() if "lora_" in name or value.dim() == 1} == {
        torch.float32}
    for ours, theirs in zip(results(held, engine, bf16), results(wide, engine, bf16), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert all(value.dtype == torch.bfloat16 for value in frozen_matrices(held))


def test_what_is_trained_is_float32():
    model = make_model(LoRAConfig(), CONFIG, torch.float32)
    model.transformer.h[1].mlp.c_fc.weight.data = model.transformer.h[1].mlp.c_fc.weight.data.bfloat16()
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.weight is torch\.bfloat16: trainable parameters must be"):
        FlatParameters(model)


def test_no_float32_copy_of_a_frozen_matrix_waits_for_the_backward_pass():
    """What autograd keeps of a product: the matrix as it is held."""
    kept = []
    weight, x = torch.ones(40, 30).bfloat16(), torch.ones(2, 30, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        from base.products import linear
        linear(x, weight)
    assert any(value.dtype == torch.bfloat16 and value.numel() == 1200 for value in kept)
    assert not any(value.dtype == torch.float32 and value.numel() == 1200 for value in kept)
