"""The samplers: frequencies, the law of the batch size, independence between units, steps, ranks; shuffled epochs.

The statistics look at a whole run at once, a table of which unit was included in which step. Each check fails by
chance once in a million runs; the negative controls at the end of each part are tables that must fail.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from base.distributed import World
from privacy.randomness import NoiseSource
from privacy.allocation import Allocated
from privacy.sampling import AllocationSampler, PoissonSampler, ShuffleSampler

LIMIT = 4.9  # standard deviations: one in a million
N, Q, STEPS = 503, 0.06, 3000  # N divides by none of the world sizes


def sources(kind: str, size: int, seed: int = 11) -> list[NoiseSource]:
    return [NoiseSource(kind, "mask", rank, seed if kind == "seeded" else None) for rank in range(size)]


def table(kind: str, size: int, N: int = N, q: float = Q, steps: int = STEPS, seed: int = 11) -> np.ndarray:
    """(steps, N) how often each unit was included by all ranks together."""
    samplers = [PoissonSampler(N, N * q, World(rank, size), source)
                for rank, source in enumerate(sources(kind, size, seed))]
    counts = np.zeros((steps, N), dtype=np.int64)
    for step in range(1, steps + 1):
        for sampler in samplers:
            drawn = sampler.draw(step)
            assert drawn.dtype == torch.int64
            np.add.at(counts[step - 1], drawn.numpy(), 1)
    return counts


def defects(counts: np.ndarray, q: float, size: int) -> list[str]:
    """In what a table differs from independent inclusion with probability q, unit u belonging to rank u mod size."""
    found = []
    steps, N = counts.shape

    def check(name: str, value: float, expected: float, deviation: float) -> None:
        if not abs(value - expected) <= LIMIT * deviation:
            found.append(f"{name}: {value:.5g}, expected {expected:.5g} +- {deviation:.2g}")

    if counts.max() > 1:
        found.append("a unit is in one step twice")
    variance = q * (1 - q)
    check("inclusions", counts.mean(), q, math.sqrt(variance / counts.size))
    by_unit = ((counts.sum(0) - steps * q) ** 2).sum() / (steps * variance)  # chi-square with N degrees of freedom
    if not 5e-7 < stats.chi2.sf(by_unit, N) < 1 - 5e-7:
        found.append(f"frequencies of the units: chi-square {by_unit:.1f} of {N}")
    x = counts - q
    whole = x.sum(1)
    # The fourth moment of a sum of N Bernoullis: variance of its squared deviation is 2 s^4 + N k4.
    spread = math.sqrt((2 * (N * variance) ** 2 + N * variance * (1 - 6 * variance)) / steps)
    check("variance of the batch size", (whole**2).mean(), N * variance, spread)
    ranks = [x[:, rank::size] for rank in range(size)]
    for rank, own in enumerate(ranks):
        check(f"inclusions on rank {rank}", own.mean(), 0, math.sqrt(variance / own.size))
        for other in range(rank):
            mean = (own.sum(1) * ranks[other].sum(1)).mean()
            scale = variance * math.sqrt(own.shape[1] * ranks[other].shape[1] / steps)
            check(f"covariance of the batch sizes of ranks {other} and {rank}", mean, 0, scale)
            width = min(own.shape[1], ranks[other].shape[1])
            pairs = (own[:, :width] * ranks[other][:, :width]).mean()
            check(f"units at the same place on ranks {other} and {rank}", pairs, 0, variance / math.sqrt(width * steps))
    for lag in (1, 2, 3, 7, N // 2):
        check(f"units {lag} apart", (x[:, lag:] * x[:, :-lag]).mean(), 0, variance / math.sqrt(steps * (N - lag)))
    for lag in (1, 2, 3, steps // 2):
        check(f"steps {lag} apart", (x[lag:] * x[:-lag]).mean(), 0, variance / math.sqrt((steps - lag) * N))
    return found


# ------------------------------------------------------------------ Poisson


@pytest.mark.parametrize("kind", ["os", "secure", "seeded"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_poisson_is_independent_inclusion(kind, size):
    if kind == "secure":
        pytest.importorskip("cryptography")
    assert defects(table(kind, size), Q, size) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 16])
def test_poisson_over_a_long_run(size):
    assert defects(table("os", size, 2003, 0.01, 20_000), 0.01, size) == []


def one_key(size: int) -> np.ndarray:
    """Every rank with rank 0's key."""
    counts = np.zeros((STEPS, N), dtype=np.int64)
    for rank in range(size):
        sampler = PoissonSampler(N, N * Q, World(rank, size), NoiseSource("seeded", "mask", 0, 11))
        for step in range(STEPS):
            counts[step, sampler.draw(step + 1).numpy()] += 1
    return counts


