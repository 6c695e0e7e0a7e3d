"""Where the repository lies, and how tests run its scripts: processes, their environments, ports, a user's mistake."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import textwrap
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", "GROUP_RANK",
            "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")


def run_script(*arguments: object, cwd: pathlib.Path = ROOT, timeout: float = 300,
               **options) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` and return the finished process with its text output."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, timeout=timeout, capture_output=True, text=True, **options)


def fresh_copy(folder: pathlib.Path) -> pathlib.Path:
    """scripts/ and src/ alone, as a clone without any download has them."""
    for name in ("scripts", "src"):
        shutil.copytree(ROOT / name, folder / "clone" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "clone"


def bash(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *map(str, arguments)], capture_output=True, text=True, timeout=120, **options)


def write_script(path: pathlib.Path, body: str, modules: str = "distributed, errors, files",
                 lasting: bool = False) -> pathlib.Path:
    """A script with src/ on its path whose main() is `body`; of `modules`, distributed imports torch for seconds."""
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT / 'src')!r})\nimport os\nfrom base import {modules}\n"
                    f"def main():\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
                    f"errors.run_main(main, {lasting})\n")
    return path


def assert_user_error(process: subprocess.CompletedProcess, *words: str) -> None:
    """The process ended as a user's mistake must: status 2, one line on standard error that holds all `words`."""
    assert process.returncode == 2, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in process.stderr, process.stderr
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"


def environment(**more: object) -> dict[str, str]:
    """This process's environment without a launcher's variables, without GPUs, one thread a process."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER
            and not name.startswith("TORCHELASTIC")}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            **{name: str(value) for name, value in more.items()}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environments(size: int) -> list[dict[str, object]]:
    """What a launcher gives to each of `size` ranks that meet on a free port; nothing to a process alone."""
    port = free_port()
    return [{}] if size == 1 else [{"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1",
                                    "MASTER_PORT": port} for rank in range(size)]


def children(pid: int) -> list[int]:
    return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
