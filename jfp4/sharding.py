"""The mesh, and where on it every logical axis lies: one table, read by models and trainers alike.

A mesh has three axes. ``data`` copies the weights and divides the batch; ``fsdp`` divides the batch
AND the rows of every weight, which are gathered a layer at a time where they are used; ``tensor``
divides heads, the MLP's width and the vocabulary. All are automatic: XLA inserts the collectives.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

AXES = ("data", "fsdp", "tensor")
"""Axes of a mesh, the outermost first: neighbours along ``tensor`` are nearest to each other."""

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "layers": (),  # the scan's, and the optimizer's in-place slices: one layer at a time, whole
    "embed": (),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
}
"""The mesh axes that divide each logical axis."""

ROWS = "fsdp"
"""Divides the first axis of every matrix besides what ``RULES`` says of it.

The first and not "embed", since blocks of optimizer state lie along the last axis: they stay whole.
Where it does not divide the first axis it divides the last.
"""


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of the axes that "data=2,fsdp=-1" names; -1 takes the devices that are left.

    Raises:
        ValueError: an unknown axis or one given twice, a size that is neither positive nor -1, or
            more than one -1.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, size = part.strip().partition("=")
        if axis not in AXES or not equals:
            raise ValueError(f"{part.strip()!r} in {text!r}; expected AXIS=SIZE of {_names(AXES)}")
        if axis in sizes:
            raise ValueError(f"{axis} twice in {text!r}; expected each axis once")
        if not re.fullmatch(r"-1|0*[1-9][0-9]*", size):
            raise ValueError(f"{part.strip()!r} in {text!r}; expected a positive size, or -1")
        sizes[axis] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"{text!r} has more than one -1; expected one axis to take the rest")
    return sizes


def mesh_shape(sizes: Mapping[str, int], devices: int) -> tuple[int, ...]:
    """The size of every axis of ``AXES``, -1 resolved; axes that are not named have size 1.

    Raises:
        ValueError: an axis is none of ``AXES``, or the sizes do not make up the number of devices.
    """
    if unknown := [axis for axis in sizes if axis not in AXES]:
        raise ValueError(f"axis {unknown[0]!r} is unknown; expected {', '.join(AXES)}")
    given = math.prod(size for size in sizes.values() if size > 0)
    rest = devices // given if -1 in sizes.values() else 1
    shape = tuple(rest if sizes.get(axis) == -1 else sizes.get(axis, 1) for axis in AXES)
    if math.prod(shape) != devices:
        written = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(
            f"{written!r} has {given} devices{' or a multiple' if -1 in sizes.values() else ''} "
            f"and there are {devices}; expected a product of {devices}"
        )
    return shape


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all ``devices`` (by default every process's), its axes automatic.

    Raises:
        ValueError: as ``mesh_shape``.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(sizes, len(devices))
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def weight_spec(
    names: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]
) -> PartitionSpec:
    """How a weight is divided, by the logical names of its axes.

    Vectors, such as the scales of norms, are divided by nothing.

    Args:
        names: a logical name an axis, the stacked "layers" first if there is such an axis.
        shape: their lengths.
        sizes: of the mesh's axes.

    Raises:
        ValueError: a length that the mesh does not divide.
    """
    stack = names[0] == "layers" if names else False
    if len(names) - stack < 2:
        return PartitionSpec()
    axes = [RULES[name] if name else () for name in names]
    rows = [(*axis, ROWS) if i == stack else axis for i, axis in enumerate(axes)]
    columns = [*axes[:-1], (*axes[-1], ROWS)]
    for spec in (rows, columns):
        if all(n % _product(axis, sizes) == 0 for n, axis in zip(shape, spec, strict=True)):
            return PartitionSpec(*(axis or None for axis in spec))
    described = ", ".join(f"{name} {n}" for name, n in zip(names, shape, strict=True))
    wanted = ", ".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes[axis] > 1)
    raise ValueError(f"axes {described} under {wanted}; expected lengths that these divide")


def weight_shardings(params: nnx.State, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of every parameter in a State, by the axes that its variables declare.

    Raises:
        ValueError: a weight that the mesh does not divide, named by its path.
    """

    def place(path: tuple[Any, ...], variable: nnx.Variable[Any]) -> nnx.Variable[Any]:
        shape = variable.get_value().shape
        names = variable.get_metadata().get("out_sharding") or (None,) * len(shape)
        try:
            return variable.replace(NamedSharding(mesh, weight_spec(names, shape, mesh.shape)))
        except ValueError as error:
            raise ValueError(f"{'.'.join(str(key) for key in path)} has {error}") from None

    return nnx.map_state(place, params)


def constrain(x: Array, *names: str | None) -> Array:
    """Fixes where ``x`` lies on the mesh in force, by logical names of its first axes.

    Without a mesh (``jax.set_mesh``), or on one of a single device, nothing. Where the mesh is not
    of ``AXES`` XLA decides: of a name none of whose axes it has, or that a caller's
    ``jax.shard_map`` has divided already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    there = _sizes(mesh)
    if not any(axis in there for name in names if name for axis in RULES[name]):
        return x

    def entry(name: str | None) -> Any:
        axes = tuple(axis for axis in RULES[name] if axis in there) if name else ()
        lost = name is not None and RULES[name] and not axes
        return PartitionSpec.UNCONSTRAINED if lost else axes or None

    return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(entry, names)))


def constrain_weights(params: nnx.State) -> nnx.State:
    """Fixes where a State of parameters, or of their gradients, lies: as ``weight_shardings``.

    What holds its slices in place of a stack has them divided as the stack's other axes are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return params

    def fix(place: NamedSharding, whole: Any) -> Any:
        def fix_part(x: Array) -> Array:
            spec = place.spec[max(len(place.spec) - x.ndim, 0) :]
            return jax.lax.with_sharding_constraint(x, place.update(spec=PartitionSpec(*spec)))

        return jax.tree.map(fix_part, whole)

    return jax.tree.map(fix, weight_shardings(params, mesh), params)


def batch_shards() -> int:
    """Into how many parts the mesh in force divides a batch; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    there = {} if mesh.empty else _sizes(mesh)
    return _product([axis for axis in RULES["batch"] if axis in there], there)


def _sizes(mesh: AbstractMesh) -> dict[str, int]:
    """Of the axes that are not divided by hand, within a ``jax.shard_map``."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind != AxisType.Manual}


def _product(axes: Sequence[str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names)
