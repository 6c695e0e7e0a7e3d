"""Format WebNLG (Gardent et al., 2017) for fine-tuning: one example a reference.

    python src/format_converting_webnlg.py data/webnlg/train.json data/webnlg/train_formatted.jsonl
    python src/format_converting_webnlg.py --seen 3.0 test.json test_formatted.jsonl     # the release of 2020

In: the challenge's JSON, {"entries": [{"1": {"category", "lexicalisations", "modifiedtripleset"}}, ...]}, or its XML
(<benchmark><entries><entry category=...>), from which the same examples come. Out: lines of
{"context": "subject : relation : object | ...", "completion": text, "cate": category was seen in training}. Only texts
that the challenge's annotators judged "good" are taken, and of one language; a text that names none is English.
"""

import base.early  # noqa: F401  # isort: skip  # before slow imports

import argparse
from collections.abc import Iterator
from xml.etree.ElementTree import Element

from base.errors import fail, run_main
from base.flags import Parser, check_output
from corpus.triples import linearise, read_data, write_examples

# (categories of the training set, further ones of the test set) of the challenges of 2017 and 2020
_2017 = "Airport Astronaut Building City ComicsCharacter Food Monument SportsTeam University WrittenWork".split()
_ADDED = "Artist Athlete CelestialBody MeanOfTransportation Politician".split()
CATEGORIES = {"2017": (_2017, _ADDED), "3.0": ([*_2017, *_ADDED, "Company"], ["Film", "MusicalWork", "Scientist"])}
ENTRY = '{"NUMBER": {"category": ..., "lexicalisations": [...], "modifiedtripleset": [...]}}'


def convert(path: str, release: str, language: str) -> Iterator[dict[str, object] | str]:
    """Yield the examples of a WebNLG file, or which kind of text is none."""
    wanted = 'the challenge\'s XML, or its JSON, an object with the list "entries"'
    data = read_data(path, wanted, from_xml)
    if not isinstance(data, dict) or not isinstance(data.get("entries"), list):
        fail(f"{path}: holds {str(data)[:60]!r}; want {wanted}, not the rows that a datasets hub makes of it")
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
            elif (text.get("lang") or "en") != language:
                yield f"texts of language {text.get('lang') or 'en'!r}"
            elif not text["lex"].strip():
                yield "empty texts"
            else:
                yield {"context": context, "completion": text["lex"], "cate": category in seen}


def from_xml(benchmark: Element) -> dict:
    """The challenge's XML in the form of its JSON. The enriched release has a text in an element of its own."""

    def triple(text: str) -> dict[str, str]:
        return dict(zip(("subject", "property", "object"), map(str.strip, text.split(" | ", 2)), strict=False))

    def record(entry: Element) -> dict:
        return {
            "category": entry.get("category"),
            "lexicalisations": [
                {**lex.attrib, "lex": lex.findtext("text", lex.text or "")} for lex in entry.iter("lex")
            ],
            "modifiedtripleset": [triple(one.text or "") for one in entry.iterfind("modifiedtripleset/mtriple")],
        }

    return {"entries": [{entry.get("eid"): record(entry)} for entry in benchmark.iter("entry")]}


def is_list_of_objects(value: object) -> bool:
    """Whether a JSON value is a list of objects."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="IN.json|IN.xml")
    parser.add_argument("output", metavar="OUT_formatted.jsonl")
    parser.add_argument(
        "--seen",
        choices=CATEGORIES,
        default="2017",
        metavar="RELEASE",
        help="2017 (default) or 3.0, which suits 2.1 too: whose training categories count as seen",
    )
    parser.add_argument("--lang", default="en", help="language to take, en (default) or ru")
    args = parser.parse_args()
    check_output(args.output, args.input)
    write_examples(args.output, convert(args.input, args.seen, args.lang))


if __name__ == "__main__":
    run_main(main)
