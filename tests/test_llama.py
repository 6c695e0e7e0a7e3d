"""Llama, Mistral, Qwen2, Qwen3 and SmolLM2 against transformers: logits, gradients, what is refused."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from base.products import row_blocks
from families import of_model_type
from helpers.llamas import KINDS, POSITIONS, SHAPE, VOCABULARY, norms_in_float64, ours_of, theirs_of
from llama import LlamaLMModel, Transformer
from llama_config import LlamaConfig
from model import LoRAConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' remarks on itself


def tokens(T: int = 33, rows: int = 3, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, T), generator=torch.Generator().manual_seed(seed))


def loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:])


@pytest.mark.parametrize("rows", [0, 16], ids=["at once", "row blocks"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_hugging_face(kind, rows):
    """In float32 no further from the float64 result than a few times transformers' own error; in float64 to its
    rounding, which has 29 bits more."""
    theirs, ids = theirs_of(kind), tokens()
    ours = ours_of(theirs)
    exact = norms_in_float64(copy.deepcopy(theirs))
    found = {}
    for name, model in (("theirs", theirs), ("exact", exact), ("ours", ours), ("ours64", copy.deepcopy(ours).double())):
        with row_blocks(rows if name.startswith("ours") else 0):
            output = model(ids)
            logits = output if isinstance(output, torch.Tensor) else output.logits
            loss(logits, ids).backward()
        gradients = {key.removeprefix("transformer.").removeprefix("model."): p.grad.double()
                     for key, p in model.named_parameters()}
        found[name] = {"logits": logits.detach().double(), **gradients}
    assert found["exact"]["logits"].std(dim=1).min() > 0.01, "the logits are too alike to tell models apart"
    assert found["ours"].keys() == found["exact"].keys()
    for key, value in found["exact"].items():
        scale = value.abs().max()
        error = max((found["theirs"][key] - value).abs().max(), 2 ** -22 * scale)
        assert scale > 1e-5 and error < 1e-4 * scale, key
        assert (found["ours"][key] - value).abs().max() <= 8 * error, key
        assert (found["ours64"][key] - value).abs().max() <= 64 * error * 2 ** -29, key


def test_every_kind_of_position_and_head_is_among_them():
    ropes = {KINDS[kind][1].get("rope_parameters", {}).get("rope_type", "default") for kind in KINDS}
    assert ropes == {"default", "linear", "llama3", "yarn"}
    assert {KINDS[kind][1].get("tie_word_embeddings", True) for kind in KINDS} == {True, False}
    assert {theirs_of(kind).config.model_type for kind in KINDS} == set(LlamaLMModel.MODEL_TYPES)


def test_scaled_positions_are_not_the_plain_ones():
    """Negative control of the comparison above: each scaling changes the logits by more than rounding."""
    for kind in ("llama 3.1", "llama linear", "qwen2 yarn"):
        theirs = theirs_of(kind)
        rope = {"rope_type": "default", "rope_theta": theirs.config.rope_parameters["rope_theta"]}
        plain = theirs_of(kind, rope_parameters=rope)
        assert (theirs(tokens()).logits - plain(tokens()).logits).abs().max() > 1e-3


def test_causality_and_independence_of_rows():
    model = ours_of(theirs_of("qwen3")).double()
    ids = tokens()
    with torch.no_grad():
        logits = model(ids)
        for length in (1, 7, 33):
            torch.testing.assert_close(model(ids[:1, :length]), logits[:1, :length], rtol=1e-12, atol=1e-13)


def test_a_cast_leaves_the_positions_exact():
    model = ours_of(theirs_of("llama"))
    before = model.transformer.places(torch.arange(9))
    after = model.bfloat16().transformer.places(torch.arange(9))
    assert all(torch.equal(a, b) for a, b in zip(before, after)) and after[0].dtype == torch.float32


@pytest.mark.parametrize("targets", [
    ("q",), ("k", "v"), ("o",), ("gate", "up"), ("down",), ("all",), ("query", "value"), ("attn_out", "down")])
def test_adapters_are_products_added_to_the_weights(targets):
    """Against the plain model whose weights are W + s B A, for both scalings."""
    for rslora, scale in ((False, 6.0 / 4), (True, 6.0 / 2)):
        ours = ours_of(theirs_of("qwen3", num_hidden_layers=1), LoRAConfig(4, 6.0, 0.0, targets, rslora)).double()
        generator = torch.Generator().manual_seed(5)
        plain = ours_of(theirs_of("qwen3", num_hidden_layers=1)).double()
        count = 0
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
            for path, (part,) in LlamaLMModel.PROJECTIONS.items():
                layer = ours.transformer.layers[0].get_submodule(path)
                assert layer.has_adapter() == (part in ours.lora_config.targets)
                if layer.has_adapter():
                    count += 1
                    plain.transformer.layers[0].get_submodule(path).weight += scale * layer.lora_B @ layer.lora_A
            torch.testing.assert_close(ours(tokens()), plain(tokens()), rtol=1e-9, atol=1e-11)
        assert count == (7 if targets == ("all",) else len(targets))


def test_targets_are_named_alike_in_both_families_and_strangers_are_refused():
    parts = LlamaLMModel.parts()
    assert parts == ("q", "k", "v", "o", "gate", "up", "down")
    assert LoRAConfig(1, targets=("attn_out", "value", "query")).of(parts).targets == ("q", "v", "o")
    for name in ("mlp_in", "c_attn"):
        with pytest.raises(ValueError, match=f"^{name}: no part of this model; it has q k v o gate up down$"):
            LoRAConfig(1, targets=("q", name)).of(parts)


# ------------------------------------------------------------------ config.json


CONTENT = {"model_type": "llama", **SHAPE, "hidden_act": "silu"}


@pytest.mark.parametrize("change, words", [
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu' alone"),
    ({"num_local_experts": 8}, "num_local_experts is 8: mixtures of experts are not supported"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'; supported are default, linear"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10.0}}, "factor of rope_type 'yarn' is None"),
    ({"rope_parameters": {"rope_type": "linear", "factor": -1.0}}, "factor of rope_type 'linear' is -1.0"),
    ({"rope_parameters": {"rope_theta": 10.0, "strange": 1}}, "strange of rope_type 'default' is 1, which is not"),
    ({"rope_parameters": [1]}, "rope_parameters is [1]"), ({"rope_theta": 0}, "rope_theta"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3, wanted a divisor of num_attention_heads 4"),
    ({"num_attention_heads": 5}, "num_attention_heads is 5, wanted a divisor of hidden_size 16"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"), ({"head_dim": 5}, "head_dim is 5, wanted an even"),
    ({"vocab_size": -1}, "vocab_size is -1, wanted a positive whole number"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x', wanted a positive number"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, wanted true or false"),
    ({"intermediate_size": None}, "intermediate_size is missing, so this is not the shape of a Llama"),
    ({"eos_token_id": "</s>"}, "eos_token_id is ('</s>',), wanted ids"), ({"eos_token_id": [1, -1]}, "eos_token_id"),
    ({"model_type": "mistral", "attention_bias": True}, "attention_bias or mlp_bias"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
    ({"model_type": "qwen3", "layer_types": ["chunked"] * 2, "head_dim": 4}, "layer_types is or holds 'chunked'"),
    ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": 3, "head_dim": 4}, "layer_types"),
    ({"model_type": "qwen3"}, "head_dim is missing"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is ['LlamaForSequenceClassification']"),
    ({"architectures": ["MistralForCausalLM"]}, "of model_type 'llama', supported is LlamaForCausalLM"),
    ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'"),
])
def test_what_is_not_covered_is_refused_by_name(change, words):
    with pytest.raises(ValueError) as caught:
        LlamaLMModel.read_config({**CONTENT, **change})
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["mixtral", "gemma2", "qwen3_moe", "smollm3", None, ["llama"]])
def test_other_architectures_are_refused_by_name(model_type):
    with pytest.raises(ValueError, match="supported are gpt2, llama, mistral, qwen2, qwen3$"):
        of_model_type(model_type)


@pytest.mark.parametrize("change, positions", [
    ({"model_type": "llama", "sliding_window": 8}, POSITIONS), ({"model_type": "mistral", "sliding_window": 8}, 8),
    ({"model_type": "mistral", "sliding_window": None}, POSITIONS), ({"model_type": "mistral"}, POSITIONS),
    ({"model_type": "qwen2", "sliding_window": 8}, POSITIONS),
    ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, POSITIONS),
    ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, 8),
    ({"model_type": "qwen3", "head_dim": 4, "sliding_window": 8, "use_sliding_window": True,
      "layer_types": ["full_attention"] * 2}, POSITIONS)])
def test_a_sliding_window_counts_where_a_layer_has_one(change, positions):
    config = LlamaLMModel.read_config({**CONTENT, **change})
    assert config.n_positions == positions
    assert config.limit == ("the model has 64 positions" if positions == 64 else
                            "the model attends over a sliding_window of 8, supported for texts up to that")


@pytest.mark.parametrize("T", [8, 9])
def test_within_the_window_a_sliding_window_is_no_other_attention(T):
    theirs = theirs_of("mistral", sliding_window=8)
    ours = ours_of(theirs)
    with torch.no_grad():
        error = (ours(tokens(T)) - theirs(tokens(T)).logits).abs().max()
    assert (error < 1e-4) == (T <= 8)


def test_the_config_that_is_written_is_the_one_that_was_read():
    """By this project and by transformers, for every kind."""
    for kind, end in itertools.product(KINDS, (None, 5)):
        theirs = theirs_of(kind).config
        ours = LlamaLMModel.read_config(theirs.to_dict())
        written = ours.to_hugging_face(end)
        again = LlamaLMModel.read_config(written)
        assert ours.same(again) and again.eos_token_id == ((2, 3) if end is None else (5,))
        back = type(theirs)(**{key: value for key, value in written.items() if key != "model_type"})
        for key in ("rope_parameters", "head_dim", "tie_word_embeddings", "sliding_window", "attention_bias",
                    "mlp_bias", "layer_types", "rms_norm_eps", *SHAPE.keys() - {"eos_token_id"}):
            assert getattr(back, key, None) == getattr(theirs, key, None), (kind, key)


def test_initialisation():
    torch.manual_seed(0)
    config = LlamaConfig("qwen2", 300, 64, 96, 2, 4, 2, 16, 50, {"rope_type": "default", "rope_theta": 1e4})
    model = LlamaLMModel(config, LoRAConfig(2, targets=("all",)))
    for name, parameter in model.named_parameters():
        n = parameter.numel()
        if name.endswith("bias") or "lora_B" in name:
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        elif "lora_" not in name:
            assert abs(parameter.std().item() - 0.02) < 5 * 0.02 / (2 * n) ** 0.5, name
    assert isinstance(model.transformer, Transformer) and not model.tied
    model.keep_vocabulary(290)
    assert model(torch.zeros(1, 2, dtype=torch.int64)).shape == (1, 2, 290) and model.config.vocab_size == 290
