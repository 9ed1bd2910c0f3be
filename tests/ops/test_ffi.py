"""The compiled targets on the CPU: bit for bit the oracle's; their errors; and the choice of path.

What the CUDA targets compute is tested in tests/gpu; the checks of their buffers are these.
"""

import dataclasses
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jfp4
from jfp4.formats import FORMATS
from jfp4.ops import ffi
from jfp4.ops import reference as ref
from jfp4.ops.gemm import gemm
from jfp4.ops.linear import linear, save_codes
from jfp4.ops.outliers import quantize_compensated, quantize_compensated_both, thresholds
from jfp4.ops.quantize import quantize, quantize_both, quantize_gradient
from jfp4.qtensor import PackedQTensor, QTensor
from jfp4.recipe import RECIPES

ELSEWHERE = "" if jax.default_backend() == "cpu" else "runs where JAX_PLATFORMS=cpu"
built = pytest.mark.skipif(
    bool(ffi.missing("host") or ELSEWHERE), reason=ffi.missing("host") or ELSEWHERE
)
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
FOUR_BITS = ("e2m1", "e1m2", "e3m0", "e2m1b3")
SHAPES = [(1, 1), (1, 129), (127, 1), (64, 64), (65, 130), (127, 129)]
TINY = np.finfo(np.float32).tiny
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_format = pytest.mark.parametrize("format", FORMATS)


def test_the_module_is_built_where_there_is_a_compiler():
    """Elsewhere the tests below are skipped, which nobody should overlook."""
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        pytest.skip("there is no C++ compiler")
    assert ffi.missing("host") == ""


def gaussian(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rough(seed, *shape, dtype="float32"):
    """Heavy tails, rows and columns of zeros, NaN, infinities, subnormals and huge numbers."""
    x = gaussian(seed, *shape) ** 3
    for row, value in ((1, 0), (2, np.nan), (3, np.inf), (4, 1e-40), (5, 1e38), (6, 1e30)):
        if row < shape[0] - 1:
            x[row, shape[1] // 2] = value
        if row in (1, 4) and row < shape[0] - 1:
            x[row] = value
        if row < shape[1] - 1 and value not in (np.nan, np.inf):
            x[:, row] = value
    with np.errstate(over="ignore"):
        return x.astype(DTYPES[dtype])


def same_bits(a, b):
    """Equal values, NaN in the same places, equal signs of zero."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_array_equal(a, b)
    number = ~np.isnan(b)
    np.testing.assert_array_equal(np.signbit(a)[number], np.signbit(b)[number])


# ------------------------------------------------------------------------------------ quantisers

QUANTIZERS = {1: ffi.quantize_rows, 0: ffi.quantize_columns}
by_axis = pytest.mark.parametrize("axis", QUANTIZERS)


def check_quantized(x, axis, format, *, clamp=None):
    """Every layout is the oracle's codes."""
    want = ["codes", "codes_t"]
    if format == "e2m1" and clamp is None:
        want.append("packed")
    outliers = None if clamp is None else tuple(jnp.float32(v) for v in clamp)
    q = QUANTIZERS[axis](jnp.asarray(x), format=format, want=want, outliers=outliers)
    if clamp is None:
        codes, scale, _ = ref.quantize(x, axis, format)
    else:
        codes, scale = ref.compensate(x, *clamp, axis, format)
    carrier = FORMATS[format if clamp is None else "e4m3"].dtype
    assert q.codes.dtype == q.codes_t.dtype == carrier
    np.testing.assert_array_equal(q.scale, scale)
    same_bits(q.codes, codes)
    same_bits(q.codes_t, codes.T)
    if "packed" in want:
        np.testing.assert_array_equal(q.packed, ref.pack(codes if axis == 1 else codes.T, format))
    else:
        assert q.packed is None


@built
@by_shape
@by_axis
@by_format
def test_codes_are_the_oracles(format, axis, shape):
    check_quantized(rough(0, *shape), axis, format)


@built
@by_dtype
@by_axis
@pytest.mark.parametrize("format", ["e2m1", "e5m2"])
def test_codes_of_every_dtype(format, axis, dtype):
    check_quantized(rough(1, 65, 70, dtype=dtype), axis, format)


@built
@by_axis
@by_format
def test_codes_of_every_half(format, axis):
    """All 16-bit patterns, which hold every tie of the narrow formats."""
    for dtype in (ml_dtypes.bfloat16, np.float16):
        patterns = np.arange(2**16, dtype=np.uint16).view(dtype).reshape(256, 256)
        check_quantized(patterns, axis, format)


@built
@by_axis
@pytest.mark.parametrize("format", FOUR_BITS)
def test_compensated_codes_are_the_oracles(format, axis):
    x = rough(2, 97, 66)
    for lo, hi in ((-1.5, 0.75), (-np.inf, np.inf), (2, 1), (0, 0), (np.nan, 1), (-1e-40, 1e-40)):
        clamp = np.float32(lo), np.float32(hi)
        check_quantized(x, axis, format, clamp=clamp)


@built
@by_axis
def test_compensation_about_the_least_normal_number(axis):
    """Where an element, a threshold or a residual is subnormal, and so taken for zero."""
    x = gaussian(36, 64, 65) * (2 * TINY)
    for lo, hi in ((-1.5, 1.25), (-0.75, 0.5), (-3, 2), (1.25, 1.5), (-1.25, -0.5)):
        clamp = np.float32(lo * TINY), np.float32(hi * TINY)
        check_quantized(x, axis, "e2m1", clamp=clamp)


@built
@by_axis
@pytest.mark.parametrize("format", FOUR_BITS)
def test_compensation_about_zero(edges, format, axis):
    x = edges.elements if axis == 1 else edges.elements.T
    for clamp in edges.limits:
        check_quantized(x, axis, format, clamp=clamp)


@built
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=24, max_size=24), at=st.integers(0, 23))
@by_axis
@pytest.mark.parametrize("clamps", [False, True])
def test_codes_of_any_patterns(clamps, axis, bits, at):
    v = np.array(bits, np.uint32).view(np.float32)
    v = np.where(np.isnan(v), np.float32(np.nan), v)
    bound = np.nan_to_num(np.abs(ref.to_float32(v)), posinf=1)[at]
    clamp = (-bound, bound) if clamps else None
    with np.errstate(all="ignore"):
        check_quantized(v.reshape(6, 4), axis, "e2m1", clamp=clamp)


