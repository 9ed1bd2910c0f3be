"""Train steps on meshes of several GPUs beside one GPU: speed, and what their collectives take.

``python -m benchmarks.mesh`` writes results/mesh-DEVICE.json. A GPU has the same tokens a step on
every mesh: along data and fsdp sequences of its own, along tensor its part of every sequence. With
``--quick`` a tiny model takes the same way, on any devices: of a CPU, as many as
XLA_FLAGS=--xla_force_host_platform_device_count=2 makes.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.provenance import RESULTS
from benchmarks.timing import (
    Event,
    Log,
    NoTrace,
    Side,
    covered,
    gpu_provenance,
    markdown,
    traced,
    wall_seconds,
    write,
)
from benchmarks.train_step import OPTIMIZER, CompiledStep
from jfp4.models.config import MODELS, LlamaConfig
from jfp4.ops.exchange import GradComm
from jfp4.recipe import RECIPES
from train.collectives import collectives, summary
from train.config import OptimizerConfig, TrainConfig
from train.placement import place

SEQUENCES, LENGTH = 8, 2048
"""A GPU's sequences a step, and their tokens."""

OPTIMIZERS = {"llama1b": OptimizerConfig(), "llama7b": OPTIMIZER}
"""Models, each whole, and what its weights and moments are kept in: what the trainer does unasked,
and what the README does with models that large."""

QUICK = dataclasses.replace(
    MODELS["llama5m"], num_layers=2, embed_dim=64, mlp_dim=128, num_kv_heads=4
)

STEPS = 8
"""Steps in a row of the longer of the two runs that a step's time is the difference of."""

TRACED = 3
"""Steps in a trace."""

BRIEF = 0.05
"""Milliseconds a step below which a kernel is not named."""

COLLECTIVE = re.compile(r"nccl|MemcpyP2P|SendRecv|all_?reduce_?kernel|^p(max|sum)_", re.IGNORECASE)
"""Names of what moves data between GPUs; what waits for another GPU counts too."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One step to be timed.

    Attributes:
        model: name of the size.
        recipe: name of the preset.
        mesh: the trainer's flag, or None for one device.
        grad_comm: what devices send one another of gradients; None: what these are kept in.
        overlap: whether collectives may go on beside computation, as the trainer has it.
    """

    model: str
    recipe: str = "fp4"
    mesh: str | None = None
    grad_comm: GradComm | None = None
    overlap: bool = True

    def __str__(self) -> str:
        """The case in words."""
        rest = "" if self.overlap else ", in XLA's own order"
        sent = self.grad_comm or "as kept"
        return f"{self.model}, {self.recipe}, {self.mesh or 'one'}, {sent}{rest}"


def cases(model: str, devices: int) -> list[Case]:
    """Every case of a model, the more telling ones first."""
    data, fsdp, tensor = (f"{axis}={devices}" for axis in ("data", "fsdp", "tensor"))
    narrow = OPTIMIZERS.get(model, OptimizerConfig()).master != "float32"
    return [
        Case(model),
        *(Case(model, mesh=mesh) for mesh in (data, fsdp)),
        *(Case(model, mesh=mesh, grad_comm="fp8") for mesh in (data, fsdp)),
        Case(model, mesh=tensor),
        *(Case(model, mesh=mesh, grad_comm="float32") for mesh in (data, fsdp) if narrow),
        Case(model, "bf16"),
        Case(model, "bf16", mesh=fsdp),
        *(Case(model, mesh=mesh, overlap=False) for mesh in (fsdp, data)),
    ]


