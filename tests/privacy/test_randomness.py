"""The noise: its key stream against NIST's vectors, its normals against the normal law, its keys against leaking."""

import copy
import io
import math
import os
import pickle
import random
import resource
import time

import numpy as np
import pytest
import torch
from scipy import special, stats

from base.errors import UserError
from privacy import randomness
from privacy.randomness import NoiseSource

NORMALS = 2_000_000


def make(kind: str, purpose: str = "noise", rank: int = 0, seed: int = 7) -> NoiseSource:
    if kind == "secure":
        pytest.importorskip("cryptography")
    return NoiseSource(kind, purpose, rank, seed if kind == "seeded" else None)


def normals(source: NoiseSource, count: int = NORMALS, std: float = 1.0) -> torch.Tensor:
    buffer = torch.zeros(count)
    source.add_normal_(buffer, std)
    return buffer


def defects(sample: np.ndarray) -> list[str]:
    """In what `sample` differs from independent standard normals. Each check fails by chance once in a million runs."""
    found, count = [], len(sample)
    limit = 4.9  # standard deviations

    def check(name: str, value: float, expected: float, deviation: float) -> None:
        if abs(value - expected) > limit * deviation:
            found.append(f"{name}: {value:.5g}, expected {expected:.5g} +- {deviation:.2g}")

    sample = sample.astype(np.float64)
    check("mean", sample.mean(), 0, 1 / math.sqrt(count))
    check("variance", (sample**2).mean(), 1, math.sqrt(2 / count))
    check("skewness", (sample**3).mean(), 0, math.sqrt(15 / count))
    check("fourth moment", (sample**4).mean(), 3, math.sqrt(96 / count))
    for lag in (1, 2, count // 2, randomness.CPU_CHUNK // 2, randomness.CPU_CHUNK):
        check(f"correlation at lag {lag}", (sample[lag:] * sample[:-lag]).mean(), 0, 1 / math.sqrt(count - lag))
        squares = (sample[lag:] ** 2 - 1) * (sample[:-lag] ** 2 - 1)
        check(f"correlation of squares at lag {lag}", squares.mean(), 0, 2 / math.sqrt(count - lag))
    for tail in (3.0, 4.0, 4.5, 5.0):
        expected = 2 * special.ndtr(-tail) * count
        beyond = int((np.abs(sample) > tail).sum())
        # Poisson, two-sided at 1e-6.
        if stats.poisson.cdf(beyond, expected) < 5e-7 or stats.poisson.sf(beyond - 1, expected) < 5e-7:
            found.append(f"{beyond} beyond {tail}, expected {expected:.1f}")
    distance = stats.kstest(sample, "norm").statistic * math.sqrt(count)
    if distance > math.sqrt(math.log(2 / 1e-6) / 2):  # Kolmogorov's tail 2 exp(-2 x^2)
        found.append(f"Kolmogorov-Smirnov {distance:.2f}")
    return found


# --- the words ---


def test_nist_vectors():
    """NIST SP 800-38A, F.5.5: AES-256 in counter mode, through the code's own stream and in uneven pieces."""
    pytest.importorskip("cryptography")
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = bytes.fromhex(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    for pieces in ([8], [3, 5], [1] * 8):
        source = randomness.AesCtrWords(key, counter)
        stream = b"".join(source.words(count).astype("<u8").tobytes() for count in pieces)
        assert bytes(a ^ b for a, b in zip(stream, plain)) == cipher


def test_secure_normals_are_box_muller_of_the_key_stream(monkeypatch):
    """A known key: the normals equal those made, one at a time, of AES blocks encrypted one counter at a time."""
    ciphers = pytest.importorskip("cryptography.hazmat.primitives.ciphers")
    key = bytes(range(32))
    monkeypatch.setattr(os, "urandom", lambda count: key[:count])
    count = 1001  # odd: the last normal of the last pair is dropped
    ours = normals(make("secure"), count, std=2.5)
    pairs = (count + 1) // 2
    encryptor = ciphers.Cipher(ciphers.algorithms.AES(key), ciphers.modes.ECB()).encryptor()
    stream = b"".join(encryptor.update(block.to_bytes(16, "big")) for block in range(pairs))
    uniform = [(int.from_bytes(stream[8 * i : 8 * i + 8], "little") >> 11) / 2**53 for i in range(2 * pairs)]
    radius = [2.5 * math.sqrt(-2 * math.log(u + 2**-53)) for u in uniform[:pairs]]
    angle = [2 * math.pi * u for u in uniform[pairs:]]
    expected = [r * math.cos(a) for r, a in zip(radius, angle)] + [r * math.sin(a) for r, a in zip(radius, angle)]
    # float32 has 24 bits: half a unit in the last place of numbers below 16.
    torch.testing.assert_close(ours.double(), torch.tensor(expected[:count], dtype=torch.float64), atol=1e-6, rtol=0)


def test_every_bit_of_the_key_counts():
    """torch.Generator on the CPU takes 32 bits of its seed; a stream here changes with each of the key's 256."""
    first = randomness.Sfc64Words(bytes(32)).words(4).tobytes()
    streams = {randomness.Sfc64Words((1 << bit).to_bytes(32, "little")).words(4).tobytes() for bit in range(256)}
    assert len(streams | {first}) == 257


# --- the normals ---


@pytest.mark.parametrize("kind", randomness.KINDS)
def test_normals_are_normal(kind):
    assert defects(normals(make(kind)).numpy()) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", randomness.KINDS)
def test_many_normals_are_normal(kind):
    assert defects(normals(make(kind), 50_000_000).numpy()) == []


def test_the_checks_catch_what_is_wrong():
    """Negative controls: each defect that a noise source could have is seen by the checks that the sources passed."""
    good = normals(make("seeded")).numpy()
    assert defects(good) == []
    generator = np.random.default_rng(3)
    wrong = {
        "10 % low": 0.9 * good,
        "0.5 % low": 0.995 * good,
        "added by two ranks": math.sqrt(2) * good,
        "one coordinate in a hundred without noise": np.where(np.arange(len(good)) % 100 == 0, 0, good),
        "the same for both halves": np.tile(good[: len(good) // 2], 2),
        "repeated from chunk to chunk": np.tile(good[: randomness.CPU_CHUNK], len(good) // randomness.CPU_CHUNK),
        "tails cut at 4": np.clip(good, -4, 4),
        "a sum of twelve uniforms": generator.random((12, len(good) // 2), dtype=np.float32).sum(0) - 6,
        "heavy tails": generator.standard_t(30, len(good)) * math.sqrt(28 / 30),
        "shifted": good + 0.01,
    }
    for name, sample in wrong.items():
        assert defects(sample), f"{name}: not noticed"


@pytest.mark.parametrize("kind", randomness.KINDS)
def test_std_scales_and_adds(kind):
    """What was in the buffer stays; std is the standard deviation, to 0.5 %; only the part given changes."""
    buffer = torch.full((1_000_001 + 10,), 3.0)
    make(kind).add_normal_(buffer[5:-5], 0.25)
    assert (buffer[:5] == 3).all() and (buffer[-5:] == 3).all()
    added = buffer[5:-5].double() - 3
    assert added.std().item() == pytest.approx(0.25, rel=0.005)  # 7 deviations of 1 / sqrt(2 n)
    assert added.mean().item() == pytest.approx(0, abs=0.25 * 5e-3)
    assert (added != 0).float().mean() > 0.999


@pytest.mark.parametrize("kind", randomness.KINDS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, *(randomness.CPU_CHUNK + more for more in (-1, 0, 1))])
def test_any_length(kind, count):
    buffer = normals(make(kind), count)
    assert buffer.isfinite().all() and (buffer != 0).all()


def test_the_largest_and_smallest_uniforms_make_finite_normals(monkeypatch):
    for word in (0, 2**64 - 1):
        source = make("seeded")
        monkeypatch.setattr(source._source, "words", lambda count, word=word: np.full(count, word, dtype=np.uint64))
        drawn = normals(source, 4)
        assert drawn.isfinite().all() and drawn.abs().max() < 8.6  # sqrt(2 * 53 * log 2) = 8.57
        assert 0 <= source.uniform(1).item() < 1


def test_wrong_buffers_are_refused():
    source = make("os")
    for buffer, std in (
        (torch.zeros(4, dtype=torch.float16), 1.0),
        (torch.zeros(4, dtype=torch.bfloat16), 1.0),
        (torch.zeros(2, 2), 1.0),
        (torch.zeros(4, device="meta"), 1.0),
        *((torch.zeros(4), std) for std in (-1.0, math.nan, math.inf)),
    ):
        with pytest.raises(ValueError, match="expected"):
            source.add_normal_(buffer, std)
    untouched = torch.ones(7)
    source.add_normal_(untouched, 0.0)
    assert (untouched == 1).all()


def test_no_second_buffer():
    """The noise of 64 MB of gradient needs no 64 MB more."""
    buffer = torch.ones(16_000_000)
    source = make("os")
    source.add_normal_(buffer[:100_000], 1.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source.add_normal_(buffer, 1.0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16_000  # kilobytes


# --- uniforms and orders ---


@pytest.mark.parametrize("kind", randomness.KINDS)
def test_uniforms(kind):
    drawn = make(kind, "mask").uniform(1_000_000)
    assert drawn.dtype == torch.float64 and drawn.shape == (1_000_000,)
    assert 0 <= drawn.min() and drawn.max() < 1
    steps = drawn.numpy() * 2**53
    assert (steps == np.floor(steps)).all()
    for bit in (0, 1, 26, 52):  # all 53 bits are in use, each half the time
        share = ((steps.astype(np.int64) >> bit) & 1).mean()
        assert share == pytest.approx(0.5, abs=4.9 * 0.5 / 1000)
    assert stats.kstest(drawn.numpy(), "uniform").statistic * 1000 < math.sqrt(math.log(2 / 1e-6) / 2)
    assert make(kind, "mask").uniform(0).shape == (0,)


@pytest.mark.parametrize("kind", randomness.KINDS)
def test_permutations(kind):
    source = make(kind, "mask")
    order = source.permutation(10_000)
    assert order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(10_000))
    assert source.permutation(0).tolist() == [] and source.permutation(1).tolist() == [0]
    draws = 24 * 500
    counts: dict[tuple, int] = {}
    for _ in range(draws):
        drawn = tuple(source.permutation(4).tolist())
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 1e-6


def test_tied_words_are_drawn_again(monkeypatch):
    source = make("seeded", "mask")
    draws = iter([np.array([5, 5, 1], dtype=np.uint64), np.array([5, 9, 1], dtype=np.uint64)])
    monkeypatch.setattr(source._source, "words", lambda count: next(draws))
    assert source.permutation(3).tolist() == [2, 0, 1]


def test_the_masks_of_dropout_have_more_than_32_bits(monkeypatch):
    """torch.manual_seed alone would keep the lower half of one word. What torch then draws is numpy's Mersenne Twister
    with the very state that the stream gave."""
    masks = []
    for top in range(3):
        source = make("seeded", "dropout")
        state = np.random.default_rng(5).integers(2**32, size=randomness.MERSENNE_WORDS, dtype=np.uint64)
        state[300] ^= np.uint64(top)
        words = np.append(np.uint64(77), (state << np.uint64(32)) + np.uint64(9))
        monkeypatch.setattr(source._source, "words", lambda count, words=words: words[:count])
        source.seed_torch()
        drawn = torch.rand(2000) * 2**24  # the lower 24 bits of a word each
        twister = np.random.MT19937()
        twister.state = {"bit_generator": "MT19937", "state": {"key": state.astype(np.uint32), "pos": 624}}
        assert np.array_equal(drawn.numpy(), twister.random_raw(2000) & np.uint64(2**24 - 1))
        source.seed_torch()
        masks.append(torch.nn.functional.dropout(torch.ones(5000), 0.5))
        again = make("seeded", "dropout")
        again.seed_torch()
        kept = torch.get_rng_state()
        again.begin_step(0), again.seed_torch()
        assert torch.equal(kept, torch.get_rng_state())
    assert not any(torch.equal(masks[i], masks[j]) for i in range(3) for j in range(i))


# --- keys ---


@pytest.mark.parametrize("kind", randomness.KINDS)
def test_streams_of_other_purposes_and_ranks_are_others(kind):
    keys = [(purpose, rank) for purpose in randomness.PURPOSES for rank in range(3)]
    samples = [normals(make(kind, purpose, rank), 200_000).double() for purpose, rank in keys]
    if kind == "seeded":
        for step in (1, 2):
            source = make(kind)
            source.begin_step(step)
            samples.append(normals(source, 200_000).double())
        samples.append(normals(make(kind, seed=8), 200_000).double())
    for index, left in enumerate(samples):
        for right in samples[:index]:
            assert not (left == right).float().mean() > 1e-3
            assert abs((left * right).mean().item()) < 6 / math.sqrt(200_000)
    # Negative control: one key on two ranks.
    assert abs((samples[0] * samples[0]).mean().item()) > 0.9


@pytest.mark.parametrize("kind", ["os", "secure"])
def test_nothing_but_entropy_decides(kind):
    """Two runs with the same seeds everywhere differ, a step begun again does not repeat, no global generator moves."""
    drawn = []
    for _ in range(2):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        state = torch.get_rng_state()
        source = make(kind)
        for _ in range(2):
            source.begin_step(1)
            drawn.append(tuple(normals(source, 4).tolist()))
        assert torch.equal(state, torch.get_rng_state())
    assert len(set(drawn)) == 4


def test_seeded_resumes_where_it_was():
    whole = make("seeded")
    steps = []
    for step in range(1, 6):
        whole.begin_step(step)
        steps.append((normals(whole, 1000), whole.uniform(50), whole.permutation(20)))
    resumed = make("seeded")
    for step in (4, 5):
        resumed.begin_step(step)
        again = (normals(resumed, 1000), resumed.uniform(50), resumed.permutation(20))
        assert all(torch.equal(left, right) for left, right in zip(again, steps[step - 1]))
    assert not torch.equal(steps[3][0], steps[4][0])


@pytest.mark.parametrize("kind", randomness.KINDS)
def test_a_key_never_leaves(kind, monkeypatch):
    key = bytes(range(100, 132))
    monkeypatch.setattr(os, "urandom", lambda count: key[:count])
    source = make(kind, seed=987654321)
    shown = f"{source!r} {source}"
    for secret in ("987654321", key.hex(), repr(key), str(int.from_bytes(key, "little"))):
        assert secret not in shown
    assert key not in [value for value in vars(source).values() if isinstance(value, bytes)]
    for leave in (pickle.dumps, copy.copy, copy.deepcopy, lambda value: torch.save({"noise": value}, io.BytesIO())):
        with pytest.raises(TypeError, match="never pickled"):
            leave(source)


@pytest.mark.parametrize("kind", ["os", "secure"])
def test_without_entropy_there_is_no_noise(kind, monkeypatch):
    def refuse(error):
        def urandom(count):
            raise error

        return urandom

    short = [lambda count: b"", lambda count: bytes(count - 1)]
    for urandom in (refuse(OSError("no device")), refuse(NotImplementedError()), *short):
        monkeypatch.setattr(os, "urandom", urandom)
        with pytest.raises(UserError, match="entropy"):
            NoiseSource(kind, "noise")
    monkeypatch.setattr(os, "urandom", refuse(OSError("no device")))
    NoiseSource("seeded", "noise", seed=3)  # needs none


def test_wrong_kinds_are_refused():
    with pytest.raises(UserError, match="os, secure, seeded"):
        NoiseSource("urandom", "noise")
    seeds = ("os", "noise", 0, 5), ("secure", "noise", 0, 5), ("seeded", "noise", 0, None)
    for arguments in (*seeds, ("os", "weights", 0, None)):
        with pytest.raises(ValueError):
            NoiseSource(*arguments)


def test_secure_without_its_package_is_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(UserError, match="--noise_source secure: .*requirements.txt"):
        NoiseSource("secure", "noise")


@pytest.mark.parametrize("kind", ["os", "secure"])
def test_speed(kind):
    """Nanoseconds a normal beside torch's own float32 generator, alternating in one run, and what a step costs: GPT-2
    small whole (124.4 million coordinates) and its adapters of rank 4 on query and value (147,456)."""
    source, buffer, generator = make(kind), torch.zeros(2**22), torch.Generator()

    def torchs() -> None:
        for chunk in buffer.split(randomness.CPU_CHUNK):
            chunk.add_(torch.empty_like(chunk).normal_(generator=generator))

    def seconds(function) -> float:
        started = time.perf_counter()
        function()
        return time.perf_counter() - started

    pairs = [(seconds(lambda: source.add_normal_(buffer, 1.0)), seconds(torchs)) for _ in range(7)]
    ours, theirs = (min(column) / len(buffer) * 1e9 for column in zip(*pairs))
    adapters = torch.zeros(12 * 2 * (4 * 768 + 768 * 4))
    lora = min(seconds(lambda: source.add_normal_(adapters, 1.0)) for _ in range(7))
    print(f"\n{kind}: {ours:.1f} ns, torch {theirs:.1f} ns a normal; whole GPT-2 small {ours * 0.1244:.2f} s, "
          f"its adapters {lora * 1e3:.2f} ms a step")
    assert ours < 8 * theirs
