"""Weight files as others leave them: wrapped, sharded, adapters alone, in folders of Trainer, the hub and Git LFS.

The files are written by torch, transformers, peft and opacus themselves.
"""

import json
import os
import pathlib
import shutil

import opacus
import peft
import pytest
import safetensors.torch
import torch
import transformers

from helpers.checkpoints import (
    CONFIG,
    SHAPE,
    assert_same_weights,
    export,
    plain_weights,
    random_model,
    refused,
    write_base,
)
from model import GPT2LMModel, LoRAConfig
from weights.checkpoint import load_model

pytestmark = pytest.mark.filterwarnings("ignore")  # remarks of transformers, peft and opacus on themselves

BASE = "--base_checkpoint"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> pathlib.Path:
    """The random GPT-2 of helpers.checkpoints, as transformers saves it."""
    folder = tmp_path_factory.mktemp("theirs")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE))
    model.load_state_dict(plain_weights(random_model()), strict=False)
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


def adapted() -> GPT2LMModel:
    """The same GPT-2 with random adapters."""
    model = random_model(LoRAConfig(2, 6.0))
    model.load_state_dict(plain_weights(random_model()), strict=False)
    return model


def hugging_face(theirs: pathlib.Path) -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel.from_pretrained(theirs)


# ------------------------------------------------------------------ wrappers


class Lightning(torch.nn.Module):
    """A LightningModule's state_dict has the names of its attributes."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model


def compile_blocks(model: torch.nn.Module) -> torch.nn.Module:
    for i, block in enumerate(model.transformer.h):
        model.transformer.h[i] = torch.compile(block)
    return model


def under(name: str):
    return lambda model: {name: model.state_dict(), "epoch": 3, "optimizer": {"state": {}}}


WRAPPED = {
    "DataParallel": lambda model: torch.nn.DataParallel(model).state_dict(),
    "Opacus": lambda model: opacus.GradSampleModule(model, strict=False).state_dict(),
    "torch.compile": lambda model: torch.compile(model).state_dict(),
    "blocks compiled": lambda model: compile_blocks(model).state_dict(),
    "DataParallel in Opacus": lambda model: opacus.GradSampleModule(
        torch.nn.DataParallel(model), strict=False).state_dict(),
    "compiled DataParallel": lambda model: torch.compile(torch.nn.DataParallel(model)).state_dict(),
    "Lightning": lambda model: {"state_dict": Lightning(model).state_dict(), "epoch": 3, "global_step": 9},
    "compiled in Lightning": lambda model: {"state_dict": Lightning(torch.compile(model)).state_dict()},
    "the published code": under("model_state_dict"),
    "a training script": under("model"),
    "DeepSpeed": under("module"),
    "parameters": lambda model: dict(model.named_parameters()),
    "the bare model": lambda model: model.transformer.state_dict(),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_what_wraps_a_model_changes_no_weight(wrapper, theirs, tmp_path):
    wrap = WRAPPED[wrapper]
    torch.save(wrap(hugging_face(theirs)), tmp_path / "pytorch_model.bin")
    shutil.copy(theirs / "config.json", tmp_path)
    assert_same_weights(load_model(str(tmp_path)).model, random_model())


def nano_gpt(model: transformers.GPT2LMHeadModel) -> dict:
    """nanoGPT's ckpt.pt: its layers are nn.Linear, so four weights of a block are the other way round."""
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = {f"_orig_mod.{name}": value.T.contiguous() if name.endswith(turned) else value
               for name, value in model.state_dict().items()}
    return {"model": weights, "model_args": {"n_layer": 2}, "iter_num": 7, "config": {"bias": True}}


def two_heads(model: transformers.GPT2LMHeadModel) -> dict:
    return {**model.state_dict(), "module.lm_head.weight": model.lm_head.weight + 1}