@built
@by_shape
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_gradients_are_the_oracles(format, shape):
    m, n = shape
    dy = rough(3, m, n, dtype="bfloat16")
    columns = np.abs(gaussian(4, 1, n)) + np.float32(0.01)
    rows = np.abs(gaussian(5, m, 1)) + np.float32(0.01)
    operands = jnp.asarray(dy), jnp.asarray(columns), jnp.asarray(rows)
    amax = ffi.gradient_amax(*operands)
    codes, row_scale, codes_t, col_scale = ffi.quantize_gradient(*operands, *amax, format=format)
    with np.errstate(all="ignore"):
        of_rows, of_columns = dy.astype(np.float32) * columns, dy.astype(np.float32) * rows
        by_row = ref.quantize(of_rows, 1, format)
        by_column = ref.quantize(of_columns, 0, format)
    for got, of, axis in zip(amax, (of_rows, of_columns), (1, 0), strict=True):
        # XLA has its threads flush subnormals, which are under every scale's least magnitude.
        largest = np.max(np.abs(of), axis=axis, keepdims=True)
        np.testing.assert_allclose(got, largest, rtol=0, atol=2.0**-126)
    np.testing.assert_array_equal(row_scale, by_row[1])
    np.testing.assert_array_equal(col_scale, by_column[1])
    same_bits(codes, by_row[0])
    same_bits(codes_t, by_column[0].T)


@built
@by_dtype
@pytest.mark.parametrize("alpha", [0.9, 0.99, 1.0])
@pytest.mark.parametrize("sample", [None, 50])
def test_thresholds_are_the_oracles(sample, alpha, dtype):
    x = (gaussian(6, 37, 48) ** 3).astype(DTYPES[dtype])
    taken = x if sample is None else ref.sample(x, sample)
    with jfp4.backend("host"):
        got = thresholds(jnp.asarray(x), alpha, sample=sample)
        np.testing.assert_array_equal(got, ref.thresholds(taken, alpha))
        x.flat[0] = np.nan
        assert np.all(np.isnan(thresholds(jnp.asarray(x), alpha, sample=sample)))


# -------------------------------------------------------------------------------------- products


def codes_of(seed, shape, format, *, scale=None):
    """Every code alike often, and scales that are no powers of two."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(FORMATS[format].grid, shape) * rng.choice([-1, 1], shape)
    scale = np.ones((1, 1)) if scale is None else rng.uniform(0.01, 9, scale)
    return QTensor(
        jnp.asarray(codes.astype(FORMATS[format].dtype)), jnp.float32(scale), None, format, None
    )


def exact_sums(a, b):
    return ref.sums(np.asarray(a.codes, np.float64), np.asarray(b.codes, np.float64))


@built
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (5, 3, 31), (1, 70, 129), (127, 129, 64), (33, 40, 4096)]
)
@pytest.mark.parametrize("fa", FORMATS)
@pytest.mark.parametrize("fb", ["e2m1", "e3m0", "e4m3"])
def test_products_are_exact_sums_scaled_in_order(fa, fb, m, n, k):
    a, b = codes_of(7, (m, k), fa, scale=(m, 1)), codes_of(8, (k, n), fb, scale=(1, n))
    bias = gaussian(9, n)
    with jfp4.backend("host"):
        y = gemm(a, b, bias=jnp.asarray(bias))
    sums = exact_sums(a, b)
    rounding = 0.0
    if fa in ("e4m3", "e5m2") or fb == "e4m3":
        # A rounding an addition, of the sums that float32 does not hold.
        rounding = (
            k
            * 2.0**-24
            * (np.abs(np.asarray(a.codes, np.float64)) @ np.abs(np.asarray(b.codes, np.float64)))
        )
        rounding = rounding * np.asarray(a.scale) * np.asarray(b.scale)
    expected = sums.astype(np.float32) * np.asarray(a.scale) * np.asarray(b.scale) + bias
    ulps = 4 * 2.0**-24 * (np.abs(expected) + np.abs(bias)) * (np.max(rounding) > 0)
    assert np.all(np.abs(y - expected) <= rounding + ulps)


@built
@pytest.mark.parametrize(
    ("fa", "fb", "k"),
    [(fa, fb, 16384) for fa in FOUR_BITS for fb in FOUR_BITS] + [("e3m0", "e3m0", 2**19)],
)
def test_the_largest_sums_do_not_overflow(fa, fb, k):
    """All codes at the maximum, with either sign, but one: the smallest, which sets the lattice."""
    a = np.full((5, k), FORMATS[fa].max) * np.resize([1, -1], (5, 1))
    b = np.full((3, k), FORMATS[fb].max)
    a[:, 0], b[:, 0] = FORMATS[fa].grid[1], FORMATS[fb].grid[1]
    one = jnp.ones((1, 1), jnp.float32)
    codes = (jnp.asarray(v.astype(ml_dtypes.float8_e4m3fn)) for v in (a, b))
    a_codes, b_codes = codes
    y = ffi.gemm(a_codes, one, b_codes, one, out_dtype=jnp.float32)
    np.testing.assert_array_equal(y, (a @ b.T).astype(np.float32))  # rounded once


@built
@pytest.mark.parametrize(("k", "bytes"), [(1, 16), (16, 16), (17, 32)])
def test_rows_of_codes_are_padded_to_what_gpus_copy(k, bytes):
    a, b, one = jnp.ones((3, k)), jnp.ones((5, k)), jnp.ones((1, 1))
    codes = (a.astype(jnp.float8_e4m3fn), one, b.astype(jnp.float8_e4m3fn), one)
    packed = (a.astype(jnp.uint8), one, b.astype(jnp.uint8), one)
    for f, operands, dtype in ((ffi.gemm, codes, "f8E4M3FN"), (ffi.packed_gemm, packed, "ui8")):
        text = jax.jit(functools.partial(f, out_dtype=jnp.float32)).lower(*operands).as_text()
        call = next(line for line in text.splitlines() if "@jfp4" in line)
        assert f"tensor<3x{bytes}x{dtype}>" in call and f"tensor<5x{bytes}x{dtype}>" in call


@built
def test_codes_between_those_of_four_bits():
    """Small E4M3 codes are no multiples of what E2M1's are."""
    codes = ref.grid("e4m3")
    codes = np.random.default_rng(37).choice(codes[codes <= 2], (5, 64))
    a = QTensor(jnp.asarray(codes, jnp.float8_e4m3fn), jnp.ones((1, 1)), None, "e4m3", None)
    b = codes_of(38, (64, 7), "e2m1")
    with jfp4.backend("host"):
        np.testing.assert_array_equal(gemm(a, b), exact_sums(a, b))


@built
@pytest.mark.parametrize("sa", [(9, 1), (1, 1)])
@pytest.mark.parametrize("sb", [(1, 11), (1, 1)])
@by_dtype
def test_products_are_those_of_xla(dtype, sa, sb):
    a, b = codes_of(10, (9, 64), "e2m1", scale=sa), codes_of(11, (64, 11), "e2m1", scale=sb)
    bias = jnp.asarray(gaussian(12, 11))
    got, expected = both(gemm)(a, b, bias=bias, out_dtype=dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, expected)


