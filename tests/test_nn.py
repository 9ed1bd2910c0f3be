"""The NNX layer: its arithmetic is ``jfp4.linear``'s, its state and conversion are checked here."""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jfp4
from jfp4.nn import MOMENTUM, CalibrationStat, Linear, convert
from jfp4.ops import reference as ref
from jfp4.recipe import RECIPES, Recipe

M, K, N = 32, 16, 24
U = 2.0**-24

_rng = np.random.default_rng(0)
# Three calls' worth. Multiples of 1/64 over a power of two of tokens, so that means are exact.
X = np.round(_rng.normal(size=(3, M, K)) * np.array([1, 3, 0.5])[:, None, None] * 64) / 64
X = X.astype(np.float32) + np.float32(0.25)
W = (_rng.normal(size=(K, N)) * np.linspace(0.02, 0.08, N)).astype(np.float32)
BIAS = _rng.normal(size=N).astype(np.float32)

change = dataclasses.replace
MEAN = Recipe(occ_alpha=0.95, x_shift="mean")
QUANTIZED = {"fp4": RECIPES["fp4"], "fp4_cast": RECIPES["fp4_cast"], "mean": MEAN}


def make(kind, *, bias=True, **kwargs):
    """A layer with this module's weights."""
    layer = kind(K, N, use_bias=bias, rngs=nnx.Rngs(0), **kwargs)
    layer.kernel[...] = jnp.asarray(W, layer.kernel.dtype)
    if bias:
        layer.bias[...] = jnp.asarray(BIAS, layer.bias.dtype)
    return layer


def thresholds(x, recipe):
    """What the layer should observe of ``x``, by the oracle."""
    mean = ref.mean_shift(x) if recipe.x_shift == "mean" else np.zeros((1, K))
    lo, hi = ref.thresholds(ref.sample(x - mean, recipe.occ_sample), recipe.occ_alpha)
    return [np.float32(v) for v in (lo, hi, mean)]


def stats(layer):
    return [None if v is None else np.asarray(v[...]) for v in (layer.lo, layer.hi, layer.mean)]


# ---------------------------------------------------------------------------------- arguments


def test_takes_the_arguments_of_nnx_linear():
    """Every one, by its name, with the same default and the same effect on the parameters."""
    ours, theirs = (inspect.signature(kind.__init__).parameters for kind in (Linear, nnx.Linear))
    assert [name for name in ours if name not in theirs] == ["recipe", "kwargs"]
    for name, parameter in ours.items():
        if name in theirs:
            assert (parameter.kind, parameter.default) == (
                theirs[name].kind,
                theirs[name].default,
            )
    given = {
        "use_bias": True,
        "dtype": jnp.bfloat16,
        "param_dtype": jnp.float16,
        "precision": "highest",
        "kernel_init": nnx.initializers.normal(0.5),
        "bias_init": nnx.initializers.ones,
        "dot_general": lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs),
        "promote_dtype": lambda values, *, dtype: tuple(v.astype(dtype) for v in values),
        "preferred_element_type": jnp.float32,
        "kernel_metadata": {"out_sharding": ("embed", "mlp"), "eager_sharding": False},
        "bias_metadata": {"out_sharding": ("mlp",), "eager_sharding": False},
    }
    assert {"self", "in_features", "out_features", "rngs", *given} == set(theirs)
    expected = nnx.Linear(K, N, rngs=nnx.Rngs(3), **given)
    got = Linear(K, N, recipe="bf16", rngs=nnx.Rngs(3), **given)
    for name in ("in_features", "out_features", *given):
        if hasattr(expected, name):
            assert getattr(got, name) == getattr(expected, name)
    for name in ("kernel", "bias"):
        one, other = getattr(got, name), getattr(expected, name)
        np.testing.assert_array_equal(one[...], other[...])
        assert one.dtype == jnp.float16
        assert one.get_metadata() == other.get_metadata()
    np.testing.assert_array_equal(got(X[0]), expected(X[0]))


