"""The product of two QTensors: exact sums of codes first, then scales, shifts and bias."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Float32

from jfp4.formats import FORMATS, Format, get_format, unpack
from jfp4.ops import dge, ffi, partition
from jfp4.ops.partition import IN_FLOAT32, Part, Reduction, Rule
from jfp4.ops.quantize import check_float, flush
from jfp4.qtensor import PackedQTensor, QTensor

_E5M2 = FORMATS["e5m2"].dtype
_KERNEL_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_AS_E2M1 = {"e2m1": 1.0, "e2m1b3": 0.25}
"""What kernels that know E2M1 alone take for it, and by what multiple of its scales."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slope:
    """The gradient estimator's slope at ``w / scale``, for a product to be multiplied by.

    Attributes:
        w: the weight before rounding, [m, n]; any shift taken off.
        scale: that of its codes, [1, n] or [1, 1].
        format: the codes' format.
        k: steepness, at least 1.
        cap: upper bound of the slope.
    """

    w: Float[Array, "m n"]
    scale: Float32[Array, "1 #n"]
    format: str = dataclasses.field(metadata={"static": True})
    k: float = dataclasses.field(metadata={"static": True})
    cap: float = dataclasses.field(metadata={"static": True})

    def __call__(self) -> Float32[Array, "m n"]:
        """The slope by itself; see ``jfp4.ops.dge.derivative``."""
        v = self.w.astype(jnp.float32) * (1 / self.scale)
        return dge.derivative(v, self.format, k=self.k, cap=self.cap)

    @property
    def has_kernel(self) -> bool:
        """Whether a kernel can have it for an epilogue: k = 1 is a constant, better folded."""
        fits = np.float32(self.k) > 1 and np.float32(self.cap) > 0
        return bool(fits) and self.format in _AS_E2M1 and self.w.dtype in _KERNEL_DTYPES


