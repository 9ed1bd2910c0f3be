"""Holds the float64 oracle to things outside it.

Casts of ml_dtypes, nearest-value search in exact fractions, numbers of the paper, finite
differences of the paper's estimator and plain float64 algebra. Nothing here reads the library.
"""

import ast
import math
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jfp4.ops import reference as ref

FORMATS = ("e2m1", "e1m2", "e3m0", "e2m1b3", "e4m3", "e5m2")
FOUR_BITS = FORMATS[:3]
DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
TINY = np.float32(2.0**-126)

fast = settings(max_examples=60, deadline=None)
floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def nearest(v, fmt):
    """Brute-force nearest grid value of one finite number, in exact arithmetic."""
    exact = Fraction(float(v))
    distances = [abs(abs(exact) - Fraction(g)) for g in ref.grid(fmt).tolist()]
    best = min(distances)
    indices = [i for i, d in enumerate(distances) if d == best]
    index = indices[0] if len(indices) == 1 else next(i for i in indices if i % 2 == 0)
    return math.copysign(float(ref.grid(fmt)[index]), float(v))


def round32(exact):
    """Correctly rounded float32 of a Fraction (ties to even), subnormals flushed; no NumPy."""
    sign = -1.0 if exact < 0 else 1.0
    exact = abs(exact)
    if exact == 0:
        return 0.0
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    exponent -= exact < Fraction(2) ** exponent
    ulp = Fraction(2) ** (max(exponent, -126) - 23)
    value = round(exact / ulp) * ulp  # Fraction.__round__ sends ties to even
    if value < Fraction(2) ** -126:
        return sign * 0.0
    return sign * (math.inf if value >= Fraction(2) ** 128 else float(value))


def quotient(a, b):
    """A * (1 / b), reciprocal and product each rounded to float32."""
    return Fraction(round32(Fraction(a) * Fraction(round32(1 / Fraction(b)))))


def scale_of(values, fmt):
    """Scale of one row of fractions."""
    least = Fraction(2) ** -126 * 2 / Fraction(float(ref.grid(fmt)[1]))
    return max(quotient(max(map(abs, values)), ref.max_value(fmt)), least)


def same_bits(a, b):
    """Equal values and equal signs of zero."""
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(np.signbit(a), np.signbit(b))


def gaussian(seed, *shape, dtype=np.float32):
    """Normal data."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


# ---------------------------------------------------------------------------- independence


def test_imports_nothing_of_the_library():
    """The oracle is independent of what it checks."""
    assert ref.__file__ is not None
    tree = ast.parse(Path(ref.__file__).read_text())
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    froms = {
        n for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for n in [node.module]
    }
    assert names | froms == {"math", "dataclasses", "typing", "ml_dtypes", "numpy", "numpy.typing"}
    assert all(n.level == 0 for n in ast.walk(tree) if isinstance(n, ast.ImportFrom))


# --------------------------------------------------------------------------------- formats


def test_published_grids():
    """The four-bit grids are the published ones; the maxima of the eight-bit ones too."""
    assert ref.grid("e2m1").tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert ref.grid("e1m2").tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert ref.grid("e3m0").tolist() == [0, 0.25, 0.5, 1, 2, 4, 8, 16]
    assert (ref.max_value("e4m3"), ref.max_value("e5m2")) == (448, 57344)


@pytest.mark.parametrize("fmt", DTYPES)
def test_magnitude_codes_are_the_bits_of_ml_dtypes(fmt):
    """Index i of the grid is the value whose bit pattern is i."""
    values = ref.grid(fmt)
    bits = np.arange(len(values), dtype=np.uint8)
    np.testing.assert_array_equal(bits.view(DTYPES[fmt]).astype(np.float64), values)
    assert values[-1] == float(ml_dtypes.finfo(DTYPES[fmt]).max)


def test_unknown_format():
    """An unknown format is refused by name."""
    with pytest.raises(ValueError, match="e9m9"):
        ref.grid("e9m9")


# -------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("fmt", DTYPES)
def test_rounds_as_ml_dtypes_casts(fmt):
    """Every bfloat16 and every midpoint, where the cast does not overflow, signs of zero too."""
    values = ref.grid(fmt)
    midpoints = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    patterns = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    probes = np.concatenate(
        [
            patterns,
            midpoints,
            np.nextafter(midpoints, np.float32(np.inf)),
            np.nextafter(midpoints, np.float32(0)),
        ]
    )
    probes = np.concatenate([probes, -probes])
    probes = probes[np.abs(probes) <= values[-1]]  # drops NaN too
    expected = probes.astype(DTYPES[fmt]).astype(np.float64)
    same_bits(ref.round_to_format(probes.astype(np.float64), fmt), expected)


@pytest.mark.parametrize("fmt", FORMATS)
def test_rounds_to_the_nearest_in_exact_arithmetic(fmt):
    """Grid points, midpoints, the float64 neighbours of both, random values and beyond the end."""
    values = ref.grid(fmt)
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2, [values[-1] * 1.5]])
    points = np.concatenate([points, np.nextafter(points, np.inf), np.nextafter(points, 0)])
    points = np.concatenate([points, np.random.default_rng(0).uniform(0, values[-1], 200)])
    points = np.concatenate([points, -points])
    same_bits(ref.round_to_format(points, fmt), [nearest(p, fmt) for p in points])


@fast
@given(v=st.floats(allow_nan=False, allow_infinity=False), fmt=st.sampled_from(FOUR_BITS))
def test_rounds_any_float64(v, fmt):
    """Any finite float64 goes to its nearest value."""
    same_bits(ref.round_to_format(v, fmt), nearest(v, fmt))


def test_published_ties():
    """0.25 -> 0, 2.5 -> 2, 5 -> 4: the hardware's rule."""
    got = ref.round_to_format([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], "e2m1")
    assert got.tolist() == [0, 1, 1, 2, 2, 4, 4]
    # E3M0 has no mantissa bit: the even magnitude code decides.
    assert ref.round_to_format([0.125, 0.375, 0.75, 12], "e3m0").tolist() == [0, 0.5, 0.5, 8]