def main() -> int:
    """Measures what the time allows; returns the exit status, 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mesh")
    parser.add_argument("--quick", action="store_true", help="a tiny model, on any devices")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=1200, help="no case begins after these")
    parser.add_argument("--models", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--only", default="", help="a pattern of the cases, as they are printed")
    arguments = parser.parse_args()
    if jax.device_count() < 2 or (jax.default_backend() == "cpu" and not arguments.quick):
        print(
            f"error: JAX sees {jax.device_count()} {jax.default_backend()} device; expected two "
            "GPUs or more, or --quick on any two devices",
            file=sys.stderr,
        )
        return 2
    log = Log()
    results: dict[str, Any] = {
        "provenance": gpu_provenance(),
        "quick": arguments.quick,
        "devices": jax.device_count(),
        "rounding": OptimizerConfig().rounding,
        "cases": [],
        "left_out": [],
        "errors": log.errors,
    }
    log.say(f"{jax.device_count()} x {results['provenance']['device']}")
    models = ["llama5m"] if arguments.quick else arguments.models
    measure_all(
        log,
        [case for model in models for case in cases(model, jax.device_count())],
        arguments,
        results,
    )
    log.say(f"wrote {write('mesh', results, arguments.out)}")
    print(table(results))
    for error in log.errors:
        print(f"ERROR {error}")
    return 1 if log.errors else 0


def measure_all(
    log: Log, every: Sequence[Case], arguments: argparse.Namespace, results: dict[str, Any]
) -> None:
    """Compiles all cases together, then times one after the other, each written at once."""
    wanted = [case for case in every if re.search(arguments.only, str(case))]
    results["left_out"] += [str(case) for case in every if case not in wanted]
    end = log.start + arguments.seconds
    with concurrent.futures.ThreadPoolExecutor(max(len(wanted), 1)) as pool:
        futures = [pool.submit(compiled, case, arguments.quick) for case in wanted]
        # Compiling tries kernels on the GPU, so that nothing is timed beside it.
        concurrent.futures.wait(futures, timeout=max(0.0, end - time.perf_counter()))
        for future in futures:
            future.cancel()  # if it has not begun
    log.say(f"compiled {len(wanted)} cases")
    for case, future in zip(wanted, futures, strict=True):
        if time.perf_counter() > end or future.cancelled():
            results["left_out"].append(str(case))
            continue
        step = log.attempt(str(case), future.result)
        if step is None:
            continue
        found = log.attempt(str(case), functools.partial(timed, case, step, log))
        if found is not None:
            results["cases"].append(found)
            write("mesh", results, arguments.out)


def compiled(case: Case, quick: bool) -> CompiledStep:
    """The step of a case, yet without a state."""
    config = configuration(case, quick)
    placement = place(case.mesh, config.llama, config.batch_size)
    return CompiledStep(config, placement, None if case.overlap else {})


def configuration(case: Case, quick: bool) -> TrainConfig:
    """The trainer's configuration of a case."""
    length = 32 if quick else LENGTH
    rows = (1 if quick else SEQUENCES) * (1 if case.mesh is None else jax.device_count())
    return TrainConfig(
        model=case.model, recipe=case.recipe, batch_size=rows, seq_len=length, steps=1000, lr=1e-4,
        mesh=case.mesh, grad_comm=case.grad_comm,
        llama=_llama(case.model, quick), quantization=RECIPES[case.recipe],
        optimizer=OPTIMIZERS.get(case.model, OptimizerConfig()),
    )  # fmt: skip


def _llama(model: str, quick: bool) -> LlamaConfig:
    if quick:
        return QUICK
    return dataclasses.replace(MODELS[model], remat="none", scan_layers=False)


def timed(case: Case, step: CompiledStep, log: Log) -> dict[str, Any]:
    """A case's speed by the wall clock, its bytes, and of the first GPU's trace its collectives."""
    side = step.side()
    side.run(2)
    seconds = wall_seconds({"step": side}, rounds=2, few=2, many=STEPS)["step"]
    sent = summary(collectives(step.hlo))
    devices = 1 if case.mesh is None else jax.device_count()
    found = dataclasses.asdict(case) | {
        "grad_comm": step.config.gradients_sent_in,
        "devices": devices,
        "layers": step.config.llama.num_layers,
        "tokens": step.config.batch_size * step.config.seq_len,
        "ms": 1e3 * seconds,
        "tokens_per_s": step.config.batch_size * step.config.seq_len / seconds,
        "state_bytes": step.state_bytes,
        "temp_bytes": step.temp_bytes,
        "collectives": sent,
        "traced": trace(side, log),
    }
    log.say(
        f"{case}: {found['ms']:.1f} ms, {found['tokens_per_s']:,.0f} tokens/s, "
        f"{sum(sent for _, sent in sent.values()) / 2**30:.2f} GiB sent; {_words(found['traced'])}"
    )
    return found


