"""PRIVACY.md cannot go stale: the tests, mutants and files that it names exist, and its figures are computed again."""

import math
import re
import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import log_ndtr
from scipy.stats import norm

import mutants
from helpers.calibration import calibrate_sigma, calibrate_sigma_shuffle
from helpers.processes import ROOT, environment
from privacy import accounting
from privacy.accounting import Phase

TEXT = (ROOT / "PRIVACY.md").read_text(encoding="utf-8")
LINES = [line for line in TEXT.splitlines() if line.lstrip().startswith("|")]
ROWS = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in LINES]  # of all tables
# N, expected batch, epochs, sigma, delta of the two published recipes; the second's sigma is calibrated
E2E, AUTHORS = (42_061, 128, 20, 0.6, 1e-5), (304_279, 1_024, 3, None, 1 / 304_279)


def figures(label: str) -> list[float]:
    """The numbers in the one row of the last table that begins with `label`."""
    (row,) = [row for row in ROWS if row[0].startswith(label)]
    return [float(cell) for cell in row[1:]]


def plans() -> list[tuple[float, float, int, float, int, int]]:
    """(sigma, q, steps, delta, epochs, batches of an epoch) of both recipes."""
    found = []
    for N, batch, epochs, sigma, delta in (E2E, AUTHORS):
        q, steps = batch / N, round(epochs * N / batch)
        found.append((sigma or calibrate_sigma(8, delta, q, steps), q, steps, delta, epochs, -(-N // batch)))
    return found


def known_order(sigma: float, epochs: int, delta: float) -> float:
    """Balle and Wang (2018), theorem 8, solved for epsilon; no code of the product."""
    mu = math.sqrt(epochs) / sigma
    return brentq(lambda e: norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu) - delta, 0, 400)


def secret_order_at_least(sigma: float, batches: int, epochs: int, delta: float, width: float = 1e-3) -> float:
    """A lower bound of epsilon of shuffling: the largest sum of each epoch, against the data of Chua et al. (2024),
    "How private are DP-SGD implementations?", section 4. Bins, and losses rounded down, only lower it."""
    c = np.linspace(-6, 12, 200_001)

    def masses(shift: float) -> np.ndarray:
        """Of the bins, where one of the `batches` sums is 1 + shift, and the others 0, above what all have."""
        return np.diff(np.exp((batches - 1) * log_ndtr(c / sigma) + log_ndtr((c - shift) / sigma)))

    there, absent = masses(2), masses(1)
    seen = (there > 0) & (absent > 0)
    steps = np.floor(np.log(there[seen] / absent[seen]) / width).astype(int)
    least, count = steps.min(), (steps.max() - steps.min()) * epochs + 1
    mass = np.bincount(steps - least, weights=there[seen])
    size = 1 << int(count).bit_length()
    mass = np.fft.irfft(np.fft.rfft(mass, size) ** epochs, size)[:count].clip(min=0)
    loss = (np.arange(count) + least * epochs) * width

    def delta_of(epsilon: float) -> float:
        return float(mass @ -np.expm1(np.minimum(epsilon - loss, 0)))

    return brentq(lambda e: delta_of(e) - delta, 0, 400)


def test_the_figures_of_the_published_recipes():
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    for column, (sigma, q, steps, delta, epochs, batches) in enumerate(plans()):
        phases = [Phase(sigma, q, steps)]
        shuffled = known_order(sigma, epochs, delta)
        theirs = pld.from_gaussian_mechanism(sigma, sampling_prob=q).self_compose(steps).get_epsilon_for_delta(delta)
        for label, value in {
            "what is printed": accounting.epsilon_prv(phases, delta),
            "Poisson, RDP": accounting.epsilon_rdp(phases, delta), "Poisson, dp_accounting": theirs,
            "**what is true**": shuffled, "the same noise, order secret (upper": shuffled,
            "the same noise, order secret \\*": secret_order_at_least(sigma, batches, epochs, delta),
            "**this repository**": accounting.epsilon_prv(phases, delta),
            "this repository, `--s": accounting.epsilon_shuffle(sigma, epochs, delta),
        }.items():
            assert figures(label)[column] == pytest.approx(value, abs=0.0051), label
        assert figures("mu = ")[column] == pytest.approx(math.sqrt(epochs) / sigma, abs=6e-5)
        words = [row[1 + column] for row in ROWS if row[0] in ("steps E N/B, q = B/N", "sigma")]
        assert words[0] == f"{steps:,}, {q:.7f}" and words[1].startswith(f"{sigma:.4g}")
        N, batch = (E2E, AUTHORS)[column][:2]
        (given,) = [row[1 + column] for row in ROWS if row[0].startswith("N, expected batch")]
        assert given.startswith(f"{N:,}, {batch:,}, {epochs}, ")
    sentence = re.search(r"shuffled E2E run needs sigma ([\d.]+), a Poisson run ([\d.]+)\.", TEXT)
    shuffled, poisson = map(float, sentence.groups())
    assert shuffled == pytest.approx(calibrate_sigma_shuffle(8, 1e-5, 20), abs=6e-4)
    assert poisson == pytest.approx(calibrate_sigma(8, 1e-5, 128 / 42061, 6572), abs=6e-5)


def test_a_lower_bound_is_below_what_is_exact():
    """Controls of the oracle above: one batch an epoch hides nothing, and more batches hide more."""
    exact = known_order(0.6, 20, 1e-5)
    alone = secret_order_at_least(0.6, 1, 20, 1e-5)
    assert 0.99 * exact < alone <= exact
    values = [secret_order_at_least(0.6, batches, 20, 1e-5) for batches in (1, 10, 329, 10_000)]
    assert values == sorted(values, reverse=True) and values[-1] < 0.8 * exact


@pytest.mark.slow
def test_the_commands_print_the_figures():
    """Each command that the document names prints every figure of its column that is not marked as the test's own."""
    commands = re.findall(r"^python (src/privacy_report\.py --plan .*)$", TEXT, re.M)
    assert len(commands) == 2
    for column, command in enumerate(commands):
        done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=environment(), capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        printed = [float(number) for number in re.findall(r"\d+\.\d+(?:e-\d+)?", done.stdout)]
        for label in ("what is printed", "Poisson, RDP", "**what is true**", "this repository, `--s"):
            assert any(abs(number - figures(label)[column]) < 0.0051 for number in printed), label


# ------------------------------------------------------------------ names


def test_every_test_and_file_that_is_named_exists():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", TEXT)
    assert len(named) > 50
    for file, test in named:
        text = mutants.find_test_file(file).read_text(encoding="utf-8")
        assert re.search(rf"^def {test}\(", text, re.M), f"{file}::{test}"
    files = set(re.findall(r"\b((?:src|tests|scripts)/[\w./-]+\.(?:py|sh))\b", TEXT))
    assert len(files) >= 10
    for file in files:
        assert (ROOT / file).exists(), file


def test_every_mutant_stands_beside_a_test_that_catches_it():
    by_name = {mutant.name: mutant for mutant in mutants.MUTANTS}
    named = {}
    for row in ROWS:
        for name in re.findall(r'"([^"]+)"', row[-1] if len(row) == 3 else ""):
            named[name] = row[1]
    assert named.keys() == by_name.keys()
    for name, tests in named.items():
        assert any(test in tests for test in by_name[name].tests), f"{name}: {by_name[name].tests} beside {tests}"
