"""The audit: its bound against brute force and simulation, its canaries against the mechanism, and whole audits on
sound and on faulty code."""

import functools
import json
import math
import pathlib
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import binom, norm

from base.distributed import World
from base.errors import UserError
from corpus.batching import TightCut
from corpus.examples import read_examples
from helpers.processes import ROOT, SHARED, free_port, run_script
from helpers.small_runs import read, server, write_model, write_tokens
from model import GPT2Config, GPT2LMModel, LoRAConfig
from optimizer import FlatParameters
from privacy import auditing
from privacy.accounting import epsilon_gaussian
from privacy.auditing import (
    audit,
    gaussian_lower_bound,
    gaussian_p_value,
    lower_bound,
    numbers_of_guesses,
    p_value,
    sampled_gaussian_llr,
)
from privacy.clipping import BookKeeping, ClippingRule
from privacy.plan import PlanSettings
from privacy_audit import assumption
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

SCRIPT = "src/privacy_audit.py"

# ------------------------------------------------------------------ the bound


def exact_p_value(m: int, guesses: int, right: int, odds: Fraction, delta: Fraction) -> Fraction:
    """Theorem 5.2 of Steinke et al. (2023) in whole numbers; odds = exp(epsilon)."""
    accuracy = odds / (1 + odds)
    mass = [math.comb(guesses, k) * accuracy**k * (1 - accuracy) ** (guesses - k) for k in range(guesses + 1)]
    alpha = max((sum(mass[right - i:right]) / i for i in range(1, right + 1)), default=Fraction(0))
    return min(Fraction(1), sum(mass[right:]) + 2 * m * delta * alpha)


@pytest.mark.parametrize("m, guesses", [(1, 1), (20, 7), (50, 50), (400, 40)])
@pytest.mark.parametrize("delta", ["0.00001", "0.003"])
def test_p_value_is_the_theorem(m, guesses, delta):
    for right in range(guesses + 1):
        for odds in ("1", "1.5", "4", "30"):
            exact = float(exact_p_value(m, guesses, right, Fraction(odds), Fraction(delta)))
            assert p_value(m, guesses, right, math.log(float(odds)), float(delta)) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("guesses, right", [(1000, 620), (1000, 999), (5000, 2501), (5000, 4400)])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 2.0, 6.0])
