"""A model small enough to train in a test: its flags, its runs, and what they wrote."""

import dataclasses
import functools
import json
import signal
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from train import loop, main, plan, step
from train.batches import batches
from train.config import CheckpointConfig, LogConfig
from train.step import Trainer

TINY = (
    "--model.num_layers=2",
    "--model.scan_layers",
    "--model.embed_dim=32",
    "--model.mlp_dim=64",
    "--model.num_heads=2",
    "--model.num_kv_heads=1",
    "--batch_size=2",
    "--seq_len=16",
    "--steps=12",
    "--eval_every=4",
    "--eval_batches=2",
    "--checkpoint.every=4",
    "--log.every=3",
    "--log.health_every=6",
)

_plan = functools.cache(plan.make_plan)


class _Jax:
    """What the loop uses of jax, but functions are compiled once for all runs."""

    jit = staticmethod(functools.cache(jax.jit))
    device_get = staticmethod(jax.device_get)
    process_count = staticmethod(jax.process_count)


@functools.cache
def _trainer(config):
    return Trainer(config)


def _shared_trainer(config, placement):
    """One trainer, on one device, for all configurations that compile to the same functions."""
    assert placement.mesh.size == 1
    return _trainer(
        dataclasses.replace(
            config,
            data="pystdlib",
            tokenizer=None,
            run_dir=None,
            eval_every=1,
            eval_batches=1,
            resume=False,
            plan=False,
            profile=0,
            optimizer=dataclasses.replace(config.optimizer, max_skipped=20),
            checkpoint=CheckpointConfig(),
            log=LogConfig(),
        )
    )


def write_text(path, first=0):
    lines = (f"def f{i}(x):\n    return x * {i * i} + {i % 7}\n\n" for i in range(first, 400))
    path.write_text("".join(lines))
    return path


class Runs:
    """Starts runs of the tiny model in this process."""

    def __init__(self, text):
        self.text = text

    def __call__(self, *flags):
        """Runs the program with these flags alone; returns its exit status."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step, "Trainer", _shared_trainer)
            patch.setattr(plan, "make_plan", _plan)
            patch.setattr(loop, "jax", _Jax)
            return main.main([str(flag) for flag in flags])

    def tiny(self, run_dir, *flags):
        """Runs the tiny model; returns the exit status."""
        return self(*TINY, f"--data={self.text}", f"--run_dir={run_dir}", *flags)

    def resume(self, run_dir, *flags):
        """Goes on with a run, by as few flags as can be."""
        return self(f"--run_dir={run_dir}", "--resume", *flags)


def lines_of(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(run_dir) / name).read_text().splitlines()]


def saved_arrays(run_dir, number):
    """The arrays of a checkpoint by name, read without the trainer's own code."""
    path = Path(run_dir).absolute() / "checkpoints" / str(number) / "default"
    with ocp.StandardCheckpointer() as reader:
        found = reader.metadata(path).item_metadata.tree
        empty = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in found.items()}
        return reader.restore(path, empty)


def assert_same_arrays(a, b):
    assert a.keys() == b.keys() and len(a) > 20
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def one_error(capsys):
    """The one line that a mistake prints, and nothing else printed."""
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    return errors


def interrupt_at(monkeypatch, step, number=signal.SIGTERM):
    """Has the signal arrive while the loop waits for the batch of a step."""

    def interrupted(*args, **kwargs):
        for done, batch in enumerate(batches(*args, **kwargs), start=kwargs["start_step"]):
            if done + 1 == step:
                signal.raise_signal(number)
            yield batch

    monkeypatch.setattr(loop, "batches", interrupted)
