"""AdamW on stored parameters: a chain of optax's form, and one kernel that takes the same step."""

import dataclasses
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float32, UInt32

from jfp4 import master
from jfp4.ops import ffi, partition
from jfp4.ops.rounding import as_uint32, stochastic_key
from jfp4.ops.slices import is_slices
from jfp4.optim import (
    Blocks,
    bound_of_first,
    check_moments,
    clip_by_norm,
    scale_by_adam,
    skip_not_finite,
)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW, clipped by the global norm, skipping what is not finite; moments in a few bits.

    ``transformation`` is it as a chain for optax. ``step`` applies that chain to stored parameters
    (``jfp4.master``), and by one kernel a leaf where there are kernels (``jfp4.backends``): the
    chain's arithmetic, which reads each byte of gradient, parameters and moments once and writes
    what is new in place. The two differ by float32's roundings, of products with reciprocals where
    the chain divides and of sums that are fused with a product; the state is the same tree, so that
    either goes on from the other's.

    Attributes:
        learning_rate: a number, or a schedule: a function of the count of steps taken.
        b1: decay rate of the first moment.
        b2: decay rate of the second.
        eps: added to the root of the second moment.
        weight_decay: decoupled: times the learning rate.
        mask: a tree of booleans, or a function from the parameters to one: which of them decay;
            None: all.
        clip_norm: largest global norm of a gradient; None clips nothing.
        first: format of the first moment; see ``jfp4.optim.scale_by_adam``.
        second: format of the second moment's root.
        seed: rounds the moments stochastically; None rounds them to nearest, at which they may
            stand still (``scale_by_adam``).

    Raises:
        ValueError: a number is out of range, or a moment's format unknown.
    """

    learning_rate: float | optax.Schedule
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    mask: Any = None
    clip_norm: float | None = None
    first: str = "e4m3"
    second: str = "float16"
    seed: int | None = 0

    def __post_init__(self) -> None:
        check_moments(self.first, self.second)
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected 0 <= {name} < 1")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps={self.eps}; expected a positive number, finite")
        for name in ("weight_decay", "learning_rate"):
            value = getattr(self, name)
            if isinstance(value, numbers.Real) and not 0 <= float(value) < math.inf:
                raise ValueError(f"{name}={value}; expected 0 or more, finite")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm={self.clip_norm}; expected a positive number, or None")

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
        shardings: Any = None,
    ) -> tuple[Any, optax.ApplyIfFiniteState, Float32[Array, ""]]:
        """Takes a step on stored parameters; see ``jfp4.master.apply_gradients``.

        Under ``jax.jit`` with donated arguments everything is replaced in its own memory.

        Args:
            stored: what ``jfp4.master.encode`` made.
            state: of ``init``.
            grads: gradients of the values, of ``stored``'s shapes, in any float dtypes; those of
                stacks may be ``jfp4.ops.slices.Slices``, which the kernel takes as they are, but
                for stacks of vectors and where a mesh divides the first axis.
            scale: what they are multiplied by.
            seed: the bits that are rounded by are a function of (seed, step, element), wherever on
                a mesh the element lies.
            step: likewise.
            shardings: a tree of NamedSharding, where each of ``stored`` lies; gradients and moments
                are moved there. Of automatic axes the kernel needs it, since arrays do not say.

        Returns:
            What is stored and the state after the step, and the global norm of the scaled gradient
            before it is clipped.

        Raises:
            ValueError: ``grads`` is another tree than ``stored``, or a gradient is not of its
                parameter's shape; the state's moments are in other formats than this optimizer's.

        Warns:
            UserWarning: the kernel serves, but not this leaf: nothing says where it lies, or its
                mesh divides amid a block of its moments.
        """
        self._check(state)
        optimizer = self._with_mask_of(stored)
        chain = optimizer.transformation()

        def by_chain(*args: Any, fused: Any = None) -> Any:
            stored, state, grads, scale, seed, n = args
            return master.apply_gradients(
                chain, stored, state, grads, scale=scale, seed=seed, step=n, fused=fused
            )

        def by_kernel(*args: Any) -> Any:
            return by_chain(*args, fused=optimizer._kernel(args[0], shardings, args[3:]))

        numbers = jnp.float32(scale), as_uint32(seed), jnp.asarray(step, jnp.int32)
        return ffi.dispatch(by_kernel, by_chain, stored, state, grads, *numbers)

    def _check(self, state: optax.ApplyIfFiniteState) -> None:
        _, (adam, *_) = state.inner_state
        for name, moments in (("first", adam.mu), ("second", adam.nu)):
            wanted = getattr(self, name)
            for moment in jax.tree.leaves(moments, is_leaf=lambda x: isinstance(x, Blocks)):
                found = "float32"
                if isinstance(moment, Blocks):
                    found = "e4m3" if moment.codes.dtype == jnp.uint8 else "float16"
                if found != wanted:
                    raise ValueError(
                        f"state keeps the {name} moment in {found}; expected {wanted}, as this "
                        "optimizer's init makes it"
                    )

    def _with_mask_of(self, stored: Any) -> "AdamW":
        """Itself, its mask asked of whole leaves: by slices, they would have other shapes."""
        if self.mask is None:
            return self
        whole = jax.tree.map(  # a mask may have one answer for many leaves
            lambda decay, part: jax.tree.map(lambda _: decay, part), self._mask_of(stored), stored
        )
        decays = dict(jax.tree.leaves_with_path(whole))
        return dataclasses.replace(
            self, mask=lambda tree: jax.tree.map_with_path(lambda path, _: decays[path], tree)
        )

    def _mask_of(self, stored: Any) -> Any:
        return self.mask(stored) if callable(self.mask) else self.mask

    def _schedule(self) -> optax.Schedule:
        rate = self.learning_rate
        return rate if callable(rate) else optax.constant_schedule(rate)

    def _kernel(
        self, stored: Any, shardings: Any, numbers: tuple[Array, ...]
    ) -> Callable[..., Any] | None:
        """The kernel as ``jfp4.master.apply_gradients`` has its ``fused``.

        Args:
            stored: the whole tree.
            shardings: where its leaves lie, as far as that is known.
            numbers: the gradient's scale, and seed and step.
        """
        leaves = jax.tree.leaves(stored)
        structure: Any = jax.tree.structure(stored)
        told = None if shardings is None else structure.flatten_up_to(shardings)
        places = partition.places(leaves, told)
        if places is None:
            warnings.warn(
                f"AdamW.step: shardings=None, and {jax.device_count()} devices may divide what is "
                "given; expected where each parameter lies: XLA takes the step",
                stacklevel=2,
            )
            return None
        decays = [True] * len(leaves)
        if self.mask is not None:
            decays = structure.flatten_up_to(self._mask_of(stored))
        scale, seed, step = numbers

        def fused(number: int, held: Any, grad: Any, norm: Array, finite: Array) -> Any:
            param, state = held
            place = places[number]
            if is_slices(grad) and (
                # Slices have keys of their own in stacks of matrices alone.
                param.ndim < 3 or partition.parts_of_axis(place, 0, param.ndim) > 1
            ):
                grad = grad.stack()
            _, (adam, _, scheduled) = state.inner_state
            (first,), (second,) = (
                jax.tree.leaves(moment, is_leaf=lambda x: isinstance(x, Blocks))
                for moment in (adam.mu, adam.nu)
            )
            if why := _divided_amid_blocks(place, first, second):
                warnings.warn(
                    f"AdamW.step: {why}: XLA takes the step of {param.shape}", stacklevel=2
                )
                return None

            def of_part(begin: tuple[Any, ...], arrays: Any, *whole: Array) -> Any:
                param, grad, first, second = arrays
                rates, seed, step, count = whole
                updated = ffi.adamw(
                    grad.each if is_slices(grad) else (_of_rows(grad),),
                    _of_rows(param),
                    _of_rows(first),
                    _of_rows(second),
                    rates,
                    self._keys(number, held[0].shape, begin, param.shape, seed, step, count),
                    b1=self.b1,
                    b2=self.b2,
                    eps=self.eps,
                    weight_decay=self.weight_decay if decays[number] else 0.0,
                    bound=bound_of_first(self.b1, self.b2),
                    root=not self.first == self.second == "float32",
                    stochastic=self.seed is not None,
                )
                old = param, first, second
                return jax.tree.map(lambda a, like: a.reshape(like.shape), updated, old)

            rates = self._rates(adam.count, scheduled.count, scale, norm, finite)
            param, first, second = partition.by_parts(
                of_part, place, (param, grad, first, second), rates, seed, step, adam.count
            )
            alone = jax.tree.structure(adam.mu, is_leaf=lambda x: isinstance(x, Blocks))
            moments = (jax.tree.unflatten(alone, [moment]) for moment in (first, second))
            return param, self._counted(state, norm, finite, *moments)

        return fused

    def _rates(
        self, count: Array, scheduled: Array, scale: Array, norm: Array, finite: Array
    ) -> Float32[Array, "5"]:
        """What the kernel multiplies by; the order is that of cuda_ffi/kernels/adamw.h."""
        t = optax.safe_increment(count)
        most = self.clip_norm
        clip = 1.0 if most is None else jnp.where(norm < most, 1, most / norm)
        rates = (
            scale * clip,
            self._schedule()(scheduled),
            1 / (1 - self.b1**t),
            1 / jnp.sqrt(1 - self.b2**t),
            finite,
        )
        return jnp.stack([jnp.asarray(rate, jnp.float32) for rate in rates])

    def _keys(
        self,
        number: int,
        shape: tuple[int, ...],
        begin: tuple[int | Array, ...],
        part: tuple[int, ...],
        seed: Array,
        step: Array,
        count: Array,
    ) -> UInt32[Array, "slices 3"]:
        """What the kernel makes the chain's random bits of, in a part of a leaf.

        Args:
            number: of the leaf.
            shape: of all of it.
            begin: index of the part's first element.
            part: the part's shape.
            seed: of the parameters' bits.
            step: likewise.
            count: of steps taken, for the moments' bits.
        """
        # A slice of the leading axis, where there are three, has keys of its own; rows are numbered
        # through it, and so the last axis but one goes on from where the axes before it are.
        missing = max(0, 3 - len(shape))
        shape, part = (1,) * missing + shape, (1,) * missing + part
        outer = part[:-2]
        first, *rest, row, column = (
            jnp.asarray(i).astype(jnp.uint32) for i in (*[0] * missing, *begin)
        )
        slices, *others = (
            i + lax.broadcasted_iota(jnp.uint32, outer, axis)
            for axis, i in enumerate((first, *rest))
        )
        rows = jnp.zeros(outer, jnp.uint32)
        for n, i in zip(shape[1:-1], (*others, row), strict=True):
            rows = rows * n + i
        own = stochastic_key(number, slices)
        param = stochastic_key(stochastic_key(seed, step, own), 0)
        moments = stochastic_key(self.seed or 0, count, own, 0)
        keys = param + rows, moments + rows, jnp.broadcast_to(column, outer)
        return jnp.stack(keys, -1).reshape(-1, 3)

    def _counted(
        self, state: Any, norm: Array, finite: Array, mu: Any, nu: Any
    ) -> optax.ApplyIfFiniteState:
        """The state after a step: the chain's own counts, and the moments that are given."""
        nothing = ()  # and not None, which would be no parameters rather than none of them

        def with_moments(state: Any, mu: Any, nu: Any) -> Any:
            clip, (adam, *others) = state.inner_state
            adam = adam._replace(mu=mu, nu=nu)
            return state._replace(inner_state=(clip, (adam, *others)))

        _, counted = self.transformation().update(
            nothing, with_moments(state, nothing, nothing), nothing, grad_norm=norm, finite=finite
        )
        return with_moments(counted, mu, nu)


def _divided_amid_blocks(place: NamedSharding | None, *moments: Any) -> str:
    """Why the mesh leaves no device the whole of each block; empty if it does."""
    for moment in moments:
        if isinstance(moment, Blocks):
            blocks = moment.exponents.shape[-1]
            parts = partition.parts_of_axis(place, -1, moment.exponents.ndim)
            if blocks % parts:
                return f"the mesh divides the last axis, of {blocks} blocks of moments, by {parts}"
    return ""


def _of_rows(x: Any) -> Any:
    """An array, or ``Blocks``, of at least one axis."""
    return jax.tree.map(jnp.atleast_1d, x)
