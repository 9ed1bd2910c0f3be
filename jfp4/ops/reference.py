"""Slow float64 NumPy oracle of everything that jfp4 computes.

Property tests hold every other implementation to this one, so it shares no code with them: it
imports NumPy, ml_dtypes and the standard library, nothing else. It prefers the line that is
obviously right to the line that is fast.

Paper: Wang et al., "Optimizing Large Language Model Training Using FP4 Quantization", arXiv
2501.17116 (v2); "section" and "equation" below mean its sections and equations.

Conventions:

* Codes are float64 arrays whose elements lie on a format's grid. Codes that are not numbers but
  bit patterns occur in `pack` and `unpack` alone.
* `scale` is the dequantisation multiplier: value = code * scale + shift.
* Arithmetic that the library does in float32 is done here in np.float32, one correctly rounded
  operation at a time; each float32 result below 2**-126 is flushed to a zero of the same sign
  (`to_float32`). Everything after the codes (sums, scales, shifts, bias) is float64.
* Letters in shapes: m rows (tokens), k contraction, n columns (channels).
"""

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

MIN_NORMAL = np.float32(2.0**-126)
"""The smallest normal float32: values under it are flushed."""

# name: (exponent bits, mantissa bits, exponent bias, largest magnitude code that is a number).
# E4M3FN gives its last code to NaN; E5M2 gives its last four to infinity and NaN.
_FORMATS = {
    "e2m1": (2, 1, 1, 7),
    "e1m2": (1, 2, 0, 7),
    "e3m0": (3, 0, 3, 7),
    "e2m1b3": (2, 1, 3, 7),
    "e4m3": (4, 3, 7, 126),
    "e5m2": (5, 2, 15, 123),
}


# ------------------------------------------------------------------------------------- formats


def grid(fmt: str) -> Float64:
    """All non-negative finite values of a format, ascending; the index is the magnitude code.

    E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6. E1M2: 0 to 3.5 by 0.5. E3M0: 0, 0.25, 0.5, 1, 2, 4, 8, 16.
    E4M3 is float8_e4m3fn (127 values, up to 448); E5M2 is float8_e5m2 (124 values, up to 57344).

    Args:
        fmt: "e2m1", "e1m2", "e3m0", "e4m3" or "e5m2".

    Returns:
        float64 [number of magnitudes], exact.

    Raises:
        ValueError: the format is unknown.

    Source: the paper's appendix on formats; OCP 8-bit and microscaling format specifications.
    """
    if fmt not in _FORMATS:
        raise ValueError(f"unknown format {fmt!r}; known: {', '.join(_FORMATS)}")
    exponent_bits, mantissa_bits, bias, last_code = _FORMATS[fmt]
    assert last_code < 1 << (exponent_bits + mantissa_bits)
    values = []
    for code in range(last_code + 1):
        exponent, mantissa = divmod(code, 1 << mantissa_bits)
        if exponent == 0:  # zero and subnormals: no leading one
            value = math.ldexp(mantissa, 1 - bias - mantissa_bits)
        else:
            value = math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)
        values.append(value)
    return np.array(values, dtype=np.float64)


def max_value(fmt: str) -> float:
    """The largest finite value of a format: 6, 3.5, 16, 448 or 57344."""
    return float(grid(fmt)[-1])


def _magnitude_codes(magnitude: Float64, fmt: str) -> npt.NDArray[np.int64]:
    """Index of the nearest grid value of each magnitude (no NaN), ties to the even index."""
    values = grid(fmt)
    # Exact: neighbours differ in at most one bit beyond the mantissa, far inside float64.
    midpoints = (values[:-1] + values[1:]) / 2
    # Number of midpoints strictly below the magnitude: on a midpoint this is the lower neighbour.
    index = np.searchsorted(midpoints, magnitude, side="left")
    on_midpoint = magnitude == np.append(midpoints, np.inf)[index]
    is_tie = on_midpoint & (index < len(midpoints))  # +inf is not a tie: it is past the last one
    return np.asarray(index + (is_tie & (index % 2 == 1)), dtype=np.int64)


