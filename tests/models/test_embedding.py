"""Rows of an embedding, and their gradient, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jfp4.models.config import LlamaConfig
from jfp4.models.embedding import look_up
from jfp4.models.llama import Llama, split_params

ROWS, WIDTH = 5, 8
rng = np.random.default_rng(0)
IDS = jnp.asarray(rng.integers(0, ROWS + 1, (1, 4, 3000)))
"""Thousands of places for every id, of which the last is one too many."""


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_and_their_gradient(stored, dtype):
    table = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), stored)
    # Sums that float32 has: what differs from them was added up in fewer bits.
    dy = jnp.asarray(rng.integers(-3, 9, (*IDS.shape, WIDTH)), dtype)
    y, gradient = jax.vjp(lambda table: look_up(table, IDS, dtype), table)
    (found,) = gradient(dy)

    assert y.dtype == dtype and found.dtype == stored
    rows = np.append(np.asarray(table.astype(dtype), np.float64), np.full((1, WIDTH), np.nan), 0)
    np.testing.assert_array_equal(np.asarray(y, np.float64), rows[IDS])
    sums = np.zeros((ROWS + 1, WIDTH))
    np.add.at(sums, np.asarray(IDS), np.asarray(dy, np.float64))
    np.testing.assert_array_equal(found, jnp.asarray(sums[:ROWS]).astype(stored))


@pytest.mark.parametrize("tied", [False, True])
def test_a_frequent_tokens_gradient_is_that_of_float32(tied):
    """It would lose two thirds of itself to sums in bfloat16."""
    sizes = dict(vocab_size=16, embed_dim=32, num_layers=1, num_heads=2, num_kv_heads=2, mlp_dim=64)
    tokens = jnp.asarray(rng.choice(16, (128, 129), p=[0.4, *[0.04] * 15]))

    def gradient(dtype):
        config = LlamaConfig(**sizes, tied_head=tied, dtype=dtype, remat="none")
        graph, params, rest = split_params(Llama(config, "bf16", rngs=nnx.Rngs(0)))

        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            return model.loss(tokens[:, :-1], tokens[:, 1:])

        return np.asarray(jax.jit(jax.grad(loss))(params)["embed"]["embedding"][...])

    narrow, wide = gradient("bfloat16"), gradient("float32")
    # A place's gradient is off by a few roundings to bfloat16, of either sign; the sum by less.
    for found, wanted in ((narrow[0], wide[0]), (narrow, wide)):
        assert np.linalg.norm(found - wanted) <= 4 * 2.0**-8 * np.linalg.norm(wanted)
