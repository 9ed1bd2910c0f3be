"""RMSNorm and the gradients of a residual stream, held to float64 by float32's own error bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rms_norm_oracle import DTYPES, assert_close, case, forward_and_gradients, oracle

from jfp4.ops.rms_norm import rms_norm, rms_norm_of_stream


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 64), (7, 257)])
def test_is_float64s_within_float32s_bounds(shape, terms, dtype):
    operands = case(shape, dtype, terms)
    assert_close(jax.jit(forward_and_gradients)(operands), *oracle(operands))


def test_gradients_are_those_of_the_plain_formula():
    """By JAX's own differentiation of what the docstring says, in float64."""
    with jax.enable_x64(True):
        (x, added), scale, _, _ = case((4, 33), "float32", 2)

        def plain(x, added, scale):
            total = x + added
            square = jnp.mean(total**2, axis=-1, keepdims=True) + 1e-5
            return jnp.sum(total**3) + jnp.sum(jnp.sin(total * scale / jnp.sqrt(square)))

        def by_rule(x, added, scale):
            total, y = rms_norm_of_stream((x, added), scale, epsilon=1e-5)
            return jnp.sum(total**3) + jnp.sum(jnp.sin(y))

        wide = [jnp.asarray(a, jnp.float64) for a in (x, added, scale)]
        for found, wanted in zip(
            jax.grad(by_rule, (0, 1, 2))(*wide), jax.grad(plain, (0, 1, 2))(*wide), strict=True
        ):
            # Each is a few dozen terms, none larger than the result's largest, in float32.
            bound = 100 * 2.0**-24 * np.max(np.abs(wanted))
            np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_a_stream_is_rounded_as_its_dtype_has_it(dtype):
    """Down to its subnormals, and up to its largest number; float32's subnormals CPUs flush."""
    info = jnp.finfo(dtype)
    exponents = np.linspace(max(info.minexp - info.nmant - 1, -100), info.maxexp - 1.5, 64)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 64)) * 2.0**exponents, dtype)
    x = x.at[0].set(jnp.asarray(float(info.max) / 2, dtype))
    exact = np.asarray(x, np.float32) + np.asarray(x[::-1], np.float32)
    stream, _ = jax.jit(lambda *t: rms_norm_of_stream(t, jnp.ones(64), epsilon=1e-5))(x, x[::-1])
    expected = exact.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(stream, np.float32), expected)


def test_vmap_is_a_loop():
    (x, added), scale, _, _ = case((3, 4, 32), "bfloat16", 2)
    scales = jnp.stack([scale, 2 * scale, -scale])

    def norm(x, added, scale):
        return rms_norm_of_stream((x, added), scale, epsilon=1e-5)

    together = jax.vmap(norm)(x, added, scales)
    for i in range(3):
        for found, wanted in zip(together, norm(x[i], added[i], scales[i]), strict=True):
            np.testing.assert_array_equal(found[i], wanted)


def test_what_is_no_number_stays_in_its_row():
    x = np.ones((3, 8), np.float32)
    x[1, 3] = np.nan
    x[2, 0] = np.inf
    y = rms_norm(jnp.asarray(x), jnp.ones(8), epsilon=1e-5)
    assert np.all(np.isfinite(y[0]))
    assert np.all(np.isnan(y[1]))
    assert np.isnan(y[2, 0])
    zeros, dx = jax.value_and_grad(lambda x: jnp.sum(rms_norm(x, jnp.ones(8), epsilon=1e-5)))(
        jnp.zeros((2, 8))
    )
    assert zeros == 0
    np.testing.assert_allclose(dx, 1e-5**-0.5, rtol=8 * 2.0**-24)


@pytest.mark.parametrize(
    ("terms", "scale", "error", "message"),
    [
        ((), (8,), ValueError, "terms are none; expected one, or two alike"),
        (((2, 8),) * 3, (8,), ValueError, "terms are .*expected one, or two alike"),
        (((2, 8), (1, 8)), (8,), ValueError, r"float32\[2, 8\], float32\[1, 8\]; expected one"),
        (((2, 8),), (4,), ValueError, r"scale has shape \(4,\) and x \(2, 8\)"),
        (((),), (), ValueError, r"scale has shape \(\) and x \(\)"),
    ],
)
def test_refuses_what_does_not_fit(terms, scale, error, message):
    with pytest.raises(error, match=message):
        rms_norm_of_stream([jnp.ones(shape) for shape in terms], jnp.ones(scale), epsilon=1e-5)


def test_refuses_what_are_no_floats():
    with pytest.raises(TypeError, match="x is int32; expected an array of a floating-point dtype"):
        rms_norm(jnp.ones((2, 8), jnp.int32), jnp.ones(8), epsilon=1e-5)
    with pytest.raises(TypeError, match="scale is int32"):
        rms_norm(jnp.ones((2, 8)), jnp.ones(8, jnp.int32), epsilon=1e-5)
    with pytest.raises(TypeError, match="x is float; expected an array"):
        rms_norm_of_stream([1.0], jnp.ones(8), epsilon=1e-5)
