"""A language model, one token at a time, for samples: each slot's cache is one line of tokens.

The states of a sample must have the same bits whatever the other slots hold, so that a seed gives the same texts in any
batch. Hence every kernel gets shapes that depend on the sample alone:
- products and activations run on `rows` rows at a time (FixedLinear, row_blocks());
- a slot attends to its own length, rounded up to a multiple of REACH; neighbours with the same reach share a call, in
  which the CPU's and the GPU's kernels treat each slot and head by itself;
- a context is read by itself, and its keys and values are copied to all its samples.

Shapes: S slots, L positions, R rows (slots at work), B contexts, T tokens, D width, H heads, N heads of keys and
values, W width of a head.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from base.products import FixedLinear, row_blocks
from decoding.packed_model import PackedModel
from language_model import LanguageModel, causal_attention

# Rows of one product at most: more reach a higher rate, fewer waste less at the end. On one core of an Intel Xeon,
# 768 x 3072: 83 GFLOP/s with 32 rows, 107 with 64, 129 with 128, 141 with 256.
ROWS = {"cpu": 128, "cuda": 256}
REACH = 32  # attention reads keys in multiples of it
READ_TOKENS = 4096  # tokens of contexts that are read at once, which bounds the activations


def rows_for(samples: int, device: torch.device) -> int:
    """Rows of a product for a run of so many samples, those included that other ranks draw or that are drawn already:
    the bits depend on it."""
    return min(ROWS[device.type], max(8, 1 << (samples - 1).bit_length()))


class LineDecoder(PackedModel):
    """A language model with its adapters merged, and the cache of the samples in work."""

    def __init__(self, model: LanguageModel, slots: int, length: int, rows: int):
        """slots: samples at once; length: the most tokens that one may have, with its context; rows: of rows_for()."""
        device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        self.rows = rows
        super().__init__(model, functools.partial(FixedLinear, rows=self.rows))
        self.slots, self.room = slots, -(-length // REACH) * REACH  # S, L
        # keys and values, each head's positions one after the other
        shape = (len(self.blocks), 2, slots, self.heads, self.room, self.width)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.used = np.zeros(slots, int)  # positions of each slot
        # context -> (keys and values (layers, 2, N, T, W), state (D,)), of those whose samples may still come
        self.known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self.table = self.body.places(torch.arange(self.room, device=device))
        self.read_tokens = self.stepped_tokens = 0  # through the layers so far

    def places(self, positions: Tensor) -> Any:
        """A row of a table: computed for the rows of a step, a cosine's last bit would depend on its place there."""
        return None if self.table is None else tuple(part[positions] for part in self.table)

    def admit(self, slots: np.ndarray, contexts: Sequence[tuple[int, ...]]) -> Tensor:
        """Forget what the slots held, put a context into each; the states (len(slots), D) of their last positions."""
        self.known = {context: self.known[context] for context in {*contexts} & self.known.keys()}
        part: list[tuple[int, ...]] = []
        for context in dict.fromkeys(contexts):
            if context in self.known:
                continue
            if part and sum(map(len, part)) + len(context) > READ_TOKENS:
                self.read(part)
                part = []
            part.append(context)
        if part:
            self.read(part)
        states = []
        for slot, context in zip(slots, contexts, strict=True):
            kv, state = self.known[context]
            self.kv[:, :, slot, :, : len(context)] = kv
            self.used[slot] = len(context)
            states.append(state)
        self.known = {contexts[-1]: self.known[contexts[-1]]}  # the next samples may be of the same context
        return torch.stack(states)

    def read(self, contexts: list[tuple[int, ...]]) -> None:
        """Add contexts to the known ones: their tokens are rows one after the other, without padding."""
        ends = np.cumsum([len(context) for context in contexts])
        bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        ids = self.indices(np.concatenate([np.array(context) for context in contexts]))
        positions = self.indices(np.concatenate([np.arange(len(context)) for context in contexts]))
        kv = self.kv.new_empty(len(self.kv), 2, self.heads, len(ids), self.width)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            kv[layer, 0], kv[layer, 1] = key.transpose(0, 1), value.transpose(0, 1)
            return torch.cat([causal_attention(*(x[None, a:b] for x in (query, key, value)))[0] for a, b in bounds])

        with row_blocks(self.rows):
            x = self.run_blocks(ids, positions, attend)
            states = self.body.last_norm(x[self.indices(ends - 1)])
        self.read_tokens += len(ids)
        for context, (a, b), state in zip(contexts, bounds, states, strict=True):
            self.known[context] = (kv[:, :, :, a:b].clone(), state)

    def advance(self, slots: np.ndarray, tokens: np.ndarray) -> Tensor:
        """Append tokens[r] to slots[r], both (R,), ascending by slot; states (R, D)."""
        positions = self.used[slots]
        self.used[slots] += 1
        self.stepped_tokens += len(slots)
        at, place = self.indices(slots), self.indices(positions)
        runs = self.runs(slots)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self.kv[layer]  # (S, N, L, W) each
            keys[at, :, place], values[at, :, place] = key, value
            found = []
            for a, b, slot, reach, bias in runs:
                queries = query[a:b].unflatten(1, (self.heads, -1))  # (n, N, H/N, W)
                own = slice(slot, slot + b - a)
                y = F.scaled_dot_product_attention(
                    queries, keys[own, :, :reach], values[own, :, :reach], attn_mask=bias
                )
                found.append(y.flatten(1))
            return torch.cat(found)  # (R, H W)

        with row_blocks(self.rows):
            return self.body.last_norm(self.run_blocks(self.indices(tokens), place, attend))

    def runs(self, slots: np.ndarray) -> list[tuple[int, int, int, int, Tensor]]:
        """Rows a to b of neighbouring slots from `slot` on that have one reach: (a, b, slot, reach, mask (n, 1, 1,
        reach))."""
        reach = -(-self.used[slots] // REACH) * REACH
        cuts = np.flatnonzero((np.diff(slots) != 1) | (np.diff(reach) != 0)) + 1
        used, found = self.indices(self.used[slots]), []
        for a, b in zip([0, *cuts], [*cuts, len(slots)], strict=True):
            hidden = torch.arange(reach[a], device=self.device) >= used[a:b, None]
            bias = torch.zeros(hidden.shape, dtype=self.kv.dtype, device=self.device).masked_fill_(hidden, -torch.inf)
            found.append((int(a), int(b), int(slots[a]), int(reach[a]), bias[:, None, None]))
        return found
