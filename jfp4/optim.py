"""Adam with its moments in a few bits, and steps that skip what is not finite; for optax."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float16, Float32, UInt8, UInt32

from jfp4.ops.quantize import amax_of
from jfp4.ops.rounding import binade, random_bits, round_to_dtype, stochastic_key
from jfp4.ops.slices import is_slices

BLOCK = 128
"""Elements along the last axis that share a scale."""

FIRST = {"e4m3": jnp.float8_e4m3fn, "float16": jnp.float16, "float32": jnp.float32}
"""Formats of the first moment."""

SECOND = {"float16": jnp.float16, "float32": jnp.float32}
"""Formats of the second moment's root."""

_LEAST_BINADE = 2.0**-80
"""Blocks with nothing above it share its scale, so that no product of scale and code is subnormal;
the smallest root of a normal float32 is 2**-63."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """An array in few bits: ``value = codes * scale``.

    Invariants:
      * A scale serves ``BLOCK`` elements of the last axis, or all of that axis where ``BLOCK`` does
        not divide it.
      * A scale is a power of two, so that only the codes' rounding loses anything; the block's
        largest magnitude comes to lie in the format's last binade but one, and cannot overflow.
      * A block that held a NaN or an infinity has the exponent 255, and every value of it is NaN.

    Attributes:
        codes: the array's shape, float16, or uint8 that holds the bits of E4M3: CPUs widen a whole
            float8 array to write a part of it, and not everything that saves arrays knows float8.
        exponents: of the scales, biased as float32's are (E8M0): scale = 2**(exponent - 127).
    """

    codes: Float16[Array, "..."] | UInt8[Array, "..."]
    exponents: UInt8[Array, "..."]


def to_blocks(
    x: Float32[Array, "..."], dtype: jax.typing.DTypeLike, bits: UInt32[Array, "..."] | None = None
) -> Blocks:
    """Rounds to codes with a scale a block.

    Args:
        x: any shape.
        dtype: of the codes, float8_e4m3fn or float16.
        bits: as in ``round_to_dtype``.
    """
    blocks = _split(x)
    amax = amax_of(blocks, -1)[..., 0]
    top = 2.0 ** (math.floor(math.log2(jnp.finfo(dtype).max)) - 1)
    scale = jnp.maximum(binade(amax), _LEAST_BINADE) * np.float32(1 / top)
    codes = round_to_dtype((blocks * (1 / scale)[..., None]).reshape(x.shape), dtype, bits)
    if codes.dtype == jnp.float8_e4m3fn:
        codes = lax.bitcast_convert_type(codes, jnp.uint8)
    exponents = lax.bitcast_convert_type(scale, jnp.uint32) >> 23
    return Blocks(codes, exponents.astype(jnp.uint8))


def from_blocks(blocks: Blocks) -> Float32[Array, "..."]:
    """The values; exact."""
    codes = blocks.codes
    if codes.dtype == jnp.uint8:
        codes = lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
    # What was not finite has an infinite scale; its codes, times the reciprocal, are zero or NaN,
    # and so NaN comes back.
    bits = blocks.exponents.astype(jnp.uint32) << 23
    scale = lax.bitcast_convert_type(bits, jnp.float32)[..., None]
    return (_split(codes.astype(jnp.float32)) * scale).reshape(codes.shape)


def _split(x: Array) -> Array:
    """``x`` with its last axis in two, blocks and the elements of one."""
    n = x.shape[-1] if x.ndim else 1
    block = BLOCK if n % BLOCK == 0 else n
    return x.reshape(*x.shape[:-1], n // block, block)


def scale_by_adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    first: str = "e4m3",
    second: str = "float16",
    seed: int | None = 0,
) -> optax.GradientTransformation:
    """``optax.scale_by_adam`` with its state in about three bytes a parameter instead of eight.

    The first moment is E4M3 and the second FP16, each with scales, as arXiv 2310.18313 (FP8-LM,
    section 2.2) and arXiv 2501.17116 keep them; the arithmetic is optax's own, in float32, on the
    decoded moments, before they are rounded again. Composes as that one does::

        optax.chain(
            jfp4.optim.scale_by_adam(0.9, 0.95),
            optax.add_decayed_weights(0.1, mask),
            optax.scale_by_learning_rate(3e-4),
        )

    No update exceeds the largest that Adam can make of any gradients, whatever rounding does. Two
    things see to it:

    * What is kept of the second moment is its ROOT. FP16's 40 binades under a block's largest value
      are then 80 of the second moment, and each is as fine, relatively, as the update needs it.
    * By Cauchy and Schwarz, ``|m| <= c * sqrt(v)`` for all moments that gradients can make, with
      ``c = (1 - b1) / sqrt((1 - b2) * (1 - b1**2 / b2))``, and a step that starts within the bound
      ends within it. Decoded moments are clipped to it. So where the root was rounded to zero, next
      to a larger one in its block, the first moment is forgotten with it and not divided by eps;
      and a first moment rounded up to E4M3's smallest, far above its own root, does no harm either.

    A NaN or an infinity in a gradient makes its block's moments NaN, and so every later update of
    the block (``skip_not_finite`` keeps them out).

    Args:
        b1: decay rate of the first moment.
        b2: decay rate of the second; where ``b1**2 >= b2`` Adam's updates have no bound, and these
            have none either.
        eps: added to the root of the second moment.
        first: format of the first moment, "e4m3", "float16" or "float32".
        second: format of the second moment's root, "float16" or "float32".
        seed: rounds the moments stochastically, by bits that are a function of (seed, step, leaf,
            element). None rounds them to nearest, and then what decays by less than half of a
            format's step stands still: in E4M3 the smallest codes, and from ``b1`` of 0.95 on some
            of every binade, so that parameters go on moving after their gradient has ended; a root
            in float16 from ``b2`` of 0.999 on.

    Returns:
        A transformation whose state is optax's ``ScaleByAdamState``, ``mu`` the first moment and
        ``nu`` the root of the second, in each leaf's place ``Blocks``, or a float32 array. Updates
        are float32. With both moments in float32 it is optax's own, ``nu`` being no root then.

    Raises:
        ValueError: unknown format.
    """
    check_moments(first, second)
    adam = optax.scale_by_adam(b1, b2, eps)
    if first == second == "float32":
        return _in_float32(adam)
    bound = bound_of_first(b1, b2)

    def init(params: Any) -> optax.ScaleByAdamState:
        def zeros(format: str) -> Any:
            return jax.tree.map(
                lambda p: encode(jnp.zeros(p.shape, jnp.float32), format, None), params
            )

        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros(first), zeros(second))

    def update(
        updates: Any,
        state: optax.ScaleByAdamState,
        params: Any = None,
        *,
        part: int | Array = 0,
        **_: Any,
    ) -> tuple[Any, optax.ScaleByAdamState]:
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        roots = jax.tree.map(lambda _, r: decode(r), grads, state.nu)
        moments = jax.tree.map(lambda r, m: limit(decode(m), r), roots, state.mu)
        wide = optax.ScaleByAdamState(state.count, moments, jax.tree.map(jnp.square, roots))
        updates, new = adam.update(grads, wide, params)

        def bits(number: int, x: Array) -> Array | None:
            if seed is None:
                return None
            return random_bits(stochastic_key(seed, state.count, part, number), x.shape)

        def encode_first(number: int, m: Array) -> Any:
            return encode(m, first, bits(number, m))

        def encode_second(number: int, v: Array) -> Any:
            # One hash for both: of its 32 bits the first moment's codes need the upper 20, but for
            # the smallest, and the root's the upper 13.
            own = bits(number, v)
            return encode(jnp.sqrt(v), second, None if own is None else own << 16 | own >> 16)

        numbers = numbered(grads)
        kept = optax.ScaleByAdamState(
            new.count,
            jax.tree.map(encode_first, numbers, new.mu),
            jax.tree.map(encode_second, numbers, new.nu),
        )
        # Of what they came in, which may be no Blocks: see decode.
        return updates, jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(kept))

    def limit(m: Array, root: Array) -> Array:
        return m if math.isinf(bound) else jnp.clip(m, -bound * root, bound * root)

    return optax.GradientTransformationExtraArgs(init, update)


def _in_float32(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam whose moments are float32 whatever the dtype of parameters and gradients."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Any) -> Any:
        return adam.init(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return adam.update(wide(updates), state, params)

    return optax.GradientTransformation(init, update)


def check_moments(first: str, second: str) -> None:
    """Raises ValueError, naming the moment, unless these are formats that they are kept in."""
    for name, value, known in (("first", first, FIRST), ("second", second, SECOND)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; expected one of {', '.join(known)}")


def bound_of_first(b1: float, b2: float) -> float:
    """The largest ratio of first moment to root that gradients can make; infinite if any can."""
    room = (1 - b2) * (1 - b1**2 / b2) if b2 > 0 else 0
    return (1 - b1) / math.sqrt(room) if room > 0 else math.inf


def numbered(tree: Any) -> Any:
    """The tree with the number of each leaf in its place."""
    return jax.tree.unflatten(jax.tree.structure(tree), range(len(jax.tree.leaves(tree))))


def encode(x: Float32[Array, "..."], format: str, bits: Array | None) -> Any:
    """A moment as it is kept: ``Blocks``, or itself in float32."""
    return x if format == "float32" else to_blocks(x, (FIRST | SECOND)[format], bits)


def decode(moment: Any) -> Float32[Array, "..."]:
    """A moment's values.

    A step of ``flax.nnx.Optimizer`` leaves a ``State`` of their arrays in the place of ``Blocks``.
    """
    parts = jax.tree.leaves(moment)
    return from_blocks(Blocks(*parts)) if len(parts) == 2 else parts[0]


def clip_by_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """``optax.clip_by_global_norm`` that can be told the norm, by the argument ``grad_norm``.

    So it can be applied to a part of the gradient, of which the norm would be another.

    Raises:
        ValueError: ``max_norm`` is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm}; expected a positive number")

    def update(
        updates: Any, state: Any, params: Any = None, *, grad_norm: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        norm = norm_and_finite(updates)[0] if grad_norm is None else grad_norm
        factor = jnp.where(norm < max_norm, 1, max_norm / norm)
        return jax.tree.map(lambda u: u * factor, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def skip_not_finite(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Makes a gradient without a finite norm change nothing but the counts of what was skipped.

    What ``optax.apply_if_finite`` does without its limit, by a selection an element where that one
    has a ``lax.cond``; and it can be told whether the gradient is finite, by the argument
    ``finite``, so that it can be applied to a part of it.

    Returns:
        A transformation whose state is ``optax.ApplyIfFiniteState``; updates of a skipped step are
        zero.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> optax.ApplyIfFiniteState:
        # Arrays of their own each: a step may be given them to write in.
        zero, total = (jnp.zeros([], jnp.int32) for _ in range(2))
        return optax.ApplyIfFiniteState(zero, jnp.array(True), total, inner.init(params))

    def update(
        updates: Any,
        state: optax.ApplyIfFiniteState,
        params: Any = None,
        *,
        finite: Array | None = None,
        **extra: Any,
    ) -> tuple[Any, optax.ApplyIfFiniteState]:
        finite = norm_and_finite(updates)[1] if finite is None else finite
        updates, new = inner.update(updates, state.inner_state, params, **extra)

        def select(taken: Any, skipped: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), taken, skipped)

        def count(skips: Array) -> Array:
            return jnp.where(finite, 0, optax.safe_increment(skips))

        return select(updates, optax.tree.zeros_like(updates)), optax.ApplyIfFiniteState(
            count(state.notfinite_count),
            finite,
            jnp.where(finite, state.total_notfinite, optax.safe_increment(state.total_notfinite)),
            select(new, state.inner_state),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def norm_and_finite(grads: Any) -> tuple[Float32[Array, ""], Bool[Array, ""]]:
    """Global norm of a gradient of any float dtypes, and whether that is a finite number.

    It is not where an element is NaN or infinite, nor where float32 does not hold the sum of
    squares, above a norm of 1.8e19: clipped by it nothing would be left, and the second moment
    would be infinite.

    Stacked leaves, those of three axes or more and ``Slices``, are read slice by slice: CPUs write
    out what a sum is over, here every value in float32.
    """

    def squares(leaf: Array) -> Array:
        return jnp.sum(jnp.square(leaf.astype(jnp.float32)))

    def of_each(*slices: Array) -> Array:
        return jnp.stack([*map(squares, slices)])

    def in_turn(*slices: Array) -> Array:
        choices = [functools.partial(lambda own: own, own) for own in slices]
        return lax.map(lambda i: squares(lax.switch(i, choices)), jnp.arange(len(slices)))

    def of_leaf(leaf: Any) -> Array:
        if is_slices(leaf):
            return jnp.sum(lax.platform_dependent(*leaf.each, cpu=in_turn, default=of_each))
        return jnp.sum(lax.map(squares, leaf)) if leaf.ndim >= 3 else squares(leaf)

    leaves = jax.tree.leaves(grads, is_leaf=is_slices)
    norm = jnp.sqrt(sum(map(of_leaf, leaves), jnp.float32(0)))
    return norm, jnp.isfinite(norm)
