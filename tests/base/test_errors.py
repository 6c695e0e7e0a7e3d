"""A mistake of a user is one line and status 2, a bug of ours keeps its traceback."""

import subprocess
import sys

import pytest

from helpers.processes import assert_user_error, run_script, write_script


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
        process = run_script(write_script(tmp_path / "script.py", raised))
        assert process.returncode == 1 and "Traceback" in process.stderr


def test_a_closed_pipe_is_no_traceback(tmp_path):
    script = write_script(tmp_path / "script.py", "for i in range(100000): print(i)")
    process = subprocess.run(f"{sys.executable} {script} | head -1; exit ${{PIPESTATUS[0]}}", shell=True, text=True,
                             executable="/bin/bash", capture_output=True)
    assert process.returncode == 141 and process.stderr == "" and process.stdout == "0\n"