def round_to_format(v: npt.ArrayLike, fmt: str) -> Float64:
    """Round to the nearest value of a format.

    Rounding: to nearest. Ties: to the even magnitude code, which is the even mantissa where the
    format has mantissa bits (E2M1: 0.25 -> 0, 2.5 -> 2, 5 -> 4). Saturates at the largest value,
    infinities too. The sign is kept, that of zero included. NaN gives NaN.

    Args:
        v: real array of any shape; read as float64.
        fmt: format name.

    Returns:
        float64, the shape of v.
    """
    v = np.asarray(v, dtype=np.float64)
    is_nan = np.isnan(v)
    magnitude = np.where(is_nan, 0.0, np.abs(v))
    rounded = grid(fmt)[_magnitude_codes(magnitude, fmt)]
    return np.where(is_nan, np.nan, np.copysign(rounded, v))


def pack(values: npt.ArrayLike, fmt: str) -> npt.NDArray[np.uint8]:
    """Pack values of a 4-bit format, two to a byte along the last axis.

    A 4-bit code is sign << 3 | magnitude code; -0.0 is 8. Element 2i is the low nibble of byte i,
    element 2i + 1 the high one. An odd last axis is padded with code 0.

    Args:
        values: [..., k] real array whose elements are all values of the format.
        fmt: "e2m1", "e1m2" or "e3m0".

    Returns:
        uint8 [..., ceil(k / 2)].

    Raises:
        ValueError: the format is not a 4-bit one, an element is not one of its values (NaN
            included), or the array has no last axis.
    """
    _check_four_bits(fmt)
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 0:
        raise ValueError("pack needs at least one axis")
    if not np.all(np.isin(np.abs(values), grid(fmt))):
        raise ValueError(f"not every element is a value of {fmt}")
    magnitude = np.searchsorted(grid(fmt), np.abs(values))
    codes = (np.signbit(values).astype(np.uint8) << 3) | magnitude.astype(np.uint8)
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4), dtype=np.uint8)


def unpack(packed: npt.ArrayLike, fmt: str, size: int | None = None) -> Float64:
    """Undo `pack`.

    Args:
        packed: uint8 [..., b], two 4-bit codes a byte, the low nibble first.
        fmt: "e2m1", "e1m2" or "e3m0".
        size: length of the last axis before packing, to drop the padding of an odd one; 2b when
            None.

    Returns:
        float64 [..., size].

    Raises:
        ValueError: the format is not a 4-bit one, the bytes are not uint8, or size is neither 2b
            nor 2b - 1.
    """
    _check_four_bits(fmt)
    packed = np.asarray(packed)
    if packed.dtype != np.uint8:
        raise ValueError(f"packed codes are uint8, got {packed.dtype}")
    full = 2 * packed.shape[-1]
    size = full if size is None else size
    if size not in (full, full - 1):
        raise ValueError(f"{packed.shape[-1]} bytes cannot hold {size} codes")
    codes = np.zeros((*packed.shape[:-1], full), dtype=np.uint8)
    codes[..., 0::2] = packed & 0xF
    codes[..., 1::2] = packed >> 4
    sign = np.where(codes & 8, -1.0, 1.0)
    return np.asarray((sign * grid(fmt)[codes & 7])[..., :size], dtype=np.float64)


def _check_four_bits(fmt: str) -> None:
    if len(grid(fmt)) != 8:
        raise ValueError(f"{fmt} is not a 4-bit format")


# ------------------------------------------------------------------------------- scale and shift


def to_float32(x: npt.ArrayLike) -> Float32:
    """Convert to float32 (to nearest, ties to even), then flush subnormals to a signed zero.

    A float64 beyond the float32 range becomes an infinity. What rounds to 2**-126 is kept.

    Args:
        x: array of any floating dtype (those of ml_dtypes included), any shape.

    Returns:
        float32, the shape of x.

    Raises:
        TypeError: the dtype is not a floating one.
    """
    x = np.asarray(x)
    try:
        # ml_dtypes knows its own floats as well as NumPy's, but annotates none of its functions.
        ml_dtypes.finfo(x.dtype)  # type: ignore[no-untyped-call, unused-ignore]
    except ValueError as error:
        raise TypeError(f"expected a floating dtype, got {x.dtype}") from error
    if x.dtype.kind == "c":
        raise TypeError(f"expected a real floating dtype, got {x.dtype}")
    with np.errstate(over="ignore", under="ignore"):
        x = x.astype(np.float32)
    return np.where(np.abs(x) < MIN_NORMAL, np.copysign(np.float32(0), x), x)


