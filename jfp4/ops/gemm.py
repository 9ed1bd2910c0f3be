"""The product of two QTensors: exact sums of codes first, then scales, shifts and bias."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Float32

from jfp4.formats import get_format
from jfp4.qtensor import QTensor


def gemm(
    a: QTensor,
    b: QTensor,
    *,
    bias: Float[Array, " n"] | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
) -> Float[Array, "m n"]:
    """``dequantize(a) @ dequantize(b) + bias``, with the sums over codes exact.

    With value = code * scale + shift, the product is the scaled sum of code products, plus one
    rank-one term for each shift; these, the scales ``(sums * a.scale) * b.scale`` in that order,
    and the bias are computed in float32, and the result is cast once.

    Args:
        a: codes [m, k], scale [m, 1] or [1, 1]; shift [m, 1], [1, 1] or [1, k].
        b: codes [k, n], scale [1, n] or [1, 1]; shift [1, n], [1, 1] or [k, 1].
        bias: added to every row.
        out_dtype: dtype of the result.

    Returns:
        The product, [m, n].

    Raises:
        TypeError: ``a`` or ``b`` is not a QTensor.
        ValueError: an operand is not a matrix, the contraction axes differ in length, a scale
            varies along the contraction, or ``bias`` is not of length n.
    """
    _check_operands(a, b, bias)
    y = code_sums(a, b) * a.scale * b.scale
    if a.shift is not None:
        y = y + _shift_term(a, b)
    if b.shift is not None:
        y = y + _shift_term(b.T, a.T).T
    if a.shift is not None and b.shift is not None:
        # Each term above took the other's value with its shift: one of the two counts double.
        k = a.shape[1]
        overlap = jnp.broadcast_to(a.shift, (a.shift.shape[0], k)) @ jnp.broadcast_to(
            b.shift, (k, b.shift.shape[1])
        )
        y = y - overlap
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(out_dtype)


def _shift_term(a: QTensor, b: QTensor) -> Float32[Array, "#m n"]:
    """``shift(a) @ dequantize(b)``: rank one, for a shift that is constant along one axis."""
    assert a.shift is not None
    if a.shift.shape[1] == 1:  # constant along the contraction: only b's column sums are needed
        columns = jnp.sum(b.codes.astype(jnp.float32), axis=0, keepdims=True) * b.scale
        if b.shift is not None:
            columns = columns + jnp.sum(jnp.broadcast_to(b.shift, b.shape), axis=0, keepdims=True)
        return a.shift * columns
    return jnp.matmul(a.shift, b.dequantize(), precision=lax.Precision.HIGHEST)


def code_sums(a: QTensor, b: QTensor) -> Float32[Array, "m n"]:
    """``a.codes @ b.codes``, exact, in float32.

    4-bit codes are small multiples of a power of two, so on CPU and TPU their product is one of
    int8 integers into int32, exact at any length that fits (K below 14 million for E2M1), and
    rounded once if it passes 2**24 lattice units. Eight-bit codes are exact in bfloat16, so their
    products are exact in float32, and so are the sums while they stay below 2**24 units of the
    smallest product. GPUs multiply the float8 codes themselves; Hopper's tensor cores keep E2M1
    sums exact while every partial sum stays below 4096.

    Args:
        a: codes [m, k]; scale and shift are not looked at.
        b: codes [k, n], likewise.

    Returns:
        Float32 sums [m, n].
    """
    fa, fb = get_format(a.format), get_format(b.format)
    small = fa.bits == 4 and fb.bits == 4
    portable = (
        functools.partial(_integer_sums, lattices=(fa.lattice, fb.lattice))
        if small
        else _bfloat16_sums
    )
    float8 = functools.partial(_float8_sums, dtypes=(fa.dtype, fb.dtype))
    return lax.platform_dependent(a.codes, b.codes, cpu=portable, tpu=portable, default=float8)


def _float8_sums(a: Array, b: Array, dtypes: tuple[np.dtype, np.dtype]) -> Float32[Array, "m n"]:
    a8, b8 = a.astype(dtypes[0]), b.astype(dtypes[1])
    return jnp.matmul(a8, b8, preferred_element_type=jnp.float32)


def _integer_sums(a: Array, b: Array, lattices: tuple[int, int]) -> Float32[Array, "m n"]:
    a8 = (a.astype(jnp.float32) * lattices[0]).astype(jnp.int8)
    b8 = (b.astype(jnp.float32) * lattices[1]).astype(jnp.int8)
    sums = _row_major_matmul(a8, b8, jnp.int32)
    return sums.astype(jnp.float32) * (1.0 / (lattices[0] * lattices[1]))


def _bfloat16_sums(a: Array, b: Array) -> Float32[Array, "m n"]:
    return _row_major_matmul(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), jnp.float32)


def _row_major_matmul(a: Array, b: Array, dtype: jax.typing.DTypeLike) -> Array:
    # Fixing the layout keeps XLA from folding a caller's transpose into the product: its CPU
    # kernels take operands contiguous this way round at two to eight times the other's speed.
    row_major = Layout(major_to_minor=(0, 1))
    a, b = with_layout_constraint(a, row_major), with_layout_constraint(b, row_major)
    return jnp.matmul(a, b, preferred_element_type=dtype)


def _check_operands(a: QTensor, b: QTensor, bias: Array | None) -> None:
    for name, q, contraction in (("a", a, 1), ("b", b, 0)):
        if not isinstance(q, QTensor):
            raise TypeError(f"{name} is {type(q).__name__}; expected a QTensor")
        if q.ndim != 2:
            raise ValueError(f"{name} has shape {q.shape}; expected a matrix")
        if q.scale.ndim != 2 or q.scale.shape[contraction] != 1:
            raise ValueError(
                f"{name} has codes {q.shape} and scale {q.scale.shape}; expected a scale of size 1 "
                f"along the contraction, axis {contraction}"
            )
    if a.shape[1] != b.shape[0]:
        raise ValueError(
            f"a has shape {a.shape} and b {b.shape}; expected the contraction lengths "
            f"{a.shape[1]} and {b.shape[0]} to be equal"
        )
    if bias is not None and bias.shape != (b.shape[1],):
        raise ValueError(f"bias has shape {bias.shape}; expected ({b.shape[1]},)")