@pytest.mark.parametrize(
    "argument",
    [
        {"precision": "highest"},
        {"dot_general": lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs)},
        {"preferred_element_type": jnp.float32},
        {"promote_dtype": lambda values, *, dtype: values},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_refuses_what_a_quantised_product_would_ignore(argument):
    (name,) = argument
    with pytest.raises(ValueError, match=f"^{name}=.*; expected the default"):
        Linear(K, N, recipe="fp4", rngs=nnx.Rngs(0), **argument)
    layer = Linear(K, N, recipe="bf16", rngs=nnx.Rngs(0), **argument)
    with pytest.raises(ValueError, match=f"^{name}=.*; expected the default"):
        layer.set_recipe("fp8")
    assert layer.recipe == RECIPES["bf16"] and layer(jnp.asarray(X[0])).shape == (M, N)


def test_errors():
    with pytest.raises(ValueError, match="recipe='fp5'"):
        Linear(K, N, recipe="fp5", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="out_sharding=x"):
        make(Linear)(X[0], out_sharding="x")
    with pytest.raises(TypeError, match="kernel_int"):
        Linear(K, N, kernel_int=None, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("recipe", [RECIPES["fp4"], MEAN], ids=["fp4", "mean"])
def test_a_refused_input_leaves_the_statistics_as_they_were(recipe):
    layer = make(Linear, recipe=recipe)
    old = [None if stat is None else np.asarray(stat) for stat in stats(layer)]
    for shape in ((4, K - 1), ()):
        with pytest.raises(ValueError, match=rf"inputs has shape {re.escape(str(shape))}; expect"):
            layer(np.ones(shape, np.float32))
    with pytest.raises(TypeError, match="x is complex64"):
        layer(np.ones((4, K), np.complex64))
    for stat, before in zip(stats(layer), old, strict=True):
        np.testing.assert_array_equal(stat, before)


# --------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("name", "bias"), [("fp4", True), ("fp4_cast", True), ("mean", True), ("mean", False)]
)
def test_training_is_linear_with_its_own_calibration(name, bias):
    layer = make(Linear, bias=bias, recipe=QUANTIZED[name])
    x = X[:2]  # [2, M, K]: leading axes count tokens
    expected = jfp4.linear(x, W, QUANTIZED[name], bias=BIAS if bias else None)
    y = layer(x)
    assert y.shape == (2, M, N)
    np.testing.assert_array_equal(y, expected)
    if bias:
        assert np.any(y != make(Linear, bias=False, recipe=QUANTIZED[name])(x))


@pytest.mark.parametrize("name", ["fp4", "mean"])
def test_evaluation_is_linear_with_the_running_calibration(name):
    recipe = QUANTIZED[name]
    layer = make(Linear, recipe=recipe)
    layer(X[0])
    layer.eval()
    lo, hi, mean = (jnp.asarray(v) for v in thresholds(X[0], recipe))
    kept = jfp4.Calibration(lo, hi, mean if recipe.x_shift else None)
    expected = jfp4.linear(X[1], W, recipe, bias=BIAS, calibration=kept)
    np.testing.assert_array_equal(layer(X[1]), expected)
    assert np.any(expected != jfp4.linear(X[1], W, recipe, bias=BIAS))


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "param_dtype", "result"),
    [
        ("float32", None, "float32", "float32"),
        ("bfloat16", None, "float32", "float32"),
        ("bfloat16", None, "bfloat16", "bfloat16"),
        ("float32", "bfloat16", "float32", "bfloat16"),
        ("bfloat16", "float32", "float32", "float32"),
        ("int32", None, "float32", "float32"),
    ],
)
def test_dtype_is_the_compute_dtype_and_that_of_the_result(x_dtype, dtype, param_dtype, result):
    dtypes = {"dtype": dtype and jnp.dtype(dtype), "param_dtype": jnp.dtype(param_dtype)}
    x = jnp.asarray(X[0]).astype(x_dtype)
    y = make(Linear, recipe="fp4_cast", **dtypes)(x)
    assert y.dtype == result == make(nnx.Linear, **dtypes)(x).dtype
    kernel, bias = (jnp.asarray(v).astype(param_dtype) for v in (W, BIAS))
    np.testing.assert_array_equal(y, jfp4.linear(x.astype(result), kernel, "fp4_cast", bias=bias))


