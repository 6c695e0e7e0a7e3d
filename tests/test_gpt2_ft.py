"""Whole runs of gpt2_ft.py on a tiny model: budgets, samplers, what is written, and what must not change a result."""

import hashlib
import json
import math
import os
import random
import re

import numpy as np
import pytest
import torch

from helpers.exact_accounting import gaussian_epsilon
from helpers.interrupted_runs import DRAW, kill
from helpers.processes import ROOT, free_port
from helpers.small_runs import (
    STEPS,
    N,
    contents,
    equal,
    flags,
    initial,
    ledger,
    material,
    metrics,
    read,
    server,
    start_ranks,
    train,
    weights,
    write_tokens,
)

DPDDP = "opacus.distributed:DifferentiallyPrivateDistributedDataParallel"
SPEC_KEYS = {"unit", "relation", "N", "q", "sigma", "clip", "steps_charged", "delta", "epsilon_prv", "epsilon_rdp",
             "sampling", "noise_source", "disclosed"}


# ------------------------------------------------------------------ what a run leaves


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    work = tmp_path_factory.mktemp("whole") / "run"
    (rank,) = train(flags(work, noise_source=None, noise_seed=None, eval_interval=4))
    return work, rank


def test_files_and_their_keys(run):
    work, rank = run
    assert sorted(os.listdir(work)) == [".lock", "args.json", "metrics.jsonl", "model.2.pt", "model.4.pt", "model.6.pt",
                                        "optimizer.6.pt", "privacy.json", "privacy_ledger.jsonl"]
    said = (ROOT / "PRIVACY.md").read_text()  # of each file, whether it may be published
    names = {re.sub(r"\.\d+\.", ".{step}.", name) for name in os.listdir(work)} - {".lock"}
    assert all(f"`{name}`" in said for name in names)
    report = read(work)
    assert SPEC_KEYS <= set(report)
    assert {key: report[key]
            for key in ("unit", "relation", "N", "q", "sigma", "clip", "steps_charged", "delta", "sampling",
                                         "noise_source")} == {
        "unit": "example", "relation": "add or remove one example", "N": N, "q": 8 / N, "sigma": 0.8, "clip": 1.0,
        "steps_charged": STEPS, "delta": 1e-5, "sampling": "poisson", "noise_source": "os"}
    for words in ("training loss", "optimizer.{step}.pt", "digest of the training file", "cut at --seq_len",
                  "validation loss"):
        assert any(words in item for item in report["disclosed"])
    records = metrics(work)
    for record in records:
        assert {"step", "epoch", "lr", "seconds"} <= set(record)
        assert {"loss", "epsilon", "examples_per_s", "tokens_per_s"} <= set(record) or {"valid_loss",
                                                                                        "valid_ppl"} <= set(record)
    assert [(record["step"], "loss" in record) for record in records] == [(2, True), (4, True), (4, False), (6, True),
                                                                          (6, False)]
    for record in records:
        assert record["epoch"] == pytest.approx(record["step"] * 8 / N)
        assert record["lr"] == pytest.approx(0.01 * (STEPS - record["step"] + 1) / STEPS)  # linear; the step's own rate
        if "valid_loss" in record:
            assert record["valid_ppl"] == pytest.approx(math.exp(record["valid_loss"]))
    assert f"epsilon {report['epsilon_prv']:.4f} (PRV upper bound)" in rank.stdout and not rank.stderr
    assert read(work, "args.json")["lora_dim"] == 2


def test_the_summary(run, tmp_path):
    """A run that came to its end says so in its report; the memory is the most of any rank, before a resume too."""
    work, _ = run
    report, last = read(work), metrics(work)[-1]
    assert report["eval_loss"] == last["valid_loss"] and report["final_epsilon_prv"] == report["epsilon_prv"]
    assert last["seconds"] <= report["train_runtime"] < last["seconds"] + 30
    greedy = {1: [["allocate", {"point": DRAW, "nth": 3, "size": 500_000_000}]]}
    ranks = start_ranks(flags(tmp_path / "run", save_interval=3), 2, {**greedy, 0: [kill(DRAW, "after", 5)]})
    for rank in ranks:
        rank.wait()
    assert not (tmp_path / "run/privacy.json").exists() or "train_runtime" not in read(tmp_path / "run")
    train(flags(tmp_path / "run", resume=True), 2)
    train(flags(tmp_path / "thrifty"), 2)
    more = read(tmp_path / "run")["peak_memory_bytes"] - read(tmp_path / "thrifty")["peak_memory_bytes"]
    assert 4e8 < more < 6e8


