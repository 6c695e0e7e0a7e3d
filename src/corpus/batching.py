"""How drawn units become micro-batches: texts side by side, padded to one length.

A private run cuts by PublicLengths: a unit's texts are padded to a length that follows from the unit and from public
figures alone, so that one more unit in the draw changes nothing in how the others are computed. Evaluation, and
training without privacy, cut by TightCut, which looks at all that was drawn and pads least.

Shapes: M rows (= texts), U units, T padded inputs of a text (its tokens without the last, which is a target only).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from losses import MicroBatch

# What a micro-batch costs beside its tokens, as a share of the token budget: on 2 cores GPT-2 small takes 0.35 s more
# for each of them, the time of about 100 tokens of 2,048 (LoRA, measured over budgets 512 to 4,096).
START_COST = 0.05
GRAIN = 8  # public lengths are multiples of it
GROWTH = 1.25  # of neighbouring public lengths where no public figures say how long texts are


class Cut(Protocol):
    """A way to cut texts of `inputs` tokens (ascending) into slices, each with the length T that it is padded to."""

    @property
    def token_budget(self) -> int: ...

    def groups(self, inputs: np.ndarray, rows_per_unit: int = 1) -> Iterator[tuple[slice, int]]: ...


@dataclass(frozen=True)
class TightCut:
    """The cheapest cut of what was drawn into micro-batches of at most `token_budget` padded tokens, or of one unit."""

    token_budget: int

    def groups(self, inputs: np.ndarray, rows_per_unit: int = 1) -> Iterator[tuple[slice, int]]:
        for group in groups_within(inputs, self.token_budget // rows_per_unit):
            yield group, max(1, int(inputs[group.stop - 1]))


@dataclass(frozen=True)
class PublicLengths:
    """Texts go with those of their own length class: each is padded to the smallest of `lengths` (ascending) that holds
    it, whatever else was drawn. At most `token_budget` padded tokens, or one unit, are a micro-batch."""

    lengths: tuple[int, ...]
    token_budget: int

    def groups(self, inputs: np.ndarray, rows_per_unit: int = 1) -> Iterator[tuple[slice, int]]:
        if len(inputs) and inputs[-1] > self.lengths[-1]:
            raise ValueError(f"a text of {inputs[-1]} inputs: expected at most {self.lengths[-1]}")
        ends = np.searchsorted(inputs, self.lengths, side="right")
        for T, begin, end in zip(self.lengths, np.concatenate([[0], ends[:-1]]), ends, strict=True):
            units = max(1, self.token_budget // (T * rows_per_unit))
            for start in range(int(begin), int(end), units):
                yield slice(start, min(start + units, int(end))), T


def choose_lengths(
    public: np.ndarray | None, longest: int, units: float, token_budget: int, filler: float, rows_per_unit: int = 1
) -> tuple[int, ...]:
    """The lengths of PublicLengths: those of the least expected cost for a draw of `units` units a rank.

    public   (n,) lengths of texts that the run does not protect, such as its validation data; None or empty: unknown
    longest  inputs of the longest text that may come
    filler   tokens of zeros that base.products.row_blocks() adds to a micro-batch on the average

    Dynamic programming over multiples of GRAIN up to the longest public text: a class costs its padded tokens, and for
    every micro-batch what starting one costs. Beyond, and where nothing is public, each length is GROWTH times the one
    before: rare texts cost little whatever they are padded to.
    """
    ladder = np.minimum(np.arange(GRAIN, longest + GRAIN, GRAIN), longest)
    chosen: list[int] = []
    if public is not None and len(public):
        places = np.searchsorted(ladder, np.minimum(public, longest))
        counts = np.bincount(places, minlength=len(ladder))
        known = int(np.flatnonzero(counts)[-1]) + 1
        drawn = np.concatenate([[0], units * np.cumsum(counts) / len(public)])  # expected units up to each length
        start_cost = token_budget * START_COST + filler
        cost, begin = np.zeros(known + 1), np.zeros(known + 1, dtype=np.int64)
        for end in range(1, known + 1):
            T, expected = int(ladder[end - 1]), drawn[end] - drawn[:end]
            tokens = expected * T * rows_per_unit
            started = np.maximum(-np.expm1(-expected), tokens / token_budget)  # 1 - exp(-x): a draw is not empty
            costs = cost[:end] + tokens + start_cost * started
            begin[end] = int(costs.argmin())
            cost[end] = costs[begin[end]]
        end = known
        while end > 0:
            chosen.append(int(ladder[end - 1]))
            end = int(begin[end])
    lengths = chosen[::-1]
    while not lengths or lengths[-1] < longest:
        following = GRAIN if not lengths else max(lengths[-1] + GRAIN, GRAIN * math.ceil(lengths[-1] * GROWTH / GRAIN))
        lengths.append(min(following, longest))
    return tuple(lengths)


def collate(
    tokens: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    first_scored: np.ndarray,
    T: int,
    rows_per_unit: int = 1,
) -> MicroBatch:
    """A micro-batch of texts, padded to T inputs: tokens[starts[m] : starts[m] + lengths[m]] is row m, scored from its
    token first_scored[m] on; rows_per_unit consecutive ones belong to a unit."""
    inputs = lengths - 1  # the last token of a text is a target only: no state is computed for it
    columns = np.arange(T)
    real = columns < inputs[:, None]
    source = starts[:, None] + columns
    ids = np.where(real, tokens[np.where(real, source, 0)], 0)
    scored = real & (columns >= first_scored[:, None] - 1)  # a state predicts the token after it
    counts = scored.sum(1)
    return MicroBatch(
        ids=torch.from_numpy(ids.astype(np.int64)),
        positions=torch.from_numpy(np.flatnonzero(scored)),
        targets=torch.from_numpy(tokens[source[scored] + 1].astype(np.int64)),
        weights=torch.from_numpy(np.repeat(1 / (np.maximum(counts, 1) * rows_per_unit), counts).astype(np.float32)),
        counts=counts.reshape(-1, rows_per_unit).sum(1).tolist(),
        rows_per_unit=rows_per_unit,
        tokens=int(lengths.sum()),
    )


def groups_within(lengths: Sequence[int] | np.ndarray, token_budget: int) -> list[slice]:
    """Cut `lengths` (of the texts' inputs, ascending) into slices whose longest times their number is within the
    budget, or of one text.

    Of all such cuts the cheapest: padded tokens, and for every slice what starting one costs. Dynamic programming over
    where the last slice begins: at E2E's lengths, a logical batch of 128 and a budget of 2,048, 7 % are padding where
    filling every slice leaves 14 %; at a batch of 1,024, 1.5 %.
    """
    start_cost = token_budget * START_COST
    cost, begin = np.zeros(len(lengths) + 1), np.zeros(len(lengths) + 1, dtype=np.int64)
    for end in range(1, len(lengths) + 1):
        longest = max(1, int(lengths[end - 1]))
        first = min(end - 1, max(0, end - token_budget // longest))
        costs = cost[first:end] + longest * np.arange(end - first, 0, -1)
        best = int(costs.argmin())
        cost[end], begin[end] = costs[best] + start_cost, first + best
    slices, end = [], len(lengths)
    while end > 0:
        slices.append(slice(int(begin[end]), end))
        end = slices[-1].start
    return slices[::-1]
