"""What the WebNLG and DART converters share: triples as one line of text, and formatted examples as JSON lines."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from xml.etree import ElementTree

from base.errors import fail
from base.files import atomic_write, open_text


def read_data(path: str, wanted: str, from_xml: Callable[[ElementTree.Element], object] | None = None) -> object:
    """The value that a UTF-8 file of JSON holds; of JSON lines, a list of their values; of XML, what `from_xml` makes
    of its root. Raises UserError, with the line, for anything else. wanted: what to ask for in place of XML."""
    with open_text(path) as handle:
        try:
            text = handle.read()
        except UnicodeDecodeError as error:
            fail(f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x}); fetch the file again")
    if not text.lstrip().startswith("<"):
        return parse_json(path, text)
    if from_xml is None:
        fail(f"{path}: is XML; want {wanted}")
    try:
        return from_xml(ElementTree.fromstring(text))
    except ElementTree.ParseError as error:
        fail(f"{path}:{error.position[0]}: not XML ({error}); fetch the file again")


def parse_json(path: str, text: str) -> object:
    """The value of `text`, or a list of the values of its lines."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        lines = text.rstrip("\n").split("\n")
        if error.msg == "Extra data" and error.lineno > 1 and len(lines) > 1:
            return [parse_json(f"{path}:{number}", line) for number, line in enumerate(lines, start=1)]
        where = path if len(lines) == 1 else f"{path}:{error.lineno}"
        fail(f"{where}: not JSON ({error.msg}, column {error.colno}); fetch the file again")
    except RecursionError:
        fail(f"{path}: JSON nested too deep; fetch the file again")


def linearise(where: str, triples: Iterable[tuple[object, object, object]]) -> str:
    """Write triples as `subject : relation : object | subject : relation : object`."""
    parts = []
    for triple in triples:
        if not all(isinstance(item, str) for item in triple):
            fail(f"{where}: the triple {triple!r}, want three strings")
        parts.append(" : ".join(map(str, triple)))
    if not parts:
        fail(f"{where}: has no triple; want at least one")
    return " | ".join(parts)


def write_examples(path: str, examples: Iterable[dict[str, object] | str]) -> None:
    """Write a line of ASCII-escaped JSON an example, all or none, and print what was written.

    A string among the examples says which kind of text was left out.
    """
    count, unseen, contexts = 0, 0, set()
    left_out: Counter[str] = Counter()
    with atomic_write(path) as handle:
        for example in examples:
            if isinstance(example, str):
                left_out[example] += 1
                continue
            handle.write(json.dumps(example) + "\n")
            contexts.add(example["context"])
            count += 1
            unseen += example.get("cate") is False
        reasons = "".join(f"; left out {number} {reason}" for reason, number in sorted(left_out.items()))
        if not count:
            fail(f"{path}: not written, the input holds no text to take{reasons}")
    of_unseen = f"; {unseen} of categories not seen in training" if unseen else ""
    print(f"{path}: {count} examples of {len(contexts)} contexts{reasons}{of_unseen}")
