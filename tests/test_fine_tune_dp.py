"""Whole runs of fine-tune-dp.py on a tiny model and generated authors: what they leave, what must not change a result, the
published commands, and what is refused; and the scripts that make its data."""

import atexit
import functools
import importlib.util
import json
import math
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_user_error, run_script
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant
from small_runs import environment, equal, free_port, ledger, metrics, read, server, weights, write_model

AUTHORS, HELD_OUT, STEPS = 40, 2, 6
VOCAB = ROOT / "vocab" / "demo"
RUN_TIME_FLAGS = "--log_level info --prediction_loss_only --remove_unused_columns False --label_names labels " \
    "--dataloader_num_workers 2 --eval_accumulation_steps 1 --per_device_eval_batch_size 64 --disable_tqdm True"


def write_corpus(path: pathlib.Path, authors: int, seed: int = 1, most: int = 6) -> pathlib.Path:
    draw = random.Random(seed)
    words = "the place serves cheap food near a river and it is rated high by families who like tea".split()
    lines = [{"author": f"author {n}", "content": " ".join(draw.choices(words, k=draw.randint(3, 30)))}
             for n in range(authors) for _ in range(draw.randint(1, most))]
    draw.shuffle(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@functools.cache
def material() -> pathlib.Path:
    """A folder with tiny/ (the model), train.jsonl (AUTHORS authors) and eval.jsonl, made once a session."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="author_runs."))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_model(folder / "tiny", vocabulary=1500, positions=48)
    write_corpus(folder / "train.jsonl", AUTHORS)
    write_corpus(folder / "eval.jsonl", 5, seed=2)
    return folder


def flags(work: os.PathLike, **changed: object) -> list[str]:
    """The flags of a small reproducible run into `work`; changed: name=value, True for a switch, None to leave one out."""
    folder = material()
    values = {
        "output_dir": work, "model_name": folder / "tiny", "vocab": VOCAB, "train_file": folder / "train.jsonl",
        "eval_fraction": HELD_OUT / AUTHORS, "sequence_len": 24, "per_device_train_batch_size": 8, "noise_multiplier": 0.8,
        "noise_source": "seeded", "noise_seed": 1, "max_steps": STEPS, "learning_rate": 0.01, "logging_steps": 2, "save_steps": 2,
        "enable_lora": True, "lora_dim": 2, "lora_dropout": 0.1, **changed}
    found: list[str] = []
    for name, value in values.items():
        if value is not None:
            found += [f"--{name}"] if value is True else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return found


def start(arguments: list, size: int = 1, faults: list | None = None, **options) -> list:
    port = free_port()
    return [server().start("src/fine-tune-dp.py", arguments, faults=faults, env={} if size == 1 else {
        "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}, **options)
        for rank in range(size)]


def train(arguments: list, size: int = 1, **options) -> list:
    ranks = start(arguments, size, **options)
    statuses = [rank.wait() for rank in ranks]
    assert statuses == [0] * size, "\n".join(rank.stdout[-2000:] + rank.stderr for rank in ranks)
    return ranks


@functools.cache
def script():
    """src/fine-tune-dp.py as a module."""
    spec = importlib.util.spec_from_file_location("fine_tune_dp", ROOT / "src" / "fine-tune-dp.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------ what a run leaves


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    work = tmp_path_factory.mktemp("authors") / "run"
    (rank,) = train(flags(work, noise_multiplier=None, target_epsilon=8, samples_per_author=3, eval_strategy="steps",
                          eval_steps=3) + RUN_TIME_FLAGS.split())
    return work, rank


def test_the_report(run):
    work, rank = run
    report, N = read(work), AUTHORS - HELD_OUT
    assert {key: report[key] for key in ("unit", "relation", "N", "q", "clip", "steps_charged", "delta", "delta_strict",
                                         "sampling")} == {
        "unit": "author", "relation": "add or remove one author", "N": N, "q": 8 / N, "clip": 1.0, "steps_charged": STEPS,
        "delta": 1 / N, "delta_strict": 1 / (10 * N), "sampling": "poisson"}
    assert 0.99 * 8 <= report["epsilon_prv"] <= 8 and report["epsilon_prv"] < report["epsilon_prv_strict"]
    assert report["final_epsilon_prv"] == report["epsilon_prv"] and report["final_epsilon_rdp"] == report["epsilon_rdp"]
    assert report["held_out"]["authors"] == HELD_OUT and report["held_out"]["by"] == "author" and report["held_out"]["seed"] == 42
    assert any("texts never used" in item for item in report["disclosed"])
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
    head, rule, row = rank.stdout.splitlines()[-3:]
    assert head == "| Model (HF) | Fine-tuning Method | DP | GPUs | Epochs | Train Loss | Eval Loss | epsilon | Run Time [s] |"
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["tiny", "LoRA", "Yes", "1xCPU"] and len(cells) == 9
    assert cells[4] == f"{STEPS * 8 / (AUTHORS - HELD_OUT):.3g}"
    assert cells[5:] == [f"{report['train_loss']:.2f}", f"{report['eval_loss']:.2f}", f"{report['epsilon_prv']:.2f}",
                         f"{report['train_runtime']:.0f}"]


def test_what_authors_contributed(run):
    """Quantiles against numpy over the file, the split redone by names; the texts of a run that draws nobody are all unused."""
    work, _ = run
    found, sizes = read(work)["contributions"], []
    held = read(work)["held_out"]
    texts = [json.loads(line)["author"] for line in (material() / "train.jsonl").read_text().splitlines()]
    assert found["texts"] + held["texts"] == len(texts) and found["samples_per_author"] == 3
    sizes = np.unique(texts, return_counts=True)[1]
    assert found["texts_per_author"]["min"] >= sizes.min() and found["texts_per_author"]["max"] <= sizes.max()
    assert 0 < found["texts_never_used"] < found["texts"]
    expected = found["texts_never_used_expected"]
    assert abs(found["texts_never_used"] - expected) < 5 * math.sqrt(3 * expected)  # an author's texts come three at a time


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
                          noise_seed=None, eval_fraction=0))
    report = read(tmp_path / "run")
    assert report["epsilon_prv"] == report["final_epsilon_prv"] == "inf" and report["sigma"] == 0
    assert "--disable_dp: --target_epsilon 8 has no effect" in rank.stdout and "epsilon = inf" in rank.stdout
    assert "| tiny | LoRA | No | 1xCPU |" in rank.stdout and "| - | inf |" in rank.stdout  # eval_fraction 0: no evaluation
    assert report["held_out"]["authors"] == 0 and report["N"] == AUTHORS


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
    """Two steps, everything logged, with the noise of the whole run; then the rest: the same bits, the same mean loss."""
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
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-12) and ours["eval_loss"] == theirs["eval_loss"]
    # which texts were used before is the sampling's secret: on no disk, so unknown now
    assert ours["contributions"]["texts_never_used"] is None and theirs["contributions"]["texts_never_used"] > 0
    assert ours["contributions"]["texts_never_used_expected"] == theirs["contributions"]["texts_never_used_expected"]


def test_a_killed_run_draws_the_same_authors_and_texts_again(tmp_path, uninterrupted):
    work = tmp_path / "run"
    (rank,) = start(flags(work, samples_per_author=2),
                    faults=[["signal", {"point": "privacy.plan:PrivacyPlan.release", "when": "before", "nth": 4}]])
    assert rank.wait() == -9
    train(flags(work, samples_per_author=2, resume=True))
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


def test_authors_in_both_files_are_told(tmp_path):
    (rank,) = train(flags(tmp_path / "run", eval_fraction=None, eval_file=material() / "train.jsonl", max_steps=1))
    assert f"WARNING: {AUTHORS} authors of --eval_file wrote training texts too" in rank.stdout
    assert read(tmp_path / "run")["held_out"]["authors_in_training_too"] == AUTHORS


def test_ranks_share_the_authors_and_agree(tmp_path):
    """Full fine-tuning on two ranks; the ledger's batch is of the whole job, and the ranks end with the same bits."""
    dumps = [tmp_path / "rank0", tmp_path / "rank1"]
    port = free_port()
    arguments = flags(tmp_path / "run", enable_lora=None, lora_dim=None, per_device_train_batch_size=4, save_steps=100)
    ranks = [server().start("src/fine-tune-dp.py", arguments, faults=[["dump", {"file": str(dumps[rank])}]], env={
        "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert dumps[0].read_bytes() == dumps[1].read_bytes()
    records = ledger(tmp_path / "run")
    assert [record["q"] for record in records] == [8 / (AUTHORS - HELD_OUT)] * STEPS and records[0]["unit"] == "author"
    assert "transformer.wte.weight" in weights(tmp_path / "run") and "| Full | Yes | 2xCPU |" in ranks[0].stdout


# ------------------------------------------------------------------ Hugging Face's meaning


def test_defaults_are_hugging_faces():
    from transformers import TrainingArguments
    ours, theirs = vars(script().parse(["--output_dir", "x"])), TrainingArguments("x", use_cpu=True)
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "adam_beta1",
                 "adam_beta2", "adam_epsilon", "max_grad_norm", "num_train_epochs", "max_steps", "warmup_steps", "logging_steps",
                 "save_steps", "seed", "bf16", "log_level"):
        assert ours[name] == getattr(theirs, name), name
    assert ours["lr_scheduler_type"] == theirs.lr_scheduler_type.value and ours["eval_strategy"] == theirs.eval_strategy.value
    parsed = script().parse(["--output_dir", "x", "--evaluation_strategy", "steps", "--bf16", "True", "--disable_tqdm", "false"])
    assert (parsed.eval_strategy, parsed.bf16, parsed.disable_tqdm) == ("steps", True, False)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_are_hugging_faces(name, warmup):
    from transformers import get_scheduler
    args = script().parse(f"--output_dir x --lr_scheduler_type {name} --learning_rate 0.3".split())
    args.warmup_steps = warmup if name != "constant" else 0
    ours = script().learning_rate(args, steps=50)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=args.warmup_steps, num_training_steps=50)
    for t in range(50):
        assert ours(t) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-12), t
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_adamw_is_torchs(eps):
    """Gradients of the size of the published run's noise (0.6 / 1024), decay on matrices alone. Ours decays after the update
    and torch before it: lr x decay = 1e-5 of an update apart."""
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
    args = script().parse(flags(tmp_path, num_train_epochs=7, max_steps=-1))
    from distributed import World
    request = script().make_request(args, 38, World())
    assert request.steps == round(7 / (8 / 38)) and request.batch == 8 and request.delta == 1 / 38
    args = script().parse(flags(tmp_path, gradient_accumulation_steps=2))
    assert script().make_request(args, 380, World(0, 3)).batch == 48


# ------------------------------------------------------------------ the published commands

COMMAND = """python -m torch.distributed.run --nproc_per_node 16 fine-tune-dp.py \
  --output_dir scratch --model_name gpt2 --sequence_len 128 \
  --per_device_train_batch_size 32 --gradient_accumulation_steps 2 \
  --evaluation_strategy steps --eval_steps 45 --log_level info --per_device_eval_batch_size 64 \
  --eval_accumulation_steps 1 --seed 42 --target_epsilon 8 --per_sample_max_grad_norm 1.0 \
  --prediction_loss_only --weight_decay 0.01 --remove_unused_columns False --num_train_epochs 3 \
  --logging_steps 5 --max_grad_norm 0 --lr_scheduler_type constant --learning_rate 1e-4 \
  --disable_tqdm True --label_names labels --dataloader_num_workers 2"""
LORA_COMMAND = COMMAND.replace("train_batch_size 32", "train_batch_size 64").replace("steps 2 ", "steps 1 ").replace(
    "1e-4", "3e-4") + " --lora_dim 4 --lora_alpha 32 --lora_dropout 0.0 --enable_lora"


def make_tree(root: pathlib.Path, authors: int, layers: int = 1, width: int = 32) -> pathlib.Path:
    """A copy of src/ with stand-ins where the commands' defaults point: data/reddit/train.jsonl, vocab/, a folder `gpt2`."""
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(VOCAB, root / "vocab")
    (root / "data" / "reddit").mkdir(parents=True)
    write_corpus(root / "data" / "reddit" / "train.jsonl", authors, most=3)
    write_model(root / "small", vocabulary=1500, positions=128)
    return root


def launch(command: str, root: pathlib.Path, folder: str, timeout: float) -> subprocess.CompletedProcess:
    command = command.replace("python -m", f"{sys.executable} -m").replace("run --", "run --standalone --")
    return subprocess.run(command, shell=True, cwd=root / folder, env=environment(), capture_output=True, text=True,
                          timeout=timeout)


def test_the_published_command_from_the_source_folder(tmp_path):
    """Letter for letter but for 2 processes and a small folder as the model: relative defaults lie in the repository's root."""
    root = make_tree(tmp_path / "tree", 300)
    command = LORA_COMMAND.replace("--nproc_per_node 16", "--nproc_per_node 2").replace("--model_name gpt2", "--model_name ../small")
    done = launch(command, root, "src", 120)
    assert done.returncode == 0, done.stderr[-3000:]
    report = read(root / "src" / "scratch")
    assert report["N"] == 294 and report["expected_batch"] == 128 and report["steps_charged"] == round(3 * 294 / 128)
    assert report["delta"] == 1 / 294 and report["epsilon_prv"] <= 8 and "| small | LoRA | Yes | 2xCPU | 3.05 |" in done.stdout
    assert read(root / "src" / "scratch", "args.json")["lora_target"] == ["query", "value"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [COMMAND, LORA_COMMAND], ids=["full", "lora"])
@pytest.mark.parametrize("folder", ["src", "."])
def test_the_published_commands_on_16_processes(tmp_path, command, folder):
    root = make_tree(tmp_path / "tree", 1200)
    if folder == ".":
        command = command.replace("fine-tune-dp.py", "src/fine-tune-dp.py")
    done = launch(command.replace("--model_name gpt2", f"--model_name {root / 'small'}"), root, folder, 1200)
    assert done.returncode == 0, done.stderr[-3000:]
    report = read(root / folder / "scratch")
    assert report["N"] == 1176 and report["expected_batch"] == 1024 and report["steps_charged"] == 3
    assert read(root / folder / "scratch", "args.json")["world_size"] == 16 and "| 16xCPU |" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [COMMAND, LORA_COMMAND], ids=["full", "lora"])
