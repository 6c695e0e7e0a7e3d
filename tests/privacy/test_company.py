"""A unit's clipped gradient is the same bits whoever else is drawn: any companions, order and rank, in every dtype.

What a unit adds to the sum is its notes (the factors of its gradient, or the gradient itself) times its clip factor.
Both are taken from the engine as it works on real micro-batches, and compared as bytes.
"""

import copy
import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from base.products import by_rows
from corpus.authors import AuthorTexts
from corpus.batching import PublicLengths, TightCut, choose_lengths
from helpers.clipping_oracle import alone_from, as_examples, demo_model, make_model
from helpers.llamas import tiny_config
from losses import MicroBatch
from model import GPT2Config, LoRAConfig
from optimizer import FlatParameters
from privacy import clipping, opacus_engine
from privacy import unit_gradients as layers
from privacy.clipping import BookKeeping, ClippingRule
from privacy.company import fingerprint
from privacy.opacus_engine import OpacusEngine
from privacy.unit_gradients import Lookup, Outer, Ragged, Rows
from run.loop import autocast
from weights.building import frozen_matrices

SMALL = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=515, n_positions=72)
LENGTHS = (8, 16, 24, 40, 64)
CPU = torch.device("cpu")


# Grouped heads, norms of queries and keys, an untied head; and the tied head with every bias
LLAMA = tiny_config(vocab_size=515, hidden_size=64, intermediate_size=96, head_dim=16, max_position_embeddings=72)
BIASED = replace(LLAMA, model_type="llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
MODELS = {"gpt2 full": (SMALL, LoRAConfig()), "gpt2 lora": (SMALL, LoRAConfig(4, 32.0)),
          "llama full": (LLAMA, LoRAConfig()), "llama lora": (LLAMA, LoRAConfig(4, 32.0, targets=("all",))),
          "biased full": (BIASED, LoRAConfig()), "gpt2 bottleneck": (SMALL, LoRAConfig(bottleneck=4)),
          "llama bottleneck": (LLAMA, LoRAConfig(bottleneck=4))}


def model_of(name: str):
    config, lora = MODELS[name.removesuffix(", bf16 base")]
    model = make_model(lora, config, torch.float32, spread=0.1)
    for parameter in frozen_matrices(model) if name.endswith("base") else ():
        parameter.data = parameter.data.bfloat16()
    return model


def texts(lengths, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, SMALL.vocab_size, length) for length in lengths]


def as_authors(units: list[list[np.ndarray]], samples: int) -> AuthorTexts:
    """units: the texts of each author."""
    rows = [text for unit in units for text in unit]
    lengths = np.array([len(row) for row in rows])
    first = np.concatenate([[0], np.cumsum([len(unit) for unit in units])])
    keys = np.array([int.from_bytes(hashlib.sha256(unit[0].tobytes()).digest()[:8], "little") for unit in units],
                    dtype=np.uint64)
    return AuthorTexts(np.concatenate(rows).astype(np.int32), np.cumsum(lengths) - lengths, lengths, first, keys,
                       samples, 0)


def key_of(batch: MicroBatch, unit: int) -> bytes:
    return batch.ids[unit * batch.rows_per_unit:(unit + 1) * batch.rows_per_unit].numpy().tobytes()


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def notes_of(contribution, unit: int, counts: list[int]) -> list[torch.Tensor]:
    if isinstance(contribution, Outer):
        parts = (contribution.grads,) if contribution.grads is not None else (contribution.p, contribution.q)
    elif isinstance(contribution, Rows):
        parts = (contribution.grads,)
    elif isinstance(contribution, Lookup):
        parts = contribution.ids, contribution.rows
    else:
        assert isinstance(contribution, Ragged)
        begin = sum(counts[:unit])
        return [contribution.b[begin:begin + counts[unit]], contribution.h[begin:begin + counts[unit]]]
    return [part[unit] for part in parts]


class Spy(ClippingRule):
    """A clipping rule that keeps a digest of what every unit contributes."""

    def attach(self, engine) -> "Spy":
        object.__setattr__(self, "engine", engine)
        object.__setattr__(self, "seen", {})
        engine.rule = self
        return self

    def factors(self, norms_sq):
        factors, finite = super().factors(norms_sq)
        batch, engine = self.engine.batch, self.engine
        for unit in range(batch.units):
            digest = hashlib.sha256(bytes_of(factors[unit]))
            for _, contribution in engine.noted:
                for part in notes_of(contribution, unit, batch.counts):
                    digest.update(bytes_of(part))
            self.seen.setdefault(key_of(batch, unit), set()).add(digest.hexdigest())
        return factors, finite


