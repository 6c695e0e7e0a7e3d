"""The ranks of a job: real processes that meet on the loopback interface."""

import json
import pathlib
import socket
import subprocess
import sys

import pytest

from base import errors
from helpers.processes import (
    LAUNCHER,
    assert_user_error,
    environment,
    free_port,
    rank_environments,
    run_script,
    write_script,
)


def run_ranks(script: pathlib.Path, size: int, *arguments: object) -> list[subprocess.CompletedProcess]:
    """`script` as `size` processes that meet on a free port; their outputs, by rank."""
    started = [subprocess.Popen([sys.executable, str(script), *map(str, arguments)], env=environment(**variables),
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for variables in rank_environments(size)]
    finished = []
    try:
        for process in started:
            out, err = process.communicate(timeout=120)
            finished.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
    return finished


# ------------------------------------------------------------------ who am I: the launcher's environment

LOOPBACK = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
OMPI = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
ENVIRONMENTS = [  # (environment, platform, --local_rank, what starts or what the error says)
    ({}, "local", None, "0 of 1 local 0"),
    (LOOPBACK, "local", None, "0 of 1 local 0"),  # an address alone is no job
    ({**LOOPBACK, "RANK": "0", "WORLD_SIZE": "1"}, "local", None, "0 of 1 local 0"),
    ({"RANK": "0"}, "local", None, "RANK is set but WORLD_SIZE is not"),
    ({"WORLD_SIZE": "4"}, "local", None, "WORLD_SIZE is set but RANK is not"),
    ({"RANK": "0", "WORLD_SIZE": "4"}, "local", None, "MASTER_ADDR is not"),
    ({"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}, "local", None, "MASTER_PORT is not"),
    ({**LOOPBACK, "RANK": "4", "WORLD_SIZE": "4"}, "local", None, "RANK=4 with WORLD_SIZE=4"),
    ({**LOOPBACK, "RANK": "-1", "WORLD_SIZE": "4"}, "local", None, "RANK=-1"),
    ({**LOOPBACK, "RANK": "0", "WORLD_SIZE": "0"}, "local", None, "WORLD_SIZE=0"),
    ({**LOOPBACK, "RANK": "one", "WORLD_SIZE": "4"}, "local", None, "RANK='one': expected a whole number"),
    ({**LOOPBACK, "RANK": "", "WORLD_SIZE": "4"}, "local", None, "RANK='': expected a whole number"),
    ({**LOOPBACK, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "local", None, "LOCAL_RANK='x'"),
    ({**LOOPBACK, "RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "http"}, "local", None, "MASTER_PORT='http'"),
    ({**LOOPBACK, "RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "0"}, "local", None, "MASTER_PORT=0"),
    ({**LOOPBACK, "RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "70000"}, "local", None, "MASTER_PORT=70000"),
    ({**LOOPBACK, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere.invalid"}, "local", None, "no such host"),
    ({**LOOPBACK, "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": ""}, "local", None, "no such host"),
    ({}, "azure", None, "--platform azure: expected local or k8s"),
    ({}, "k8s", None, "OMPI_COMM_WORLD_RANK is not set"),
    ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, "k8s", None, "OMPI_COMM_WORLD_LOCAL_RANK is not set"),
    (OMPI, "k8s", None, "0 of 1 local 0"),
    ({**OMPI, **LOOPBACK, "RANK": "3", "WORLD_SIZE": "4"}, "k8s", None, "0 of 1 local 0"),  # Open MPI's word counts
    ({**OMPI, "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "2"}, "k8s", None, "expected 0 <= rank < size"),
    ({**OMPI, "OMPI_COMM_WORLD_SIZE": "many"}, "k8s", None, "expected a whole number"),
    ({**LOOPBACK, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, "which", 3, "5 of 8 local 1"),
    ({**LOOPBACK, "RANK": "5", "WORLD_SIZE": "8"}, "which", 3, "5 of 8 local 3"),
    ({**LOOPBACK, "RANK": "5", "WORLD_SIZE": "8"}, "which", None, "5 of 8 local 5"),
]


def test_every_environment_starts_or_says_what_is_wrong(tmp_path):
    """All of them in one process: importing torch takes longer than the rest."""
    script = write_script(tmp_path / "script.py", f"""
        import json
        for variables, platform, local_rank, _ in json.loads(sys.argv[1]):
            for name in {LAUNCHER!r}:
                os.environ.pop(name, None)
            os.environ.update(variables)
            try:
                if platform == "which":
                    rank, size, local = distributed.environment_world("local", local_rank)
                else:
                    world = distributed.start(platform, local_rank, join_seconds=1)
                    rank, size, local = world.rank, world.size, world.local_rank
                print(f"{{rank}} of {{size}} local {{local}}")
            except errors.UserError as error:
                print(error)
        """)
    process = run_script(script, json.dumps(ENVIRONMENTS), env=environment())
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == len(ENVIRONMENTS), process.stdout
    for line, (variables, platform, _, words) in zip(lines, ENVIRONMENTS, strict=True):
        assert words in line, f"{variables} {platform}: {line}"


MEET = """
    world = distributed.start(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None, join_seconds=3)
    print(world.rank, world.size, world.local_rank, world.gather(world.rank * 10))
    world.close()
    """


def test_ranks_that_do_not_appear_and_a_busy_port(tmp_path):
    """A stale environment in a shell: rank 0 waits for others, rank 1 for rank 0, and a port that is not torch's."""
    script = write_script(tmp_path / "script.py", MEET)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        busy, free = server.getsockname()[1], free_port()
        cases = [(0, free, "did not meet"), (1, free_port(), "did not meet"), (0, busy, "Address already in use"),
                 (1, busy, "did not meet")]
        started = [subprocess.Popen([sys.executable, str(script), "local"], text=True, stderr=subprocess.PIPE,
                                    env=environment(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
                   for rank, port, _ in cases]
        try:
            for process, (_, port, words) in zip(started, cases, strict=True):
                _, stderr = process.communicate(timeout=60)
                done = subprocess.CompletedProcess(process.args, process.returncode, "", stderr)
                assert_user_error(done, words, str(port), "MASTER_PORT")
                assert len(stderr.splitlines()) == 1, stderr  # none of torch's C++ frames either
        finally:
            for process in started:
                process.kill()


def test_open_mpi_and_local_rank(tmp_path):
    script = write_script(tmp_path / "script.py", MEET)
    port = free_port()
    started = [subprocess.Popen(
        [sys.executable, str(script), "k8s"], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(OMPI_COMM_WORLD_RANK=rank, OMPI_COMM_WORLD_SIZE=2, OMPI_COMM_WORLD_LOCAL_RANK=1 - rank,
                        MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE=True)) for rank in range(2)]  # the last is stale
    for rank, process in enumerate(started):
        out, err = process.communicate(timeout=60)
        assert out == f"{rank} 2 {1 - rank} [0, 10]\n", err


def test_launchers(tmp_path):
    """torchrun, and torch.distributed.launch with its --local-rank flag."""
    script = write_script(tmp_path / "script.py", """
        import argparse
        parser = argparse.ArgumentParser()
        parser.add_argument("--local_rank", "--local-rank", type=int)
        world = distributed.start("local", parser.parse_args().local_rank, join_seconds=30)
        sys.stdout.write(f"{world.rank} {world.size} {world.local_rank} {world.gather(world.rank * 10)}\\n")
        world.close()
        """)
    port = free_port()
    for module, where in (("run", "--standalone"), ("launch", f"--master_port={port}")):
        module = f"torch.distributed.{module}"
        process = run_script("-m", module, where, "--nproc_per_node=2", script, env=environment())
        assert process.returncode == 0, process.stderr
        assert sorted(process.stdout.splitlines()) == ["0 2 0 [0, 10]", "1 2 1 [0, 10]"]


# ------------------------------------------------------------------ what a run does with the others


def test_collectives(tmp_path):
    script = write_script(tmp_path / "script.py", """
        import dataclasses, hashlib, time, torch
        world = distributed.start(join_seconds=60, timeout_seconds=60)
        torch.manual_seed(world.rank)
        mine = torch.randn(105_003)
        parts = world.gather(mine)
        total = world.all_reduce(mine.clone())
        exact = sum(part.double() for part in parts)
        # n summands in float32: at most n-1 roundings, each of half a unit in the last place of a partial sum
        bound = sum(part.double().abs() for part in parts) * (world.size - 1) * 2 ** -24
        assert ((total - exact).abs() <= bound).all()
        digests = world.gather(hashlib.sha256(total.numpy()).hexdigest())
        assert len(set(digests)) == 1, "the ranks disagree on the bits of a sum"
        # Shares: as on CPUs, and by the calls that GPUs make, here over gloo.
        n = 35_001
        for place in (world, dataclasses.replace(world, device=torch.device("cuda"))):
            own = place.reduce_scatter(mine[:3 * n].clone())
            span = slice(n * world.rank, n * (world.rank + 1))
            assert ((own - exact[span]).abs() <= bound[span]).all()
            buffer = torch.zeros(3 * n)
            buffer[span] = own
            place.all_gather(buffer)
            assert torch.equal(buffer, torch.cat(world.gather(own)))
        gathered = world.gather_tensor(own)
        assert gathered is None if world.rank else torch.equal(gathered, buffer)
        assert torch.equal(world.broadcast(mine), parts[0])
        for coordinates in (0, 1, 3, 7, 9):
            shares = world.gather(world.share(coordinates))
            assert [k for share in shares for k in range(coordinates)[share]] == list(range(coordinates))
        assert world.gather({"rank": world.rank}) == [{"rank": rank} for rank in range(world.size)]
        if world.is_main:
            time.sleep(0.5)
            open(sys.argv[1], "w").close()
        world.barrier()
        assert os.path.exists(sys.argv[1]), "a rank passed the barrier before rank 0 did"
        world.close()
        """)
    for process in run_ranks(script, 3, tmp_path / "reached"):
        assert process.returncode == 0, process.stderr


def test_an_error_on_one_rank_stops_every_rank(tmp_path):
    """One rank's mistake ends them all with status 2 and is said once; a bug stays a bug; no error, no effect."""
    script = write_script(tmp_path / "script.py", """
        world = distributed.start(join_seconds=60, timeout_seconds=60)
        def fail(error):
            with world.raise_if_any_failed():
                if error is not None:
                    raise error
        fail(None)
        for raised in ({0: errors.UserError("first"), 1: errors.UserError("second")}, {1: KeyError("ours")}):
            try:
                fail(raised.get(world.rank))
            except Exception as error:
                print(f"{type(error).__name__}: {error}")
        fail(errors.UserError("--data: gone") if world.rank == 1 else None)
        """)
    processes = run_ranks(script, 2)
    assert [process.returncode for process in processes] == [2, 2]
    assert [process.stdout for process in processes] == [
        "UserError: first\nUserError: rank 1: 'ours'\n", "UserError: first\nKeyError: 'ours'\n"]
    said = [line for process in processes for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert said == ["error: rank 1: --data: gone"]


def test_alone_every_collective_is_the_identity():
    import torch

    from base.distributed import World
    world, values = World(), torch.randn(5)
    assert torch.equal(world.all_reduce(values.clone()), values) and torch.equal(world.broadcast(values), values)
    assert torch.equal(world.reduce_scatter(values), values) and world.gather_tensor(values) is values
    world.all_gather(values)
    assert world.gather("x") == ["x"] and world.is_main and world.share(5) == slice(0, 5)
    world.barrier()
    with world.raise_if_any_failed():
        pass
    with pytest.raises(errors.UserError, match="^wrong$"), world.raise_if_any_failed():
        raise errors.UserError("wrong")
    with pytest.raises(errors.UserError, match="^gone: No such"), world.raise_if_any_failed():
        open("gone")
    with pytest.raises(KeyError), world.raise_if_any_failed():
        raise KeyError("ours")
    world.close()