def gemm(
    a: QTensor | PackedQTensor,
    b: QTensor | PackedQTensor,
    *,
    bias: Float[Array, " n"] | None = None,
    slope: Slope | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
    promote: bool = False,
    reduce: Reduction = IN_FLOAT32,
) -> Float[Array, "m n"]:
    """``dequantize(a) @ dequantize(b) + bias``, with the sums over codes exact.

    With value = code * scale + shift, the product is the scaled sum of code products, plus one
    rank-one term for each shift; these, the scales ``(sums * a.scale) * b.scale`` in that order,
    and the bias are computed in float32, and the result is cast once.

    Args:
        a: codes [m, k], scale [m, 1] or [1, 1]; shift [m, 1], [1, 1] or [1, k].
        b: codes [k, n], scale [1, n] or [1, 1]; shift [1, n], [1, 1] or [k, 1]. Where both
            operands are packed, kernels multiply them as they are, unless ``promote`` is set;
            whatever else is packed is unpacked first.
        bias: added to every row.
        slope: multiplies the result, in float32 before the cast: a weight's gradient by the
            estimator's slope. GPUs' kernels have it to within ``2**-20`` of its size. Where a mesh
            divides the contraction and leaves the result whole, kernels scale and multiply each
            part, and ``reduce.dtype`` rounds it, before XLA sums them.
        out_dtype: dtype of the result.
        promote: on GPUs, add up every 128 products along k in float32, where tensor cores keep
            fewer bits; without effect where sums are exact anyway.
        reduce: how the parts of the product are summed where a mesh divides the contraction.

    Returns:
        The product, [m, n].

    Raises:
        TypeError: ``a`` or ``b`` is neither a QTensor nor a PackedQTensor, or ``bias`` not an array
            of floats.
        ValueError: an operand is not a matrix, the contraction axes differ in length, a scale
            varies along the contraction, a scale or shift is of another shape than its codes ask
            for, codes are packed along another axis, ``bias`` is not of length n, or ``slope`` is
            not of the result's shape.
    """
    _check_operands(a, b, bias, slope)
    if slope is not None and not slope.has_kernel:
        y = gemm(a, b, bias=bias, promote=promote, reduce=reduce)
        return (y * slope()).astype(out_dtype)
    bias = None if bias is None else bias.astype(jnp.float32)
    u, v = _shift_terms(a, b)
    fa, fb = get_format(a.format), get_format(b.format)
    as_packed = (
        all(isinstance(q, PackedQTensor) and q.format in _AS_E2M1 for q in (a, b))
        and not promote
        and slope is None
    )
    # On a mesh sums are scaled once they are complete: until then they are exact, and rows even, as
    # an exchange in few bits needs them. With a slope that would be another pass over a weight's
    # gradient, of several arrays; so where XLA sums each kernel scales and multiplies its part.
    slope_first = slope is not None and bias is None and u is None and reduce.by is None

    def slope_operands(w: Array, w_scale: Array) -> tuple[Array, Array, float, float]:
        assert slope is not None
        return w, w_scale * _AS_E2M1[slope.format], slope.k, slope.cap

    def after(sums: Array, a_scale: Array, b_scale: Array, *added: Any) -> Array:
        """What XLA makes of the sums of codes."""
        u, v, bias, w, w_scale = added
        y = sums * a_scale * b_scale
        # Terms are added one by one, as kernels add them, to flushed products: so that no compiler
        # makes one operation of product and sum, which would round once where kernels round twice.
        for r in range(0 if u is None else u.shape[1]):
            y = flush(y) + flush(u[:, r : r + 1] * v[r : r + 1])
        if bias is not None:
            y = flush(y) + bias
        if slope is not None:
            y = y * dataclasses.replace(slope, w=w, scale=w_scale)()
        return y.astype(out_dtype)

    def xla(part: Part, a_part: Array, b_part: Array, *outer: Any) -> tuple[Array]:
        sums = _sums(_codes(part, a, a_part), _codes(part, b, b_part), fa, fb)
        return (after(reduce(part, sums, "k"), *outer),)

    def kernel(part: Part, a_part: Array, b_part: Array, *outer: Any) -> tuple[Array]:
        if not part.divides("k"):
            return (product(part, a_part, b_part, *outer, out_dtype=out_dtype),)
        if slope_first and not part.scatter[1]:
            y = product(part, a_part, b_part, *outer, out_dtype=reduce.dtype)
            return (reduce(part, y, "k").astype(out_dtype),)
        one = jnp.ones((1, 1), jnp.float32)
        sums = product(part, a_part, b_part, one, one, out_dtype=reduce.dtype)
        return (after(reduce(part, sums, "k"), *outer),)

    def product(
        part: Part,
        a_part: Array,
        b_part: Array,
        a_scale: Array,
        b_scale: Array,
        u: Array | None = None,
        v: Array | None = None,
        bias: Array | None = None,
        w: Array | None = None,
        w_scale: Array | None = None,
        *,
        out_dtype: jax.typing.DTypeLike,
    ) -> Array:
        if as_packed:
            a_scale, b_scale = a_scale * _AS_E2M1[a.format], b_scale * _AS_E2M1[b.format]
            return ffi.packed_gemm(a_part, a_scale, b_part, b_scale, bias=bias, out_dtype=out_dtype)
        return ffi.gemm(
            _codes(part, a, a_part).astype(fa.dtype),
            a_scale,
            _codes(part, b, b_part).T.astype(fb.dtype),
            b_scale,
            u=u,
            v=v,
            bias=bias,
            slope=None if w is None or w_scale is None else slope_operands(w, w_scale),
            out_dtype=out_dtype,
            promote=promote,
        )

    operands = (
        *(q.packed if isinstance(q, PackedQTensor) else q.codes for q in (a, b)),
        *(a.scale, b.scale, u, v, bias),
        *((None, None) if slope is None else (slope.w, slope.scale)),
    )
    outer = ("m 1", "1 n", "m 1", "1 n", "n", "m n", "1 n")
    rule = Rule((*_contraction(a, b), *outer), ("m n",), inner=2, wanted=reduce.wanted)
    # Tensor cores multiply no E5M2 by E5M2.
    served = (
        jnp.dtype(out_dtype) in _KERNEL_DTYPES
        and 0 not in (*a.shape, *b.shape)
        and not fa.dtype == fb.dtype == _E5M2
    )
    dispatch = functools.partial(ffi.dispatch, kernel) if served else partition.by_xla
    (y,) = dispatch(xla, *operands, rule=rule)
    return y


