"""Bad input: weight files that are none, entries that are damaged, config.json that describes no GPT-2 of ours."""

import json
import os
import pathlib
import pickle
import random

import pytest
import safetensors.torch
import torch

from base.errors import UserError
from families import family_of
from helpers.checkpoints import CONFIG, SHAPE, plain_weights, random_model, refused, train_from, write_base
from helpers.llamas import tiny_config
from helpers.processes import ROOT, assert_user_error, run_script
from helpers.spoiled_files import Malicious
from model import LoRAConfig
from weights import foreign
from weights.checkpoint import load_model
from weights.foreign import fingerprint, load_strictly

LORA = LoRAConfig(2, 6.0)

# ------------------------------------------------------------------ files that are no checkpoints


@pytest.mark.parametrize("form", ["zip", "legacy", "raw", "raw protocol 2", "nested"])
def test_a_malicious_pickle_is_refused_and_does_nothing(form, tmp_path):
    base, victim = write_base(tmp_path), tmp_path / "executed"
    weights = torch.load(base, weights_only=True)
    bomb = Malicious(str(victim))
    path = tmp_path / "pytorch_model.bin"
    if form.startswith("raw"):
        path.write_bytes(pickle.dumps({"model_state_dict": bomb}, protocol=2 if "2" in form else 4))
    else:
        content = {**weights, "x": bomb}
        content = {"model_state_dict": content, "config": SHAPE} if form == "nested" else content
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    refused(lambda: load_model(str(path)), "--init_checkpoint", path, "refused", "nothing in it was run")
    for entry in ("--init_checkpoint", "--resume", "--base_checkpoint"):
        refused(lambda entry=entry: foreign.read_file(str(path), entry), entry)
    assert not victim.exists()
    if form in ("zip", "legacy"):  # the bomb was live: a loader that trusts the file sets it off
        torch.load(path, weights_only=False)
        assert victim.exists()


def test_the_refusal_names_what_the_file_asked_for(tmp_path):
    torch.save({"x": Malicious("made")}, tmp_path / "evil.bin")
    refused(lambda: load_model(str(tmp_path / "evil.bin")), "it asks for posix.mkdir")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.bin")
    refused(lambda: load_model(str(tmp_path / "module.bin")), "it asks for torch.nn.modules.linear.Linear")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.3.pt"])
@pytest.mark.parametrize("content", [
    b"", b"hello, this is a text\n" * 30, b'{"a": 1}', b"\x80", b"PK\x03\x04", b"\x00" * 999, b"<html>404</html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"])
def test_files_of_another_kind(name, content, tmp_path):
    write_base(tmp_path)
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        refused(lambda path=path: load_model(str(path)), "--init_checkpoint", tmp_path / name)