def test_the_training_file_is_no_validation_data(tmp_path):
    """The same bytes under another name: one line, nothing written. Without noise, too."""
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((material() / "train.jsonl").read_bytes())
    for changed in ({}, {"noise_multiplier": 0, "noise_source": None, "noise_seed": None}):
        ranks = start_ranks(flags(tmp_path / "run", valid_data=copy, **changed), 2)
        assert [rank.wait() for rank in ranks] == [2, 2] and not ranks[1].stderr
        assert f"--valid_data {copy}: is the training file (same sha256)" in ranks[0].error
    assert os.listdir(tmp_path) == ["copy.jsonl"]


def test_the_digest_is_of_what_was_read(tmp_path):
    """The training file becomes longer after it was read and before the run writes its digest."""
    data = tmp_path / "train.jsonl"
    data.write_bytes((material() / "train.jsonl").read_bytes())
    sha256 = hashlib.sha256(data.read_bytes()).hexdigest()
    longer = ["shell", {"point": "corpus.examples:read_examples", "when": "after", "nth": 1,
                        "command": f"head -n 1 {data} >> {data}"}]
    train(flags(tmp_path / "run", train_data=data, max_step=1), faults={0: [longer]})
    assert read(tmp_path / "run", "args.json")["train_sha256"] == sha256
    assert sha256 != hashlib.sha256(data.read_bytes()).hexdigest()


def test_validation_examples_that_are_training_examples_are_said_on_the_terminal_alone(run, tmp_path):
    """Their number is private: what is on disk is the same with two of them, one of them twice, and with none."""
    lines = (material() / "train.jsonl").read_text().splitlines(True)
    valid = tmp_path / "valid.jsonl"
    valid.write_text((material() / "valid.jsonl").read_text() + lines[3] + lines[30] + lines[3])
    (rank,) = train(flags(tmp_path / "run", valid_data=valid, noise_source=None, noise_seed=None))
    (line,) = [line for line in rank.stdout.splitlines() if "WARNING" in line]
    assert line.startswith("WARNING: 3 of the 10 validation examples are training examples, too")
    work, without = run
    assert read(tmp_path / "run")["disclosed"] == read(work)["disclosed"] and "WARNING" not in without.stdout


def test_checkpoints_are_plain_tensors(run):
    work, _ = run
    for name in ("model.2.pt", "model.6.pt", "optimizer.6.pt"):
        torch.load(work / name, weights_only=True)
    assert set(weights(work)) == {f"transformer.h.{layer}.attn.c_attn.lora_{part}" for layer in (0, 1) for part in "AB"}


def test_no_key_of_the_noise_is_on_disk(tmp_path):
    """Whatever the operating system gave for keys is in no file of the run."""
    dump = tmp_path / "keys"
    train(flags(tmp_path / "run", noise_source="os", noise_seed=None), 1, {0: [["entropy", {"file": str(dump)}]]})
    keys = [bytes.fromhex(line) for line in dump.read_text().split()]
    assert len(keys) >= 2 and all(len(key) == 32 for key in keys)
    for path in (tmp_path / "run").iterdir():
        content = path.read_bytes()
        for key in keys:
            assert key[:8] not in content and key.hex()[:16].encode() not in content
            assert str(int.from_bytes(key, "little"))[:16].encode() not in content


def test_the_random_seed_decides_no_noise(tmp_path):
    """Two runs with one --random_seed differ, with lr 0 they do not: all that differs is masks and noise."""
    for name, lr in (("a", 0.01), ("b", 0.01), ("c", 0.0), ("d", 0.0)):
        train(flags(tmp_path / name, noise_source=None, noise_seed=None, lr=lr))
    assert not equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert equal(weights(tmp_path / "c"), weights(tmp_path / "d"))


# ------------------------------------------------------------------ noise and budgets