def _contraction(a: QTensor | PackedQTensor, b: QTensor | PackedQTensor) -> tuple[str, str]:
    """The axes of what carries both operands' codes; packed, the contraction comes last."""
    packed = tuple(isinstance(q, PackedQTensor) for q in (a, b))
    k = "k" if all(packed) else "k/2"
    return (f"m {k}" if packed[0] else "m k"), (f"n {k}" if packed[1] else "k n")


def _codes(part: Part, q: QTensor | PackedQTensor, carried: Array) -> Array:
    """The codes, [m, k] or [k, n], of a part of an operand."""
    if not isinstance(q, PackedQTensor):
        return carried
    # A part of a contraction is a number of whole bytes.
    length = 2 * carried.shape[-1] if part.divides("k") else q.length
    codes = unpack(carried, length, q.format)
    return codes if q.axis == 1 else codes.T


def _shift_terms(
    a: QTensor | PackedQTensor, b: QTensor | PackedQTensor
) -> tuple[Float32[Array, "m r"], Float32[Array, "r n"]] | tuple[None, None]:
    """What shifts add to the product, as one of low rank: a term for each operand that has one."""
    if a.shift is None and b.shift is None:
        return None, None
    a, b = (q.unpack() if isinstance(q, PackedQTensor) else q for q in (a, b))
    terms = []
    if a.shift is not None:
        terms.append(_shift_term(a, b))
    if b.shift is not None:
        # The term above took b's value with its shift; so here a goes without.
        v, u = _shift_term(b.T, dataclasses.replace(a, shift=None).T)
        terms.append((u.T, v.T))
    us, vs = zip(*terms, strict=True)
    return jnp.concatenate(us, axis=1), jnp.concatenate(vs, axis=0)


def _shift_term(a: QTensor, b: QTensor) -> tuple[Float32[Array, "m 1"], Float32[Array, "1 n"]]:
    """``shift(a) @ dequantize(b)``: rank one, for a shift that is constant along one axis."""
    assert a.shift is not None
    m = a.shape[0]
    if a.shift.shape[1] == 1:  # constant along the contraction: only b's column sums are needed
        columns = flush(jnp.sum(b.codes.astype(jnp.float32), axis=0, keepdims=True) * b.scale)
        if b.shift is not None:
            columns = columns + jnp.sum(jnp.broadcast_to(b.shift, b.shape), axis=0, keepdims=True)
        return jnp.broadcast_to(a.shift, (m, 1)), columns
    row = jnp.matmul(a.shift, b.dequantize(), precision=lax.Precision.HIGHEST)
    return jnp.ones((m, 1), jnp.float32), row


def code_sums(a: QTensor, b: QTensor) -> Float32[Array, "m n"]:
    """``a.codes @ b.codes``, exact, in float32.

    4-bit codes are small multiples of a power of two, so on CPU and TPU their product is one of
    int8 integers into int32, exact at any length that fits (K below 14 million for E2M1), and
    rounded once if it passes 2**24 lattice units. Those of longer ones, and of eight-bit codes, are
    computed in bfloat16: it holds every code, so products are exact in float32, and so are the sums
    while they stay below 2**24 units of the smallest product. GPUs multiply the float8 codes
    themselves; Hopper's tensor cores keep E2M1 sums exact while every partial sum stays below 4096.

    Args:
        a: codes [m, k]; scale and shift are not looked at.
        b: codes [k, n], likewise.

    Returns:
        Float32 sums [m, n].
    """
    return _sums(a.codes, b.codes, get_format(a.format), get_format(b.format))


