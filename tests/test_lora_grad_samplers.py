"""Per-sample gradients under Opacus against a loop of autograd, one sample at a time, in float64.

The loop runs on a copy of the model that Opacus never saw. Where dropout is on, the masks that the batched forward pass
drew are recorded and the loop's dropout is made to use the sample's own row of the same mask.
"""

import copy
import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule
from torch import nn

import lora_grad_samplers  # noqa: F401  registers the samplers
import loralib as lora
from loralib import layers as lora_layers
from model import SLOTS, Conv1D, GPT2Config, GPT2LMModel, LoRAConfig, TiedHead

# The first layer's input needs no gradient; Opacus's hooks fire all the same, which is right, and torch remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

# Sums of fewer than 1000 products of numbers of order 1 in float64: 1000 * 2**-53 ~ 1e-13, times a margin of 10.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
CONFIG = GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=31, n_positions=12)
B, T = 3, 7
ALL_ENABLED = list(itertools.product([False, True], repeat=3))


class Masks:
    """Replaces loralib's dropout: records the masks of batched passes, replays one sample's row of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.drawn: list[torch.Tensor] = []
        self.replay: list[torch.Tensor] | None = None
        self.real = F.dropout
        monkeypatch.setattr(lora_layers.F, "dropout", self)

    def __call__(self, x: torch.Tensor, p: float, training: bool = True) -> torch.Tensor:
        if not training:
            return x
        if self.replay is not None:
            return x * self.replay.pop(0)
        mask = self.real(torch.ones_like(x), p, True)
        if torch.is_grad_enabled():
            self.drawn.append(mask)
        return x * mask

    def row(self, i: int) -> None:
        self.replay = [mask[i:i + 1] for mask in self.drawn]


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> Masks:
    return Masks(monkeypatch)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew in float64, so that no zero (lora_B, biases) hides a wrong term."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return module.train()


def inputs(count: int = 1, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, CONFIG.vocab_size, (B, T), generator=generator) for _ in range(count)]


def losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The loss of each sample (B,), in which no two positions weigh the same."""
    logits = model(ids)
    weights = torch.linspace(0.5, 1.5, ids.shape[1] - 1, dtype=logits.dtype)
    return (F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none") * weights).sum(1)


def looped(model: nn.Module, batches: list[torch.Tensor], masks: Masks | None = None) -> dict[str, torch.Tensor]:
    """name -> per-sample gradients of the loss summed over `batches`, by autograd on one sample at a time."""
    gradients: dict[str, list[torch.Tensor]] = {}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for i in range(len(batches[0])):
        if masks is not None:
            masks.row(i)
        total = sum(losses(model, ids[i:i + 1]).sum() for ids in batches)
        for name, gradient in zip(trainable, torch.autograd.grad(total, list(trainable.values())), strict=True):
            gradients.setdefault(name, []).append(gradient)
    if masks is not None:
        assert masks.replay == [], "the loop drew fewer masks than the batch"
        masks.replay = None
    return {name: torch.stack(rows) for name, rows in gradients.items()}


def assert_equal_to_loop(wrapped: GradSampleModule, expected: dict[str, torch.Tensor]) -> None:
    found = {name.removeprefix("_module."): p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys() and expected
    for name, parameter in found.items():
        assert expected[name].abs().max() > 1e-6, f"{name}: the loop's gradient is zero and proves nothing"
        torch.testing.assert_close(parameter.grad_sample, expected[name], msg=lambda text, name=name: f"{name}: {text}",
                                   **TOLERANCE)


def check(model: GPT2LMModel, masks: Masks | None = None, reduction: str = "sum") -> None:
    reference = copy.deepcopy(model)
    wrapped = GradSampleModule(model, loss_reduction=reduction)
    [ids] = inputs()
    values = losses(wrapped, ids)
    (values.sum() if reduction == "sum" else values.mean()).backward()
    assert_equal_to_loop(wrapped, looped(reference, [ids], masks))


@pytest.mark.parametrize("enable", ALL_ENABLED)
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora_equals_loop(enable, bias, dropout, masks):
    model = randomised(GPT2LMModel(CONFIG, LoRAConfig(2, 5.0, dropout, tuple(itertools.compress(SLOTS, enable)))))
    lora.mark_only_lora_as_trainable(model, bias)
    if not any(enable) and bias != "all":  # nothing to adapt: nothing trains, and nothing may crash
        assert not [p for p in model.parameters() if p.requires_grad]
        assert torch.isfinite(model(inputs()[0])).all()
        return
    check(model, masks)
    assert bool(masks.drawn) == (dropout > 0 and any(enable))


@pytest.mark.parametrize("rank", [1, 3, 8, 30])  # 30 is more than the width
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_ranks_equal_loop(rank, dropout, masks):
    model = randomised(GPT2LMModel(CONFIG, LoRAConfig(rank, 32.0, dropout)))
    model.freeze_for_training()
    check(model, masks)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_full_fine_tuning_equals_loop(reduction):
    """With the tied embedding: its per-sample gradient is the sum over both uses, once."""
    model = randomised(GPT2LMModel(CONFIG))
    model.freeze_for_training()
    assert model.lm_head.weight is model.transformer.wte.weight
    check(model, reduction=reduction)


@pytest.mark.parametrize("trainable", [
    ("wte",), ("wpe", "ln_f"), ("lora_", "wte"), ("lora_A",), ("lora_B", "c_attn.bias"), ("c_attn.weight",),
    ("mlp.c_fc.weight", "mlp.c_proj.bias"), ("ln_1.bias", "ln_2.weight"), ("",),
])
def test_any_mixture_equals_loop(trainable, masks):
    """Any set of trainable parameters, adapters with dropout beside trained weights included."""
    model = randomised(GPT2LMModel(CONFIG, LoRAConfig(2, 8.0, 0.2, ("query", "key"))))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trainable))
    check(model, masks)


