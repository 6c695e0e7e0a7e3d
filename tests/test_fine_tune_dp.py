"""Whole runs of fine-tune-dp.py: what they leave, what must not change a result, what Hugging Face's flags mean."""

import json
import math
import types

import numpy as np
import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant

from base.distributed import World
from helpers.author_runs import AUTHORS, HELD_OUT, STEPS, flags, material, script, start, train, write_corpus
from helpers.small_runs import equal, ledger, metrics, read, server, weights
from optimizer import hugging_face_schedule
from run import setup

RUN_TIME_FLAGS = "--log_level info --prediction_loss_only --remove_unused_columns False --label_names labels " \
    "--dataloader_num_workers 2 --eval_accumulation_steps 1 --per_device_eval_batch_size 64 --disable_tqdm True"


# ------------------------------------------------------------------ what a run leaves


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    work = tmp_path_factory.mktemp("authors") / "run"
    (rank,) = train(flags(work, noise_multiplier=None, target_epsilon=8, samples_per_author=3, eval_strategy="steps",
                          eval_steps=3) + RUN_TIME_FLAGS.split())
    return work, rank


def test_the_report(run):
    work, _ = run
    report, N = read(work), AUTHORS - HELD_OUT
    assert {key: report[key] for key in ("unit", "relation", "N", "q", "clip", "steps_charged", "delta", "delta_strict",
                                         "sampling")} == {
        "unit": "author", "relation": "add or remove one author", "N": N, "q": 8 / N, "clip": 1.0,
        "steps_charged": STEPS, "delta": 1 / N, "delta_strict": 1 / (10 * N), "sampling": "poisson"}
    assert 0.99 * 8 <= report["epsilon_prv"] <= 8 and report["epsilon_prv"] < report["epsilon_prv_strict"]
    assert report["final_epsilon_prv"] == report["epsilon_prv"] and report["final_epsilon_rdp"] == report["epsilon_rdp"]
    held_out = report["held_out"]
    assert (held_out["authors"], held_out["by"], held_out["seed"]) == (HELD_OUT, "author", 42)
    assert any("of texts never used" in item for item in report["disclosed"])
    # an independent accountant over the raw records of the ledger
    accountant = pld_privacy_accountant.PLDAccountant(value_discretization_interval=1e-3)  # adds less than 6e-3
    for record in ledger(work):
        accountant.compose(dp_event.PoissonSampledDpEvent(record["q"], dp_event.GaussianDpEvent(record["sigma"])))
    assert accountant.get_epsilon(1 / N) <= report["epsilon_prv"] * 1.001
    assert accountant.get_epsilon(1 / N) > 0.97 * report["epsilon_prv"]


def test_the_metrics(run):
    work, _ = run
    records = metrics(work)
    logged = [record for record in records if "loss" in record]
    assert [record["step"] for record in logged] == [2, 4, 6]
    for record in logged:
        assert {"lr", "epsilon", "epsilon_rdp", "texts_per_s", "authors_per_s", "tokens_per_s"} <= set(record)
    assert any(record["texts_per_s"] > record["authors_per_s"] for record in logged)  # K = 3
    assert [record["step"] for record in records if "valid_loss" in record] == [3, 6]
    last, report = records[-1], read(work)
    for key in ("train_loss", "eval_loss", "final_epsilon_prv", "final_epsilon_rdp", "train_runtime"):
        assert last[key] == report[key]
    assert last["eval_loss"] == [record["valid_loss"] for record in records if "valid_loss" in record][-1]


def test_the_row_of_the_table(run):
    work, rank = run
    report = read(work)
    head, _, row = rank.stdout.splitlines()[-3:]
    assert head == ("| Model (HF) | Fine-tuning Method | DP | GPUs | Epochs | Train Loss | Eval Loss | epsilon | "
                    "Run Time [s] |")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["tiny", "LoRA", "Yes", "1xCPU"] and len(cells) == 9
    assert cells[4] == f"{STEPS * 8 / (AUTHORS - HELD_OUT):.3g}"
    assert cells[5:] == [f"{report['train_loss']:.2f}", f"{report['eval_loss']:.2f}", f"{report['epsilon_prv']:.2f}",
                         f"{report['train_runtime']:.0f}"]


