"""The processes of a job, and their collectives.

The launcher describes the job in the environment (`torchrun`, `torch.distributed.launch`, or Open MPI's variables under
`--platform k8s`). A process that plain `python` starts is alone and makes no process group. What is on
GPUs goes over NCCL, what is on CPUs over gloo.
"""

import atexit
import contextlib
import datetime
import hashlib
import os
import resource
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from base.device import read_back
from base.errors import UserError, fail
from base.memory import keep_memory

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
UNSET = "start with torchrun, or unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT"


@dataclass(frozen=True)
class World:
    """This process's rank among the processes of a job, and its device."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, buffer: Tensor) -> Tensor:
        """Sum `buffer` over the ranks, in place; every rank holds the same bits afterwards."""
        if self.size > 1:
            with self.collective_errors():
                dist.all_reduce(buffer)
        return buffer

    def share_length(self, coordinates: int) -> int:
        """n: so many coordinates over the number of ranks, rounded up."""
        return -(-coordinates // self.size)

    def share(self, coordinates: int) -> slice:
        """Which of so many coordinates this rank owns: runs of n, the last ones shorter or empty."""
        length = self.share_length(coordinates)
        return slice(min(length * self.rank, coordinates), min(length * (self.rank + 1), coordinates))

    def reduce_scatter(self, buffer: Tensor) -> Tensor:
        """Sum `buffer` (size x n,) over the ranks, which may change it. Rank k gets entries kn to (k + 1)n, (n,)."""
        n = len(buffer) // self.size
        if self.device.type == "cpu":  # gloo's own takes three times as long as its sum
            return self.all_reduce(buffer)[n * self.rank : n * (self.rank + 1)]
        own = buffer.new_empty(n)
        with self.collective_errors():
            dist.reduce_scatter_single(own, buffer)
        return own

    def all_gather(self, buffer: Tensor) -> None:
        """Of `buffer` (size x n,), rank k has entries kn to (k + 1)n; afterwards every rank has them all."""
        if self.size == 1:
            return
        parts = buffer.view(self.size, -1)
        with self.collective_errors():
            if self.device.type == "cpu":  # gloo's own takes five times as long as these
                for work in [dist.broadcast(part, src=rank, async_op=True) for rank, part in enumerate(parts)]:
                    work.wait()
            else:
                dist.all_gather_single(buffer, parts[self.rank])

    def gather_tensor(self, own: Tensor) -> Tensor | None:
        """The ranks' `own` (n,), one after the other (size x n,), on rank 0; None on the others."""
        if self.size == 1:
            return own
        whole = own.new_empty(self.size, len(own)) if self.is_main else None
        with self.collective_errors():
            dist.gather(own, None if whole is None else list(whole))
        return None if whole is None else whole.view(-1)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's values, on every rank, in place."""
        if self.size == 1:
            return tensor
        with self.collective_errors():
            dist.broadcast(tensor, src=0)
        return tensor

    def gather(self, value: object) -> list:
        """Every rank's value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        with self.collective_errors():
            dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def collective_errors(self) -> Iterator[None]:
        """Around a collective: UserError, in place of a traceback, where a rank died or did not answer in time."""
        try:
            yield
        except RuntimeError as error:
            mistake = UserError(
                f"rank {self.rank}: the job ends, another rank died or did not answer in time "
                f"({str(error).splitlines()[0][:200]}); the cause is in that rank's output"
            )
            mistake.elsewhere = True
            raise mistake from error

    def barrier(self) -> None:
        """Wait until every rank is here: reading the sum makes the process wait, not the GPU's stream alone."""
        read_back("barrier", self.all_reduce(torch.zeros(1, device=self.device)))

    @contextlib.contextmanager
    def raise_if_any_failed(self) -> Iterator[None]:
        """Around what each rank does by itself: an error on one rank is raised on all, so that none waits for another.

        The message of another rank than 0 begins with its number. The block must not contain a collective: the ranks
        meet at its end. An OSError becomes a UserError; any other exception keeps its traceback.
        """
        error: Exception | None = None
        try:
            yield
        except OSError as failure:
            if failure.strerror is None:
                error = failure
            else:
                error = UserError(f"{failure.filename or 'input/output'}: {failure.strerror}")
                error.__cause__ = failure
        except Exception as failure:
            error = failure
        messages = self.gather(None if error is None else str(error))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if not failed:
            return
        if error is not None and not isinstance(error, UserError):
            raise error
        first = failed[0]
        mistake = UserError(messages[first] if first == 0 else f"rank {first}: {messages[first]}")
        mistake.on_every_rank = True
        raise mistake from error

    def peak_memory(self) -> int:
        """The most bytes that a rank has used so far: allocated on its GPU, or resident without one. Collective."""
        if self.device.type == "cuda":
            return max(self.gather(torch.cuda.max_memory_allocated(self.device)))
        return max(self.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))  # Linux counts in KiB

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def environment_world(platform: str, local_rank_flag: int | None) -> tuple[int, int, int]:
    """(rank, world size, local rank) from the launcher's environment; (0, 1, 0) where there is no launcher."""
    if platform == "k8s":
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
        absent = [name for name in names if name not in os.environ]
        if absent:
            fail(f"--platform k8s: {absent[0]} is not set; start with Open MPI's mpirun, or use --platform local")
        rank, size, local = (integer(name) for name in names)
        if not 0 <= rank < size:
            fail(f"--platform k8s: {names[0]}={rank} with {names[1]}={size}: expected 0 <= rank < size")
        return rank, size, local
    given = [name for name in LAUNCHER_VARIABLES if name in os.environ]
    if "RANK" not in given and "WORLD_SIZE" not in given:
        return 0, 1, 0
    for name in LAUNCHER_VARIABLES:
        if name not in given:
            fail(f"environment: {given[0]} is set but {name} is not: a stale environment; {UNSET}")
    rank, size = integer("RANK"), integer("WORLD_SIZE")
    if not 0 <= rank < size:
        fail(f"environment: RANK={rank} with WORLD_SIZE={size}: expected 0 <= RANK < WORLD_SIZE; {UNSET}")
    if "LOCAL_RANK" in os.environ:
        return rank, size, integer("LOCAL_RANK")
    return rank, size, rank if local_rank_flag is None else local_rank_flag


