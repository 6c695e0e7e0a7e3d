"""The files that a run writes beside its weights (args.json, metrics.jsonl, event files, privacy.json, the lock), and
its output on the terminal."""

import json
import math
import os
import socket
import sys
import time
from typing import BinaryIO

from tqdm import tqdm

from base.errors import fail
from base.files import atomic_write, check_file, check_link, lock, read_object

ARGS = "args.json"


def read_args(folder: str) -> dict:
    """The entries of a training folder's args.json; {} where it has none."""
    path = os.path.join(folder, ARGS)
    return read_object(path, "what the run wrote; restore it") if os.path.exists(path) else {}


class WorkDir:
    """A run's folder, held by one run at a time."""

    def __init__(self, path: str, must_exist: bool = False, flag: str = "--work_dir"):
        self.path, self.tensorboard, self.torn_dropped = path, None, False
        check_link(path, flag)
        if must_exist and not os.path.isdir(path):
            fail(f"--resume: {flag} {path} does not exist, there is nothing to continue")
        try:
            os.makedirs(path, exist_ok=True)
            for name in (".lock", ARGS, "metrics.jsonl", "privacy.json"):  # before a step is drawn
                check_file(file := os.path.join(path, name))
                if os.path.exists(file):  # of an earlier attempt, perhaps another user's
                    open(file, "ab").close()
            self.lock = open(os.path.join(path, ".lock"), "a+")
        except OSError as error:
            what = "" if error.filename in (None, path) else f": {error.filename}"
            fail(f"{flag} {path}: cannot be written ({error.strerror}{what})")
        try:
            lock(self.lock.fileno())  # where there are no locks, the ledger says so and watches its own file
        except BlockingIOError:
            self.lock.seek(0)
            fail(f"{flag} {path}: another run is writing there ({self.lock.read().strip() or 'unknown process'})")
        self.lock.truncate(0)
        try:
            self.lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            self.lock.flush()
        except OSError as error:
            fail(f"{flag} {path}: cannot be written ({error.strerror})")

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def write_json(self, name: str, content: dict) -> None:
        with atomic_write(self.file(name)) as handle:
            json.dump(content, handle, indent=1, allow_nan=False)
            handle.write("\n")

    def read_json(self, name: str) -> dict:
        return read_object(self.file(name), "what the run wrote; restore it or start in a new folder")

    def open_tensorboard(self, done: int) -> None:
        """Make append_metrics() write TensorBoard's event files too. A killed attempt's events of steps after `done`,
        which are repeated, are hidden."""
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and the package need not be there
        except ImportError as error:
            fail(
                f"--tensorboard: the package tensorboard does not work ({error}); install it anew, or leave the flag "
                "out"
            )
        self.tensorboard = SummaryWriter(self.file("tensorboard"), purge_step=done + 1)

    def append_metrics(self, record: dict) -> None:
        """Append one line to metrics.jsonl: a log line or an evaluation. The first call drops a line that a kill cut
        short; a later call could drop one that another process is writing."""
        path, line = self.file("metrics.jsonl"), json.dumps(record, allow_nan=False).encode() + b"\n"
        check_file(path)
        try:
            with open(path, "ab+") as handle:
                if not self.torn_dropped:
                    self.drop_torn_line(handle)
                    self.torn_dropped = True
                handle.write(line)
            if self.tensorboard is not None:
                for name, value in record.items():
                    if name != "step" and isinstance(value, (int, float)):
                        self.tensorboard.add_scalar(name, value, record["step"])
                self.tensorboard.flush()  # a line on the disk is an event on the disk
        except OSError as error:
            fail(f"{path}: {error.strerror}; the last checkpoint is intact: make room and --resume")

    @staticmethod
    def drop_torn_line(handle: BinaryIO) -> None:
        end = handle.seek(0, os.SEEK_END)
        handle.seek(max(0, end - 2**16))
        tail = handle.read()
        if tail and not tail.endswith(b"\n"):
            handle.truncate(end - len(tail) + tail.rfind(b"\n") + 1)


class NoWorkDir(WorkDir):
    """The folder on every rank but the first: nothing is written."""

    def __init__(self, path: str):
        self.path = path

    def write_json(self, name: str, content: dict) -> None:
        pass

    def open_tensorboard(self, done: int) -> None:
        pass

    def append_metrics(self, record: dict) -> None:
        pass


class Display:
    """Progress output: a bar on a terminal, plain lines elsewhere. Silent on every rank but the first."""

    def __init__(self, is_main: bool, total: int, done: int, bar: bool = True, progress: bool = True):
        """bar: show a bar on a terminal. progress: also print lines that are neither warnings nor results."""
        self.is_main, self.progress = is_main, progress
        on_terminal = is_main and sys.stderr.isatty() and bar
        self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True) if on_terminal else None

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def say(self, text: str, important: bool = False) -> None:
        """A line on standard output, above the bar where there is one. important: a warning or a result."""
        if self.is_main and (self.progress or important):
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def status(self, **values: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix(values)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Meter:
    """Sums of what steps report, and the rate since the last reading."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.steps, self.start = 0, time.monotonic()
        self.loss, self.units, self.tokens, self.texts, self.grad_norm = 0.0, 0.0, 0.0, 0.0, 0.0

    def add(self, loss: float, units: float, tokens: float, texts: float, grad_norm: float) -> None:
        self.steps += 1
        self.loss += loss
        self.units += units
        self.tokens += tokens
        self.texts += texts
        self.grad_norm += grad_norm

    def read(self, unit: str) -> dict:
        """Mean loss of a unit (None where none was drawn), units, texts and real tokens a second, mean norm of a step's
        released gradient before --clip (None where it is not finite, or there was no step); starts anew."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        grad_norm = self.grad_norm / self.steps if self.steps else math.nan
        reading = {
            "loss": self.loss / self.units if self.units else None,
            f"{unit}s_per_s": self.units / seconds,
            "texts_per_s": self.texts / seconds,
            "tokens_per_s": self.tokens / seconds,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        }
        self.reset()
        return reading
