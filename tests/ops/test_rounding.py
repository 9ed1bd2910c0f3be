"""Rounding to narrow dtypes against exact arithmetic, and the bits that it is done by."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jfp4.ops.rounding import binade, mix, random_bits, round_to_dtype, stochastic_key

DTYPES = (jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2)
rounded = jax.jit(round_to_dtype, static_argnums=1)


def values_of(dtype):
    """Every finite value of a dtype, ascending, float64."""
    bits = np.dtype(dtype).itemsize * 8
    every = np.arange(2**bits, dtype=f"uint{bits}").view(dtype)
    with np.errstate(invalid="ignore"):  # ml_dtypes' own NaN
        every = every[np.isfinite(every)].astype(np.float64)
    return np.unique(every)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_round_to_themselves_whatever_the_bits(dtype):
    values = values_of(dtype).astype(np.float32)
    for bits in (None, np.zeros(values.shape, np.uint32), np.full(values.shape, 2**32 - 1, "u4")):
        np.testing.assert_array_equal(np.float64(rounded(values, dtype, bits)), values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_is_that_of_ml_dtypes(dtype):
    values = values_of(dtype)
    middles = ((values[1:] + values[:-1]) / 2).astype(np.float32)  # exact: one bit more
    beside = np.concatenate([np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)])
    for x in (middles, beside):
        expected = x.astype(np.dtype(dtype)).astype(np.float32)
        np.testing.assert_array_equal(np.float32(rounded(x, dtype, None)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [None, np.uint32(2**32 - 1)])
def test_what_is_not_finite_or_too_large_is_no_number(dtype, bits):
    largest = min(2 * float(jnp.finfo(dtype).max), 3.4e38)
    x = np.float32([np.nan, np.inf, -np.inf, largest, -largest])
    bits = None if bits is None else np.full(x.shape, bits)
    result = np.float32(rounded(x, dtype, bits))
    if dtype == jnp.bfloat16:  # 3.4e38 rounds up to infinity to nearest, down with these bits
        result, x = result[:3], x[:3]
    assert not np.any(np.isfinite(result))
    assert np.isnan(result[0])


def fractions(dtype, x):
    """The neighbours of ``x`` in a dtype, and how far between them it is."""
    values = values_of(dtype)
    i = np.searchsorted(values, abs(x), side="right") - 1
    below, above = Fraction(values[i]), Fraction(values[i + 1])
    return below, above, (Fraction(abs(x)) - below) / (above - below)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_stochastic_rounding_is_unbiased_over_all_bit_patterns(dtype, data):
    # A pattern counts by its upper 24 bits, and rounds up below a threshold: so it is enough that
    # the patterns beside the exact threshold round to the two sides.
    largest = float(jnp.finfo(dtype).max) / 2
    x = np.float32(data.draw(st.floats(2.0**-126, min(largest, 2.0**100), width=32)))
    below, above, share = fractions(dtype, float(x))
    patterns = -(-share * 2**24 // 1)  # rounded up: how many of 2**24 round up
    around = [p for p in (0, patterns - 1, patterns, 2**24 - 1) if 0 <= p < 2**24]
    bits = np.array([(p << 8) | 255 for p in map(int, around)], np.uint32)
    for sign in (1, -1):
        found = np.float64(rounded(np.full(len(bits), sign * x), dtype, bits)) * sign
        expected = [float(above if p < patterns else below) for p in around]
        np.testing.assert_array_equal(found, expected)
    assert Fraction(0) <= patterns / Fraction(2**24) - share < Fraction(1, 2**24)
    if abs(x) >= float(jnp.finfo(dtype).tiny):  # then the mean is x, and not only nearly
        assert below + (above - below) * patterns / 2**24 == Fraction(float(x))


def test_every_pattern_of_a_fraction_counts_once():
    # All 2**24 upper parts, for a value three eighths of the way.
    x, dtype = np.float32(1 + 3 / 8 * 2**-3), jnp.float8_e4m3fn
    bits = np.arange(2**24, dtype=np.uint32) << 8
    up = np.float32(rounded(np.broadcast_to(x, bits.shape), dtype, bits)) > 1
    assert up.sum() == 3 * 2**21


@given(st.floats(2.0**-126, 2.0**127, width=32))
def test_binade_is_the_power_of_two_at_or_below(x):
    assert float(binade(jnp.float32(x))) == 2.0 ** np.floor(np.log2(np.float64(np.float32(x))))


def test_binade_of_what_is_not_finite_is_infinite():
    assert np.all(np.isposinf(binade(jnp.float32([np.inf, np.nan]))))


def unmix(x):
    """The inverse of ``mix``, by the inverses of its steps modulo 2**32."""
    x = x ^ (x >> 14) ^ (x >> 28)
    x = x * pow(0x31848BAB, -1, 2**32) % 2**32
    x = x ^ (x >> 15) ^ (x >> 30)
    x = x * pow(0xAC4C1B51, -1, 2**32) % 2**32
    x = x ^ (x >> 11) ^ (x >> 22)
    x = x * pow(0xED5AD4BB, -1, 2**32) % 2**32
    x = x ^ (x >> 17)
    return (x - 0x9E3779B9) % 2**32


def test_the_hash_is_a_bijection():
    # So the bits of a row are drawn without repetition, and all 2**32 are equally frequent.
    x = np.random.default_rng(0).integers(0, 2**32, 10**6, dtype=np.uint32)
    x[:3] = 0, 2**31, 2**32 - 1
    np.testing.assert_array_equal(unmix(np.uint64(jax.jit(mix)(x))), x)


def test_keys_are_of_any_integers():
    for number in (0, -1, 2**31, 2**32 - 1, 2**40 + 3, np.int64(-5)):
        same = jnp.uint32(int(number) % 2**32)
        assert stochastic_key(7, number) == jax.jit(stochastic_key)(jnp.int32(7), same)
    assert stochastic_key(1, 2) != stochastic_key(2, 1)


def test_every_bit_of_the_hash_depends_on_every_bit():
    x = np.random.default_rng(1).integers(0, 2**32, 2**16, dtype=np.uint32)
    mixed = np.asarray(mix(x))
    for i in range(32):
        changed = mixed ^ np.asarray(mix(x ^ np.uint32(1 << i)))
        shares = [(changed >> j & 1).mean() for j in range(32)]
        # Half of them, within five standard deviations of 2**16 draws and the hash's own bias.
        assert np.max(np.abs(np.subtract(shares, 0.5))) < 5 * 0.5 / 2**8 + 0.01


@pytest.mark.parametrize("width", [32, 16])
@pytest.mark.parametrize("shape", [(2**20,), (16, 64, 1024), (2**14, 64), (2, 3, 5, 7, 5000)])
def test_bits_are_uniform_and_independent_of_their_neighbours(shape, width):
    bits = np.asarray(
        jax.jit(random_bits, static_argnums=(1, 2))(stochastic_key(3, 1), shape, width)
    )
    bins = np.bincount((bits >> 24).ravel(), minlength=256)
    chi2 = np.sum((bins - bits.size / 256) ** 2) / (bits.size / 256)
    assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255)
    u = bits / 2**32
    for axis in range(bits.ndim):
        a, b = np.split(np.moveaxis(u, axis, 0), [bits.shape[axis] // 2])
        pairs = np.corrcoef(a.ravel(), b[: len(a)].ravel())[0, 1]
        near = np.moveaxis(u, axis, 0)
        beside = np.corrcoef(near[1:].ravel(), near[:-1].ravel())[0, 1]
        assert max(abs(pairs), abs(beside)) < 5 / np.sqrt(len(a) * near[0].size)


def test_bits_are_those_of_the_key_and_the_element_alone():
    keys = [stochastic_key(*n) for n in itertools.product((0, 1), (0, 1), (0, 1))]
    found = [tuple(np.asarray(random_bits(key, (3, 40))).ravel().tolist()) for key in keys]
    assert len(set(found)) == 8
    again = jax.jit(lambda seed: random_bits(stochastic_key(seed, 1, 0), (3, 40)))(1)
    assert tuple(np.asarray(again).ravel().tolist()) == found[keys.index(stochastic_key(1, 1, 0))]
    assert np.asarray(random_bits(keys[0], ())).shape == ()
    assert len({b for bits in found for b in bits}) == 8 * 120  # no two alike among so few


@pytest.mark.parametrize("shape", [(3, 40), (3, 41), (1,), ()])
def test_neighbours_share_the_halves_of_a_hash(shape):
    key = stochastic_key(7)
    bits = np.atleast_1d(random_bits(key, shape, 16))
    *rows, n = bits.shape
    whole = np.asarray(random_bits(key, (*rows, -(-n // 2))))
    np.testing.assert_array_equal(bits[..., 0::2] >> 16, whole >> 16)
    np.testing.assert_array_equal(bits[..., 1::2] >> 16, (whole & 0xFFFF)[..., : n // 2])


@pytest.mark.parametrize(("dtype", "width"), [(jnp.float16, 32), (jnp.bfloat16, 16)])
def test_bits_take_no_memory(dtype, width):
    shape = (8, 256, 1024)
    fused = jax.jit(lambda x: round_to_dtype(x, dtype, random_bits(jnp.uint32(1), shape, width)))
    compiled = fused.lower(jax.ShapeDtypeStruct(shape, np.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < np.prod(shape) / 64
