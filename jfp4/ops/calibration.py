"""What an activation quantiser needs to know of the tensor as a whole."""

import dataclasses

import jax
from jaxtyping import Array, Float, Float32

from jfp4.ops.outliers import thresholds
from jfp4.ops.quantize import resolve_shift, to_float32
from jfp4.recipe import Recipe, get_recipe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Calibration:
    """Statistics over tokens: taken from the tensor itself in training, kept for evaluation.

    With a scale a token they are all that lets one token's result depend on another's, so a layer
    that is handed the same calibration gives every token the same result in whatever company it
    comes.

    Attributes:
        lo: lower clamp threshold in units of ``x - mean``; None if the recipe does not clamp.
        hi: upper one.
        mean: the mean over tokens, [1, k]; None unless the recipe shifts by it.
    """

    lo: Float32[Array, ""] | None = None
    hi: Float32[Array, ""] | None = None
    mean: Float32[Array, "1 k"] | None = None


def calibrate(x: Float[Array, "m k"], recipe: str | Recipe) -> Calibration:
    """Takes from ``x`` what the recipe's activation quantiser needs; treated as constant.

    Args:
        x: activations, a token a row, of any float dtype.
        recipe: decides which statistics are needed; the others are None.

    Returns:
        The statistics, float32.

    Raises:
        ValueError: ``x`` is not a matrix, or the recipe is unknown; and as ``thresholds`` does.
    """
    recipe = get_recipe(recipe)
    if x.ndim != 2:
        raise ValueError(f"x has shape {x.shape}; expected [m, k], a token a row")
    x = jax.lax.stop_gradient(x)
    lo = hi = mean = None
    if recipe.x_shift == "mean":
        x, _ = to_float32(x, 1)
        mean = resolve_shift(x, 1, "mean")
        x = x - mean
    if recipe.occ_alpha is not None:
        lo, hi = thresholds(x, recipe.occ_alpha, sample=recipe.occ_sample)
    return Calibration(lo, hi, mean)
