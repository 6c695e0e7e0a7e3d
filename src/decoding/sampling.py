"""Samples from a language model: its softmax at a temperature, or what top-k and top-p leave of it.

The rules, in this order, as in transformers:
  temperature  logits are divided by it
  top_k        the k most probable tokens stay, and those that are as probable as the k-th
  top_p        of what stays, the smallest set of most probable tokens whose share is at least p (Holtzman et al., 2020,
               arXiv:1904.09751), and those that are as probable as its least one

A token is chosen by the inverse of the distribution function at a uniform number. Sample j of prompt i has a stream of
numbers of its own, Philox (Salmon et al., 2011) with the key (seed, i) and the counter (0, 0, j, .); no number depends
on the order in which samples are drawn. The choice is made on the host with numpy, whose vector code computes an
array's last elements as it does all others.

Shapes: S slots, R rows, V vocabulary (with padding of probability 0), G groups of tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from base.errors import fail
from decoding.line_decoder import LineDecoder
from decoding.top_k_head import GROUP

EMPTY = -1


@dataclass(frozen=True)
class SamplingRules:
    """top_k 0 and top_p 1 leave every token. ends: ids after which a sample ends."""

    max_new_tokens: int
    ends: frozenset[int] = frozenset()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Job:
    """Sample `sample` of prompt number `prompt`, whose tokens are `context`, not empty. index: its place in the
    output."""

    index: int
    prompt: int
    sample: int
    context: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """What was generated for the job `index`; logprob is the natural logarithm of the tokens' probability under the
    distribution that they were drawn from."""

    index: int
    tokens: list[int]
    logprob: float


def uniforms(seed: int, prompt: int, sample: int, count: int) -> np.ndarray:
    """The first `count` numbers in [0, 1) of a sample's stream, (count,) float64. seed: in [0, 2^64)."""
    key = np.array([seed, prompt], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, sample, 0], np.uint64))).random(count)


def weights(logits: np.ndarray, rules: SamplingRules) -> np.ndarray:
    """logits (R, V) float32, changed -> what the tokens' probabilities are proportional to, (R, V) float32."""
    logits -= logits.max(1, keepdims=True)
    if rules.temperature != 1.0:
        logits /= np.float32(rules.temperature)
    w = np.exp(logits, out=logits)
    if 0 < rules.top_k < w.shape[1]:
        for row, least in zip(w, kth_largest(w, rules.top_k), strict=True):
            row[row < least] = 0.0
    if rules.top_p < 1.0:
        for row in w:
            row[row < nucleus_least(row, rules.top_p)] = 0.0
    return w


def kth_largest(w: np.ndarray, k: int) -> np.ndarray:
    """Of each row of w (R, V), V a multiple of GROUP: (R,). The k best tokens are at least the k-th best maximum of a
    group, so few are sorted."""
    best = w.reshape(len(w), -1, GROUP).max(2)  # (R, G)
    least = np.partition(best, -k, axis=1)[:, -k] if k < best.shape[1] else np.zeros(len(w), w.dtype)
    found = [np.partition(kept := row[row >= low], len(kept) - k)[-k] for row, low in zip(w, least, strict=True)]
    return np.array(found)


def nucleus_least(w: np.ndarray, p: float) -> float:
    """The least weight of the smallest set of largest weights of w (V,) whose share is at least p.

    Weights below (1 - p)/V of the total have together less than 1 - p of it, and need not be sorted."""
    total = w.sum(dtype=np.float64)
    kept = np.sort(w[w >= (1 - p) * total / len(w) * (1 - 1e-6)])[::-1]
    count = np.searchsorted(np.cumsum(kept, dtype=np.float64), p * total)
    return kept[min(count, len(kept) - 1)]


def choose(w: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (R, V), numbers in [0, 1) (R,) -> tokens (R,), the logarithms of their shares (R,) float64."""
    rows = np.arange(len(w))
    groups = w.reshape(len(w), -1, GROUP)
    upto = np.cumsum(groups.sum(2), axis=1, dtype=np.float64)  # (R, G)
    total = upto[:, -1]
    target = u * total
    group = (upto <= target[:, None]).sum(1)
    inside = groups[rows, group].astype(np.float64)  # (R, GROUP)
    before = np.where(group > 0, upto[rows, group - 1], 0.0)
    reached = before[:, None] + np.cumsum(inside, axis=1) > target[:, None]
    # Rounding can leave the sum of a group's tokens below its total: then the last of them that has a weight.
    last = GROUP - 1 - (inside[:, ::-1] > 0).argmax(1)
    place = np.where(reached.any(1), reached.argmax(1), last)
    return group * GROUP + place, np.log(inside[rows, place]) - np.log(total)


@torch.inference_mode()
def sample_all(
    jobs: Sequence[Job],
    decoder: LineDecoder,
    rules: SamplingRules,
    seed: int,
    stopped: Callable[[Sequence[int]], bool] | None = None,
) -> Iterator[Sample]:
    """Draw every job's sample and yield each as soon as it has ended: by one of rules.ends, which it keeps, by
    stopped(its tokens), or at max_new_tokens. A waiting job takes the slot of one that has ended.

    Jobs of one context should stand together: it is read once.
    """
    slots = min(decoder.slots, len(jobs))
    waiting = list(reversed(jobs))
    job: list[Job | None] = [None] * slots
    tokens = np.full((slots, rules.max_new_tokens), EMPTY, np.int32)
    length, logprob = np.zeros(slots, int), np.zeros(slots)
    numbers = np.zeros((slots, rules.max_new_tokens))
    refill = max(1, slots // 8)  # reading several contexts at once costs hardly more than reading one
    slot, states = np.empty(0, int), torch.empty(0)
    while waiting or len(slot):
        free = np.array([n for n in range(slots) if job[n] is None], int)
        if waiting and (len(free) >= refill or not len(slot)):
            new = free[: len(waiting)]
            taken = [waiting.pop() for _ in new]
            for n, one in zip(new, taken, strict=True):
                job[n], length[n], logprob[n] = one, 0, 0.0
                numbers[n] = uniforms(seed, one.prompt, one.sample, rules.max_new_tokens)
            admitted = decoder.admit(new, [one.context for one in taken])
            states = torch.cat([states, admitted]) if len(slot) else admitted
            slot = np.concatenate([slot, new])
        chosen = draw(decoder, states, rules, numbers[slot, length[slot]])
        tokens[slot, length[slot]] = chosen[0]
        length[slot] += 1
        logprob[slot] += chosen[1]
        for n in slot:
            one, own = job[n], tokens[n, : length[n]]
            if (
                int(own[-1]) in rules.ends
                or length[n] == rules.max_new_tokens
                or (stopped is not None and stopped(own.tolist()))
            ):
                assert one is not None
                yield Sample(one.index, own.tolist(), float(logprob[n]))
                job[n] = None
        slot = np.sort(np.array([n for n in slot if job[n] is not None], int))
        if len(slot):
            states = decoder.advance(slot, tokens[slot, length[slot] - 1])


def draw(decoder: LineDecoder, states: Tensor, rules: SamplingRules, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One token after each of the states (R, D), and the logarithm of its probability; `rows` of them at a time, whose
    logits stay in the processor's cache."""
    parts = []
    for start in range(0, len(states), decoder.rows):
        part = slice(start, start + decoder.rows)
        parts.append(choose(weights(decoder.head.logits(states[part]), rules), u[part]))
    token, logprob = (np.concatenate(each) for each in zip(*parts, strict=True))
    if not math.isfinite(logprob.sum()):
        fail("--init_checkpoint: the model's probabilities are no numbers; was the training divergent?")
    return token, logprob