def _subtract(a: npt.ArrayLike, b: npt.ArrayLike) -> Float32:
    """Float32 a - b, correctly rounded, then flushed."""
    with np.errstate(all="ignore"):
        return to_float32(np.subtract(a, b, dtype=np.float32))


def _add(a: npt.ArrayLike, b: npt.ArrayLike) -> Float32:
    """Float32 a + b, correctly rounded, then flushed."""
    with np.errstate(all="ignore"):
        return to_float32(np.add(a, b, dtype=np.float32))


def _multiply(a: npt.ArrayLike, b: npt.ArrayLike) -> Float32:
    """Float32 a * b, correctly rounded, then flushed."""
    with np.errstate(all="ignore"):
        return to_float32(np.multiply(a, b, dtype=np.float32))


def _divide(a: npt.ArrayLike, b: npt.ArrayLike) -> Float32:
    """Float32 a * (1 / b): reciprocal and product each correctly rounded, then flushed.

    Not a / b: compilers turn a division by something broadcast into this product, some of them
    and sometimes, so the product is what all can agree on.
    """
    with np.errstate(all="ignore"):
        return _multiply(a, np.divide(np.float32(1), b, dtype=np.float32))


def min_scale(fmt: str) -> np.float32:
    """The least scale: half a smallest step of it is 2**-126, so that subnormals round to 0."""
    return np.float32(2.0**-126 / (grid(fmt)[1] / 2))


def scale(x: npt.ArrayLike, axis: int | None, fmt: str) -> Float32:
    """Dequantisation multiplier: max(amax / max_value(fmt), min_scale(fmt)).

    The quotient is a float32 product with the correctly rounded reciprocal of the maximum. A row
    of zeros gets the least scale. A row that holds a NaN, or a magnitude of 2**126 or more (an
    infinity above all), gets NaN: a broken input never yields a plausible scale.

    Args:
        x: array of any floating dtype; see `to_float32`.
        axis: the contraction axis, over which amax is taken (-1 for activations [m, k], 0 for
            weights [k, n]); None for one scale per tensor.
        fmt: format name.

    Returns:
        float32, the shape of x with `axis` (all axes when None) kept at length 1.

    Source: section 3, absmax scaling; token-wise and channel-wise granularity.
    """
    x = to_float32(x)
    amax = np.max(np.abs(x), axis=axis, keepdims=True)  # NaN wins over every number
    quotient = _divide(amax, np.float32(max_value(fmt)))
    floored = np.where(quotient < min_scale(fmt), min_scale(fmt), quotient)
    return np.where(amax < 2.0**126, floored, np.float32(np.nan)).astype(np.float32)


def midrange_shift(x: npt.ArrayLike, axis: int | None) -> Float32:
    """Half of the maximum plus half of the minimum, in float32; the halves are added last.

    Args:
        x: array of any floating dtype.
        axis: as in `scale`.

    Returns:
        float32, shaped as `scale`'s result. NaN where a row holds a NaN (or both infinities).
    """
    x = to_float32(x)
    half = np.float32(0.5)
    highest = np.max(x, axis=axis, keepdims=True)
    lowest = np.min(x, axis=axis, keepdims=True)
    return _add(_multiply(highest, half), _multiply(lowest, half))


def mean_shift(x: npt.ArrayLike) -> Float32:
    """Mean over tokens: over all axes but the last, computed in float64, rounded to float32.

    Args:
        x: [..., k], any floating dtype.

    Returns:
        float32 [1, ..., 1, k]: as many axes as x.
    """
    x = to_float32(x).astype(np.float64)
    with np.errstate(invalid="ignore"):
        mean = np.mean(x, axis=tuple(range(x.ndim - 1)), keepdims=True)
    return to_float32(mean)


