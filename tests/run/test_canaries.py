"""Canaries of an audit against the mechanism, and what its adversaries score against plain loops."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from base.distributed import World
from corpus.batching import TightCut
from corpus.examples import read_examples
from helpers.small_runs import write_tokens
from model import GPT2Config, GPT2LMModel, LoRAConfig
from optimizer import FlatParameters
from privacy.clipping import BookKeeping, ClippingRule
from privacy.plan import PlanSettings
from run.canaries import (
    LONGEST_CONTEXT,
    OWN_CONTEXT,
    RAW,
    CanaryBatch,
    CanaryData,
    CanaryEngine,
    GradientAdversary,
    TextAdversary,
    own_sizes,
    quiet_coordinates,
    text_canaries,
    text_losses,
    toss_coins,
)

SHAPE = dict(vocab_size=60, n_positions=48, n_embd=16, n_layer=2, n_head=2)


def make_model(lora: LoRAConfig, vocabulary: int = 60) -> GPT2LMModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMModel(GPT2Config(**{**SHAPE, "vocab_size": vocabulary}), lora)
    model.freeze_for_training()
    return model


@pytest.fixture
def model():
    return make_model(LoRAConfig(2, 8.0))


@pytest.fixture
def examples(tmp_path):
    return read_examples(str(write_tokens(tmp_path / "train.jsonl", 12, seed=1)), "--train_data", 60, 32)


@pytest.mark.parametrize("kind", ["flat", "per_layer", "automatic"])
def test_a_gradient_canary_adds_its_clipped_size(model, examples, kind):
    """Flipping one coin moves the noiseless sum along one coordinate, by C for flat clipping, and nothing else."""
    flat, m, C = FlatParameters(model), 40, 0.7
    where = torch.arange(m) * flat.size // m
    engine = CanaryEngine(BookKeeping(model, flat, ClippingRule(kind, C)), flat, ClippingRule(kind, C), where)
    units = torch.arange(len(examples) + m)
    sums = {}
    for flipped in (None, 0, 17, m - 1):
        coins = np.arange(m) % 3 == 0
        if flipped is not None:
            coins[flipped] = not coins[flipped]
        flat.sums.zero_()
        for batch in CanaryData(examples, coins, None).micro_batches(units, TightCut(64)):
            losses = engine.accumulate(batch)
            assert isinstance(batch, CanaryBatch) == bool((losses == 0).all())
        sums[flipped] = flat.grad.double().clone()
    size = {"flat": C, "per_layer": C / math.sqrt(len(flat.named)), "automatic": C * RAW * C / (RAW * C + 0.01)}[kind]
    assert engine.size * C == pytest.approx(size, rel=1e-5)
    for flipped in (0, 17, m - 1):
        moved = (sums[flipped] - sums[None]).abs()
        assert moved[engine.coordinates[flipped]] == pytest.approx(size, rel=1e-5)
        moved[engine.coordinates[flipped]] = 0
        assert moved.max() < 1e-6


def test_quiet_coordinates_are_those_of_the_smallest_sums(model, examples):
    """With LoRA's B at zero, A has no gradient: its coordinates come first. And nothing is left in the sum."""
    flat, rule = FlatParameters(model), ClippingRule("flat", 1.0)
    engine = BookKeeping(model, flat, rule)
    for batch in examples.micro_batches(torch.arange(len(examples)), TightCut(10**6)):
        engine.accumulate(batch)
    sums = flat.grad.abs().clone()
    is_a = torch.cat([torch.full((parameter.numel(),), "lora_A" in name) for name, parameter in flat.named])
    assert not sums[is_a].any() and sums[~is_a].any()
    m = int(is_a.sum()) + 20
    quiet = quiet_coordinates(engine, flat, examples, m, TightCut(10**6), World())
    assert len(quiet.unique()) == m and torch.equal(quiet, quiet.sort().values) and not flat.sums.any()
    chosen = torch.zeros(flat.size, dtype=torch.bool).index_fill_(0, quiet, True)
    assert chosen[is_a].all() and sums[chosen].max() <= sums[~chosen].min() * (1 + 1e-4) + 1e-7


