"""Quantisation: scale, shift, round."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jfp4.formats import TINY, get_format, round_to_format
from jfp4.ops import ffi, partition
from jfp4.ops.partition import Axes, Part, Rule
from jfp4.qtensor import QTensor

SHIFTS = ("midrange", "mean")


def quantize(
    x: Float[Array, "..."],
    axis: int | None,
    *,
    format: str = "e2m1",
    shift: str | Float32[Array, "..."] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> QTensor:
    """Quantises a tensor with a scale from its own largest magnitude.

    ``scale = amax / max(format)`` and ``code = round((x - shift) / scale)``, to nearest with ties
    to the even code (arXiv 2501.17116, section 3.1). ``axis`` is the one a product will contract
    over: for activations [m, k], -1 gives a scale per token; for weights [k, n], 0 gives a scale
    per output channel.

    Both divisions are float32 products with a correctly rounded reciprocal, which every back end
    computes alike; a division written as one would be that on some of them and not on others.
    The scale has a least value, so that a row of zeros needs no special case and subnormals have
    code 0. A NaN, or a magnitude of 2**126 or more, makes the scale of its slice NaN and its codes
    0: whatever is computed from them is NaN, never a plausible number.

    To be differentiated is ``linear``'s part: rounding has no useful derivative, and kernels none.

    Args:
        x: any float dtype, any shape; converted to float32 first.
        axis: the axis amax is taken over, or None for one scale for the whole tensor.
        format: element format of the codes.
        shift: None; "midrange", ``max/2 + min/2`` over ``axis``; "mean", the mean over every
            other axis (for activations, a vector of length k); or the shift itself, float32, of
            ``x``'s rank and along each axis of its size or 1.
        dtype: what carries the codes; None is the format's one-byte dtype. A wider one saves the
            conversions where codes are multiplied at once and not kept; no kernel writes it.

    Returns:
        A QTensor of ``x``'s shape.

    Raises:
        TypeError: ``x`` or ``shift`` is not an array of floats.
        ValueError: unknown ``format`` or ``shift``, a shift of another shape, an ``axis`` that
            ``x`` does not have, or a ``dtype`` that does not hold the format's codes.
    """
    x, axis, offset = _shifted(x, axis, format, shift)
    if dtype is not None and not get_format(format).fits(dtype):
        raise ValueError(f"dtype={jnp.dtype(dtype)} does not hold all codes of {format}")
    (q,) = operands(_bare, codes_and_scale, x, axis, format=format, shift=offset, dtype=dtype)
    return q


def quantize_both(
    x: Float[Array, "r c"],
    axis: int | None,
    *,
    format: str = "e2m1",
    shift: str | Float32[Array, "..."] | None = None,
) -> tuple[QTensor, ...]:
    """``quantize(x, axis)`` and its transpose, each with codes of its own, contiguous by rows.

    Two products read one tensor along different axes, and tensor cores read along rows alone: a
    kernel writes both layouts in one call.
    """
    x, axis, offset = _shifted(x, axis, format, shift)
    return operands(_bare, codes_and_scale, x, axis, format=format, shift=offset, both=True)


def _bare(x: Float[Array, "..."]) -> Float32[Array, "..."]:
    return jnp.asarray(x, jnp.float32)


def codes_and_scale(
    x: Float[Array, "..."], *, axis: int | None, format: str, across: Axes = ()
) -> tuple[Float32[Array, "..."], Float32[Array, "..."]]:
    """Codes in float32, and their scale; ``across`` are the mesh axes that divide ``axis``."""
    x = jnp.asarray(x, jnp.float32)
    scale = scale_of(x, axis, format, across)
    return scaled_codes(x, scale, format), scale


def quantize_gradient(
    dy: Float[Array, "m n"],
    col_factor: Float32[Array, "#1 #n"],
    row_factor: Float32[Array, "#m #1"],
    *,
    format: str,
) -> tuple[QTensor, QTensor]:
    """Quantises ``dy * col_factor`` with a scale a row and ``dy * row_factor`` with one a column.

    These are what a linear layer's dgrad and wgrad contract over columns and over rows; the
    products with the factors are rounded to float32. Where no platform has kernels, the codes come
    in bfloat16: they are multiplied at once, and CPUs, which have no float8, are spared the detour.
    """
    served = bool(ffi.kernel_platforms()) and dy.size > 0
    carrier = get_format(format).dtype if served else jnp.bfloat16

    def xla(part: Part, dy: Array, col_factor: Array, row_factor: Array) -> tuple[Array, ...]:
        dy = jnp.asarray(dy, jnp.float32)
        rows, row_scale = codes_and_scale(
            dy * col_factor, axis=1, format=format, across=part.divides("n")
        )
        columns, col_scale = codes_and_scale(
            dy * row_factor, axis=0, format=format, across=part.divides("m")
        )
        return rows.astype(carrier), row_scale, columns.astype(carrier), col_scale

    def kernel(part: Part, dy: Array, col_factor: Array, row_factor: Array) -> tuple[Array, ...]:
        m, n = dy.shape
        dy = kernel_input(dy)
        factors = jnp.broadcast_to(col_factor, (1, n)), jnp.broadcast_to(row_factor, (m, 1))
        of_rows, of_columns = ffi.gradient_amax(dy, *factors)
        # Of a row or a column that is divided, a device has seen its own part alone.
        of_rows = _largest(of_rows, part.divides("n"))
        of_columns = _largest(of_columns, part.divides("m"))
        codes, row_scale, codes_t, col_scale = ffi.quantize_gradient(
            dy, *factors, of_rows, of_columns, format=format
        )
        return codes, row_scale, codes_t.T, col_scale

    rule = Rule(("m n", "1 n", "m 1"), ("m n", "m 1", "m n", "1 n"))
    dispatch = functools.partial(ffi.dispatch, kernel) if served else partition.by_xla
    codes, row_scale, columns, col_scale = dispatch(xla, dy, col_factor, row_factor, rule=rule)
    return (
        QTensor(codes, row_scale, None, format, 1),
        QTensor(columns, col_scale, None, format, 0),
    )


def operands(
    bounded: Callable[..., Float32[Array, "..."]],
    xla: Callable[..., tuple[Array, Array]],
    x: Float[Array, "..."],
    axis: int | None,
    *outliers: Float32[Array, ""],
    format: str,
    shift: Float32[Array, "..."] | None = None,
    both: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[QTensor, ...]:
    """Quantises by the path that serves: the tensor, and with ``both`` its transpose as well.

    Kernels serve scales along one of the last two axes. Where the tensor alone is wanted they
    write its codes contiguous along ``axis``, which is how products read them.

    Args:
        bounded: of ``x`` and ``outliers``, what is scaled: its largest magnitude is the format's.
        xla: of the same, codes in float32 and the scale; ``axis``, ``format`` and the mesh axes
            ``across`` which that axis is divided are passed by name.
        x: what is quantised, the shift taken off.
        axis: as in ``quantize``, counted from the front.
        outliers: clamp thresholds, or none; what was clamped off is added to the codes, which are
            E4M3 then.
        format: the format before compensation.
        shift: the shift that was taken off.
        both: whether the transpose, of a matrix, is wanted.
        dtype: what carries the codes; None is the format's own.
    """
    x = jnp.asarray(x)
    by_row = axis == x.ndim - 1
    quantize_by = ffi.quantize_rows if by_row else ffi.quantize_columns
    single: ffi.Layout = "codes" if by_row else "codes_t"
    made = "e4m3" if outliers else format
    carrier = get_format(made).dtype
    dtype = carrier if dtype is None else dtype

    names = [f"x{i}" for i in range(x.ndim)]
    reduced = [name for i, name in enumerate(names) if axis is None or i == axis]

    def plain(part: Part, x: Array, *outliers: Array) -> tuple[Array, ...]:
        across = part.divides(*reduced)
        codes, scale = xla(x, *outliers, axis=axis, format=format, across=across)
        codes = codes.astype(dtype)
        return (codes, codes.T, scale) if both else (codes, scale)

    def kernel(part: Part, x: Array, *outliers: Array) -> tuple[Array, ...]:
        across = part.divides(*reduced)
        # A kernel knows no more of a row or a column than its own part, but can be told.
        floor = amax_of(bounded(x, *outliers), axis, across) if across else None
        bounds = [jnp.broadcast_to(bound, x.shape[:-2]) for bound in outliers]
        codes, codes_t, _, scale = quantize_by(
            kernel_input(x),
            format=format,
            want=("codes", "codes_t") if both else (single,),
            outliers=(bounds[0], bounds[1]) if bounds else None,
            amax_floor=floor,
        )
        if both:
            assert codes is not None and codes_t is not None
            return codes, codes_t, scale
        if codes is None:
            assert codes_t is not None
            codes = jnp.swapaxes(codes_t, -1, -2)
        return codes, scale

    whole, turned = " ".join(names), " ".join(reversed(names))
    of_scale = " ".join("1" if name in reduced else name for name in names)
    results = (whole, turned, of_scale) if both else (whole, of_scale)
    rule = Rule((whole, *[""] * len(outliers)), results)
    served = x.ndim >= 2 and x.size > 0 and axis in (x.ndim - 1, x.ndim - 2) and dtype == carrier
    dispatch = functools.partial(ffi.dispatch, kernel) if served else partition.by_xla
    codes, *turned_codes, scale = dispatch(plain, x, *outliers, rule=rule)
    q = QTensor(codes, scale, shift, made, axis)
    return (q, *(dataclasses.replace(q.T, codes=codes_t) for codes_t in turned_codes))


def kernel_input(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x`` in a dtype that kernels read: its own, or float32."""
    return x if x.dtype in (jnp.bfloat16, jnp.float16, jnp.float32) else x.astype(jnp.float32)


