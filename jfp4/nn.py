"""FP4 layers for flax.nnx models, and the conversion of an existing model."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jfp4.ops.calibration import Calibration, calibrate
from jfp4.ops.health import health
from jfp4.ops.linear import linear
from jfp4.ops.prepare import prepare
from jfp4.recipe import Recipe, get_recipe

M = TypeVar("M", bound=nnx.Module)

MOMENTUM = 0.9
"""Weight of the old value in the running calibration: it follows the last ten calls or so."""


class CalibrationStat(nnx.Variable):
    """Running clamp thresholds and means, kept with the model for evaluation."""


class Prepared(nnx.Variable):
    """A layer's weight, quantised ahead of the calls that multiply by it."""


class _ByRecipe:
    """What the layers have in common: a kernel of contracted axes and then features.

    They have Flax's class as their first base, or its objects could not become theirs in place.

    Attributes:
        recipe: how it is quantised.
        use_running_average: whether the running calibration is used; ``train()`` and ``eval()``
            of the model set it.
        monitor: whether a call leaves its quantisation health as ``nnx.Intermediate``: ``health``,
            a tuple of one dictionary (``jfp4.ops.health``), of the last call.
    """

    in_features: Any
    out_features: Any
    kernel: nnx.Param[Array]
    bias: nnx.Param[Array] | None
    dtype: Any

    def set_recipe(self, recipe: str | Recipe) -> None:
        """Makes the layer compute by ``recipe`` from now on; forgets the running calibration.

        Raises:
            ValueError: an unknown recipe, or the layer asks for what it would have to ignore.
        """
        recipe = get_recipe(recipe)
        if recipe.quantizes:
            _refuse(self)
        self.recipe = recipe
        # A layer that is evaluated goes on being so with another recipe.
        self.use_running_average = getattr(self, "use_running_average", False)
        self.monitor = getattr(self, "monitor", False)
        # A layer stacked under scan has leading axes, and so have its statistics.
        *stack, k, _ = self._matrix().shape
        occ, mean = recipe.occ_alpha is not None, recipe.x_shift == "mean"
        # The dtype is given, or they would be weakly typed and the second call compiled anew.
        lo, hi = (jnp.full(stack, bound, jnp.float32) for bound in (-jnp.inf, jnp.inf))
        zeros = jnp.zeros((*stack, 1, k), jnp.float32)
        # Said to be data even where there is none, so that another recipe may put some there.
        self.lo = nnx.data(CalibrationStat(lo) if occ else None)
        self.hi = nnx.data(CalibrationStat(hi) if occ else None)
        self.mean = nnx.data(CalibrationStat(zeros) if mean else None)
        if hasattr(self, "prepared"):
            del self.prepared

    def prepare(self) -> None:
        """Quantises the weight once for all calls, until the next ``prepare``.

        For a computation in which the weight does not change, such as a step of training with its
        microbatches and its recomputations: what comes of it has the same bits, and the gradient
        flows to ``kernel`` as before. A call after the kernel has changed would not see the change.
        """
        if self.recipe.quantizes:
            self.prepared = Prepared(prepare(self._matrix(), self.recipe))

    def _matrix(self) -> Float[Array, "*stack k n"]:
        shape = self.kernel.shape
        contracted, features = _sizes(self.in_features), _sizes(self.out_features)
        stack = shape[: len(shape) - len(contracted) - len(features)]
        return self.kernel[...].reshape(*stack, math.prod(contracted), math.prod(features))

    def _quantized(self, inputs: Any, out_sharding: Any) -> Array:
        """What a call computes, from the last axes of ``inputs`` to ``out_features``."""
        if out_sharding is not None:
            raise ValueError(f"out_sharding={out_sharding}; expected None for a quantised layer")
        inputs = jnp.asarray(inputs)
        sizes = _sizes(self.in_features)
        *rest, _ = shape = (*inputs.shape[: -len(sizes)], math.prod(sizes))
        if inputs.shape[-len(sizes) :] != sizes:
            expected = ", ".join(map(str, sizes))
            raise ValueError(f"inputs has shape {inputs.shape}; expected [..., {expected}]")
        kernel = self._matrix()
        bias = None if self.bias is None else self.bias[...].reshape(-1)
        x = inputs.astype(self.dtype or jnp.promote_types(inputs.dtype, kernel.dtype))
        x = x.reshape(shape)
        tokens = x.reshape(math.prod(rest), x.shape[-1])
        calibration: Calibration | None = None
        if self.use_running_average:
            calibration = self._running()
        elif tokens.size > 0:
            calibration = calibrate(tokens, self.recipe)
        # There only once it is made, as nnx.update has it of what a call adds.
        prepared = self.prepared.get_value() if hasattr(self, "prepared") else None
        y = linear(x, kernel, self.recipe, bias=bias, calibration=calibration, prepared=prepared)
        # Of inputs that are none, which are refused by now, nothing stays.
        if calibration is not None and not self.use_running_average:
            self._observe(calibration)
        if self.monitor and calibration is not None:
            # As ``sow`` would leave it, but of this call alone: the state keeps its shape.
            self.health = nnx.Intermediate((health(tokens, kernel, self.recipe, calibration),))
        return y.reshape(*rest, *_sizes(self.out_features))

    def _running(self) -> Calibration:
        lo, hi, mean = (
            None if stat is None else stat[...] for stat in (self.lo, self.hi, self.mean)
        )
        return Calibration(lo, hi, mean)

    def _observe(self, calibration: Calibration) -> None:
        for stat, new in (
            (self.lo, calibration.lo),
            (self.hi, calibration.hi),
            (self.mean, calibration.mean),
        ):
            if stat is not None and new is not None:
                old = stat[...]
                # What has seen nothing yet, the first call replaces: thresholds are infinite then,
                # and means all zero. A call that is not finite has nothing to tell.
                unseen = jnp.all(old == 0) if stat is self.mean else jnp.isinf(old)
                seen = jnp.where(unseen, new, MOMENTUM * old + (1 - MOMENTUM) * new)
                stat[...] = jnp.where(jnp.isfinite(new), seen, old)


