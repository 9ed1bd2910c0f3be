"""AdamW by its kernel: the chain's step, in the same state and in place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfp4
from jfp4 import master
from jfp4.adamw import AdamW
from jfp4.ops import ffi
from jfp4.ops.slices import Slices
from jfp4.optim import bound_of_first, clip_by_norm

PARAMS = {
    "stack": np.random.default_rng(0).normal(size=(5, 3, 256)).astype(np.float32),
    "matrix": np.random.default_rng(1).normal(size=(4, 130)).astype(np.float32),
    "vector": np.random.default_rng(2).normal(size=3).astype(np.float32),
    "number": np.float32(0.5),
}
MOMENTS = [("e4m3", "float16"), ("float32", "float32"), ("float16", "float32")]


@pytest.fixture(autouse=True)
def _host():
    if why := ffi.missing("host"):
        pytest.skip(why)


def optimizer_of(first, second, seed=None):
    return AdamW(
        lambda count: 1e-2 * 0.9**count,
        b2=0.95,
        weight_decay=0.1,
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        clip_norm=1.0,
        first=first,
        second=second,
        seed=seed,
    )


@functools.cache
def step_of(optimizer):
    """The step, which is compiled once for each back end that it is called with."""
    return jax.jit(lambda *args, n: optimizer.step(*args, scale=1 / 8, seed=7, step=n))


def follow(optimizer, format, backends, bad=None):
    """Stored parameters, state and norm after a step by each of the back ends."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    stored, state, norm = master.encode(params, format), optimizer.init(params), None
    for number, name in enumerate(backends):
        rng = np.random.default_rng(100 + number)
        grads = {
            name: 3 * rng.normal(size=p.shape).astype(np.float32) for name, p in PARAMS.items()
        }
        if number == bad:
            grads["vector"][1] = np.nan
        with jfp4.backend(name):
            stored, state, norm = step_of(optimizer)(stored, state, grads, n=number)
    return stored, state, norm


@pytest.mark.parametrize("format", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("first", "second"), MOMENTS)
@pytest.mark.parametrize("seed", [None, 1])
def test_a_step_by_the_kernel_is_the_chains(format, first, second, seed):
    """Whatever either of them left: their states are one tree."""
    optimizer = optimizer_of(first, second, seed)
    expected = follow(optimizer, format, ["xla"] * 4, bad=2)
    for backends in (["host"] * 4, ["xla", "host", "xla", "host"]):
        found = follow(optimizer, format, backends, bad=2)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
            # Other roundings of float32 move a value by a few units in the last place of the terms
            # that it is the sum of, and take one in a thousand across a middle, or a threshold, of
            # what it is rounded to, which is coarser by 2**13 and more.
            different = np.abs(a - b) > 2.0**-20 * np.max(np.abs(b), initial=0)
            assert np.mean(different) <= max(0.01, 1.5 / a.size)


@pytest.mark.parametrize("rates", [(0.99, 0.9), (0.95, 0.9025)])
def test_a_first_moment_may_outlast_the_second(rates):
    """Then no ratio bounds it; roots are zero at the first step."""
    optimizer = dataclasses.replace(optimizer_of("e4m3", "float16"), b1=rates[0], b2=rates[1])
    assert np.isinf(bound_of_first(*rates))
    expected, found = (follow(optimizer, "float32", [name] * 3)[0] for name in ("xla", "host"))
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2.0**-20 * np.max(np.abs(b)))


def test_a_step_s_seed_may_be_any_integer():
    optimizer, weights = AdamW(0.1), jnp.ones((4, 256), jnp.bfloat16)
    state, grads = optimizer.init(weights), jnp.full((4, 256), 0.3, jnp.bfloat16)
    for name in ("xla", "host"):
        with jfp4.backend(name):
            one, other = (
                optimizer.step(weights, state, grads, seed=seed, step=0)[0]
                for seed in (-1, 2**32 - 1)
            )
        np.testing.assert_array_equal(one, other)


def test_a_first_step_may_be_given_the_state_to_write_in():
    optimizer, weights = AdamW(0.1), jnp.ones((4, 256), jnp.bfloat16)
    grads = jnp.full((4, 256), 0.3, jnp.bfloat16)
    step = jax.jit(lambda *args: optimizer.step(*args, step=0), donate_argnums=(0, 1))
    jax.block_until_ready(step(weights, optimizer.init(weights), grads))  # no array stands twice