def _shifted(
    x: Float[Array, "..."],
    axis: int | None,
    format: str,
    shift: str | Float32[Array, "..."] | None,
) -> tuple[Float[Array, "..."], int | None, Float32[Array, "..."] | None]:
    """The arguments of ``quantize``, checked: ``x`` less the shift, the axis, and the shift."""
    get_format(format)
    wide, axis = to_float32(x, axis)
    if shift is None:
        return x, axis, None
    offset = resolve_shift(wide, axis, shift)
    return wide - offset, axis, offset


def to_float32(
    x: Float[Array, "..."], axis: int | None
) -> tuple[Float32[Array, "..."], int | None]:
    """Checks ``x`` and ``axis``; returns ``x`` in float32 and ``axis`` counted from the front.

    Raises:
        TypeError: ``x`` is not an array of floats.
        ValueError: ``axis`` is out of range.
    """
    check_float(x)
    if axis is not None and not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis={axis} is out of range for x of shape {x.shape}")
    return jnp.asarray(x, jnp.float32), None if axis is None else axis % x.ndim


def check_float(x: Float[Array, "..."], name: str = "x") -> None:
    """Raises TypeError, naming the argument, unless ``x`` is an array of real floats."""
    if not isinstance(x, jax.Array | np.ndarray) or not jnp.issubdtype(x.dtype, jnp.floating):
        kind = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"{name} is {kind}; expected an array of a floating-point dtype")


