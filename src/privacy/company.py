"""Batch invariance: does a unit's gradient depend on the other units of its micro-batch (its company), or on the rank?

It is tested with the machine's own kernels before a private run. The proof of epsilon requires a unit's clipped
gradient to be a function of the unit alone. base.products.row_blocks() and PublicLengths give every kernel one shape.
That a kernel of one shape computes all rows alike, and all ranks compute alike, depends on the machines' libraries.
Where it fails, float32 results change by a few units in the last place, which the noise does not cover. bfloat16
results change by 2^-8 of themselves, equally for equal units, so the sum over them changes by several C.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from base.device import read_back
from base.distributed import World
from base.errors import fail
from corpus.batching import PublicLengths, collate
from language_model import LanguageModel
from losses import MicroBatch
from optimizer import FlatParameters

MOST = 1e-5  # relative: the order of float32 sums makes less than 1e-6, one bfloat16 kernel for another more than 1e-4


def probe_batch(T: int, units: int, vocabulary: int) -> MicroBatch:
    """`units` texts of T tokens; the last one is always the same text, and alone has a loss."""
    texts = np.random.default_rng(0).integers(0, vocabulary, (units, T + 1))
    texts[-1] = np.random.default_rng(1).integers(0, vocabulary, T + 1)
    lengths = np.full(units, T + 1)
    batch = collate(texts.ravel(), np.arange(units) * (T + 1), lengths, np.full(units, max(1, T // 2)), T)
    batch.weights[: -batch.counts[-1]] = 0.0
    return batch


def contribution(
    engine, model: LanguageModel, flat: FlatParameters, T: int, units: int, bf16: bool, read: Callable = Tensor.clone
) -> Any:
    """What `read` says of the clipped gradient (P,) of the one unit of probe_batch(T, units) that has a loss; a copy,
    where nothing else is asked for. Leaves flat.sums zero."""
    adapters = [module for module in model.modules() if getattr(module, "lora_dropout", 0.0)]
    rates = [module.lora_dropout for module in adapters]
    for module in adapters:  # not model.eval(), in which Opacus's hooks do nothing
        module.lora_dropout = 0.0
    flat.sums.zero_()
    with torch.autocast(flat.data.device.type, torch.bfloat16, enabled=bf16):
        engine.accumulate(probe_batch(T, units, model.config.vocab_size).to(flat.data.device))
    for module, rate in zip(adapters, rates, strict=True):
        module.lora_dropout = rate
    gradient = read(flat.grad)
    flat.sums.zero_()
    return gradient


def change(one: Tensor, other: Tensor) -> float:
    """Of `one`, relative to its norm."""
    moved, norm = read_back("company", torch.stack([(other - one).double().norm(), one.double().norm()])).tolist()
    return moved / norm if norm else moved


def influence_of_company(engine, model: LanguageModel, flat: FlatParameters, cut: PublicLengths, bf16: bool) -> float:
    """The largest relative change, over all lengths, of a unit's clipped gradient when as many others as the budget
    allows, whose own gradients are zero, come before it.

    As many as possible, because by PyTorch's source its bfloat16 attention for CPUs with AMX takes a path that depends
    on the sizes of all texts (this was not tried).
    """
    worst = 0.0
    for T in cut.lengths:
        if (units := cut.token_budget // T) > 1:
            one, other = (contribution(engine, model, flat, T, count, bf16) for count in (1, units))
            worst = max(worst, change(one, other))
    return worst


def influence_of_rank(
    engine, model: LanguageModel, flat: FlatParameters, cut: PublicLengths, bf16: bool, world: World
) -> float:
    """The largest relative difference of a unit's clipped gradient between rank 0 and another. Collective.

    One more unit moves the units after it in the file to other ranks. Where machines compute differently, all of these
    then contribute something else.
    """
    worst = 0.0
    for T in cut.lengths:
        here = contribution(engine, model, flat, T, 1, bf16)
        worst = max(worst, change(world.broadcast(here.clone()), here))
    return max(world.gather(worst))


def check_company(
    engine, model: LanguageModel, flat: FlatParameters, cut: PublicLengths, world: World, low: str = "--bf16"
) -> None:
    """Raise UserError, on every rank, where in bfloat16 a unit's gradient depends on the others in its micro-batch.
    low: the flag that asks for bfloat16, of the products or of the frozen weights alone."""
    influence = influence_of_company(engine, model, flat, cut, bf16=low == "--bf16")
    with world.raise_if_any_failed():
        if not influence <= MOST:
            fail(
                f"{low}: on this machine one unit changes the gradients of the others by {influence:.1e} of "
                f"themselves: the epsilon would not be true; "
                + ("leave --bf16 out" if low == "--bf16" else "give --base_dtype float32")
            )


def check_ranks_compute_alike(
    engine, model: LanguageModel, flat: FlatParameters, cut: PublicLengths, world: World
) -> None:
    """Raise UserError, on every rank, where in bfloat16 a unit's gradient depends on the rank that computes it."""
    influence = influence_of_rank(engine, model, flat, cut, True, world)
    with world.raise_if_any_failed():
        if not influence <= MOST:
            fail(
                f"--bf16: the machines of this job compute a unit's gradient in different ways, by {influence:.1e} of "
                "itself, and one unit more moves others to another rank: the epsilon would not be true; use machines "
                "of one kind, or leave --bf16 out"
            )


def fingerprint(grad: Tensor) -> str:
    """The SHA-256 of grad (P,), on the CPU; nothing is copied."""
    return hashlib.sha256(grad.numpy()).hexdigest()


def check_ranks_round_alike(
    engine, model: LanguageModel, flat: FlatParameters, cut: PublicLengths, world: World
) -> None:
    """Raise UserError, on every rank, where in float32 a unit's gradient has other bits on another rank.

    CPUs of other kinds differ by 1e-6 of it, other numbers of threads by 3e-7, and the noise pays for neither.
    """
    own = [contribution(engine, model, flat, T, 1, False, fingerprint) for T in cut.lengths]
    alike = all(found == own for found in world.gather(own))
    with world.raise_if_any_failed():
        if not alike:
            fail(
                f"OMP_NUM_THREADS ({torch.get_num_threads()} threads here): the processes of this job round a unit's "
                "gradient in different ways, and one unit more moves others to another process: the epsilon would not "
                "be true; use machines of one kind, and the same OMP_NUM_THREADS for all"
            )
