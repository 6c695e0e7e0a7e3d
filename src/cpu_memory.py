"""Freed memory stays with the process, and large tensors lie on huge pages: for training on a CPU.

By itself glibc gives large freed blocks back to the system, which zeroes their pages again at the next allocation.
Book-keeping holds all notes of a micro-batch and frees them at its end, so every micro-batch paid for its pages anew.
Measured on 2 cores (GPT-2 small, whole model, 64 texts of 128 tokens): 0.85 of ordinary training's speed without this,
1.00 with it; the peak stayed 4.7 GB, ordinary training's rose from 4.3 to 5.6 GB.
"""

import ctypes
import os

# Parameters and limits of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
NEVER, LARGEST_THRESHOLD = -1, 32 << 20


def keep_memory() -> None:
    """Call before the first tensor is made. Does nothing where the C library is not glibc."""
    # Read by PyTorch once, at its first allocation: blocks of 2 MiB and more ask for huge pages, those included that
    # are too large for glibc to keep, the logits.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, NEVER)
        mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