def quantize(
    x: npt.ArrayLike,
    axis: int | None,
    fmt: str,
    shift: str | Array | None = None,
) -> tuple[Float64, Float32, Float32 | None]:
    """Scale (and shift) a tensor onto a format and round it.

    codes = round_to_format((x - shift) / scale), where the difference is a correctly rounded
    float32 operation, the quotient is `_divide`'s and the scale is that of the shifted tensor.
    Rounding is to nearest, ties to the even code, saturating. Where the scale is NaN the codes are
    0, so that codes * scale is NaN all the same.

    Args:
        x: array of any floating dtype; see `to_float32`.
        axis: the contraction axis, or None for one scale per tensor.
        fmt: format name.
        shift: None; "midrange" (`midrange_shift` over the same axis); "mean" (`mean_shift`, for
            activations [..., k] with axis None or the last); or an array that broadcasts against
            x, used as it is after `to_float32`.

    Returns:
        codes (float64, the shape of x), scale (float32, `axis` kept at length 1) and shift
        (float32, or None as given).

    Raises:
        ValueError: an unknown shift, or "mean" with an axis that is not the last.
    """
    x = to_float32(x)
    used: Float32 | None = None
    if isinstance(shift, str):
        if shift == "midrange":
            used = midrange_shift(x, axis)
        elif shift == "mean":
            if axis is not None and axis % x.ndim != x.ndim - 1:
                raise ValueError("the mean over tokens goes with a contraction over the last axis")
            used = mean_shift(x)
        else:
            raise ValueError(f"unknown shift {shift!r}; known: midrange, mean")
    elif shift is not None:
        used = to_float32(shift)
    shifted = x if used is None else _subtract(x, used)
    s = scale(shifted, axis, fmt)
    codes = round_to_format(_divide(shifted, s), fmt)
    return np.where(np.isnan(s), 0.0, codes), s, used


def dequantize(codes: npt.ArrayLike, scale: npt.ArrayLike, shift: Array | None = None) -> Float64:
    """Codes * scale + shift in float64, by broadcasting."""
    value = np.asarray(codes, dtype=np.float64) * np.asarray(scale, dtype=np.float64)
    return value if shift is None else value + np.asarray(shift, dtype=np.float64)


# --------------------------------------------------------------------------------------- outliers


def sample(x: npt.ArrayLike, size: int) -> Array:
    """Strided sample of a tensor, in row-major order.

    The whole tensor when it has at most `size` elements. Otherwise every stride-th element from
    the first, `size` of them; stride is (number of elements) // size, lowered by 1 until it has
    no common factor with the last axis, so that every column is visited (1 always qualifies).

    Args:
        x: [..., k], any dtype.
        size: at least 1.

    Returns:
        [min(size, number of elements)], the dtype of x.

    Raises:
        ValueError: size is below 1.
    """
    if size < 1:
        raise ValueError(f"sample size must be at least 1, got {size}")
    x = np.asarray(x)
    flat = x.reshape(-1)
    if flat.size <= size:
        return flat
    stride = flat.size // size
    while math.gcd(stride, x.shape[-1]) != 1:
        stride -= 1
    return flat[::stride][:size]


def thresholds(x: npt.ArrayLike, alpha: float) -> tuple[np.float32, np.float32]:
    """The (1 - alpha) and alpha quantiles of the signed tensor, by nearest rank.

    With the n elements ascending in s and r = ceil(alpha * n): hi = s[r - 1] and lo = s[n - r],
    indices clamped to the array, no interpolation. r is math.ceil(alpha * n - 1e-9), so that a
    product that is whole but for its last bits is not rounded up. lo exceeds hi when alpha is at
    most one half.

    Args:
        x: array of any floating dtype and shape, at least one element.
        alpha: quantile, 0.99 by default in the paper.

    Returns:
        (lo, hi) in the units of x; both NaN when any element is NaN.

    Raises:
        ValueError: the tensor is empty.

    Source: section 3.2.
    """
    s = np.sort(to_float32(x).reshape(-1))
    n = s.size
    if n == 0:
        raise ValueError("an empty tensor has no quantiles")
    if np.any(np.isnan(s)):
        return np.float32(np.nan), np.float32(np.nan)
    rank = math.ceil(alpha * n - 1e-9)
    highest, lowest = (min(max(index, 0), n - 1) for index in (rank - 1, n - rank))
    return s[lowest], s[highest]


