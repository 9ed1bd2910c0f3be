"""Every output of the quantisers, byte for byte the oracle's, whatever shape and dtype come in."""

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
from jfp4.ops.outliers import quantize_compensated
from jfp4.ops.outliers import thresholds as find_thresholds
from jfp4.ops.quantize import quantize_gradient, reciprocal

SHAPES = [
    (1, 1),
    (1, 5119),
    (5119, 1),
    (127, 129),
    (129, 127),
    (5119, 127),
    (129, 5119),
    (256, 512),
]
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
FOUR_BITS = ("e2m1", "e1m2", "e3m0", "e2m1b3")
LO, HI = np.float32(-1.5), np.float32(2)
OUTLIERS = {"plain": None, "compensated": (LO, HI)}

by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_clamp = pytest.mark.parametrize("clamp", OUTLIERS)
by_axis = pytest.mark.parametrize("axis", [0, 1], ids=["columns", "rows"])


def tensor(shape, dtype, *, broken=True):
    """A Gaussian with outliers, ties and zeros; in larger ones, lines that are not plain numbers.

    The first lines of either axis hold, one each: zeros, subnormals, ties, and, if ``broken``, a
    NaN, an infinity and a magnitude without a scale.
    """
    rng = np.random.default_rng(shape)
    x = rng.normal(size=shape).astype(np.float32) ** 3
    if min(shape) > 100:
        for lines in (x, x.T):
            lines[0], lines[1] = 0, np.float32(1e-40) * np.sign(lines[1])
            lines[2] = np.resize(np.float32([6, 5, -2.5, 0.25, -0.0, 0.75, 3.5]), lines[2].size)
            lines[3, 100] = 500
    if min(shape) > 100 and broken:
        x[10, 50], x[11, 51], x[12, 52] = np.nan, -np.inf, 2.0**126
    with np.errstate(over="ignore"):
        return x.astype(DTYPES[dtype])


def codes_of(x, axis, format, clamp):
    """The oracle's codes, as the bytes that carry them, its scale, and the codes as numbers."""
    if (thresholds := OUTLIERS[clamp]) is None:
        codes, scale, _ = ref.quantize(x, axis, format)
        return codes.astype(FORMATS[format].dtype), scale, codes
    codes, scale = ref.compensate(x, *thresholds, axis, format)
    return codes.astype(FORMATS["e4m3"].dtype), scale, codes


def same_bytes(got, expected):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    np.testing.assert_array_equal(got.view(np.uint8), expected.view(np.uint8))


def same_scale(got, expected):
    assert got.dtype == jnp.float32 and got.shape == expected.shape
    np.testing.assert_array_equal(got, expected)  # NaN equals NaN, of whatever payload


# ------------------------------------------------------------------------- rows and columns


def check(poisoned, axis, x, format, clamp):
    """All layouts at once; columns are packed along themselves, as a product wants them."""
    kernel = ffi.quantize_rows if axis == 1 else ffi.quantize_columns
    thresholds = OUTLIERS[clamp]
    packs = format == "e2m1" and thresholds is None

    def quantized(x):
        return kernel(
            x,
            format=format,
            want=("codes", "codes_t", "packed") if packs else ("codes", "codes_t"),
            outliers=thresholds and tuple(jnp.asarray(t) for t in thresholds),
        )

    codes, scale, numbers = codes_of(x, axis, format, clamp)
    for got in poisoned(quantized, x):
        same_bytes(got.codes, codes)
        same_bytes(got.codes_t, codes.T.copy())
        same_scale(got.scale, scale)
        if packs:
            same_bytes(got.packed, ref.pack(numbers if axis == 1 else numbers.T, format))


@by_axis
@by_shape
@by_clamp
def test_every_shape(backend, poisoned, clamp, shape, axis):
    check(poisoned, axis, tensor(shape, "bfloat16"), "e2m1", clamp)


@by_axis
@by_dtype
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_and_dtype(backend, poisoned, format, dtype, axis):
    check(poisoned, axis, tensor((130, 257), dtype), format, "plain")


@by_axis
@by_dtype
@pytest.mark.parametrize("format", FOUR_BITS)
def test_compensation_of_every_format_and_dtype(backend, poisoned, format, dtype, axis):
    check(poisoned, axis, tensor((130, 257), dtype), format, "compensated")


