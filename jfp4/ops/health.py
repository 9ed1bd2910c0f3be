"""How well a layer's operands survive quantisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jfp4.ops.calibration import Calibration
from jfp4.ops.linear import quantize_activation
from jfp4.ops.prepare import quantize_weight
from jfp4.recipe import Recipe


def health(
    x: Float[Array, "m k"], w: Float[Array, "k n"], recipe: Recipe, calibration: Calibration
) -> dict[str, Float32[Array, ""]]:
    """Measures what quantisation does to a layer's operands; constant to a gradient.

    Returns:
        ``clipped``: share of activations beyond the clamp thresholds. ``x_snr_db``, ``w_snr_db``:
        signal-to-noise ratio, ``10 log10(sum v^2 / sum (v - value(Q(v)))^2)``, in dB, with the
        outliers as the product sees them. ``x_zero``, ``w_zero``: share of codes that are zero.
    """
    x, w, calibration = jax.lax.stop_gradient((x, w, calibration))
    xq, residual = quantize_activation(x, recipe, calibration)
    wq = quantize_weight(w, recipe)
    x32, w32 = x.astype(jnp.float32), w.astype(jnp.float32)
    centred = x32 if calibration.mean is None else x32 - calibration.mean
    clipped = jnp.float32(0)
    if calibration.lo is not None and calibration.hi is not None:
        clipped = jnp.mean((centred < calibration.lo) | (centred > calibration.hi))
    value = xq.dequantize() + (0 if residual is None else residual)
    return {
        "clipped": clipped,
        "x_snr_db": snr_db(x32, value),
        "w_snr_db": snr_db(w32, wq.dequantize()),
        "x_zero": jnp.mean(xq.codes == 0),
        "w_zero": jnp.mean(wq.codes == 0),
    }


def snr_db(v: Float32[Array, "..."], approximation: Float32[Array, "..."]) -> Float32[Array, ""]:
    """Signal-to-noise ratio in dB; infinite where nothing was lost, NaN for all-zero input."""
    noise = jnp.sum(jnp.square(v - approximation))
    return 10 * jnp.log10(jnp.sum(jnp.square(v)) / noise)
