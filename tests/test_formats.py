"""Formats: every file says which one it has, those of earlier versions still read, an unknown one is refused by name."""

import pytest

from base.errors import UserError
from base.files import check_format


@pytest.mark.parametrize("found, number", [(None, 1), (1, 1), (2, 2), (3, 3)])
def test_a_known_format_is_its_number(found, number):
    assert check_format(found, 3, "file") == number


@pytest.mark.parametrize("found", [4, 10**30, 0, -1, True, 2.0, "2", [2], {}])
def test_an_unknown_format_is_refused_by_name(found):
    with pytest.raises(UserError, match="^some/file:7: format ") as caught:
        check_format(found, 3, "some/file:7")
    message = str(caught.value)
    assert repr(found) in message and "\n" not in message
    assert ("newer than this version reads (3); use the version that wrote it" in message) == (found in (4, 10**30))
