"""Standard streams that are closed, broken, full, or of another encoding."""

import subprocess
import sys

import pytest

from helpers.processes import environment, write_script


def shell(script, redirected: str, **more) -> subprocess.CompletedProcess:
    command = f"{sys.executable} {script} {redirected}"
    return subprocess.run(["bash", "-c", command], env=environment(**more), text=True, capture_output=True, timeout=60)


def test_a_closed_stream_is_no_file_of_ours(tmp_path):
    """What C code prints to a stream that was closed does not land in the file that was opened next."""
    script = write_script(tmp_path / "script.py", f"""
        handle = os.open({str(tmp_path / 'ledger')!r}, os.O_WRONLY | os.O_CREAT)
        os.write(handle, b"record")
        os.write(1, b"of C"), os.write(2, b"of C")
        print("text"), print("text", file=sys.stderr)
        return 5""", "errors")
    done = shell(script, "<&- >&- 2>&-")
    assert done.returncode == 5 and (tmp_path / "ledger").read_bytes() == b"record"


@pytest.mark.parametrize("redirected", ["> /dev/full", "2> /dev/full", ">&-", "> /dev/full 2>&1"])
def test_a_training_goes_on_without_its_streams(tmp_path, redirected):
    body = f"""
        for stream in (sys.stdout, sys.stderr):
            print("text " * 9999, file=stream, flush=True)
        open({str(tmp_path / 'saved')!r}, "w").close()
        return 7"""
    script = write_script(tmp_path / "script.py", body, "errors", lasting=True)
    assert shell(script, redirected).returncode == 7 and (tmp_path / "saved").exists()


def test_a_training_whose_reader_goes_away(tmp_path):
    script = write_script(tmp_path / "script.py", f"""
        for number in range(100000): print(number)
        open({str(tmp_path / 'saved')!r}, "w").close()""", "errors", lasting=True)
    done = shell(script, "| head -1; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "") and (tmp_path / "saved").exists()


@pytest.mark.parametrize("redirected, status", [("> /dev/full", 2), ("2> /dev/full", 2), ("2>&-", 2)])
def test_the_status_is_kept(tmp_path, redirected, status):
    """Of a script that is no training: what it prints is what it is for."""
    script = write_script(tmp_path / "script.py", "print('scores')\n"
                          "if os.readlink('/proc/self/fd/1') != '/dev/full': errors.fail('--x')", "errors")
    done = shell(script, redirected)
    assert done.returncode == status and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("more", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
                                  {"PYTHONIOENCODING": "ascii"}])
def test_a_character_that_the_encoding_lacks(tmp_path, more):
    script = write_script(tmp_path / "script.py", "print('Zażółć')\nerrors.fail('--data Zażółć: missing')", "errors")
    done = shell(script, "", **more)
    assert done.returncode == 2 and done.stdout.startswith("Za") and done.stderr.startswith("error: --data Za")


def test_a_closed_stream_is_closed_to_no_child(tmp_path):
    """A program that this one starts has /dev/null there, too."""
    body = f"""
        import subprocess
        with open({str(tmp_path / 'out')!r}, "w") as out:
            return subprocess.run(["readlink", "/proc/self/fd/1"], stderr=out).returncode"""
    script = write_script(tmp_path / "script.py", body, "errors")
    assert shell(script, ">&-").returncode == 0 and (tmp_path / "out").read_text() == ""
