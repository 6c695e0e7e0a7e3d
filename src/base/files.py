"""Files read with their mistakes named, and files that appear whole or not at all."""

import codecs
import contextlib
import errno
import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import IO, Any

from base.errors import fail

UNABLE = (errno.ENOSYS, errno.EOPNOTSUPP)  # what a file system says that does not have a call
LFS_POINTER = b"version https://git-lfs"
BOM = "\ufeff"  # a byte-order mark


def is_text(value: str) -> bool:
    """False where `value` holds half of a surrogate pair, which JSON can spell and no file can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_text(path: str, flag: str = "") -> IO[str]:
    """Open `path` for reading as UTF-8, or raise UserError. `flag` names the flag that gave the path.

    A byte-order mark at the start is dropped.
    """
    try:
        return open(path, encoding="utf-8-sig", newline="\n")
    except OSError as error:
        fail(f"{flag} {path}: cannot be read ({error.strerror})".strip())


def read_object(path: str, wanted: str, flag: str = "") -> dict:
    """The JSON object that a file holds. UserError ends in "wanted" and `wanted`: what it should be, and the cure."""
    check_file(path, flag)
    check_pointer(path, flag)
    with open_text(path, flag) as handle:
        try:
            content = json.load(handle)
        except (ValueError, RecursionError) as error:
            fail(f"{flag} {path}: not JSON ({error}); wanted {wanted}".strip())
    if not isinstance(content, dict):
        fail(f"{flag} {path}: holds a {type(content).__name__}; wanted {wanted}".strip())
    return content


def check_pointer(path: str, flag: str = "") -> None:
    """Raise UserError for the line that Git LFS leaves in place of a large file until it is fetched."""
    with contextlib.suppress(OSError), open(path, "rb") as handle:  # whoever reads the file says why it cannot be read
        if handle.read(len(LFS_POINTER)) == LFS_POINTER:
            what = f"{flag} {path}".strip()
            fail(f"{what}: is a Git LFS pointer, not the file itself; run git lfs pull where it was cloned")


def folder_below(folder: str, names: Iterable[str]) -> str | None:
    """A folder below that holds one of `names`: the newest checkpoint-N that transformers' Trainer left, a snapshot in
    the hub's cache, or any other child."""
    names = tuple(names)
    found = []
    for pattern in ("", "snapshots"):
        with contextlib.suppress(OSError), os.scandir(os.path.join(folder, pattern)) as entries:
            found += [(entry.name, entry.path) for entry in entries if entry.is_dir()]
    found = [(name, path) for name, path in found if any(os.path.isfile(os.path.join(path, file)) for file in names)]

    def rank(pair: tuple[str, str]) -> tuple[int, str]:
        match = re.fullmatch(r"checkpoint-(\d+)", pair[0])
        return int(match[1]) if match else -1, pair[1]

    return max(found, key=rank)[1] if found else None


def check_format(found: object, newest: int, where: str) -> int:
    """The format number of a file or record, 1 .. newest, from its entry `found`.

    None, which stands for an absent entry, is format 1: the files that were written before formats had numbers.
    Raises UserError, which begins with `where`, for anything but a number that this version knows.
    """
    if found is None:
        return 1
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        fail(f"{where}: format {found!r} is none: wanted a whole number from 1 to {newest}; restore the file")
    if found > newest:
        fail(
            f"{where}: format {found} is newer than this version reads ({newest}); use the version that wrote it, "
            "or a later one"
        )
    return found


