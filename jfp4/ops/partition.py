"""How an operation is divided over a mesh: a rule of its axes, and a function of a device's part.

XLA divides its own operations by itself, but of a custom call it gathers the operands, in silence,
and of what it does divide it may send the widest form. So every operation says by a ``Rule`` which
axes of its operands and results belong together, and computes a device's ``Part`` of it. Where
the parts lie is left to JAX: on automatic axes XLA's propagation decides, on explicit ones
the operands' own shardings do, and inside a caller's ``jax.shard_map`` the caller has decided.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.core import get_axis_env  # by which axes jax.vmap divides is said nowhere else
from jax._src.mesh import get_concrete_mesh  # nor is this inside jax.jit
from jax._src.sharding_impls import parse_flatten_op_sharding  # exported nowhere
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

Axes = tuple[str, ...]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Rule:
    """The factors that the axes of an operation's operands and results are.

    A factor is a name, such as ``m`` in ``("m k", "k n")``. An axis written ``k/2`` holds two
    elements of ``k`` each, and one written ``1`` is never divided; nor is one of length 1 whose
    factor is longer elsewhere, and which is broadcast therefore.

    Attributes:
        operands: an entry an operand, in the order of the function's arguments.
        results: an entry a result.
        inner: how many of the operands are divided as the work is; the others come in after what
            was reduced, and are divided as the results are. None: all.
        wanted: where the results had best lie on explicit axes, which nobody else says there; None:
            all of them on every device, as far as the operands leave it open.
    """

    operands: tuple[str, ...]
    results: tuple[str, ...]
    inner: int | None = None
    wanted: tuple[PartitionSpec, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """What a device's part of an operation knows of the others.

    Attributes:
        axes: the mesh axes that divide each factor.
        scatter: the axis of the result along which ``reduce`` leaves each device a part, and the
            mesh axes that divide it so; the axis is -1 where the result is reduced whole.
    """

    axes: Mapping[str, Axes]
    scatter: tuple[int, Axes] = (-1, ())

    def divides(self, *factors: str) -> Axes:
        """The mesh axes that divide these factors; none where a device has all of them."""
        return tuple(axis for factor in factors for axis in self.axes.get(factor, ()))

    def count(self, factor: str) -> int:
        """How many parts a factor is divided into."""
        axes = self.divides(factor)
        return lax.axis_size(axes) if axes else 1

    def index(self, factor: str) -> Array | int:
        """Which part of a factor this is, from 0."""
        axes = self.divides(factor)
        return lax.axis_index(axes) if axes else 0

    def sum(self, x: Array, *factors: str) -> Array:
        """The sum over all parts of these factors."""
        axes = self.divides(*factors)
        return lax.psum(x, axes) if axes else x

    def reduce(self, x: Array, factor: str, by: "Sums | None" = None) -> Array:
        """The sum over all parts of a factor, as the result is to lie.

        Args:
            x: what this device has of it.
            factor: the factor.
            by: what sums over mesh axes, leaving a part of the sum or all of it; None: XLA.
        """
        scattered_sum, whole_sum = (_psum_scatter, lax.psum) if by is None else by
        axis, scattered = self.scatter
        if scattered:
            x = scattered_sum(x, scattered, axis)
        rest = tuple(name for name in self.divides(factor) if name not in scattered)
        return whole_sum(x, rest) if rest else x


Sums = tuple[Callable[[Array, Axes, int], Array], Callable[[Array, Axes], Array]]


@dataclasses.dataclass(frozen=True)
class Reduction:
    """How the parts of a sum over devices become that sum, in float32.

    Attributes:
        dtype: what parts are rounded to first.
        by: what sums over mesh axes, leaving a part of the sum or all of it; None: XLA.
        to: where the sum had best lie on explicit axes.
    """

    dtype: jax.typing.DTypeLike = jnp.float32
    by: Sums | None = None
    to: PartitionSpec | None = None

    @property
    def wanted(self) -> tuple[PartitionSpec, ...] | None:
        """``Rule.wanted`` of an operation whose one result is the sum."""
        return None if self.to is None else (self.to,)

    def __call__(self, part: Part, x: Array, factor: str) -> Array:
        """The sum of ``x`` over all parts of a factor, as ``Part.reduce`` has it lie.

        Where the factor is not divided ``x`` is that sum, and is not rounded.
        """
        if not part.divides(factor):
            return x
        return part.reduce(x.astype(self.dtype), factor, self.by).astype(jnp.float32)


IN_FLOAT32 = Reduction()


def _psum_scatter(x: Array, axes: Axes, axis: int) -> Array:
    return lax.psum_scatter(x, axes, scatter_dimension=axis, tiled=True)


WHOLE = Part({})


def unfit() -> str:
    """Why a kernel cannot be had for what is traced now; empty if it can."""
    if len(set(mesh_of().axis_types)) > 1 and not _alone():
        return "axes of the mesh differ in type; expected all automatic, explicit or manual"
    return ""


def mesh_of(*arrays: Array) -> AbstractMesh:
    """The mesh in force; without one, the mesh of explicit axes that an array's type names."""
    in_force = jax.sharding.get_abstract_mesh()
    if in_force.empty:
        for mesh in (jax.typeof(x).sharding.mesh for x in arrays):
            if set(mesh.axis_types) == {AxisType.Explicit}:
                return mesh
    return in_force


