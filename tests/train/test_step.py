"""The functions of training against direct computations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jfp4
from jfp4 import nn
from jfp4.models.llama import REMAT, Llama, split_params
from jfp4.ops import ffi
from jfp4.ops.calibration import calibrate
from jfp4.ops.health import health
from jfp4.recipe import RECIPES
from train.config import OptimizerConfig
from train.optimizer import schedule
from train.step import Trainer, mean_loss

OUT_OF_VOCABULARY = 10**6
"""A token whose embedding is NaN, and so is everything after it."""


def tokens(seed, rows=2):
    return np.random.default_rng(seed).integers(0, 256, (rows, 17), dtype=np.int32)


@pytest.fixture(scope="module")
def trainer(tiny_config, compiled_once):
    """The FP4 trainer, its functions compiled."""
    return compiled(Trainer(tiny_config()))


@pytest.fixture(scope="module")
def exact(tiny_config):
    """Trainers without quantisation in float32, of four rows in one or two microbatches."""
    llama = dataclasses.replace(tiny_config().llama, dtype="float32", num_layers=1)

    def make(accumulation):
        return Trainer(
            tiny_config(
                llama=llama,
                quantization=RECIPES["bf16"],
                batch_size=4,
                optimizer=OptimizerConfig(accumulation=accumulation),
            )
        )

    return make


def compiled(trainer):
    for name in ("init", "step", "evaluate", "health"):
        setattr(trainer, name, jax.jit(getattr(trainer, name)))
    return trainer


@pytest.fixture(scope="module")
def trained(trainer):
    """The state after three steps."""
    state = trainer.init()
    for step in range(3):
        state, _ = trainer.step(state, tokens(step))
    return state


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def differs(a, b):
    return any(np.any(x != y) for x, y in zip(leaves(a), leaves(b), strict=True))


def test_the_start_is_the_seeds(tiny_config, trainer):
    state = trainer.init()
    assert int(state.step) == 0
    model = Llama(tiny_config().llama, tiny_config().quantization, rngs=nnx.Rngs(0))
    # Compiled and not, random numbers are the same but for the rounding of their transformation.
    for ours, theirs in zip(leaves(state.params), leaves(split_params(model)[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert not np.any(
        np.concatenate([leaf.ravel() for leaf in leaves(state.opt_state.inner_state)])
    )
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), trainer.abstract_state())
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)


def test_loss_and_gradient_norm_are_those_of_a_direct_computation(exact):
    trainer = exact(1)
    state, batch = jax.jit(trainer.init)(), tokens(1, rows=4)

    def logits_of(params):
        return nnx.merge(trainer.graph, params, state.stats, copy=True)(batch[:, :-1])

    logits = np.asarray(jax.jit(logits_of)(state.params), np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    targets = np.take_along_axis(log_probability, batch[:, 1:, None], -1)
    loss, stats, grads = jax.jit(trainer._gradient)(state, batch)
    assert float(loss) == pytest.approx(-targets.mean(), rel=1e-6)
    assert leaves(stats) == []

    # Along its own direction the loss changes by the gradient's norm.
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in leaves(grads)))
    moved = jax.jit(
        lambda size: mean_loss(
            nnx.merge(
                trainer.graph,
                jax.tree.map(lambda p, g: p + size * g / norm, state.params, grads),
                state.stats,
                copy=True,
            ),
            batch,
        )
    )
    assert (float(moved(0.02)) - float(moved(-0.02))) / 0.04 == pytest.approx(norm, rel=5e-3)


def test_microbatches_average_to_the_whole_batch(exact):
    state = jax.jit(exact(1).init)()
    batch = tokens(2, rows=4)
    loss, _, grads = jax.jit(exact(1)._gradient)(state, batch)
    split_loss, _, split_grads = jax.jit(exact(2)._gradient)(state, batch)
    # Each is a sum over 64 tokens, in another order: an error of 64 roundings at most.
    tolerance = 64 * float(np.finfo(np.float32).eps)
    assert float(split_loss) == pytest.approx(float(loss), rel=tolerance)
    for whole, split in zip(leaves(grads), leaves(split_grads), strict=True):
        np.testing.assert_allclose(split, whole, rtol=0, atol=tolerance * np.abs(whole).max())


def quantisers_run(jaxpr, times=1):
    """How often a program runs the quantiser with a scale a column, which weights alone have."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ffi_call":
            total += times * (equation.params["target_name"] == "jfp4_quantize_columns")
        inside = times * equation.params.get("length", 1)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += quantisers_run(inner, inside)
    return total


@pytest.mark.skipif(bool(ffi.missing("host")), reason=ffi.missing("host"))
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("remat", ["none", *REMAT])
def test_each_weight_is_quantised_once_a_step(tiny_config, remat, accumulation):
    llama = dataclasses.replace(tiny_config().llama, remat=remat)
    optimizer = OptimizerConfig(accumulation=accumulation)
    trainer = Trainer(tiny_config(llama=llama, optimizer=optimizer))
    with jfp4.backend("host"):
        jaxpr = jax.make_jaxpr(trainer.step)(trainer.abstract_state(), trainer.batch_shape())
    assert quantisers_run(jaxpr.jaxpr) == 4 * llama.num_layers


def test_statistics_go_from_microbatch_to_microbatch(tiny_config):
    llama = dataclasses.replace(tiny_config().llama, num_layers=1)
    whole = Trainer(tiny_config(llama=llama))
    split = Trainer(tiny_config(llama=llama, optimizer=OptimizerConfig(accumulation=2)))
    state, (a, b) = jax.jit(whole.init)(), tokens(3)

    def statistics(trainer):
        return jax.jit(lambda state, batch: trainer._gradient(state, batch)[1])

    after_one = statistics(whole)
    between = dataclasses.replace(state, stats=after_one(state, a[None]))
    expected = after_one(between, b[None])
    found = statistics(split)(state, np.stack([a, b]))
    for x, y in zip(leaves(found), leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-2)  # the compute dtype is bfloat16
    assert differs(expected, between.stats)


