"""AdamW's kernel, byte for byte what numpy computes in float32, whatever is kept in what."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jfp4.ops import ffi
from jfp4.ops.rounding import mix
from jfp4.optim import BLOCK, Blocks, from_blocks, to_blocks

F32 = np.float32
B1, B2, EPS, DECAY, BOUND = 0.9, 0.95, 1e-8, 0.1, 0.5
RATES = np.array([0.35, 3e-3, 3.7, 4.1, 1], F32)
PARAMS = {"float32": F32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
MOMENTS = {"e4m3": ml_dtypes.float8_e4m3fn, "float16": np.float16, "float32": F32}
LEAST = {"bfloat16": 2.0**-126, "float16": 2.0**-14, "e4m3": 2.0**-6}
MANTISSA = {"bfloat16": 7, "float16": 10, "e4m3": 3}
TOP = {"e4m3": 2.0**7, "float16": 2.0**14}

# Leading axis: slices. Whole blocks and rows of any length, one block and an odd number of them.
SHAPES = [(1, 1, 128), (3, 5, 256), (2, 3, 384), (1, 1, 1), (2, 7, 5), (1, 33, 130), (3, 2, 1000)]


def rounded(x, format, bits):
    """Float32 on the format's grid: to nearest for no bits, and else stochastically."""
    x = x.astype(F32)
    if bits is None:
        dtype = (PARAMS | MOMENTS)[format]
        return x.astype(dtype).astype(F32)
    _, exponent = np.frexp(np.abs(x))
    binade = np.maximum(np.ldexp(F32(1), exponent - 1), F32(LEAST[format]))
    step = binade * F32(2.0 ** -MANTISSA[format])
    steps = np.abs(x) / step
    below = np.floor(steps)
    up = (bits >> 8).astype(F32) * F32(2.0**-24) < steps - below
    return np.copysign((below + up) * step, x)


