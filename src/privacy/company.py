"""Whether this machine's kernels keep a unit's gradient apart from its company, tried before a private run in bfloat16.

The proof of epsilon takes a unit's clipped gradient for a function of the unit alone. fast_linear.row_blocks() and
PublicLengths give every kernel one shape; that a kernel then treats all rows alike is a property of the machine's
libraries. In float32 a breach costs a few units in the last place. In bfloat16 it costs 2^-8 of a value, the same way
for all units that are alike, and the sum over them moves by several C.
"""

import numpy as np
import torch

from batching import PublicLengths, collate
from losses import MicroBatch
from model import GPT2LMModel
from optimizer import FlatParameters

COMPANY = 17  # units beside the one that is watched: more than a block of the norms
MOST = 1e-5  # relative: the order of float32 sums makes less than 1e-6, one bfloat16 kernel for another more than 1e-4


def probe_batch(T: int, units: int, vocabulary: int) -> MicroBatch:
    """`units` texts of T tokens; the last one is always the same text, and alone has a loss."""
    rng = np.random.default_rng(0)
    texts = rng.integers(0, vocabulary, (COMPANY + 1, T + 1))[-units:]
    lengths = np.full(units, T + 1)
    batch = collate(texts.ravel(), np.arange(units) * (T + 1), lengths, np.full(units, max(1, T // 2)), T)
    batch.weights[:-batch.counts[-1]] = 0.0
    return batch


def influence_of_company(engine, model: GPT2LMModel, flat: FlatParameters, cut: PublicLengths, bf16: bool) -> float:
    """The largest relative change of a unit's clipped gradient when COMPANY others, whose own gradients are zero, come
    before it: over the shortest, a middle and the length of most tokens that the budget allows. Leaves flat.sums zero.
    """
    device = flat.data.device
    lengths = [T for T in cut.lengths if T * (COMPANY + 1) <= cut.token_budget] or [cut.lengths[0]]
    worst = 0.0
    adapters = [module for module in model.modules() if getattr(module, "lora_dropout", 0.0)]
    rates = [module.lora_dropout for module in adapters]
    for module in adapters:  # not model.eval(): Opacus's hooks keep still there
        module.lora_dropout = 0.0
    for T in sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]}):
        sums = []
        for units in (1, COMPANY + 1):
            flat.sums.zero_()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                engine.accumulate(probe_batch(T, units, model.config.vocab_size).to(device))
            sums.append(flat.grad.clone())
        alone = sums[0].double().norm().item()
        change = (sums[1] - sums[0]).double().norm().item()
        worst = max(worst, change / alone if alone else change)
    for module, rate in zip(adapters, rates):
        module.lora_dropout = rate
    flat.sums.zero_()
    return worst