@pytest.mark.parametrize("fmt", FORMATS)
def test_special_values(fmt):
    """Infinities saturate, NaN stays, minus zero stays, shape stays."""
    top = ref.max_value(fmt)
    got = ref.round_to_format([[np.inf, -np.inf, 1e300], [np.nan, -0.0, -1e-300]], fmt)
    same_bits(got[0], [top, -top, top])
    assert np.isnan(got[1, 0])
    same_bits(got[1, 1:], [-0.0, -0.0])
    assert ref.round_to_format(1.0, fmt).shape == ()


# --------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("fmt", FOUR_BITS)
def test_pack_bits(fmt):
    """Low nibble first, sign at bit 3, minus zero is 8, odd lengths padded with 0."""
    g = ref.grid(fmt)
    packed = ref.pack([g[1], -g[2], -0.0, g[7], -g[7]], fmt)
    assert packed.dtype == np.uint8
    assert packed.tolist() == [0xA1, 0x78, 0x0F]
    codes = np.arange(256, dtype=np.uint8)[:, None]
    np.testing.assert_array_equal(ref.pack(ref.unpack(codes, fmt), fmt), codes)


def test_pack_holds_the_bits_of_ml_dtypes():
    """A nibble is the float4_e2m1fn bit pattern."""
    v = ref.round_to_format(gaussian(1, 3, 8) * 3, "e2m1")
    bits = v.astype(np.float32).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 0xF
    np.testing.assert_array_equal(ref.pack(v, "e2m1"), bits[:, 0::2] + 16 * bits[:, 1::2])


@fast
@given(data=st.data(), fmt=st.sampled_from(FOUR_BITS), k=st.integers(1, 9))
def test_pack_round_trip(data, fmt, k):
    """Unpack undoes pack, signs of zero included, for odd lengths too."""
    signed = [s * g for g in ref.grid(fmt).tolist() for s in (1.0, -1.0)]
    row = st.lists(st.sampled_from(signed), min_size=k, max_size=k)
    values = np.array(data.draw(st.lists(row, min_size=1, max_size=3)))
    packed = ref.pack(values, fmt)
    assert packed.shape == (len(values), (k + 1) // 2)
    same_bits(ref.unpack(packed, fmt, k), values)
    if k % 2:
        same_bits(ref.unpack(packed, fmt)[:, -1], np.zeros(len(values)))


def test_pack_refuses():
    """Values off the grid, NaN, wide formats, wrong byte types and wrong sizes are errors."""
    for bad in ([0.3], [np.nan], [8.0]):
        with pytest.raises(ValueError, match="not every element"):
            ref.pack(bad, "e2m1")
    with pytest.raises(ValueError, match="4-bit"):
        ref.pack([1.0], "e4m3")
    with pytest.raises(ValueError, match="4-bit"):
        ref.unpack(np.zeros(1, np.uint8), "e5m2")
    with pytest.raises(ValueError, match="uint8"):
        ref.unpack(np.zeros(1, np.int8), "e2m1")
    with pytest.raises(ValueError, match="cannot hold"):
        ref.unpack(np.zeros(2, np.uint8), "e2m1", 2)


# ------------------------------------------------------------------------------- float32


def test_to_float32():
    """Conversion, overflow, flush and its sign, and what rounds up to the least normal."""
    x = np.array([1 / 3, 1e300, -1e300, 2.0**-126, -(2.0**-127), 2.0**-126 * (1 - 2.0**-30), 1e-60])
    got = ref.to_float32(x)
    assert got.dtype == np.float32
    same_bits(got, np.array([1 / 3, np.inf, -np.inf, TINY, -0.0, TINY, 0.0], np.float32))
    assert ref.to_float32(np.float32(1.5)).shape == ()


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn, np.float16]
)
def test_to_float32_takes_every_float(dtype):
    """Narrow floats convert exactly."""
    same_bits(ref.to_float32(np.array([0.5, -3, -0.0], dtype)), np.float32([0.5, -3, -0.0]))


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, np.bool_])
def test_to_float32_refuses(dtype):
    """What is not a real float is an error."""
    with pytest.raises(TypeError, match="floating dtype"):
        ref.to_float32(np.zeros(2, dtype))


# ------------------------------------------------------------------------ scale and shift


@fast
@example(row=[2.0**126, 1.0], fmt="e2m1", shift=None)
@example(row=[float(np.nextafter(np.float32(2.0**126), np.float32(0)))], fmt="e2m1b3", shift=None)
@example(row=[3e38, -3e38], fmt="e2m1", shift="midrange")
@given(
    row=st.lists(floats32, min_size=1, max_size=6),
    fmt=st.sampled_from(FORMATS),
    shift=st.sampled_from([None, "midrange"]),
)
def test_quantize_in_exact_arithmetic(row, fmt, shift):
    """Scale, shift and codes of one row, each step in fractions and rounded to float32 once."""
    exact = [Fraction(round32(Fraction(v))) for v in row]
    z = Fraction(0)
    if shift is not None:
        z = Fraction(round32(max(exact) / 2)) + Fraction(round32(min(exact) / 2))
        z = Fraction(round32(z))
        exact = [Fraction(round32(v - z)) for v in exact]
    codes, got_scale, got_shift = ref.quantize(np.array([row], np.float32), 1, fmt, shift)
    assert got_scale.shape == (1, 1) and got_scale.dtype == np.float32
    if shift is None:
        assert got_shift is None
    else:
        assert got_shift is not None and got_shift.dtype == np.float32
        assert got_shift[0, 0] == float(z)
    if max(map(abs, exact)) >= Fraction(2) ** 126:
        assert np.isnan(got_scale[0, 0]) and not np.any(codes)
        return
    s = scale_of(exact, fmt)
    assert got_scale[0, 0] == float(s)
    np.testing.assert_array_equal(codes[0], [nearest(quotient(v, s), fmt) for v in exact])


def test_quantize_keeps_the_sign_of_zero():
    """Minus zero and what underflows from below are minus zero."""
    codes, _, _ = ref.quantize(np.float32([[-0.0, 0.0, -1e-38, 6.0, -0.1]]), 1, "e2m1")
    same_bits(codes, np.array([[-0.0, 0.0, -0.0, 6.0, -0.0]]))