def test_a_step_reports_and_moves_everything(trainer, tiny_config):
    start = trainer.init()
    state, metrics = trainer.step(start, tokens(0))
    assert {name: value.shape for name, value in metrics.items()} == dict.fromkeys(
        ("loss", "grad_norm", "lr", "skipped", "skipped_in_a_row"), ()
    )
    assert float(metrics["loss"]) == pytest.approx(np.log(512), rel=0.05)
    assert float(metrics["grad_norm"]) > 0
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (0, 0)
    assert int(state.step) == 1
    for before, after in zip(leaves(start.params), leaves(state.params), strict=True):
        assert np.any(before != after)
    # The first call replaces infinite thresholds by those it saw.
    assert all(np.all(np.isinf(leaf)) for leaf in leaves(start.stats))
    assert len(leaves(state.stats)) == 8 and all(
        np.all(np.isfinite(x)) for x in leaves(state.stats)
    )
    rates = [float(metrics["lr"])]
    for step in range(1, 4):
        state, metrics = trainer.step(state, tokens(step))
        rates.append(float(metrics["lr"]))
    np.testing.assert_allclose(rates, [schedule(tiny_config())(step) for step in range(4)])


def test_what_is_not_finite_changes_nothing_and_is_counted(trainer, trained):
    poisoned = tokens(7)
    poisoned[1, 3] = OUT_OF_VOCABULARY
    state, metrics = trainer.step(trained, poisoned)
    assert not np.isfinite(float(metrics["loss"]))
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 1)
    assert_same(state.params, trained.params)
    assert_same(state.stats, trained.stats)
    assert_same(state.opt_state.inner_state, trained.opt_state.inner_state)
    assert int(state.step) == int(trained.step) + 1

    state, metrics = trainer.step(state, poisoned)
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (2, 2)
    # Then it goes on as if the two had not been, but for the count.
    state, metrics = trainer.step(state, tokens(8))
    expected, unpoisoned = trainer.step(trained, tokens(8))
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (2, 0)
    assert float(metrics["lr"]) == float(unpoisoned["lr"])
    assert_same(state.params, expected.params)
    assert_same(state.stats, expected.stats)
    assert int(state.step) == int(expected.step) + 2


def test_evaluation_uses_the_running_calibration(trainer, trained):
    def loss(*rows):
        return float(trainer.evaluate(trained.params, trained.stats, np.stack(rows)))

    a, b, c, d = tokens(11, rows=4)
    # A row's loss does not depend on its company.
    assert loss(a, b) + loss(c, d) == pytest.approx(loss(a, c) + loss(b, d), rel=1e-6)
    fresh = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), trained.stats)
    unclamped = float(trainer.evaluate(trained.params, fresh, np.stack([a, b])))
    assert np.isnan(unclamped) or unclamped != loss(a, b)
    before = [np.array(leaf) for leaf in leaves(trained)]  # copies, not views of what may change
    loss(a, b)
    for x, y in zip(before, leaves(trained), strict=True):
        np.testing.assert_array_equal(x, y)


def test_evaluation_by_microbatches_is_that_of_the_batch(trained, tiny_config):
    rows = tokens(12, rows=6)
    whole, parts = (
        Trainer(tiny_config(batch_size=n, optimizer=OptimizerConfig(accumulation=n)))
        for n in (1, 4)
    )
    for count in (6, 4, 3):  # in two, four and one
        found, expected = (
            float(t.evaluate(trained.params, trained.stats, rows[:count])) for t in (parts, whole)
        )
        assert found == pytest.approx(expected, rel=1e-6)


def test_health_is_that_of_each_layer_on_its_own_input(trained, tiny_config, monkeypatch):
    def with_operands(x, w, recipe, calibration):
        return health(x, w, recipe, calibration) | {"x": x.astype(jnp.float32), "w": w}

    monkeypatch.setattr(nn, "health", with_operands)
    measured = jax.jit(Trainer(tiny_config()).health)(trained.params, trained.stats, tokens(5))
    assert sorted(measured) == [
        "layers.attention.o_proj",
        "layers.attention.qkv_proj",
        "layers.mlp.down_proj",
        "layers.mlp.gate_up_proj",
    ]
    recipe = tiny_config().quantization
    direct = jax.jit(lambda x, w: health(x, w, recipe, calibrate(x, recipe)))
    kernels = {leaf.shape: leaf for leaf in leaves(trained.params)}
    for path, values in measured.items():
        x, w = values.pop("x"), values.pop("w")
        assert sorted(values) == ["clipped", "w_snr_db", "w_zero", "x_snr_db", "x_zero"]
        np.testing.assert_array_equal(w, kernels[w.shape])
        for layer in range(2):
            tokens_of_layer = x[layer].astype(jnp.bfloat16)
            expected = direct(tokens_of_layer, w[layer])
            for name, value in expected.items():
                assert float(values[name][layer]) == pytest.approx(float(value), rel=1e-4), path
            # Two in a hundred are beyond the 0.99 quantiles of both sides; four bits give 20 dB.
            assert 0.005 < float(values["clipped"][layer]) < 0.04
            assert 12 < float(values["x_snr_db"][layer]) < 30
            assert 12 < float(values["w_snr_db"][layer]) < 30
