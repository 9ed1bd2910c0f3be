"""Compares runs: a table of where they ended and a picture of how they got there.

python -m train.compare runs/bf16 runs/fp4 --out=compare.png takes the first run as the reference
of the gaps. Runs that are not done yet can be compared too.
"""

import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from jfp4.recipe import RECIPES
from train.config import parse_flags, report_error, sent_in
from train.errors import UserError
from train.plot import save_loss_plot
from train.rundir import FREE_OF_MODEL

PROGRAM = "python -m train.compare"
_UNKNOWN = "—"
_SAME_MODEL = ("scan_layers", *FREE_OF_MODEL)  # How it is computed, not what.


@dataclass(frozen=True)
class Config:
    """Compares training runs; the first is the reference."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint=""),
    ]
    """Directories that train.main has written."""

    out: Path = Path("compare.png")
    """Picture of the curves to write, a .png."""

    def __post_init__(self) -> None:
        """Checks the flags.

        Raises:
            UserError: A run is given twice, or the picture is no .png.
        """
        for i, run in enumerate(self.runs):
            if run.resolve() in [other.resolve() for other in self.runs[:i]]:
                raise UserError(f"{run} is given twice; drop one")
        if self.out.suffix != ".png":
            raise UserError(f"--out={self.out} is no .png; give a name that ends in .png")


@dataclass(frozen=True)
class RunSummary:
    """Where a run stands, finished or not."""

    name: str
    """Name of its directory."""

    recipe: str
    """Quantisation preset, with the fields in which the run's recipe is another."""

    seed: int
    """Seed of the initial weights and of the data order."""

    steps: int
    """Last step done."""

    planned_steps: int
    """Steps of the whole run."""

    tokens: int
    """Tokens trained on so far."""

    train_loss: float
    """Mean training loss of the last 5% of the steps done, at least one, in nats a token."""

    valid_loss: float | None
    """Validation loss of the last evaluation, in nats a token; None if none ran."""

    valid_step: int | None
    """Step of that evaluation."""

    tokens_per_s: float | None
    """Median over the steps; None if none was timed."""

    peak_bytes: int | None
    """Peak memory of the device; None if it is not known."""

    skipped: int
    """Steps without a finite gradient, which left the weights as they were."""

    data_fingerprint: str
    """Names the tokens that were trained on."""

    config: Mapping[str, Any] = field(repr=False)
    """The whole configuration, as recorded."""


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the metrics of a run, a dictionary a step.

    A last line without its end is one that the run is writing, or was when it was stopped; it is
    left out unless it is whole.

    Raises:
        UserError: There are none, or a line is not one of a step.
    """
    path = Path(run_dir) / "metrics.jsonl"
    *ended, rest = _read(path).split(b"\n")
    lines = []
    for number, text in enumerate([*ended, rest] if rest else ended, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            if number > len(ended):
                break
            raise UserError(f"{path}:{number} is not JSON; mend or remove the line") from None
        for key in ("step", "loss", "tokens"):
            if not isinstance(line, dict) or not isinstance(line.get(key), int | float):
                raise UserError(f"{path}:{number} has no number {key!r}; mend or remove the line")
        lines.append(line)
    if not lines:
        raise UserError(f"{path} has no steps yet; wait for the run's first metrics")
    return lines


def summarize(run_dir: str | os.PathLike[str]) -> RunSummary:
    """Sums up a run from its config.json and metrics.jsonl.

    Raises:
        UserError: One of them is missing or cannot be understood.
    """
    path = Path(run_dir) / "config.json"
    try:
        recorded = json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    metrics = read_metrics(run_dir)
    last = metrics[-1]
    tail = metrics[-max(1, len(metrics) // 20) :]
    evaluated = [line for line in metrics if line.get("valid_loss") is not None]
    speeds = [line["tokens_per_s"] for line in metrics if line.get("tokens_per_s") is not None]
    # Every part of a resumed run ends with its own peak.
    peaks = [line["peak_bytes"] for line in metrics if line.get("peak_bytes") is not None]
    try:
        config = recorded["config"]
        for key in ("model", "batch_size", "seq_len"):
            config[key]
        return RunSummary(
            name=Path(run_dir).resolve().name,
            recipe=_recipe(config),
            seed=config["seed"],
            steps=last["step"],
            planned_steps=config["steps"],
            tokens=last["tokens"],
            train_loss=sum(line["loss"] for line in tail) / len(tail),
            valid_loss=evaluated[-1]["valid_loss"] if evaluated else None,
            valid_step=evaluated[-1]["step"] if evaluated else None,
            tokens_per_s=statistics.median(speeds) if speeds else None,
            peak_bytes=max(peaks, default=None),
            skipped=last.get("skipped", 0),
            data_fingerprint=recorded["data_fingerprint"],
            config=config,
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not that of a run ({error} is missing)") from None


def differing_fields(runs: Sequence[RunSummary]) -> list[str]:
    """Names what the runs should share for their gap to tell of the recipe, with its values.

    Returns:
        For each such field "name (value, value)", every value once.
    """
    fields = {
        "data_fingerprint": [run.data_fingerprint[:12] for run in runs],
        "seed": [str(run.seed) for run in runs],
        "batch_size x seq_len": [
            f"{run.config['batch_size']} x {run.config['seq_len']}" for run in runs
        ],
        "steps": [_steps(run) for run in runs],
        "lr": [str(run.config.get("lr")) for run in runs],
        "optimizer": [_optimizer(run, runs) for run in runs],
        "grad_comm": [_grad_comm(run.config) for run in runs],
        "step of the last evaluation": [str(run.valid_step) for run in runs],
        "eval_batches": [str(run.config.get("eval_batches")) for run in runs],
        "model": [_model(run, runs) for run in runs],
    }
    return [
        f"{name} ({', '.join(dict.fromkeys(values))})"
        for name, values in fields.items()
        if len(set(values)) > 1
    ]


def compare(config: Config) -> None:
    """Prints the table, warns of runs that do not compare, and writes the picture.

    Raises:
        UserError: There is no run, one cannot be read, or the picture cannot be written. Nothing
            is written.
    """
    # Not a check of Config, as a mistyped flag takes the run behind it along and is what to report.
    if not config.runs:
        raise UserError(f"no run is given; give at least one directory, see {PROGRAM} --help")
    runs = [summarize(run_dir) for run_dir in config.runs]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run_dir) for run_dir in config.runs]
    curves = {name: read_metrics(run_dir) for name, run_dir in zip(names, config.runs, strict=True)}
    try:
        save_loss_plot(config.out, curves)
    except OSError as error:
        raise UserError(f"--out={config.out} cannot be written ({error.strerror})") from error
    if different := differing_fields(runs):
        print(
            f"warning: gaps mean little: the runs differ in {'; '.join(different)}",
            file=sys.stderr,
        )
    # A line wider than the terminal is wrapped by it; Rich would cut numbers off to make it fit.
    console = Console(width=10_000, markup=False, emoji=False, highlight=False)
    console.print(_table(names, runs))
    console.print(_notes(names, runs), f"Curves: {config.out}", sep="\n")


def _table(names: Sequence[str], runs: Sequence[RunSummary]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("run")
    table.add_column("recipe")
    for heading in (
        "seed",
        "steps",
        "tokens",
        "training\nloss (nats)",
        "validation\nloss (nats)",
        "gap\n(nats)",
        "gap\n(%)",
        "tokens/s",
        "peak memory\n(GiB)",
        "skipped\nsteps",
    ):
        table.add_column(heading, justify="right")
    losses = _compared(runs)
    for name, run, loss in zip(names, runs, losses, strict=True):
        gap = loss - losses[0]
        percent = 100 * gap / losses[0] if losses[0] else math.nan
        table.add_row(
            name,
            run.recipe,
            str(run.seed),
            _steps(run),
            f"{run.tokens:,}",
            _format(run.train_loss, ".4f"),
            _format(run.valid_loss, ".4f"),
            _format(gap, "+.4f"),
            _format(percent, "+.2f"),
            _format(run.tokens_per_s, ",.0f"),
            _format(None if run.peak_bytes is None else run.peak_bytes / 2**30, ".2f"),
            str(run.skipped),
        )
    return table


def _notes(names: Sequence[str], runs: Sequence[RunSummary]) -> str:
    unevaluated = [name for name, run in zip(names, runs, strict=True) if run.valid_loss is None]
    gap = (
        f"training loss less that of {names[0]}, as {', '.join(unevaluated)} has no validation loss"
        if unevaluated
        else f"validation loss less that of {names[0]}"
    )
    return (
        "Training loss: mean of the last 5% of steps, at least one.\n"
        f"Gap: {gap}; in nats, and in percent of the latter.\n"
        "Tokens/s: median over the steps."
    )


def _compared(runs: Sequence[RunSummary]) -> list[float]:
    """The losses that gaps are taken of: validation if every run has it, else training."""
    valid = [run.valid_loss for run in runs if run.valid_loss is not None]
    return valid if len(valid) == len(runs) else [run.train_loss for run in runs]


def _steps(run: RunSummary) -> str:
    return f"{run.steps}" if run.steps == run.planned_steps else f"{run.steps}/{run.planned_steps}"


def _model(run: RunSummary, runs: Sequence[RunSummary]) -> str:
    """The model's name, with the fields that overrides have made differ between runs of one."""
    fields = [
        other.config.get("llama", {})
        for other in runs
        if other.config["model"] == run.config["model"]
    ]
    overridden = _differing(run.config.get("llama", {}), fields, _SAME_MODEL)
    return " ".join([run.config["model"], *overridden])