def bits_of(key, rows, columns, first, halves=False):
    """What random_bits gives a slice, from the mixing that tests/ops/test_rounding.py holds."""
    row = np.asarray(mix(jnp.asarray(np.arange(rows, dtype=np.uint32) + key)))
    column = np.arange(columns, dtype=np.uint32) + first
    if not halves:
        return np.asarray(mix(jnp.asarray(row[:, None] ^ column)))
    whole = np.asarray(mix(jnp.asarray(row[:, None] ^ column // 2)))
    return np.where(column % 2, whole << 16, whole)


def fma(a, b, c):
    """``a * b + c`` of float32, rounded once.

    Float64 has all of the product; of the sum, rounded to odd, enough for the second rounding to
    be right (Boldo and Melquiond, IEEE Transactions on Computers 57, 2008).
    """
    product, c = np.float64(a) * np.float64(b), np.float64(c)
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)
    even = total.view(np.int64) % 2 == 0
    odd = np.nextafter(total, np.copysign(np.inf, lost))
    return np.where((lost != 0) & np.isfinite(total) & even, odd, total).astype(F32)


def encoded(values, format, bits):
    """A moment as it is kept, codes and exponents, and None of these for float32."""
    if format == "float32":
        return values, None
    *rows, n = values.shape
    block = BLOCK if n % BLOCK == 0 else n
    blocks = values.reshape(*rows, n // block, block)
    mantissa, exponent = np.frexp(np.abs(blocks).max(-1))
    binade = np.where(mantissa == 0, F32(0), np.ldexp(F32(1), exponent - 1))
    scale = np.maximum(binade, F32(2.0**-80)) / F32(TOP[format])
    codes = rounded((blocks / scale[..., None]).reshape(values.shape), format, bits)
    return codes.astype(MOMENTS[format]), (scale.view(np.uint32) >> 23).astype(np.uint8)


def decoded(codes, exponents):
    if exponents is None:
        return codes
    scale = (exponents.astype(np.uint32) << 23).view(F32)
    scale = np.repeat(scale, codes.shape[-1] // scale.shape[-1], axis=-1)
    return codes.astype(F32) * scale


@np.errstate(over="ignore", invalid="ignore")
def oracle(
    grad, param, first, second, rates, keys, *, formats, decay, root, stochastic, bound=BOUND
):
    """The step in float32, its operations rounded as cuda_ffi/kernels/adamw.h states them."""
    format, first_format, second_format = formats
    factor_of_gradient, rate, first_correction, second_correction, finite = rates
    assert finite
    factor = F32(2.0**10 if format == "float16" else 1)
    g = grad.astype(F32) * factor_of_gradient
    p, m, v = param.astype(F32) / factor, decoded(*first), decoded(*second)
    if root:
        most = F32(bound) * v if np.isfinite(bound) else np.full_like(v, np.inf)
        # Not np.clip, which may take a zero for the other one.
        m = np.where(m > most, most, np.where(m < -most, -most, m))
        m = np.where(np.isnan(most), most, m)
        v = v * v
    m = fma(F32(1 - B1), g, F32(B1) * m)
    v = fma(F32(1 - B2), g * g, F32(B2) * v)
    reciprocal = 1 / fma(np.sqrt(v), second_correction, F32(EPS))
    p = fma(-rate, fma(F32(decay), p, m * first_correction * reciprocal), p)
    _, rows, n = grad.shape
    of_param = np.stack(
        [bits_of(key, rows, n, column, format == "bfloat16") for key, _, column in keys]
    )
    of_first = np.stack([bits_of(key, rows, n, column) for _, key, column in keys])
    of_second = of_first << 16 | of_first >> 16  # the halves of the same hash, exchanged
    if format != "float32":
        p = rounded(p * factor, format, of_param).astype(PARAMS[format])
    moments = (
        encoded(values, format, bits if stochastic else None)
        for values, format, bits in (
            (m, first_format, of_first),
            (np.sqrt(v) if root else v, second_format, of_second),
        )
    )
    return p, *moments


@np.errstate(over="ignore")
def case(shape, format, first, second):
    rng = np.random.default_rng(shape)

    def gaussian(spread=1.0):
        # Over many binades, with zeros and a row of them.
        x = rng.normal(size=shape) * np.exp2(rng.integers(-12, 4, shape)) * spread
        x[rng.random(shape) < 0.05] = 0
        x[-1, -1] *= x.shape[1] == 1
        return x.astype(F32)

    # Of float16 some overflow: an infinity, as it is to be.
    param = (gaussian() * F32(2.0**10 if format == "float16" else 1)).astype(PARAMS[format])
    grad = gaussian(0.01).astype(PARAMS[format])
    moments = [
        encoded(values, kind, None)
        for values, kind in ((gaussian(1e-3), first), (np.abs(gaussian(1e-3)), second))
    ]
    keys = rng.integers(0, 2**32, (shape[0], 3), dtype=np.uint32)
    return grad, param, *moments, keys


def as_moment(codes, exponents):
    if exponents is None:
        return jnp.asarray(codes)
    return Blocks(
        jnp.asarray(codes.view(np.uint8) if codes.dtype.itemsize == 1 else codes), exponents
    )


def run(grad, param, first, second, rates, keys, decay, root, stochastic, bound=BOUND):
    step = functools.partial(
        ffi.adamw, b1=B1, b2=B2, eps=EPS, weight_decay=decay, bound=bound, root=root,
        stochastic=stochastic,
    )  # fmt: skip
    grads = grad if isinstance(grad, tuple) else (grad,)
    return jax.jit(step)(grads, param, as_moment(*first), as_moment(*second), rates, keys)


def assert_bits(found, expected):
    found = np.asarray(found)
    assert found.dtype.itemsize == expected.dtype.itemsize
    np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))


def assert_moment(found, codes, exponents):
    assert_bits(found.codes if exponents is not None else found, codes)
    if exponents is not None:
        assert_bits(found.exponents, exponents)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", PARAMS)
@pytest.mark.parametrize(
    ("first", "second"),
    [("e4m3", "float16"), ("float16", "float32"), ("float32", "float16"), ("float32", "float32")],
)
@pytest.mark.parametrize("stochastic", [False, True])
def test_every_byte_is_numpys(backend, shape, format, first, second, stochastic):
    grad, param, m, v, keys = case(shape, format, first, second)
    root = not first == second == "float32"
    options = {"decay": DECAY, "root": root, "stochastic": stochastic}
    given = tuple(grad) if stochastic else grad  # whole, or by slices
    found = run(given, param, m, v, RATES, keys, **options)
    expected = oracle(grad, param, m, v, RATES, keys, formats=(format, first, second), **options)
    assert_bits(found[0], expected[0])
    assert_moment(found[1], *expected[1])
    assert_moment(found[2], *expected[2])


@pytest.mark.parametrize("shape", [(3, 5, 256), (2, 7, 5)], ids=str)
@pytest.mark.parametrize("format", PARAMS)
def test_an_infinite_bound_clips_nothing(backend, shape, format):
    """Not even beside a root of zero, with which it has no product."""
    formats = format, "e4m3", "float16"
    grad, param, m, v, keys = case(shape, *formats)
    assert np.any(v[0] == 0)
    options = {"decay": DECAY, "root": True, "stochastic": False, "bound": np.inf}
    found = run(grad, param, m, v, RATES, keys, **options)
    expected = oracle(grad, param, m, v, RATES, keys, formats=formats, **options)
    assert not np.any(np.isnan(expected[0].astype(F32)))
    assert_bits(found[0], expected[0])
    assert_moment(found[1], *expected[1])
    assert_moment(found[2], *expected[2])


@pytest.mark.parametrize("binades", [(-12, 4), (-4, 0), (-55, -45), (25, 45)], ids=str)
@pytest.mark.parametrize("correction", [0.5, 1.0, 2.0**21])
@pytest.mark.parametrize(
    ("format", "first", "second"),
    [("bfloat16", "e4m3", "float16"), ("float32", "float32", "float32")],
)
@pytest.mark.parametrize("stochastic", [False, True])
def test_numbers_of_any_magnitude(backend, binades, correction, format, first, second, stochastic):
    """The kernel has paths for usual magnitudes and for others, of roots and of what is rounded.

    No square is subnormal, for a CPU's threads take those as zero. Of moments within four binades
    every one is normal in its format, and of sixteen not every one in E4M3.
    """
    shape = (3, 5, 1024)
    rng = np.random.default_rng(np.abs(binades))

    def numbers():
        return (rng.uniform(1, 2, shape) * np.exp2(rng.integers(*binades, shape))).astype(F32)

    signs = rng.choice([-1, 1], shape).astype(F32)
    grad, param = (signs * numbers()).astype(PARAMS[format]), numbers().astype(PARAMS[format])
    m, v = encoded(signs * numbers(), first, None), encoded(numbers(), second, None)
    keys = rng.integers(0, 2**32, (shape[0], 3), dtype=np.uint32)
    rates = RATES.copy()
    rates[2:4] = correction
    options = {"decay": DECAY, "root": first == "e4m3", "stochastic": stochastic}
    found = run(grad, param, m, v, rates, keys, **options)
    expected = oracle(grad, param, m, v, rates, keys, formats=(format, first, second), **options)
    assert_bits(found[0], expected[0])
    assert_moment(found[1], *expected[1])
    assert_moment(found[2], *expected[2])


@pytest.mark.parametrize("shape", [(3, 5, 256), (2, 7, 5)], ids=str)
def test_a_step_that_is_skipped_changes_nothing(backend, shape):
    grad, param, m, v, keys = case(shape, "float16", "e4m3", "float16")
    rates = np.where(np.arange(5) == 4, 0, np.nan).astype(F32)
    found = run(grad, param, m, v, rates, keys, DECAY, True, True)
    assert_bits(found[0], param)
    assert_moment(found[1], *m)
    assert_moment(found[2], *v)


@pytest.mark.parametrize("shape", [(1, 2, 256), (1, 2, 5)], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so_and_in_its_block(backend, shape, bad):
    grad, param, m, v, keys = case(shape, "float32", "e4m3", "float16")
    grad[0, 0, 1] = bad
    new, first, second = run(grad, param, m, v, RATES, keys, DECAY, True, False)
    block = min(shape[-1], BLOCK)
    assert not np.isfinite(np.asarray(new)[0, 0, 1])
    for moment in (first, second):
        assert np.asarray(moment.exponents)[0, 0, 0] == 255
        assert np.all(np.asarray(moment.exponents).ravel()[1:] < 255)
    assert np.all(np.isfinite(np.delete(np.asarray(new).ravel(), 1)))
    values = np.asarray(from_blocks(first)).reshape(-1)
    assert np.all(np.isnan(values[:block])) and np.all(np.isfinite(values[block:]))


def test_blocks_are_those_of_the_optimizer():
    """The oracle's own encoding is jfp4.optim's."""
    x = np.random.default_rng(0).normal(size=(1, 4, 384)).astype(F32)
    for format, dtype in (("e4m3", jnp.float8_e4m3fn), ("float16", jnp.float16)):
        codes, exponents = encoded(x, format, None)
        found = to_blocks(jnp.asarray(x), dtype)
        assert_bits(found.codes, codes)
        assert_bits(found.exponents, exponents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": np.zeros((3, 5, 2), F32)},
         r"grad is f32\[3, 5, 2\], in part 0 of 1; expected 15 rows of 256, beside param f32"),
        ({"grad": (np.zeros((5, 256), F32),) * 2},
         r"grad is in 2 parts; expected a number that divides the slices of keys u32\[3, 3\]"),
        ({"grad": (np.zeros((5, 256), F32), np.zeros((4, 256), F32), np.zeros((5, 256), F32))},
         r"grad is f32\[4, 256\], in part 1 of 3; expected 5 rows of 256"),
        ({"grad": np.zeros((3, 5, 256), np.int8)}, "grad is .*; expected bf16, f16 or f32"),
        ({"first": (np.zeros((3, 5, 256), np.int8), None)}, "first is .*; expected u8, f16 or f32"),
        ({"second": (np.zeros((3, 5, 256), np.uint8), np.zeros((3, 5, 2), np.uint8))},
         r"second is u8\[3, 5, 256\]; expected f16 or f32"),
        ({"keys": np.zeros((4, 3), np.uint32)}, r"keys is u32\[4, 3\]; expected u32\[slices, 3\]"),
        ({"rates": RATES[:4]}, r"rates is f32\[4\]; expected f32\[5\]"),
        ({"first": (np.zeros((3, 5, 256), np.float16), np.zeros((3, 5, 1), np.uint8))},
         r"first_exponents is u8\[3, 5, 1\]; expected u8\[3, 5, 2\]"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(backend, change, message):
    grad, param, first, second, keys = case((3, 5, 256), "float32", "float16", "float16")
    given = {"grad": grad, "param": param, "first": first, "second": second, "rates": RATES}
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(
            run(**given | {"keys": keys} | change, decay=0, root=True, stochastic=False)
        )
