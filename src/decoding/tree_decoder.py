"""A language model, one token at a time, with a key-value cache that the beams of a context share.

The hypotheses of one context are a tree: the context is the trunk, every generated token a node. Keys and values are
stored once a node and do not move when beams are reordered. A row of booleans says which nodes a hypothesis sees, and a
reordering copies those rows. Nodes that no hypothesis sees any more are removed when room is needed.

Shapes: S slots (contexts), K beams, L nodes a slot, R rows (live hypotheses), B new contexts, T tokens, D width,
H heads, N heads of keys and values (each serves H/N queries; a GPT-2 has as many), W width of a head.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from base.device import read_back
from decoding.packed_model import PackedModel
from language_model import LanguageModel, causal_attention

# Steps for which make_room() makes room. Few mean frequent copies of the live nodes, many a longer dead part to read.
SPARE_STEPS = 4


class TreeDecoder(PackedModel):
    """A language model with its adapters merged, and the cache of the contexts that it is decoding."""

    def __init__(self, model: LanguageModel, slots: int, beam: int):
        """Takes the weights in the device and dtype that they have; the model's adapters are merged and stay so.

        slots: contexts at once; beam: hypotheses of each at most.
        """
        super().__init__(model)
        self.slots, self.beam, dtype = slots, beam, model.lm_head.weight.dtype
        self.room = 0  # L
        self.kv = torch.empty(len(self.blocks), slots, 0, 2 * self.heads * self.width, dtype=dtype, device=self.device)
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

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.kv[layer].flatten(0, 1)[target] = torch.cat([key.flatten(1), value.flatten(1)], dim=1)[source]
            return causal_attention(*(x.unflatten(0, (B, T)) for x in (query, key, value))).flatten(0, 1)

        x = self.run_blocks(self.indices(ids.ravel()), self.indices(np.tile(np.arange(T), B)), attend)
        x = x[self.indices(np.arange(B) * T + lengths - 1)]
        self.visible[self.indices(slots), 0, :T] = self.indices(real)
        self.used[slots] = self.depth[slots] = lengths
        return self.body.last_norm(x)

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
        S, K, N, W = len(self.used), self.beam, self.heads, self.width
        bias = torch.zeros(S, K, reach, dtype=self.kv.dtype, device=self.device)
        bias.masked_fill_(~self.visible[:, :, :reach], -torch.inf)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            """A head of keys serves its queries of all beams at once, as rows of one product: it is not repeated."""
            self.kv[layer].flatten(0, 1)[node_at] = torch.cat([key.flatten(1), value.flatten(1)], dim=1)
            G = query.shape[1] // N  # queries to a key
            queries = torch.zeros(S, K, N, G, W, dtype=self.kv.dtype, device=self.device)
            queries[at, place] = query.unflatten(1, (N, G))
            queries = queries.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (S, N, G K, W)
            key, value = self.kv[layer, :, :reach].view(S, reach, 2, N, W).permute(2, 0, 3, 1, 4)  # (S, N, L, W)
            y = F.scaled_dot_product_attention(queries, key, value, attn_mask=bias.repeat(1, G, 1)[:, None])
            return y.unflatten(2, (G, K)).permute(0, 3, 1, 2, 4)[at, place].flatten(1)  # (R, H W)

        return self.body.last_norm(self.run_blocks(self.indices(tokens), self.indices(depth), attend))

    def make_room(self, slots: np.ndarray, wanted: np.ndarray) -> None:
        """See that each of the slots can take `wanted` nodes more; if not, remove the nodes that nobody sees."""
        if (self.used[slots] + wanted).max() <= self.room:
            return
        live = self.visible.any(1)  # (S, L)
        self.used = read_back("beam room", live.sum(1)).numpy()
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
