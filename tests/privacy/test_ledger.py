"""The ledger: what a record holds, what breaks the chain, what a resumed run must agree with, and what epsilon
follows."""

import hashlib
import json
import math
import os
import shutil
import signal
import time

import pytest
from scipy.stats import norm

from base import errors
from helpers.ledgers import SETTINGS, make, pld_epsilon
from helpers.small_runs import STEPS, flags, ledger, material, metrics, read, server, start_ranks, train, weights
from privacy import ledger as module
from privacy.ledger import Ledger, read_ledger
from privacy.plan import epsilons

# ------------------------------------------------------------------ records


def test_a_record_holds_what_epsilon_needs(tmp_path):
    path = make(tmp_path, sigma=0.7)
    make(tmp_path, steps=(3, 4), resume=True, sigma=0.7)
    lines = open(path).read().splitlines()
    previous = ""
    for line, (step, attempt) in zip(lines, [(1, 1), (2, 1), (3, 1), (3, 2), (4, 2)], strict=True):
        record = json.loads(line)
        chain = record.pop("checksum")
        assert record == {"format": 2, **SETTINGS, "sigma": 0.7, "step": step, "attempt": attempt}
        body = json.dumps(record, sort_keys=True)
        assert chain == hashlib.sha256(f"{previous}\n{body}".encode()).hexdigest()[:16]
        previous = chain


def test_a_record_is_on_disk_when_charge_returns(tmp_path, monkeypatch):
    """Written, then flushed to the device, then no more: nothing is left to be written later."""
    opened, seen = Ledger(str(tmp_path), SETTINGS, resume=False), []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (fsync(handle), seen.append(open(opened.path).read())))
    for step in (1, 2, 3):
        opened.charge(step)
        assert seen[-1] == open(opened.path).read() and seen[-1].count("\n") == step == len(seen)


# ------------------------------------------------------------------ torn and damaged


def test_torn_anywhere_in_the_last_line(tmp_path):
    """What is left of the last line counts as one step; a resumed run mends it, and the chain holds again."""
    path = make(tmp_path)
    whole = open(path, "rb").read()
    start = whole[:-1].rfind(b"\n") + 1
    for end in range(start, len(whole)):
        open(path, "wb").write(whole[:end])
        charged = 2 + (end > start)
        state = read_ledger(path)
        assert state.charged == charged and state.torn == (end > start)
        # what epsilon charges is what the mended ledger charges
        torn_epsilon = epsilons(state, 1e-5)
        make(tmp_path, steps=(), resume=True)
        assert epsilons(read_ledger(path), 1e-5) == torn_epsilon
        make(tmp_path, steps=(3,), resume=True)
        assert read_ledger(path).charged == charged + 1 and not read_ledger(path).torn


def test_a_torn_first_line_counts(tmp_path):
    path = make(tmp_path, steps=(1,))
    os.truncate(path, 50)
    assert read_ledger(path).charged == 1
    make(tmp_path, steps=(1,), resume=True)
    assert [record["step"] for record in ledger(tmp_path)] == [1, 1]


def test_a_torn_line_is_mended_with_the_settings_it_was_written_with(tmp_path):
    path = make(tmp_path, sigma=0.5)
    os.truncate(path, os.path.getsize(path) - 20)
    make(tmp_path, steps=(3,), resume=True, changed=("sigma",), sigma=5.0)
    assert [record["sigma"] for record in ledger(tmp_path)] == [0.5, 0.5, 0.5, 5.0]


def test_every_changed_byte_is_noticed(tmp_path):
    """Whichever byte of the whole lines is changed, reading refuses and names a line; only the last line feed makes a
    torn line."""
    path = make(tmp_path)
    whole = open(path, "rb").read()
    for place, byte in enumerate(whole):
        if byte == ord(" "):
            continue  # white space of JSON, no part of a value
        open(path, "wb").write(whole[:place] + bytes([byte ^ 1]) + whole[place + 1:])
        if place == len(whole) - 1:
            assert read_ledger(path).charged == 3
            continue
        with pytest.raises(errors.UserError, match=rf"{path}:[123]: (damaged|format 3 is newer)"):
            read_ledger(path)


@pytest.mark.parametrize("damage, line", [
    (lambda lines: lines[1:], 1), (lambda lines: lines[:1] + lines[2:], 2),
    (lambda lines: [lines[0], lines[2], lines[1]], 2),
    (lambda lines: lines[:2] + lines[1:], 3), (lambda lines: [lines[0], b"\n", *lines[1:]], 2),
    (lambda lines: [lines[0], b"\xff\xfe\n", lines[2]], 2), (lambda lines: [b"[]\n", *lines[1:]], 1),
    (lambda lines: [lines[0], b"\0" * 100 + b"\n", lines[2]], 2),
    (lambda lines: [lines[0], lines[1][:40] + lines[2]], 2),
    (lambda lines: [b"[" * 100000 + b"\n", *lines], 1), (lambda lines: [b'{"step": 1}\n', *lines], 1),
])
def test_damage_is_refused_with_its_line(tmp_path, damage, line):
    path = make(tmp_path)
    lines = open(path, "rb").read().splitlines(True)
    open(path, "wb").writelines(damage(lines))
    with pytest.raises(errors.UserError, match=f"{path}:{line}: damaged"):
        read_ledger(path)


