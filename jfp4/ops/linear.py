"""The linear layer: fprop, dgrad and wgrad on quantised operands, tied by a custom VJP.

With ``x = s_x q_x`` (a scale per token) and ``w = s_w q_w`` (one per output channel),

    fprop  y  = s_x (q_x q_w) s_w
    dgrad  dx = Q(dy * s_w) q_w^T       s_w varies along dgrad's contraction, so dy carries it
    wgrad  dw = q_x^T Q(dy * s_x)       s_x varies along wgrad's contraction, likewise

which is exact algebra but for the rounding Q of the folded gradient; so the forward's codes and
scales are all that the backward needs (arXiv 2501.17116, section 3 and appendix).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32

from jfp4.formats import operand_format
from jfp4.ops import exchange
from jfp4.ops.calibration import Calibration, calibrate
from jfp4.ops.gemm import Slope, bfloat16_sums, gemm
from jfp4.ops.outliers import clamp, quantize_compensated, quantize_compensated_both
from jfp4.ops.partition import (
    IN_FLOAT32,
    Part,
    Place,
    Reduction,
    Rule,
    by_xla,
    varying_alike,
)
from jfp4.ops.prepare import (
    PreparedWeight,
    quantize_weight,
    quantize_weight_both,
    unpacked,
    weight_format,
)
from jfp4.ops.quantize import (
    check_float,
    quantize,
    quantize_both,
    quantize_gradient,
    to_float32,
)
from jfp4.qtensor import PackedQTensor, QTensor
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
    prepared: PreparedWeight | None = None,
) -> Float[Array, "*b n"]:
    """``x @ w + bias`` with the recipe's quantisation, differentiable in x, w and bias.

    Args:
        x: activations; every leading axis counts tokens. Its dtype is the compute dtype and that
            of the result.
        w: weight, best in the dtype of its master copy: it is quantised from what is passed.
        recipe: a ``Recipe`` or a preset's name.
        bias: added after the product, in float32; in ``x``'s dtype by a recipe that quantises
            nothing.
        calibration: clamp thresholds and mean to use in place of ``x``'s own (``calibrate``); with
            them, and a scale a token, each token's result is independent of the others.
        prepared: what ``prepare(w, recipe)`` gave, to use in place of quantising ``w`` here. The
            gradient flows to ``w`` all the same, whose values before rounding the estimator reads.

    Returns:
        The layer's output in ``x``'s dtype.

    Raises:
        TypeError: ``x``, ``w`` or ``bias`` is not an array of floats.
        ValueError: shapes that do not fit, an unknown recipe, a calibration that lacks what the
            recipe needs or has what it does not, a prepared weight of another shape or recipe, or
            either of them where the recipe quantises nothing.
    """
    recipe = get_recipe(recipe)
    _check_shapes(x, w, bias)
    if recipe.quantizes:
        _check_prepared(prepared, recipe, w.shape)
        _check_calibration(calibration, recipe, w.shape[0])
    else:
        _check_none(calibration=calibration, prepared=prepared)
    if not recipe.quantizes or x.size == 0:
        y = jnp.matmul(x, w.astype(x.dtype))
        return y if bias is None else y + bias.astype(y.dtype)
    tokens = x.reshape(-1, x.shape[-1])
    if calibration is None:
        calibration = calibrate(tokens, recipe)
    y = _linear(recipe, *varying_alike((tokens, w, bias, calibration, prepared)))
    return y.reshape(*x.shape[:-1], w.shape[1])


def quantize_activation(
    x: Float[Array, "m k"], recipe: Recipe, calibration: Calibration
) -> tuple[QTensor, Float32[Array, "m k"] | None]:
    """Quantises activations as the recipe says.

    Returns:
        The operand of the product, and the outlier residual where the recipe compensates by a
        second product (None otherwise).
    """
    (q,), residual = _quantize_activation(x, recipe, calibration, both=False)
    return q, residual


def _quantize_activation(
    x: Float[Array, "m k"], recipe: Recipe, calibration: Calibration, *, both: bool
) -> tuple[tuple[QTensor, ...], Float32[Array, "m k"] | None]:
    """``quantize_activation``; with ``both`` the operand's transpose as well."""
    assert recipe.x_format is not None
    axis = 1 if recipe.x_scale == "token" else None

    def plain(x: Array, shift: str | Array | None) -> tuple[QTensor, ...]:
        assert recipe.x_format is not None
        format = operand_format(recipe.x_format)
        if both:
            return quantize_both(x, axis, format=format, shift=shift)
        return (quantize(x, axis, format=format, shift=shift),)

    if recipe.occ_alpha is None:
        return plain(x, calibration.mean if recipe.x_shift == "mean" else recipe.x_shift), None
    lo, hi, mean = calibration.lo, calibration.hi, calibration.mean
    assert lo is not None and hi is not None
    if mean is not None:
        x = to_float32(x, axis)[0] - mean
    residual = None
    operands: tuple[QTensor, ...]
    if recipe.occ_compensation != "operand":
        clamped, residual = clamp(x, lo, hi)
        operands = plain(clamped, None)
    elif both:
        operands = quantize_compensated_both(x, lo, hi, axis, format=recipe.x_format)
    else:
        operands = (quantize_compensated(x, lo, hi, axis, format=recipe.x_format),)
    if mean is not None:
        shifts = (mean, mean.T)
        operands = tuple(
            dataclasses.replace(q, shift=shift) for q, shift in zip(operands, shifts, strict=False)
        )
    return operands, residual if recipe.occ_compensation == "residual" else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(
    recipe: Recipe,
    x: Array,
    w: Array,
    bias: Array | None,
    calibration: Calibration,
    prepared: PreparedWeight | None,
) -> Array:
    xq, residual = quantize_activation(x, recipe, calibration)
    wq = quantize_weight(w, recipe) if prepared is None else prepared.fprop
    return _product(xq, wq, residual, bias, x.dtype)