def test_no_noise_is_said_to_be_no_privacy(tmp_path):
    (rank,) = train(flags(tmp_path / "run", noise_multiplier=0, noise_source=None, noise_seed=None, sampling="poisson"))
    report = read(tmp_path / "run")
    assert report["epsilon_prv"] == report["epsilon_rdp"] == "inf" and report["sigma"] == 0
    assert "epsilon = inf" in rank.stdout and rank.stdout.count("epsilon = inf") == 2
    assert all(record.get("epsilon", "inf") == "inf" for record in metrics(tmp_path / "run"))
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_steps_without_noise_are_not_forgotten(tmp_path):
    """Noise that comes later takes nothing back: epsilon stays infinite, which is said before the first step and at the
    end, and no target can be met; nothing is drawn or changed for one. And noise first, then none."""
    work, changed = tmp_path / "run", ["--resume_changed", "sigma", "noise_multiplier", "steps", "max_step"]
    train(flags(work, noise_multiplier=0, sampling="poisson", max_step=2))
    before = {**contents(work), ".lock": None}
    (rank,) = start_ranks([*flags(work, noise_multiplier=None, target_epsilon=8, sampling="poisson", resume=True),
                           *changed, "target_epsilon"])
    assert rank.wait() == 2 and "--target_epsilon 8: " in rank.error
    assert "charges 2 steps without noise, epsilon is infinite" in rank.error
    assert {**contents(work), ".lock": None} == before
    (rank,) = train([*flags(work, sampling="poisson", resume=True), *changed])
    assert "WARNING: 2 of the steps charged so far had no noise: epsilon is infinite" in rank.stdout
    assert "epsilon inf (PRV upper bound), inf (RDP) at delta 1e-05; inf (PRV) at delta 0.0025;" in rank.stdout
    report = read(work)
    assert {report[key] for key in report if key.startswith("epsilon")} == {"inf"} and report["sigma"] == 0.8
    assert not rank.stderr and report["steps_charged"] == STEPS == len(ledger(work))
    rank = server().start("src/privacy_report.py", [work])
    assert rank.wait() == 0 and "inf           inf  no noise, or no steps; the run's delta" in rank.stdout
    other = tmp_path / "other"
    train(flags(other, max_step=2))
    (rank,) = train([*flags(other, noise_multiplier=0, sampling="poisson", resume=True), *changed])
    assert read(other)["epsilon_prv"] == "inf" and "gives no privacy" in rank.stdout and not rank.stderr


@pytest.mark.parametrize("sampling", ["poisson", "shuffle", "allocation"])
def test_the_target_is_met_and_never_passed(tmp_path, sampling):
    (rank,) = train(flags(work := tmp_path / "run", noise_multiplier=None, target_epsilon=3, sampling=sampling))
    report = read(work)
    # Shuffling: STEPS = 6 steps of 5 an epoch are two participations.
    assert 0.995 * 3 <= report["epsilon_prv"] <= 3 == report["target_epsilon"] and report["steps_charged"] == STEPS
    assert f"({'PLD' if sampling == 'allocation' else 'PRV'} upper bound)" in rank.stdout
    if sampling == "shuffle":
        assert report["epsilon_prv"] == pytest.approx(gaussian_epsilon(math.sqrt(2) / report["sigma"], 1e-5), rel=1e-6)


def test_redone_steps_come_out_of_the_budget(tmp_path):
    """Killed in step 4 with a checkpoint of step 2: two of the six steps are spent twice, so the run ends after step 4,
    with the model of step 4; and again, resumed with nothing left, it draws nothing."""
    work, budget = tmp_path / "run", {"noise_multiplier": None, "target_epsilon": 3}
    (rank,) = start_ranks(flags(work, **budget), 1, {0: [kill(DRAW, "after", 4)]})
    assert rank.wait() == -9
    (rank,) = train(flags(work, **budget, resume=True))
    assert "the privacy budget permits no step after 4" in rank.stdout
    report = read(work)
    assert report["steps_charged"] == 6 and 0.995 * 3 <= report["epsilon_prv"] <= 3
    assert [record["step"] for record in ledger(work)] == [1, 2, 3, 4, 3, 4]
    assert max(name for name in os.listdir(work) if name.startswith("model")) == "model.4.pt"
    reference = tmp_path / "reference"
    train(flags(reference, **budget))
    assert equal(weights(work, 4), weights(reference, 4))
    (rank,) = train(flags(work, **budget, resume=True))
    assert "the privacy budget permits no step after 4" in rank.stdout and len(ledger(work)) == 6


def test_a_budget_spent_on_kills_is_never_passed(tmp_path):
    """Killed until nothing is left: epsilon stays within the target to the end."""
    work, budget = tmp_path / "run", {"noise_multiplier": None, "target_epsilon": 3, "save_interval": 100}
    for attempt in range(7):
        (rank,) = start_ranks(flags(work, **budget, resume=attempt > 0 or None), 1, {0: [kill(DRAW, "after", 1)]})
        if rank.wait() == 0:
            break
    assert attempt == STEPS and len(ledger(work)) == STEPS and read(work)["epsilon_prv"] <= 3
    assert "permits no step after 0" in rank.stdout and (work / "model.0.pt").exists()