def test_the_kernel_is_quantised_without_a_cast_in_between():
    y = make(Linear, recipe="fp4_cast", dtype=jnp.bfloat16)(X[0])
    x, narrow = jnp.asarray(X[0], jnp.bfloat16), jnp.asarray(W, jnp.bfloat16)
    np.testing.assert_array_equal(y, jfp4.linear(x, W, "fp4_cast", bias=BIAS))
    assert np.any(y != jfp4.linear(x, narrow, "fp4_cast", bias=BIAS))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_bf16_recipe_is_nnx_linear_bit_for_bit(bias, dtype):
    dtype = dtype and jnp.dtype(dtype)

    def loss(layer):
        y = layer(X[0])
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    results = []
    for kind, kwargs in ((Linear, {"recipe": "bf16"}), (nnx.Linear, {})):
        layer = make(kind, bias=bias, dtype=dtype, **kwargs)
        (_, y), grads = nnx.value_and_grad(loss, has_aux=True)(layer)
        results.append([y, grads.kernel[...], *([grads.bias[...]] if bias else [])])
        assert not nnx.state(layer, CalibrationStat)
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def test_gradients_are_those_of_linear():
    layer = make(Linear, recipe=MEAN)

    def loss(layer, x):
        return jnp.sum(jnp.sin(layer(x)))

    def direct(w, bias, x):
        return jnp.sum(jnp.sin(jfp4.linear(x, w, MEAN, bias=bias)))

    expected = jax.grad(direct, argnums=(0, 1, 2))(W, BIAS, X[0])
    grads, dx = nnx.grad(loss, argnums=(0, 1))(layer, jnp.asarray(X[0]))
    for got, value in zip((grads.kernel[...], grads.bias[...], dx), expected, strict=True):
        np.testing.assert_array_equal(got, value)
        assert np.any(value != 0)
    # The call was a training call like any other.
    for got, value in zip(stats(layer), thresholds(X[0], MEAN), strict=True):
        np.testing.assert_array_equal(got, value)


# ------------------------------------------------------------------------ running calibration


def test_which_statistics_a_recipe_has():
    shapes = {
        name: [None if v is None else v.shape for v in stats(make(Linear, recipe=recipe))]
        for name, recipe in {**QUANTIZED, "cast and mean": change(MEAN, occ_alpha=None)}.items()
    }
    assert shapes == {
        "fp4": [(), (), None],
        "fp4_cast": [None, None, None],
        "mean": [(), (), (1, K)],
        "cast and mean": [None, None, (1, K)],
    }


