"""Samples against the exact softmax, the filters against plain loops in float64, and a sample against its company."""

import math
import random

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from base import products
from base.products import FixedLinear
from decoding import line_decoder
from decoding.line_decoder import LineDecoder
from decoding.sampling import GROUP, Job, SamplingRules, choose, sample_all, uniforms, weights
from helpers.llamas import tiny_config
from llama import LlamaLMModel
from model import GPT2Config, GPT2LMModel

SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.7},
    "all": {"temperature": 1.3, "top_k": 6, "top_p": 0.8},
}


def slow_softmax(logits, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """One row in float64, token by token: the specification read aloud."""
    x = np.array([float(value) / temperature for value in logits])
    kept = set(range(len(x)))
    if top_k:
        kth = sorted(x, reverse=True)[min(top_k, len(x)) - 1]
        kept = {n for n in kept if x[n] >= kth}
    p = np.array([math.exp(x[n] - max(x)) if n in kept else 0.0 for n in range(len(x))])
    p /= p.sum()
    total, least = 0.0, 0.0
    for value in sorted(p, reverse=True):
        total, least = total + value, value
        if total >= top_p:
            break
    if top_p < 1:
        p = np.where(p >= least, p, 0.0)
    return p / p.sum()


def random_logits(rows: int, V: int, ties: bool) -> np.ndarray:
    logits = np.random.default_rng(V).normal(0, 3, (rows, V)).astype(np.float32)
    return np.round(logits * 2) / 2 if ties else logits  # as bfloat16's: many are equal


def padded(logits: np.ndarray) -> np.ndarray:
    """As TopKHead.logits() gives them."""
    missing = -logits.shape[1] % GROUP
    return np.pad(logits, ((0, 0), (0, missing)), constant_values=-np.inf)


@pytest.mark.parametrize("ties", [False, True], ids=["different", "ties"])
@pytest.mark.parametrize("V", [5, 64, 700])
@pytest.mark.parametrize("name", SETTINGS)
def test_weights_are_those_of_a_plain_loop(name, V, ties):
    logits = random_logits(20, V, ties)
    w = weights(padded(logits), SamplingRules(1, **SETTINGS[name]))
    for row, found in zip(logits, w.astype(np.float64), strict=True):
        want = slow_softmax(row, **SETTINGS[name])
        # exp() of a float32 of size x is off by x 2^-24, and here x is below 60
        np.testing.assert_allclose(found[:V] / found.sum(), want, rtol=60 * 2**-23)
        assert not found[V:].any()


def test_a_number_chooses_the_token_in_whose_share_it_lies():
    V, draws = 300, 2000
    w = weights(padded(random_logits(1, V, False)), SamplingRules(1, top_k=40))
    upto = np.cumsum(w[0].astype(np.float64))
    u = np.random.default_rng(0).random(draws)
    u[:3] = 0.0, 1 - 2**-53, upto[7] / upto[-1]
    token, logprob = choose(np.repeat(w, draws, 0), u)
    off = np.abs(token - np.searchsorted(upto, u * upto[-1], side="right"))
    # groups' sums are float32, so that a number within 2^-20 of a border may fall on its other side
    near = np.min(np.abs(u[:, None] - upto / upto[-1]), axis=1) < 2**-20
    assert not off[~near].any() and near.sum() < 20
    assert (w[0][token] > 0).all()
    np.testing.assert_allclose(logprob, np.log(w[0][token] / upto[-1]), rtol=1e-6)


def test_streams_depend_on_seed_prompt_and_sample_alone():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**64 - 1, 0, 0)]
    drawn = [tuple(uniforms(*key, 50)) for key in keys]
    assert len(set(drawn)) == len(keys) and len({x for row in drawn for x in row}) == 50 * len(keys)
    assert uniforms(0, 0, 0, 7).tolist() == list(drawn[0][:7])
    # each sample may use 2^64 numbers before it reaches another's: they are in the counter's third word
    blocks = np.random.Philox(key=np.array([3, 4], np.uint64), counter=np.array([0, 0, 1, 0], np.uint64)).random_raw(3)
    other = np.random.Philox(key=np.array([3, 4], np.uint64)).advance(2**128).random_raw(3)
    assert blocks.tolist() == other.tolist()


def gpt2(width: int = 32, vocab: int = 11) -> GPT2LMModel:
    torch.manual_seed(0)
    model = GPT2LMModel(GPT2Config(width, 2, 4, vocab_size=vocab, n_positions=208))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)
    return model


