"""QTensor: a quantised tensor."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jfp4.formats import get_format


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

    def nbytes(self, *, packed: bool = False) -> int:
        """Bytes of codes, scales and shift; ``packed`` counts 4-bit codes two a byte."""
        width = get_format(self.format).bits / 8 if packed else 1
        rest = self.scale.size + (0 if self.shift is None else self.shift.size)
        return int(-(-self.codes.size * width // 1)) + 4 * rest
