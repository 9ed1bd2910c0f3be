"""A weight quantised ahead of the products that read it.

A step reads a weight's codes in fprop, in what remat recomputes of it, and in dgrad, and does so
again for every microbatch; the weight changes once. Prepared, it is quantised once as well.
"""

import dataclasses

import jax
from jaxtyping import Array, Float

from jfp4.formats import get_format, operand_format
from jfp4.ops.quantize import quantize, quantize_both
from jfp4.qtensor import PackedQTensor, QTensor
from jfp4.recipe import Recipe, get_recipe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreparedWeight:
    """The codes of a weight [k, n], contiguous along the contraction of each product.

    Both layouts are kept, since tensor cores read along rows alone and to transpose bytes takes as
    long as to unpack nibbles. Packed they are a byte a weight together, as one layout of bytes
    would be; 8-bit formats and weights with a shift are left in bytes, two a weight.

    Attributes:
        fprop: contiguous along k.
        dgrad: contiguous along n.
    """

    fprop: QTensor | PackedQTensor
    dgrad: QTensor | PackedQTensor


def prepare(w: Float[Array, "k n"], recipe: str | Recipe) -> PreparedWeight:
    """Quantises a weight as the recipe says, for every product of a step that reads it.

    Returns:
        What ``linear`` takes in place of quantising ``w``; codes and scales have the same bits.

    Raises:
        TypeError: ``w`` is not an array of floats.
        ValueError: the recipe quantises nothing.
    """
    recipe = get_recipe(recipe)
    if recipe.w_format is None:
        raise ValueError("recipe.w_format=None; expected a format: there is nothing to prepare")
    both = quantize_weight_both(w, recipe)
    if get_format(recipe.w_format).bits != 4 or recipe.w_shift is not None:
        return both
    return PreparedWeight(
        PackedQTensor.pack(unpacked(both.fprop), axis=0),
        PackedQTensor.pack(unpacked(both.dgrad), axis=1),
    )


def quantize_weight(w: Float[Array, "k n"], recipe: Recipe) -> QTensor:
    """Quantises a weight as the recipe says, for fprop alone."""
    return quantize(w, _axis(recipe), format=weight_format(recipe), shift=recipe.w_shift)


def quantize_weight_both(w: Float[Array, "k n"], recipe: Recipe) -> PreparedWeight:
    """Quantises a weight as the recipe says, in bytes: for products that follow at once."""
    wq, wq_t = quantize_both(w, _axis(recipe), format=weight_format(recipe), shift=recipe.w_shift)
    return PreparedWeight(wq_t.T, wq)


def weight_format(recipe: Recipe) -> str:
    """The format in which the recipe's weights are multiplied (``formats.operand_format``)."""
    assert recipe.w_format is not None
    return operand_format(recipe.w_format)


def unpacked(q: QTensor | PackedQTensor) -> QTensor:
    """The QTensor, whether it was packed or not."""
    return q.unpack() if isinstance(q, PackedQTensor) else q


def _axis(recipe: Recipe) -> int | None:
    return 0 if recipe.w_scale == "channel" else None