@pytest.mark.parametrize("recipe", [RECIPES["fp4"], MEAN], ids=["fp4", "mean"])
def test_the_first_call_replaces_and_the_rest_average(recipe):
    layer = make(Linear, recipe=recipe)
    assert np.isneginf(stats(layer)[0]) and np.isposinf(stats(layer)[1])
    assert MOMENTUM == 0.9
    expected = thresholds(X[0], recipe)
    for call, x in enumerate(X):
        if call:
            new = thresholds(x, recipe)
            # In float32, operation by operation, as the layer does outside jit.
            expected = [
                np.float32(0.9) * a + np.float32(0.1) * b
                for a, b in zip(expected, new, strict=True)
            ]
        layer(x)
        for got, value in zip(stats(layer), expected, strict=True):
            if got is not None:
                assert got.dtype == np.float32
                np.testing.assert_array_equal(got, value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("recipe", [RECIPES["fp4"], MEAN], ids=["fp4", "mean"])
def test_what_is_not_finite_leaves_the_statistics_as_they_were(recipe, bad):
    layer, broken = make(Linear, recipe=change(recipe, occ_alpha=1.0)), np.array(X[0])
    broken[..., 0] = bad
    for before in (None, X[1]):
        if before is not None:
            layer(before)
        old = [None if stat is None else np.asarray(stat) for stat in stats(layer)]
        assert np.all(np.isnan(layer(broken)))
        found = [np.asarray(stat) for stat in stats(layer) if stat is not None]
        assert not any(np.any(np.isnan(stat)) for stat in found)
        # The least element is a number in both, and is the lower threshold of an infinity's batch.
        kept = slice(2) if np.isnan(bad) else slice(1, 2)
        np.testing.assert_array_equal(stats(layer)[kept], old[kept])
        if recipe is MEAN:
            assert np.all(np.isfinite(stats(layer)[2]))
    layer.eval()
    assert np.all(np.isfinite(layer(X[0])))


def test_a_layer_that_saw_nothing_clamps_and_shifts_nothing():
    layer = make(Linear, recipe=MEAN)
    layer.eval()
    y = layer(X[0])
    plain = jfp4.linear(X[0], W, change(MEAN, occ_alpha=None, x_shift=None), bias=BIAS)
    np.testing.assert_array_equal(y, plain)


def test_eval_keeps_the_statistics_and_train_switches_back():
    layer = make(Linear)
    layer(X[0])
    kept = stats(layer)
    layer.eval()
    evaluated = layer(X[1])
    assert stats(layer)[:2] == kept[:2]
    layer.train()
    np.testing.assert_array_equal(layer(X[1]), jfp4.linear(X[1], W, bias=BIAS))
    assert np.any(evaluated != jfp4.linear(X[1], W, bias=BIAS))
    assert stats(layer)[0] != kept[0] and stats(layer)[1] != kept[1]


@pytest.mark.parametrize("name", QUANTIZED)
def test_in_evaluation_a_token_does_not_depend_on_its_neighbours(name):
    layer = make(Linear, recipe=QUANTIZED[name])
    layer(X[0])
    others = X[2] / 4
    others[0] = X[0, 0]
    trained = [np.asarray(layer(x))[0] for x in (X[0], others)]
    if name != "fp4_cast":  # which has no statistics
        assert np.any(trained[0] != trained[1])
    layer.eval()
    together = layer(X[0])
    np.testing.assert_array_equal(layer(others)[0], together[0])
    np.testing.assert_array_equal(layer(X[0, :1])[0], together[0])
    np.testing.assert_array_equal(layer(X[0, 0]), together[0])


@pytest.mark.parametrize("recipe", [RECIPES["fp4"], MEAN], ids=["fp4", "mean"])
def test_jit_updates_the_statistics_and_compiles_once(recipe):
    layer, eager = make(Linear, recipe=recipe), make(Linear, recipe=recipe)
    traces = []

    @nnx.jit
    def call(layer, x):
        traces.append(x)
        return layer(x)

    for x in X:
        y, expected = call(layer, x), eager(x)
        np.testing.assert_allclose(y, expected, rtol=0, atol=4 * U * np.abs(expected).max())
        for got, value in zip(stats(layer), stats(eager), strict=True):
            # The average of two is three roundings, or two where they are contracted.
            assert got is None or np.allclose(got, value, rtol=4 * U, atol=U)
    assert len(traces) == 1


# ------------------------------------------------------------------------------------ monitor


@pytest.mark.parametrize("evaluate", [False, True], ids=["train", "eval"])
def test_monitor_leaves_the_health_of_the_last_call(evaluate):
    layer = make(Linear, recipe=Recipe(occ_alpha=0.95))
    layer(X[0])
    assert not nnx.state(layer, nnx.Intermediate)
    layer.set_attributes(Linear, monitor=True)
    if evaluate:
        layer.eval()
    for x in X[:2]:
        layer(x)
    (path, seen), *more = nnx.to_flat_state(nnx.state(layer, nnx.Intermediate))
    assert path == ("health",) and not more
    (measures,) = seen.get_value()
    lo, hi, _ = thresholds(X[0] if evaluate else X[1], layer.recipe)
    codes, scale = ref.compensate(X[1], lo, hi, 1, "e2m1")
    w_codes, w_scale, _ = ref.quantize(W, 0, "e2m1")

    def decibels(v, approximation):
        v = v.astype(np.float64)
        return 10 * np.log10(np.sum(v**2) / np.sum((v - approximation) ** 2))

    expected = {
        "clipped": np.mean((X[1] < lo) | (X[1] > hi)),
        "x_snr_db": decibels(X[1], codes * scale),
        "w_snr_db": decibels(W, w_codes * w_scale),
        "x_zero": np.mean(codes == 0),
        "w_zero": np.mean(w_codes == 0),
    }
    assert {name: float(v) for name, v in measures.items()} == pytest.approx(expected, rel=1e-5)
    # Thresholds of a third the size clip most of the second call's tokens' range.
    assert (expected["clipped"] > 0.3) == evaluate


def test_monitor_under_jit():
    layer, eager = make(Linear, bias=False), make(Linear, bias=False)
    layer.monitor = eager.monitor = True
    call = nnx.jit(lambda layer, x: layer(x))
    for x in X[:2]:
        call(layer, x)
        eager(x)
        for got, value in zip(
            jax.tree.leaves(layer.health.get_value()),
            jax.tree.leaves(eager.health.get_value()),
            strict=True,
        ):
            np.testing.assert_allclose(got, value, rtol=1e-5)


# ------------------------------------------------------------------------------------ convert


class Special(nnx.Linear):
    """A subclass, which may compute anything."""


class Block(nnx.Module):
    """Layers in every kind of container, one of them shared."""

    def __init__(self, rngs):
        self.up_proj = nnx.Linear(K, K, rngs=rngs)
        self.list = nnx.List([nnx.Linear(K, K, rngs=rngs) for _ in range(2)])
        self.dict = nnx.Dict(a=nnx.Linear(K, K, rngs=rngs))
        self.shared = self.up_proj
        self.special = Special(K, K, rngs=rngs)
        self.norm = nnx.RMSNorm(K, rngs=rngs)
        self.lm_head = nnx.Linear(K, N, rngs=rngs)

    def __call__(self, x):
        for layer in (self.up_proj, *self.list, self.dict.a, self.shared, self.special, self.norm):
            x = x + layer(x)
        return self.lm_head(x)


LINEAR = ["up_proj", "list.0", "list.1", "dict.a", "lm_head"]


def block():
    return Block(nnx.Rngs(0))


def converted(model):
    """Paths of the quantised layers."""
    return {
        ".".join(map(str, path))
        for path, layer in nnx.iter_modules(model)
        if isinstance(layer, Linear) and layer.recipe.quantizes
    }


def paths(*names):
    # A shared layer is met once, under the name that sorts first.
    return {"shared" if name == "up_proj" else name for name in names}


def snapshot(model):
    """Everything a conversion could change: types, attributes and values."""
    state = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    return (
        [(path, type(module), sorted(vars(module))) for path, module in nnx.iter_modules(model)],
        jax.tree.map(lambda v: v.tobytes(), state),
    )


def test_convert_is_in_place():
    model = block()
    parameters = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    objects = {path: node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Param)}
    values = {path: np.array(v[...]) for path, v in parameters.items()}
    layers = dict(nnx.iter_modules(model))
    assert convert(model) is model
    after = {path: node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Param)}
    assert after.keys() == objects.keys() and all(after[p] is objects[p] for p in after)
    assert all(layers[path] is module for path, module in nnx.iter_modules(model))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        np.testing.assert_array_equal(variable[...], values[path])
    assert converted(model) == paths("up_proj", "list.0", "list.1", "dict.a")
    for layer in (model.up_proj, model.list[1], model.dict.a):
        assert type(layer) is Linear and layer.recipe == RECIPES["fp4"]