def clamp_residual(
    x: npt.ArrayLike, lo: npt.ArrayLike, hi: npt.ArrayLike
) -> tuple[Float32, Float32]:
    """Clamp to [lo, hi], and what the clamp took away.

    lo is applied first: min(max(x, lo), hi). A value equal to a threshold is kept as it is. A NaN
    in x or a NaN threshold gives NaN.

    Args:
        x: array of any floating dtype.
        lo: lower threshold, in the units of x.
        hi: upper threshold, in the units of x.

    Returns:
        (clipped, x - clipped), float32, the shape of x; the difference is correctly rounded.

    Source: section 3.2.
    """
    x, lo, hi = to_float32(x), to_float32(lo), to_float32(hi)
    clipped = np.where(x < lo, lo, x)
    clipped = np.where(clipped > hi, hi, clipped)
    clipped = np.where(np.isinf(x), x, clipped)
    clipped = np.where(np.isnan(lo) | np.isnan(hi), np.float32(np.nan), clipped)
    return clipped, _subtract(x, clipped)


def compensate(
    x: npt.ArrayLike, lo: npt.ArrayLike, hi: npt.ArrayLike, axis: int | None, fmt: str
) -> tuple[Float64, Float32]:
    """Clamped tensor and its residual as one E4M3 operand.

    code = round_to_format(q(v) + (u - v), "e4m3"): the scale is that of x_c, from
    `clamp_residual`; u is x / scale; v is u clamped to lo / scale and hi / scale, lo first; q
    rounds to `fmt`, and its zeros are positive. The quotients are as in `quantize`, difference and
    sum each one correctly rounded float32 operation, E4M3 rounding to nearest, ties to even,
    saturating at 448. As quotients keep order, v is x_c / scale to the bit, and u - v is what the
    clamp took away, in code units. Values of every 4-bit format are E4M3 values, so where that is 0
    the code is q(v). A difference below 2**-126 is 0; one that is not, but rounds to 0, leaves it
    its sign. An infinity in x is not clamped, so that the scale sees it. Where the scale is NaN the
    codes are 0.

    Args:
        x: array of any floating dtype.
        lo: lower threshold, in the units of x.
        hi: upper threshold, in the units of x.
        axis: the contraction axis, or None for one scale per tensor.
        fmt: format of the clamped part.

    Returns:
        codes (float64 values of E4M3, the shape of x) and scale (float32, `axis` kept).

    Source: section 3.2, in the one-operand form of the authors' released code.
    """
    s = scale(clamp_residual(x, lo, hi)[0], axis, fmt)
    u, low, high = (_divide(to_float32(a), s) for a in (x, lo, hi))
    v = np.where(u < low, low, u)
    v = np.where(v > high, high, v)
    codes = round_to_format(v, fmt) + 0.0  # -0.0 becomes 0.0
    compensated = round_to_format(_add(codes, _subtract(u, v)), "e4m3")
    return np.where(np.isnan(s), 0.0, compensated), s


# ---------------------------------------------------------------------------------------- product


def _unit(a: Float64) -> float:
    """The largest power of two, from 1 to 2**-30, of which every element is a multiple; else 0."""
    unit = 1.0
    while np.any(np.fmod(a, unit)):
        unit /= 2
        if unit < 2.0**-30:
            return 0.0
    return unit


