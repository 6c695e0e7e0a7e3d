"""Beam search over many contexts at once: exact, without work that cannot change the result.

The algorithm is the LoRA NLG example's (Hu et al., 2021): totals of log-probabilities, a finished hypothesis scored
total / length**length_penalty. Around it:
- Each live hypothesis is a row of the batch. One that has ended, or that cannot beat the best finished one any more, is
  dropped, so the work of a step shrinks. Dropping it is exact: what it would push out of the beam ranks below it.
- A context that is done leaves and a waiting one takes its slot: no step waits for the slowest context.
- The head's weight is read once a step, in blocks, and no (rows, V) array of log-probabilities exists (TopKHead).

Scores are base-2 logarithms: every rule here is linear in the total, so the unit changes no comparison.

Shapes: S slots (contexts in work), K beams, R live rows, N generated tokens at most (eval_len), D width, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from decoding.top_k_head import Edits, TopKHead

NOTHING = -1  # where a history has no token


@dataclass(frozen=True)
class SearchSettings:
    """The rules of the search; see "Semantics" in beam_search()."""

    beam: int
    eval_len: int
    eos_ids: tuple[int, ...]
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    min_length: int = 0

    def __post_init__(self):
        for name, least in (("beam", 1), ("eval_len", 1), ("no_repeat_ngram_size", 0), ("min_length", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected {name} >= {least}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty={self.repetition_penalty}: expected a number > 0")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty={self.length_penalty}: expected a finite number")
        try:
            self.divisor(self.eval_len)
        except OverflowError:
            raise ValueError(f"length_penalty={self.length_penalty}: eval_len**length_penalty overflows") from None

    def divisor(self, length: int) -> float:
        return float(length) ** self.length_penalty


class Decoder(Protocol):
    """A model and its cache, as the search needs them."""

    head: TopKHead

    def admit(self, slots: np.ndarray, contexts: list[Sequence[int]]) -> Tensor:
        """Forget what the slots held, read a context into each; the last position's states (len(slots), D)."""

    def advance(self, slots: np.ndarray, places: np.ndarray, parents: np.ndarray, tokens: np.ndarray) -> Tensor:
        """Append tokens[r] to the hypothesis that stood at place parents[r] of slots[r], and let it stand at places[r].

        All arrays (R,), sorted by slot. Returns states (R, D). A place that no row names is forgotten.
        """


@dataclass(frozen=True)
class Found:
    """The best hypothesis of one context: `index` is the context's, `score` its natural-log score over the divisor."""

    index: int
    tokens: list[int]
    score: float