def _fprop(
    recipe: Recipe,
    x: Array,
    w: Array,
    bias: Array | None,
    calibration: Calibration,
    prepared: PreparedWeight | None,
) -> tuple[Array, tuple[Any, ...]]:
    # Contiguous along each product's contraction: fprop reads xq, wgrad xq_t.
    (xq, xq_t), residual = _quantize_activation(x, recipe, calibration, both=True)
    xq_t, residual = checkpoint_name((xq_t, residual), CODES_NAME)
    if prepared is None:
        prepared = quantize_weight_both(w, recipe)
        prepared = dataclasses.replace(prepared, dgrad=checkpoint_name(prepared.dgrad, CODES_NAME))
    y = checkpoint_name(_product(xq, prepared.fprop, residual, bias, x.dtype), PRODUCT_NAME)
    # Of x, and of what no slope needs, only the dtype is kept; a w that is kept is the parameter
    # itself, which lives through the step anyway.
    kept_w = jnp.empty(0, w.dtype) if recipe.dge_k is None else w
    dtypes = (jnp.empty(0, x.dtype), None if bias is None else jnp.empty(0, bias.dtype))
    places = (Place.of(x, w), Place.of(w, x), Place.of(x if bias is None else bias, x, w))
    return y, (xq_t, residual, prepared.dgrad, kept_w, calibration, dtypes, places)


def _product(
    xq: QTensor,
    wq: QTensor | PackedQTensor,
    residual: Array | None,
    bias: Array | None,
    dtype: Any,
) -> Array:
    if residual is None:
        return gemm(xq, wq, bias=bias, out_dtype=dtype)
    y = gemm(xq, wq, bias=bias)
    return (y + _matmul(residual, unpacked(wq).dequantize())).astype(dtype)


def _backward(recipe: Recipe, saved: tuple[Any, ...], dy: Array) -> tuple[Any, ...]:
    xq_t, residual, wq, w, calibration, (x_like, bias_like), places = saved
    for_dgrad, for_wgrad = _fold_and_quantize(recipe, dy, xq_t, wq)
    dy = dy.astype(jnp.float32)
    dx = _dgrad(dy, for_dgrad, wq, x_like.dtype)
    slope = None
    if recipe.dge_k is not None:
        # Of the weight BEFORE rounding: on its codes the slope would be a constant.
        centred = w if wq.shift is None else w.astype(jnp.float32) - wq.shift
        slope = Slope(centred, wq.scale, wq.format, recipe.dge_k, recipe.dge_cap)
    reduce = dataclasses.replace(exchange.reduction(), to=places[1].spec)
    dw = _wgrad(dy, for_wgrad, xq_t, residual, slope, w.dtype, reduce)
    dbias = None if bias_like is None else jnp.sum(dy, axis=0).astype(bias_like.dtype)
    zeros = jax.tree.map(jnp.zeros_like, calibration)
    of_operands = (
        None if d is None else place.put(d)
        for place, d in zip(places, (dx, dw, dbias), strict=True)
    )
    return *of_operands, zeros, None


_linear.defvjp(_fprop, _backward)


def _fold_and_quantize(
    recipe: Recipe, dy: Float[Array, "m n"], xq_t: QTensor, wq: QTensor | PackedQTensor
) -> tuple[QTensor | Array, QTensor | Array]:
    """``dy * s_w`` and ``dy * s_x``, quantised unless the recipe leaves them in bfloat16."""
    w_scale, x_scale = wq.scale, xq_t.scale.T
    if recipe.grad_format is None:
        dy = dy.astype(jnp.float32)
        return (dy * w_scale).astype(jnp.bfloat16), (dy * x_scale).astype(jnp.bfloat16)
    return quantize_gradient(dy, w_scale, x_scale, format=recipe.grad_format)