@pytest.mark.parametrize("key, value", [
    ("sigma", math.nan), ("sigma", -1.0), ("sigma", math.inf), ("sigma", "0.8"), ("q", 0.0), ("q", 1.1),
    ("q", math.nan), ("N", 0),
    ("N", 40.0), ("step", 0), ("step", True), ("attempt", 0), ("sampling", "uniform"), ("steps_per_epoch", 0),
    ("mechanism", "laplace"), ("delta", 0.0),
    ("delta", 1.0), ("unit", None), ("noise_source", "dice"), ("clip", -1.0), ("world_size", 0), ("clip", math.nan),
])
def test_values_that_no_run_writes_are_refused(tmp_path, key, value):
    """Even under a right checksum."""
    record = {"format": 2, "step": 1, "attempt": 1, **SETTINGS, key: value}
    record["checksum"] = module.checksum("", record)
    path = tmp_path / "privacy_ledger.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(errors.UserError, match=f"{path}:1: damaged"):
        read_ledger(str(path))


# ------------------------------------------------------------------ what a resumed run must agree with


@pytest.mark.parametrize("key, other", [
    ("N", 41), ("q", 0.1), ("sigma", 0.9), ("clip", 2.0), ("sampling", "shuffle"), ("delta", 1e-6),
    ("world_size", 2), ("steps_per_epoch", 6), ("noise_source", "os"),
])
def test_settings_that_differ_are_named(tmp_path, key, other):
    path = make(tmp_path)
    before = open(path).read()
    with pytest.raises(errors.UserError,
                       match=f"--resume: .*{key} {SETTINGS[key]} there, {other} here.*--resume_changed {key}"):
        make(tmp_path, resume=True, **{key: other})
    assert open(path).read() == before
    make(tmp_path, steps=(4,), resume=True, changed=(key,), **{key: other})
    assert ledger(tmp_path)[-1][key] == other and read_ledger(path).charged == 4


def test_a_ledger_counts_for_one_unit_whatever_is_said(tmp_path):
    """An epsilon of an example is none of an author: no --resume_changed makes one of both."""
    before = open(make(tmp_path)).read()
    for changed in ((), ("unit",)):
        with pytest.raises(errors.UserError, match="counts for one example, this run for one author: .*new folder"):
            make(tmp_path, resume=True, changed=changed, unit="author")
    assert open(tmp_path / "privacy_ledger.jsonl").read() == before


def test_missing_and_unexpected_ledgers(tmp_path):
    with pytest.raises(errors.UserError,
                       match="--resume: .*privacy_ledger.jsonl is missing: nobody knows what the run has spent"):
        make(tmp_path, resume=True)
    assert not os.listdir(tmp_path)
    make(tmp_path)
    with pytest.raises(errors.UserError, match="--work_dir .* holds privacy_ledger.jsonl of an earlier run"):
        make(tmp_path)
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", steps=())  # a run that ended before its first step
    make(tmp_path / "empty")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps' checkpoint out of STEPS, stopped by SIGTERM."""
    work = tmp_path_factory.mktemp("finished") / "run"
    stop = ["signal", {"point": "privacy.sampling:PoissonSampler.draw", "when": "after", "nth": 2, "number": 15}]
    (rank,) = start_ranks(flags(work), 1, {0: [stop]})
    assert rank.wait() == 128 + 15
    return work


