"""The model against Hugging Face's GPT-2 and peft's LoRA."""

import copy
import itertools
import json

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

import loralib as lora
from base.errors import UserError
from model import MODEL_CARDS, SLOTS, GPT2Config, GPT2LMModel, LoRAConfig
from weights.checkpoint import load_model

HEADS = {"gpt2.sm": (768, 12, 12), "gpt2.md": (1024, 24, 16), "gpt2.lg": (1280, 36, 20), "gpt2.xl": (1600, 48, 25)}
VOCABULARY, POSITIONS, T = 61, 32, 19


def oracle(layers: int, heads: int, seed: int = 0, **options) -> transformers.GPT2LMHeadModel:
    """Hugging Face's GPT-2 with heads of width 4 and every parameter random, biases and norms included."""
    config = transformers.GPT2Config(n_embd=4 * heads, n_layer=layers, n_head=heads, vocab_size=VOCABULARY,
                                     n_positions=POSITIONS, bos_token_id=0, eos_token_id=0, **options)
    model = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def weights_of(model: transformers.GPT2LMHeadModel, prefix: bool, head: bool = False, masks: bool = False) -> dict:
    """The weights as Hugging Face's files have held them over the years."""
    weights = {name: value.detach().clone() for name, value in model.transformer.state_dict().items()}
    if masks:
        for i in range(model.config.n_layer):
            weights[f"h.{i}.attn.bias"] = torch.ones(1, 1, POSITIONS, POSITIONS, dtype=torch.uint8).tril()
            weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    if prefix:
        weights = {f"transformer.{name}": value for name, value in weights.items()}
    if head:
        weights["lm_head.weight"] = model.lm_head.weight.detach().clone()
    return weights


def tokens(seed: int = 3, rows: int = 3) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, T), generator=torch.Generator().manual_seed(seed))


def assert_same_logits(ours: GPT2LMModel, theirs: transformers.GPT2LMHeadModel) -> None:
    """In float64 to its rounding; in float32 no further from the float64 logits than a few times Hugging Face's own."""
    ids = tokens()
    ours.eval()
    with torch.no_grad():
        mine, other = ours(ids), theirs(ids).logits
        exact, mine64 = copy.deepcopy(theirs).double()(ids).logits, copy.deepcopy(ours).double()(ids)
    scale = exact.abs().max()
    assert scale > 0.5 and exact.std(dim=1).min() > 0.01, "the logits are too alike to tell models apart"
    # float64 has 29 bits more than float32, whose error is measured here
    error = (other - exact).abs().max()
    assert error < 1e-3 * scale
    assert (mine64 - exact).abs().max() <= 8 * error * 2 ** -29
    assert (mine - exact).abs().max() <= 4 * error


def test_cards_are_the_published_shapes():
    assert {name: (c.n_embd, c.n_layer, c.n_head) for name, c in MODEL_CARDS.items()} == HEADS
    assert all((c.vocab_size, c.n_positions, c.inner, c.layer_norm_epsilon) == (50257, 1024, 4 * c.n_embd, 1e-5)
               for c in MODEL_CARDS.values())
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in GPT2LMModel(card).parameters()) for name, card in MODEL_CARDS.items()}
        configs = {name: transformers.GPT2Config(n_embd=D, n_layer=L, n_head=H) for name, (D, L, H) in HEADS.items()}
        theirs = {name: transformers.GPT2LMHeadModel(config).num_parameters() for name, config in configs.items()}
    assert sizes == theirs


@pytest.mark.parametrize("card", HEADS)
def test_logits_equal_hugging_face(card, tmp_path):
    """Each card's layers and heads; .safetensors and config.json as Hugging Face writes them, shape from the file."""
    _, layers, heads = HEADS[card]
    theirs = oracle(layers, heads)
    theirs.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert (loaded.model.config.n_layer, loaded.model.config.n_head) == (layers, heads)
    assert_same_logits(loaded.model, theirs)
    adapted = load_model(str(tmp_path), str(tmp_path), LoRAConfig(4, 32.0)).model  # adapters begin at zero
    assert_same_logits(adapted, theirs)


@pytest.mark.parametrize("kind", ["bin", "legacy bin", "safetensors"])
@pytest.mark.parametrize("prefix, head, masks", [(False, False, False), (True, False, False), (False, True, True),
                                                 (True, True, True)])
def test_every_layout_of_file(kind, prefix, head, masks, tmp_path):
    theirs = oracle(2, 3)
    weights = weights_of(theirs, prefix, head, masks)
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    if kind == "safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "bin")
    theirs.config.save_pretrained(tmp_path)
    for name in (path, tmp_path):
        assert_same_logits(load_model(str(name)).model, theirs)