def test_a_longer_run_needs_its_change_said_and_keeps_the_budget(tmp_path):
    """Twice the steps with the noise that was chosen for half of them: it ends where the budget does."""
    work = tmp_path / "run"
    train(flags(work, noise_multiplier=None, target_epsilon=3))
    sigma = read(work)["sigma"]
    (rank,) = train([*flags(work, noise_multiplier=None, target_epsilon=3, max_step=2 * STEPS, resume=True),
                     "--resume_changed",
                     "max_step", "steps", "sigma"])
    report = read(work)
    assert report["sigma"] > sigma and report["epsilon_prv"] <= 3 and f"permits no step after {STEPS}" in rank.stdout


def test_shuffling_claims_no_amplification(tmp_path):
    """Every example once an epoch, E epochs: mu = sqrt(E)/sigma. A kill makes the epoch it interrupts count twice."""
    work = tmp_path / "run"
    shuffled = {"sampling": "shuffle", "max_step": 10, "noise_multiplier": 2.0}
    train(flags(work, **shuffled))
    report = read(work)
    assert report["epsilon_prv"] == pytest.approx(gaussian_epsilon(math.sqrt(2) / 2, 1e-5), rel=1e-6)
    assert report["relation"].startswith("add or remove one example, its place in the order left empty")
    killed = tmp_path / "killed"
    start_ranks(flags(killed, **shuffled), 1, {0: [kill("privacy.sampling:ShuffleSampler.draw", "after", 4)]})[0].wait()
    train(flags(killed, **shuffled, resume=True))
    assert read(killed)["epsilon_prv"] == pytest.approx(gaussian_epsilon(math.sqrt(3) / 2, 1e-5), rel=1e-6)
    assert equal(weights(killed, 10), weights(work, 10))


def test_an_empty_draw_is_a_step(tmp_path):
    """q = 1/40: most draws of two ranks are empty on one of them or on both; every step is charged, noised and made."""
    work = tmp_path / "run"
    ranks = train(flags(work, train_batch_size=1, noise_multiplier=1, max_step=20, lora_dim=0, lr=0.001), 2,
                  {rank: [["count", {"point": "privacy.clipping:BookKeeping.accumulate",
                                     "file": str(tmp_path / f"{rank}")}]]
                   for rank in (0, 1)})
    passes = [(tmp_path / str(rank)).stat().st_size if (tmp_path / str(rank)).exists() else 0 for rank in (0, 1)]
    assert max(passes) < 20 and len(ledger(work)) == 20 == read(work)["steps_charged"]
    assert not equal(weights(work, 20), weights(work, 18)) and not any(rank.stderr for rank in ranks)


# ------------------------------------------------------------------ what must not change a result


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_how_a_batch_is_cut_changes_rounding_alone(tmp_path):
    """Micro-batches of one example, of some, of all; and both engines.

    The noise is the same, so gradients (of about sigma C / B = 0.1) differ by some 1e-7; Adam without bias correction
    divides m by sqrt(v), so an update of lr = 0.01 at most moves by 1e-6 of itself a step, six times: 1e-7. Another
    seed moves 1e-2.
    """
    results = {}
    for name, more in {"one": {"micro_batch_tokens": 1}, "some": {"micro_batch_tokens": 40},
                       "all": {"micro_batch_tokens": 10**6},
                       "opacus": {"grad_engine": "opacus"}, "other": {"noise_seed": 2}}.items():
        train(flags(tmp_path / name, lora_dropout=0, **more))
        results[name] = weights(tmp_path / name)
    for name in ("one", "some", "opacus"):
        assert largest_difference(results[name], results["all"]) < 2e-6
    assert largest_difference(results["other"], results["all"]) > 2e-3


