"""Working through stacks slice by slice is doing so at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfp4.ops.slices import Slices, scan_written_out, update_by_slices


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


def test_a_stack_is_its_slices():
    stack = jnp.arange(24.0).reshape(4, 2, 3)
    slices = Slices.of(stack)
    assert slices.shape == stack.shape and len(jax.tree.leaves(slices)) == 4
    np.testing.assert_array_equal(slices.stack(), stack)
    weights = jnp.cos(stack)
    gradient = jax.grad(lambda x: jnp.sum(Slices.of(x).stack() * weights))(stack)
    np.testing.assert_array_equal(gradient, weights)


def scanned(scan, stacks, others):
    def f(x, own):
        w, b = own
        x = jnp.tanh(x @ w["w"] + b)
        return x, {"sum": jnp.sum(x), "x": x}

    def loss(stacks):
        x, made = scan(f, jnp.ones((2, 3)), (stacks, others))
        return jnp.sum(x) + jnp.sum(made["sum"]), made

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(stacks)


def test_a_written_out_scan_is_a_scan():
    """Of stacks, or of slices, whose gradients are slices."""
    rng = np.random.default_rng(0)
    stacks = {"w": jnp.asarray(rng.normal(size=(5, 3, 3)), jnp.float32)}
    others = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    expected = scanned(jax.lax.scan, stacks, others)
    of_stacks = scanned(scan_written_out, stacks, others)
    value, gradient = scanned(scan_written_out, jax.tree.map(Slices.of, stacks), others)
    assert isinstance(gradient["w"], Slices)
    for found in (of_stacks, (value, {"w": gradient["w"].stack()})):
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            # Five products of three terms, and as many sums of them on the way back.
            np.testing.assert_allclose(a, b, rtol=0, atol=64 * 2.0**-24 * np.abs(b).max())


def test_a_gradient_by_slices_is_copied_to_no_stack():
    slices = jax.eval_shape(Slices.of, jax.ShapeDtypeStruct((5, 3, 3), jnp.float32))

    def has_stack(of_gradient):
        def f(slices):
            _, gradient = scanned(scan_written_out, {"w": slices}, jnp.ones((5, 3)))
            return of_gradient(gradient["w"])

        return "f32[5,3,3]" in jax.jit(f).lower(slices).compile().as_text()

    assert has_stack(Slices.stack) and not has_stack(lambda gradient: gradient)


def test_a_written_out_scan_traces_its_function_once():
    traced = []

    def f(x, w):
        traced.append(w)
        return x * w, None

    x, _ = scan_written_out(f, jnp.float32(1), jnp.arange(1.0, 6))
    assert float(x) == 120 and len(traced) == 1


def test_what_is_carried_keeps_its_type_and_there_are_slices():
    with pytest.raises(TypeError, match=r"f makes float32\[\] of bfloat16\[\]"):
        scan_written_out(lambda c, x: (c.astype(x.dtype) + x, None), jnp.bfloat16(0), jnp.ones(3))
    for xs in (jnp.ones((0, 2)), ()):
        with pytest.raises(ValueError, match="xs has no slices"):
            scan_written_out(lambda c, x: (c, x), 0.0, xs)
