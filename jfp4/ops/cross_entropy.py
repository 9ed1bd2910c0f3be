"""Cross-entropy over a vocabulary, the logits made and used up a chunk of tokens at a time."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

LOGITS = 2**28
"""Most logits that stand at a time where no chunk is given: 1 GiB of float32."""


def cross_entropy(
    x: Float[Array, "t d"],
    w: Float[Array, "d v"],
    targets: Int[Array, " t"],
    *,
    chunk: int | None = None,
) -> Float32[Array, ""]:
    """Mean of ``-log softmax(x @ w)[target]`` over the tokens, in nats; differentiable in x and w.

    Each token's loss is the one it has where all logits are made at once: products in ``x``'s
    dtype, then float32. Only their sum is in another order: of t losses, none of them negative, any
    two orders differ by at most ``2 (t - 1)`` times float32's unit roundoff, relatively.

    Where it is differentiated, each chunk's gradient is made with its loss, so that no logits are
    kept or made twice: what is kept are those of the sum of losses, dx in ``x``'s dtype and dw,
    added up in float32 from products in float32.

    Args:
        x: the last hidden states, a token a row.
        w: the head's weight, cast to ``x``'s dtype once.
        targets: the class of each token; one outside [0, v) makes loss and gradients NaN.
        chunk: most tokens whose logits stand at a time; None takes as many as have ``LOGITS``.

    Returns:
        The mean, float32.

    Raises:
        ValueError: shapes that do not fit, no tokens, targets that are no integers, or a chunk that
            is not positive.
    """
    fit = x.ndim == w.ndim == 2 and x.shape[1] == w.shape[0] and targets.shape == x.shape[:1]
    if not fit or x.shape[0] == 0:
        raise ValueError(
            f"x has shape {x.shape}, w {w.shape} and targets {targets.shape}; expected [t, d], "
            "[d, v] and [t], t > 0"
        )
    _check_integers(targets)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}; expected a positive number of tokens, or None")
    return _mean(chunk, x, w, targets)


def cross_entropy_of_logits(
    logits: Float[Array, "*b v"], targets: Int[Array, "*b"]
) -> Float32[Array, ""]:
    """``cross_entropy`` of logits that there are already, computed in float32.

    Raises:
        ValueError: ``targets`` is not of the logits' leading shape, or of no integers.
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets has shape {targets.shape}; expected {logits.shape[:-1]}, beside logits of "
            f"shape {logits.shape}"
        )
    _check_integers(targets)
    return jnp.mean(_losses(logits.astype(jnp.float32), targets)[0])


def _check_integers(targets: Array) -> None:
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets is {targets.dtype}{list(targets.shape)}; expected integers")


def chunk_size(tokens: int, vocab: int, chunk: int | None) -> int:
    """Tokens a chunk: as many in each, but for the last, and no more than ``chunk``."""
    most = max(LOGITS // vocab, 1) if chunk is None else chunk
    return math.ceil(tokens / math.ceil(tokens / most))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mean(chunk: int | None, x: Array, w: Array, targets: Array) -> Array:
    narrow = w.astype(x.dtype)

    def add(total: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
        x, targets, counted = part
        losses, _ = _losses(jnp.matmul(x, narrow).astype(jnp.float32), targets)
        return total + jnp.sum(jnp.where(counted, losses, 0)), None

    total, _ = jax.lax.scan(add, jnp.float32(0), _chunks(chunk, w.shape[1], x, targets))
    return total / x.shape[0]


def loss_and_gradients(
    chunk: int | None, x: Float[Array, "t d"], w: Float[Array, "d v"], targets: Int[Array, " t"]
) -> tuple[Float32[Array, ""], Float[Array, "t d"], Float32[Array, "d v"]]:
    """What ``cross_entropy`` makes of tokens where it is differentiated, before it is a mean.

    Args:
        chunk: most tokens whose logits stand at a time, or None.
        x: the last hidden states.
        w: the head's weight in ``x``'s dtype.
        targets: the class of each token.

    Returns:
        The sum of the losses; its gradient by x in x's dtype, and by w in float32.
    """
    t, d = x.shape

    def add(carry: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[Any, Array]:
        total, dw = carry
        x, targets, counted = part
        losses, slope = _losses(jnp.matmul(x, w).astype(jnp.float32), targets)
        # Of the sum, not the mean: a t-th of it would be too small for float16, before the scale of
        # the loss is known.
        dlogits = jnp.where(counted[:, None], slope, 0).astype(x.dtype)
        total = total + jnp.sum(jnp.where(counted, losses, 0))
        dw = dw + jnp.matmul(x.T, dlogits, preferred_element_type=jnp.float32)
        return (total, dw), jnp.matmul(dlogits, w.T)

    start = jnp.float32(0), jnp.zeros(w.shape, jnp.float32)
    (total, dw), dx = jax.lax.scan(add, start, _chunks(chunk, w.shape[1], x, targets))
    return total, dx.reshape(-1, d)[:t], dw


def _mean_and_gradients(
    chunk: int | None, x: Array, w: Array, targets: Array
) -> tuple[Array, tuple[Array, ...]]:
    total, dx, dw = loss_and_gradients(chunk, x, w.astype(x.dtype), targets)
    return total / x.shape[0], (dx, dw, jnp.empty(0, w.dtype))


def _scaled(chunk: int | None, saved: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    dx, dw, w_like = saved
    g = g / dx.shape[0]
    return (g * dx.astype(jnp.float32)).astype(dx.dtype), (g * dw).astype(w_like.dtype), None


_mean.defvjp(_mean_and_gradients, _scaled)


def _losses(
    logits: Float32[Array, "*b v"], targets: Int[Array, "*b"]
) -> tuple[Float32[Array, "*b"], Float32[Array, "*b v"]]:
    """Each token's loss, and its derivative by the logits."""
    v = logits.shape[-1]
    if targets.dtype.itemsize < 4:  # which may not hold v
        targets = targets.astype(jnp.int32)
    is_target = jnp.arange(v, dtype=targets.dtype) == targets[..., None]
    high = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - high), axis=-1, keepdims=True)) + high
    # Without a class there is neither a loss nor a gradient.
    broken = jnp.where((targets >= 0) & (targets < v), 0, jnp.nan)[..., None]
    log_sum = log_sum + broken
    own = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return log_sum[..., 0] - own, jnp.exp(logits - log_sum) - is_target.astype(jnp.float32)


def _chunks(chunk: int | None, vocab: int, x: Array, targets: Array) -> tuple[Array, ...]:
    """``x`` and ``targets`` in chunks, the last filled up, and which of the tokens count."""
    t = x.shape[0]
    size = chunk_size(t, vocab, chunk)
    count = math.ceil(t / size)
    added = count * size - t
    counted = jnp.arange(count * size) < t
    x = jnp.pad(x, [(0, added), (0, 0)])
    targets = jnp.pad(targets, [(0, added)])
    return x.reshape(count, size, -1), targets.reshape(count, size), counted.reshape(count, size)