def test_what_authors_contributed(run):
    """Against counts over the file; and the number of unused texts against its expectation."""
    work, _ = run
    found, held = read(work)["contributions"], read(work)["held_out"]
    texts = [json.loads(line)["author"] for line in (material() / "train.jsonl").read_text().splitlines()]
    assert found["texts"] + held["texts"] == len(texts) and found["samples_per_author"] == 3
    sizes = np.unique(texts, return_counts=True)[1]
    assert found["texts_per_author"]["min"] >= sizes.min() and found["texts_per_author"]["max"] <= sizes.max()
    assert 0 < found["texts_never_used"] < found["texts"]
    expected = found["texts_never_used_expected"]
    assert abs(found["texts_never_used"] - expected) < 5 * math.sqrt(3 * expected)  # texts come three at a time


def test_flags_without_effect_are_said(run):
    _, rank = run
    (line,) = [line for line in rank.stdout.splitlines() if line.startswith("accepted, without effect:")]
    assert set(line.split(":")[1].split()) == {"--prediction_loss_only", "--remove_unused_columns", "--label_names",
                                               "--dataloader_num_workers", "--eval_accumulation_steps",
                                               "--per_device_eval_batch_size"}
    help_text = server().start("src/fine-tune-dp.py", ["--help"])
    assert help_text.wait() == 0
    section = help_text.stdout.split("accepted, without effect:")[1].split("privacy and execution:")[0]
    for name in ("remove_unused_columns", "label_names", "prediction_loss_only", "eval_accumulation_steps"):
        assert f"--{name}" in section


def test_warnings_and_results_alone(tmp_path):
    (rank,) = train(flags(tmp_path / "run", log_level="warning"))
    lines = rank.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["WARNING:", "epsilon", "|", "|", "|"]


def test_without_privacy(tmp_path):
    """--disable_dp wins over --target_epsilon, as in the published code, and says so."""
    (rank,) = train(flags(tmp_path / "run", disable_dp=True, noise_multiplier=None, target_epsilon=8, noise_source=None,
                          noise_seed=None, eval_fraction=0, per_device_train_batch_size=AUTHORS))
    report = read(tmp_path / "run")
    assert report["epsilon_prv"] == report["final_epsilon_prv"] == "inf" and report["sigma"] == 0
    assert "--disable_dp: --target_epsilon 8 has no effect" in rank.stdout and "epsilon = inf" in rank.stdout
    assert "| tiny | LoRA | No | 1xCPU |" in rank.stdout
    assert "| - | inf |" in rank.stdout  # eval_fraction 0: no evaluation
    assert report["held_out"]["authors"] == 0 and report["N"] == AUTHORS
    # every author is in every step, with one text drawn afresh: of the same one each time, all others would be left
    sizes = np.unique([json.loads(line)["author"] for line in open(material() / "train.jsonl")], return_counts=True)[1]
    expected = (sizes * (1 - 1 / sizes) ** STEPS).sum()
    found = report["contributions"]["texts_never_used"]
    assert abs(found - expected) < 5 * expected**0.5 < sizes.sum() - AUTHORS - expected


# ------------------------------------------------------------------ what must not change a result


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    work = tmp_path_factory.mktemp("authors") / "whole"
    train(flags(work, samples_per_author=2))
    return work


def test_worker_processes_and_micro_batches_change_nothing(tmp_path, uninterrupted):
    """Seeded: bit for bit with worker processes; to rounding, which the noise hides, with another cut."""
    train(flags(tmp_path / "a", samples_per_author=2, dataloader_num_workers=3))
    assert equal(weights(tmp_path / "a"), weights(uninterrupted))
    train(flags(tmp_path / "b", samples_per_author=2, lora_dropout=0.0, micro_batch_tokens=30))
    train(flags(tmp_path / "c", samples_per_author=2, lora_dropout=0.0, micro_batch_tokens=3000))
    left, right = weights(tmp_path / "b"), weights(tmp_path / "c")
    assert all(torch.allclose(left[name], right[name], atol=2e-5) for name in left)


