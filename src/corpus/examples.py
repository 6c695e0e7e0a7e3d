"""Token files in memory.

A line of a token file is {"context": [ids], "completion": [ids]}; a line is one example, and an example is one unit.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from base.errors import fail
from base.files import read_lines
from corpus.batching import Cut, collate
from losses import MicroBatch

WANTED = 'wanted {"context": [token ids], "completion": [token ids]}, as src/gpt2_encode.py writes it'


@dataclass
class Examples:
    """N examples, one after the other.

    tokens       (sum of lengths,) int32: context and completion, cut to seq_len
    starts       (N + 1,) int64 into tokens
    first_scored (N,) int64, the first scored token of each example; the last is always the example's last
    cut          how many examples were longer than seq_len
    unscored     how many of those have no scored token left
    sha256       of the file, as it was read
    """

    tokens: np.ndarray
    starts: np.ndarray
    first_scored: np.ndarray
    cut: int
    unscored: int
    sha256: str = ""

    def __len__(self) -> int:
        return len(self.first_scored)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    @property
    def inputs(self) -> np.ndarray:
        """(N,) tokens for which a state is computed: all but the last."""
        return np.maximum(self.lengths - 1, 1)

    def micro_batches(self, units: Tensor, cut: Cut, step: int = 0) -> Iterator[MicroBatch]:
        """Cut `units` (int64) into micro-batches, shortest first. An example is the same in every step."""
        chosen = units.numpy()
        if not len(chosen):
            return
        inputs, lengths = self.inputs, self.lengths
        chosen = chosen[np.argsort(inputs[chosen], kind="stable")]
        for group, T in cut.groups(inputs[chosen]):
            rows = chosen[group]
            yield collate(self.tokens, self.starts[rows], lengths[rows], self.first_scored[rows], T)


def read_examples(path: str, flag: str, vocab_size: int, seq_len: int, objective: str = "clm") -> Examples:
    """Read a token file. objective "clm" scores the completion, "jlm" every token that has one before it.

    Raises UserError with file:line for a line that is not an example, ids outside the vocabulary, an empty completion,
    and (clm) an empty context, from which the first token could not be predicted.
    """
    pieces, first_scored, lengths = [], [], []
    cut, unscored, digest = 0, 0, hashlib.sha256()
    for number, line in read_lines(path, flag, digest):
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
            context, completion = record["context"], record["completion"]
            text = isinstance(context, str) or isinstance(completion, str)
            ids = np.array([] if text else context + completion)
        except (ValueError, KeyError, TypeError, RecursionError):
            fail(f"{where}: not an example; {WANTED}")
        if text:
            fail(f"{where}: text where token ids are wanted; encode the file with src/gpt2_encode.py")
        if not isinstance(context, list) or not completion:
            fail(f"{where}: the completion is empty; {WANTED}")
        if not context and objective == "clm":
            fail(f"{where}: the context is empty, nothing predicts the first token; encode with --add_bos")
        if ids.ndim != 1 or ids.dtype.kind != "i" or any(isinstance(value, bool) for value in context + completion):
            fail(f"{where}: token ids must be whole numbers; {WANTED}")
        if ids.min() < 0 or ids.max() >= vocab_size:
            bad = ids.min() if ids.min() < 0 else ids.max()
            fail(
                f"{where}: token id {bad} is outside the vocabulary of {vocab_size}; "
                "was the file encoded with this model's --vocab?"
            )
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
    return Examples(np.concatenate(pieces), starts, np.array(first_scored), cut, unscored, digest.hexdigest())


def check_scored(examples: Examples, given: str, seq_len: int) -> None:
    """Raise UserError where no example has a scored token: nothing can be learned, and a mean loss is not defined.
    given: the flag and its path."""
    if examples.unscored == len(examples):
        fail(
            f"{given}: all {len(examples)} contexts fill --seq_len {seq_len}, so that no scored token is left; give a "
            "larger --seq_len or shorter contexts"
        )


def describe_cut(examples: Examples, kind: str, seq_len: int) -> str:
    """What was cut of the examples of a `kind`, in words; "" where nothing was."""
    if not examples.cut:
        return ""
    left = f"; {examples.unscored} of them have no scored token left" if examples.unscored else ""
    return f"{examples.cut} {kind} examples were longer than --seq_len {seq_len} and were cut{left}"


def count_shared(valid: Any, train: Any) -> int:
    """How many texts of `valid` are texts of `train`, too: the same tokens, cut as the run cuts them, wherever the
    context ends. Both have tokens, starts and lengths, as Examples and AuthorTexts do."""

    def texts(data: Any) -> Iterator[bytes]:
        tokens = np.asarray(data.tokens)  # slices of a memory map are ten times as slow
        # not strict: the starts of Examples hold the end of the last one, too
        for start, length in zip(data.starts.tolist(), data.lengths.tolist(), strict=False):
            yield tokens[start : start + length].tobytes()

    wanted = Counter(texts(valid))  # held in memory, since it is the smaller one
    return sum(wanted[text] for text in {text for text in texts(train) if text in wanted})
