"""The first tokens of Llamas of 1.3 and 7 billion in FP4 and in BF16, and FP16 beside BF16.

``python -m benchmarks.first_tokens --data=SHARDS`` trains every run of ``RUNS`` by ``python -m
train.main``, on as many GPUs at a time as it is told of, and writes first_tokens-DEVICE.json to
results/ after each, where results of other runs are kept. What is finished is not run again. Runs
of one group see the same initial weights and the same batches in the same order, with one seed.
"""

import concurrent.futures
import dataclasses
import json
import queue
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.large_run import SETTLED
from benchmarks.loss_study import Job, finished, summarize, train
from benchmarks.provenance import RESULTS, commit
from train.compare import read_metrics
from train.config import parse_flags, report_error
from train.errors import UserError

EVALUATIONS = 5
"""Times that all whole batches of validation are evaluated in a run, evenly."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        group: runs that differ in one thing, and stand in one picture.
        name: what is different.
        flags: of train.main.
        tokens: that it sees, at least.
        lr: peak learning rate.
        rows, length: sequences a step, and tokens in each.
    """

    group: str
    name: str
    flags: tuple[str, ...]
    tokens: int
    lr: float
    rows: int = 8
    length: int = 2048

    @property
    def steps(self) -> int:
        """Steps that it takes."""
        return -(-self.tokens // (self.rows * self.length))


LARGE = ("--model=llama1b", "--model.no_scan_layers")
SMALL = ("--model=llama130m", "--model.no_scan_layers")
LARGEST = (
    "--model=llama7b", "--model.no_scan_layers", "--model.remat=none",
    "--optimizer.master=bfloat16", "--optimizer.first_moment=e4m3",
    "--optimizer.second_moment=float16",
)  # fmt: skip

RUNS = (
    # The paper's learning rate, of all its sizes; its batches of four million tokens would make
    # three steps of ten million.
    Run("llama1b", "bf16", (*LARGE, "--recipe=bf16"), 10_000_000, 3e-4),
    Run("llama1b", "fp4", (*LARGE, "--recipe=fp4"), 10_000_000, 3e-4),
    # A fourth of those, for a step takes five times as long. A twentieth of so few steps is a
    # warm-up of eight, in which the loss rises: so a third of the rate and a longer one as well.
    *(
        Run(group, recipe, (*LARGEST, f"--recipe={recipe}", *flags), 2_500_000, lr)
        for group, lr, flags in (
            ("llama7b", 3e-4, ()),
            ("llama7b, longer warm-up", 1e-4, ("--optimizer.warmup=0.2",)),
        )
        for recipe in ("bf16", "fp4")
    ),
    # The best that llama60m was found to have (docs/results.md).
    *(
        Run(
            "llama130m",
            f"{recipe}, {dtype} compute",
            (*SMALL, f"--recipe={recipe}", f"--model.dtype={dtype}"),
            2_500_000,
            1e-3,
            length=1024,
        )
        for recipe in ("fp4", "bf16")
        for dtype in ("bfloat16", "float16")
    ),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains FP4 beside BF16 over the first tokens of a large model, and FP16 beside BF16."""

    data: str
    """Prepared shards."""

    gpus: int = 1
    """GPUs that the runs are dealt to, one run on each at a time."""

    runs: str = "runs/first_tokens"
    """Where the runs are kept."""

    out: str = str(RESULTS)
    """Folder of the result."""

    only: str = ""
    """A pattern of the runs to train, such as "llama1b"."""

    share: float = 1.0
    """Part of each run's tokens, to try the program with."""

    shared: bool = False
    """Others use the GPUs meanwhile, and so speeds tell nothing: none are kept."""

    flags: str = ""
    """Other flags of train.main for every run, such as "--model.num_layers=2 --eval_batches=1"."""


def main() -> int:
    """Trains and writes; returns the exit status."""
    try:
        config = parse_flags(Config, sys.argv[1:], "python -m benchmarks.first_tokens")
        runs = [
            dataclasses.replace(run, tokens=round(run.tokens * config.share))
            for run in RUNS
            if re.search(config.only, f"{run.group} {run.name}")
        ]
        train_all(config, runs)
    except UserError as error:
        return report_error(error)
    return 0


def train_all(config: Config, runs: list[Run]) -> None:
    """Trains what is not finished, and writes the result whenever a run is."""
    start = time.monotonic()
    gpus: queue.Queue[int] = queue.Queue()
    for gpu in range(config.gpus):
        gpus.put(gpu)
    results: dict[Run, dict[str, Any]] = {}
    with concurrent.futures.ThreadPoolExecutor(config.gpus) as pool:
        futures = {pool.submit(trained, config, run, gpus): run for run in runs}
        for future in concurrent.futures.as_completed(futures):
            results[futures[future]] = future.result()
            path = write(config, [results[run] for run in runs if run in results])
            done, seconds = results[futures[future]], time.monotonic() - start
            speed = "" if config.shared else f", {done['tokens_per_s']:,.0f} tokens/s"
            print(
                f"[{seconds:5.0f} s] {done['group']}, {done['variant']}: validation "
                f"{done['valid_loss']:.4f}{speed}; wrote {path}",
                flush=True,
            )


def trained(config: Config, run: Run, gpus: "queue.Queue[int]") -> dict[str, Any]:
    """Trains a run unless it is finished, and sums it up."""
    name = re.sub(r"\W+", "-", f"{run.group}-{run.name}")
    run_dir = Path(config.runs) / name
    flags = [
        *run.flags,
        f"--data={config.data}",
        f"--steps={run.steps}",
        f"--batch_size={run.rows}",
        f"--seq_len={run.length}",
        f"--lr={run.lr}",
        f"--eval_every={-(-run.steps // EVALUATIONS)}",
        "--eval_batches=1000000",
        "--checkpoint.every=0",
        "--log.health_every=0",
        *config.flags.split(),
    ]
    if not finished(run_dir, run.steps):
        gpu = gpus.get()
        try:
            train(name, run_dir, flags, gpu)
        finally:
            gpus.put(gpu)
    return summary(run_dir, run) | ({"tokens_per_s": None} if config.shared else {})


def summary(run_dir: Path, run: Run) -> dict[str, Any]:
    """What the report needs of a run, its curve thinned; one that diverged has infinite loss."""
    lines = read_metrics(run_dir)
    about = json.loads((run_dir / "config.json").read_text())
    config = about["config"]
    speeds = [line["tokens_per_s"] for line in lines if line["step"] > SETTLED]
    scales = [line["loss_scale"] for line in lines if "loss_scale" in line]
    return summarize(run_dir, Job(run.name, run.lr, 0)) | {
        "group": run.group,
        "device": about["device"],
        "versions": about["versions"],
        "model": config["model"],
        "recipe": config["recipe"],
        "dtype": config["llama"]["dtype"],
        "steps": config["steps"],
        "warmup_share": config["optimizer"]["warmup"],
        "rounding": config["optimizer"]["rounding"],
        "batch_size, seq_len": [config["batch_size"], config["seq_len"]],
        "validations": [
            [line["tokens"], line["valid_loss"]] for line in lines if "valid_loss" in line
        ],
        "tokens_per_s": statistics.median(speeds or [line["tokens_per_s"] for line in lines]),
        "peak_bytes": lines[-1].get("peak_bytes"),
        "planned_bytes": about["planned_bytes"],
        "loss_scale": [scales[0], min(scales), scales[-1]] if scales else None,
    }


def write(config: Config, runs: list[dict[str, Any]]) -> Path:
    """Writes what is finished so far, with where it comes from, and keeps other runs' results."""
    device = re.sub(r"[^a-z0-9]+", "-", runs[0]["device"].lower()).strip("-")
    shared = "-shared" if config.shared else ""
    path = Path(config.out) / f"first_tokens-{device}{shared}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    there = json.loads(path.read_text())["runs"] if path.exists() else []
    found = {(run["group"], run["variant"]): run for run in there}
    origin = {"data": Path(config.data).name, "commit": commit(), "at_a_time": config.gpus}
    found |= {(run["group"], run["variant"]): run | origin for run in runs}
    path.write_text(json.dumps({"runs": list(found.values())}, indent=1) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
