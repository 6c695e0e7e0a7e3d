"""Format DART v1.1.1 (Nan et al., 2021) for fine-tuning: one example a reference.

    python src/format_converting_dart.py data/dart/dart-v1.1.1-full-train.json data/dart/train_formatted.jsonl

In: [{"tripleset": [[subject, relation, object], ...], "annotations": [{"source", "text"}, ...]}, ...], or one such
object a line; annotations may be one object of lists, {"source": [...], "text": [...]}. Out: lines of
{"context": "subject : relation : object | ...", "completion": text}, relations in lower case.
"""

import base.early  # noqa: F401  # isort: skip  # before slow imports

import argparse
from collections.abc import Iterator

from base.errors import fail, run_main
from base.flags import Parser, check_output
from corpus.triples import linearise, read_data, write_examples

ENTRY = '{"tripleset": [[subject, relation, object], ...], "annotations": [{"text": ...}, ...]}'


def convert(path: str) -> Iterator[dict[str, object] | str]:
    """Yield the examples of a DART file, or why a text is none."""
    wanted = f"a JSON list of {ENTRY}, as in DART v1.1.1"
    data = read_data(path, wanted)
    if isinstance(data, dict) and "tripleset" in data:
        data = [data]  # JSON lines, of which there is one
    if not isinstance(data, list):
        fail(f"{path}: want {wanted}")
    for number, entry in enumerate(data, start=1):
        where = f"{path}: entry {number}"
        triples, texts = (entry.get("tripleset"), entry.get("annotations")) if isinstance(entry, dict) else (None, None)
        if isinstance(texts, dict) and isinstance(texts.get("text"), list):
            texts = [{"text": text} for text in texts["text"]]
        if not isinstance(triples, list) or not isinstance(texts, list):
            fail(f"{where}: want {ENTRY}")
        if not all(isinstance(t, list) and len(t) == 3 and isinstance(t[1], str) for t in triples):
            fail(f"{where}: want {ENTRY}, three strings a triple")
        context = linearise(where, ((subject, relation.lower(), obj) for subject, relation, obj in triples))
        for text in texts:
            if not isinstance(text, dict) or not isinstance(text.get("text"), str):
                fail(f'{where}: the annotation {str(text)[:60]!r}, want a text in "text"')
            if text["text"].strip():
                yield {"context": context, "completion": text["text"]}
            else:
                yield "empty texts"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="IN.json")
    parser.add_argument("output", metavar="OUT_formatted.jsonl")
    args = parser.parse_args()
    check_output(args.output, args.input)
    write_examples(args.output, convert(args.input))


if __name__ == "__main__":
    run_main(main)