def test_convert_shares_what_was_shared():
    model = convert(block(), MEAN)
    assert model.shared is model.up_proj
    model.up_proj(X[0])
    model.shared(X[1])
    expected = zip(thresholds(X[0], MEAN), thresholds(X[1], MEAN), strict=True)
    for got, (first, second) in zip(stats(model.up_proj), expected, strict=True):
        np.testing.assert_allclose(got, 0.9 * first + 0.1 * second, rtol=4 * U, atol=U)


def test_a_converted_model_computes_by_jfp4():
    model = convert(block(), "fp4_cast")
    x = X[0]
    for layer in (model.up_proj, *model.list, model.dict.a, model.up_proj):
        x = x + jfp4.linear(x, layer.kernel[...], "fp4_cast", bias=layer.bias[...])
    x = x + model.special(x)
    expected = model.lm_head(x + model.norm(x))
    np.testing.assert_array_equal(model(X[0]), expected)
    assert np.any(expected != block()(X[0]))


def test_convert_takes_modules_of_nnx():
    with pytest.raises(TypeError, match=r"model is a flax\.linen\..*Dense; expected a flax\.nnx"):
        convert(linen.Dense(8))


def test_convert_skips_by_the_recipes_patterns():
    assert converted(convert(block(), Recipe(skip=()))) == paths(*LINEAR)
    assert converted(convert(block(), Recipe(skip=("list.*", "*head")))) == paths(
        "up_proj", "dict.a"
    )
    # Patterns hold for the whole path, and letters for their own case.
    assert converted(convert(block(), Recipe(skip=("list", "LM_HEAD")))) == paths(*LINEAR)
    model = convert(block(), Recipe(skip=("list.0",)))
    assert type(model.list[0]) is nnx.Linear


