"""A language model whose weights are laid out for decoding: what beam search and sampling share.

Shapes: R rows, D width, H heads, N heads of keys and values, W width of a head.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import loralib as lora
from base.device import upload
from base.products import PackedLinear
from decoding.top_k_head import TopKHead
from language_model import Block, LanguageModel

# (layer, query (rows, H, W), key and value (rows, N, W)) -> (rows, H W)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Product = Callable[[Tensor], Tensor]  # (rows, in) -> (rows, out)
Layout = Callable[[Tensor, Tensor | None], Product]  # of a weight (out, in) and a bias


def twin_of(module: torch.nn.Module, **replaced: object) -> Any:
    """A copy of a module that has other parts in place of some, and none of their weights; the rest is shared."""
    twin = copy.copy(module)
    twin._modules = {name: part for name, part in module._modules.items() if name not in replaced}
    for name, part in replaced.items():
        object.__setattr__(twin, name, part)
    return twin


def packed(block: Block, model: LanguageModel, linear: Layout) -> Block:
    """A block of the model whose projections are laid out by `linear`."""
    parts: dict[str, dict[str, Product]] = {}  # the part of the block -> its projections
    for path in model.PROJECTIONS:
        part, _, name = path.rpartition(".")
        layer = block.get_submodule(path)
        weight = layer.weight.T if model.TRANSPOSED else layer.weight
        parts.setdefault(part, {})[name] = linear(weight, layer.bias)
    return twin_of(block, **{part: twin_of(block.get_submodule(part), **layers) for part, layers in parts.items()})


class PackedModel:
    """A language model with its adapters merged, one token a row; its decoders add the cache."""

    def __init__(self, model: LanguageModel, linear: Layout = PackedLinear):
        """Takes the weights in the device and dtype that they have; the model's adapters are merged and stay so."""
        lora.merge(model)
        model.requires_grad_(False)
        self.head = TopKHead(model.lm_head.weight, linear=linear)
        self.blocks = [packed(block, model, linear) for block in model.transformer.blocks]
        replaced: dict[str, object] = {model.BLOCKS: self.blocks}
        if model.tied:  # the head's copy serves both
            table = self.head.groups.view(-1, model.lm_head.weight.shape[1])
            replaced[model.EMBEDDING] = lambda ids: table[ids]
        self.body = twin_of(model.transformer, **replaced)
        self.heads, self.width = model.config.key_heads, model.config.head_width  # N, W
        self.device = model.lm_head.weight.device

    def places(self, positions: Tensor) -> Any:
        return self.body.places(positions)

    def run_blocks(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Tokens (rows,) at positions (rows,) -> (rows, D): every position-wise part is here, attention in `attend`."""
        x, places = self.body.embed(ids, positions), self.places(positions)
        for layer, block in enumerate(self.blocks):
            x = block.finish(x, attend(layer, *block.project(x, places)))
        return x

    def indices(self, array: np.ndarray) -> Tensor:
        return upload(torch.from_numpy(np.ascontiguousarray(array)), self.device)
