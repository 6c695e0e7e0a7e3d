"""What the scorers' processes share: a Java of each run's own, and standard streams that may be gone."""

import subprocess
import sys

import pytest

from helpers.processes import ROOT

SCRIPT = ROOT / "eval" / "e2e" / "measure_scores.py"


def test_two_runs_at_once(tmp_path):
    """Two tokenizers side by side do not see each other's files."""
    texts = [[f"text {i} of run {run} ." for i in range(50)] for run in range(2)]
    code = "import sys; sys.path.insert(0, sys.argv[1]); import java; print(java.tokenize_ptb([sys.argv[2:]], 200)[0])"
    command = [sys.executable, "-c", code, str(ROOT / "eval" / "e2e")]
    runs = [subprocess.Popen([*command, *lines], stdout=subprocess.PIPE, text=True) for lines in texts]
    for run, lines in zip(runs, texts, strict=True):
        assert run.communicate(timeout=100)[0].strip() == str([line.removesuffix(" .") for line in lines])


@pytest.mark.parametrize("redirected, status", [(">&- 2>&-", 2), ("> /dev/full", 2)])
def test_without_standard_streams(tmp_path, redirected, status):
    command = f"{sys.executable} {SCRIPT} {tmp_path}/none {tmp_path}/none {redirected}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == status and "Traceback" not in done.stderr
