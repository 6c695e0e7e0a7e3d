"""The ends of what is accepted as C and as sigma C: float32 holds the squares with all their digits, and the noise."""

import pytest
import torch

import gpt2_ft
from base.errors import UserError
from helpers.clipping_oracle import ENGINES, RULES, draw_units, make_model, norm, pack, run_engine, unit_gradients
from model import LoRAConfig
from privacy.clipping import ClippingRule
from privacy.randomness import NoiseSource
from run.settings import CLIP_RANGE, NOISE_RANGE


def largest_share_of_c(C: float, kind: str, name: str, monkeypatch) -> float:
    """The largest norm / C of a unit's clipped gradient, over units with gradients from 0.9 C to 3 C."""
    largest = 0.0
    for lora in (LoRAConfig(), LoRAConfig(3, 8.0)):
        model, units = make_model(lora, dtype=torch.float32), draw_units(4)
        for unit, gradient in zip(units, unit_gradients(make_model(lora), units)[1]):
            for size in (0.9, 1.0, 1.2, 3.0):
                batch = pack([unit], 1, torch.float32)
                batch.weights *= size * C / norm(gradient)
                found = run_engine(name, model, ClippingRule(kind, C), [batch], monkeypatch)[1]
                largest = max(largest, norm(found) / C)
    return largest


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("name", ENGINES)
def test_c_is_kept_at_both_ends_of_its_range(kind, name, monkeypatch):
    for C in CLIP_RANGE:
        assert largest_share_of_c(C, kind, name, monkeypatch) <= 1 + 1e-6
    # Negative control: where the squares are below 2^-126, a unit passes for a smaller one.
    if kind == "flat" and name != "ghost":  # whose norms are float64 throughout
        assert largest_share_of_c(1e-22, kind, name, monkeypatch) > 1.1


def deviation(source: NoiseSource, std: float) -> float:
    """The standard deviation of 2^16 coordinates of noise, as a share of `std`; none may be infinite or 0."""
    buffer = torch.zeros(2**16)
    source.add_normal_(buffer, std)
    assert bool(buffer.isfinite().all()) and bool((buffer != 0).all())
    return float((buffer.double() / std).std())


@pytest.mark.parametrize("kind", ["seeded", "secure"])
def test_noise_has_its_scale_at_both_ends_of_its_range(kind):
    source = NoiseSource(kind, "noise", seed=1 if kind == "seeded" else None)
    for std in NOISE_RANGE:
        assert deviation(source, std) == pytest.approx(1, abs=0.015)  # 5 sigma: 5 / sqrt(2^17)
    for std in (1e-46, 1e39):  # negative control
        with pytest.raises(AssertionError):
            deviation(source, std)


def check(sigma: float | None, clip: float) -> None:
    noise = [] if sigma is None else ["--noise_multiplier", str(sigma)]
    gpt2_ft.parse(["--train_data", "x", "--valid_data", "x", "--max_grad_norm", str(clip), *noise]).check()


def test_what_float32_cannot_hold_is_refused_by_name():
    for sigma, clip in ((None, 1.0), (0.0, 1.0), (0.6, CLIP_RANGE[0]), (1e6, 0.999 * CLIP_RANGE[1]), (1e-30, 1.0)):
        check(sigma, clip)
    for clip in (1e-7, 1e-22, 1e-45, 1e9, float("inf"), float("nan"), 0.0):
        with pytest.raises(UserError, match=r"^--max_grad_norm \S+: expected a number from 1e-06 to below 1e\+08$"):
            check(0.6, clip)
    for sigma in (1e-160, 1e-31, 1e15, 1e300):
        with pytest.raises(UserError, match=r"^--noise_multiplier \S+: times --max_grad_norm 1 it gives noise"):
            check(sigma, 1.0)