def llama(vocab: int = 11) -> LlamaLMModel:
    torch.manual_seed(0)
    model = LlamaLMModel(tiny_config(vocab_size=vocab, eos_token_id=(10,)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(12 if parameter.dim() > 1 else 1)
    return model


MODELS = {"gpt2": gpt2, "llama": llama}
CONTEXT = (3, 1, 4)


def probabilities(model, ends: frozenset[int], rules: dict) -> dict[tuple[int, ...], float]:
    """Of every sample of at most two tokens after CONTEXT, by whole forward passes in float64."""
    model = model.double()

    def after(*tokens: int) -> np.ndarray:
        with torch.no_grad():
            return slow_softmax(model(torch.tensor([[*CONTEXT, *tokens]]))[0, -1].numpy(), **rules)

    found = {}
    for first, p in enumerate(after()):
        if first in ends:
            found[first,] = p
        else:
            found |= {(first, second): p * q for second, q in enumerate(after(first))}
    assert sum(found.values()) == pytest.approx(1)
    return found


def p_value(samples: list[tuple[int, ...]], want: dict[tuple[int, ...], float]) -> float:
    """Pearson's chi-square of the samples' counts; cells of fewer than 5 expected are one cell."""
    assert all(want[sample] > 0 for sample in samples)
    count = {cell: 0 for cell in want}
    for sample in samples:
        count[sample] += 1
    cells = [(count[cell], p * len(samples)) for cell, p in want.items() if p > 0]
    few = [cell for cell in cells if cell[1] < 5]
    cells = [cell for cell in cells if cell[1] >= 5]
    if sum(expected for _, expected in few) >= 5:
        cells.append(tuple(map(sum, zip(*few, strict=True))))
    statistic = sum((found - expected) ** 2 / expected for found, expected in cells)
    return chi2.sf(statistic, len(cells) - 1)


def two_tokens(model, rules: dict, count: int, ends: frozenset[int]) -> list:
    decoder = LineDecoder(model, 256, 8, rows=256)
    jobs = [Job(n, 0, n, CONTEXT) for n in range(count)]
    return list(sample_all(jobs, decoder, SamplingRules(2, ends, **rules), seed=7))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", MODELS)
def test_samples_follow_the_exact_distribution(family, name):
    """Seeded, so it fails always or never; the threshold is what one of 12 true tests falls below in 1 of 800 suites.
    Negative control: the same samples are not those of a temperature that is 30 % higher."""
    rules, ends = SETTINGS[name], frozenset([10])
    samples = two_tokens(MODELS[family](), rules, 6000, ends)
    want = probabilities(MODELS[family](), ends, rules)
    drawn = [tuple(sample.tokens) for sample in samples]
    assert p_value(drawn, want) > 1e-4
    for sample in samples[:200]:
        # float32 logits of size 30 after a few layers
        assert sample.logprob == pytest.approx(math.log(want[tuple(sample.tokens)]), abs=1e-3)
    if name in ("plain", "temperature", "hot"):
        other = {"temperature": 1.3 * rules.get("temperature", 1.0)}
        assert p_value(drawn, probabilities(MODELS[family](), ends, other)) < 1e-6


def jobs_of(prompts: int, samples: int, vocab: int, longest: int) -> list[Job]:
    draw = random.Random(prompts)
    lengths = [draw.randint(longest // 3, longest) for _ in range(prompts)]
    contexts = [tuple(draw.randrange(vocab) for _ in range(length)) for length in lengths]
    return [Job(i * samples + j, i, j, c) for i, c in enumerate(contexts) for j in range(samples)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", MODELS)
def test_a_sample_does_not_depend_on_its_company(family, dtype, monkeypatch):
    """Tokens and every bit of the log-probabilities, for contexts on both sides of REACH, with early ends."""
    vocab, jobs = 300, jobs_of(7, 2, 300, 130)

    def drawn(slots: int, jobs: list[Job], rows: int = 32) -> dict:
        model = MODELS[family](vocab=vocab).to(dtype)
        with torch.no_grad():
            model.lm_head.weight.mul_(0.2)
        decoder = LineDecoder(model, slots, 150, rows)
        rules = SamplingRules(20, frozenset(range(6)), top_p=0.98)
        return {sample.index: sample for sample in sample_all(jobs, decoder, rules, seed=1)}

    alone = drawn(1, jobs)
    lengths = {len(sample.tokens) for sample in alone.values()}
    assert len(lengths) > 3
    assert drawn(5, jobs) == drawn(14, jobs[::-1]) == alone
    assert drawn(4, jobs[::3]) == {job.index: alone[job.index] for job in jobs[::3]}
    # Negative control: products whose results change by 1e-6 for each further row.
    whole = products.by_rows
    monkeypatch.setattr(products, "by_rows", lambda function, *operands, rows=None: (
        whole(function, *operands, rows=rows) * (1 + 1e-6 * len(operands[0]))))
    assert dtype == torch.bfloat16 or drawn(14, jobs) != alone


def test_fixed_rows_are_the_plain_product():
    torch.manual_seed(0)
    for n in (1, 31, 32, 70):
        x, weight, bias = torch.randn(n, 48), torch.randn(40, 48), torch.randn(40)
        want = x.double() @ weight.double().T + bias
        torch.testing.assert_close(FixedLinear(weight, bias, 32)(x).double(), want, rtol=0, atol=48 * 2**-23 * 40)


@pytest.mark.parametrize("family", MODELS)
def test_states_are_those_of_a_whole_pass(family, monkeypatch):
    """In float64, where slots are taken again, contexts are known from before, and lengths cross REACH."""
    monkeypatch.setattr(line_decoder, "REACH", 8)
    monkeypatch.setattr(line_decoder, "READ_TOKENS", 20)
    model = MODELS[family](vocab=30).double()
    decoder, draw = LineDecoder(model, 4, 60, rows=4), random.Random(0)
    line: dict[int, list[int]] = {}
    for step in range(30):
        if step % 7 == 0:
            slots = np.array(sorted(draw.sample(range(4), 2 + step % 3)))
            contexts = [tuple(draw.randrange(30) for _ in range(draw.choice([1, 5, 17]))) for _ in slots]
            contexts[1] = contexts[0]
            states = decoder.admit(slots, contexts)
            line |= {int(slot): list(context) for slot, context in zip(slots, contexts, strict=True)}
        else:
            slots = np.array(sorted(line))
            tokens = np.array([draw.randrange(30) for _ in slots])
            for slot, token in zip(slots, tokens, strict=True):
                line[slot].append(int(token))
            states = decoder.advance(slots, tokens)
        for slot, state in zip(slots, states, strict=True):
            with torch.no_grad():
                want = model.transformer(torch.tensor([line[int(slot)]]))[0, -1]
            torch.testing.assert_close(state, want, rtol=0, atol=1e-9 * want.abs().max().item())