class OpacusSpy(ClippingRule):
    """The same of Opacus's engine, whose per-unit gradients pass through sum_of_squares()."""

    def attach(self, engine, monkeypatch) -> "OpacusSpy":
        object.__setattr__(self, "seen", {})
        object.__setattr__(self, "grads", [])
        engine.rule = self
        run_part, squares = engine.accumulate_part, layers.sum_of_squares

        def keep(grads):
            self.grads.append(grads)
            return squares(grads)

        def part(batch):
            object.__setattr__(self, "batch", batch)
            self.grads.clear()
            return run_part(batch)

        monkeypatch.setattr(opacus_engine, "sum_of_squares", keep)
        monkeypatch.setattr(engine, "accumulate_part", part)
        return self

    def factors(self, norms_sq):
        factors, finite = super().factors(norms_sq)
        for unit in range(self.batch.units):
            if self.batch.counts[unit]:
                digest = hashlib.sha256(bytes_of(factors[unit]))
                for grad in self.grads:
                    digest.update(bytes_of(grad[unit]))
                self.seen.setdefault(key_of(self.batch, unit), set()).add(digest.hexdigest())
        return factors, finite


def contributions(engine: str, model, data, draws, cut, rule: str, bf16: bool, monkeypatch) -> dict[bytes, set[str]]:
    """unit -> digests of what it contributed in each of `draws`."""
    model = copy.deepcopy(model)
    flat = FlatParameters(model)
    if engine == "opacus":
        runner = OpacusEngine(model, flat, ClippingRule(rule, 0.5), 0.1)
        spy = OpacusSpy(rule, 0.5).attach(runner, monkeypatch)
    else:
        runner = BookKeeping(model, flat, ClippingRule(rule, 0.5), 0.1)
        spy = Spy(rule, 0.5).attach(runner)
    with autocast(CPU, bf16):
        for draw in draws:
            for batch in data.micro_batches(torch.tensor(draw), cut):
                runner.accumulate(batch)
    return spy.seen


# The first 12 units are watched: of several lengths, one of them in each class and two in some.
WATCHED = [2, 9, 12, 17, 24, 25, 33, 40, 41, 50, 57, 65]
COMPANY = [9] * 40 + [8, 10, 16, 18, 25, 26, 41, 42, 65] + [57] * 12 + [30] * 13


def companies(rng: np.random.Generator) -> list[list[int]]:
    """Draws of units 0 .. 11 alone, in pairs, with few and with many others, in other orders."""
    watched, others = list(range(12)), list(range(12, 12 + len(COMPANY)))
    draws = [[unit] for unit in watched] + [watched, others + watched]
    for share in (0.02, 0.1, 0.5):
        draws.append(list(rng.permutation(watched + [unit for unit in others if rng.random() < share])))
    return draws


def assert_one_contribution_each(seen: dict[bytes, set[str]], watched: int) -> None:
    assert len(seen) >= watched
    assert [len(digests) for digests in seen.values()] == [1] * len(seen)


CASES = [("book_keeping", 75, "flat", model, bf16) for model in MODELS for bf16 in (False, True)]
CASES += [("book_keeping", 75, "flat", f"{model} lora, bf16 base", bf16) for model in ("gpt2", "llama")
          for bf16 in (False, True)]
CASES += [("opacus", 75, "flat", "gpt2 lora", False), ("opacus", 75, "flat", "gpt2 full", True)]
CASES += [("opacus", 75, "flat", "llama full", False), ("opacus", 75, "flat", "llama lora", True)]
CASES += [("book_keeping", 0, "per_layer", "gpt2 full", True), ("book_keeping", 1e9, "automatic", "gpt2 lora", True)]
CASES += [("book_keeping", 0, "flat", "llama lora", True), ("book_keeping", 1e9, "per_layer", "llama full", True)]


@pytest.mark.parametrize("engine, cost, rule, model, bf16", CASES)
def test_the_same_bits_in_any_company(engine, cost, rule, model, bf16, monkeypatch):
    monkeypatch.setattr(layers, "TRAFFIC_COST", cost)
    data = as_examples(texts(WATCHED + COMPANY))
    seen = contributions(engine, model_of(model), data, companies(np.random.default_rng(5)),
                         PublicLengths(LENGTHS, 512), rule, bf16, monkeypatch)
    assert_one_contribution_each(seen, 12)


@pytest.mark.parametrize("cost", [0, 1e9], ids=["materialised", "ghost"])
@pytest.mark.parametrize("model, bf16", [("gpt2 full", False), ("llama full", True), ("biased full", False)])
def test_the_same_bits_of_products_formed_alone(cost, model, bf16, monkeypatch):
    """What is added is a product of the unit's own, whose bits come from its notes, its place in memory aside."""
    monkeypatch.setattr(layers, "TRAFFIC_COST", cost)
    alone_from(monkeypatch)
    formed, form = {}, layers.product_alone

    def product_alone(p, q, out):
        form(p, q, out)
        formed.setdefault(bytes_of(p) + bytes_of(q), set()).add(hashlib.sha256(bytes_of(out)).hexdigest())

    monkeypatch.setattr(layers, "product_alone", product_alone)
    seen = contributions("book_keeping", model_of(model), as_examples(texts(WATCHED + COMPANY)),
                         companies(np.random.default_rng(5))[:15], PublicLengths(LENGTHS, 512), "flat", bf16,
                         monkeypatch)
    assert_one_contribution_each(seen, 12)
    assert len(formed) > 12 and [len(found) for found in formed.values()] == [1] * len(formed)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("engine", ["book_keeping", "opacus"])
