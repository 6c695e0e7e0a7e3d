"""PEFT adapters in and out, against peft and transformers themselves."""

import copy
import itertools
import json
import os
import pathlib

import peft
import pytest
import safetensors
import safetensors.torch
import torch
import transformers

from helpers import author_runs
from helpers.checkpoints import assert_same_weights, export, refused
from helpers.small_runs import equal, flags, material, server, train, weights
from model import SLOTS, GPT2LMModel, LoRAConfig
from weights import checkpoint, peft_format
from weights.checkpoint import load_model, save_checkpoint

D, L, HEADS, VOCABULARY, POSITIONS = 12, 2, 3, 61, 32
PATTERNS = [enable for enable in itertools.product([False, True], repeat=3) if any(enable)]
EXPORT = "src/export.py"


def parts(enable: tuple[bool, ...]) -> tuple[str, ...]:
    return tuple(itertools.compress(SLOTS, enable))


pytestmark = pytest.mark.filterwarnings("ignore")  # peft's and transformers' remarks on themselves


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 19), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pathlib.Path:
    """A GPT-2 as transformers saves it, every parameter random."""
    folder = tmp_path_factory.mktemp("peft") / "base"
    config = transformers.GPT2Config(n_embd=D, n_layer=L, n_head=HEADS, vocab_size=VOCABULARY, n_positions=POSITIONS,
                                     bos_token_id=0, eos_token_id=0)
    model, generator = transformers.GPT2LMHeadModel(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def their_base(base: pathlib.Path) -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel.from_pretrained(base).eval()


def peft_adapter(base: pathlib.Path, folder: pathlib.Path, steps: int = 0, **options) -> torch.nn.Module:
    """An adapter as peft makes and saves it: random factors, or trained for some steps from its own initialisation."""
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 10, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(their_base(base), peft.LoraConfig(**options))
    factors = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    if steps:
        optimizer = torch.optim.SGD(factors, 0.5)
        for _ in range(steps):
            model(input_ids=tokens(), labels=tokens()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    else:
        with torch.no_grad():
            for parameter in factors:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    return model.eval()


def ours_trained(base: pathlib.Path, work: pathlib.Path, lora_config: LoRAConfig) -> GPT2LMModel:
    """What a training leaves in `work`, with random factors."""
    loaded, generator = load_model(str(base), lora_config=lora_config), torch.Generator().manual_seed(4)
    loaded.model.freeze_for_training()
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    work.mkdir(parents=True, exist_ok=True)
    save_checkpoint(str(work), 5, loaded.model, loaded.base, {})
    return loaded.model.eval()


def assert_same_logits(ours: GPT2LMModel, theirs: torch.nn.Module, base: pathlib.Path, rounded: bool = False) -> None:
    """In float64 to its rounding, in float32 as near to the float64 logits as their own float32 is; and the adapter
    counts, so that a scale wrong by a thousandth would show. rounded: `theirs` is merged in float32."""
    ids = tokens()
    with torch.no_grad():
        mine, other = ours.eval()(ids), theirs(input_ids=ids).logits
        mine64, exact = copy.deepcopy(ours).double()(ids), copy.deepcopy(theirs).double()(input_ids=ids).logits
        moved = (exact - their_base(base).double()(ids).logits).abs().max()
    error = (other - exact).abs().max()
    assert moved > 1e-2 and error < 1e-5 * exact.abs().max()
    assert (mine - exact).abs().max() <= 4 * error < 1e-3 * moved
    assert (mine64 - exact).abs().max() <= 8 * error * (1.0 if rounded else 2 ** -29)  # float64 has 29 bits more


# ------------------------------------------------------------------ out


@pytest.mark.parametrize("enable, rank, alpha", [
    *((enable, 3, 7.0) for enable in PATTERNS), ((True, True, True), 1, 0.1), ((False, True, True), 5, 32.0)])
def test_peft_loads_what_export_writes(enable, rank, alpha, base, tmp_path):
    """The same logits in peft; and read back here, the same bits."""
    config = LoRAConfig(rank, alpha, 0.25, parts(enable))
    model = ours_trained(base, tmp_path / "run", config)
    folder = export(tmp_path / "run", tmp_path / "adapter", "--format", "peft")
    theirs = peft.PeftModel.from_pretrained(their_base(base), folder).eval()
    assert_same_logits(model, theirs, base)
    assert theirs.peft_config["default"].lora_dropout == 0.25
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()  # finds the base by itself
    assert torch.equal(auto(tokens()).logits, theirs(tokens()).logits)
    back = load_model(str(folder))
    assert_same_weights(back.model, model)
    assert back.model.lora_config == config and back.base["absolute"] == str(base / "model.safetensors")


@pytest.mark.parametrize("lora, names, r", [
    (LoRAConfig(3, 8.0, 0.0, ("attn_out",)), ["attn.c_proj"], 3),
    (LoRAConfig(3, 8.0, 0.0, ("mlp_in", "mlp_out"), True), ["c_fc", "mlp.c_proj"], 3),
    (LoRAConfig(2, 7.0, 0.0, ("query", "value", "attn_out", "mlp_out")), ["c_attn", "c_proj"], 2),
    (LoRAConfig(2, 32.0, 0.1, ("all",), True), ["c_attn", "c_fc", "c_proj"], 2),
    (LoRAConfig(4, 8.0, 0.0, ("key", "mlp_in")), ["c_attn", "c_fc"], 4)])
def test_adapters_of_any_part_go_out_and_come_back(lora, names, r, base, tmp_path):
    """Slots of the fused projection together have a higher rank than the others: rank_pattern and alpha_pattern."""
    model = ours_trained(base, tmp_path / "run", lora)
    folder = export(tmp_path / "run", tmp_path / "adapter", "--format", "peft")
    written = json.loads((folder / "adapter_config.json").read_text())
    slots = sum(part in model.lora_config.targets for part in SLOTS)
    assert written["target_modules"] == names and written["r"] == r and written["use_rslora"] == lora.rslora
    assert written.get("rank_pattern") == ({"c_attn": slots * r} if slots > 1 else None)
    assert_same_logits(model, peft.PeftModel.from_pretrained(their_base(base), folder).eval(), base)
    back = load_model(str(folder)).model
    assert_same_weights(back, model)
    assert back.lora_config == model.lora_config


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"r": 3, "lora_alpha": 5, "lora_dropout": 0.2}])
def test_adapters_of_all_linear_layers(options, base, tmp_path):
    theirs = peft_adapter(base, tmp_path, target_modules="all-linear", **options)
    ours = load_model(str(tmp_path), base_checkpoint=str(base)).model
    assert_same_logits(ours, theirs, base)
    expected = LoRAConfig(options.get("r", 4), options.get("lora_alpha", 10.0), options.get("lora_dropout", 0.0),
                          GPT2LMModel.parts(), options.get("use_rslora", False))
    assert ours.lora_config == expected


