"""Sums over codes exactly, then scales, shifts and bias in float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jfp4
from jfp4.formats import FORMATS
from jfp4.ops import ffi
from jfp4.ops import reference as ref
from jfp4.ops.gemm import Slope, code_sums, gemm
from jfp4.ops.outliers import quantize_compensated, thresholds
from jfp4.ops.quantize import quantize
from jfp4.qtensor import PackedQTensor, QTensor

FOUR_BITS = ("e2m1", "e1m2", "e3m0", "e2m1b3")
quantized = functools.partial(jax.jit, static_argnames=("axis", "shift"))(quantize)
eager_and_jit = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])


def gaussian(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def codes_of(seed, shape, format, *, positive=False, scale=None):
    """Every code of the format alike often, and scales that are no powers of two."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(FORMATS[format].grid, shape)
    if not positive:
        codes *= rng.choice([-1, 1], shape)
    scale = np.ones((1, 1)) if scale is None else rng.uniform(0.01, 9, scale)
    return QTensor(
        jnp.asarray(codes.astype(FORMATS[format].dtype)), jnp.float32(scale), None, format, None
    )


def exact_sums(a, b):
    return ref.sums(np.asarray(a.codes, np.float64), np.asarray(b.codes, np.float64))


# ------------------------------------------------------------------------------------ sums


@pytest.mark.parametrize("positive", [False, True], ids=["signed", "one-sided"])
@pytest.mark.parametrize("k", [1, 7, 1024, 16384])
@pytest.mark.parametrize("format", FOUR_BITS)
def test_four_bit_sums_are_exact(format, k, positive):
    """Exact where float32 holds the sum, and else rounded once."""
    a = codes_of(0, (5, k), format, positive=positive)
    b = codes_of(1, (k, 6), format, positive=positive)
    exact = exact_sums(a, b)
    if format != "e3m0":
        assert np.all(exact == exact.astype(np.float32))
    np.testing.assert_array_equal(code_sums(a, b), exact.astype(np.float32))


@pytest.mark.parametrize("fa", FOUR_BITS)
@pytest.mark.parametrize("fb", FOUR_BITS)
def test_every_pair_of_four_bit_formats(fa, fb):
    a, b = codes_of(2, (9, 300), fa), codes_of(3, (300, 11), fb)
    np.testing.assert_array_equal(jax.jit(code_sums)(a, b), exact_sums(a, b))


@pytest.mark.parametrize("fa", FOUR_BITS)
@pytest.mark.parametrize("fb", FOUR_BITS)
def test_the_largest_sums_do_not_overflow(fa, fb):
    """All codes at the maximum, with either sign."""
    k = 16384
    a = np.full((2, k), FORMATS[fa].max) * [[1], [-1]]
    b = np.full((k, 1), FORMATS[fb].max)
    one = jnp.ones((1, 1), jnp.float32)
    qa = QTensor(jnp.asarray(a.astype(FORMATS[fa].dtype)), one, None, fa, None)
    qb = QTensor(jnp.asarray(b.astype(FORMATS[fb].dtype)), one, None, fb, None)
    np.testing.assert_array_equal(code_sums(qa, qb), a @ b)


@pytest.mark.parametrize("k", [64, 4096, 16384])
def test_compensated_sums_are_exact(k):
    x = gaussian(4, 16, k) ** 3
    a = jax.jit(lambda x: quantize_compensated(x, *thresholds(x, 0.97), 1))(x)
    assert np.max(np.abs(np.asarray(a.codes, np.float32))) > 12
    b = quantized(gaussian(5, k, 12), 0)
    np.testing.assert_array_equal(code_sums(a, b), exact_sums(a, b))


def test_saturated_outliers_times_the_largest_weights():
    """448 * 6 is past every int8 lattice."""
    one = jnp.ones((1, 1), jnp.float32)
    a = QTensor(jnp.full((2, 96), 448, jnp.float8_e4m3fn), one, None, "e4m3", None)
    b = QTensor(jnp.full((96, 3), -6, jnp.float8_e4m3fn), one, None, "e2m1", None)
    np.testing.assert_array_equal(code_sums(a, b), np.full((2, 3), -448 * 6 * 96))
    np.testing.assert_array_equal(code_sums(b.T, a.T), np.full((3, 2), -448 * 6 * 96))


@pytest.mark.parametrize("fa", ["e4m3", "e5m2"])
@pytest.mark.parametrize("fb", ["e2m1", "e4m3", "e5m2"])
def test_eight_bit_sums_are_float32_sums_of_exact_products(fa, fb):
    k = 128
    a, b = codes_of(6, (7, k), fa), codes_of(7, (k, 9), fb)
    magnitudes = np.abs(np.asarray(a.codes, np.float64)) @ np.abs(np.asarray(b.codes, np.float64))
    # Each of the k - 1 additions rounds a partial sum, in whatever order.
    assert np.all(np.abs(code_sums(a, b) - exact_sums(a, b)) <= (k - 1) * 2.0**-24 * magnitudes)


