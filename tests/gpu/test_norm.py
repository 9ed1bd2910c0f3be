"""RMSNorm's kernels: float64's results within float32's bounds, whatever the memory held."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rms_norm_oracle import DTYPES, EPSILON, assert_close, case, forward_and_gradients, oracle

from jfp4.ops import ffi
from jfp4.ops.rms_norm import rms_norm, rms_norm_of_stream

SHAPES = ((1, 1), (3, 5), (129, 127), (2, 3, 4096), (500, 5120), (2, 5119), (3, 8192))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_float64s_within_float32s_bounds(backend, poisoned, shape, terms, dtype):
    operands = case(shape, dtype, terms)
    for found in poisoned(forward_and_gradients, operands):
        assert_close(found, *oracle(operands))


@pytest.mark.parametrize("dtype", DTYPES)
def test_repetition_changes_nothing(backend, dtype):
    operands = case((1000, 512), dtype, 2)
    run = jax.jit(forward_and_gradients)
    first = run(operands)
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, run(operands), first)


def test_vmap_is_a_loop(backend):
    (x, added), scale, dstream, dy = case((3, 40, 96), "bfloat16", 2)
    scales = jnp.stack([scale, 2 * scale, -scale])

    def step(x, added, scale, dstream, dy):
        return forward_and_gradients(((x, added), scale, dstream, dy))

    together = jax.jit(jax.vmap(step))(x, added, scales, dstream, dy)
    for i in range(3):
        operands = x[i], added[i], scales[i], dstream[i], dy[i]
        alone = jax.jit(step)(*operands)
        for name in ("stream", "y", "dx"):  # the parts of dscale XLA adds up, as it likes
            np.testing.assert_array_equal(together[name][i], alone[name])
        found = jax.tree.map(lambda a, i=i: a[i], together)
        assert_close(found, *oracle((operands[:2], *operands[2:])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_in_its_row(backend, dtype):
    (x, added), scale, dstream, dy = case((4, 96), dtype, 2)
    x = x.at[1, 5].set(jnp.nan).at[2, 7].set(jnp.inf)
    found = jax.jit(forward_and_gradients)(((x, added), scale, dstream, dy))
    for name in ("y", "dx"):
        assert np.all(np.isfinite(np.float32(found[name])[[0, 3]]))
        assert np.all(np.isnan(np.float32(found[name])[1]))
    assert np.isnan(np.float32(found["y"])[2, 7])
    assert np.all(np.isnan(np.float32(found["dx"])[2]))
    assert np.all(np.isnan(found["dscale"][jnp.array([5, 7])]))


def test_wide_rows_are_xlas(backend):
    """A row that no block holds is not refused."""
    operands = case((2, ffi.NORM_COLUMNS + 8), "bfloat16", 2)
    assert_close(jax.jit(forward_and_gradients)(operands), *oracle(operands))


def test_remat_changes_nothing(backend):
    (x, added), scale, _, dy = case((64, 256), "bfloat16", 2)

    def loss(norm, x, added, scale):
        total, y = norm((x, added), scale)
        return jnp.sum((y * dy + total).astype(jnp.float32))

    norm = functools.partial(rms_norm_of_stream, epsilon=EPSILON)
    gradient = jax.jit(jax.grad(loss, argnums=(1, 2, 3)), static_argnums=0)
    plain = gradient(norm, x, added, scale)
    jax.tree.map(
        np.testing.assert_array_equal, gradient(jax.checkpoint(norm), x, added, scale), plain
    )


def test_kernels_serve_what_asks_for_them(backend):
    """Or a path that is lost would look like one that works."""
    x, scale = jnp.zeros((4, 64)), jnp.ones(64)
    program = (
        jax.jit(jax.grad(lambda x: jnp.sum(rms_norm(x, scale, epsilon=EPSILON)))).lower(x).as_text()
    )
    assert program.count("jfp4_rms_norm_gradient") >= 1