@by_axis
@pytest.mark.parametrize("format", FOUR_BITS)
def test_neighbours_of_every_boundary(backend, format, axis):
    """Of codes, of the middles between them and of powers of two, at a scale of one."""
    codes = FORMATS[format].grid.astype(np.float32)
    places = np.concatenate([codes, (codes[1:] + codes[:-1]) / 2, np.exp2(np.arange(-6, 5.0))])
    bits = places.astype(np.float32).view(np.int32)[:, None] + np.arange(-8, 9)
    x = np.maximum(bits, 0).astype(np.int32).view(np.float32).ravel()
    x = np.concatenate([x[x <= codes[-1]], -x[x <= codes[-1]]])
    x = np.resize(x, (16, -(-x.size // 16) * 16 + 16))
    x[:, 0] = codes[-1]
    check(lambda f, x: [jax.jit(f)(x)], axis, x if axis == 1 else x.T.copy(), format, "plain")
    assert np.all(ref.scale(x, 1, format) == 1)


@pytest.mark.parametrize("shape", [(27_648 + 1040, 40), (13_824 + 16, 72)], ids=str)
def test_columns_that_are_held_in_part(backend, shape):
    """Of two bytes an element, and of four: what makes room is loaded again."""
    for dtype in ("bfloat16", "float32"):
        x = tensor(shape, dtype)
        check(lambda f, x: [jax.jit(f)(x)], 0, x, "e2m1", "plain")


@pytest.mark.gpu
def test_columns_that_clusters_take_as_they_come_to_them(poisoned):
    """From a counter, which each call begins and clears."""
    x = jnp.asarray(tensor((3344, 4096), "float32"))
    with ffi.backend("xla"):
        expected = jfp4.quantize(x, 0)
    with ffi.backend("cuda"):
        for _ in range(5):
            want = functools.partial(ffi.quantize_columns, format="e2m1", want=("codes", "codes_t"))
            for got in poisoned(want, x):
                same_bytes(got.codes, expected.codes)
                same_bytes(got.codes_t, expected.codes.T)
                same_scale(got.scale, expected.scale)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 4096), (16_384, 1024), (2048, 13_824)], ids=str)
def test_what_begins_early_waits_for_what_it_reads(shape):
    """The second layout's kernel may be there before the first one has ended, and read too soon.

    It would find what the call before has left in its memory, which is another tensor's.
    """

    @jax.jit
    def misplaced(x):
        q = ffi.quantize_rows(x, format="e2m1", want=("codes", "codes_t"))
        codes, codes_t = (jax.lax.bitcast_convert_type(c, jnp.uint8) for c in (q.codes, q.codes_t))
        return jnp.sum(codes_t != codes.T)

    with jfp4.backend("cuda"):
        tensors = [
            jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) for seed in range(4)
        ]
        assert [int(n) for n in [misplaced(x) for x in 3 * tensors]] == [0] * 12


@by_axis
@pytest.mark.parametrize("copies", [2, 1], ids=["fast", "any"])
@pytest.mark.parametrize("format", FOUR_BITS)
def test_compensation_about_zero(backend, edges, format, copies, axis):
    """Fast kernels that transpose take whole groups of 16 rows alone."""
    x = np.tile(edges.elements, (copies, copies))
    x = x if axis == 1 else x.T
    kernel = ffi.quantize_rows if axis == 1 else ffi.quantize_columns
    quantized = jax.jit(functools.partial(kernel, format=format, want=("codes", "codes_t")))
    for lo, hi in edges.limits:
        got = quantized(x, outliers=(jnp.asarray(lo), jnp.asarray(hi)))
        codes, scale = ref.compensate(x, lo, hi, axis, format)
        same_bytes(got.codes, codes.astype(FORMATS["e4m3"].dtype))
        same_bytes(got.codes_t, codes.T.astype(FORMATS["e4m3"].dtype))
        same_scale(got.scale, scale)


@pytest.mark.parametrize("want", ["codes", "codes_t", "packed"])
@pytest.mark.parametrize("kernel", [ffi.quantize_rows, ffi.quantize_columns])
def test_one_layout_alone(backend, poisoned, kernel, want):
    x = tensor((300, 640), "bfloat16")
    every = kernel(x, format="e2m1", want=("codes", "codes_t", "packed"))
    for got in poisoned(lambda x: kernel(x, format="e2m1", want=(want,)), x):
        same_bytes(getattr(got, want), getattr(every, want))
        same_scale(got.scale, np.asarray(every.scale))
        assert sum(part is not None for part in got) == 2


