"""Rounding float32 to a narrow dtype, to nearest or stochastically, and the bits for the latter."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, UInt32


def stochastic_key(*numbers: int | Array) -> UInt32[Array, ""]:
    """Mixes integers, such as a seed, a step and a leaf's number, into a key; order counts."""
    key = jnp.uint32(0)
    for number in numbers:
        key = mix(key + as_uint32(number))
    return key


def as_uint32(number: int | Array) -> UInt32[Array, ""]:
    """An integer of any size and sign modulo 2**32."""
    if isinstance(number, int | np.integer):
        return jnp.uint32(int(number) % 2**32)
    return number.astype(jnp.uint32)


def random_bits(
    key: UInt32[Array, ""], shape: tuple[int, ...], width: int = 32
) -> UInt32[Array, "..."]:
    """Random bits that are a function of (key, element index) alone.

    Elementwise integer arithmetic, which XLA fuses into what uses it: bits of ``jax.random`` for a
    stacked weight would be an array of their own, as large as the weight in float32. They are for
    rounding, not for cryptography nor for sampling.

    Rows and columns are hashed one after the other, so that an array may have over 2**32 elements;
    within a row no two elements have the same bits.

    Args:
        key: of ``stochastic_key``.
        shape: of the array; its last axis is a row.
        width: how many of an element's bits are to be random, from the top: 32, or 16, for which
            two neighbours of a row share a hash, the first its upper half.
    """
    *rows, n = shape or (1,)
    row = lax.iota(jnp.uint32, math.prod(rows)).reshape(*rows, 1)
    column = lax.broadcasted_iota(jnp.uint32, (*rows, n), len(rows))
    if width == 32:
        return mix(mix(row + key) ^ column).reshape(shape)
    assert width == 16
    return (mix(mix(row + key) ^ column >> 1) << (column & 1) * 16).reshape(shape)


def mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32-bit integers in which every bit of ``x`` flips each of the result's.

    C. Wellons's "triple32" (https://nullprogram.com/blog/2018/07/31/), with an odd constant added
    first, or zero would be a fixed point. His cheaper "lowbias32" leaves the upper bits of
    consecutive numbers uneven.
    """
    x = x + np.uint32(0x9E3779B9)
    x = (x ^ (x >> 17)) * np.uint32(0xED5AD4BB)
    x = (x ^ (x >> 11)) * np.uint32(0xAC4C1B51)
    x = (x ^ (x >> 15)) * np.uint32(0x31848BAB)
    return x ^ (x >> 14)


def round_to_dtype(
    x: Float[Array, "..."],
    dtype: jax.typing.DTypeLike,
    bits: UInt32[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """Rounds float32 to a narrower dtype: to nearest, ties to even, or stochastically.

    Stochastic rounding takes the upper neighbour (away from zero) with a probability of the
    distance from the lower one, in steps, so that the mean is ``x``: exactly where that distance is
    a multiple of 2**-24, as it is for every normal value of ``dtype``, and else within 2**-24.

    Args:
        x: values, converted to float32.
        dtype: float16, bfloat16 or a float8 dtype.
        bits: random bits of ``x``'s shape, of which the upper 24 count (16 for bfloat16); None
            rounds to nearest.

    Returns:
        ``x``'s shape in ``dtype``. What exceeds the largest value is an infinity, or NaN in a dtype
        that has none; NaN stays NaN.
    """
    info = jnp.finfo(dtype)
    x = x.astype(jnp.float32)
    if info.dtype == jnp.bfloat16:
        return _to_bfloat16(x, bits)
    magnitude = jnp.abs(x)
    step = jnp.maximum(binade(magnitude), float(info.tiny)) * np.float32(2.0**-info.nmant)
    # The reciprocal of a power of two by its exponent: XLA would not fuse a division as freely.
    exponent = lax.bitcast_convert_type(step, jnp.uint32)
    inverse = lax.bitcast_convert_type(np.uint32(254 << 23) - exponent, jnp.float32)
    steps = magnitude * inverse
    if bits is None:
        rounded = jnp.round(steps)
    else:
        below = jnp.floor(steps)
        # Both sides are multiples of 2**-24 under one; int32, since not every back end converts
        # unsigned integers by itself.
        threshold = (bits >> 8).astype(jnp.int32).astype(jnp.float32) * np.float32(2.0**-24)
        rounded = below + (threshold < steps - below).astype(jnp.float32)
    # On the grid already, so that the cast is exact and a compiler may not undo it.
    rounded = jnp.where(jnp.isfinite(x), jnp.copysign(rounded * step, x), x)
    return rounded.astype(dtype)


def _to_bfloat16(x: Float32[Array, "..."], bits: UInt32[Array, "..."] | None) -> Array:
    # Its patterns are the first 16 bits of float32's, and the last 16 are how far on the way to the
    # next one x is: they are carried where they exceed as many bits, or half. In integers, so that
    # nothing is flushed.
    pattern = lax.bitcast_convert_type(x, jnp.uint32)
    carry = np.uint32(0x7FFF) + (pattern >> 16 & 1) if bits is None else ~bits >> 16
    quiet = pattern | np.uint32(0x00400000)  # what makes a NaN one may be in the last bits alone
    pattern = jnp.where(jnp.isnan(x), quiet, pattern + carry)
    return lax.bitcast_convert_type((pattern >> 16).astype(jnp.uint16), jnp.bfloat16)


def binade(magnitude: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The largest power of two that is at most ``magnitude``; zero for a subnormal.

    NaN and infinity give infinity.
    """
    exponent = lax.bitcast_convert_type(magnitude, jnp.uint32) & np.uint32(0x7F800000)
    return lax.bitcast_convert_type(exponent, jnp.float32)