def both(f):
    """The function's results by the host path and by XLA's."""

    def run(*args, **kwargs):
        for name in ("host", "xla"):
            with jfp4.backend(name):
                yield f(*args, **kwargs)

    return run


@built
def test_results_are_rounded_as_casts_are():
    """Every magnitude, the infinities and NaN, through the scale of a one by one product."""
    scales = np.concatenate(
        [
            np.ldexp(1 + np.arange(64) / 64 + d, e)
            for e in (-149, -133, -126, -25, -24, -15, -14, 0, 15, 127)
            for d in (0, 2.0**-9, 2.0**-12 + 2.0**-20)
        ]
        + [[np.nan, np.inf, 65519, 65520, 3.4e38]]
    )
    with np.errstate(over="ignore"):
        scales = scales.astype(np.float32)
    every_bit = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)  # NaNs
    scales = np.concatenate([scales, every_bit])[:, None]
    ones = jnp.ones((len(scales), 1), jnp.float8_e4m3fn)
    one = jnp.ones((1, 1), jnp.float32)
    for dtype in DTYPES.values():
        y = ffi.gemm(ones, jnp.asarray(scales), ones[:1], one, out_dtype=dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = scales.astype(dtype)
        normal = ~(np.abs(scales) < TINY)  # others may be flushed before they are cast
        same_bits(np.asarray(y)[normal], expected[normal])


@built
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_rank_terms_and_bias(rank):
    m, n, k = 7, 9, 40
    a, b = codes_of(13, (m, k), "e2m1"), codes_of(14, (k, n), "e2m1")
    u, v, bias = gaussian(15, m, rank), gaussian(16, rank, n), gaussian(17, n)
    y = ffi.gemm(
        a.codes,
        a.scale,
        b.codes.T,
        b.scale,
        u=jnp.asarray(u),
        v=jnp.asarray(v),
        bias=jnp.asarray(bias),
        out_dtype=jnp.float32,
    )
    expected = exact_sums(a, b).astype(np.float32)
    for r in range(rank):
        expected = expected + u[:, r : r + 1] * v[r : r + 1]
    np.testing.assert_array_equal(y, expected + bias)


@built
@pytest.mark.parametrize("path", ["host", "xla"])
def test_terms_of_two_shifts_are_added_in_turn(path):
    a, b = codes_of(18, (24, 40), "e2m1"), codes_of(19, (40, 9), "e2m1")
    of_a, of_b = gaussian(20, 24, 1), np.rint(8 * gaussian(21, 1, 9)) / 8  # these sum up exactly
    with jfp4.backend(path):
        y = jax.jit(gemm)(
            dataclasses.replace(a, shift=jnp.asarray(of_a)),
            dataclasses.replace(b, shift=jnp.asarray(of_b)),
        )
    columns = np.sum(np.float32(b.codes), axis=0, keepdims=True) + 40 * of_b
    rows = np.sum(np.float32(a.codes), axis=1, keepdims=True)
    sums = exact_sums(a, b).astype(np.float32)
    in_turn = (sums + of_a * columns) + rows * of_b
    assert np.any(in_turn != sums + (of_a * columns + rows * of_b))
    np.testing.assert_array_equal(y, in_turn)


@built
@by_dtype
def test_order_statistics_in_any_order_of_ranks(dtype):
    x = gaussian(19, 3, 40).astype(DTYPES[dtype])
    for ranks in itertools.product((0, 5, 19, 39), repeat=2):
        got = ffi.thresholds(
            jnp.asarray(x), stride=1, count=40, low_rank=ranks[0], high_rank=ranks[1]
        )
        expected = np.sort(x.astype(np.float32), axis=1)[:, ranks].T
        np.testing.assert_array_equal(got, expected)


@built
@pytest.mark.parametrize("k", [1, 2, 31, 64, 129])
@pytest.mark.parametrize("mixed", [False, True], ids=["both packed", "one packed"])
@pytest.mark.parametrize("format", ["e2m1", "e2m1b3"])
def test_packed_products_are_those_of_bytes(k, mixed, format):
    a, b = codes_of(18, (5, k), "e2m1", scale=(5, 1)), codes_of(19, (k, 7), format, scale=(1, 7))
    pack = jax.jit(PackedQTensor.pack, static_argnums=1)
    product = jax.jit(functools.partial(gemm, out_dtype=jnp.bfloat16))
    bias = jnp.asarray(gaussian(20, 7))
    expected = product(a, b, bias=bias)
    for got in both(product)(a if mixed else pack(a, 1), pack(b, 0), bias=bias):
        np.testing.assert_array_equal(got, expected)


@built
def test_two_operands_in_e5m2_are_xlas_to_multiply():
    a, b = codes_of(21, (3, 16), "e5m2"), codes_of(22, (16, 4), "e5m2")
    np.testing.assert_array_equal(*both(gemm)(a, b))


# ----------------------------------------------------------------------------------- the ops' layer


def leaves_agree(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert g.dtype == e.dtype and g.shape == e.shape
        same_bits(g, e)


@built
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("shape", "axis"), [((13, 30), 1), ((13, 30), 0), ((3, 5, 8), 2), ((3, 5, 8), 1)]
)
def test_quantizers_are_those_of_xla(shape, axis, wrap):
    x = jnp.asarray(gaussian(23, *shape), jnp.bfloat16)
    lo, hi = jnp.float32(-1), jnp.float32(0.8)
    functions = [
        lambda x: quantize(x, axis),
        lambda x: quantize(x, axis, format="e5m2", shift="midrange"),
        lambda x: quantize_compensated(x, lo, hi, axis),
    ]
    if x.ndim == 2:
        functions += [
            lambda x: quantize_both(x, axis),
            lambda x: quantize_compensated_both(x, lo, hi, axis),
            lambda x: thresholds(x, 0.9),
        ]
    for f in functions:
        leaves_agree(*both(wrap(f))(x))


@built
def test_both_layouts_are_a_tensor_and_its_transpose():
    x = jnp.asarray(gaussian(24, 13, 30))
    in_both, in_one = (
        jax.jit(functools.partial(f, shift="midrange"), static_argnums=1)
        for f in (quantize_both, quantize)
    )
    for name in ("host", "xla"):
        with jfp4.backend(name):
            for axis in (0, 1, None):
                q, q_t = in_both(x, axis)
                leaves_agree(q, in_one(x, axis))
                leaves_agree(q_t, q.T)


@built
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (5,), ()], ids=str)
def test_what_kernels_do_not_take_is_xlas(shape):
    x = jnp.asarray(gaussian(25, *shape))
    compiled = jax.jit(quantize, static_argnums=1)
    leaves_agree(*both(compiled)(x, -1 if shape else None))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = jnp.ones((3, 4), jnp.float64)
        leaves_agree(*both(compiled)(wide, 1))


