"""Health figures against direct NumPy computations on the oracle's codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfp4.ops import ffi
from jfp4.ops import reference as ref
from jfp4.ops.calibration import calibrate
from jfp4.ops.health import health, snr_db
from jfp4.recipe import Recipe

# Multiples of 1/64 and a power of two of tokens: the mean is exact in float32.
X = np.round(np.random.default_rng(0).normal(size=(64, 48)) ** 3 * 64).astype(np.float32) / 64 + 1
W = np.random.default_rng(1).normal(size=(48, 24)).astype(np.float32)


def measure(x, w, recipe):
    got = jax.jit(lambda x, w: health(x, w, recipe, calibrate(x, recipe)))(x, w)
    assert all(v.shape == () and v.dtype == jnp.float32 for v in got.values())
    return {name: float(v) for name, v in got.items()}


def decibels(v, approximation):
    v = v.astype(np.float64)
    return 10 * np.log10(np.sum(v**2) / np.sum((v - approximation) ** 2))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("compensation", ["operand", "residual", None])
def test_with_outliers(compensation, mean):
    recipe = Recipe(occ_alpha=0.95, occ_compensation=compensation, x_shift="mean" if mean else None)
    shift = ref.mean_shift(X) if mean else np.zeros((1, 48), np.float32)
    centred = X - shift
    lo, hi = ref.thresholds(centred, 0.95)
    clipped, residual = ref.clamp_residual(centred, lo, hi)
    if compensation == "operand":
        codes, scale = ref.compensate(centred, lo, hi, 1, "e2m1")
    else:
        codes, scale, _ = ref.quantize(clipped, 1, "e2m1")
    value = ref.dequantize(codes, scale, shift) + (residual if compensation == "residual" else 0)
    w_codes, w_scale, _ = ref.quantize(W, 0, "e2m1")
    got = measure(X, W, recipe)
    assert got["clipped"] == pytest.approx(np.mean((centred < lo) | (centred > hi)), rel=1e-6)
    assert 0.05 < got["clipped"] <= 0.1
    assert got["x_zero"] == pytest.approx(np.mean(codes == 0), rel=1e-6)
    assert got["w_zero"] == pytest.approx(np.mean(w_codes == 0), rel=1e-6)
    # 1e-4 dB is 2e-5 of the ratio: the float32 sums of some thousand squares.
    assert got["x_snr_db"] == pytest.approx(decibels(X, value), abs=1e-4)
    assert got["w_snr_db"] == pytest.approx(decibels(W, w_codes * w_scale), abs=1e-4)


@pytest.mark.parametrize("shift", [None, "midrange", "mean"])
def test_without_outliers(shift):
    got = measure(X, W, Recipe(occ_alpha=None, x_shift=shift, w_shift="midrange"))
    value = ref.dequantize(*ref.quantize(X, 1, "e2m1", shift))
    assert got["clipped"] == 0
    assert got["x_snr_db"] == pytest.approx(decibels(X, value), abs=1e-4)
    value = ref.dequantize(*ref.quantize(W, 0, "e2m1", "midrange"))
    assert got["w_snr_db"] == pytest.approx(decibels(W, value), abs=1e-4)


def test_the_compensated_loses_least():
    snr = {c: measure(X, W, Recipe(occ_compensation=c))["x_snr_db"] for c in ("operand", None)}
    snr["cast"] = measure(X, W, Recipe(occ_alpha=None))["x_snr_db"]
    assert snr["operand"] > max(snr[None], snr["cast"]) + 3


def test_half_precision_is_measured_in_float32():
    x, w = jnp.asarray(X, jnp.bfloat16), jnp.asarray(W, jnp.bfloat16)
    recipe = Recipe(occ_alpha=0.95)
    wide = measure(np.asarray(x, np.float32), np.asarray(w, np.float32), recipe)
    assert measure(x, w, recipe) == pytest.approx(wide, rel=1e-6)


def test_snr():
    v = jnp.float32([3, 4])
    assert float(snr_db(v, v)) == np.inf
    assert float(snr_db(v, jnp.float32([3, 3.5]))) == pytest.approx(20)
    assert np.isnan(snr_db(jnp.zeros(2), jnp.zeros(2)))
    assert np.isnan(snr_db(v, jnp.float32([np.nan, 0])))


@pytest.mark.parametrize("path", ["xla", "host"])
def test_is_constant_to_a_gradient(path):
    """Kernels have no derivative: asking for one would be an error."""
    if path == "host" and (why := ffi.missing("host")):
        pytest.skip(why)

    def total(x, w):
        figures = health(x, w, Recipe(occ_alpha=0.95), calibrate(x, Recipe(occ_alpha=0.95)))
        return figures["x_snr_db"] + figures["w_snr_db"]

    with ffi.backend(path):
        assert not any(np.any(g) for g in jax.jit(jax.grad(total, argnums=(0, 1)))(X, W))
