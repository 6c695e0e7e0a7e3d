"""What a search or a sampling has finished, on disk, so that one that was killed can go on.

OUTPUT.journal.RANK, one file a rank, holds a line of JSON a record. The first says which search it is:
{"format": FORMAT, ...its identity}; the files of format 1 that earlier versions wrote lack the number. The others are
{"context": index of a context, "predict": [its tokens]}, or of a sample with {"tokens", "logprob"}. A line that a kill
tore is ignored, and its context searched again; without a whole first line the file is refused.
"""

import errno
import glob
import io
import json
import os
from typing import IO, Any

from base.errors import fail
from base.files import check_file, check_format, lock

FORMAT = 1  # the newest that this version reads, and the one that it writes


class Journal:
    """The journal of the search that writes the file `output`. flag: what named the file. work: the word for a search.

    Rank 0 holds the lock of its own file. Without it, a second search would drop these files, and each of the two
    would replace the other's output.
    """

    def __init__(self, output: str, flag: str = "--output_file", work: str = "search"):
        self.output, self.flag, self.work = output, flag, work
        self.locked: IO[str] | None = None
        self.alone = True  # False: its file system has no locks, and nothing keeps a second search out
        self.left_over = False  # whether take_lock() found files of a search that did not end

    def files(self) -> list[str]:
        """Those of every rank of this search, or of one that did not end."""
        return sorted(glob.glob(glob.escape(self.output) + ".journal.*"))

    def path(self, rank: int) -> str:
        return f"{self.output}.journal.{rank}"

    def take_lock(self) -> None:
        """On rank 0. UserError where another search has it."""
        path, self.left_over = self.path(0), bool(self.files())
        for file in (path, *self.files()):
            check_file(file, self.flag)
        while True:
            self.locked = open(path, "a")
            try:
                self.alone = lock(self.locked.fileno())
            except BlockingIOError:
                fail(f"{self.flag} {self.output}: another {self.work} is writing it; wait for its end, or name another")
            if os.path.exists(path) and os.path.samestat(os.fstat(self.locked.fileno()), os.stat(path)):
                return  # else a search has just ended, and removed what was opened

    def read(self, identity: dict) -> dict[int, Any]:
        """Index of a context -> its "predict", from every rank's file.

        UserError where there is no file, or one of another search or of a format that is not known.
        """
        if not self.files():
            fail(f"--resume: nothing to resume, there is no {self.output}.journal.*; leave --resume out")
        found: dict[int, Any] = {}
        for file in self.files():
            with open(file, "rb") as handle:  # by bytes: a torn line may end inside a character, or in NULs
                lines = handle.readlines()
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                if not isinstance(record, dict):  # what a kill left of a line can be a number
                    if number == 1 and line.endswith(b"\n"):  # open() begins a file anew that a kill left without this
                        fail(
                            f"--resume {file}:1: damaged, and it alone says which search the file is of; restore it, "
                            "or leave --resume out"
                        )
                    continue
                if number == 1:
                    check_format(record.get("format"), FORMAT, f"--resume {file}:1")
                    changed = [key for key, value in identity.items() if record.get(key) != value]
                    if changed:
                        fail(
                            f"--resume: {file} is of a {self.work} with other {' and '.join(changed)}; "
                            "give the same, or leave --resume out"
                        )
                elif "context" in record:
                    found[record["context"]] = record["predict"]
        return found

    def open(self, rank: int, identity: dict, fresh: bool) -> io.FileIO:
        """A rank's file, to be added to; begun anew where it is `fresh` or a kill left not even its first line."""
        path = self.path(rank)
        keep = not fresh and os.path.exists(path) and b"\n" in open(path, "rb").read(4096)
        handle = open(path, "ab" if keep else "wb", buffering=0)  # what a full disk refuses is not tried again
        if keep:
            handle.write(b"\n")  # ends a torn line; an empty one is ignored like it
        else:
            self.add(handle, {"format": FORMAT, **identity})
        return handle

    @staticmethod
    def add(handle: io.FileIO, record: dict) -> None:
        line = json.dumps(record).encode() + b"\n"
        try:
            if handle.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            fail(f"{handle.name!s}: {error.strerror}; what was found before is kept: make room and --resume")

    def remove(self) -> None:
        for file in self.files():
            os.unlink(file)

    def empty(self) -> None:
        """Drop what the files hold. They are not removed: the lock is that of a file."""
        for file in self.files():
            os.truncate(file, 0)