@built
def test_gradients_come_in_bytes_where_a_kernel_serves():
    dy = jnp.asarray(gaussian(26, 12, 20), jnp.bfloat16)
    columns, rows = jnp.asarray(np.abs(gaussian(27, 1, 20))), jnp.ones((1, 1), jnp.float32)
    (row, column), (row_x, column_x) = both(quantize_gradient)(dy, columns, rows, format="e5m2")
    assert row.codes.dtype == column.codes.dtype == jnp.float8_e5m2
    assert row_x.codes.dtype == column_x.codes.dtype == jnp.bfloat16
    for got, expected in ((row, row_x), (column, column_x)):
        np.testing.assert_array_equal(got.scale, expected.scale)
        same_bits(got.codes, expected.codes)
        assert (got.format, got.axis) == (expected.format, expected.axis)


M, K, N = 32, 48, 40
X, W, DY = gaussian(28, M, K), gaussian(29, K, N), gaussian(30, M, N)


def loss(x, w, recipe="fp4"):
    return jnp.sum(jnp.tanh(linear(jnp.sin(x), w, recipe)) * DY)


@built
@pytest.mark.parametrize("recipe", [name for name in RECIPES if RECIPES[name].quantizes])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_is_that_of_xla(recipe, dtype):
    x = jnp.asarray(X, dtype)
    f = jax.jit(
        jax.value_and_grad(
            lambda x, w: linear(x, w, recipe).astype(jnp.float32).sum(), argnums=(0, 1)
        )
    )
    (y, (dx, dw)), (y_x, (dx_x, dw_x)) = both(f)(x, jnp.asarray(W))
    # E2M1 sums are exact; sums of products of 8-bit codes may round differently.
    np.testing.assert_allclose(y, y_x, rtol=1e-5)
    for got, expected in ((dx, dx_x), (dw, dw_x)):
        assert got.dtype == expected.dtype
        eps = float(jnp.finfo(expected.dtype).eps)
        np.testing.assert_allclose(
            np.float64(got), np.float64(expected), rtol=2 * eps, atol=2 * eps * np.std(expected)
        )


def custom_calls(f, *args):
    """How often each target is called in the compiled program."""
    text = jax.jit(f).lower(*args).compile().as_text()
    found = re.findall(r'custom_call_target="(jfp4_\w+)"', text)
    return {name: found.count(name) for name in sorted(set(found))}


@built
def test_save_codes_recomputes_neither_quantiser_nor_product():
    """In a scan, where forward and backward are loops of their own and nothing is shared."""

    def calls(**checkpoint):
        def layer(x, w):
            return jnp.tanh(linear(x, w, "fp4")), None

        if checkpoint:
            layer = jax.checkpoint(layer, prevent_cse=False, **checkpoint)
        return custom_calls(jax.grad(lambda w: jnp.sum(jax.lax.scan(layer, X, w)[0])), stack)

    stack = jnp.asarray(gaussian(35, 3, K, K))
    with jfp4.backend("host"):
        plain, saved, everything = calls(), calls(policy=save_codes), calls(policy=None)
    assert (
        plain
        == saved
        == {
            "jfp4_gemm": 3,
            "jfp4_gradient_amax": 1,
            "jfp4_quantize_columns": 1,
            "jfp4_quantize_gradient": 1,
            "jfp4_quantize_rows": 1,
            "jfp4_thresholds": 1,
        }
    )
    assert everything == {
        "jfp4_gemm": 4,
        "jfp4_gradient_amax": 1,
        "jfp4_quantize_columns": 2,
        "jfp4_quantize_gradient": 1,
        "jfp4_quantize_rows": 2,
        "jfp4_thresholds": 2,
    }


@built
def test_a_layer_that_is_not_differentiated_writes_one_layout_of_each():
    with jfp4.backend("host"):
        text = jax.jit(lambda x, w: linear(x, w, "fp4_cast")).lower(X, W).as_text()
    rows, columns = (
        next(line for line in text.splitlines() if f"@jfp4_quantize_{name}" in line)
        for name in ("rows", "columns")
    )
    assert rows.endswith(
        f"(tensor<{M}x{K}xf8E4M3FN>, tensor<{K}x0xf8E4M3FN>, tensor<{M}x0xui8>, tensor<{M}x1xf32>)"
    )
    assert columns.endswith(
        f"(tensor<{K}x0xf8E4M3FN>, tensor<{N}x{K}xf8E4M3FN>, "
        f"tensor<{N}x0xui8>, tensor<1x{N}xf32>, tensor<{N}xf32>)"
    )


# ----------------------------------------------------------------------------------- transforms


@built
def test_vmap_is_a_loop():
    x, w = gaussian(31, 3, 6, 32), gaussian(32, 3, 32, 5)
    functions = [
        lambda x, w: quantize(x, 1),
        lambda x, w: quantize(w, 0),
        lambda x, w: quantize_both(x, 1),
        lambda x, w: quantize_compensated(x, *thresholds(x, 0.9), 1),
        lambda x, w: thresholds(x, 0.9),
        lambda x, w: gemm(quantize(x, 1), quantize(w, 0, shift="midrange"), bias=w[0]),
        lambda x, w: gemm(PackedQTensor.pack(quantize(x, 1)), PackedQTensor.pack(quantize(w, 0))),
        lambda x, w: linear(x, w, "fp4"),
        lambda x, w: jax.grad(lambda x, w: jnp.sum(linear(x, w, "fp4") ** 2), (0, 1))(x, w),
    ]
    with jfp4.backend("host"):
        for f in functions:
            f = jax.jit(f)
            one_by_one = [f(jnp.asarray(p), jnp.asarray(q)) for p, q in zip(x, w, strict=True)]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)
            leaves_agree(jax.vmap(f)(x, w), stacked)
            shared = [f(jnp.asarray(p), jnp.asarray(w[0])) for p in x]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *shared)
            leaves_agree(jax.vmap(f, in_axes=(0, None))(x, w[0]), stacked)
            twice = jax.vmap(jax.vmap(f))(x[None], w[None])
            leaves_agree(jax.tree.map(lambda leaf: leaf[0], twice), jax.vmap(f)(x, w))


