"""Small random Llamas, Mistrals and Qwens, by transformers and by this project, with equal weights."""

import pathlib

import torch
import transformers

from llama import LlamaLMModel
from llama_config import LlamaConfig
from model import LoRAConfig

VOCABULARY, POSITIONS = 61, 64
LLAMA3 = {"rope_type": "llama3", "rope_theta": 300.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 24}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
# name -> (class of transformers' config, what differs from SHAPE)
KINDS: dict[str, tuple[type, dict]] = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": False}),
    "llama tied, every bias": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": (transformers.LlamaConfig, {"tie_word_embeddings": False, "rope_parameters": LLAMA3}),
    "llama linear": (transformers.LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0,
                                                                    "factor": 2.0}}),
    "smollm2": (transformers.LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
                                           "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 12,
                                           "rms_norm_eps": 1e-5}),
    "mistral": (transformers.MistralConfig, {"tie_word_embeddings": False, "head_dim": 6, "sliding_window": 40}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2 yarn": (transformers.Qwen2Config, {"tie_word_embeddings": False, "rope_parameters": YARN}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 6}),
    "qwen3 yarn": (transformers.Qwen3Config, {
        "head_dim": 8, "tie_word_embeddings": False, "attention_bias": True, "rope_parameters": {
            **YARN, "attention_factor": 0.8, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}}),
    "llama yarn mscale": (transformers.LlamaConfig, {"rope_parameters": {**YARN, "mscale": 0.7,
                                                                         "mscale_all_dim": 0.4}}),
}
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
         "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None}


def theirs_of(kind: str, seed: int = 0, **changed) -> transformers.PreTrainedModel:
    """Hugging Face's model of a KIND in float32, every parameter random."""
    config_class, options = KINDS[kind]
    config = config_class(**{**SHAPE, **options, **changed})
    config._attn_implementation = "sdpa"  # the eager one has a softmax in float32 whatever the type
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            parameter.copy_(mean + 0.25 * torch.randn(parameter.shape, generator=generator))
    return model


def norms_in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """`model` in float64 throughout: transformers computes norms in float32 whatever the type."""
    for module in model.double().modules():
        if type(module).__name__.endswith("RMSNorm"):
            def forward(x, module=module):
                return module.weight * x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
            module.forward = forward
    return model


def ours_of(theirs: transformers.PreTrainedModel, lora: LoRAConfig = LoRAConfig()) -> LlamaLMModel:
    """This project's model of the same shape and weights, without a file between."""
    model = LlamaLMModel(LlamaLMModel.read_config(theirs.config.to_dict()), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                other = theirs.get_parameter(name.replace("transformer.", "model."))
                assert parameter.shape == other.shape
                parameter.copy_(other)
    count = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" not in name)
    assert count == theirs.num_parameters()
    return model


def write_folder(kind: str, folder: pathlib.Path, seed: int = 0, shard: str = "1GB",
                 **changed) -> transformers.PreTrainedModel:
    """The folder that save_pretrained() writes, in files of `shard` at most."""
    theirs = theirs_of(kind, seed, **changed)
    theirs.save_pretrained(folder, max_shard_size=shard)
    return theirs


def tiny_config(**changed) -> LlamaConfig:
    """A Qwen3 with its own head: every kind of parameter that this family has, biases included."""
    values = {"model_type": "qwen3", "vocab_size": 37, "hidden_size": 16, "intermediate_size": 20,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
              "max_position_embeddings": 208, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
              "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attention_bias": False, "eos_token_id": (36,)}
    return LlamaConfig(**{**values, **changed})