def test_gradient_accumulation_is_one_larger_draw(tmp_path):
    """--grad_acc 4 of 2 is one batch of 8: the same q, records, weights."""
    for name, more in (("a", {"train_batch_size": 8}), ("b", {"train_batch_size": 2, "grad_acc": 4})):
        train(flags(tmp_path / name, **more))
    assert ledger(tmp_path / "a") == ledger(tmp_path / "b")
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_ranks_agree_with_one_another_and_with_one_process(tmp_path):
    """The whole data in every step (q = 1) and next to no noise: 1, 2 and 4 ranks sum the same clipped gradients, so
    the weights agree to rounding (gradients are sums of 40 in another order: 1e-6 of an update of 0.01 at most, a
    step). The account does not depend on the number of ranks at all; ranks hold the same bits."""
    found = {}
    for size in (1, 2, 4):
        work = tmp_path / f"{size}"
        dumps = {rank: [["dump", {"file": str(tmp_path / f"{size}.{rank}")}]] for rank in range(size)}
        train(flags(work, train_batch_size=N // size, noise_multiplier=1e-12, lora_dropout=0, scheduler="constant"),
              size, dumps)
        assert len({(tmp_path / f"{size}.{rank}").read_bytes() for rank in range(size)}) == 1
        found[size] = weights(work)
        keep = ("unit", "relation", "N", "q", "sigma", "clip", "steps_charged", "delta", "epsilon_prv", "epsilon_rdp",
                "sampling")
        assert {key: read(work)[key] for key in keep} == {key: read(tmp_path / "1")[key] for key in keep}
        for one, other in zip(metrics(work), metrics(tmp_path / "1"), strict=True):
            for key in ("loss", "valid_loss"):
                assert one.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-5)
    start = torch.load(tmp_path / "1/model.2.pt", weights_only=True)["model_state_dict"]
    assert largest_difference(found[1], start) > 1e-3
    for size in (2, 4):
        assert largest_difference(found[size], found[1]) < 1e-4


