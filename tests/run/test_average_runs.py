"""Runs with --average: beside the last iterate, which stays as it was; saved, evaluated, used, resumed."""

import functools
import os
import signal

import pytest
import torch

from helpers import author_runs
from helpers.interrupted_runs import CHARGE, interrupted, kill, reference
from helpers.small_runs import (
    STEPS,
    equal,
    flags,
    initial,
    material,
    metrics,
    read,
    server,
    start_ranks,
    train,
    weights,
)
from privacy.ledger import read_ledger
from run.card import collect
from weights.checkpoint import load_model

EMA, TAIL = "ema:0.7", "tail:0.5"
NONE = {"noise_multiplier": 0, "noise_source": None, "noise_seed": None}
SHAPES = {"LoRA": {}, "whole, bf16": {"lora_dim": 0, "bf16": True}, "no noise": NONE}


def average(work, step: int = STEPS) -> dict[str, torch.Tensor]:
    return torch.load(os.path.join(work, f"average.{step}.pt"), weights_only=True)["model_state_dict"]


def run(rule: str, size: int, shape: str = "LoRA"):
    """The folder of an uninterrupted run that saved every step."""
    return made(rule, size, shape)


@functools.cache
def made(rule: str, size: int, shape: str):
    work = material() / f"average {rule} {size} {shape}"
    train(flags(work, average=rule, save_interval=1, log_interval=1, eval_interval=3, **SHAPES[shape]), size)
    return work


# ------------------------------------------------------------------ what is saved


@pytest.mark.parametrize("rule, size, shape", [(EMA, 2, "LoRA"), (TAIL, 1, "LoRA"), (TAIL, 1, "whole, bf16"),
                                              (EMA, 1, "no noise")])
def test_a_file_holds_the_average_of_the_saved_iterates(rule, size, shape):
    """Against a sum in float64 over model.1.pt, model.2.pt ...; float32 rounds a step by at most 2^-22 of the largest
    coordinate (test_averages.py)."""
    work = run(rule, size, shape)
    first = 1 if rule == EMA else 4
    assert sorted(path.name for path in work.glob("average.*")) == [f"average.{t}.pt" for t in range(first, STEPS + 1)]
    for t in range(first, STEPS + 1):
        share = [(0.7 ** (t - i) if rule == EMA else 1.0) for i in range(first, t + 1)]
        iterates, found = [weights(work, i) for i in range(first, t + 1)], average(work, t)
        assert found.keys() == iterates[0].keys()
        for name, value in found.items():
            mean = sum(w * one[name].double() for w, one in zip(share, iterates, strict=True)) / sum(share)
            largest = max(one[name].abs().max() for one in iterates)
            assert value.dtype == torch.float32 and (value - mean).abs().max() <= 2.0**-21 * t * largest
    content, other = (torch.load(work / f"{name}.{STEPS}.pt", weights_only=True) for name in ("average", "model"))
    assert content["average"] == {"rule": rule, "first": first}
    assert {key: content[key] for key in other if key != "model_state_dict"} == {
        key: value for key, value in other.items() if key != "model_state_dict"}


def test_the_last_iterate_keeps_its_bits_and_a_folder_names_it():
    assert equal(weights(run(EMA, 2)), reference(2))
    loaded = load_model(str(run(TAIL, 1)))
    assert loaded.path.endswith(f"model.{STEPS}.pt")


def test_it_is_evaluated_beside_the_last_iterate(tmp_path):
    """Its losses are those of a run that starts from the file and learns nothing; the report has the last one."""
    work = run(TAIL, 1)
    lines = [line for line in metrics(work) if "valid_loss" in line]
    assert [line["step"] for line in lines] == [3, 6] and "average_valid_loss" not in lines[0]
    for name, place in (("valid_loss", work), ("average_valid_loss", work / f"average.{STEPS}.pt")):
        train(flags(tmp_path / name, init_checkpoint=place, model_card=None, lr=0, max_step=1, **NONE))
        (again,) = [line["valid_loss"] for line in metrics(tmp_path / name) if "valid_loss" in line]
        assert again == pytest.approx(lines[-1][name], rel=1e-6)
    assert lines[-1]["average_valid_loss"] != lines[-1]["valid_loss"]
    report = read(work)
    assert (report["average"], report["average_eval_loss"]) == (TAIL, lines[-1]["average_valid_loss"])
    assert report["eval_loss"] == lines[-1]["valid_loss"]
    path = str(work / "privacy_ledger.jsonl")
    rows = dict(collect(path, read_ledger(path), report).rows)
    assert rows["Average of iterates"].startswith(f"{TAIL}, in average.{{step}}.pt")


