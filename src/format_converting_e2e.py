"""Turn E2E's text, `context||completion` a line, into JSON lines.

    python src/format_converting_e2e.py data/e2e/train.txt data/e2e/train_formatted.jsonl

A line is stripped of white space at both ends and split at its first `||`; it becomes
`{"context": ..., "completion": ...}`, ASCII-escaped. The output is written whole or not at all.
"""

import base.early  # noqa: F401  # isort: skip  # before slow imports

import json
import re
import sys

from tqdm import tqdm

from base.errors import fail, run_main
from base.files import atomic_write, read_lines
from base.flags import Parser, check_output

# How the lines of E2E's other forms begin, its meaning representations being `name[A], eatType[pub]`.
OTHER_FORMS = {
    "the challenge's CSV": r'"?(mr|meaning_representation)"?\s*([,;\t]|$)|"?[a-z ]+\[',
    "JSON": r"\s*[\[{]",
    "XML": r"\s*<",
}


def convert_line(line: str, where: str) -> dict[str, str]:
    """{"context": ..., "completion": ...} of one line. where: "file:line". UserError where it is not of the form."""
    context, bars, completion = line.strip().partition("||")
    form = next((name for name, start in OTHER_FORMS.items() if re.match(start, line, re.IGNORECASE)), None)
    if not bars and form:
        fail(
            f"{where}: is {form}, got {line[:60]!r}; wanted the .txt form, `name : A | Type : pub||text` a line, as "
            "scripts/download_e2e.sh fetches it"
        )
    if not bars:
        fail(f"{where}: wanted context||completion, got {line[:60]!r} without ||; correct or remove the line")
    if not context.strip() or not completion.strip():
        empty = "completion" if context.strip() else "context"
        fail(f"{where}: empty {empty} in {line[:60]!r}; correct or remove the line")
    return {"context": context, "completion": completion}


def main() -> None:
    parser = Parser(description="E2E text to JSON lines")
    parser.add_argument("input", metavar="IN.txt", help="E2E text, context||completion a line")
    parser.add_argument("output", metavar="OUT_formatted.jsonl", help="JSON lines to write")
    args = parser.parse_args()
    check_output(args.output, args.input)

    count = 0
    with atomic_write(args.output) as out:
        lines = read_lines(args.input)
        for number, line in tqdm(lines, desc="format", unit=" lines", disable=not sys.stderr.isatty()):
            out.write(json.dumps(convert_line(line, f"{args.input}:{number}")) + "\n")
            count += 1
        if count == 0:
            fail(f"{args.input}: is empty, wanted a context||completion a line; fetch it again")
    print(f"{args.output}: {count} examples")


if __name__ == "__main__":
    run_main(main)
