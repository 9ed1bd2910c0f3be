"""AdamW against a few lines of NumPy, its schedule, and what it leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.config import OptimizerConfig
from train.optimizer import decay_mask, make_optimizer, schedule
from train.step import Trainer


@pytest.fixture
def config(tiny_config):
    def make(steps=100, lr=0.01, **changes):
        return tiny_config(steps=steps, lr=lr, optimizer=OptimizerConfig(**changes))

    return make


def lr_of(config):
    rate = schedule(config)
    return np.array([rate(step) for step in range(config.steps + 1)])


def test_schedule_warms_up_peaks_and_falls_to_its_last_share(config):
    lr = lr_of(config(steps=100, lr=0.01, warmup=0.1, final_lr=0.2))
    np.testing.assert_allclose(lr[:11], 0.001 + 0.009 * np.arange(11) / 10, rtol=1e-5)
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(91) / 90))
    np.testing.assert_allclose(lr[10:], 0.01 * (0.2 + 0.8 * cosine), rtol=1e-5)
    assert np.argmax(lr) == 10 and lr[-1] == pytest.approx(0.002)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_schedule_without_warm_up_or_with_nothing_else(config, steps, warmup):
    lr = lr_of(config(steps=steps, warmup=warmup))
    assert np.all(lr > 0) and np.all(lr <= 0.01 * (1 + 1e-6))
    assert lr[0] == pytest.approx(0.01 if warmup == 0 else 0.01 / steps, rel=1e-5)
    assert lr.max() == pytest.approx(0.01)


def test_only_matrices_decay(tiny_config):
    params = Trainer(tiny_config()).abstract_state().params
    decays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): decay
        for path, decay in jax.tree_util.tree_flatten_with_path(decay_mask(params))[0]
    }
    names = {name for name, decay in decays.items() if decay}
    assert len(decays) == 8 and len(names) == 5  # four layers and the embedding, three norms
    assert all("_proj/kernel" in name or "embedding" in name for name in names)
    assert all("norm/scale" in name for name in decays.keys() - names)


PARAMS = {"kernel": np.float32([[0.5, -2.0], [3.0, 0.25]]), "scale": np.float32([1.0, -1.0])}
GRADS = [
    {"kernel": np.float32([[0.3, -0.1], [0.0, 0.2]]), "scale": np.float32([0.05, -0.4])},
    {"kernel": np.float32([[3.0, 4.0], [-5.0, 0.0]]), "scale": np.float32([6.0, 0.0])},
    {"kernel": np.float32([[-0.1, 0.2], [0.3, 0.1]]), "scale": np.float32([0.1, 0.1])},
]


def adamw(config, grads_of_steps):
    """Parameters after the steps, by the definition, in float64."""
    o = config.optimizer
    w = {name: value.astype(np.float64) for name, value in PARAMS.items()}
    m = {name: np.zeros_like(value) for name, value in w.items()}
    v = {name: np.zeros_like(value) for name, value in w.items()}
    for t, grads in enumerate(grads_of_steps, start=1):
        norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))
        scale = min(1, o.clip_norm / norm) if o.clip_norm else 1
        for name, g in grads.items():
            m[name] = o.beta1 * m[name] + (1 - o.beta1) * g * scale
            v[name] = o.beta2 * v[name] + (1 - o.beta2) * (g * scale) ** 2
            update = m[name] / (1 - o.beta1**t) / (np.sqrt(v[name] / (1 - o.beta2**t)) + o.eps)
            decay = o.weight_decay * w[name] if name == "kernel" else 0
            w[name] = w[name] - float(schedule(config)(t - 1)) * (update + decay)
    return w


def follow(config, grads_of_steps):
    optimizer = make_optimizer(config).transformation()
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for grads in grads_of_steps:
        updates, state = update(grads, state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
    return params, state


@pytest.mark.parametrize(
    "changes",
    [{}, {"clip_norm": None}, {"clip_norm": 0.1}, {"weight_decay": 0.0}, {"eps": 0.1, "beta1": 0}],
)
def test_steps_are_those_of_clipped_adamw(config, changes):
    config = config(**changes)
    params, _ = follow(config, GRADS)
    expected = adamw(config, GRADS)
    for name in PARAMS:
        np.testing.assert_allclose(params[name], expected[name], rtol=2e-6)


def test_a_gradient_that_is_not_finite_is_as_if_it_had_not_been(config):
    config = config()
    for bad in (np.nan, np.inf):
        poisoned = GRADS[1] | {"scale": np.float32([bad, 0.0])}
        params, state = follow(config, [GRADS[0], poisoned, poisoned, GRADS[2]])
        expected, _ = follow(config, [GRADS[0], GRADS[2]])
        for name in PARAMS:
            np.testing.assert_array_equal(params[name], expected[name])
        assert (int(state.total_notfinite), int(state.notfinite_count)) == (2, 0)


def test_skipping_never_gives_up(config):
    # The loop stops a run; the optimizer itself must not let a bad gradient through after so many.
    poisoned = jax.tree.map(lambda g: g * np.nan, GRADS[0])
    params, state = follow(config(max_skipped=2), [poisoned] * 5)
    for name, value in PARAMS.items():
        np.testing.assert_array_equal(params[name], value)
    assert int(state.notfinite_count) == 5


def test_the_peak_is_the_learning_rate_of_the_flags(config):
    changed = dataclasses.replace(config(), lr=0.5)
    assert lr_of(changed).max() == pytest.approx(0.5)


def test_a_run_s_seed_is_that_of_its_rounding(tiny_config):
    """Of moments, and of parameters in two bytes, whose bits are other ones in every step."""
    narrow = OptimizerConfig(
        master="bfloat16", first_moment="e4m3", second_moment="float16", rounding="stochastic"
    )
    config = tiny_config(optimizer=narrow)
    batch = jnp.zeros(Trainer(config).batch_shape().shape, jnp.int32)

    def after(seed, step=0):
        trainer = Trainer(dataclasses.replace(config, seed=seed))
        assert make_optimizer(trainer.config).seed == seed
        start = jax.jit(Trainer(config).init)()  # the same for all
        start = dataclasses.replace(start, step=jnp.int32(step))
        return jax.tree.leaves(jax.jit(trainer.step)(start, batch)[0].params)

    params, *others = after(0), after(3), after(0, step=1)
    for other in others:
        assert any(np.any(a != b) for a, b in zip(params, other, strict=True))
    to_nearest = dataclasses.replace(narrow, rounding="nearest")
    assert make_optimizer(dataclasses.replace(config, optimizer=to_nearest)).seed is None
