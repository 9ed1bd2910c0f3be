"""Loss of each part of the FP4 method beside BF16 at its own best learning rate.

``python -m benchmarks.loss_study --data=SHARDS`` sweeps the learning rate of the bf16 recipe with
one seed, takes the best, and trains every variant at it with several seeds; a seed stands for the
same initial weights and the same data order in every variant. What is finished is not run again,
so an interrupted study goes on where it was. ``benchmarks.report`` makes docs/results.md of it.
"""

import concurrent.futures
import dataclasses
import json
import math
import os
import queue
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provenance import RESULTS, ROOT, provenance
from train.compare import read_metrics
from train.config import parse_flags, report_error
from train.errors import UserError

VARIANTS: dict[str, tuple[str, ...]] = {
    "bf16": ("--recipe=bf16",),
    "fp8": ("--recipe=fp8",),
    "fp4_cast": ("--recipe=fp4_cast",),
    "cast + DGE": ("--recipe=fp4", "--recipe.occ_alpha=None"),
    "cast + OCC": ("--recipe=fp4", "--recipe.dge_k=None"),
    "fp4": ("--recipe=fp4",),
    "fp4 + mean shift": ("--recipe=fp4", "--recipe.x_shift=mean"),
}
CURVE_POINTS = 100
"""Points that a curve is averaged down to in the results."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Trains every variant of the method beside BF16."""

    data: str
    """Prepared shards."""

    model: str = "llama60m"
    """Model size."""

    steps: int = 610
    """Steps a run."""

    batch_size: int = 32
    """Sequences a step."""

    seq_len: int = 1024
    """Tokens a sequence."""

    sweep: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3)
    """Learning rates that bf16 is tried at; its best is everybody's."""

    sweep_also: tuple[str, ...] = ("fp4",)
    """Variants tried at the same learning rates, for the table alone."""

    seeds: int = 3
    """Seeds a variant."""

    jobs: int = 1
    """Runs at a time (on a shared device their speed says nothing)."""

    gpus: int = 1
    """GPUs that the runs are dealt to."""

    runs: str = "runs/loss_study"
    """Where the runs are kept."""

    out: str = str(RESULTS / "loss.json")
    """Where the results go."""

    only: tuple[str, ...] = tuple(VARIANTS)
    """Variants to train."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of the study."""

    variant: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its directory."""
        return f"{self.variant.replace(' + ', '-').replace(' ', '_')}-lr{self.lr:g}-seed{self.seed}"


def main() -> int:
    """Runs the study; returns the exit status."""
    try:
        study = parse_flags(Study, sys.argv[1:], "python -m benchmarks.loss_study")
        swept = run_all(
            study, [Job(v, lr, 0) for v in ("bf16", *study.sweep_also) for lr in study.sweep]
        )
        write(study, swept, None)
        reference = [result for result in swept if result["variant"] == "bf16"]
        best = min(reference, key=lambda result: _order(result["valid_loss"]))["lr"]
        print(f"best learning rate of bf16: {best:g}", flush=True)
        jobs = [Job(v, best, seed) for seed in range(study.seeds) for v in study.only]
        write(study, swept, run_all(study, jobs))
    except UserError as error:
        return report_error(error)
    return 0


def run_all(study: Study, jobs: list[Job]) -> list[dict[str, Any]]:
    """Trains what is not trained yet, ``study.jobs`` at a time; the results in order."""
    start, done = time.monotonic(), 0
    slots: queue.Queue[int] = queue.Queue()
    for slot in range(study.jobs):
        slots.put(slot % study.gpus)
    with concurrent.futures.ThreadPoolExecutor(study.jobs) as pool:
        futures = [pool.submit(run, study, job, slots) for job in jobs]
        for future in concurrent.futures.as_completed(futures):
            result = future.result()
            done += 1
            print(
                f"[{time.monotonic() - start:5.0f} s] {done}/{len(jobs)} {result['variant']} "
                f"lr {result['lr']:g} seed {result['seed']}: {result['valid_loss']:.4f}",
                flush=True,
            )
    return [future.result() for future in futures]


def run(study: Study, job: Job, gpus: queue.Queue[int]) -> dict[str, Any]:
    """Trains one job in a process of its own, unless it is finished, and sums it up."""
    run_dir = Path(study.runs) / job.name
    flags = [
        *VARIANTS[job.variant],
        f"--model={study.model}",
        f"--data={study.data}",
        f"--steps={study.steps}",
        f"--batch_size={study.batch_size}",
        f"--seq_len={study.seq_len}",
        f"--lr={job.lr}",
        f"--seed={job.seed}",
        f"--eval_every={study.steps}",
        "--eval_batches=1000000",
        "--checkpoint.every=0",
        f"--log.health_every={study.steps}",
        "--log.every=50",
    ]
    if not finished(run_dir, study.steps):
        gpu = gpus.get()
        try:
            train(job.name, run_dir, flags, gpu)
        finally:
            gpus.put(gpu)
    return summarize(run_dir, job)


def train(name: str, run_dir: Path, flags: Sequence[str], gpu: int) -> None:
    """Trains in a process of its own, on the visible GPU of this number; it may diverge.

    Raises:
        UserError: it failed, or there is something of it that is not finished.
    """
    if run_dir.exists():
        raise UserError(f"{run_dir} was cut off; remove it, and it is trained again")
    done = subprocess.run(
        [sys.executable, "-m", "train.main", f"--run_dir={run_dir}", *flags],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": visible(gpu)},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0 and "not finite" not in done.stderr:
        # All of its last words: what JAX ends with is a remark on how it shows tracebacks.
        raise UserError("\n".join([f"{name} failed:", *done.stderr.splitlines()[-20:]]))


def visible(gpu: int) -> str:
    """What CUDA is to be told of the GPU of this number, of those that this process may see.

    Raises:
        UserError: it may not see so many.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not seen:
        return str(gpu)
    names = seen.split(",")
    if gpu >= len(names):
        raise UserError(f"CUDA_VISIBLE_DEVICES={seen}; expected {gpu + 1} GPUs, as --gpus says")
    return names[gpu]