class Linear(nnx.Linear, _ByRecipe):
    """``nnx.Linear`` whose products are quantised by a recipe.

    In training every call calibrates from its own input and updates a running calibration; after
    ``model.eval()`` the running one is used, so that, with a scale a token, a token's result does
    not depend on the tokens it comes with. A layer that has never been trained clamps and shifts
    nothing then.

    Takes the arguments of ``nnx.Linear``; ``dtype`` is the compute dtype, and the kernel is
    quantised from its own dtype without a cast in between.

    Raises:
        ValueError: an unknown recipe, or ``precision``, ``dot_general``, ``promote_dtype`` or
            ``preferred_element_type``, which a quantised product would have to ignore.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        recipe: str | Recipe = "fp4",
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_features, out_features, rngs=rngs, **kwargs)
        self.set_recipe(recipe)

    def __call__(self, inputs: Float[Array, "*b k"], out_sharding: Any = None) -> Array:
        """Applies the layer along the last axis: [..., in_features] to [..., out_features].

        Raises:
            ValueError: ``inputs`` is of another shape; and as ``linear`` does.
        """
        if not self.recipe.quantizes:
            return super().__call__(inputs, out_sharding)
        return self._quantized(inputs, out_sharding)


class LinearGeneral(nnx.LinearGeneral, _ByRecipe):
    """``nnx.LinearGeneral`` whose products are quantised by a recipe, as ``Linear``'s are.

    What ``nnx.MultiHeadAttention`` has for its projections. A token is all axes that are
    contracted, a channel one of all features, so that scales are those of the same matrix in a
    ``Linear``.

    Raises:
        ValueError: as of ``Linear``, or ``axis`` is not the last axes in their order, or
            ``batch_axis`` names any.
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        recipe: str | Recipe = "fp4",
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_features, out_features, rngs=rngs, **kwargs)
        self.set_recipe(recipe)

    def __call__(self, inputs: Float[Array, "..."], out_sharding: Any = None) -> Array:
        """Applies the layer along the last axes: [..., *in_features] to [..., *out_features].

        Raises:
            ValueError: ``inputs`` is of another shape; and as ``linear`` does.
        """
        if not self.recipe.quantizes:
            return super().__call__(inputs, out_sharding)
        return self._quantized(inputs, out_sharding)