def test_an_excluded_canary_is_never_in_a_batch(examples):
    coins = np.random.default_rng(0).random(200) < 0.5
    drawn = torch.tensor([0, 3, 12, 13, 50, 120, 211])
    found = [batch.canaries.tolist() for batch in CanaryData(examples, coins, None).micro_batches(drawn, TightCut(64))
             if isinstance(batch, CanaryBatch)]
    assert sum(found, []) == [k - 12 for k in (12, 13, 50, 120, 211) if coins[k - 12]]
    texts = text_canaries(200, examples, make_model(LoRAConfig()), ClippingRule("flat", 1.0), World())
    data = CanaryData(examples, coins, texts)
    rows = [(row[: batch.ids.shape[1]], batch.targets[at].tolist())
            for batch in data.micro_batches(drawn, TightCut(64))
            for row, at in zip(batch.ids.tolist(), torch.arange(len(batch.targets)).split(batch.counts))]
    assert len(data) == 212 and len(rows) == 2 + sum(coins[k] for k in (0, 1, 38, 108, 199))
    for k in (0, 1, 38, 108, 199):
        *context, token = texts.tokens[texts.starts[k]:texts.starts[k + 1]].tolist()
        assert any(row[:len(context)] == context and targets == [token] for row, targets in rows) == coins[k]
    assert not list(data.micro_batches(torch.tensor([k + 12 for k in range(200) if not coins[k]]), TightCut(64)))


def test_coins_are_fair_and_fresh():
    a, b = toss_coins(100_001, World()), toss_coins(100_001, World())
    assert a.dtype == bool and len(a) == 100_001
    for share in (a.mean(), b.mean(), (a == b).mean(), (a[1:] == a[:-1]).mean()):
        assert abs(share - 0.5) < 4.5 * 0.5 / math.sqrt(100_000)


RULE = ClippingRule("flat", 0.5)


def split_up(texts) -> list[tuple[tuple[int, ...], int]]:
    """(context, token) of each text canary."""
    whole = [texts.tokens[start:end].tolist() for start, end in zip(texts.starts[:-1], texts.starts[1:])]
    assert (texts.first_scored == texts.lengths - 1).all()
    return [(tuple(context), token) for *context, token in whole]


def test_text_canaries_are_of_rare_tokens(examples):
    """The tokens that are never used, in three rounds, each behind the beginning of an example."""
    used = np.bincount(examples.tokens, minlength=200)
    unused = int((used == 0).sum())
    texts = split_up(text_canaries(2 * unused + 9, examples, make_model(LoRAConfig(), 200), RULE, World()))
    chosen = set()
    for start in (0, unused, 2 * unused):
        contexts, tokens = zip(*texts[start:start + unused])
        assert len(set(contexts)) == 1 and len(set(tokens)) == len(tokens) and not used[list(tokens)].any()
        (context,) = set(contexts)
        chosen.add(context)
        assert 1 <= len(context) <= LONGEST_CONTEXT
        assert any(examples.tokens[at:at + len(context)].tolist() == list(context) for at in examples.starts[:-1])
    assert len({token for _, token in texts}) == unused and len(chosen) == 3
    assert len(set(split_up(text_canaries(3000, examples, make_model(LoRAConfig()), RULE, World())))) == 3000
    counts = np.bincount(examples.tokens, minlength=60)  # where nearly all are used: the rarest quarter
    scarce = {token for _, token in split_up(text_canaries(50, examples, make_model(LoRAConfig()), RULE, World()))}
    assert len(scarce) == 15 and counts[list(scarce)].max() <= np.sort(counts)[14]


def test_text_canaries_of_a_frozen_embedding_have_contexts_of_their_own(examples):
    used = np.bincount(examples.tokens, minlength=200)
    texts = split_up(text_canaries(140, examples, make_model(LoRAConfig(2, 8.0), 200), RULE, World()))
    contexts, tokens = zip(*texts)
    assert len(set(contexts)) == len(set(tokens)) == 140 and {len(context) for context in contexts} == {OWN_CONTEXT}
    assert not used[np.array(contexts)].any() and not used[list(tokens)].any()


@pytest.mark.parametrize("kind", ["flat", "per_layer", "automatic"])
def test_own_sizes_are_what_the_engine_adds_to_the_token_s_row(examples, kind):
    """And the context that is chosen has larger ones than contexts have on the average."""
    rule, whole = ClippingRule(kind, 0.05), make_model(LoRAConfig(), 200)
    texts = text_canaries(9, examples, whole, rule, World())
    tokens = torch.tensor([token for _, token in split_up(texts)])
    contexts = [torch.from_numpy(examples.tokens[at:at + 5].astype(np.int64)) for at in examples.starts[:-1]]
    usual = np.mean([own_sizes(whole, rule, context, tokens[:2]).mean().item() for context in contexts])
    found = own_sizes(whole, rule, torch.tensor(split_up(texts)[0][0]), tokens)
    assert found.mean().item() > usual
    flat = FlatParameters(whole)
    engine = BookKeeping(whole, flat, rule)
    for k, token in enumerate(tokens.tolist()):
        flat.sums.zero_()
        for batch in texts.micro_batches(torch.tensor([k]), TightCut(64)):
            engine.accumulate(batch)
        left = flat.grad_of(whole.lm_head.weight)[token].norm().item()
        assert found[k].item() * 0.05 == pytest.approx(left, rel=1e-3)


