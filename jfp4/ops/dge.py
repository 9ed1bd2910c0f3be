"""Differentiable gradient estimator (DGE): arXiv 2501.17116, equations 7, 8 and 22."""

import itertools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jfp4.formats import get_format
from jfp4.recipe import check_dge


def derivative(
    v: Float[Array, "..."], format: str = "e2m1", *, k: float = 5.0, cap: float = 3.0
) -> Float32[Array, "..."]:
    """Slope of the smooth stand-in for rounding, by which the weight gradient is multiplied.

    On the grid interval ``[g, g + delta]`` that holds ``|v|`` it is
    ``min(cap, |2 (|v| - g) / delta - 1| ** (1/k - 1) / k)``: steep in the middle of the interval,
    where rounding jumps, and 1/k at its ends. Beyond the format's maximum the last interval's end
    counts.

    Args:
        v: the weight in code units BEFORE rounding, ``w / scale``. Rounded values all sit on the
            ends of intervals, where the slope is the constant 1/k: passing them would train
            nothing worth having.
        format: a 4-bit element format.
        k: steepness, at least 1; 1 gives the straight-through estimator.
        cap: upper bound of the slope, without which it would be infinite in the middle.

    Returns:
        Float32 of ``v``'s shape; NaN where ``v`` is.

    Raises:
        ValueError: unknown format, ``k`` below 1, or ``cap`` not positive.
    """
    check_dge(k, cap)
    f = get_format(format)
    magnitude = jnp.minimum(jnp.abs(v.astype(jnp.float32)), f.max)
    if k == 1:
        return jnp.where(jnp.isnan(magnitude), magnitude, np.float32(min(1, cap)))
    grid = f.grid.astype(np.float32)
    # Steps are powers of two, so that a product with the inverse is the quotient.
    low, per_step = jnp.zeros_like(magnitude), jnp.full_like(magnitude, 2 / grid[1])
    # Past the grid's last value nothing is left to enter, so its own interval is the last.
    for g, above in itertools.pairwise(grid[1:]):
        inside = magnitude >= g
        low = jnp.where(inside, g, low)
        per_step = jnp.where(inside, 2 / (above - g), per_step)
    distance = jnp.abs((magnitude - low) * per_step - 1)
    # A power by its logarithm: on a GPU half the instructions of a general one, which would take
    # longer than the memory does.
    power = jnp.exp(jnp.log(distance) * np.float32(1 / k - 1))
    return jnp.minimum(power * np.float32(1 / k), cap)
