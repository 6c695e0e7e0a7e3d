"""The privacy plan: the noise that the ranks' sum carries, what a step releases and costs, and that no step escapes.

The ranks are real processes that meet over gloo on the loopback interface. The statistics look at what came out of
release(); each has its negative controls.
"""

import json
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import mutants
from base.distributed import World
from helpers.plans import BATCH, CLIP, COORDINATES, SEEDED, SIGMA, STEPS, open_plan, settings
from helpers.processes import ROOT, environment, free_port
from privacy import attack_risk
from privacy.ledger import NoLedger, read_ledger
from privacy.plan import PrivacyPlan, spent
from privacy.randomness import NoiseSource
from privacy.sampling import PoissonSampler

LIMIT = 4.9  # standard deviations: one false alarm in a million runs


# ------------------------------------------------------------------ the noise of 1, 2 and 4 ranks

DRIVER = """
    import json, os, sys
    sys.path.insert(0, sys.argv[1])
    import numpy as np, torch, torch.distributed as dist
    from base import distributed
    from privacy.ledger import Ledger, NoLedger
    from privacy.plan import PlanSettings, PrivacyPlan

    folder, cases, ports = sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])

    def job(rank, name, size, changes, P):
        '''All steps of a plan with zero gradients; saved: released gradients, extras, draws, number of collectives.'''
        torch.manual_seed(1)
        world = distributed.start() if size > 1 else distributed.World()
        given = PlanSettings(**changes)
        place = os.path.join(folder, name)
        ledger = NoLedger()
        if rank == 0:
            os.mkdir(place)
            ledger = Ledger(place, given.ledger_entries(size), False)
        plan = PrivacyPlan(given, world, ledger)
        counted = {"n": 0}
        for call in ("all_reduce", "broadcast", "reduce_scatter_single"):
            def counting(*a, real=getattr(dist, call), **k):
                counted["n"] += 1
                return real(*a, **k)
            setattr(dist, call, counting)
        sharded = name.startswith("shares")
        padded = -(-P // size) * size if sharded else P
        grads, extras, draws = [], [], []
        for step in range(1, given.steps + 1):
            drawn = plan.open_step(step)
            sums = torch.zeros(padded + 2, dtype=torch.float64)
            sums[padded:] = torch.tensor([len(drawn), 10.0 ** rank])
            grads.append(plan.release(sums, P, sharded).clone().numpy())
            extras.append(sums[padded:].tolist())
            draws.append(drawn.tolist())
        np.save(f"{place}.{rank}.npy", np.stack(grads))
        with open(f"{place}.{rank}.json", "w") as handle:
            json.dump({"extras": extras, "draws": draws, "collectives": counted["n"]}, handle)
        world.close()

    failed = 0
    for (name, size, changes, P), port in zip(cases, ports):
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                try:
                    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank),
                                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                    job(rank, name, size, changes, P)
                except BaseException as error:
                    print(f"{name} rank {rank}: {error!r}", file=sys.stderr, flush=True)
                    os._exit(1)
                os._exit(0)
            children.append(child)
        failed += sum(os.waitpid(child, 0)[1] != 0 for child in children)
    sys.exit(failed)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """name -> [(gradients (steps, P), other results) of each rank]: real processes, forked from one that has torch."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = []
    for size in (1, 2, 4):
        cases.append((f"os{size}", size, {}, COORDINATES))
        cases.append((f"empty{size}", size, {"batch": 1e-9, "steps": 12, **SEEDED}, 100))
        cases.append((f"shuffle{size}", size, {"sampling": "shuffle", "N": 1003, "steps": 22, **SEEDED}, 10))
    cases.append(("again", 1, {}, COORDINATES))
    cases.append(("seeded", 2, SEEDED, 1000))
    cases.append(("seeded again", 2, SEEDED, 1000))
    cases.append(("shares4", 4, {}, COORDINATES))
    cases += [(name, 4, SEEDED, 1001) for name in ("shares seeded", "whole seeded")]  # n = 251: the last share is short
    script = folder / "driver.py"
    script.write_text(textwrap.dedent(DRIVER))
    complete = [(name, size, vars(settings(**changes)), P) for name, size, changes, P in cases]
    ports = [free_port() for _ in cases]
    done = subprocess.run([sys.executable, script, ROOT / "src", folder, json.dumps(complete), json.dumps(ports)],
                          env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: [(np.load(folder / f"{name}.{rank}.npy"), json.loads((folder / f"{name}.{rank}.json").read_text()))
                   for rank in range(size)] for name, size, _, _ in cases} | {"folder": folder}