REFUSED = {
    "nanoGPT": (nano_gpt, ["_orig_mod.transformer.h.0.attn.c_attn.weight is (24, 8)", "nanoGPT", "transpose"]),
    "another model": (lambda model: {"encoder.layer.0.weight": torch.ones(2), "encoder.layer.1.weight": torch.ones(2),
                                     "a": torch.ones(1), "b": torch.ones(1)},
                      ["holds unknown encoder.layer.0.weight, encoder.layer.1.weight, a and 1 more", "save_pretra"]),
    "a weight twice": (lambda model: {**model.state_dict(), "module.transformer.wpe.weight": torch.ones(6, 8)},
                       ["holds wpe.weight twice", "module.transformer.wpe.weight"]),
    "two heads": (two_heads, ["two heads that differ"]),
    "PEFT's whole state": (lambda model: peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM")).state_dict(),
        ["base_model.model.transformer.h.0.attn.c_attn.base_layer.weight", BASE, "merge the adapter into its base"]),
    "layers missing": (lambda model: {"transformer.wte.weight": model.transformer.wte.weight},
                       ["lacks: transformer.wpe.weight", "it holds transformer.wte.weight"]),
    "no dict": (lambda model: {"state_dict": 3}, ["its entry 'state_dict' is no dict of named tensors"]),
    "a module": (lambda model: {"model": torch.nn.Linear(1, 1)}, ["torch.save(model.state_dict(), ...)"]),
}


@pytest.mark.parametrize("form", REFUSED)
def test_another_arithmetic_is_refused_showing_names_of_the_file(form, theirs, tmp_path):
    make, words = REFUSED[form]
    torch.save(make(hugging_face(theirs)), tmp_path / "pytorch_model.bin")
    shutil.copy(theirs / "config.json", tmp_path)
    refused(lambda: load_model(str(tmp_path)), "--init_checkpoint", tmp_path / "pytorch_model.bin", *words)


# ------------------------------------------------------------------ shards


def shard(theirs: pathlib.Path, folder: pathlib.Path, form: str) -> pathlib.Path:
    """Shards and their index, as save_pretrained() writes them; this transformers writes no .bin any more."""
    hugging_face(theirs).save_pretrained(folder, max_shard_size="2KB")
    index = folder / "model.safetensors.index.json"
    if form == "bin":
        content = json.loads(index.read_text())
        for file in sorted(set(content["weight_map"].values())):
            torch.save(safetensors.torch.load_file(folder / file), folder / bin_name(file))
            (folder / file).unlink()
        names = {name: bin_name(file) for name, file in content["weight_map"].items()}
        index.unlink()
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({**content, "weight_map": names}))
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 2
    return index


def bin_name(file: str) -> str:
    return "pytorch_" + file.replace(".safetensors", ".bin")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards_are_read_through_their_index(form, theirs, tmp_path):
    index = shard(theirs, tmp_path / "shards", form)
    loaded = load_model(str(tmp_path / "shards"))
    assert_same_weights(loaded.model, random_model())
    assert_same_weights(load_model(str(index)).model, random_model())
    files = sorted(str(path) for path in (tmp_path / "shards").glob(f"*-of-*.{form}"))
    assert sorted(loaded.files) == [(file, None) for file in files]
    refused(lambda: load_model(files[0]), files[0], "one of several files", "give their folder")
    # and they lie under adapters like any other base
    adapters = adapted()
    torch.save({"model_state_dict": {name: value for name, value in adapters.named_parameters() if "lora_" in name}},
               tmp_path / "adapters.pt")
    found = load_model(str(tmp_path / "adapters.pt"), None, LoRAConfig(2, 6.0), str(tmp_path / "shards"))
    assert [file for file, _ in found.files] == [file for file, _ in loaded.files] + [str(tmp_path / "adapters.pt")]


def test_runs_are_found_behind_shards(theirs, tmp_path):
    """What the weights spent stands in the metadata of a shard as in those of a whole file."""
    index = shard(theirs, tmp_path, "safetensors")
    file = sorted(tmp_path.glob("*-of-*.safetensors"))[1]
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, {"format": "pt", "privacy": '{"unit": "x"}'})
    assert [entry for _, entry in load_model(str(index)).files if entry] == [{"unit": "x"}]


def rewrite(change):
    def damage(index: pathlib.Path, files: list[pathlib.Path]) -> None:
        content = json.loads(index.read_text())
        change(content)
        index.write_text(json.dumps(content))
    return damage


def change_shard(change):
    def damage(index: pathlib.Path, files: list[pathlib.Path]) -> None:
        content = safetensors.torch.load_file(files[1])
        change(content)
        safetensors.torch.save_file(content, files[1])
    return damage


