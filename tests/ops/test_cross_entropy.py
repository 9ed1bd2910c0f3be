"""The loss by chunks against NumPy in float64, and what of it stands in memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfp4.ops.cross_entropy import (
    LOGITS,
    chunk_size,
    cross_entropy,
    cross_entropy_of_logits,
)

U = 2.0**-24
T, D, V = 37, 16, 50
_rng = np.random.default_rng(0)
X = _rng.normal(size=(T, D)).astype(np.float32)
W = _rng.normal(size=(D, V)).astype(np.float32)
TARGETS = _rng.integers(0, V, T).astype(np.int32)
CHUNKS = (None, 1, 7, 36, T, 1000)


def with_gradient(x, w, targets, chunk, g=1.0):
    loss, vjp = jax.vjp(lambda x, w: cross_entropy(x, w, targets, chunk=chunk), x, w)
    return loss, *vjp(jnp.float32(g))


run = jax.jit(with_gradient, static_argnums=3)
alone = jax.jit(lambda x, w, t, chunk: cross_entropy(x, w, t, chunk=chunk), static_argnums=3)


def numpys(x, w, targets):
    """Loss and gradients in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    logits = x @ w
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    dlogits = (np.exp(log_p) - np.eye(V)[targets]) / len(x)
    loss = -log_p[np.arange(len(x)), targets].mean()
    return loss, dlogits @ w.T, x.T @ dlogits


@pytest.mark.parametrize("chunk", CHUNKS)
def test_loss_and_gradients_are_numpys(chunk):
    loss, dx, dw = run(X, W, TARGETS, chunk)
    expected, odx, odw = numpys(X, W, TARGETS)
    # A logit of D terms is off by D U of their magnitudes, and so are the loss and, relatively, the
    # probabilities (twice: theirs and their sum's); a few roundings more of exp, log and sums.
    logit = (D + 8) * U * np.max(np.abs(X) @ np.abs(W))
    assert float(loss) == pytest.approx(expected, abs=2 * logit + T * U * expected)
    size = (np.abs(numpys(X, W, TARGETS)[1]).max(), np.abs(odw).max())
    np.testing.assert_allclose(
        dx, odx, rtol=0, atol=(2 * logit + V * U) * np.abs(W).sum(1).max() / T
    )
    np.testing.assert_allclose(
        dw, odw, rtol=0, atol=(2 * logit + T * U) * np.abs(X).sum(0).max() / T
    )
    assert min(size) > 1e3 * U


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_change_no_more_than_the_order_of_sums(chunk, dtype):
    x = X.astype(jnp.dtype(dtype))
    whole, whole_dx, whole_dw = run(x, W, TARGETS, T)
    loss, dx, dw = run(x, W, TARGETS, chunk)
    assert float(alone(x, W, TARGETS, chunk)) == float(loss)
    # A product of another height may add up its D terms in another order as well.
    logit = 2 * D * U * np.max(np.abs(np.asarray(x, np.float32)) @ np.abs(W))
    # A bfloat16 logit may fall the other way, and its probability changes by as much, relatively.
    largest = np.abs(np.asarray(x, np.float32) @ W).max()
    step = 0 if dtype == "float32" else 2.0**-8 * largest
    assert abs(float(loss) - float(whole)) <= 2 * (T - 1) * U * float(whole) + logit + step
    assert (dx.dtype, dw.dtype) == (x.dtype, jnp.float32)
    tolerance = 2 * (T + D + V) * U if dtype == "float32" else 2.0**-7 + step
    for got, expected in ((dx, whole_dx), (dw, whole_dw)):
        got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_the_weights_gradient_is_added_up_in_float32():
    """Each chunk's gradient is 1/512: in bfloat16 a sum of 512 of them would stop at a half."""
    t = 512
    x = jnp.ones((t, 1), jnp.bfloat16)
    dw = run(x, jnp.zeros((1, 2)), jnp.zeros(t, jnp.int32), 1)[2]
    np.testing.assert_array_equal(dw, [[-0.5, 0.5]])
    half = run(x, jnp.zeros((1, 2)), jnp.zeros(t, jnp.int32), 1, -3.0)
    np.testing.assert_array_equal(half[2], [[1.5, -1.5]])


@pytest.mark.parametrize("bad", [-1, V, 10**6])
@pytest.mark.parametrize("chunk", [8, T])
def test_a_target_outside_the_vocabulary_is_nan(bad, chunk):
    targets = TARGETS.copy()
    targets[5] = bad
    loss, dx, dw = run(X, W, targets, chunk)
    assert np.isnan(loss) and np.all(np.isnan(dw))
    assert np.flatnonzero(np.isnan(dx).any(1)).tolist() == [5]
    assert np.isnan(alone(X, W, targets, chunk))
    assert np.isnan(cross_entropy_of_logits(X @ W, targets))


