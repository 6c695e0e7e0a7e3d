"""Format WebNLG (Gardent et al., 2017) for fine-tuning: one example a reference.

    python src/format_converting_webnlg.py data/webnlg/train.json data/webnlg/train_formatted.jsonl
    python src/format_converting_webnlg.py --seen 3.0 test.json test_formatted.jsonl     # the release of 2020

In: the challenge's JSON, {"entries": [{"1": {"category", "lexicalisations", "modifiedtripleset"}}, ...]}. Out: lines of
{"context": "subject : relation : object | ...", "completion": text, "cate": category was seen in training}. Only texts
that the challenge's annotators judged "good" are taken, and of one language.
"""

import argparse
from collections.abc import Iterator

from base.errors import fail, run_main
from base.flags import Parser, check_output
from corpus.triples import linearise, read_json, write_examples

# (categories of the training set, further ones of the test set) of the challenges of 2017 and 2020
_2017 = "Airport Astronaut Building City ComicsCharacter Food Monument SportsTeam University WrittenWork".split()
_ADDED = "Artist Athlete CelestialBody MeanOfTransportation Politician".split()
CATEGORIES = {"2017": (_2017, _ADDED), "3.0": ([*_2017, *_ADDED, "Company"], ["Film", "MusicalWork", "Scientist"])}
ENTRY = '{"NUMBER": {"category": ..., "lexicalisations": [...], "modifiedtripleset": [...]}}'


def convert(path: str, release: str, language: str) -> Iterator[dict[str, object] | str]:
    """Yield the examples of a WebNLG file, or which kind of text is none. language: a text without one has any."""
    wanted = 'the challenge\'s JSON, an object with the list "entries"'
    data = read_json(path, wanted)
    if not isinstance(data, dict) or not isinstance(data.get("entries"), list):
        fail(f"{path}: want {wanted}")
    seen, unseen = CATEGORIES[release]
    for number, entry in enumerate(data["entries"], start=1):
        where = f"{path}: entry {number}"
        if not isinstance(entry, dict) or len(entry) != 1 or not isinstance(next(iter(entry.values())), dict):
            fail(f"{where}: want {ENTRY}")
        (record,) = entry.values()
        category, texts, triples = (record.get(key) for key in ("category", "lexicalisations", "modifiedtripleset"))
        if not isinstance(category, str) or not is_list_of_objects(texts) or not is_list_of_objects(triples):
            fail(f"{where}: want {ENTRY}")
        if category not in seen + unseen:
            fail(
                f"{where}: the category {category!r} is not one of WebNLG {release}; --seen {' or '.join(CATEGORIES)} "
                "says of which release the trained categories are"
            )
        context = linearise(where, ((t.get("subject"), t.get("property"), t.get("object")) for t in triples))
        for text in texts:
            if not isinstance(text.get("lex"), str):
                fail(f'{where}: the lexicalisation {str(text)[:60]!r}, want a text in "lex"')
            if text.get("comment") != "good":
                yield "texts not judged good"
            elif text.get("lang") not in (None, "", language):
                yield f"texts of language {text['lang']!r}"
            elif not text["lex"].strip():
                yield "empty texts"
            else:
                yield {"context": context, "completion": text["lex"], "cate": category in seen}


def is_list_of_objects(value: object) -> bool:
    """Whether a JSON value is a list of objects."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="IN.json")
    parser.add_argument("output", metavar="OUT_formatted.jsonl")
    parser.add_argument(
        "--seen",
        choices=CATEGORIES,
        default="2017",
        metavar="RELEASE",
        help="2017 (default) or 3.0: whose training categories count as seen",
    )
    parser.add_argument("--lang", default="en", help="language to take, such as en (default) or ru")
    args = parser.parse_args()
    check_output(args.output, args.input)
    write_examples(args.output, convert(args.input, args.seen, args.lang))


if __name__ == "__main__":
    run_main(main)