SPOILED = {
    "a shard missing": (lambda index, files: files[1].unlink(), ["-00002-of-", "not beside it"]),
    "shards missing": (lambda index, files: [file.unlink() for file in files[1:]], ["are missing)", "fetch it, too"]),
    "a shard cut": (lambda index, files: files[1].write_bytes(files[1].read_bytes()[:-9]), ["-00002-of-", "truncated"]),
    "a pointer": (lambda index, files: files[1].write_text("version https://git-lfs.github.com/spec/v1\noid x\n"),
                  ["-00002-of-", "Git LFS pointer", "git lfs pull"]),
    "a weight twice": (change_shard(lambda content: content.update({"transformer.ln_f.bias": torch.ones(8)})),
                       ["-00002-of-", "holds transformer.ln_f.bias", "says nothing"]),
    "a weight gone": (change_shard(lambda content: content.popitem()), ["-00002-of-", "lacks transformer."]),
    "no weight_map": (rewrite(lambda content: content.pop("weight_map")), ["weight_map", "fetch it again"]),
    "an empty one": (rewrite(lambda content: content.update(weight_map={})), ["weight_map"]),
    "not names": (rewrite(lambda content: content.update(weight_map={"a": 3})), ["weight_map"]),
    "elsewhere": (rewrite(lambda content: content.update(weight_map={"a": "../x.safetensors"})), ["beside the index"]),
    "itself": (rewrite(lambda content: content.update(weight_map={"a": "model.safetensors.index.json"})), ["wanted a"]),
    "no JSON": (lambda index, files: index.write_text("{"), ["not JSON"]),
}


@pytest.mark.parametrize("damage", SPOILED)
def test_each_shard_is_checked(damage, theirs, tmp_path):
    index = shard(theirs, tmp_path, "safetensors")
    spoil, words = SPOILED[damage]
    spoil(index, sorted(tmp_path.glob("*-of-*.safetensors")))
    refused(lambda: load_model(str(tmp_path)), "--init_checkpoint", tmp_path, *words)


# ------------------------------------------------------------------ adapters of the published code


@pytest.mark.parametrize("prefix", ["", "module.", "module._module."])
def test_adapters_alone_of_the_published_code(prefix, theirs, tmp_path):
    """Names and shapes are this project's; alpha and the slots are in no file."""
    model = adapted()
    factors = {f"{prefix}{name}": value for name, value in model.state_dict().items() if "lora_" in name}
    path = str(tmp_path / "model.9.pt")
    torch.save({"model_state_dict": factors}, path)
    loaded = load_model(path, None, LoRAConfig(2, 6.0), str(theirs))
    assert_same_weights(loaded.model, model)
    assert loaded.base["absolute"] == str(theirs / "model.safetensors") and loaded.path == path
    assert [file for file, _ in loaded.files] == [str(theirs / "model.safetensors"), path]
    refused(lambda: load_model(path, str(theirs), LoRAConfig(2, 6.0)), path, "holds adapters alone", BASE)
    for given in (None, LoRAConfig(), LoRAConfig(3, 6.0)):
        refused(lambda given=given: load_model(path, None, given, str(theirs)), "--lora_dim 2", "--lora_alpha")
    all_slots = LoRAConfig(2, 6.0, targets=("query", "key", "value"))
    refused(lambda: load_model(path, None, all_slots, str(theirs)), path, "another shape")
    refused(lambda: load_model(path, None, LoRAConfig(2, 6.0), path), BASE, "holds adapters")
    torch.save({"model_state_dict": dict(list(factors.items())[:-1])}, path)
    refused(lambda: load_model(path, None, LoRAConfig(2, 6.0), str(theirs)), path, "lacks: transformer.h.1")


