"""Device time: what a GPU spends on a call, read from the profiler's trace.

A few tens of microseconds of kernel cannot be timed from Python, which needs as long to dispatch a
call. The trace of JAX's profiler has the start and end of every kernel in the process, PyTorch's
among them, to the nanosecond; a call takes from its first kernel's start to its last one's end, so
that gaps between its kernels count and gaps between calls do not. They are the device's own gaps:
calls are dispatched while a kernel before them keeps the device busy, or it would wait for Python
between a call's kernels too. The wall clock of calls dispatched back to back is recorded beside it.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.provenance import RESULTS, provenance

L2 = 64 << 20
"""Bytes of last-level cache, rounded up: 50 MB on an H100, 60 MB on an H200."""

GAP = 2e-3
"""Seconds between windows of the trace; host and device clocks disagree by less than half."""

HELD = (1 << 16, 96 << 10)
"""Bytes, rows by columns, that are read to hold the device, for about 1.5 ms of an H200. Reading
leaves in the cache nothing that calls would have to write back, and every side holds it so, for
what draws less power would leave the next one a higher clock."""

PACKAGES = ("torch", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cublas", "triton")
WINDOW = re.compile(r"window (\d+)$")


@dataclasses.dataclass(frozen=True)
class Side:
    """One contender.

    Attributes:
        call: launches the work of the call of that number, which chooses its operands; returns
            what ``wait`` takes.
        wait: returns when the work is done.
        hold: its call keeps the device busy while this side's are dispatched; None: these take so
            long that dispatching them does not count.
    """

    call: Callable[[int], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    hold: "Side | None" = None

    def run(self, calls: int) -> None:
        """Dispatches calls back to back and waits for the last."""
        result = None
        for i in range(calls):
            result = self.call(i)
        self.wait(result)


@dataclasses.dataclass(frozen=True)
class Event:
    """A kernel or a copy on the device, in nanoseconds of the trace."""

    start: float
    end: float
    name: str


# --------------------------------------------------------------------------------- measuring


def measure(
    sides: Mapping[str, Side],
    *,
    calls: int = 6,
    rounds: int = 5,
    wall: bool = True,
    label: Callable[[str, Event], str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Times every side, by turns, so that a drift of the clocks hits all alike.

    What draws less power leaves the next one higher clocks, so turns come in another order in each
    round.

    Args:
        sides: by name; each runs twice before anything is timed.
        calls: calls in a row of one side.
        rounds: turns of each side.
        wall: also times back-to-back calls on the host.
        label: names the part of a side's work that an event belongs to.

    Returns:
        By side: ``ms``, the median over all calls of the time from a call's first kernel to the
        end of its last; ``spread``, the distance of the quartiles as a share of it; ``busy_ms``,
        the median time in which a kernel runs; ``wall_ms``; ``kernels``, milliseconds a call by
        kernel name; and ``parts``, the same by label.
        Without a usable trace, ``ms`` is ``wall_ms``; ``clock`` says which it was.
    """
    for side in sides.values():
        if side.hold is not None:
            side.hold.run(1)
        side.run(2)
    walls = wall_seconds(sides, rounds=3) if wall else {}
    names = list(sides)
    order = [names[i] for turn in turns(len(names), rounds) for i in turn]
    try:
        windows = traced([sides[name] for name in order], calls)
    except NoTrace as error:
        print(f"warning: {error}; timed by the wall clock", file=sys.stderr)
        walls = walls or wall_seconds(sides, rounds=3)
        return {
            name: {"ms": 1e3 * s, "wall_ms": 1e3 * s, "clock": "wall"} for name, s in walls.items()
        }
    results = {}
    for name in names:
        own = [window for who, window in zip(order, windows, strict=True) if who == name]
        results[name] = summary(*split(own, calls))
        if label is not None:
            events = [event for window in own for event in window]
            parts = [(label(name, event), event) for event in events]
            results[name]["parts"] = _milliseconds(parts, rounds * calls)
        if name in walls:
            results[name]["wall_ms"] = 1e3 * walls[name]
    return results


def turns(count: int, rounds: int) -> list[list[int]]:
    """Orders of so many sides, one a round, in which none follows the same other one too often.

    Over as many rounds as sides each follows each other one once, or, where their number is odd,
    half of them twice (E. J. Williams, Australian Journal of Scientific Research A 2, 1949).
    """
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]
    return [[(i + shift) % count for i in zigzag] for shift in range(rounds)]


def summary(groups: Sequence[list[Event]], calls: int) -> dict[str, Any]:
    """Numbers of one side, from groups of events that stand for ``calls`` calls each."""
    spans = [1e-6 * (max(e.end for e in group) - group[0].start) / calls for group in groups]
    busy = [1e-6 * covered(group) / calls for group in groups]
    kernels = _milliseconds(((e.name, e) for group in groups for e in group), len(groups) * calls)
    ms = statistics.median(spans)
    low, _, high = statistics.quantiles(spans, n=4)
    return {
        "ms": ms,
        "spread": (high - low) / ms,
        "clock": "trace" if calls == 1 else "trace, gaps between calls included",
        "busy_ms": statistics.median(busy),
        "kernels": kernels,
    }


