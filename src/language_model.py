"""What a family of language models gives to training, losses, clipping, decoding and checkpoints.

families.py lists them. A family is a file like model.py or llama.py with a config (Shape), a transformer (Body) of
blocks, and a LanguageModel that has both. Nothing else in this project knows what is inside a block.

Shapes: B batch, T tokens, D width, H heads, K key-value heads, W width of a head, V vocabulary.
"""

import abc
import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loralib as lora
from base.products import gelu, linear, repeat_heads

# The same part under the names of either family, so that one --lora_target fits both.
SYNONYMS = {"query": "q", "key": "k", "value": "v", "attn_out": "o"}
SYNONYMS |= {short: long for long, short in SYNONYMS.items()}
EVERY_PART = "all"


@dataclass(frozen=True)
class LoRAConfig:
    """The adapters: a product of rank `dim` for each of the `targets`, parts of a block; dim 0 means none.

    bottleneck: the inner width of adapters of the other kind (Bottleneck), 0 means none; a model has one kind at most.
    rslora: scaled by alpha/sqrt(dim) (Kalajdzievski, 2023, arXiv:2312.03732), not alpha/dim.
    """

    dim: int = 0
    alpha: float = 128.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("query", "value")
    rslora: bool = False
    bottleneck: int = 0

    @property
    def adapts(self) -> bool:
        """Whether there are adapters, of either kind."""
        return self.dim > 0 or self.bottleneck > 0

    def of(self, parts: Sequence[str]) -> "LoRAConfig":
        """The same with `targets` as a family names them, in the order of its `parts`; ValueError for another's."""
        named = {name if name in parts else SYNONYMS.get(name, name) for name in self.targets}
        wanted = {*parts} if EVERY_PART in named else named
        if unknown := sorted(wanted - {*parts}):
            raise ValueError(f"{' '.join(unknown)}: no part of this model; it has {' '.join(parts)}")
        return dataclasses.replace(self, targets=tuple(part for part in parts if part in wanted))

    @property
    def words(self) -> str:
        """The targets, as --lora_target names them."""
        return " ".join(self.targets) or "none"

    def scaling(self, dim: int) -> float:
        """What a product of rank `dim` is multiplied by."""
        return self.alpha / (math.sqrt(dim) if self.rslora else dim)


class Shape(Protocol):
    """A family's config, a frozen dataclass."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def tie_word_embeddings(self) -> bool: ...  # whether the head's weight is the token embedding's

    @property
    def n_positions(self) -> int: ...  # the most tokens that a text may have

    @property
    def limit(self) -> str: ...  # why, as a clause

    @property
    def block_outputs(self) -> int: ...  # multiply-adds of a token in all blocks' matrices, over D

    @property
    def key_heads(self) -> int: ...  # K, and of each W

    @property
    def head_width(self) -> int: ...

    @property
    def eos_ids(self) -> tuple[int, ...]: ...  # of the tokens that end a text

    @property
    def known_tokens(self) -> int: ...  # ids that are not padding of the vocabulary, as far as the shape can tell

    def describe(self) -> str: ...

    def same(self, other: object) -> bool: ...  # whether weights of one fit the other and mean the same there

    def to_hugging_face(self, end_of_text: int | None) -> dict: ...  # config.json; None: the config's own end of text


def checked_shape(kind: type, values: Mapping[str, Any], what: str) -> Any:
    """kind(**values) for a dataclass; ValueError names what is missing or not of a field's type. Numbers are positive.

    what: "the shape of a GPT-2".
    """
    words = {int: "a positive whole number", float: "a positive number", bool: "true or false", str: "a text"}
    for field in dataclasses.fields(kind):
        if field.name not in values:
            if field.default is dataclasses.MISSING:
                raise ValueError(f"{field.name} is missing, so this is not {what}")
            continue
        value = values[field.name]
        first = typing.get_args(field.type)[0] if isinstance(field.type, types.UnionType) else field.type
        if (value is None and first is not field.type) or first not in words:  # int | None; a tuple or dict
            continue
        sound = type(value) in ((int, float) if first is float else (first,))
        if not sound or (first in (int, float) and not 0 < value < 2**31):
            raise ValueError(f"{field.name} is {value!r}, wanted {words[first]}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"not {what} ({error})") from error


class Head(nn.Module):
    """The vocabulary projection, with a weight (V, D) of its own."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))

    def forward(self, states: Tensor) -> Tensor:
        """states (..., D) -> logits (..., V)."""
        return linear(states, self.weight)


class TiedHead(Head):
    """The vocabulary projection whose weight is the token embedding's own tensor."""

    def __init__(self, embedding: nn.Embedding):
        nn.Module.__init__(self)
        self.weight = embedding.weight


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is one of an adapter, of either kind."""
    return "lora_" in name or ".adapter_" in name


class Bottleneck(nn.Module):
    """An adapter behind a sublayer, before its residual sum: x + up(gelu(down(x))) (Houlsby et al., 2019,
    arXiv:1902.00751, section 2.1). `up` begins at zero, so the model begins as it was. The norms stay frozen."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.down, self.up = lora.MergedLinear(width, inner), lora.MergedLinear(inner, width)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        self.up.weight.zero_()
        for layer in (self.down, self.up):
            if layer.bias is not None:
                layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return x + self.up(gelu(self.down(x)))