def test_their_adapters_can_be_exported(theirs, tmp_path):
    model = adapted()
    torch.save({"model_state_dict": {name: value for name, value in model.state_dict().items() if "lora_" in name}},
               tmp_path / "a.pt")
    folder = export(tmp_path / "a.pt", tmp_path / "out", BASE, theirs, "--lora_dim", 2, "--lora_alpha", 6)
    ids = torch.randint(0, CONFIG.vocab_size, (2, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = transformers.GPT2LMHeadModel.from_pretrained(folder).double().eval()(ids).logits
        torch.testing.assert_close(model.eval()(ids).double(), exact, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ PEFT


def peft_folder(theirs: pathlib.Path, folder: pathlib.Path, **options) -> peft.PeftModel:
    torch.manual_seed(5)
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(hugging_face(theirs), peft.LoraConfig(init_lora_weights=False, **options))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("wrap", [lambda model: model, torch.nn.DataParallel, torch.compile],
                         ids=["plain", "DataParallel", "torch.compile"])
def test_factors_saved_with_the_adapters_name(wrap, theirs, tmp_path):
    model = peft_folder(theirs, tmp_path)
    wanted = load_model(str(tmp_path), base_checkpoint=str(theirs)).model
    state = {name: value for name, value in wrap(model).state_dict().items() if "lora_" in name}
    assert all(".default." in name for name in state)
    safetensors.torch.save_file(state, tmp_path / "adapter_model.safetensors")
    assert_same_weights(load_model(str(tmp_path), base_checkpoint=str(theirs)).model, wanted)
    other = {name.replace(".default.", ".second."): value for name, value in state.items()}
    for content, word in (({**state, **other}, "'default' and 'second'"),
                          ({**state, **{f"module.{name}": value for name, value in state.items()}}, "twice"),
                          (model.state_dict(), "transformer.wte.weight")):
        torch.save(dict(content), tmp_path / "adapter_model.bin")
        (tmp_path / "adapter_model.safetensors").unlink(missing_ok=True)
        refused(lambda: load_model(str(tmp_path), base_checkpoint=str(theirs)), "adapter_model.bin", word)


def test_adapters_of_other_modules_name_the_cure(theirs, tmp_path):
    peft_folder(theirs, tmp_path, target_modules=["wte", "c_attn"])
    refused(lambda: load_model(str(tmp_path), base_checkpoint=str(theirs)), "wte.lora_embedding_A",
            "merge the adapter into its base with peft")


# ------------------------------------------------------------------ folders


def trainer(theirs: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """What transformers' Trainer leaves: a folder a checkpoint. The newest is the one of the most steps."""
    for step in (900, 1000, 50):
        hugging_face(theirs).save_pretrained(folder / f"checkpoint-{step}")
    return folder / "checkpoint-1000"


def hub(theirs: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The hub's cache: links into blobs/."""
    snapshot = folder / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    shutil.copytree(theirs, folder / "blobs", dirs_exist_ok=True)
    (folder / "blobs" / "model.safetensors").rename(folder / "blobs" / "0d1e2f")
    (folder / "blobs" / "config.json").rename(folder / "blobs" / "3a4b5c")
    os.symlink("../../blobs/0d1e2f", snapshot / "model.safetensors")
    os.symlink("../../blobs/3a4b5c", snapshot / "config.json")
    return snapshot


def second_adapter(theirs: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """PEFT saves an adapter of another name than 'default' in a folder of that name."""
    peft.get_peft_model(hugging_face(theirs), peft.LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM"),
                        adapter_name="mine").save_pretrained(folder)
    return folder / "mine"


@pytest.mark.parametrize("make", [trainer, hub, second_adapter])
def test_a_folder_above_the_weights_is_told_which_one_to_give(make, theirs, tmp_path):
    wanted = make(theirs, tmp_path / "out")
    refused(lambda: load_model(str(tmp_path / "out")), "--init_checkpoint", f"; give {wanted}")
    load_model(str(wanted), base_checkpoint=str(theirs) if make is second_adapter else None)
    if make is not second_adapter:
        refused(lambda: load_model(None, str(tmp_path / "out")), "--model_card", f"; give {wanted}")
    if make is hub:
        refused(lambda: load_model(str(wanted.parent)), f"; give {wanted}")


def test_a_folder_of_other_files_shows_what_it_holds(tmp_path):
    for name in ("tf_model.h5", "flax_model.msgpack", "README.md", "vocab.json"):
        (tmp_path / name).write_text("x")
    refused(lambda: load_model(str(tmp_path)), "it holds README.md, flax_model.msgpack, tf_model.h5 and 1 more")


@pytest.mark.parametrize("name", ["base.bin", "model.safetensors", "config.json"])
def test_git_lfs_pointers_are_named(name, tmp_path):
    path = write_base(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    refused(lambda: load_model(path if name != "model.safetensors" else str(tmp_path)), tmp_path / name,
            "is a Git LFS pointer", "git lfs pull")
