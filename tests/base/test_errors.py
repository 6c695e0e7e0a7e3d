"""A mistake of a user is one line and status 2, a bug of ours keeps its traceback."""

import subprocess
import sys
import time

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from helpers.processes import assert_user_error, environment, run_script, write_script


@pytest.mark.parametrize("raised, words", [
    ("errors.fail('--lr x: expected a number\\nand this')", "--lr x: expected a number and this"),
    ("open('/no/such/file')", "/no/such/file: No such file or directory"),
    ("raise OSError(28, 'No space left on device')", "No space left on device"),
    ("with open('/dev/full', 'w') as f: f.write('x')", "No space left on device"),
])
def test_a_mistake_is_one_line_and_status_2(tmp_path, raised, words):
    assert_user_error(run_script(write_script(tmp_path / "script.py", raised)), words)


def test_a_bug_of_ours_keeps_its_traceback(tmp_path):
    for raised in ("raise ValueError('ours')", "raise OSError('without a number')"):
        process = run_script(write_script(tmp_path / "script.py", raised, "errors"))
        assert process.returncode == 1 and "Traceback" in process.stderr


def test_a_closed_pipe_is_no_traceback(tmp_path):
    script = write_script(tmp_path / "script.py", "for i in range(100000): print(i)", "errors")
    process = subprocess.run(f"{sys.executable} {script} | head -1; exit ${{PIPESTATUS[0]}}", shell=True, text=True,
                             executable="/bin/bash", capture_output=True)
    assert process.returncode == 141 and process.stderr == "" and process.stdout == "0\n"


@pytest.mark.parametrize("raised, words", [
    ("errors.fail('--lr x: expected a number')", "error: --lr x: expected a number"),
    ("open('/no/such/file')", "error: /no/such/file: No such file or directory"),
    ("mistake = errors.UserError('--a'); mistake.on_every_rank = True; raise mistake", "error: --a"),
    ("raise ValueError('ours')", "ValueError: ours"),
    ("mistake = errors.UserError('--a'); mistake.elsewhere = True; raise mistake", None),
    ("return 3", None),
])
def test_the_launcher_is_told_the_reason(tmp_path, raised, words):
    """As torch's own reader of the file finds it, which makes torchrun's last lines."""
    path = tmp_path / "error.json"
    run_script(write_script(tmp_path / "script.py", raised, "errors"),
               env=environment(RANK=1, TORCHELASTIC_ERROR_FILE=path))
    if words is None:
        assert not path.exists()
        return
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file=str(path))
    shown = ChildFailedError("script", {1: failure}).format_msg()
    assert failure.message["message"] == words and words in shown.partition("Root Cause")[2]
    assert abs(failure.timestamp - time.time()) < 60
