"""GPT-2 (Radford et al., 2019), in the layout of the released checkpoints, with LoRA on the fused attention projection.

References: OpenAI's released TensorFlow code (model.py of gpt-2) for the arithmetic; Hugging Face's checkpoints for the
names and for Conv1D weights stored as (in, out).

Shapes: B batch, T tokens, D width, H heads, V vocabulary, n scored positions.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loralib as lora
from base.products import gelu, linear

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


SLOTS = ("query", "key", "value")  # the parts of the fused projection, in its order


@dataclass(frozen=True)
class LoRAConfig:
    """The adapter of every layer's fused projection, a product for each enabled part of SLOTS; dim 0 means none."""

    dim: int = 0
    alpha: float = 128.0
    dropout: float = 0.0
    enable: tuple[bool, ...] = (True, False, True)  # by SLOTS

    @property
    def targets(self) -> str:
        """The enabled parts, as --lora_target names them."""
        return " ".join(name for name, on in zip(SLOTS, self.enable, strict=True) if on) or "none"


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


class Attention(nn.Module):
    def __init__(self, config: GPT2Config, lora_config: LoRAConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = lora.MergedLinear(
            config.n_embd,
            3 * config.n_embd,
            r=lora_config.dim,
            lora_alpha=lora_config.alpha,
            lora_dropout=lora_config.dropout,
            enable_lora=lora_config.enable,
            fan_in_fan_out=True,
        )
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.inner)
        self.c_proj = Conv1D(config.inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: GPT2Config, lora_config: LoRAConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, lora_config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Everything up to and with the last layer norm."""

    def __init__(self, config: GPT2Config, lora_config: LoRAConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, lora_config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) int64 -> states (B, T, D). Padding belongs on the right: attention is causal."""
        # one row a unit, for per-unit gradients
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        x = self.wte(ids) + self.wpe(positions)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class TiedHead(nn.Module):
    """The vocabulary projection; its weight (V, D) is the token embedding's own tensor."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.weight = embedding.weight

    def forward(self, states: Tensor) -> Tensor:
        """states (..., D) -> logits (..., V)."""
        return linear(states, self.weight)


class GPT2LMModel(nn.Module):
    """GPT-2 with its language-model head, tied to the token embedding."""

    def __init__(self, config: GPT2Config, lora_config: LoRAConfig = LoRAConfig()):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_head={config.n_head}: expected a divisor of n_embd={config.n_embd}")
        self.config, self.lora_config = config, lora_config
        self.transformer = Transformer(config, lora_config)
        self.lm_head = TiedHead(self.transformer.wte)
        self.init_weights()

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) int64 -> logits (B, T, V)."""
        return self.lm_head(self.transformer(ids))

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), the residual projections divided by sqrt(2 n_layer); biases zero."""
        for name, parameter in self.named_parameters():
            if "lora_" in name:
                continue
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                residual = name.endswith("c_proj.weight")
                parameter.normal_(0.0, 0.02 / (math.sqrt(2 * self.config.n_layer) if residual else 1.0))
        for block in self.transformer.h:
            block.attn.c_attn.reset_lora_parameters()

    def freeze_for_training(self) -> None:
        """Leave trainable what training changes: the adapters where there are any, else every parameter."""
        if self.lora_config.dim > 0:
            lora.mark_only_lora_as_trainable(self)
