"""The differentiable gradient estimator against the oracle and its closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jfp4.formats import FORMATS, round_to_format
from jfp4.ops import reference as ref
from jfp4.ops.dge import derivative

FOUR_BITS = ("e2m1", "e1m2", "e3m0", "e2m1b3")

# With u = 2**-24 and t the distance from the centre: t carries one rounding, which the power
# passes on times 1 - 1/k < 1. The power is exp(p log t): the logarithm is 2u off, p and the product
# a rounding each, so that the exponent is 4u |p ln t| off, and |p ln t| is at most ln(3 k), 3.4 for
# the largest k here, where the cap of 3 does not hold. The exponential is 2u off; 1/k and the
# product with it have a rounding each.
RTOL = (1 + 4 * 3.4 + 2 + 2) * 2.0**-24

jitted = functools.partial(jax.jit, static_argnames=("format", "k", "cap"))(derivative)
eager_and_jit = pytest.mark.parametrize("slope", [derivative, jitted], ids=["eager", "jit"])


@eager_and_jit
@pytest.mark.parametrize("format", FOUR_BITS)
@pytest.mark.parametrize("k", [2.0, 3.0, 5.0, 10.0])
def test_is_the_oracles(slope, format, k):
    top = FORMATS[format].max
    v = np.random.default_rng(0).uniform(-1.2 * top, 1.2 * top, 8192).astype(np.float32)
    got = slope(v, format=format, k=k)
    assert got.dtype == jnp.float32 and got.shape == v.shape
    np.testing.assert_allclose(got, ref.dge_derivative(v, format, k), rtol=RTOL)


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=32, max_size=32))
def test_any_float32(bits):
    v = np.array(bits, np.uint32).view(np.float32)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(jitted(v), ref.dge_derivative(v, "e2m1"), rtol=RTOL)


@pytest.mark.parametrize("cap", [0.15, 1.0, 3.0, 100.0])
def test_cap_holds_at_the_centres(cap):
    grid = FORMATS["e2m1"].grid
    centres = np.float32((grid[1:] + grid[:-1]) / 2)
    assert derivative(jnp.asarray(centres), cap=cap).tolist() == [np.float32(cap)] * 7
    v = np.linspace(-7, 7, 999, dtype=np.float32)
    got = np.asarray(derivative(v, cap=cap))
    assert got.max() <= np.float32(cap)
    np.testing.assert_allclose(got, ref.dge_derivative(v, "e2m1", cap=cap), rtol=RTOL)


@pytest.mark.parametrize("format", FOUR_BITS)
def test_k_1_is_straight_through_exactly(format):
    v = np.linspace(-20, 20, 4001, dtype=np.float32)
    np.testing.assert_array_equal(derivative(v, format, k=1.0), np.ones_like(v))


@pytest.mark.parametrize(("k", "published"), [(3.0, 0.778), (5.0, 0.594), (10.0, 0.383)])
def test_mean_over_uniform_weights_is_the_analytic_one(k, published):
    """The integral of min(t**(1/k - 1) / k, c), with t uniform on [0, 1]."""
    meets = (3 * k) ** (-k / (k - 1))
    analytic = 3 * meets + 1 - meets ** (1 / k)
    assert analytic == pytest.approx(published, abs=6e-4)
    v = ((np.arange(600_000) + 0.5) * 1e-5).astype(np.float32)
    assert np.mean(np.asarray(derivative(v, k=k), np.float64)) == pytest.approx(analytic, rel=2e-4)


@pytest.mark.parametrize("format", FOUR_BITS)
def test_rounded_weights_give_a_constant(format):
    """The trap: on codes in place of weights the slope says nothing."""
    w = np.random.default_rng(1).normal(size=1000).astype(np.float32) * 3
    rounded = round_to_format(jnp.asarray(w), format)
    np.testing.assert_array_equal(derivative(rounded, format), np.full(1000, np.float32(0.2)))
    assert np.std(np.asarray(derivative(w, format))) > 0.3


def test_width_is_that_of_the_interval():
    """A quarter into each interval, of width 0.5, 1 or 2, the slope is the same."""
    grid = FORMATS["e2m1"].grid
    quarter = np.float32(grid[:-1] + np.diff(grid) / 4)
    expected = np.full(7, 0.2 * 0.5**-0.8)
    np.testing.assert_allclose(derivative(quarter), expected, rtol=RTOL)
    np.testing.assert_allclose(derivative(-quarter), expected, rtol=RTOL)


def test_beyond_the_maximum_and_nan():
    got = derivative(jnp.float32([6, 6.5, -100, np.inf, -np.inf, np.nan]))
    assert got[:5].tolist() == [np.float32(0.2)] * 5 and np.isnan(got[5])


def test_other_dtypes_are_computed_in_float32():
    v = jnp.bfloat16(np.linspace(-6, 6, 64))
    np.testing.assert_array_equal(derivative(v), derivative(v.astype(jnp.float32)))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"k": 0.99}, "k=0.99"),
        ({"k": float("nan")}, "k=nan"),
        ({"cap": 0.0}, "cap=0"),
        ({"cap": -1.0}, "cap=-1"),
        ({"format": "e9m9"}, "e9m9"),
    ],
)
def test_refuses(arguments, named):
    with pytest.raises(ValueError, match=named):
        derivative(jnp.zeros(1), **arguments)
