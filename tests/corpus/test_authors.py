"""Texts with authors: who is held out, which texts are drawn; and that the author is the unit of clipping, by a loop of
autograd over authors."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from base.distributed import World
from corpus import author_cache
from corpus.authors import AuthorTexts, split_authors
from corpus.batching import PublicLengths, TightCut
from helpers.clipping_oracle import (
    CONFIG,
    RULES,
    Text,
    clipped_sum,
    difference,
    distance,
    make_model,
    norm,
    run_engine,
    unit_gradients,
)
from model import GPT2LMModel, LoRAConfig
from privacy.clipping import ClippingRule
from run import loop

# ------------------------------------------------------------------ who is held out, which texts are drawn


def test_held_out_authors():
    keys = np.array([author_cache.name_key(f"author {n}") for n in range(10_000)], dtype=np.uint64)
    for fraction in (0, 0.02, 0.5, 0.999):
        train, held = split_authors(keys, fraction, seed=1)
        assert sorted([*train, *held]) == list(range(10_000))
        assert abs(len(held) - fraction * 10_000) <= 4 * (10_000 * fraction * (1 - fraction)) ** 0.5
    held = {int(key) for key in keys[split_authors(keys, 0.02, 1)[1]]}
    other = {int(key) for key in keys[split_authors(keys, 0.02, 2)[1]]}
    assert len(held & other) < 20  # independent: 0.02 of some 200
    # by name alone: neither order nor neighbours matter
    fewer = np.random.default_rng(0).permutation(keys)[:5000]
    assert {int(key) for key in fewer[split_authors(fewer, 0.02, 1)[1]]} == held & {int(key) for key in fewer}


def units(sizes, samples=1, seed=0, length=9, keys=None) -> AuthorTexts:
    """Authors of so many random texts of 2 to `length` tokens; keys stand for the digests of their names."""
    generator = np.random.default_rng(5)
    first = np.concatenate([[0], np.cumsum(sizes)])
    lengths = generator.integers(2, length + 1, first[-1]).astype(np.int32)
    tokens = generator.integers(CONFIG.vocab_size, size=lengths.sum()).astype(np.uint16)
    keys = np.arange(len(sizes), dtype=np.uint64) * np.uint64(10**15) if keys is None else keys
    return AuthorTexts(tokens, np.cumsum(lengths) - lengths, lengths, first, keys, samples, seed)


def drawn(data: AuthorTexts, authors, step: int) -> dict[int, tuple]:
    """author -> the texts drawn."""
    texts, counts = data.draw(np.array(authors), step)
    ends = np.cumsum(counts)
    return {author: tuple(texts[end - count:end].tolist()) for author, end, count in zip(authors, ends, counts)}


def test_a_draw_is_of_the_authors_own_texts_without_repetition():
    data = units([1, 2, 5, 40], samples=4)
    for step in range(50):
        for author, texts in drawn(data, [0, 1, 2, 3], step).items():
            assert len(set(texts)) == len(texts) == min(4, data.sizes[author])
            assert all(data.first[author] <= text < data.first[author + 1] for text in texts)


def test_a_draw_depends_on_seed_step_and_author_alone():
    """Not on who else is drawn, in which order, by which rank or attempt."""
    data = units([6] * 30, samples=2, seed=3)
    together = drawn(data, list(range(30)), step=7)
    for author in range(30):
        assert drawn(data, [author], 7)[author] == together[author]
    assert drawn(data, list(range(29, -1, -1)), 7) == together
    assert drawn(data, list(range(30)), 8) != together
    assert drawn(units([6] * 30, samples=2, seed=4), list(range(30)), 7) != together


def test_a_draw_does_not_change_when_an_author_is_added():
    """The seed is public, so neighbouring data must give everyone else the same texts; the texts' numbers do shift."""
    keys = np.random.default_rng(0).integers(0, 2**63, 30).astype(np.uint64)
    everyone = drawn(units([6] * 30, samples=2, keys=keys), list(range(30)), step=7)
    fewer = drawn(units([6] * 29, samples=2, keys=np.delete(keys, 3)), list(range(29)), step=7)
    for author, texts in fewer.items():
        before = author if author < 3 else author + 1
        assert [text - 6 * author for text in texts] == [text - 6 * before for text in everyone[before]]


