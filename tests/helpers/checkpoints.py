"""Small random models and the checkpoints that a user downloads, that training leaves, and that export writes."""

import dataclasses
import json
import pathlib

import pytest
import torch

from base.errors import UserError
from helpers.small_runs import server
from model import GPT2Config, GPT2LMModel, LoRAConfig
from weights.checkpoint import load_model, save_checkpoint

CONFIG = GPT2Config(8, 2, 2, vocab_size=13, n_positions=6)
LORA = LoRAConfig(2, 6.0, 0.1)
SHAPE = dataclasses.asdict(CONFIG)


def random_model(lora_config: LoRAConfig = LoRAConfig(), seed: int = 0, config: GPT2Config = CONFIG) -> GPT2LMModel:
    model = GPT2LMModel(config, lora_config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.freeze_for_training()
    return model


def plain_weights(model: GPT2LMModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def write_base(folder: pathlib.Path, seed: int = 0, name: str = "base.bin") -> str:
    """A plain weight file with its config.json, as a user downloads it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(plain_weights(random_model(seed=seed)), folder / name)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **SHAPE}))
    return str(folder / name)


def train_from(base: str, work_dir: pathlib.Path, step: int = 7, seed: int = 1) -> GPT2LMModel:
    """What training leaves: adapters changed, saved on top of `base`."""
    loaded = load_model(base, lora_config=LORA)
    model = loaded.model
    model.freeze_for_training()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    work_dir.mkdir(parents=True, exist_ok=True)
    save_checkpoint(str(work_dir), step, model, loaded.base, {"moments": torch.ones(3), "step": step})
    return model


def assert_same_weights(a: GPT2LMModel, b: GPT2LMModel) -> None:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def refused(call, *words: object) -> None:
    with pytest.raises(UserError) as caught:
        call()
    for word in words:
        assert str(word) in str(caught.value), f"{word!r} is not in {caught.value}"


def export(work: pathlib.Path, output: pathlib.Path, *arguments: object) -> pathlib.Path:
    run = server().start("src/export.py", ["--init_checkpoint", work, "--output", output, *arguments])
    assert run.wait() == 0, run.stderr
    return output