def test_carriers_wider_than_a_byte():
    """A gradient's codes may come in bfloat16; the sums are the same."""
    narrow = quantize(gaussian(8, 6, 32), 1, format="e5m2")
    wide = quantize(gaussian(8, 6, 32), 1, format="e5m2", dtype=jnp.bfloat16)
    assert wide.codes.dtype == jnp.bfloat16
    np.testing.assert_array_equal(wide.codes, narrow.codes.astype(jnp.bfloat16))
    b = quantized(gaussian(9, 32, 5), 0)
    np.testing.assert_array_equal(code_sums(wide, b), code_sums(narrow, b))


# ----------------------------------------------------------------------------------- scales


@eager_and_jit
@pytest.mark.parametrize("sa", [(9, 1), (1, 1)])
@pytest.mark.parametrize("sb", [(1, 11), (1, 1)])
@pytest.mark.parametrize("format", ["e2m1", "e3m0"])
def test_scales_take_two_float32_roundings_in_this_order(wrap, sa, sb, format):
    a, b = codes_of(10, (9, 64), format, scale=sa), codes_of(11, (64, 11), format, scale=sb)
    y = wrap(gemm)(a, b)
    assert y.dtype == jnp.float32 and y.shape == (9, 11)
    expected = exact_sums(a, b).astype(np.float32) * np.asarray(a.scale) * np.asarray(b.scale)
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_result_is_cast_once(dtype):
    a, b = codes_of(12, (9, 64), "e2m1", scale=(9, 1)), codes_of(13, (64, 11), "e2m1")
    y = gemm(a, b, out_dtype=dtype)
    assert y.dtype == dtype
    as_numpy = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    np.testing.assert_array_equal(y, np.asarray(gemm(a, b)).astype(as_numpy))


def test_nan_scales_reach_their_own_rows_and_columns():
    x, w = gaussian(14, 4, 16), gaussian(15, 16, 5)
    x[1, 2], w[3, 4] = np.nan, np.inf
    broken = np.isnan(gemm(quantized(x, 1), quantized(w, 0)))
    expected = np.zeros((4, 5), bool)
    expected[1], expected[:, 4] = True, True
    np.testing.assert_array_equal(broken, expected)


# ------------------------------------------------------------------------- shifts and bias


def operand(seed, shape, axis, shift):
    return quantized(gaussian(seed, *shape) + 1, axis, shift=shift)


@pytest.mark.parametrize("a_shift", [None, "midrange", "mean"])
@pytest.mark.parametrize("b_shift", [None, "midrange", "mean"])
def test_shifts_and_bias(a_shift, b_shift):
    k = 48
    a, b = operand(16, (6, k), 1, a_shift), operand(17, (k, 10), 0, b_shift)
    bias = gaussian(18, 10)
    y = jax.jit(gemm)(a, b, bias=bias)
    va, vb = (
        ref.dequantize(np.asarray(q.codes, np.float64), np.asarray(q.scale), q.shift)
        for q in (a, b)
    )
    exact = va @ vb + bias
    # Every term of every float32 sum, whose k roundings and few more hold in any order.
    ma, mb = (
        np.abs(np.asarray(q.codes, np.float64) * q.scale)
        + (0 if q.shift is None else np.abs(np.asarray(q.shift, np.float64)))
        for q in (a, b)
    )
    terms = ma @ mb + np.abs(bias)
    assert np.all(np.abs(y - exact) <= (k + 8) * 2.0**-24 * terms)


def test_a_dropped_shift_term_would_show():
    """The bound above is far under any single term of the expansion."""
    a, b = operand(16, (6, 48), 1, "midrange"), operand(17, (48, 10), 0, "midrange")
    for one, other in (
        (QTensor(a.codes, a.scale, None, a.format, 1), b),
        (a, QTensor(b.codes, b.scale, None, b.format, 0)),
    ):
        assert np.min(np.abs(gemm(a, b) - gemm(one, other))) > 1e-3


def test_bias_is_one_addition():
    a, b = codes_of(19, (9, 64), "e2m1"), codes_of(20, (64, 11), "e2m1")
    bias = gaussian(21, 11)
    np.testing.assert_array_equal(gemm(a, b, bias=bias), np.asarray(gemm(a, b)) + bias)
    narrow = jnp.asarray(bias, jnp.bfloat16)
    expected = np.asarray(gemm(a, b)) + np.asarray(narrow, np.float32)
    np.testing.assert_array_equal(gemm(a, b, bias=narrow), expected)


