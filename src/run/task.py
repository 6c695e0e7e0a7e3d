"""What a run is made of: its task, what it learns with, and where it goes on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

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


Observer = Callable[[Tensor], None]  # is shown the released gradient (P,) of every step
WrapEngine = Callable[[Any, FlatParameters, PrivacyPlan, Cut], Engine]


@dataclass(frozen=True)
class Task:
    """What a script makes of its flags and its data. All of it but `data` is public."""

    unit: str  # "example" or "author"
    data: Data  # of N units
    valid: ValidationData | None
    longest: int  # tokens of the longest text that may come
    steps: int  # logical steps, for which noise and learning rates are made
    lr: Callable[[int], float]  # of a step, from 0
    delta: float
    disclosed: list[str]  # what the run shows beside the model
    digests: dict[str, Any]  # entries of args.json beside the flags
    rows_per_unit: int = 1  # the most texts that a unit contributes to a step
    last_step: int | None = None  # end there, of the `steps` that are planned
    resumable: bool = True
    wrap_engine: WrapEngine | None = None  # for an audit: makes of the run's engine the one to use
    observe: Observer | None = None  # for an audit

    @property
    def N(self) -> int:
        return len(self.data)


@dataclass(frozen=True)
class Learner:
    """What a step computes with."""

    loaded: Loaded
    flat: FlatParameters
    engine: Engine
    optimizer: AdamW
    cut: Cut  # of a draw into micro-batches


@dataclass(frozen=True)
class Position:
    """Where a run goes on. progress, report: of the checkpoint (Trainer.progress(), provenance.py); None: there is
    none."""

    done: int = 0
    progress: dict | None = None
    report: dict | None = None
