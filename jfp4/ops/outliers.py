"""Outlier clamp and compensation (OCC): arXiv 2501.17116, section 3.2."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jfp4.formats import TINY, get_format, round_to_format
from jfp4.ops import ffi
from jfp4.ops.partition import Axes, Part, Rule, varying_alike
from jfp4.ops.quantize import (
    check_float,
    flush,
    kernel_input,
    operands,
    reciprocal,
    scale_of,
    to_float32,
)
from jfp4.qtensor import QTensor
from jfp4.recipe import check_occ


def thresholds(
    x: Float[Array, "..."], alpha: float = 0.99, *, sample: int | None = 65536
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """The (1 - alpha) and alpha quantiles of the signed tensor, by nearest rank.

    Of n sorted elements these are the ones at ranks ``n - ceil(alpha n)`` and
    ``ceil(alpha n) - 1``, so that at most a share ``1 - alpha`` lies beyond each. The elements are
    found exactly by a binary search over the bits of their keys (a radix selection). XLA reads
    them 16 times for that, or 32 if they have 32 bits, where a sort would move them; kernels keep a
    sample in registers.

    Args:
        x: any float dtype, any shape.
        alpha: quantile in (0.5, 1].
        sample: estimate from this many elements, taken at a fixed stride that has no factor in
            common with the last axis (so that every column is seen), or None for all of them. Of
            a tensor only a few times as large it may end well before the last rows.

    Returns:
        ``(lo, hi)`` in input units; both NaN if an element looked at is NaN.

    Raises:
        TypeError: ``x`` is not an array of floats.
        ValueError: ``alpha`` or ``sample`` is out of range, or ``x`` is empty, or 2**31 elements or
            more would be looked at.
    """
    check_float(x)
    check_occ(alpha, sample)
    if x.size == 0:
        raise ValueError(f"x has shape {x.shape}; expected at least one element")
    x = kernel_input(jnp.asarray(x))
    stride = 1 if sample is None else sample_stride(x.shape, sample)
    count = -(-x.size // stride) if sample is None else min(-(-x.size // stride), sample)
    if count >= 2**31:  # counts of elements are int32
        raise ValueError(
            f"x has shape {x.shape} and sample is {sample}; expected fewer than 2**31 elements to "
            "look at: set sample"
        )
    high = min(max(math.ceil(alpha * count - 1e-9) - 1, 0), count - 1)
    ranks = (count - 1 - high, high)
    # A row of it is a row of x; anything else about its shape is of no account.
    rows = x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)

    def xla(part: Part, rows: Array) -> tuple[Array, Array]:
        if part.axes:
            looked_at = _gathered_sample(part, rows, stride, count)
        else:
            looked_at = rows.reshape(-1)[::stride][:count]
        is_nan = jnp.any(jnp.isnan(looked_at))
        lo, hi = order_statistics(looked_at, ranks)
        return jnp.where(is_nan, jnp.nan, lo), jnp.where(is_nan, jnp.nan, hi)

    def kernel(part: Part, rows: Array) -> tuple[Array, Array]:
        flat, step = rows.reshape(-1), stride
        if part.axes:
            flat, step = _gathered_sample(part, rows, stride, count), 1
        low, high = ranks
        return ffi.thresholds(flat, stride=step, count=count, low_rank=low, high_rank=high)

    return ffi.dispatch(kernel, xla, rows, rule=Rule(("m k",), ("", "")))


def _gathered_sample(
    part: Part, rows: Float[Array, "m k"], stride: int, count: int
) -> Float[Array, " count"]:
    """The elements 0, stride, 2 stride, ... of a matrix of which this is a part.

    Every device puts those that it has in their places; the sum is the sample.
    """
    m, k = rows.shape
    row, column = _positions(stride, count, k * part.count("k"))
    row, column = row - part.index("m") * m, column - part.index("k") * k
    own = (row >= 0) & (row < m) & (column >= 0) & (column < k)
    found = rows[jnp.clip(row, 0, m - 1), jnp.clip(column, 0, k - 1)]
    return part.sum(jnp.where(own, found, 0), "m", "k")


def _positions(
    stride: int, count: int, k: int
) -> tuple[Int32[Array, " count"], Int32[Array, " count"]]:
    """Rows and columns, in a matrix of k columns, of the elements 0, stride, 2 stride, ...

    What counts them may have 2**31 elements and more, which no int32 is: so the position of a
    block's first element, and within a block, are reckoned ahead, and added by row and column.
    """
    block = math.isqrt(count) + 1
    starts, within = (
        [jnp.asarray(part, jnp.int32) for part in divmod(np.arange(block) * step, k)]
        for step in (stride * block, stride)
    )
    row, column = (a[:, None] + b for a, b in zip(starts, within, strict=True))
    row, column = row + (column >= k), column % k
    return row.reshape(-1)[:count], column.reshape(-1)[:count]


def sample_stride(shape: tuple[int, ...], sample: int) -> int:
    """The largest stride up to ``size // sample`` without a factor in common with the last axis."""
    stride = max(math.prod(shape) // sample, 1)
    while math.gcd(stride, shape[-1] if shape else 1) != 1:
        stride -= 1
    return stride


def order_statistics(
    x: Float[Array, " n"], ranks: tuple[int, ...]
) -> tuple[Float32[Array, ""], ...]:
    """The elements at the given ranks (from 0) of ``x`` sorted ascending, exactly.

    IEEE bit patterns, read as integers with the negative ones flipped, sort as the numbers do;
    each step of the search fixes one bit of the answers by counting the keys below.
    """
    bits = x.dtype.itemsize * 8
    integer = jnp.dtype(f"int{bits}")
    pattern = lax.bitcast_convert_type(x, integer)
    magnitude_mask = jnp.array((1 << (bits - 1)) - 1, integer)
    keys = jnp.where(pattern < 0, pattern ^ magnitude_mask, pattern)

    def narrow(step: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        # Bits go from the top; adding 2**(bits - 1) to the smallest integer wraps to 0, as wanted.
        bit = jnp.left_shift(jnp.array(1, integer), jnp.asarray(bits - 1 - step, integer))
        trials = tuple(f + bit for f in found)
        below = tuple(jnp.sum(keys < t, dtype=jnp.int32) for t in trials)
        return tuple(
            jnp.where(b <= rank, t, f)
            for b, rank, t, f in zip(below, ranks, trials, found, strict=True)
        )

    # Of the keys, in name: what is mapped over explicit axes has to be so from the loop's start.
    smallest = jnp.where(True, jnp.array(-(1 << (bits - 1)), integer), keys[0])
    start = varying_alike((smallest,) * len(ranks), keys)
    found = lax.fori_loop(0, bits, narrow, start)
    values = (jnp.where(f < 0, f ^ magnitude_mask, f) for f in found)
    return tuple(lax.bitcast_convert_type(v, x.dtype).astype(jnp.float32) for v in values)


def clamp(
    x: Float[Array, "..."], lo: Float32[Array, ""], hi: Float32[Array, ""]
) -> tuple[Float32[Array, "..."], Float32[Array, "..."]]:
    """Splits ``x`` into ``clip(x, lo, hi)`` and the residual ``x`` minus it, both float32.

    A NaN threshold makes both NaN; so does a NaN element of its own place. An infinity stays one,
    so that ``quantize`` sees it, and its residual is NaN.
    """
    x, _ = to_float32(x, None)
    clamped = jnp.where(jnp.isinf(x), x, jnp.clip(x, lo, hi))
    return clamped, x - clamped


def quantize_compensated(
    x: Float[Array, "..."],
    lo: Float32[Array, ""],
    hi: Float32[Array, ""],
    axis: int | None,
    *,
    format: str = "e2m1",
) -> QTensor:
    """Quantises with outliers kept in the operand: E4M3(Q(v) + (u - v)), where u = x / scale.

    The scale comes from the clamped tensor; v is u clamped to ``lo / scale`` and ``hi / scale``,
    and u - v what the clamp took away. An outlier keeps four significant bits up to 448 code units
    and SATURATES there (a plain cast to float8_e4m3fn would make it NaN); everything else is the
    code ``quantize`` gives. One 8-bit operand then carries both terms of the compensated product.

    Args:
        x: any float dtype, any shape.
        lo: lower threshold, input units; ``-inf`` clamps nothing.
        hi: upper threshold, likewise.
        axis: as in ``quantize``.
        format: the 4-bit format of what is not clamped.

    Returns:
        A QTensor of format "e4m3".

    Raises:
        TypeError: ``x``, ``lo`` or ``hi`` is not of floats.
        ValueError: a threshold is no scalar, ``format`` is not a 4-bit one, or ``axis`` is out of
            range.
    """
    lo, hi, axis = _checked(x, lo, hi, axis, format)
    (q,) = operands(_clamped, _compensate, x, axis, lo, hi, format=format)
    return q


def quantize_compensated_both(
    x: Float[Array, "r c"],
    lo: Float32[Array, ""],
    hi: Float32[Array, ""],
    axis: int | None,
    *,
    format: str = "e2m1",
) -> tuple[QTensor, ...]:
    """``quantize_compensated`` and its transpose; see ``quantize_both``."""
    lo, hi, axis = _checked(x, lo, hi, axis, format)
    return operands(_clamped, _compensate, x, axis, lo, hi, format=format, both=True)


def _clamped(x: Array, lo: Array, hi: Array) -> Float32[Array, "..."]:
    return clamp(x, lo, hi)[0]


def _checked(
    x: Array, lo: Array, hi: Array, axis: int | None, format: str
) -> tuple[Float32[Array, ""], Float32[Array, ""], int | None]:
    """The thresholds in float32, and the axis counted from the front."""
    if get_format(format).bits != 4:
        raise ValueError(f"format={format!r}; expected a 4-bit one: E4M3 holds what is clamped off")
    _, axis = to_float32(x, axis)
    bounds = []
    for name, bound in (("lo", lo), ("hi", hi)):
        bound = jnp.asarray(bound)
        check_float(bound, name)
        if bound.shape != ():
            raise ValueError(f"{name} has shape {bound.shape}; expected a scalar")
        bounds.append(bound.astype(jnp.float32))
    return bounds[0], bounds[1], axis


def _compensate(
    x: Array, lo: Array, hi: Array, *, axis: int | None, format: str, across: Axes = ()
) -> tuple[Float32[Array, "..."], Float32[Array, "..."]]:
    scale = scale_of(_clamped(x, lo, hi), axis, format, across)
    inverse = reciprocal(scale)
    # The outer flush also keeps the compiler from fusing product and difference into one rounding.
    u, low, high = (flush(flush(to_float32(a, None)[0]) * inverse) for a in (x, lo, hi))
    v = jnp.clip(u, low, high)
    # Of either sign, a difference that is flushed makes a zero a positive one.
    outlier = jnp.where(jnp.abs(u - v) < TINY, np.float32(0), u - v)
    codes = round_to_format(round_to_format(v, format) + outlier, "e4m3")
    return jnp.where(jnp.isnan(codes), np.float32(0), codes), scale
