"""Mistakes of the user in one line with status 2, and every script's way out."""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from base import signals, streams


class UserError(ValueError):
    """A mistake that the user can correct. Its text is one line: flag or file:line, got and wanted, the cure."""

    on_every_rank = False  # every rank of the job has this very error, so rank 0 alone prints it
    elsewhere = False  # another rank has the cause


def fail(message: str, on_every_rank: bool = False) -> NoReturn:
    """Raise UserError(message). on_every_rank: all ranks do so."""
    mistake = UserError(message)
    mistake.on_every_rank = on_every_rank
    raise mistake


def run_main(main: Callable[[], int | None], lasting: bool = False) -> None:
    """Run a script's main() and leave the process with its status: 2 and one line for a user's mistake, 128 + n for
    signal n, which unwinds what is open.

    lasting: the loss of standard output or standard error does not end it.
    A ValueError that is not a UserError is a bug of ours and keeps its traceback.
    """
    streams.prepare(lasting)
    signals.on_request(lambda number: sys.exit(128 + number))
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        rank = os.environ.get("RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
        report(str(error), shown=rank == "0" or not error.on_every_rank, cause=not error.elsewhere)
        status = 2
    except BrokenPipeError:  # the reader of our standard output went away, as `| head` does
        streams.silence(sys.stdout.fileno())
        status = 141
    except OSError as error:
        # A full disk, a missing permission, a folder where a file was wanted: the operating system's own words name it.
        if error.filename is None and error.errno is None:
            raise
        report(f"{error.filename or 'input/output'}: {error.strerror}")
        try:
            sys.stdout.flush()
        except OSError:  # it was standard output: another try, as the interpreter ends, would hide the status
            streams.silence(sys.stdout.fileno())
        status = 2
    except Exception as error:
        tell_launcher(f"{type(error).__name__}: {error}", traceback.format_exc())
        raise
    sys.exit(status)


def report(message: str, shown: bool = True, cause: bool = True) -> None:
    """Say a mistake in one line on standard error, and to the launcher where it may be the cause of the job's end."""
    line = f"error: {' '.join(message.split())}"
    if cause:
        tell_launcher(line)
    try:
        if shown:
            print(line, file=sys.stderr, flush=True)
    except OSError:  # nobody is left to read it; another try, as the interpreter ends, would hide the status
        streams.silence(sys.stderr.fileno())


def tell_launcher(line: str, callstack: str = "") -> None:
    """Write why this rank ends where torchrun looks for it, in the form of torch.distributed.elastic's ErrorHandler."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or "RANK" not in os.environ:
        return
    more = {"py_callstack": callstack or line, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as handle:
        json.dump({"message": {"message": line, "extraInfo": more}}, handle)