def _alone() -> bool:
    """Whether nothing can be divided. Without a mesh in force arrays may still lie on one."""
    mesh = mesh_of()
    return jax.device_count() == 1 if mesh.empty else mesh.size == 1


def _undivided() -> bool:
    """Whether a function sees all of its operands that it ever will: also within a shard_map."""
    return _alone() or set(mesh_of().axis_types) == {AxisType.Manual}


def divided(fn: Callable[..., T], rule: Rule) -> Callable[..., T]:
    """``fn(WHOLE, *operands)``, computed as ``fn(part, *parts)`` on each device of a mesh.

    Operands lie where the rule's axes have them; what lies otherwise is moved by XLA, in the
    dtype that it has here. A factor that no result has is one that ``fn`` has to reduce.

    Args:
        fn: given a ``Part`` and an argument for each entry of the rule's operands, arrays or None;
            returns a tuple of arrays, one for each of its results.
        rule: of arguments and results.

    Returns:
        A function of the arguments.
    """

    def call(*operands: Array | None) -> Any:
        given = [operand for operand in operands if operand is not None]
        mesh = mesh_of(*given)
        if mesh != mesh_of():
            with jax.sharding.use_abstract_mesh(mesh):
                return call(*operands)
        kinds = set(mesh.axis_types)
        if _undivided() or len(kinds) > 1:
            return fn(WHOLE, *operands)

        def of_given(part: Part, *arrays: Array) -> Any:
            rest = iter(arrays)
            return fn(part, *(None if operand is None else next(rest) for operand in operands))

        inner = len(operands) if rule.inner is None else rule.inner
        present = Rule(
            tuple(r for r, x in zip(rule.operands, operands, strict=True) if x is not None),
            rule.results,
            None if rule.inner is None else sum(x is not None for x in operands[:inner]),
            rule.wanted,
        )
        by_kind = _explicitly if kinds == {AxisType.Explicit} else _automatically
        return by_kind(of_given, present)(*given)

    return call


def by_xla(fn: Callable[..., T], *operands: Array | None, rule: Rule) -> T:
    """What no kernel computes: ``divided(fn, rule)(*operands)``."""
    return divided(fn, rule)(*operands)