def trace(side: Side, log: Log) -> dict[str, Any] | None:
    """Milliseconds a step of the first GPU's kernels, or None where the profiler saw none."""
    try:
        (events,) = traced([side], TRACED, "/device:GPU:0")
    except NoTrace as error:
        log.say(f"no trace: {error}")
        return None
    return shares(events, TRACED)


def shares(events: Sequence[Event], steps: int) -> dict[str, Any]:
    """What part of a GPU's time is communication, and what part of that nothing goes on beside.

    Args:
        events: of one GPU.
        steps: that they are of.

    Returns:
        Milliseconds a step: ``busy_ms`` in which anything runs, ``collective_ms`` in which a
        collective does, ``exposed_ms`` in which nothing but collectives does; and ``kernels``, the
        sum of every kernel's time by its name, less the numbers that the compiler gives and less
        those of under ``BRIEF``.
    """
    sent = [event for event in events if COLLECTIVE.search(event.name)]
    rest = [event for event in events if not COLLECTIVE.search(event.name)]
    busy, scale = covered(events), 1e-6 / steps
    kernels: dict[str, float] = collections.defaultdict(float)
    for event in events:
        kernels[re.sub(r"(_\d+)+$", "", event.name)] += scale * (event.end - event.start)
    longest = sorted(kernels.items(), key=lambda item: -item[1])
    return {
        "busy_ms": scale * busy,
        "collective_ms": scale * covered(sent),
        "exposed_ms": scale * (busy - covered(rest)),
        "kernels": {name: ms for name, ms in longest if ms >= BRIEF},
    }


def _words(traced: dict[str, Any] | None) -> str:
    if traced is None:
        return "not traced"
    return f"collectives {traced['collective_ms']:.1f} ms, alone {traced['exposed_ms']:.1f}"


def table(results: dict[str, Any]) -> str:
    """The cases, each beside one GPU of its model and recipe."""
    return markdown(HEAD, list(rows(results)))


HEAD = (
    "model", "layers", "recipe", "mesh", "gradients", "order", "ms", "tokens/s", "over one GPU",
    "GiB sent", "collectives, ms", "alone, ms", "state GiB", "temporary GiB",
)  # fmt: skip


def rows(results: dict[str, Any]) -> Iterable[list[str]]:
    """A row a case; a dash where there is nothing to say."""
    for case in results["cases"]:
        sent = sum(sent for _, sent in case["collectives"].values())
        over, times, several = over_one(results, case), case["traced"], case["devices"] > 1
        yield [
            case["model"].removeprefix("llama").upper(), str(case["layers"]), case["recipe"],
            f"`{case['mesh']}`" if several else "one GPU",
            case["grad_comm"] if several else "—",
            ("overlapped" if case["overlap"] else "XLA's") if several else "—",
            f"{case['ms']:.1f}", f"{case['tokens_per_s']:,.0f}",
            f"{over:.3f}x" if over else "—",
            f"{sent / 2**30:.2f}" if several else "—",
            *(f"{times[name]:.1f}" if several and times else "—"
              for name in ("collective_ms", "exposed_ms")),
            f"{case['state_bytes'] / 2**30:.1f}", f"{case['temp_bytes'] / 2**30:.1f}",
        ]  # fmt: skip


def over_one(results: dict[str, Any], case: dict[str, Any]) -> float | None:
    """Tokens a second over one GPU's; None for one GPU, or where that was not measured."""
    one = [
        other["tokens_per_s"]
        for other in results["cases"]
        if other["devices"] == 1
        and (other["model"], other["recipe"]) == (case["model"], case["recipe"])
    ]
    return case["tokens_per_s"] / one[0] if one and case["devices"] > 1 else None


if __name__ == "__main__":
    sys.exit(main())
