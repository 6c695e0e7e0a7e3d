"""The head of a language model: all logits for sampling, or for beam search a step's best pairs, without an array of
all log-probabilities.

For the pairs one pass over the vocabulary, in blocks that stay in the processor's cache, gives for every row the sum of
exponentials (as running maximum and rescaled sum: Milakov & Gimelshein, 2018, "Online normalizer calculation for
softmax") and the maximum of every group of GROUP tokens. The k best pairs of a context lie in its k best groups, since
each group outside them has k groups with a better maximum; the logits of those groups alone are computed again.

Shapes: R rows (live hypotheses), A contexts, K beams, D width, V vocabulary, G groups.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from base.device import read_back, upload
from base.products import PackedLinear

GROUP = 64
CPU_BLOCK = 2048  # tokens: with 300 rows a block of logits is 2.4 MB; up to 6144 it measures 8 % slower
LOWEST = -3e38  # stands for a maximum of nothing, so that -inf minus it is -inf and not NaN


@dataclass(frozen=True)
class Edits:
    """Changes to the logits: penalised (2, n) and banned (2, n) hold (row, token) pairs; repeats do no harm."""

    penalised: np.ndarray
    banned: np.ndarray
    penalty: float


class TopKHead:
    """A language model's head that projects states onto the vocabulary and keeps a step's best pairs alone."""

    def __init__(self, weight: Tensor, block: int | None = None, linear: Callable[..., Any] = PackedLinear):
        """weight (V, D), copied; a packed copy is kept too. block: tokens a block, a multiple of GROUP. linear: lays a
        weight out for products, as PackedLinear does."""
        self.size, width = weight.shape
        if block is None:
            block = CPU_BLOCK if weight.device.type == "cpu" else math.ceil(self.size / GROUP) * GROUP
        padding = -self.size % GROUP
        self.groups = F.pad(weight, (0, 0, 0, padding)).view(-1, GROUP, width)  # (G, GROUP, D)
        padded = self.groups.view(-1, width)
        self.starts = range(0, len(padded), block)
        self.blocks = [linear(padded[start : start + block], None) for start in self.starts]

    def logits(self, states: Tensor) -> np.ndarray:
        """states (R, D) -> logits (R, V rounded up to whole groups) float32 on the host, -inf behind the vocabulary."""
        found = np.empty((len(states), len(self.groups) * GROUP), np.float32)
        for start, project in zip(self.starts, self.blocks, strict=True):
            part = project(states).float()
            found[:, start : start + part.shape[1]] = read_back("samples", part).numpy()
        found[:, self.size :] = -np.inf
        return found

    def best_pairs(
        self,
        states: Tensor,
        score: np.ndarray,
        context: np.ndarray,
        place: np.ndarray,
        contexts: int,
        beam: int,
        edits: Edits,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The `beam` best (hypothesis, token) pairs of each context, best first.

        states (R, D); score (R,) float32, total log2-probability so far; context (R,) in [0, contexts) and place (R,)
        in [0, beam): whose row and which of its beams. Returns (total, parent, token), each (contexts, beam): the new
        total in bits, -inf where there is no pair, the place of the hypothesis and the token.
        """
        device, rows = states.device, len(states)
        x = (states.float() * math.log2(math.e)).to(states.dtype)  # logits in bits: exp2 costs a quarter of exp
        group_max, log_sum = self.scan(x, edits)  # (R, G), (R, 1)

        score = upload(torch.from_numpy(score), device)[:, None]
        flat = upload(torch.from_numpy(context * beam + place), device)  # (R,) the row's cell among all contexts' beams
        row_of = torch.zeros(contexts * beam, dtype=torch.long, device=device)
        row_of[flat] = torch.arange(rows, device=device)
        G = len(self.groups)
        totals = torch.full((contexts * beam, G), -math.inf, device=device)
        totals[flat] = group_max + (score - log_sum)
        best, cell = totals.view(contexts, beam * G).topk(beam, sorted=False)  # (A, K)
        group = cell % G
        parent = cell // G + torch.arange(contexts, device=device)[:, None] * beam  # (A, K) as in `flat`
        row = row_of[parent.flatten()]  # (A*K,)

        group = group.flatten()
        logits = torch.bmm(self.groups[group], x[row][:, :, None])[:, :, 0].float()  # (A*K, GROUP)
        tokens = group[:, None] * GROUP + torch.arange(GROUP, device=device)
        there = best.flatten() > -math.inf  # not an empty cell, whose `row` is another's
        self.edit_groups(logits, row, group, there, rows, edits)
        impossible = (tokens >= self.size) | ~there[:, None]
        totals = (logits - log_sum[row]).clamp_(max=0.0) + score[row]  # (A*K, GROUP); a log-probability is at most 0
        totals = totals.masked_fill_(impossible, -math.inf).view(contexts, beam * GROUP)
        total, cell = totals.topk(beam)
        parent = (parent % beam).gather(1, cell // GROUP)
        token = tokens.view(contexts, -1).gather(1, cell)
        # In one array, exact in float64, for one read.
        total, parent, token = read_back(
            "beams", torch.stack([total.double(), parent.double(), token.double()])
        ).numpy()
        return total.astype(np.float32), parent.astype(np.int64), token.astype(np.int64)

    def scan(self, x: Tensor, edits: Edits) -> tuple[Tensor, Tensor]:
        """x (R, D) -> the maximum logit of every group (R, G), log2 of the sum of exp2 over the vocabulary (R, 1)."""
        rows, device = len(x), x.device
        group_max = torch.empty(rows, len(self.groups), device=device)
        top = torch.full((rows, 1), LOWEST, device=device)
        total = torch.zeros(rows, 1, device=device)
        penalised, banned = self.by_block(edits.penalised, device), self.by_block(edits.banned, device)
        for i, (start, project) in enumerate(zip(self.starts, self.blocks, strict=True)):
            logits = project(x).float()  # (R, block)
            if start + logits.shape[1] > self.size:
                logits[:, self.size - start :] = -math.inf
            if (pairs := penalised[i]) is not None:
                penalise(logits, *pairs, edits.penalty)
            if (pairs := banned[i]) is not None:
                logits[*pairs] = -math.inf
            block_max = logits.view(rows, -1, GROUP).amax(-1)
            group_max[:, start // GROUP : start // GROUP + block_max.shape[1]] = block_max
            higher = torch.maximum(top, block_max.amax(-1, keepdim=True))
            total = total * torch.exp2(top - higher) + logits.sub_(higher).exp2_().sum(-1, keepdim=True)
            top = higher
        return group_max, top + total.clamp_(min=1e-38).log2()

    def by_block(self, pairs: np.ndarray, device: torch.device) -> list[tuple[Tensor, Tensor] | None]:
        """(row, token) pairs -> for each block None or (row, column in the block)."""
        if not pairs.shape[1]:
            return [None] * len(self.starts)
        row, token = pairs[:, np.argsort(pairs[1])]
        bounds = np.searchsorted(token, [*self.starts, self.size])
        row, token = upload(torch.from_numpy(row), device), upload(torch.from_numpy(token), device)
        return [
            (row[a:b], token[a:b] - start) if a < b else None
            for start, a, b in zip(self.starts, bounds[:-1], bounds[1:], strict=True)
        ]

    def edit_groups(self, logits: Tensor, row: Tensor, group: Tensor, there: Tensor, rows: int, edits: Edits) -> None:
        """Apply the edits to recomputed groups, in place: logits (n, GROUP) holds group[i] of row[i] where there[i]."""
        if not edits.penalised.shape[1] and not edits.banned.shape[1]:
            return
        device = logits.device
        # (R + 1, G) the group's place in `logits`, or -1; groups that are not there write into the last row, which
        # nobody reads: no index depends on how many there are, which the device would have to be asked for
        where = torch.full((rows + 1, len(self.groups)), -1, device=device)
        where[torch.where(there, row, rows), group] = torch.arange(len(row), device=device)
        for pairs, is_ban in ((edits.penalised, False), (edits.banned, True)):
            pair_row, token = upload(torch.from_numpy(pairs), device)
            named = torch.zeros(len(logits) + 1, GROUP, dtype=torch.bool, device=device)
            named[where[pair_row, token // GROUP], token % GROUP] = True  # place -1 is the last row
            changed = -math.inf if is_ban else penalised(logits, edits.penalty)
            logits.copy_(torch.where(named[:-1], changed, logits))


def penalise(logits: Tensor, row: Tensor, column: Tensor, penalty: float) -> None:
    """The repetition penalty of Keskar et al. (2019, CTRL, section 4.1), in place. A pair named twice counts once."""
    logits[row, column] = penalised(logits[row, column], penalty)


def penalised(logits: Tensor, penalty: float) -> Tensor:
    return torch.where(logits < 0, logits * penalty, logits / penalty)