def sums(a: npt.ArrayLike, b: npt.ArrayLike) -> Float64:
    """The matrix product, each element the correctly rounded value of its exact sum.

    The result is the exact sum whenever a float64 can hold it, as it can for codes of the 4-bit
    formats at any practical k. Each product of two float32 numbers is exact in float64, and
    math.fsum rounds once. An operand with a NaN or an infinity goes through plain IEEE sums.

    Args:
        a: [m, k], elements of at most 24 significant bits (codes of any format, float32).
        b: [k, n], likewise.

    Returns:
        float64 [m, n].
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"cannot multiply {a.shape} by {b.shape}")
    if not (np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
        with np.errstate(all="ignore"):
            return np.asarray(a @ b, dtype=np.float64)
    unit = _unit(a) * _unit(b)
    if unit > 0 and a.size > 0 and b.size > 0:
        largest = a.shape[1] * float(np.max(np.abs(a))) * float(np.max(np.abs(b)))
        if largest <= 2.0**53 * unit:  # every partial sum, in any order, is exact
            return np.asarray(a @ b, dtype=np.float64)
    result = np.zeros((a.shape[0], b.shape[1]), dtype=np.float64)
    for row in range(a.shape[0]):
        for column in range(b.shape[1]):
            result[row, column] = math.fsum(a[row] * b[:, column])
    return result


def matmul(
    a_codes: npt.ArrayLike,
    a_scale: npt.ArrayLike,
    b_codes: npt.ArrayLike,
    b_scale: npt.ArrayLike,
    a_shift: npt.ArrayLike | None = None,
    b_shift: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
) -> Float64:
    """(sa * qa + za) (sb * qb + zb) + bias.

    The four products of the expansion are summed by `sums`; scales, shift terms and bias are then
    float64. A NaN scale makes its row or column NaN.

    Args:
        a_codes: qa, [m, k].
        a_scale: sa, [m, 1] or [1, 1].
        b_codes: qb, [k, n].
        b_scale: sb, [1, n] or [1, 1].
        a_shift: za, [m, 1] or [1, 1] (midrange), or [1, k] or [k] (mean over tokens).
        b_shift: zb, [1, n] or [1, 1] (midrange).
        bias: [n] or [1, n].

    Returns:
        float64 [m, n].

    Raises:
        ValueError: a scale varies along the contraction, or shapes do not agree.
    """
    qa, qb = np.asarray(a_codes, dtype=np.float64), np.asarray(b_codes, dtype=np.float64)
    sa, sb = np.asarray(a_scale, dtype=np.float64), np.asarray(b_scale, dtype=np.float64)
    m, n = qa.shape[0], qb.shape[1]
    if sa.shape not in ((m, 1), (1, 1)):
        raise ValueError(f"a_scale is [{m}, 1] or [1, 1], got {sa.shape}")
    if sb.shape not in ((1, n), (1, 1)):
        raise ValueError(f"b_scale is [1, {n}] or [1, 1], got {sb.shape}")
    za = None if a_shift is None else np.broadcast_to(np.asarray(a_shift, np.float64), qa.shape)
    zb = None if b_shift is None else np.broadcast_to(np.asarray(b_shift, np.float64), qb.shape)
    y = sa * sums(qa, qb) * sb
    if zb is not None:
        y = y + sa * sums(qa, zb)
    if za is not None:
        y = y + sums(za, qb) * sb
    if za is not None and zb is not None:
        y = y + sums(za, zb)
    if bias is not None:
        y = y + np.asarray(bias, dtype=np.float64)
    return y


# -------------------------------------------------------------------------------------- gradients


def dge_derivative(v: npt.ArrayLike, fmt: str, k: float = 5.0, cap: float = 3.0) -> Float64:
    """Derivative of the differentiable gradient estimator, at the weight BEFORE rounding.

    On the grid interval [g, g + delta] that holds |v| (the derivative is even in v):

        f'(v) = min((1 / k) * |2 (|v| - g) / delta - 1| ** (1 / k - 1), cap)

    1 / k at the grid points and `cap` at an interval's centre, where the power is infinite. A
    grid point belongs to the interval above it, the largest value to the last interval; |v|
    beyond the largest value counts as the largest. NaN gives NaN. With k = 1 it is 1 everywhere.

    Args:
        v: scaled weight w / scale, any shape; read as float64.
        fmt: format name.
        k: sharpness, at least 1.
        cap: upper bound.

    Returns:
        float64, the shape of v.

    Raises:
        ValueError: k is below 1.

    Source: equations 7, 8 and 22.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    v = np.asarray(v, dtype=np.float64)
    values = grid(fmt)
    is_nan = np.isnan(v)
    magnitude = np.minimum(np.where(is_nan, 0.0, np.abs(v)), values[-1])
    index = np.minimum(np.searchsorted(values, magnitude, side="right") - 1, len(values) - 2)
    lower = values[index]
    delta = values[index + 1] - lower
    distance = np.abs(2 * (magnitude - lower) / delta - 1)
    with np.errstate(divide="ignore"):
        derivative = (1 / k) * distance ** (1 / k - 1)
    return np.where(is_nan, np.nan, np.minimum(derivative, cap))


