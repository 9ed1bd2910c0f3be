"""The loss under a head that the parts of a batch share, each with a gradient in float32."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from jfp4.ops.cross_entropy import cross_entropy, loss_and_gradients
from jfp4.ops.exchange import sum_of_parts
from jfp4.sharding import constrain


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def loss_of_parts(
    chunk: int | None, x: Float[Array, "p t d"], w: Float[Array, "d v"], targets: Int[Array, "p t"]
) -> Float32[Array, ""]:
    """Mean of ``cross_entropy`` over the parts of a batch (``batch_shards``), each in chunks.

    Every part has a gradient of the head of its own, in float32, until they are summed as
    ``grad_comm`` says; the sum is rounded to ``w``'s dtype once.
    """
    of_part = functools.partial(cross_entropy, chunk=chunk)
    return jnp.mean(jax.vmap(of_part)(x, _heads(w, x), targets))


def _heads(w: Array, x: Array) -> Array:
    """The head of each part, cast first: no device is sent more of it than it computes with."""
    heads = jnp.broadcast_to(w.astype(x.dtype), (x.shape[0], *w.shape))
    return constrain(heads, "batch", None, "vocab")


def _forward(chunk: int | None, x: Array, w: Array, targets: Array) -> tuple[Array, Any]:
    of_part = functools.partial(loss_and_gradients, chunk)
    losses, dx, dw = jax.vmap(of_part)(x, _heads(w, x), targets)
    return jnp.sum(losses) / targets.size, (dx, dw, jnp.empty(0, w.dtype))


def _backward(chunk: int | None, saved: tuple[Array, ...], g: Array) -> tuple[Array, Array, None]:
    dx, dw, like = saved
    g = g / (dx.shape[0] * dx.shape[1])
    dw = sum_of_parts(constrain(dw, "batch", None, "vocab"))
    return (g * dx.astype(jnp.float32)).astype(dx.dtype), (g * dw).astype(like.dtype), None


loss_of_parts.defvjp(_forward, _backward)