def test_convert_where():
    by_path = convert(block(), "fp4", lambda path, layer: path.startswith("list."))
    assert converted(by_path) == {"list.0", "list.1"}
    by_layer = convert(block(), "fp4", lambda path, layer: layer.out_features == N)
    assert converted(by_layer) == {"lm_head"}  # in place of the recipe's skip patterns
    asked = {}
    convert(block(), "fp4", lambda path, layer: asked.setdefault(path, type(layer)) is not None)
    assert asked == dict.fromkeys(paths(*LINEAR), nnx.Linear)


def test_convert_leaves_subclasses_alone():
    class Own(Linear):
        pass

    model = nnx.Dict(own=Own(K, N, recipe="fp8", rngs=nnx.Rngs(0)), plain=make(nnx.Linear))
    convert(model, "fp4", lambda path, layer: True)
    assert type(model.own) is Own and model.own.recipe == RECIPES["fp8"]
    assert type(model.plain) is Linear
    special = convert(block(), Recipe(skip=())).special
    assert type(special) is Special and not hasattr(special, "recipe")


def test_convert_of_the_root():
    layer = make(nnx.Linear)
    kernel = layer.kernel
    assert convert(layer) is layer and type(layer) is Linear and layer.kernel is kernel
    np.testing.assert_array_equal(layer(X[0]), jfp4.linear(X[0], W, bias=BIAS))
    seen = []
    convert(layer, "fp8", lambda path, layer: not seen.append(path))
    assert seen == [""] and layer.recipe == RECIPES["fp8"]


def test_convert_again_gives_the_new_recipe():
    model = convert(block(), "fp4")
    model.up_proj(X[0])
    assert np.isfinite(stats(model.up_proj)[0])
    convert(model, "fp8")  # has no statistics, and so no place for them unless one is kept
    assert stats(model.up_proj) == [None, None, None]
    convert(model, MEAN)
    assert {model.up_proj.recipe, model.list[0].recipe, model.dict.a.recipe} == {MEAN}
    lo, hi, mean = stats(model.up_proj)
    assert np.isneginf(lo) and np.isposinf(hi) and not np.any(mean)  # and forgets the old
    convert(model, "fp8")
    assert stats(model.up_proj) == [None, None, None]
    assert not nnx.state(model, CalibrationStat)


def test_convert_back_to_bf16():
    model = convert(block(), MEAN)
    quantised = model.up_proj(X[0])
    convert(model, "bf16")
    assert np.any(quantised != model.up_proj(X[0]))
    np.testing.assert_array_equal(model(X[0]), block()(X[0]))
    assert not nnx.state(model, CalibrationStat) and not converted(model)