def test_the_published_commands_with_gpt2(tmp_path, shared, command):
    """gpt2 with random weights where the download script puts it, GPT-2's own vocabulary, 2 processes, 2 steps."""
    from model import MODEL_CARDS, GPT2LMModel
    root = make_tree(tmp_path / "tree", 64)
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(shared / "vocab" / name, root / "vocab" / name)
    (root / "pretrained_checkpoints").mkdir()
    weights = GPT2LMModel(MODEL_CARDS["gpt2.sm"]).state_dict()
    torch.save({name.removeprefix("transformer."): value for name, value in weights.items() if "lm_head" not in name},
               root / "pretrained_checkpoints" / "gpt2-pytorch_model.bin")
    command = re.sub(r"train_batch_size \d+", "train_batch_size 8", command.replace("node 16", "node 2")) + " --max_steps 2"
    done = launch(command, root, "src", 1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| gpt2 | " in done.stdout and read(root / "src" / "scratch")["steps_charged"] == 2


# ------------------------------------------------------------------ what is refused


def one_author(path: pathlib.Path) -> pathlib.Path:
    path.write_text('{"author": "x", "content": "some text here"}\n' * 20)
    return path


def model_alone(path: pathlib.Path) -> pathlib.Path:
    shutil.copy(material() / "tiny" / "model.safetensors", path)
    return path


REFUSED = {
    "neither sigma nor epsilon": (dict(noise_multiplier=None), ["--noise_multiplier and --target_epsilon", "exactly one"]),
    "sigma and epsilon": (dict(target_epsilon=8), ["--noise_multiplier and --target_epsilon", "exactly one"]),
    "a negative epsilon": (dict(noise_multiplier=None, target_epsilon=-1), ["--target_epsilon", "above 0"]),
    "an epsilon too small": (dict(noise_multiplier=None, target_epsilon=1e-9, target_delta=1e-12),
                             ["--target_epsilon", "no noise multiplier up to"]),
    "LoRA of rank 0": (dict(lora_dim=0), ["--enable_lora", "--lora_dim is 0"]),
    "a rank without LoRA": (dict(enable_lora=None), ["--lora_dim 2", "--enable_lora"]),
    "an unknown model": (dict(model_name="gpt3"), ["--model_name gpt3", "gpt2, gpt2-medium, gpt2-large, gpt2-xl",
                                                   "pretrained_checkpoints"]),
    "a model that is not there": (dict(model_name="gpt2-xl"), ["--model_name gpt2-xl", "gpt2-xl-pytorch_model.bin",
                                                               "download_pretrained_checkpoints.sh"]),
    "a model without its shape": (dict(model_name=model_alone), ["--model_name", "config.json"]),
    "a batch above the authors": (dict(per_device_train_batch_size=39), ["--per_device_train_batch_size", "= 39", "38 authors"]),
    "one author": (dict(train_file=one_author), ["--train_file", "all 20 texts are by one author"]),
    "no data": (dict(train_file="nowhere.jsonl"), ["--train_file nowhere.jsonl"]),
    "no vocabulary": (dict(vocab="nowhere"), ["nowhere", "encoder.json"]),
    "another author field": (dict(author_field="user"), ["train.jsonl:1", "has no 'user'", "--author_field"]),
    "everything held out": (dict(eval_fraction=0.99), ["--eval_fraction 0.99", "holds out all 40"]),
    "a fraction of 1": (dict(eval_fraction=1), ["--eval_fraction 1", "below 1"]),
    "a fraction and a file": (dict(eval_file="x"), ["--eval_fraction", "--eval_file"]),
    "long sequences": (dict(sequence_len=49), ["--sequence_len 49", "48 positions"]),
    "short sequences": (dict(sequence_len=1), ["--sequence_len 1", "at least 2"]),
    "no texts an author": (dict(samples_per_author=0), ["--samples_per_author 0", "at least 1"]),
    "no steps": (dict(max_steps=0), ["--max_steps 0"]),
    "no epochs": (dict(num_train_epochs=0), ["--num_train_epochs 0"]),
    "a NaN": (dict(learning_rate="nan"), ["--learning_rate nan"]),
    "C of 0": (dict(per_sample_max_grad_norm=0), ["--per_sample_max_grad_norm 0"]),
    "delta of 1": (dict(target_delta=1), ["--target_delta 1"]),
    "an unknown flag": (dict(learningrate=1), ["--learningrate"]),
    "an unknown schedule": (dict(lr_scheduler_type="polynomial"), ["--lr_scheduler_type", "polynomial", "linear"]),
    "warm-up of a constant": (dict(lr_scheduler_type="constant", warmup_steps=3), ["--warmup_steps", "constant_with_warmup"]),
    "no boolean": (dict(bf16="maybe"), ["--bf16", "maybe"]),
    "a checkpoint elsewhere": (dict(resume_from_checkpoint=lambda path: path.parent), ["--resume_from_checkpoint", "own folder"]),
    "nothing to resume": (dict(resume_from_checkpoint="true"), ["--output_dir", "nothing to continue"]),
    "an output that is a file": (dict(output_dir=lambda path: one_author(path)), ["--output_dir"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    """One line, status 2, no traceback, and nothing written."""
    changed, words = REFUSED[case]
    changed = {name: value(tmp_path / f"{name}.made.safetensors") if callable(value) else value for name, value in changed.items()}
    before = sorted(path.name for path in tmp_path.iterdir())
    (rank,) = start(flags(**{"work": tmp_path / "run", **changed}), cwd=tmp_path)
    assert rank.wait() == 2, rank.stdout + rank.stderr
    for word in words:
        assert word in rank.error
    assert [name for name in sorted(path.name for path in tmp_path.iterdir()) if name not in (*before, ".author_cache")] == []


def test_a_folder_with_an_earlier_run(tmp_path, uninterrupted):
    before = {path.name: path.read_bytes() for path in uninterrupted.iterdir()}
    (rank,) = start(flags(uninterrupted))
    assert rank.wait() == 2 and f"--output_dir {uninterrupted}" in rank.error and "--resume" in rank.error
    (rank,) = start(flags(uninterrupted, resume=True, per_sample_max_grad_norm=2.0, samples_per_author=2))
    assert rank.wait() == 2 and "clip 1.0 there, 2.0 here" in rank.error
    del before[".lock"]
    assert before == {path.name: path.read_bytes() for path in uninterrupted.iterdir() if path.name != ".lock"}


def test_every_rank_ends_with_a_mistake_of_the_data(tmp_path):
    """The one process that reads a bad line ends the job: the others do not wait for its cache."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"author": "x", "content": ""}\n')
    ranks = start(flags(tmp_path / "run", train_file=bad), size=2)
    assert [rank.wait() for rank in ranks] == [2, 2]
    assert f"{bad}:1: 'content' is empty" in ranks[0].error and ranks[1].stderr == ""


# ------------------------------------------------------------------ the scripts that make data


def reddit_archive(path: pathlib.Path, lines: list) -> pathlib.Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("corpus-webis-tldr-17.json", "".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_prepare_reddit(tmp_path):
    """The first usable records in order; what is left out is counted; nothing behind the last one is looked at."""
    usable = [{"author": f"u{n}", "content": f"text {n} \u00e9", "body": "x", "id": n} for n in range(6)]
    junk = [{"author": "[deleted]", "content": "a"}, {"author": "AutoModerator", "content": "b"}, {"content": "c"},
            {"author": None, "content": "d"}, {"author": "e", "content": " "}, {"author": "f", "content": "\ud800"}]
    archive = reddit_archive(tmp_path / "a.zip", [junk[0], usable[0], *junk[1:], *usable[1:4], "no record", *usable[4:]])
    out = tmp_path / "out.jsonl"
    done = server().start("scripts/prepare_reddit.py", ["--archive", archive, "--output", out, "--records", 4])
    assert done.wait() == 0, done.stderr
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"author": record["author"], "content": record["content"]} for record in usable[:4]]
    assert "4 records by 4 authors; left out: 1 by AutoModerator, 1 by [deleted], 1 with half of a surrogate pair, " \
        "1 without a text, 2 without an author" in done.stdout
    done = server().start("scripts/prepare_reddit.py", ["--archive", archive, "--output", tmp_path / "new", "--records", 5])
    assert done.wait() == 2 and "a.zip:corpus-webis-tldr-17.json:11: not a JSON object" in done.error
    assert not (tmp_path / "new").exists()


def test_prepare_reddit_refuses(tmp_path):
    (tmp_path / "text.zip").write_text("no archive")
    torn = reddit_archive(tmp_path / "torn.zip", [{"author": "a", "content": "x" * 5000 + str(n)} for n in range(500)])
    torn.write_bytes(torn.read_bytes()[:300] + b"\0" * 50 + torn.read_bytes()[350:])
    for arguments, word in ((["--archive", tmp_path / "text.zip"], "not a zip"), (["--archive", torn], "torn.zip"),
                            (["--archive", tmp_path / "absent.zip"], "no such file"), (["--records", 0], "--records 0")):
        run = server().start("scripts/prepare_reddit.py", ["--output", tmp_path / "out", *arguments])
        assert run.wait() == 2 and word in run.error
    assert not (tmp_path / "out").exists()


def test_generated_corpora(tmp_path):
    """As many authors and records as asked for, sizes by Zipf's law, the same bytes again; authors write of their own."""
    outs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl"]
    for out, seed in zip(outs, (1, 1, 2)):
        done = run_script("scripts/make_author_corpus.py", "--authors", 300, "--records", 3000, "--words", 40, "--seed", seed, "--out", out)
        assert done.returncode == 0, done.stderr
    assert outs[0].read_bytes() == outs[1].read_bytes() != outs[2].read_bytes()
    lines = [json.loads(line) for line in outs[0].read_text().splitlines()]
    sizes = np.sort(np.unique([line["author"] for line in lines], return_counts=True)[1])[::-1]
    assert len(lines) == 3000 and len(sizes) == 300 and sizes[-1] >= 1
    expected = 1 + 2700 / sum(1 / rank for rank in range(1, 301)) / np.arange(1, 301)
    assert np.abs(sizes[:10] - expected[:10]).max() < 5 * expected[0] ** 0.5
    words = [len(line["content"].split()) for line in lines]
    assert 40 < np.mean(words) < 50  # whole sentences: a text runs a little over
    refused = run_script("scripts/make_author_corpus.py", "--authors", 30, "--records", 3, "--out", tmp_path / "x")
    assert_user_error(refused, "--records 3", "30 --authors")


def test_plots_of_runs(tmp_path, uninterrupted):
    done = run_script("scripts/plot_run.py", uninterrupted, "--out", tmp_path / "plot.png")
    assert done.returncode == 0 and (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG", done.stderr
    assert_user_error(run_script("scripts/plot_run.py", tmp_path), "metrics.jsonl", "cannot be read")