@pytest.mark.parametrize("asked", ["true", "folder", "file", "--resume"])
def test_a_dry_run_that_is_continued_is_the_uninterrupted_run(tmp_path, uninterrupted, asked):
    """Two steps, everything logged, with the noise of the whole run; then the rest: the same bits and mean loss."""
    work = tmp_path / "run"
    (rank,) = train(flags(work, samples_per_author=2, dry_run=True))
    assert [record["step"] for record in metrics(work)] == [1, 1, 2, 2, 2] and read(work)["steps_charged"] == 2
    value = {"true": ["--resume_from_checkpoint"], "folder": ["--resume_from_checkpoint", work],
             "file": ["--resume_from_checkpoint", work / "model.2.pt"], "--resume": ["--resume"]}[asked]
    (rank,) = train(flags(work, samples_per_author=2) + value)
    assert "resumed after step 2" in rank.stdout
    assert equal(weights(work), weights(uninterrupted))
    ours, theirs = read(work), read(uninterrupted)
    assert ours["steps_charged"] == STEPS and ours["epsilon_prv"] == theirs["epsilon_prv"]
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-12)
    assert ours["eval_loss"] == theirs["eval_loss"]
    # which texts were used before is the sampling's secret: on no disk, so unknown now
    assert ours["contributions"]["texts_never_used"] is None and theirs["contributions"]["texts_never_used"] > 0
    assert ours["contributions"]["texts_never_used_expected"] == theirs["contributions"]["texts_never_used_expected"]


def test_a_killed_run_draws_the_same_authors_and_texts_again(tmp_path, uninterrupted):
    work = tmp_path / "run"
    (rank,) = start(flags(work, samples_per_author=2),
                    faults={0: [["signal", {"point": "privacy.plan:PrivacyPlan.release", "when": "before", "nth": 4}]]})
    assert rank.wait() == -9
    without_effect = dict(dataloader_num_workers=3, per_device_eval_batch_size=2, prediction_loss_only=True)
    train(flags(work, samples_per_author=2, resume=True, **without_effect))  # a resumed run may differ in these
    assert equal(weights(work), weights(uninterrupted)) and read(work)["steps_charged"] == STEPS + 2  # 3 and 4 twice


def test_a_resumed_run_must_have_the_same_data(tmp_path):
    work, data = tmp_path / "run", write_corpus(tmp_path / "data.jsonl", AUTHORS)
    train(flags(work, train_file=data, dry_run=True))
    moved = data.rename(tmp_path / "moved.jsonl")
    with open(moved, "a") as handle:
        handle.write('{"author": "author 1", "content": "one more text"}\n')
    (rank,) = start(flags(work, train_file=moved, resume=True))
    assert rank.wait() == 2 and "train_sha256" in rank.error
    moved.write_text("".join(moved.read_text().splitlines(True)[:-1]))
    train(flags(work, train_file=moved, resume=True))  # the same bytes elsewhere are the same data


