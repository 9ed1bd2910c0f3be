"""Training with narrow moments, masters and activations: bytes, resuming, losses, overflow."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import assert_same_arrays, interrupt_at, lines_of, saved_arrays

from jfp4.models.config import MODELS
from jfp4.recipe import RECIPES
from train.config import OptimizerConfig, TrainConfig
from train.loss_scale import LossScale
from train.main import STOPPED
from train.step import Trainer

MOMENTS = ("--optimizer.first_moment=e4m3", "--optimizer.second_moment=float16")
NARROW = dict(first_moment="e4m3", second_moment="float16")


def size(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    # Bytes a matrix element: master, gradient, moments of one and two bytes, their scales.
    ("master", "expected"),
    [("float32", 4 + 4 + 3), ("float16", 2 + 2 + 3), ("bfloat16", 2 + 2 + 3)],
)
def test_bytes_a_parameter_of_llama13b(master, expected):
    optimizer = OptimizerConfig(master=master, **NARROW)
    trainer = Trainer(
        TrainConfig(model="llama13b", llama=MODELS["llama13b"], optimizer=optimizer, batch_size=1)
    )
    state = trainer.abstract_state()
    grads = jax.eval_shape(trainer._gradient, state, trainer.batch_shape())[2]
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    measured = size((state.params, state.opt_state, grads)) / parameters
    # Two exponents of a byte for each 128; norm scales, 4 parameters in 10**5, stay float32.
    assert expected + 2 / 128 < measured < expected + 2 / 128 + 8 * 4e-5
    assert size((state.params, state.opt_state)) / parameters <= 9


@pytest.mark.parametrize("master", ["float16", "bfloat16"])
def test_a_run_stopped_and_resumed_is_the_unbroken_one(runs, tmp_path, monkeypatch, master):
    flags = (*MOMENTS, f"--optimizer.master={master}", "--optimizer.rounding=stochastic")
    assert runs.tiny(tmp_path / "unbroken", *flags) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        assert runs.tiny(tmp_path / "run", *flags) == STOPPED
    assert runs.resume(tmp_path / "run") == 0
    expected = saved_arrays(tmp_path / "unbroken", 12)
    assert_same_arrays(saved_arrays(tmp_path / "run", 12), expected)
    kinds = {str(array.dtype) for array in expected.values()}
    assert {master, "float16", "uint8", "float32"} <= kinds
    lines = [
        [(line["loss"], line.get("loss_scale")) for line in lines_of(tmp_path / name)]
        for name in ("run", "unbroken")
    ]
    assert lines[0] == lines[1]
    assert lines[0][0][1] == (2.0**16 if master == "float16" else None)


@pytest.mark.slow
@pytest.mark.timeout(900)  # several runs
def test_the_loss_is_float32s_within_what_a_seed_makes(runs, tmp_path):
    def losses(name, *flags):
        found = []
        for seed in range(3):
            run_dir = tmp_path / f"{name}-{seed}"
            rest = ("--steps=100", "--eval_every=100", "--checkpoint.every=0", f"--seed={seed}")
            rest += ("--recipe=bf16", "--log.health_every=0")
            assert runs.tiny(run_dir, *rest, *flags) == 0
            found.append(lines_of(run_dir)[-1]["valid_loss"])
        return np.array(found)

    exact = losses("float32")
    assert np.all(exact < 0.9 * np.log(256))  # it has learned something to compare
    gap = losses("narrow", *MOMENTS, "--optimizer.master=float16") - exact
    # Rounding sets a run on another path, as a seed does: it may change the loss by as much as
    # seeds do, and the mean of three by less, by their root.
    assert abs(gap.mean()) < np.ptp(exact) / np.sqrt(3), gap


def test_a_weight_too_large_for_float16_ends_the_run(runs, tmp_path, capsys):
    flags = ("--lr=1000", "--optimizer.master=float16", "--checkpoint.every=1", "--log.every=1")
    assert runs.tiny(tmp_path / "run", *flags) == 2
    errors = capsys.readouterr().err
    assert "error: a weight reached 64 by step 1, more than it can in float16" in errors
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def tokens(seed, rows=2):
    return np.random.default_rng(seed).integers(0, 256, (rows, 17), dtype=np.int32)


def trainer_of(tiny_config, dtype="float32", recipe="bf16", **optimizer):
    llama = dataclasses.replace(tiny_config().llama, dtype=dtype)
    config = tiny_config(
        llama=llama, quantization=RECIPES[recipe], optimizer=OptimizerConfig(**optimizer)
    )
    return Trainer(config)


def with_scale(state, scale):
    return dataclasses.replace(state, loss_scale=LossScale(jnp.float32(scale), jnp.int32(5)))


@pytest.mark.parametrize("recipe", ["bf16", "fp4"])
def test_float16_steps_are_scaled_and_an_overflow_is_skipped(tiny_config, recipe):
    trainer = trainer_of(tiny_config, "float16", recipe, master="float16", **NARROW)
    step = jax.jit(trainer.step)
    state = jax.jit(trainer.init)()
    state, metrics = step(state, tokens(0))
    assert float(metrics["loss_scale"]) == 2.0**16 and int(metrics["skipped"]) == 0
    assert int(state.loss_scale.fitting_steps) == 1

    skipped, metrics = step(with_scale(state, 2.0**40), tokens(1))
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 1)
    assert np.isfinite(float(metrics["loss"])) and not np.isfinite(float(metrics["grad_norm"]))
    assert float(metrics["loss_scale"]) == 2.0**40
    assert float(skipped.loss_scale.value) == 2.0**39 and int(skipped.loss_scale.fitting_steps) == 0
    kept = (skipped.params, skipped.stats, skipped.opt_state.inner_state)
    for a, b in zip(
        jax.tree.leaves(kept),
        jax.tree.leaves((state.params, state.stats, state.opt_state.inner_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    _, metrics = step(with_scale(skipped, 2.0**16), tokens(1))
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 0)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_scale_of_the_loss_is_taken_off_again(tiny_config, accumulation):
    scaled = trainer_of(tiny_config, master="float16", accumulation=accumulation)
    plain = trainer_of(tiny_config, accumulation=accumulation)
    state, batch = jax.jit(scaled.init)(), tokens(3)
    exact = jax.jit(plain.init)()
    grads = jax.jit(plain._gradient)(exact, batch)[2]
    gradient, step = jax.jit(scaled._gradient), jax.jit(scaled.step)
    norm = float(jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads))))
    for scale in (2.0**8, 2.0**12):
        loss, _, found = gradient(with_scale(state, scale), batch)
        for g, expected in zip(jax.tree.leaves(found), jax.tree.leaves(grads), strict=True):
            # Weights are rounded to 2**-12, which moves the loss's gradient about as much.
            error = np.linalg.norm(np.float64(g) / scale - expected) / np.linalg.norm(expected)
            assert error < 2.0**-6
        assert float(loss) == pytest.approx(5.5, abs=0.8)  # of the loss itself, not the scaled one
        _, metrics = step(with_scale(state, scale), batch)
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=2.0**-6)


@pytest.mark.parametrize(
    ("dtype", "master", "scaled"),
    [
        ("bfloat16", "float32", False),
        ("bfloat16", "bfloat16", False),
        ("float16", "float32", True),
        ("bfloat16", "float16", True),
    ],
)
def test_the_loss_is_scaled_where_something_is_float16(tiny_config, dtype, master, scaled):
    trainer = trainer_of(tiny_config, dtype, master=master)
    assert (trainer.abstract_state().loss_scale is not None) == scaled
    kinds = {leaf.dtype for leaf in jax.tree.leaves(trainer.abstract_state().params)}
    assert kinds == {jnp.dtype(master), jnp.dtype("float32")}  # norm scales are never narrow
