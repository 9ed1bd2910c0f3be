"""A run that is killed in the middle of a step and goes on from its checkpoint, bit for bit.

``python -m benchmarks.resume --data=shards/ --model=llama13b ...`` starts ``python -m train.main``
with all flags that are not its own, kills it some steps after its one checkpoint, resumes it, and
compares the steps that were made twice: those of the process that was killed are what an unbroken
run goes on with. It writes results/resume-MODEL-RECIPE-DEVICE.json.
"""

import argparse
import dataclasses
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.large_run import SETTLED
from benchmarks.provenance import RESULTS, ROOT, commit
from train.compare import read_metrics
from train.errors import UserError

POLL = 0.02
"""Seconds between looks at what a run has written."""

MEASURED = ("tokens_per_s", "peak_bytes")
"""What a line of metrics says of the machine: everything else is to be equal."""


def main() -> int:
    """Runs, kills, resumes and compares; returns the exit status, 1 if a step differs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resume",
        epilog="other flags are train.main's",
        allow_abbrev=False,
    )
    parser.add_argument("--run_dir", type=Path, required=True, help="a new one, that holds a state")
    parser.add_argument("--saved", type=int, default=40, help="step after which it is saved")
    parser.add_argument("--killed", type=int, default=48, help="step after which it is killed")
    parser.add_argument("--steps", type=int, default=60, help="steps of the whole run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument(
        "--seconds", type=float, default=3600,
        help="after these the resumed run ends as soon as there is enough to compare",
    )  # fmt: skip
    own, flags = parser.parse_known_args()
    if not own.saved < own.killed < min(own.steps, 2 * own.saved):
        parser.error(
            f"--saved={own.saved} --killed={own.killed} --steps={own.steps}; expected saved < "
            "killed < steps, and killed before a second save"
        )
    try:
        found = killed_and_resumed(own, flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    own.out.mkdir(parents=True, exist_ok=True)
    path = own.out / f"resume-{found['model']}-{found['recipe']}-{device}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    equal = sum(pair["equal"] for pair in found["repeated"])
    print(
        f"{path}: {equal} of {len(found['repeated'])} steps made twice are equal, "
        f"{found['tokens_per_s']:,.0f} tokens/s"
    )
    return 0 if equal == len(found["repeated"]) else 1


def killed_and_resumed(own: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    """The result: what was run, how fast and in what memory, and every step that was made twice.

    Raises:
        UserError: a run ended by itself before its time.
    """
    deadline = time.monotonic() + own.seconds
    common = [f"--run_dir={own.run_dir}", "--log.every=1", "--log.health_every=0"]
    checkpoint = own.run_dir / "checkpoints" / str(own.saved)

    def saved_and_past() -> bool:
        return steps_in(own.run_dir) >= own.killed and checkpoint.is_dir()

    first = Watched(
        [*flags, *common, f"--steps={own.steps}", f"--eval_every={own.steps}", "--deterministic",
         f"--checkpoint.every={own.saved}", "--checkpoint.keep=1"],
        own.run_dir,
    )  # fmt: skip
    if not first.until(saved_and_past):
        raise UserError(f"the run ended with {first.process.returncode} before it could be killed")
    time.sleep(first.step_seconds / 2)  # in the middle of a step
    first.kill()
    before = lines_by_step(own.run_dir)

    def late() -> bool:
        return time.monotonic() > deadline and steps_in(own.run_dir) >= own.killed

    # It is saved no more, so that the place need not hold two states.
    second = Watched([*common, "--resume", "--checkpoint.every=0"], own.run_dir, own.saved)
    if second.until(late):
        second.kill()
    elif second.process.returncode != 0:
        raise UserError(f"the resumed run ended with {second.process.returncode}")
    after = lines_by_step(own.run_dir)

    about = json.loads((own.run_dir / "config.json").read_text())
    config = about["config"]
    last = after[max(after)]
    return {
        "device": about["device"],
        "versions": about["versions"],
        "commit": commit(),
        "parameters": about["parameters"],
        "planned_bytes": about["planned_bytes"],
        "model": config["model"],
        "recipe": config["recipe"],
        "layers": config["llama"]["num_layers"],
        "rounding": config["optimizer"]["rounding"],
        "flags": [flag for flag in flags if not flag.startswith("--data")],
        "batch_size, seq_len": [config["batch_size"], config["seq_len"]],
        "saved": own.saved,
        "killed": own.killed,
        "steps": max(after),
        "repeated": repeated(before, after, own.saved),
        "loss": [after[step]["loss"] for step in sorted(after)],
        "tokens_per_s": speed(after, own.saved),
        "peak_bytes": last.get("peak_bytes"),
        "valid_loss": last.get("valid_loss"),
        "checkpoint_bytes": size_of(own.run_dir / "checkpoints"),
        "killed run": dataclasses.asdict(first.seen),
        "resumed run": dataclasses.asdict(second.seen),
    }


def speed(lines: dict[int, dict[str, Any]], saved: int) -> float:
    """Median tokens a second of a run's steps, but for the first ``SETTLED`` of either process."""
    settled = [n for n in lines if n > SETTLED and not saved < n <= saved + SETTLED]
    return statistics.median(lines[n]["tokens_per_s"] for n in settled or lines)


