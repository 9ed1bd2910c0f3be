"""Adam with narrow moments against Adam, the bound on its updates, skipping, and clipping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jfp4 import AdamW, optim

B1, B2, EPS = 0.9, 0.95, 1e-8
NARROW = [("e4m3", "float16"), ("float16", "float16"), ("e4m3", "float32"), ("float32", "float16")]
PAIRS = [("e4m3", "float16", None), ("e4m3", "float16", 5), ("float16", "float32", None)]


@functools.cache
def adam(first="e4m3", second="float16", seed=None, b1=B1, b2=B2):
    return optim.scale_by_adam(b1, b2, EPS, first=first, second=second, seed=seed)


compiled = functools.cache(jax.jit)


def follow(optimizer, grads_of_steps):
    """Updates of every step, float64."""
    update = compiled(optimizer.update)
    state = jax.jit(optimizer.init)(jnp.zeros(grads_of_steps[0].shape))
    updates = []
    for grads in grads_of_steps:
        found, state = update(jnp.asarray(grads), state)
        updates.append(np.float64(found))
    return updates, state


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float16])
@pytest.mark.parametrize("shape", [(), (5,), (3, 128), (2, 3, 384), (4, 130), (2, 0)])
def test_blocks_hold_values_to_half_a_step(dtype, shape):
    x = np.asarray(np.random.default_rng(0).normal(size=shape), np.float32)
    blocks = jax.jit(optim.to_blocks, static_argnums=1)(x, dtype)
    found = optim.from_blocks(blocks)
    assert found.shape == x.shape and found.dtype == jnp.float32
    n = shape[-1] if shape else 1
    block = 128 if n % 128 == 0 else n
    assert blocks.codes.shape == shape and blocks.codes.itemsize == jnp.dtype(dtype).itemsize
    assert blocks.exponents.dtype == jnp.uint8
    assert blocks.exponents.shape == (*shape[:-1], n // block)
    if x.size:
        amax = np.abs(x.reshape(*shape[:-1], -1, block)).max(-1, keepdims=True)
        info = jnp.finfo(dtype)
        # The largest is in binade 7 of E4M3, 14 of float16, so the smallest normal this far down.
        least = 2.0 ** np.floor(np.log2(amax)) * 2.0 ** (info.minexp - (info.maxexp - 2))
        step = np.maximum(np.abs(x.reshape(*amax.shape[:-1], block)), least) * 2.0**-info.nmant
        error = np.abs(np.float64(found) - x).reshape(step.shape)
        assert np.all(error <= step / 2)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float16])
@pytest.mark.parametrize("exponent", [-149, -126, -100, -80, 0, 100, 126])
def test_blocks_of_any_magnitude_neither_overflow_nor_come_out_larger(dtype, exponent):
    x = jnp.float32([1.99, -1.0, 0.3, 0.0]) * jnp.float32(2.0**exponent)
    found = np.float64(optim.from_blocks(optim.to_blocks(x, dtype)))
    assert np.all(np.isfinite(found)) and np.all(np.abs(found) <= np.abs(x) * (1 + 2.0**-4))
    assert exponent <= -80 or np.all(np.abs(found - x) <= np.abs(x) * 2.0**-4)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_block_with_what_is_not_finite_is_nan_and_no_other(dtype, bad):
    x = np.ones((2, 256), np.float32)
    x[1, 130] = bad
    found = np.asarray(optim.from_blocks(optim.to_blocks(jnp.asarray(x), dtype)))
    assert (
        np.all(np.isnan(found[1, 128:])) and np.all(found[0] == 1) and np.all(found[1, :128] == 1)
    )


@pytest.mark.parametrize(("first", "second"), NARROW)
def test_the_first_step_is_adams(first, second):
    # Its moments have not been rounded yet.
    grads = [np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)]
    (found,), state = follow(adam(first, second), grads)
    (expected,), _ = follow(optax.scale_by_adam(B1, B2, EPS), grads)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert int(state.count) == 1


@pytest.mark.parametrize(("first", "second"), NARROW)
def test_the_state_after_a_step_is_adams_rounded(first, second):
    grads = [np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)]
    _, state = follow(adam(first, second), grads)
    _, exact = follow(optax.scale_by_adam(B1, B2, EPS), grads)
    moment, root = optim.decode(state.mu), optim.decode(state.nu)
    half = {"e4m3": 2.0**-4, "float16": 2.0**-11, "float32": 2.0**-23}
    small = np.abs(exact.mu) > 2.0**-10 * np.abs(exact.mu).max()  # no subnormals of E4M3
    np.testing.assert_allclose(moment[small], exact.mu[small], rtol=half[first])
    np.testing.assert_allclose(root, np.sqrt(exact.nu), rtol=half[second] + 2.0**-22)


def test_both_moments_in_float32_is_optax():
    grads = list(np.random.default_rng(0).normal(size=(4, 2, 5)).astype(np.float32))
    found, state = follow(adam("float32", "float32"), grads)
    expected, exact = follow(optax.scale_by_adam(B1, B2, EPS), grads)
    np.testing.assert_array_equal(found, expected)
    assert jax.tree.structure(state) == jax.tree.structure(exact)


def test_rounding_keeps_near_adam_over_many_steps():
    rng = np.random.default_rng(1)
    scale = np.exp(rng.normal(size=(4, 256)))
    grads = [(rng.normal(size=scale.shape) * scale).astype(np.float32) for _ in range(60)]
    exact, _ = follow(optax.scale_by_adam(B1, B2, EPS), grads)
    for seed in (None, 3):
        found, _ = follow(adam(seed=seed), grads)
        error = np.concatenate([(a - b).ravel() for a, b in zip(found, exact, strict=True)])
        size = np.concatenate([b.ravel() for b in exact])
        # A rounding of E4M3 errs by 2**-4 of the moment at most (2**-3 stochastically), and b1
        # forgets: independent errors add up to the share 1 / sqrt(1 - b1**2), 2.3, of one.
        at_most = (2.0**-4 if seed is None else 2.0**-3) / np.sqrt(1 - B1**2)
        assert np.sqrt(np.mean(error**2) / np.mean(size**2)) < at_most
        # And to no side.
        assert abs(np.mean(error)) < 5 * np.std(error) / np.sqrt(error.size * (1 - B1))


def largest_update(b1, b2, t):
    bound = (1 - b1) / np.sqrt((1 - b2) * (1 - b1**2 / b2))
    return bound * np.sqrt(1 - b2**t) / (1 - b1**t)


@pytest.mark.parametrize(("first", "second", "seed"), PAIRS)
@given(
    exponents=arrays(np.int8, (8, 4), elements=st.integers(-60, 30)),
    zero=arrays(np.bool_, (8, 4)),
)
def test_no_update_exceeds_the_largest_that_adam_can_make(first, second, seed, exponents, zero):
    # Gradients of one block over 90 binades, coming and going: what underflows beside a larger one
    # is not divided by eps.
    grads = list(np.where(zero, 0, np.float32(2.0) ** exponents).astype(np.float32))
    found, _ = follow(adam(first, second, seed), grads)
    for t, updates in enumerate(found, start=1):
        assert np.all(np.abs(updates) <= largest_update(B1, B2, t) * (1 + 1e-4))


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_root_that_underflows_beside_a_larger_one_makes_no_large_update(seed):
    # Far under what E4M3 holds beside 1 and, in the second case, what float16 does as well.
    for small in (1e-6, 1e-13):
        grads = np.full((30, 128), small, np.float32)
        grads[0, 0] = 1
        grads[:, 1] = 0
        found, _ = follow(adam(seed=seed), list(grads))
        exact, _ = follow(optax.scale_by_adam(B1, B2, 0), list(grads))
        for t, (updates, expected) in enumerate(zip(found, exact, strict=True), start=1):
            assert np.all(np.abs(updates) <= largest_update(B1, B2, t) * (1 + 1e-4))
            assert updates[1] == 0 or seed is not None
            assert t > 1 or np.all(np.abs(updates) <= np.abs(np.nan_to_num(expected)) * 1.001)


def test_stochastic_moments_are_adams_on_average():
    # Copies of one row, rounded by other bits: their mean first moment is that without rounding.
    row = np.random.default_rng(2).normal(size=128).astype(np.float32)
    grads = [np.tile(row * factor, (4096, 1)) for factor in (1, -0.3, 0.7)]
    _, exact = follow(optax.scale_by_adam(B1, B2, EPS), grads)
    _, state = follow(adam(seed=1), grads)
    for found, expected in (
        (optim.decode(state.mu), exact.mu),
        (optim.decode(state.nu), np.sqrt(exact.nu)),
    ):
        found = np.float64(found)
        deviation = found.std(0) / np.sqrt(len(found))
        # The root of a mean of squares is above the mean root, by less than half a step squared.
        bias = np.abs(expected[0]) * 2.0**-20
        assert np.all(np.abs(found.mean(0) - expected[0]) <= 5 * deviation + bias)
    assert len(np.unique(np.asarray(state.mu.codes), axis=0)) > 4000


def test_stochastic_rounding_is_a_function_of_seed_step_leaf_and_part():
    grads = {name: jnp.linspace(0.1, 1, 256) for name in ("a", "b")}

    def codes(seed=1, part=0, steps=1):
        optimizer = adam(seed=seed)
        state = optimizer.init(grads)
        for _ in range(steps):
            _, state = optimizer.update(grads, state, part=part)
        return np.asarray(state.mu["a"].codes), np.asarray(state.mu["b"].codes)

    a, b = codes()
    np.testing.assert_array_equal(a, codes()[0])
    others = [b, codes(seed=2)[0], codes(part=1)[0]]
    assert all(np.any(a != other) for other in others)
    fresh = adam(seed=1).init(grads)._replace(count=jnp.int32(1))
    assert np.any(a != np.asarray(adam(seed=1).update(grads, fresh)[1].mu["a"].codes))


def test_both_moments_of_an_element_are_rounded_independently():
    # One value in a row of them, so that each moment takes one of two neighbours everywhere.
    grads = jnp.full((2**12, 128), 0.3)
    _, state = follow(adam(seed=1), [grads])
    up = [np.ravel(m.codes) == np.max(np.asarray(m.codes)) for m in (state.mu, state.nu)]
    # Of two shares between 1/16 and 15/16; the correlation of independent ones has a standard
    # deviation of 2**-9.5.
    assert all(2.0**-4 < np.mean(u) < 1 - 2.0**-4 for u in up)
    assert abs(np.corrcoef(*up)[0, 1]) < 5 * 2.0**-9.5


@pytest.mark.parametrize(("first", "second"), [*NARROW, ("float32", "float32")])
@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_nnx_optimizers_take_the_steps_of_the_chain(first, second, jit):
    """``nnx.Optimizer`` keeps ``Blocks`` as a ``State`` of their arrays from its first step on."""
    chain = AdamW(1e-2, clip_norm=1.0, first=first, second=second).transformation()
    model = nnx.Linear(128, 3, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    update = jit(lambda optimizer, model, grads: optimizer.update(model, grads) and None)

    @(jax.jit if jit is nnx.jit else jit)
    def step(params, state, grads):
        updates, state = chain.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = chain.init(params)
    for number in range(4):
        grads = jax.tree.map(lambda p, n=number: jnp.sin(p * 100 + n), params)
        grads["bias"] = grads["bias"] * (jnp.nan if number == 2 else 1)  # a step that is skipped
        update(optimizer, model, nnx.State(jax.tree.map(nnx.Param, grads)))
        params, state = step(params, state, grads)
        jax.tree.map(
            np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model, nnx.Param)), params
        )
    assert int(optimizer.opt_state.total_notfinite[...]) == 1


def test_nothing_that_is_not_finite_becomes_a_number():
    for bad in (np.nan, np.inf):
        grads = np.ones((4, 2, 128), np.float32)
        grads[1, 0, 5] = bad
        found, _ = follow(adam(), list(grads))
        for updates in found[2:]:
            assert np.all(np.isnan(updates[0])) and np.all(np.isfinite(updates[1]))


def test_state_takes_three_bytes_a_parameter():
    shapes = {"a": (4, 64, 256), "b": (1000, 128)}
    params = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    state = jax.eval_shape(adam().init, params)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    parameters = sum(np.prod(shape) for shape in shapes.values())
    # A code of one byte, one of two, two exponents for each 128; and the count.
    assert size == 3 * parameters + 2 * parameters // 128 + 4


def test_without_a_bound_of_adam_there_is_none_of_ours():
    # b1**2 >= b2: Adam's own updates grow without limit, and these stay near them.
    grads = [np.full(128, g, np.float32) for g in (1, 1e-3, 1e-3, 1e-3)]
    found, _ = follow(adam(b1=0.9, b2=0.5), grads)
    exact, _ = follow(optax.scale_by_adam(0.9, 0.5, EPS), grads)
    np.testing.assert_allclose(found, exact, rtol=3 * 2.0**-4)


def test_unknown_formats_are_named():
    with pytest.raises(ValueError, match="first='fp8' is unknown; expected one of e4m3, float16"):
        adam(first="fp8")
    with pytest.raises(ValueError, match="second='e4m3' is unknown; expected one of float16"):
        adam(second="e4m3")


def tree(*values):
    return {"a": jnp.float32(values), "b": jnp.ones((2, 3, 4), jnp.float16)}


def test_skipping_does_as_optax_does():
    def inner():
        return optax.chain(optax.scale_by_adam(), optax.scale(-0.1))

    ours, theirs = optim.skip_not_finite(inner()), optax.apply_if_finite(inner(), 100)
    params = tree(1.0, 2.0)
    states = [ours.init(params), theirs.init(params)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for value in (1, np.nan, np.inf, 2, -np.inf, 3):
        found = []
        for i, optimizer in enumerate((ours, theirs)):
            updates, states[i] = jax.jit(optimizer.update)(tree(0.5, value), states[i], params)
            found.append(jax.tree.leaves((updates, states[i])))
        for a, b in zip(*found, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
    assert [int(states[0].total_notfinite), int(states[0].notfinite_count)] == [3, 0]


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(4096,), (64, 64), (2, 64, 64)], ids=str)
def test_no_nan_of_a_large_leaf_is_missed(shape, dtype):
    """Where CPUs take the maximum over vectors, that of floats loses what is not a number."""
    size = int(np.prod(shape))
    measure = jax.jit(optim.norm_and_finite)
    for index in np.random.default_rng(0).integers(size, size=20):
        grads = jnp.ones(size, dtype).at[index].set(jnp.nan).reshape(shape)
        assert not bool(measure({"a": grads})[1])
        codes = np.asarray(optim.to_blocks(grads.astype(jnp.float32), jnp.float16).exponents)
        assert np.count_nonzero(codes == 255) == 1


@pytest.mark.parametrize("leaf", ["a", "b"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_norm_and_what_is_finite(leaf, bad):
    grads = tree(3.0, 4.0)
    norm, finite = optim.norm_and_finite(grads)
    assert float(norm) == pytest.approx(7.0) and bool(finite)  # 9 + 16 + 24 ones
    index = (0,) * grads[leaf].ndim
    norm, finite = optim.norm_and_finite(grads | {leaf: grads[leaf].at[index].set(bad)})
    assert not np.isfinite(float(norm)) and not bool(finite)


@pytest.mark.parametrize(("value", "fits"), [(1.8e19, True), (1.9e19, False)])
def test_a_norm_that_float32_does_not_hold_is_not_finite(value, fits):
    norm, finite = optim.norm_and_finite({"a": jnp.float32([value, 1])})
    assert bool(np.isfinite(float(norm))) is bool(finite) is fits


@pytest.mark.parametrize("largest", [0.5, 6.9, 7.1])
def test_clipping_is_optaxs_or_by_the_norm_that_is_given(largest):
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), tree(3.0, 4.0))
    ours, theirs = optim.clip_by_norm(largest), optax.clip_by_global_norm(largest)
    found, expected = (each.update(grads, optax.EmptyState())[0] for each in (ours, theirs))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    told, _ = ours.update(grads, optax.EmptyState(), grad_norm=jnp.float32(70.0))
    np.testing.assert_allclose(told["a"], grads["a"] * largest / 70, rtol=1e-6)


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.95), (0.95, 0.95)])
def test_what_has_no_gradient_any_more_comes_to_rest(b1, b2):
    """Rounded to nearest, a moment beside a living one stood still, and its root went on decaying.

    Rounding is unbiased, and the mean over as many elements spreads by a few percent: a fifth is
    far more than that, and far from what rounding to nearest makes of it, three times as much.
    """
    rng = np.random.default_rng(0)
    grad = jnp.asarray(rng.uniform(0.5, 2, (16, 128)), jnp.float32)
    quiet = grad * (jnp.arange(128) == 0)

    def moved(adam):
        state = adam.init(grad)
        update = jax.jit(adam.update)
        for _ in range(30):
            _, state = update(grad, state)
        total = jnp.zeros(grad.shape)
        for _ in range(400):
            updates, state = update(quiet, state)
            total += updates
        return float(jnp.mean(total[:, 1:]))

    exact = moved(optim.scale_by_adam(b1, b2, first="float32", second="float32"))
    assert moved(optim.scale_by_adam(b1, b2)) == pytest.approx(exact, rel=0.2)
    assert moved(optim.scale_by_adam(b1, b2, seed=None)) > 3 * exact