@pytest.fixture
def stopped(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize("changed, words", [
    ({"noise_multiplier": 0.9}, ["sigma 0.8 there, 0.9 here", "--resume_changed sigma"]),
    ({"max_grad_norm": 0.5}, ["clip 1.0 there, 0.5 here"]),
    ({"train_batch_size": 4}, ["q 0.2 there, 0.1 here"]),
    ({"sampling": "shuffle"}, ["sampling poisson there, shuffle here"]),
    ({"target_delta": 1e-6}, ["delta 1e-05 there, 1e-06 here"]),
    ({"lr": 0.1}, ["lr 0.01 there, 0.1 here", "--resume_changed lr"]),
    ({"max_step": 9}, ["max_step 6 there, 9 here", "steps 6 there, 9 here"]),
    ({"random_seed": 3}, ["random_seed 10 there, 3 here"]),
    ({"lora_dim": 3}, ["lora_dim 2 there, 3 here"]),
    ({"clipping": "automatic"}, ["clipping 'flat' there, 'automatic' here"]),
    ({"noise_source": "os", "noise_seed": None}, ["noise_source seeded there, os here"]),
    ({"obj": "jlm"}, ["obj 'clm' there, 'jlm' here"]),
    ({"lr": 0.1, "resume_changed": ["weight_decay"]}, ["lr 0.01 there"]),
    ({"resume_changed": ["learning_rate"]}, ["--resume_changed learning_rate"]),
])
def test_a_run_with_other_settings_is_not_continued(stopped, changed, words):
    (rank,) = start_ranks(flags(stopped, resume=True, **changed))
    assert rank.wait() == 2
    for word in words:
        assert word in rank.error
    assert len(ledger(stopped)) == 2 and not (stopped / "model.4.pt").exists()


def test_other_data_are_named(stopped, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text((material() / "train.jsonl").read_text().replace("[", "[1, ", 1))
    (rank,) = start_ranks(flags(stopped, resume=True, train_data=data))
    assert rank.wait() == 2 and "train_sha256" in rank.error and len(ledger(stopped)) == 2
    data.write_bytes((material() / "train.jsonl").read_bytes())  # the same bytes in another place
    train(flags(stopped, resume=True, train_data=data))


def test_settings_that_may_change_and_settings_that_are_said_to(stopped):
    train(flags(stopped, resume=True, log_interval=1, save_interval=3, micro_batch_tokens=64, lr=0.02, weight_decay=0.1,
                resume_changed=["lr", "weight_decay"]))
    assert read(stopped, "args.json")["lr"] == 0.02
    # ... and that is what the next resumed run is compared with
    (rank,) = start_ranks(flags(stopped, resume=True))
    assert rank.wait() == 2 and "lr 0.02 there, 0.01 here" in rank.error


def test_a_run_that_is_resumed_at_its_end_logs_no_step(stopped):
    train(flags(stopped, resume=True, log_interval=4))
    logged = [record for record in metrics(stopped) if "loss" in record]
    assert logged[-1]["step"] == 6 and logged[-1]["loss"] is not None
    train(flags(stopped, resume=True, log_interval=4))
    assert [record for record in metrics(stopped) if "loss" in record] == logged and len(ledger(stopped)) == 6


def test_what_an_earlier_attempt_did_is_not_forgotten(stopped):
    """Seeded noise stays known to whoever knows the seed, shuffled steps keep their relation, whatever comes after."""
    train([*flags(stopped, resume=True, sampling="shuffle", noise_source="os", noise_seed=None), "--resume_changed",
           "noise_source", "noise_seed", "sampling"])
    report = read(stopped)
    assert report["noise_source"] == "os and seeded" and "can subtract it" in report["warning"]
    assert report["relation"] == ("add or remove one example and add or remove one example, its place in the order "
                                  "left empty (zero-out)")
    printed = server().start("src/privacy_report.py", [stopped])
    assert printed.wait() == 0 and "noise source  os and seeded" in printed.stdout
    assert "can subtract it" in printed.stdout and "agrees with the ledger" in printed.stdout


def test_more_ranks_when_it_is_said(stopped):
    more = flags(stopped, resume=True, train_batch_size=4)
    ranks = start_ranks(more, 2)
    assert [rank.wait() for rank in ranks] == [2, 2] and "world_size 1 there, 2 here" in ranks[0].error
    train([*more, "--resume_changed", "world_size", "train_batch_size"], 2)
    assert [record["world_size"] for record in ledger(stopped)] == [1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("spoil, words", [
    (lambda work: os.unlink(work / "privacy_ledger.jsonl"), "privacy_ledger.jsonl is missing"),
    (lambda work: os.truncate(work / "privacy_ledger.jsonl", 0), "records 0 steps, the checkpoint has 2 behind it"),
    (lambda work: os.truncate(work / "privacy_ledger.jsonl", len(json.dumps(ledger(work)[0])) + 1),
     "records 1 steps, the checkpoint has 2 behind it"),
    (lambda work: (work / "privacy.json").write_text(json.dumps({**read(work), "steps_charged": 5})),
     "records 2 steps, privacy.json reports 5"),
    (lambda work: os.unlink(work / "args.json"), "args.json"),
    (lambda work: (work / "args.json").write_text("[1]"), "args.json: holds a list; wanted what the run wrote"),
    (lambda work: (work / "args.json").write_text('{"lr": 0.01'), "args.json: not JSON"),
    (lambda work: os.truncate(work / "model.2.pt", 700), "model.2.pt"),
    (lambda work: os.truncate(work / "optimizer.2.pt", 700), "optimizer.2.pt"),
])
def test_folders_that_lost_something(stopped, spoil, words):
    spoil(stopped)
    (rank,) = start_ranks(flags(stopped, resume=True))
    assert rank.wait() == 2 and words in rank.error


def test_a_new_run_does_not_start_among_an_old_one_s_files(stopped):
    for _ in ("with its ledger", "without"):
        (rank,) = start_ranks(flags(stopped))
        assert rank.wait() == 2 and "of an earlier run" in rank.error
        (stopped / "privacy_ledger.jsonl").unlink(missing_ok=True)


def test_two_runs_in_one_folder(tmp_path):
    """The second is refused while the first lives, and may continue once it is dead."""
    work = tmp_path / "run"
    (first,) = start_ranks(flags(work), 1, {0: [["sleep", {"point": "optimizer:AdamW.step", "seconds": 30, "nth": 4}]]})
    deadline = time.monotonic() + 20
    while not (work / "model.2.pt").exists() or len(ledger(work)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    before = len(ledger(work))
    for resume in (None, True):
        (second,) = start_ranks(flags(work, resume=resume))
        assert second.wait() == 2 and "another run is writing there (process " in second.error
        assert str(first.pid) in second.error and len(ledger(work)) == before
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    train(flags(work, resume=True))
    assert len(weights(work)) and read(work)["steps_charged"] == before + STEPS - 2


# ------------------------------------------------------------------ what epsilon follows


def test_epsilon_from_the_raw_records(tmp_path):
    """PRV between an independent accountant's value and 0.011 above it, for a run whose sigma and q changed and a torn
    line."""
    path = make(tmp_path)
    make(tmp_path, steps=(4, 5, 6), resume=True, changed=("sigma", "q"), sigma=1.3, q=0.1)
    records = ledger(tmp_path)
    for delta in (1e-5, 1 / 400):
        truth, (prv, rdp) = pld_epsilon(records, delta), epsilons(read_ledger(path), delta)
        assert 0.999 * truth < prv < truth + 0.011 and prv < rdp
    os.truncate(path, os.path.getsize(path) - 30)
    torn = read_ledger(path)
    truth = pld_epsilon([*torn.records, torn.records[-1]], 1e-5)
    assert 0.999 * truth < epsilons(torn, 1e-5)[0] < truth + 0.011
    # Negative control: leaving the torn line out is seen.
    assert pld_epsilon(torn.records, 1e-5) + 0.011 < epsilons(torn, 1e-5)[0]


def test_epsilon_of_a_whole_run(tmp_path):
    """privacy.json and metrics.jsonl say what the records give, redone steps included."""
    work = tmp_path / "run"
    kill = ["signal", {"point": "privacy.sampling:PoissonSampler.draw", "when": "after", "nth": 4}]
    start_ranks(flags(work), 1, {0: [kill]})[0].wait()
    train(flags(work, resume=True))
    records, report = ledger(work), read(work)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert report["steps_charged"] == 8 and report["attempts"] == 2
    assert report["delta"] == 1e-5 and report["delta_strict"] == 1 / 400
    for epsilon, delta in (("epsilon_prv", 1e-5), ("epsilon_prv_strict", 1 / 400)):
        truth = pld_epsilon(records, delta)
        assert 0.999 * truth < report[epsilon] < truth + 0.011
    by_step = {record["step"]: record["epsilon"] for record in metrics(work) if "epsilon" in record}
    assert by_step[6] == report["epsilon_prv"] and by_step[2] < by_step[4] < by_step[6]
    truth = pld_epsilon(records[:6], 1e-5)  # at the second attempt's step 4, six steps were charged
    assert 0.999 * truth < by_step[4] < truth + 0.011


def test_epsilon_of_shuffling(tmp_path):
    """Each attempt's part of each epoch is a participation: mu = sqrt(E)/sigma, nothing amplified."""
    path = make(tmp_path, steps=range(1, 8), sampling="shuffle", sigma=2.0)  # epochs 1 and part of 2
    make(tmp_path, steps=range(7, 11), resume=True, sampling="shuffle", sigma=2.0)  # the rest of 2, shuffled afresh
    for delta in (1e-5, 1e-3):
        mu = math.sqrt(3) / 2.0
        prv, _ = epsilons(read_ledger(path), delta)

        def delta_of(epsilon: float) -> float:
            return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)

        assert delta_of(prv) <= delta * (1 + 1e-9) and delta_of(prv - 1e-6) > delta * (1 - 1e-9)
        os.truncate(path, os.path.getsize(path) - 3) if delta == 1e-5 else None
        make(tmp_path, steps=(), resume=True, sampling="shuffle", sigma=2.0)


def test_the_test_server_carries_nothing_over(tmp_path):
    """Two runs of one seed agree byte for byte although one of them was forked later."""
    train(flags(tmp_path / "a"))
    train(flags(tmp_path / "b"))
    assert (tmp_path / "a/model.6.pt").read_bytes() == (tmp_path / "b/model.6.pt").read_bytes()