@dataclasses.dataclass
class Seen:
    """What was seen of a process from outside.

    Attributes:
        start_seconds: from its start to its first step's line.
        save_seconds: by which the longest step was longer than the median one; a save of a large
            state is in it.
        host_bytes: its largest resident memory.
        machine_bytes: the largest memory that the machine had in use.
    """

    start_seconds: float = 0.0
    save_seconds: float = 0.0
    host_bytes: int = 0
    machine_bytes: int = 0


class Watched:
    """A trainer in a process of its own, watched through what it writes."""

    def __init__(self, flags: Sequence[str], run_dir: Path, done: int = 0) -> None:
        """Starts it.

        Args:
            flags: of train.main.
            run_dir: that it writes to.
            done: the step that it begins after.
        """
        self.process = subprocess.Popen([sys.executable, "-m", "train.main", *flags], cwd=ROOT)
        self.seen = Seen()
        self.step_seconds = 0.0
        self._run_dir, self._done = run_dir, done
        self._old = self._metrics_bytes()
        self._start = time.monotonic()
        self._ends: list[float] = []  # when each step's line was first seen

    def until(self, there: Callable[[], bool]) -> bool:
        """Watches until ``there`` says so; False if the process ends by itself before."""
        while self.process.poll() is None:
            self._look()
            if self._ends and there():
                return True
            time.sleep(POLL)
        return False

    def kill(self) -> None:
        """Ends the process as a power failure would, and waits until it is gone."""
        self.process.kill()
        self.process.wait()

    def _look(self) -> None:
        try:
            resident = psutil.Process(self.process.pid).memory_info().rss
        except psutil.NoSuchProcess:
            return
        memory = psutil.virtual_memory()
        self.seen.host_bytes = max(self.seen.host_bytes, resident)
        self.seen.machine_bytes = max(self.seen.machine_bytes, memory.total - memory.available)
        now, count = time.monotonic(), steps_in(self._run_dir) - self._done
        if self._metrics_bytes() == self._old:
            return  # still as the process left it that was killed: the new one drops some first
        self._old = -1
        self._ends += [now] * (count - len(self._ends))
        if len(self._ends) > 2:
            gaps = [b - a for a, b in zip(self._ends, self._ends[1:], strict=False)]
            self.step_seconds = statistics.median(gaps)
            self.seen.save_seconds = max(gaps) - self.step_seconds
        if self._ends:
            self.seen.start_seconds = self._ends[0] - self._start

    def _metrics_bytes(self) -> int:
        path = self._run_dir / "metrics.jsonl"
        return path.stat().st_size if path.is_file() else 0


def steps_in(run_dir: Path) -> int:
    """Step of the last whole line of metrics; 0 where there is none."""
    return max(lines_by_step(run_dir), default=0)


def lines_by_step(run_dir: Path) -> dict[int, dict[str, Any]]:
    """The lines of metrics by their step; none where there are none yet."""
    try:
        return {line["step"]: line for line in read_metrics(run_dir)}
    except UserError:
        return {}


def repeated(
    before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]], saved: int
) -> list[dict[str, Any]]:
    """Every step that both runs made: its loss in each, and whether all of its line is equal.

    Raises:
        UserError: there is none.
    """
    both = sorted(step for step in before.keys() & after.keys() if step > saved)
    if not both:
        raise UserError(f"no step after {saved} was made twice")
    return [
        {
            "step": step,
            "loss": [before[step]["loss"], after[step]["loss"]],
            "equal": _timeless(before[step]) == _timeless(after[step]),
        }
        for step in both
    ]


def _timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in MEASURED}


def size_of(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(main())