@dataclass(frozen=True)
class LinearConfig:
    """What `linear` quantises, and how.

    Attributes:
        x_fmt: format of the activations; None leaves them in float32.
        w_fmt: format of the weights; None leaves them in float32.
        x_granularity: "token" (one scale per row) or "tensor".
        w_granularity: "channel" (one scale per output column) or "tensor".
        grad_fmt: format of the scaled output gradients; None leaves them in float32.
        dge_k: sharpness of the differentiable gradient estimator; None for straight through.
        dge_cap: its upper bound.
        occ_alpha: quantile of the outlier clamp with compensation; None for no clamp.
        occ_compensation: "operand" (`compensate`), "residual" (a second product) or None (dropped).
        x_shift: None, "midrange" (per scale, without the clamp) or "mean" (over tokens).
        w_shift: None or "midrange".
        sample_size: number of elements that the thresholds are taken from; see `sample`.
    """

    x_fmt: str | None = "e2m1"
    w_fmt: str | None = "e2m1"
    x_granularity: str = "token"
    w_granularity: str = "channel"
    grad_fmt: str | None = "e5m2"
    dge_k: float | None = 5.0
    dge_cap: float = 3.0
    occ_alpha: float | None = 0.99
    sample_size: int = 65536
    occ_compensation: str | None = "operand"
    x_shift: str | None = None
    w_shift: str | None = None

    def __post_init__(self) -> None:
        """Refuse what has no meaning, naming the field."""
        if self.x_granularity not in ("token", "tensor"):
            raise ValueError(f"x_granularity is token or tensor, got {self.x_granularity!r}")
        if self.w_granularity not in ("channel", "tensor"):
            raise ValueError(f"w_granularity is channel or tensor, got {self.w_granularity!r}")
        if self.occ_alpha is not None and self.x_fmt is None:
            raise ValueError("occ_alpha needs an x_fmt")
        if self.dge_k is not None and self.w_fmt is None:
            raise ValueError("dge_k needs a w_fmt")
        if self.occ_compensation not in ("operand", "residual", None):
            raise ValueError(
                f"occ_compensation is operand, residual or None, got {self.occ_compensation!r}"
            )
        if self.x_shift is not None and self.x_fmt is None:
            raise ValueError("x_shift needs an x_fmt")
        if self.w_shift is not None and self.w_fmt is None:
            raise ValueError("w_shift needs a w_fmt")
        if self.x_shift == "midrange" and self.occ_alpha is not None:
            raise ValueError("x_shift is midrange or there is an occ_alpha, not both")