def test_two_forward_passes_before_the_backward_use_each_its_own_mask(masks):
    model = randomised(GPT2LMModel(CONFIG, LoRAConfig(2, 8.0, 0.5)))
    model.freeze_for_training()
    reference, wrapped = copy.deepcopy(model), GradSampleModule(model, loss_reduction="sum")
    batches = inputs(2)
    sum(losses(wrapped, ids).sum() for ids in batches).backward()
    assert len(masks.drawn) == 2 * CONFIG.n_layer
    assert_equal_to_loop(wrapped, looped(reference, batches, masks))


def test_the_same_input_twice_before_the_backward(masks):
    model = randomised(GPT2LMModel(CONFIG, LoRAConfig(2, 8.0, 0.5)))
    model.freeze_for_training()
    reference, wrapped = copy.deepcopy(model), GradSampleModule(model, loss_reduction="sum")
    batches = inputs(1) * 2
    sum(losses(wrapped, ids).sum() for ids in batches).backward()
    assert_equal_to_loop(wrapped, looped(reference, batches, masks))


def test_other_forward_passes_in_between_change_nothing(masks):
    """Validation between a training pass's forward and backward, and passes without gradients, in either mode."""
    model = randomised(GPT2LMModel(CONFIG, LoRAConfig(2, 8.0, 0.5)))
    model.freeze_for_training()
    reference, wrapped = copy.deepcopy(model), GradSampleModule(model, loss_reduction="sum")
    ids, other = inputs(2)
    with torch.no_grad():
        losses(wrapped, other)
    total = losses(wrapped, ids).sum()
    with torch.no_grad():
        losses(wrapped, other)
    wrapped.eval()
    losses(wrapped, other)  # with gradients enabled, and dropped
    total.backward()  # while in eval mode: the mask is the forward pass's
    assert_equal_to_loop(wrapped, looped(reference, [ids], masks))


def test_successive_steps_do_not_mix(masks):
    model = randomised(GPT2LMModel(CONFIG, LoRAConfig(2, 8.0, 0.5)))
    model.freeze_for_training()
    reference, wrapped = copy.deepcopy(model), GradSampleModule(model, loss_reduction="sum")
    for ids in inputs(3):
        wrapped.zero_grad()
        masks.drawn.clear()
        losses(wrapped, ids).sum().backward()
        assert_equal_to_loop(wrapped, looped(reference, [ids], masks))


@pytest.mark.parametrize("watched", [False, True])
def test_dropped_inputs_do_not_pile_up(watched):
    """Ordinary training with dropout asks for no per-sample gradients; a watcher may not ask for every pass."""
    layer = lora.MergedLinear(6, 9, r=2, lora_dropout=0.5, enable_lora=(True, False, True))
    if watched:
        layer.register_forward_hook(lambda *_: None)
    for _ in range(20):
        layer(torch.randn(4, 3, 6)).sum().backward()
    gc.collect()
    assert len(layer.adapter_inputs) == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_factors_in_any_order_and_for_regrouped_rows(frozen):
    """Our own engine's use: parameters frozen, inputs held and regrouped to units of several rows, passes abandoned."""
    layer = randomised(lora.MergedLinear(6, 9, r=2, lora_dropout=0.5, enable_lora=(True, False, True)))
    layer.register_forward_hook(lambda *_: None)
    xs = [torch.randn(4, 3, 6, dtype=torch.float64) for _ in range(4)]
    outputs = []
    for i, x in enumerate(xs):
        layer.train(i != 3)  # the last is a pass without dropout
        state = torch.get_rng_state()
        layer.requires_grad_(not frozen)
        layer(x)
        layer.requires_grad_(True)
        torch.set_rng_state(state)
        hooks, layer._forward_hooks = layer._forward_hooks, {}
        outputs.append(layer(x))  # the same mask again, for autograd
        layer._forward_hooks = hooks
    for i in (1, 0, 3):  # the third is never asked for
        grad = torch.randn(4, 3, 9, dtype=torch.float64)
        expected = torch.autograd.grad(outputs[i], [layer.lora_A, layer.lora_B], grad)
        (p, q), slots = layer.adapter_factors(xs[i].detach().reshape(2, 6, 6), grad.reshape(2, 6, 9))
        torch.testing.assert_close(torch.einsum("btr,bti->ri", p, q), expected[0], **TOLERANCE)
        for rows, p, q in slots:
            torch.testing.assert_close(torch.einsum("bto,btr->or", p, q), expected[1][rows], **TOLERANCE)
    with pytest.raises(RuntimeError, match="dropout mask is unknown"):
        layer.adapter_factors(xs[0], grad)


