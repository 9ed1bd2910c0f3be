"""Rows of an embedding, whose gradient is summed in float32."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jfp4.ops.exchange import sum_of_parts
from jfp4.ops.partition import varying_alike
from jfp4.sharding import constrain


def look_up(
    table: Float[Array, "v d"], ids: Int[Array, "p *n"], dtype: jax.typing.DTypeLike
) -> Float[Array, "p *n d"]:
    """The table's rows of these ids, in ``dtype``; NaN where an id is larger than any.

    A row's gradient is the sum over all places that have its id, which of a frequent one are
    thousands. Autodiff would add them up in ``dtype``, where a bfloat16 number no longer grows by
    what is less than ``2**-9`` of it; here they are added up in float32, and rounded to the
    table's dtype once.

    Args:
        table: the embedding, as it is stored.
        ids: not negative, by parts of the batch (``batch_shards``). Each part has a gradient of its
            own until they are summed as ``grad_comm`` says.
        dtype: what is computed in.
    """
    return _look_up(dtype, *varying_alike((table, ids)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(dtype: jax.typing.DTypeLike, table: Array, ids: Array) -> Array:
    take = functools.partial(jnp.take, axis=0)
    if ids.shape[0] == 1:
        return take(table, ids).astype(dtype)
    # In this order, that no device is sent more of the table than it computes with.
    tables = jnp.broadcast_to(table.astype(dtype), (ids.shape[0], *table.shape))
    return jax.vmap(take)(constrain(tables, "batch", "vocab"), ids)


def _forward(
    dtype: jax.typing.DTypeLike, table: Array, ids: Array
) -> tuple[Array, tuple[Array, Array]]:
    # Of the table its dtype and its number of rows.
    return _look_up(dtype, table, ids), (table[:, :0], ids)


def _backward(
    dtype: jax.typing.DTypeLike, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, None]:
    like, ids = saved

    def of_part(ids: Array, dy: Array) -> Array:
        zeros = jnp.zeros((like.shape[0], dy.shape[-1]), jnp.float32)
        return zeros.at[ids].add(dy.astype(jnp.float32), mode="drop")

    if ids.shape[0] == 1:
        gradient = of_part(ids[0], dy[0])
    else:
        gradient = sum_of_parts(constrain(jax.vmap(of_part)(ids, dy), "batch", "vocab"))
    return gradient.astype(like.dtype), None


_look_up.defvjp(_forward, _backward)
