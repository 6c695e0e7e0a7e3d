"""Reading references and system outputs in the forms that the E2E challenge's script takes.

Plain text: REF has a reference a line and an empty line after each group, or one reference a segment and no empty line;
SYS has an output a line. TSV or CSV (told by the file's extension): a column of sources and one of texts, found by
their headers or, without headers, the first and second of two. Beside these, REF may be a folder of parallel files
reference0, reference1, ..., as the WebNLG challenge has them: the lines of one number are a group.
"""

import csv
import os
import re
import sys
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

# Words that tell what a column holds where its header begins with one.
SOURCE_HEADER = re.compile(r"mr|src|source|meaning|da|dial(ogue)?[_ .-]act", re.IGNORECASE)
OUTPUT_HEADER = re.compile(r"out|ref|sys", re.IGNORECASE)
REFERENCE_HEADER = re.compile(r"trg|tgt|target|ref|human", re.IGNORECASE)
# Files of earlier stages, which would be scored as they stand.
OTHER_FORMS = {"JSON lines": lambda line: line.startswith('{"'), "E2E's context||text": lambda line: "||" in line}
UNSEEN = re.compile("[\0\r]|^\ufeff")
# Pound signs and accents that spreadsheet programs broke in the challenge's submissions.
BROKEN_ENCODINGS = (("Ł", "£"), ("Â£", "£"), ("Ã©", "é"), ("ã©", "é"))


class UserError(ValueError):
    """A mistake of the user. The text is one line: where, what was found, what was expected, the cure."""


@dataclass(frozen=True)
class Segments:
    """The test set: for each segment its source ("" where unknown), its references and the system's output."""

    sources: list[str]
    references: list[list[str]]
    outputs: list[str]


def note_unicode_forms(name: str, references: Iterable[Iterable[str]], outputs: Iterable[str]) -> None:
    """Print a note where the letters of one side alone are composed (NFC): the same word is another one then."""
    spoiled = [
        any(not unicodedata.is_normalized("NFC", text) for text in texts)
        for texts in (chain.from_iterable(references), outputs)
    ]
    if spoiled[0] != spoiled[1]:
        side, other = ("references", "outputs") if spoiled[0] else ("outputs", "references")
        print(
            f"note: {name}: the {side} hold letters with accents of their own (Unicode form NFD), which the {other} do "
            "not: words that look the same count as different; convert both to NFC",
            file=sys.stderr,
        )


@dataclass(frozen=True)
class Text:
    """A text and where it stands, for errors."""

    line: int
    source: str
    text: str


def read_lines(path: str) -> list[str]:
    """Read a UTF-8 file's lines, at least one. Only a line feed ends a line. A byte-order mark at the start is dropped.

    NUL, a carriage return inside a line and a byte-order mark at the start of a later one are refused: nobody sees
    them, and they change the number of texts or every score. So are files that are all JSON lines or context||text.
    """
    try:
        with open(path, "rb") as handle:
            rows = handle.readlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if rows:
        rows[0] = rows[0].removeprefix(b"\xef\xbb\xbf")
    lines = []
    for number, row in enumerate(rows, start=1):
        try:
            lines.append(row.decode("utf-8"))
        except UnicodeDecodeError as error:
            byte = row[error.start]
            raise UserError(f"{path}:{number}: not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8") from None
        if found := UNSEEN.search(lines[-1].rstrip("\r\n")):
            name = {"\0": "NUL", "\r": "a carriage return"}.get(found[0], "a byte-order mark (U+FEFF)")
            raise UserError(f"{path}:{number}: holds {name}; save the file as UTF-8 with line feeds, or remove it")
    if not lines:
        raise UserError(f"{path}: is empty")
    filled = [line for line in lines if line.strip()]
    for form, is_of_form in OTHER_FORMS.items():
        if filled and all(is_of_form(line) for line in filled):
            raise UserError(f"{path}: is {form}; want texts alone, as src/gpt2_decode.py writes them")
    return lines


def is_table(path: str) -> bool:
    """Whether the challenge's script would read the file as TSV or CSV."""
    return re.search(r"\.[ct]sv$", path, re.IGNORECASE) is not None


