"""What every test may ask for. pyproject.toml says from which folders modules are imported."""

import pathlib
import signal

import pytest

from helpers.processes import SHARED

# Tests send SIGHUP to what they start; under nohup all of it would ignore the signal.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def shared() -> pathlib.Path:
    """The folder of reference material, which lies beside a developer's checkout; the test is skipped without it."""
    if not (SHARED / "README.md").exists():
        pytest.skip("needs the reference material in ../shared, which this machine does not have")
    return SHARED
