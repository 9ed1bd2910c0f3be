"""``python -m train.launch``: runs ``train.main``, and starts it again when it was killed.

One on every host, such as under ``srun``, with the flags of ``train.main`` and --run_dir among
them; or one alone that starts ``--processes`` on this host. Each starts its own processes again,
which meet at the coordinator, and go on from the last checkpoint that is complete. Where one has
ended, those of other hosts do not start again.
"""

import argparse
import contextlib
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.config import flags_of, value_of
from train.errors import UserError
from train.interrupts import LAUNCHER, SAME_REQUEST
from train.main import STOPPED
from train.rundir import CONFIG, ENDED

POLL = 0.2
"""Seconds between looks at the processes."""

USER_ERROR, INTERRUPTED = 2, 130
FINAL = (USER_ERROR, INTERRUPTED, STOPPED)
"""Exit statuses of ``train.main`` after which it is not started again."""

LATE = 60
"""Seconds that launchers of one start may begin after each other."""

PAUSE = 5.0
"""Seconds before a process starts again that others meet: what ended it may be a mistake of one of
them, whose launcher is about to tell."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs until the run is done; returns the exit status of the last attempt."""
    parser = argparse.ArgumentParser(
        prog="python -m train.launch",
        epilog="all other flags are train.main's, --run_dir among them",
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, help="started here; by default one, as flags say")
    parser.add_argument("--restarts", type=int, default=10, help="most times it is started again")
    own, flags = parser.parse_known_args(args)
    try:
        return launch(flags, own.processes, own.restarts)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


def launch(flags: Sequence[str], processes: int | None, restarts: int) -> int:
    """Runs ``train.main`` with ``flags`` until it ends by itself; returns its exit status.

    SIGTERM, SIGINT and SIGHUP are handed on as SIGTERM, so that the run saves and ends; it is not
    started again then. One that another host's launcher had save and end is not either: all of them
    return ``STOPPED``. A second signal, more than ``SAME_REQUEST`` seconds later, kills it: one
    that hangs cannot save.

    Raises:
        UserError: no --run_dir, or one that cannot be read; a coordinator besides ``processes``, or
            numbers that start nothing.
    """
    if processes is not None and processes < 1:
        raise UserError(f"--processes={processes}; expected >= 1")
    if restarts < 0:
        raise UserError(f"--restarts={restarts}; expected >= 0")
    run_dir = value_of("run_dir", list(flags), None)
    if run_dir is None:
        raise UserError("--run_dir=None; expected a directory, given as a flag at every start")
    if processes is not None and value_of("coordinator", list(flags), None) is not None:
        raise UserError(f"--processes={processes} with --coordinator; expected one of them")
    others = _Others(Path(run_dir)) if processes is None and _meets_others(flags) else None
    status = INTERRUPTED
    with _Terminated() as terminated:
        for attempt in range(restarts + 1):
            if attempt and others is not None:
                time.sleep(PAUSE)
                if (ended := others.ended()) is not None:
                    _say(f"not starting again: {ended}")
                    break
            if attempt:
                _say(f"starting again, {attempt} of at most {restarts} times")
            if terminated.received:
                break
            resume = ["--resume"] if _began(run_dir) and "--resume" not in flags else []
            status = _attempt([*flags, *resume], processes, terminated)
            if status in (0, *FINAL) or terminated.received:
                break
    if others is not None:
        others.tell(f"the launcher on {platform.node()} has ended, {_how(status)}")
    return status


def _began(run_dir: str) -> bool:
    try:
        return Path(run_dir, CONFIG).is_file()
    except OSError as error:
        raise UserError(f"--run_dir={run_dir} cannot be read ({error.strerror})") from error


def _meets_others(flags: Sequence[str]) -> bool:
    """Whether there may be launchers on other hosts: by ``flags``, or the file of --config."""
    file = value_of("config", list(flags), None)
    try:
        of_file = [] if file is None else flags_of(Path(file))
    except UserError:  # for the run to tell
        return True
    return value_of("coordinator", [*of_file, *flags], None) is not None


class _Others:
    """What launchers on several hosts tell each other: which of them ended first, in a file.

    What it tells counts from shortly before this launcher began. What was told before is of an
    earlier start, and need not be cleared away.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / ENDED
        self._since = time.time() - LATE

    def ended(self) -> str | None:
        """How the first one ended, or None if none has."""
        with contextlib.suppress(OSError):
            if self._file.stat().st_mtime >= self._since:
                return self._file.read_text() or "the launcher on another host has ended"
        return None

    def tell(self, how: str) -> None:
        """Tells how this one has ended, unless another has."""
        if self.ended() is None:
            with contextlib.suppress(OSError):  # a full disk has room for an empty file
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._file.write_text(how)


def _attempt(flags: Sequence[str], processes: int | None, terminated: "_Terminated") -> int:
    command = [sys.executable, "-m", "train.main", *flags]
    meeting = [[]] if processes is None else _meeting(processes)
    # In groups of their own: a terminal's Ctrl-C would reach them beside what is handed on, and a
    # SIGINT after another signal ends a run at once.
    environment = os.environ | {LAUNCHER: str(os.getpid())}
    running = [
        subprocess.Popen([*command, *own], process_group=0, env=environment) for own in meeting
    ]
    handed_on = False
    try:
        while True:
            # Here and not where signals arrive, which may be before the processes are known.
            if terminated.received and not handed_on:
                handed_on = True
                for process in running:
                    process.terminate()
            if terminated.again:
                _say("asked again to end: killing what still runs")
                return INTERRUPTED
            statuses = [process.poll() for process in running]
            failed = [i for i, status in enumerate(statuses) if status not in (None, 0, STOPPED)]
            if failed:
                # What is not complete without it is not completed: nothing to wait for. One that
                # has a mistake to tell may take others with it.
                told = [i for i in failed if statuses[i] in FINAL]
                first = (told or failed)[0]
                status = running[first].returncode
                _say(f"process {first} of {len(running)} here ended {_how(status)}")
                return status
            if None not in statuses:
                return STOPPED if STOPPED in statuses else 0
            time.sleep(POLL)
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()


def _meeting(processes: int) -> list[list[str]]:
    """The flags by which processes on this host find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        [f"--coordinator={address}", f"--num_processes={processes}", f"--process_id={number}"]
        for number in range(processes)
    ]


class _Terminated:
    """Notes the signals that ask this process to end, which they do not do by themselves.

    Attributes:
        received: whether there was one.
        again: whether there was another, which is not the first one arrived twice.
    """

    def __init__(self) -> None:
        self.received = self.again = False

    def __enter__(self) -> "_Terminated":
        # What is ignored, as nohup has it, stays so.
        numbers = [
            number
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            if signal.getsignal(number) != signal.SIG_IGN
        ]
        self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._first = True, now
        self.again |= now - self._first > SAME_REQUEST


def _how(status: int) -> str:
    return f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"


def _say(message: str) -> None:
    print(f"launch: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
