"""Scales, shifts and codes, bit for bit those of the oracle."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jfp4.formats import FORMATS
from jfp4.ops import reference as ref
from jfp4.ops.quantize import mended_reciprocal, quantize, reciprocal

DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
TINY, TOP = np.finfo(np.float32).tiny, np.finfo(np.float32).max

jitted = functools.partial(jax.jit, static_argnames=("axis", "format", "shift"))(quantize)
eager_and_jit = pytest.mark.parametrize("quantizer", [quantize, jitted], ids=["eager", "jit"])


def same_bits(a, b):
    """Equal values, NaN in the same places, equal signs of zero."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_array_equal(a, b)
    number = ~np.isnan(b)
    np.testing.assert_array_equal(np.signbit(a)[number], np.signbit(b)[number])


@pytest.mark.parametrize("off", range(-2, 3))
def test_a_reciprocal_is_mended_from_a_quotient_that_is_off(off):
    """Of every mantissa, at exponents whose reciprocals are normal."""
    mantissa = np.arange(1 << 23, dtype=np.uint32)
    exponent = np.uint32(1) + (mantissa * np.uint32(2654435761) >> np.uint32(8)) % np.uint32(252)
    x = ((exponent << np.uint32(23)) | mantissa).view(np.float32)
    exact = np.float32(1) / x
    # Units are those of the quotient itself: below a power of two they are half of those above.
    quotient = (exact.view(np.int32) + np.int32(off)).view(np.float32)
    np.testing.assert_array_equal(jax.jit(mended_reciprocal)(x, quotient), exact)
    if off == 0:
        np.testing.assert_array_equal(jax.jit(reciprocal)(x), exact)


def test_the_reciprocal_of_nan_is_nan():
    assert np.isnan(reciprocal(jnp.float32(np.nan)))


def gaussian(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def check(quantizer, x, axis, format="e2m1", shift=None):
    """Codes, scale and a midrange shift are the oracle's, and so is their form."""
    q = quantizer(x, axis=axis, format=format, shift=shift)
    codes, scale, offset = ref.quantize(x, axis, format, shift)
    assert q.codes.dtype == FORMATS[format].dtype and q.scale.dtype == jnp.float32
    assert q.codes.shape == codes.shape and q.scale.shape == scale.shape
    assert (q.format, q.axis) == (format, None if axis is None else axis % x.ndim)
    np.testing.assert_array_equal(q.scale, scale)
    same_bits(q.codes, codes)
    if offset is None:
        assert q.shift is None
    else:
        assert q.shift.dtype == jnp.float32
        np.testing.assert_array_equal(q.shift, offset)
    return q


@pytest.mark.parametrize(
    ("quantizer", "format", "axis"),
    [(jitted, format, axis) for format in FORMATS for axis in (0, 1, None)]
    + [(quantize, "e2m1", 1), (quantize, "e5m2", 0)],
)
def test_codes_and_scales_are_the_oracles(quantizer, format, axis):
    check(quantizer, gaussian(0, 67, 128) ** 3, axis, format)


@eager_and_jit
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_input_dtype(quantizer, dtype):
    x = (gaussian(1, 13, 31) * 5).astype(DTYPES[dtype])
    check(quantizer, x, 1)


@eager_and_jit
def test_float64_arrays_of_jax(quantizer):
    x = np.random.default_rng(2).normal(size=(7, 12)) * 10.0 ** np.arange(-42, 42, 12)[:, None]
    x[0, 0] = 1e300
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        assert jnp.asarray(x).dtype == jnp.float64
        q = quantizer(jnp.asarray(x), axis=1)
        codes, scale, _ = ref.quantize(x, 1, "e2m1")
        assert q.scale.dtype == jnp.float32
        np.testing.assert_array_equal(q.scale, scale)
        same_bits(q.codes, codes)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((), None),
        ((1,), 0),
        ((1,), None),
        ((1, 1), -1),
        ((37,), -1),
        ((37, 1), 0),
        ((1, 37), 0),
        ((11, 13), -2),
        ((3, 5, 7), 0),
        ((3, 5, 7), 1),
        ((3, 5, 7), -1),
        ((3, 5, 7), None),
    ],
)
def test_shapes_and_axes(shape, axis):
    check(jitted, gaussian(3, *shape), axis)
    if shape:
        check(jitted, gaussian(3, *shape) + 2, axis, shift="midrange")