def read_table(path: str, text_header: re.Pattern[str]) -> list[Text]:
    """Read a TSV or CSV of sources and texts; which of the two it is, a tab in its first line tells."""
    lines = read_lines(path)
    for broken, mended in BROKEN_ENCODINGS:
        lines = [line.replace(broken, mended) for line in lines]
    # A tab at either end of a line parts an empty field from its neighbour.
    filled = [(number, line.strip(" \r\n")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not filled:
        raise UserError(f"{path}: holds no row")
    delimiter = "\t" if "\t" in filled[0][1] else ","
    rows = []
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((line for _, line in filled), delimiter=delimiter)
    try:
        for row in reader:
            rows.append((filled[reader.line_num - 1][0], row))
    except csv.Error as error:
        raise UserError(f"{path}:{filled[reader.line_num - 1][0]}: not a CSV row ({error})") from None

    first = rows[0][1]
    source_columns = [i for i, field in enumerate(first) if SOURCE_HEADER.match(field)]
    text_columns = [i for i, field in enumerate(first) if text_header.match(field)]
    if len(source_columns) == len(text_columns) == 1:
        source_column, text_column = source_columns[0], text_columns[0]
        del rows[0]
    elif not source_columns and not text_columns and len(first) == 2:
        source_column, text_column = 0, 1
    else:
        found = f"{len(source_columns)} headers of a source and {len(text_columns)} of a text in {len(first)} columns"
        raise UserError(f"{path}:1: {found}; want one each (as in `MR` and `ref`), or two columns without headers")
    if source_column == text_column:
        raise UserError(f"{path}:1: one column's header {first[source_column]!r} reads as source and text; rename it")
    for number, row in rows:
        if len(row) != len(first):
            raise UserError(f"{path}:{number}: {len(row)} columns, expected {len(first)} as in the first line")
    if not rows:
        raise UserError(f"{path}: has a header and no rows")
    return [Text(number, row[source_column], row[text_column]) for number, row in rows]


def read_outputs(path: str, source_path: str | None) -> list[Text]:
    """Read SYS; with a file of sources SYS is a table whose sources are checked against it."""
    if source_path is None and not is_table(path):
        return [Text(number, "", line.strip()) for number, line in enumerate(read_lines(path), start=1)]
    outputs = read_table(path, OUTPUT_HEADER)
    if source_path is not None:
        sources = [line.strip() for line in read_lines(source_path)]
        for number, (source, output) in enumerate(zip(sources, outputs, strict=False), start=1):
            if source != output.source:
                raise UserError(
                    f"{path}:{output.line}: the source is {output.source[:80]!r}, but {source_path}:{number} has "
                    f"{source[:80]!r}; both must have the same sources in the same order"
                )
        check_counts(source_path, list(range(1, len(sources) + 1)), "sources", path, outputs)
    return outputs


def read_groups(path: str) -> list[list[Text]]:
    """Read plain-text references: groups parted by empty lines, or without any, one reference a group."""
    groups: list[list[Text]] = [[]]
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            groups[-1].append(Text(number, "", line.strip()))
        elif groups[-1]:
            groups.append([])
        else:
            raise UserError(f"{path}:{number}: an empty line where a reference should be; one empty line ends a group")
    return groups if groups[-1] else groups[:-1]


def read_parallel(folder: str) -> list[list[Text]]:
    """Read a folder of reference0, reference1, ...: the lines of one number are a group.

    What fills a group up, an empty line or the first reference again, is left out.
    """
    numbers = sorted(int(name[9:]) for name in os.listdir(folder) if re.fullmatch(r"reference\d+", name))
    if not numbers or numbers != list(range(len(numbers))):
        found = ", ".join(f"reference{number}" for number in numbers) or "no reference0"
        raise UserError(
            f"{folder}: holds {found}; want reference0, reference1, ... as gpt2_decode.py --ref_type webnlg or dart "
            "has written them"
        )
    paths = [os.path.join(folder, f"reference{number}") for number in numbers]
    columns = [[line.strip() for line in read_lines(path)] for path in paths]
    for path, column in zip(paths, columns, strict=True):
        if len(column) != len(columns[0]):
            raise UserError(f"{path}: {len(column)} lines, but {paths[0]} has {len(columns[0])}; decode anew")
    if "" in columns[0]:
        raise UserError(f"{paths[0]}:{columns[0].index('') + 1}: no reference; every text needs one here")
    return [
        [Text(number, "", text) for text in (first, *(other for other in others if other not in ("", first)))]
        for number, (first, *others) in enumerate(zip(*columns, strict=True), start=1)
    ]


def group_table(path: str, outputs: list[Text], output_path: str) -> list[list[Text]]:
    """Read references from a table: grouped by the outputs' sources, or where unknown by runs of one source."""
    rows = read_table(path, REFERENCE_HEADER)
    if not any(output.source for output in outputs):
        groups: list[list[Text]] = []
        for row in rows:
            if groups and groups[-1][0].source == row.source:
                groups[-1].append(row)
            else:
                groups.append([row])
        return groups
    by_source: dict[str, list[Text]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row)
    asked = {output.source for output in outputs}
    counts = f"{len(by_source)} different sources in {path}, {len(asked)} in {output_path}"
    for output in outputs:
        if output.source not in by_source:
            where = f"{output_path}:{output.line}"
            raise UserError(f"{where}: no reference for the source {output.source[:80]!r}; {counts}")
    for source, group in by_source.items():
        if source not in asked:
            raise UserError(f"{path}:{group[0].line}: no output for the source {source[:80]!r}; {counts}")
    return [by_source[output.source] for output in outputs]


def check_counts(path: str, lines: list[int], what: str, output_path: str, outputs: list[Text]) -> None:
    """Refuse files of different lengths, naming both counts and the line from which the longer one goes on alone."""
    if len(lines) == len(outputs):
        return
    both = min(len(lines), len(outputs))
    where = f"{path}:{lines[both]}" if len(lines) > both else f"{output_path}:{outputs[both].line}"
    raise UserError(
        f"{path} has {len(lines)} {what}, {output_path} has {len(outputs)} outputs; they part at {where}, which has no "
        "counterpart in the other file"
    )


def load_segments(reference_path: str, output_path: str, source_path: str | None = None) -> Segments:
    """Read the references and the outputs and line them up, or raise UserError."""
    outputs = read_outputs(output_path, source_path)
    if os.path.isdir(reference_path):
        groups = read_parallel(reference_path)
    elif is_table(reference_path):
        groups = group_table(reference_path, outputs, output_path)
    else:
        groups = read_groups(reference_path)
        # A file without empty lines holds single references; with one output it is that output's group.
        if len(groups) == 1 and len(outputs) > 1:
            groups = [[reference] for reference in groups[0]]
    check_counts(reference_path, [group[0].line for group in groups], "groups of references", output_path, outputs)
    references = [[reference.text for reference in group] for group in groups]
    return Segments([output.source for output in outputs], references, [output.text for output in outputs])
