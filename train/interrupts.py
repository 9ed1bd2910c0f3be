"""How a run is stopped from outside: by signals, and by the end of its launcher."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SAME_REQUEST = 5.0
"""Seconds in which a second signal is taken for the first one, arrived twice."""

LAUNCHER = "JFP4_LAUNCHER"
"""Environment variable by which a launcher tells a run its process id."""

_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


@contextmanager
def interrupts(*, alone: bool) -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM arrives; a second one ends the process.

    But for a SIGTERM within ``SAME_REQUEST`` of the first, which is taken for it.

    Of several processes (not ``alone``) SIGTERM asks all to stop, after the same step:
    ``processes.preempted``. SIGINT, which a terminal sends to all of them but never between the
    same steps, stops at once.
    """
    received: list[int] = []
    first = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first
        if not received:
            first = time.monotonic()
        # A scheduler that signals all of a job's processes reaches a run by its launcher as well.
        elif number == signal.SIGINT or time.monotonic() - first > SAME_REQUEST:
            signal.default_int_handler(number, frame)
        received.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM) if alone else ()
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_with_launcher() -> None:
    """Has Linux kill this process when the launcher that started it ends, however that happens.

    It would go on and hold its directory, or wait for ever, out of reach of whoever ended the
    launcher. On other systems it does.
    """
    launcher = os.environ.pop(LAUNCHER, None)  # it is not that of what this process starts
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)
