"""Paths for all tests: the modules of src/, and the reference material that lies beside a developer's checkout."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT / "src"))
sys.path.insert(0, str(ROOT / "tests"))
sys.path.append(str(ROOT / "scripts"))
import start  # noqa: E402, F401  puts the folders below scripts/ on the path


@pytest.fixture
def shared() -> pathlib.Path:
    """The folder of reference material; the test is skipped where it is absent."""
    if not (SHARED / "README.md").exists():
        pytest.skip("needs the reference material in ../shared, which this machine does not have")
    return SHARED


def run_script(*arguments: object, cwd: pathlib.Path = ROOT, timeout: float = 300,
               **options) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` and return the finished process with its text output."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, timeout=timeout, capture_output=True, text=True, **options)


def assert_user_error(process: subprocess.CompletedProcess, *words: str) -> None:
    """The process ended as a user's mistake must: status 2, one line on standard error that holds all `words`."""
    assert process.returncode == 2, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in process.stderr, process.stderr
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"