@pytest.fixture(params=["xla", "host"])
def backend(request):
    """What computes; the host's kernels need the module."""
    if request.param == "host" and (why := ffi.missing("host")):
        pytest.skip(why)
    with jfp4.backend(request.param):
        yield


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("a_shift", [None, "midrange"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_operation_after_the_sums_is_rounded(a_shift, with_bias):
    """In their order, compiled as well: a compiler that fused two would round once for both."""
    a, b = operand(50, (64, 128), 1, a_shift), quantized(gaussian(51, 128, 64), 0)
    bias = gaussian(52, 64) if with_bias else None
    found = jax.jit(gemm)(a, b, bias=bias)
    expected = exact_sums(a, b).astype(np.float32) * np.asarray(a.scale) * np.asarray(b.scale)
    if a_shift:
        columns = np.sum(np.asarray(b.codes, np.float32), axis=0, keepdims=True) * b.scale
        expected = expected + np.asarray(a.shift) * np.asarray(columns)
    np.testing.assert_array_equal(found, expected if bias is None else expected + bias)


@pytest.mark.usefixtures("backend")
def test_no_length_wraps():
    """Of E3M0, whose products have the most lattice units: int32 would hold 524,287 of these."""
    k = 2**19
    a = QTensor(jnp.full((1, k), 16, jnp.float8_e4m3fn), jnp.ones((1, 1)), None, "e3m0", 1)
    assert float(gemm(a, dataclasses.replace(a.T, axis=0))[0, 0]) == 256 * k


def test_packed_operands_and_promotion_change_nothing():
    a, b = quantized(gaussian(26, 4, 33), 1), quantized(gaussian(27, 33, 5), 0)
    packed = PackedQTensor.pack(a), PackedQTensor.pack(b)
    product = jax.jit(gemm, static_argnames="promote")
    expected = product(a, b)
    for x, w in (packed, (a, packed[1]), (packed[0], b)):
        np.testing.assert_array_equal(product(x, w), expected)
        np.testing.assert_array_equal(product(x, w, promote=True), expected)


# ----------------------------------------------------------------------- batches and errors


def test_batches_by_vmap():
    x, w = gaussian(22, 3, 6, 32), gaussian(23, 3, 32, 5)
    one_by_one = [gemm(quantized(p, 1), quantized(q, 0)) for p, q in zip(x, w, strict=True)]
    got = jax.vmap(lambda p, q: gemm(quantized(p, 1), quantized(q, 0)))(x, w)
    np.testing.assert_array_equal(got, np.stack(one_by_one))
    shared = quantized(w[0], 0)
    got = jax.vmap(lambda p: gemm(quantized(p, 1), shared))(x)
    np.testing.assert_array_equal(got, np.stack([gemm(quantized(p, 1), shared) for p in x]))


def test_errors_name_the_operand_and_the_shapes():
    a, b = quantized(gaussian(24, 4, 8), 1), quantized(gaussian(25, 8, 5), 0)
    with pytest.raises(TypeError, match="a is "):
        gemm(gaussian(24, 4, 8), b)
    with pytest.raises(TypeError, match="b is "):
        gemm(a, gaussian(25, 8, 5))
    with pytest.raises(ValueError, match=r"a has shape \(4, 8\) and b \(4, 8\).* 8 and 4"):
        gemm(a, quantized(gaussian(24, 4, 8), 0))
    with pytest.raises(ValueError, match=r"a has codes \(4, 8\) and scale \(1, 8\).*axis 1"):
        gemm(quantized(gaussian(24, 4, 8), 0), b)
    with pytest.raises(ValueError, match=r"b has codes \(8, 5\) and scale \(8, 1\).*axis 0"):
        gemm(a, quantized(gaussian(25, 8, 5), 1))
    with pytest.raises(ValueError, match=r"a has codes \(1, 8\) and scale \(4, 1\).* 1 or 1 "):
        gemm(dataclasses.replace(a, codes=a.codes[:1]), b)
    for shift in (np.ones((4, 8)), np.ones((1, 5)), np.ones(8)):
        of = dataclasses.replace(a, shift=jnp.asarray(shift, jnp.float32))
        with pytest.raises(ValueError, match=r"a has codes \(4, 8\) and shift .*of size 1 along"):
            gemm(of, b)
    with pytest.raises(ValueError, match=r"b has shape \(2, 8, 5\)"):
        gemm(a, quantized(gaussian(25, 2, 8, 5), 1))
    with pytest.raises(
        ValueError, match=r"b has shape \(8, 5\) and is packed along axis 1.*axis 0"
    ):
        gemm(a, PackedQTensor.pack(quantized(gaussian(25, 8, 5), 1)))
    with pytest.raises(ValueError, match=r"bias has shape \(4,\); expected \(5,\)"):
        gemm(a, b, bias=np.zeros(4, np.float32))
    for w, scale in (((1, 5), (1, 5)), ((4, 5), (4, 1)), ((5, 5), (1, 1))):
        slope = Slope(jnp.ones(w), jnp.ones(scale), "e2m1", 5.0, 3.0)
        with pytest.raises(
            ValueError, match=r"slope has a weight .* and a scale .*; expected \(4, 5\)"
        ):
            gemm(a, b, slope=slope)
    with pytest.raises(TypeError, match="bias is complex64"):
        gemm(a, b, bias=np.zeros(5, np.complex64))
