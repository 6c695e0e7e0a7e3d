"""--recompute: the sums have the same bits, in every rule, engine and kind of note; and what is kept is less."""

import copy
import functools

import numpy as np
import pytest
import torch

from base.errors import UserError
from base.recompute import Forgotten, recomputed
from corpus.batching import PublicLengths
from helpers.clipping_oracle import CONFIG, as_examples, draw_units, make_model, pack
from helpers.llamas import tiny_config
from language_model import LoRAConfig
from optimizer import FlatParameters
from privacy import clipping
from privacy import unit_gradients as layers
from privacy.clipping import BookKeeping, ClippingRule, NonPrivate
from privacy.opacus_engine import OpacusEngine
from run.loop import autocast

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch's remark on Opacus's hooks
LLAMA = tiny_config()
MODELS = {"gpt2 full": (CONFIG, LoRAConfig()), "gpt2 lora": (CONFIG, LoRAConfig(3, 8.0, 0.3)),
          "llama full": (LLAMA, LoRAConfig()), "llama lora": (LLAMA, LoRAConfig(3, 8.0, 0.3, targets=("all",))),
          "llama tied": (tiny_config(tie_word_embeddings=True, attention_bias=True), LoRAConfig())}
NEVER, ALWAYS = 1e9, 0


@functools.cache
def model_of(name: str):
    config, lora = MODELS[name]
    return make_model(lora, config, torch.float32)


def batches(vocabulary: int):
    rng = np.random.default_rng(0)
    data = as_examples([rng.integers(0, vocabulary, length) for length in (5, 9, 9, 14, 30, 31)])
    return list(data.micro_batches(torch.arange(6), PublicLengths((16, 32), 96)))


def engine_of(kind: str, model, rule: str, recompute: bool):
    model = copy.deepcopy(model)
    flat = FlatParameters(model, extra=0, sums=torch.float32 if kind == "ordinary" else torch.float64)
    if kind == "ordinary":
        return NonPrivate(model, flat, 0.1, recompute), flat
    build = {"book_keeping": BookKeeping, "opacus": OpacusEngine}[kind]
    return build(model, flat, ClippingRule(rule, 0.5), 0.1, recompute=recompute), flat


def results(kind: str, model, rule: str, bf16: bool, recompute: bool) -> list[torch.Tensor]:
    engine, flat = engine_of(kind, model, rule, recompute)
    torch.manual_seed(0)  # of dropout
    with autocast(torch.device("cpu"), bf16):
        losses = [engine.accumulate(batch) for batch in batches(model.config.vocab_size)]
    return [*losses, flat.sums, torch.get_rng_state()]


CASES = [("book_keeping", rule, cost, worth) for rule in clipping.CLIPPING_RULES
         for cost, worth in ((75, 4), (0, ALWAYS), (1e9, ALWAYS), (75, NEVER))]
CASES += [("opacus", "flat", 75, 4), ("ordinary", "flat", 75, 4)]


@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_with_and_without(name, monkeypatch):
    """cost: notes formed or not; worth: notes kept, dropped or by their size. The generator is where it was, too."""
    for bf16 in (False, True):
        for kind, rule, cost, worth in CASES:
            monkeypatch.setattr(layers, "TRAFFIC_COST", cost)
            monkeypatch.setattr(clipping, "WORTH_KEEPING", worth)
            plain, again = (results(kind, model_of(name), rule, bf16, recompute) for recompute in (False, True))
            for one, other in zip(plain, again, strict=True):
                assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), (kind, rule, cost, worth, bf16)
            assert plain[-2].any()


def runs_of_blocks(model, recompute: bool, cost: float, monkeypatch) -> int:
    """How often a block runs in one micro-batch."""
    monkeypatch.setattr(layers, "TRAFFIC_COST", cost)
    engine, _ = engine_of("book_keeping", model, "flat", recompute)
    count, block = [], type(engine.model.transformer.blocks[0])
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda *rest, **more: [count.append(1), forward(*rest, **more)][1])
    engine.accumulate(batches(model.config.vocab_size)[-1])
    monkeypatch.undo()
    return len(count) // len(engine.model.transformer.blocks)


def test_large_notes_are_had_again_and_small_ones_kept(monkeypatch):
    """Inputs and output gradients of every projection are large, the gradients of adapters of rank 1 small."""
    assert runs_of_blocks(model_of("llama full"), False, 1e9, monkeypatch) == 1
    assert runs_of_blocks(model_of("llama full"), True, 1e9, monkeypatch) == 3
    adapted = make_model(LoRAConfig(1, 8.0, targets=("all",)), LLAMA, torch.float32)
    assert runs_of_blocks(adapted, True, 0, monkeypatch) == 2


def test_a_block_that_stands_twice_is_refused_when_it_runs():
    """Its backward passes come one after the other, so the first has been noted when the second begins."""
    model = make_model(LoRAConfig(), LLAMA)
    model.transformer.layers[1] = model.transformer.layers[0]
    engine = BookKeeping(model, FlatParameters(model), ClippingRule("flat", 1.0), recompute=True)
    with pytest.raises(RuntimeError, match="ran twice in one micro-batch"):
        engine.accumulate(pack(draw_units(2)))
    assert not engine.flat.sums.any()


def test_a_machine_that_computes_a_block_in_another_way_each_time_ends_the_run(monkeypatch):
    """As kernels do that add in no fixed order: the norm would be another gradient's."""
    engine, flat = engine_of("book_keeping", model_of("gpt2 full"), "flat", True)
    differentiate, calls = Forgotten.differentiate, []

    def inexact(block, grad):
        calls.append(1)
        return differentiate(block, grad * (1 + 2**-23) if len(calls) > 2 else grad)

    monkeypatch.setattr(Forgotten, "differentiate", inexact)
    with pytest.raises(UserError, match="--recompute: this machine computes a block in another way each time"):
        engine.accumulate(batches(CONFIG.vocab_size)[0])


def test_nothing_but_the_input_is_kept():
    """By autograd, of a function that would keep three tensors; and without gradients nothing is done twice."""
    runs = []

    def function(x):
        runs.append(1)
        return x.exp().sin().exp()

    x = torch.randn(100, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        y = recomputed(function, x)
        assert len(runs) == 1 and not kept
    y.sum().backward()
    expected, = torch.autograd.grad(function(x).sum(), x)
    assert torch.equal(x.grad, expected) and len(runs) == 3
    with torch.no_grad():
        recomputed(function, x)
    assert len(runs) == 4
