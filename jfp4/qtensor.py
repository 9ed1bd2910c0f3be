"""QTensor, a quantised tensor, and PackedQTensor, the same with two codes a byte."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from jfp4.formats import pack, unpack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """Codes with the scale, and perhaps the shift, that turn them back into values.

    Invariants, which hold of whatever ``quantize`` returns:
      * ``value = codes * scale + shift`` (``dequantize``); scale is always the multiplier.
      * Every code lies on the grid of ``format``. What carries it is that format's one-byte dtype
        unless ``quantize`` was asked for a wider one, which a product narrows again if it needs to.
      * ``scale`` has the rank of ``codes``, is positive or NaN, and has size 1 along ``axis``
        (everywhere if ``axis`` is None), so that it can be applied after a contraction over it.
      * ``shift``, where there is one, has the rank of ``codes`` and broadcasts against them.
      * A slice along the kept axis that held a NaN or an infinity has scale NaN and codes 0.

    Attributes:
        codes: values on the format's grid.
        scale: float32 multiplier.
        shift: float32 offset in units of the input, or None.
        format: name of the element format.
        axis: the axis to contract over, counted from the front; None when one scale serves all.
    """

    codes: Float[Array, "..."]
    scale: Float32[Array, "..."]
    shift: Float32[Array, "..."] | None
    format: str = dataclasses.field(metadata={"static": True})
    axis: int | None = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the codes, and of the values."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.codes.ndim

    @property
    def T(self) -> "QTensor":
        """The transposed matrix (axes reversed)."""
        return QTensor(
            self.codes.T,
            self.scale.T,
            None if self.shift is None else self.shift.T,
            self.format,
            None if self.axis is None else self.ndim - 1 - self.axis,
        )

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "..."]:
        """``codes * scale + shift``, computed in float32 and then cast to ``dtype``."""
        value = self.codes.astype(jnp.float32) * self.scale
        if self.shift is not None:
            value = value + self.shift
        return value.astype(dtype)

    def unscaled(self) -> "QTensor":
        """The codes alone: scale 1 and no shift, as the backward products want them.

        Only its codes and format matter to a product, so ``axis`` is None.
        """
        one = jnp.ones((1,) * self.ndim, jnp.float32)
        return QTensor(self.codes, one, None, self.format, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedQTensor:
    """A quantised matrix in half the bytes: 4-bit codes packed along the contraction.

    An operand of ``gemm`` that is read from memory more than it is multiplied, such as a weight in
    generation, or what is stored and sent.

    Invariants:
      * ``packed`` holds the codes with the contraction last, whichever axis of the matrix that is:
        of [k, n] contracted over axis 0, it is [n, ceil(k / 2)]; see ``formats.pack``.
      * ``scale`` is that of the QTensor.

    Attributes:
        packed: two codes a byte, the earlier in the low nibble.
        scale: float32 multiplier.
        format: name of a 4-bit element format.
        axis: the axis to contract over, 0 or 1.
        length: the contraction's length.
    """

    packed: UInt8[Array, "r p"]
    scale: Float32[Array, "..."]
    format: str = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def pack(cls, q: QTensor, axis: int | None = None) -> "PackedQTensor":
        """Packs a matrix along ``axis``, or along ``q.axis`` where none is given.

        Raises:
            ValueError: ``q`` is not a matrix, has a shift or an 8-bit format, or there is no axis.
        """
        axis = q.axis if axis is None else axis
        if q.ndim != 2:
            raise ValueError(f"q has shape {q.shape}; expected a matrix")
        if q.shift is not None:
            raise ValueError(f"q has a shift of shape {q.shift.shape}; expected none")
        if axis not in (0, 1):
            raise ValueError(f"axis={axis}; expected 0 or 1")
        codes = q.codes if axis == 1 else q.codes.T
        return cls(pack(codes, q.format), q.scale, q.format, axis, q.shape[axis])

    def unpack(self) -> QTensor:
        """The QTensor that was packed."""
        codes = unpack(self.packed, self.length, self.format)
        return QTensor(
            codes if self.axis == 1 else codes.T, self.scale, None, self.format, self.axis
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        rows = self.packed.shape[0]
        return (rows, self.length) if self.axis == 1 else (self.length, rows)

    @property
    def T(self) -> "PackedQTensor":
        """The transposed matrix, of the same bytes."""
        return dataclasses.replace(self, scale=self.scale.T, axis=1 - self.axis)

    @property
    def shift(self) -> None:
        """None: what has a shift is not packed."""
        return None

    def unscaled(self) -> "PackedQTensor":
        """The codes alone; see ``QTensor.unscaled``."""
        return dataclasses.replace(self, scale=jnp.ones((1, 1), jnp.float32))
