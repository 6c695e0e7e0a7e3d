"""Whole runs of src/fine-tune-dp.py on a random GPT-2 of two layers and generated authors, for tests."""

import atexit
import functools
import importlib.util
import json
import os
import pathlib
import random
import shutil
import tempfile

from helpers.processes import ROOT, rank_environments
from helpers.small_runs import server, write_model

AUTHORS, HELD_OUT, STEPS = 40, 2, 6  # of these names, with seed 42, a fraction of 0.16 holds out two
VOCAB = ROOT / "vocab" / "demo"


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
    """The flags of a small reproducible run into `work`; changed: name=value, True a switch, None to leave one out."""
    folder = material()
    values = {
        "output_dir": work, "model_name": folder / "tiny", "vocab": VOCAB, "train_file": folder / "train.jsonl",
        "eval_fraction": 0.16, "sequence_len": 24, "per_device_train_batch_size": 8,
        "noise_multiplier": 0.8, "noise_source": "seeded", "noise_seed": 1, "max_steps": STEPS, "learning_rate": 0.01,
        "logging_steps": 2, "save_steps": 2, "enable_lora": True, "lora_dim": 2, "lora_dropout": 0.1, **changed}
    found: list[str] = []
    for name, value in values.items():
        if value is not None:
            found += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return found


def start(arguments: list, size: int = 1, faults: dict[int, list] | None = None, **options) -> list:
    """fine-tune-dp.py as `size` ranks; faults: rank -> its faults."""
    return [server().start("src/fine-tune-dp.py", arguments, env=env, faults=(faults or {}).get(rank), **options)
            for rank, env in enumerate(rank_environments(size))]


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