def integer(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        fail(f"environment: {name}={os.environ[name]!r}: expected a whole number; {UNSET}")


def meeting_point(rank: int, agent_store: bool) -> tuple[str, int]:
    """(MASTER_ADDR, MASTER_PORT); fails at once where nobody could meet there, instead of after a time-out."""
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = integer("MASTER_PORT") if "MASTER_PORT" in os.environ else 29500
    where = f"environment: MASTER_ADDR={address} MASTER_PORT={port}"
    if not 0 < port < 65536:
        fail(f"{where}: expected a port from 1 to 65535; {UNSET}")
    try:
        socket.getaddrinfo(address, port)
    except (OSError, UnicodeError) as error:
        fail(f"{where}: no such host ({getattr(error, 'strerror', None) or error}); {UNSET}")
    if rank == 0 and not agent_store:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))  # every interface, as the store does: the address may be a service's, not ours
            except OSError as error:
                fail(f"{where}: {error.strerror}; choose another --master_port, or end the run that holds it")
    return address, port


def open_store(address: str, port: int, size: int, is_master: bool, seconds: float) -> dist.Store:
    """The key-value store at which the ranks meet; fails when they have not all come after `seconds`.

    It connects in a separate thread. torch's client waits for ever where another program answers on the port, and
    prints pages of C++ frames where its own time-out is reached.
    """
    outcome: list[dist.Store | Exception] = []

    def connect() -> None:
        try:
            outcome.append(
                dist.TCPStore(
                    address,
                    port,
                    size,
                    is_master=is_master,
                    multi_tenant=True,
                    timeout=datetime.timedelta(seconds=seconds + 60),
                )
            )
        except (RuntimeError, ValueError) as error:  # DistStoreError and DistNetworkError are RuntimeErrors
            outcome.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome or isinstance(outcome[0], Exception):
        reason = f" ({str(outcome[0]).splitlines()[0][:160]})" if outcome else ""
        fail(
            f"environment: {size} processes did not meet at MASTER_ADDR={address} MASTER_PORT={port} within "
            f"{seconds:g} s{reason}; is WORLD_SIZE stale? {UNSET}"
        )
    return outcome[0]


