"""Whole runs with --base_dtype bf16: recorded, resumed bit for bit, refused with another, read, exported, searched."""

import json

import pytest
import safetensors.torch
import torch

from helpers.checkpoints import export
from helpers.interrupted_runs import CHARGE, interrupted, kill
from helpers.small_runs import STEPS, equal, flags, initial, material, read, server, train, weights
from weights.checkpoint import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    work = tmp_path_factory.mktemp("bf16") / "run"
    train(flags(work, base_dtype="bf16"))
    return work


def rounded() -> dict[str, torch.Tensor]:
    return {name: value.bfloat16().float() if value.dim() > 1 else value for name, value in initial().items()}


def test_killed_and_resumed(run, tmp_path):
    work = tmp_path / "run"
    interrupted(work, 1, {0: [kill(CHARGE, "before", 4)]}, base_dtype="bf16")
    rank, = interrupted(work, 1, {}, resume=True, base_dtype="float32")
    assert rank.status == 2 and "base_dtype 'bf16' there, 'float32' here" in rank.error
    train(flags(work, resume=True, base_dtype="bf16"))
    assert equal(weights(work), weights(run)) and read(work, "args.json")["base_dtype"] == "bf16"


def test_a_run_from_before_the_flag_held_float32(tmp_path):
    work = tmp_path / "run"
    interrupted(work, 1, {0: [kill(CHARGE, "before", 4)]})
    arguments = read(work, "args.json")
    assert arguments.pop("base_dtype") == "float32"  # what the default is here
    (work / "args.json").write_text(json.dumps(arguments))
    rank, = interrupted(work, 1, {}, resume=True, base_dtype="bf16")
    assert rank.status == 2 and "base_dtype 'float32' there, 'bf16' here" in rank.error
    train(flags(work, resume=True))


def test_a_checkpoint_is_read_on_the_matrices_that_its_adapters_were_trained_on(run, tmp_path):
    """By search, export and another training: the base's file rounded, whose fingerprint is still the file's."""
    content = torch.load(run / f"model.{STEPS}.pt", weights_only=True)
    whole = load_model(str(material() / "tiny")).base
    assert content["base"]["dtype"] == "bf16" and content["base"]["fingerprint"] == whole["fingerprint"]
    model = load_model(str(run)).model
    found = {name: value.detach() for name, value in model.named_parameters() if "lora_" not in name}
    assert equal(found, rounded())
    again = load_model(str(run), lora_config=model.lora_config, bf16_base=True)
    assert again.base["dtype"] == "bf16" and again.model.embedding.weight.dtype == torch.bfloat16
    assert torch.equal(again.model.embedding.weight.float(), model.embedding.weight)

    out = export(run, tmp_path / "merged")
    merged = safetensors.torch.load_file(str(out / "model.safetensors"))
    layer = model.transformer.h[1].attn.c_attn
    expected = layer.weight + layer.delta_weight()
    assert merged["transformer.h.1.attn.c_attn.weight"].dtype == torch.float32
    torch.testing.assert_close(merged["transformer.h.1.attn.c_attn.weight"], expected.detach(), rtol=0, atol=0)
    adapter = export(run, tmp_path / "adapter", "--format", "peft")
    with safetensors.safe_open(adapter / "adapter_model.safetensors", framework="pt") as handle:
        assert handle.metadata()["base_fingerprint"] == whole["fingerprint"]  # or its own base would be refused

    content["base"]["dtype"] = "int4"
    (tmp_path / "damaged").mkdir()
    torch.save(content, tmp_path / "damaged" / "model.6.pt")
    failed = server().start("src/export.py", ["--init_checkpoint", tmp_path / "damaged", "--output", tmp_path / "no"])
    assert failed.wait() == 2 and "its entries 'config', 'lora', 'base' or 'step' are damaged" in failed.error


def test_recomputed_for_a_part_of_the_run(run, tmp_path):
    """--recompute may change between attempts, since no bit does; adapters with dropout here, whole matrices below."""
    work = tmp_path / "run"
    interrupted(work, 1, {0: [kill(CHARGE, "before", 4)]}, base_dtype="bf16", recompute=True)
    train(flags(work, resume=True, base_dtype="bf16"))
    assert equal(weights(work), weights(run))
    for name, recompute in (("kept", None), ("again", True)):
        train(flags(tmp_path / name, lora_dim=0, lora_dropout=None, max_step=3, recompute=recompute))
    assert equal(weights(tmp_path / "kept", 3), weights(tmp_path / "again", 3))


def test_on_two_ranks(tmp_path):
    """Every rank gets rank 0's matrices."""
    work = tmp_path / "run"
    train(flags(work, base_dtype="bf16", max_step=2), 2)
    assert read(work, "args.json")["world_size"] == 2 and set(weights(work, 2)) == {
        f"transformer.h.{layer}.attn.c_attn.lora_{part}" for layer in (0, 1) for part in "AB"}


def test_a_search_on_such_a_base(run, tmp_path):
    data = tmp_path / "contexts.jsonl"
    data.write_text('{"context": [3, 4, 5]}\n')
    for name, more in (("float32", []), ("bf16", ["--bf16"])):
        search = server().start("src/gpt2_beam.py", [
            "--data", data, "--init_checkpoint", run, "--work_dir", tmp_path, "--output_file", name, "--seq_len", 32,
            "--eval_len", 6, "--beam", 3, "--eos_token_id", 1, *more])
        assert search.wait() == 0, search.stderr
        assert json.loads((tmp_path / name).read_text())["predict"]


def test_without_a_file_the_frozen_weights_are_in_the_checkpoint_as_they_are_held(tmp_path):
    work = tmp_path / "run"
    train(flags(work, base_dtype="bf16", init_checkpoint=None, max_step=2))
    held = weights(work, 2)
    assert {value.dtype for name, value in held.items() if "lora_" in name or value.dim() == 1} == {torch.float32}
    assert held["transformer.wte.weight"].dtype == torch.bfloat16
    model = load_model(str(work)).model
    assert torch.equal(model.embedding.weight, held["transformer.wte.weight"].float())