def test_it_is_used_by_the_name_of_its_file(tmp_path):
    """Exported with its adapters merged: base + B A of the file, in float64."""
    work = run(TAIL, 1)
    given = ["--init_checkpoint", work / f"average.{STEPS}.pt", "--output", tmp_path / "x"]
    done = server().start("src/export.py", given)
    assert done.wait() == 0, done.stderr
    from safetensors.torch import load_file

    merged, held = load_file(str(tmp_path / "x" / "model.safetensors")), average(work)
    A, B = (held[f"transformer.h.0.attn.c_attn.lora_{part}"].double() for part in "AB")
    weight = initial()["transformer.h.0.attn.c_attn.weight"].double()  # (16, 48): query, key and value side by side
    for slot, columns in ((0, slice(16)), (1, slice(32, 48))):  # query and value, alpha / rank = 4
        weight[:, columns] += 4 * (B[16 * slot: 16 * slot + 16] @ A[2 * slot: 2 * slot + 2]).T
    assert torch.allclose(merged["transformer.h.0.attn.c_attn.weight"].double(), weight, atol=1e-6)
    report = read(tmp_path / "x")
    assert report["steps_charged"] == STEPS and "Average of iterates" in (tmp_path / "x" / "README.md").read_text()


# ------------------------------------------------------------------ resumed


@pytest.mark.parametrize("rule, size, fault", [
    (EMA, 2, kill(CHARGE, "before", 4)), (TAIL, 1, kill(CHARGE, "before", 6)),
    (EMA, 1, kill("weights.average_file:save_average", "after", 2)),  # its model is not written any more
    (TAIL, 1, kill("optimizer:AdamW.step", "after", 4, signal.SIGTERM))])
def test_a_resumed_average_has_the_bits_of_the_uninterrupted_one(tmp_path, rule, size, fault):
    work = tmp_path / "run"
    interrupted(work, size, {0: [fault]}, average=rule)
    assert not (work / f"model.{STEPS}.pt").exists()
    train(flags(work, average=rule, resume=True, save_interval=6), size)  # at another interval
    assert equal(weights(work), reference(size)) and equal(average(work), average(run(rule, size)))
    steps = {path.name.split(".")[1] for path in work.glob("average.*")}
    assert steps <= {path.name.split(".")[1] for path in work.glob("model.*")}  # none of a model that was not written


def test_another_average_is_refused(tmp_path):
    work = tmp_path / "run"
    train(flags(work, average=EMA, max_step=4))
    for given, words in [
        ({"average": "ema:0.8"}, "average 'ema:0.7' there, 'ema:0.8' here"), ({}, "average 'ema:0.7' there, None here"),
        ({"average": "ema:0.8", "resume_changed": "average"}, "--resume_changed average: refused"),
    ]:
        rank, = start_ranks(flags(work, resume=True, max_step=4, **given))
        assert rank.wait() == 2 and words in rank.error, rank.error
    content = torch.load(work / "average.4.pt", weights_only=True)
    for entry in (None, {"rule": EMA, "first": 2}):  # damaged; or of a tail that other planned steps end
        torch.save({**content, "average": entry}, work / "average.4.pt")
        rank, = start_ranks(flags(work, average=EMA, resume=True, max_step=4))
        assert rank.wait() == 2 and f"average.4.pt: its entry 'average' is {entry}, this run wants" in rank.error
    (work / "average.4.pt").unlink()
    rank, = start_ranks(flags(work, average=EMA, resume=True, max_step=4))
    assert rank.wait() == 2 and "average.4.pt: is not there" in rank.error


def test_a_run_that_ends_before_its_tail_says_so(tmp_path):
    """Two of six steps, by --dry_run; resumed it is the run that was not stopped."""
    one, other = tmp_path / "one", tmp_path / "other"
    rank, = author_runs.train(author_runs.flags(one, average=TAIL, dry_run=True))
    assert "--average tail:0.5: would begin with step 4, and the run ends after step 2" in rank.stdout
    assert not list(one.glob("average.*")) and read(one)["average_eval_loss"] is None
    author_runs.train(author_runs.flags(one, average=TAIL, resume_from_checkpoint="true"))
    author_runs.train(author_runs.flags(other, average=TAIL))
    assert equal(average(one), average(other)) and metrics(other)[-1]["average_eval_loss"] == read(
        one)["average_eval_loss"]
