"""Make data/reddit/train.jsonl: the first usable records of the Webis-TLDR-17 corpus, {"author", "content"} a line.

    python scripts/prepare_reddit.py                        # fetches the archive (3.1 GB, checked) if it is not there
    python scripts/prepare_reddit.py --archive corpus.zip   # from a local copy, which is not checked

The archive is read as a stream and never unpacked (it would take 19 GB), and no further than needed. A record without
an author or by a pseudo-author ([deleted], AutoModerator), and one without a text, is left out and counted.
"""

import json
import os
import subprocess
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator

from tqdm import tqdm

import start  # puts src/ and the folders below scripts/ on the path
from base.errors import fail, run_main
from base.files import atomic_write, is_text
from base.flags import Parser
from corpus.records import PSEUDO_AUTHORS

ARCHIVE = os.path.join(start.ROOT, "data", "reddit", "corpus-webis-tldr-17.zip")


def archive_lines(path: str) -> Iterator[tuple[str, bytes]]:
    """("member:line number", line) of every .json member of a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.endswith((".json", ".jsonl"))]
            if not members:
                fail(f"--archive {path}: holds no .json file; wanted corpus-webis-tldr-17.zip")
            for name in members:
                with archive.open(name) as stream:
                    for number, line in enumerate(stream, start=1):
                        yield f"{path}:{name}:{number}", line
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        fail(f"--archive {path}: not a zip archive, or a damaged one ({error}); fetch it again")


def usable(line: bytes, where: str) -> tuple[dict | None, str]:
    """(the record to write, "") or (None, why it is left out)."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        fail(f"{where}: not a line of JSON; is this the Webis-TLDR-17 corpus?")
    if not isinstance(record, dict):
        fail(f"{where}: not a JSON object; is this the Webis-TLDR-17 corpus?")
    author, content = record.get("author"), record.get("content")
    if not isinstance(author, str) or not author:
        return None, "without an author"
    if author in PSEUDO_AUTHORS:
        return None, f"by {author}"
    if not isinstance(content, str) or not content.strip():
        return None, "without a text"
    if not is_text(author + content):
        return None, "with half of a surrogate pair"
    return {"author": author, "content": content}, ""


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", help="a local corpus-webis-tldr-17.zip (default: downloaded to data/reddit)")
    parser.add_argument("--output", default=os.path.join(start.ROOT, "data", "reddit", "train.jsonl"))
    parser.add_argument("--records", type=int, default=500_000, help="usable records to take (default 500000)")
    args = parser.parse_args()
    if args.records < 1:
        fail(f"--records {args.records}: expected at least 1")
    if args.archive is None:
        status = subprocess.run(["bash", os.path.join(start.ROOT, "scripts", "download_reddit.sh")]).returncode
        if status:
            return status  # it has said why
    elif not os.path.isfile(args.archive):
        fail(f"--archive {args.archive}: no such file")
    os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)

    taken, left_out, authors = 0, Counter[str](), set[str]()
    bar = tqdm(desc="records", total=args.records, unit=" records", disable=not sys.stderr.isatty())
    with atomic_write(args.output) as out, bar:
        for where, line in archive_lines(args.archive or ARCHIVE):
            record, reason = usable(line, where)
            if record is None:
                left_out[reason] += 1
                continue
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            authors.add(record["author"])
            taken += 1
            bar.update()
            if taken == args.records:
                break
        if not taken:
            fail(f"--archive {args.archive or ARCHIVE}: holds no usable record")
    if taken < args.records:
        print(f"the archive ended after {taken} usable records of {args.records}")
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "nothing"
    print(f"{args.output}: {taken} records by {len(authors)} authors; left out: {reasons}")
    return 0


if __name__ == "__main__":
    run_main(main)