def noise_defects(grads: np.ndarray, std: float, size: int) -> list[str]:
    """In what released zero gradients (steps, P) differ from N(0, std^2), once a coordinate, independent throughout."""
    found = []
    x = grads.astype(np.float64) / std
    steps, P = x.shape
    whole = math.sqrt((x**2).mean())
    if abs(whole - 1) > 0.003:  # 12 deviations of 1/sqrt(2 n) for n of 4 million
        found.append(f"standard deviation {whole:.5f} of what it should be")
    if abs(x.mean()) > LIMIT / math.sqrt(x.size):
        found.append(f"mean {x.mean():.2g}")
    if (x == 0).mean() > 1e-4:
        found.append(f"{(x == 0).sum()} coordinates without noise")
    parts = [x[:, P * rank // size:P * (rank + 1) // size] for rank in range(size)]
    for rank, part in enumerate(parts):
        own = math.sqrt((part**2).mean())
        if abs(own - 1) > LIMIT / math.sqrt(2 * part.size):
            found.append(f"standard deviation {own:.5f} in the share of rank {rank}")
        for other in range(rank):
            width = min(part.shape[1], parts[other].shape[1])
            if abs((part[:, :width] * parts[other][:, :width]).mean()) > LIMIT / math.sqrt(steps * width):
                found.append(f"the shares of ranks {other} and {rank} are alike")
    for lag in range(1, steps):
        if abs((x[lag:] * x[:-lag]).mean()) > LIMIT / math.sqrt((steps - lag) * P):
            found.append(f"steps {lag} apart are alike")
    return found


STD = SIGMA * CLIP / BATCH


@pytest.mark.parametrize("size", [1, 2, 4])
def test_noise_has_its_scale_after_the_all_reduce(ranks, size):
    results = ranks[f"os{size}"]
    assert noise_defects(results[0][0], STD, size) == []
    for grads, _ in results[1:]:
        assert grads.tobytes() == results[0][0].tobytes(), "ranks differ"


def test_shares_are_those_of_the_whole(ranks):
    """Each rank gets its own share: noise once a coordinate, none after the last; the bits of what all ranks get."""
    assert noise_defects(np.hstack([grads for grads, _ in ranks["shares4"]]), STD, 4) == []
    shares = np.hstack([grads for grads, _ in ranks["shares seeded"]])
    assert shares[:, :1001].tobytes() == ranks["whole seeded"][0][0].tobytes() and not shares[:, 1001:].any()
    for (_, shared), (_, whole) in zip(ranks["shares seeded"], ranks["whole seeded"], strict=True):
        assert shared["extras"] == whole["extras"] and shared["collectives"] == whole["collectives"] + STEPS


def test_the_noise_checks_catch_what_is_wrong(ranks):
    """Negative controls, made of the noise that passed."""
    good = ranks["os4"][0][0]
    quarter = COORDINATES // 4
    missing, repeated, doubled = good.copy(), good.copy(), good.copy()
    missing[:, quarter:2 * quarter] = 0
    repeated[:, quarter:2 * quarter] = good[:, :quarter]
    doubled[:, quarter:2 * quarter] *= math.sqrt(2)
    wrong = {
        "sigma 10 % low": 0.9 * good, "sigma 0.5 % low": 0.995 * good, "a rank's share without noise": missing,
        "one key on two ranks": repeated, "a share with noise of two ranks": doubled,
        "every rank adds all of it": 2 * good,
        "the same noise in every step": np.repeat(good[:1], STEPS, 0), "divided by another batch": good * BATCH / 97,
        "one coordinate in a thousand left out": np.where(np.arange(COORDINATES) % 1000 == 0, 0, good),
    }
    for name, grads in wrong.items():
        assert noise_defects(grads, STD, 4), f"{name}: not noticed"


def test_one_random_seed_does_not_decide_the_noise(ranks):
    """Both runs began with torch.manual_seed(1). The seeded source, and it alone, repeats itself."""
    left, right = ranks["os1"][0][0], ranks["again"][0][0]
    assert (left == right).mean() < 1e-4
    assert abs((left * right).mean()) < LIMIT * STD**2 / math.sqrt(left.size)
    assert ranks["os1"][0][1]["draws"] != ranks["again"][0][1]["draws"]
    for rank in range(2):
        assert ranks["seeded"][rank][0].tobytes() == ranks["seeded again"][rank][0].tobytes()
        assert ranks["seeded"][rank][1] == ranks["seeded again"][rank][1]
    places = [[[unit // 2 for unit in step] for step in result["draws"]] for _, result in ranks["seeded"]]
    assert places[0] != places[1], "one mask on both ranks"
    grads = ranks["seeded"][0][0]
    assert not np.isclose(grads[:, :500], grads[:, 500:], rtol=1e-3).mean() > 0.1, "one noise on both ranks"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_draws_are_disjoint_and_the_extras_are_summed_and_no_more(ranks, size):
    total = 0
    for step in range(STEPS):
        drawn = [unit for _, result in ranks[f"os{size}"] for unit in result["draws"][step]]
        assert len(set(drawn)) == len(drawn)
        total += len(drawn)
        for _, result in ranks[f"os{size}"]:
            assert result["extras"][step] == [len(drawn), sum(10.0**rank for rank in range(size))]
    assert abs(total - STEPS * BATCH) < LIMIT * math.sqrt(STEPS * BATCH)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_empty_draws_everywhere_are_steps_like_any_other(ranks, size):
    """q -> 0: no units on any rank, and still as many collectives, records and noisy releases as steps."""
    results = ranks[f"empty{size}"]
    for grads, result in results:
        assert result["draws"] == [[]] * 12
        assert result["collectives"] == (0 if size == 1 else 24)  # a word before the draw and the sum, on every rank
        assert len({step.tobytes() for step in grads}) == 12 and (grads != 0).all()
    spread = results[0][0].std() / (SIGMA * CLIP / 1e-9)  # divided by the expected batch, however small
    assert abs(spread - 1) < LIMIT / math.sqrt(2 * 1200)
    ledger = read_ledger(ranks["folder"] / f"empty{size}" / "privacy_ledger.jsonl")
    assert [record["step"] for record in ledger.records] == list(range(1, 13))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shuffled_epochs_of_real_ranks(ranks, size):
    """1003 units in steps of 100: each once an epoch, disjoint among the ranks, the last step what remains."""
    for epoch in (range(11), range(11, 22)):
        used = [unit for _, result in ranks[f"shuffle{size}"] for step in epoch for unit in result["draws"][step]]
        assert sorted(used) == list(range(1003))
    assert ranks["shuffle1"][0][1]["draws"][:11] != ranks["shuffle1"][0][1]["draws"][11:]


# ------------------------------------------------------------------ a step of one process


def test_release_divides_by_the_expected_batch_and_adds_noise_once(tmp_path):
    """Whatever was drawn; the extras stay as they were; it is rounded to float32 last."""
    plan = open_plan(tmp_path, settings(**SEEDED))
    for step in (1, 2):
        assert len(plan.open_step(step)) != BATCH
        sums = torch.arange(1010, dtype=torch.float64) * (1 + 1e-9)  # no float32 numbers
        noise = torch.zeros(1000, dtype=torch.float64)
        source = NoiseSource("seeded", "noise", 0, 9)
        source.begin_step(step)
        source.add_normal_(noise, SIGMA * CLIP)
        given = sums.clone()
        grad = plan.release(sums, 1000)
        assert torch.equal(grad, ((given[:1000] + noise) / BATCH).float()) and torch.equal(sums[1000:], given[1000:])


def test_a_step_is_opened_once_and_released_once(tmp_path):
    plan = open_plan(tmp_path, settings())
    sums = torch.zeros(10, dtype=torch.float64)
    for misuse in (lambda: plan.release(sums, 10), plan.seed_dropout):
        with pytest.raises(AssertionError):
            misuse()
    plan.open_step(1)
    with pytest.raises(AssertionError, match="before the step before"):
        plan.open_step(2)
    with pytest.raises(AssertionError):
        plan.release(sums.float(), 10)
    plan.release(sums, 10)
    with pytest.raises(AssertionError):
        plan.release(sums, 10)
    with pytest.raises(ValueError, match="rank 0"):
        PrivacyPlan(settings(), World(), NoLedger())
    with pytest.raises(ValueError, match="rank 0"):
        PrivacyPlan(settings(), World(1, 2), plan.ledger)


def test_the_record_is_on_disk_before_the_mask_is_drawn(tmp_path, monkeypatch):
    plan = open_plan(tmp_path, settings())
    seen = []
    real = PoissonSampler.draw

    def draw(self, step):
        seen.append((step, [record["step"] for record in read_ledger(plan.ledger.path).records]))
        return real(self, step)

    monkeypatch.setattr(PoissonSampler, "draw", draw)
    for step in (1, 2, 3):
        plan.open_step(step)
        plan.release(torch.zeros(5, dtype=torch.float64), 5)
    assert seen == [(1, [1]), (2, [1, 2]), (3, [1, 2, 3])]


@pytest.mark.parametrize("sampling, kind, target", [
    ("poisson", "epsilon", 1.0), ("shuffle", "epsilon", 4.0), ("poisson", "advantage", 0.1),
    ("shuffle", "advantage", 0.5), ("allocation", "epsilon", 1.0), ("allocation", "advantage", 0.1)])
def test_the_budget_is_checked_before_a_step_is_drawn(tmp_path, sampling, kind, target):
    """As many steps as stay within the target and no more; the refused step is neither charged nor drawn."""
    plan = open_plan(tmp_path, settings(steps=1000, sampling=sampling, **{f"target_{kind}": target}))
    step = 0

    def measured() -> float:
        return plan.epsilon()[0] if kind == "epsilon" else attack_risk.advantage(spent(plan.state))

    while (drawn := plan.open_step(step + 1)) is not None:
        step += 1
        plan.release(torch.zeros(5, dtype=torch.float64), 5)
        assert measured() <= target
    assert 0 < step < 1000 and len(read_ledger(plan.ledger.path).records) == step == plan.ledger.state.charged
    assert drawn is None and plan.open is None
    plan.permitted = 1
    plan.open_step(step + 1)
    assert measured() > target  # one more would have passed it


# ------------------------------------------------------------------ these tests can fail


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_still_applies(mutant):
    text = (ROOT / "src" / mutant.file).read_text(encoding="utf-8")
    assert mutants.mutated(text, mutant) != text
    for test in mutant.tests:
        mutants.address(test)
    with pytest.raises(ValueError, match="has no test_that_is_gone"):
        mutants.address("test_privacy_plan.py::test_that_is_gone")


@pytest.mark.slow
def test_every_mutant_is_caught():
    command = [sys.executable, ROOT / "tests" / "mutants.py"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
