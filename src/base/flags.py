"""The argument parser of every script, and the checks of its flags' values."""

import argparse
import math
import os
from typing import NoReturn

from base.errors import UserError, fail


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and reports a mistake in one line."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        mistake = UserError(f"{message}; see --help")
        mistake.on_every_rank = True
        raise mistake


def check_least(flags: object, **least: int) -> None:
    """Raise UserError for a flag, an attribute of `flags`, below its least value. None, not given, passes; so below."""
    for name, bound in least.items():
        if (value := getattr(flags, name)) is not None and value < bound:
            fail(f"--{name} {value}: expected at least {bound}")


def check_range(flags: object, **bounds: tuple[float, float]) -> None:
    """Raise UserError for a flag that is not in its [low, high)."""
    for name, (low, high) in bounds.items():
        if (value := getattr(flags, name)) is not None and not low <= value < high:
            fail(f"--{name} {value:g}: expected a number from {low} to below {high:g}")


def check_positive(flags: object, **most: float) -> None:
    """Raise UserError for a flag that is not above 0, or above its most (math.inf: it may be any finite number)."""
    for name, bound in most.items():
        if (value := getattr(flags, name)) is not None and not (0 < value <= bound and value < math.inf):
            limit = f", at most {bound:g}" if bound < math.inf else ""
            fail(f"--{name} {value:g}: expected a number above 0{limit}")


def check_output(output: str, source: str, flag: str = "OUT") -> None:
    """Raise UserError where `output`, named by `flag`, is the file that is read."""
    if os.path.realpath(output) == os.path.realpath(source):
        fail(f"{flag} {output}: is the input itself, which would be lost; name another file")
