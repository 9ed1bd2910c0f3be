"""Thresholds, clamp and compensation, bit for bit those of the oracle."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jfp4.formats import FORMATS
from jfp4.ops import reference as ref
from jfp4.ops.outliers import (
    clamp,
    order_statistics,
    quantize_compensated,
    sample_stride,
    thresholds,
)
from jfp4.ops.quantize import quantize

FOUR_BITS = ("e2m1", "e1m2", "e3m0", "e2m1b3")

jit_thresholds = functools.partial(jax.jit, static_argnames=("alpha", "sample"))(thresholds)
jit_order_statistics = functools.partial(jax.jit, static_argnums=1)(order_statistics)
jit_compensated = functools.partial(jax.jit, static_argnames=("axis", "format"))(
    quantize_compensated
)
compensators = pytest.mark.parametrize(
    "compensated", [quantize_compensated, jit_compensated], ids=["eager", "jit"]
)


def gaussian(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def same_bits(a, b):
    """Equal values, NaN in the same places, equal signs of zero."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_array_equal(a, b)
    number = ~np.isnan(b)
    np.testing.assert_array_equal(np.signbit(a)[number], np.signbit(b)[number])


def check_thresholds(x, alpha, sample, find=jit_thresholds):
    lo, hi = find(x, alpha=alpha, sample=sample)
    assert lo.dtype == hi.dtype == jnp.float32 and lo.shape == hi.shape == ()
    taken = x if sample is None else ref.sample(x, sample)
    np.testing.assert_array_equal((lo, hi), ref.thresholds(taken, alpha))
    return lo, hi


# ------------------------------------------------------------------------------ thresholds


@pytest.mark.parametrize(
    ("alpha", "sample"),
    [(a, n) for a in (0.501, 0.9, 0.99, 0.999, 1.0) for n in (None, 100)]
    + [(0.9, n) for n in (1, 7, 65536)],
)
def test_thresholds_are_the_oracles(alpha, sample):
    check_thresholds(gaussian(0, 37, 48), alpha, sample)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn"])
@pytest.mark.parametrize("find", [thresholds, jit_thresholds], ids=["eager", "jit"])
def test_thresholds_of_every_dtype(dtype, find):
    x = (gaussian(1, 21, 32) * 3).astype(jnp.dtype(dtype))
    check_thresholds(x, 0.97, None, find)
    check_thresholds(x, 0.97, 200, find)


def test_thresholds_of_float64():
    x = np.random.default_rng(2).normal(size=(21, 32))
    check_thresholds(x, 0.97, None)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        check_thresholds(jnp.asarray(x), 0.97, 200)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3,), (101,), (1, 97), (97, 1), (3, 5, 8)])
def test_thresholds_of_every_shape(shape):
    x = gaussian(3, *shape)
    check_thresholds(x, 0.9, None)
    if shape:
        check_thresholds(x, 0.9, 20)


def test_ranks_are_those_of_the_definition():
    """Of the numbers 0 to 99, 0.99 keeps 1 to 98; a whole product is not rounded up."""
    x = np.random.default_rng(4).permutation(100).astype(np.float32)
    for alpha, lo, hi in (
        (0.99, 1, 98),
        (0.97, 3, 96),
        (0.985, 1, 98),
        (1.0, 0, 99),
        (0.55, 45, 54),
    ):
        assert tuple(map(float, thresholds(x, alpha, sample=None))) == (lo, hi)


def test_ties_and_zeros():
    check_thresholds(np.repeat(np.float32([-2, -1, 0, 1, 2]), 20), 0.9, None)
    check_thresholds(np.full((4, 4), -3, np.float32), 0.99, None)
    assert tuple(map(float, thresholds(np.float32([0, -0.0] * 4), 0.7, sample=None))) == (0, 0)
    check_thresholds(np.round(gaussian(5, 20, 20)), 0.9, None)


def test_infinities_sort_and_a_nan_spoils_both():
    x = gaussian(6, 10, 10)
    x[0, 0], x[1, 1] = np.inf, -np.inf
    assert np.all(np.isfinite(check_thresholds(x, 0.99, None)))
    assert np.all(np.isinf(check_thresholds(x, 1.0, None)))
    for nan in (np.nan, -np.nan):
        x[2, 3] = nan
        assert np.all(np.isnan(check_thresholds(x, 0.9, None)))
    # A NaN that the sample does not meet is left to the scale.
    x[2, 3], x[0, 1] = 0, np.nan
    assert math.gcd(sample_stride(x.shape, 10), 10) == 1 and sample_stride(x.shape, 10) == 9
    assert np.all(np.isfinite(check_thresholds(x, 0.9, 10)))


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=21, max_size=21))
@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_thresholds_of_any_patterns(bits, alpha):
    x = ref.to_float32(np.where(np.isnan(v := np.array(bits, np.uint32).view(np.float32)), 1, v))
    check_thresholds(x, alpha, None)


