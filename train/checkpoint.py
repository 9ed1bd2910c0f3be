"""Checkpoints: the train state by orbax, asynchronously, the newest few kept."""

import asyncio
import contextlib
import errno
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.metadata.array_metadata_store import Store  # exported nowhere

from train.config import CheckpointConfig
from train.errors import UserError
from train.host import free_memory
from train.step import TrainState

CHUNK = 64 * 2**20
"""Bytes in which an array is compressed, each chunk by a core of its own."""

SAVING = 12 * 3600
"""Seconds that a save may take. Orbax's own 20 minutes can be too few for a slow file system, and
that a process has died, which they are to notice, its heartbeats tell within seconds."""


class Checkpoints:
    """The checkpoints under a run directory, each a whole ``TrainState``.

    A save is complete or absent: orbax writes beside its place and renames, so a run killed in the
    middle of one resumes from the one before.

    ``sharers`` are the run's processes on this host, which save at the same time.

    Attributes:
        host_bytes: of a state that may be copied to host memory whole, to be written while the run
            goes on. What is larger is saved in parts of at most as much, or of one array, and the
            run waits.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, sharers: int = 1) -> None:
        # Orbax reports every step of its own, and as a traceback each error that it raises too.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        if config.host_gib is None:
            # What is copied stands twice, as it came from the device and as it is written, and
            # the memory of this moment is not all there will be.
            self.host_bytes = free_memory() // (4 * sharers)
        else:
            self.host_bytes = int(config.host_gib * 2**30)
        types = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, _InParts(self.host_bytes)), (np.ndarray, ocp.type_handlers.NumpyHandler())
        )
        self._manager = ocp.CheckpointManager(
            (run_dir / "checkpoints").absolute(),
            item_handlers=ocp.PyTreeCheckpointHandler(type_handler_registry=types),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(timeout_secs=SAVING),
                cleanup_tmp_directories=True,  # of a save that was cut off
            ),
        )

    def latest(self) -> int | None:
        """Steps done at the newest complete checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def in_parts(self, state: TrainState) -> bool:
        """Whether a state, which may be abstract, is saved in parts while the run waits."""
        return sum(map(_held, jax.tree.leaves(state))) > self.host_bytes

    def save(self, step: int, state: TrainState) -> None:
        """Starts saving; returns once the device's buffers may be written again.

        Raises:
            OSError: this save or the one before could not be written.
        """
        if self.latest() == step:
            return
        # The next step reuses the state's memory while orbax still writes. Where memory is the
        # host's, orbax would read from there.
        arrays = named_leaves(state)
        if jax.default_backend() == "cpu" and not self.in_parts(state):
            arrays = jax.tree.map(jnp.copy, arrays)
        self.wait()
        if shutil.disk_usage(self._manager.directory).free < sum(a.nbytes for a in arrays.values()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # cleaner than half a save
        chunks = dict.fromkeys(arrays, ocp.SaveArgs(chunk_byte_size=CHUNK))
        with _os_errors():
            self._manager.save(step, args=ocp.args.PyTreeSave(arrays, save_args=chunks))
        if self.in_parts(state):
            self.wait()

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Reads a checkpoint into the shapes, dtypes and shardings of ``abstract``.

        Each process reads what its own devices hold, whatever mesh the checkpoint was saved from.

        Raises:
            UserError: it is of another model; what differs is named. Or it cannot be read.
        """
        wanted = named_leaves(abstract)
        path = self._manager.directory / str(step) / "default"
        # An array is refused that is not smaller than what may be under way at a time.
        largest = max(leaf.size * leaf.dtype.itemsize for leaf in wanted.values())
        under_way = max(self.host_bytes, 2 * largest) / 10**9
        handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=under_way)
        with contextlib.closing(ocp.Checkpointer(handler)) as reader:
            check_holds(reader, path, wanted)
            arrays = reader.restore(path, args=ocp.args.StandardRestore(wanted))
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
def orbax_silent() -> Iterator[None]:
    """Keeps orbax from warning of what is not missing: the files of a manager, which wrote none."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_holds(reader: ocp.Checkpointer, path: Path, wanted: dict[str, Any]) -> None:
    """Refuses a checkpoint that does not hold what is to be read, by its metadata alone.

    Args:
        reader: of checkpoints as the one at ``path``.
        path: of its arrays, in a directory that is named after its step.
        wanted: abstract arrays by name.

    Raises:
        UserError: it is of another model; what differs is named. Or it cannot be read.
    """
    step = path.parent.name
    metadata = reader.metadata(path).item_metadata
    if metadata is None:  # orbax's word for what it cannot read
        raise UserError(
            f"checkpoint {step} cannot be read, or is damaged; if it is, move {path.parent} "
            "elsewhere to go on from the one before, if there is one"
        )
    shapes = {name: tuple(leaf.shape) for name, leaf in metadata.tree.items()}
    for name, leaf in wanted.items():
        if shapes.get(name) != tuple(leaf.shape):
            raise UserError(
                f"checkpoint {step} is of another model: {name} has shape "
                f"{shapes.get(name, 'none')}, this model's {tuple(leaf.shape)}; give the flags of "
                "the run it is of, or another run_dir"
            )


class _InParts(ocp.type_handlers.ArrayHandler):
    """Writes arrays that are together larger than a limit one part after the other.

    What is smaller is copied to the host at once and written later, as orbax has it.
    """

    def __init__(self, most: int) -> None:
        """Sets the limit, ``most`` bytes; an array that is larger is a part by itself."""
        super().__init__(array_metadata_store=Store())  # as orbax's own handler of arrays
        self._most = most

    async def serialize(
        self, values: Sequence[jax.Array], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        """Starts writing, or has written all; returns what is yet to be waited for."""
        sizes = [_held(value) for value in values]
        if sum(sizes) <= self._most:
            return await super().serialize(values, infos, args)
        for part in parts(sizes, self._most):
            own = None if args is None else args[part]
            writes = await super().serialize(values[part], infos[part], own)
            await asyncio.gather(*(asyncio.to_thread(write.result) for write in writes))
        return []


def parts(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Cuts a sequence of sizes into runs of at most ``most`` together, or of a single one."""
    start, total = 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > most:
            yield slice(start, i)
            start, total = i, 0
        total += size
    yield slice(start, len(sizes))


def _held(leaf: Any) -> int:
    """Bytes of an array, which may be abstract, that this process's devices hold.

    What is replicated counts once for every device.
    """
    if getattr(leaf, "sharding", None) is None:
        return int(leaf.size * leaf.dtype.itemsize)
    devices = len(leaf.sharding.addressable_devices)
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize * devices


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


def named_leaves(state: TrainState) -> dict[str, Any]:
    """Every array of the state under its path, such as "params/layers/mlp/down_proj/kernel"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }
