"""Where a run's arrays lie on its mesh: the state's leaves, and the rows of a batch."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from jfp4.models.config import LlamaConfig
from jfp4.optim import Blocks
from jfp4.sharding import ROWS, RULES, make_mesh, parse_mesh, weight_shardings
from train.errors import UserError

Key = tuple[Any, ...]

SMALL = 2**20
"""Elements under which a leaf may be whole on every device: the scales of norms and their like."""


class Placement:
    """A mesh, and the shardings of what a run keeps on it.

    Attributes:
        mesh: the mesh, of one device where none is asked for.
        replicated: the sharding of what every device has whole.
        batch: that of a batch's rows, or of anything else whose first axis they are.
        shards: into how many parts a batch is divided.
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        self.mesh = make_mesh({}, jax.local_devices()[:1]) if mesh is None else mesh
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.batch = NamedSharding(self.mesh, PartitionSpec(RULES["batch"]))
        self.shards = math.prod(self.mesh.shape[axis] for axis in RULES["batch"])

    def in_force(self) -> AbstractContextManager[Any]:
        """The context in which functions are to be traced, so that models see the mesh.

        Where there are more devices than it has it tells operations that nothing is divided.
        """
        return jax.set_mesh(self.mesh) if jax.device_count() > 1 else nullcontext()

    def state(self, abstract: Any) -> Any:
        """The sharding of every leaf of a ``TrainState``.

        What the optimizer keeps of a weight lies as the weight does: moments, codes, and of a
        moment's exponents each axis that is long enough. Everything else is replicated.

        Raises:
            UserError: a weight that the mesh does not divide, by name.
        """
        try:
            weights = weight_shardings(abstract.params, self.mesh)
        except ValueError as error:
            raise UserError(f"mesh={self}: {error}") from None
        by_path = dict(jax.tree_util.tree_flatten_with_path(weights)[0])

        def place(path: Key, leaf: Any) -> Any:
            own = _of_weight(path, by_path) or self.replicated
            if not isinstance(leaf, Blocks):
                return own
            columns = leaf.exponents.shape[-1]
            fits = not own.spec or columns % _product(own.spec[-1], self.mesh) == 0
            rows: Any = own.spec[:-1]
            of_exponents = NamedSharding(self.mesh, PartitionSpec(*rows))
            places: Any = (own, own if fits else of_exponents)
            return Blocks(*places)

        return jax.tree_util.tree_map_with_path(
            place, abstract, is_leaf=lambda leaf: isinstance(leaf, Blocks)
        )

    def check_divided(self, state: Any, compiled: Any) -> None:
        """Refuses a step in which a large leaf of the state is whole along fsdp.

        It is what the compiled step asks for that counts: a layer whose variables declare no axes
        has its weights replicated, silently, and trains as well, but for the memory.

        Args:
            state: the abstract state.
            compiled: the sharding of each of its leaves in the compiled step.

        Raises:
            UserError: naming every such leaf.
        """
        wanted = self.mesh.shape[ROWS]

        def is_none(leaf: Any) -> bool:  # what there is not, and what a step does not read
            return leaf is None

        leaves = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_none)[0]
        places = jax.tree.leaves(compiled, is_leaf=is_none)
        whole = [
            f"{jax.tree_util.keystr(path, simple=True, separator='/')} {list(leaf.shape)}"
            for (path, leaf), place in zip(leaves, places, strict=True)
            if place is not None
            and math.prod(leaf.shape) >= SMALL
            and math.prod(leaf.shape) < wanted * math.prod(place.shard_shape(leaf.shape))
        ]
        if whole:
            raise UserError(
                f"mesh={self}: whole on every device along {ROWS}={wanted} are {', '.join(whole)}; "
                "expected each to declare its logical axes (jfp4/sharding.py)"
            )

    def rows(self, count: int) -> list[int]:
        """The rows of a batch of ``count`` that this process's devices hold, ascending."""
        places: Any = self.batch.addressable_devices_indices_map((count,)).values()
        return sorted({row for (rows,) in places for row in range(*rows.indices(count))})

    def put(self, own: npt.NDArray[np.int32], count: int) -> Int32[Array, "b s1"]:
        """A batch on the mesh, of this process's rows of it.

        Args:
            own: the rows that ``rows`` names.
            count: rows of the whole batch.
        """
        at = {row: i for i, row in enumerate(self.rows(count))}

        def part(index: tuple[slice, ...] | None) -> npt.NDArray[Any]:
            assert index is not None
            return own[[at[row] for row in range(*index[0].indices(count))], index[1]]

        return jax.make_array_from_callback((count, own.shape[1]), self.batch, part)

    def __str__(self) -> str:
        """The flag's value, such as "data=2,fsdp=4,tensor=1"."""
        return ",".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())


def place(text: str | None, llama: LlamaConfig, rows: int) -> Placement:
    """The placement that --mesh asks for, on all devices of all processes.

    Args:
        text: the flag; None is the first device.
        llama: the model, which the tensor axis has to divide.
        rows: of a microbatch, which data and fsdp have to divide.

    Raises:
        UserError: there are other devices than that, or something is not divided.
    """
    if text is None:
        if jax.process_count() > 1:
            raise UserError(
                f"mesh=None with {jax.process_count()} processes; expected all of their "
                f"{jax.device_count()} devices, such as --mesh=fsdp={jax.device_count()}"
            )
        return Placement()
    try:
        placement = Placement(make_mesh(parse_mesh(text)))
    except ValueError as error:
        raise UserError(f"mesh={error}") from None
    check(placement, llama, rows)
    return placement


def check(placement: Placement, llama: LlamaConfig, rows: int) -> None:
    """Refuses a mesh that does not divide heads or rows; weights are ``Placement.state``'s part.

    Raises:
        UserError: naming the flag, what it was, and what was expected.
    """
    tensor = placement.mesh.shape["tensor"]
    for name in ("num_kv_heads", "mlp_dim", "vocab_size"):
        size = getattr(llama, name)
        if size % tensor:
            raise UserError(
                f"model.{name}={size}; expected a multiple of the mesh's tensor={tensor}"
            )
    if rows % placement.shards:
        raise UserError(
            f"batch_size / optimizer.accumulation={rows}; expected a multiple of the mesh's "
            f"data x fsdp, {placement.shards}"
        )


def _of_weight(path: Key, by_path: dict[Key, NamedSharding]) -> NamedSharding | None:
    """The sharding of the weight whose path another path ends with, if there is one."""
    return next((place for own, place in by_path.items() if path[-len(own) :] == own), None)


def _product(axes: str | Sequence[str] | None, mesh: Mesh) -> int:
    axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[axis] for axis in axes)
