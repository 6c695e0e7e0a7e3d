"""What passes between the CPU and the device of a run: numbers that are read back, arrays that are sent.

A read makes the CPU wait until the device has done all that it was asked for, and the device then waits for new work.
So every read is made by read_back(), and PLACES is the list of them all. A training step has one; none is inside its
loop over micro-batches, but for that of --recompute. What a step sends goes by upload(), for which nobody waits.
tests/repository/test_other_device.py runs all of it on a device that refuses every other read.
"""

import torch
from torch import Tensor

# place -> what is read there, and how often
PLACES = {
    "step": "the sums of losses, units and tokens, the released gradient's norm, if all is finite: once a step",
    "recompute": "whether what ran again is the same: once a micro-batch of --recompute where whole matrices train",
    "evaluation": "the sums of losses and tokens: once an evaluation",
    "checkpoint": "the trained parameters and the optimizer's moments: a tensor at a time, as files are written",
    "company": "how far a unit's gradient moves in other company: once for each length, before a private bf16 run",
    "barrier": "one number, to wait for all ranks: at a command's start",
    "beams": "the best pairs of all contexts: once a token of a beam search",
    "samples": "the logits of a block of the vocabulary: once a token and block of a sampling",
    "beam room": "how many nodes are live: when a beam search's cache is full, every few tokens",
    "canaries": "an audit's scores and losses: once a step of an audit, and before it",
}


def read_back(place: str, tensor: Tensor, copy: bool = False) -> Tensor:
    """`tensor` on the CPU; itself where it is there already, or with `copy` a copy. place: one of PLACES."""
    if place not in PLACES:
        raise ValueError(f"{place!r}: not in the list of places that read from the device")
    return tensor.to("cpu", copy=copy)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`, without waiting for the copy; itself where that is the CPU."""
    if device.type == "cuda":  # from memory that is not pinned the copy would be made twice, the first by this thread
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
