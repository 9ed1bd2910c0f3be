"""Checkpoints: the train state by orbax, asynchronously, the newest few kept."""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
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
        # Orbax reports every step of its own at INFO and each option left out at WARNING.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._manager = ocp.CheckpointManager(
            (run_dir / "checkpoints").absolute(),
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
        # The next step reuses the state's memory while orbax still writes: save a copy of it.
        arrays = {name: np.array(leaf) for name, leaf in _named_leaves(state).items()}
        self._manager.save(step, args=ocp.args.StandardSave(arrays))

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Reads a checkpoint into the shapes and dtypes of ``abstract``.

        Raises:
            UserError: it is of another model; what differs is named.
        """
        wanted = _named_leaves(abstract)
        kept = self._manager.item_metadata(step)
        shapes = {name: tuple(leaf.shape) for name, leaf in dict(kept or {}).items()}
        for name, leaf in wanted.items():
            if shapes.get(name) != tuple(leaf.shape):
                raise UserError(
                    f"checkpoint {step} is of another model: {name} has shape "
                    f"{shapes.get(name, 'none')}, this model's {tuple(leaf.shape)}; give the "
                    "flags of the run it is of, or another run_dir"
                )
        targets = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
            )
            for name, leaf in wanted.items()
        }
        arrays = self._manager.restore(step, args=ocp.args.StandardRestore(targets))
        leaves = [arrays[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves)

    def wait(self) -> None:
        """Waits for the last save to be complete.

        Raises:
            OSError: it could not be written.
        """
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of threads and files."""
        self._manager.close()


def _named_leaves(state: TrainState) -> dict[str, Any]:
    """Every array of the state under its path, such as "params/layers/mlp/down_proj/kernel"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }
