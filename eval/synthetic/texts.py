"""The files that are judged: samples, real texts, losses and planted secrets, each with its mistakes named."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from segments import UserError

FIELDS = ("text", "completion", "content")  # of a line of JSON; the first that is there is the text
WORD = re.compile(r"\w+|[^\w\s]")
MOST_SHARED = 0.5  # of the held-out texts may be private texts; with more, a file is in the other's place


def words(text: str) -> list[str]:
    """Runs of letters and digits, and every other sign for itself. Capitals count: a copy is a copy."""
    return WORD.findall(text)


def read_lines(path: str, flag: str) -> list[str]:
    """The lines of a UTF-8 file that hold something, at least one."""
    try:
        with open(path, "rb") as handle:
            rows = handle.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror})") from None
    lines = []
    for number, row in enumerate(rows, start=1):
        try:
            lines.append(row.decode("utf-8").strip("\r"))
        except UnicodeDecodeError as error:
            byte = row[error.start]
            raise UserError(f"{path}:{number}: not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8") from None
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise UserError(f"{flag} {path}: is empty; want a text a line")
    return lines


def read_object(line: str, where: str, wanted: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: not JSON, got {line[:60]!r}; want {wanted}") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: not a JSON object, got {line[:60]!r}; want {wanted}")
    return found


def read_texts(path: str, flag: str) -> list[str]:
    """A text a line: JSON objects with one of FIELDS where the first line is one, else the lines themselves."""
    lines, texts = read_lines(path, flag), []
    is_json = lines[0].lstrip().startswith("{")
    wanted = 'an object with a string as "text" (or "completion", or "content") a line'
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        text: Any = line
        if is_json:
            record = read_object(line, where, wanted)
            text = next((record[name] for name in FIELDS if name in record), None)
        if not isinstance(text, str):
            raise UserError(f"{where}: got {line[:60]!r}; want {wanted}, as src/generate.py writes samples")
        texts.append(text.strip())
    return texts


def check_apart(private: list[str], held_out: list[str], private_path: str, held_out_path: str) -> None:
    """UserError where the held-out texts are private texts, or the private ones held-out texts."""
    for inner, outer, flag, path, other in (
        (held_out, private, "--held_out", held_out_path, private_path),
        (private, held_out, "--private", private_path, held_out_path),
    ):
        known = set(outer)
        shared = sum(text in known for text in inner)
        if shared > MOST_SHARED * len(inner):
            raise UserError(
                f"{flag} {path}: {shared} of its {len(inner)} texts are in {other}, too; want the texts that were "
                "trained on as --private, and others as --held_out: were the files swapped, or cut from one another?"
            )


@dataclass(frozen=True)
class Losses:
    """The losses of one model, as src/text_losses.py writes them: name of a token file -> (lines,) float64."""

    path: str
    of: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.of:
            have = ", ".join(self.of) or "none"
            raise UserError(f"{self.path}: holds no losses of {name}.jsonl (of these: {have}); write them in one call")
        return self.of[name]


def read_json(path: str, flag: str, wanted: str) -> dict[str, Any]:
    return read_object("\n".join(read_lines(path, flag)), path, wanted)


def read_losses(path: str, flag: str) -> Losses:
    wanted = "what src/text_losses.py writes"
    files = read_json(path, flag, wanted).get("files")
    if not isinstance(files, dict):
        raise UserError(f"{flag} {path}: has no files; want {wanted}")
    found = {}
    for name, file in files.items():
        values = file.get("losses") if isinstance(file, dict) else None
        if not isinstance(values, list) or not all(type(value) in (int, float) for value in values) or not values:
            raise UserError(f"{flag} {path}: the losses of {name} are no list of numbers; want {wanted}")
        if not all(map(math.isfinite, values)):
            raise UserError(f"{flag} {path}: a loss of {name} is not finite; was the model trained at too high a rate?")
        found[name] = np.array(values, np.float64)
    return Losses(path, found)


@dataclass(frozen=True)
class Secret:
    """A planted secret, or one of the same kind that was not planted. tokens: without the end of text."""

    kind: str
    planted: bool
    tokens: list[int]
    text: str


@dataclass(frozen=True)
class Secrets:
    """secrets.json of src/plant_secrets.py. repeats: lines of each planted one. others: rivals of each secret."""

    found: list[Secret]
    repeats: int
    others: int


def read_secrets(path: str) -> Secrets:
    wanted = "what src/plant_secrets.py writes"
    content = read_json(path, "--secrets", wanted)
    try:
        found = [
            Secret(str(one["kind"]), bool(one["planted"]), list(one["secret"]), str(one["text"]))
            for one in content["secrets"]
        ]
        return Secrets(found, int(content["repeats"]), int(content["others"]))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"--secrets {path}: not of the form; want {wanted}") from None


def read_token_lines(path: str, flag: str, key: str) -> list[list[int]]:
    """The ids under `key` of each line of JSON."""
    found = []
    for number, line in enumerate(read_lines(path, flag), start=1):
        ids = read_object(line, f"{path}:{number}", f'{{"{key}": [ids]}}').get(key)
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise UserError(f"{path}:{number}: {key} is no list of token ids, got {line[:60]!r}")
        found.append(ids)
    return found