@pytest.mark.parametrize("lo", [np.nan, -np.inf])
def test_thresholds_that_are_no_numbers(backend, lo):
    x = tensor((128, 128), "bfloat16")
    q = jax.jit(quantize_compensated, static_argnames="axis")(x, jnp.float32(lo), HI, axis=1)
    codes, scale = ref.compensate(x, np.float32(lo), HI, 1, "e2m1")
    same_bytes(q.codes, codes.astype(q.codes.dtype))
    same_scale(q.scale, scale)


# ------------------------------------------------------------------------------------ gradients


def check_gradient(poisoned, dy, format):
    rng = np.random.default_rng(1)
    row = rng.uniform(0.01, 3, (dy.shape[0], 1)).astype(np.float32)
    column = rng.uniform(0.01, 3, (1, dy.shape[1])).astype(np.float32)
    wide = ref.to_float32(dy)
    with np.errstate(all="ignore"):
        by_row = ref.quantize(wide * column, 1, format)
        by_column = ref.quantize(wide * row, 0, format)
    carrier = FORMATS[format].dtype

    def kernel(*operands):
        return ffi.quantize_gradient(*operands, *ffi.gradient_amax(*operands), format=format)

    for got in poisoned(kernel, dy, column, row):
        same_bytes(got[0], by_row[0].astype(carrier))
        same_scale(got[1], by_row[1])
        same_bytes(got[2], by_column[0].astype(carrier).T.copy())
        same_scale(got[3], by_column[1])


@by_shape
def test_gradients_of_every_shape(backend, poisoned, shape):
    check_gradient(poisoned, tensor(shape, "bfloat16"), "e5m2")


@by_dtype
@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_gradients_of_every_format_and_dtype(backend, poisoned, format, dtype):
    check_gradient(poisoned, tensor((130, 257), dtype), format)


# ------------------------------------------------------------------------- parts of a tensor


def amax_of(x, axis):
    """The largest magnitudes along an axis, NaN if there is one: what a part hears of the rest."""
    return np.max(np.abs(ref.to_float32(x)), axis=axis, keepdims=True, initial=0)


@by_axis
@by_clamp
@pytest.mark.parametrize("shape", [(256, 512), (130, 258)], ids=["fast", "any"])
def test_parts_that_are_told_of_the_rest(backend, poisoned, shape, clamp, axis):
    """Halves along the axis of a scale, each with the whole's magnitudes: the whole's codes."""
    x = tensor(shape, "bfloat16")
    kernel = ffi.quantize_rows if axis == 1 else ffi.quantize_columns
    thresholds = OUTLIERS[clamp]
    codes, scale, _ = codes_of(x, axis, "e2m1", clamp)
    bounded = x if thresholds is None else ref.clamp_residual(x, *thresholds)[0]

    def quantized(part, floor):
        return kernel(
            part,
            format="e2m1",
            want=("codes", "codes_t"),
            outliers=thresholds and tuple(jnp.asarray(t) for t in thresholds),
            amax_floor=floor,
        )

    floor = amax_of(bounded, axis)
    halves = (np.array_split(a, 2, axis) for a in (x, codes))
    for part, expected in zip(*halves, strict=True):
        for got in poisoned(quantized, part, floor):
            same_bytes(got.codes, expected)
            same_bytes(got.codes_t, expected.T.copy())
            same_scale(got.scale, scale)