@pytest.mark.parametrize("options", [{"n_inner": 20}, {"layer_norm_epsilon": 0.1}, {"n_inner": None}])
def test_other_shapes_come_from_config_json(options, tmp_path):
    theirs = oracle(2, 3, **options)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(load_model(str(tmp_path)).model, theirs)
    assert_same_logits(load_model(str(tmp_path / "model.safetensors"), str(tmp_path / "config.json")).model, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision_become_float32(dtype, tmp_path):
    theirs = oracle(2, 3).to(dtype)
    theirs.save_pretrained(tmp_path)
    model = load_model(str(tmp_path)).model
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert_same_logits(model, theirs.float())


def test_the_reference_checkpoint_equals_hugging_face(shared):
    folder = shared / "reference" / "beam"
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    ours = load_model(str(folder)).model.eval()
    ids = torch.tensor([json.loads((folder / "contexts.jsonl").read_text().splitlines()[0])["context"]])
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(ids).logits
        error = (theirs(ids).logits - exact).abs().max()
        assert (ours(ids) - exact).abs().max() <= 4 * error
        assert (copy.deepcopy(ours).double()(ids) - exact).abs().max() <= 8 * error * 2 ** -29


def test_causality_and_independence_of_rows():
    """What lies to the right (padding) or in other rows changes no logit."""
    torch.manual_seed(0)
    model = GPT2LMModel(GPT2Config(12, 2, 3, vocab_size=VOCABULARY, n_positions=POSITIONS)).double().eval()
    ids = tokens()
    with torch.no_grad():
        logits = model(ids)
        for length in (1, 7, T):
            torch.testing.assert_close(model(ids[:1, :length]), logits[:1, :length], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("change, words", [
    (lambda w: w.pop("transformer.h.1.mlp.c_fc.bias"), ["lacks", "transformer.h.1.mlp.c_fc.bias"]),
    (lambda w: w.pop("transformer.wte.weight"), ["lacks", "transformer.wte.weight"]),
    (lambda w: w.update({"transformer.h.2.ln_1.weight": torch.ones(12)}), ["unknown", "transformer.h.2.ln_1.weight"]),
    (lambda w: w.update({"score.weight": torch.ones(2, 12)}), ["unknown", "score.weight"]),
    (lambda w: w.update({"transformer.wpe.weight": torch.ones(8, 12)}),
     ["another shape", "wpe.weight (8, 12) for (32, 12)"]),
    (lambda w: w.update({"wte.weight": w["transformer.wte.weight"].clone()}), ["twice", "wte.weight"]),
    (lambda w: w.update({"lm_head.weight": torch.ones(VOCABULARY, 12)}), ["differs from wte.weight", "tied"]),
    (lambda w: w.update({"transformer.ln_f.bias": torch.ones(12, dtype=torch.int64)}), ["ln_f.bias", "int64"]),
    (lambda w: w.update({"transformer.h.0.attn.c_attn.lora_A": torch.ones(8, 12)}), ["unknown", "lora_A"]),
])
def test_loading_is_strict_and_names_what_did_not_fit(change, words, tmp_path):
    theirs = oracle(2, 3)
    weights = weights_of(theirs, prefix=True)
    change(weights)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    theirs.config.save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        load_model(str(tmp_path))
    assert all(word in str(caught.value) for word in ["--init_checkpoint", *words]), str(caught.value)


def test_wrong_prefix_is_refused(tmp_path):
    """The original skipped such keys in silence and trained from noise."""
    theirs = oracle(2, 3)
    theirs.config.save_pretrained(tmp_path)
    weights = {f"teacher.{name}": value for name, value in weights_of(theirs, prefix=False).items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds unknown teacher.wte.weight, teacher.wpe.weight"):
        load_model(str(tmp_path))


# ------------------------------------------------------------------ LoRA on the fused projection, against peft


def lora_pair(enable: tuple[bool, ...]) -> tuple[GPT2LMModel, torch.nn.Module]:
    """Our model and peft's with the same function, in float64. peft adapts the whole fused projection at once with rank
    G*R: its lora_A is ours, its lora_B the block matrix with our slots' lora_B on its blocks and zeros elsewhere."""
    R, alpha, layers, heads = 3, 7.0, 2, 3
    theirs, G, D = oracle(layers, heads), sum(enable), 4 * heads
    ours = GPT2LMModel(GPT2Config(D, layers, heads, vocab_size=VOCABULARY, n_positions=POSITIONS),
                       LoRAConfig(R, alpha, 0.0, tuple(itertools.compress(SLOTS, enable)))).double()
    weights = {name: value.double() for name, value in weights_of(theirs, prefix=True, head=True).items()}
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected and all("lora_" in name for name in missing)
    options = peft.LoraConfig(r=G * R, lora_alpha=alpha * G, target_modules=["c_attn"], fan_in_fan_out=True)
    theirs = peft.get_peft_model(theirs.double(), options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for i, block in enumerate(ours.transformer.h):
            layer = block.attn.c_attn
            for parameter in (layer.lora_A, layer.lora_B):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
            other = theirs.base_model.model.transformer.h[i].attn.c_attn
            other.lora_A["default"].weight.copy_(layer.lora_A)
            blocks = torch.zeros(3 * D, G * R, dtype=torch.float64)
            for rows, columns, mine in block_places(enable, D, R):
                blocks[rows, columns] = layer.lora_B[mine]
            other.lora_B["default"].weight.copy_(blocks)
    return ours, theirs


def block_places(enable: tuple[bool, ...], D: int, R: int) -> list[tuple[slice, slice, slice]]:
    """For each enabled slot: its rows and columns in peft's lora_B, and its rows in ours."""
    slots = [slot for slot, on in enumerate(enable) if on]
    return [(slice(slot * D, slot * D + D), slice(j * R, j * R + R), slice(j * D, j * D + D))
            for j, slot in enumerate(slots)]


@pytest.mark.filterwarnings("ignore")  # peft's remarks on itself
@pytest.mark.parametrize("enable", [e for e in itertools.product([False, True], repeat=3) if any(e)])
def test_lora_equals_peft(enable):
    ours, theirs = lora_pair(enable)
    ours.freeze_for_training()
    ids, tolerance = tokens(), {"rtol": 1e-9, "atol": 1e-11}
    targets = ids[:, 1:]
    ours_logits, their_logits = ours(ids), theirs(input_ids=ids).logits
    torch.testing.assert_close(ours_logits, their_logits, **tolerance)
    for logits in (ours_logits, their_logits):
        F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="sum").backward()
    for i, block in enumerate(ours.transformer.h):
        mine, other = block.attn.c_attn, theirs.base_model.model.transformer.h[i].attn.c_attn
        torch.testing.assert_close(mine.lora_A.grad, other.lora_A["default"].weight.grad, **tolerance)
        for rows, columns, own in block_places(enable, 12, 3):
            theirs_b = other.lora_B["default"].weight.grad[rows, columns]
            torch.testing.assert_close(mine.lora_B.grad[own], theirs_b, **tolerance)
        assert mine.lora_A.grad.abs().max() > 1e-3 and mine.weight.grad is None
    merged = theirs.merge_and_unload().state_dict()
    lora.merge(ours)
    for i, block in enumerate(ours.transformer.h):
        expected = merged[f"transformer.h.{i}.attn.c_attn.weight"]
        torch.testing.assert_close(block.attn.c_attn.weight.detach(), expected, **tolerance)


def test_adapter_without_slots_is_the_plain_model():
    config = GPT2Config(12, 2, 3, vocab_size=VOCABULARY, n_positions=POSITIONS)
    torch.manual_seed(0)
    plain, adapted = GPT2LMModel(config), GPT2LMModel(config, LoRAConfig(4, 8.0, 0.5, ()))
    adapted.load_state_dict(plain.state_dict())
    assert torch.equal(adapted(tokens()), plain(tokens()))


# ------------------------------------------------------------------ initialisation and freezing


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    L, D = 8, 96
    model = GPT2LMModel(GPT2Config(D, L, 4, vocab_size=400, n_positions=100), LoRAConfig(4))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
            continue
        std = 0.02 / (2 * L) ** 0.5 if name.endswith("c_proj.weight") else 0.02
        n = parameter.numel()  # the deviation of n normals spreads by std / sqrt(2n), their mean by std / sqrt(n)
        assert abs(parameter.std().item() - std) < 5 * std / (2 * n) ** 0.5, name
        assert abs(parameter.mean().item()) < 5 * std / n ** 0.5, name
    assert not any(block.attn.c_attn.lora_B.any() for block in model.transformer.h)


def test_what_trains():
    config = GPT2Config(12, 2, 3, vocab_size=VOCABULARY)
    full, adapted = GPT2LMModel(config), GPT2LMModel(config, LoRAConfig(2))
    full.freeze_for_training()
    adapted.freeze_for_training()
    assert all(parameter.requires_grad for parameter in full.parameters())
    assert full.lm_head.weight is full.transformer.wte.weight
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == \
        {f"transformer.h.{i}.attn.c_attn.lora_{c}" for i in range(2) for c in "AB"}


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="n_head=5"):
        GPT2LMModel(GPT2Config(12, 1, 5))
