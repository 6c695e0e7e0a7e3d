"""The search against a literal, slow transcription of the algorithm; the cache against whole forward passes."""

import json
import math
import random

import numpy as np
import pytest
import torch

from base import products
from base.products import PackedLinear
from decoding import tree_decoder
from decoding.beam_search import NOTHING, Beams, SearchSettings, beam_search
from decoding.top_k_head import GROUP, Edits, TopKHead
from decoding.tree_decoder import TreeDecoder
from families import family_of
from helpers.llamas import tiny_config
from language_model import LanguageModel
from model import GPT2Config, LoRAConfig
from weights.checkpoint import load_model


def slow_search(logits_after, context: list[int], s: SearchSettings) -> tuple[list[int], float]:
    """One context, one hypothesis at a time, every step, float64: the specification read aloud. (tokens, score)."""
    beams = [(0.0, [])] * s.beam
    best_score, best_tokens = -math.inf, []
    for i in range(s.eval_len):
        total = []
        for j, (score, tokens) in enumerate(beams):
            if score == -math.inf or (i == 0 and j > 0):
                total.append(np.full_like(total[0] if total else logits_after(context), -math.inf))
                continue
            logits = logits_after(context + tokens).copy()
            if s.repetition_penalty != 1:
                for token in set(tokens):
                    logits[token] *= s.repetition_penalty if logits[token] < 0 else 1 / s.repetition_penalty
            if i < s.min_length:
                logits[list(s.eos_ids)] = -math.inf
            n = s.no_repeat_ngram_size
            for start in range(len(tokens) - n + 1) if n else ():
                if tokens[start:start + n - 1] == tokens[len(tokens) - n + 1:]:
                    logits[tokens[start + n - 1]] = -math.inf
            top = logits.max()
            total.append(logits if top == -math.inf else score + logits - top - math.log(np.exp(logits - top).sum()))
        total = np.stack(total)
        order = np.argsort(-total, axis=None, kind="stable")[:s.beam]
        beams = [(total.flat[o], beams[o // total.shape[1]][1] + [int(o % total.shape[1])]) for o in order]
        for j, (score, tokens) in enumerate(beams):
            if tokens[-1] in s.eos_ids:
                if score / len(tokens) ** s.length_penalty > best_score:
                    best_score, best_tokens = score / len(tokens) ** s.length_penalty, tokens
                beams[j] = (-math.inf, tokens)
    for score, tokens in beams:
        if score / s.eval_len ** s.length_penalty > best_score:
            best_score, best_tokens = score / s.eval_len ** s.length_penalty, tokens
    return best_tokens, best_score


class TableDecoder:
    """A language model without a network, on whole sequences: the state is a random function of the last two tokens
    and of the length (without which two orders of the same steps would tie)."""

    def __init__(self, V: int, seed: int, sharpness: float, block: int = GROUP):
        generator = torch.Generator().manual_seed(seed)
        self.states = torch.randn(V, V, 8, generator=generator)
        self.lengths = torch.randn(100, 8, generator=generator) * 0.5
        self.weight = torch.randn(V, 8, generator=generator) * sharpness
        self.head = TopKHead(self.weight, block)
        self.sequences: dict[tuple[int, int], list[int]] = {}
        self.admitted, self.steps, self.rows = [], 0, 0

    def state(self, sequence: list[int]) -> torch.Tensor:
        return self.states[sequence[-2] if len(sequence) > 1 else 0, sequence[-1]] + self.lengths[len(sequence)]

    def logits_after(self, sequence: list[int]) -> np.ndarray:
        return (self.weight.double() @ self.state(sequence).double()).numpy()

    def admit(self, slots, contexts):
        for slot, context in zip(slots, contexts, strict=True):
            self.admitted.append(tuple(context))
            self.sequences = {key: value for key, value in self.sequences.items() if key[0] != slot}
            self.sequences[slot, 0] = list(context)
        return torch.stack([self.state(context) for context in contexts])

    def advance(self, slots, places, parents, tokens):
        assert list(slots) == sorted(slots) and len(set(zip(slots, places))) == len(slots)
        self.sequences = {(slot, place): self.sequences[slot, parent] + [int(token)]
                          for slot, place, parent, token in zip(slots, places, parents, tokens, strict=True)}
        self.steps, self.rows = self.steps + 1, self.rows + len(slots)
        return torch.stack([self.state(self.sequences[slot, place]) for slot, place in zip(slots, places)])


def random_settings(draw: random.Random, V: int) -> SearchSettings:
    return SearchSettings(
        beam=min(V, draw.randint(1, 16)), eval_len=draw.randint(1, 14),
        eos_ids=tuple(draw.sample(range(V), draw.randint(1, 3))),
        length_penalty=draw.choice([-1.0, 0.0, 0.5, 0.8, 1.0, 2.0]),
        no_repeat_ngram_size=draw.randint(0, 4), repetition_penalty=draw.choice([0.5, 1.0, 1.0, 1.2, 2.0]),
        min_length=draw.choice([0, 0, 2, 5, 20]))


def random_contexts(draw: random.Random, V: int, count: int, longest: int) -> list[list[int]]:
    return [[draw.randrange(V) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def assert_found(found, contexts, logits_after, settings):
    found = {result.index: result for result in found}
    assert sorted(found) == list(range(len(contexts)))
    for index, context in enumerate(contexts):
        tokens, score = slow_search(logits_after, context, settings)
        assert found[index].tokens == tokens, (settings, context)
        # float32 sums of at most 14 log-probabilities of size below 100, divided by at least 14**-1
        assert found[index].score == pytest.approx(score, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_transcription_on_random_tables(seed):
    draw = random.Random(seed)
    V = draw.choice([3, 17, 64, 65, 130])
    settings = random_settings(draw, V)
    decoder = TableDecoder(V, seed, sharpness=draw.choice([0.3, 1.0, 3.0]))
    contexts = random_contexts(draw, V, 6, 5)
    found = beam_search(contexts, decoder, settings, slots=draw.choice([1, 2, 6, 50]))
    assert_found(found, contexts, decoder.logits_after, settings)
    assert sorted(decoder.admitted) == sorted(map(tuple, contexts))  # each prefix is run once, not once a beam


@pytest.mark.parametrize("seed", range(12))
def test_stopping_is_exact_where_short_or_certain_hypotheses_win(seed):
    """Negative penalties reverse the order of lengths, and so the bound under which a beam is given up."""
    draw = random.Random(seed)
    settings = SearchSettings(beam=6, eval_len=12, eos_ids=(0, 1, 2), length_penalty=-0.25 * (1 + seed % 4),
                              min_length=seed % 3)
    decoder = TableDecoder(17, seed, sharpness=1.0)
    contexts = random_contexts(draw, 17, 8, 5)
    assert_found(beam_search(contexts, decoder, settings, 8), contexts, decoder.logits_after, settings)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_edits_equal_a_loop(n):
    """Over hypotheses of unequal length, as they stand side by side when contexts come and go."""
    draw = np.random.default_rng(n)
    settings = SearchSettings(3, 12, (5, 6), no_repeat_ngram_size=n, repetition_penalty=1.5, min_length=4)
    beams = Beams(8, settings)
    beams.length[:] = np.arange(8) + 2
    for slot in range(8):
        beams.history[slot, :, :slot + 2] = draw.integers(0, 3, (3, slot + 2))
    slots, places = np.repeat(np.arange(8), 3), np.tile(np.arange(3), 8)
    penalised, banned = set(), set()
    for row, (slot, place) in enumerate(zip(slots, places)):
        tokens = [token for token in beams.history[slot, place].tolist() if token != NOTHING]
        penalised |= {(row, token) for token in tokens}
        banned |= {(row, token) for token in settings.eos_ids if len(tokens) < 4}
        banned |= {(row, tokens[i + n - 1]) for i in range(len(tokens) - n + 1)
                   if tokens[i:i + n - 1] == tokens[len(tokens) - n + 1:]}
    edits = beams.edits(slots, places)
    assert set(zip(*edits.penalised.tolist())) == penalised
    assert set(zip(*edits.banned.tolist())) == banned


SHAPES = {
    "gpt2": lambda V: GPT2Config(24, 2, 3, vocab_size=V, n_positions=40),
    "qwen3": lambda V: tiny_config(vocab_size=V, max_position_embeddings=40),
    "llama": lambda V: tiny_config(vocab_size=V, max_position_embeddings=40, model_type="llama", attention_bias=True,
                                   num_key_value_heads=1, tie_word_embeddings=True)}


def small_model(seed: int, V: int, lora_dim: int = 0, family: str = "gpt2", width: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    config = SHAPES[family](V)
    targets = ("query", "value") if family == "gpt2" else ("all",)
    model = family_of(config)(config, LoRAConfig(lora_dim, 8.0, targets=targets, bottleneck=width)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # far from the tiny initial weights, so that contexts matter and EOS comes
                parameter.normal_(0, 1.0 if "wte" in name or "wpe" in name or "embed" in name else 0.3)
    return model


@pytest.mark.parametrize("seed, family", [*((seed, "gpt2") for seed in range(16)), (16, "qwen3"), (17, "llama"),
                                          (18, "qwen3"), (19, "llama")])
def test_equals_the_transcription_on_random_models(seed, family):
    draw = random.Random(1000 + seed)
    V = draw.choice([29, 64, 150])
    settings = random_settings(draw, V)
    model = small_model(seed, V, draw.choice([0, 2]), family)
    exact = small_model(seed, V, model.lora_config.dim, family).double()

    @torch.no_grad()
    def logits_after(sequence):
        return exact(torch.tensor([sequence]))[0, -1].numpy()

    contexts = random_contexts(draw, V, 7, 20)
    slots = draw.choice([1, 3, 7])
    found = beam_search(contexts, TreeDecoder(model, slots, settings.beam), settings, slots)
    assert_found(found, contexts, logits_after, settings)


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("adapter", [(2, 0), (0, 3)], ids=["lora", "bottleneck"])
def test_cache_gives_the_states_of_whole_forward_passes(family, adapter, monkeypatch):
    """Hypotheses are grafted at random over many sweeps; every state equals the model's on the whole sequence."""
    monkeypatch.setattr(tree_decoder, "SPARE_STEPS", 2)
    model, draw = small_model(3, 31, adapter[0], family, adapter[1]), np.random.default_rng(0)
    exact = small_model(3, 31, adapter[0], family, adapter[1]).double()
    slots, K = np.array([0, 2]), 4
    contexts = [[1, 2, 3, 4, 5], [7]]
    decoder = TreeDecoder(model, 3, K)
    with torch.inference_mode():
        def check(states, sequences):
            for state, sequence in zip(states, sequences, strict=True):
                want = exact.transformer(torch.tensor([sequence]))[0, -1]
                # float32 rounding over two layers of normalised width 24
                torch.testing.assert_close(state.double(), want, rtol=0, atol=5e-5)

        check(decoder.admit(slots, contexts), contexts)
        held = {(slot, 0): list(context) for slot, context in zip(slots, contexts)}
        for step in range(30):
            if step == 15:  # a newcomer takes a used slot while the other goes on
                check(decoder.admit(slots[:1], [[9, 8, 7]]), [[9, 8, 7]])
                held = {key: value for key, value in held.items() if key[0] != 0} | {(0, 0): [9, 8, 7]}
            rows = [(slot, place, draw.choice([p for s, p in held if s == slot]), draw.integers(31))
                    for slot in slots for place in sorted(draw.choice(K, draw.integers(1, K + 1), replace=False))]
            held = {(slot, place): held[slot, parent] + [int(token)] for slot, place, parent, token in rows}
            check(decoder.advance(*(np.array(column) for column in zip(*rows))), held.values())
    assert decoder.room < 5 + 30 * K  # it was swept
    width = model.config.key_heads * model.config.head_width
    assert decoder.kv.shape[-1] == 2 * width and (width < 24) == (family != "gpt2")  # heads of keys are kept once


def test_slots_and_company_change_nothing():
    draw = random.Random(5)
    settings = SearchSettings(5, 12, (0, 3), 0.8, 3, 1.3, 2)
    contexts = random_contexts(draw, 64, 23, 9)
    results = [sorted((r.index, r.tokens) for r in beam_search(contexts, TableDecoder(64, 1, 1.0), settings, slots))
               for slots in (1, 4, 23)]
    assert results[0] == results[1] == results[2]


def test_stops_when_no_beam_can_win():
    """Where EOS is nearly certain, the search ends after a few steps with few rows; the result is the full search's."""
    decoder = TableDecoder(40, 2, 0.1)
    decoder.states[..., 0], decoder.lengths[:, 0] = 12.0, 0.0  # every state agrees with EOS's row below
    decoder.weight[:, 0], decoder.weight[7, 0] = 0.0, 1.0
    decoder.head = TopKHead(decoder.weight)
    settings = SearchSettings(beam=8, eval_len=50, eos_ids=(7,), length_penalty=0.8)
    contexts = [[1], [2, 3]]
    assert_found(beam_search(contexts, decoder, settings, 2), contexts, decoder.logits_after, settings)
    assert decoder.steps <= 2 and decoder.rows <= 2 * 8 * 2


def test_nothing_left_gives_no_token():
    settings = SearchSettings(beam=2, eval_len=6, eos_ids=(0,), no_repeat_ngram_size=1, min_length=6)
    [found] = beam_search([[1]], TableDecoder(3, 0, 1.0), settings, 1)
    assert found.tokens == [] and found.score == -math.inf
    assert list(beam_search([], TableDecoder(3, 0, 1.0), settings, 4)) == []


@pytest.mark.parametrize("change", [
    {"beam": 0}, {"eval_len": 0}, {"repetition_penalty": 0.0}, {"repetition_penalty": math.nan},
    {"length_penalty": math.inf}, {"length_penalty": 1e9}, {"min_length": -1}])
def test_settings_without_a_meaning_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        SearchSettings(**{"beam": 2, "eval_len": 4, "eos_ids": (0,), **change})


@pytest.mark.parametrize("V, block", [(64, 64), (200, 64), (1000, 128), (1000, 1024)])
def test_best_pairs_equal_a_full_log_softmax(V, block):
    """Two contexts with unequal numbers of rows, logits far below zero, bans and penalties on the best tokens."""
    generator = torch.Generator().manual_seed(V + block)
    weight, states = torch.randn(V, 16, generator=generator), torch.randn(5, 16, generator=generator) * 8
    context, place = np.array([0, 0, 0, 1, 1]), np.array([0, 2, 3, 1, 3])
    score = np.array([-1, -30, -2, -4, -3.5], np.float32)
    logits = states.double() @ weight.double().T
    best = logits.argmax(1)
    penalised = np.stack([np.arange(5).repeat(2), np.stack([best.numpy(), np.full(5, V - 1)], 1).ravel()])
    banned = np.array([[0, 3], [int(best[0]), int(best[3])]])
    for row, token in penalised.T:
        logits[row, token] *= 1.7 if logits[row, token] < 0 else 1 / 1.7
    logits[banned[0], banned[1]] = -math.inf
    want = torch.from_numpy(score).double()[:, None] + logits.log_softmax(1) / math.log(2)
    total, parent, token = TopKHead(weight, block).best_pairs(states, score, context, place, 2, 4,
                                                              Edits(penalised, banned, 1.7))
    for c in range(2):
        rows = np.nonzero(context == c)[0]
        value, cell = want[rows].flatten().topk(4)
        np.testing.assert_allclose(total[c], value, rtol=1e-5, atol=1e-4)
        assert parent[c].tolist() == [place[rows[i // V]] for i in cell.tolist()]
        assert token[c].tolist() == (cell % V).tolist()


@pytest.mark.parametrize("available", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_packed_product_equals_the_plain_one(rows, available, monkeypatch):
    monkeypatch.setattr(products, "AVAILABLE", available)
    x, weight, bias = torch.randn(rows, 48), torch.randn(70, 48), torch.randn(70)
    want = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(PackedLinear(weight, bias)(x).double(), want, rtol=0, atol=48 * 2**-23 * 40)


REFERENCES = [("default", SearchSettings(10, 64, (628, 50256), 0.8, 4)),
              ("variant", SearchSettings(4, 40, (628, 50256), 1.0, 3, 1.2, 12))]


@pytest.mark.parametrize("name, settings", REFERENCES, ids=[name for name, _ in REFERENCES])
def test_reference_tokens(shared, name, settings):
    folder = shared / "reference" / "beam"
    contexts = [json.loads(line)["context"] for line in open(folder / "contexts.jsonl")]
    expected = [json.loads(line)["predict"] for line in open(folder / f"expected_{name}.jsonl")]
    decoder = TreeDecoder(load_model(str(folder)).model, 8, settings.beam)
    found = {result.index: result.tokens for result in beam_search(contexts, decoder, settings, 8)}
    assert [found[index] for index in range(len(contexts))] == expected
