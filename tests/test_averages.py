"""Averages of iterates against their definitions, summed in float64."""

import pytest
import torch
from torch import nn

from averages import Average, read_rule
from optimizer import FlatParameters

STEPS = 40


def defined(rule: str, iterates: list[torch.Tensor], steps: int) -> torch.Tensor:
    """The average by its definition, not step by step; `iterates`: of the steps 1, 2, ... in float64."""
    kind, number = rule.split(":")
    t = len(iterates)
    if kind == "ema":
        weights = torch.tensor([float(number) ** (t - i) for i in range(1, t + 1)], dtype=torch.float64)
    else:
        first = steps - max(1, round(float(number) * steps)) + 1
        weights = torch.tensor([float(i >= first) for i in range(1, t + 1)], dtype=torch.float64)
    return (weights[:, None] * torch.stack(iterates)).sum(0) / weights.sum()


def walk(rule: str, dtype: torch.dtype, size: int = 999):
    """(average, iterates so far in float64, step) after every step of a random walk of `size` coordinates."""
    torch.manual_seed(0)
    net = nn.Linear(size, 1, bias=False).to(dtype)
    flat = FlatParameters(net)
    average, iterates = Average(rule, flat, STEPS), []
    for step in range(1, STEPS + 1):
        flat.data.add_(torch.randn(flat.size, dtype=dtype))
        average.add(step)
        iterates.append(flat.data.double().clone())
        yield average, iterates, step


@pytest.mark.parametrize("rule", ["ema:0.99", "ema:0.5", "ema:0.9999999", "tail:0.3", "tail:1", "tail:0.001"])
@pytest.mark.parametrize("dtype, unit", [(torch.float32, 2.0**-24), (torch.float64, 2.0**-53)])
def test_the_average_is_its_definition(rule, dtype, unit):
    """A step rounds the difference, its product with w, which is rounded too, and the sum: at most four roundings, each
    of a number of at most twice the largest coordinate. Later steps only shrink them. w itself, of 1 - B^t, is right to
    2^-53/(1 - B)."""
    for average, iterates, step in walk(rule, dtype):
        first = {"tail:0.3": 29, "tail:0.001": 40}.get(rule, 1)
        assert average.begun(step) == (step >= first)
        if step < first:
            continue
        largest = max(values.abs().max().item() for values in iterates)
        bound = 8 * step * largest * unit
        if rule == "ema:0.9999999":
            bound += step * largest * 2.0**-53 / 1e-7
        assert (average.values.double() - defined(rule, iterates, STEPS)).abs().max() <= bound
        assert average.values.dtype == dtype
        if step == first:
            assert torch.equal(average.values.double(), iterates[-1])


def test_without_the_correction_it_would_be_seen():
    """Negative control: the undebiased average, which begins at the initial weights, is far off."""
    for average, iterates, step in walk("ema:0.9", torch.float32):
        if step == 5:
            plain = torch.zeros_like(iterates[0])
            for values in iterates:
                plain += 0.1 * (values - plain)
            assert (plain - average.values).abs().max() > 1
            break


def test_it_is_put_in_place_and_taken_out_again():
    for average, iterates, step in walk("ema:0.9", torch.float32, 150_001):  # two pieces of the exchange
        if step == 5:
            held = average.values.clone()
            with pytest.raises(ZeroDivisionError), average.in_place():
                (parameter,) = (value for _, value in average.flat.named)
                assert torch.equal(parameter.detach().flatten(), held)
                raise ZeroDivisionError
            assert torch.equal(average.flat.data.double(), iterates[-1]) and torch.equal(average.values, held)
            break


@pytest.mark.parametrize("text", [
    "", "ema", "ema:", "ema:0", "ema:1", "ema:nan", "ema:x", "tail:0", "tail:1.1", "tail:-1", "tail:inf", "mean:0.3",
    "0.99"])
def test_another_rule_is_refused(text):
    with pytest.raises(ValueError, match=f"^{text}: expected ema:B .* such as ema:0.99, or tail:F"):
        read_rule(text)