@pytest.mark.parametrize("pattern, word", [
    ({"rank_pattern": {"c_fc": 2}}, "rank_pattern or alpha_pattern differ too much (attn.c_attn r 4"),
    ({"alpha_pattern": {"c_fc": 2}}, "mlp.c_fc r 4 and lora_alpha 2"),
    ({"alpha_pattern": {"h.1.mlp.c_fc": 2}}, "tell layers of mlp.c_fc apart"),
    ({"rank_pattern": {"c_f.*": 4}}, "rank_pattern is {'c_f.*': 4}")])
def test_patterns_that_are_no_one_rank_are_refused(pattern, word, base, tmp_path):
    peft_adapter(base, tmp_path, target_modules=["c_attn", "c_fc"], **pattern)
    refused(lambda: load_model(str(tmp_path), base_checkpoint=str(base)), "--init_checkpoint", word)


def test_factors_that_training_has_not_touched_come_back_where_they_were(base, tmp_path):
    """Columns of zeros say nothing of their slot; with the run's own --lora_dim and --lora_target they return to it."""
    config = LoRAConfig(3, 8.0, 0.0, ("key", "value"))
    model = ours_trained(base, tmp_path / "run", config)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.lora_B[:, 1] = 0.0
            block.attn.c_attn.lora_B[D:, 2] = 0.0
    written, factors = peft_format.from_ours(model, str(base))
    safetensors.torch.save_file(factors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    assert_same_weights(load_model(str(tmp_path), lora_config=config).model, model)
    smaller = load_model(str(tmp_path)).model
    assert smaller.lora_config == LoRAConfig(2, 16 / 3, 0.0, ("key", "value"))
    torch.testing.assert_close(smaller(tokens()), model(tokens()), rtol=1e-5, atol=1e-6)


def test_a_trained_run_goes_out_and_is_trained_further_from_peft(tmp_path):
    """gpt2_ft.py -> peft's folder -> gpt2_ft.py: the second run starts from the very weights of the first."""
    slots = {"lora_target": ["query", "key"]}
    train(flags(tmp_path / "run", **slots))
    folder = export(tmp_path / "run", tmp_path / "adapter", "--format", "peft")
    theirs = peft.PeftModel.from_pretrained(their_base(material() / "tiny"), folder).eval()
    ids = tokens() % 60
    with torch.no_grad():
        torch.testing.assert_close(load_model(str(folder)).model.eval()(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    for start in ("run", "adapter"):
        train(flags(tmp_path / f"from_{start}", init_checkpoint=tmp_path / start, max_step=2, **slots))
    assert equal(weights(tmp_path / "from_run", 2), weights(tmp_path / "from_adapter", 2))
    for changed, words in (({"lora_dim": 3}, ["--lora_dim 3", "rank 2"]), ({"lora_dim": 1}, ["--lora_dim 1", "rank 2"]),
                           ({"lora_target": ["query", "value"]}, ["with query value", "query key"]),
                           ({"lora_alpha": 9}, ["--lora_alpha 9", "trained with 8"]),
                           ({"base_checkpoint": tmp_path / "run/model.6.pt"}, ["--base_checkpoint", "holds adapters"])):
        run = server().start("src/gpt2_ft.py", flags(tmp_path / "new", **{**slots, **changed},
                                                     init_checkpoint=folder))
        assert run.wait() == 2 and all(word in run.error for word in words), run.stderr
    assert not (tmp_path / "new").exists()


def test_author_level_training_goes_on_from_an_adapter(tmp_path):
    author_runs.train(author_runs.flags(tmp_path / "run"))
    export(tmp_path / "run", tmp_path / "adapter", "--format", "peft")
    for start in ("run", "adapter"):
        author_runs.train(author_runs.flags(tmp_path / f"from_{start}", model_name=tmp_path / start, max_steps=2))
    assert equal(weights(tmp_path / "from_run", 2), weights(tmp_path / "from_adapter", 2))
    run = author_runs.start(author_runs.flags(tmp_path / "new", model_name=tmp_path / "adapter", lora_dim=3))[0]
    assert run.wait() == 2 and "--lora_dim 3" in run.error and "rank 2" in run.error


# ------------------------------------------------------------------ in


@pytest.mark.parametrize("options", [
    {}, {"r": 1, "lora_alpha": 3}, {"r": 6, "lora_alpha": 1, "use_rslora": True, "lora_dropout": 0.1},
    {"init_lora_weights": "gaussian", "target_modules": r".*\.h\.\d\.attn\.c_attn", "fan_in_fan_out": True}])
def test_an_adapter_that_peft_trained(options, base, tmp_path):
    """A dense one: every slot gets a copy of A."""
    theirs = peft_adapter(base, tmp_path / "adapter", steps=4, **options)
    loaded = load_model(str(tmp_path / "adapter"), base_checkpoint=str(base))
    assert_same_logits(loaded.model, theirs, base)
    config = loaded.model.lora_config
    assert config.dim == options.get("r", 4) and config.targets == SLOTS
    assert config.dropout == options.get("lora_dropout", 0.0)
    for form in ("merged", "peft"):  # on it goes
        export(tmp_path / "adapter", tmp_path / "out" / form, "--base_checkpoint", base, "--format", form)
    again = peft.PeftModel.from_pretrained(their_base(base), tmp_path / "out" / "peft").eval()
    assert_same_logits(loaded.model, again, base)
    assert_same_logits(loaded.model, their_base(tmp_path / "out" / "merged"), base, rounded=True)


@pytest.mark.parametrize("enable", PATTERNS)
def test_the_smallest_form_is_chosen(enable, base, tmp_path):
    """Slots of peft's B that are zero get no adapter; where each slot uses columns of its own, the rank is theirs."""
    theirs = peft_adapter(base, tmp_path, r=4)
    slots = [slot for slot, on in enumerate(enable) if on]
    columns = {slot: [[0, 2], [1, 3], [2]][place] for place, slot in enumerate(slots)}  # in no order of ours
    with torch.no_grad():
        for block in theirs.base_model.model.transformer.h:
            B = block.attn.c_attn.lora_B["default"].weight
            keep = torch.zeros_like(B)
            for slot, chosen in columns.items():
                keep[slot * D:(slot + 1) * D, chosen] = 1.0
            B.mul_(keep)
    theirs.save_pretrained(tmp_path)
    ours = load_model(str(tmp_path), base_checkpoint=str(base)).model
    assert_same_logits(ours, theirs, base)
    assert ours.lora_config == LoRAConfig(2, 5.0, 0.0, parts(enable))
    larger = LoRAConfig(4, 10.0, 0.0, SLOTS)  # holds it too, where a run asks for it
    wide = load_model(str(tmp_path), lora_config=larger, base_checkpoint=str(base)).model
    assert wide.lora_config == larger
    assert_same_logits(wide, theirs, base)
    for given, word in ((LoRAConfig(1, 2.5, 0.0, parts(enable)), "--lora_dim 1"),
                        (LoRAConfig(5, 12.5, 0.0, parts(enable)), "--lora_dim 5"), (LoRAConfig(0), "--lora_dim 0"),
                        (LoRAConfig(2, 6.0, 0.0, parts(enable)), "--lora_alpha 6")):
        refused(lambda given=given: load_model(str(tmp_path), None, given, str(base)), word)
    if sum(enable) > 1:
        fewer = (SLOTS[slots[0]],)
        refused(lambda: load_model(str(tmp_path), None, LoRAConfig(2, 5.0, 0.0, fewer), str(base)), SLOTS[slots[0]])


def test_a_fresh_adapter_can_be_trained_in_any_form_that_fits(base, tmp_path):
    peft_adapter(base, tmp_path / "x")
    model = peft.get_peft_model(their_base(base), peft.LoraConfig(r=4, lora_alpha=10, target_modules=["c_attn"]))
    model.save_pretrained(tmp_path)
    for given in (None, LoRAConfig(4, 10.0), LoRAConfig(3, 7.5, 0.1, ("key",))):
        ours = load_model(str(tmp_path), None, given, str(base)).model
        assert given is None or ours.lora_config == given
        with torch.no_grad():
            torch.testing.assert_close(ours(tokens()), their_base(base)(tokens()).logits, rtol=1e-5, atol=1e-5)
        layer = ours.transformer.h[0].attn.c_attn
        theirs = model.base_model.model.transformer.h[0].attn.c_attn.lora_A["default"].weight
        assert all((row == theirs).all(1).any() for row in layer.lora_A) and not layer.lora_B.any()


@pytest.mark.parametrize("form", ["bfloat16", "pickle", "of the transformer alone", "the file itself"])
def test_other_files_of_peft(form, base, tmp_path):
    theirs = peft_adapter(base, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    content = safetensors.torch.load_file(path)
    if form == "bfloat16":
        content = {name: value.bfloat16() for name, value in content.items()}
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.copy_(parameter.bfloat16())
        safetensors.torch.save_file(content, path)
    elif form == "pickle":
        torch.save(content, tmp_path / "adapter_model.bin")
        path.unlink()
    elif form == "of the transformer alone":
        safetensors.torch.save_file({name.replace("transformer.", ""): value for name, value in content.items()}, path)
    given = path if form == "the file itself" else tmp_path
    ours = load_model(str(given), base_checkpoint=str(base)).model
    assert next(ours.parameters()).dtype == torch.float32
    assert_same_logits(ours, theirs, base)


def test_beam_search_takes_an_adapter(base, tmp_path):
    """gpt2_beam.py finds the same tokens from peft's folder as from the merged model."""
    peft_adapter(base, tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "merged", "--base_checkpoint", base)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"context": row[:6].tolist()}) + "\n" for row in tokens()))
    for name, more in (("adapter", ["--base_checkpoint", base]), ("merged", [])):
        run = server().start("src/gpt2_beam.py", [
            "--data", tmp_path / "data.jsonl", "--init_checkpoint", tmp_path / name,
            "--work_dir", tmp_path / f"out_{name}", "--seq_len", 20, "--eval_len", 8, "--beam", 3,
            "--output_file", "p.jsonl", *more])
        assert run.wait() == 0, run.stderr
    assert (tmp_path / "out_adapter/p.jsonl").read_text() == (tmp_path / "out_merged/p.jsonl").read_text()


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("options, word", [
    ({"use_dora": True}, "use_dora is True"), ({"bias": "lora_only"}, "bias is lora_only"),
    ({"modules_to_save": ["ln_f"]}, "modules_to_save is ['ln_f']"),
    ({"rank_pattern": {"h.0.attn.c_attn": 2}}, "rank_pattern"),
    ({"alpha_pattern": {"h.0.attn.c_attn": 2}}, "alpha_pattern"),
    ({"target_modules": ["wte"]}, "wte"), ({"layers_to_transform": [0]}, "layers_to_transform is [0]"),
    ({"lora_bias": True}, "lora_bias"), ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"), ({"init_lora_weights": "olora"}, "'olora'")])
def test_what_cannot_be_represented_is_refused_by_name(options, word, base, tmp_path):
    """Folders that peft itself wrote."""
    peft_adapter(base, tmp_path, fan_in_fan_out=True, **options)
    refused(lambda: load_model(str(tmp_path), base_checkpoint=str(base)), "--init_checkpoint", tmp_path, word)


@pytest.mark.parametrize("change, word", [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"), ({"r": 3}, "lora_A.weight is (4, 12)"), ({"r": "4"}, "r is '4'"),
    ({"r": 0}, "r is 0"), ({"r": True}, "r is True"), ({"lora_alpha": None}, "lora_alpha is None"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"), ({"lora_dropout": 1}, "lora_dropout is 1"),
    ({"lora_alpha": 10**400}, "lora_alpha is 1"),
    ({"use_rslora": "yes"}, "use_rslora is 'yes'"), ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
    ({"some_later_option": {"on": True}}, "some_later_option"), ({"init_lora_weights": 1}, "init_lora_weights is 1")])
def test_a_damaged_configuration(change, word, base, tmp_path):
    peft_adapter(base, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(lambda: load_model(str(tmp_path), base_checkpoint=str(base)), "--init_checkpoint", tmp_path, word)
    for content in (b"", b"[1]", b"{", b"\xff"):
        path.write_bytes(content)
        refused(lambda: load_model(str(tmp_path), base_checkpoint=str(base)), "adapter_config.json")
    path.unlink()
    refused(lambda: load_model(str(tmp_path), base_checkpoint=str(base)), "adapter_config.json", "cannot be read")


def test_a_base_that_is_not_there_or_not_the_one(base, tmp_path):
    peft_adapter(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    written = json.loads(path.read_text())
    assert written["base_model_name_or_path"] == str(base)
    load_model(str(tmp_path / "adapter"))
    for name in ("gpt2-medium", None):
        path.write_text(json.dumps({**written, "base_model_name_or_path": name}))
        refused(lambda: load_model(str(tmp_path / "adapter")), name or "does not name", "give --base_checkpoint")
    other = their_base(base)
    with torch.no_grad():
        other.transformer.ln_f.bias[0] += 2.0 ** -20
    other.save_pretrained(tmp_path / "other")
    load_model(str(tmp_path / "adapter"), base_checkpoint=str(tmp_path / "other"))  # peft's own folder cannot tell
    ours_trained(base, tmp_path / "run", LoRAConfig(2, 4.0))
    ours = export(tmp_path / "run", tmp_path / "ours", "--format", "peft")
    refused(lambda: load_model(str(ours), base_checkpoint=str(tmp_path / "other")), "fingerprint differs")
    refused(lambda: load_model(str(ours), base_checkpoint=str(tmp_path / "run")), "holds adapters", "merge them")
    refused(lambda: load_model(str(ours), base_checkpoint=str(tmp_path / "adapter")), "holds adapters")
    whole = load_model(str(base))  # a whole model of our own may lie under it
    os.makedirs(tmp_path / "whole")
    save_checkpoint(str(tmp_path / "whole"), 3, whole.model, None, {})
    same = load_model(str(ours), base_checkpoint=str(tmp_path / "whole")).model
    assert_same_weights(same, load_model(str(ours)).model)


@pytest.mark.parametrize("damage, word", [
    (lambda content: content.popitem(), "lacks h."),
    (lambda content: content.clear(), "lacks h.0.attn.c_attn.lora_A and 3"),
    (lambda content: content.update({"base_model.model.h.2.attn.c_attn.lora_A.weight": torch.ones(4, D)}), "h.2."),
    (lambda content: content.update({"x": torch.ones(1)}), "holds x"),
    (lambda content: content.update({name: value.int() for name, value in content.items()}), "int32")])
def test_damaged_factors(damage, word, base, tmp_path):
    peft_adapter(base, tmp_path)
    content = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    damage(content)
    safetensors.torch.save_file(content, tmp_path / "adapter_model.safetensors")
    refused(lambda: load_model(str(tmp_path), base_checkpoint=str(base)), "--init_checkpoint", word)


def test_frozen_weights_that_no_file_holds_alone_have_to_be_named(base, tmp_path):
    ours_trained(base, tmp_path / "run", LoRAConfig(2, 4.0))
    whole = load_model(str(tmp_path / "run"))
    os.makedirs(tmp_path / "whole")
    save_checkpoint(str(tmp_path / "whole"), 3, whole.model, None, {})
    arguments = ["--init_checkpoint", tmp_path / "whole", "--output", tmp_path / "new", "--format", "peft"]
    run = server().start(EXPORT, arguments)
    assert run.wait() == 2 and "give --base_name" in run.error and not (tmp_path / "new").exists()
    folder = export(tmp_path / "whole", tmp_path / "named", "--format", "peft", "--base_name", "some/base")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    assert_same_weights(load_model(str(folder), base_checkpoint=str(base)).model, whole.model)
    assert checkpoint.find_checkpoint(str(folder)).endswith("adapter_model.safetensors")