def meeting_name(store: dist.Store, rank: int, size: int, seconds: float) -> str:
    """A name for this meeting of the ranks that no other had; RuntimeError where not all have come after `seconds`.

    torchrun's agent keeps its store when it starts its workers again, with the keys of those before, and its
    TORCHELASTIC_RESTART_COUNT does not distinguish the meetings: after a machine was lost, it differs between the other
    machines and the replacement. So each rank writes a random word, and the ranks have met when all have seen the same
    words. The word of a dead process is never confirmed.
    """
    store.set(f"word/{rank}", secrets.token_hex(8))
    words, deadline = [f"word/{other}" for other in range(size)], time.monotonic() + seconds
    while time.monotonic() < deadline:
        if store.check(words):
            name = hashlib.sha256(b" ".join(store.multi_get(words))).hexdigest()[:16]
            store.set(f"seen/{name}/{rank}", "")
            if store.check([f"seen/{name}/{other}" for other in range(size)]):
                return name
        time.sleep(0.05)
    raise RuntimeError(f"not all of them were there at one time within {seconds:g} s")


def job_name() -> str | None:
    """The name that torchrun gives all workers of a job, those that it starts again included; None where it has none.

    It is --rdzv_id, or drawn at random under --standalone.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" or "RANK" not in os.environ else name


def start(
    platform: str = "local", local_rank_flag: int | None = None, timeout_seconds: float = 600, join_seconds: float = 120
) -> World:
    """Join the job that the environment describes.

    timeout_seconds: how long a collective waits for the other ranks before the job ends
    join_seconds: how long to wait for the other ranks to appear
    Raises UserError for a stale or contradictory environment, a busy port, ranks that do not appear.
    """
    if not 0 < timeout_seconds < 1e9:
        fail(f"--collective_timeout {timeout_seconds:g}: expected seconds above 0 and below 1e+09")
    if platform not in ("local", "k8s"):
        fail(f"--platform {platform}: expected local or k8s (Azure's and Philly's launchers are not supported)")
    rank, size, local_rank = environment_world(platform, local_rank_flag)
    if torch.cuda.is_available():
        if not 0 <= local_rank < torch.cuda.device_count():
            fail(f"--nproc_per_node: local rank {local_rank} has no GPU, this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        keep_memory()
    if size == 1:
        return World(device=device)
    # torchrun's agent holds its own store on the port and lets the workers share it
    agent_store = platform == "local" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = meeting_point(rank, agent_store)
    store = open_store(address, port, size, is_master=rank == 0 and not agent_store, seconds=join_seconds)
    try:
        name = meeting_name(store, rank, size, join_seconds)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            rank=rank,
            world_size=size,
            store=dist.PrefixStore(name, store),
            timeout=datetime.timedelta(seconds=timeout_seconds),
        )
    except (RuntimeError, ValueError) as error:
        fail(
            f"environment: the {size} processes met at MASTER_ADDR={address} MASTER_PORT={port} but cannot talk to "
            f"each other ({str(error).splitlines()[0][:160]})"
        )
    world = World(rank, size, local_rank, device)
    atexit.register(world.close)  # a group left open can abort the process as it ends, and hide its exit status
    return world
