"""What every test may ask for. pyproject.toml says from which folders modules are imported."""

import pathlib

import pytest

from helpers.processes import SHARED


@pytest.fixture
def shared() -> pathlib.Path:
    """The folder of reference material, which lies beside a developer's checkout; the test is skipped without it."""
    if not (SHARED / "README.md").exists():
        pytest.skip("needs the reference material in ../shared, which this machine does not have")
    return SHARED
