"""loralib against plain formulas in float64: forward, merge and unmerge, copies, freezing and saving."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loralib as lora
from model import SLOTS, GPT2Config, GPT2LMModel, LoRAConfig

# Fewer than 100 products of numbers of order 1: rounding below 100 * 2**-53 (float64) and 100 * 2**-24 (float32).
TOLERANCE64 = {"rtol": 1e-12, "atol": 1e-13}
TOLERANCE32 = {"rtol": 1e-5, "atol": 1e-5}
ALL_ENABLED = list(itertools.product([False, True], repeat=3))


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def merged_linear(enable=(True, False, True), r=2, **options) -> lora.MergedLinear:
    return randomised(lora.MergedLinear(6, 12, r=r, lora_alpha=5, enable_lora=enable, **options))


def one_slot(r=3, **options) -> lora.MergedLinear:
    """A single adapter over the whole output."""
    return randomised(lora.MergedLinear(6, 5, r=r, lora_alpha=2, enable_lora=(True,), **options))


def dense_delta(layer: lora.MergedLinear) -> torch.Tensor:
    """(O, I): alpha/r B_j A_j in the rows of the j-th enabled slot, written as a loop over single entries."""
    delta = torch.zeros(layer.out_features, layer.in_features, dtype=layer.weight.dtype)
    width, j = layer.out_features // len(layer.enable_lora), 0
    for slot, on in enumerate(layer.enable_lora):
        if not on:
            continue
        for o in range(width):
            for k in range(layer.r):
                b = layer.lora_alpha / layer.r * layer.lora_B[j * width + o, k]
                delta[slot * width + o] += b * layer.lora_A[j * layer.r + k]
        j += 1
    return delta


def layers() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """name -> (a layer in eval mode with every parameter random, an input for it)."""
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    found = {f"merged {enable} {fan}": (merged_linear(enable, fan_in_fan_out=fan), x)
             for enable in ALL_ENABLED for fan in (False, True)}
    found["merged two slots"] = merged_linear((False, True)), x
    found["one slot"] = one_slot(lora_dropout=0.5), x
    found["one slot fan_in_fan_out"] = one_slot(fan_in_fan_out=True, bias=False), x
    found["one slot r=0"] = one_slot(r=0), x
    return {name: (layer.eval(), x) for name, (layer, x) in found.items()}


LAYERS = sorted(layers())


@pytest.mark.parametrize("enable", ALL_ENABLED)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 9])
def test_forward_is_w_plus_ba(enable, fan_in_fan_out, rank):
    layer = merged_linear(enable, rank, fan_in_fan_out=fan_in_fan_out).double()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    weight = layer.weight.T if fan_in_fan_out else layer.weight
    with torch.no_grad():
        delta = dense_delta(layer) if any(enable) else torch.zeros_like(weight)
        torch.testing.assert_close(layer(x), x @ (weight + delta).T + layer.bias, **TOLERANCE64)
        if any(enable):
            torch.testing.assert_close(layer.delta_weight(), delta.T if fan_in_fan_out else delta, **TOLERANCE64)


def test_gradients_are_those_of_w_plus_ba():
    layer = merged_linear((True, False, True), fan_in_fan_out=True).double()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    grad = torch.randn(3, 4, 12, dtype=torch.float64)
    parameters = [layer.weight, layer.bias, layer.lora_A, layer.lora_B]
    found = torch.autograd.grad(layer(x), parameters, grad)
    expected = torch.autograd.grad(x @ (layer.weight + dense_delta(layer).T) + layer.bias, parameters, grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE64)


def test_one_slot_is_w_plus_ba():
    linear = one_slot().double()
    x = torch.randn(4, 6, dtype=torch.float64)
    delta = 2 / 3 * linear.lora_B @ linear.lora_A
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight + delta, linear.bias), **TOLERANCE64)


def test_initialisation_adds_nothing_and_has_the_published_spread():
    for enable, rank in (((True, False, True), 8), ((True,), 16)):
        layer = lora.MergedLinear(64, 30, r=rank, enable_lora=enable)
        bound = 1 / math.sqrt(64)  # Kaiming-uniform(sqrt 5): sqrt(6 / ((1 + 5) * fan_in))
        assert layer.lora_A.abs().max() <= bound and layer.lora_A.abs().max() > 0.9 * bound
        assert not layer.lora_B.any() and not layer.delta_weight().any()


@pytest.mark.parametrize("name", LAYERS)
def test_merge_and_unmerge_are_exact_and_idempotent(name):
    layer, x = layers()[name]
    before, output = layer.weight.detach().clone(), layer(x)
    for _ in range(3):
        layer.merge()
        once = layer.weight.detach().clone()
        layer.merge()
        assert torch.equal(layer.weight, once), "a second merge() changed the weight"
        torch.testing.assert_close(layer(x), output, **TOLERANCE32)
        layer.unmerge()
        layer.unmerge()
        assert torch.equal(layer.weight, before), "unmerge() did not restore every bit"
        assert torch.equal(layer(x), output)


def test_merged_weight_is_the_exact_sum():
    layer = merged_linear(fan_in_fan_out=True).double()
    expected = layer.weight + dense_delta(layer).T
    layer.merge()
    torch.testing.assert_close(layer.weight, expected, **TOLERANCE64)


def test_train_and_eval_do_not_merge():
    layer = merged_linear()
    before = layer.weight.detach().clone()
    assert torch.equal(layer.eval().weight, before) and torch.equal(layer.train().weight, before)
    layer.merge()
    layer.eval()
    assert layer.merged


def test_a_merged_layer_that_was_cast_unmerges():
    layer = merged_linear()
    before = layer.weight.detach().clone()
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight, before.bfloat16())


def test_while_merged_there_is_no_saving_loading_or_training():
    layer, x = merged_linear(), torch.randn(2, 6)
    saved = copy.deepcopy(layer.state_dict())
    model = nn.Sequential(layer)
    layer.merge()
    with pytest.raises(RuntimeError, match=r"0\.weight is merged: call unmerge\(\) before state_dict"):
        model.state_dict()
    with pytest.raises(RuntimeError, match=r"call unmerge\(\) before load_state_dict"):
        model.load_state_dict({f"0.{name}": value for name, value in saved.items()})
    with pytest.raises(RuntimeError, match=r"call unmerge\(\) before training"):
        layer(x)
    with torch.no_grad():
        layer(x)
    layer.unmerge()
    model.load_state_dict(model.state_dict())
    layer(x).sum().backward()
    assert layer.lora_A.grad is not None


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("merged", [False, True])
def test_copies_and_pickles_are_independent_twins(name, merged):
    layer, x = layers()[name]
    watched = layer.register_forward_hook(lambda *_: None)
    layer.train()
    layer(x)  # whatever a forward pass leaves behind must not stand in the way
    watched.remove()
    layer.eval()
    if merged:
        layer.merge()
    output = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert twin.merged == layer.merged and torch.equal(twin(x), output)
        layer_before = [parameter.detach().clone() for parameter in layer.parameters()]
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1)
        assert all(map(torch.equal, layer.parameters(), layer_before))
        twin.unmerge()
        twin.train()
        twin(x).sum().backward()


@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_round_trip(name):
    layer, x = layers()[name]
    other = randomised(copy.deepcopy(layer), seed=99)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    adapted = layer.has_adapter()
    assert {"lora_A", "lora_B"} <= layer.state_dict().keys() if adapted else "lora_A" not in layer.state_dict()


def test_a_model_with_adapters_is_deep_copied_with_its_tied_embedding():
    model = randomised(GPT2LMModel(GPT2Config(8, 2, 2, vocab_size=11, n_positions=5), LoRAConfig(2, 4.0, 0.1)))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.lm_head.weight is twin.transformer.wte.weight
        assert twin.lm_head.weight is not model.lm_head.weight
        ids = torch.arange(5)[None]
        assert torch.equal(twin.eval()(ids), model.eval()(ids))


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout_acts_on_the_adapter_alone_and_is_unbiased(dropout):
    layer = merged_linear(lora_dropout=dropout).double()
    x = torch.ones(1, 6, dtype=torch.float64)
    base = F.linear(x, layer.weight, layer.bias)
    exact = F.linear(x, layer.weight + dense_delta(layer), layer.bias).detach()
    assert torch.equal(layer.eval()(x), layer.eval()(x))
    torch.testing.assert_close(layer.eval()(x), exact, **TOLERANCE64)
    n = 20_000
    with torch.no_grad():
        samples = layer.train()(x.expand(n, 6))
        kept = F.linear(torch.eye(6, dtype=torch.float64), layer.expanded_B() @ layer.lora_A)  # (I, O) by input
        # every input is kept with probability 1-p and divided by it: variance p/(1-p) of its part, squared and summed
        spread = (kept.square().sum(0) * dropout / (1 - dropout) / n).sqrt()
    assert ((samples.mean(0) - exact[0]).abs() <= 5 * spread + 1e-12).all()
    assert torch.equal(samples[:, 4:8], base.expand(n, 12)[:, 4:8])  # the slot without an adapter
    assert samples[:, 0].unique().numel() > 1


def test_freezing_and_saving_by_bias_mode():
    one = (True,)
    model = nn.ModuleDict({"adapted": lora.MergedLinear(4, 6, r=2, enable_lora=(True, False)),
                           "single": lora.MergedLinear(4, 4, r=1, enable_lora=one), "table": nn.Embedding(5, 4),
                           "off": lora.MergedLinear(4, 6, r=2, enable_lora=(False, False)),
                           "none": lora.MergedLinear(4, 4, enable_lora=one),
                           "unbiased": lora.MergedLinear(4, 4, r=1, enable_lora=one, bias=False),
                           "plain": nn.Linear(4, 4)})
    adapters = {f"{name}.lora_{c}" for name in ("adapted", "single", "unbiased") for c in "AB"}
    own = {"adapted.bias", "single.bias"}
    expected = {"none": adapters, "lora_only": adapters | own,
                "all": adapters | own | {"off.bias", "none.bias", "plain.bias"}}
    for _ in range(2):  # from any state before
        for bias, names in expected.items():
            lora.mark_only_lora_as_trainable(model, bias)
            assert {name for name, p in model.named_parameters() if p.requires_grad} == names
            assert lora.lora_state_dict(model, bias).keys() == names
    for function in (lora.mark_only_lora_as_trainable, lora.lora_state_dict):
        with pytest.raises(ValueError, match="bias='some'"):
            function(model, "some")


def test_a_bare_layer_is_frozen_too():
    layer = lora.MergedLinear(4, 4, r=1, enable_lora=(True,))
    lora.mark_only_lora_as_trainable(layer, "lora_only")
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"bias", "lora_A", "lora_B"}
    assert lora.lora_state_dict(layer, "lora_only").keys() == {"bias", "lora_A", "lora_B"}


def test_merging_a_whole_model():
    config = GPT2Config(16, 3, 2, vocab_size=17, n_positions=9)
    for enable in ALL_ENABLED:
        adapter = LoRAConfig(2, 3.0, 0.2, tuple(itertools.compress(SLOTS, enable)))
        model = randomised(GPT2LMModel(config, adapter)).eval()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        ids = torch.randint(0, 17, (2, 9))
        with torch.no_grad():
            output = model(ids)
            lora.merge(model)
            # three layers amplify rounding; the size of the logits sets its scale
            torch.testing.assert_close(model(ids), output, rtol=0, atol=1e-4 * output.abs().max().item())
            lora.unmerge(model)
            assert torch.equal(model(ids), output)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert len(lora.adapted_layers(model)) == (3 if any(enable) else 0)


@pytest.mark.parametrize("options, words", [
    ({"r": -1}, "r=-1"), ({"lora_dropout": 1.0}, "lora_dropout=1.0"), ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
    ({"enable_lora": (True, False, True, True, True)}, "divisor of out_features=12"), ({"enable_lora": ()}, "0 slots"),
])
def test_nonsense_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        lora.MergedLinear(6, 12, **options)
