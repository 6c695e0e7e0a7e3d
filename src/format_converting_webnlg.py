"""Format WebNLG 2017 (Gardent et al., 2017) for fine-tuning: one example a reference.

    python src/format_converting_webnlg.py data/webnlg/train.json data/webnlg/train_formatted.jsonl

In: the challenge's JSON, {"entries": [{"1": {"category", "lexicalisations", "modifiedtripleset"}}, ...]}. Out: lines of
{"context": "subject : relation : object | ...", "completion": text, "cate": category was seen in training}. Only texts
that the challenge's annotators judged "good" are taken.
"""

import argparse
from collections.abc import Iterator

from cli import Parser, check_output, fail, run_main
from triples import linearise, read_json, write_examples

# The ten categories of the challenge's training set; its test set has five more.
SEEN_CATEGORIES = frozenset(
    "Airport Astronaut Building City ComicsCharacter Food Monument SportsTeam University WrittenWork".split()
)
ENTRY = '{"NUMBER": {"category": ..., "lexicalisations": [...], "modifiedtripleset": [...]}}'


def convert(path: str) -> Iterator[dict[str, object] | str]:
    """Yield the examples of a WebNLG file, or why a text is none."""
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("entries"), list):
        fail(f'{path}: want a JSON object with the list "entries", as in the WebNLG 2017 challenge')
    for number, entry in enumerate(data["entries"], start=1):
        where = f"{path}: entry {number}"
        if not isinstance(entry, dict) or len(entry) != 1 or not isinstance(next(iter(entry.values())), dict):
            fail(f"{where}: want {ENTRY}")
        (record,) = entry.values()
        category, texts, triples = (record.get(key) for key in ("category", "lexicalisations", "modifiedtripleset"))
        if not isinstance(category, str) or not is_list_of_objects(texts) or not is_list_of_objects(triples):
            fail(f"{where}: want {ENTRY}")
        context = linearise(where, ((t.get("subject"), t.get("property"), t.get("object")) for t in triples))
        for text in texts:
            if not isinstance(text.get("lex"), str):
                fail(f'{where}: the lexicalisation {str(text)[:60]!r}, want a text in "lex"')
            if text.get("comment") != "good":
                yield "texts not judged good"
            elif not text["lex"].strip():
                yield "empty texts"
            else:
                yield {"context": context, "completion": text["lex"], "cate": category in SEEN_CATEGORIES}


def is_list_of_objects(value: object) -> bool:
    """Whether a JSON value is a list of objects."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="IN.json")
    parser.add_argument("output", metavar="OUT_formatted.jsonl")
    args = parser.parse_args()
    check_output(args.output, args.input)
    write_examples(args.output, convert(args.input))


if __name__ == "__main__":
    run_main(main)