@pytest.mark.parametrize("axis", [0, 1, -1, 2, None])
def test_scale_axis(axis):
    """Amax runs over the given axis, which is kept at length 1."""
    x = gaussian(2, 3, 4, 5)
    s = ref.scale(x, axis, "e2m1")
    amax = np.abs(x).max(axis=axis, keepdims=True)
    assert s.shape == amax.shape
    np.testing.assert_array_equal(s, amax * np.float32(1 / 6))
    codes, _, _ = ref.quantize(x, axis, "e2m1")
    np.testing.assert_array_equal(np.abs(codes).max(axis=axis), np.full(amax.squeeze().shape, 6.0))


def test_scale_of_zero_and_tiny_rows():
    """The least scale is 2**-124: the least normal is half a smallest step of it, and ties to 0."""
    x = np.array(
        [[0, 0], [-0.0, 0], [2.0**-126, 0], [1.5 * 2.0**-126, 0], [2.0**-120, 0], [1e-44, 0]],
        np.float32,
    )
    codes, s, _ = ref.quantize(x, 1, "e2m1")
    least = 2.0**-124
    assert ref.min_scale("e2m1") == least
    above = np.float32(2.0**-120) * np.float32(1 / 6)
    assert s[:, 0].tolist() == [least, least, least, least, above, least]
    assert codes[:, 0].tolist() == [0, 0, 0, 0.5, 6, 0]


@pytest.mark.parametrize("fmt", FORMATS)
def test_least_scale_sends_subnormals_to_zero(fmt):
    """No subnormal reaches half a step of the least scale, and the least scale is the tightest."""
    half_step = Fraction(float(ref.min_scale(fmt))) * Fraction(float(ref.grid(fmt)[1])) / 2
    assert half_step == Fraction(2) ** -126


