"""fine-tune-dp.py as people start it: the published commands, what is refused; and the scripts that make its data."""

import json
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch

from helpers.author_runs import VOCAB, flags, material, start, train, write_corpus
from helpers.processes import ROOT, assert_user_error, environment, run_script
from helpers.small_runs import read, server, write_model


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run."""
    work = tmp_path_factory.mktemp("authors") / "run"
    train(flags(work, samples_per_author=2))
    return work


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


def make_tree(root: pathlib.Path, authors: int) -> pathlib.Path:
    """A copy of src/ with stand-ins where the defaults point: data/reddit/train.jsonl, vocab/; and a model, small/."""
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
    """Letter for letter but for 2 processes and a small folder as the model: defaults lie in the repository's root."""
    root = make_tree(tmp_path / "tree", 300)
    command = LORA_COMMAND.replace("node 16", "node 2").replace("--model_name gpt2", "--model_name ../small")
    done = launch(command, root, "src", 120)
    assert done.returncode == 0, done.stderr[-3000:]
    report = read(root / "src" / "scratch")
    assert report["N"] == 294 and report["expected_batch"] == 128 and report["steps_charged"] == round(3 * 294 / 128)
    assert report["delta"] == 1 / 294 and report["epsilon_prv"] <= 8
    assert "| small | LoRA | Yes | 2xCPU | 3.05 |" in done.stdout
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
    assert report["N"] == 1178 and report["expected_batch"] == 1024 and report["steps_charged"] == 3
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
    command = command.replace("node 16", "node 2") + " --max_steps 2"
    command = re.sub(r"train_batch_size \d+", "train_batch_size 8", command)
    done = launch(command, root, "src", 1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| gpt2 | " in done.stdout and read(root / "src" / "scratch")["steps_charged"] == 2


# ------------------------------------------------------------------ a corpus of Reddit's size


def tree_memory(pid: int) -> float:
    """MB of a process and all below it; a page that several share counts once (PSS)."""
    try:
        status = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = [int(child) for task in pathlib.Path(f"/proc/{pid}/task").iterdir()
                    for child in (task / "children").read_text().split()]
    except OSError:  # it has just ended
        return 0.0
    return int(re.search(r"^Pss: +(\d+)", status, re.MULTILINE)[1]) / 1024 + sum(map(tree_memory, children))


def measured_run(arguments: list[str]) -> tuple[float, float]:
    """(CPU seconds, peak MB) of a run of fine-tune-dp.py and all its processes."""
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before, peak = spent(), 0.0
    process = subprocess.Popen([sys.executable, ROOT / "src" / "fine-tune-dp.py", *arguments], env=environment(),
                               stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.1)
    assert process.returncode == 0
    return spent() - before, peak


@pytest.mark.slow
def test_a_corpus_of_reddits_size(tmp_path):
    """304,279 authors by a Zipf law: a run of one step takes less than 90 s of one core, 10 s at the second start, and
    less than 2 GB beyond a run on few records, tokenising processes included. (Of CPU time, which another job on the
    machine leaves nearly as it is; several cores tokenise in parallel.)"""
    corpus, few = tmp_path / "reddit.jsonl", tmp_path / "few.jsonl"
    made = run_script("scripts/start.py", "make_author_corpus", "--authors", 304_279, "--records", 500_000,
                      "--words", 270, "--out", corpus, timeout=1200)
    assert made.returncode == 0, made.stderr
    with open(corpus) as lines, open(few, "w") as out:
        out.writelines(line for line, _ in zip(lines, range(2000)))
    seconds, memory = {}, {}
    for name, path in {"few": few, "first": corpus, "second": corpus}.items():
        seconds[name], memory[name] = measured_run(flags(
            tmp_path / name, train_file=path, sequence_len=48, eval_fraction=0.0005, max_steps=1))
    assert read(tmp_path / "first")["contributions"]["texts"] + read(tmp_path / "first")["held_out"]["texts"] == 500_000
    assert seconds["first"] < 90 and seconds["second"] < 10
    assert max(memory["first"], memory["second"]) - memory["few"] < 2000


# ------------------------------------------------------------------ what is refused


def one_author(path: pathlib.Path) -> pathlib.Path:
    path.write_text('{"author": "x", "content": "some text here"}\n' * 20)
    return path


def model_alone(path: pathlib.Path) -> pathlib.Path:
    shutil.copy(material() / "tiny" / "model.safetensors", path)
    return path


REFUSED = {
    "neither sigma nor epsilon": (dict(noise_multiplier=None), ["--noise_multiplier and --target_epsilon",
                                                                "exactly one"]),
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
    "a batch above the authors": (dict(per_device_train_batch_size=39), ["--per_device_train_batch_size", "= 39",
                                                                         "38 authors"]),
    "one author": (dict(train_file=one_author), ["--train_file", "all 20 texts are by one author"]),
    "no data": (dict(train_file="nowhere.jsonl"), ["--train_file nowhere.jsonl"]),
    "no vocabulary": (dict(vocab="nowhere"), ["nowhere", "encoder.json"]),
    "another author field": (dict(author_field="user"), ["train.jsonl:1", "has no 'user'", "--author_field"]),
    "everything held out": (dict(eval_fraction=0.999), ["--eval_fraction 0.999", "of 40 authors"]),
    "a fraction of 1": (dict(eval_fraction=1), ["--eval_fraction 1", "below 1"]),
    "the training file to evaluate on": (dict(eval_fraction=None, eval_file=lambda path: pathlib.Path(shutil.copy(
        material() / "train.jsonl", path))), ["--eval_file", "is the training file (same sha256)"]),
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
    "steps of no evaluation": (dict(eval_steps=2), ["--eval_steps 2", "--eval_strategy no"]),
    "warm-up of a constant": (dict(lr_scheduler_type="constant", warmup_steps=3), ["--warmup_steps",
                                                                                   "constant_with_warmup"]),
    "no boolean": (dict(bf16="maybe"), ["--bf16", "maybe"]),
    "a checkpoint elsewhere": (dict(resume_from_checkpoint=lambda path: path.parent), ["--resume_from_checkpoint",
                                                                                       "own folder"]),
    "nothing to resume": (dict(resume_from_checkpoint="true"), ["--output_dir", "nothing to continue"]),
    "an output that is a file": (dict(output_dir=lambda path: one_author(path)), ["--output_dir"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    """One line, status 2, no traceback, and nothing written."""
    changed, words = REFUSED[case]
    changed = {name: value(tmp_path / f"{name}.safetensors") if callable(value) else value
               for name, value in changed.items()}
    before = sorted(path.name for path in tmp_path.iterdir())
    (rank,) = start(flags(**{"work": tmp_path / "run", **changed}), cwd=tmp_path)
    assert rank.wait() == 2, rank.stdout + rank.stderr
    for word in words:
        assert word in rank.error
    assert {path.name for path in tmp_path.iterdir()} <= {*before, ".author_cache"}


def test_a_folder_with_an_earlier_run(tmp_path, finished):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    (rank,) = start(flags(finished))
    assert rank.wait() == 2 and f"--output_dir {finished}" in rank.error and "--resume" in rank.error
    (rank,) = start(flags(finished, resume=True, per_sample_max_grad_norm=2.0, samples_per_author=2))
    assert rank.wait() == 2 and "clip 1.0 there, 2.0 here" in rank.error
    del before[".lock"]
    assert before == {path.name: path.read_bytes() for path in finished.iterdir() if path.name != ".lock"}


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
    lines = [junk[0], usable[0], *junk[1:], *usable[1:4], "no record", *usable[4:]]
    archive, out = reddit_archive(tmp_path / "a.zip", lines), tmp_path / "out.jsonl"
    done = server().start("scripts/prepare_reddit.py", ["--archive", archive, "--output", out, "--records", 4])
    assert done.wait() == 0, done.stderr
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"author": record["author"], "content": record["content"]} for record in usable[:4]]
    assert "4 records by 4 authors; left out: 1 by AutoModerator, 1 by [deleted], 1 with half of a surrogate pair, " \
        "1 without a text, 2 without an author" in done.stdout
    arguments = ["--archive", archive, "--output", tmp_path / "new", "--records", 5]
    done = server().start("scripts/prepare_reddit.py", arguments)
    assert done.wait() == 2 and "a.zip:corpus-webis-tldr-17.json:11: not a JSON object" in done.error
    assert not (tmp_path / "new").exists()


def test_prepare_reddit_refuses(tmp_path):
    (tmp_path / "text.zip").write_text("no archive")
    torn = reddit_archive(tmp_path / "torn.zip", [{"author": "a", "content": "x" * 5000 + str(n)} for n in range(500)])
    torn.write_bytes(torn.read_bytes()[:300] + b"\0" * 50 + torn.read_bytes()[350:])
    locked = bytearray(reddit_archive(tmp_path / "locked.zip", [{"author": "a", "content": "x"}]).read_bytes())
    for flags_at in (6, locked.rindex(b"PK\1\2") + 8):  # of the member and of the directory: bit 0 is "encrypted"
        locked[flags_at] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    for arguments, word in ((["--archive", tmp_path / "text.zip"], "not a zip"), (["--archive", torn], "torn.zip"),
                            (["--archive", tmp_path / "locked.zip"], "encrypted"),
                            (["--recrods", 3], "--recrods"), (["--records", "x"], "--records"),
                            (["--archive", tmp_path / "absent.zip"], "no such file"),
                            (["--records", 0], "--records 0")):
        run = server().start("scripts/prepare_reddit.py", ["--output", tmp_path / "out", *arguments])
        assert run.wait() == 2 and word in run.error
    assert not (tmp_path / "out").exists()


def test_generated_corpora(tmp_path):
    """As many authors and records as asked for, sizes by Zipf's law, the same bytes again."""
    outs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl"]
    for out, seed in zip(outs, (1, 1, 2)):
        done = run_script("scripts/start.py", "make_author_corpus", "--authors", 300, "--records", 3000, "--words", 40,
                          "--seed", seed, "--out", out)
        assert done.returncode == 0, done.stderr
    assert outs[0].read_bytes() == outs[1].read_bytes() != outs[2].read_bytes()
    lines = [json.loads(line) for line in outs[0].read_text().splitlines()]
    sizes = np.sort(np.unique([line["author"] for line in lines], return_counts=True)[1])[::-1]
    assert len(lines) == 3000 and len(sizes) == 300 and sizes[-1] >= 1
    expected = 1 + 2700 / sum(1 / rank for rank in range(1, 301)) / np.arange(1, 301)
    assert np.abs(sizes[:10] - expected[:10]).max() < 5 * expected[0] ** 0.5
    words = [len(line["content"].split()) for line in lines]
    assert 40 < np.mean(words) < 50  # whole sentences: a text runs a little over
    refused = run_script("scripts/start.py", "make_author_corpus", "--authors", 30, "--records", 3,
                         "--out", tmp_path / "x")
    assert_user_error(refused, "--records 3", "30 --authors")


def test_plots_of_runs(tmp_path, finished):
    done = run_script("scripts/plot_run.py", finished, "--out", tmp_path / "plot.png")
    assert done.returncode == 0 and (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG", done.stderr
    assert_user_error(run_script("scripts/plot_run.py", tmp_path), "metrics.jsonl", "cannot be read")
