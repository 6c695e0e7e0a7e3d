"""GPT-2 (Radford et al., 2019), in the layout of the released checkpoints, with LoRA on the projections of its blocks.

References: OpenAI's released TensorFlow code (model.py of gpt-2) for the arithmetic; Hugging Face's checkpoints for the
names and for Conv1D weights stored as (in, out).

Shapes: B batch, T tokens, D width, H heads, V vocabulary, n scored positions.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from base.products import gelu, linear
from language_model import (
    Block,
    Body,
    LanguageModel,
    LoRAConfig,
    TiedHead,
    adapted,
    bottleneck,
    checked_shape,
    is_adapter,
    reset_adapters,
)

END_OF_TEXT_ID = 50256  # the last of GPT-2's own vocabulary


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2."""

    n_embd: int
    n_layer: int
    n_head: int
    vocab_size: int = 50257
    n_positions: int = 1024
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5

    @property
    def inner(self) -> int:
        return self.n_inner or 4 * self.n_embd

    @property
    def end_of_text(self) -> int:
        """The id of <|endoftext|>: GPT-2's, behind which rows are padding, or the last one of a smaller vocabulary."""
        return min(END_OF_TEXT_ID, self.vocab_size - 1)

    @property
    def key_heads(self) -> int:
        return self.n_head

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head

    @property
    def tie_word_embeddings(self) -> bool:
        return True

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return (self.end_of_text,)

    @property
    def known_tokens(self) -> int:
        return self.end_of_text + 1

    @property
    def limit(self) -> str:
        return f"the model has {self.n_positions} positions"

    @property
    def block_outputs(self) -> int:
        return self.n_layer * (4 * self.n_embd + 2 * self.inner)

    def describe(self) -> str:
        return f"{self.n_layer} layers, width {self.n_embd}, {self.n_head} heads, vocabulary {self.vocab_size}"

    def same(self, other: object) -> bool:
        return isinstance(other, GPT2Config) and (
            dataclasses.replace(self, n_inner=self.inner) == dataclasses.replace(other, n_inner=other.inner)
        )

    def to_hugging_face(self, end_of_text: int | None = None) -> dict:
        """config.json of a GPT2LMHeadModel of this shape; this project's GPT-2 has no dropout."""
        end = self.end_of_text if end_of_text is None else end_of_text
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "vocab_size": self.vocab_size,
            "n_positions": self.n_positions,
            "n_ctx": self.n_positions,
            "n_embd": self.n_embd,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_inner": self.n_inner,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "bos_token_id": end,
            "eos_token_id": end,
        }


SLOTS = ("query", "key", "value")  # the parts of the fused projection, in its order

MODEL_CARDS = {
    "gpt2.sm": GPT2Config(768, 12, 12),
    "gpt2.md": GPT2Config(1024, 24, 16),
    "gpt2.lg": GPT2Config(1280, 36, 20),
    "gpt2.xl": GPT2Config(1600, 48, 25),
}