# --------------------------------------------------------------------------------------- errors


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that a target takes; arrays as (dtype, shape)."""

    target: str
    operands: dict
    results: dict
    attributes: dict

    def __call__(self, **changes):
        operands, results, attributes = (
            {name: changes.get(name, value) for name, value in part.items()}
            for part in (self.operands, self.results, self.attributes)
        )
        arrays = [jnp.zeros(shape, dtype) for dtype, shape in operands.values()]
        shapes = [jax.ShapeDtypeStruct(shape, dtype) for dtype, shape in results.values()]
        call = jax.ffi.ffi_call(self.target, shapes)
        return jax.block_until_ready(call(*arrays, **attributes))


F32, BF16, F16, U8 = "float32", "bfloat16", "float16", "uint8"
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
ROWS = Call(
    "jfp4_quantize_rows",
    {
        "x": (BF16, (2, 3, 8)),
        "lo": (F32, (2, 1)),
        "hi": (F32, (2, 1)),
        "amax_floor": (F32, (2, 3)),
    },
    {
        "codes": (E4M3, (2, 3, 8)),
        "codes_t": (E4M3, (2, 8, 3)),
        "packed": (U8, (2, 3, 0)),
        "scale": (F32, (2, 3, 1)),
    },
    {"format": np.int32(0)},
)
COLUMNS = Call(
    "jfp4_quantize_columns",
    {"x": (F32, (3, 8)), "lo": (F32, (0,)), "hi": (F32, (0,)), "amax_floor": (F32, (8,))},
    {
        "codes": (E4M3, (3, 8)),
        "codes_t": (E4M3, (8, 3)),
        "packed_t": (U8, (8, 2)),
        "scale": (F32, (1, 8)),
        "amax": (F32, (8,)),
    },
    {"format": np.int32(0)},
)
GRADIENT_AMAX = Call(
    "jfp4_gradient_amax",
    {"dy": (BF16, (3, 8)), "col_factor": (F32, (1, 8)), "row_factor": (F32, (3, 1))},
    {"row_amax": (F32, (3, 1)), "col_amax": (F32, (1, 8)), "counter": ("uint32", (4,))},
    {},
)
GRADIENT = Call(
    "jfp4_quantize_gradient",
    {
        "dy": (BF16, (3, 8)),
        "col_factor": (F32, (1, 8)),
        "row_factor": (F32, (3, 1)),
        "row_amax": (F32, (3, 1)),
        "col_amax": (F32, (1, 8)),
    },
    {
        "codes": (E5M2, (3, 8)),
        "row_scale": (F32, (3, 1)),
        "codes_t": (E5M2, (8, 3)),
        "col_scale": (F32, (1, 8)),
    },
    {"format": np.int32(5)},
)
THRESHOLDS = Call(
    "jfp4_thresholds",
    {"x": (BF16, (2, 20))},
    {"lo": (F32, (2,)), "hi": (F32, (2,))},
    {"stride": 3, "count": 7, "low_rank": 0, "high_rank": 6},
)
GEMM = Call(
    "jfp4_gemm",
    {
        "a": (E4M3, (2, 3, 32)),
        "a_scale": (F32, (2, 3, 1)),
        "b": (E5M2, (2, 5, 32)),
        "b_scale": (F32, (2, 1, 1)),
        "u": (F32, (2, 3, 1)),
        "v": (F32, (2, 1, 5)),
        "bias": (F32, (2, 5)),
        "slope_w": (F16, (2, 3, 5)),
        "slope_scale": (F32, (2, 1, 5)),
    },
    {"y": (BF16, (2, 3, 5)), "counter": ("uint32", (2, 4))},
    {"promote": False, "slope_k": np.float32(5), "slope_cap": np.float32(3)},
)
PACKED_GEMM = Call(
    "jfp4_packed_gemm",
    {
        "a": (U8, (3, 16)),
        "a_scale": (F32, (1, 1)),
        "b": (U8, (5, 16)),
        "b_scale": (F32, (1, 5)),
        "bias": (F32, (0,)),
    },
    {"y": (BF16, (3, 5))},
    {},
)
RMS_NORM = Call(
    "jfp4_rms_norm",
    {"x": (BF16, (2, 3, 8)), "added": (BF16, (2, 3, 8)), "scale": (F32, (2, 8))},
    {"sum": (BF16, (2, 3, 8)), "y": (BF16, (2, 3, 8))},
    {"epsilon": np.float32(1e-5)},
)
RMS_NORM_GRADIENT = Call(
    "jfp4_rms_norm_gradient",
    {"x": (F16, (3, 8)), "scale": (F32, (8,)), "dy": (F16, (3, 8)), "dsum": (F16, (3, 8))},
    {"dx": (F16, (3, 8)), "dscale": (F32, (2, 8))},
    {"epsilon": np.float32(1e-5)},
)
CALLS = [
    ROWS,
    COLUMNS,
    GRADIENT_AMAX,
    GRADIENT,
    THRESHOLDS,
    GEMM,
    PACKED_GEMM,
    RMS_NORM,
    RMS_NORM_GRADIENT,
]

MISTAKES = [
    (ROWS, {"x": ("int8", (2, 3, 8))}, "x is another type[2, 3, 8]; expected bf16, f16 or f32"),
    (ROWS, {"x": (BF16, (8,))}, "x is bf16[8]; expected at least 2 dimensions"),
    (ROWS, {"x": (BF16, (2, 0, 8))}, "x is bf16[2, 0, 8]; expected no empty dimension"),
    (ROWS, {"lo": (F32, (1, 1))}, "lo is f32[1, 1]; expected f32[2, 1], beside x bf16[2, 3, 8]"),
    (ROWS, {"hi": (BF16, (2, 1))}, "hi is bf16[2, 1]; expected f32[2, 1], beside x bf16[2, 3, 8]"),
    (ROWS, {"hi": (F32, (2, 0))}, "lo is f32[2, 1] and hi f32[2, 0]; expected both or neither"),
    (ROWS, {"amax_floor": (F32, (2, 8))}, "amax_floor is f32[2, 8]; expected f32[2, 3], beside x"),
    (ROWS, {"codes": (E5M2, (2, 3, 8))}, "codes is f8e5m2[2, 3, 8]; expected f8e4m3fn[2, 3, 8]"),
    (ROWS, {"codes_t": (E4M3, (2, 3, 8))}, "codes_t is f8e4m3fn[2, 3, 8]; expected f8e4m3fn[2, 8"),
    (ROWS, {"packed": (U8, (2, 3, 4))}, "packed is present; expected format E2M1 without lo"),
    (ROWS, {"packed": (U8, (2, 4, 0))}, "packed is u8[2, 4, 0]; expected u8[2, 3, 0]"),
    (ROWS, {"scale": (F32, (2, 3))}, "scale is f32[2, 3]; expected f32[2, 3, 1]"),
    (ROWS, {"format": np.int32(6)}, "format is 6; expected 0 to 5"),
    (ROWS, {"format": np.int32(4)}, "lo and hi are present; expected neither, or a 4-bit format"),
    (COLUMNS, {"x": (F32, (0, 8))}, "x is f32[0, 8]; expected no empty dimension"),
    (COLUMNS, {"amax_floor": (F32, (3,))}, "amax_floor is f32[3]; expected f32[8], beside x f32"),
    (COLUMNS, {"codes": (E4M3, (8, 3))}, "codes is f8e4m3fn[8, 3]; expected f8e4m3fn[3, 8]"),
    (COLUMNS, {"codes_t": (U8, (8, 3))}, "codes_t is u8[8, 3]; expected f8e4m3fn[8, 3], beside x"),
    (COLUMNS, {"packed_t": (U8, (8, 1))}, "packed_t is u8[8, 1]; expected u8[8, 2], beside x f32"),
    (COLUMNS, {"format": np.int32(1)}, "packed_t is present; expected format E2M1 without lo"),
    (COLUMNS, {"scale": (F32, (8, 1))}, "scale is f32[8, 1]; expected f32[1, 8]"),
    (COLUMNS, {"amax": (F32, (3,))}, "amax is f32[3]; expected f32[8]"),
    (GRADIENT, {"dy": (E5M2, (3, 8))}, "dy is f8e5m2[3, 8]; expected bf16, f16 or f32"),
    (GRADIENT, {"col_factor": (F32, (8,))}, "col_factor is f32[8]; expected f32[1, 8], beside dy"),
    (GRADIENT, {"row_factor": (F32, (1, 1))}, "row_factor is f32[1, 1]; expected f32[3, 1]"),
    (GRADIENT_AMAX, {"dy": (U8, (3, 8))}, "dy is u8[3, 8]; expected bf16, f16 or f32"),
    (GRADIENT_AMAX, {"col_factor": (F32, (1, 1))}, "col_factor is f32[1, 1]; expected f32[1, 8]"),
    (GRADIENT_AMAX, {"row_factor": (F32, (3,))}, "row_factor is f32[3]; expected f32[3, 1]"),
    (GRADIENT_AMAX, {"row_amax": (F32, (8,))}, "row_amax is f32[8]; expected f32[3, 1], beside dy"),
    (GRADIENT_AMAX, {"col_amax": (F32, (8,))}, "col_amax is f32[8]; expected f32[1, 8], beside dy"),
    (GRADIENT_AMAX, {"counter": ("uint32", (3,))}, "counter is u32[3]; expected u32[4], beside dy"),
    (GRADIENT, {"codes": (E5M2, (3, 0))}, "codes is f8e5m2[3, 0]; expected f8e5m2[3, 8]"),
    (GRADIENT, {"row_scale": (BF16, (3, 1))}, "row_scale is bf16[3, 1]; expected f32[3, 1]"),
    (GRADIENT, {"codes_t": (E5M2, (3, 8))}, "codes_t is f8e5m2[3, 8]; expected f8e5m2[8, 3]"),
    (GRADIENT, {"col_scale": (F32, (8,))}, "col_scale is f32[8]; expected f32[1, 8]"),
    (GRADIENT, {"row_amax": (F32, (3,))}, "row_amax is f32[3]; expected f32[3, 1], beside dy bf16"),
    (GRADIENT, {"col_amax": (F32, (3,))}, "col_amax is f32[3]; expected f32[1, 8], beside dy bf16"),
    (GRADIENT, {"format": np.int32(-1)}, "format is -1; expected 0 to 5"),
    (THRESHOLDS, {"x": (U8, (2, 20))}, "x is u8[2, 20]; expected bf16, f16 or f32"),
    (THRESHOLDS, {"x": (BF16, ())}, "x is bf16[]; expected at least 1 dimensions"),
    (THRESHOLDS, {"lo": (F32, ())}, "lo is f32[]; expected f32[2], beside x bf16[2, 20]"),
    (THRESHOLDS, {"hi": (BF16, (2,))}, "hi is bf16[2]; expected f32[2]"),
    (
        THRESHOLDS,
        {"stride": 4},
        "stride is 4 and count 7; expected positive numbers that stay in x",
    ),
    (THRESHOLDS, {"stride": 0}, "stride is 0 and count 7; expected positive"),
    (THRESHOLDS, {"count": 0}, "stride is 3 and count 0; expected positive"),
    (THRESHOLDS, {"count": 2**32}, "count is 4294967296; expected at most 4294967295"),
    (THRESHOLDS, {"low_rank": -1}, "low_rank is -1 and high_rank 6; expected 0 to count - 1, 6"),
    (THRESHOLDS, {"high_rank": 7}, "low_rank is 0 and high_rank 7; expected 0 to count - 1, 6"),
    (GEMM, {"a": (U8, (2, 3, 32))}, "a is u8[2, 3, 32]; expected f8e4m3fn or f8e5m2"),
    (GEMM, {"a": (E5M2, (2, 3, 32))}, "a and b are both f8e5m2; expected one of them at most"),
    (GEMM, {"a": (E4M3, (32,))}, "a is f8e4m3fn[32]; expected at least 2 dimensions"),
    (GEMM, {"a": (E4M3, (2, 3, 0))}, "a is f8e4m3fn[2, 3, 0]; expected no empty dimension"),
    (GEMM, {"a_scale": (F32, (2, 2, 1))}, "a_scale is f32[2, 2, 1]; expected f32[2, 3, 1], beside"),
    (GEMM, {"b": (E4M3, (2, 5, 16))}, "b is f8e4m3fn[2, 5, 16]; expected f8e4m3fn[2, 5, 32]"),
    (GEMM, {"b": (E4M3, (1, 5, 32))}, "b is f8e4m3fn[1, 5, 32]; expected f8e4m3fn[2, 5, 32]"),
    (GEMM, {"b": (F32, (2, 5, 32))}, "b is f32[2, 5, 32]; expected f8e4m3fn or f8e5m2, beside a"),
    (GEMM, {"b": (E4M3, (5, 32))}, "b is f8e4m3fn[5, 32]; expected 3 dimensions, beside a"),
    (GEMM, {"b": (E4M3, (2, 0, 32))}, "b is f8e4m3fn[2, 0, 32]; expected no empty dimension"),
    (GEMM, {"b_scale": (F32, (2, 5, 1))}, "b_scale is f32[2, 5, 1]; expected f32[2, 1, 1]"),
    (GEMM, {"b_scale": (F32, (2, 1, 3))}, "b_scale is f32[2, 1, 3]; expected f32[2, 1, 5]"),
    (GEMM, {"u": (F32, (3,))}, "u is f32[3]; expected 3 dimensions, beside a"),
    (GEMM, {"u": (F32, (2, 1, 1))}, "u is f32[2, 1, 1]; expected f32[2, 3, 1]"),
    (GEMM, {"v": (F32, (2, 2, 5))}, "v is f32[2, 2, 5]; expected f32[2, 1, 5]"),
    (GEMM, {"bias": (F32, (2, 3))}, "bias is f32[2, 3]; expected f32[2, 5]"),
    (GEMM, {"slope_w": (U8, (2, 3, 5))}, "slope_w is u8[2, 3, 5]; expected bf16, f16 or f32"),
    (GEMM, {"slope_w": (F32, (2, 5, 3))}, "slope_w is f32[2, 5, 3]; expected f32[2, 3, 5]"),
    (GEMM, {"slope_scale": (F32, (2, 3, 1))}, "slope_scale is f32[2, 3, 1]; expected f32[2, 1, 1]"),
    (GEMM, {"slope_k": np.float32(1)}, "slope_k is 1.000000 and slope_cap 3.000000; expected them"),
    (GEMM, {"slope_cap": np.float32(0)}, "slope_k is 5.000000 and slope_cap 0.000000; expected"),
    (GEMM, {"y": (BF16, (2, 5, 3))}, "y is bf16[2, 5, 3]; expected bf16[2, 3, 5]"),
    (GEMM, {"y": (E4M3, (2, 3, 5))}, "y is f8e4m3fn[2, 3, 5]; expected bf16, f16 or f32"),
    (
        GEMM,
        {"counter": (F32, (2, 4))},
        "counter is f32[2, 4]; expected u32[2, 4], beside a f8e4m3fn",
    ),
    (PACKED_GEMM, {"a": (E4M3, (3, 16))}, "a is f8e4m3fn[3, 16]; expected u8[3, 16]"),
    (PACKED_GEMM, {"a_scale": (F32, (2, 1))}, "a_scale is f32[2, 1]; expected f32[3, 1]"),
    (PACKED_GEMM, {"b": (U8, (5, 8))}, "b is u8[5, 8]; expected u8[5, 16], beside a u8[3, 16]"),
    (PACKED_GEMM, {"b_scale": (F32, (5, 1))}, "b_scale is f32[5, 1]; expected f32[1, 1]"),
    (PACKED_GEMM, {"bias": (BF16, (5,))}, "bias is bf16[5]; expected f32[5], beside a u8[3, 16]"),
    (PACKED_GEMM, {"y": (F32, (5, 3))}, "y is f32[5, 3]; expected f32[3, 5], beside a u8[3, 16]"),
    (RMS_NORM, {"x": (U8, (2, 3, 8))}, "x is u8[2, 3, 8]; expected bf16, f16 or f32"),
    (RMS_NORM, {"x": (BF16, (8,))}, "x is bf16[8]; expected at least 2 dimensions"),
    (RMS_NORM, {"x": (BF16, (2, 3, 8193))}, "x is bf16[2, 3, 8193]; expected at most 8192 columns"),
    (
        RMS_NORM,
        {"added": (F16, (2, 3, 8))},
        "added is f16[2, 3, 8]; expected bf16[2, 3, 8], beside",
    ),
    (RMS_NORM, {"added": (BF16, (2, 3, 0))}, "added is bf16[2, 3, 0] and sum bf16[2, 3, 8]; expec"),
    (RMS_NORM, {"scale": (BF16, (2, 8))}, "scale is bf16[2, 8]; expected f32[2, 8], beside x bf16"),
    (
        RMS_NORM,
        {"sum": (BF16, (2, 8, 3))},
        "sum is bf16[2, 8, 3]; expected bf16[2, 3, 8], beside x",
    ),
    (RMS_NORM, {"y": (F32, (2, 3, 8))}, "y is f32[2, 3, 8]; expected bf16[2, 3, 8], beside x bf16"),
    (RMS_NORM_GRADIENT, {"x": (F16, (8,))}, "x is f16[8]; expected at least 2 dimensions"),
    (RMS_NORM_GRADIENT, {"scale": (F32, (3,))}, "scale is f32[3]; expected f32[8], beside x f16"),
    (RMS_NORM_GRADIENT, {"dy": (F16, (2, 8))}, "dy is f16[2, 8]; expected f16[3, 8], beside x f16"),
    (RMS_NORM_GRADIENT, {"dsum": (F32, (3, 8))}, "dsum is f32[3, 8]; expected f16[3, 8], beside x"),
    (RMS_NORM_GRADIENT, {"dx": (F16, (8, 3))}, "dx is f16[8, 3]; expected f16[3, 8], beside x f16"),
    (RMS_NORM_GRADIENT, {"dscale": (F32, (8,))}, "dscale is f32[8]; expected f32[1, 8], beside x"),
]


@built
@pytest.mark.parametrize("call", CALLS)
def test_the_calls_below_are_right_but_for_their_one_change(call):
    assert len(call()) == len(call.results)


@built
@pytest.mark.parametrize(("call", "change", "message"), MISTAKES)
def test_a_wrong_buffer_is_named_with_both_shapes(call, change, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(message)) as raised:
        call(**change)
    assert "INVALID_ARGUMENT" in str(raised.value)


@built
def test_a_parameter_without_an_axis_is_refused():
    number, none = (F32, ()), (U8, (0,))
    state = {"first": number, "first_exponents": none, "second": number, "second_exponents": none}
    attributes = dict.fromkeys(("b1", "rest1", "b2", "rest2", "eps", "weight_decay", "bound"))
    call = Call(
        "jfp4_adamw",
        {
            "param": number,
            **state,
            "rates": (F32, (6,)),
            "keys": ("uint32", (1, 4)),
            "grad": number,
        },
        {"param": number, **state},
        dict.fromkeys(attributes, np.float32(0.5)) | {"root": True, "stochastic": False},
    )
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"param is f32\[\]; expected at least one"
    ):
        call()


@built
def test_every_operand_and_result_has_a_mistake_above():
    for call in CALLS:
        changed = {name for other, change, _ in MISTAKES if other is call for name in change}
        untested = {*call.operands, *call.results} - changed
        # Those of columns are rows' own.
        assert untested <= ({"lo", "hi"} if call is COLUMNS else set())


# --------------------------------------------------------------------------------- choosing a path


@built
def test_a_context_chooses_and_jit_follows():
    f = jax.jit(lambda x: quantize(x, 1))

    def calls():
        return custom_calls(f, X)

    with jfp4.backend("host"):
        assert calls() == {"jfp4_quantize_rows": 1}
        with jfp4.backend("xla"):
            assert calls() == {}
            assert str(jfp4.backends()).endswith("by xla (asked for)")
        assert calls() == {"jfp4_quantize_rows": 1}
        assert str(jfp4.backends()).endswith("by host (asked for)")
    assert calls() == {}


@built
def test_only_the_branch_that_serves_is_lowered(monkeypatch):
    """Where there are kernels, each platform's program holds its own branch alone."""
    monkeypatch.setattr(ffi, "missing", lambda path: "")
    a, b = codes_of(33, (M, K), "e2m1"), codes_of(34, (K, N), "e2m1")
    traced = jax.jit(lambda a, b: gemm(a, b)).trace(a, b)
    for platform, kernels, products in (("cuda", 1, 0), ("cpu", 0, 1), ("tpu", 0, 1)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert (text.count("@jfp4_gemm"), text.count("dot_general")) == (kernels, products)


@built
def test_a_path_that_was_asked_for_is_not_left_for_another(monkeypatch):
    monkeypatch.setattr(ffi, "missing", lambda path: "")
    with jfp4.backend("cuda"):
        traced = jax.jit(lambda x: quantize(x, 1)).trace(X)
    with pytest.raises(NotImplementedError, match="platform_index"):
        traced.lower(lowering_platforms=("cpu",))


@pytest.mark.parametrize("name", ["gpu", "", None])
def test_unknown_backends_are_refused(name):
    with pytest.raises(ValueError, match="expected one of auto, xla, host, cuda"):
        jfp4.backend(name)


def test_asking_for_cuda_where_there_is_none_says_why():
    if jax.default_backend() != "cpu":
        pytest.skip("there may be a GPU")
    why = ffi.missing("cuda")
    assert "CUDA" in why or "jfp4._kernels" in why
    with jfp4.backend("cuda"):
        for f in (quantize, lambda x, _: thresholds(x), lambda x, _: linear(x, x.T)):
            with pytest.raises(RuntimeError, match=re.escape(f"'cuda', is missing: {why}")):
                f(X, 1)
        with pytest.raises(RuntimeError, match=re.escape(why)):
            jfp4.backends()


def pretend(monkeypatch, module):
    """Makes jfp4._kernels that module, or none."""
    monkeypatch.setitem(sys.modules, "jfp4._kernels", module)
    loaded, why = ffi._load()
    monkeypatch.setattr(ffi, "_module", loaded)
    monkeypatch.setattr(ffi, "_why_no_module", why)
    return why


def test_versions_are_compared_by_number_whatever_follows_it():
    versions = ["0.9.2", "0.10.2", "0.11.0rc1", "0.11.0.dev20260101", "0.11.1+local", "1.0"]
    numbers = [ffi._numbers(version) for version in versions]
    assert numbers == sorted(numbers) and numbers[2] == numbers[3] == [0, 11, 0]


STALE = types.SimpleNamespace(interface=ffi.INTERFACE - 1, jaxlib="0.10.2")
NEWER = types.SimpleNamespace(interface=ffi.INTERFACE, jaxlib="99.1.0")


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (None, "jfp4._kernels is not built; `cmake"),
        (STALE, "jfp4._kernels was built for another version of jfp4; build it again"),
        (NEWER, "jfp4._kernels was built with jaxlib 99.1.0, newer than the "),
    ],
    ids=["none", "stale", "newer"],
)
def test_a_module_that_cannot_be_used_says_why(monkeypatch, module, why):
    assert pretend(monkeypatch, module).startswith(why)
    assert ffi.missing("host").startswith(why) and ffi.missing("cuda").startswith(why)
    monkeypatch.setattr(jax, "default_backend", lambda: "cuda")
    served = jfp4.backends()
    assert all(str(s).startswith(f"xla ({why}") for s in served.operations.values())
    quantize(X, 1)  # by XLA
    with jfp4.backend("host"), pytest.raises(RuntimeError, match=re.escape(why)):
        quantize(X, 1)