@given(bits=st.lists(st.integers(0, 2**16 - 1), min_size=33, max_size=33))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_order_statistics_of_any_narrow_patterns(bits, dtype):
    patterns = np.array(bits, np.uint16).view(jnp.dtype(dtype))
    x = np.where(np.isnan(patterns), np.zeros_like(patterns), patterns)
    ranks = (0, 5, 16, 32)
    got = jit_order_statistics(x, ranks)
    assert [float(v) for v in got] == np.sort(x.astype(np.float32))[list(ranks)].tolist()


@pytest.mark.parametrize("shape", [(512, 1024), (100, 48), (64, 6), (33, 30), (7, 7), (1000,)])
@pytest.mark.parametrize("sample", [1, 64, 1000, 65536])
def test_stride_is_the_largest_that_sees_every_column(shape, sample):
    stride, size = sample_stride(shape, sample), math.prod(shape)
    coprime = [s for s in range(1, max(size // sample, 1) + 1) if math.gcd(s, shape[-1]) == 1]
    assert stride == max(coprime)
    if min(sample, size // stride) >= shape[-1]:
        assert len(set(stride * np.arange(shape[-1]) % shape[-1])) == shape[-1]


def test_the_sample_sees_the_one_column_of_outliers():
    for column in range(32):
        x = np.zeros((640, 32), np.float32)
        x[:, column] = 5
        assert jit_thresholds(x, alpha=0.97, sample=1280)[1] == 5


@pytest.mark.parametrize("alpha", [0.5, 0.0, 1.001, -1.0, float("nan")])
def test_refuses_alpha(alpha):
    with pytest.raises(ValueError, match="alpha"):
        thresholds(np.ones(3, np.float32), alpha)


def test_refuses_what_has_no_quantile():
    for sample in (0, 1.5):
        with pytest.raises(ValueError, match=f"sample={sample}; expected a positive integer"):
            thresholds(np.ones(3, np.float32), sample=sample)
    with pytest.raises(ValueError, match=r"x has shape \(0, 4\)"):
        thresholds(np.ones((0, 4), np.float32))
    large = jax.ShapeDtypeStruct((2**21, 2**10), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"sample is None; expected fewer than 2\*\*31 elements"):
        jax.eval_shape(lambda x: thresholds(x, sample=None), large)
    jax.eval_shape(thresholds, large)
    for x in (np.ones(3, np.int8), [1.0]):
        with pytest.raises(TypeError, match="x is"):
            thresholds(x)


# ----------------------------------------------------------------------------------- clamp


@pytest.mark.parametrize(
    ("lo", "hi"),
    [(-1, 0.5), (-np.inf, np.inf), (2, 0), (0.25, 0.75), (np.nan, 1), (-1, np.nan), (-1, 1e30)],
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_clamp_is_the_oracles(lo, hi, wrap):
    x = gaussian(7, 16, 16)
    x[0, :4] = [np.nan, lo, hi, 0]
    if not np.isnan(lo + hi):
        x[1, :2] = [np.inf, -np.inf]
    got = wrap(clamp)(x, jnp.float32(lo), jnp.float32(hi))
    for mine, oracles in zip(
        got, ref.clamp_residual(x, np.float32(lo), np.float32(hi)), strict=True
    ):
        assert mine.dtype == jnp.float32
        np.testing.assert_array_equal(mine, oracles)


@pytest.mark.parametrize(("alpha", "percent"), [(0.999, 0.2), (0.99, 2.0), (0.97, 6.0)])
def test_published_share_of_residuals(alpha, percent):
    x = np.random.default_rng(8).permutation(10000).astype(np.float32) - 3000
    _, residual = clamp(x, *thresholds(x, alpha, sample=None))
    assert 100 * np.mean(np.asarray(residual) != 0) == pytest.approx(percent)


# ---------------------------------------------------------------------------- compensation


def check_compensated(compensated, x, lo, hi, axis, format="e2m1"):
    q = compensated(x, jnp.float32(lo), jnp.float32(hi), axis=axis, format=format)
    codes, scale = ref.compensate(x, np.float32(lo), np.float32(hi), axis, format)
    assert q.format == "e4m3" and q.codes.dtype == jnp.float8_e4m3fn and q.shift is None
    assert q.axis == (None if axis is None else axis % x.ndim)
    np.testing.assert_array_equal(q.scale, scale)
    same_bits(q.codes, codes)
    return q


@pytest.mark.parametrize(
    ("compensated", "format", "axis"),
    [(jit_compensated, format, axis) for format in FOUR_BITS for axis in (1, 0, None)]
    + [(quantize_compensated, "e2m1", 1)],
)
def test_compensated_codes_are_the_oracles(compensated, format, axis):
    x = gaussian(9, 48, 64) ** 3
    lo, hi = ref.thresholds(x, 0.95)
    q = check_compensated(compensated, x, lo, hi, axis, format)
    assert np.any(np.abs(np.asarray(q.codes, np.float32)) > FORMATS[format].max)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_compensation_of_every_dtype(dtype):
    x = np.random.default_rng(10).normal(size=(16, 64)) ** 3
    x = x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    check_compensated(jit_compensated, x, *ref.thresholds(x, 0.95), -1)


@compensators
def test_product_and_difference_are_rounded_apart(compensated):
    """Rows where a fused multiply-add would reach another E4M3 code than two roundings."""
    rng = np.random.default_rng(11)
    hi = rng.uniform(1, 8, 400_000).astype(np.float32)
    scale = hi * np.float32(1 / 6)
    inverse = np.float32(1) / scale
    x = (scale * 8.5).view(np.int32) + rng.integers(-3, 4, hi.size, dtype=np.int32)
    x = x.view(np.float32)
    v = hi * inverse
    apart = 6 + (x * inverse - v)
    fused = 6 + (x.astype(np.float64) * inverse - v).astype(np.float32)
    differs = np.flatnonzero((apart <= 8.5) & (fused > 8.5))[:64]
    assert differs.size == 64
    for i in differs[:4]:
        row = np.float32([[x[i], hi[i], 0, -hi[i]]])
        codes = check_compensated(compensated, row, -hi[i], hi[i], 1).codes
        assert float(codes[0, 0]) == 8


@compensators
def test_saturates_at_448(compensated):
    """A cast to E4M3 would make a NaN of these."""
    x = np.float32([[6, -6, 1000, -1000, 3e37, 449, -0.0, 2.5]])
    q = check_compensated(compensated, x, -6, 6, 1)
    same_bits(q.codes[0], [6, -6, 448, -448, 448, 448, 0, 2])
    assert np.all(np.isfinite(q.dequantize()))


def test_unclamped_is_the_plain_code_in_the_wider_carrier():
    x = gaussian(12, 8, 32)
    q = check_compensated(jit_compensated, x, -np.inf, np.inf, 1)
    np.testing.assert_array_equal(
        np.asarray(q.codes, np.float32), np.asarray(quantize(x, 1).codes, np.float32)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_rows_are_never_plausible(bad):
    x = gaussian(13, 3, 8)
    x[1, 2] = bad
    q = check_compensated(jit_compensated, x, -1, 1, 1)
    assert np.isnan(q.scale[:, 0]).tolist() == [False, True, False]
    assert not np.any(np.asarray(q.codes, np.float32)[1])


@pytest.mark.parametrize(("lo", "hi"), [(np.nan, 1), (-1, np.nan), (np.nan, np.nan)])
def test_nan_thresholds_break_every_row(lo, hi):
    q = check_compensated(jit_compensated, gaussian(14, 3, 8), lo, hi, 1)
    assert np.all(np.isnan(q.scale)) and not np.any(np.asarray(q.codes, np.float32))


def test_extreme_magnitudes():
    x = np.float32([[0, 0, 0], [1e-40, -1e-44, 0], [1e-30, 1, 1e30], [1e36, -1e37, 1], [1, 2, 3]])
    for hi in (0, 1e-40, 1e-30, 1, 1e37):
        check_compensated(jit_compensated, x, -hi, hi, 1)


@pytest.mark.parametrize("format", FOUR_BITS)
@pytest.mark.parametrize("axis", [0, 1])
def test_compensation_about_zero(edges, axis, format):
    x = edges.elements if axis == 1 else edges.elements.T
    for lo, hi in edges.limits:
        check_compensated(jit_compensated, x, lo, hi, axis, format)


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=24, max_size=24), at=st.integers(0, 23))
def test_compensation_of_any_patterns(bits, at):
    v = np.array(bits, np.uint32).view(np.float32)
    v = np.where(np.isnan(v), np.float32(np.nan), v)
    hi = np.nan_to_num(np.abs(ref.to_float32(v)), posinf=1)[at]
    with np.errstate(all="ignore"):
        check_compensated(jit_compensated, v.reshape(6, 4), -hi, hi, 1)


def test_compensated_errors_are_those_of_quantize():
    one = jnp.float32(1)
    with pytest.raises(TypeError, match="x is"):
        quantize_compensated(np.ones((2, 2), int), -one, one, 1)
    with pytest.raises(ValueError, match="axis=2"):
        quantize_compensated(np.ones((2, 2), np.float32), -one, one, 2)
    with pytest.raises(ValueError, match="e9m9"):
        quantize_compensated(np.ones((2, 2), np.float32), -one, one, 1, format="e9m9")


def test_compensated_takes_scalar_thresholds_and_a_four_bit_format_on_every_path():
    x, one = jnp.ones((2, 2)), jnp.float32(1)
    expected = quantize_compensated(x, -one, one, 1)
    for lo in (-1.0, np.float32(-1), jnp.bfloat16(-1)):
        np.testing.assert_array_equal(quantize_compensated(x, lo, one, 1).codes, expected.codes)
    with pytest.raises(ValueError, match=r"lo has shape \(1,\); expected a scalar"):
        quantize_compensated(x, -jnp.ones(1), one, 1)
    with pytest.raises(TypeError, match="hi is int32"):
        quantize_compensated(x, -one, jnp.int32(1), 1)
    with pytest.raises(ValueError, match="format='e4m3'; expected a 4-bit one"):
        quantize_compensated(x, -one, one, 1, format="e4m3")