def varying_alike(tree: T, *others: Any) -> T:
    """``tree``, with every array varying over the manual axes that any of all these vary over.

    Inside a ``jax.shard_map`` that checks its types operands of one computation have to; what is
    varied so has its gradient summed over these axes. Elsewhere nothing.
    """

    def over(x: Array) -> frozenset[str]:
        return frozenset(jax.typeof(x).manual_axis_type.varying)

    every = frozenset().union(*(over(x) for x in jax.tree.leaves((tree, others))))

    def vary(x: Array) -> Array:
        missing = tuple(sorted(every - over(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Place:
    """Where an array on explicit axes lies, which its gradient has to as well.

    Attributes:
        sharding: None elsewhere.
    """

    sharding: NamedSharding | None

    @classmethod
    def of(cls, x: Array, *others: Array) -> "Place":
        """The place of an array; where it lies on no mesh, that of all of it beside others."""
        mesh = mesh_of(x, *others)
        explicit = set(mesh.axis_types) == {AxisType.Explicit}
        return cls(NamedSharding(mesh, jax.typeof(x).sharding.spec) if explicit else None)

    @property
    def spec(self) -> PartitionSpec | None:
        """How it is divided there; None elsewhere."""
        return None if self.sharding is None else self.sharding.spec

    def put(self, x: Array) -> Array:
        """``x``, at this place."""
        return x if self.sharding is None else jax.sharding.reshard(x, self.sharding)


def places(
    arrays: Sequence[Array], told: Sequence[NamedSharding] | None
) -> Sequence[NamedSharding | None] | None:
    """Where arrays lie on the mesh in force, as far as what is traced can know.

    Args:
        arrays: of any shapes.
        told: where they lie, of automatic axes, on which arrays do not say.

    Returns:
        For each array its place, or None where its parts cannot be told from a whole; instead of
        all, None where that is not known.
    """
    if _undivided():
        return [None] * len(arrays)
    mesh = mesh_of(*arrays)
    if set(mesh.axis_types) == {AxisType.Explicit}:
        return [NamedSharding(mesh, jax.typeof(x).sharding.spec) for x in arrays]
    return told


def by_parts(fn: Callable[..., T], place: NamedSharding | None, arrays: Any, *whole: Array) -> T:
    """``fn(begin, arrays, *whole)``, computed on each device of its parts of the arrays.

    Args:
        fn: returns a tree of arrays, divided as the first is; ``begin`` is the index in it of the
            first element of its part.
        place: by which all arrays are divided, axis by axis; None: by nothing.
        arrays: a tree of arrays of as many axes as the first, or of its last ones alone.
        whole: what every device has.
    """
    first, *_ = jax.tree.leaves(arrays)
    if place is None:
        return fn((0,) * first.ndim, arrays, *whole)
    entries = _entries(place.spec, first.ndim)

    def of_part(arrays: Any, *whole: Array) -> T:
        shape = jax.tree.leaves(arrays)[0].shape
        begin = tuple(
            lax.axis_index(_axes(entry)) * n if _axes(entry) else 0
            for entry, n in zip(entries, shape, strict=True)
        )
        return fn(begin, arrays, *whole)

    specs = jax.tree.map(lambda x: PartitionSpec(*entries[first.ndim - x.ndim :]), arrays)
    if set(place.mesh.axis_types) == {AxisType.Explicit}:
        arrays = jax.tree.map(
            lambda x, spec: jax.sharding.reshard(x, NamedSharding(place.mesh, spec)), arrays, specs
        )
    return jax.shard_map(
        of_part,
        mesh=place.mesh,
        in_specs=(specs, *[PartitionSpec()] * len(whole)),
        out_specs=place.spec,
        check_vma=False,
    )(arrays, *whole)


def parts_of_axis(place: NamedSharding | None, axis: int, ndim: int) -> int:
    """Into how many parts an array's axis is divided."""
    if place is None:
        return 1
    return _product(_axes(_entries(place.spec, ndim)[axis]), place.mesh.shape)


def _automatically(
    fn: Callable[..., tuple[Array, ...]], rule: Rule
) -> Callable[..., tuple[Array, ...]]:
    """On automatic axes: XLA decides where everything lies, and then asks for the parts."""

    def partition(in_force: Any, mesh: Any, operands: Any, results: Any) -> tuple[Any, ...]:
        # Of arguments that all lie nowhere XLA asks without a mesh, and in terms of its own.
        mesh = in_force if mesh.empty else mesh
        arrays = (*operands, *results)
        specs = [_spec(x, mesh) for x in arrays]
        n = len(operands)
        part, *places = _plan(rule, [x.shape for x in arrays], specs, n, mesh.shape)
        given, made = (tuple(NamedSharding(mesh, spec) for spec in own) for own in places)
        return mesh, functools.partial(fn, part), made, given

    def sharding_rule(mesh: Any, operands: Any, results: Any) -> SdyShardingRule:
        return _shardy(rule, [tuple(x.shape) for x in (*operands, *results)], len(operands))

    def whole(*operands: Array) -> tuple[Array, ...]:
        return fn(WHOLE, *operands)

    @custom_vmap
    def call(*operands: Array) -> tuple[Array, ...]:
        partitioned = custom_partitioning(whole)
        in_force = functools.partial(partition, get_concrete_mesh())
        partitioned.def_partition(in_force, sharding_rule=sharding_rule)
        return partitioned(*operands)

    @call.def_vmap  # custom_partitioning has no rule of its own
    def batched(size: int, are_batched: Any, *operands: Array) -> tuple[Any, Any]:
        operands = tuple(
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip(operands, are_batched, strict=True)
        )
        return _automatically(_each(fn), _batched(rule))(*operands), (True,) * len(rule.results)

    return call


def _spec(x: Any, mesh: Any) -> PartitionSpec:
    if isinstance(x.sharding, NamedSharding):
        return x.sharding.spec
    return parse_flatten_op_sharding(x.sharding._to_xla_hlo_sharding(len(x.shape)), mesh)[0]


def _explicitly(
    fn: Callable[..., tuple[Array, ...]], rule: Rule
) -> Callable[..., tuple[Array, ...]]:
    """On explicit axes: the operands' types say where they lie, and results follow from that."""

    def call(*operands: Array) -> tuple[Array, ...]:
        mesh = jax.sharding.get_abstract_mesh()
        # Of arrays that lie nowhere, or a sum over a divided axis would be refused.
        like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
        results = jax.eval_shape(functools.partial(fn, WHOLE), *like)
        shapes = [x.shape for x in (*like, *results)]
        specs = [jax.typeof(x).sharding.spec for x in operands]
        # Of an axis that jax.vmap has taken from these types a reduce-scatter cannot be lowered.
        batched = get_axis_env().explicit_mesh_axis_names
        specs += (not batched and rule.wanted) or [PartitionSpec()] * len(results)
        part, given, made = _plan(rule, shapes, specs, len(like), mesh.shape)
        moved = [jax.sharding.reshard(x, spec) for x, spec in zip(operands, given, strict=True)]
        parts = jax.shard_map(
            functools.partial(fn, part), in_specs=given, out_specs=made, check_vma=False
        )
        return parts(*moved)

    return call


# --------------------------------------------------------------------------------------- batches

_BATCH = "batch"


def _batched(rule: Rule) -> Rule:
    """The rule of what ``jax.vmap`` makes of an operation: an axis more, in front."""
    depth = sum(token.startswith(_BATCH) for token in rule.operands[0].split())
    operands, results = (
        tuple(f"{_BATCH}{depth} {own}" for own in entries)
        for entries in (rule.operands, rule.results)
    )
    return Rule(operands, results, rule.inner)


def _each(fn: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
    def each(part: Part, *operands: Array) -> tuple[Array, ...]:
        axis, scattered = part.scatter
        own = dataclasses.replace(part, scatter=(axis - 1 if scattered else axis, scattered))
        return jax.vmap(functools.partial(fn, own))(*operands)

    return each


# --------------------------------------------------------------------------------- who lies where

_Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Dims:
    """The factor of each axis of an array; None where it is never divided."""

    factors: tuple[str | None, ...]
    halved: tuple[bool, ...]
    shape: _Shape

    def axes(self, spec: PartitionSpec) -> dict[str, Axes]:
        """The mesh axes that a sharding divides each factor by."""
        return {
            factor: _axes(entry)
            for factor, entry in zip(self.factors, _entries(spec, len(self.shape)), strict=True)
            if factor is not None
        }

    def spec(self, axes: Mapping[str, Axes]) -> PartitionSpec:
        """The sharding by which these mesh axes divide each factor."""
        return PartitionSpec(*(axes.get(f) or None if f else None for f in self.factors))


def _resolve(rule: Rule, shapes: Sequence[_Shape]) -> list[_Dims]:
    """The factors of every operand and every result, by their shapes."""
    entries = [entry.split() for entry in (*rule.operands, *rule.results)]
    length: dict[str, int] = {}
    for tokens, shape in zip(entries, shapes, strict=True):
        for token, n in zip(tokens, shape, strict=True):
            length[token] = max(length.get(token, 0), n)
    # A length that is odd ends amid a byte: nor are its elements divided where they are whole.
    odd = {
        token.removesuffix("/2")
        for tokens, shape in zip(entries, shapes, strict=True)
        for token, n in zip(tokens, shape, strict=True)
        if token.endswith("/2") and length.get(token.removesuffix("/2")) != 2 * n
    }
    resolved = []
    for tokens, shape in zip(entries, shapes, strict=True):
        halved = tuple(token.endswith("/2") for token in tokens)
        names = [token.removesuffix("/2") for token in tokens]
        factors = tuple(
            name if name != "1" and name not in odd and (half or length[name] == n) else None
            for name, half, n in zip(names, halved, shape, strict=True)
        )
        resolved.append(_Dims(factors, halved, shape))
    return resolved


def _shardy(rule: Rule, shapes: Sequence[_Shape], count: int) -> SdyShardingRule:
    """The rule as Shardy, XLA's propagation of shardings, reads it; ``count`` are operands."""
    dims = _resolve(rule, shapes)
    in_halves = {f for d in dims for f, half in zip(d.factors, d.halved, strict=True) if half and f}
    numbers = itertools.count()

    def mapping(d: _Dims) -> ArrayMapping:
        entries: list[Any] = []
        for factor, half in zip(d.factors, d.halved, strict=True):
            if factor is None:
                entries.append(f"own{next(numbers)}")
            elif factor in in_halves and not half:
                entries.append(CompoundFactor(factor, f"{factor}_pair"))
            else:
                entries.append(factor)
        return ArrayMapping(*entries)

    mapped = tuple(mapping(d) for d in dims)
    made = {f for d in dims[count:] for f in d.factors}
    # In the order of their appearance, which Shardy numbers factors by.
    reduced = dict.fromkeys(f for d in dims[:count] for f in d.factors if f and f not in made)
    pairs: dict[str, Any] = {f"{factor}_pair": 2 for factor in sorted(in_halves)}
    return SdyShardingRule(
        mapped[:count], mapped[count:], reduction_factors=tuple(reduced), **pairs
    )


def _plan(
    rule: Rule,
    shapes: Sequence[_Shape],
    specs: Sequence[PartitionSpec],
    count: int,
    sizes: Mapping[str, int],
) -> tuple[Part, tuple[PartitionSpec, ...], tuple[PartitionSpec, ...]]:
    """What divides each factor, and so where operands and results shall lie.

    A mesh axis divides one factor of the work. First come the factors that all matrices among the
    inner operands divide alike, then those of the operands in turn, then those of the results. So
    rows and columns of a product stay where they are; a contraction that both operands divide is
    summed where it lies; and an operand that divides it alone, by axes that are taken, is gathered:
    a weight of FSDP.

    Args:
        rule: of operands and results.
        shapes: of these, in this order.
        specs: where they lie, or where results are wanted.
        count: how many are operands.
        sizes: of the mesh's axes.
    """
    dims = _resolve(rule, shapes)
    lying = [d.axes(spec) for d, spec in zip(dims, specs, strict=True)]
    inner = count if rule.inner is None else rule.inner
    unit: dict[str, int] = {}
    for d in dims:
        for factor, n in zip(d.factors, d.shape, strict=True):
            if factor is not None:
                unit[factor] = math.gcd(unit.get(factor, 0), n)
    taken: dict[str, Axes] = {}

    def take(factor: str, wanted: Axes) -> None:
        """Has ``wanted`` divide a factor, where it goes on from what does already."""
        own = taken.get(factor, ())
        others = {axis for f, axes in taken.items() if f != factor for axis in axes}
        wanted = tuple(axis for axis in wanted if axis not in others)
        while unit[factor] % _product(wanted, sizes):
            wanted = wanted[:-1]
        if wanted and wanted[: len(own)] == own:
            taken[factor] = wanted

    matrices = [axes for axes in lying[:inner] if len(axes) > 1]
    for axes in matrices:
        for factor in axes:
            take(factor, _common([own[factor] for own in matrices if factor in own]))
    for axes in (*lying[:inner], *lying[count:]):
        for factor, wanted in axes.items():
            take(factor, wanted)

    made = {factor for d in dims[count:] for factor in d.factors}
    summed = {axis for f, axes in taken.items() if f not in made for axis in axes}
    part = Part(taken)
    outer: Mapping[str, Axes] = taken
    if rule.inner is not None and summed:
        part, outer = _scattered(part, dims[count], lying[count], summed, sizes)
    places = [d.spec(taken if i < inner else outer) for i, d in enumerate(dims)]
    return part, tuple(places[:count]), tuple(places[count:])


def _scattered(
    part: Part,
    result: _Dims,
    wanted: Mapping[str, Axes],
    summed: set[str],
    sizes: Mapping[str, int],
) -> tuple[Part, Mapping[str, Axes]]:
    """Where a result lies of which each device is to have a part of the sum alone."""
    for i, (factor, n) in enumerate(zip(result.factors, result.shape, strict=True)):
        if factor is None or factor.startswith(_BATCH):
            continue
        own = part.divides(factor)
        rest = wanted[factor][len(own) :]
        goes_on = wanted[factor][: len(own)] == own and summed.issuperset(rest)
        if rest and goes_on and n % _product(wanted[factor], sizes) == 0:
            return dataclasses.replace(part, scatter=(i, rest)), {
                **part.axes,
                factor: wanted[factor],
            }
    return part, part.axes


def _common(specs: Sequence[Axes]) -> Axes:
    """The axes that all of these begin with."""
    return tuple(
        axes[0]
        for axes in itertools.takewhile(lambda axes: len(set(axes)) == 1, zip(*specs, strict=False))
    )


def _entries(spec: PartitionSpec, ndim: int) -> tuple[Any, ...]:
    """The entry of every axis: those at the end may have been left out."""
    return (*spec, *[None] * (ndim - len(spec)))


def _axes(entry: Any) -> Axes:
    """An entry of a PartitionSpec as a tuple of mesh axes."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _product(axes: Sequence[str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)