def check_file(path: str, flag: str = "") -> None:
    """Raise UserError for a pipe or a device, or a link to one: it gives its content once, or without an end. For all
    that a run reads more than once, or finds in its own folder."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        what = f"{flag} {path}".strip()
        fail(f"{what}: is a pipe or a device, and is read more than once; put a file with its content into its place")


def check_link(folder: str, flag: str) -> None:
    """Raise UserError for a link to a folder that is not there: making it fails with "File exists"."""
    if os.path.islink(folder) and not os.path.exists(folder):
        fail(f"{flag} {folder}: is a link to {os.readlink(folder)}, which is not there; make that, or name another one")


def check_place(path: str, flag: str) -> None:
    """Raise UserError where no file of that name can be written, before the work that it shall hold."""
    if os.path.isdir(path):
        fail(f"{flag} {path}: is a folder, wanted the name of a file")
    folder = os.path.dirname(path)
    check_link(folder or ".", flag)
    if folder and not os.path.isdir(folder):
        fail(f"{flag} {path}: there is no folder {folder}; make it, or name another")
    if not os.access(folder or ".", os.W_OK | os.X_OK):
        fail(f"{flag} {path}: its folder cannot be written to; name another")


def decode_line(line: bytes, path: str, number: int) -> str:
    """Line `number` (from 1) of the UTF-8 text file `path`, without its end, a line feed with or without carriage
    returns before it. A byte-order mark at the start of the file is dropped.

    Raises UserError with file:line for bytes that are not UTF-8, and for what no editor shows and programs read
    differently: NUL, a carriage return inside a line (several lines that it ends would be one here), and a byte-order
    mark at the start of a later line, where files were joined.
    """
    try:
        text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        fail(f"{path}:{number}: not UTF-8 (byte 0x{line[error.start]:02x}); save the file as UTF-8")
    if "\0" in text:
        fail(f"{path}:{number}: holds NUL, which is no text, got {text[:60]!r}; save the file as UTF-8")
    if "\r" in text:
        fail(f"{path}:{number}: carriage returns inside the line, got {text[:60]!r}; save the file with line feeds")
    if text.startswith(BOM):
        fail(f"{path}:{number}: begins with a byte-order mark (U+FEFF), as joined files do; remove it")
    return text


def read_lines(path: str, flag: str = "", digest: Any = None) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) of a UTF-8 text file. `flag` names the flag that gave the path.

    Only a line feed ends a line: characters such as U+2028 that str.splitlines() takes for an end are text.
    decode_line() says what is dropped and what is refused.
    digest: an object of hashlib, which is fed with what was read.
    Raises UserError where the file cannot be read, and with file:line as decode_line() does.
    """
    try:
        with open(path, "rb") as handle:
            for number, line in enumerate(handle, start=1):
                if digest is not None:
                    digest.update(line)
                yield number, decode_line(line, path, number)
    except OSError as error:
        fail(f"{flag} {path}: cannot be read ({error.strerror})".strip())


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[IO]:
    """Write a file aside, flush it to disk and rename it to `path`: a reader sees the old file or the new one, whole.

    mode is "w" (UTF-8 text, line feeds kept) or "wb". An exception inside the block leaves `path` untouched.
    """
    aside = f"{path}.{os.getpid()}.partial"
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    try:
        with open(aside, mode, encoding=encoding, newline=newline) as handle:
            yield handle
            handle.flush()
            sync(handle.fileno())
        os.replace(aside, path)
        sync_folder(os.path.dirname(path))
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = path  # a full disk shows at a write, which does not know its file's name
        raise


def lock(handle: int) -> bool:
    """Take the lock of an open file, which its closing gives back; False where its file system has no locks.

    Raises BlockingIOError where another process holds it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, *UNABLE):
            raise
        return False
    return True


def sync(handle: int) -> bool:
    """Flush an open file or folder to its disk; False where its file system has no such call."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, *UNABLE):
            raise
        return False
    return True


def sync_folder(folder: str) -> bool:
    """Make a rename inside `folder` survive a power cut; False where that cannot be had.

    Old CIFS, VirtualBox's shared folders and some of FUSE cannot sync a folder, and nobody can open one that may be
    written to and not read.
    """
    try:
        handle = os.open(folder or ".", os.O_RDONLY)
    except PermissionError:
        return False
    try:
        return sync(handle)
    finally:
        os.close(handle)
