"""The loss of a unit, and the projection onto the vocabulary, which is computed for scored positions alone.

The loss of one text is the mean over its scored tokens of (1-s) NLL + s mean_v(-log p_v), s = label smoothing; the loss
of a unit with several texts is the mean over them. It depends on no other unit.

Shapes: U units, M rows (= texts), T tokens, D width, V vocabulary, n scored positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from base import products
from base.device import upload
from base.products import fill_up, product
from language_model import LanguageModel

# Entries of a logits block: the block, and the passes over it, stay in a CPU's cache. A GPU wants few large launches.
CPU_BLOCK, GPU_BLOCK = 1 << 20, 1 << 28


@dataclass
class MicroBatch:
    """Some units of a logical batch, padded to one length.

    ids        (M, T) int64; rows_per_unit consecutive rows belong to one unit; padding on the right, any valid id
    positions  (n,) int64 into the flattened (M*T): the states from which a scored token is predicted, by unit
    targets    (n,) int64, the scored tokens
    weights    (n,) float32, 1/(scored tokens of the text x texts of the unit)
    counts     scored positions of each unit, U of them
    tokens     real tokens, padding not counted
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    counts: list[int]
    rows_per_unit: int
    tokens: int

    @property
    def units(self) -> int:
        return len(self.counts)

    @property
    def unit(self) -> Tensor:
        """(n,) int64: the unit of each scored position."""
        return self.positions // (self.ids.shape[1] * self.rows_per_unit)

    @property
    def texts(self) -> int:
        """Rows in which something is scored."""
        return len(torch.unique_consecutive(self.positions // self.ids.shape[1]))

    def split(self, units: int) -> Iterator["MicroBatch"]:
        """Parts of `units` units each, the last one filled up with units of which nothing is scored."""
        rows, T = units * self.rows_per_unit, self.ids.shape[1]
        ends = np.cumsum([0, *self.counts]).tolist()
        for first in range(0, self.units, units):
            counts = self.counts[first : first + units]
            begin, end = ends[first], ends[first + len(counts)]
            start = first * self.rows_per_unit
            yield MicroBatch(
                fill_up(self.ids[start : start + rows], rows),
                self.positions[begin:end] - start * T,
                self.targets[begin:end],
                self.weights[begin:end],
                counts + [0] * (units - len(counts)),
                self.rows_per_unit,
                self.tokens,
            )

    def to(self, device: torch.device) -> "MicroBatch":
        if device.type == "cpu":
            return self
        names = ("ids", "positions", "targets", "weights")
        return replace(self, **{name: upload(getattr(self, name), device) for name in names})


class LogitsLoss(torch.autograd.Function):
    """Token losses from logits (n, V); the gradient is written over the logits, so one buffer of that size is all."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        rows = row_chunk(logits)
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = torch.empty(len(logits), device=logits.device, dtype=wide)
        normaliser = torch.empty_like(losses)
        for start in range(0, len(logits), rows):
            part = logits[start : start + rows].to(wide)
            count = len(part)
            true = part.gather(1, targets[start : start + rows, None]).squeeze(1)
            if products.block_rows:  # a single row alone would be summed in another order
                part = fill_up(part, rows)
            lse = torch.logsumexp(part, dim=1)[:count]
            mean = part.mean(1)[:count] if smoothing else 0
            losses[start : start + rows] = lse - (1 - smoothing) * true - smoothing * mean
            normaliser[start : start + rows] = lse
        # Not by save_for_backward, whose version check would forbid the overwriting. Nothing else reads the buffer.
        ctx.logits, ctx.smoothing = logits, smoothing
        ctx.save_for_backward(targets, normaliser)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.logits is None:
            raise RuntimeError("the logits were overwritten by the first backward pass; run the forward pass again")
        logits, ctx.logits = ctx.logits, None
        targets, normaliser = ctx.saved_tensors
        V, rows = logits.shape[1], row_chunk(logits)
        for start in range(0, len(logits), rows):
            part = logits[start : start + rows]
            weight = grad[start : start + rows, None]
            p = part.to(normaliser.dtype)
            p.sub_(normaliser[start : start + rows, None]).exp_()
            if ctx.smoothing:
                p.sub_(ctx.smoothing / V)
            p.mul_(weight)
            p.scatter_add_(1, targets[start : start + rows, None], (ctx.smoothing - 1) * weight)
            if p is not part:
                part.copy_(p)
        return logits, None, None


def row_chunk(logits: Tensor) -> int:
    """Rows of a pass over logits (n, V)."""
    rows = max(1, (CPU_BLOCK if logits.device.type == "cpu" else GPU_BLOCK) // logits.shape[1])
    return min(rows, products.block_rows) if products.block_rows else rows


class FrozenHeadLoss(torch.autograd.Function):
    """Token losses of states (n, D) under a head (V, D) that is not trained; the logits are never held.

    The vocabulary is walked in blocks. Beside the running maximum m and normaliser Z, the running sum of
    exp(l_v - m) W_v is kept and rescaled when m grows (the online softmax of Milakov & Gimelshein, 2018). So the
    forward pass knows the gradient, d loss/d h = E_p[W] - (1-s) W[target] - s mean_v W_v, and computes nothing twice.
    """

    @staticmethod
    def forward(ctx, states: Tensor, head: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        n, D = states.shape
        V = len(head)
        kind = states.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        rows = products.block_rows or n
        block = max(256, (CPU_BLOCK if kind == "cpu" else GPU_BLOCK) // max(1, rows))
        parts = [fill_up(part, rows) for part in states.to(low).split(rows)]
        top = states.new_full((len(parts), rows, 1), float("-inf"))
        Z = states.new_zeros(len(parts), rows, 1)
        expected = states.new_zeros(len(parts), rows, D) if ctx.needs_input_grad[0] else None
        total = torch.zeros(D, device=states.device, dtype=states.dtype)
        for start in range(0, V, block):
            W = head[start : start + block].to(low)
            for k, h in enumerate(parts):
                logits = product(h, W).to(states.dtype)
                new_top = torch.maximum(top[k], logits.amax(1, keepdim=True))
                shrink = (top[k] - new_top).exp_()
                logits.sub_(new_top).exp_()
                Z[k].mul_(shrink).add_(logits.sum(1, keepdim=True))
                if expected is not None:
                    expected[k].mul_(shrink).add_(product(logits.to(low), W.T))
                top[k] = new_top
            if smoothing:
                total += W.sum(0, dtype=states.dtype)
        top, Z = top.view(-1, 1)[:n], Z.view(-1, 1)[:n]
        expected = None if expected is None else expected.view(-1, D)[:n]
        true_rows, mean_row = head[targets].to(states.dtype), total / V
        true, mean = (states * true_rows).sum(1), (states * mean_row).sum(1)
        losses = (top + Z.log()).squeeze(1) - (1 - smoothing) * true - smoothing * mean
        if expected is not None:
            ctx.save_for_backward(expected.div_(Z).sub_(true_rows, alpha=1 - smoothing).sub_(mean_row, alpha=smoothing))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (d_states,) = ctx.saved_tensors
        return d_states * grad[:, None], None, None, None


def token_losses(
    model: LanguageModel, batch: MicroBatch, smoothing: float, head_trains: bool, all_positions: bool
) -> Tensor:
    """The loss of each scored token, (n,).

    head_trains: the head needs a gradient, so the logits of what is scored are held for it.
    all_positions: run the head over every position, in the (M, T, D) layout that Opacus's hooks take for samples.
    """
    states = model.transformer(batch.ids)
    if all_positions:
        return LogitsLoss.apply(model.lm_head(states).flatten(0, 1)[batch.positions], batch.targets, smoothing)
    states = states.flatten(0, 1)[batch.positions]
    if head_trains:
        return LogitsLoss.apply(model.lm_head(states), batch.targets, smoothing)
    return FrozenHeadLoss.apply(states, model.lm_head.weight, batch.targets, smoothing)


def unit_losses(
    model: LanguageModel,
    batch: MicroBatch,
    smoothing: float = 0.0,
    head_trains: bool = False,
    all_positions: bool = False,
) -> Tensor:
    """The loss of each unit, (U,)."""
    weighted = token_losses(model, batch, smoothing, head_trains, all_positions) * batch.weights
    return torch.zeros(batch.units, device=weighted.device, dtype=weighted.dtype).index_add(0, batch.unit, weighted)
