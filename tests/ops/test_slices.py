"""Updating stacks slice by slice is updating them at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfp4.ops.slices import update_by_slices


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16, jnp.uint8])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_every_slice_is_updated_once_from_its_own_value(dtype, length):
    stack = jnp.arange(length * 6).reshape(length, 2, 3).astype(dtype)
    extra = jnp.arange(length * 3.0).reshape(length, 3)
    count = jnp.int32(7)
    seen = jnp.zeros(length, jnp.int32)

    def step(i, held, extra):
        new = held["stack"] + 2 * extra.astype(dtype)
        return {"stack": new, "count": held["count"] + 1, "seen": i + 1}

    held = {"stack": stack, "count": count, "seen": seen}
    stacked = {"stack": True, "count": False, "seen": True}
    new = jax.jit(lambda held, extra: update_by_slices(step, held, stacked, extra))(held, extra)
    np.testing.assert_array_equal(new["stack"], stack + 2 * extra[:, None].astype(dtype))
    np.testing.assert_array_equal(new["seen"], np.arange(1, length + 1))
    # What is no stack is the same for every slice: counted once, not once a slice.
    assert int(new["count"]) == 8 and new["stack"].dtype == dtype


def test_donated_stacks_are_written_in_place():
    held = [jax.ShapeDtypeStruct((32, 64, 256), dtype) for dtype in (np.float32, np.uint8)]

    def step(i, held, extra):
        wide, narrow = held
        # Each reads the other: an order is needed in which neither is overwritten first.
        both = wide + narrow.astype(jnp.float32)
        return [both, (both + extra).astype(jnp.uint8)]

    def update(held, extra):
        return update_by_slices(step, held, [True, True], extra)

    compiled = jax.jit(update, donate_argnums=0).lower(held, held[0]).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 32 * 64 * 256 * 5
    # Slices of five float32 values an element: the two read, the two made, what is added.
    assert memory.temp_size_in_bytes <= 64 * 256 * 4 * 5