def test_empty():
    assert quantize(np.zeros((0, 4), np.float32), 1).scale.shape == (0, 1)
    q = quantize(np.zeros((3, 0), np.float32), 1)
    assert q.codes.shape == (3, 0)
    np.testing.assert_array_equal(q.scale, np.full((3, 1), FORMATS["e2m1"].min_scale))


SPECIAL_ROWS = {
    "zeros": [0, -0.0, 0, 0],
    "one element": [0, 0, -3, 0],
    "subnormal": [1e-40, -1e-44, 0, TINY * 0.99],
    "least normal": [TINY, -TINY, 0, 1e-44],
    "half a step": [2 * TINY, -1.0001 * TINY, TINY, 3 * TINY],
    "small": [1e-30, -2e-31, 3e-32, 0],
    "large": [1e30, -2e29, 3e28, 1],
    "below the bound": [np.nextafter(np.float32(2.0**126), np.float32(0)), -(2.0**125), 1, 0],
    "at the bound": [2.0**126, 1, 0, 0],
    "largest": [TOP, -1, 1, 0],
    "NaN": [np.nan, 1, 2, 3],
    "infinity": [1, np.inf, 2, 3],
    "minus infinity": [1, 2, -np.inf, 3],
    "ties": [6, 5, -2.5, 0.25],
}


@pytest.mark.parametrize(
    ("quantizer", "format", "shift"),
    [(jitted, format, shift) for format in FORMATS for shift in (None, "midrange")]
    + [(quantize, "e2m1", None), (quantize, "e5m2", "midrange")],
)
def test_special_rows(quantizer, format, shift):
    x = np.float32(list(SPECIAL_ROWS.values()))
    q = check(quantizer, x, 1, format, shift)
    broken = [name for name, s in zip(SPECIAL_ROWS, q.scale[:, 0], strict=True) if np.isnan(s)]
    expected = ["at the bound", "largest", "NaN", "infinity", "minus infinity"]
    assert broken == (expected if shift is None else expected[1:])  # of half the magnitude
    assert np.all(np.asarray(q.scale)[~np.isnan(q.scale)] >= FORMATS[format].min_scale)
    assert np.all(np.isnan(q.dequantize())[np.isnan(q.scale[:, 0])])
    check(quantizer, x.T.copy(), 0, format, shift)


def test_a_broken_element_breaks_a_tensor_wide_scale():
    x = gaussian(4, 4, 5)
    x[2, 3] = np.nan
    q = check(jitted, x, None)
    assert np.isnan(q.scale[0, 0]) and not np.any(np.asarray(q.codes, np.float32))


@pytest.mark.parametrize("shift", [None, "midrange"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_nan_is_found_in_tensors_large_enough_for_vector_code(axis, shift):
    x = np.random.default_rng(0).normal(size=(300, 640)).astype(np.float32)
    x[3, 5], x[200, 639] = np.nan, np.nan
    q = jax.jit(lambda x: quantize(x, axis, shift=shift))(x)
    lines = np.flatnonzero(np.isnan(q.scale))
    np.testing.assert_array_equal(lines, [3, 200] if axis == 1 else [5, 639])
    if shift:
        np.testing.assert_array_equal(np.isnan(q.shift), np.isnan(q.scale))


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=24, max_size=24))
@pytest.mark.parametrize("shift", [None, "midrange"])
@pytest.mark.parametrize("format", ["e2m1", "e5m2"])
def test_any_float32_patterns(bits, format, shift):
    with np.errstate(invalid="ignore"):
        check(jitted, np.array(bits, np.uint32).view(np.float32).reshape(6, 4), 1, format, shift)


@given(exponents=st.lists(st.integers(-130, 127), min_size=6, max_size=6), seed=st.integers(0, 99))
@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_every_magnitude(exponents, seed, format):
    x = gaussian(seed, 6, 4).astype(np.float64) * 2.0 ** np.array(exponents)[:, None]
    with np.errstate(over="ignore"):
        check(jitted, x.astype(np.float32), 1, format)


# ---------------------------------------------------------------------------------- shifts


