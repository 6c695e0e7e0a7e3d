"""The folder of spoiled files, made once for all tests that read from it."""

import pathlib

import pytest

from helpers.spoiled_files import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> pathlib.Path:
    return make_world(tmp_path_factory.mktemp("world"))
