"""Llama (Touvron et al., 2023) and its kin: Mistral, Qwen2, Qwen3, SmolLM2, in Hugging Face's names and layout.

RMSNorm (Zhang and Sennrich, 2019), rotary positions (Su et al., 2021, arXiv:2104.09864; scaled as Llama 3.1 or by YaRN,
Peng et al., 2023, arXiv:2309.00071), grouped-query attention (Ainslie et al., 2023, arXiv:2305.13245), SwiGLU (Shazeer,
2020, arXiv:2002.05202). The arithmetic is that of transformers.

Shapes: B batch, T tokens, D width, H heads, K key-value heads, W width of a head, I width inside the MLP, V vocabulary.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from base.products import gated_silu, rms_norm
from language_model import (
    Block,
    Body,
    Head,
    LanguageModel,
    LoRAConfig,
    TiedHead,
    adapted,
    bottleneck,
    is_adapter,
    reset_adapters,
)
from llama_config import ARCHITECTURES, LlamaConfig, check_config, read_config, rotary_frequencies


def rotated(x: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
    """x (..., T, H, W) turned by its places, cosine and sine (T, 1, W/2); entry i and entry i + W/2 are a pair."""
    cos, sin = places
    left, right = x.chunk(2, dim=-1)  # (..., T, H, W/2)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    """x over its root mean square, times a weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """The projections around grouped-query attention, which Block computes."""

    def __init__(self, config: LlamaConfig, lora_config: LoRAConfig):
        super().__init__()
        D, W, queries = config.hidden_size, config.head_dim, config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * W
        self.head_dim = W
        self.q_proj = adapted(D, queries, ("q",), lora_config, bias=config.qkv_bias)
        self.k_proj = adapted(D, keys, ("k",), lora_config, bias=config.qkv_bias)
        self.v_proj = adapted(D, keys, ("v",), lora_config, bias=config.qkv_bias)
        self.o_proj = adapted(queries, D, ("o",), lora_config, bias=config.attention_bias)
        self.q_norm = RMSNorm(W, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(W, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def split(self, x: Tensor, places: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., T, D) -> query (..., T, H, W), key and value (..., T, K, W)."""
        query, key, value = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in self.projections())
        return rotated(self.q_norm(query), places), rotated(self.k_norm(key), places), value

    def projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.q_proj, self.k_proj, self.v_proj


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) up(x))."""

    def __init__(self, config: LlamaConfig, lora_config: LoRAConfig):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = adapted(D, inner, ("gate",), lora_config, bias=bias)
        self.up_proj = adapted(D, inner, ("up",), lora_config, bias=bias)
        self.down_proj = adapted(inner, D, ("down",), lora_config, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated_silu(self.gate_proj(x), self.up_proj(x)))


class LlamaBlock(Block):
    def __init__(self, config: LlamaConfig, lora_config: LoRAConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, lora_config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, lora_config)
        self.adapter_attn, self.adapter_mlp = (bottleneck(config.hidden_size, lora_config) for _ in range(2))

    def project(self, x: Tensor, places: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.split(self.input_layernorm(x), places)

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.adapter_attn(self.self_attn.o_proj(y))
        return x + self.adapter_mlp(self.mlp(self.post_attention_layernorm(x)))


class Transformer(Body):
    def __init__(self, config: LlamaConfig, lora_config: LoRAConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(config, lora_config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Numbers even where the model is built on "meta"; and no buffer, which a cast of the model would round.
        with torch.device("cpu"):
            self.frequencies, self.attention_scaling = rotary_frequencies(config)

    def _apply(self, *arguments: Any) -> "Transformer":
        """The frequencies go where the weights go, once and not in each forward pass; never to "meta"."""
        super()._apply(*arguments)
        if self.embed_tokens.weight.device.type != "meta":
            self.frequencies = self.frequencies.to(self.embed_tokens.weight.device)
        return self

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    @property
    def last_norm(self) -> RMSNorm:
        return self.norm

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.embed_tokens(ids).to(self.norm.weight.dtype)  # a table held in bfloat16 gives float32 states

    def places(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (T,) -> (cosine, sine), each (T, 1, W/2) float32."""
        angles = positions[:, None, None].float() * self.frequencies
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


class LlamaLMModel(LanguageModel):
    TITLE, CONFIG, MODEL_TYPES = "Llama", LlamaConfig, tuple(ARCHITECTURES)
    HUGGING_FACE, EMBEDDING, BLOCKS = "model.", "embed_tokens", "layers"
    PROJECTIONS: ClassVar = {
        **{f"self_attn.{part}_proj": (part,) for part in ("q", "k", "v", "o")},
        **{f"mlp.{part}_proj": (part,) for part in ("gate", "up", "down")},
    }
    TRANSPOSED = False
    WEIGHTS = re.compile(
        r"embed_tokens\.weight|norm\.weight|"
        r"layers\.\d+\.((input|post_attention)_layernorm|self_attn\.[qk]_norm)\.weight|"
        r"layers\.\d+\.adapter_(attn|mlp)\.(down|up)\.(weight|bias)|"
        r"layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.(weight|bias|lora_[AB])"
    )
    BUFFERS = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

    def __init__(self, config: LlamaConfig, lora_config: LoRAConfig = LoRAConfig()):
        super().__init__()
        self.config, self.lora_config = config, lora_config.of(self.parts())
        self.transformer = Transformer(config, self.lora_config)
        tied = config.tie_word_embeddings
        self.lm_head = TiedHead(self.embedding) if tied else Head(config.vocab_size, config.hidden_size)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """N(0, 0.02) for matrices, ones for norms, zero for biases, as transformers draws a new model."""
        for name, parameter in self.named_parameters():
            if is_adapter(name):
                continue
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        reset_adapters(self)

    @classmethod
    def read_config(cls, content: Mapping[str, Any]) -> LlamaConfig:
        return read_config(content)

    @classmethod
    def check_config(cls, values: Mapping[str, Any]) -> LlamaConfig:
        return check_config(values)