def _dgrad(
    dy: Float32[Array, "m n"], folded: QTensor | Array, wq: QTensor | PackedQTensor, dtype: Any
) -> Float[Array, "m k"]:
    if wq.shift is None:
        return _gradient_product(folded, wq.T.unscaled(), dtype)
    # A number a column: the same for every k.
    added = jnp.sum(dy * wq.shift, axis=1, keepdims=True)
    return (_gradient_product(folded, wq.T.unscaled(), jnp.float32) + added).astype(dtype)


def _wgrad(
    dy: Float32[Array, "m n"],
    folded: QTensor | Array,
    xq_t: QTensor,
    residual: Array | None,
    slope: Slope | None,
    dtype: Any,
    reduce: Reduction,
) -> Float[Array, "k n"]:
    if xq_t.shift is None and residual is None:
        return _gradient_product(xq_t.unscaled(), folded, dtype, slope, reduce)
    dw = _gradient_product(xq_t.unscaled(), folded, jnp.float32, reduce=reduce)
    if xq_t.shift is not None:
        if xq_t.shift.shape[0] == 1:  # a number a token: the same for every k
            dw = dw + jnp.sum(dy * xq_t.shift.T, axis=0, keepdims=True)
        else:  # a vector of length k: an outer product with dy's sum over tokens
            dw = dw + xq_t.shift * jnp.sum(dy, axis=0, keepdims=True)
    if residual is not None:
        dw = dw + _matmul(residual.T, dy, reduce)
    return (dw if slope is None else dw * slope()).astype(dtype)


def _gradient_product(
    a: QTensor | Array,
    b: QTensor | PackedQTensor | Array,
    dtype: Any,
    slope: Slope | None = None,
    reduce: Reduction = IN_FLOAT32,
) -> Array:
    """The product of codes; or in bfloat16, where the gradient is not quantised."""
    if isinstance(a, QTensor) and isinstance(b, QTensor | PackedQTensor):
        return gemm(a, b, slope=slope, out_dtype=dtype, reduce=reduce)
    a, b = (unpacked(v).codes if not isinstance(v, jax.Array) else v for v in (a, b))
    y = _divided(bfloat16_sums, a, b, reduce)
    return (y if slope is None else y * slope()).astype(dtype)


def _matmul(a: Array, b: Array, reduce: Reduction = IN_FLOAT32) -> Array:
    highest = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    return _divided(highest, a, b, reduce)


def _divided(
    multiply: Callable[[Array, Array], Array], a: Array, b: Array, reduce: Reduction
) -> Array:
    """``multiply(a, b)``, whose parts are summed by ``reduce``: XLA would sum them in float32."""

    def of_part(part: Part, a: Array, b: Array) -> tuple[Array]:
        return (reduce(part, multiply(a, b), "k"),)

    rule = Rule(("m k", "k n"), ("m n",), inner=2, wanted=reduce.wanted)
    (y,) = by_xla(of_part, a, b, rule=rule)
    return y


def _check_shapes(x: Array, w: Array, bias: Array | None) -> None:
    check_float(x, "x")
    check_float(w, "w")
    if bias is not None:
        check_float(bias, "bias")
    if x.ndim == 0 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise ValueError(
            f"x has shape {x.shape} and w {w.shape}; expected x [..., k] and w [k, n] with equal k"
        )
    if bias is not None and bias.shape != (w.shape[1],):
        raise ValueError(f"bias has shape {bias.shape}; expected ({w.shape[1]},)")


def _check_none(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name} is a {type(value).__name__}; expected None, as recipe quantises nothing"
            )


def _check_calibration(calibration: Calibration | None, recipe: Recipe, k: int) -> None:
    if calibration is None:
        return
    clamp = None if recipe.occ_alpha is None else ()
    mean = (1, k) if recipe.x_shift == "mean" else None
    for name, field, expected in (
        ("lo", "occ_alpha", clamp),
        ("hi", "occ_alpha", clamp),
        ("mean", "x_shift", mean),
    ):
        value = getattr(calibration, name)
        shape = None if value is None else value.shape
        if shape != expected:
            raise ValueError(
                f"calibration.{name} has shape {shape}; expected {expected} with "
                f"recipe.{field}={getattr(recipe, field)!r}"
            )


def _check_prepared(
    prepared: PreparedWeight | None, recipe: Recipe, shape: tuple[int, ...]
) -> None:
    if prepared is None:
        return
    scale = (1, shape[1] if recipe.w_scale == "channel" else 1)
    expected = _described(shape, weight_format(recipe), scale, recipe.w_shift is not None)
    for q in (prepared.fprop, prepared.dgrad):
        found = _described(q.shape, q.format, q.scale.shape, q.shift is not None)
        if found != expected:
            raise ValueError(
                f"prepared has shape {found}; expected {expected}, those of w and the recipe"
            )


def _described(
    shape: tuple[int, ...], format: str | None, scale: tuple[int, ...], shifted: bool
) -> str:
    return f"{shape} in {format!r} with {'a' if shifted else 'no'} shift and a scale of {scale}"