class Conv1D(nn.Module):
    """A linear layer whose weight is stored as (in, out), as GPT-2's checkpoints have it."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.T, self.bias)


def projection(n_in: int, n_out: int, part: str, lora_config: LoRAConfig) -> nn.Module:
    """A Conv1D, or the same layer with an adapter where `part` has one."""
    if lora_config.dim and part in lora_config.targets:
        return adapted(n_in, n_out, (part,), lora_config, fan_in_fan_out=True)
    return Conv1D(n_in, n_out)


class Attention(nn.Module):
    def __init__(self, config: GPT2Config, lora_config: LoRAConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = adapted(config.n_embd, 3 * config.n_embd, SLOTS, lora_config, fan_in_fan_out=True)
        self.c_proj = projection(config.n_embd, config.n_embd, "attn_out", lora_config)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., D) -> query, key, value, each (..., H, D/H)."""
        qkv = self.c_attn(x).view(*x.shape[:-1], 3, self.n_head, x.shape[-1] // self.n_head)
        return qkv.unbind(-3)


class MLP(nn.Module):
    def __init__(self, config: GPT2Config, lora_config: LoRAConfig = LoRAConfig()):
        super().__init__()
        self.c_fc = projection(config.n_embd, config.inner, "mlp_in", lora_config)
        self.c_proj = projection(config.inner, config.n_embd, "mlp_out", lora_config)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(gelu(self.c_fc(x)))


class GPT2Block(Block):
    def __init__(self, config: GPT2Config, lora_config: LoRAConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, lora_config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config, lora_config)
        self.adapter_attn, self.adapter_mlp = (bottleneck(config.n_embd, lora_config) for _ in range(2))

    def project(self, x: Tensor, places: None) -> tuple[Tensor, Tensor, Tensor]:
        return self.attn.split(self.ln_1(x))

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.adapter_attn(self.attn.c_proj(y))
        return x + self.adapter_mlp(self.mlp(self.ln_2(x)))


class Transformer(Body):
    """Everything up to and with the last layer norm."""

    def __init__(self, config: GPT2Config, lora_config: LoRAConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(GPT2Block(config, lora_config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.h

    @property
    def last_norm(self) -> nn.LayerNorm:
        return self.ln_f

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        # one row of positions a unit, for per-unit gradients; tables held in bfloat16 give float32 states
        dtype = self.ln_f.weight.dtype
        return self.wte(ids).to(dtype) + self.wpe(positions.expand_as(ids)).to(dtype)


class GPT2LMModel(LanguageModel):
    """GPT-2 with its language-model head, tied to the token embedding."""

    TITLE, CONFIG, MODEL_TYPES = "GPT-2", GPT2Config, ("gpt2",)
    HUGGING_FACE, EMBEDDING, BLOCKS = "transformer.", "wte", "h"
    PROJECTIONS: ClassVar = {
        "attn.c_attn": SLOTS,
        "attn.c_proj": ("attn_out",),
        "mlp.c_fc": ("mlp_in",),
        "mlp.c_proj": ("mlp_out",),
    }
    TRANSPOSED = True
    WEIGHTS = re.compile(
        r"(wte|wpe)\.weight|ln_f\.(weight|bias)|h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.lora_[AB]|"
        r"h\.\d+\.adapter_(attn|mlp)\.(down|up)\.(weight|bias)|"
        r"h\.\d+\.(ln_1|ln_2|attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.(weight|bias)"
    )
    BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask of Hugging Face's older files

    def __init__(self, config: GPT2Config, lora_config: LoRAConfig = LoRAConfig()):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_head={config.n_head}: expected a divisor of n_embd={config.n_embd}")
        self.config, self.lora_config = config, lora_config.of(self.parts())
        self.transformer = Transformer(config, self.lora_config)
        self.lm_head = TiedHead(self.transformer.wte)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), the residual projections divided by sqrt(2 n_layer); biases zero."""
        for name, parameter in self.named_parameters():
            if is_adapter(name):
                continue
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                residual = name.endswith("c_proj.weight")
                parameter.normal_(0.0, 0.02 / (math.sqrt(2 * self.config.n_layer) if residual else 1.0))
        reset_adapters(self)

    @classmethod
    def read_config(cls, content: Mapping[str, Any]) -> GPT2Config:
        for key, only in (
            ("activation_function", "gelu_new"),
            ("tie_word_embeddings", True),
            ("scale_attn_weights", True),
            ("scale_attn_by_inverse_layer_idx", False),
            ("add_cross_attention", False),
        ):
            if content.get(key, only) != only:
                raise ValueError(f"{key} is {content[key]!r}; supported is {only!r} alone")
        known = {field.name for field in dataclasses.fields(GPT2Config)}
        return cls.check_config({key: value for key, value in content.items() if key in known})

    @classmethod
    def check_config(cls, values: Mapping[str, Any]) -> GPT2Config:
        config = checked_shape(GPT2Config, values, "the shape of a GPT-2")
        if config.n_embd % config.n_head:
            raise ValueError(f"n_head is {config.n_head}, wanted a divisor of n_embd {config.n_embd}")
        return config
