"""The shape of a Llama, Mistral, Qwen2 or Qwen3: config.json, what of it llama.py covers, and the rotary frequencies.

References: Llama 3.1's scaling of rotary positions, and YaRN's (Peng et al., 2023, arXiv:2309.00071), as transformers
computes them.

Shapes: W width of a head.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from language_model import checked_shape

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# rope_type -> the settings that it has beside rope_theta: (needed, optional)
ROPE: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}
KINDS = ("full_attention", "sliding_attention")
WINDOWS = ("layer_types", "use_sliding_window", "max_window_layers")  # of a Qwen alone


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, Mistral, Qwen2 or Qwen3, by the names of config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_parameters: dict
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()  # of a model with sliding and full attention
    bos_token_id: tuple[int, ...] = ()
    eos_token_id: tuple[int, ...] = ()

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.model_type == "qwen3"

    @property
    def key_heads(self) -> int:
        return self.num_key_value_heads

    @property
    def head_width(self) -> int:
        return self.head_dim

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return tuple(token for token in self.eos_token_id if token < self.vocab_size)

    @property
    def known_tokens(self) -> int:
        return self.vocab_size

    @property
    def n_positions(self) -> int:
        """Attention over a sliding window is the whole one as long as a text fits into the window."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    @property
    def limit(self) -> str:
        if self.n_positions < self.max_position_embeddings:
            return f"the model attends over a sliding_window of {self.n_positions}, supported for texts up to that"
        return f"the model has {self.n_positions} positions"

    @property
    def block_outputs(self) -> int:
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        return self.num_hidden_layers * (heads * self.head_dim + 3 * self.intermediate_size)

    def describe(self) -> str:
        return (
            f"{self.model_type}, {self.num_hidden_layers} layers, width {self.hidden_size}, {self.num_attention_heads} "
            f"heads, {self.num_key_value_heads} of keys, vocabulary {self.vocab_size}"
        )

    def same(self, other: object) -> bool:
        return isinstance(other, LlamaConfig) and self == dataclasses.replace(
            other, bos_token_id=self.bos_token_id, eos_token_id=self.eos_token_id
        )

    def to_hugging_face(self, end_of_text: int | None = None) -> dict:
        """config.json of such a model; this project's has no dropout. Both spellings of the rotary positions are there,
        that of transformers before 5, too."""
        ends = self.eos_token_id if end_of_text is None else (end_of_text,)
        rope, kind = self.rope_parameters, self.model_type
        found = {
            "architectures": [ARCHITECTURES[kind]],
            **dataclasses.asdict(self),
            "bos_token_id": next(iter(self.bos_token_id), None),
            "eos_token_id": list(ends) if len(ends) > 1 else next(iter(ends), None),
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None if rope["rope_type"] == "default" else rope,
            "layer_types": list(self.layer_types) or None,
            "use_sliding_window": self.sliding_window is not None,
            "max_window_layers": self.layer_types.count("full_attention"),
            "hidden_act": "silu",
            "attention_dropout": 0.0,
        }
        foreign = {
            "llama": {"sliding_window", *WINDOWS},
            "mistral": {"attention_bias", "mlp_bias", *WINDOWS},
            "qwen2": {"attention_bias", "mlp_bias", "head_dim"},
            "qwen3": {"mlp_bias"},
        }[kind]
        return {name: value for name, value in found.items() if name not in foreign}


# ------------------------------------------------------------------ rotary positions