def test_the_evaluation_is_the_same_on_any_number_of_ranks(tmp_path):
    """Learning rate 0; with three texts of --eval_file, four ranks leave one without any."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join((material() / "eval.jsonl").read_text().splitlines(True)[:3]))
    losses = []
    for size in (1, 2, 4):
        work = tmp_path / f"run{size}"
        ranks = train(flags(work, learning_rate=0.0, eval_fraction=None, eval_file=few, max_steps=1,
                            per_device_train_batch_size=8 // size), size)
        assert all(rank.stdout == "" for rank in ranks[1:]) and f"| {size}xCPU |" in ranks[0].stdout
        losses.append(read(work)["eval_loss"])
        assert read(work)["held_out"]["texts"] == 3 and read(work)["N"] == AUTHORS
    assert max(losses) - min(losses) < 1e-6 * losses[0]


def test_validation_data_that_is_training_data_is_said_on_the_terminal_alone(tmp_path):
    """Authors of both files, by name; texts of both, also where held-out authors are of the training file. The counts
    are private: reports with and without them say the same."""
    def run(name: str, **changed: object) -> tuple[list[str], list[str]]:
        (rank,) = train(flags(tmp_path / name, max_steps=1, **changed))
        found = [line.split(", too")[0] for line in rank.stdout.splitlines() if "are training" in line]
        return found, read(tmp_path / name)["disclosed"]

    lines = (material() / "train.jsonl").read_text().splitlines()
    texts = [json.loads(line)["content"] for line in lines]
    strangers, mixed, copies = (tmp_path / f"{name}.jsonl" for name in ("strangers", "mixed", "copies"))
    others = [{"author": f"stranger {n}", "content": f"{n} other words"} for n in range(3)]
    strangers.write_text("".join(json.dumps(line) + "\n" for line in others))
    mixed.write_text(strangers.read_text() + json.dumps({"author": "stranger 1", "content": texts[5]}) + "\n"
                     + json.dumps({"author": "author 7", "content": "not written before"}) + "\n")
    none, disclosed = run("none", eval_fraction=None, eval_file=strangers)
    assert none == []
    assert run("mixed", eval_fraction=None, eval_file=mixed) == (
        ["WARNING: 1 of the 4 validation authors are training authors",
         "WARNING: 1 of the 5 validation texts are training texts"], disclosed)
    same = [json.dumps({"author": f"author {n}", "content": "we all say so"}) for n in range(AUTHORS)]
    copies.write_text("".join(line + "\n" for line in [*lines, *same]))
    found = run("copies", train_file=copies)
    total = read(tmp_path / "copies")["held_out"]["texts"]
    assert found == ([f"WARNING: {HELD_OUT} of the {total} validation texts are training texts"], disclosed)
    assert run("by_author") == ([], disclosed)
    assert read(tmp_path / "mixed")["held_out"].keys() == {"by", "file_sha256", "authors", "texts"}


def test_ranks_share_the_authors_and_agree(tmp_path):
    """Full fine-tuning on two ranks; the ledger's batch is of the whole job, and the ranks end with the same bits."""
    dumps = [tmp_path / "rank0", tmp_path / "rank1"]
    arguments = flags(tmp_path / "run", enable_lora=None, lora_dim=None, per_device_train_batch_size=4, save_steps=100)
    ranks = start(arguments, 2, {rank: [["dump", {"file": str(dumps[rank])}]] for rank in range(2)})
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert dumps[0].read_bytes() == dumps[1].read_bytes()
    records = ledger(tmp_path / "run")
    assert [record["q"] for record in records] == [8 / (AUTHORS - HELD_OUT)] * STEPS and records[0]["unit"] == "author"
    assert "transformer.wte.weight" in weights(tmp_path / "run") and "| Full | Yes | 2xCPU |" in ranks[0].stdout


def test_a_rank_that_draws_nobody_keeps_step(tmp_path):
    """Two expected authors on two ranks: the seeded masks, drawn again here, are empty on one, the other, both."""
    from base.distributed import World
    from privacy.randomness import NoiseSource
    from privacy.sampling import PoissonSampler
    N, steps, size = AUTHORS - HELD_OUT, 12, 2
    samplers = [PoissonSampler(N, size, World(rank, size), NoiseSource("seeded", "mask", rank, 1))
                for rank in range(size)]
    sizes = [[len(sampler.draw(step)) for sampler in samplers] for step in range(1, steps + 1)]
    assert {(a > 0, b > 0) for a, b in sizes} == {(True, True), (True, False), (False, True), (False, False)}
    train(flags(tmp_path / "run", per_device_train_batch_size=1, max_steps=steps, logging_steps=1), size)
    assert len(ledger(tmp_path / "run")) == read(tmp_path / "run")["steps_charged"] == steps
    losses = [record["loss"] for record in metrics(tmp_path / "run") if "loss" in record]
    assert [loss is None for loss in losses] == [sum(drawn) == 0 for drawn in sizes]


