"""Recipe: what each of a linear layer's three products quantises, and which estimator it uses."""

import dataclasses
import difflib
import fnmatch
import math
import numbers
import types
import typing
from typing import Any, Literal

from jfp4.formats import get_format

FormatName = Literal["e2m1", "e1m2", "e3m0", "e4m3", "e5m2"]
GradFormatName = Literal["e4m3", "e5m2"]


def check_choices(config: Any) -> None:
    """Raises ValueError where a field declared as a ``Literal`` (or None) holds anything else."""
    for name, hint in typing.get_type_hints(type(config)).items():
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        parts = typing.get_args(hint) if union else (hint,)
        literals = [part for part in parts if typing.get_origin(part) is Literal]
        choices = [choice for literal in literals for choice in typing.get_args(literal)]
        choices += [None] * (type(None) in parts)
        if literals and getattr(config, name) not in choices:
            listed = ", ".join(str(choice) for choice in choices)
            raise ValueError(f"{name}={getattr(config, name)!r}; expected one of {listed}")


def check_dge(k: float, cap: float, prefix: str = "") -> None:
    """Raises ValueError unless ``k`` is at least 1 and ``cap`` positive, both finite.

    What they are called in its message begins with ``prefix``.
    """
    if not 1 <= k < math.inf:
        raise ValueError(f"{prefix}k={k} is out of range; expected {prefix}k >= 1, finite")
    if not 0 < cap < math.inf:
        raise ValueError(f"{prefix}cap={cap} is out of range; expected {prefix}cap > 0, finite")


def is_count(value: Any) -> bool:
    """Whether it is a positive integer."""
    return isinstance(value, numbers.Integral) and int(value) > 0


def check_occ(alpha: float, sample: int | None, prefix: str = "") -> None:
    """Raises ValueError unless ``alpha`` is in (0.5, 1] and ``sample`` is None or positive.

    What they are called in its message begins with ``prefix``.
    """
    if not 0.5 < alpha <= 1:
        raise ValueError(
            f"{prefix}alpha={alpha} is out of range; expected 0.5 < {prefix}alpha <= 1"
        )
    if sample is not None and not is_count(sample):
        raise ValueError(f"{prefix}sample={sample}; expected a positive integer or None")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a linear layer is quantised. Hashable, so that a compiled function can be keyed by it.

    fprop multiplies quantised x and w; dgrad and wgrad reuse those codes and quantise dy, with the
    scales folded into it. A layer whose path matches ``skip`` is computed in the compute dtype.

    Raises:
        ValueError: a combination that has no meaning, naming the fields.
    """

    x_format: FormatName | None = "e2m1"
    """Element format of activations; None leaves the whole layer in the compute dtype."""

    w_format: FormatName | None = "e2m1"
    """Element format of weights; None leaves the whole layer in the compute dtype."""

    grad_format: GradFormatName | None = "e5m2"
    """Element format of dy in dgrad and wgrad; None keeps dy in bfloat16."""

    x_scale: Literal["token", "tensor"] = "token"
    """One activation scale per token (row) or for the whole tensor."""

    w_scale: Literal["channel", "tensor"] = "channel"
    """One weight scale per output channel (column) or for the whole tensor."""

    x_shift: Literal["midrange", "mean"] | None = None
    """Activation shift: the midrange of each token, or the mean over tokens."""

    w_shift: Literal["midrange"] | None = None
    """Weight shift: the midrange of each output channel."""

    dge_k: float | None = 5.0
    """Steepness of the differentiable gradient estimator; None: straight through."""

    dge_cap: float = 3.0
    """Upper bound of the estimator's slope."""

    occ_alpha: float | None = 0.99
    """Quantile at which activations are clamped, in (0.5, 1]; None clamps nothing."""

    occ_sample: int | None = 65536
    """Elements from which the quantile is estimated; None takes all of them (exact)."""

    occ_compensation: Literal["operand", "residual"] | None = "operand"
    """What was clamped off: kept in the FP8 operand, as a second product, or dropped (None)."""

    skip: tuple[str, ...] = ("*embed*", "*lm_head*")
    """Shell patterns of layer paths that stay in the compute dtype, in place of these."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not (isinstance(self.skip, tuple) and all(isinstance(p, str) for p in self.skip)):
            raise ValueError(
                f"skip={self.skip!r}; expected a tuple of patterns, such as ('*head*',)"
            )
        if (self.x_format is None) != (self.w_format is None):
            raise ValueError(
                f"x_format={self.x_format!r} and w_format={self.w_format!r}; expected both or "
                "neither to be None, since a product takes codes on both sides"
            )
        if not self.quantizes:
            return
        assert self.x_format is not None and self.w_format is not None
        x, w = get_format(self.x_format), get_format(self.w_format)
        if self.dge_k is not None:
            check_dge(self.dge_k, self.dge_cap, "dge_")
            if w.bits != 4:
                raise ValueError(
                    f"dge_k={self.dge_k} with w_format={w.name!r}; the estimator is for 4-bit "
                    "weights: set dge_k to None"
                )
        if self.occ_alpha is not None:
            check_occ(self.occ_alpha, self.occ_sample, "occ_")
            if x.bits != 4:
                raise ValueError(
                    f"occ_alpha={self.occ_alpha} with x_format={x.name!r}; clamping is for 4-bit "
                    "activations: set occ_alpha to None"
                )
            if self.x_shift == "midrange":
                raise ValueError(
                    f"x_shift='midrange' with occ_alpha={self.occ_alpha}; the clamp already bounds "
                    "the range: set one of them to None"
                )

    @property
    def quantizes(self) -> bool:
        """Whether anything is quantised at all."""
        return self.x_format is not None

    @property
    def inert(self) -> dict[str, str]:
        """The fields that change nothing, and which others' values make it so."""
        if not self.quantizes:
            names = {field.name for field in dataclasses.fields(self)} - {"x_format", "w_format"}
            return dict.fromkeys(sorted(names), "x_format and w_format are None")
        inert: dict[str, str] = {}
        if self.dge_k is None:
            inert["dge_cap"] = "dge_k is None"
        if self.occ_alpha is None:
            inert |= dict.fromkeys(("occ_sample", "occ_compensation"), "occ_alpha is None")
        return inert

    def applies_to(self, path: str) -> bool:
        """Whether the layer at this dotted path is quantised: it matches no ``skip`` pattern."""
        return self.quantizes and not any(fnmatch.fnmatchcase(path, p) for p in self.skip)


_PLAIN = Recipe(dge_k=None, occ_alpha=None)

RECIPES: dict[str, Recipe] = {
    "bf16": dataclasses.replace(_PLAIN, x_format=None, w_format=None),
    "fp8": dataclasses.replace(_PLAIN, x_format="e4m3", w_format="e4m3"),
    "fp4": Recipe(),
    "fp4_cast": _PLAIN,
}
"""The presets: products in the compute dtype, of Llamas BF16, with nothing quantised; FP8 with the
same scaling; the paper's FP4; FP4 by cast alone."""


def get_recipe(recipe: str | Recipe) -> Recipe:
    """Returns a preset by name, or the recipe itself.

    Raises:
        TypeError: neither a name nor a recipe.
        ValueError: no preset has this name; near names are given.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(
            f"recipe is {type(recipe).__name__}; expected a Recipe or one of {', '.join(RECIPES)}"
        )
    if recipe not in RECIPES:
        near = difflib.get_close_matches(recipe, RECIPES, n=2, cutoff=0.4)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ValueError(
            f"recipe={recipe!r} is unknown{hint}; expected one of {', '.join(RECIPES)}"
        )
    return RECIPES[recipe]
