"""Mistakes of the user in one line with status 2, and every script's way out."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """A mistake that the user can correct. Its text is one line: flag or file:line, got and wanted, the cure."""

    on_every_rank = False  # every rank of the job has this very error, so rank 0 alone prints it


def fail(message: str) -> NoReturn:
    """Raise UserError(message)."""
    raise UserError(message)


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
