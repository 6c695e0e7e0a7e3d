"""scripts/quickstart.sh: both of its tables, and a signal that reaches the one that runs."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from helpers.processes import ROOT, until

VENV = 'cd "$(dirname "${BASH_SOURCE[0]}")/.."\ninstall_requirements() { :; }\n'
# A table that trains nothing: it waits where the file `wait` stands, fails where `fail` does, and writes what stops it.
TABLE = """
import pathlib, signal, sys, time
def stop(number, frame):
    for each in signals:
        signal.signal(each, signal.SIG_IGN)
    pathlib.Path("stopped").write_text(signal.Signals(number).name)
    sys.exit(128 + number)
signals = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
           if signal.getsignal(number) is not signal.SIG_IGN]
for number in signals:
    signal.signal(number, stop)
with open("arguments", "a") as out:
    print(*sys.argv[1:], file=out)
while pathlib.Path("wait").exists():
    time.sleep(0.05)
sys.exit(2 if pathlib.Path("fail").exists() else 0)
"""


def start(folder: pathlib.Path) -> subprocess.Popen:
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/quickstart.sh", folder / "scripts")
    (folder / "scripts/venv.sh").write_text(VENV)
    (folder / "scripts/e2e_table.sh").write_text(f'exec {sys.executable} table.py "$@"\n')
    (folder / "table.py").write_text(TABLE)
    return subprocess.Popen(["bash", "scripts/quickstart.sh"], cwd=folder, start_new_session=True)


def begun(folder: pathlib.Path) -> list[str]:
    """The arguments of each table."""
    return (folder / "arguments").read_text().splitlines() if (folder / "arguments").exists() else []


def test_two_tables_one_after_the_other(tmp_path):
    assert start(tmp_path).wait(20) == 0
    first, second = begun(tmp_path)
    assert "--epsilon 0 3 8 inf pretrained_checkpoints/demo --" in first
    assert "--epsilon 8 pretrained_checkpoints/demo-llama --" in second and second.endswith("--max_epoch 2")


def test_nothing_follows_a_table_that_failed(tmp_path):
    (tmp_path / "fail").touch()
    assert start(tmp_path).wait(20) == 2 and len(begun(tmp_path)) == 1


@pytest.mark.parametrize("to_all", [False, True], ids=["to the script", "to all"])  # as Ctrl-C
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_first_table_and_nothing_follows(tmp_path, number, to_all):
    (tmp_path / "wait").touch()
    script = start(tmp_path)
    try:
        until(lambda: begun(tmp_path), 20)
        (os.killpg if to_all else os.kill)(script.pid, number)
        assert script.wait(20) == 128 + number
        assert (tmp_path / "stopped").read_text() == number.name and len(begun(tmp_path)) == 1
    finally:
        (tmp_path / "wait").unlink()  # nothing is left running