def linear(
    x: npt.ArrayLike,
    w: npt.ArrayLike,
    dy: npt.ArrayLike,
    config: LinearConfig,
    bias: npt.ArrayLike | None = None,
) -> tuple[Float64, Float64, Float64]:
    """Forward and both gradients of y = x w, with every quantisation step.

    fprop: y = s_x * (Xq Wq) * s_w. Xq are the codes of x, or with `occ_alpha` its compensated
    E4M3 operand, from thresholds of a strided sample of x.

    dgrad: dx = Q(dy * s_w) Wq^T. s_w runs along dgrad's contraction n, so it is folded into dy (a
    float32 product); Q takes one scale per token (over n), applied after the sum.

    wgrad: dw = (Xq^T Q(dy * s_x)) * f'(w / s_w). s_x runs along wgrad's contraction m, so it is
    folded likewise; Q takes one scale per column (over m). f' is `dge_derivative` at the float32
    quotient that fprop rounds; without `dge_k` it is 1. Activations pass straight through,
    clamped elements included.

    Shifts z_x and z_w add rank-one terms to all three: y gains those of `matmul`, dx gains
    dy z_w^T and dw gains z_x^T dy (before f', which is then at (w - z_w) / s_w), from dy as it is.
    With a mean shift the thresholds are those of x minus the mean. With the "residual" r as a
    second product, y gains r (s_w Wq + z_w) and dw gains r^T dy.

    An operand that is not quantised is its float32 self with scale 1.

    Args:
        x: [m, k], any floating dtype.
        w: [k, n], any floating dtype.
        dy: [m, n], gradient of the loss by y, any floating dtype.
        config: what is quantised, and how.
        bias: [n], added to y.

    Returns:
        (y [m, n], dx [m, k], dw [k, n]), float64.

    Source: sections 3.1 and 3.2; equations 7, 8 and 22; the folding is exact algebra.
    """
    x, w, dy = to_float32(x), to_float32(w), to_float32(dy)
    one = np.ones((1, 1), dtype=np.float32)
    x_axis = 1 if config.x_granularity == "token" else None
    w_axis = 0 if config.w_granularity == "channel" else None

    xq, s_x = x.astype(np.float64), one
    z_x: Float32 | None = None
    residual: Float32 | None = None
    if config.x_fmt is not None and config.occ_alpha is not None:
        centred = x
        if config.x_shift == "mean":
            z_x = mean_shift(x)
            centred = _subtract(x, z_x)
        lo, hi = thresholds(sample(centred, config.sample_size), config.occ_alpha)
        if config.occ_compensation == "operand":
            xq, s_x = compensate(centred, lo, hi, x_axis, config.x_fmt)
        else:
            clipped, residual = clamp_residual(centred, lo, hi)
            xq, s_x, _ = quantize(clipped, x_axis, config.x_fmt)
            residual = residual if config.occ_compensation == "residual" else None
    elif config.x_fmt is not None:
        xq, s_x, z_x = quantize(x, x_axis, config.x_fmt, config.x_shift)

    wq, s_w = w.astype(np.float64), one
    z_w: Float32 | None = None
    if config.w_fmt is not None:
        wq, s_w, z_w = quantize(w, w_axis, config.w_fmt, config.w_shift)

    y = matmul(xq, s_x, wq, s_w, z_x, z_w, bias)
    if residual is not None:
        # Scale and shift outside the sums, which take no more than 24 bits an element.
        y = y + matmul(residual, one, wq, s_w, None, z_w)

    dgrad_dy = _multiply(dy, s_w)
    if config.grad_fmt is None:
        dx = matmul(dgrad_dy, one, wq.T, one)
    else:
        codes, s, _ = quantize(dgrad_dy, 1, config.grad_fmt)
        dx = matmul(codes, s, wq.T, one)
    if z_w is not None:
        dx = dx + sums(dy, np.broadcast_to(z_w, w.shape).T)

    wgrad_dy = _multiply(dy, s_x)
    if config.grad_fmt is None:
        dw = matmul(xq.T, one, wgrad_dy, one)
    else:
        codes, s, _ = quantize(wgrad_dy, 0, config.grad_fmt)
        dw = matmul(xq.T, one, codes, s)
    if z_x is not None:
        dw = dw + sums(np.broadcast_to(z_x, x.shape).T, dy)
    if residual is not None:
        dw = dw + sums(residual.T, dy)
    if config.dge_k is not None and config.w_fmt is not None:
        v = _divide(w if z_w is None else _subtract(w, z_w), s_w)
        dw = dw * dge_derivative(v, config.w_fmt, config.dge_k, config.dge_cap)

    return y, dx, dw