@pytest.mark.parametrize("lora_dim", [2, 0], ids=["lora", "full"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_opacus_releases_the_same_gradient(tmp_path, size, lora_dim):
    """--grad_engine opacus with several ranks: each one's passes go through Opacus's DPDDP, and the first step releases
    book-keeping's sum, of all N units (q = 1) under the same noise.

    Every rounding is 2^-24 of its value, in both engines; independent ones add like their roots. The noise, `size` - 1
    sums over ranks and the division round what is released. Before them come N additions to a sum of norm N C at most,
    and N gradients of norm C at most, each through some 20 products of 64 addends at most: C sqrt(20 x 64) = 36 C.
    After six steps the weights differ by no more than in test_how_a_batch_is_cut_changes_rounding_alone.
    """
    sums, found = {}, {}
    for engine in ("book_keeping", "opacus"):
        work, passes = tmp_path / engine, [tmp_path / f"{engine}.{rank}" for rank in range(size)]
        faults = {rank: [["count", {"point": f"{DPDDP}.forward", "file": str(passes[rank])}]] for rank in range(size)}
        faults[0].append(["released", {"file": f"{work}.sum"}])
        train(flags(work, grad_engine=engine, lora_dim=lora_dim, lora_dropout=0, train_batch_size=N // size), size,
              faults)
        assert [path.exists() for path in passes] == [engine == "opacus" and size > 1] * size
        sums[engine], found[engine] = np.fromfile(f"{work}.sum"), weights(work)
    released, difference = (np.linalg.norm(x) for x in (sums["opacus"], sums["opacus"] - sums["book_keeping"]))
    assert difference < 2 * 2**-24 * ((size + 1) * released + math.sqrt(N) * (N + 36))
    assert largest_difference(found["opacus"], found["book_keeping"]) < 2e-6


def test_opacus_resumes_on_two_ranks(tmp_path):
    arguments = {"grad_engine": "opacus", "eval_interval": 2}
    train(flags(tmp_path / "whole", **arguments), 2)
    faults = {rank: [kill("run.loop:Trainer.after_step", "after", 3)] for rank in range(2)}
    assert [rank.wait() for rank in start_ranks(flags(tmp_path / "run", **arguments), 2, faults)] == [-9, -9]
    train(flags(tmp_path / "run", resume=True, **arguments), 2)
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_the_whole_model_trains_too(tmp_path):
    """--lora_dim 0: every weight moves, the tied embedding once; the checkpoint holds all and starts another run."""
    train(flags(tmp_path / "run", lora_dim=0, lora_dropout=0))
    before, after = initial(), weights(tmp_path / "run")
    assert before.keys() == after.keys() and all(not torch.equal(before[name], after[name]) for name in before)
    train(flags(tmp_path / "next", lora_dim=0, lora_dropout=0, init_checkpoint=tmp_path / "run", lr=0))
    assert equal(weights(tmp_path / "next"), after)


def test_weights_of_an_earlier_run_bring_what_it_spent_to_mind(tmp_path):
    """A new ledger does not know the one beside the initial weights: the run says so, and its report keeps it."""
    train(flags(tmp_path / "run", max_step=2))
    (rank,) = train(flags(tmp_path / "next", init_checkpoint=tmp_path / "run", max_step=2))
    words = f"initial weights of {tmp_path / 'run'}, whose own ledger charges 2 steps: not counted here"
    assert f"WARNING: {words}" in rank.stdout and any(words in item for item in read(tmp_path / "next")["disclosed"])
    assert "initial weights" not in json.dumps(read(tmp_path / "run"))


@pytest.mark.parametrize("changed", [{"max_grad_norm": 2.0}, {"noise_source": "os", "noise_seed": None},
                                     {"train_data": "other"}, {"lr": 0.5}])
def test_ranks_with_other_flags_or_files_do_not_start(tmp_path, changed):
    """One rank's q, C or noise source would not be what rank 0 reports."""
    other = {**changed}
    if "train_data" in changed:
        other["train_data"] = write_tokens(tmp_path / "other.jsonl", N + 1, seed=3)
    port, ranks = free_port(), []
    for rank, own in enumerate(({}, other)):
        env = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(server().start("src/gpt2_ft.py", flags(tmp_path / "run", **own), env=env))
    assert [rank.wait() for rank in ranks] == [2, 2] and not ranks[1].stderr
    assert "the processes differ: " in ranks[0].error and f"{next(iter(changed))} " in ranks[0].error
    assert not (tmp_path / "run").exists()


def test_norms_are_float32_where_the_machine_asks_for_tf32(tmp_path):
    """NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which rounds products to 10 bits: norms would err."""
    seen = tmp_path / "precision"
    train(flags(tmp_path / "run", max_step=1), 1, {0: [["tf32", {"file": str(seen)}]]})
    assert seen.read_text() == "highest"


def test_without_weights_a_run_says_so(tmp_path):
    (rank,) = train(flags(tmp_path / "run", init_checkpoint=None))
    assert "no --init_checkpoint: training starts from random weights" in rank.stdout


# ------------------------------------------------------------------ what is cut is said


def test_examples_that_are_cut_are_counted(tmp_path):
    draw, lengths = random.Random(5), [(3, 4), (10, 5), (12, 2), (11, 1), (20, 9), (2, 10), (2, 11)]
    lines = [json.dumps({"context": draw.choices(range(60), k=c), "completion": draw.choices(range(60), k=t)})
             for c, t in lengths]
    data = tmp_path / "long.jsonl"
    data.write_text("\n".join(lines) + "\n")
    (tmp_path / "v.jsonl").write_text("\n".join(lines[:1] + lines[2:4]) + "\n")
    (rank,) = train(flags(tmp_path / "run", train_data=data, valid_data=tmp_path / "v.jsonl", seq_len=12,
                          train_batch_size=7, noise_multiplier=1))
    # longer than 12: (10, 5), (12, 2), (20, 9), (2, 11); of these (12, 2) and (20, 9) have nothing left to score
    assert "4 training examples were longer than --seq_len 12 and were cut; 2 of them" in rank.stdout
    assert "1 validation examples were longer than --seq_len 12 and were cut; 1 of them" in rank.stdout
    assert read(tmp_path / "run")["N"] == 7
    assert all(math.isfinite(value.sum()) for value in weights(tmp_path / "run").values())


def test_flags_without_effect_say_so(tmp_path):
    (rank,) = train(flags(tmp_path / "run", eval_epoch=1, scheduler="dev_perf", max_step=1))
    for words in ("--eval_epoch has no effect", "--scheduler dev_perf: a constant learning rate"):
        assert words in rank.stdout


def test_parameters_that_overflow_end_the_run(tmp_path):
    """What is spent is said; no checkpoint is made of it."""
    ranks = start_ranks(flags(tmp_path / "run", lora_dim=0, lora_dropout=0, lr=1e38, weight_decay=1e8,
                              save_interval=100), 2)
    assert [rank.wait() for rank in ranks] == [2, 2] and not ranks[1].stderr
    assert "a parameter is NaN or infinite; epsilon " in ranks[0].error and "is spent" in ranks[0].error
    assert not list((tmp_path / "run").glob("model.*")) and len(ledger(tmp_path / "run")) >= 1