class Wrapped(nn.Module):
    """One layer under a loss that weighs every output differently."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.layer(x)).flatten(1).sum(1)


def check_layer(layer: nn.Module, x: torch.Tensor, masks: Masks | None = None) -> None:
    reference = copy.deepcopy(layer)
    wrapped = GradSampleModule(Wrapped(layer), loss_reduction="sum")
    wrapped(x).sum().backward()
    names = [name for name, p in reference.named_parameters() if p.requires_grad]
    for i in range(len(x)):
        if masks is not None:
            masks.row(i)
        total = Wrapped(reference)(x[i:i + 1]).sum()
        expected = torch.autograd.grad(total, [reference.get_parameter(name) for name in names])
        for name, gradient in zip(names, expected, strict=True):
            torch.testing.assert_close(layer.get_parameter(name).grad_sample[i], gradient, **TOLERANCE)
    if masks is not None:
        masks.replay = None


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 2, 3, 6)])
def test_linear_layers_in_both_layouts(fan_in_fan_out, bias, dropout, shape, masks):
    """Weight, bias and adapter at once; with any number of position dimensions, none included."""
    x = torch.randn(shape, dtype=torch.float64)
    options = {"lora_alpha": 3, "lora_dropout": dropout, "fan_in_fan_out": fan_in_fan_out, "bias": bias}
    check_layer(randomised(lora.MergedLinear(6, 5, r=2, enable_lora=(True,), **options)), x, masks)
    for enable in [(True, False, True), (False, True), (True,), (True, True, False, True)]:
        masks.drawn.clear()
        check_layer(randomised(lora.MergedLinear(6, 12, r=2, enable_lora=enable, **options)), x, masks)
    check_layer(randomised(lora.MergedLinear(6, 5, r=0, enable_lora=(True,), **options)), x)


def test_conv1d_and_tied_head():
    check_layer(randomised(Conv1D(6, 5)), torch.randn(4, 3, 6, dtype=torch.float64))
    check_layer(randomised(TiedHead(nn.Embedding(11, 6))), torch.randn(4, 3, 6, dtype=torch.float64))


def test_an_empty_batch_gives_no_rows_and_no_error():
    """Poisson sampling draws empty batches."""
    for lora_config in (LoRAConfig(), LoRAConfig(2, 4.0, 0.3)):
        model = randomised(GPT2LMModel(CONFIG, lora_config))
        model.freeze_for_training()
        wrapped = GradSampleModule(model, loss_reduction="sum")
        losses(wrapped, torch.zeros(0, T, dtype=torch.int64)).sum().backward()
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                assert parameter.grad_sample.shape == (0, *parameter.shape)


def test_gradients_are_float32_under_autocast():
    """Half-precision activations; the sum over positions of 1 + 2**-9, 512 times, keeps what bfloat16 would lose."""
    layer = lora.MergedLinear(1, 1, r=1, enable_lora=(True,), bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.fill_(1.0)
        layer.lora_B.fill_(1.0)
    wrapped = GradSampleModule(layer, loss_reduction="sum")
    x = torch.ones(1, 512, 1)
    x[:, ::2] += 2 ** -7  # exact in bfloat16; the sum of 512 of them is not
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wrapped(x).float().sum().backward()
    for parameter in (layer.lora_A, layer.lora_B, layer.weight):
        assert parameter.grad_sample.dtype == torch.float32
        assert parameter.grad_sample.item() == 512 + 256 * 2 ** -7


def test_a_wrong_mask_is_noticed(masks):
    """Negative control: were the sampler to draw a mask of its own, the comparison would fail."""
    model = randomised(GPT2LMModel(CONFIG, LoRAConfig(2, 8.0, 0.5)))
    model.freeze_for_training()
    reference, wrapped = copy.deepcopy(model), GradSampleModule(model, loss_reduction="sum")
    [ids] = inputs()
    losses(wrapped, ids).sum().backward()
    masks.drawn = [masks.real(torch.ones_like(mask), 0.5, True) for mask in masks.drawn]
    with pytest.raises(AssertionError):
        assert_equal_to_loop(wrapped, looped(reference, [ids], masks))