@pytest.mark.parametrize(
    ("made", "given", "words"),
    [
        (("e4m3", "float16"), ("float16", "float16"), "first moment in e4m3; expected float16"),
        (("float16", "float32"), ("e4m3", "float32"), "first moment in float16; expected e4m3"),
        (("e4m3", "float16"), ("e4m3", "float32"), "second moment in float16; expected float32"),
        (("float32", "float32"), ("float32", "float16"), "second moment in float32; expected fl"),
    ],
)
def test_a_state_in_other_formats_is_refused(made, given, words):
    weights = jnp.ones((4, 256))
    first, second = made
    state = AdamW(0.1, first=first, second=second).init(weights)
    first, second = given
    with pytest.raises(ValueError, match=f"^state keeps the {words}"):
        AdamW(0.1, first=first, second=second).step(weights, state, weights, step=0)


@pytest.mark.parametrize("name", ["xla", "host"])
def test_seed_and_step_choose_the_bits_that_weights_are_rounded_by(name):
    optimizer, weights = AdamW(0.1), jnp.ones((4, 256), jnp.bfloat16)
    state, grads = optimizer.init(weights), jnp.full((4, 256), 0.3, jnp.bfloat16)
    with jfp4.backend(name):
        one, *others = (
            np.asarray(optimizer.step(weights, state, grads, seed=seed, step=step)[0], np.float32)
            for seed, step in ((1, 0), (2, 0), (1, 1))
        )
    # Each is one of two neighbours; other bits choose another for a good part of them.
    assert all(np.mean(one != other) > 0.1 for other in others)


