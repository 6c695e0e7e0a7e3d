"""Standard streams that are there, that take every character, and whose loss ends no training."""

import io
import os
import sys


def silence(handle: int) -> None:
    """From now on what is written to the open file number `handle` is dropped."""
    dropped = os.open(os.devnull, os.O_RDWR)
    os.dup2(dropped, handle)
    if dropped == handle:
        os.set_inheritable(handle, True)  # as dup2 makes another one
    else:
        os.close(dropped)


class Lasting(io.FileIO):
    """An output that is dropped from the first failing write on: its reader or terminal is gone, its disk is full."""

    def write(self, content, /) -> int:
        try:
            return super().write(content) or 0
        except BlockingIOError:
            raise
        except OSError:
            silence(self.fileno())
            return len(content)


def prepare(lasting: bool = False) -> None:
    """Call before a script opens its first file.

    A stream that the process was started without (`>&-`) becomes /dev/null. The next file that is opened would have its
    number otherwise, and whatever C code prints there would land in that file. A character that the locale's encoding
    lacks is written as an escape. lasting: a stream that cannot be written to any more is no error.
    """
    for handle, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(handle)
        except OSError:
            silence(handle)
        mode, stream = "w" if handle else "r", getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(handle, mode, encoding="utf-8", closefd=False))
            continue
        if not handle or not isinstance(stream, io.TextIOWrapper):
            continue
        if stream.encoding.lower() != "utf-8" or stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
        if lasting and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            raw = io.BufferedWriter(Lasting(handle, mode, closefd=False))
            setattr(
                sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=stream.line_buffering)
            )
