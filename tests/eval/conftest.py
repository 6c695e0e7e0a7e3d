"""What the tests of the scorers ask for."""

import pytest

import java


@pytest.fixture(scope="module")
def meteor():
    """One METEOR for all tests of a file: it takes seconds to start."""
    with java.Meteor(patience=200) as program:
        yield program
