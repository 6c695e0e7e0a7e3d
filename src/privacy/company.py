"""Whether this machine's kernels keep a unit's gradient apart from its company, tried before a private run.

The proof of epsilon takes a unit's clipped gradient for a function of the unit alone. base.products.row_blocks() and
PublicLengths give every kernel one shape; that a kernel then treats all rows alike is a property of the machine's
libraries, and that all ranks have the same. In float32 a breach costs a few units in the last place, which the noise
does not pay for; in bfloat16 it costs 2^-8 of a value, the same way for all units that are alike, and the sum over them
moves by several C.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from base.distributed import World
from base.errors import fail
from corpus.batching import PublicLengths, collate
from losses import MicroBatch
from model import GPT2LMModel
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
    engine, model: GPT2LMModel, flat: FlatParameters, T: int, units: int, bf16: bool, read: Callable = Tensor.clone
) -> Any:
    """What `read` says of the clipped gradient (P,) of the one unit of probe_batch(T, units) that has a loss; a copy,
    where nothing else is asked for. Leaves flat.sums zero."""
    adapters = [module for module in model.modules() if getattr(module, "lora_dropout", 0.0)]
    rates = [module.lora_dropout for module in adapters]
    for module in adapters:  # not model.eval(): Opacus's hooks keep still there
        module.lora_dropout = 0.0
    flat.sums.zero_()
    with torch.autocast(flat.data.device.type, torch.bfloat16, enabled=bf16):
        engine.accumulate(probe_batch(T, units, model.config.vocab_size).to(flat.data.device))
    for module, rate in zip(adapters, rates, strict=True):
        module.lora_dropout = rate
    found = read(flat.grad)
    flat.sums.zero_()
    return found


def change(one: Tensor, other: Tensor) -> float:
    """Of `one`, relative to its norm."""
    moved, norm = (other - one).double().norm().item(), one.double().norm().item()
    return moved / norm if norm else moved


def influence_of_company(engine, model: GPT2LMModel, flat: FlatParameters, cut: PublicLengths, bf16: bool) -> float:
    """The largest relative change, over all lengths, of a unit's clipped gradient when as many others as the budget
    allows, whose own gradients are zero, come before it.

    Few would not do: by PyTorch's source, which was read and not run, its attention for CPUs with AMX goes about
    bfloat16 in a way that depends on the sizes of all texts.
    """
    worst = 0.0
    for T in cut.lengths:
        if (units := cut.token_budget // T) > 1:
            one, other = (contribution(engine, model, flat, T, count, bf16) for count in (1, units))
            worst = max(worst, change(one, other))
    return worst


def influence_of_rank(
    engine, model: GPT2LMModel, flat: FlatParameters, cut: PublicLengths, bf16: bool, world: World
) -> float:
    """The largest relative difference of a unit's clipped gradient between rank 0 and another. Collective.

    A unit more shifts those behind it in the file to other ranks, so that where machines compute in another way, all
    of them contribute something else.
    """
    worst = 0.0
    for T in cut.lengths:
        own = contribution(engine, model, flat, T, 1, bf16)
        worst = max(worst, change(world.broadcast(own.clone()), own))
    return max(world.gather(worst))


def check_company(engine, model: GPT2LMModel, flat: FlatParameters, cut: PublicLengths, world: World) -> None:
    """Raise UserError, on every rank, where in bfloat16 a unit's gradient depends on the others in its micro-batch."""
    influence = influence_of_company(engine, model, flat, cut, bf16=True)
    with world.raise_if_any_failed():
        if not influence <= MOST:
            fail(
                f"--bf16: on this machine one unit changes the gradients of the others by {influence:.1e} of "
                "themselves: the epsilon would not be true; leave --bf16 out"
            )


def check_ranks_compute_alike(
    engine, model: GPT2LMModel, flat: FlatParameters, cut: PublicLengths, world: World
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


def fingerprint(grad: Tensor) -> tuple[float, ...]:
    """Three sums over grad (P,), for which nothing is copied: gradients of other bits differ in one of them."""
    return grad.sum().item(), grad.norm(1).item(), grad.norm(2).item()


def check_ranks_round_alike(engine, model: GPT2LMModel, flat: FlatParameters, cut: PublicLengths, world: World) -> None:
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