def test_the_checks_catch_what_is_wrong():
    """Negative controls: a table for each thing that a sampler could get wrong."""
    good = table("seeded", 4)
    assert defects(good, Q, 4) == []
    generator = np.random.default_rng(5)
    fixed = np.zeros_like(good)
    shuffled = np.zeros_like(good)
    size = round(N * Q)
    for step in range(STEPS):
        fixed[step, generator.permutation(N)[:size]] = 1
    for step in range(STEPS):
        place = step % (N // size)
        if place == 0:
            order = generator.permutation(N)
        shuffled[step, order[place * size:(place + 1) * size]] = 1
    left_out, twice, always, early, reused, near = (good.copy() for _ in range(6))
    left_out[:, 3::4] = 0
    twice[:, 7] *= 2
    always[:, 7] = 1
    early[early.sum(1) < 22] = fixed[early.sum(1) < 22]
    reused[1::2] = reused[::2]
    near[:, 1::2] = near[:, 0:-1:2]
    wrong = {
        "q 3 % low": table("seeded", 4, q=0.97 * Q), "q divided by the ranks": table("seeded", 4, q=Q / 4),
        "a rank left out": left_out, "a unit twice": twice, "a unit always in": always,
        "the mask reused in the next step": reused,
        "one mask for all steps": np.repeat(good[:1], STEPS, 0), "pairs of units together": near,
        "one key on every rank": one_key(4),
        "a fixed batch size": fixed, "shuffled epochs": shuffled, "small draws filled up": early,
    }
    for name, counts in wrong.items():
        assert defects(counts, Q, 4), f"{name}: not noticed"


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_ranks_share_out_the_units(size):
    """q = 1 draws everybody once, on one rank; so does every N, also with fewer units than ranks."""
    for count in (1, 3, 10, 11):
        drawn = [PoissonSampler(count, count, World(rank, size), source).draw(1)
                 for rank, source in enumerate(sources("os", size))]
        assert torch.equal(torch.cat(drawn).sort().values, torch.arange(count))


def test_tiny_q_draws_nobody():
    """Empty draws are draws: tensors of no units, step after step."""
    sampler = PoissonSampler(1000, 1e-9, World(), NoiseSource("os", "mask"))
    for step in range(1, 200):
        drawn = sampler.draw(step)
        assert drawn.shape == (0,) and drawn.dtype == torch.int64


def test_a_resumed_seeded_run_draws_what_the_uninterrupted_one_drew():
    whole, resumed = (PoissonSampler(N, N * Q, World(1, 2), NoiseSource("seeded", "mask", 1, 5)) for _ in range(2))
    draws = [whole.draw(step) for step in range(1, 8)]
    for step in (5, 6, 7):
        assert torch.equal(resumed.draw(step), draws[step - 1])
    assert not any(torch.equal(draws[i], draws[j]) for i in range(7) for j in range(i))


# ------------------------------------------------------------------ shuffled epochs


class SharedWorld(World):
    """A rank among several in one process: what rank 0 broadcasts lies in a list until the others fetch it."""

    said: list = []

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.is_main:
            self.said.append(tensor.clone())
        return self.said[-1].clone()


def epochs(kind: str, size: int, N: int, batch: int, count: int, seed: int = 3) -> list[list[list[int]]]:
    """For each epoch, for each of its steps, the units of all ranks."""
    samplers = [ShuffleSampler(N, batch, SharedWorld(rank, size), source)
                for rank, source in enumerate(sources(kind, size, seed))]
    steps = math.ceil(N / batch)
    drawn = []
    for epoch in range(count):
        drawn.append([])
        for position in range(steps):
            parts = [sampler.draw(epoch * steps + position + 1) for sampler in samplers]
            assert max(map(len, parts)) - min(map(len, parts)) <= 1  # shared out evenly
            drawn[-1].append(torch.cat(parts).tolist())
    return drawn


@pytest.mark.parametrize("kind", ["os", "seeded"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("N, batch", [(12, 4), (13, 4), (7, 7), (9, 2), (3, 2)])
def test_shuffle_uses_each_unit_once_an_epoch(kind, size, N, batch):
    for epoch in epochs(kind, size, N, batch, 3):
        assert [len(step) for step in epoch[:-1]] == [batch] * (len(epoch) - 1)
        assert sorted(sum(epoch, [])) == list(range(N))  # no example twice, none left out, no padding


def test_shuffle_orders_are_fresh_and_uniform():
    """The first unit of an epoch is anybody; no epoch repeats another."""
    drawn = epochs("os", 2, 10, 5, 2000)
    first = np.bincount([epoch[0][0] for epoch in drawn], minlength=10)
    together = np.bincount([epoch[0].count(0) + epoch[0].count(1) for epoch in drawn], minlength=3)
    assert stats.chisquare(first).pvalue > 1e-6
    assert stats.chisquare(together, 2000 * np.array([2, 5, 2]) / 9).pvalue > 1e-6  # hypergeometric
    assert stats.chisquare(first + 200 * np.eye(10)[0], np.full(10, 220)).pvalue < 1e-6  # control: one twice as often


def test_a_resumed_seeded_epoch_is_the_same_and_another_seed_is_not():
    whole = ShuffleSampler(11, 3, World(), NoiseSource("seeded", "mask", 0, 5))
    draws = [whole.draw(step) for step in range(1, 13)]
    resumed = ShuffleSampler(11, 3, World(), NoiseSource("seeded", "mask", 0, 5))
    assert all(torch.equal(resumed.draw(step), draws[step - 1]) for step in range(7, 13))
    assert epochs("seeded", 1, 11, 3, 1) != epochs("seeded", 1, 11, 3, 1, seed=4)


# ------------------------------------------------------------------ random allocation


def places(kind: str, size: int, N: int, batch: int, epochs: int, seed: int = 11, one: bool = False) -> np.ndarray:
    """(epochs, N) the step of each epoch, from 0, in which a unit took part; -1 where not in exactly one. one: every
    rank has rank 0's key, a mistake."""
    keys = [NoiseSource(kind, "mask", 0, seed) for _ in range(size)] if one else sources(kind, size, seed)
    samplers = [AllocationSampler(N, batch, World(rank, size), key) for rank, key in enumerate(keys)]
    t = math.ceil(N / batch)
    found = np.full((epochs, N), -1)
    for epoch in range(epochs):
        uses = np.zeros(N, dtype=int)
        for position in range(t):
            for sampler in samplers:
                drawn = sampler.draw(epoch * t + position + 1).numpy()
                uses[drawn] += 1
                found[epoch, drawn] = position
        found[epoch, uses != 1] = -1
    return found


def misplaced(found: np.ndarray, t: int, size: int) -> list[str]:
    """In what a table of places differs from a uniform step in each epoch, independent between units and epochs."""
    wrong = ["a unit takes part in no step of an epoch, or in several"] * bool((found < 0).any())
    counts = np.array([np.bincount(row, minlength=t) for row in np.maximum(found, 0)])
    if stats.chisquare(counts.sum(0)).pvalue < 1e-6:
        wrong.append("steps are not equally likely")
    epochs, N = found.shape
    # the batch sizes' chi-square within an epoch has t - 1 degrees of freedom; fixed sizes would give 0
    chi = ((counts - N / t) ** 2 / (N / t)).sum()
    if abs(chi - epochs * (t - 1)) > LIMIT * math.sqrt(2 * epochs * (t - 1)):
        wrong.append(f"batch sizes: chi-square {chi:.0f} of {epochs * (t - 1)}")

    def check(name: str, same: np.ndarray) -> None:
        if abs(same.mean() - 1 / t) > LIMIT * math.sqrt((t - 1) / same.size) / t:
            wrong.append(f"{name}: {same.mean():.5f} together, expected {1 / t:.5f}")

    for lag in (1, 2, 3, epochs // 2):
        check(f"epochs {lag} apart", found[lag:] == found[:-lag])
    for lag in (1, 2, 3, 4, 7, N // 2):
        check(f"units {lag} apart", found[:, lag:] == found[:, :-lag])
    return wrong


@pytest.mark.parametrize("kind", ["os", "secure", "seeded"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_allocation_is_one_uniform_step_of_each_epoch(kind, size):
    if kind == "secure":
        pytest.importorskip("cryptography")
    assert misplaced(places(kind, size, 203, 20, 300), 11, size) == []


def test_the_checks_of_allocation_catch_what_is_wrong():
    """Negative controls: a table for each thing that an allocation could get wrong."""
    good, generator = places("seeded", 2, 203, 20, 300), np.random.default_rng(5)
    assert misplaced(good, 11, 2) == []
    reused, pairs, few, absent = (good.copy() for _ in range(4))
    reused[1::2] = reused[::2]
    pairs[:, 1::2] = pairs[:, 0:-1:2]
    few[few == 10] = 9
    absent[3, 5] = -1
    balanced = np.array([generator.permutation(np.arange(203) % 11) for _ in range(300)])
    wrong = {"the allocation reused in the next epoch": reused, "pairs together": pairs, "a step left out": few,
             "a unit in no step": absent, "equal batches": balanced,
             "one key": places("seeded", 2, 203, 20, 300, one=True)}
    for name, found in wrong.items():
        assert misplaced(found, 11, 2), f"{name}: not noticed"


def test_one_more_unit_changes_no_other_s_allocation():
    """Neighbouring data: with the same keys and the same number of steps, the others take part where they did."""
    fewer, more = (places("seeded", 3, N, 20, 4) for N in (202, 203))
    assert np.array_equal(more[:, :202], fewer)


def test_what_an_allocation_charges():
    """One use for each epoch of each attempt, of the steps that were charged there; a plan foresees just that."""
    def records(attempt: int, steps: range) -> list[dict]:
        return [{"sigma": 0.7, "steps_per_epoch": 5, "attempt": attempt, "step": step} for step in steps]

    whole, part = Allocated(0.7, 5, 5, 1), Allocated(0.7, 5, 3, 1)
    assert AllocationSampler.charged(records(1, range(1, 14))) == {whole: 2, part: 1}
    # stopped after step 8 and resumed: what each attempt took of the second epoch
    resumed = [*records(1, range(1, 9)), *records(2, range(9, 16))]
    assert AllocationSampler.charged(resumed) == {whole: 2, part: 1, Allocated(0.7, 5, 2, 1): 1}
    # a torn line, repaired as a further step of the last epoch, is charged also where that epoch is full
    assert AllocationSampler.charged([*records(1, range(1, 6)), *records(1, range(5, 6))]) == {
        whole: 1, Allocated(0.7, 5, 1, 1): 1}
    for done in range(6):
        for steps in range(13):
            planned = +AllocationSampler.planned(0.7, 23, 5, steps, done)
            assert planned == AllocationSampler.charged(records(1, range(done + 1, done + steps + 1))), (done, steps)
