"""Master weights in two bytes: exactly stored, read, and moved on average by the update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jfp4 import master, optim
from jfp4.ops.slices import Slices

NARROW = ("float16", "bfloat16")


@pytest.mark.parametrize("format", NARROW)
def test_every_stored_value_is_read_and_stored_again_exactly(format):
    stored = jnp.asarray(np.arange(2**16, dtype=np.uint16).view(jnp.dtype(format)))
    finite = np.array(jnp.isfinite(stored.astype(jnp.float32)))
    if format == "bfloat16":  # CPUs flush its subnormals
        finite &= np.abs(np.asarray(stored.astype(jnp.float32))) >= 2.0**-126
    stored = jnp.where(finite, stored, 0)
    value = jax.jit(master.decode)(stored)
    factor = 2.0**10 if format == "float16" else 1
    np.testing.assert_array_equal(
        np.float64(value)[finite] * factor, np.float64(stored.astype(jnp.float32))[finite]
    )
    again = jax.jit(lambda v: master.encode(v, format))(value)
    assert again.dtype == stored.dtype
    np.testing.assert_array_equal(np.asarray(again)[finite], np.asarray(stored)[finite])
    kept = master.apply_updates(stored, jnp.zeros(stored.shape), jnp.uint32(3))
    np.testing.assert_array_equal(np.asarray(kept)[finite], np.asarray(stored)[finite])


@given(st.floats(-63, 63, width=32))
def test_storing_in_float16_errs_by_half_a_step(x):
    value = float(master.decode(master.encode(jnp.float32(x), "float16")))
    assert abs(value - x) <= max(abs(x) * 2.0**-11, 2.0**-35)


def test_what_float16_does_not_hold_is_infinite_and_no_number():
    found = np.asarray(master.encode(jnp.float32([63.9, 64, -64, 1e9, np.nan]), "float16"))
    assert found[0] == 65440 and np.all(np.isinf(found[1:4])) and np.isnan(found[4])
    near = master.encode(jnp.float32([63.9]), "float16")
    grown = master.apply_updates(near, jnp.float32([0.2]), jnp.uint32(0))
    assert np.isinf(np.asarray(grown)[0]) and np.isinf(np.asarray(master.decode(grown))[0])


def test_the_mask_and_float32_leave_values_as_they_are():
    params = {"kernel": jnp.ones((2, 2)), "norm": {"scale": jnp.ones(2)}}
    stored = master.encode(params, "float16", {"kernel": True, "norm": {"scale": False}})
    assert (stored["kernel"].dtype, stored["norm"]["scale"].dtype) == (jnp.float16, jnp.float32)

    def by_rank(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    by_function = master.encode(params, "float16", by_rank)
    assert jax.tree.map(lambda a: a.dtype, by_function) == jax.tree.map(lambda a: a.dtype, stored)
    same = master.encode(params, "float32")
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (params, same)), strict=True))
    with pytest.raises(ValueError, match="format='fp16' is unknown; expected one of float32, fl"):
        master.encode(params, "fp16")
    with pytest.raises(TypeError, match=r"params\['w'\]\[0\] is int32; expected an array"):
        master.encode({"w": [jnp.arange(3)]}, "float16")


@pytest.mark.parametrize("format", [*NARROW, "float32"])
def test_the_gradient_is_the_values_in_the_storage_dtype(format):
    value = jnp.linspace(0.1, 2, 12).reshape(3, 4)
    stored = master.encode(value, format)

    def loss(stored):
        # As in a model: a slice is read inside of a scan that is recomputed.
        def layer(total, slice):
            return total + jnp.sum(jnp.square(master.decode(slice))), None

        return jax.lax.scan(jax.checkpoint(layer), jnp.float32(0), stored)[0]

    grads = jax.jit(jax.grad(loss))(stored)
    assert grads.dtype == stored.dtype
    np.testing.assert_array_equal(grads, (2 * master.decode(stored)).astype(stored.dtype))


@pytest.mark.parametrize(("format", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_updates_too_small_for_a_step_arrive_on_average(format, bits):
    # A hundredth of a step: to nearest it would never arrive.
    stored = master.encode(jnp.full((64, 4096), 1.0), format)
    update = 2.0 ** (1 - bits) / 100
    for step in range(10):
        stored = master.apply_updates(stored, jnp.full(stored.shape, update), jnp.uint32(step))
    moved = np.float64(master.decode(stored)) - 1
    deviation = moved.std() / np.sqrt(moved.size)
    assert abs(moved.mean() - 10 * update) < 5 * deviation and deviation < update / 10
    assert np.all(moved % 2.0 ** (1 - bits) == 0)
    nearest = master.encode(jnp.float32(1 + update), format)
    assert float(master.decode(nearest)) == 1


def test_float32_is_added_to_as_optax_does():
    params = {"a": jnp.linspace(0, 1, 7), "b": jnp.ones((2, 3, 4))}
    updates = jax.tree.map(lambda p: p * 1e-3, params)
    found = master.apply_updates(params, updates, jnp.uint32(0))
    for a, b in zip(
        *map(jax.tree.leaves, (found, optax.apply_updates(params, updates))), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def optimizer_of(seed=None, first="e4m3", second="float16"):
    return optim.skip_not_finite(
        optax.chain(
            optim.clip_by_norm(1.0),
            optim.scale_by_adam(0.9, 0.95, first=first, second=second, seed=seed),
            optax.add_decayed_weights(0.1, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
            optax.scale_by_learning_rate(optax.linear_schedule(1e-2, 1e-3, 10)),
        )
    )


PARAMS = {
    "stack": np.random.default_rng(0).normal(size=(5, 3, 256)).astype(np.float32),
    "matrix": np.random.default_rng(1).normal(size=(4, 7)).astype(np.float32),
    "vector": np.random.default_rng(2).normal(size=3).astype(np.float32),
}


def gradient(step):
    rng = np.random.default_rng(100 + step)
    return {name: rng.normal(size=p.shape).astype(np.float32) for name, p in PARAMS.items()}


@pytest.mark.parametrize(
    "moments", [("e4m3", "float16"), ("float32", "float32"), ("e4m3", "float32")]
)
def test_by_slices_is_as_at_once(moments):
    optimizer = optimizer_of(None, *moments)
    stored = jax.tree.map(jnp.asarray, PARAMS)
    state, whole, whole_state = optimizer.init(stored), stored, optimizer.init(stored)

    @jax.jit
    def at_once(params, state, grads):
        updates, state = optimizer.update(jax.tree.map(lambda g: g / 8, grads), state, params)
        return optax.apply_updates(params, updates), state

    by_slices = jax.jit(lambda *args: master.apply_gradients(optimizer, *args, scale=1 / 8, step=0))
    for step in range(4):
        grads = gradient(step)
        if step == 2:
            grads["matrix"][0, 0] = np.nan
        stored, state, norm = by_slices(stored, state, grads)
        whole, whole_state = at_once(whole, whole_state, grads)
        if step != 2:
            assert float(norm) == pytest.approx(float(optax.tree.norm(grads)) / 8, rel=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(whole_state)
    assert int(state.total_notfinite) == 1
    for a, b in zip(*map(jax.tree.leaves, ((stored, state), (whole, whole_state))), strict=True):
        assert a.dtype == b.dtype
        if a.dtype == jnp.uint8:  # a value that another order of sums puts across a middle
            assert np.mean(np.asarray(a) != np.asarray(b)) < 0.01
        else:
            # float16 roots may differ by a rounding as well, and so what they lead to.
            np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=2.0**-10, atol=1e-6)


@pytest.mark.parametrize("format", [*NARROW, "float32"])
def test_a_skipped_step_changes_no_bit(format):
    optimizer = optimizer_of(7)
    step = jax.jit(lambda *a, n: master.apply_gradients(optimizer, *a, seed=7, step=n))
    stored = master.encode(jax.tree.map(jnp.asarray, PARAMS), format)
    stored, state, _ = step(stored, optimizer.init(PARAMS), gradient(0), n=0)
    bad = gradient(1)
    bad["stack"][4, 2, 255] = np.inf
    kept, kept_state, _ = step(stored, state, bad, n=1)
    before = jax.tree.leaves((stored, state.inner_state))
    after = jax.tree.leaves((kept, kept_state.inner_state))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not bool(kept_state.last_finite) and int(kept_state.notfinite_count) == 1


@pytest.mark.parametrize("of", [lambda g: g, Slices.of])
@pytest.mark.parametrize("shape", [(2, 5, 256), (5, 4, 256)])
def test_a_gradient_of_another_shape_is_refused(of, shape):
    stored = {"a": jnp.ones(3), "stack": jnp.ones((4, 5, 256))}
    grads = {"a": jnp.ones(3), "stack": of(jnp.ones(shape))}
    optimizer = optimizer_of(None)
    with pytest.raises(ValueError, match=r"grads has .* in place 1; expected \(4, 5, 256\)"):
        master.apply_gradients(optimizer, stored, optimizer.init(stored), grads, step=0)


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"b": 1.0, "c": 2.0}, r"without \['a'\], with \['c'\]"),
        ({"a": 1.0}, r"without \['b'\]"),
        ([1.0, 2.0], r"without \['a'\], without \['b'\], with \[0\], with \[1\]"),
    ],
)
def test_gradients_of_another_tree_are_refused(grads, message):
    stored = {"a": jnp.float32(1), "b": jnp.float32(2)}
    optimizer = optimizer_of(None)
    with pytest.raises(ValueError, match=f"grads is another tree than stored: {message}; expected"):
        master.apply_gradients(optimizer, stored, optimizer.init(stored), grads, step=0)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
@pytest.mark.parametrize(("format", "mask"), [("float32", None), ("float16", False)])
def test_what_is_not_narrowed_is_float32_whatever_it_was(dtype, format, mask):
    stored = master.encode(jnp.asarray([1, 2], dtype), format, mask)
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(master.decode(stored), [1, 2])


def test_slices_are_rounded_by_bits_of_their_own():
    optimizer = optimizer_of(7)
    same = {"stack": jnp.ones((6, 2, 256)) * jnp.linspace(0.1, 1, 256)}
    stored = master.encode(same, "float16")
    grads = jax.tree.map(lambda p: p * 0.37, same)
    new, state, _ = master.apply_gradients(
        optimizer, stored, optimizer.init(same), grads, seed=7, step=3
    )
    for array in (new["stack"], state.inner_state[1].mu["stack"].codes):
        rows = np.asarray(array).reshape(12, 256)
        assert len(np.unique(rows, axis=0)) == 12
    again, *_ = master.apply_gradients(
        optimizer, stored, optimizer.init(same), grads, seed=7, step=4
    )
    assert np.any(np.asarray(again["stack"]) != np.asarray(new["stack"]))


# bfloat16 is left out: CPUs have none, and widen every whole leaf to compute with it.
@pytest.mark.parametrize("format", ["float32", "float16"])
@pytest.mark.parametrize("moments", [("e4m3", "float16"), ("float32", "float32")])
@pytest.mark.parametrize("seed", [None, 1])
def test_a_step_takes_the_memory_of_a_few_slices(format, moments, seed):
    shape = (64, 128, 1024)
    optimizer = optimizer_of(seed, *moments)

    def init(params):
        return master.encode(params, format), optimizer.init(params)

    def step(state, grads, number):
        *state, norm = master.apply_gradients(optimizer, *state, grads, seed=1, step=number)
        return state, norm

    state = jax.eval_shape(init, {"kernel": jax.ShapeDtypeStruct(shape, np.float32)})
    number = jax.ShapeDtypeStruct((), np.int32)
    compiled = jax.jit(step, donate_argnums=0).lower(state, state[0], number).compile()
    memory = compiled.memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= held - 4 * len(jax.tree.leaves(state))
    # Float32 values of a slice: value, gradient, two moments, the update, and a root; no leaf's.
    assert memory.temp_size_in_bytes <= 6 * 4 * np.prod(shape[1:])
