"""What a run reports: metrics.jsonl, health.jsonl, TensorBoard events, and the progress line."""

import contextlib
import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from train.errors import UserError

METRICS, HEALTH = "metrics.jsonl", "health.jsonl"


class RunLog:
    """Writers of a run directory; of a resumed run, what was written after its checkpoint goes."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self._open = contextlib.ExitStack()
        self._metrics = self._open.enter_context(_open_at(run_dir / METRICS, start_step))
        self._health = self._open.enter_context(_open_at(run_dir / HEALTH, start_step))
        (run_dir / "tensorboard").mkdir(exist_ok=True)
        # Not SummaryWriter: its thread dies of a full disk, and then whoever writes waits for ever.
        name = f"events.out.tfevents.{time.time():.0f}.{start_step}"
        self._events = RecordWriter(str(run_dir / "tensorboard" / name))
        self._open.enter_context(contextlib.closing(self._events))
        self._event(start_step, file_version="brain.Event:2")
        self._event(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def step(self, line: dict[str, Any]) -> None:
        """Writes the metrics of a step; ``line`` holds "step" and scalars."""
        _write(self._metrics, line)
        for name, value in line.items():
            if name != "step" and value is not None:
                self._event(line["step"], summary=scalar(f"train/{name}", value))

    def health(self, step: int, measures: dict[str, dict[str, Any]]) -> None:
        """Writes quantisation health: a line a layer, stacked layers numbered after the path."""
        for path, values in sorted(measures.items()):
            layers = {name: value.reshape(-1).tolist() for name, value in values.items()}
            for i in range(len(next(iter(layers.values())))):
                line = {name: value[i] for name, value in sorted(layers.items())}
                _write(self._health, {"step": step, "path": path, "layer": i, **line})
                for name, value in line.items():
                    self._event(step, summary=scalar(f"health/{path}.{i}/{name}", value))

    def flush(self) -> None:
        """Hands everything written so far to the operating system."""
        for file in (self._metrics, self._health):
            file.flush()
        self._events.flush()

    def sync(self) -> None:
        """Has all lines written so far on disk, where they outlive the host's own end."""
        self.flush()
        for file in (self._metrics, self._health):
            os.fsync(file.fileno())

    def close(self) -> None:
        """Closes the files."""
        self._open.close()

    def _event(self, step: int, **content: Any) -> None:
        event = Event(wall_time=time.time(), step=step, **content)
        self._events.write(event.SerializeToString())


class Mute:
    """What a process has for ``RunLog`` and ``ProgressLine`` that leaves speaking to another."""

    def step(self, line: dict[str, Any]) -> None:
        """Writes nothing."""

    def health(self, step: int, measures: dict[str, dict[str, Any]]) -> None:
        """Writes nothing."""

    def report(self, step: int, loss: float, tokens_per_s: float, seconds_left: float) -> None:
        """Shows nothing."""

    def say(self, message: str) -> None:
        """Says nothing."""

    def flush(self) -> None:
        """Has nothing to hand on."""

    def sync(self) -> None:
        """Has nothing to keep."""

    def close(self) -> None:
        """Has nothing to close."""


def set_aside(run_dir: Path) -> Path | None:
    """Gives the logs of a run that begins again a free name, such as metrics-1.jsonl.

    Returns:
        Where its metrics are now; None if it had written none.
    """
    if not (run_dir / METRICS).is_file() or not (run_dir / METRICS).stat().st_size:
        return None
    taken = {path.name for path in run_dir.iterdir()}
    names = ((f"metrics-{n}.jsonl", f"health-{n}.jsonl") for n in itertools.count(1))
    metrics, health = next(pair for pair in names if taken.isdisjoint(pair))
    (run_dir / METRICS).rename(run_dir / metrics)
    if HEALTH in taken:
        (run_dir / HEALTH).rename(run_dir / health)
    return run_dir / metrics


def _open_at(path: Path, start_step: int) -> TextIO:
    """Opens a log for appending after dropping what is later than ``start_step`` or torn."""
    file = path.open("a+")
    file.seek(0)
    kept = 0
    for number, line in enumerate(file, start=1):
        try:
            if not line.endswith("\n") or json.loads(line)["step"] > start_step:
                break
        except (ValueError, KeyError, TypeError):
            file.close()
            raise UserError(f"{path}:{number} is no line of a step; mend or remove it") from None
        kept += len(line.encode())
    file.truncate(kept)
    return file


def _write(file: TextIO, line: dict[str, Any]) -> None:
    file.write(json.dumps(line) + "\n")


class ProgressLine:
    """A live line on a terminal; elsewhere a plain line at each report."""

    def __init__(self, total: int, start: int) -> None:
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                console=self._console,
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=total, completed=start, text="")
        self._total = total

    def report(self, step: int, loss: float, tokens_per_s: float, seconds_left: float) -> None:
        """Shows where the run is: loss in nats a token, time left in seconds."""
        left = _clock(seconds_left)
        text = f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s  {left} left"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=text)
        else:
            self.say(f"step {step}/{self._total}  {text}")

    def say(self, message: str) -> None:
        """Prints a line above the live one."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the last state standing."""
        if self._progress is not None:
            self._progress.stop()


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
