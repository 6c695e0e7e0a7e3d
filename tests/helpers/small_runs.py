"""Whole runs of src/gpt2_ft.py on a random GPT-2 of two layers, for tests: the files, the flags, the processes."""

import atexit
import contextlib
import functools
import itertools
import json
import os
import pathlib
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field

import torch

from helpers.processes import ROOT, environment, rank_environments

N, STEPS, VOCABULARY = 40, 6, 60


# ------------------------------------------------------------------ files


def write_model(folder: pathlib.Path, vocabulary: int = VOCABULARY, positions: int = 48) -> pathlib.Path:
    """A random GPT-2 of 2 layers and width 16 in Hugging Face's layout."""
    import safetensors.torch

    from model import GPT2Config, GPT2LMModel, LoRAConfig
    shape = dict(vocab_size=vocabulary, n_positions=positions, n_embd=16, n_layer=2, n_head=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = GPT2LMModel(GPT2Config(**shape), LoRAConfig()).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**shape, "model_type": "gpt2"}))
    weights = {name.removeprefix("transformer."): value.clone() for name, value in weights.items()
               if "lm_head" not in name}
    safetensors.torch.save_file(weights, str(folder / "model.safetensors"))
    return folder


def write_tokens(path: pathlib.Path, examples: int, seed: int, longest: int = 20,
                 vocabulary: int = VOCABULARY) -> pathlib.Path:
    draw = random.Random(seed)

    def tokens() -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(draw.randint(1, longest // 2))]

    path.write_text("".join(json.dumps({"context": tokens(), "completion": tokens()}) + "\n" for _ in range(examples)))
    return path


@functools.cache
def material() -> pathlib.Path:
    """A folder with tiny/ (the model), train.jsonl (N examples) and valid.jsonl, made once a session."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="small_runs."))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_model(folder / "tiny")
    write_tokens(folder / "train.jsonl", N, seed=1)
    write_tokens(folder / "valid.jsonl", 7, seed=2)
    return folder


def initial() -> dict[str, torch.Tensor]:
    """The weights of the tiny model, under this project's names."""
    import safetensors.torch
    found = safetensors.torch.load_file(str(material() / "tiny" / "model.safetensors"))
    return {f"transformer.{name}": value for name, value in found.items()}


def flags(work: os.PathLike, **changed: object) -> list[str]:
    """The flags of a small reproducible run into `work`; changed: name=value, True for a switch, None to leave one
    out."""
    folder = material()
    values = {
        "train_data": folder / "train.jsonl", "valid_data": folder / "valid.jsonl", "train_batch_size": 8,
        "noise_multiplier": 0.8, "noise_source": "seeded", "noise_seed": 1, "model_card": folder / "tiny",
        "init_checkpoint": folder / "tiny", "seq_len": 32, "max_step": STEPS, "lora_dim": 2, "lora_alpha": 8,
        "lr": 0.01,
        "scheduler": "linear", "save_interval": 2, "log_interval": 2, "lora_dropout": 0.1, "work_dir": work, **changed}
    found: list[str] = []
    for name, value in values.items():
        if value is not None:
            found += [f"--{name}"] if value is True else [f"--{name}",
                                                          *map(str, value if isinstance(value, list) else [value])]
    return found


def weights(work: os.PathLike, step: int = STEPS) -> dict[str, torch.Tensor]:
    return torch.load(os.path.join(work, f"model.{step}.pt"), weights_only=True)["model_state_dict"]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """The same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)) for name in a)


def ledger(work: os.PathLike) -> list[dict]:
    """The whole records of a ledger, read by nothing of the product."""
    return [json.loads(line) for line in (pathlib.Path(work) / "privacy_ledger.jsonl").read_text().splitlines(True)
            if line.endswith("\n")]


def read(work: os.PathLike, name: str = "privacy.json") -> dict:
    return json.loads((pathlib.Path(work) / name).read_text())


def metrics(work: os.PathLike) -> list[dict]:
    return [json.loads(line) for line in (pathlib.Path(work) / "metrics.jsonl").read_text().splitlines()]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file under `folder`, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------ processes


@dataclass
class Run:
    """One process that the fork server started."""

    server: "ForkServer"
    pid: int
    out: pathlib.Path
    err: pathlib.Path

    def wait(self, seconds: float = 60) -> int:
        """Its exit status, or minus the signal that killed it."""
        return self.server.wait(self.pid, seconds)

    def kill(self) -> None:
        """SIGKILL; nothing where it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    @property
    def stdout(self) -> str:
        return self.out.read_text()

    @property
    def stderr(self) -> str:
        return self.err.read_text()

    @property
    def error(self) -> str:
        """The one line of a user's mistake."""
        lines = self.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.stderr
        return lines[0]


@dataclass
class ForkServer:
    """tests/helpers/fork_server.py, started once."""

    process: subprocess.Popen = field(init=False)
    ended: dict[int, int] = field(default_factory=dict)
    started: dict[int, int] = field(default_factory=dict)
    numbers: itertools.count = field(default_factory=itertools.count)
    pending: bytes = b""

    def __post_init__(self):
        self.process = subprocess.Popen([sys.executable, str(ROOT / "tests/helpers/fork_server.py")],
                                        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="fork_server."))
        atexit.register(self.close)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)
        shutil.rmtree(self.folder, ignore_errors=True)

    def listen(self, seconds: float) -> None:
        """Take in what the server says within `seconds`."""
        if select.select([self.process.stdout], [], [], max(0, seconds))[0]:
            received = os.read(self.process.stdout.fileno(), 1 << 16)
            if not received:
                raise RuntimeError("the fork server ended")
            *lines, self.pending = (self.pending + received).split(b"\n")
            for answer in map(json.loads, lines):
                if "status" in answer:
                    self.ended[answer["pid"]] = answer["status"]
                elif "id" in answer:
                    self.started[answer["id"]] = answer["pid"]

    def start(self, script: str, arguments: list, cwd: os.PathLike = ROOT, env: dict | None = None,
              faults: list | None = None) -> Run:
        """Start `python SCRIPT ARGUMENTS`; faults: [name, keywords] of fork_server.FAULTS."""
        number = next(self.numbers)
        out, err = self.folder / f"{number}.out", self.folder / f"{number}.err"
        job = {"id": number, "script": script, "arguments": list(map(str, arguments)), "cwd": str(cwd),
               "env": {name: str(value) for name, value in (env or {}).items()}, "faults": faults or [],
               "out": str(out), "err": str(err)}
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()
        while number not in self.started:
            self.listen(60)
        return Run(self, self.started.pop(number), out, err)

    def wait(self, pid: int, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        while pid not in self.ended:
            if time.monotonic() > deadline:
                os.kill(pid, 9)
                raise AssertionError(f"process {pid} has not ended after {seconds} s")
            self.listen(0.2)
        return self.ended.pop(pid)


@functools.cache
def server() -> ForkServer:
    return ForkServer()


def start_ranks(arguments: list, size: int = 1, faults: dict[int, list] | None = None, **options) -> list[Run]:
    """gpt2_ft.py as `size` ranks; faults: rank -> its faults."""
    return [server().start("src/gpt2_ft.py", arguments, env=env, faults=(faults or {}).get(rank), **options)
            for rank, env in enumerate(rank_environments(size))]


def train(arguments: list, size: int = 1, faults: dict[int, list] | None = None, **options) -> list[Run]:
    """A run from start to end that must succeed on every rank."""
    ranks = start_ranks(arguments, size, faults, **options)
    statuses = [rank.wait() for rank in ranks]
    assert statuses == [0] * size, "\n".join(rank.stdout[-2000:] + rank.stderr for rank in ranks)
    return ranks