def test_a_gpu_of_another_architecture_is_xlas(monkeypatch):
    ampere = types.SimpleNamespace(compute_capability="8.0", device_kind="NVIDIA A100")
    monkeypatch.setattr(ffi, "_module", types.SimpleNamespace())
    monkeypatch.setattr(ffi, "_platforms", frozenset(["cpu", "cuda"]))
    monkeypatch.setattr(jax, "local_devices", lambda backend: [ampere])
    ffi._unfit_devices.cache_clear()
    try:
        assert ffi.missing("cuda") == "NVIDIA A100 has compute capability 8.0, not 9.0"
    finally:
        ffi._unfit_devices.cache_clear()
    monkeypatch.setattr(ffi, "_platforms", frozenset(["cpu"]))
    assert ffi.missing("cuda") == "jfp4._kernels was built without a CUDA compiler (12.5 or newer)"


@pytest.mark.parametrize(
    ("built", "driver", "why"),
    [
        (13010, 13000, ""),
        (12050, 13010, ""),
        (
            13010,
            12080,
            "the driver has CUDA 12.8; expected 13.0 or newer, of kernels built with 13.1",
        ),
        (
            12050,
            12020,
            "the driver has CUDA 12.2; expected 12.3 or newer, of kernels built with 12.5",
        ),
    ],
)
def test_a_driver_older_than_the_kernels_is_xlas(monkeypatch, built, driver, why):
    hopper = types.SimpleNamespace(compute_capability="9.0", device_kind="NVIDIA H200")
    module = types.SimpleNamespace(cuda_versions=lambda: (built, driver))
    monkeypatch.setattr(ffi, "_module", module)
    monkeypatch.setattr(ffi, "_platforms", frozenset(["cpu", "cuda"]))
    monkeypatch.setattr(jax, "local_devices", lambda backend: [hopper])
    caches = ffi._unfit_devices, ffi._old_driver
    for cache in caches:
        cache.cache_clear()
    try:
        assert ffi.missing("cuda") == why
    finally:
        for cache in caches:
            cache.cache_clear()


def test_backends_reads_well():
    served = ffi.Backends(
        "cuda",
        {"quantize": ffi.Served("cuda"), "gemm": ffi.Served("cuda"), "f": ffi.Served("xla", "why")},
    )
    assert str(served) == "on cuda: quantize, gemm by cuda; f by xla (why)"
    assert {"quantize", "thresholds", "gemm", "packed_gemm", "adamw", "rms_norm"} == set(
        jfp4.backends().operations
    )


def run_python(code, **environment):
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {**os.environ, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_environment_sets_the_default():
    code = "import jfp4; print(*{s.path for s in jfp4.backends().operations.values()})"
    done = run_python(code, JFP4_BACKEND="xla")
    assert (done.stdout, done.stderr) == ("xla\n", "")
    done = run_python(code, JFP4_BACKEND="xls")
    assert "ValueError: JFP4_BACKEND='xls'; expected one of auto, xla, host, cuda" in done.stderr
