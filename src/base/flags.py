"""Command lines: the parser of every script, the checks of flags, and settings classes whose fields are flags."""

import argparse
import dataclasses
import math
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from base.errors import fail


def given_text(value: str) -> str:
    """The text of a flag, which is perhaps a path in a home folder. An empty one is refused: it is not the absence of
    the flag, and as a path it has no name to be told by."""
    if not value:
        raise argparse.ArgumentTypeError("is empty; is a variable of the shell not set? Give a value, or leave it out")
    return os.path.expanduser(value)


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and reports a mistake in one line.

    A value that is a text, and the default of one, may begin with ~ or ~user: it is a path in a home folder. The shell
    does not expand it behind `=`, in quotes or in an environment variable.
    """

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self.register("type", None, given_text)  # what is done with the flags that have no type

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see --help", on_every_rank=True)


# ---------------------------------------------------------------- checks; they accept None, a flag that was not given


def check_least(flags: object, **least: int) -> None:
    """Raise UserError for an attribute of `flags` that is below its least value. least: name -> that value."""
    for name, bound in least.items():
        if (value := getattr(flags, name)) is not None and value < bound:
            fail(f"--{name} {value}: expected at least {bound}")


def check_range(flags: object, **bounds: tuple[float, float]) -> None:
    """Raise UserError for an attribute of `flags` that is not in its interval [low, high). bounds: name -> interval."""
    for name, (low, high) in bounds.items():
        if (value := getattr(flags, name)) is not None and not low <= value < high:
            fail(f"--{name} {value:g}: expected a number from {low} to below {high:g}")


def check_positive(flags: object, **most: float) -> None:
    """Raise UserError for an attribute of `flags` that is not in (0, most]. math.inf permits any finite number."""
    for name, bound in most.items():
        if (value := getattr(flags, name)) is not None and not (0 < value <= bound and value < math.inf):
            limit = f", at most {bound:g}" if bound < math.inf else ""
            fail(f"--{name} {value:g}: expected a number above 0{limit}")


def check_output(output: str, source: str, flag: str = "OUT") -> None:
    """Raise UserError where the output file, which `flag` names, is the input file."""
    if os.path.realpath(output) == os.path.realpath(source):
        fail(f"{flag} {output}: is the input itself, which would be lost; name another file")


# ---------------------------------------------------------------- settings classes

REQUIRED = dataclasses.MISSING


@dataclass(frozen=True)
class Flag:
    """A flag without its default, which the field of the settings class has.

    names       spellings of the flag, of which args.json holds the first; by default the field's name
    least, within, positive     its range: at least `least`; within [low, high); above 0 and at most `positive`
    may_change  a resumed run may differ in it
    boolean     it may be followed by true or false; alone it means true
    options     further arguments of argparse, such as choices
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


def flag(default: object = None, help: str | None = None, **attributes) -> Any:
    """A field of a settings class that is a flag. attributes: of Flag, or arguments of argparse."""
    return field(default=default, metadata={"flag": changed_flag(Flag(help=help), attributes)})


def changed_flag(known: Flag, attributes: Mapping[str, Any]) -> Flag:
    """`known` with other attributes; those that Flag does not have are arguments of argparse."""
    ours = {name: value for name, value in attributes.items() if name in Flag.__dataclass_fields__}
    options = {name: value for name, value in attributes.items() if name not in ours}
    return dataclasses.replace(known, options={**known.options, **options}, **ours)


def spelled(*names: str, **changed: object) -> dict[str, Any]:
    """What a script changes in a flag of a shared settings class: its names, and other arguments of flag()."""
    return {"names": names, **changed} if names else changed


def read_boolean(text: str) -> bool:
    """True for true, yes, 1 and the like, as Hugging Face's argument parser takes them."""
    for value, words in ((True, ("true", "yes", "t", "y", "1")), (False, ("false", "no", "f", "n", "0"))):
        if text.lower() in words:
            return value
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def value_type(hint: Any) -> type:
    """The type of a flag's value: bool, int, float or str, from the hint T, T | None or tuple[T, ...]."""
    inside = [value_type(part) for part in typing.get_args(hint) if part not in (type(None), ...)]
    return inside[0] if inside else hint


@dataclass(frozen=True)
class Given:
    """The flags of a command line, by the names that its script gives them."""

    values: dict[str, Any]
    flags: dict[str, Flag]
    names: dict[str, str]  # field of a settings class -> the flag's name
    explicit: frozenset[str]  # the flags that stand on the command line
    defaults: dict[str, Any]

    def check_ranges(self) -> None:
        """Raise UserError for the first value that is out of its flag's range."""
        values = argparse.Namespace(**self.values)
        for name, known in self.flags.items():
            known.check(values, name)

    @property
    def may_change(self) -> set[str]:
        """The flags in which a resumed run may differ."""
        return {name for name, known in self.flags.items() if known.may_change}


class SettingsParser(Parser):
    """A parser whose flags are the fields of settings classes, which are frozen dataclasses with flag() as defaults."""

    def __init__(
        self,
        sections: Mapping[str, type],
        changes: Mapping[str, dict] | None = None,
        preset: Mapping[str, object] | None = None,
        left_out: Sequence[str] = (),
        *,
        unit: str,
        **options,
    ):
        """sections: title -> settings class. changes: field -> spelled(). unit: the word for {unit} in a help text.

        The script has no flag for the fields in `preset`, which gives their values, nor for those in `left_out`, which
        keep their defaults.
        """
        super().__init__(**options)
        self.sections, self.changes, self.preset, self.unit = sections, changes or {}, preset or {}, unit
        self.flags: dict[str, Flag] = {}
        self.names: dict[str, str] = {}
        self.defaults: dict[str, Any] = {}
        for title, section in sections.items():
            group = self.add_argument_group(title)
            for member in dataclasses.fields(section):
                if "flag" in member.metadata and member.name not in {*self.preset, *left_out}:
                    self.add_field(group, member, typing.get_type_hints(section)[member.name])

    def add_field(self, group: argparse._ArgumentGroup, member: dataclasses.Field, hint: object) -> None:
        changes = dict(self.changes.get(member.name, {}))
        default = changes.pop("default", member.default)
        known = changed_flag(member.metadata["flag"], changes)
        names = known.names or (member.name,)
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
        self.flags[names[0]], self.names[member.name] = known, names[0]

    def parse_settings(self, words: list[str]) -> tuple[Any, ...]:
        """(the flags by name, an object of each section's class). Given.check_ranges() checks the ranges."""
        values = vars(self.parse_args(words))
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        by_field = {**self.preset, **{member: values[name] for member, name in self.names.items()}}
        settings = []
        for section in self.sections.values():
            members = {member.name for member in dataclasses.fields(section)}
            settings.append(section(**{name: by_field[name] for name in members & by_field.keys()}))
        spellings = {word.partition("=")[0] for word in words}
        explicit = frozenset(
            name
            for name, known in self.flags.items()
            if spellings & {f"--{spelling}" for spelling in known.names or (name,)}
        )
        return Given(values, self.flags, self.names, explicit, self.defaults), *settings