def bfloat16_sums(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float32[Array, "m n"]:
    """``a @ b`` of operands rounded to bfloat16, with sums in float32."""
    # Not everywhere: GPUs would only be made to transpose an operand that lies the other way round.
    plain = functools.partial(_cast_sums, dtypes=(jnp.bfloat16, jnp.bfloat16))
    return lax.platform_dependent(a, b, cpu=_bfloat16_sums, tpu=_bfloat16_sums, default=plain)


def _sums(a: Array, b: Array, fa: Format, fb: Format) -> Float32[Array, "m n"]:
    largest = math.prod(f.max * f.lattice for f in (fa, fb)) * a.shape[1]
    small = fa.bits == 4 and fb.bits == 4 and largest < 2**31  # else integers would wrap
    portable = (
        functools.partial(_integer_sums, lattices=(fa.lattice, fb.lattice))
        if small
        else _bfloat16_sums
    )
    float8 = functools.partial(_cast_sums, dtypes=(fa.dtype, fb.dtype))
    return lax.platform_dependent(a, b, cpu=portable, tpu=portable, default=float8)


def _cast_sums(
    a: Array, b: Array, dtypes: tuple[jax.typing.DTypeLike, jax.typing.DTypeLike]
) -> Float32[Array, "m n"]:
    a, b = a.astype(dtypes[0]), b.astype(dtypes[1])
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


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
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual:
        row_major = Layout(major_to_minor=(0, 1))
        a, b = with_layout_constraint(a, row_major), with_layout_constraint(b, row_major)
    else:  # where it would have XLA gather both operands; a barrier has it divide them
        a, b = lax.optimization_barrier((a, b))
    return jnp.matmul(a, b, preferred_element_type=dtype)


def _check_operands(
    a: QTensor | PackedQTensor,
    b: QTensor | PackedQTensor,
    bias: Array | None,
    slope: Slope | None,
) -> None:
    for name, q, contraction in (("a", a, 1), ("b", b, 0)):
        if not isinstance(q, QTensor | PackedQTensor):
            raise TypeError(f"{name} is {type(q).__name__}; expected a QTensor or PackedQTensor")
        if len(q.shape) != 2:
            raise ValueError(f"{name} has shape {q.shape}; expected a matrix")
        if isinstance(q, PackedQTensor) and q.axis != contraction:
            raise ValueError(
                f"{name} has shape {q.shape} and is packed along axis {q.axis}; expected the "
                f"contraction, axis {contraction}"
            )
        other = q.shape[1 - contraction]
        if q.scale.shape not in ((1, 1), (other, 1) if contraction == 1 else (1, other)):
            raise ValueError(
                f"{name} has codes {q.shape} and scale {q.scale.shape}; expected a scale of size 1 "
                f"along the contraction, axis {contraction}, and 1 or {other} along the other"
            )
        if q.shift is not None and q.shift.shape not in ((1, 1), (q.shape[0], 1), (1, q.shape[1])):
            raise ValueError(
                f"{name} has codes {q.shape} and shift {q.shift.shape}; expected a shift of size 1 "
                "along one axis, and 1 or as many as codes along the other"
            )
    if a.shape[1] != b.shape[0]:
        raise ValueError(
            f"a has shape {a.shape} and b {b.shape}; expected the contraction lengths "
            f"{a.shape[1]} and {b.shape[0]} to be equal"
        )
    m, n = a.shape[0], b.shape[1]
    if slope is not None:
        w, scale = slope.w.shape, slope.scale.shape
        if w != (m, n) or scale not in ((1, 1), (1, n)):
            raise ValueError(
                f"slope has a weight {w} and a scale {scale}; expected {(m, n)} and {(1, n)} or "
                "(1, 1)"
            )
    if bias is None:
        return
    check_float(bias, "bias")
    if bias.shape != (n,):
        raise ValueError(f"bias has shape {bias.shape}; expected ({n},)")