@pytest.mark.parametrize("biased", [False, True])
def test_every_pair_of_texts_is_equally_likely(biased):
    """chi-square over the 15 pairs of 6 texts and 4,000 draws; the control draws one of them half as often again."""
    data = units([6] * 40, samples=2)
    pairs = Counter()
    for step in range(100):
        for author, texts in drawn(data, list(range(40)), step).items():
            pair = tuple(sorted(text - data.first[author] for text in texts))
            if biased and pair == (4, 5) and step % 2 == 0:
                pair = (0, 1)
            pairs[pair] += 1
    counts = [pairs[pair] for pair in itertools.combinations(range(6), 2)]
    assert sum(counts) == 4000 and (chisquare(counts).pvalue > 1e-3) != biased


def test_successive_draws_of_an_author_are_independent():
    data = units([2] * 200)
    same = sum(drawn(data, list(range(200)), step)[a] == drawn(data, list(range(200)), step + 1)[a]
               for step in range(20) for a in range(200))
    assert abs(same / 4000 - 0.5) < 4 * 0.5 / 4000 ** 0.5


# ------------------------------------------------------------------ micro-batches


@pytest.mark.parametrize("budget", [1, 20, 64, 10 ** 6])
@pytest.mark.parametrize("samples", [1, 3])
def test_micro_batches_hold_every_drawn_author_once(samples, budget):
    data = units([1, 2, 3, 7, 1, 1, 30, 2, 4], samples)
    authors = torch.tensor([0, 2, 3, 4, 6, 7, 8])
    expected = Counter()
    for texts in drawn(data, authors.tolist(), 5).values():
        rows = [tuple(data.tokens[data.starts[t]:data.starts[t] + data.lengths[t]].tolist()) for t in texts]
        expected[tuple(sorted(rows))] += 1
    found = Counter()
    for batch in data.micro_batches(authors, TightCut(budget), step=5):
        M, T = batch.ids.shape
        K = batch.rows_per_unit
        assert M == K * batch.units and (M * T <= budget or batch.units == 1) and batch.texts == M
        rows = [[] for _ in range(M)]
        for position, target in zip(batch.positions.tolist(), batch.targets.tolist()):
            row, t = divmod(position, T)
            assert t == len(rows[row])  # every token but the first is scored, from the state before it
            rows[row].append(target)
        texts = [tuple([int(batch.ids[m, 0]), *rows[m]]) for m in range(M)]
        for m, text in enumerate(texts):
            assert text[:-1] == tuple(batch.ids[m, :len(text) - 1].tolist())
        assert batch.counts == [sum(len(text) - 1 for text in texts[u * K:(u + 1) * K]) for u in range(batch.units)]
        by_unit = torch.split(batch.weights, batch.counts)
        for u, weights in enumerate(by_unit):
            wanted = [1 / ((len(text) - 1) * K) for text in texts[u * K:(u + 1) * K] for _ in text[1:]]
            torch.testing.assert_close(weights, torch.tensor(wanted))
            found[tuple(sorted(texts[u * K:(u + 1) * K]))] += 1
        assert batch.tokens == sum(map(len, texts))
    assert found == expected


def test_an_empty_draw_has_no_micro_batch():
    assert list(units([1, 2]).micro_batches(torch.tensor([], dtype=torch.int64), TightCut(100), 1)) == []


def test_texts_never_used_and_their_expectation():
    """Counted over 60 Poisson steps; the expectation is within 4 standard deviations of the count."""
    data = units([1] * 200 + [3] * 100 + [40] * 5, samples=2)
    generator, q, steps = np.random.default_rng(1), 0.05, 60
    seen = set()
    for step in range(steps):
        authors = np.flatnonzero(generator.random(305) < q)
        seen |= set(itertools.chain.from_iterable(drawn(data, authors.tolist(), step).values()))
        list(data.micro_batches(torch.from_numpy(authors), TightCut(1000), step))
    assert data.used.sum() == len(seen)
    never = len(data.used) - len(seen)
    assert abs(never - data.never_used(q, steps, independent=True)) < 4 * (never * 0.9) ** 0.5


def test_texts_never_used_where_authors_come_once_an_epoch():
    """Two epochs and a half of random allocation, 20 steps an epoch."""
    data, generator = units([1] * 200 + [3] * 300, samples=2), np.random.default_rng(2)
    for epoch in range(3):
        places = generator.integers(20, size=500)
        for step in range(20 if epoch < 2 else 10):
            drawn_units = torch.from_numpy(np.flatnonzero(places == step))
            list(data.micro_batches(drawn_units, TightCut(1000), 20 * epoch + step))
    never, expected = len(data.used) - int(data.used.sum()), data.never_used(0.05, 50, independent=False)
    assert abs(never - expected) < 4 * (never * 0.9) ** 0.5
    assert abs(never - data.never_used(0.05, 50, independent=True)) > 4 * (never * 0.9) ** 0.5  # Poisson's is another


# ------------------------------------------------------------------ the author is the unit