@pytest.mark.parametrize("axis", [0, 1, None])
def test_midrange_is_exact(axis):
    q = check(jitted, gaussian(5, 33, 20) ** 2, axis, shift="midrange")
    codes = np.asarray(q.codes, np.float32)
    assert np.all(codes.max(axis=axis) == 6) and np.all(codes.min(axis=axis) == -6)


@eager_and_jit
@pytest.mark.parametrize(("shape", "axis"), [((61, 20), -1), ((20, 61), 0), ((3, 21, 20), 2)])
def test_mean_is_within_the_rounding_of_its_sum(quantizer, shape, axis):
    x = gaussian(6, *shape) + 3
    q = quantizer(x, axis=axis, shift="mean")
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    exact = x.astype(np.float64).mean(axis=others, keepdims=True)
    terms = np.abs(x).astype(np.float64).mean(axis=others, keepdims=True)
    assert q.shift.dtype == jnp.float32 and q.shift.shape == exact.shape
    # n - 1 additions in whatever order, the reciprocal of n, and the product with it.
    additions = x.size // exact.size + 1
    assert np.all(np.abs(np.asarray(q.shift) - exact) <= additions * 2.0**-24 * terms)
    # The rest is exact, given the shift.
    codes, scale, _ = ref.quantize(x, axis, "e2m1", np.asarray(q.shift))
    np.testing.assert_array_equal(q.scale, scale)
    same_bits(q.codes, codes)


def test_mean_of_exact_sums_is_exact():
    x = np.round(gaussian(7, 64, 9) * 256) / 256
    check(jitted, x, 1, shift="mean")


@pytest.mark.parametrize("shape", [(1, 9), (16, 1), (1, 1), (16, 9)])
def test_given_shift(shape):
    x, offset = gaussian(8, 16, 9), gaussian(9, *shape)
    q = quantize(x, 1, shift=jnp.asarray(offset))
    codes, scale, used = ref.quantize(x, 1, "e2m1", offset)
    np.testing.assert_array_equal(q.scale, scale)
    np.testing.assert_array_equal(q.shift, used)
    same_bits(q.codes, codes)


def test_a_difference_beyond_float32_is_broken():
    q = quantize(np.float32([[3e38, 1]]), 1, shift=jnp.float32([[-3e38, 0]]))
    assert np.isnan(q.scale[0, 0]) and not np.any(np.asarray(q.codes, np.float32))


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "x", [np.zeros((2, 2), np.int32), jnp.zeros(2, bool), np.zeros(2, np.complex64), [1.0], 1.0]
)
def test_refuses_what_is_not_an_array_of_floats(x):
    with pytest.raises(TypeError, match=r"^x is .*floating"):
        quantize(x, None)


@pytest.mark.parametrize("axis", [2, -3])
def test_refuses_an_axis_that_is_not_there(axis):
    with pytest.raises(ValueError, match=rf"axis={axis} .*\(3, 4\)"):
        quantize(np.zeros((3, 4), np.float32), axis)


def test_refuses_unknown_names_and_shifts_that_do_not_fit():
    x = np.zeros((3, 4), np.float32)
    with pytest.raises(ValueError, match="format='e9m9'"):
        quantize(x, 1, format="e9m9")
    with pytest.raises(ValueError, match="shift='median'"):
        quantize(x, 1, shift="median")
    with pytest.raises(ValueError, match=r"shift='mean' .*axis"):
        quantize(x, None, shift="mean")
    # Larger ones would have stretched x.
    for shape in ((4,), (3, 5), (2, 1), (1, 3, 4)):
        with pytest.raises(ValueError, match=rf"shift has shape {re.escape(str(shape))}; expect"):
            quantize(x[:, :1] if shape == (3, 5) else x, 1, shift=jnp.zeros(shape))
    with pytest.raises(TypeError, match="shift is int32"):
        quantize(x, 1, shift=jnp.zeros((3, 4), jnp.int32))


@pytest.mark.parametrize(("format", "dtype"), [("e2m1", "int8"), ("e4m3", "float8_e5m2")])
def test_refuses_to_carry_codes_in_what_does_not_hold_them(format, dtype):
    with pytest.raises(ValueError, match=f"dtype={dtype} does not hold all codes of {format}"):
        quantize(np.ones((3, 4), np.float32), 1, format=format, dtype=dtype)