def covered(events: Iterable[Event]) -> float:
    """Nanoseconds in which at least one of the events goes on."""
    total, end = 0.0, 0.0
    for event in sorted(events, key=lambda event: event.start):
        total += max(0.0, event.end - max(event.start, end))
        end = max(end, event.end)
    return total


def _milliseconds(events: Iterable[tuple[str, Event]], calls: int) -> dict[str, float]:
    """Milliseconds a call by name, most first."""
    total: dict[str, float] = collections.defaultdict(float)
    for name, event in events:
        total[name] += 1e-6 * (event.end - event.start) / calls
    return dict(sorted(total.items(), key=lambda item: -item[1]))


class NoTrace(Exception):
    """The profiler saw no kernels, or not those of every window."""


def traced(sides: Sequence[Side], calls: int, device: str = "/device:GPU") -> list[list[Event]]:
    """Runs the sides one after the other under the profiler; the events of each, in order.

    Of all devices whose names in the trace begin with ``device``. What holds the device is not
    among them: it runs by itself first, to tell how many events it is.
    """
    holds = list({id(side.hold): side.hold for side in sides if side.hold is not None}.values())
    asked = [*((hold, 1) for hold in holds), *((side, calls) for side in sides)]
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = 1
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            for i, (side, count) in enumerate(asked):
                time.sleep(GAP)
                with jax.profiler.TraceAnnotation(f"window {i}"):
                    if side.hold is not None:
                        side.hold.call(0)
                    side.run(count)
            time.sleep(GAP)
        finally:
            jax.profiler.stop_trace()
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        if not files:
            raise NoTrace("the profiler wrote no trace")
        profile = jax.profiler.ProfileData.from_file(str(files[-1]))
        windows = assign(profile, len(asked), device)
    own = {id(hold): len(events) for hold, events in zip(holds, windows, strict=False)}
    return [
        events[own.get(id(side.hold), 0) :]
        for side, events in zip(sides, windows[len(holds) :], strict=True)
    ]


def assign(
    profile: Any, count: int, device: str = "/device:GPU", line: str = "Stream"
) -> list[list[Event]]:
    """The device's events by the window of the host in which they started."""
    events, windows = [], {}
    for plane in profile.planes:
        for lane in plane.lines:
            if plane.name.startswith(device) and lane.name.startswith(line):
                events += [
                    Event(e.start_ns, e.start_ns + e.duration_ns, e.name) for e in lane.events
                ]
            elif plane.name.startswith("/host"):
                for e in lane.events:
                    if match := WINDOW.match(e.name):
                        windows[int(match[1])] = (e.start_ns, e.start_ns + e.duration_ns)
    if sorted(windows) != list(range(count)):
        raise NoTrace(f"the trace has {len(windows)} of {count} windows")
    slack = 1e9 * GAP / 2
    found = []
    for _, (start, end) in sorted(windows.items()):
        inside = [e for e in events if start - slack <= e.start < end + slack]
        found.append(sorted(inside, key=lambda e: (e.start, e.end)))
    if not all(found) or sum(map(len, found)) != len(events):
        planes = ", ".join(
            f"{p.name} ({', '.join(x.name for x in p.lines)})" for p in profile.planes
        )
        raise NoTrace(f"{len(events)} events do not fill {count} windows; the trace has {planes}")
    return found


def split(windows: Sequence[list[Event]], calls: int) -> tuple[list[list[Event]], int]:
    """Cuts each window into its calls, if every call launched the same kernels.

    Returns:
        Lists of events, and the calls that each stands for: 1, or those of a window.
    """
    per_call = []
    for events in windows:
        size = len(events) // calls
        chunks = [events[i * size : (i + 1) * size] for i in range(calls)]
        names = [sorted(e.name for e in chunk) for chunk in chunks]
        if size * calls != len(events) or any(n != names[0] for n in names):
            return list(windows), calls
        per_call += chunks
    return per_call, 1


def wall_seconds(
    sides: Mapping[str, Side], *, rounds: int, few: int = 4, many: int = 20
) -> dict[str, float]:
    """Median seconds a call: the difference of a long and a short run, so without their ends.

    Before either stands a short one that is not timed: what another side has left in the caches and
    of the clocks would make the first take longer, and so the difference too little.
    """
    names = list(sides)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in turns(len(names), rounds):
        for name in (names[i] for i in turn):
            ends = []
            sides[name].run(few)
            for calls in (few, many):
                start = time.perf_counter()
                sides[name].run(calls)
                ends.append(time.perf_counter() - start)
            times[name].append((ends[1] - ends[0]) / (many - few))
    return {name: statistics.median(values) for name, values in times.items()}


def sets_of(nbytes: int, most: int = 16) -> int:
    """How many sets of operands of this size it takes so that none is left in the cache."""
    return min(most, max(1, math.ceil(3 * L2 / nbytes)))


