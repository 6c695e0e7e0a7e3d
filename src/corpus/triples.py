"""What the WebNLG and DART converters share: triples as one line of text, and formatted examples as JSON lines."""

import json
from collections import Counter
from collections.abc import Iterable

from base.errors import fail
from base.files import atomic_write, open_text


def read_json(path: str, wanted: str) -> object:
    """Parse a UTF-8 JSON file, or raise UserError with its line. wanted: what to ask for where it is another form."""
    with open_text(path) as handle:
        try:
            text = handle.read().removeprefix("\ufeff")  # a byte order mark is no text
            return json.loads(text)
        except json.JSONDecodeError as error:
            if text.lstrip().startswith("<"):
                fail(f"{path}: is XML; want {wanted}")
            if error.msg == "Extra data" and error.lineno > 1:
                fail(f"{path}: is JSON lines, a value a line; want {wanted}: one value, as `jq -s .` makes of lines")
            fail(f"{path}:{error.lineno}: not JSON ({error.msg}); fetch the file again")
        except UnicodeDecodeError as error:
            fail(f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x}); fetch the file again")
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