def test_steps_without_noise_are_not_forgotten(tmp_path):
    """--disable_dp, resumed with noise: infinite to the end, in the table too; with a target: refused."""
    work = tmp_path / "run"
    changed = "--resume_changed sigma noise_multiplier disable_dp sampling max_steps steps target_epsilon".split()
    train(flags(work, disable_dp=True, noise_multiplier=None, max_steps=2))
    (rank,) = start([*flags(work, noise_multiplier=None, target_epsilon=8, resume=True), *changed])
    assert rank.wait() == 2 and "--target_epsilon 8: " in rank.error and "2 steps without noise" in rank.error
    (rank,) = train([*flags(work, resume=True), *changed])
    assert "WARNING: 2 of the steps charged so far had no noise" in rank.stdout and not rank.stderr
    assert "epsilon inf (PRV upper bound), inf (RDP)" in rank.stdout and "| Yes | 1xCPU |" in rank.stdout
    assert rank.stdout.splitlines()[-1].split("|")[-3].strip() == "inf"
    assert read(work)["epsilon_prv"] == read(work)["final_epsilon_prv"] == "inf"


# ------------------------------------------------------------------ Hugging Face's meaning


def test_defaults_are_hugging_faces():
    from transformers import TrainingArguments
    ours, theirs = script().parse(["--output_dir", "x"]).given.values, TrainingArguments("x", use_cpu=True)
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay",
                 "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "num_train_epochs", "max_steps",
                 "warmup_steps", "logging_steps", "save_steps", "seed", "bf16", "log_level"):
        assert ours[name] == getattr(theirs, name), name
    assert ours["lr_scheduler_type"] == theirs.lr_scheduler_type.value
    assert ours["eval_strategy"] == theirs.eval_strategy.value
    given = script().parse("--output_dir x --evaluation_strategy steps --bf16 True --disable_tqdm false".split()).given
    assert [given.values[name] for name in ("eval_strategy", "bf16", "disable_tqdm")] == ["steps", True, False]


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_are_hugging_faces(name, warmup):
    from transformers import get_scheduler
    warmup = warmup if name != "constant" else 0
    ours = hugging_face_schedule(name, 0.3, 50, warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=50)
    for t in range(50):
        assert ours(t) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-12), t
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_adamw_is_torchs(eps):
    """Gradients of the size of the published run's noise (0.6 / 1024), decay on matrices alone. Ours decays after the
    update and torch before it: lr x decay = 1e-5 of an update apart."""
    from optimizer import AdamW, FlatParameters
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(20, 30), torch.nn.Linear(20, 30)
    theirs.load_state_dict(ours.state_dict())
    start_weights = ours.weight.detach().clone()
    flat = FlatParameters(ours, no_decay_bias=True)
    mine = AdamW(flat, (0.9, 0.999), eps, 0.01, correct_bias=True, torch_eps=True)
    groups = [{"params": [theirs.weight], "weight_decay": 0.01}, {"params": [theirs.bias], "weight_decay": 0.0}]
    torchs = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=eps)
    for _ in range(50):
        theirs.weight.grad, theirs.bias.grad = torch.randn(30, 20) * 6e-4, torch.randn(30) * 6e-4
        by_name = {"weight": theirs.weight.grad, "bias": theirs.bias.grad}
        mine.step(torch.cat([by_name[name].flatten() for name, _ in flat.named]), 1e-3)
        torchs.step()
    moved = (theirs.weight - start_weights).norm()
    assert (ours.weight - theirs.weight).norm() < 3e-5 * moved
    assert torch.allclose(ours.bias, theirs.bias, rtol=0, atol=2e-7)  # rounding of values up to 0.25 over 50 steps


def test_steps_follow_epochs_and_authors(tmp_path):
    """round(num_train_epochs / q), q = batch / training authors."""
    settings = script().translated(script().parse(flags(tmp_path, num_train_epochs=7, max_steps=-1)))
    texts = types.SimpleNamespace(train=range(38), valid=None, unit="author", digests={})
    task = script().make_task(settings, texts, World())
    assert task.steps == round(7 / (8 / 38)) and task.delta == 1 / 38 and setup.logical_batch(settings, World()) == 8
    settings = script().parse(flags(tmp_path, gradient_accumulation_steps=2))
    assert setup.logical_batch(settings, World(0, 3)) == 48