def test_the_terms_left_out_are_nothing(guesses, right, epsilon):
    """All v terms of the maximum, by logarithms of factorials."""
    accuracy = 1 / (1 + math.exp(-epsilon))
    k = np.arange(guesses + 1)
    log_mass = [math.lgamma(guesses + 1) - math.lgamma(i + 1) - math.lgamma(guesses - i + 1) for i in k]
    mass = np.exp(log_mass + k * math.log(accuracy) + (guesses - k) * math.log1p(-accuracy))
    alpha = (np.cumsum(mass[:right][::-1]) / np.arange(1, right + 1)).max()
    expected = min(1.0, mass[right:].sum() + 2 * 10**5 * 1e-6 * alpha)
    assert p_value(10**5, guesses, right, epsilon, 1e-6) == pytest.approx(expected, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("guesses, right, delta", [(100, 70, 1e-5), (100, 100, 1e-3), (2000, 1500, 1e-4),
                                                   (30, 30, 1e-9)])
def test_the_bound_is_the_last_epsilon_refuted(guesses, right, delta):
    bound = lower_bound(1000, guesses, right, delta, 0.05)
    assert bound > 0
    below, above = np.linspace(0, bound, 40), bound + np.linspace(1.1 * auditing.TOLERANCE, 3, 40)
    assert max(p_value(1000, guesses, right, epsilon, delta) for epsilon in below) <= 0.05
    assert min(p_value(1000, guesses, right, epsilon, delta) for epsilon in above) > 0.05
    assert lower_bound(1000, guesses, guesses // 2, delta, 0.05) == 0


def randomised_response(epsilon: float, delta: float, m: int, draw: np.random.Generator):
    """(scores, coins): each coin is told outright with probability delta, else with accuracy e^eps / (1 + e^eps).
    What is told scores +-2, the rest +-1, times a random size below 1.1, so that different numbers of guesses are
    different sets."""
    coins = draw.random(m) < 0.5
    told = draw.random(m) < delta
    said = np.where(told | (draw.random(m) < 1 / (1 + math.exp(-epsilon))), coins, ~coins)
    return (2 * said - 1) * np.where(told, 2, 1) * draw.uniform(1, 1.1, m), coins


@pytest.fixture
def remembered(monkeypatch):
    """The bounds remember their answers: thousands of simulated audits ask for the same few."""
    monkeypatch.setattr(auditing, "lower_bound", functools.cache(lower_bound))
    monkeypatch.setattr(auditing, "gaussian_lower_bound", functools.cache(gaussian_lower_bound))


def share_above(truth: float, epsilon: float, delta: float, claimed_delta: float, m: int, runs: int, **options):
    """Share of audits of randomised response at (epsilon, delta) whose bound at claimed_delta is above `truth`."""
    draw = np.random.default_rng(1)
    found = [audit(*randomised_response(epsilon, delta, m, draw), claimed_delta, two_sided=True, **options).epsilon
             for _ in range(runs)]
    return float(np.mean(np.array(found) > truth))


RUNS = 2000
SLACK = 3.5 * math.sqrt(0.05 * 0.95 / RUNS)  # of a share of 0.05: below it but for one time in 4,000


@pytest.mark.parametrize("epsilon, delta", [(0.5, 1e-9), (1.0, 1e-9), (3.0, 1e-9), (1.0, 0.004), (3.0, 0.01)])
def test_randomised_response_is_seldom_refuted(remembered, epsilon, delta):
    assert share_above(epsilon, epsilon, delta, delta, 256, RUNS) <= 0.05 + SLACK


def test_simulated_audits_can_refute(remembered):
    """Negative controls: a larger epsilon than claimed, a delta left out, numbers of guesses tried and not paid for."""
    assert share_above(1.0, 1.8, 1e-9, 1e-9, 256, 300) > 0.9
    assert share_above(1.0, 1.0, 0.15, 1e-9, 256, 300) > 0.5  # and with the delta that it has:
    assert share_above(1.0, 1.0, 0.15, 0.15, 256, 300) <= 0.05
    counts = numbers_of_guesses(256)
    unpaid = share_above(1.0, 1.0, 1e-9, 1e-9, 256, RUNS, counts=counts, confidence=1 - 0.05 * len(counts))
    assert unpaid > 0.05 + SLACK


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0])
def test_the_bound_is_tight_for_randomised_response(epsilon):
    """With 20,000 guesses, three deviations of the share of right ones are 0.03 to 0.05 of epsilon."""
    bound = audit(*randomised_response(epsilon, 0, 20000, np.random.default_rng(2)), 1e-9, True, counts=[20000]).epsilon
    assert 0.9 * epsilon < bound < epsilon + 0.05


# ------------------------------------------------------------------ the Gaussian bound


def exact_gaussian_p_value(m: int, guesses: int, right: int, mu: float) -> float:
    """By quadrature over the density of the threshold, the (guesses + 1)-th largest of m; each guess is right or wrong
    with the folded densities' own masses above it."""
    def integrand(t: float) -> float:
        good, bad = math.erfc((t - mu / 2) / math.sqrt(2)) / 2, math.erfc((t + mu / 2) / math.sqrt(2)) / 2
        density = (math.exp(-((t - mu / 2) ** 2) / 2) + math.exp(-((t + mu / 2) ** 2) / 2)) / math.sqrt(2 * math.pi)
        ways = math.exp(math.lgamma(m + 1) - math.lgamma(guesses + 1) - math.lgamma(m - guesses))
        hits = sum(math.comb(guesses, k) * good**k * bad ** (guesses - k) for k in range(right, guesses + 1))
        return ways * hits * density * (1 - good - bad) ** (m - guesses - 1)

    return quad(integrand, 0, mu / 2 + 12, limit=200, epsabs=1e-9)[0]