def bottleneck(width: int, config: LoRAConfig) -> nn.Module:
    """The Bottleneck that `config` asks for; nn.Identity, which has no parameter, where it asks for none."""
    return Bottleneck(width, config.bottleneck) if config.bottleneck else nn.Identity()


def reset_adapters(model: nn.Module) -> None:
    """Draw every adapter of the model anew."""
    for layer in lora.adapted_layers(model):
        layer.reset_lora_parameters()
    for module in model.modules():
        if isinstance(module, Bottleneck):
            module.reset_parameters()


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query (B, T, H, W), key and value (B, T, K, W), H/K queries to a key -> (B, T, H W)."""
    B, T, H, W = query.shape
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, H or K, T, W)
    if key.shape[1] != H:
        key, value = (repeat_heads(x, H // x.shape[1]) for x in (key, value))  # (B, H, T, W)
    y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return y.transpose(1, 2).reshape(B, T, H * W)


class Block(nn.Module, abc.ABC):
    """A transformer block around its attention, which whoever calls may do with a cache of keys and values."""

    @abc.abstractmethod
    def project(self, x: Tensor, places: Any) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., D), its Body.places() -> (query (..., H, W), key and value (..., K, W))."""

    @abc.abstractmethod
    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """The block's input x (..., D) and what attention found, y (..., H W) -> the block's output (..., D)."""

    def forward(self, x: Tensor, places: Any) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        return self.finish(x, causal_attention(*self.project(x, places)))


class Body(nn.Module, abc.ABC):
    """Everything up to and with the last norm."""

    # How training runs a block's function of its input (base.recompute.recomputed); None: it keeps what it computes.
    run_block: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] | None = None

    @property
    @abc.abstractmethod
    def blocks(self) -> Sequence[Block]: ...

    @property
    @abc.abstractmethod
    def last_norm(self) -> nn.Module: ...

    @abc.abstractmethod
    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids (..., T), their positions (T,) -> (..., T, D)."""

    def places(self, positions: Tensor) -> Any:
        """What every block needs to know of the positions (T,)."""
        return None

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) int64 -> states (B, T, D). Padding belongs on the right: attention is causal."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x, places = self.embed(ids, positions), self.places(positions)
        for block in self.blocks:
            if self.run_block is None:
                x = block(x, places)
            else:
                x = self.run_block(functools.partial(block.__call__, places=places), x)
        return self.last_norm(x)


class LanguageModel(nn.Module, abc.ABC):
    """A transformer and its head. The class attributes say how the family's parts are called.

    Guarantees: parameters are named "transformer." and the name that Hugging Face's file has behind HUGGING_FACE, and
    lm_head.weight where the head is not tied.
    """

    TITLE: ClassVar[str]  # "GPT-2"
    CONFIG: ClassVar[type]
    MODEL_TYPES: ClassVar[tuple[str, ...]]  # of config.json
    HUGGING_FACE: ClassVar[str]  # prefix of the transformer's weights in files of the whole model
    EMBEDDING: ClassVar[str]  # the token embedding's attribute of the transformer, and BLOCKS the list's of the blocks
    BLOCKS: ClassVar[str]
    # projection, as a path in a block -> its parts, equal slots of its outputs that may have an adapter
    PROJECTIONS: ClassVar[Mapping[str, tuple[str, ...]]]
    TRANSPOSED: ClassVar[bool]  # whether the projections' weights are stored as (in, out)
    WEIGHTS: ClassVar[re.Pattern]  # names of weights and adapters, without a prefix
    BUFFERS: ClassVar[re.Pattern]  # of constants that some files hold beside them

    config: Any
    lora_config: LoRAConfig
    transformer: Body
    lm_head: Head

    @classmethod
    @abc.abstractmethod
    def read_config(cls, content: Mapping[str, Any]) -> Any:
        """The config of Hugging Face's config.json; ValueError for what this family does not cover."""

    @classmethod
    @abc.abstractmethod
    def check_config(cls, values: Mapping[str, Any]) -> Any:
        """The config of the entry `config` of a checkpoint of ours; ValueError."""

    @classmethod
    def parts(cls) -> tuple[str, ...]:
        """Everything in a block that may have an adapter."""
        return tuple(part for parts in cls.PROJECTIONS.values() for part in parts)

    @property
    def embedding(self) -> nn.Embedding:
        return getattr(self.transformer, self.EMBEDDING)

    @property
    def tied(self) -> bool:
        return isinstance(self.lm_head, TiedHead)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) int64 -> logits (B, T, V)."""
        return self.lm_head(self.transformer(ids))

    def freeze_for_training(self) -> None:
        """Leave trainable what training changes: the adapters where there are any, else every parameter."""
        if self.lora_config.adapts:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(is_adapter(name))

    def keep_vocabulary(self, size: int) -> None:
        """Drop the rows of the embedding and the head behind the first `size`."""
        for weight in {self.embedding.weight, self.lm_head.weight}:
            weight.data = weight.data[:size].clone()
        self.config = dataclasses.replace(self.config, vocab_size=size)


def adapted(n_in: int, n_out: int, parts: Sequence[str], config: LoRAConfig, **options) -> lora.MergedLinear:
    """The projection of `parts`, with an adapter for each that `config` names. options: of MergedLinear."""
    return lora.MergedLinear(
        n_in,
        n_out,
        r=config.dim,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        enable_lora=tuple(part in config.targets for part in parts),
        rslora=config.rslora,
        **options,
    )
