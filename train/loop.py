"""The training loop: batches in, steps, reports, evaluations and checkpoints out."""

import dataclasses
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled

from train import plot, processes
from train.batches import TokenWindows, batches, eval_batches, eval_rows
from train.checkpoint import Checkpoints
from train.compare import read_metrics
from train.config import TrainConfig
from train.data import Corpus
from train.errors import UserError
from train.interrupts import interrupts
from train.metrics import Mute, ProgressLine, RunLog, set_aside
from train.plan import peak_bytes
from train.profile import WARM_UP, Profile
from train.step import Trainer, TrainState


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: steps done.
        valid_loss: the last validation loss, nats a token, or None if none was taken.
        interrupted: whether a signal ended it before its last step.
    """

    step: int
    valid_loss: float | None
    interrupted: bool


def train(
    config: TrainConfig, run_dir: Path, corpus: Corpus, trainer: Trainer, step_fn: Compiled
) -> Outcome:
    """Runs from the newest checkpoint, or the start, to the last step or a signal.

    Args:
        config: the run's configuration.
        run_dir: an existing directory that is this run's.
        corpus: tokens to train on and to evaluate with.
        trainer: the functions of ``config``.
        step_fn: ``trainer.step``, compiled, its state donated.

    Raises:
        UserError: the gradient was not finite too often in a row, or a checkpoint does not fit.
        OSError: something could not be written.
    """
    sharers = processes.on_this_host()
    with closing(Checkpoints(run_dir, config.checkpoint, sharers)) as checkpoints:
        # A host may see a shared directory as it was a while ago.
        start = int(processes.of_first(lambda: str(checkpoints.latest() or 0)))
        state = (
            checkpoints.restore(start, trainer.abstract_state()) if start else trainer.placed_init()
        )
        speaks = processes.is_first()
        aside = set_aside(run_dir) if speaks and not start else None
        with (
            closing(RunLog(run_dir, start) if speaks else Mute()) as log,
            closing(ProgressLine(config.steps, start) if speaks else Mute()) as line,
        ):
            if 0 < start < config.steps:
                line.say(f"going on from step {start}")
            if aside is not None:
                line.say(
                    f"warning: {run_dir} has steps but no checkpoint: beginning again at step 0; "
                    f"their log is kept in {aside.name}"
                )
            if checkpoints.in_parts(trainer.abstract_state()):
                line.say(
                    "checkpoints go in parts of at most "
                    f"{checkpoints.host_bytes / 2**30:.3g} GiB, and training waits for them "
                    "(--checkpoint.host_gib)"
                )
            run = _Run(config, run_dir, corpus, trainer, checkpoints, log, line)
            taken, windows = run.evaluated()
            if taken < windows:
                line.say(f"an evaluation takes {taken:,} of {windows:,} sequences")
            return run.go(state, step_fn)


class _Run:
    """The parts of a run that its loop puts together."""

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        corpus: Corpus,
        trainer: Trainer,
        checkpoints: Checkpoints,
        log: RunLog | Mute,
        line: ProgressLine | Mute,
    ) -> None:
        self.config, self.run_dir, self.corpus = config, run_dir, corpus
        self.checkpoints, self.log, self.line = checkpoints, log, line
        self.placement = trainer.placement
        self.eval_fn = jax.jit(trainer.evaluate, out_shardings=self.placement.replicated)
        self.health_fn = jax.jit(trainer.health, out_shardings=self.placement.replicated)
        # What several write into one folder opens in no viewer.
        self.profile = Profile(run_dir / "profile", config.profile if processes.is_first() else 0)
        self.valid_loss: float | None = None

    def go(self, state: TrainState, step_fn: Compiled) -> Outcome:
        c = self.config
        step = int(state.step)
        pending: list[tuple[int, dict[str, Any]]] = []
        data = batches(
            self.corpus.train,
            seq_len=c.seq_len,
            batch_size=c.batch_size,
            seed=c.seed,
            start_step=step,
            rows=self.placement.rows(c.batch_size),
        )
        clock = time.perf_counter()
        with interrupts(alone=jax.process_count() == 1) as interrupted:
            while step < c.steps and not interrupted:
                batch = self.placement.put(next(data), c.batch_size)
                with self.profile.named(step + 1):
                    state, metrics = step_fn(state, batch)
                step += 1
                if processes.preempted(step):
                    interrupted.append(signal.SIGTERM)
                self._say_traced(self.profile.step(state))
                pending.append((step, metrics))
                evaluate = step % c.eval_every == 0 or step == c.steps
                save = self._saves(step)
                measure = self._measures_health(step)
                if evaluate or save or measure or step % c.log.every == 0:
                    clock = self._report(pending, clock, state if evaluate else None)
                    pending = []
                if measure:
                    self.log.health(step, jax.device_get(self._health(state, batch)))
                    self.log.flush()
                if save:
                    self.log.sync()  # before the save: a checkpoint without its lines loses them
                    self.checkpoints.save(step, state)
                if evaluate or save or measure:
                    clock = time.perf_counter()  # a step's time is the step's alone
            self._say_traced(self.profile.end(state))
            if self.profile.missed:
                self.line.say(f"warning: nothing traced: that begins after {WARM_UP} steps")
            stopped = bool(interrupted) and step < c.steps
            self._report(pending, clock, None)
            if stopped:
                self.line.say(f"interrupted: saving step {step}")
                self.log.sync()
                self.checkpoints.save(step, state)
            self.checkpoints.wait()
        if step:
            self._plot()
        return Outcome(step, self.valid_loss, stopped)

    def _report(
        self, pending: list[tuple[int, dict[str, Any]]], clock: float, evaluated: TrainState | None
    ) -> float:
        """Reads the metrics of the steps since the last report, and writes them.

        Returns:
            The time from which the next report's speed counts.
        """
        if not pending:
            return clock
        c = self.config
        values = jax.device_get([metrics for _, metrics in pending])
        now = time.perf_counter()
        a_step = c.batch_size * c.seq_len
        speed = len(pending) * a_step / (now - clock)
        last = pending[-1][0]
        if evaluated is not None:
            self.valid_loss = self._evaluate(evaluated)
        for (step, _), value in zip(pending, values, strict=True):
            line: dict[str, Any] = {
                "step": step,
                "loss": float(value["loss"]),
                "tokens": step * a_step,
                "tokens_per_s": round(speed, 1),
                "grad_norm": float(value["grad_norm"]),
                "lr": float(value["lr"]),
                "skipped": int(value["skipped"]),
            }
            if "loss_scale" in value:
                line["loss_scale"] = float(value["loss_scale"])
            if step == last and evaluated is not None:
                line["valid_loss"] = self.valid_loss
            if step == c.steps:
                line["peak_bytes"] = peak_bytes()
            self.log.step(line)
        self.log.flush()  # a run that is killed leaves the lines of what it reported
        self.line.report(last, line["loss"], speed, (c.steps - last) * a_step / speed)
        if evaluated is not None:
            self.line.say(f"step {last}/{c.steps}  validation loss {self.valid_loss:.4f}")
            self._plot()
        self._check_skipped(max(int(value["skipped_in_a_row"]) for value in values), last)
        self._check_overflow(any(bool(value.get("overflowed", False)) for value in values), last)
        return now

    def _check_skipped(self, in_a_row: int, step: int) -> None:
        if in_a_row >= self.config.optimizer.max_skipped:
            health = f", or look at {self.run_dir / 'health.jsonl'}"
            raise UserError(
                f"the gradient was not finite for {in_a_row} steps in a row, up to step {step}, "
                "which changed no parameter: start again with a lower --lr"
                + (health if self.config.quantization.quantizes else "")
            )

    def _check_overflow(self, overflowed: bool, step: int) -> None:
        if overflowed:
            raise UserError(
                f"a weight reached 64 by step {step}, more than it can in float16: start again "
                "with --optimizer.master=bfloat16 or float32, or with a lower --lr"
            )

    def evaluated(self) -> tuple[int, int]:
        """How many sequences an evaluation takes, in whole batches, and of how many."""
        windows = len(TokenWindows(self.corpus.valid, self.config.seq_len))
        count = eval_rows(windows, self.config.batch_size, self.placement.shards)
        return count * min(self.config.eval_batches, windows // count), windows

    def _evaluate(self, state: TrainState) -> float:
        c = self.config
        windows = len(TokenWindows(self.corpus.valid, c.seq_len))
        count = eval_rows(windows, c.batch_size, self.placement.shards)
        losses = [
            self.eval_fn(state.params, state.stats, self.placement.put(batch, count))
            for batch in eval_batches(
                self.corpus.valid,
                seq_len=c.seq_len,
                batch_size=count,
                max_batches=c.eval_batches,
                rows=self.placement.rows(count),
            )
        ]
        return float(np.mean(jax.device_get(losses), dtype=np.float64))

    def _saves(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return every > 0 and (step % every == 0 or step == self.config.steps)

    def _measures_health(self, step: int) -> bool:
        every = self.config.log.health_every
        return self.config.quantization.quantizes and every > 0 and step % every == 0

    def _health(self, state: TrainState, batch: Any) -> Any:
        return self.health_fn(state.params, state.stats, batch)

    def _say_traced(self, steps: int) -> None:
        if steps:
            self.line.say(f"traced {steps} steps into {self.profile.folder}")

    def _plot(self) -> None:
        if not processes.is_first():
            return
        plot.save_loss_plot(
            self.run_dir / "loss.png", {self.run_dir.name: read_metrics(self.run_dir)}
        )
