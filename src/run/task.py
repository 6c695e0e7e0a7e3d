"""The parts of a run: its task, the objects that a step computes with, and the position from which it continues."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from averages import Average
from corpus.batching import Cut
from losses import MicroBatch
from optimizer import AdamW, FlatParameters
from privacy.plan import PrivacyPlan
from weights.checkpoint import Loaded


class Data(Protocol):
    def __len__(self) -> int: ...

    def micro_batches(self, units: Tensor, cut: Cut, step: int = 0) -> Iterator[Any]: ...


class ValidationData(Data, Protocol):
    @property
    def inputs(self) -> np.ndarray: ...  # (texts,), inputs of each


class Engine(Protocol):
    def accumulate(self, batch: MicroBatch) -> Tensor: ...


Observer = Callable[[Tensor], None]  # gets the released gradient (P,) of every step
WrapEngine = Callable[[Any, FlatParameters, PrivacyPlan, Cut], Engine]


@dataclass(frozen=True)
class Task:
    """What differs between the training scripts. All but `data` is public."""

    unit: str  # the word for it: "example", "author", "line", or the field that names it
    data: Data  # of N units
    valid: ValidationData | None
    longest: int  # the most tokens that a text may have
    steps: int  # planned logical steps, for which noise and learning rates are chosen
    lr: Callable[[int], float]  # learning rate of a step, counted from 0
    delta: float
    disclosed: list[str]  # what the run discloses beside the model
    digests: dict[str, Any]  # entries of args.json beside the flags
    rows_per_unit: int = 1  # the most texts that a unit contributes to a step
    last_step: int | None = None  # end after this one of the planned steps
    resumable: bool = True
    wrap_engine: WrapEngine | None = None  # for an audit: replaces the run's engine
    observe: Observer | None = None  # for an audit; of runs without --shard, whose ranks have a share each

    @property
    def N(self) -> int:
        return len(self.data)


@dataclass(frozen=True)
class Learner:
    """The objects that a step computes with."""

    loaded: Loaded
    flat: FlatParameters
    engine: Engine
    optimizer: AdamW
    cut: Cut  # of a draw into micro-batches
    average: Average | None = None  # of the iterates; None without --average


@dataclass(frozen=True)
class Position:
    """Where a run starts: before its first step, or at a checkpoint.

    done: steps of the checkpoint. progress, report: its entries (Trainer.progress(), provenance.py); None without one.
    """

    done: int = 0
    progress: dict | None = None
    report: dict | None = None
