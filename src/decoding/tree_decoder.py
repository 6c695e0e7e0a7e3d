"""GPT-2, one token at a time, with a key-value cache that the beams of a context share.

The hypotheses of one context are a tree: the context is the trunk, every generated token a node. Keys and values are
stored once a node and do not move when beams are reordered. A row of booleans says which nodes a hypothesis sees, and a
reordering copies those rows. Nodes that no hypothesis sees any more are removed when room is needed.

Shapes: S slots (contexts), K beams, L nodes a slot, R rows (live hypotheses), B new contexts, T tokens, D width,
H heads.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import loralib as lora
from base.products import PackedLinear
from decoding.top_k_head import TopKHead
from model import GPT2LMModel

# Steps for which make_room() makes room. Few mean frequent copies of the live nodes, many a longer dead part to read.
SPARE_STEPS = 4
Attend = Callable[[int, Tensor], Tensor]  # (layer, its fused query, key, value (rows, 3D)) -> (rows, D)


class PackedBlock:
    """The weights of one transformer block, laid out for products with few rows."""

    def __init__(self, block: torch.nn.Module):
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        layers = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        self.qkv, self.projection, self.up, self.down = (PackedLinear(layer.weight.T, layer.bias) for layer in layers)


class TreeDecoder:
    """A GPT-2 with its adapters merged, and the cache of the contexts that it is decoding."""

    def __init__(self, model: GPT2LMModel, slots: int, beam: int):
        """Takes the weights in the device and dtype that they have; the model's adapters are merged and stay so.

        slots: contexts at once; beam: hypotheses of each at most.
        """
        lora.merge(model)
        model.requires_grad_(False)
        self.config, self.slots, self.beam = model.config, slots, beam
        body = model.transformer
        self.position_embedding, self.ln_f = body.wpe.weight, body.ln_f
        self.blocks = [PackedBlock(block) for block in body.h]
        self.head = TopKHead(model.lm_head.weight)
        self.token_embedding = self.head.groups.view(-1, self.config.n_embd)  # tied: the head's copy serves both
        self.device, dtype = self.token_embedding.device, self.token_embedding.dtype
        self.room = 0  # L
        self.kv = torch.empty(len(self.blocks), slots, 0, 2 * self.config.n_embd, dtype=dtype, device=self.device)
        self.visible = torch.zeros(slots, beam, 0, dtype=torch.bool, device=self.device)  # (S, K, L)
        self.used = np.zeros(slots, int)  # nodes of each slot
        self.depth = np.zeros(slots, int)  # tokens that each of the slot's hypotheses has

    def admit(self, slots: np.ndarray, contexts: list[Sequence[int]]) -> Tensor:
        """Read one context into each of the slots; returns the states (B, D) of their last positions."""
        lengths = np.array([len(context) for context in contexts])
        B, T = len(contexts), int(lengths.max())
        self.visible[self.indices(slots)] = False
        self.used[slots] = self.depth[slots] = 0
        self.make_room(slots, lengths)
        ids = np.zeros((B, T), np.int64)
        for row, context in zip(ids, contexts, strict=True):
            row[: len(context)] = context
        real = np.arange(T) < lengths[:, None]  # (B, T): padding is on the right, where causal attention ignores it
        row, position = np.nonzero(real)
        source, target = self.indices(row * T + position), self.indices(slots[row] * self.room + position)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            self.kv[layer].flatten(0, 1)[target] = qkv[source, self.config.n_embd :]
            query, key, value = qkv.view(B, T, 3, self.config.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
            y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            return y.transpose(1, 2).reshape(B * T, -1)

        x = self.embed(self.indices(ids.ravel()), self.indices(np.tile(np.arange(T), B)))
        x = self.run_blocks(x, attend)[self.indices(np.arange(B) * T + lengths - 1)]
        self.visible[self.indices(slots), 0, :T] = self.indices(real)
        self.used[slots] = self.depth[slots] = lengths
        return self.ln_f(x)

    def advance(self, slots: np.ndarray, places: np.ndarray, parents: np.ndarray, tokens: np.ndarray) -> Tensor:
        """One token more for every row; see beam_search.Decoder.advance. Returns states (R, D)."""
        present, first, added = np.unique(slots, return_index=True, return_counts=True)
        self.make_room(present, added)
        node = self.used[slots] + np.arange(len(slots)) - np.repeat(first, added)
        depth = self.depth[slots]
        self.used[present] += added
        self.depth[present] += 1
        reach = int(self.used[present].max())  # nodes beyond are unused in every slot

        at, place, node_at = self.indices(slots), self.indices(places), self.indices(slots * self.room + node)
        seen = self.visible[at, self.indices(parents)]  # (R, L)
        seen[torch.arange(len(slots), device=self.device), self.indices(node)] = True
        self.visible.zero_()
        self.visible[at, place] = seen
        S, D, H = len(self.used), self.config.n_embd, self.config.n_head
        bias = torch.zeros(S, 1, self.beam, reach, dtype=self.kv.dtype, device=self.device)
        bias.masked_fill_(~self.visible[:, None, :, :reach], -torch.inf)
        queries = torch.zeros(S, self.beam, D, dtype=self.kv.dtype, device=self.device)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            self.kv[layer].flatten(0, 1)[node_at] = qkv[:, D:]
            queries[at, place] = qkv[:, :D]
            query = queries.view(S, self.beam, H, D // H).transpose(1, 2)  # (S, H, K, D/H)
            key, value = self.kv[layer, :, :reach].view(S, reach, 2, H, D // H).permute(2, 0, 3, 1, 4)  # (S, H, L, D/H)
            y = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
            return y.transpose(1, 2)[at, place].view(-1, D)

        return self.ln_f(self.run_blocks(self.embed(self.indices(tokens), self.indices(depth)), attend))

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.token_embedding[tokens] + self.position_embedding[positions]  # (rows, D)

    def run_blocks(self, x: Tensor, attend: Attend) -> Tensor:
        """x (rows, D) -> (rows, D): every position-wise part runs here, attention in `attend`."""
        for layer, block in enumerate(self.blocks):
            x = x + block.projection(attend(layer, block.qkv(block.ln_1(x))))
            x = x + block.down(F.gelu(block.up(block.ln_2(x)), approximate="tanh"))
        return x

    def make_room(self, slots: np.ndarray, wanted: np.ndarray) -> None:
        """See that each of the slots can take `wanted` nodes more; if not, remove the nodes that nobody sees."""
        if (self.used[slots] + wanted).max() <= self.room:
            return
        live = self.visible.any(1)  # (S, L)
        self.used = live.sum(1).cpu().numpy()
        needed = self.used.copy()
        needed[slots] += wanted
        room = int(needed.max()) + SPARE_STEPS * self.beam
        kept = int(self.used.max())
        order = (~live).to(torch.int8).argsort(dim=1, stable=True)[:, :kept]  # (S, kept): live nodes first
        kv = self.kv.new_zeros(len(self.kv), len(order), room, self.kv.shape[-1])
        for layer, old in enumerate(self.kv):
            kv[layer, :, :kept] = old[torch.arange(len(order), device=self.device)[:, None], order]
        visible = self.visible.new_zeros(len(order), self.beam, room)
        visible[:, :, :kept] = self.visible.gather(2, order[:, None].expand(-1, self.beam, -1))
        self.kv, self.visible, self.room = kv, visible, room

    def indices(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