LENGTHS = (4, 8, 16, 40, 207)


def authors_as_units(data: AuthorTexts, authors: list[int], step: int) -> list[list[Text]]:
    """What the clipping oracle calls units: lists of texts."""
    return [[Text(tuple(data.tokens[data.starts[t]:data.starts[t] + data.lengths[t]].tolist()), 1) for t in texts]
            for texts in drawn(data, authors, step).values()]


def double(batches):
    for batch in batches:
        batch.weights = batch.weights.double()
        yield batch


@pytest.mark.parametrize("engine", ["ghost", "materialise", "opacus"])
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("lora", [LoRAConfig(), LoRAConfig(3, 16.0)], ids=["full", "lora"])
@pytest.mark.parametrize("samples", [1, 3])
def test_per_author_clipping_equals_autograd_over_authors(samples, lora, kind, engine, monkeypatch):
    """In float64 but for the weights, which a micro-batch holds in float32 (2^-24 = 6e-8)."""
    data = units([1, 2, 4, 9, 1, 3], samples)
    authors, model = [0, 1, 2, 3, 5], make_model(lora)
    _, gradients = unit_gradients(model, authors_as_units(data, authors, 2))
    rule = ClippingRule(kind, sorted(map(norm, gradients))[2])  # some are clipped, some are not
    expected = clipped_sum(gradients, rule)
    for budget in (1, 40, 10 ** 6) if kind == "flat" else (40,):
        batches = list(double(data.micro_batches(torch.tensor(authors), PublicLengths(LENGTHS, budget), 2)))
        _, ours = run_engine(engine, model, rule, batches, monkeypatch)
        assert distance(ours, expected) < 1e-6


@pytest.mark.parametrize("engine", ["chosen", "opacus"])
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("lora", [LoRAConfig(), LoRAConfig(3, 16.0)], ids=["full", "lora"])
@pytest.mark.parametrize("samples", [1, 4, 50])
def test_an_author_with_a_huge_gradient_and_50_texts_moves_the_step_by_c(samples, lora, engine, kind, monkeypatch):
    """D and D plus the author: the noiseless sums differ by exactly C, whatever K; clipped by text it would be K C."""
    data = units([1, 2, 4, 50], samples)
    model, rule = make_model(lora, spread=1.0), ClippingRule(kind, 1e-6 if kind == "per_layer" else 1e-3, gamma=1e-9)
    _, gradients = unit_gradients(model, authors_as_units(data, [3], 1))
    assert norm(gradients[0]) > 100 * rule.C
    if kind == "per_layer":  # every parameter's part is clipped: the parts C / sqrt(n) add up to C
        assert min(map(float, (g.norm() for g in gradients[0].values()))) > rule.C
    cut = PublicLengths(LENGTHS, 200)
    batches = [list(double(data.micro_batches(torch.tensor(authors), cut, 1)))
               for authors in ([0, 1, 2], [0, 1, 2, 3])]
    sums = [run_engine(engine, model, rule, some, monkeypatch)[1] for some in batches]
    assert norm(difference(sums[1], sums[0])) == pytest.approx(rule.C, rel=2e-6)


# ------------------------------------------------------------------ evaluation


def test_the_evaluation_is_the_token_mean_whatever_the_world_size(monkeypatch):
    """Against a loop in float64; 2 to 12 ranks share 9 texts, so some have none. The ranks' sums are added by hand."""
    model = make_model(spread=0.2, dtype=torch.float32)
    texts = AuthorTexts(*(getattr(units([9]), name) for name in ("tokens", "starts", "lengths")), np.arange(10),
                        np.zeros(9, np.uint64), 1, 0)
    wide, total, count = GPT2LMModel(CONFIG).double(), 0.0, 0
    wide.load_state_dict(model.state_dict())
    for start, length in zip(texts.starts, texts.lengths):
        ids = torch.from_numpy(texts.tokens[start:start + length].astype(np.int64))
        total += torch.nn.functional.cross_entropy(wide(ids[None])[0, :-1], ids[1:], reduction="sum").item()
        count += length - 1
    for size, budget in ((1, 1), (1, 1000), (2, 16), (4, 1000), (12, 8)):
        parts = []
        monkeypatch.setattr(World, "all_reduce", lambda self, buffer: (parts.append(buffer.clone()), buffer)[1])
        for rank in range(size):
            loop.evaluate(model, texts, World(rank, size), TightCut(budget), bf16=False)
        nll, tokens, asked = sum(parts).tolist()
        assert asked == 0 and tokens == count and nll / tokens == pytest.approx(total / count, rel=1e-6)
        assert size <= 9 or any(part[1] == 0 for part in parts)