def test_convert_of_nothing_names_the_layers():
    with pytest.raises(ValueError, match=r"no layer .* was chosen.*: none$"):
        convert(nnx.RMSNorm(K, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"no layer .*: the model itself$"):
        convert(make(nnx.Linear), "fp4", lambda path, layer: False)
    model = block()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"no layer .* was chosen") as error:
        convert(model, Recipe(skip=("*",)))
    assert set(str(error.value).split(": ")[1].split(", ")) == paths(*LINEAR)
    with pytest.raises(ValueError, match="recipe='fp5'"):
        convert(model, "fp5")
    assert snapshot(model) == before


def test_a_refused_layer_changes_nothing():
    model = nnx.Dict(
        a=make(nnx.Linear),
        b=make(Linear, recipe="fp8"),
        c=make(nnx.Linear, precision="highest", preferred_element_type=jnp.float32),
        d=make(nnx.Linear),
    )
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"^c: precision=highest, preferred_element_type=\S+ \S+; expected the"
    ):
        convert(model)
    assert snapshot(model) == before and model.b.recipe == RECIPES["fp8"]
    # What is not chosen is not refused, and a plain product ignores nothing.
    convert(model, "fp4", lambda path, layer: path != "c")
    assert type(model.c) is nnx.Linear and converted(model) == {"a", "b", "d"}
    convert(model, "bf16")
    assert type(model.c) is Linear and model.c.precision == "highest"


def test_convert_after_the_optimizer_was_made():
    model = block()
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
    convert(model, change(MEAN, occ_alpha=None))
    target = jnp.asarray(_rng.normal(size=(M, N)), jnp.float32)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X[0]) - target) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    before = np.array(model.list[0].kernel[...])
    losses = [float(step(model, optimizer)) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert np.any(model.list[0].kernel[...] != before)
    assert np.all(stats(model.list[0])[2] != 0)


def test_a_stacked_layer_has_stacked_statistics():
    def stack(kind, **kwargs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def make_all(rngs):
            return kind(K, K, rngs=rngs, **kwargs)

        return make_all(nnx.Rngs(0))

    shapes = [(3,), (3,), (3, 1, K)]
    assert [v.shape for v in stats(stack(Linear, recipe=MEAN))] == shapes
    layers = convert(stack(nnx.Linear), MEAN)
    assert [v.shape for v in stats(layers)] == shapes

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def apply(x, layer):
        return layer(x)

    once = nnx.jit(lambda layer, x: layer(x))
    y, x = apply(jnp.asarray(X[0]), layers), X[0]
    for i in range(3):
        layer = Linear(K, K, recipe=MEAN, rngs=nnx.Rngs(0))
        layer.kernel[...] = layers.kernel[i]
        x = once(layer, x)
        for got, value in zip(stats(layers), stats(layer), strict=True):
            np.testing.assert_allclose(got[i], value, rtol=8 * U, atol=8 * U)
    np.testing.assert_allclose(y, x, rtol=0, atol=16 * U * np.abs(x).max())


def test_converting_twice_alike_is_converting_once():
    assert snapshot(convert(convert(block()))) == snapshot(convert(block()))


def test_a_prepared_weight_is_used_until_another_recipe():
    layer = jfp4.nn.Linear(8, 6, recipe="fp4_cast", rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)
    expected = layer(x)
    layer.prepare()
    np.testing.assert_array_equal(layer(x), expected)
    layer.kernel[...] = layer.kernel[...] * 3
    np.testing.assert_array_equal(layer(x), expected)  # it is not looked at
    layer.prepare()
    changed = layer(x)
    assert np.any(changed != expected)
    layer.set_recipe("fp8")
    assert np.any(layer(x) != changed)
    layer.set_recipe("bf16")
    layer.prepare()
    assert not nnx.to_flat_state(nnx.state(layer, jfp4.nn.Prepared))
