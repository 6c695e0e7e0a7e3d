"""The projection against the model's own counts, a simulation, and arithmetic done by hand."""

import json
import sys

import numpy as np
import pytest

import project_scaling
from base.errors import UserError
from helpers.processes import run_script
from helpers.result_rows import lines_of
from model import MODEL_CARDS, GPT2Config, GPT2LMModel, LoRAConfig
from optimizer import FlatParameters
from run import loop

SMALL = GPT2Config(n_embd=48, n_layer=3, n_head=4, vocab_size=101, n_positions=32)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_trained_coordinates_are_the_model_s(rank):
    model = GPT2LMModel(SMALL, LoRAConfig(rank, 8))
    model.freeze_for_training()
    assert project_scaling.trained_coordinates(SMALL, rank) == FlatParameters(model).size


def test_what_is_known_of_gpt2():
    """Radford et al.: 124 M and 1.5 B parameters with the tied head; and what a step sums beside the gradient."""
    counts = [project_scaling.trained_coordinates(MODEL_CARDS[card], 0) for card in ("gpt2.sm", "gpt2.xl")]
    assert counts == [124_439_808, 1_557_611_200]
    assert project_scaling.EXTRA == loop.EXTRA


@pytest.mark.parametrize("mean, n", [(128.0, 1), (64.0, 2), (2.0, 64), (0.5, 256)])
def test_the_largest_draw(mean, n):
    """Against a simulation: the mean of 20,000 maxima, within five of its standard errors."""
    draws = np.random.default_rng(1).poisson(mean, (20_000, n)).max(axis=1)
    assert abs(draws.mean() - project_scaling.largest_draw(mean, n)) < 5 * draws.std() / np.sqrt(len(draws)) + 1e-9


@pytest.fixture
def project(monkeypatch, capsys):
    """What the script prints for some arguments."""
    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["project_scaling.py", *map(str, arguments)])
        project_scaling.main()
        return capsys.readouterr().out

    return run


def test_the_columns_by_hand(project):
    out = project("--model_card", "gpt2.sm", "--gpus", 1, 16, "--rate", 1e12, "--reached", 0.5,
                  "--memory_bandwidth", 1e11, "--link_bandwidth", 1e10, "--node_bandwidth", 5e9,
                   "--batch", 128, "--N", 1280, "--epochs", 2,
                  "--tokens", 50, "--scored", 20)
    alone, many = lines_of(out)
    P = 124_439_808
    example = 3 * (50 * 12 * 12 * 768**2 + 20 * 768 * 50257)
    assert float(alone["compute [ms]"]) == round(128 * example / 0.5e12 * 1e3)
    assert float(alone["update [ms]"]) == round(36 * 4 * P / 1e11 * 1e3)
    assert alone["sum [ms]"] == alone["load [ms]"] == "0" and alone["efficiency"] == "100%"
    assert float(alone["run [h]"]) == round(20 * (128 * example / 0.5e12 + 36 * 4 * P / 1e11) / 3600, 2)
    inside, between = 2 * 7 / 8 * 8 * (P + 5) / 1e10, 2 * 1 / 2 * 8 * (P + 5) / 5e9
    assert float(many["sum [ms]"]) == round((inside + between) * 1e3)
    assert float(many["compute [ms]"]) == round(8 * example / 0.5e12 * 1e3)
    # with shares: 8 bytes are scattered and 4 gathered in place of 16; two passes zero, one looks for NaN
    shared = lines_of(project("--model_card", "gpt2.sm", "--gpus", 8, "--memory_bandwidth", 1e11, "--link_bandwidth",
                              1e10, "--shard", "optimizer"))[0]
    assert float(shared["sum [ms]"]) == round(12 * 7 / 8 * (P + 5) / 1e10 * 1e3)
    assert float(shared["update [ms]"]) == round((3 + 33 / 8) * 4 * P / 1e11 * 1e3)
    # with a fast processor the weights' way through the memory is what takes time
    out = project("--model_card", "gpt2.sm", "--gpus", 64, "--rate", 1e18, "--memory_bandwidth", 1e11)
    assert float(lines_of(out)[0]["compute [ms]"]) == round(26 * P / 1e11 * 1e3)


@pytest.mark.parametrize("flag, value", [("--gpus", 0), ("--reached", 0), ("--node_bandwidth", -1), ("--scored", 99)])
def test_mistakes(project, flag, value):
    with pytest.raises(UserError, match=flag):
        project(flag, value)


@pytest.mark.slow
def test_what_is_measured():
    done = run_script("scripts/start.py", "project_scaling", "--measure", "--model_card", "gpt2.sm", timeout=900)
    found = json.loads(done.stdout)
    assert 0 < found["private_share_of_rate"] < 1.2 and 0 < found["link_bytes_per_s"] < 1e12
    assert found["private_share_of_rate"] < 1.2 * found["ordinary_share_of_rate"]