@pytest.mark.parametrize("m, guesses", [(2, 1), (20, 7), (50, 49), (300, 30)])
@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0, 3.0])
def test_gaussian_p_value_is_an_integral(m, guesses, mu):
    """Never below it, and above by what a step of the sum takes too much: a thousandth part of what the accuracy of a
    guess changes over all thresholds."""
    for right in sorted({1, guesses // 2, 3 * guesses // 4, guesses}):
        exact, found = exact_gaussian_p_value(m, guesses, right, mu), gaussian_p_value(m, guesses, right, mu)
        assert exact - 1e-8 <= found <= exact + 0.02 * min(1, exact + 0.05)


def test_all_guesses_are_a_binomial():
    for right in range(41):
        assert gaussian_p_value(40, 40, right, 0.8) == pytest.approx(binom.sf(right - 1, 40, norm.cdf(0.4)), abs=1e-12)


@pytest.mark.parametrize("m, guesses, right", [(100, 100, 70), (100, 25, 24), (2000, 125, 110), (10**6, 3200, 2600)])
def test_the_gaussian_bound_is_the_last_mu_refuted(m, guesses, right):
    bound = gaussian_lower_bound(m, guesses, right, 0.05)
    assert bound > 0
    below, above = np.linspace(0, bound, 40), bound + np.linspace(1.1 * auditing.TOLERANCE, 3, 40)
    assert max(gaussian_p_value(m, guesses, right, mu) for mu in below) <= 0.05
    assert min(gaussian_p_value(m, guesses, right, mu) for mu in above) > 0.05
    assert gaussian_lower_bound(m, guesses, guesses // 2, 0.05) == 0


def gaussian_views(mu: float, m: int, draw: np.random.Generator):
    """(scores, coins) of the Gaussian mechanism itself: N(0, 1) or N(mu, 1)."""
    coins = draw.random(m) < 0.5
    return draw.normal(size=m) + mu * coins, coins


def views_of_one_strength(mu: float, m: int, draw: np.random.Generator):
    """(scores, coins): each canary alone has the view of a Gaussian mechanism, but all have one and the same strength
    a = |view - mu/2|, and so the same accuracy 1 / (1 + exp(-mu a)). The assumption of independence does not hold."""
    coins = draw.random(m) < 0.5
    a = abs(draw.normal(mu / 2))
    said = np.where(draw.random(m) < 1 / (1 + math.exp(-mu * a)), coins, ~coins)
    return (2 * said - 1) * draw.uniform(1, 1.1, m), coins


def gaussian_share_above(views, mu: float, claimed: float, m: int, runs: int, two_sided: bool = True, **options):
    """(share of audits whose mu is above `claimed`, share whose bound of 2023 is above the claimed epsilon)."""
    draw, delta = np.random.default_rng(4), 1e-5
    found = [audit(*views(mu, m, draw), delta, two_sided, **options) for _ in range(runs)]
    above = [one.best_gaussian.mu > claimed for one in found]
    return np.mean(above), np.mean([one.epsilon > epsilon_gaussian(claimed, delta) for one in found])


@pytest.mark.parametrize("mu, m, two_sided", [(0.0, 256, True), (0.4, 256, True), (1.0, 1024, True),
                                              (1.0, 256, False), (2.5, 256, True)])
def test_gaussian_views_are_seldom_refuted(remembered, mu, m, two_sided):
    shares = gaussian_share_above(gaussian_views, mu, mu, m, RUNS, two_sided)
    assert max(shares) <= 0.05 + SLACK


def test_the_gaussian_bound_can_refute(remembered):
    """Negative controls: a larger mu than claimed, numbers of guesses tried and not paid for, dependent canaries; the
    bound of 2023 holds for these, too."""
    assert gaussian_share_above(gaussian_views, 1.3, 1.0, 1024, 300)[0] > 0.9
    counts = numbers_of_guesses(256)
    unpaid = gaussian_share_above(gaussian_views, 1.0, 1.0, 256, RUNS, counts=counts, confidence=1 - 0.05 * len(counts))
    assert unpaid[0] > 0.05 + SLACK
    dependent = gaussian_share_above(views_of_one_strength, 1.0, 1.0, 1024, RUNS)
    assert dependent[0] > 0.2 and dependent[1] <= 0.05 + SLACK


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.0])
def test_the_gaussian_bound_is_tight(mu):
    """20,000 canaries, half of the guesses made: three deviations of a guess's accuracy are below 0.03 of mu or so."""
    scores, coins = gaussian_views(mu, 20000, np.random.default_rng(5))
    assert 0.85 * mu < audit(scores, coins, 1e-5, True, counts=[10000]).best_gaussian.mu < mu + 0.01


@pytest.mark.parametrize("two_sided", [False, True])
def test_guesses_are_those_of_a_plain_loop(two_sided):
    draw = np.random.default_rng(3)
    scores = draw.normal(size=101).round(1)  # rounded: there are ties
    coins = draw.random(101) < 1 / (1 + np.exp(-4 * scores))
    result = audit(scores, coins, 1e-5, two_sided)
    ranked = sorted(range(101), key=lambda canary: (-scores[canary], canary))
    assert [one.made for one in result.tried] == [101, 25]
    for one in result.tried:
        low = one.made // 2 if two_sided else 0
        right = sum(coins[canary] for canary in ranked[:one.made - low])
        right += sum(not coins[canary] for canary in ranked[101 - low:])
        assert one.right == right and one.epsilon == lower_bound(101, one.made, right, 1e-5, 0.05 / 2)
        assert one.mu == gaussian_lower_bound(101, one.made, right, 0.05 / 2)
        assert one.epsilon_gaussian == epsilon_gaussian(one.mu, 1e-5)
    assert max(one.epsilon for one in result.tried) > 0 and max(one.mu for one in result.tried) > 0
    assert result.best in result.tried and result.epsilon == max(one.epsilon for one in result.tried)
    assert result.best_gaussian.mu == max(one.mu for one in result.tried)


def test_what_no_audit_takes():
    with pytest.raises(UserError, match="delta 0"):
        audit(np.zeros(20), np.ones(20, bool), 0.0, True)
    with pytest.raises(ValueError, match="finite"):
        audit(np.array([math.nan] * 20), np.ones(20, bool), 1e-5, True)


@pytest.mark.parametrize("q, sigma, size", [(0.003, 0.6, 1.0), (0.3, 2.0, 0.25), (1.0, 1.0, 1.0), (0.5, 0.5, 10.0)])
def test_the_score_is_the_log_likelihood_ratio(q, sigma, size):
    x = np.linspace(-3, 3, 25)
    expected = np.log((1 - q) * norm.pdf(x, 0, sigma) + q * norm.pdf(x, size, sigma)) - norm.logpdf(x, 0, sigma)
    assert np.allclose(sampled_gaussian_llr(x, q, sigma, size), expected, rtol=1e-9, atol=1e-12)
    assert np.isfinite(sampled_gaussian_llr(np.array([-1e6, 1e6]), q, sigma, size)).all()


# ------------------------------------------------------------------ the canaries


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
    texts = text_canaries(40, examples, whole, RULE, World())
    assert len(set(texts.lengths)) > 1 or len({context for context, _ in split_up(texts)}) == 1
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


# ------------------------------------------------------------------ whole audits

M = 20_000  # with 100 guesses, the claim of 0.74 lies six deviations from what each fault gives


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> pathlib.Path:
    """A model of 31,000 coordinates and a token file that uses 60 of its 1,500 tokens."""
    folder = tmp_path_factory.mktemp("audit")
    write_model(folder / "model", vocabulary=1500)
    write_tokens(folder / "train.jsonl", 50, seed=1)
    return folder


def start(material: pathlib.Path, work: pathlib.Path, *faults: str, env: dict | None = None, **changed: object):
    values = {"train_data": material / "train.jsonl", "model_card": material / "model", "seq_len": 32, "canaries": M,
              "train_batch_size": (M + 50) // 32, "noise_multiplier": 1.5, "max_step": 30, "target_delta": 1e-6,
              "guesses": 100, "init_checkpoint": material / "model", "work_dir": work, **changed}
    flags = [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]
    return server().start(SCRIPT, flags, env=env, faults=[["weaken", {"name": name}] for name in faults])


def finished(run, work: pathlib.Path, refuted: bool) -> dict:
    assert run.wait() == refuted, run.stdout + run.stderr
    found = read(work, "audit.json")
    assert found["refuted"] is refuted
    decisive = found["gaussian"] if found["decides"] == "gaussian" else found
    assert (decisive["epsilon_lower"] > found["epsilon_claimed"]) is refuted
    assert ("REFUTED" in run.stdout) is refuted
    return found


@pytest.mark.parametrize("fault", [None, "noise_off", "participation_fixed", "q_wrong_by_16"])
def test_gradient_canaries(material, tmp_path, fault):
    """Below the claim on the right code and above it on each fault; and the report says what was found."""
    work = tmp_path / "run"
    found = finished(start(material, work, *[fault] * bool(fault)), work, refuted=fault is not None)
    privacy = read(work)
    assert found["epsilon_claimed"] == privacy["epsilon_prv"] and found["delta"] == privacy["delta"] == 1e-6
    assert found["N"] == privacy["N"] == M + 50 and found["q"] == ((M + 50) // 32) / (M + 50)
    assert found["steps_charged"] == privacy["steps_charged"] == 30
    saved = np.load(work / "audit_scores.npz")
    scores, coins = saved["scores"], saved["coins"]
    assert len(scores) == M and coins.sum() == found["included"]
    right = coins[np.argsort(-scores, kind="stable")[:100]].sum()
    assert right == pytest.approx(found["guesses_right"], abs=2)  # scores on disk are float32: another may be the 100th
    assert (work / "audit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("fault", [None, "noise_off"])
def test_text_canaries(material, tmp_path, fault):
    work = tmp_path / "run"
    run = start(material, work, *[fault] * bool(fault), canaries=200, canary_kind="text", train_batch_size=250,
                guesses=100, noise_multiplier=4, lr=0.001, max_step=4, target_delta=1e-5)
    found = finished(run, work, refuted=fault is not None)
    assert found["canary_kind"] == "text" and found["epsilon_claimed"] < 3 and found["decides"] == "2023"
    assert "not proven for text canaries" in found["gaussian"]["assumption"]


def test_text_canaries_of_a_run_that_trains_no_embedding(material, tmp_path):
    """By the losses before and after: without noise, LoRA tells something of them."""
    work = tmp_path / "run"
    run = start(material, work, "noise_off", canaries=200, canary_kind="text", train_batch_size=62, guesses=100,
                noise_multiplier=6, lr=0.02, max_step=60, target_delta=1e-5, lora_dim=4, lora_alpha=32)
    assert run.wait() in (0, 1), run.stderr
    assert read(work, "audit.json")["epsilon_lower"] > 0


@pytest.mark.parametrize("fault", [None, "sigma_at_two_thirds"])
def test_the_gaussian_bound_decides_where_it_is_proven(material, tmp_path, fault):
    """Gradient canaries, q = 1: 20,000 of them tell two thirds of the noise from all of it, and half the claim is
    reached."""
    work = tmp_path / "run"
    run = start(material, work, *[fault] * bool(fault), train_batch_size=M + 50, noise_multiplier=3, max_step=4,
                guesses=None, target_delta=1e-5)
    found = finished(run, work, refuted=fault is not None)
    assert found["decides"] == "gaussian" and found["gaussian"]["epsilon_lower"] > found["epsilon_claimed"] / 2
    assert found["epsilon_lower"] < found["epsilon_claimed"]


@pytest.mark.parametrize("kind, q, sampling, proven", [
    ("gradient", 1.0, "poisson", True), ("gradient", 0.5, "poisson", False), ("gradient", 0.5, "shuffle", True),
    ("text", 1.0, "poisson", False), ("text", 0.5, "poisson", False)])
def test_what_decides(kind, q, sampling, proven):
    plan = PlanSettings(unit="example", N=100, batch=int(100 * q), steps=1, clip=1.0, sigma=1.0, delta=1e-5,
                        sampling=sampling)
    decides, words = assumption(kind, plan)
    assert decides == proven
    assert ("approximation" in words) == (q < 1 and sampling == "poisson")
    assert ("not proven" in words) == (kind == "text")


def test_two_ranks_toss_the_same_coins(material, tmp_path):
    """Were the coins of each rank its own, half of the canaries would be guessed wrongly though there is no noise."""
    work = tmp_path / "run"
    launch = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [start(material, work, "noise_off", train_batch_size=(M + 50) // 64, plot=tmp_path / "elsewhere.png",
                   env={"RANK": rank, "LOCAL_RANK": rank, **launch}) for rank in range(2)]
    assert ranks[1].wait() == 0, ranks[1].stderr
    found = finished(ranks[0], work, refuted=True)
    assert found["world_size"] == 2 and found["guesses_right"] == 100
    assert (tmp_path / "elsewhere.png").exists() and not (work / "audit.png").exists()


def test_an_audit_that_torchrun_starts_again_is_refused(material, tmp_path):
    """Its coins and scores died with the first start, whose steps the ledger charges."""
    work = tmp_path / "run"
    job = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
           "TORCHELASTIC_RUN_ID": "mine"}
    few = {"canaries": 20, "guesses": 10, "train_batch_size": 8, "max_step": 2}
    first = start(material, work, env=job, **few)
    assert first.wait() == 0, first.stderr
    before = (work / "privacy_ledger.jsonl").read_bytes()
    again = start(material, work, env=job, **few)
    assert again.wait() == 2 and "begun by this job, mine" in again.error
    assert (work / "privacy_ledger.jsonl").read_bytes() == before


def test_the_documents_name_commands_that_are_there():
    text = (ROOT / "docs/audit.md").read_text()
    for script in (SCRIPT, "scripts/audit_faults.py"):
        (command,) = re.findall(rf"^python {re.escape(script)} [^`]*?[^\\]$", text, re.M)
        named = set(re.findall(r"--(\w+)", command))
        known = set(re.findall(r"--(\w+)", run_script(script, "--help").stdout))
        assert named and named <= known


# ------------------------------------------------------------------ slow


@pytest.mark.slow
def test_the_table_of_faults(material, tmp_path):
    """Every fault is seen and no sound row is refuted, on a model of 130,000 coordinates."""
    write_model(tmp_path / "model", vocabulary=8000)
    model = tmp_path / "model"
    table = run_script("scripts/audit_faults.py", "--train_data", material / "train.jsonl", "--model_card", model,
                       "--init_checkpoint", model, "--seq_len", 32, "--settings", "participation", "noise", "text",
                       "--output", tmp_path / "faults", timeout=1800)
    assert table.returncode == 0, table.stdout + table.stderr
    rows = json.loads((tmp_path / "faults" / "faults.json").read_text())
    assert [row["refuted"] for row in rows] == [row["fault"] != "none" for row in rows] and len(rows) == 9


@pytest.mark.slow
@pytest.mark.parametrize("kind, fault, runs", [("gradient", None, 40), ("text", None, 40),
                                               ("gradient", "sigma_at_two_thirds", 5), ("text", "noise_off", 5)])
def test_sound_code_is_refuted_in_one_of_twenty_audits(material, tmp_path, kind, fault, runs):
    """Whole audits at q = 1, by the bound that decides and by the other one. Where each of 40 is above the claim with a
    chance of 0.05, more than 7 are once in 1,000 times. The control: every audit of broken code refutes it."""
    found = []
    for number in range(runs):
        work = tmp_path / f"run{number}"
        m = 2000 if kind == "gradient" else 400
        run = start(material, work, *[fault] * bool(fault), canaries=m, canary_kind=kind, train_batch_size=m + 50,
                    noise_multiplier=1.5, max_step=2, guesses=None, target_delta=1e-5, lr=0.0005)
        assert run.wait() in (0, 1), run.stderr
        found.append(read(work, "audit.json"))
    if fault:
        assert all(one["refuted"] for one in found)
        return
    for bound in (lambda one: one["epsilon_lower"], lambda one: one["gaussian"]["epsilon_lower"]):
        assert sum(bound(one) > one["epsilon_claimed"] for one in found) <= 7
        assert np.median([bound(one) for one in found]) > 0


@pytest.mark.slow
def test_a_thousand_canaries_in_the_e2e_data(shared, tmp_path):
    """A few steps of the published settings: below the claim, and above it with the noise off."""
    for name, source in (("format_converting_e2e.py", shared / "data/e2e/train.txt"), ("gpt2_encode.py", None)):
        arguments = [source, tmp_path / "text.jsonl"] if source else [
            "--vocab", SHARED / "vocab", "--add_bos", "--add_eos", "--input", tmp_path / "text.jsonl", "--output",
            tmp_path / "train.jsonl"]
        assert run_script(f"src/{name}", *arguments).returncode == 0
    beam = shared / "reference/beam"
    table = run_script("scripts/audit_faults.py", "--train_data", tmp_path / "train.jsonl", "--model_card", beam,
                       "--init_checkpoint", beam, "--settings", "published", "--output", tmp_path / "faults",
                       timeout=3600)
    assert table.returncode == 0, table.stdout + table.stderr