def _recipe(config: dict[str, Any]) -> str:
    """The preset's name, with what overrides have made of it."""
    own, preset = config.get("quantization", {}), RECIPES.get(config["recipe"])
    of_preset = {} if preset is None else json.loads(json.dumps(asdict(preset)))
    return " ".join([config["recipe"], *_differing(own, [of_preset], ())])


def _grad_comm(config: Mapping[str, Any]) -> str:
    return sent_in(config.get("grad_comm"), config.get("optimizer", {}).get("master"))


def _optimizer(run: RunSummary, runs: Sequence[RunSummary]) -> str:
    fields = [other.config.get("optimizer", {}) for other in runs]
    own = run.config.get("optimizer", {})
    return " ".join(_differing(own, fields, ("accumulation",)))


def _differing(
    own: dict[str, Any], of_all: Sequence[dict[str, Any]], of_no_account: Sequence[str]
) -> list[str]:
    return [
        f"{key}={value}"
        for key, value in sorted(own.items())
        if key not in of_no_account and any(other.get(key) != value for other in of_all)
    ]


def _format(value: float | None, spec: str) -> str:
    if value is None:
        return _UNKNOWN
    return format(value, spec) if math.isfinite(value) else str(value)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give the directory of a run"
        ) from None


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program on `args`, or on the command line; returns the exit status."""
    try:
        compare(parse_flags(Config, sys.argv[1:] if args is None else args, PROGRAM))
    except UserError as error:
        return report_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
