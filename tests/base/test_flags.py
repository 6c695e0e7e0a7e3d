"""Flags: a path may begin with ~, in every script."""

import os
from dataclasses import dataclass

import pytest

from base.errors import UserError
from base.flags import Parser, SettingsParser, flag
from helpers.processes import ROOT


@dataclass(frozen=True, kw_only=True)
class Section:
    """Settings with a path, a list of texts and a number."""

    folder: str | None = flag()
    files: tuple[str, ...] = flag((), nargs="+")
    count: int = flag(3)


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of a user")
    parser = Parser()
    for name, default in (("--given", None), ("--default", "~/d"), ("--other", "a~b")):
        parser.add_argument(name, default=default)
    parser.add_argument("place", nargs="*")
    found = parser.parse_args(["--given=~/x/~", "~", "b/~/c"])
    assert vars(found) == {"given": "/home/of a user/x/~", "default": "/home/of a user/d", "other": "a~b",
                           "place": ["/home/of a user", "b/~/c"]}
    parser = SettingsParser({"section": Section}, unit="unit")
    given, section = parser.parse_settings(["--folder=~/w", "--files", "~/a", "b"])
    assert section == Section(folder="/home/of a user/w", files=("/home/of a user/a", "b"))
    assert given.values["folder"] == section.folder and given.explicit == {"folder", "files"}


@pytest.mark.parametrize("words", [["--folder", ""], ["--folder="], ["--files", "a", ""]])
def test_an_empty_text_is_refused(words):
    """As from a variable of the shell that is not set: the flag is not absent, and "" as a path names nothing."""
    with pytest.raises(UserError, match=f"{words[0].strip('=')}: is empty; is a variable of the shell not set"):
        SettingsParser({"section": Section}, unit="unit").parse_settings(words)


def test_every_script_parses_so():
    """None makes argparse's own parser, or names str as a flag's type, which would leave the value as it is."""
    texts = {path: path.read_text(encoding="utf-8") for name in ("src", "scripts", "eval")
             for path in (ROOT / name).rglob("*.py")}
    assert not [path for path, text in texts.items() if "ArgumentParser(" in text or "type=str" in text]


def test_the_scorers_take_a_tilde(monkeypatch):
    import command

    monkeypatch.setenv("HOME", "/home/u")
    parser = command.Parser(None)
    parser.add_argument("file")
    found = parser.parse_args(["~/ref", "--json=~/scores.json"])
    assert (found.file, found.json_file) == (os.path.join("/home/u", "ref"), "/home/u/scores.json")
