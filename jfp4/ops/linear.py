"""The linear layer: fprop, dgrad and wgrad on quantised operands, tied by a custom VJP.

With ``x = s_x q_x`` (a scale per token) and ``w = s_w q_w`` (one per output channel),

    fprop  y  = s_x (q_x q_w) s_w
    dgrad  dx = Q(dy * s_w) q_w^T       s_w varies along dgrad's contraction, so dy carries it
    wgrad  dw = q_x^T Q(dy * s_x)       s_x varies along wgrad's contraction, likewise

which is exact algebra but for the rounding Q of the folded gradient; so the forward's codes and
scales are all that the backward needs (arXiv 2501.17116, section 3 and appendix).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

from jfp4.ops import dge
from jfp4.ops.calibration import Calibration, calibrate
from jfp4.ops.gemm import gemm
from jfp4.ops.outliers import clamp, quantize_compensated
from jfp4.ops.quantize import check_float, quantize, to_float32
from jfp4.qtensor import QTensor
from jfp4.recipe import Recipe, get_recipe

CODES_NAME, PRODUCT_NAME = "jfp4_codes", "jfp4_product"

save_codes = jax.checkpoint_policies.save_only_these_names(CODES_NAME, PRODUCT_NAME)
"""A policy for ``jax.checkpoint``: keep the backward's codes AND fprop's product.

