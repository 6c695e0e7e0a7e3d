"""Append-only files of chained records, a line of JSON each: the machinery of the ledger and of the budget file.

A record's checksum is over itself and over the checksum before it, so lines that were changed, dropped or moved show.
A record is on disk when append() returns. What another program wrote is never cut off.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping

from base.errors import fail
from base.files import check_file


class Overtaken(Exception):
    """Another run or program wrote to the file at the same moment."""


def digest(previous: str, record: Mapping) -> str:
    """16 hexadecimal digits of a record, whose entry "checksum" is left out, and of the checksum before it."""
    body = json.dumps({key: value for key, value in record.items() if key != "checksum"}, sort_keys=True)
    return hashlib.sha256(f"{previous}\n{body}".encode()).hexdigest()[:16]


def read_chain(
    path: str, opened: int | None, accept: Callable[[object, str], str | None], unreadable: str, damaged: str
) -> tuple[int, bytes]:
    """Give each whole line's record (None for one that is no JSON) to accept(record, "path:line"), which keeps it, or
    says what is wrong with it. `opened`: the open file, where there is one.

    Returns (bytes of the whole lines, what is left of a last line cut short). UserError for a file that cannot be read,
    which ends in `unreadable`, and for a damaged line, which ends in `damaged`.
    """
    check_file(path)
    try:
        with open(path if opened is None else opened, "rb", closefd=opened is None) as handle:
            content = handle.read()
    except OSError as error:
        fail(f"{path}: {unreadable.format(error.strerror)}")
    *lines, rest = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        problem = accept(record, f"{path}:{number}")
        if problem is not None:
            fail(f"{path}:{number}: damaged: {problem}; {damaged}")
    return len(content) - len(rest), rest


def append(handle: int, line: bytes, size: int) -> None:
    """Write `line` at the end of a file of `size` bytes, opened with O_APPEND, and flush it to disk.

    Raises OSError where the disk refuses, Overtaken where another wrote since the file had `size` bytes. Then the line
    is taken back, unless another line follows it: a record too many may stay, none is lost.
    """
    written = 0
    try:
        written = os.write(handle, line)  # at the end, wherever that is by now
        if written != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(handle)
    except OSError:
        take_back(handle, written)
        raise
    if os.lseek(handle, 0, os.SEEK_CUR) != size + len(line):
        take_back(handle, written)
        raise Overtaken


def take_back(handle: int, written: int) -> None:
    """Cut off what the last write left, if nothing was written after it."""
    with contextlib.suppress(OSError):
        end = os.lseek(handle, 0, os.SEEK_CUR)
        if os.fstat(handle).st_size == end:
            os.ftruncate(handle, end - written)


def mend(path: str, opened: int, line: bytes, size: int) -> None:
    """Write a whole line over a last one that was cut short, behind the first `size` bytes, and flush it to disk.

    opened: the file, read to its end. Raises Overtaken where it has grown since; OSError where the disk refuses, and
    what was torn then stays.
    """
    before = os.lseek(opened, 0, os.SEEK_CUR)
    if os.fstat(opened).st_size != before:
        raise Overtaken
    handle = os.open(path, os.O_RDWR)  # the other one can but append
    try:
        if os.pwrite(handle, line, size) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(handle, size + len(line))  # the torn line may have been the longer one
        os.fsync(handle)
    except OSError:
        with contextlib.suppress(OSError):  # failing here too leaves a record too many, never one too few
            os.ftruncate(handle, before)
        raise
    finally:
        os.close(handle)
