"""Neighbouring data sets through the real batching, with data made to be worst: many like units, and one more that
would change every padding and every cut."""

import json
import os
import pathlib

import numpy as np
import pytest
import torch

from corpus.batching import PublicLengths, choose_lengths
from helpers.clipping_oracle import as_examples, demo_model
from helpers.llamas import write_folder
from helpers.plans import open_plan
from helpers.processes import ROOT, assert_user_error, run_script
from helpers.small_runs import flags, start_ranks, train
from optimizer import FlatParameters
from privacy.clipping import BookKeeping, ClippingRule, rounding_share
from privacy.company import MOST, influence_of_company
from privacy.opacus_engine import OpacusEngine
from privacy.plan import PlanSettings
from run.loop import autocast

DEMO = ROOT / "pretrained_checkpoints/demo"
CPU = torch.device("cpu")
MOST_TOKENS = 16384  # of a micro-batch, a GPU's default


def copies(count: int, length: int, extra: int | None) -> list[np.ndarray]:
    """`count` times one text of `length` tokens, and a text of `extra` tokens."""
    text = np.random.default_rng(1).integers(0, 1500, 64)
    return [text[:length]] * count + ([text[:extra]] if extra else [])


def write(path: pathlib.Path, texts: list[np.ndarray]) -> pathlib.Path:
    lines = (json.dumps({"context": text[:1].tolist(), "completion": text[1:].tolist()}) for text in texts)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def released(folder: pathlib.Path, extra: int | None, more: dict, avx2: bool) -> np.ndarray:
    """The noisy sum of the first step of src/gpt2_ft.py, every unit drawn: 60 copies of a text, and one of `extra`
    tokens."""
    texts, name = copies(60, 8, extra), f"{extra}"
    arguments = flags(folder / name, train_data=write(folder / f"{name}.jsonl", texts),
                      valid_data=write(folder / "valid.jsonl", copies(3, 20, 8)), train_batch_size=len(texts),
                      noise_multiplier=1e-6, max_step=1, lora_dropout=0,
                      **{"model_card": DEMO, "init_checkpoint": DEMO, **more})
    file = str(folder / f"{name}.sum")
    if avx2:
        code = ("import runpy, sys; sys.path[:0] = ['src', 'tests']; from helpers import fork_server\n"
                f"fork_server.fault_released({file!r})\n"
                "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
        assert run_script("-c", code, "src/gpt2_ft.py", *arguments, env=environment).returncode == 0
    else:
        train(arguments, faults={0: [["released", {"file": file}]]})
    return np.fromfile(file)


LLAMA = {"init_checkpoint": "llama", "model_card": None}  # made below; its shape comes with it
LARGE = {"vocab_size": 1500, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "tie_word_embeddings": False}


@pytest.mark.parametrize("more, avx2", [({}, False), ({"bf16": True}, False), ({"bf16": True, "lora_dim": 0}, True),
                                        ({"bf16": True, "grad_engine": "opacus"}, False),
                                        ({**LLAMA, "lora_target": "all"}, False),
                                        ({**LLAMA, "bf16": True, "lora_dim": 0}, True)],
                         ids=["float32", "bf16", "bf16 full", "bf16 opacus", "llama", "llama bf16 full"])
def test_one_more_unit_through_the_script(tmp_path, more, avx2):
    """The sums with and without one unit more, a token longer than the others, under the same noise.

    With PyTorch's AVX2 kernels and without public lengths they differ by 1.2 C. The noise is 1e-6 C a coordinate.
    """
    if "model_card" in more:
        write_folder("qwen3", tmp_path / "llama", **LARGE)
        more = {**more, "init_checkpoint": tmp_path / "llama"}
    one, other = (released(tmp_path, extra, more, avx2) for extra in (None, 9))
    kappa = json.loads((tmp_path / "9/privacy.json").read_text())["rounding"]
    assert 1 - 1e-3 < np.linalg.norm(other - one) < 1 + kappa


def summed(model, texts: list[np.ndarray], cut, bf16: bool, engine: type = BookKeeping) -> torch.Tensor:
    flat = FlatParameters(model)
    runner = engine(model, flat, ClippingRule("flat", 1.0))
    with autocast(CPU, bf16):
        for batch in as_examples(texts).micro_batches(torch.arange(len(texts)), cut):
            runner.accumulate(batch)
    return flat.grad.double()


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("count, length, extra", [(100, 8, 9), (1000, 8, 9), (1000, 8, 40), (300, 33, 34)])
def test_a_thousand_like_units(count, length, extra, lora, bf16):
    """What the others move by stays within what the noise pays for, at a GPU's token budget and at a CPU's."""
    kappa = rounding_share(count, 63, 1)
    for budget in (2048, MOST_TOKENS):
        cut = PublicLengths(choose_lengths(np.full(100, length), 63, count, budget, 64), budget)
        fewer, more = (summed(demo_model(lora), copies(count, length, one), cut, bf16) for one in (None, extra))
        alone = summed(demo_model(lora), copies(0, length, extra), cut, bf16)
        assert (more - fewer).norm() <= 1 + kappa
        assert (more - fewer - alone).norm() <= kappa


@pytest.mark.slow
def test_the_control_like_units_padded_to_what_was_drawn():
    """With PyTorch's AVX2 kernels in bfloat16, padded to the longest of a micro-batch: 800 others move by 6 C."""
    code = ("import sys; sys.path[:0] = ['src', 'tests', 'tests/privacy']; from test_neighbours import *\n"
            "from corpus.batching import TightCut\n"
            "cut = TightCut(MOST_TOKENS)\n"
            "units = (800, 8, None), (800, 8, 9), (0, 8, 9)\n"
            "sums = [summed(demo_model(False), copies(*one), cut, True) for one in units]\n"
            "print((sums[1] - sums[0] - sums[2]).norm().item())")
    process = run_script("-c", code, env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"})
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) > 1


def test_what_rounding_may_move_is_paid_for(tmp_path):
    """The noise has sigma C (1 + kappa): a million coordinates pin it to 0.3 %, kappa being 10 % here."""
    settings = PlanSettings("example", 100, 10, 5, 0.5, 2.0, 1e-5, rounding=0.1)
    plan = open_plan(tmp_path, settings)
    plan.open_step(1)
    sums = torch.zeros(1_000_000, dtype=torch.float64)
    noise = plan.release(sums, len(sums)) * 10
    assert noise.std().item() == pytest.approx(2.0 * 0.5 * 1.1, rel=3e-3)
    assert plan.noise_norm(100) == pytest.approx(2.0 * 0.5 * 1.1 * 10 / 10)


# ------------------------------------------------------------------ what is tried before a run


@pytest.mark.parametrize("engine", [BookKeeping, OpacusEngine])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_company_has_no_influence_here(engine, lora):
    model = demo_model(lora)
    flat = FlatParameters(model)
    cut = PublicLengths((8, 16, 40), 512)
    assert influence_of_company(engine(model, flat, ClippingRule("flat", 1.0)), model, flat, cut, True) < MOST / 10
    assert not flat.sums.any() and model.training


FAULTY = {
    "products": "from base import products as place; name = 'product'; "
                "busy = lambda a: a.abs().sum(1).gt(0).sum() > 64",
    "attention of many": "import torch.nn.functional as place; name = 'scaled_dot_product_attention'; "
                         "busy = lambda a: len(a) > 40"}


@pytest.mark.parametrize("kernel, low, cure", [
    ("products", {"bf16": True}, "leave --bf16 out"), ("attention of many", {"bf16": True}, "leave --bf16 out"),
    ("products", {"base_dtype": "bf16"}, "give --base_dtype float32")])
def test_a_machine_whose_kernels_see_company_is_refused(tmp_path, kernel, low, cure):
    """A kernel that computes in another way when it has more rows, or forty texts; those of this machine have no
    such switch, so one is put in."""
    faulty = (f"import runpy, sys; sys.path.insert(0, 'src'); {FAULTY[kernel]}; kept = getattr(place, name)\n"
              "setattr(place, name, lambda a, *rest, **more: kept(a, *rest, **more) * (1.004 if busy(a) else 1))\n"
              "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    arguments = flags(tmp_path / "work", **low)
    process = run_script("-c", faulty, "src/gpt2_ft.py", *arguments)
    assert_user_error(process, f"--{next(iter(low))}", "gradients of the others", cure)
    assert not list((tmp_path / "work").glob("model.*"))


@pytest.mark.parametrize("factor, status", [(1.001, 2), (1.0, 0)], ids=["unlike", "like"])
def test_ranks_that_compute_in_different_ways_are_refused(tmp_path, factor, status):
    """One more unit moves those behind it to another rank: of 60 + 60 units on AVX-512 and AVX2 kernels the sum of the
    others moves by 0.8 C."""
    ranks = start_ranks(flags(tmp_path / "work", bf16=True, lora_dropout=0.1), 2, {1: [["unlike", {"factor": factor}]]})
    assert [rank.wait() for rank in ranks] == [status] * 2, ranks[0].stderr
    assert bool(list((tmp_path / "work").glob("model.*"))) == (status == 0)
    if status:
        assert "--bf16" in ranks[0].error and "machines of one kind" in ranks[0].error and not ranks[1].stderr


def test_ranks_that_round_in_different_ways_are_refused(tmp_path):
    """In float32, by the last digit of each product, as with other numbers of threads."""
    ranks = start_ranks(flags(tmp_path / "work"), 2, {1: [["unlike", {"factor": 1 + 2**-23}]]})
    assert [rank.wait() for rank in ranks] == [2, 2], ranks[0].stderr
    assert "OMP_NUM_THREADS" in ranks[0].error and "machines of one kind" in ranks[0].error and not ranks[1].stderr
    assert not list((tmp_path / "work").glob("model.*"))
