"""Grids, rounding and packing, held to ml_dtypes and to the published grids."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jfp4 import formats
from jfp4.formats import FORMATS, get_format, pack, round_to_format, unpack
from jfp4.ops import reference as ref

FOUR_BITS = ("e2m1", "e1m2", "e3m0", "e2m1b3")
ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
EVERY_BFLOAT16 = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)

jitted = functools.partial(jax.jit, static_argnames="format")(round_to_format)
eager_and_jit = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])


def same_bits(a, b):
    """Equal values, NaN in the same places, equal signs of zero."""
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_array_equal(a, b)
    number = ~np.isnan(b)
    np.testing.assert_array_equal(np.signbit(a)[number], np.signbit(b)[number])


def rounder(wrap, name):
    return wrap(lambda v: round_to_format(v, name))


def oracle(v, name):
    with np.errstate(invalid="ignore"):  # signalling NaNs among all the patterns
        return ref.round_to_format(v, name)


# ----------------------------------------------------------------------------------- grids


def test_published_four_bit_grids():
    assert FORMATS["e2m1"].grid.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert FORMATS["e1m2"].grid.tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert FORMATS["e3m0"].grid.tolist() == [0, 0.25, 0.5, 1, 2, 4, 8, 16]


def test_operands_are_the_same_numbers_with_exponents_that_share_their_first_bit():
    plain, quarter = FORMATS["e2m1"], FORMATS[formats.operand_format("e2m1")]
    np.testing.assert_array_equal(plain.grid / 4, quarter.grid)
    assert quarter.min_scale == 4 * plain.min_scale
    assert np.float32(1 / quarter.max) == 4 * np.float32(1 / plain.max)  # of amax, for the scale
    patterns = quarter.grid.astype(quarter.dtype).view(np.uint8)
    assert not np.any(patterns & 0x40) and np.any(plain.grid.astype(plain.dtype).view("u1") & 0x40)
    assert [f for f in FORMATS if formats.operand_format(f) != f] == ["e2m1"]


@pytest.mark.parametrize("name", ML_DTYPES)
def test_grid_index_is_the_bit_pattern_of_ml_dtypes(name):
    grid = FORMATS[name].grid
    patterns = np.arange(len(grid), dtype=np.uint8).view(ML_DTYPES[name])
    np.testing.assert_array_equal(grid, patterns.astype(np.float64))
    assert grid[-1] == FORMATS[name].max == float(ml_dtypes.finfo(ML_DTYPES[name]).max)


@pytest.mark.parametrize("name", FORMATS)
def test_attributes(name):
    f = get_format(name)
    assert f.name == name
    same_bits(f.grid, ref.grid(name))
    assert f.bits == (4 if name in FOUR_BITS else 8)
    assert f.dtype == (ml_dtypes.float8_e5m2 if name == "e5m2" else ml_dtypes.float8_e4m3fn)
    same_bits(f.grid.astype(f.dtype).astype(np.float64), f.grid)
    assert f.min_scale == ref.min_scale(name)
    assert hash(f) == hash(get_format(name))


@pytest.mark.parametrize("name", FOUR_BITS)
def test_lattice_is_the_least_factor_that_makes_codes_int8(name):
    f = get_format(name)
    assert f.lattice == {"e2m1": 2, "e1m2": 2, "e3m0": 4, "e2m1b3": 8}[name]
    integers = f.grid * f.lattice
    assert np.all(integers == np.round(integers)) and integers[-1] <= 127
    assert np.any(integers % 2)


def test_unknown_format_is_named():
    with pytest.raises(ValueError, match=r"'e9m9' is unknown.*e2m1"):
        get_format("e9m9")
    with pytest.raises(ValueError, match="e9m9"):
        round_to_format(jnp.zeros(1), "e9m9")


# -------------------------------------------------------------------------------- rounding


@eager_and_jit
@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_bfloat16_rounds_as_ml_dtypes_casts_the_clipped(name, wrap):
    top = FORMATS[name].max
    got = rounder(wrap, name)(jnp.asarray(EVERY_BFLOAT16))
    assert got.dtype == jnp.float32
    wide = EVERY_BFLOAT16.astype(np.float32)
    with np.errstate(invalid="ignore"):
        clipped = np.where(np.isnan(wide), 0, np.clip(wide, -top, top))
    expected = clipped.astype(ML_DTYPES[name]).astype(np.float32)
    same_bits(got, np.where(np.isnan(wide), np.nan, expected))


@eager_and_jit
@pytest.mark.parametrize("name", FORMATS)
def test_every_bfloat16_rounds_as_the_oracle(name, wrap):
    wide = EVERY_BFLOAT16.astype(np.float32)
    same_bits(rounder(wrap, name)(wide), oracle(wide, name))


@eager_and_jit
@pytest.mark.parametrize("name", FORMATS)
def test_midpoints_go_to_the_even_code_and_their_neighbours_to_the_nearest(name, wrap):
    grid = FORMATS[name].grid.astype(np.float32)
    below, above = grid[:-1], grid[1:]
    middle = (below + above) / 2
    even = np.where(np.arange(len(below)) % 2 == 0, below, above)
    less, more = np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))
    probes = np.stack([middle, less, more, below])
    expected = np.stack([even, below, above, below])
    round_ = rounder(wrap, name)
    same_bits(round_(probes), expected)
    same_bits(round_(-probes), -expected)


def test_published_ties():
    ties = jnp.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    assert round_to_format(ties, "e2m1").tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert round_to_format(-ties, "e2m1").tolist() == [0, -1, -1, -2, -2, -4, -4]


@eager_and_jit
@pytest.mark.parametrize("name", FORMATS)
def test_special_values(name, wrap):
    """Infinities saturate, NaN stays, signs stay (that of zero too), shape stays."""
    top = np.float32(FORMATS[name].max)
    f32 = np.finfo(np.float32)
    v = np.float32([[np.inf, f32.max, top * 1.01, np.nan], [0.0, f32.tiny, 1e-44, 1e-30]])
    expected = np.float32([[top, top, top, np.nan], [0, 0, 0, 0]])
    round_ = rounder(wrap, name)
    same_bits(round_(v), expected)
    same_bits(round_(-v), -expected)
    assert round_(np.zeros((), np.float32)).shape == ()
    assert round_(np.zeros((0, 3), np.float32)).shape == (0, 3)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_narrow_inputs_are_computed_in_float32(name, dtype):
    bits = np.arange(256, dtype=np.uint8)
    if "8" in dtype:
        v = bits.view(jnp.dtype(dtype))
    else:
        v = (bits.astype(np.uint16) << 8 | 0x5A).view(jnp.dtype(dtype))
    with np.errstate(invalid="ignore"):
        wide = v.astype(np.float32)
    if dtype == "bfloat16":  # back ends may flush subnormal inputs, all of which round to zero
        wide = np.where(np.abs(wide) < 2.0**-126, np.copysign(np.float32(0), wide), wide)
    got = round_to_format(jnp.asarray(v), name)
    assert got.dtype == jnp.float32
    same_bits(got, oracle(wide, name))


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=16, max_size=16))
@pytest.mark.parametrize("name", FORMATS)
def test_any_float32_rounds_as_the_oracle(name, bits):
    v = np.array(bits, np.uint32).view(np.float32)
    same_bits(jitted(v, format=name), oracle(v, name))


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_idempotent_and_the_carrier_holds_it(name):
    rng = np.random.default_rng(0)
    v = jnp.float32(rng.normal(size=512) * FORMATS[name].max / 3)
    once = round_to_format(v, name)
    same_bits(round_to_format(once, name), once)
    same_bits(once.astype(FORMATS[name].dtype).astype(jnp.float32), once)


# --------------------------------------------------------------------------------- packing


def signed_grid(name):
    """The 16 codes in the order of their bit patterns."""
    return np.concatenate([FORMATS[name].grid, -FORMATS[name].grid]).astype(np.float32)


@pytest.mark.parametrize("name", FOUR_BITS)
@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn", "bfloat16"])
def test_bits_are_the_index_and_sign(name, dtype):
    codes = signed_grid(name).astype(jnp.dtype(dtype))
    bits = formats.to_bits(jnp.asarray(codes), name)
    assert bits.dtype == jnp.uint8 and bits.tolist() == list(range(16))
    back = formats.from_bits(bits, name)
    assert back.dtype == FORMATS[name].dtype
    same_bits(back.astype(jnp.float32), signed_grid(name))
    same_bits(formats.from_bits(bits | 0xF0, name).astype(jnp.float32), signed_grid(name))


@pytest.mark.parametrize("name", FOUR_BITS)
def test_all_bytes_unpack_and_pack(name):
    packed = jnp.arange(256, dtype=jnp.uint8)
    codes = unpack(packed, 512, name)
    assert codes.dtype == FORMATS[name].dtype
    same_bits(codes.astype(jnp.float32), ref.unpack(np.asarray(packed), name))
    np.testing.assert_array_equal(pack(codes, name), packed)


def test_the_earlier_code_is_in_the_low_nibble():
    assert pack(jnp.float32([0.5, -1, -0.0, 6, -6])).tolist() == [0xA1, 0x78, 0x0F]
    assert unpack(jnp.uint8([0xA1, 0x78, 0x0F]), 5).astype(jnp.float32).tolist() == [
        0.5, -1, -0.0, 6, -6,
    ]  # fmt: skip


def test_packed_bits_are_those_of_float4_e2m1fn():
    v = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32) * 3
    codes = v.clip(-6, 6).astype(ml_dtypes.float4_e2m1fn)
    nibbles = codes.view(np.uint8) & 15
    got = pack(jnp.asarray(codes.astype(np.float32)))
    np.testing.assert_array_equal(got, nibbles[:, 0::2] | nibbles[:, 1::2] << 4)


@pytest.mark.parametrize("name", FOUR_BITS)
@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (7,), (3, 5), (2, 3, 4), (0, 3)])
def test_pack_round_trip(name, shape):
    rng = np.random.default_rng(2)
    codes = rng.choice(signed_grid(name), shape)
    packed = jax.jit(lambda c: pack(c, name))(codes)
    assert packed.dtype == jnp.uint8
    assert packed.shape == (*shape[:-1], (shape[-1] + 1) // 2)
    np.testing.assert_array_equal(packed, ref.pack(codes, name))
    if shape[-1] % 2:
        assert not np.any(np.asarray(packed)[..., -1] >> 4)
    same_bits(jax.jit(lambda p: unpack(p, shape[-1], name))(packed).astype(jnp.float32), codes)


def test_packing_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match=r"format='e4m3' has 8 bits"):
        pack(jnp.zeros(2), "e4m3")
    with pytest.raises(ValueError, match=r"format='e5m2' has 8 bits"):
        unpack(jnp.zeros(1, jnp.uint8), 2, "e5m2")
    with pytest.raises(ValueError, match=r"codes has shape \(\)"):
        pack(jnp.float32(1))
    for n in (2, 5):
        with pytest.raises(ValueError, match=rf"packed has shape \(2,\); {n} codes"):
            unpack(jnp.zeros(2, jnp.uint8), n)
    with pytest.raises(ValueError, match=r"packed has shape \(\)"):
        unpack(jnp.uint8(0), 1)
    for take, name in (
        (lambda x: unpack(x, 2), "packed"),
        (lambda x: formats.from_bits(x, "e2m1"), "bits"),
    ):
        with pytest.raises(TypeError, match=f"{name} is int32; expected uint8"):
            take(jnp.zeros(1, jnp.int32))


def test_what_is_no_code_is_stored_as_the_next_one_down():
    stored = formats.from_bits(
        formats.to_bits(jnp.float32([1.99, -5.9, jnp.inf, jnp.nan]), "e2m1"), "e2m1"
    )
    np.testing.assert_array_equal(stored.astype(jnp.float32), [1.5, -4, 6, 0])
