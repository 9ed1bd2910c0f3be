"""The linear layer and its gradients against the oracle, switch by switch.

The data make float32 exact wherever it can be: activations are multiples of 1/64 over a power of
two of tokens, so their mean is exact; gradients lie in [0.5, 2) with 8 bits, so that the sums of
folded E5M2 codes are exact. What is left are single roundings, and a code that differed in one
place would show.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jfp4.ops import reference as ref
from jfp4.ops.calibration import Calibration, calibrate
from jfp4.ops.linear import linear, save_codes
from jfp4.ops.prepare import prepare
from jfp4.recipe import RECIPES, Recipe

M, K, N = 32, 48, 40
U = 2.0**-24  # float32's unit roundoff
SLOPE = 11 * U  # of the estimator's slope, see test_dge

_rng = np.random.default_rng(0)
X = np.round(_rng.normal(size=(M, K)) * 64).astype(np.float32) / 64 + np.float32(0.25)
X[:, ::16] *= 8
W = (_rng.normal(size=(K, N)) * np.linspace(0.02, 0.08, N)).astype(np.float32)
DY = (_rng.integers(64, 256, (M, N)) * _rng.choice([-1, 1], (M, N)) / 128).astype(np.float32)
BIAS = _rng.normal(size=N).astype(np.float32)

CAST = RECIPES["fp4_cast"]
FP4 = Recipe(occ_alpha=0.95)
change = dataclasses.replace
SWITCHES = {
    "fp4": RECIPES["fp4"],
    "fp4_cast": CAST,
    "fp8": RECIPES["fp8"],
    "x e1m2": change(FP4, x_format="e1m2"),
    "x e3m0": change(FP4, x_format="e3m0"),
    "x e4m3": change(CAST, x_format="e4m3"),
    "x e5m2": change(CAST, x_format="e5m2"),
    "w e1m2": change(FP4, w_format="e1m2"),
    "w e3m0": change(FP4, w_format="e3m0"),
    "w e4m3": change(CAST, w_format="e4m3"),
    "gradient e4m3": change(FP4, grad_format="e4m3"),
    "x scale tensor": change(CAST, x_scale="tensor"),
    "w scale tensor": change(FP4, w_scale="tensor"),
    "x midrange": change(CAST, x_shift="midrange"),
    "x mean": change(CAST, x_shift="mean"),
    "x mean and clamp": change(FP4, x_shift="mean"),
    "w midrange": change(CAST, w_shift="midrange"),
    "w midrange and slope": change(FP4, w_shift="midrange"),
    "both midranges": change(CAST, x_shift="midrange", w_shift="midrange"),
    "straight through": change(FP4, dge_k=None),
    "slope alone": change(CAST, dge_k=5.0),
    "k 3": change(FP4, dge_k=3.0),
    "cap 1.5": change(FP4, dge_cap=1.5),
    "alpha 0.8": change(FP4, occ_alpha=0.8),
    "alpha 1": change(FP4, occ_alpha=1.0),
    "exact quantile": change(FP4, occ_sample=None),
    "sample of 100": change(FP4, occ_sample=100),
    "residual": change(FP4, occ_compensation="residual"),
    "residual and mean": change(FP4, occ_compensation="residual", x_shift="mean"),
    "dropped": change(FP4, occ_compensation=None),
}


def oracle_config(recipe):
    return ref.LinearConfig(
        x_fmt=recipe.x_format,
        w_fmt=recipe.w_format,
        x_granularity=recipe.x_scale,
        w_granularity=recipe.w_scale,
        grad_fmt=recipe.grad_format,
        dge_k=recipe.dge_k,
        dge_cap=recipe.dge_cap,
        occ_alpha=recipe.occ_alpha,
        sample_size=recipe.occ_sample or 10**9,
        occ_compensation=recipe.occ_compensation,
        x_shift=recipe.x_shift,
        w_shift=recipe.w_shift,
    )


@functools.partial(jax.jit, static_argnames="recipe")
def run(x, w, dy, bias=None, *, recipe, calibration=None):
    """y, dx, dw and, where there is a bias, its gradient."""

    def layer(x, w, bias):
        return linear(x, w, recipe, bias=bias, calibration=calibration)

    y, vjp = jax.vjp(layer, x, w, bias)
    return y, *vjp(dy.astype(y.dtype))


def terms(x, w, dy, config):
    """Sums of the magnitudes of all that is added up, for bounds on the roundings of sums."""
    shifts = [np.zeros((1, 1)), np.zeros((1, 1))]
    residual = np.zeros_like(x)
    x_axis = 1 if config.x_granularity == "token" else None
    w_axis = 0 if config.w_granularity == "channel" else None
    if config.occ_alpha is None:
        codes, scale, z = ref.quantize(x, x_axis, config.x_fmt, config.x_shift)
    else:
        z = None if config.x_shift is None else ref.mean_shift(x)
        centred = x if z is None else x - z
        lo, hi = ref.thresholds(ref.sample(centred, config.sample_size), config.occ_alpha)
        codes, scale = ref.compensate(centred, lo, hi, x_axis, config.x_fmt)
        residual = ref.clamp_residual(centred, lo, hi)[1]
    shifts[0] = shifts[0] if z is None else np.abs(z)
    xv = np.abs(codes * scale) + shifts[0] + np.abs(residual)
    codes, scale, z = ref.quantize(w, w_axis, config.w_fmt, config.w_shift)
    shifts[1] = shifts[1] if z is None else np.abs(z)
    wv = np.abs(codes * scale) + shifts[1]
    # Rounding to a gradient format changes a term by an eighth at most, unless it is tiny.
    return xv @ wv, 1.2 * np.abs(dy) @ wv.T, 1.2 * xv.T @ np.abs(dy)


def close(got, expected, relative, absolute):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    worst = np.abs(got - expected) / (relative * np.abs(expected) + absolute + 1e-300)
    assert np.max(worst) <= 1, f"{np.max(worst)} times the bound"


# -------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_is_the_oracles(name):
    recipe = SWITCHES[name]
    config = oracle_config(recipe)
    y, dx, dw, _ = run(X, W, DY, recipe=recipe)
    oy, odx, odw = ref.linear(X, W, DY, config)
    slope = 0 if recipe.dge_k is None else SLOPE + U
    # Sums are exact but for products of two 8-bit codes, shifts and residuals; those take a
    # rounding a term and a few for the additions of the parts.
    rounded = (
        recipe.x_shift is not None
        or recipe.w_shift is not None
        or recipe.occ_compensation == "residual"
        or "e4m3" in (recipe.x_format, recipe.w_format)
        or recipe.x_format == "e5m2"
    )
    ty, tdx, tdw = terms(X, W, DY, config) if rounded else (0, 0, 0)
    close(y, oy, 2.001 * U, (K + 4) * U * ty)
    if recipe.dge_k is not None:
        tdw = tdw * recipe.dge_cap
    if rounded:
        close(dx, odx, U, (N + 4) * U * tdx)
        close(dw, odw, U + slope, (M + 4) * U * tdw)
    else:
        np.testing.assert_array_equal(dx, odx.astype(np.float32))
        if recipe.dge_k is None:
            np.testing.assert_array_equal(dw, odw.astype(np.float32))
        else:
            close(dw, odw, 1.001 * (U + slope), 0)


def test_switches_make_a_difference():
    """No two recipes of the table have the same three results, so that each switch is looked at."""
    results = {name: ref.linear(X, W, DY, oracle_config(r)) for name, r in SWITCHES.items()}
    digests = {name: b"".join(v.tobytes() for v in r) for name, r in results.items()}
    same = [(a, b) for a in digests for b in digests if a < b and digests[a] == digests[b]]
    assert same == [("alpha 1", "slope alone")]  # which clamps nothing, as it should


@pytest.mark.parametrize("w_scale", ["channel", "tensor"])
@pytest.mark.parametrize("x_scale", ["token", "tensor"])
def test_gradients_of_representable_data_are_exact(x_scale, w_scale):
    """Codes times powers of two: the folding is exact algebra, so dx and dw are those of x @ w."""
    rng = np.random.default_rng(1)
    signed = np.concatenate([ref.grid("e2m1"), -ref.grid("e2m1")])
    qx, qw = rng.choice(signed, (M, K)), rng.choice(signed, (K, N))
    qx[:, 0], qw[0] = 6, -6
    x = qx * (2.0 ** rng.integers(-3, 4, (M, 1)) if x_scale == "token" else 0.5)
    w = qw * (2.0 ** rng.integers(-3, 4, (1, N)) if w_scale == "channel" else 4.0)
    # 57344 is 7 * 2**13: with sevens the gradients' scales are powers of two as well.
    dy = rng.choice([7.0, -3.5, 1.75, -14.0], (M, N))
    recipe = change(CAST, x_scale=x_scale, w_scale=w_scale)
    y, dx, dw, _ = run(np.float32(x), np.float32(w), np.float32(dy), recipe=recipe)
    # A float32 scale may be an ulp off its power of two, since 6 has no exact reciprocal.
    np.testing.assert_allclose(y, x @ w, rtol=8 * U, atol=0)
    np.testing.assert_allclose(dx, dy @ w.T, rtol=8 * U, atol=1e-4)
    np.testing.assert_allclose(dw, x.T @ dy, rtol=8 * U, atol=1e-4)


def test_unquantised_gradients_are_bfloat16():
    """With grad_format None the folded dy is rounded to bfloat16, and nothing else is."""
    recipe = change(FP4, grad_format=None, dge_k=None)
    y, dx, dw, _ = run(X, W, DY, recipe=recipe)
    np.testing.assert_array_equal(y, run(X, W, DY, recipe=FP4)[0])
    xq, sx = ref.compensate(X, *ref.thresholds(X, 0.95), 1, "e2m1")
    wq, sw, _ = ref.quantize(W, 0, "e2m1")
    for got, folded, codes in ((dx, DY * sw, wq.T), (dw.T, (DY * sx).T, xq)):
        folded = folded.astype(ml_dtypes.bfloat16).astype(np.float64)
        bound = folded.shape[1] * U * (np.abs(folded) @ np.abs(codes))
        close(got, ref.sums(folded, codes), U, bound)


# -------------------------------------------------------------------------- dtypes and shapes


@pytest.mark.parametrize("recipe", [RECIPES["fp4"], SWITCHES["residual and mean"], RECIPES["fp8"]])
def test_bfloat16_is_the_float32_result_cast(recipe):
    x, w, bias = (jnp.asarray(v, jnp.bfloat16) for v in (X, W, BIAS))
    narrow = run(x, w, DY, bias, recipe=recipe)
    wide = run(*(v.astype(jnp.float32) for v in (x, w)), DY, bias, recipe=recipe)
    for got, expected in zip(narrow, wide, strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got, expected.astype(jnp.bfloat16))


def test_dtypes_of_the_gradients_are_those_of_the_arguments():
    y, dx, dw, dbias = run(jnp.asarray(X, jnp.bfloat16), W, DY, BIAS, recipe=FP4)
    assert (y.dtype, dx.dtype, dw.dtype, dbias.dtype) == ("bfloat16", "bfloat16", *["float32"] * 2)


@pytest.mark.parametrize("name", ["fp4", "residual", "both midranges"])
def test_bias(name):
    recipe = SWITCHES[name]
    plain = run(X, W, DY, recipe=recipe)
    y, dx, dw, dbias = run(X, W, DY, BIAS, recipe=recipe)
    np.testing.assert_allclose(y, np.asarray(plain[0]) + BIAS, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(dx, plain[1])
    np.testing.assert_array_equal(dw, plain[2])
    np.testing.assert_array_equal(dbias, DY.sum(axis=0, dtype=np.float64))  # exact: 8 bits each
    oy, _, _ = ref.linear(X, W, DY, oracle_config(recipe), BIAS)
    magnitudes = terms(X, W, DY, oracle_config(recipe))[0] + np.abs(BIAS)
    close(y, oy, 0, (K + 4) * U * magnitudes)


@pytest.mark.parametrize("leading", [(), (4, 2, 4)])
def test_leading_axes_count_tokens(leading):
    x = X[0] if not leading else X.reshape(*leading, K)
    dy = DY[0] if not leading else DY.reshape(*leading, N)
    flat = run(x.reshape(-1, K), W, dy.reshape(-1, N), recipe=FP4)
    y, dx, dw, _ = run(x, W, dy, recipe=FP4)
    assert y.shape == (*leading, N) and dx.shape == x.shape
    for got, expected in zip((y, dx, dw), flat, strict=False):
        np.testing.assert_array_equal(np.asarray(got).reshape(expected.shape), expected)


def test_bf16_recipe_is_a_plain_product():
    x, w = jnp.asarray(X, jnp.bfloat16), jnp.asarray(W)
    y, dx, dw, dbias = run(x, w, DY, BIAS, recipe="bf16")
    assert (y.dtype, dx.dtype, dw.dtype, dbias.dtype) == ("bfloat16", "bfloat16", *["float32"] * 2)
    xv, wv = np.asarray(x, np.float64), np.asarray(w.astype(jnp.bfloat16), np.float64)
    eps = 2.0**-8
    close(y, xv @ wv + BIAS, 2 * eps, eps * (np.abs(xv @ wv) + np.abs(BIAS)) + 1e-4)
    close(dx, DY @ wv.T, eps, 1e-4)
    close(dw, xv.T @ DY, eps, 1e-3)


# --------------------------------------------------------------------------------- broken inputs


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_activation_breaks_its_own_token_and_dw(bad):
    x = X.copy()
    x[3, 5] = bad
    y, dx, dw, _ = run(x, W, DY, recipe=CAST)
    assert np.flatnonzero(np.isnan(y).any(axis=1)).tolist() == [3] and np.all(np.isnan(y[3]))
    assert np.all(np.isfinite(dx)) and np.all(np.isnan(dw))
    clean = run(X, W, DY, recipe=CAST)[0]
    np.testing.assert_array_equal(np.delete(y, 3, axis=0), np.delete(clean, 3, axis=0))


def test_a_broken_activation_with_given_thresholds():
    x = X.copy()
    x[3, 5] = np.nan
    y, _, dw, _ = run(x, W, DY, recipe=FP4, calibration=calibrate(X, FP4))
    assert np.flatnonzero(np.isnan(y).any(axis=1)).tolist() == [3]
    assert np.all(np.isnan(dw))
    # Thresholds of its own tensor are NaN, and nothing plausible is left.
    assert np.all(np.isnan(run(x, W, DY, recipe=FP4)[0]))


@pytest.mark.parametrize("recipe", [CAST, FP4], ids=["cast", "fp4"])
def test_a_broken_weight_breaks_its_column_and_dx(recipe):
    w = W.copy()
    w[5, 7] = np.nan
    y, dx, dw, _ = run(X, w, DY, recipe=recipe)
    assert np.flatnonzero(np.isnan(y).any(axis=0)).tolist() == [7] and np.all(np.isnan(y[:, 7]))
    assert np.all(np.isnan(dx))
    columns = [7] if recipe.dge_k is not None else []
    assert np.flatnonzero(np.isnan(dw).any(axis=0)).tolist() == columns


def test_a_broken_gradient_is_never_plausible():
    dy = DY.copy()
    dy[4, 6] = np.nan
    _, dx, dw, _ = run(X, W, dy, recipe=FP4)
    assert np.flatnonzero(np.isnan(dx).any(axis=1)).tolist() == [4] and np.all(np.isnan(dx[4]))
    assert np.flatnonzero(np.isnan(dw).any(axis=0)).tolist() == [6] and np.all(np.isnan(dw[:, 6]))


def test_huge_outliers_are_finite():
    x = X.copy()
    x[3, 5] = 1e6
    for name in ("fp4", "residual", "dropped"):
        assert all(np.all(np.isfinite(v)) for v in run(x, W, DY, recipe=SWITCHES[name])[:3])


# ----------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("name", ["fp4", "residual and mean"])
def test_a_calibration_makes_tokens_independent(name):
    recipe = SWITCHES[name]
    kept = calibrate(X, recipe)
    together = run(X, W, DY, recipe=recipe, calibration=kept)
    alone = [run(X[i : i + 1], W, DY[i : i + 1], recipe=recipe, calibration=kept) for i in range(4)]
    for i, result in enumerate(alone):
        np.testing.assert_array_equal(result[0][0], together[0][i])
        np.testing.assert_array_equal(result[1][0], together[1][i])


def test_without_one_tokens_share_thresholds():
    x = X.copy()
    x[1:] *= 3
    first, again = (run(v, W, DY, recipe=FP4)[0][0] for v in (X, x))
    assert np.any(first != again)


def test_a_calibration_is_a_constant():
    recipe = SWITCHES["x mean and clamp"]

    def loss(calibration):
        return jnp.sum(linear(X, W, recipe, calibration=calibration))

    gradient = jax.jit(jax.grad(loss))(calibrate(X, recipe))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


# ------------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["fp4", "fp4_cast", "fp8", "x mean and clamp"])
def test_backward_keeps_a_byte_an_activation(name, dtype):
    recipe = SWITCHES[name]
    x = X.astype(jnp.dtype(dtype))
    _, vjp = jax.eval_shape(lambda x, w: jax.vjp(lambda *v: linear(*v, recipe), x, w), x, W)
    kept = jax.tree.leaves(vjp)
    assert [leaf.dtype for leaf in kept if leaf.shape == (K, M)] == [jnp.float8_e4m3fn]
    statistics = {"fp4": 8, "fp4_cast": 0, "fp8": 0, "x mean and clamp": 8 + 4 * K}[name]
    slope = 0 if recipe.dge_k is None else 4 * K * N  # of w itself
    expected = (M * K + 4 * M) + (K * N + 4 * N) + slope + statistics  # codes, codes
    # The mean is one array, in the operand and in the calibration; whether it counts twice is
    # up to JAX.
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
    assert total in (expected, expected + (4 * K if recipe.x_shift else 0))


def counts(function, *arguments):
    """How often the jaxpr multiplies codes and casts to either float8 format."""
    text = str(jax.make_jaxpr(function)(*arguments))
    casts = text.count("new_dtype=float8_e4m3fn")
    return text.count("platform_index"), casts


def test_save_codes_recomputes_neither_quantiser_nor_product():
    def block(x, w):
        return jnp.sum(jnp.tanh(linear(jnp.sin(x), w, FP4)))

    def gradient(f):
        return jax.grad(f, argnums=(0, 1))

    plain = counts(gradient(block), X, W)
    everything = counts(gradient(jax.checkpoint(block)), X, W)
    saved = counts(gradient(jax.checkpoint(block, policy=save_codes)), X, W)
    assert plain[0] == 3  # fprop, dgrad, wgrad
    assert saved == plain
    assert everything[1] == 2 * plain[1]
    remade = jax.jit(gradient(jax.checkpoint(block, policy=save_codes)))(X, W)
    for got, expected in zip(remade, jax.jit(gradient(block))(X, W), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------- transforms


def test_eager_is_jit():
    y, vjp = jax.vjp(lambda x: linear(x, W, CAST), X)
    compiled = run(X, W, DY, recipe=CAST)
    np.testing.assert_array_equal(y, compiled[0])
    np.testing.assert_array_equal(vjp(DY)[0], compiled[1])


def test_vmap_is_a_loop():
    x = np.stack([X, X[::-1] * 2, -X])
    w = np.stack([W, W * 3, -W])
    value = jax.jit(jax.vmap(jax.value_and_grad(lambda x, w: jnp.sum(linear(x, w, FP4) * DY), 1)))
    totals, dw = value(x, w)
    for i in range(3):
        y, _, expected, _ = run(x[i], w[i], DY, recipe=FP4)
        np.testing.assert_allclose(totals[i], np.sum(y * DY), rtol=1e-4)
        close(dw[i], expected, 2 * SLOPE, 0)


def test_presets_by_name():
    def program(*recipe):
        return str(jax.make_jaxpr(lambda x, w: linear(x, w, *recipe))(X, W))

    assert all(program(name) == program(recipe) for name, recipe in RECIPES.items())
    assert program() == program("fp4") != program("fp4_cast")


@pytest.mark.parametrize("recipe", [*RECIPES])
def test_without_tokens_or_inputs_there_is_nothing_to_quantise(recipe):
    for x_shape, w_shape in (((0, K), (K, N)), ((2, 0, K), (K, N)), ((3, 0), (0, N))):
        x, w, bias = jnp.ones(x_shape, jnp.bfloat16), jnp.ones(w_shape), jnp.ones(N)
        y, vjp = jax.vjp(lambda x, w, b: linear(x, w, recipe, bias=b), x, w, bias)
        assert (y.shape, y.dtype) == ((*x_shape[:-1], N), x.dtype)
        assert np.all(np.asarray(y) == 1)
        for a, like in zip(vjp(y), (x, w, bias), strict=True):
            assert (a.shape, a.dtype) == (like.shape, like.dtype)


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("recipe", ["fp4", "bf16"])
def test_errors_name_the_argument(recipe):
    with pytest.raises(TypeError, match="x is int32"):
        linear(jnp.ones((2, K), jnp.int32), W, recipe)
    with pytest.raises(TypeError, match="w is list"):
        linear(X, [[1.0]], recipe)
    for x, w in ((X[:, 1:], W), (X, W[0]), (X[0, 0:1][0].reshape(()), W), (X, W[None])):
        with pytest.raises(ValueError, match=r"x has shape .* and w "):
            linear(jnp.asarray(x), w, recipe)
    with pytest.raises(ValueError, match=r"bias has shape \(48,\); expected \(40,\)"):
        linear(X, W, recipe, bias=np.ones(K, np.float32))
    with pytest.raises(ValueError, match="recipe='fp5'"):
        linear(X, W, "fp5")


def test_refuses_a_prepared_weight_that_nothing_reads():
    with pytest.raises(ValueError, match="prepared is a PreparedWeight; expected None"):
        linear(X, W, "bf16", prepared=prepare(W, "fp4"))
    with pytest.raises(ValueError, match="calibration is a Calibration; expected None"):
        linear(X, W, "bf16", calibration=Calibration())


def test_no_tokens_are_checked_like_some():
    with pytest.raises(ValueError, match=r"calibration.lo has shape None"):
        linear(X[:0], W, "fp4", calibration=Calibration())
    with pytest.raises(ValueError, match="prepared has shape"):
        linear(X[:0], W, "fp4", prepared=prepare(W[:, 1:], "fp4"))


@pytest.mark.parametrize("recipe", ["bf16", "fp4"])
def test_a_bias_is_an_array_of_floats(recipe):
    bias = np.ones(W.shape[1])
    for wrong, kind in ((bias.astype(np.complex64), "complex64"), (bias.tolist(), "list")):
        with pytest.raises(TypeError, match=f"bias is {kind}; expected an array of a floating"):
            linear(X, W, recipe, bias=wrong)


def test_refuses_a_calibration_that_lacks_something():
    zero = jnp.float32(0)
    with pytest.raises(
        ValueError, match=r"calibration.hi has shape None; expected \(\) with recipe.occ_alpha=0.99"
    ):
        linear(X, W, "fp4", calibration=Calibration(lo=zero))
    mean = change(CAST, x_shift="mean")
    with pytest.raises(ValueError, match=r"calibration.mean has shape None"):
        linear(X, W, mean, calibration=Calibration())
    with pytest.raises(ValueError, match=r"calibration.mean has shape \(1, 3\).*\(1, 48\)"):
        linear(X, W, mean, calibration=Calibration(mean=jnp.zeros((1, 3))))


def test_refuses_a_calibration_of_another_recipe():
    lo, mean = jnp.float32(-1), jnp.zeros((1, K))
    for recipe, calibration, message in (
        (FP4, Calibration(lo, -lo, mean), r"mean has shape \(1, 48\).* None with .*x_shift=None"),
        (CAST, Calibration(mean=mean), r"mean has shape \(1, 48\); expected None"),
        (CAST, Calibration(lo, -lo), r"lo has shape \(\); expected None with .*occ_alpha=None"),
        (FP4, Calibration(mean[0], -lo), r"lo has shape \(48,\); expected \(\) with"),
        (FP4, Calibration(lo, mean), r"hi has shape \(1, 48\); expected \(\) with"),
    ):
        with pytest.raises(ValueError, match="calibration." + message):
            linear(X, W, recipe, calibration=calibration)
