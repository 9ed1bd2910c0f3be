"""Checkpoints: the train state by orbax, asynchronously, the newest few kept."""

import contextlib
import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from train.config import CheckpointConfig
from train.errors import UserError
from train.step import TrainState


class Checkpoints:
    """The checkpoints under a run directory, each a whole ``TrainState``.

    A save is complete or absent: orbax writes beside its place and renames, so a run killed in the
    middle of one resumes from the one before.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig) -> None:
        # Orbax reports every step of its own, and as a traceback each error that it raises too.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._manager = ocp.CheckpointManager(
            (run_dir / "checkpoints").absolute(),
            # Named here, or metadata could be read only after this manager's first save.
            item_handlers=ocp.StandardCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep, enable_async_checkpointing=True
            ),
        )

    def latest(self) -> int | None:
        """Steps done at the newest complete checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Starts saving; returns once the device's buffers may be written again.

        Raises:
            OSError: this save or the one before could not be written.
        """
        if self.latest() == step:
            return
        # The next step reuses the state's memory while orbax still writes. Where memory is the
        # host's, orbax would read from there.
        arrays = _named_leaves(state)
        if jax.default_backend() == "cpu":
            arrays = jax.tree.map(jnp.copy, arrays)
        self.wait()
        if shutil.disk_usage(self._manager.directory).free < sum(a.nbytes for a in arrays.values()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # cleaner than half a save
        with _os_errors():
            self._manager.save(step, args=ocp.args.StandardSave(arrays))

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Reads a checkpoint into the shapes, dtypes and shardings of ``abstract``.

        Each process reads what its own devices hold, whatever mesh the checkpoint was saved from.

        Raises:
            UserError: it is of another model; what differs is named.
        """
        wanted = _named_leaves(abstract)
        kept = self._manager.item_metadata(step).tree
        shapes = {name: tuple(leaf.shape) for name, leaf in kept.items()}
        for name, leaf in wanted.items():
            if shapes.get(name) != tuple(leaf.shape):
                raise UserError(
                    f"checkpoint {step} is of another model: {name} has shape "
                    f"{shapes.get(name, 'none')}, this model's {tuple(leaf.shape)}; give the "
                    "flags of the run it is of, or another run_dir"
                )
        arrays = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
        leaves = [arrays[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves)

    def wait(self) -> None:
        """Waits for the last save to be complete.

        Raises:
            OSError: it could not be written.
        """
        with _os_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of threads and files.

        Raises:
            OSError: the last save could not be written.
        """
        with _os_errors():
            self._manager.close()


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Raises an operating system's error as OSError, where tensorstore makes it a ValueError."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def _named_leaves(state: TrainState) -> dict[str, Any]:
    """Every array of the state under its path, such as "params/layers/mlp/down_proj/kernel"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }
