"""Products of codes: exact where the tensor cores are, within what they keep where they are not."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jfp4
from jfp4.formats import FORMATS
from jfp4.ops import ffi, gemm
from jfp4.ops import reference as ref
from jfp4.qtensor import QTensor

SHAPES = [(1, 1, 1), (1, 127, 129), (129, 255, 127), (257, 16, 100), (300, 5119, 1), (64, 64, 2049)]
U = 2.0**-24


def operand(seed, shape, axis, format="e2m1", *, positive=False):
    """Codes of a Gaussian tensor, or of its magnitude; scales of all sizes."""
    x = np.random.default_rng(seed).normal(size=shape)
    codes, scale, _ = ref.quantize(np.float32(np.abs(x) if positive else x), axis, format)
    return qtensor(codes, scale, axis, format)


def qtensor(codes, scale, axis, format):
    return QTensor(jnp.asarray(codes.astype(FORMATS[format].dtype)), scale, None, format, axis)


def pair(m, k, n, format="e2m1", **options):
    return operand(m, (m, k), 1, format, **options), operand(n + 1000, (k, n), 0, **options)


def exact_sums(a, b):
    return ref.sums(np.asarray(a.codes, np.float64), np.asarray(b.codes, np.float64))


def scaled(sums, a, b, bias=None, dtype=np.float32):
    """The epilogue: float32 operations in this order, and one cast."""
    y = sums.astype(np.float32) * np.asarray(a.scale) * np.asarray(b.scale)
    return (y if bias is None else y + np.float32(bias)).astype(dtype)


# -------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("promote", [False, True], ids=["fast", "promoted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact_at_every_shape(backend, poisoned, shape, promote):
    a, b = pair(*shape)
    for y in poisoned(lambda a, b: jfp4.gemm(a, b, promote=promote), a, b):
        np.testing.assert_array_equal(y, scaled(exact_sums(a, b), a, b))


@pytest.mark.parametrize("promote", [False, True], ids=["fast", "promoted"])
@pytest.mark.parametrize("k", [1024, 4096, 5120, 11008, 13824])
def test_sums_of_gaussian_tensors_are_exact_at_every_length(backend, k, promote):
    a, b = pair(256, k, 384)
    y = jax.jit(lambda a, b: jfp4.gemm(a, b, promote=promote))(a, b)
    np.testing.assert_array_equal(y, scaled(exact_sums(a, b), a, b))


@pytest.mark.parametrize("k", [1024, 5120, 13824])
def test_promoted_sums_are_exact_on_one_sided_data(backend, k):
    a, b = pair(256, k, 384, positive=True)
    y = jax.jit(lambda a, b: jfp4.gemm(a, b, promote=True))(a, b)
    np.testing.assert_array_equal(y, scaled(exact_sums(a, b), a, b))


@pytest.mark.gpu
def test_fast_sums_are_not_exact_on_one_sided_data():
    """Past 4096 quarters are lost: this is what promotion is for."""
    a, b = pair(256, 13824, 384, positive=True)
    exact = exact_sums(a, b)
    assert np.min(exact) > 4096
    with ffi.backend("cuda"):
        y = np.asarray(jax.jit(jfp4.gemm)(a.unscaled(), b.unscaled()))
    assert np.any(y != exact)
    assert np.all(np.abs(y - exact) <= rounding(a, b, promote=False))


@pytest.mark.parametrize(
    "formats", [*itertools.product(["e2m1", "e1m2", "e3m0"], repeat=2)], ids=str
)
def test_every_pair_of_four_bit_formats(backend, formats):
    a = operand(1, (65, 96), 1, formats[0])
    b = operand(2, (96, 80), 0, formats[1])
    y = np.asarray(jax.jit(jfp4.gemm)(a.unscaled(), b.unscaled()), np.float64)
    # E3M0 spans seven binades, so two of its products can be further apart than the 13 bits kept.
    tolerance = rounding(a, b, promote=False) if "e3m0" in formats else 0
    assert np.all(np.abs(y - exact_sums(a, b)) <= tolerance)


# ------------------------------------------------------------------------------ many tiles

LARGE = {
    "narrow": (2304, 512, 1500),
    "medium": (2048, 512, 5120),
    "wide": (2048, 512, 13824),
    "joint": (2048, 11008, 4096),
    "wide, several in turn": (16384, 256, 13824),
    "wide, then narrow": (4096, 512, 4096),
    "wide, then narrow, several in turn": (8192, 256, 11008),
    "edges": (2100, 272, 5272),
}
"""Sizes of which a GPU of 132 multiprocessors takes tiles of each width, and several by a block."""


CUBLAS = {"xla_gpu_enable_triton_gemm": False}
"""Spares XLA the minutes in which it would try its own kernels on a float32 product."""


def codes_on_device(seed, shape, axis):
    """E2M1 codes of a Gaussian tensor that is never on the host, and scales of all sizes."""
    keys = jax.random.split(jax.random.key(seed))
    q = jfp4.quantize(jax.random.normal(keys[0], shape), axis)
    scale = jnp.exp(jax.random.normal(keys[1], q.scale.shape))
    return QTensor(q.codes, scale, None, "e2m1", axis)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", LARGE)
def test_every_width_of_tile_is_exact(size, dtype):
    """Again and again, over poison: what a race leaves out shows."""
    m, k, n = LARGE[size]
    a, b = codes_on_device(m, (m, k), 1), codes_on_device(n, (k, n), 0)

    @functools.partial(jax.jit, compiler_options=CUBLAS)
    def expected(a, b):
        wide = (q.codes.astype(jnp.float32) for q in (a, b))
        sums = jnp.matmul(*wide, precision="highest")  # exact in float32: below 2**22 quarters
        return (sums * a.scale * b.scale).astype(dtype)

    @functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
    def product(poison, a, b):
        with ffi.backend("cuda"):
            return jfp4.gemm(a, b, out_dtype=dtype)

    exact = expected(a, b)
    for _ in range(20):
        y = product(jnp.full((m, n), jnp.nan, dtype), a, b)
        assert int(jnp.sum(y != exact)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", ["narrow", "wide", "edges"])
def test_a_slope_at_every_size(size, dtype):
    """To within what the slope may be off by."""
    m, k, n = LARGE[size]
    a, b = codes_on_device(m, (m, k), 1), codes_on_device(n, (k, n), 0)
    w = jax.random.normal(jax.random.key(3), (m, n), dtype)
    scale = jax.random.uniform(jax.random.key(4), (1, n), jnp.float32, 0.05, 0.5)
    slope = gemm.Slope(w, scale, "e2m1", 5.0, 3.0)
    with ffi.backend("cuda"):
        y = jax.jit(lambda a, b, slope: jfp4.gemm(a, b, slope=slope))(a, b, slope)
        plain = jax.jit(jfp4.gemm)(a, b)  # which the test above holds to exact sums
    v = np.asarray(w, np.float32) * (np.float32(1) / np.asarray(scale))
    exact = np.asarray(plain) * ref.dge_derivative(v, "e2m1", k=5, cap=3)
    # The slope is within 2**-20 of itself; then the product with it is rounded.
    assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= (2.0**-20 + U) * np.abs(exact))


# --------------------------------------------------------------------------- eight-bit codes


def rounding(a, b, *, promote):
    """A bound on the error of sums over 32 products at a time that keep 13 fractional bits.

    Hopper's tensor cores align 32 products and the accumulator to the largest of them, keep 13
    bits below its leading one and drop the rest: less than ``2**-13`` times the largest, for each
    of 33 addends (34, should the hardware take the products in two halves). What came before
    carries over. With promotion, 128 products go through that from zero, and one addition in
    float32 follows; without, the accumulator is the whole sum so far.
    """
    qa, qb = np.asarray(a.codes, np.float64), np.asarray(b.codes, np.float64)
    steps = -(-qa.shape[1] // 32)
    part, error, total, flushed = 0.0, 0.0, 0.0, 0.0
    for i in range(steps):
        a32, b32 = qa[:, 32 * i : 32 * (i + 1)], qb[32 * i : 32 * (i + 1)]
        part = part + a32 @ b32
        largest = np.max(np.abs(a32[:, :, None] * b32[None]), axis=1)
        error = error + 34 * 2.0**-13 * np.maximum(np.abs(part) + error, largest)
        if promote and i % 4 == 3:
            total, flushed = total + part, flushed + error
            flushed = flushed + U * (np.abs(total) + flushed)
            part, error = 0.0, 0.0
    return (flushed + error) * (1 + U)


@pytest.mark.parametrize("promote", [False, True], ids=["fast", "promoted"])
@pytest.mark.parametrize("formats", [("e5m2", "e2m1"), ("e5m2", "e4m3"), ("e4m3", "e4m3")], ids=str)
@pytest.mark.parametrize("swap", [False, True], ids=["as named", "swapped"])
def test_eight_bit_sums_are_within_what_the_tensor_cores_keep(backend, formats, swap, promote):
    m, k, n = 40, 512, 72
    formats = formats[::-1] if swap else formats
    a, b = operand(3, (m, k), 1, formats[0]), operand(4, (k, n), 0, formats[1])
    y = jax.jit(lambda a, b: jfp4.gemm(a, b, promote=promote))(a.unscaled(), b.unscaled())
    exact, bound = exact_sums(a, b), rounding(a, b, promote=promote)
    assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= bound)
    assert np.median(bound) < np.median(np.abs(exact))  # or the line above would say nothing


# ---------------------------------------------------------------------------------- epilogue


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("axes", [(1, 0), (None, 0), (1, None), (None, None)], ids=str)
def test_epilogue_is_float32_in_order(backend, poisoned, axes, with_bias, dtype):
    m, k, n = 130, 192, 258
    a, b = operand(5, (m, k), axes[0]), operand(6, (k, n), axes[1])
    bias = np.random.default_rng(7).normal(size=n).astype(np.float32) if with_bias else None
    as_numpy = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    expected = scaled(exact_sums(a, b), a, b, bias, as_numpy)
    results = poisoned(lambda a, b: jfp4.gemm(a, b, bias=bias, out_dtype=dtype), a, b)
    for y in results:
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("w_axis", [0, None], ids=["by channel", "by tensor"])
@pytest.mark.parametrize("size", [(130, 258), (3, 1), (1, 127), (256, 512)], ids=str)
def test_the_slope_multiplies_before_the_cast(backend, poisoned, size, w_axis, dtype):
    m, n = size
    a, b = pair(m, 160, n)
    random = np.random.default_rng(9)
    w = jnp.asarray(random.normal(size=(m, n)), dtype)
    # Past the format's maximum, and exactly on the grid and its middles, as well.
    scale = np.float32(random.uniform(0.05, 0.5, size=(1, n if w_axis == 0 else 1)))
    w = w.at[0, :].set(jnp.asarray(np.linspace(-8, 8, n) * scale[0], dtype))
    slope = gemm.Slope(w, jnp.asarray(scale), "e2m1", 5.0, 3.0)
    v = np.asarray(w, np.float32) * (np.float32(1) / scale)
    exact = scaled(exact_sums(a, b), a, b) * ref.dge_derivative(v, "e2m1", k=5, cap=3)
    # The slope is within 2**-20 of itself; then one product and one cast are rounded.
    tolerance = (2.0**-20 + U + float(jnp.finfo(dtype).eps) / 2) * np.abs(exact)
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    for y in poisoned(lambda a, b: jfp4.gemm(a, b, slope=slope, out_dtype=dtype), a, b):
        assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= tolerance + tiny)


def test_a_weight_that_is_nan_has_no_slope(backend):
    a, b = pair(16, 64, 24)
    w = jnp.ones((16, 24)).at[3, 5].set(jnp.nan)
    slope = gemm.Slope(w, jnp.ones((1, 24)), "e2m1", 5.0, 3.0)
    y = jax.jit(lambda a, b: jfp4.gemm(a, b, slope=slope))(a, b)
    assert np.argwhere(np.isnan(y)).tolist() == [[3, 5]]


@pytest.mark.parametrize("shifted", ["a", "b", "both"])
def test_shifts_are_rank_one_terms(backend, shifted):
    m, k, n = 70, 160, 90
    x, w = (
        np.random.default_rng(s).normal(size=size) + 1 for s, size in ((8, (m, k)), (9, (k, n)))
    )
    shift = {"a": ("mean", None), "b": (None, "midrange"), "both": ("midrange", "midrange")}
    a = jfp4.quantize(np.float32(x), 1, shift=shift[shifted][0])
    b = jfp4.quantize(np.float32(w), 0, shift=shift[shifted][1])
    y = jax.jit(jfp4.gemm)(a, b)
    qa, qb = (np.asarray(q.codes, np.float64) for q in (a, b))
    exact = ref.matmul(qa, a.scale, qb, b.scale, a.shift, b.shift)
    va, vb = (
        np.abs(np.asarray(q.codes, np.float64) * q.scale)
        + (0 if q.shift is None else np.abs(np.asarray(q.shift, np.float64)))
        for q in (a, b)
    )
    assert np.all(np.abs(y - exact) <= (k + 8) * U * (va @ vb))


def test_a_nan_scale_breaks_its_own_row_or_column(backend):
    a, b = pair(20, 64, 30)
    broken_row = QTensor(a.codes, jnp.asarray(a.scale).at[3].set(jnp.nan), None, a.format, 1)
    broken_column = QTensor(b.codes, jnp.asarray(b.scale).at[0, 5].set(jnp.nan), None, b.format, 0)
    y = np.isnan(jax.jit(jfp4.gemm)(broken_row, broken_column))
    assert np.all(y[3]) and np.all(y[:, 5]) and np.sum(y) == 20 + 30 - 1


def test_batches_by_vmap(backend):
    pairs = [pair(33, 80 + 0 * s, 47) for s in range(3)]
    a, b = (jax.tree.map(lambda *x: jnp.stack(x), *side) for side in zip(*pairs, strict=True))
    batched = jax.jit(jax.vmap(jfp4.gemm))(a, b)
    shared = jax.jit(jax.vmap(jfp4.gemm, in_axes=(0, None)))(a, pairs[0][1])
    for i, (one, other) in enumerate(pairs):
        np.testing.assert_array_equal(batched[i], jfp4.gemm(one, other))
        np.testing.assert_array_equal(shared[i], jfp4.gemm(one, pairs[0][1]))


# ------------------------------------------------------------------------------------ packed


def packed_product(a, b, bias, dtype):
    a_packed, b_packed = jfp4.pack(a.codes), jfp4.pack(b.codes.T)
    bias = bias if bias is None else jnp.asarray(bias)
    return ffi.packed_gemm(a_packed, a.scale, b_packed, b.scale, bias=bias, out_dtype=dtype)


@pytest.mark.parametrize("m", [*range(1, 66), 200])
def test_packed_products_are_exact(backend, poisoned, m):
    k, n = 544, 129
    a, b = pair(m, k, n)
    bias = np.random.default_rng(m).normal(size=n).astype(np.float32)
    for y in poisoned(lambda a, b: packed_product(a, b, bias, "bfloat16"), a, b):
        expected = scaled(exact_sums(a, b), a, b, bias, ml_dtypes.bfloat16)
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("k", [1, 31, 5120, 13824])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_packed_products_of_every_length(backend, poisoned, k, dtype):
    a, b = pair(5, k, 260)
    for y in poisoned(lambda a, b: packed_product(a, b, None, dtype), a, b):
        np.testing.assert_array_equal(y, scaled(exact_sums(a, b), a, b, None, np.dtype(dtype)))