def rotating(f: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> Side:
    """A compiled function of JAX, given another set of arguments at each call."""
    return Side(lambda i: f(*sets[i % len(sets)]), hold=hold())


@functools.cache
def hold() -> Side:
    """What holds the device of JAX's default stream: the largest of each row of ``HELD`` bytes."""
    x = jnp.zeros(HELD, jnp.uint8)
    largest = jax.jit(functools.partial(jnp.max, axis=1)).lower(x).compile()
    return Side(lambda _: largest(x))


def geomean(values: Iterable[float]) -> float:
    """The geometric mean."""
    return statistics.geometric_mean(values)


# ------------------------------------------------------------------------------- the program


class Log:
    """Progress as it happens, and errors that end one contender rather than the program."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.start = time.perf_counter()

    def say(self, text: str) -> None:
        """Prints a line with the seconds since the start."""
        print(f"[{time.perf_counter() - self.start:6.1f}] {text}", flush=True)

    def attempt(self, label: str, f: Callable[[], Any]) -> Any:
        """The function's result, or None once its error is noted."""
        try:
            return f()
        except Exception as error:  # whatever it is, it is said, kept, and fails the program
            lines = str(error).strip().splitlines() or [""]
            self.errors.append(f"{label}: {type(error).__name__}: {lines[0]}")
            self.say(f"ERROR {self.errors[-1]}")
            return None


@dataclasses.dataclass(frozen=True)
class Contender:
    """A side yet to be compiled and checked.

    Attributes:
        build: compiles it.
        check: given it and all that are built, returns its error, or raises if that is too large;
            None: what others are compared with.
    """

    build: Callable[[], Side]
    check: Callable[[Side, Mapping[str, Side]], float] | None = None


def contest(
    log: Log, label: str, contenders: Mapping[str, Contender], **options: Any
) -> dict[str, dict[str, Any]]:
    """Compiles all contenders at once, checks them one by one, times those that are right.

    Returns:
        What ``measure`` does, with the ``error`` of each beside its times, None if it was not
        checked.
    """
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = {name: pool.submit(c.build) for name, c in contenders.items()}
        built = {
            name: side
            for name, future in futures.items()
            if (side := log.attempt(f"{name}, {label}", future.result)) is not None
        }
    errors: dict[str, float | None] = {}
    for name, side in built.items():
        check = contenders[name].check
        if check is None:
            errors[name] = None
        elif (
            error := log.attempt(f"{name}, {label}", functools.partial(check, side, built))
        ) is not None:
            errors[name] = error
    right = {name: built[name] for name in errors}
    times = measure(right, **options) if right else {}
    return {name: {"error": errors[name], **result} for name, result in times.items()}


def main(
    name: str,
    run: Callable[[Log, bool], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> int:
    """What the benchmarks of GPUs have in common: flags, provenance, the file and the table.

    Args:
        name: of the benchmark.
        run: measures; told whether a quick look is enough.
        table: what to print last.

    Returns:
        The exit status: 0, 1 if a contender failed, 2 without a GPU.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="two shapes, few rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    # PyTorch's tensors live in the same memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if jax.default_backend() != "gpu":
        print("error: this measures GPUs, and JAX sees none", file=sys.stderr)
        return 2
    source, log = gpu_provenance(), Log()
    log.say(f"{source['device']}, commit {source['commit']}")
    results = {"provenance": source, "quick": arguments.quick, **run(log, arguments.quick)}
    results["errors"] = log.errors
    log.say(f"wrote {write(name, results, arguments.out)}")
    print(table(results))
    for error in log.errors:
        print(f"ERROR {error}")
    return 1 if log.errors else 0


def write(name: str, results: dict[str, Any], folder: Path) -> Path:
    """Writes a benchmark's results to NAME-DEVICE.json, of a quick look to NAME-DEVICE-quick.json.

    Args:
        name: of the benchmark.
        results: with ``provenance``, and whether it was ``quick``.
        folder: made if it is not there.
    """
    device = re.sub(r"[^a-z0-9]+", "-", results["provenance"]["device"].lower()).strip("-")
    out = folder / f"{name}-{device}{'-quick' * results['quick']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    return out


def gpu_provenance() -> dict[str, Any]:
    """``provenance`` and the versions of what runs on the GPU."""
    source = provenance()
    for package in PACKAGES:
        try:
            source["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    source["versions"]["CUDA"] = jax.devices()[0].client.platform_version.replace("\n", "; ")
    source["driver"] = next(_nvidia_smi("driver_version"), None)
    source["power_limit"] = next(_nvidia_smi("power.limit"), None)
    source["xla_flags"] = os.environ.get("XLA_FLAGS", "")
    source["nccl"] = {
        name: os.environ[name] for name in sorted(os.environ) if name.startswith("NCCL_")
    }
    return source


def _nvidia_smi(field: str) -> Iterator[str]:
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return
    yield from done.stdout.strip().splitlines()[:1]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, columns aligned so that it reads in a terminal too."""
    widths = [max(3, *map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
