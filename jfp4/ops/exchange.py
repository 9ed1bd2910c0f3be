"""Sums of gradients over devices: of float32 or bfloat16 numbers, or exchanged in FP8.

In FP8 every device sends each other one its share of the gradient as E4M3 codes with a float32
scale a row; shares are added up in float32, and where all devices are to have all of it the sums
are quantised once more and gathered. So no sum is ever taken in eight bits, and what is sent is
half of what BF16 would send, and the scales (FP8 gradient communication: arXiv 2310.18313,
section 2.1, after which arXiv 2501.17116, section 4.1, trains).

An element that is quantised is off by at most ``2**-4`` of itself or, where that is more, by
``2**-10`` of its row's scale, which is the largest magnitude of the row over 448.
"""

from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from jfp4.formats import FORMATS
from jfp4.ops import partition
from jfp4.ops.partition import Axes, Part, Reduction, Rule
from jfp4.ops.quantize import codes_and_scale

GradComm = Literal["float32", "bfloat16", "fp8"]

_asked = jax.make_user_context("float32")


def grad_comm(name: GradComm) -> AbstractContextManager[None]:
    """Chooses how devices sum the gradients of weights: ``with jfp4.grad_comm("fp8"): ...``.

    It holds for what is differentiated in the context, on automatic and explicit axes of a mesh;
    inside a caller's ``jax.shard_map`` the caller sums. What is summed so are the gradients of
    quantised layers, and of Llama's embedding and head.

    Args:
        name: "float32"; "bfloat16", to which each device's part is rounded, and sums as the back
            end makes them of such numbers; or "fp8", E4M3 with a scale a row.

    Raises:
        ValueError: another name.
    """
    if name not in get_args(GradComm):
        raise ValueError(f"grad_comm={name!r}; expected one of {', '.join(get_args(GradComm))}")
    return _asked(name)


def reduction() -> Reduction:
    """How a gradient is summed over devices, as ``grad_comm`` says now."""
    if _asked.value == "fp8":
        return Reduction(by=(_scattered_sum, _sum))
    return Reduction(jnp.dtype(_asked.value))


def sum_of_parts(gradients: Float32[Array, "p *w"]) -> Float32[Array, "*w"]:
    """The sum of the gradients of the parts of a batch, by ``grad_comm``."""
    reduce = reduction()

    def summed(part: Part, stack: Array) -> tuple[Array]:
        return (reduce(part, jnp.sum(stack, axis=0), "p"),)

    axes = " ".join(f"w{i}" for i in range(gradients.ndim - 1))
    (found,) = partition.by_xla(summed, gradients, rule=Rule((f"p {axes}",), (axes,), inner=1))
    return found


def _quantized(x: Float32[Array, "... n"]) -> tuple[Any, Float32[Array, "... 1"]]:
    """Codes as integers of eight bits, which are sent as such by every back end, and scales."""
    codes, scale = codes_and_scale(x, axis=x.ndim - 1, format="e4m3")
    return lax.bitcast_convert_type(codes.astype(FORMATS["e4m3"].dtype), jnp.uint8), scale


def _values(codes: Array, scale: Array) -> Float32[Array, "... n"]:
    e4m3 = lax.bitcast_convert_type(codes, FORMATS["e4m3"].dtype)
    return e4m3.astype(jnp.float32) * scale


def _scattered_sum(x: Float32[Array, "..."], axes: Axes, axis: int) -> Float32[Array, "..."]:
    """What ``lax.psum_scatter`` gives, each device its part along ``axis``."""
    count = lax.axis_size(axes)
    # Not jnp.stack of jnp.split, which XLA copies even where only the first axis is divided.
    shares = jnp.moveaxis(x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :]), axis, 0)
    sent = (lax.all_to_all(y, axes, 0, 0, tiled=True) for y in _quantized(shares))
    return jnp.sum(_values(*sent), axis=0)


def _sum(x: Float32[Array, "..."], axes: Axes) -> Float32[Array, "..."]:
    """What ``lax.psum`` gives."""
    count = lax.axis_size(axes)
    rows = x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(1, -1)
    padded = jnp.pad(rows, [(0, -rows.shape[0] % count), (0, 0)])
    own = _quantized(_scattered_sum(padded, axes, 0))
    gathered = (lax.all_gather(y, axes, axis=0, tiled=True) for y in own)
    return _values(*gathered)[: rows.shape[0]].reshape(x.shape)