def test_scale_up_to_the_largest():
    """From 2**126 on a scale's reciprocal might be subnormal: NaN."""
    below = np.nextafter(np.float32(2.0**126), np.float32(0))
    s = ref.scale(np.float32([[below, 1], [-(2.0**126), 1], [np.inf, 1], [np.nan, 1]]), 1, "e2m1")
    assert s[0, 0] == below * np.float32(1 / 6) and np.all(np.isnan(s[1:]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shift", [None, "midrange"])
def test_broken_rows_are_never_plausible(bad, shift):
    """A NaN or an infinity makes its row's scale NaN and its codes 0; other rows are untouched."""
    x = gaussian(3, 3, 4)
    clean = ref.quantize(x, 1, "e2m1", shift)
    x[1, 2] = bad
    codes, s, _ = ref.quantize(x, 1, "e2m1", shift)
    assert np.isnan(s[:, 0]).tolist() == [False, True, False]
    assert codes[1].tolist() == [0, 0, 0, 0]
    np.testing.assert_array_equal(codes[[0, 2]], clean[0][[0, 2]])
    assert np.all(np.isnan(ref.dequantize(codes, s)[1]))
    assert np.isnan(ref.scale(x, None, "e2m1")[0, 0])


def test_shift_overflow_is_never_plausible():
    """A difference beyond float32 gives NaN, not a saturated code."""
    _, s, _ = ref.quantize(np.float32([[3e38, 1.0]]), 1, "e2m1", np.float32([[-3e38, 0]]))
    assert np.isnan(s[0, 0])


@pytest.mark.parametrize("shape", [(64, 8), (4, 16, 8)])
def test_mean_shift(shape):
    """Mean over all tokens, one number a column; a given array is used as it is."""
    x = gaussian(4, *shape) + 2
    codes, s, mean = ref.quantize(x, -1, "e2m1", "mean")
    assert mean is not None and mean.shape == (1,) * (len(shape) - 1) + (8,)
    exact = [sum(map(Fraction, col)) / 64 for col in x.reshape(-1, 8).T.astype(float).tolist()]
    np.testing.assert_allclose(mean.ravel(), [float(e) for e in exact], rtol=1e-7)
    again = ref.quantize(x, -1, "e2m1", mean.ravel())
    for a, b in zip(again[:2], (codes, s), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="last axis"):
        ref.quantize(x, 0, "e2m1", "mean")
    with pytest.raises(ValueError, match="unknown shift"):
        ref.quantize(x, 0, "e2m1", "median")


def test_midrange_halves_first():
    """No overflow at the top of float32; halves below 2**-126 are flushed before they meet."""
    x = np.array([[3e38, 3.2e38], [TINY, TINY], [-3e38, 3e38]], np.float32)
    z = ref.midrange_shift(x, 1)
    assert z.dtype == np.float32 and z.shape == (3, 1)
    assert z[:, 0].tolist() == [np.float32(3e38) / 2 + np.float32(3.2e38) / 2, 0, 0]


def test_midrange_uses_the_whole_range():
    """One-sided data: both ends of the range reach the largest code, and the error halves."""
    x = gaussian(5, 32, 64) ** 2
    codes, s, z = ref.quantize(x, 1, "e2m1", "midrange")
    assert np.all(codes.max(axis=1) == 6) and np.all(codes.min(axis=1) == -6)
    assert np.all(np.abs(ref.dequantize(codes, s, z) - x) <= s * 1.0001)  # half the widest gap


@pytest.mark.parametrize("fmt", FORMATS)
def test_error_is_at_most_half_a_gap(fmt):
    """Dequantised values are within half of the widest gap of the grid."""
    x = gaussian(6, 16, 32)
    codes, s, _ = ref.quantize(x, 1, fmt)
    assert np.all(np.abs(ref.dequantize(codes, s) - x) <= s * np.diff(ref.grid(fmt)).max() * 0.5001)


# -------------------------------------------------------------------------------- outliers


@pytest.mark.parametrize(("alpha", "percent"), [(0.999, 0.2), (0.99, 2.0), (0.97, 6.0)])
def test_published_share_of_residuals(alpha, percent):
    """0.2, 2 and 6 percent of distinct values lie outside the thresholds."""
    x = np.random.default_rng(7).permutation(10000).astype(np.float32) - 3000
    lo, hi = ref.thresholds(x, alpha)
    _, residual = ref.clamp_residual(x, lo, hi)
    assert 100 * np.mean(residual != 0) == pytest.approx(percent)
    assert np.sum(x > hi) == np.sum(x < lo) == round((1 - alpha) * 10000)


@fast
@given(
    values=st.lists(floats32, min_size=1, max_size=40),
    percent=st.integers(51, 100),
)
def test_thresholds_by_counting(values, percent):
    """Hi is the least element with at least alpha * n elements at or below it; lo mirrors it."""
    s = [float(v) for v in ref.to_float32(np.array(values, np.float32))]
    need = Fraction(percent, 100) * len(s)
    lo, hi = ref.thresholds(np.array(values, np.float32).reshape(1, -1), percent / 100)
    assert hi == min(v for v in s if sum(u <= v for u in s) >= need)
    assert lo == max(v for v in s if sum(u >= v for u in s) >= need)


def test_thresholds_edges():
    """NaN anywhere gives NaN; clamped ranks; bfloat16 input; whole products are not rounded up."""
    assert all(np.isnan(ref.thresholds([1.0, np.nan, 2.0], 0.99)))
    assert ref.thresholds([3.0, 1.0, 2.0], 1.0) == (1, 3)
    assert ref.thresholds([3.0, 1.0, 2.0], 0.0) == (3, 1)
    assert ref.thresholds(np.array([5], ml_dtypes.bfloat16), 0.99) == (5, 5)
    assert 0.07 * 100 > 7 and ref.thresholds(np.arange(100.0), 0.07)[1] == 6
    with pytest.raises(ValueError, match="empty"):
        ref.thresholds(np.zeros((0, 4)), 0.99)


@fast
@given(m=st.integers(1, 40), k=st.integers(1, 24), size=st.integers(1, 120))
def test_sample(m, k, size):
    """Size, order, the stride's definition, and every column visited when enough is taken."""
    x = np.arange(m * k, dtype=np.float64).reshape(m, k)
    got = ref.sample(x, size)
    assert len(got) == min(size, m * k)
    if m * k <= size:
        np.testing.assert_array_equal(got, x.ravel())
        return
    strides = [d for d in range(1, m * k // size + 1) if math.gcd(d, k) == 1]
    np.testing.assert_array_equal(got, max(strides) * np.arange(size))
    assert len(set(got[:k] % k)) == min(k, size)


def test_sampled_threshold_is_close():
    """A strided sample of 65,536 puts the threshold within about half a percent."""
    x = gaussian(8, 512, 1024)
    exact, sampled = (ref.thresholds(v, 0.99) for v in (x, ref.sample(x, 65536)))
    np.testing.assert_allclose(sampled, exact, rtol=0.015)
    np.testing.assert_allclose(exact, [-2.326, 2.326], rtol=0.01)  # of the normal distribution


def test_clamp_residual():
    """Both parts, their sum, and NaN on either side."""
    x = np.float32([-5, -1, -0.0, 1, 7, np.nan])
    clipped, residual = ref.clamp_residual(x, -1.0, 2.0)
    same_bits(clipped[:5], np.float32([-1, -1, -0.0, 1, 2]))
    same_bits(residual[:5], np.float32([-4, 0, 0, 0, 5]))
    assert np.isnan(clipped[5]) and np.isnan(residual[5])
    # Crossed thresholds: min(max(x, lo), hi). At a threshold, the element itself.
    assert ref.clamp_residual(np.float32([-1, 1, 3]), 2.0, 0.0)[0].tolist() == [0, 0, 0]
    same_bits(ref.clamp_residual(np.float32([-0.0, 0.0]), 0.0, -0.0)[0], np.float32([-0.0, 0.0]))
    for lo, hi in ((np.nan, 2.0), (-1.0, np.nan)):
        assert np.all(np.isnan(ref.clamp_residual(x, lo, hi)[0]))
    y = gaussian(9, 64, 64)
    clipped, residual = ref.clamp_residual(y, -0.5, 1.0)
    np.testing.assert_array_equal(clipped, np.clip(y, -0.5, 1.0))
    assert clipped.dtype == residual.dtype == np.float32
    np.testing.assert_array_equal((y.astype(float) - clipped).astype(np.float32), residual)


@pytest.mark.parametrize("fmt", FOUR_BITS)
@pytest.mark.parametrize("axis", [1, None])
def test_compensate_in_exact_arithmetic(fmt, axis):
    """Every code by fractions: clamp, scale, divide, round, subtract, add, round to E4M3."""
    x = gaussian(10, 6, 24) ** 3
    lo, hi = ref.thresholds(x, 0.9)
    codes, s = ref.compensate(x, lo, hi, axis, fmt)
    flo, fhi = Fraction(float(lo)), Fraction(float(hi))
    exact = [[Fraction(v) for v in row] for row in x.tolist()]
    clamped = [[min(max(v, flo), fhi) for v in row] for row in exact]
    rows = clamped if axis == 1 else [[v for row in clamped for v in row]] * len(clamped)
    for i, row in enumerate(exact):
        scale = scale_of(rows[i], fmt)
        assert float(s[i if axis == 1 else 0, 0]) == float(scale)
        for j, v in enumerate(row):
            u, of_clamped = (quotient(a, scale) for a in (v, clamped[i][j]))
            part = Fraction(round32(u - of_clamped))
            q = Fraction(nearest(of_clamped, fmt))
            assert codes[i, j] == nearest(round32(q + part), "e4m3")


@pytest.mark.parametrize(
    ("x", "lo", "hi", "code"),
    [
        (-0.0, -6, 6, 0.0),
        (-0.25, -6, 6, 0.0),  # rounds to zero, and nothing is clamped off
        (-3, 0, 6, -3),
        (-0.0, 0, 6, 0.0),
        (0.0, -0.0, 6, 0.0),
        (-1e-30, 0, 6, -0.0),  # a code of zero has the sign of what was clamped off,
        (1e-30, -6, 0, 0.0),
        (-1.5 * 2**-126, -(2**-126), 6, 0.0),  # which has none if it is subnormal
        (-2.5 * 2**-126, -(2**-126), 6, -0.0),
        (-1e-40, 0, 6, 0.0),
        (-2, -1e-40, 6, -2),
        (0.0, 1e-40, 6, 0.0),
        (0.0, 2**-126, 6, -0.0),
        (1, 2, 6, 1),
        (6, -6, -2, 6),
        (-0.0, 2, -6, 0.0),  # crossed
        (-3, 2, -6, -3),
    ],
)
def test_signs_of_compensated_zeros(x, lo, hi, code):
    """Beside a six, the scale is one."""
    row = np.float32([[x, 6, -6]])
    codes, s = ref.compensate(row, np.float32(lo), np.float32(hi), 1, "e2m1")
    assert s[0, 0] == 1
    same_bits(codes[0, :1], np.float64([code]))


def test_quotients_that_overflow_saturate():
    x = np.float32([[1e-10, 3e38, -3e38]])
    codes, s = ref.compensate(x, np.float32(-1e-10), np.float32(1e-10), 1, "e2m1")
    assert s[0, 0] < 1e-10 and codes.tolist() == [[6, 448, -448]]


def test_compensation_keeps_four_significant_bits():
    """An outlier keeps the clamped part's error plus 2**-4 relative, up to 448; then saturates."""
    x = gaussian(11, 64, 256)
    x[:, ::50] *= 20
    lo, hi = ref.thresholds(x, 0.97)
    clipped, _ = ref.clamp_residual(x, lo, hi)
    codes, s = ref.compensate(x, lo, hi, 1, "e2m1")
    plain, plain_scale, _ = ref.quantize(clipped, 1, "e2m1")
    np.testing.assert_array_equal(s, plain_scale)
    np.testing.assert_array_equal(codes[x == clipped], plain[x == clipped])
    carried = np.abs(ref.dequantize(plain, s) - clipped)
    error = np.abs(ref.dequantize(codes, s) - x)
    assert np.all(error <= carried * 1.0001 + np.abs(x) / 16 * 1.01 + s * 0.07)
    same_bits(codes, codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float64))


def test_compensation_saturates():
    """A plain cast would be NaN beyond 464; this is 448."""
    assert np.isnan(np.float32(1000).astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    x = np.float32([[6, -6, 1000, -1000, 3e38, -0.0]])
    codes, s = ref.compensate(x, -6.0, 6.0, 1, "e2m1")
    assert s[0, 0] == 1
    same_bits(codes[0], np.float64([6, -6, 448, -448, 448, 0.0]))


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_infinities_are_not_clamped(bad):
    """The scale of a row with an infinity is NaN, though the thresholds are finite."""
    x = np.float32([[1, bad, 9], [1, 2, 9]])
    clipped, _ = ref.clamp_residual(x, -6.0, 6.0)
    assert clipped.tolist() == [[1, bad, 6], [1, 2, 6]]
    codes, s = ref.compensate(x, -6.0, 6.0, 1, "e2m1")
    assert np.isnan(s[0, 0]) and s[1, 0] == 1
    assert codes.tolist() == [[0, 0, 0], [1, 2, 9]]


def test_compensation_of_broken_rows():
    """NaN thresholds or a NaN element: scale NaN, codes 0."""
    x = np.float32([[1, 2], [np.nan, 2]])
    codes, s = ref.compensate(x, -2.0, 2.0, 1, "e2m1")
    assert np.isnan(s[:, 0]).tolist() == [False, True] and codes[1].tolist() == [0, 0]
    codes, s = ref.compensate(x, np.nan, 2.0, 1, "e2m1")
    assert np.all(np.isnan(s)) and not np.any(codes)


def test_compensation_beats_the_direct_cast():
    """The published order of cosine and SNR: clamp with compensation over clamp over cast."""
    x = gaussian(12, 256, 512)
    x[:, ::64] *= 30  # channel-wise outliers

    def snr_db(xq):
        return 10 * np.log10(np.sum(x.astype(float) ** 2) / np.sum((x - xq) ** 2))

    lo, hi = ref.thresholds(x, 0.99)
    clipped, _ = ref.clamp_residual(x, lo, hi)
    cast, clamped = (ref.dequantize(*ref.quantize(v, 1, "e2m1")[:2]) for v in (x, clipped))
    both = ref.dequantize(*ref.compensate(x, lo, hi, 1, "e2m1"))
    assert snr_db(both) > snr_db(cast) + 6 and snr_db(both) > snr_db(clamped) + 6


# --------------------------------------------------------------------------------- product


@pytest.mark.parametrize(("fa", "fb"), [("e2m1", "e2m1"), ("e4m3", "e2m1"), ("e5m2", "e4m3")])
def test_sums_are_exact(fa, fb):
    """Against fractions, for codes of every pair that a GEMM meets; ill-conditioned ones too."""
    rng = np.random.default_rng(13)
    a = rng.choice(ref.grid(fa), (3, 17)) * rng.choice([-1, 1], (3, 17))
    b = rng.choice(ref.grid(fb), (17, 4)) * rng.choice([-1, 1], (17, 4))
    a[0, :3], b[:3, 0] = [ref.max_value(fa), ref.grid(fa)[1], -ref.max_value(fa)], 1
    exact = [
        [sum(Fraction(p) * Fraction(q) for p, q in zip(r, c, strict=True)) for c in b.T.tolist()]
        for r in a.tolist()
    ]
    np.testing.assert_array_equal(ref.sums(a, b), [[float(e) for e in row] for row in exact])


def test_sums_are_exact_in_int32():
    """2 * code is an int8: products of E2M1 codes are quarters, summed exactly in int32."""
    a = ref.round_to_format(gaussian(14, 8, 4096) * 2, "e2m1")
    b = ref.round_to_format(gaussian(15, 4096, 8) * 2, "e2m1")
    integers = (2 * a).astype(np.int8).astype(np.int32) @ (2 * b).astype(np.int8).astype(np.int32)
    np.testing.assert_array_equal(ref.sums(a, b), integers / 4)
    assert ref.sums([[6.0]], [[6.0]]) == 36


def test_sums_of_floats_and_broken_values():
    """Float32 operands round once; cancellation is exact; NaN and infinity pass through."""
    a, b = gaussian(16, 3, 5) * np.float32(1e20), gaussian(17, 5, 2)
    exact = [
        [
            float(sum(Fraction(p) * Fraction(q) for p, q in zip(r, c, strict=True)))
            for c in b.T.tolist()
        ]
        for r in a.tolist()
    ]
    np.testing.assert_array_equal(ref.sums(a, b), exact)
    big = np.float32(2.0**60)
    for small in (2.0**-40, 0.25):
        assert ref.sums([[big, small, -big]], [[1.0], [1.0], [1.0]]) == small
    assert np.isnan(ref.sums([[np.nan, 1.0]], [[0.0], [1.0]])[0, 0])
    assert ref.sums(np.zeros((2, 0)), np.zeros((0, 3))).tolist() == [[0] * 3] * 2
    with pytest.raises(ValueError, match="cannot multiply"):
        ref.sums(np.zeros((2, 3)), np.zeros((2, 3)))


@pytest.mark.parametrize("a_shift", [None, "midrange", "mean"])
@pytest.mark.parametrize("b_shift", [None, "midrange"])
@pytest.mark.parametrize("bias", [False, True])
def test_matmul_is_the_product_of_the_dequantised(a_shift, b_shift, bias):
    """Against a plain float64 product of codes * scale + shift."""
    qa, sa, za = ref.quantize(gaussian(18, 6, 16) + 1, 1, "e2m1", a_shift)
    qb, sb, zb = ref.quantize(gaussian(19, 16, 5) - 0.5, 0, "e2m1", b_shift)
    v = gaussian(20, 5) if bias else None
    expected = ref.dequantize(qa, sa, za) @ ref.dequantize(qb, sb, zb) + (0 if v is None else v)
    got = ref.matmul(qa, sa, qb, sb, za, zb, v)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
    if a_shift == "mean":
        assert za is not None
        np.testing.assert_array_equal(got, ref.matmul(qa, sa, qb, sb, za.ravel(), zb, v))


def test_matmul_refuses_scales_along_the_contraction():
    """A scale that cannot leave the sum is an error."""
    q = np.ones((4, 4))
    with pytest.raises(ValueError, match="a_scale"):
        ref.matmul(q, np.ones((1, 4)), q, np.ones((1, 4)))
    with pytest.raises(ValueError, match="b_scale"):
        ref.matmul(q, np.ones((4, 1)), q, np.ones((4, 1)))


# --------------------------------------------------------------------- gradient estimator


def paper_estimator(v, fmt, k):
    """Equation 7 on the interval of v, from the interval's lower end; v positive."""
    g = ref.grid(fmt)
    i = min(int(np.searchsorted(g, v, side="right")) - 1, len(g) - 2)
    delta = g[i + 1] - g[i]
    t = 2 * (v - g[i]) / delta - 1
    return g[i] + delta / 2 * (1 + np.sign(t) * abs(t) ** (1 / k))


@pytest.mark.parametrize("fmt", FOUR_BITS)
@pytest.mark.parametrize("k", [3.0, 5.0, 10.0])
def test_dge_is_the_derivative_of_the_paper_estimator(fmt, k):
    """Central differences of equation 7, away from the centres and the grid points."""
    v = np.random.default_rng(21).uniform(0, ref.max_value(fmt), 300)
    got = ref.dge_derivative(v, fmt, k, cap=np.inf)
    h = 1e-6
    slope = [(paper_estimator(p + h, fmt, k) - paper_estimator(p - h, fmt, k)) / (2 * h) for p in v]
    g = ref.grid(fmt)
    marks = np.concatenate([g, (g[1:] + g[:-1]) / 2])
    clear = np.min(np.abs(v[:, None] - marks), axis=1) > 3e-3
    assert clear.sum() > 250
    np.testing.assert_allclose(got[clear], np.array(slope)[clear], rtol=1e-3)
    np.testing.assert_array_equal(ref.dge_derivative(-v, fmt, k, cap=np.inf), got)


@pytest.mark.parametrize(("k", "mean"), [(3.0, 0.778), (5.0, 0.594), (10.0, 0.383)])
def test_published_mean_of_dge(k, mean):
    """The mean of f' under the cap of 3."""
    v = (np.arange(600000) + 0.5) * 1e-5
    got = np.mean(ref.dge_derivative(v, "e2m1", k))
    assert got == pytest.approx(mean, abs=6e-4)
    capped = (3 * k) ** (-k / (k - 1))  # where the power meets the cap
    assert got == pytest.approx(3 * capped + 1 - capped ** (1 / k), abs=1e-4)


def test_dge_special_points():
    """1 / k at grid points, the cap at centres, the last interval at and beyond the maximum."""
    g = ref.grid("e2m1")
    np.testing.assert_allclose(ref.dge_derivative(np.concatenate([g, -g]), "e2m1"), 0.2)
    centres = (g[1:] + g[:-1]) / 2
    assert np.all(ref.dge_derivative(np.concatenate([centres, -centres]), "e2m1") == 3.0)
    assert np.all(ref.dge_derivative(centres, "e2m1", cap=7.0) == 7.0)
    np.testing.assert_allclose(ref.dge_derivative([6.0, 6.1, -100.0, np.inf], "e2m1"), 0.2)
    assert np.isnan(ref.dge_derivative(np.nan, "e2m1"))
    assert np.all(ref.dge_derivative(gaussian(22, 9), "e2m1", k=1.0) == 1)
    # A quarter into [4, 6], whose width is 2: |2 * 0.5 / 2 - 1| = 0.5.
    assert ref.dge_derivative(4.5, "e2m1") == pytest.approx(0.2 * 0.5**-0.8)
    assert ref.dge_derivative(0.125, "e2m1") == pytest.approx(0.2 * 0.5**-0.8)
    with pytest.raises(ValueError, match="k must"):
        ref.dge_derivative(1.0, "e2m1", k=0.5)


# ---------------------------------------------------------------------------- whole layer


NOTHING = ref.LinearConfig(x_fmt=None, w_fmt=None, grad_fmt=None, dge_k=None, occ_alpha=None)


def test_linear_without_quantisation_is_float64_algebra():
    """Nothing quantised: plain products."""
    x, w, dy = gaussian(23, 6, 8), gaussian(24, 8, 5), gaussian(25, 6, 5)
    y, dx, dw = ref.linear(x, w, dy, NOTHING)
    x, w, dy = x.astype(float), w.astype(float), dy.astype(float)
    for got, expected in ((y, x @ w), (dx, dy @ w.T), (dw, x.T @ dy)):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("x_granularity", ["token", "tensor"])
@pytest.mark.parametrize("w_granularity", ["channel", "tensor"])
@pytest.mark.parametrize("grad_fmt", ["e5m2", "e4m3", None])
def test_linear_on_representable_data_is_exact(x_granularity, w_granularity, grad_fmt):
    """Codes times powers of two lose nothing: the folding of the scales is exact algebra."""
    rng = np.random.default_rng(26)
    m, k, n = 6, 8, 10
    signed = np.concatenate([ref.grid("e2m1"), -ref.grid("e2m1")])
    qx, qw = rng.choice(signed, (m, k)), rng.choice(signed, (k, n))
    qx[:, 0], qw[0] = 6, -6  # so that every scale is the power of two chosen here
    rows, columns = 2.0 ** rng.integers(-3, 4, (m, 1)), 2.0 ** rng.integers(-3, 4, (1, n))
    x = qx * (rows if x_granularity == "token" else 0.5)
    w = qw * (columns if w_granularity == "channel" else 4.0)
    # 448 and 57344 are 7 * 2**p: sevens make the gradients' scales powers of two as well.
    dy = rng.choice([7.0, -3.5, 1.75, -14.0], (m, n))
    config = ref.LinearConfig(
        x_granularity=x_granularity,
        w_granularity=w_granularity,
        grad_fmt=grad_fmt,
        dge_k=None,
        occ_alpha=None,
    )
    y, dx, dw = ref.linear(x.astype(np.float32), w.astype(np.float32), dy, config)
    np.testing.assert_array_equal(y, x @ w)
    np.testing.assert_array_equal(dx, dy @ w.T)
    np.testing.assert_array_equal(dw, x.T @ dy)


def scalar_linear(x, w, dy, config):
    """The layer once more, a scalar at a time: fractions, `nearest` and `round32` only."""
    m, k, n = len(x), len(w), len(w[0])

    def f32(v):
        return Fraction(round32(v))

    def q(v, fmt):
        return Fraction(nearest(v, fmt))

    x, w, dy = ([[f32(Fraction(v)) for v in row] for row in a] for a in (x, w, dy))
    flat = [v for row in x for v in row]
    c, r = x, [[Fraction(0)] * k for _ in x]
    if config.occ_alpha is not None:
        stride = max(1, len(flat) // config.sample_size)
        while len(flat) > config.sample_size and math.gcd(stride, k) > 1:
            stride -= 1
        s = sorted(flat[::stride][: config.sample_size])
        rank = math.ceil(Fraction(str(config.occ_alpha)) * len(s))
        lo, hi = s[len(s) - rank], s[rank - 1]
        c = [[min(max(v, lo), hi) for v in row] for row in x]
        r = [[f32(v - u) for v, u in zip(*rows, strict=True)] for rows in zip(x, c, strict=True)]
    whole = [v for row in c for v in row]
    sx = [scale_of(row if config.x_granularity == "token" else whole, config.x_fmt) for row in c]
    xq = [[q(quotient(v, t), config.x_fmt) for v in row] for row, t in zip(c, sx, strict=True)]
    if config.occ_alpha is not None:
        parts = [[quotient(u, t) for u in row] for row, t in zip(r, sx, strict=True)]
        xq = [[q(f32(xq[i][j] + parts[i][j]), "e4m3") for j in range(k)] for i in range(m)]
    columns = list(zip(*w, strict=True))
    per_column = config.w_granularity == "channel"
    whole = [v for row in w for v in row]
    sw = [scale_of(v if per_column else whole, config.w_fmt) for v in columns]
    v = [[quotient(w[i][j], sw[j]) for j in range(n)] for i in range(k)]
    wq = [[q(u, config.w_fmt) for u in row] for row in v]

    y = [
        [sx[i] * sum(xq[i][p] * wq[p][j] for p in range(k)) * sw[j] for j in range(n)]
        for i in range(m)
    ]

    g = [[f32(dy[i][j] * sw[j]) for j in range(n)] for i in range(m)]
    if config.grad_fmt is not None:
        t = [scale_of(row, config.grad_fmt) for row in g]
        g = [[t[i] * q(quotient(u, t[i]), config.grad_fmt) for u in row] for i, row in enumerate(g)]
    dx = [[sum(g[i][j] * wq[p][j] for j in range(n)) for p in range(k)] for i in range(m)]

    g = [[f32(dy[i][j] * sx[i]) for j in range(n)] for i in range(m)]
    if config.grad_fmt is not None:
        t = [scale_of(column, config.grad_fmt) for column in zip(*g, strict=True)]
        g = [[t[j] * q(quotient(u, t[j]), config.grad_fmt) for j, u in enumerate(row)] for row in g]
    dw = [[float(sum(xq[i][p] * g[i][j] for i in range(m))) for j in range(n)] for p in range(k)]
    if config.dge_k is not None:
        values = [Fraction(u) for u in ref.grid(config.w_fmt).tolist()]
        for p in range(k):
            for j in range(n):
                a = min(abs(v[p][j]), values[-1])
                low = max(u for u in values[:-1] if u <= a)
                gap = min(u for u in values if u > low) - low
                t = float(abs(2 * (a - low) / gap - 1))
                power = math.inf if t == 0 else t ** (1 / config.dge_k - 1) / config.dge_k
                dw[p][j] *= min(power, config.dge_cap)
    return ([[float(u) for u in row] for row in a] for a in (y, dx, dw))


@pytest.mark.parametrize(
    "config",
    [
        ref.LinearConfig(occ_alpha=0.9),
        ref.LinearConfig(occ_alpha=0.9, sample_size=13, x_granularity="tensor"),
        ref.LinearConfig(occ_alpha=None, dge_k=None, grad_fmt="e4m3"),
        ref.LinearConfig(occ_alpha=None, grad_fmt=None, w_granularity="tensor", dge_k=3.0),
        ref.LinearConfig(occ_alpha=None, x_fmt="e4m3", w_fmt="e1m2", dge_cap=2.0),
        ref.LinearConfig(occ_alpha=0.8, x_fmt="e3m0", w_fmt="e4m3", dge_k=None, grad_fmt=None),
    ],
    ids=str,
)
def test_linear_a_scalar_at_a_time(config):
    """The whole layer against an independent scalar version in fractions."""
    x = gaussian(27, 7, 9) ** 3
    w = gaussian(28, 9, 6) * 0.1
    w[:, 0] *= 30
    dy = gaussian(29, 7, 6) * 1e-3
    expected = scalar_linear(x.tolist(), w.tolist(), dy.tolist(), config)
    for got, want in zip(ref.linear(x, w, dy, config), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-13, atol=0)


def test_linear_approximates_the_gradients():
    """At E5M2 each term of a gradient is off by at most 2**-3 of itself; E4M3 by 2**-4."""
    x, w, dy = gaussian(30, 32, 64), gaussian(31, 64, 48) * 0.02, gaussian(32, 32, 48)
    for grad_fmt, relative in (("e5m2", 2.0**-3), ("e4m3", 2.0**-4)):
        config = ref.LinearConfig(grad_fmt=grad_fmt, dge_k=None)
        codes, s_w, _ = ref.quantize(w, 0, "e2m1")
        _, dx, _ = ref.linear(x, w, dy, config)
        wv = ref.dequantize(codes, s_w)
        bound = (relative * np.abs(dy) + np.abs(dy).max() * 2.0**-14) @ np.abs(wv).T
        assert np.all(np.abs(dx - dy @ wv.T) <= bound * 1.001)


def test_linear_keeps_broken_inputs_visible():
    """A NaN weight reaches y, dx and dw; a NaN in x reaches its row of y and all of dw."""
    x, w, dy = gaussian(33, 6, 8), gaussian(34, 8, 5), gaussian(35, 6, 5)
    w[2, 3] = np.nan
    y, dx, dw = ref.linear(x, w, dy, ref.LinearConfig(occ_alpha=None))
    assert np.isnan(y).any(axis=0).tolist() == [False, False, False, True, False]
    assert np.all(np.isnan(dx)) and np.all(np.isnan(dw[:, 3]))
    x[1, 1], w[2, 3] = np.inf, 0
    y, dx, dw = ref.linear(x, w, dy, ref.LinearConfig(occ_alpha=None))
    assert np.isnan(y).any(axis=1).tolist() == [False, True, False, False, False, False]
    assert np.all(np.isfinite(dx)) and np.all(np.isnan(dw))


def test_config_refuses_what_has_no_meaning():
    """Each contradiction names its field."""
    for field, value in (("x_granularity", "row"), ("w_granularity", "row")):
        with pytest.raises(ValueError, match=field):
            ref.LinearConfig(**{field: value})
    with pytest.raises(ValueError, match="occ_alpha"):
        ref.LinearConfig(x_fmt=None)
    with pytest.raises(ValueError, match="dge_k"):
        ref.LinearConfig(w_fmt=None)
    with pytest.raises(ValueError, match="occ_compensation"):
        ref.LinearConfig(occ_compensation="both")
    with pytest.raises(ValueError, match="x_shift"):
        ref.LinearConfig(x_shift="midrange")
    with pytest.raises(ValueError, match="x_shift"):
        ref.LinearConfig(x_fmt=None, occ_alpha=None, x_shift="mean")
    with pytest.raises(ValueError, match="w_shift"):
        ref.LinearConfig(w_fmt=None, dge_k=None, w_shift="midrange")


@pytest.mark.parametrize(
    "config",
    [
        ref.LinearConfig(grad_fmt=None, dge_k=None, occ_alpha=None, x_shift="midrange"),
        ref.LinearConfig(grad_fmt=None, dge_k=None, occ_alpha=None, x_shift="mean"),
        ref.LinearConfig(grad_fmt=None, dge_k=None, occ_alpha=None, w_shift="midrange"),
        ref.LinearConfig(grad_fmt=None, dge_k=None, occ_alpha=0.9, occ_compensation="residual"),
        ref.LinearConfig(grad_fmt=None, dge_k=None, occ_alpha=0.9, occ_compensation=None),
        ref.LinearConfig(
            grad_fmt=None,
            dge_k=None,
            occ_alpha=0.9,
            occ_compensation="residual",
            x_shift="mean",
            w_shift="midrange",
        ),
    ],
    ids=str,
)
def test_linear_is_the_algebra_of_the_dequantised(config):
    """Shifts, residual and bias: y, dx and dw of the operands' values, but for the folding."""
    x, w, dy = gaussian(36, 9, 8) + 1, gaussian(37, 8, 6) - 0.5, gaussian(38, 9, 6)
    bias = gaussian(39, 6)
    residual = np.zeros_like(x)
    if config.occ_alpha is None:
        xv = ref.dequantize(*ref.quantize(x, 1, "e2m1", config.x_shift))
    else:
        mean = ref.mean_shift(x) if config.x_shift else np.zeros((1, 8), np.float32)
        clipped, residual = ref.clamp_residual(x - mean, *ref.thresholds(x - mean, 0.9))
        xv = ref.dequantize(*ref.quantize(clipped, 1, "e2m1")[:2], mean)
        residual = residual * (config.occ_compensation is not None)
        assert np.any(residual) == (config.occ_compensation is not None)
    wv = ref.dequantize(*ref.quantize(w, 0, "e2m1", config.w_shift))
    y, dx, dw = ref.linear(x, w, dy, config, bias)
    np.testing.assert_allclose(y, (xv + residual) @ wv + bias, rtol=1e-12, atol=1e-12)
    fold = 2.0**-22  # of the terms' magnitudes: the float32 folding
    assert np.all(np.abs(dx - dy @ wv.T) <= fold * (np.abs(dy) @ np.abs(wv).T))
    bound = fold * (np.abs(xv + residual).T @ np.abs(dy))
    assert np.all(np.abs(dw - (xv + residual).T @ dy) <= bound)
