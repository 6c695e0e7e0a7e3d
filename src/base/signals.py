"""Signals that ask a process to end: which, whether they are heeded, and what a later one does."""

import os
import signal
import time
from collections.abc import Callable

# A terminal that hangs up, a scheduler that warns before it kills, a limit on processor time: each ends a process that
# does not handle it, and a training with the steps that it has charged since its last checkpoint.
URGENT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
ECHO = 5.0  # seconds; a scheduler signals every process of a job, and torchrun hands its own signal on


def stays_ignored(number: signal.Signals) -> bool:
    """Whether the process was started with the signal ignored, as by nohup, and has to leave it so.

    torchrun's agent heeds what nohup ignores, hands it on to its ranks, and kills those that live 30 s later.
    """
    if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) is not signal.SIG_IGN:
        return False
    heeded = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT").split(",")
    return "TORCHELASTIC_RUN_ID" not in os.environ or number.name not in heeded


def on_request(first: Callable[[int], None]) -> None:
    """From now on the first signal that asks the process to end calls first(its number).

    What comes within ECHO seconds of it is the same request; a later urgent one ends the process at once.
    """
    since: float | None = None

    def handle(number: int, frame: object) -> None:
        nonlocal since
        if since is None:
            since = time.monotonic()
            first(number)
        elif number in URGENT and time.monotonic() - since > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in (*URGENT, *WARNINGS):
        if not stays_ignored(number):
            signal.signal(number, handle)