def flush(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Subnormals to zeros of the same sign, on every back end alike."""
    return jnp.where(jnp.abs(x) < TINY, jnp.copysign(np.float32(0), x), x)


def scale_of(
    x: Float32[Array, "..."], axis: int | None, format: str, across: Axes = ()
) -> Float32[Array, "..."]:
    """The scale that takes the largest magnitude along ``axis`` to the format's; dims kept."""
    f = get_format(format)
    amax = amax_of(x, axis, across)
    scale = jnp.maximum(amax * np.float32(1 / f.max), np.float32(f.min_scale))
    # Not true of NaN or infinity, nor of what would leave the reciprocal subnormal.
    return jnp.where(amax < 2.0**126, scale, jnp.nan)


def amax_of(x: Float32[Array, "..."], axis: int | None, across: Axes = ()) -> Float32[Array, "..."]:
    """The largest magnitude along ``axis``, or NaN; dims kept.

    ``across`` are the mesh axes that divide ``axis``: their devices agree on one.
    """
    # As integers, magnitudes sort as they do as floats, with NaN above infinity; the maximum of
    # floats loses NaNs on CPUs once XLA takes it over vectors.
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    bits = jnp.max(bits, axis=axis, keepdims=True, initial=0)
    return _largest(lax.bitcast_convert_type(bits, jnp.float32), across)


def _largest(magnitudes: Float32[Array, "..."], across: Axes) -> Float32[Array, "..."]:
    """The largest of all devices along these mesh axes, or NaN."""
    if not across:
        return magnitudes
    bits = lax.bitcast_convert_type(magnitudes, jnp.int32)
    return lax.bitcast_convert_type(lax.pmax(bits, across), jnp.float32)


def reciprocal(scale: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """``1 / scale``, correctly rounded, for a scale that is NaN or whose reciprocal is normal.

    On GPUs XLA divides to within two units in the last place, and makes one division of a product
    with a reciprocal: one code in ten million would differ. So the quotient is mended as integers.
    """
    mended = jnp.where(jnp.isnan(scale), scale, mended_reciprocal(scale, 1 / scale))
    # Or all of this would be fused into, and done for, each element that is scaled.
    return lax.optimization_barrier(mended)


def mended_reciprocal(
    x: Float32[Array, "..."], quotient: Float32[Array, "..."]
) -> Float32[Array, "..."]:
    """``1 / x``, correctly rounded, from a quotient at most two units in the last place off."""
    for _ in range(3):  # one more step, since units halve below a power of two
        s, r = _mantissa(x), _mantissa(quotient)
        # Twice the remainder of 2**k for the k that leaves little; the rest is lost modulo 2**32.
        twice = -2 * s * r
        step = (twice > s).astype(jnp.int32) - (twice < -s).astype(jnp.int32)
        bits = lax.bitcast_convert_type(quotient, jnp.int32) + step
        quotient = lax.bitcast_convert_type(bits, jnp.float32)
    return quotient


def _mantissa(x: Float32[Array, "..."]) -> Int32[Array, "..."]:
    """The 24 bits of a normal number's mantissa, as an integer."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return (bits & np.int32(0x7FFFFF)) | np.int32(0x800000)


def scaled_codes(
    x: Float32[Array, "..."], scale: Float32[Array, "..."], format: str
) -> Float32[Array, "..."]:
    """``round(x / scale)`` in float32, with 0 where the scale is NaN."""
    codes = round_to_format(x * reciprocal(scale), format)
    return jnp.where(jnp.isnan(codes), np.float32(0), codes)


def resolve_shift(
    x: Float32[Array, "..."], axis: int | None, shift: str | Float32[Array, "..."]
) -> Float32[Array, "..."]:
    """The shift as an array of ``x``'s rank; see ``quantize``.

    Raises:
        TypeError: it is no name and no array of floats.
        ValueError: a name that is not in ``SHIFTS``, an array of another shape, or a mean over
            tokens where there is no axis to tell tokens apart.
    """
    if not isinstance(shift, str):
        check_float(shift, "shift")
        sizes = zip(shift.shape, x.shape, strict=False)
        if shift.ndim != x.ndim or any(own not in (1, size) for own, size in sizes):
            raise ValueError(
                f"shift has shape {shift.shape}; expected x's, {x.shape}, or 1 along some axes"
            )
        return jnp.asarray(shift, jnp.float32)
    if shift == "midrange":
        high = jnp.max(x, axis=axis, keepdims=True)
        low = jnp.min(x, axis=axis, keepdims=True)
        # Halved first, since the sum may overflow; flushed, so that no compiler fuses the steps.
        middle = flush(flush(high * 0.5) + flush(low * 0.5))
        # See scale_of: XLA's maximum and minimum may have lost a NaN.
        return jnp.where(jnp.any(jnp.isnan(x), axis=axis, keepdims=True), jnp.nan, middle)
    if shift == "mean":
        if axis is None:
            raise ValueError("shift='mean' needs the contraction axis; axis is None")
        others = tuple(i for i in range(x.ndim) if i != axis)
        return flush(jnp.mean(x, axis=others, keepdims=True))
    raise ValueError(f"shift={shift!r} is unknown; expected None, an array or one of {SHIFTS}")
