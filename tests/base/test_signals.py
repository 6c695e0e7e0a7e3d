"""Signals outside of the step loop: what was open is unwound, the status is 128 + n, nohup is kept to."""

import signal
import subprocess
import sys

import pytest

from helpers.processes import ROOT, environment, write_script

AGENT = {"TORCHELASTIC_RUN_ID": "job", "RANK": "0"}
WAITS = """
with files.atomic_write(sys.argv[1]) as out:
    print("ready", flush=True)
    import time
    time.sleep(60)
"""


def asked(command: list, *numbers: int, ignored: tuple = (), **more: str) -> tuple[int, str]:
    """(status, standard error) of a process that gets the signals, in turn, when it has said that it is ready."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment(**more), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN) for number in ignored])
    assert process.stdout.readline() == "ready\n"
    for number in numbers:
        process.send_signal(number)
    _, err = process.communicate(timeout=30)
    return process.returncode, err


HUP, TERM = signal.SIGHUP, signal.SIGTERM


@pytest.mark.parametrize("ignored, more, numbers, status", [
    ((), {}, (HUP,), 129), ((), {}, (signal.SIGINT,), 130), ((), {}, (TERM,), 143), ((), {}, (signal.SIGUSR2,), 140),
    ((HUP,), {}, (HUP, TERM), 143),  # nohup
    ((HUP,), AGENT, (HUP,), 129),  # nohup torchrun
    ((HUP,), {**AGENT, "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT"}, (HUP, TERM), 143),
])
def test_asked_to_end(tmp_path, ignored, more, numbers, status):
    script = write_script(tmp_path / "script.py", WAITS, "errors, files")
    assert asked([script, tmp_path / "out"], *numbers, ignored=ignored, **more) == (status, "")
    assert [path.name for path in tmp_path.iterdir() if path != script] == []


@pytest.mark.parametrize("number, ignored, more", [(signal.SIGINT, (), {}), (HUP, (), {}), (HUP, (HUP,), AGENT)])
def test_asked_to_end_during_the_imports(tmp_path, number, ignored, more):
    (tmp_path / "script.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\nimport base.early\n"
                                        "print('ready', flush=True)\nimport time; time.sleep(60)\n")
    assert asked([tmp_path / "script.py"], number, ignored=ignored, **more) == (-number, "")


SCRIPTS = [path for path in sorted((ROOT / "src").glob("*.py")) if "run_main(main" in path.read_text()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slow_imports_come_after(script):
    """A converter's take 0.3 s, in which Ctrl-C gave Python's traceback."""
    lines = script.read_text().splitlines()
    assert next(line for line in lines if line.startswith(("import ", "from "))).startswith("import base.early ")
