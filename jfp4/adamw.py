"""AdamW on stored parameters: a chain of optax's form, and one kernel that takes the same step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, UInt32

from jfp4 import master
from jfp4.ops import ffi
from jfp4.ops.rounding import stochastic_key
from jfp4.optim import (
    bound_of_first,
    clip_by_norm,
    norm_and_finite,
    scale_by_adam,
    skip_not_finite,
)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW, clipped by the global norm, skipping what is not finite; moments in a few bits.

    ``transformation`` is it as a chain for optax. ``step`` applies that chain to stored parameters
    (``jfp4.master``), and by one kernel a leaf where there are kernels (``jfp4.backends``): the
    chain's arithmetic, in which each byte of gradient, parameters and moments is read once and
    written once, in place. The two differ by float32's rounding of two products with reciprocals
    where the chain divides; the state is the same tree, so that either goes on from the other's.

    Attributes:
        learning_rate: a number, or a schedule: a function of the count of steps taken.
        b1: decay rate of the first moment.
        b2: decay rate of the second.
        eps: added to the root of the second moment.
        weight_decay: decoupled: times the learning rate.
        mask: from a tree of parameters to one of booleans, which of them decay; None: all.
        clip_norm: largest global norm of a gradient; None clips nothing.
        first: format of the first moment; see ``jfp4.optim.scale_by_adam``.
        second: format of the second moment's root.
        seed: rounds the moments stochastically; None rounds them to nearest.
    """

    learning_rate: float | optax.Schedule
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    mask: Callable[[Any], Any] | None = None
    clip_norm: float | None = None
    first: str = "e4m3"
    second: str = "float16"
    seed: int | None = None

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """The chain; its state is optax's ``ApplyIfFiniteState``.

        Raises:
            ValueError: unknown format of a moment.
        """
        adamw = optax.chain(
            scale_by_adam(
                self.b1, self.b2, self.eps, first=self.first, second=self.second, seed=self.seed
            ),
            optax.add_decayed_weights(self.weight_decay, self.mask),
            optax.scale_by_learning_rate(self._schedule()),
        )
        clip = optax.identity() if self.clip_norm is None else clip_by_norm(self.clip_norm)
        return skip_not_finite(optax.chain(clip, adamw))

    def init(self, params: Any) -> optax.ApplyIfFiniteState:
        """The state before the first step, of parameters as float32 values."""
        return self.transformation().init(params)

    def step(
        self,
        stored: Any,
        state: optax.ApplyIfFiniteState,
        grads: Any,
        *,
        scale: float | Array = 1.0,
        seed: int | Array = 0,
        step: int | Array,
    ) -> tuple[Any, optax.ApplyIfFiniteState, Float32[Array, ""]]:
        """Takes a step on stored parameters; see ``jfp4.master.apply_gradients``.

        Under ``jax.jit`` with donated arguments everything is replaced in its own memory.
        """

        def by_slices(stored: Any, state: Any, grads: Any, scale: Any, seed: Any, n: Any) -> Any:
            chain = self._with_mask_of(stored).transformation()
            return master.apply_gradients(
                chain, stored, state, grads, scale=scale, seed=seed, step=n
            )

        numbers = jnp.float32(scale), jnp.uint32(seed), jnp.asarray(step, jnp.int32)
        return ffi.dispatch(self._by_kernel, by_slices, stored, state, grads, *numbers)

    def _with_mask_of(self, stored: Any) -> "AdamW":
        """Itself, its mask asked of whole leaves: by slices, they would have other shapes."""
        if self.mask is None:
            return self
        decays = dict(jax.tree.leaves_with_path(self.mask(stored)))
        return dataclasses.replace(
            self, mask=lambda tree: jax.tree.map_with_path(lambda path, _: decays[path], tree)
        )

    def _schedule(self) -> optax.Schedule:
        rate = self.learning_rate
        return rate if callable(rate) else optax.constant_schedule(rate)

    def _by_kernel(
        self, stored: Any, state: Any, grads: Any, scale: Array, seed: Array, step: Array
    ) -> tuple[Any, optax.ApplyIfFiniteState, Array]:
        norm, finite = norm_and_finite(grads)
        norm = norm * scale
        _, (adam, _, scheduled) = state.inner_state
        rates = self._rates(adam.count, scheduled.count, scale, norm, finite)

        leaves = jax.tree.leaves(stored)
        structure: Any = jax.tree.structure(stored)
        decays = [True] * len(leaves)
        if self.mask is not None:
            decays = structure.flatten_up_to(self.mask(stored))
        new = []
        for number, (param, grad, first, second, decay) in enumerate(
            zip(
                leaves,
                *(structure.flatten_up_to(tree) for tree in (grads, adam.mu, adam.nu)),
                decays,
                strict=True,
            )
        ):
            slices = param.shape[0] if param.ndim >= 3 else 1
            updated = ffi.adamw(
                _of_rows(grad),
                _of_rows(param),
                _of_rows(first),
                _of_rows(second),
                rates,
                self._keys(number, slices, seed, step, adam.count),
                b1=self.b1,
                b2=self.b2,
                eps=self.eps,
                weight_decay=self.weight_decay if decay else 0.0,
                bound=bound_of_first(self.b1, self.b2),
                root=not self.first == self.second == "float32",
                stochastic=self.seed is not None,
            )
            old = param, first, second
            new.append(jax.tree.map(lambda a, like: a.reshape(like.shape), updated, old))
        params, mu, nu = (jax.tree.unflatten(structure, part) for part in zip(*new, strict=True))
        return params, self._counted(structure, state, norm, finite, mu, nu), norm

    def _rates(
        self, count: Array, scheduled: Array, scale: Array, norm: Array, finite: Array
    ) -> Float32[Array, "6"]:
        """What the kernel multiplies by; the order is that of cuda_ffi/kernels/adamw.h."""
        t = optax.safe_increment(count)
        most = self.clip_norm
        clip = 1.0 if most is None else jnp.where(norm < most, 1, most / norm)
        rates = (
            scale,
            clip,
            self._schedule()(scheduled),
            1 / (1 - self.b1**t),
            1 / jnp.sqrt(1 - self.b2**t),
            finite,
        )
        return jnp.stack([jnp.asarray(rate, jnp.float32) for rate in rates])

    def _keys(
        self, number: int, slices: int, seed: Array, step: Array, count: Array
    ) -> UInt32[Array, "slices 3"]:
        """Keys of the bits by which each slice is rounded: those of ``by_slices``."""
        part = stochastic_key(number, jnp.arange(slices))
        moments = (stochastic_key(self.seed or 0, count, part, which) for which in (0, 1))
        return jnp.stack([stochastic_key(stochastic_key(seed, step, part), 0), *moments], -1)

    def _counted(
        self, structure: Any, state: Any, norm: Array, finite: Array, mu: Any, nu: Any
    ) -> optax.ApplyIfFiniteState:
        """The state after a step: the chain's own counts, and the moments that are given."""
        nothing = jax.tree.unflatten(structure, [None] * structure.num_leaves)

        def with_moments(state: Any, mu: Any, nu: Any) -> Any:
            clip, (adam, *others) = state.inner_state
            adam = adam._replace(mu=mu, nu=nu)
            return state._replace(inner_state=(clip, (adam, *others)))

        _, counted = self.transformation().update(
            nothing, with_moments(state, nothing, nothing), nothing, grad_norm=norm, finite=finite
        )
        return with_moments(counted, mu, nu)


def _of_rows(x: Any) -> Any:
    """An array, or ``Blocks``, of at least one axis."""
    return jax.tree.map(jnp.atleast_1d, x)
