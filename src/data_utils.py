"""Token files in memory, and logical batches cut into micro-batches of bounded size.

A line of a token file is {"context": [ids], "completion": [ids]}; a line is one example, and an example is one unit.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cli import fail, read_lines
from losses import MicroBatch

# What a micro-batch costs beside its tokens, as a share of the token budget: on 2 cores GPT-2 small takes 0.35 s more
# for each of them, the time of about 100 tokens of 2,048 (LoRA, measured over budgets 512 to 4,096).
START_COST = 0.05
WANTED = 'wanted {"context": [token ids], "completion": [token ids]}, as src/gpt2_encode.py writes it'


@dataclass
class Examples:
    """N examples, one after the other.

    tokens       (sum of lengths,) int32: context and completion, cut to seq_len
    starts       (N + 1,) int64 into tokens
    first_scored (N,) int64, the first scored token of each example; the last is always the example's last
    cut          how many examples were longer than seq_len
    unscored     how many of those have no scored token left
    """

    tokens: np.ndarray
    starts: np.ndarray
    first_scored: np.ndarray
    cut: int
    unscored: int

    def __len__(self) -> int:
        return len(self.first_scored)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def micro_batches(self, units: Tensor, token_budget: int, step: int = 0) -> Iterator[MicroBatch]:
        """Cut `units` (int64) into micro-batches of at most `token_budget` padded tokens, or of one example.

        Sorted by length, so that little is padded. Which units share a micro-batch changes nothing but rounding, and an
        example is the same in every step.
        """
        chosen = units.numpy()
        if not len(chosen):
            return
        lengths = self.lengths
        chosen = chosen[np.argsort(lengths[chosen], kind="stable")]
        for group in groups_within(lengths[chosen] - 1, token_budget):
            rows = chosen[group]
            yield collate(self.tokens, self.starts[rows], lengths[rows], self.first_scored[rows])


def collate(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, first_scored: np.ndarray,
            rows_per_unit: int = 1) -> MicroBatch:
    """A micro-batch of texts: tokens[starts[m] : starts[m] + lengths[m]] is row m, scored from its token
    first_scored[m] on; rows_per_unit consecutive ones belong to a unit."""
    inputs = lengths - 1  # the last token of a text is a target only: no state is computed for it
    T = max(1, int(inputs.max()))
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
        counts=counts.reshape(-1, rows_per_unit).sum(1).tolist(), rows_per_unit=rows_per_unit,
        tokens=int(lengths.sum()))


def groups_within(lengths: np.ndarray, token_budget: int) -> list[slice]:
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


def read_examples(path: str, flag: str, vocab_size: int, seq_len: int, objective: str = "clm") -> Examples:
    """Read a token file. objective "clm" scores the completion, "jlm" every token that has one before it.

    Raises UserError with file:line for a line that is not an example, ids outside the vocabulary, an empty completion,
    and (clm) an empty context, from which the first token could not be predicted.
    """
    pieces, first_scored, lengths = [], [], []
    cut = unscored = 0
    for number, line in read_lines(path, flag):
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
            context, completion = record["context"], record["completion"]
            ids = np.array(context + completion)
        except (ValueError, KeyError, TypeError, RecursionError):
            fail(f"{where}: not an example; {WANTED}")
        if not isinstance(context, list) or not completion:
            fail(f"{where}: the completion is empty; {WANTED}")
        if not context and objective == "clm":
            fail(f"{where}: the context is empty, nothing predicts the first token; encode with --add_bos")
        if ids.ndim != 1 or ids.dtype.kind != "i":
            fail(f"{where}: token ids must be whole numbers; {WANTED}")
        if ids.min() < 0 or ids.max() >= vocab_size:
            bad = ids.min() if ids.min() < 0 else ids.max()
            fail(f"{where}: token id {bad} is outside the vocabulary of {vocab_size}; "
                 "was the file encoded with this model's --vocab?")
        first = len(context) if objective == "clm" else 1
        if len(ids) > seq_len:
            ids = ids[:seq_len]
            cut += 1
            unscored += first >= seq_len
        pieces.append(ids.astype(np.int32))
        first_scored.append(max(first, 1))
        lengths.append(len(ids))
    if not pieces:
        fail(f"{flag} {path}: the file is empty; {WANTED}")
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Examples(np.concatenate(pieces), starts, np.array(first_scored), cut, unscored)


def count_shared(valid: Any, train: Any) -> int:
    """How many texts of `valid` are texts of `train`, too: the same tokens, cut as the run cuts them. Where context
    ends and completion begins does not matter. Both have tokens, starts and lengths, as Examples and AuthorTexts do."""
    def texts(data: Any) -> Iterator[bytes]:
        tokens = np.asarray(data.tokens)  # slices of a memory map are ten times as slow
        for start, length in zip(data.starts.tolist(), data.lengths.tolist()):
            yield tokens[start:start + length].tobytes()

    wanted = Counter(texts(valid))  # of the smaller file
    return sum(wanted[text] for text in {text for text in texts(train) if text in wanted})