def test_the_same_bits_of_the_demo_checkpoint(engine, lora, bf16, monkeypatch):
    data = as_examples(texts(WATCHED + COMPANY))
    seen = contributions(engine, demo_model(lora), data, companies(np.random.default_rng(6)),
                         PublicLengths(LENGTHS, 2048), "flat", bf16, monkeypatch)
    assert_one_contribution_each(seen, 12)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_authors_with_several_texts(bf16, monkeypatch):
    rng = np.random.default_rng(3)
    units = [texts(rng.integers(5, 60, rng.integers(1, 6)), seed=k) for k in range(60)]
    draws = [list(rng.permutation([unit for unit in range(60) if rng.random() < share])) for share in
             (0.05, 0.2, 0.5, 0.9, 1.0, 1.0)]
    seen = contributions("book_keeping", model_of("gpt2 lora"), as_authors(units, 3), draws,
                         PublicLengths(LENGTHS, 512), "flat", bf16, monkeypatch)
    assert_one_contribution_each(seen, 60)


def test_what_was_drawn_decides_the_bits_where_it_decides_the_shapes(monkeypatch):
    """The controls: padding to what was drawn, products of all rows at once, matrices that begin anywhere."""
    data, draws = as_examples(texts(WATCHED + COMPANY)), companies(np.random.default_rng(5))

    def most_different(cut, bf16: bool) -> int:
        seen = contributions("book_keeping", model_of("gpt2 full"), data, draws, cut, "flat", bf16, monkeypatch)
        digests: dict[bytes, set[str]] = {}
        for ids, found in seen.items():  # another padding is another key: compare by the text without it
            digests.setdefault(np.trim_zeros(np.frombuffer(ids, np.int64), "b").tobytes(), set()).update(found)
        return max(map(len, digests.values()))

    assert most_different(TightCut(512), True) > 1
    with monkeypatch.context() as changed:
        changed.setitem(clipping.BLOCK_ROWS, "cpu", 0)
        assert most_different(PublicLengths(LENGTHS, 512), False) > 1


def test_kernels_see_one_shape():
    """by_rows() calls with `rows` rows and nothing else, and keeps every row."""
    shapes = []

    def double(block: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(block.shape))
        return 2 * block

    for n in (1, 7, 8, 9, 20):
        values = torch.randn(n, 3)
        assert torch.equal(by_rows(double, values, rows=8), 2 * values)
    assert set(shapes) == {(8, 3)} and len(shapes) == 1 + 1 + 1 + 2 + 3


# ------------------------------------------------------------------ the lengths


def test_lengths_follow_from_public_figures_alone():
    rng = np.random.default_rng(0)
    public = np.clip(rng.normal(58, 14, 4000).astype(int), 10, 120)
    lengths = choose_lengths(public, 511, 128, 2048, 64)
    assert lengths == tuple(sorted(set(lengths))) and lengths[-1] == 511
    assert all(length % 8 == 0 for length in lengths[:-1])
    assert choose_lengths(None, 511, 128, 2048, 64)[-1] == 511 and choose_lengths(public, 5, 8, 64, 8) == (5,)


@pytest.mark.parametrize("units, most", [(8, 1.45), (128, 1.12), (1024, 1.09)])
def test_little_is_padded(units, most):
    """Padded over real tokens where training texts are distributed like the public ones."""
    rng = np.random.default_rng(units)
    private, public = (np.clip(rng.normal(54, 13, n).astype(int), 16, 115) for n in (42_000, 4_600))
    cut = PublicLengths(choose_lengths(public, 511, units, 2048, 64), 2048)
    padded = real = 0
    for _ in range(20):
        drawn = np.sort(rng.choice(private, rng.poisson(units)))
        groups = list(cut.groups(drawn))
        assert [i for group, _ in groups for i in range(group.start, group.stop)] == list(range(len(drawn)))
        for group, T in groups:
            assert drawn[group].max() <= T and (group.stop - group.start) * T <= max(2048, T)
            padded += (group.stop - group.start) * T
        real += drawn.sum()
    assert 1 < padded / real < most


def test_gradients_of_other_bits_have_other_fingerprints():
    """The same values in another order have the same sums and norms."""
    grad = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    assert fingerprint(grad) == fingerprint(grad.clone())
    for other in (grad.flip(0).contiguous(), torch.nextafter(grad, grad + 1), grad[:2]):
        assert fingerprint(grad) != fingerprint(other)