@pytest.mark.parametrize("format", ["float32", "float16"])
def test_a_skipped_step_changes_no_bit(format):
    optimizer = optimizer_of("e4m3", "float16", 3)
    before = follow(optimizer, format, ["host"] * 2)
    after = follow(optimizer, format, ["host"] * 3, bad=2)
    assert not np.isfinite(after[2])
    for a, b in zip(
        jax.tree.leaves((before[0], before[1].inner_state)),
        jax.tree.leaves((after[0], after[1].inner_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert (int(after[1].total_notfinite), int(after[1].notfinite_count)) == (1, 1)


@pytest.mark.parametrize("backend", ["xla", "host"])
@pytest.mark.parametrize(("first", "second"), MOMENTS)
def test_a_gradient_may_come_in_slices(backend, first, second):
    """Of matrices, of what has more axes, and of vectors, which have no slices of their own."""
    shapes = {"matrices": (5, 3, 256), "more": (3, 2, 4, 130), "vectors": (4, 128)}
    rng = np.random.default_rng(0)
    params, grads = (
        {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
        for _ in range(2)
    )
    optimizer = optimizer_of(first, second, seed=1)
    results = []
    for given in (grads, jax.tree.map(Slices.of, grads)):
        stored, state = master.encode(params, "bfloat16"), optimizer.init(params)
        with jfp4.backend(backend):
            for n in range(2):
                stored, state, norm = step_of(optimizer)(stored, state, given, n=n)
        results.append((stored, state, norm))
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("axes", [1, 2])
def test_a_mask_by_shape_is_of_whole_leaves(axes):
    """Not of the slices that XLA's path takes a stack in."""
    optimizer = AdamW(
        0.1, weight_decay=0.5, mask=lambda params: jax.tree.map(lambda p: p.ndim > axes, params)
    )
    params = {"stack": jnp.ones((2, 3, 128)), "matrix": jnp.ones((4, 128)), "vector": jnp.ones(4)}
    grads = jax.tree.map(jnp.zeros_like, params)
    for name in ("xla", "host"):
        with jfp4.backend(name):
            stored, *_ = optimizer.step(params, optimizer.init(params), grads, step=0)
        shrunk = {key: bool(np.all(np.asarray(leaf) < 1)) for key, leaf in stored.items()}
        assert shrunk == {key: leaf.ndim > axes for key, leaf in params.items()}


@pytest.mark.parametrize("of", [lambda mask: mask, lambda mask: lambda params: mask])
def test_a_mask_may_have_one_answer_for_many_leaves(of):
    optimizer = AdamW(0.1, weight_decay=0.5, mask=of({"all": True, "none": False}))
    params = {name: {"a": jnp.ones((2, 128)), "b": jnp.ones(3)} for name in ("all", "none")}
    grads = jax.tree.map(jnp.zeros_like, params)
    for name in ("xla", "host"):
        with jfp4.backend(name):
            stored, *_ = optimizer.step(params, optimizer.init(params), grads, step=0)
        assert all(np.all(np.asarray(leaf) < 1) for leaf in stored["all"].values())
        assert all(np.all(np.asarray(leaf) == 1) for leaf in stored["none"].values())


def test_a_learning_rate_may_be_a_number():
    schedule, number = (
        AdamW(rate, first="float32", second="float32") for rate in (lambda count: 0.25, 0.25)
    )
    for a, b in zip(
        *map(jax.tree.leaves, (follow(o, "float32", ["host"]) for o in (schedule, number))),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_float32_moments_are_so_whatever_the_parameters_are(dtype):
    optimizer = AdamW(0.1, b2=0.999, first="float32", second="float32")
    params = {"a": jnp.ones((2, 3), dtype)}
    state, transformation = optimizer.init(params), optimizer.transformation()
    for _ in range(2):
        for leaf in jax.tree.leaves(state):
            assert leaf.ndim == 0 or leaf.dtype == np.float32
        _, state = transformation.update(params, state, params)


def test_unknown_formats_are_named():
    with pytest.raises(ValueError, match="first='fp8' is unknown; expected one of e4m3"):
        AdamW(0.1, first="fp8")


@pytest.mark.parametrize(
    "fields",
    [
        {"b1": 1.0}, {"b2": -0.1}, {"eps": 0.0}, {"eps": np.inf}, {"weight_decay": -1.0},
        {"weight_decay": np.inf}, {"clip_norm": 0.0}, {"learning_rate": np.nan},
        {"learning_rate": -1.0},
    ],
)  # fmt: skip
def test_what_would_turn_or_stop_every_step_is_refused(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=f"^{name}={value}; expected "):
        AdamW(**{"learning_rate": 0.1} | fields)
    with pytest.raises(ValueError, match="max_norm=-1; expected a positive number"):
        clip_by_norm(-1)


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("format", ["float32", "float16"])
@pytest.mark.parametrize(("first", "second"), MOMENTS)
def test_everything_is_replaced_in_its_own_memory(format, first, second, sliced):
    optimizer = optimizer_of(first, second)

    def init(params):
        return master.encode(params, format), optimizer.init(params)

    def step(state, grads, number):
        *state, norm = optimizer.step(*state, grads, step=number)
        return state, norm

    shapes = {"stack": (4, 64, 512), "matrix": (128, 512)}
    params = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    state = jax.eval_shape(init, params)
    number, grads = jax.ShapeDtypeStruct((), np.int32), state[0]
    if sliced:
        grads = grads | {"stack": jax.eval_shape(Slices.of, grads["stack"])}
    with jfp4.backend("host"):
        compiled = jax.jit(step, donate_argnums=0).lower(state, grads, number).compile()
    memory = compiled.memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= held - 4 * len(jax.tree.leaves(state))
    # The gradient's norm reads it in float32, a slice or a matrix at a time.
    assert memory.temp_size_in_bytes <= 4 * 128 * 512 + 2**12


def test_vmap_is_a_loop():
    """Of members with rates of their own: each clips by its own norm."""
    optimizer = optimizer_of("e4m3", "float16", seed=1)
    members = [{"stack": k * PARAMS["stack"], "matrix": -k * PARAMS["matrix"]} for k in (1.0, 3.0)]
    stored = [master.encode(jax.tree.map(jnp.float32, p), "bfloat16") for p in members]
    given = [(p, optimizer.init(p), jax.tree.map(jnp.sin, p)) for p in stored]

    def step(*args):
        return optimizer.step(*args, seed=7, step=3)

    with jfp4.backend("host"):
        expected = [jax.jit(step)(*args) for args in given]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *given)
        found = jax.jit(jax.vmap(step))(*stacked)
    for number, alone in enumerate(expected):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(np.asarray(a[number]), np.asarray(b))