def test_a_wide_target_is_not_another_class():
    logits = np.zeros((2, V), np.float32)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        loss = cross_entropy_of_logits(jnp.asarray(logits), jnp.asarray([2**32 + 3, 1]))
        assert np.isnan(loss)


@pytest.mark.parametrize("where", ["x", "w"])
def test_a_nan_stays_one(where):
    x, w = X.copy(), W.copy()
    (x if where == "x" else w)[3, 4] = np.nan
    loss, dx, dw = run(x, w, TARGETS, 8)
    assert np.isnan(loss) and np.any(np.isnan(dx)) and np.all(np.isnan(dw[:, 4]))


def test_of_logits_that_there_are():
    loss = cross_entropy_of_logits((X @ W).reshape(1, T, V), TARGETS[None])
    assert float(loss) == pytest.approx(numpys(X, W, TARGETS)[0], rel=(T + V) * U)


def test_no_more_logits_stand_than_a_chunks():
    t, d, v, chunk = 512, 16, 1000, 32
    x, w = jnp.zeros((t, d), jnp.float32), jnp.zeros((d, v))
    targets = jnp.zeros(t, jnp.int32)

    def compiled(chunk):
        return run.lower(x, w, targets, chunk).compile()

    part, whole = compiled(chunk), compiled(t)
    at_once = re.compile(rf"\[(512,{v}|{v},512|16,32,{v})\]")
    assert at_once.search(whole.as_text()) and not at_once.search(part.as_text())
    # Logits, exponentials, gradient and two masks, dx and dw with a copy of each, and x by chunks.
    few = 5 * 4 * chunk * v + 2 * 4 * d * (t + v) + 4 * t * d + 2**14
    assert part.memory_analysis().temp_size_in_bytes < few < 4 * t * v
    assert whole.memory_analysis().temp_size_in_bytes >= 4 * t * v


def test_sizes_of_chunks():
    assert chunk_size(16384, 32000, None) == 8192  # 2**28 / 32000 is 8388
    assert LOGITS >= 8192 * 32000
    assert chunk_size(2048, 512, None) == 2048
    assert [chunk_size(37, 50, chunk) for chunk in (1, 7, 36, 37, 1000)] == [1, 7, 19, 37, 37]
    assert chunk_size(8, 2**30, None) == 1


def test_errors_name_the_argument():
    wrong = ((X[:, 1:], W, TARGETS), (X, W, TARGETS[1:]), (X[:0], W, TARGETS[:0]))
    for arguments in (*wrong, (X[0, 0], W, TARGETS), (X[0], W, TARGETS)):
        with pytest.raises(ValueError, match=r"x has shape .*expected \[t, d\]"):
            cross_entropy(*arguments)
    with pytest.raises(ValueError, match="chunk=0; expected a positive"):
        cross_entropy(X, W, TARGETS, chunk=0)
    for f in (lambda t: cross_entropy(X, W, t), lambda t: cross_entropy_of_logits(X @ W, t)):
        with pytest.raises(ValueError, match=r"targets is float32\[.*\]; expected integers"):
            f(TARGETS.astype(np.float32))
    with pytest.raises(
        ValueError, match=rf"targets has shape \(1,\); expected \({T},\), beside logits"
    ):
        cross_entropy_of_logits(X @ W, TARGETS[:1])


def test_the_scale_of_the_loss_reaches_gradients_in_float16():
    """Divided by the tokens beforehand, most of them would be less than any number of float16."""
    t, v, scale = 16384, 512, 2.0**16
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(t, D)), 0.1 * rng.normal(size=(D, v))
    targets = rng.integers(0, v, t).astype(np.int32)

    def scaled(dtype):
        _, dx, dw = run(x.astype(dtype), w.astype(np.float32), targets, 4096, scale)
        return [np.asarray(part, np.float64) / scale for part in (dx, dw)]

    for found, exact in zip(scaled(np.float16), scaled(np.float32), strict=True):
        # Operands, logits, their derivatives and dx are rounded to 11 bits each, at random.
        assert np.linalg.norm(found - exact) < 4 * 2.0**-11 * np.linalg.norm(exact)


@pytest.mark.parametrize(("dtype", "v"), [("uint8", 256), ("int8", 300), ("uint16", 70000)])
def test_targets_of_any_integers(dtype, v):
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(6, v)), jnp.float32)
    targets = np.arange(1, 7)
    assert float(cross_entropy_of_logits(logits, targets.astype(dtype))) == float(
        cross_entropy_of_logits(logits, targets.astype(np.int32))
    )
