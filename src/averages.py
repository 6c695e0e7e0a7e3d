"""Averages of a run's iterates: post-processing of the released gradients, which costs no privacy.

a += w (x - a), where x (P,) are the trained parameters after a step and a (P,) their average, of the same dtype
(float32).
  ema:B   w = (1-B)/(1-B^t) at step t. Then a is the sum of B^(t-i) x_i over the sum of B^(t-i), i = 1..t: the
          exponential moving average, debiased. The initial weights are no part of it. De et al. (2022),
          arXiv:2204.13650.
  tail:F  w = 1/k at the k-th of the last F of the planned steps. Then a is the mean of their iterates. Jain et al.
          (2018), arXiv:1610.03774.
"""

import contextlib
from collections.abc import Iterator

import torch

from optimizer import CACHE_CHUNK, FlatParameters

WANTED = "expected ema:B with B above 0 and below 1, such as ema:0.99, or tail:F with F above 0 and at most 1"


def read_rule(text: str) -> tuple[str, float]:
    """(kind, number) of "ema:0.99" or "tail:0.3". ValueError for anything else."""
    kind, _, number = text.partition(":")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not (kind == "ema" and 0 < value < 1) and not (kind == "tail" and 0 < value <= 1):
        raise ValueError(f"{text}: {WANTED}")
    return kind, value


class Average:
    """The average of `flat`'s iterates by `rule`, over a run of `steps` planned steps. Every rank has the same one."""

    def __init__(self, rule: str, flat: FlatParameters, steps: int):
        self.rule, self.flat = rule, flat
        self.kind, self.number = read_rule(rule)
        tail = max(1, round(self.number * steps))
        self.first = 1 if self.kind == "ema" else steps - tail + 1  # the first step whose iterate is part of it
        self.values = torch.zeros_like(flat.data)

    def begun(self, step: int) -> bool:
        """Whether there is an average after step `step`, counted from 1."""
        return step >= self.first

    def weight(self, step: int) -> float:
        """w at step `step`; 1 at the first."""
        if self.kind == "ema":
            return (1 - self.number) / (1 - self.number**step)
        return 1 / (step - self.first + 1)

    def add(self, step: int) -> None:
        """Take in the iterate of step `step`."""
        if self.begun(step):
            self.values.lerp_(self.flat.data, self.weight(step))

    @property
    def entry(self) -> dict:
        """What a file of the average says of it. A resumed run must agree."""
        return {"rule": self.rule, "first": self.first}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model's parameters hold the average, and `values` the iterate."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for one, other in zip(self.flat.data.split(CACHE_CHUNK), self.values.split(CACHE_CHUNK), strict=True):
            before = one.clone()
            one.copy_(other)
            other.copy_(before)
