"""What a calibration holds: the oracle's thresholds and mean, as constants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfp4.ops import reference as ref
from jfp4.ops.calibration import Calibration, calibrate
from jfp4.recipe import Recipe

# Multiples of 1/64 and a power of two of tokens: the mean is exact in float32.
X = np.round(np.random.default_rng(0).normal(size=(64, 48)) ** 3 * 64).astype(np.float32) / 64 + 1

RECIPES = {
    "nothing": Recipe(occ_alpha=None),
    "midrange": Recipe(occ_alpha=None, x_shift="midrange"),
    "clamp": Recipe(occ_alpha=0.9),
    "clamp from all": Recipe(occ_alpha=0.95, occ_sample=None),
    "clamp from some": Recipe(occ_alpha=0.9, occ_sample=500),
    "mean": Recipe(occ_alpha=None, x_shift="mean"),
    "mean and clamp": Recipe(occ_alpha=0.9, occ_sample=500, x_shift="mean"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", RECIPES)
def test_statistics_are_the_oracles(name, dtype):
    recipe = RECIPES[name]
    x = X.astype(jnp.dtype(dtype))
    c = jax.jit(calibrate, static_argnames="recipe")(x, recipe=recipe)
    wide, mean = x.astype(np.float32), None
    if recipe.x_shift == "mean":
        mean = ref.mean_shift(wide)
        assert c.mean.dtype == jnp.float32
        np.testing.assert_array_equal(c.mean, mean)
    else:
        assert c.mean is None
    if recipe.occ_alpha is None:
        assert c.lo is None and c.hi is None
        return
    centred = wide if mean is None else wide - mean
    taken = centred if recipe.occ_sample is None else ref.sample(centred, recipe.occ_sample)
    assert c.lo.dtype == c.hi.dtype == jnp.float32
    np.testing.assert_array_equal((c.lo, c.hi), ref.thresholds(taken, recipe.occ_alpha))


def test_constants_of_the_gradient():
    def statistics(x):
        return sum(
            jnp.sum(leaf) for leaf in jax.tree.leaves(calibrate(x, RECIPES["mean and clamp"]))
        )

    assert float(statistics(X)) != 0
    assert not np.any(jax.grad(statistics)(X))


def test_is_a_pytree():
    c = Calibration(mean=jnp.zeros((1, 3)))
    assert len(jax.tree.leaves(c)) == 1
    assert jax.tree.map(lambda v: v + 1, c).mean.tolist() == [[1, 1, 1]]
    assert jax.tree.leaves(Calibration()) == []


def test_nan_reaches_the_thresholds():
    x = X.copy()
    x[0, 0] = np.nan
    c = calibrate(x, RECIPES["clamp"])
    assert np.isnan(c.lo) and np.isnan(c.hi)


def test_tokens_are_rows():
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 48\); expected \[m, k\]"):
        calibrate(np.ones((2, 3, 48), np.float32), "fp4")