def rotary_frequencies(config: LlamaConfig) -> tuple[Tensor, float]:
    """(angle of a step of one position for each pair of a head (W/2,) float32, factor of cosine and sine)."""
    rope, W = config.rope_parameters, config.head_dim
    base, factor, kind = rope["rope_theta"], rope.get("factor", 1.0), rope["rope_type"]
    wavelengths = base ** (torch.arange(0, W, 2, dtype=torch.float) / W)  # over 2 pi
    frequencies = 1.0 / wavelengths
    if kind == "linear":
        return frequencies / factor, 1.0
    if kind == "llama3":  # long waves are stretched by the factor, short ones are kept, those between are mixed
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] / (2 * math.pi / frequencies)
        smooth = (turns - low) / (high - low)
        mixed = (1 - smooth) * frequencies / factor + smooth * frequencies
        return torch.where(turns < low, frequencies / factor, torch.where(turns > high, frequencies, mixed)), 1.0
    if kind == "yarn":  # a ramp over the pairs, from those that turn beta_fast times in a text to beta_slow times
        original = rope["original_max_position_embeddings"]

        def pair(turns: float) -> float:
            return W * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        first, last = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, W - 1)
        ramp = ((torch.arange(W // 2, dtype=torch.float) - first) / ((last - first) or 0.001)).clamp(0, 1)
        kept = 1 - ramp
        return 1.0 / (factor * wavelengths) * (1 - kept) + frequencies * kept, yarn_attention(rope)
    return frequencies, 1.0


def yarn_attention(rope: Mapping[str, Any]) -> float:
    """YaRN's factor of cosine and sine."""

    def scale(by: float) -> float:
        return 0.1 * by * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1)


# ------------------------------------------------------------------ config.json


def read_config(content: Mapping[str, Any]) -> LlamaConfig:
    """The shape in config.json; ValueError for what is not covered."""
    kind = content["model_type"]
    for key, only in (("hidden_act", "silu"), ("quantization_config", None)):
        if content.get(key, only) != only:
            raise ValueError(f"{key} is {content[key]!r:.60}; supported is {only!r} alone")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if content.get(key):
            raise ValueError(f"{key} is {content[key]!r}: mixtures of experts are not supported")
    named, only = content.get("architectures") or [ARCHITECTURES[kind]], (f"{kind}forcausallm", f"{kind}model")
    if not isinstance(named, list) or not any(str(name).lower() in only for name in named):
        raise ValueError(f"architectures is {named!r:.60}; of model_type {kind!r}, supported is {ARCHITECTURES[kind]}")
    known = {field.name for field in dataclasses.fields(LlamaConfig)}
    values = {key: value for key, value in content.items() if key in known and value is not None}
    if kind == "mistral" and (values.get("attention_bias") or values.get("mlp_bias")):
        raise ValueError("attention_bias or mlp_bias is true, which a mistral does not have")
    if kind == "llama":
        values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
    if kind != "qwen3" and "head_dim" not in values:
        D, H = values.get("hidden_size"), values.get("num_attention_heads")
        if type(D) is not int or type(H) is not int or H < 1 or D % H:
            raise ValueError(f"num_attention_heads is {H!r}, wanted a divisor of hidden_size {D!r}")
        values["head_dim"] = D // H
    values["rope_parameters"] = read_rope(content)
    values["sliding_window"], values["layer_types"] = read_window(content)
    for key in ("bos_token_id", "eos_token_id"):
        tokens = content.get(key)
        values[key] = () if tokens is None else tuple(tokens) if isinstance(tokens, list) else (tokens,)
    return check_config(values)


def check_config(values: Mapping[str, Any]) -> LlamaConfig:
    """The shape of these fields; ValueError."""
    config = checked_shape(LlamaConfig, values, "the shape of a Llama")
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"model_type is {config.model_type!r}; supported are {', '.join(ARCHITECTURES)}")
    if heads % keys:
        raise ValueError(f"num_key_value_heads is {keys}, wanted a divisor of num_attention_heads {heads}")
    if config.head_dim % 2:
        raise ValueError(f"head_dim is {config.head_dim}, wanted an even number")
    for name in ("bos_token_id", "eos_token_id"):
        if not all(type(token) is int and token >= 0 for token in getattr(config, name)):
            raise ValueError(f"{name} is {getattr(config, name)!r}, wanted ids of tokens")
    check_rope(config.rope_parameters)
    return config


def read_window(content: Mapping[str, Any]) -> tuple[int | None, tuple[str, ...]]:
    """(sliding window, layer_types) of config.json: all layers of a Mistral, of a Qwen those that it names."""
    kind, window = content["model_type"], content.get("sliding_window", 4096)
    if kind == "llama":
        return None, ()
    if kind == "mistral":
        return window, ()
    layers, full = content.get("num_hidden_layers", 0), content.get("max_window_layers", 28)
    if type(layers) is not int or type(full) is not int:
        raise ValueError(f"num_hidden_layers is {layers!r} and max_window_layers {full!r}, wanted whole numbers")
    types = content.get("layer_types")
    if types is None:
        types = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    if not isinstance(types, list) or (unknown := [x for x in types if x not in KINDS]) or len(types) != layers:
        what = repr(unknown[0]) if isinstance(types, list) and unknown else repr(types)
        raise ValueError(f"layer_types is or holds {what:.60}; wanted {' or '.join(KINDS)} for each of {layers} layers")
    used = content.get("use_sliding_window", False) and "sliding_attention" in types
    return (window, tuple(types)) if used else (None, ())


def read_rope(content: Mapping[str, Any]) -> dict:
    """rope_parameters of config.json, or what transformers before 5 wrote: rope_theta and rope_scaling."""
    found = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise ValueError(f"rope_parameters is {found!r:.60}, wanted an object")
    rope = {"rope_theta": content.get("rope_theta", 10000.0), **found}
    kind = rope.setdefault("rope_type", rope.get("type", "default"))
    rope.pop("type", None)
    rope.setdefault("partial_rotary_factor", content.get("partial_rotary_factor", 1.0))
    if rope.pop("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError("partial_rotary_factor is not 1; supported is 1 alone")
    if kind in ("llama3", "yarn"):
        original = content.get("original_max_position_embeddings")
        if original is not None or "original_max_position_embeddings" not in rope:
            rope["original_max_position_embeddings"] = original or content.get("max_position_embeddings")
    return rope


def check_rope(rope: Mapping[str, Any]) -> None:
    """ValueError for positions that rotary_frequencies() does not know."""
    kind = rope.get("rope_type")
    if kind not in tuple(ROPE):
        raise ValueError(f"rope_type is {kind!r}; supported are {', '.join(ROPE)}")
    needed, optional = ROPE[kind]
    needed = {*needed, "rope_theta"}
    if unknown := sorted({*rope} - needed - optional - {"rope_type"}):
        raise ValueError(f"{unknown[0]} of rope_type {kind!r} is {rope[unknown[0]]!r:.60}, which is not known")
    for name in sorted(needed | optional):
        value: Any = rope.get(name)
        if name == "truncate" or (name in optional and value is None):
            continue
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{name} of rope_type {kind!r} is {value!r:.60}, wanted a positive number")