Saving the codes alone would save nothing, because recomputing the product needs the quantiser.
"""


def linear(
    x: Float[Array, "*b k"],
    w: Float[Array, "k n"],
    recipe: str | Recipe = "fp4",
    *,
    bias: Float[Array, " n"] | None = None,
    calibration: Calibration | None = None,
) -> Float[Array, "*b n"]:
    """``x @ w + bias`` with the recipe's quantisation, differentiable in x, w and bias.

    Args:
        x: activations; every leading axis counts tokens. Its dtype is the compute dtype and that
            of the result.
        w: weight, best in the dtype of its master copy: it is quantised from what is passed.
        recipe: a ``Recipe`` or a preset's name.
        bias: added after the product, in float32.
        calibration: clamp thresholds and mean to use in place of ``x``'s own (``calibrate``); with
            them each token's result is independent of the others.

    Returns:
        The layer's output in ``x``'s dtype.

    Raises:
        TypeError: ``x`` or ``w`` is not an array of floats.
        ValueError: shapes that do not fit, an unknown recipe, or a calibration that lacks what the
            recipe needs.
    """
    recipe = get_recipe(recipe)
    _check_shapes(x, w, bias)
    if not recipe.quantizes:
        y = jnp.matmul(x, w.astype(x.dtype))
        return y if bias is None else y + bias.astype(y.dtype)
    tokens = x.reshape(-1, x.shape[-1])
    if calibration is None:
        calibration = calibrate(tokens, recipe)
    _check_calibration(calibration, recipe, w.shape[0])
    y = _linear(recipe, tokens, w, bias, calibration)
    return y.reshape(*x.shape[:-1], w.shape[1])


def quantize_activation(
    x: Float[Array, "m k"], recipe: Recipe, calibration: Calibration
) -> tuple[QTensor, Float32[Array, "m k"] | None]:
    """Quantises activations as the recipe says.

    Returns:
        The operand of the product, and the outlier residual where the recipe compensates by a
        second product (None otherwise).
    """
    assert recipe.x_format is not None
    axis = 1 if recipe.x_scale == "token" else None
    if recipe.occ_alpha is None:
        shift = calibration.mean if recipe.x_shift == "mean" else recipe.x_shift
        return quantize(x, axis, format=recipe.x_format, shift=shift), None
    assert calibration.lo is not None and calibration.hi is not None
    x, _ = to_float32(x, axis)
    if calibration.mean is not None:
        x = x - calibration.mean
    residual = None
    if recipe.occ_compensation == "operand":
        q = quantize_compensated(x, calibration.lo, calibration.hi, axis, format=recipe.x_format)
    else:
        clamped, residual = clamp(x, calibration.lo, calibration.hi)
        q = quantize(clamped, axis, format=recipe.x_format)
        residual = residual if recipe.occ_compensation == "residual" else None
    return QTensor(q.codes, q.scale, calibration.mean, q.format, q.axis), residual


def quantize_weight(w: Float[Array, "k n"], recipe: Recipe) -> QTensor:
    """Quantises a weight as the recipe says."""
    assert recipe.w_format is not None
    axis = 0 if recipe.w_scale == "channel" else None
    return quantize(w, axis, format=recipe.w_format, shift=recipe.w_shift)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(
    recipe: Recipe, x: Array, w: Array, bias: Array | None, calibration: Calibration
) -> Array:
    return _fprop(recipe, x, w, bias, calibration)[0]


def _fprop(
    recipe: Recipe, x: Array, w: Array, bias: Array | None, calibration: Calibration
) -> tuple[Array, tuple[Any, ...]]:
    xq, residual = quantize_activation(x, recipe, calibration)
    wq = quantize_weight(w, recipe)
    xq, wq, residual = checkpoint_name((xq, wq, residual), CODES_NAME)
    y = gemm(xq, wq, bias=bias, out_dtype=jnp.float32 if residual is not None else x.dtype)
    if residual is not None:
        y = (y + _matmul(residual, wq.dequantize())).astype(x.dtype)
    y = checkpoint_name(y, PRODUCT_NAME)
    # Of x only the dtype is kept; w is the parameter itself, which lives through the step anyway.
    dtypes = (jnp.empty(0, x.dtype), None if bias is None else jnp.empty(0, bias.dtype))
    return y, (xq, residual, wq, w, calibration, dtypes)


def _backward(recipe: Recipe, saved: tuple[Any, ...], dy: Array) -> tuple[Any, ...]:
    xq, residual, wq, w, calibration, (x_like, bias_like) = saved
    dy = dy.astype(jnp.float32)
    dx = _dgrad(recipe, dy, wq).astype(x_like.dtype)
    dw = _wgrad(recipe, dy, xq, residual)
    if recipe.dge_k is not None:
        centred = w.astype(jnp.float32) - (0 if wq.shift is None else wq.shift)
        # The slope is of the weight BEFORE rounding; on its codes it would be a constant.
        slope = dge.derivative(
            centred * (1 / wq.scale), wq.format, k=recipe.dge_k, cap=recipe.dge_cap
        )
        dw = dw * slope
    dbias = None if bias_like is None else jnp.sum(dy, axis=0).astype(bias_like.dtype)
    return dx, dw.astype(w.dtype), dbias, jax.tree.map(jnp.zeros_like, calibration)


_linear.defvjp(_fprop, _backward)


def _dgrad(recipe: Recipe, dy: Float32[Array, "m n"], wq: QTensor) -> Float32[Array, "m k"]:
    folded = dy * wq.scale
    if recipe.grad_format is None:
        dx = _bfloat16_matmul(folded, wq.codes.T)
    else:
        dx = gemm(_quantize_gradient(folded, 1, recipe), wq.T.unscaled())
    if wq.shift is not None:  # a number a column: the same for every k
        dx = dx + jnp.sum(dy * wq.shift, axis=1, keepdims=True)
    return dx


def _wgrad(
    recipe: Recipe, dy: Float32[Array, "m n"], xq: QTensor, residual: Array | None
) -> Float32[Array, "k n"]:
    folded = dy * xq.scale
    if recipe.grad_format is None:
        dw = _bfloat16_matmul(xq.codes.T, folded)
    else:
        dw = gemm(xq.T.unscaled(), _quantize_gradient(folded, 0, recipe))
    if xq.shift is not None:
        if xq.shift.shape[1] == 1:  # a number a token: the same for every k
            dw = dw + jnp.sum(dy * xq.shift, axis=0, keepdims=True)
        else:  # a vector of length k: an outer product with dy's sum over tokens
            dw = dw + xq.shift.T * jnp.sum(dy, axis=0, keepdims=True)
    if residual is not None:
        dw = dw + _matmul(residual.T, dy)
    return dw


def _quantize_gradient(folded: Float32[Array, "m n"], axis: int, recipe: Recipe) -> QTensor:
    assert recipe.grad_format is not None
    # These codes are multiplied at once: bfloat16 spares CPUs, which have no float8, the detour.
    return quantize(folded, axis, format=recipe.grad_format, dtype=jnp.bfloat16)


def _bfloat16_matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(
        a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    )


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _check_shapes(x: Array, w: Array, bias: Array | None) -> None:
    check_float(x, "x")
    check_float(w, "w")
    if x.ndim == 0 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise ValueError(
            f"x has shape {x.shape} and w {w.shape}; expected x [..., k] and w [k, n] with equal k"
        )
    if bias is not None and bias.shape != (w.shape[1],):
        raise ValueError(f"bias has shape {bias.shape}; expected ({w.shape[1]},)")


def _check_calibration(calibration: Calibration, recipe: Recipe, k: int) -> None:
    if recipe.occ_alpha is not None and (calibration.lo is None or calibration.hi is None):
        raise ValueError("calibration has no lo or hi; the recipe's occ_alpha needs both")
    if recipe.x_shift == "mean" and (calibration.mean is None or calibration.mean.shape != (1, k)):
        shape = None if calibration.mean is None else calibration.mean.shape
        raise ValueError(f"calibration.mean has shape {shape}; expected (1, {k})")