def good_files(folder: pathlib.Path) -> list[pathlib.Path]:
    base = write_base(folder)
    weights = torch.load(base, weights_only=True)
    torch.save(weights, folder / "legacy.bin", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    train_from(base, folder / "run")
    return [pathlib.Path(base), folder / "legacy.bin", folder / "model.safetensors", folder / "run" / "model.7.pt"]


def test_truncated_and_damaged_files(tmp_path):
    """Cut at many places, or with bytes changed: one line, or (a weight's own byte) a whole model; nothing else."""
    source, refusals = random.Random(0), 0
    for path in good_files(tmp_path):
        whole = path.read_bytes()
        load_model(str(path))
        for cut in {1, 7, 100, len(whole) - 1, *(source.randrange(len(whole)) for _ in range(25))}:
            path.write_bytes(whole[:cut])
            refused(lambda path=path: load_model(str(path)), path)
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(source.choice([1, 20])):
                damaged[source.randrange(len(whole))] = source.randrange(256)
            path.write_bytes(damaged)
            try:
                load_model(str(path))
            except UserError as error:
                refusals += 1
                assert str(path) in str(error)
        path.write_bytes(whole)
    assert refusals > 40


@pytest.mark.parametrize("content, words", [
    ([1, 2], "holds a list"), (torch.ones(3), "holds a Tensor"), ({1: torch.ones(3)}, "dict of named tensors"),
    ({"wte.weight": 3}, "wte.weight is a int"), ({"wte.weight": "x"}, "is a str"), ({}, "lacks"),
    ({"wte.weight": torch.eye(3).to_sparse()}, "sparse"),
    ({"wte.weight": torch.ones(3, dtype=torch.complex64)}, "complex"),
    ({"wte.weight": torch.empty(3, device="meta")}, "meta"),
    ({"wte.weight": torch.ones(13, 8, dtype=torch.int32)}, "int32"),
    ({"model_state_dict": [1]}, "'model_state_dict'"), ({"model_state_dict": {1: torch.ones(1)}}, "'model_state_dict'"),
    ({"model_state_dict": {}}, "lacks"),
])
def test_pickles_of_other_things(content, words, tmp_path):
    write_base(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    refused(lambda: load_model(str(tmp_path)), "--init_checkpoint", words)


@pytest.mark.parametrize("change", [
    {"config": None}, {"config": [1]}, {"config": {}}, {"config": {**SHAPE, "n_head": 3}},
    {"config": {**SHAPE, "n_layer": 0}},
    {"config": {**SHAPE, "n_embd": "8"}}, {"config": {**SHAPE, "surplus": 1}}, {"config": {**SHAPE, "n_embd": 8.0}},
    {"config": {**SHAPE, "vocab_size": 2**40}}, {"config": {**SHAPE, "vocab_size": 14}},
    {"lora": None}, {"lora": {}}, {"lora": {"dim": -1}}, {"lora": {"dim": 2, "enable": 3}},
    {"lora": {"dim": "2", "alpha": 1.0, "dropout": 0.0, "enable": [True] * 3}},
    {"lora": {"dim": 2, "alpha": float("nan"), "dropout": 0.0, "enable": [True] * 3}},
    {"lora": {"dim": 2, "alpha": 1.0, "dropout": 1.0, "enable": [True] * 3}},
    {"lora": {"dim": 2, "alpha": 1.0, "dropout": 0.0, "enable": [True]}},
    {"step": "7"}, {"step": None}, {"step": -1}, {"step": torch.ones(2)}, {"base": 3}, {"base": {}},
    {"base": {"path": 1}},
    {"base": {"path": "a", "absolute": "b", "fingerprint": None}},
])
def test_damaged_entries_of_our_own_files(change, tmp_path):
    train_from(write_base(tmp_path), tmp_path)
    content = torch.load(tmp_path / "model.7.pt", weights_only=True)
    torch.save({**content, **change}, tmp_path / "model.7.pt")
    refused(lambda: load_model(str(tmp_path / "model.7.pt")), "--init_checkpoint", "model.7.pt")


def test_missing_files_and_folders(tmp_path):
    missing = tmp_path / "nothing"
    refused(lambda: load_model(str(missing)), "--init_checkpoint", missing, "no such file or folder")
    refused(lambda: load_model(str(tmp_path)), tmp_path, "the folder holds no model.{step}.pt")
    (tmp_path / "model.5.pt").mkdir()
    (tmp_path / "model.6.pt.123.partial").write_bytes(b"half")
    refused(lambda: load_model(str(tmp_path)), "the folder holds no")
    torch.save(plain_weights(random_model()), tmp_path / "alone.bin")
    refused(lambda: load_model(str(tmp_path / "alone.bin")), "--model_card not given", "config.json")
    refused(lambda: load_model(None), "--model_card")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(tmp_path):
    base = write_base(tmp_path)
    os.chmod(base, 0)
    refused(lambda: load_model(base), base, "cannot be read")


def test_a_script_ends_with_one_line_and_status_2(tmp_path):
    """Through run_main in a process of its own: the malicious file, a text, and a missing one."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT / 'src')!r})\nfrom base.errors import run_main\n"
                      "from weights.checkpoint import load_model\n"
                      "run_main(lambda: load_model(sys.argv[1], 'gpt2.sm') and None)\n")
    torch.save({"x": Malicious(str(tmp_path / "executed"))}, tmp_path / "evil.bin")
    (tmp_path / "text.bin").write_text("not a model\n")
    for name, words in (("evil.bin", "refused"), ("text.bin", "text.bin"), ("gone.bin", "no such file")):
        process = run_script(script, tmp_path / name)
        assert_user_error(process, "--init_checkpoint", words)
        assert len(process.stderr.splitlines()) == 1, process.stderr
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------ config.json and --model_card


@pytest.mark.parametrize("change, words", [
    ({"n_embd": None}, "n_embd is None"), ({"n_embd": "8"}, "n_embd is '8'"), ({"n_layer": False}, "n_layer is False"),
    ({"n_layer": True}, "n_layer is True"), ({"n_head": 0}, "n_head is 0"), ({"n_head": -2}, "n_head is -2"),
    ({"n_head": 3}, "divisor of n_embd"), ({"n_embd": 8.5}, "n_embd is 8.5"), ({"n_inner": False}, "n_inner is False"),
    ({"n_inner": True}, "n_inner is True"), ({"n_inner": []}, "n_inner is []"), ({"vocab_size": 1e30}, "vocab_size is"),
    ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'"), ({"layer_norm_epsilon": float("nan")}, "is nan"),
    ({"layer_norm_epsilon": float("inf")}, "is inf"), ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0"),
    ({"n_positions": {}}, "n_positions is {}"), ({"vocab_size": 10**400}, "vocab_size is"),
    ({"model_type": "bert"}, "model_type is 'bert'; supported are gpt2, llama, mistral, qwen2, qwen3"),
    ({"activation_function": "relu"}, "activation_function is 'relu'"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings is False"), ({"tie_word_embeddings": None}, "is None"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ({"scale_attn_weights": False}, "scale_attn_weights is False"),
    ({"add_cross_attention": True}, "add_cross_attention is True"),
])
def test_a_config_json_that_is_not_ours_to_run(change, words, tmp_path):
    base = write_base(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **SHAPE, **change}))
    refused(lambda: load_model(base), "config.json", words)
    refused(lambda: load_model(None, str(tmp_path)), "--model_card", "config.json", words)


@pytest.mark.parametrize("missing", ["n_embd", "n_layer", "n_head"])
def test_a_config_json_without_a_shape(missing, tmp_path):
    base = write_base(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({name: value for name, value in SHAPE.items() if name != missing}))
    refused(lambda: load_model(base), f"{missing} is missing")


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"3", b'"text"', b"true", b"{", b"\xff\xfe", b"[" * 100_000,
                                     b'{"n_embd": 8, "n_embd": }'])
def test_a_config_json_that_is_none(content, tmp_path):
    base = write_base(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    refused(lambda: load_model(base), "config.json")
    refused(lambda: load_model(None, str(tmp_path / "config.json")), "--model_card", "config.json")


def test_a_misspelt_card_does_not_read_a_file_that_happens_to_lie_here(tmp_path, monkeypatch):
    write_base(tmp_path)
    monkeypatch.chdir(tmp_path)
    refused(lambda: load_model(None, "gpt2.mdd"), "--model_card gpt2.mdd", "gpt2.sm", "folder with config.json")
    assert load_model(None, ".").model.config == CONFIG
    assert load_model(None, "config.json").model.config == CONFIG


def test_a_shape_without_memory_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "vocab_size": 2**31 - 1, "n_embd": 2**20}))
    refused(lambda: load_model(None, str(tmp_path)), "--model_card", "no memory for a model of 2 layers, width 1048576")


def test_another_shape_than_the_card(tmp_path):
    base = write_base(tmp_path)
    other = tmp_path / "other"
    write_base(other)
    (other / "config.json").write_text(json.dumps({**SHAPE, "n_layer": 3}))
    refused(lambda: load_model(base, str(other)), base, "lacks: transformer.h.2")
    refused(lambda: load_model(base, "gpt2.sm"), "another shape", "transformer.wte.weight (13, 8) for (50257, 768)")
    train_from(base, tmp_path / "run")
    (other / "config.json").write_text(json.dumps({**SHAPE, "n_head": 4}))  # the same tensors, another model
    refused(lambda: load_model(str(tmp_path / "run"), str(other)), "--model_card", "another shape", "2 heads")
    (other / "config.json").write_text(json.dumps({**SHAPE, "n_inner": 32}))  # 4 * 8, spelt out
    load_model(str(tmp_path / "run"), str(other))


# ------------------------------------------------------------------ nothing is drawn that a file overwrites


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_weight_is_the_file_s(kind, tmp_path, monkeypatch):
    """A model in memory full of NaN, of which each layer may draw its adapters alone: every number is the file's. And
    without any one of its tensors a file is refused by that name."""
    shape = CONFIG if kind == "gpt2" else tiny_config()
    family = family_of(shape)
    torch.manual_seed(1)
    original = family(shape)
    weights = {name: value.detach() for name, value in original.named_parameters()}
    path = str(tmp_path / "base.bin")
    torch.save(weights, path)
    (tmp_path / "config.json").write_text(json.dumps(shape.to_hugging_face(None)))
    monkeypatch.setattr(torch, "empty", lambda *size, **options: torch.full(
        size[0] if isinstance(size[0], (tuple, torch.Size)) else size, torch.nan, **options))
    for lora_config in (LoRAConfig(), LoRAConfig(2, 6.0, targets=("all",))):
        model = load_model(path, lora_config=lora_config).model
        for name, value in model.named_parameters():
            assert torch.equal(value, weights[name]) if "lora_" not in name else bool(value.isfinite().all()), name
            assert "lora_A" not in name or 0 < float(value.detach().abs().max()) < 1
    for name in weights:
        torch.save({other: value for other, value in weights.items() if other != name}, path)
        refused(lambda: load_model(path), path, f"lacks: {name};")


def test_loading_draws_nothing_but_adapters(tmp_path):
    """They are the first numbers of the seed, and the generator stands behind them."""
    base = write_base(tmp_path)
    torch.manual_seed(3)
    adapters = [value for name, value in load_model(base, lora_config=LORA).model.named_parameters()
                if "lora_A" in name]
    after = torch.get_rng_state()
    torch.manual_seed(3)
    for value in adapters:
        torch.testing.assert_close(value.detach(), torch.empty(4, 8).uniform_(-1, 1) * 8**-0.5, rtol=1e-6, atol=1e-7)
    assert len(adapters) == 2 and torch.equal(torch.get_rng_state(), after)


def test_what_no_file_gives_a_value_is_refused(tmp_path):
    """A family with a buffer would hold whatever its memory held."""
    model = random_model()
    model.register_buffer("scale", torch.ones(2))
    with pytest.raises(TypeError, match="scale: no parameter"):
        load_strictly(model, plain_weights(model), "base.bin", "--init_checkpoint")


def test_a_model_without_a_file_draws_the_bits_that_it_always_drew():
    """Digests of weights drawn with seed 5 before files were read without drawing."""
    for shape, expected in ((CONFIG, "a7ae01e801e5443d"), (tiny_config(), "b3fee27a489c60a4")):
        torch.manual_seed(5)
        model = family_of(shape)(shape, LoRAConfig(2, 6.0, targets=("q", "v")))
        assert fingerprint({name: value.detach() for name, value in model.named_parameters()})[:16] == expected
