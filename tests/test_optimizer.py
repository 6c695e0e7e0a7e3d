"""AdamW, the learning-rate schedules and the flat buffers against formulas written out in float64."""

import copy
import math

import pytest
import torch
from torch import nn

import optimizer
from helpers.clipping_oracle import make_model
from model import LoRAConfig
from optimizer import AdamW, FlatParameters, schedule


class Net(nn.Module):
    """A matrix that reaches over two pieces of the cached walk, a bias and a norm."""

    def __init__(self, dtype: torch.dtype = torch.float64, rows: int = 300):
        super().__init__()
        torch.manual_seed(3)
        self.bias = nn.Parameter(torch.randn(rows, dtype=dtype))
        self.weight = nn.Parameter(torch.randn(rows, 500, dtype=dtype))
        self.norm = nn.LayerNorm(7).to(dtype)
        self.table = nn.Parameter(torch.randn(11, 5, dtype=dtype))
        self.frozen = nn.Parameter(torch.randn(4, 4, dtype=dtype), requires_grad=False)


# ------------------------------------------------------------------ flat buffers


@pytest.mark.parametrize("no_decay_bias", [False, True])
def test_parameters_become_views_and_keep_their_values(no_decay_bias):
    net = Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    flat = FlatParameters(net, extra=3, no_decay_bias=no_decay_bias)
    trained = [name for name, _ in flat.named]
    assert sorted(trained) == sorted(name for name in before if name != "frozen")
    assert flat.size == sum(before[name].numel() for name in trained) and flat.sums.shape == (flat.size + 3,)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name])
    flat.data.mul_(2)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name] * (1 if name == "frozen" else 2))
    flat.sums.copy_(torch.arange(flat.size + 3))
    assert flat.extra.tolist() == [flat.size, flat.size + 1, flat.size + 2]
    covered = torch.cat([flat.grad_of(p).flatten() for _, p in flat.named])
    assert torch.equal(covered, torch.arange(flat.size, dtype=torch.float64))  # every coordinate once
    flat.grad_of(net.table)[2, 3] = -1.0
    assert (flat.sums == -1).sum() == 1 and flat.grad_of(net.frozen) is None and flat.grad_of(None) is None
    decayed = {name for name, p in flat.named if flat.slices[id(p)].stop <= flat.decayed}
    assert decayed == ({"weight", "table"} if no_decay_bias else set(trained))


def test_a_tied_weight_stands_once_and_frozen_means_no_gradient():
    model = make_model()
    flat = FlatParameters(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert flat.size == sum(p.numel() for p in set(model.parameters()))
    with flat.frozen():
        assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    adapters = FlatParameters(make_model(LoRAConfig(2, 4.0)))
    assert all("lora_" in name for name, _ in adapters.named)
    model.load_state_dict(copy.deepcopy(make_model(seed=5)).state_dict())  # a checkpoint read in goes into the buffer
    wpe = flat.data[flat.slices[id(model.transformer.wpe.weight)]]
    assert torch.equal(wpe, make_model(seed=5).transformer.wpe.weight.flatten())


def test_half_precision_and_nothing_to_train_are_refused():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):  # float32 beside float64 is refused too
        net = Net()
        net.table.data = net.table.data.to(dtype)
        with pytest.raises(ValueError, match=f"table is {dtype}: .* float32"):
            FlatParameters(net)
    net = Net().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        FlatParameters(net)


# ------------------------------------------------------------------ AdamW


def plain_adamw(p, gradients, rates, betas, eps, wd, correct, decays):
    """The formula, a coordinate vector at a time, in float64."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, (g, lr) in enumerate(zip(gradients, rates), start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        scale = math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) if correct else 1.0
        p = p - lr * scale * m / (v.sqrt() + eps)
        p = p - lr * wd * p * decays
    return p


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("wd", [0.0, 0.01])
@pytest.mark.parametrize("no_decay_bias", [False, True])
@pytest.mark.parametrize("chunk", [1000, optimizer.CACHE_CHUNK])
def test_adamw_is_the_published_formula(correct, wd, no_decay_bias, chunk, monkeypatch):
    monkeypatch.setattr(optimizer, "CACHE_CHUNK", chunk)
    flat = FlatParameters(Net(), no_decay_bias=no_decay_bias)
    assert flat.size > optimizer.CACHE_CHUNK
    adam = AdamW(flat, (0.9, 0.98), 1e-6, wd, correct)
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(flat.size, generator=generator, dtype=torch.float64) * 10.0 ** -i for i in range(6)]
    rates = [0.1, 0.05, 0.0, 0.2, 0.1, 0.01]
    decays = torch.cat([torch.full((p.numel(),), float(p.dim() > 1 or not no_decay_bias)) for _, p in flat.named])
    expected = plain_adamw(flat.data.clone(), gradients, rates, (0.9, 0.98), 1e-6, wd, correct, decays)
    for gradient, lr in zip(gradients, rates):
        adam.step(gradient, lr)
    assert adam.steps == 6
    torch.testing.assert_close(flat.data, expected, rtol=1e-12, atol=1e-12)


def test_a_zero_gradient_is_a_step_too():
    """An empty batch without noise still decays the moments and counts: what DP's empty draws rest on."""
    flat = FlatParameters(Net())
    adam = AdamW(flat, (0.9, 0.999), 1e-8, 0.0, True)
    adam.step(torch.ones(flat.size, dtype=torch.float64), 0.1)
    before, m = flat.data.clone(), adam.m.clone()
    adam.step(torch.zeros(flat.size, dtype=torch.float64), 0.1)
    assert adam.steps == 2 and (flat.data < before).all()
    torch.testing.assert_close(adam.m, 0.9 * m)


