"""The ways to start gpt2_ft.py: plain, torchrun, torch.distributed.launch, sixteen processes, the published command.

Runs are real processes of a real launcher on the loopback interface, except where a fork of the test server says the
same.
"""

import os
import pathlib
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from helpers.processes import ROOT, alive, children, environment, free_port, until
from helpers.published_command import COMMAND, words
from helpers.small_runs import (
    equal,
    flags,
    ledger,
    metrics,
    read,
    server,
    start_ranks,
    train,
    weights,
    write_model,
    write_tokens,
)

WORK = "trained_models/GPT2_M/e2e"


def launch(*launcher: object, arguments: list, cwd: pathlib.Path = ROOT, **options) -> subprocess.Popen:
    """A launcher with gpt2_ft.py and its arguments, on a port of its own."""
    return subprocess.Popen([sys.executable, *map(str, launcher), str(ROOT / "src/gpt2_ft.py"), *map(str, arguments)],
                            cwd=cwd,
                            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def torchrun(size: int) -> list[str]:
    return ["-m", "torch.distributed.run", f"--nproc_per_node={size}", f"--master_port={free_port()}"]


@pytest.fixture
def project(tmp_path) -> pathlib.Path:
    """A folder in which the published command finds its files, made small; src/ is the product's."""
    (tmp_path / "src").symlink_to(ROOT / "src")
    (tmp_path / "data/e2e").mkdir(parents=True)
    (tmp_path / "pretrained_checkpoints").mkdir()
    write_tokens(tmp_path / "data/e2e/train.jsonl", 256, 1)
    write_tokens(tmp_path / "data/e2e/valid.jsonl", 9, 2)
    return tmp_path


def small_model(project: pathlib.Path) -> None:
    """A checkpoint in Hugging Face's .bin, and its config.json as gpt2.small."""
    import safetensors.torch
    folder = write_model(project / "gpt2.small", positions=512)
    torch.save(safetensors.torch.load_file(str(folder / "model.safetensors")),
               project / "pretrained_checkpoints/gpt2-medium-pytorch_model.bin")


def check_published(work: pathlib.Path, size: int, N: int, steps: int) -> None:
    report, records = read(work), ledger(work)
    assert (report["N"], report["q"], report["sigma"], report["clip"], report["delta"]) == (N, 8 * size / N, 0.6, 1.0,
                                                                                            1e-5)
    assert len(records) == steps == report["steps_charged"] and {record["world_size"] for record in records} == {size}
    assert (work / f"model.{steps}.pt").exists() and any("valid_loss" in record for record in metrics(work))


# ------------------------------------------------------------------ launchers


def test_the_command_is_the_published_one(shared):
    published = (shared / "spec/pipeline.md").read_text().replace("\\\n", "\n").split("```")[1]
    assert shlex.split(COMMAND) == ["python", "-m", *shlex.split(published.split("python -m")[1])]


def test_every_launcher_gives_the_same_run(tmp_path):
    """Plain python alone; torchrun and torch.distributed.launch with two processes, which agree bit for bit."""
    started = {"plain": launch(arguments=flags(tmp_path / "plain", max_step=2)),
               "run": launch(*torchrun(2), arguments=flags(tmp_path / "run", max_step=2)),
               "launch": launch("-W", "ignore", "-m", "torch.distributed.launch", "--nproc_per_node=2",
                                f"--master_port={free_port()}",
                                arguments=flags(tmp_path / "launch", max_step=2))}
    for name, process in started.items():
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, f"{name}: {err}"
        assert out.count("2 steps charged") == 1 and "Traceback" not in err
    assert equal(weights(tmp_path / "run", 2), weights(tmp_path / "launch", 2))
    assert [record["world_size"] for name in started for record in ledger(tmp_path / name)] == [1, 1, 2, 2, 2, 2]
    assert read(tmp_path / "launch", "args.json")["local_rank"] == 0  # given by --local-rank
    train(flags(tmp_path / "fork", max_step=2))
    assert equal(weights(tmp_path / "fork", 2),
                 weights(tmp_path / "plain", 2))  # what the other tests start is the same


def test_a_scheduler_s_sigterm_under_torchrun(tmp_path):
    """SIGTERM to every process of the job at once, to which the launcher adds its own: a whole checkpoint, and then it
    goes on."""
    work = tmp_path / "run"
    many = {"max_step": 10**6, "save_interval": 10**6, "log_interval": 5, "scheduler": "constant"}
    launcher = launch(*torchrun(2), arguments=flags(work, **many))
    until(lambda: (work / "metrics.jsonl").exists())
    workers = children(launcher.pid)
    assert len(workers) == 2
    for pid in (launcher.pid, *workers):
        os.kill(pid, signal.SIGTERM)
    out, _ = launcher.communicate(timeout=60)
    assert launcher.returncode != 0 and "SIGTERM: stopped after step" in out
    until(lambda: not any(map(alive, workers)), 10)
    (model,) = work.glob("model.*.pt")
    step = int(model.name.split(".")[1])
    assert len(ledger(work)) == step == read(work)["steps_charged"]
    # ... and a rank that dies under torchrun: the job ends at once, and can be continued
    launcher = launch(*torchrun(2), arguments=flags(work, **many, resume=True))
    until(lambda: len(ledger(work)) > step + 3)
    os.kill(children(launcher.pid)[1], signal.SIGKILL)
    begin = time.monotonic()
    out, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 1 and time.monotonic() - begin < 30
    charged = len(ledger(work))
    # rank 0 saves what is done, if the launcher leaves it the time
    saved = max(int(path.name.split(".")[1]) for path in work.glob("model.*.pt"))
    assert step <= saved <= ledger(work)[-1]["step"]
    stop = ["signal", {"point": "privacy.sampling:PoissonSampler.draw", "when": "after", "nth": 3,
                       "number": signal.SIGTERM}]
    ranks = start_ranks(flags(work, **many, resume=True), 2, {0: [stop]})
    assert [rank.wait() for rank in ranks] == [143, 143]
    assert (work / f"model.{saved + 3}.pt").exists() and len(ledger(work)) == charged + 3


def test_sixteen_processes(project):
    """The flags of the published command, as sixteen ranks."""
    small_model(project)
    arguments = [word.replace("gpt2.md", "gpt2.small") for word in words()[4:]]
    assert arguments[0] == "--train_data"
    ranks = start_ranks(arguments, 16, cwd=project)
    assert [rank.wait(240) for rank in ranks] == [0] * 16, ranks[0].stderr
    check_published(project / WORK, 16, 256, 40)
    assert not any(rank.stderr for rank in ranks) and not any(rank.stdout for rank in ranks[1:])


@pytest.mark.slow
def test_the_published_command_on_a_small_model(project, capsys):
    """Letter for letter, with sixteen processes of the launcher; gpt2.md alone is another word."""
    small_model(project)
    begin = time.monotonic()
    command = [word.replace("gpt2.md", "gpt2.small") for word in words()]
    process = subprocess.run([sys.executable, *command], cwd=project, env=environment(), capture_output=True, text=True,
                             timeout=900)
    assert process.returncode == 0, process.stderr[-3000:]
    check_published(project / WORK, 16, 256, 40)
    with capsys.disabled():
        print(f"\nsixteen processes: {time.monotonic() - begin:.0f} s")


@pytest.mark.slow
def test_the_published_command_on_gpt2_medium(project, capsys):
    """gpt2.md itself, 355 million random weights in Hugging Face's format, two processes, two steps."""
    from model import MODEL_CARDS, GPT2LMModel, LoRAConfig
    medium = GPT2LMModel(MODEL_CARDS["gpt2.md"], LoRAConfig())
    torch.save({name.removeprefix("transformer."): value for name, value in medium.state_dict().items()
                if "lm_head" not in name},
               project / "pretrained_checkpoints/gpt2-medium-pytorch_model.bin")
    size = sum(parameter.numel() for parameter in medium.parameters())
    del medium
    write_tokens(project / "data/e2e/train.jsonl", 256, 1, longest=100, vocabulary=50257)
    write_tokens(project / "data/e2e/valid.jsonl", 9, 2, longest=100, vocabulary=50257)
    begin = time.monotonic()
    command = [word.replace("=16", "=2") for word in words()] + ["--max_step", "2"]
    process = subprocess.run([sys.executable, *command], cwd=project, env=environment(), capture_output=True, text=True,
                             timeout=1800)
    assert process.returncode == 0, process.stderr[-3000:]
    check_published(project / WORK, 2, 256, 2)
    assert (project / WORK / "model.2.pt").stat().st_size < 3e6  # the adapters alone
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    with capsys.disabled():
        print(f"\ngpt2.md, {size / 1e6:.0f} million parameters: {time.monotonic() - begin:.0f} s, "
              f"at most {peak:.1f} GB a process\n{process.stdout}")


# ------------------------------------------------------------------ environments that lie


@pytest.mark.parametrize("lies, words", [
    ({"RANK": 0}, ["RANK is set but WORLD_SIZE is not"]), ({"WORLD_SIZE": 2}, ["WORLD_SIZE is set but RANK is not"]),
    ({"RANK": 0, "WORLD_SIZE": 2}, ["MASTER_ADDR"]),
    ({"RANK": 2, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}, ["RANK=2"]),
    ({"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "many"}, ["MASTER_PORT"]),
    ({"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": 29500},
     ["no.such.host.invalid"]),
])
def test_stale_environments(tmp_path, lies, words):
    run = server().start("src/gpt2_ft.py", flags(tmp_path / "run"), env=lies)
    assert run.wait(30) == 2 and not (tmp_path / "run").exists()
    for word in [*words, "unset RANK"]:
        assert word in run.error


def test_a_busy_port(tmp_path):
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        run = server().start("src/gpt2_ft.py", flags(tmp_path / "run"), env={
            "RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        assert run.wait(30) == 2 and f"MASTER_PORT={port}" in run.error and "--master_port" in run.error


def test_open_mpi(tmp_path):
    """--platform k8s: ranks from Open MPI's variables."""
    port = free_port()
    ranks = [server().start("src/gpt2_ft.py", flags(tmp_path / "run", platform="k8s", max_step=2), env={
        "OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port}) for rank in (0, 1)]
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert read(tmp_path / "run")["steps_charged"] == 2 and not ranks[1].stdout


def test_help_names_every_flag_of_the_command():
    run = server().start("src/gpt2_ft.py", ["--help"])
    assert run.wait() == 0
    for word in words():
        if word.startswith("--") and not word.startswith("--nproc"):
            assert word in run.stdout
