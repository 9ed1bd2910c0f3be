"""Quantisation: scale, shift, round."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jfp4.formats import TINY, get_format, round_to_format
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
    code 0. A NaN, or a magnitude of 2**127 or more, makes the scale of its slice NaN and its codes
    0: whatever is computed from them is NaN, never a plausible number.

    Args:
        x: any float dtype, any shape; converted to float32 first.
        axis: the axis amax is taken over, or None for one scale for the whole tensor.
        format: element format of the codes.
        shift: None; "midrange", ``max/2 + min/2`` over ``axis``; "mean", the mean over every
            other axis (for activations, a vector of length k); or the shift itself, float32, of
            ``x``'s rank.
        dtype: what carries the codes; None is the format's one-byte dtype. A wider one saves the
            conversions where codes are multiplied at once and not kept.

    Returns:
        A QTensor of ``x``'s shape.

    Raises:
        TypeError: ``x`` is not an array of floats.
        ValueError: unknown ``format`` or ``shift``, or an ``axis`` that ``x`` does not have.
    """
    f = get_format(format)
    x, axis = to_float32(x, axis)
    offset = None if shift is None else resolve_shift(x, axis, shift)
    if offset is not None:
        x = x - offset
    scale = scale_of(x, axis, format)
    codes = scaled_codes(x, scale, format).astype(f.dtype if dtype is None else dtype)
    return QTensor(codes, scale, offset, format, axis)


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
    """Subnormals to zero, on every back end alike."""
    return jnp.where(jnp.abs(x) < TINY, np.float32(0), x)


def scale_of(x: Float32[Array, "..."], axis: int | None, format: str) -> Float32[Array, "..."]:
    """The scale that takes the largest magnitude along ``axis`` to the format's; dims kept."""
    f = get_format(format)
    amax = jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0)
    scale = jnp.maximum(amax * np.float32(1 / f.max), np.float32(f.min_scale))
    # Not true of NaN or infinity, nor of what would leave the reciprocal subnormal.
    return jnp.where(amax < 2.0**127, scale, jnp.nan)


def scaled_codes(
    x: Float32[Array, "..."], scale: Float32[Array, "..."], format: str
) -> Float32[Array, "..."]:
    """``round(x / scale)`` in float32, with 0 where the scale is NaN."""
    codes = round_to_format(x * (1 / scale), format)
    return jnp.where(jnp.isnan(codes), np.float32(0), codes)


def resolve_shift(
    x: Float32[Array, "..."], axis: int | None, shift: str | Float32[Array, "..."]
) -> Float32[Array, "..."]:
    """The shift as an array of ``x``'s rank; see ``quantize``.

    Raises:
        ValueError: a name that is not in ``SHIFTS``, an array of another rank, or a mean over
            tokens where there is no axis to tell tokens apart.
    """
    if not isinstance(shift, str):
        if shift.ndim != x.ndim:
            raise ValueError(f"shift has shape {shift.shape}; expected the rank of x, {x.shape}")
        return jnp.asarray(shift, jnp.float32)
    if shift == "midrange":
        high = jnp.max(x, axis=axis, keepdims=True)
        low = jnp.min(x, axis=axis, keepdims=True)
        # Halved first, since the sum may overflow; flushed, so that no compiler fuses the steps.
        return flush(flush(high * 0.5) + flush(low * 0.5))
    if shift == "mean":
        if axis is None:
            raise ValueError("shift='mean' needs the contraction axis; axis is None")
        others = tuple(i for i in range(x.ndim) if i != axis)
        return flush(jnp.mean(x, axis=others, keepdims=True))
    raise ValueError(f"shift={shift!r} is unknown; expected None, an array or one of {SHIFTS}")