def _sizes(features: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(features) if isinstance(features, Sequence) else (features,)


def path_name(path: Sequence[Any]) -> str:
    """A module's path as recipes and ``where`` see it: attribute names and indices with dots."""
    return ".".join(str(part) for part in path)


AnyLinear = nnx.Linear | nnx.LinearGeneral

_CONVERTED: dict[type, type[Linear] | type[LinearGeneral]] = {
    nnx.Linear: Linear,
    Linear: Linear,
    nnx.LinearGeneral: LinearGeneral,
    LinearGeneral: LinearGeneral,
}
"""By the type of a layer, what it becomes."""


def convert(
    model: M,
    recipe: str | Recipe = "fp4",
    where: Callable[[str, AnyLinear], bool] | None = None,
) -> M:
    """Makes the linear layers of an existing NNX model compute by a recipe, in place.

    Every ``nnx.Linear`` becomes a ``jfp4.nn.Linear`` and every ``nnx.LinearGeneral``, such as the
    projections of ``nnx.MultiHeadAttention``, a ``jfp4.nn.LinearGeneral``: the same object with the
    same parameters, so that references, sharing and optimizers stay valid. Layers converted before
    have their recipe changed; subclasses of these other than jfp4's own are left alone. Layers that
    were not converted before train from then on: call ``model.eval()`` after this, not before.

    Args:
        model: any NNX module, a single layer included.
        recipe: a ``Recipe`` or a preset's name.
        where: ``where(path, layer)`` says whether to convert a layer, in place of the recipe's
            ``skip`` patterns; ``path`` is dotted, such as "layers.0.mlp.up_proj".

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is none of ``flax.nnx``.
        ValueError: no layer was chosen, or one, which is named, asks for what a quantised product
            would ignore or contracts other axes than the last.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model is a {type(model).__module__}.{type(model).__qualname__}; expected a "
            "flax.nnx.Module (modules of flax.linen call jfp4.linear themselves)"
        )
    recipe = get_recipe(recipe)
    layers: list[tuple[str, Any]] = [
        (path_name(path), module)
        for path, module in nnx.iter_modules(model)
        if type(module) in _CONVERTED
    ]
    chosen = [
        (path, layer)
        for path, layer in layers
        if (where(path, layer) if where else not recipe.quantizes or recipe.applies_to(path))
    ]
    if not chosen:
        found = ", ".join(path or "the model itself" for path, _ in layers) or "none"
        raise ValueError(f"no layer of the model was chosen; its linear layers: {found}")
    for path, layer in chosen:
        if recipe.quantizes:
            _refuse(layer, path)
    for _, layer in chosen:
        layer.__class__ = _CONVERTED[type(layer)]
        layer.set_recipe(recipe)
    return model


def _refuse(layer: Any, path: str = "") -> None:
    """Raises ValueError if a layer asks for what a quantised product does not do."""
    general = isinstance(layer, nnx.LinearGeneral)
    parameters = inspect.signature(
        (nnx.LinearGeneral if general else nnx.Linear).__init__
    ).parameters
    wrong = [
        f"{name}={value}"
        for name in IGNORED
        if (value := getattr(layer, name, None)) is not None
        and value is not parameters[name].default
    ]
    where = f"{path}: " if path else ""
    if wrong:
        raise ValueError(
            f"{where}{', '.join(wrong)}; expected the default: the recipe sets the product"
        )
    if general:
        last = tuple(range(-len(layer.axis), 0))
        if layer.axis != last or layer.batch_axis:
            raise ValueError(
                f"{where}axis={layer.axis}, batch_axis={dict(layer.batch_axis)}; expected the last "
                f"axes, {last}, and no batch_axis"
            )


IGNORED = ("precision", "dot_general", "dot_general_cls", "preferred_element_type", "promote_dtype")
"""Arguments that a quantised product would have to ignore."""