class Beams:
    """The hypotheses of every slot, on the host."""

    def __init__(self, slots: int, settings: SearchSettings):
        shape = (slots, settings.beam)
        self.settings = settings
        self.eos = np.array(sorted(set(settings.eos_ids)))
        self.divisors = np.array([settings.divisor(length) for length in range(1, settings.eval_len + 1)], np.float32)
        self.index = np.full(slots, NOTHING)  # which context, or NOTHING where the slot is free
        self.length = np.zeros(slots, int)
        self.total = np.full(shape, -np.inf, np.float32)  # (S, K); -inf: no live hypothesis at this place
        self.history = np.full((*shape, settings.eval_len), NOTHING, np.int32)  # (S, K, N)
        self.best_score = np.full(slots, -np.inf, np.float32)
        self.best_tokens: list[list[int]] = [[] for _ in range(slots)]

    def open(self, slots: np.ndarray, indices: list[int]) -> None:
        """Start a search in each slot: one empty hypothesis of total 0."""
        self.index[slots], self.length[slots] = indices, 0
        self.total[slots], self.history[slots] = -np.inf, NOTHING
        self.total[slots, 0] = 0.0
        self.best_score[slots] = -np.inf
        for slot in slots:
            self.best_tokens[slot] = []

    def live(self) -> tuple[np.ndarray, np.ndarray]:
        """(slots, places), each (R,), sorted by slot and place."""
        slots, places = np.nonzero(self.total > -np.inf)
        return slots, places

    def edits(self, slots: np.ndarray, places: np.ndarray) -> Edits:
        """What the rules change in the logits of each row: (row, token) pairs to penalise and to forbid."""
        settings, history, length = self.settings, self.history[slots, places], self.length[slots]  # (R, N), (R,)
        history = history[:, : length.max(initial=0)]
        penalised = banned = np.empty((2, 0), int)
        if settings.repetition_penalty != 1.0:
            rows, columns = np.nonzero(history != NOTHING)
            penalised = np.stack([rows, history[rows, columns]])
        early = np.nonzero(length < settings.min_length)[0]
        if len(early):
            banned = np.stack([np.repeat(early, len(self.eos)), np.tile(self.eos, len(early))])
        n = settings.no_repeat_ngram_size
        if n and history.shape[1] >= n:
            rows = np.nonzero(length >= n)[0]
            history = history[rows]
            last = length[rows, None] + np.arange(1 - n, 0)  # (R, n-1) where the newest n-1 tokens stand
            last = np.take_along_axis(history, last, axis=1)
            windows = np.lib.stride_tricks.sliding_window_view(history, n, axis=1)  # (R, N-n+1, n)
            repeats = (windows[:, :, :-1] == last[:, None]).all(-1) & (windows[:, :, -1] != NOTHING)
            which, start = np.nonzero(repeats)
            banned = np.concatenate([banned, np.stack([rows[which], windows[which, start, -1]])], axis=1)
        return Edits(penalised, banned, settings.repetition_penalty)

    def extend(self, slots: np.ndarray, total: np.ndarray, parent: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Take each context's best pairs, best first, (A, K) each, as its new beams; the slots that are done."""
        settings, length = self.settings, self.length[slots]
        self.history[slots] = self.history[slots[:, None], parent]
        self.history[slots, :, length] = token
        self.length[slots] = length = length + 1
        divisor = self.divisors[length - 1][:, None]

        ended = np.isin(token, self.eos) & (total > -np.inf)
        self.offer(slots, np.where(ended, total / divisor, -np.inf))
        total = np.where(ended, -np.inf, total)
        # A total never rises, and over the lengths still open the score of a fixed total is extreme at one of the ends.
        final = self.divisors[-1]
        following = self.divisors[np.minimum(length, settings.eval_len - 1)][:, None]
        bound = np.maximum(total / final, total / following)
        last = (length == settings.eval_len)[:, None]
        self.offer(slots, np.where(last, total / final, -np.inf))
        total = np.where(last | (bound <= self.best_score[slots, None]), -np.inf, total)
        self.total[slots] = total
        return slots[~(total > -np.inf).any(1)]

    def offer(self, slots: np.ndarray, score: np.ndarray) -> None:
        """Keep the best hypothesis of each slot where it is strictly better than the one kept. score (A, K)."""
        first = score.argmax(1)
        score = score[np.arange(len(slots)), first]
        for i in np.nonzero(score > self.best_score[slots])[0]:
            slot = slots[i]
            self.best_score[slot] = score[i]
            self.best_tokens[slot] = self.history[slot, first[i], : self.length[slot]].tolist()

    def close(self, slots: np.ndarray) -> list[Found]:
        """Hand out the results of slots that are done, and free them."""
        found = [
            Found(int(self.index[slot]), self.best_tokens[slot], float(self.best_score[slot]) * math.log(2))
            for slot in slots
        ]
        self.index[slots] = NOTHING
        self.total[slots] = -np.inf
        return found


@torch.inference_mode()
def beam_search(
    contexts: Sequence[Sequence[int]], decoder: Decoder, settings: SearchSettings, slots: int
) -> Iterator[Found]:
    """Search every context and yield each result as soon as it stands, in no particular order.

    contexts: token ids, none empty. slots: contexts in work at once; it bounds memory and changes no result.

    Semantics, for each context, at step i = 0..eval_len-1: the logits after each hypothesis, where tokens that the
    hypothesis generated already are multiplied by repetition_penalty when negative and divided when not, EOS ids are
    forbidden while i < min_length, and so is a token that would repeat an n-gram of the generated tokens; the `beam`
    best (hypothesis, token) pairs by total log-probability are the new beams. One that ends in an EOS id is a finished
    candidate, kept if strictly better than the one kept before, and leaves the beam; after the last step every live
    beam is a candidate. The search of a context ends once no live beam can win.

    When everything is forbidden before anything has ended, no hypothesis is left and the result has no token.
    """
    beams = Beams(min(slots, len(contexts)), settings)
    waiting = sorted(range(len(contexts)), key=lambda index: len(contexts[index]))  # longest last, so taken first
    # One prefix pass for several newcomers costs hardly more than for one: wait until an eighth of the slots is free.
    refill = max(1, len(beams.index) // 8)
    states: list[Tensor] = []
    slot = place = np.empty(0, int)
    while waiting or len(slot):
        free = np.nonzero(beams.index == NOTHING)[0]
        if waiting and (len(free) >= refill or not len(slot)):
            indices = [waiting.pop() for _ in range(min(len(free), len(waiting)))]
            newcomers = free[: len(indices)]
            states.append(decoder.admit(newcomers, [contexts[index] for index in indices]))
            beams.open(newcomers, indices)
            slot, place = np.concatenate([slot, newcomers]), np.concatenate([place, np.zeros_like(newcomers)])

        active, context = np.unique(slot, return_inverse=True)
        total, parent, token = decoder.head.best_pairs(
            torch.cat(states),
            beams.total[slot, place],
            context,
            place,
            len(active),
            settings.beam,
            beams.edits(slot, place),
        )
        done = beams.extend(active, total, parent, token)
        yield from beams.close(done)

        slot, place = beams.live()
        states = []
        if len(slot):
            at = np.searchsorted(active, slot)
            states.append(decoder.advance(slot, place, parent[at, place], token[at, place]))