def test_float32_follows_float64():
    exact, rough = FlatParameters(Net()), FlatParameters(Net(torch.float32))
    rough.data.copy_(exact.data)
    adams = [AdamW(flat, (0.9, 0.999), 1e-6, 0.01, True) for flat in (exact, rough)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        gradient = torch.randn(exact.size, generator=generator, dtype=torch.float64)
        for adam in adams:
            adam.step(gradient.to(adam.flat.data.dtype), 0.01)
    # 20 updates of up to 0.01 with a few roundings each of numbers up to 5: 20 * 4 * 5 * 2**-24.
    assert (rough.data.double() - exact.data).abs().max() < 3e-5


def test_state_goes_out_and_in_bit_for_bit_and_another_shape_is_refused():
    flats = [FlatParameters(Net()) for _ in range(2)]
    adams = [AdamW(flat, (0.9, 0.999), 1e-6, 0.01, True) for flat in flats]
    gradient = torch.linspace(-1, 1, flats[0].size, dtype=torch.float64)
    adams[0].step(gradient, 0.1)
    flats[1].data.copy_(flats[0].data)
    adams[1].load_state_dict(copy.deepcopy(adams[0].state_dict()))
    for adam in adams:
        adam.step(gradient.flip(0), 0.1)
    assert torch.equal(flats[0].data, flats[1].data) and adams[1].steps == 2
    with pytest.raises(ValueError, match="coordinates"):
        AdamW(FlatParameters(Net(rows=10)), (0.9, 0.999), 1e-6, 0.0, True).load_state_dict(adams[0].state_dict())


# ------------------------------------------------------------------ schedules


LR, T, W = 0.4, 100, 10


@pytest.mark.parametrize("name, after", [
    ("constant", lambda t: LR),
    ("dev_perf", lambda t: LR),
    ("linear", lambda t: LR * (T - t) / (T - W)),
    ("cosine", lambda t: LR * (1 + math.cos(math.pi * t / T)) / 2),  # over all steps, the warm-up's included
    ("inv_sqrt", lambda t: LR * math.sqrt(W / t)),
])
def test_schedules(name, after):
    """Warm-up lr t / warmup with t from 0, then the formula, which without a warm-up holds from the first step."""
    rate = schedule(name, LR, T, W)
    for t in range(T):
        assert rate(t) == pytest.approx(LR * t / W if t < W else after(t), rel=1e-12, abs=1e-15)
    assert rate(0) == 0 and rate(W - 1) == pytest.approx(0.9 * LR)
    assert schedule(name, LR, T)(0) == LR
    for t in (T, 3 * T):  # beyond the end, where a resumed run may look: no negative rate
        assert 0 <= rate(t) <= LR
    if name in ("linear", "cosine"):
        assert rate(T) == pytest.approx(0, abs=1e-15)
    if name == "inv_sqrt":
        assert rate(4 * W) == pytest.approx(LR / 2)


@pytest.mark.parametrize("name", optimizer.SCHEDULES)
def test_every_schedule_lives_through_odd_numbers(name):
    for max_step, warmup in ((1, 0), (1, 1), (5, 5), (5, 9)):
        rate = schedule(name, LR, max_step, warmup, [(0, 0.1), (3, LR)])
        assert all(0 <= rate(t) <= LR for t in range(12))


def test_cycle_is_linear_between_its_points():
    rate = schedule("cycle", 9.9, T, 5, [(10, 0.2), (20, 0.4), (40, 0.0)])
    assert [rate(t) for t in (0, 9, 10)] == [0.2] * 3
    assert rate(15) == pytest.approx(0.3) and rate(20) == pytest.approx(0.4) and rate(30) == pytest.approx(0.2)
    assert rate(40) == rate(1000) == 0.0