def test_text_losses_are_those_of_a_plain_loop(examples):
    """Canaries behind contexts of several lengths, in their own order."""
    whole = make_model(LoRAConfig())
    drawn = (text_canaries(40, examples, whole, RULE, World()) for _ in range(100))
    texts = next(texts for texts in drawn if len(set(texts.lengths)) > 1)  # most draws; some have one length alone
    found = text_losses(whole, texts, torch.device("cpu"), TightCut(64))
    wide = whole.double()
    for loss, (context, token) in zip(found, split_up(texts)):
        with torch.no_grad():
            expected = -torch.log_softmax(wide(torch.tensor([context]))[0, -1], -1)[token].item()
        assert loss == pytest.approx(expected, rel=1e-5)


def test_the_text_adversary_scores_what_is_released(examples):
    """A plain loop over rows of the embedding; the line in p is a polynomial fit of degree 1."""
    class Plan:
        settings = PlanSettings(unit="example", N=100, batch=25, steps=3, clip=0.5, sigma=0.8, delta=1e-5)
        clipping_rule = RULE

    whole = make_model(LoRAConfig(), 200)
    first = int((np.bincount(examples.tokens, minlength=200) == 0).sum())  # canaries behind one context, then another
    texts = text_canaries(first + 20, examples, whole, RULE, World())
    flat, expected = FlatParameters(whole), np.zeros(first + 20)
    adversary = TextAdversary(texts, whole, RULE)
    engine = BookKeeping(whole, flat, RULE)
    assert adversary.wrap_engine(engine, flat, Plan, TightCut(64)) is engine
    for step in range(3):
        grad = torch.randn(flat.size, generator=torch.Generator().manual_seed(step)) / 25
        begin = flat.slices[id(whole.lm_head.weight)].start
        for part in (range(first), range(first, first + 20)):
            context = torch.tensor([split_up(texts)[part[0]][0]])
            tokens = [split_up(texts)[k][1] for k in part]
            with torch.no_grad():
                state, p = whole.transformer(context)[0, -1].double(), torch.softmax(whole(context)[0, -1], 0)
            rows = [grad[begin + 16 * token:begin + 16 * (token + 1)].double() for token in tokens]
            x = np.array([-(row @ state).item() / state.norm().item() * 25 / 0.5 for row in rows])
            size = own_sizes(whole, RULE, context[0], torch.tensor(tokens[:2])).mean().item()
            p = p[tokens].double().numpy()
            x = x - np.polyval(np.polyfit(p, x, 1), p) + 0.25 * size / 2
            expected[list(part)] += np.log(0.75 + 0.25 * norm.pdf(x, size, 0.8) / norm.pdf(x, 0, 0.8))
        kept = grad.clone()
        adversary.observe(grad)
        assert torch.equal(grad, kept)
    assert np.allclose(adversary.scores, expected, rtol=1e-4, atol=1e-6)


def test_the_adversary_scores_what_is_released(model, examples):
    class Plan:
        settings = PlanSettings(unit="example", N=100, batch=25, steps=3, clip=0.5, sigma=0.8, delta=1e-5)
        clipping_rule = ClippingRule("flat", 0.5)

    flat, expected = FlatParameters(model), np.zeros(10)
    adversary = GradientAdversary(10, examples, World())
    engine = adversary.wrap_engine(BookKeeping(model, flat, Plan.clipping_rule), flat, Plan, TightCut(10**6))
    for step in range(3):
        grad = torch.randn(flat.size, generator=torch.Generator().manual_seed(step)) / 25
        x = grad[engine.coordinates].double().numpy() * 25 / 0.5
        expected += np.log(0.75 + 0.25 * norm.pdf(x, 1, 0.8) / norm.pdf(x, 0, 0.8))
        kept = grad.clone()
        adversary.observe(grad)
        assert torch.equal(grad, kept)
    assert np.allclose(adversary.scores, expected, rtol=1e-4)
