"""What a QTensor says of itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfp4.ops import reference as ref
from jfp4.ops.quantize import quantize
from jfp4.qtensor import PackedQTensor, QTensor

quantized = functools.partial(jax.jit, static_argnames=("axis", "format", "shift"))(quantize)
X = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32) + 1


@pytest.mark.parametrize("shift", [None, "midrange", "mean"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dequantize_is_codes_times_scale_plus_shift(shift, dtype):
    q = quantized(X, 1, shift=shift)
    value = q.dequantize(dtype)
    assert value.dtype == dtype and value.shape == q.shape == (5, 7) and q.ndim == 2
    codes, scale = np.asarray(q.codes, np.float64), np.asarray(q.scale)
    exact = ref.dequantize(codes, scale, q.shift)
    # A float32 rounding of the product, one of the sum, and that of the cast.
    float32 = 2.0**-24 * (np.abs(codes * scale) + np.abs(exact))
    cast = 0 if dtype == "float32" else float(jnp.finfo(dtype).eps) / 2 * 1.001 * np.abs(exact)
    assert np.all(np.abs(np.asarray(value, np.float64) - exact) <= float32 * 1.001 + cast)


def test_dequantize_without_shift_is_one_rounding():
    q = quantized(X, 1)
    codes, scale, _ = ref.quantize(X, 1, "e2m1")
    np.testing.assert_array_equal(q.dequantize(), codes.astype(np.float32) * scale)


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("shift", [None, "midrange"])
def test_transpose(axis, shift):
    q = quantized(X, axis, shift=shift)
    assert q.T.shape == (7, 5)
    assert q.T.axis == (None if axis is None else 1 - axis)
    assert q.T.format == q.format and (q.T.shift is None) == (shift is None)
    np.testing.assert_array_equal(q.T.dequantize(), q.dequantize().T)
    np.testing.assert_array_equal(q.T.T.scale, q.scale)
    again = quantized(X.T, q.T.axis, shift=shift)
    np.testing.assert_array_equal(again.scale, q.T.scale)


def test_transpose_reverses_three_axes():
    q = quantized(np.ones((2, 3, 4), np.float32), 2)
    assert q.T.shape == (4, 3, 2) and q.T.axis == 0 and q.T.scale.shape == (1, 3, 2)


def test_unscaled_keeps_only_the_codes():
    u = quantized(X, 1, shift="midrange").unscaled()
    assert u.axis is None and u.shift is None and u.scale.shape == (1, 1)
    np.testing.assert_array_equal(u.dequantize(), u.codes.astype(jnp.float32))


def test_is_a_pytree_with_static_format_and_axis():
    q = quantized(X, -1)
    assert q.axis == 1
    assert [leaf.dtype for leaf in jax.tree.leaves(q)] == [jnp.float8_e4m3fn, jnp.float32]
    same = jax.jit(lambda t: t)(q)
    assert isinstance(same, QTensor) and (same.format, same.axis) == ("e2m1", 1)
    np.testing.assert_array_equal(same.dequantize(), q.dequantize())


@pytest.mark.parametrize("format", ["e2m1", "e1m2", "e3m0"])
@pytest.mark.parametrize("axis", [0, 1])
def test_packed_is_the_oracles_bytes_along_the_contraction(axis, format):
    q = quantized(X, axis, format=format)
    p = PackedQTensor.pack(q)
    codes = np.asarray(q.codes, np.float64)
    np.testing.assert_array_equal(p.packed, ref.pack(codes if axis == 1 else codes.T, format))
    assert p.shape == (5, 7) and p.T.shape == (7, 5) and p.length == X.shape[axis]
    for got, expected in ((p.unpack(), q), (p.T.unpack(), q.T)):
        assert (got.format, got.axis) == (expected.format, expected.axis)
        np.testing.assert_array_equal(got.dequantize(), expected.dequantize())


def test_packed_is_a_pytree_of_bytes_and_scale():
    p = PackedQTensor.pack(quantized(X, 1))
    assert [leaf.dtype for leaf in jax.tree.leaves(p)] == [jnp.uint8, jnp.float32]
    same = jax.jit(lambda t: t)(p)
    assert isinstance(same, PackedQTensor) and (same.axis, same.length) == (1, 7)


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match=r"q has shape \(2, 3, 4\); expected a matrix"):
        PackedQTensor.pack(quantized(np.ones((2, 3, 4), np.float32), 2))
    with pytest.raises(ValueError, match=r"q has a shift of shape \(5, 1\)"):
        PackedQTensor.pack(quantized(X, 1, shift="midrange"))
    with pytest.raises(ValueError, match="axis=None; expected 0 or 1"):
        PackedQTensor.pack(quantized(X, None))
    with pytest.raises(ValueError, match="format='e4m3' has 8 bits"):
        PackedQTensor.pack(quantized(X, 1, format="e4m3"))
