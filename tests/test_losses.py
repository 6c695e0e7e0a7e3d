"""The losses against float64 cross entropy with label smoothing, whatever the block sizes; units against a loop."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import losses
from helpers.clipping_oracle import CONFIG, draw_units, make_model, pack, unit_loss
from losses import FrozenHeadLoss, LogitsLoss, token_losses, unit_losses
from model import LoRAConfig

SMOOTHING = (0.0, 0.1, 0.7)


def reference(logits: Tensor, targets: Tensor, s: float) -> Tensor:
    """(1-s) NLL + s mean_v(-log p_v), from torch's own cross entropy and log-softmax."""
    return (1 - s) * F.cross_entropy(logits, targets, reduction="none") - s * logits.log_softmax(1).mean(1)


def draw(n: int, V: int, D: int, scale: float = 1.0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(n + V)
    states = torch.randn(n, D, generator=generator, dtype=torch.float64) * scale
    head = torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, V, (n,), generator=generator)
    weight = torch.randn(n, generator=generator, dtype=torch.float64)  # at the losses: no two rows count the same
    return states.to(dtype), head.to(dtype), targets, weight.to(dtype)


def frozen_head(states: Tensor, head: Tensor, targets: Tensor, s: float) -> Tensor:
    return FrozenHeadLoss.apply(states, head, targets, s)


def logits_loss(states: Tensor, head: Tensor, targets: Tensor, s: float) -> Tensor:
    return LogitsLoss.apply(states @ head.T, targets, s)


def check(function, states, head, targets, weight, s, tolerance: float) -> None:
    """Losses and gradient of the states, against autograd through the reference in float64."""
    exact = states.double().requires_grad_()
    expected = reference(exact @ head.double().T, targets, s)
    (gradient,) = torch.autograd.grad((expected * weight.double()).sum(), exact)
    ours = states.clone().requires_grad_()
    found = function(ours, head, targets, s)
    assert found.dtype == states.dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    (ours_gradient,) = torch.autograd.grad((found * weight).sum(), ours)
    size = float(gradient.abs().max())
    torch.testing.assert_close(ours_gradient.double(), gradient, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("function", [frozen_head, logits_loss])
@pytest.mark.parametrize("s", SMOOTHING)
@pytest.mark.parametrize("n, V", [(1, 2), (7, 37), (50, 1031)])
@pytest.mark.parametrize("block", [1, 37, 300, 1 << 20])
def test_losses_and_gradients_for_blocks_of_all_sizes(function, s, n, V, block, monkeypatch):
    """LogitsLoss walks the rows, one at the least; FrozenHeadLoss the vocabulary, 256 entries at the least."""
    monkeypatch.setattr(losses, "CPU_BLOCK", block)
    check(function, *draw(n, V, 9), s, 1e-11)


@pytest.mark.parametrize("function", [frozen_head, logits_loss])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e6])
def test_large_and_small_logits(function, scale):
    """Logits of millions: the probabilities are 0 and 1, the losses exact and nothing overflows."""
    check(function, *draw(20, 700, 9, scale), 0.1, 1e-9)


@pytest.mark.parametrize("function", [frozen_head, logits_loss])
@pytest.mark.parametrize("s", SMOOTHING)
def test_float32(function, s):
    """Sums over 1031 entries of order 1: 1031 * 2**-24 = 6e-5 at the worst, a hundredth of that in practice."""
    check(function, *draw(30, 1031, 9, dtype=torch.float32), s, 2e-5)


@pytest.mark.parametrize("function", [frozen_head, logits_loss])
def test_bf16_autocast_keeps_float32_losses(function):
    """Only the products are rounded: logits of order 3, a relative error of 2**-9, averaged by the softmax."""
    states, head, targets, weight = draw(30, 1031, 9, dtype=torch.float32)
    expected = reference(states.double() @ head.double().T, targets, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = function(states.requires_grad_(), head, targets, 0.1)
        (found * weight).sum().backward()
    assert found.dtype == states.grad.dtype == torch.float32
    assert (found.double() - expected).abs().max() < 0.1


def test_no_state_sees_another_and_nothing_scored_is_no_loss():
    states, head, targets, _ = draw(12, 300, 9)
    for function in (frozen_head, logits_loss):
        whole = function(states, head, targets, 0.1)
        alone = torch.cat([function(states[i:i + 1], head, targets[i:i + 1], 0.1) for i in range(12)])
        torch.testing.assert_close(whole, alone, rtol=1e-13, atol=1e-13)
        assert function(states[:0], head, targets[:0], 0.1).shape == (0,)
        spoilt = states.clone()
        spoilt[3] = math.nan
        losses_of = function(spoilt, head, targets, 0.1)
        assert losses_of.isfinite().tolist() == [i != 3 for i in range(12)]


def test_logits_are_overwritten_once_and_a_second_backward_is_refused():
    states, head, targets, weight = draw(12, 300, 9)
    logits = (states @ head.T).requires_grad_()
    scored = LogitsLoss.apply(logits * 1, targets, 0.1)
    total = (scored * weight).sum()
    total.backward(retain_graph=True)
    exact = (states @ head.T).requires_grad_()
    (reference(exact, targets, 0.1) * weight).sum().backward()
    torch.testing.assert_close(logits.grad, exact.grad, rtol=1e-11, atol=1e-13)
    with pytest.raises(RuntimeError, match="overwritten"):
        total.backward()


@pytest.mark.parametrize("lora", [LoRAConfig(), LoRAConfig(3, 8.0)], ids=["full", "lora"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("s", SMOOTHING)
def test_a_units_loss_is_the_mean_over_its_texts_of_the_mean_over_their_tokens(lora, rows, s):
    """Against a loop over unpadded texts; the three ways through the head agree."""
    model, units = make_model(lora), draw_units(6, rows, 2, 30)
    expected = torch.stack([unit_loss(model, unit, s) for unit in units])
    batch = pack(units, rows)
    for head_trains, all_positions in ((False, False), (True, False), (True, True)):
        found = unit_losses(model, batch, s, head_trains, all_positions)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
        tokens = token_losses(model, batch, s, head_trains, all_positions)
        assert tokens.shape == batch.targets.shape
    assert batch.units == len(units) and batch.ids.max() < CONFIG.vocab_size


def test_neither_padding_nor_the_other_units_change_a_loss():
    model, units = make_model(), draw_units(5, 1, 2, 30)
    together = unit_losses(model, pack(units))
    for i, unit in enumerate(units):
        torch.testing.assert_close(unit_losses(model, pack([unit]))[0], together[i], rtol=1e-12, atol=1e-13)
    batch = pack(units)
    padded = pack(units)
    M, T = batch.ids.shape
    padded.ids = torch.cat([batch.ids, torch.full((M, 17), 5)], 1)
    padded.positions = batch.positions // T * (T + 17) + batch.positions % T
    torch.testing.assert_close(unit_losses(model, padded), together, rtol=1e-12, atol=1e-13)