def summarize(run_dir: Path, job: Job) -> dict[str, Any]:
    """The numbers of a run that the report needs; a diverged one has an infinite loss."""
    lines = read_metrics(run_dir)
    config = json.loads((run_dir / "config.json").read_text())["config"]
    clip = config["optimizer"]["clip_norm"]
    losses = np.array([line["loss"] for line in lines])
    norms = np.array([line["grad_norm"] for line in lines])
    settled = slice(len(lines) // 10, None)  # past the warm-up, which is 5%
    return {
        "variant": job.variant,
        "lr": job.lr,
        "seed": job.seed,
        "valid_loss": lines[-1].get("valid_loss", math.inf),
        "train_loss": float(losses[-max(1, len(losses) // 20) :].mean()),
        "tokens": lines[-1]["tokens"],
        "skipped": lines[-1]["skipped"],
        "grad_norm": float(np.median(norms[settled])),
        "clipped": float(np.mean(norms[settled] > clip)),
        "curve": [
            float(part.mean()) for part in np.array_split(losses, min(CURVE_POINTS, len(losses)))
        ],
    }


def write(study: Study, swept: list[Any], results: list[Any] | None) -> None:
    """Writes the results with where they come from."""
    content = {
        "study": dataclasses.asdict(study) | {"data": Path(study.data).name},
        "provenance": provenance(),
        "sweep": swept,
        "runs": results,
    }
    out = Path(study.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")


def finished(run_dir: Path, steps: int) -> bool:
    """Whether a run directory holds a run of so many steps."""
    return (run_dir / "metrics.jsonl").is_file() and read_metrics(run_dir)[-1]["step"] == steps


def _order(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


if __name__ == "__main__":
    sys.exit(main())
