"""Flags: the parser of every script, the checks of their values, and settings classes whose fields are flags."""

import argparse
import dataclasses
import math
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from base.errors import UserError, fail


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and reports a mistake in one line.

    A value that is a text, and the default of one, may begin with ~ or ~user: it is a path in a home folder. The shell
    does not expand it behind `=`, in quotes or in an environment variable.
    """

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self.register("type", None, os.path.expanduser)  # what is done with the flags that have no type

    def error(self, message: str) -> NoReturn:
        mistake = UserError(f"{message}; see --help")
        mistake.on_every_rank = True
        raise mistake


# ---------------------------------------------------------------- checks; None, a flag that was not given, passes them


def check_least(flags: object, **least: int) -> None:
    """Raise UserError for a flag, an attribute of `flags`, below its least value."""
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


# ---------------------------------------------------------------- settings classes

REQUIRED = dataclasses.MISSING


@dataclass(frozen=True)
class Flag:
    """What is known of a flag beside its default.

    names: of the flag, the first one is its key; none: the field's name. least, within [low, high), positive (0, most]:
    its range. may_change: a resumed run may differ in it. boolean: takes "true" or "false" behind it, or nothing for
    true. options: further ones of argparse, such as choices.
    """

    names: tuple[str, ...] = ()
    help: str | None = None
    least: int | None = None
    within: tuple[float, float] | None = None
    positive: float | None = None
    may_change: bool = False
    boolean: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def check(self, values: argparse.Namespace, name: str) -> None:
        """Raise UserError where the value is out of its range."""
        if self.least is not None:
            check_least(values, **{name: self.least})
        if self.within is not None:
            check_range(values, **{name: self.within})
        if self.positive is not None:
            check_positive(values, **{name: self.positive})


def flag(default: object = None, help: str | None = None, **known) -> Any:
    """A field of a settings class that is a flag; known: the attributes of Flag, or options of argparse."""
    own = {name: known.pop(name) for name in list(known) if name in Flag.__dataclass_fields__}
    return field(default=default, metadata={"flag": Flag(help=help, options=known, **own)})


def spelled(*names: str, **changed: object) -> dict[str, Any]:
    """How a script spells a field of a shared settings class: its names, and further arguments of flag()."""
    return {"names": names, **changed} if names else changed


def read_boolean(text: str) -> bool:
    """True for true, yes, 1 and the like, as Hugging Face's argument parser takes them."""
    for value, words in ((True, ("true", "yes", "t", "y", "1")), (False, ("false", "no", "f", "n", "0"))):
        if text.lower() in words:
            return value
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def value_type(hint: Any) -> type:
    """bool, int, float or str: of a value, where `hint` is that, or it or None, or a tuple of such."""
    inside = [value_type(part) for part in typing.get_args(hint) if part not in (type(None), ...)]
    return inside[0] if inside else hint


@dataclass(frozen=True)
class Given:
    """The flags of a command line, by the names that its script gives them."""

    values: dict[str, Any]
    flags: dict[str, Flag]
    names: dict[str, str]  # field of a settings class -> name
    named: frozenset[str]  # the flags that stand on the command line
    defaults: dict[str, Any]

    def check_ranges(self) -> None:
        """Raise UserError for the first value that is out of its flag's range."""
        for name, known in self.flags.items():
            known.check(argparse.Namespace(**self.values), name)

    @property
    def may_change(self) -> set[str]:
        """The flags in which a resumed run may differ."""
        return {name for name, known in self.flags.items() if known.may_change}


class SettingsParser(Parser):
    """A parser whose flags are the fields of settings classes, which are frozen dataclasses with flag() as defaults."""

    def __init__(
        self,
        sections: Mapping[str, type],
        script: Mapping[str, dict] | None = None,
        fixed: Mapping[str, object] | None = None,
        left_out: Sequence[str] = (),
        unit: str = "unit",
        **options,
    ):
        """sections: title -> class. script: field -> spelled(). fixed: field -> its value, where it is no flag here.
        left_out: fields that are no flags here and keep their default. unit: the word for {unit} in a help text."""
        super().__init__(**options)
        self.sections, self.script, self.fixed, self.unit = sections, script or {}, fixed or {}, unit
        self.flags: dict[str, Flag] = {}
        self.names: dict[str, str] = {}
        self.defaults: dict[str, Any] = {}
        for title, kind in sections.items():
            group = self.add_argument_group(title)
            for one in dataclasses.fields(kind):
                if "flag" in one.metadata and one.name not in {*self.fixed, *left_out}:
                    self.add_field(group, one, typing.get_type_hints(kind)[one.name])

    def add_field(self, group: argparse._ArgumentGroup, one: dataclasses.Field, hint: object) -> None:
        changed, known = dict(self.script.get(one.name, {})), one.metadata["flag"]
        default = changed.pop("default", one.default)
        own = {name: changed.pop(name) for name in list(changed) if name in Flag.__dataclass_fields__}
        known = dataclasses.replace(known, options={**known.options, **changed}, **own)
        names = known.names or (one.name,)
        text = known.help and known.help.replace("{unit}", self.unit)
        options = {"help": text, "dest": names[0], "default": default, **known.options}
        kind = value_type(hint)
        if kind is bool and known.boolean:
            options |= {"type": read_boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
        elif kind is bool:
            options["action"] = "store_true"
        elif kind is not str:
            options["type"] = kind
        if default is REQUIRED:
            options |= {"required": True, "default": None}
        group.add_argument(*(f"--{name}" for name in names), **options)
        self.defaults[names[0]] = options["default"]
        self.flags[names[0]], self.names[one.name] = known, names[0]

    def parse_settings(self, words: list[str]) -> tuple[Any, ...]:
        """(the flags by name, the settings of each section). Ranges are not checked: Given.check_ranges() does."""
        values = vars(self.parse_args(words))
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        found = []
        for kind in self.sections.values():
            fields = {one.name for one in dataclasses.fields(kind)}
            own = {name: self.fixed[name] for name in fields & self.fixed.keys()}
            own |= {name: values[self.names[name]] for name in fields & self.names.keys()}
            found.append(kind(**own))
        spellings = {word.partition("=")[0] for word in words}
        named = frozenset(
            name
            for name, known in self.flags.items()
            if spellings & {f"--{spelling}" for spelling in known.names or (name,)}
        )
        return Given(values, self.flags, self.names, named, self.defaults), *found
