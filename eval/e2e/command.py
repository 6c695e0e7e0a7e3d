"""What the scoring scripts share: one-line errors with status 2, and files that are written aside and renamed."""

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import IO, NoReturn

from segments import UserError


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage. A file's name may begin with ~, as in --json=~/scores.json.

    java: whether the script starts Java, and so has --java_timeout."""

    def __init__(self, description: str | None, java: bool = True) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False)
        self.register("type", None, os.path.expanduser)  # what is done with the arguments that have no type
        self.add_argument("--json", dest="json_file", metavar="FILE", help="write all scores with their signature")
        if java:
            self.add_argument(
                "--java_timeout",
                type=float,
                default=300.0,
                metavar="SECONDS",
                help="silence after which Java counts as hung (default 300)",
            )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def check_files(args: argparse.Namespace, read: list[str], **written: str | None) -> None:
    """Raise UserError where a file of `written` (flag without its hyphens: path) cannot be written or would overwrite
    one of `read` or another, and for a --java_timeout out of range."""
    patience = getattr(args, "java_timeout", 1)
    if not 0 < patience <= 86400:
        raise UserError(f"--java_timeout {patience:g}: want seconds, more than 0 and at most a day")
    taken = [os.path.realpath(path) for path in read]
    for name, path in written.items():
        flag = "-" * min(2, len(name)) + name
        if path is None:
            continue
        if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
            raise UserError(f"{flag} {path}: cannot be written; want a file in an existing, writable folder")
        if os.path.realpath(path) in taken:
            raise UserError(f"{flag} {path}: is another file of this run, which would be lost; name another")
        taken.append(os.path.realpath(path))


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[IO[str]]:
    """Write a UTF-8 text file aside and rename it to `path` when the block ends without an exception."""
    aside = f"{path}.{os.getpid()}.partial"
    try:
        with open(aside, "w", encoding="utf-8", newline="\n") as handle:
            yield handle
            handle.flush()
            with contextlib.suppress(OSError):  # some file systems cannot; no room shows at the flush
                os.fsync(handle.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise


def run(main: Callable[[], None]) -> int:
    """main() as a process status: a user's mistake is one line on standard error and 2; signal n is 128 + n."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores one
            # unwinds the with blocks, which end Java
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    prepare_streams()
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        message = str(error)
    except BrokenPipeError:  # the reader of our standard output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        message = f"{error.filename or 'input/output'}: {error.strerror}"
        try:
            sys.stdout.flush()
        except OSError:  # it was standard output: another try, as the interpreter ends, would hide the status
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        return 0
    with contextlib.suppress(OSError):  # nobody is left to read it
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2


def prepare_streams() -> None:
    """Standard streams that were closed become /dev/null, so that no file of ours gets their number; characters that
    the locale's encoding lacks are escaped. As src/base/streams.py does."""
    for handle, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            dropped = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(dropped, True)
            setattr(sys, name, open(dropped, "w" if handle else "r", encoding="utf-8", closefd=False))
            continue
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and (stream.encoding.lower() != "utf-8" or stream.errors == "strict"):
            stream.reconfigure(errors="backslashreplace")
