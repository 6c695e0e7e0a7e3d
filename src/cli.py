"""What every script does the same way: one-line errors with status 2, and files that appear whole or not at all."""

import argparse
import contextlib
import errno
import fcntl
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any, NoReturn


class UserError(ValueError):
    """A mistake that the user can mend. Its text is one line: flag or file:line, what was got and wanted, the cure."""

    on_every_rank = False  # every rank of the job has this very error, so rank 0 alone prints it


def fail(message: str) -> NoReturn:
    """Raise UserError(message)."""
    raise UserError(message)


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and reports a mistake in one line."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        mistake = UserError(f"{message}; see --help")
        mistake.on_every_rank = True
        raise mistake


def check_least(flags: object, **least: int) -> None:
    """Raise UserError for a flag, an attribute of `flags`, below its least value. None, not given, passes; so below."""
    for name, bound in least.items():
        if (value := getattr(flags, name)) is not None and value < bound:
            fail(f"--{name} {value}: expected at least {bound}")


def check_range(flags: object, **bounds: tuple[float, float]) -> None:
    """Raise UserError for a flag that is not in its [low, high)."""
    for name, (low, high) in bounds.items():
        if (value := getattr(flags, name)) is not None and not low <= value < high:
            fail(f"--{name} {value:g}: expected a number from {low} to below {high:g}")


def check_positive(flags: object, **most: float) -> None:
    """Raise UserError for a flag that is not above 0, or above its most (math.inf: it may be any finite number)."""
    for name, bound in most.items():
        if (value := getattr(flags, name)) is not None and not (0 < value <= bound and value < math.inf):
            limit = f", at most {bound:g}" if bound < math.inf else ""
            fail(f"--{name} {value:g}: expected a number above 0{limit}")


def check_output(output: str, source: str, flag: str = "OUT") -> None:
    """Raise UserError where `output`, named by `flag`, is the file that is read."""
    if os.path.realpath(output) == os.path.realpath(source):
        fail(f"{flag} {output}: is the input itself, which would be lost; name another file")


def is_text(value: str) -> bool:
    """False where `value` holds half of a surrogate pair, which JSON can spell and no file can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def run_main(main: Callable[[], int | None]) -> None:
    """Run a script's main() and leave the process with its status: 2 and one line for a user's mistake.

    A ValueError that is not a UserError is a bug of ours and keeps its traceback.
    """
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        rank = os.environ.get("RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
        if rank == "0" or not error.on_every_rank:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        status = 2
    except BrokenPipeError:  # the reader of our standard output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except KeyboardInterrupt:
        status = 130
    except OSError as error:
        # A full disk, a missing permission, a folder where a file was wanted: the operating system's own words name it.
        if error.filename is None and error.errno is None:
            raise
        print(f"error: {error.filename or 'input/output'}: {error.strerror}", file=sys.stderr, flush=True)
        status = 2
    sys.exit(status)


def open_text(path: str, flag: str = "") -> IO[str]:
    """Open `path` for reading as UTF-8, or raise UserError. `flag` names the flag that gave the path."""
    try:
        return open(path, encoding="utf-8", newline="\n")
    except OSError as error:
        fail(f"{flag} {path}: cannot be read ({error.strerror})".strip())


def read_object(path: str, wanted: str, flag: str = "") -> dict:
    """The JSON object that a file holds. UserError ends in "wanted" and `wanted`: what it should be, and the cure."""
    check_file(path, flag)
    with open_text(path, flag) as handle:
        try:
            content = json.load(handle)
        except (ValueError, RecursionError) as error:
            fail(f"{flag} {path}: not JSON ({error}); wanted {wanted}".strip())
    if not isinstance(content, dict):
        fail(f"{flag} {path}: holds a {type(content).__name__}; wanted {wanted}".strip())
    return content


def check_file(path: str, flag: str = "") -> None:
    """Raise UserError for a pipe or a device, or a link to one: it gives its content once, or without an end. For all
    that a run reads more than once, or finds in its own folder."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        what = f"{flag} {path}".strip()
        fail(f"{what}: is a pipe or a device, and is read more than once; put a file with its content into its place")


def read_lines(path: str, flag: str = "", digest: Any = None) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) of a UTF-8 text file. `flag` names the flag that gave the path.

    Only a line feed ends a line: characters such as U+2028 that str.splitlines() takes for an end are text. `digest`, of
    hashlib, is fed with what was read.
    Raises UserError where the file cannot be read, and with file:line where its bytes are not UTF-8.
    """
    try:
        with open(path, "rb") as handle:
            for number, line in enumerate(handle, start=1):
                if digest is not None:
                    digest.update(line)
                try:
                    yield number, line.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    fail(f"{path}:{number}: not UTF-8 (byte 0x{line[error.start]:02x}); save the file as UTF-8")
    except OSError as error:
        fail(f"{flag} {path}: cannot be read ({error.strerror})".strip())


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[IO]:
    """Write a file aside, flush it to disk and rename it to `path`: a reader sees the old file or the new one, whole.

    mode is "w" (UTF-8 text, line feeds kept) or "wb". An exception inside the block leaves `path` untouched.
    """
    aside = f"{path}.{os.getpid()}.partial"
    options = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(aside, mode, **options) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
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
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return False
    return True


def sync_folder(folder: str) -> None:
    """Make a rename inside `folder` survive a power cut."""
    handle = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
