"""Llamas in and out: folders of transformers and adapters of peft, read, trained, searched and exported."""

import json
import pathlib

import peft
import pytest
import safetensors.torch
import torch
import transformers

from helpers import author_runs
from helpers.checkpoints import assert_same_weights, export, refused
from helpers.llamas import KINDS, VOCABULARY, theirs_of, write_folder
from helpers.small_runs import equal, flags, read, server, start_ranks, train, weights, write_tokens
from language_model import LanguageModel
from llama import LlamaLMModel
from model import LoRAConfig
from weights.checkpoint import load_model, save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's and transformers' remarks on themselves

PROJECTIONS = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 19), generator=torch.Generator().manual_seed(3))


def open_theirs(folder: pathlib.Path) -> transformers.PreTrainedModel:
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def assert_same_logits(ours: LanguageModel, theirs: torch.nn.Module) -> None:
    """In float32: two layers of width 16, whose logits err by some 2^-22 of the largest (tests/test_llama.py)."""
    with torch.no_grad():
        mine, other = ours.eval()(tokens()), theirs(input_ids=tokens()).logits
    assert other.std() > 0.1 and (mine - other).abs().max() < 1e-5 * other.abs().max()


# ------------------------------------------------------------------ folders of transformers


@pytest.mark.parametrize("shard", ["1GB", "4KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_comes_in_and_goes_out(kind, shard, tmp_path):
    """In one file or in shards; exported, it is transformers' again: the same weights bit for bit, the same config."""
    theirs = write_folder(kind, tmp_path / "in", shard=shard)
    assert (tmp_path / "in" / "model.safetensors.index.json").exists() == (shard == "4KB")
    ours = load_model(str(tmp_path / "in")).model
    assert_same_logits(ours, theirs)
    if shard == "1GB":
        back = open_theirs(export(tmp_path / "in", tmp_path / "out"))
        assert type(back) is type(theirs)
        for name, value in theirs.state_dict().items():
            assert torch.equal(back.state_dict()[name], value), name
        assert_same_logits(ours, back)
        assert back.config.rope_parameters == theirs.config.rope_parameters
        assert back.config.eos_token_id == [2, 3] and back.config.bos_token_id == 1


def test_files_as_they_are_found(tmp_path):
    """bfloat16; the tied head's copy and the frequencies that older files hold; the model without its head's prefix."""
    theirs = write_folder("llama linear", tmp_path)
    content = {name: value.clone() for name, value in theirs.state_dict().items()}
    content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
    content["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    safetensors.torch.save_file(content, tmp_path / "model.safetensors")
    assert_same_logits(load_model(str(tmp_path)).model, theirs)
    (tmp_path / "model.safetensors").unlink()
    torch.save({name.removeprefix("model."): value for name, value in content.items()}, tmp_path / "pytorch_model.bin")
    assert_same_logits(load_model(str(tmp_path)).model, theirs)
    torch.save({name: value.bfloat16() for name, value in content.items()}, tmp_path / "pytorch_model.bin")
    with torch.no_grad():  # a cast of the whole model would round its positions
        for parameter in theirs.parameters():
            parameter.copy_(parameter.bfloat16())
    assert_same_logits(load_model(str(tmp_path)).model, theirs)
    content["lm_head.weight"][0] += 1
    torch.save(content, tmp_path / "pytorch_model.bin")
    refused(lambda: load_model(str(tmp_path)), "its head lm_head.weight differs from embed_tokens.weight", "tied")


@pytest.mark.parametrize("damage, words", [
    (lambda w: w.pop("lm_head.weight"), "lacks: lm_head.weight"),
    (lambda w: w.pop("model.layers.1.self_attn.k_norm.weight"), "lacks: transformer.layers.1.self_attn.k_norm.weight"),
    (lambda w: w.update({"model.layers.0.mlp.up_proj.bias": torch.ones(20)}), "holds unknown: transformer"),
    (lambda w: w.update({"model.layers.0.mlp.experts.0.w1.weight": torch.ones(2, 2)}), "which are no Llama's; save"),
    (lambda w: w.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(8, 8)}), "has another shape"),
    (lambda w: w.update({"model.norm.weight": torch.ones(16, dtype=torch.int64)}), "int64"),
    (lambda w: w.update({"lm_head.weight": torch.ones(64, 16), "model.embed_tokens.weight": torch.ones(64, 16)}),
     "for another vocabulary, a padded one too")])
def test_damaged_folders_are_refused_in_a_line(damage, words, tmp_path):
    write_folder("qwen3 yarn", tmp_path)
    content = safetensors.torch.load_file(tmp_path / "model.safetensors")
    damage(content)
    safetensors.torch.save_file(content, tmp_path / "model.safetensors")
    refused(lambda: load_model(str(tmp_path)), "--init_checkpoint", words)


def test_a_missing_shard_and_another_architecture(tmp_path):
    write_folder("llama", tmp_path, shard="4KB")
    last = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    last.unlink()
    refused(lambda: load_model(str(tmp_path)), f"names {last.name}, which is not beside it; fetch it, too")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gemma"}))
    refused(lambda: load_model(None, str(tmp_path)), "config.json: model_type is 'gemma'; supported are gpt2, llama")
    del config["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(lambda: load_model(None, str(tmp_path)), "names no model_type, so it is read as a gpt2's, and ")


def test_the_shape_of_another_family(tmp_path):
    """As where config.json is missing and gpt2_ft.py takes its default."""
    write_folder("llama", tmp_path)
    refused(lambda: load_model(str(tmp_path / "model.safetensors"), "gpt2.sm"),
            "model.safetensors: holds weights of a Llama, and the shape is a GPT-2's; leave --model_card")


# ------------------------------------------------------------------ adapters of peft


def write_ours(base: pathlib.Path, folder: pathlib.Path, lora: LoRAConfig) -> LanguageModel:
    """A training's folder: adapters on top of `base`, all random."""
    loaded = load_model(str(base), lora_config=lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    loaded.model.freeze_for_training()
    folder.mkdir()
    save_checkpoint(str(folder), 1, loaded.model, loaded.base, {})
    return loaded.model


@pytest.mark.parametrize("kind, lora, names", [
    ("qwen3", LoRAConfig(3, 7.0, 0.25), ["q_proj", "v_proj"]),
    ("llama", LoRAConfig(2, 0.1, 0.0, ("all",)), sorted(PROJECTIONS)),
    ("llama tied, every bias", LoRAConfig(4, 8.0, 0.0, ("o", "down"), True), ["down_proj", "o_proj"])])
def test_peft_loads_what_export_writes(kind, lora, names, tmp_path):
    """The same logits in peft and merged in transformers; read back here, the same bits."""
    write_folder(kind, tmp_path / "base")
    model = write_ours(tmp_path / "base", tmp_path / "run", lora)
    folder = export(tmp_path / "run", tmp_path / "adapter", "--format", "peft")
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["target_modules"] == names and not written["fan_in_fan_out"] and "rank_pattern" not in written
    assert written["use_rslora"] == lora.rslora and written["lora_alpha"] == lora.alpha and written["r"] == lora.dim
    assert_same_logits(model, peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval())
    assert_same_logits(model, open_theirs(export(tmp_path / "run", tmp_path / "merged")))
    back = load_model(str(folder)).model
    assert_same_weights(back, model)
    assert back.lora_config == model.lora_config


@pytest.mark.parametrize("options, rslora", [
    ({"target_modules": "all-linear", "r": 5, "lora_alpha": 3}, False),
    ({"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "lora_dropout": 0.1}, True)])
def test_an_adapter_that_peft_made(options, rslora, tmp_path):
    theirs = write_folder("qwen3 yarn", tmp_path / "base")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    ours = load_model(str(tmp_path / "adapter"), base_checkpoint=str(tmp_path / "base")).model
    assert_same_logits(ours, adapted.eval())
    targets = LlamaLMModel.parts() if options["target_modules"] == "all-linear" else ("q", "up")
    assert ours.lora_config == LoRAConfig(options.get("r", 8), options.get("lora_alpha", 8.0),
                                          options.get("lora_dropout", 0.0), targets, rslora)
    wrong = LoRAConfig(options.get("r", 8), options.get("lora_alpha", 8.0), 0.0, targets, not rslora)
    refused(lambda: load_model(str(tmp_path / "adapter"), None, wrong, str(tmp_path / "base")), "--use_rslora")


# ------------------------------------------------------------------ the scripts


def write_data(folder: pathlib.Path) -> dict:
    return {"train_data": write_tokens(folder / "t.jsonl", 40, 1), "valid_data": write_tokens(folder / "v.jsonl", 7, 2)}


def test_trained_searched_and_exported_by_the_scripts(tmp_path):
    """gpt2_ft.py with a folder alone, private and not; resumed; its newest checkpoint searched; merged again."""
    write_folder("qwen3 yarn", tmp_path / "base")
    data = {"init_checkpoint": tmp_path / "base", "model_card": None, "lora_target": ["q", "v", "down"],
            **write_data(tmp_path)}
    train(flags(tmp_path / "run", **data))
    stop = ["signal", {"point": "weights.checkpoint:save_checkpoint", "when": "after", "nth": 1}]
    assert start_ranks(flags(tmp_path / "cut", **data), faults={0: [stop]})[0].wait() == -9
    train(flags(tmp_path / "cut", **data, resume=True))
    assert equal(weights(tmp_path / "cut"), weights(tmp_path / "run"))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in weights(tmp_path / "run")} == {
        "q_proj", "v_proj", "down_proj"}
    assert read(tmp_path / "run", "args.json")["lora_target"] == ["q", "v", "down"]
    merged = open_theirs(export(tmp_path / "run", tmp_path / "merged"))
    assert_same_logits(load_model(str(tmp_path / "run")).model, merged)
    context = tokens()[0, :8].tolist()
    (tmp_path / "d.jsonl").write_text(json.dumps({"context": context}) + "\n")
    arguments = ["--data", tmp_path / "d.jsonl", "--init_checkpoint", tmp_path / "run", "--work_dir", tmp_path,
                 "--seq_len", 30, "--eval_len", 12, "--output_file", "p.jsonl", "--no_repeat_ngram_size", 0]
    run = server().start("src/gpt2_beam.py", arguments)
    assert run.wait() == 0, run.stderr
    found = json.loads((tmp_path / "p.jsonl").read_text())["predict"]
    theirs = merged.generate(torch.tensor([context]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert found == theirs[0, 8:].tolist()
    for changed, words in (({"lora_target": ["mlp_in"]}, "--lora_target mlp_in: no part of this model; it has q k v o"),
                           ({"seq_len": 65}, "--seq_len 65: the model has 64 positions"),
                           ({"model_card": "gpt2.sm", "lora_target": None}, "leave --model_card out")):
        run = start_ranks(flags(tmp_path / "new", **{**data, **changed}))[0]
        assert run.wait() == 2 and words in run.error, run.stderr


def test_the_whole_model_is_trained_from_a_folder(tmp_path):
    theirs = write_folder("llama", tmp_path / "base")
    train(flags(tmp_path / "run", init_checkpoint=tmp_path / "base", model_card=None, lora_dim=0, lora_alpha=None,
                lora_dropout=None, **write_data(tmp_path)))
    trained = open_theirs(export(tmp_path / "run", tmp_path / "merged"))
    moved = [name for name, value in trained.state_dict().items() if not torch.equal(value, theirs.state_dict()[name])]
    assert len(moved) == len(theirs.state_dict())  # the head, too
    assert_same_logits(load_model(str(tmp_path / "run")).model, trained)


def test_author_level_training_takes_a_folder(tmp_path):
    write_folder("qwen2", tmp_path / "base", vocab_size=1500)
    author_runs.train(author_runs.flags(tmp_path / "run", model_name=tmp_path / "base", lora_target="all",
                                        max_steps=2, use_rslora=True))
    loaded = load_model(str(tmp_path / "run")).model
    assert loaded.lora_config.targets == LlamaLMModel.parts() and loaded.lora_config.rslora
    assert loaded.config.model_type == "qwen2"


def test_every_kind_has_weights_of_its_own():
    """The folders above differ: the same seed draws other weights for other shapes."""
    assert len({theirs_of(kind).num_parameters() for kind in KINDS}) >= 6
