"""PRIVACY.md's table of what is disclosed, and what a run left: files and entries, each with the row that names it."""

import functools
import importlib
import json
import pathlib
import re
from dataclasses import dataclass

import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.processes import ROOT

NAMES = {"run", "folder"}  # drawn afresh for every run; where it lay


@dataclass(frozen=True)
class Row:
    """A line of the table. entries: names; None where the whole file is one entry."""

    files: tuple[re.Pattern, ...]
    entries: frozenset[str] | None
    flags: bool  # every flag of the script is an entry, too
    covered: str  # "yes", "no" or "public"
    authors: bool  # of author-level runs alone


def file_pattern(name: str) -> re.Pattern:
    """`{word}` stands for any part of a name; a name that ends in a slash is a folder with all that is in it."""
    parts = ("[^/]+" if part.startswith("{") else re.escape(part) for part in re.split(r"(\{\w+\})", name))
    return re.compile("(.*/)?" + "".join(parts) + (".+" if name.endswith("/") else ""))


@functools.cache
def table() -> tuple[Row, ...]:
    lines = (ROOT / "PRIVACY.md").read_text(encoding="utf-8").splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("  | file | entries | covered by epsilon |"))
    rows, named = [], ""
    for line in lines[begin + 2:]:
        if not line.startswith("  |"):
            break
        file, what, covered, _ = [cell.strip() for cell in line.strip()[1:-1].split("|")]
        named = file or named
        assert covered in ("yes", "no", "public"), line
        entries = frozenset(re.findall(r"`(\w+)`", what))
        rows.append(Row(tuple(map(file_pattern, re.findall("`([^`]+)`", re.sub("^the terminal.*", "", named)))),
                        entries or None, "every flag" in what, covered, " of authors" in named))
    assert len(rows) > 25
    return tuple(rows)


def row_of(file: str, entry: str, flags: frozenset[str], authors: bool) -> Row | None:
    """The row that names `entry` (dotted: in `held_out.by`, `held_out`) of a file; None where there is none."""
    name = entry.split(".")[0]
    for row in table():
        if any(pattern.fullmatch(file) for pattern in row.files) and authors >= row.authors and (
                row.entries is None or name in row.entries or (row.flags and name in flags)):
            return row
    return None


def flat(value: object, name: str = "") -> dict[str, object]:
    """A tree of dicts by dotted names; a tensor as its dtype, shape and bytes."""
    if isinstance(value, dict) and value:
        return {key: leaf for part, inner in value.items()
                for key, leaf in flat(inner, f"{name}.{part}" if name else str(part)).items()}
    if isinstance(value, torch.Tensor):
        return {name: (str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes())}
    return {name: value}


def entries(path: pathlib.Path) -> dict[str, object]:
    """What a file holds, by name; {"": its bytes} of one that is no table of names."""
    if path.name.startswith("events.out.tfevents"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    if path.name.endswith(".partial") or ".author_cache" in path.parts:
        return {"": path.read_bytes()}
    if path.name == ".lock":
        return {"": re.sub(r"process \d+", "process", path.read_text())}
    if ".jsonl" in path.name:
        found: dict[str, list] = {}
        for line in path.read_text().splitlines():
            for name, value in flat(json.loads(line)).items() if line else ():
                found.setdefault(name, []).append(value)
        return found
    if path.suffix == ".json":
        return flat(json.loads(path.read_text()))
    if path.suffix == ".pt":
        return flat(torch.load(path, weights_only=True))
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            noted = {key: json.loads(value) if value.startswith("{") else value
                     for key, value in (file.metadata() or {}).items()}
            return flat({**noted, **{name: file.get_tensor(name) for name in file.keys()}})
    return {"": path.read_bytes()}


@dataclass
class Left:
    """What a run left in `folder` beside the files that were `given` to it."""

    folder: pathlib.Path
    flags: frozenset[str]
    authors: bool = False
    given: frozenset[str] = frozenset(("train.jsonl", "valid.jsonl"))

    def files(self) -> dict[str, pathlib.Path]:
        """By names that two runs have in common."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if path.is_file() and name not in self.given:
                name = re.sub(r"events\.out\.tfevents\..*", "events", name)  # host, time and process
                found[re.sub("train-[0-9a-f]{20}", "train", name)] = path  # the cache's digest of the file
        return found

    def rows(self) -> dict[tuple[str, str], Row | None]:
        """(file, entry) -> its row."""
        return {(file, entry): row_of(file, entry, self.flags, self.authors)
                for file, path in self.files().items() for entry in entries(path)}

    def unnamed(self) -> list[tuple[str, str]]:
        """Files and entries that no row names."""
        return [place for place, row in self.rows().items() if row is None]


def differing(one: Left, other: Left) -> dict[str, set[tuple[str, str]]]:
    """The entries that differ between two runs, by what PRIVACY.md says of them: "yes", "no" or "public". A .pt file
    whose entries are the same must be so byte for byte."""
    rows: dict = {**other.rows(), **one.rows()}
    found: dict[str, set[tuple[str, str]]] = {}
    here, there = one.files(), other.files()
    assert here.keys() == there.keys()
    for file in here:
        left, right = entries(here[file]), entries(there[file])
        changed = {name for name in {*left, *right} if left.get(name, ...) != right.get(name, ...)}
        named = {name for name in changed if name.split(".")[-1] in NAMES}
        changed -= named
        for name in changed:
            found.setdefault(rows[file, name].covered, set()).add((file, name))
        assert changed or named or not file.endswith(".pt") or here[file].read_bytes() == there[file].read_bytes(), file
    return found


def e2e_flags(script: str = "gpt2_ft") -> frozenset[str]:
    arguments = ["--train_data", "x", "--valid_data", "x"][:4 if script == "gpt2_ft" else 2]
    return frozenset(importlib.import_module(script).parse(arguments).given.values)