@pytest.mark.parametrize("shape", [(256, 512), (130, 258)], ids=["fast", "any"])
@pytest.mark.parametrize("told", [("row",), ("col",), ("row", "col")], ids="-".join)
def test_parts_of_a_gradient(backend, poisoned, told, shape):
    """A quarter of a gradient, told of the rest of its rows, its columns, or both."""
    dy = tensor(shape, "bfloat16")
    part = dy[: shape[0] // 2, : shape[1] // 2]
    rows, columns = dy[: len(part)], dy[:, : part.shape[1]]
    floors = {"row": amax_of(rows, 1), "col": amax_of(columns, 0)}
    seen = (rows if "row" in told else part, columns if "col" in told else part)
    by_row = ref.quantize(ref.to_float32(seen[0]), 1, "e5m2")
    by_column = ref.quantize(ref.to_float32(seen[1]), 0, "e5m2")
    carrier = FORMATS["e5m2"].dtype
    ones = np.ones((1, part.shape[1]), np.float32), np.ones((len(part), 1), np.float32)

    def quantized(dy, told):
        rows, columns = ffi.gradient_amax(dy, *ones)
        amax = told.get("row", rows), told.get("col", columns)
        return ffi.quantize_gradient(dy, *ones, *amax, format="e5m2")

    for got in poisoned(quantized, part, {name: floors[name] for name in told}):
        same_bytes(got[0], by_row[0][:, : part.shape[1]].astype(carrier))
        same_scale(got[1], by_row[1])
        same_bytes(got[2], by_column[0][: len(part)].astype(carrier).T.copy())
        same_scale(got[3], by_column[1])


# ------------------------------------------------------------------------------------- the rest


@pytest.mark.gpu
@by_clamp
def test_the_cpus_bytes(clamp):
    """What XLA makes on the CPU, from the same input: no oracle between the two."""
    x = tensor((300, 640), "bfloat16")

    def quantized(x):
        if clamp == "plain":
            return jfp4.quantize(x, 1)
        return quantize_compensated(x, jnp.asarray(LO), jnp.asarray(HI), 1)

    with ffi.backend("cuda"):
        on_gpu = jax.jit(quantized)(x)
    with jax.default_device(jax.devices("cpu")[0]), ffi.backend("xla"):
        on_cpu = jax.jit(quantized)(x)
    same_bytes(on_gpu.codes, on_cpu.codes)
    same_scale(on_gpu.scale, np.asarray(on_cpu.scale))


def test_batches_by_vmap(backend):
    x = np.stack([tensor((130, 257), "bfloat16", broken=False) * s for s in (1, 3, -2)])
    for axis in (0, 1):
        q = jax.jit(jax.vmap(functools.partial(jfp4.quantize, axis=axis)))(x)
        for i in range(3):
            codes, scale, _ = ref.quantize(x[i], axis, "e2m1")
            same_bytes(q.codes[i], codes.astype(q.codes.dtype))
            same_scale(q.scale[i], scale)


@by_dtype
@pytest.mark.parametrize("alpha", [0.97, 0.99, 0.999, 1.0])
@pytest.mark.parametrize(
    ("shape", "sample"), [((127, 129), None), ((2048, 512), 65536), ((7,), None)]
)
def test_thresholds_are_those_of_a_sort(backend, shape, sample, alpha, dtype):
    x = np.random.default_rng(2).normal(size=shape).astype(DTYPES[dtype])
    found = jax.jit(lambda x: find_thresholds(x, alpha, sample=sample))(x)
    seen = x if sample is None else ref.sample(x, sample)
    assert tuple(map(float, found)) == tuple(map(float, ref.thresholds(seen, alpha)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.0])
def test_thresholds_of_special_values(backend, value):
    x = np.random.default_rng(3).normal(size=(64, 64)).astype(np.float32)
    x[5, :40] = value
    found = jax.jit(lambda x: find_thresholds(x, 0.999, sample=None))(x)
    np.testing.assert_array_equal(np.float32(found), np.float32(ref.thresholds(x, 0.999)))


# ------------------------------------------------------------------------------- XLA on a GPU


@pytest.mark.gpu
def test_reciprocals_by_xla_are_correctly_rounded():
    bits = np.random.default_rng(0).integers(0x00800000, 0x7E800000, 1 << 22, dtype=np.uint32)
    x = bits.view(np.float32)
    np.testing.assert_array_equal(jax.jit(reciprocal)(x), np.float32(1) / x)


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["e4m3", "e5m2", "e2m1"])
def test_gradients_by_xla_are_those_of_the_kernels(format):
    keys = jax.random.split(jax.random.key(1), 3)
    dy = jax.random.normal(keys[0], (4096, 5120), jnp.bfloat16)
    col, row = jax.random.uniform(keys[1], (1, 5120)), jax.random.uniform(keys[2], (4096, 1))

    def run(dy, col, row):
        return [
            (q.codes.astype(jnp.float32), q.scale)
            for q in quantize_gradient(dy, col, row, format=format)
        ]

    results = []
    for path in ("cuda", "xla"):
        with ffi.backend(path):
            results.append(jax.tree.leaves(jax.jit(run)(dy, col, row)))
    for kernel, xla in zip(*results, strict=True):
        np.testing.assert_array_equal(kernel, xla)
