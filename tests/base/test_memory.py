"""Freed memory stays with the process: page faults of private training, against a process that does not ask for it."""

import platform
import subprocess
import sys

import pytest

from helpers.processes import ROOT

CHILD = """
import os, resource, sys
sys.path.insert(0, {src!r})
os.environ["THP_MEM_ALLOC_ENABLE"] = "0"  # huge pages would make every count small
import numpy, torch
from base.memory import keep_memory
if {keep}:
    keep_memory()
from corpus.batching import TightCut
from corpus.examples import Examples
from model import GPT2Config, GPT2LMModel
from optimizer import FlatParameters
from privacy.clipping import BookKeeping, ClippingRule

U, T = 16, 129
model = GPT2LMModel(GPT2Config(n_embd=256, n_layer=3, n_head=4, vocab_size=1000))
model.freeze_for_training()
engine = BookKeeping(model, FlatParameters(model), ClippingRule("flat", 1.0))
examples = Examples(numpy.arange(U * T, dtype=numpy.int32) % 1000, numpy.arange(U + 1) * T, numpy.ones(U, int), 0, 0)
(batch,) = examples.micro_batches(torch.arange(U), TightCut(U * T))
counts = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    engine.accumulate(batch)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
# The first ones grow the heap to what a micro-batch needs; glibc may grow one of its arenas once or twice more later.
print(sorted(counts[3:])[4])
"""


def faults(keep: bool) -> int:
    """Page faults, of 4 KiB each, of a micro-batch's forward and backward pass and its sums: the median of nine."""
    text = CHILD.format(src=str(ROOT / "src"), keep=keep)
    return int(subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has the setting")
def test_a_micro_batch_finds_its_memory_where_the_last_one_left_it():
    assert faults(keep=True) < 1_000
    assert faults(keep=False) > 5_000
