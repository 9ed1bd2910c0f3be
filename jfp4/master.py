"""Master weights in two bytes: how they are stored, read, and changed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, UInt32

from jfp4.ops.quantize import check_float
from jfp4.ops.rounding import random_bits, round_to_dtype, stochastic_key
from jfp4.ops.slices import is_slices, update_by_slices
from jfp4.optim import norm_and_finite, numbered

FORMATS = ("float32", "float16", "bfloat16")
"""What master weights may be stored in."""

SHIFT = 10
"""A float16 master is ``float16(value * 2**SHIFT)``.

float16 has 40 binades, and weights need those around and under one: with 2**10 the largest is
65504 / 1024, just under 64, far above any weight of a matrix, and the smallest 2**-34. Steps stop
shrinking only for weights under 2**-24, 6e-8, far under a single update of 3e-5. A power of two
costs no rounding, and one fixed for all needs neither statistics nor state, nor can it change
under a weight that is not being updated.
"""


def encode(params: Any, format: str, mask: Any = None) -> Any:
    """Parameters as they are stored, rounded to nearest.

    Args:
        params: a tree of arrays of floats; what is not narrowed is float32 afterwards, since of
            what is stored float16 means ``encode``'s.
        format: "float32" (as they are), "float16" (times 2**SHIFT) or "bfloat16".
        mask: a tree of booleans, or a function from ``params`` to one: which are stored so, the
            others staying float32; None is all of them. Norm scales and other vectors are few, and
            their values near one: leave them out.

    Returns:
        The tree in storage dtypes. In float16 a magnitude of 64 or more becomes an infinity, never
        a plausible number.

    Raises:
        TypeError: a leaf is not an array of floats.
        ValueError: unknown format.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; expected one of {', '.join(FORMATS)}")
    if callable(mask):
        mask = mask(params)
    if mask is None:
        mask = jax.tree.map(lambda _: True, params)
    dtype = jnp.dtype(format)

    def stored(path: tuple[Any, ...], value: Array, narrow: bool) -> Array:
        check_float(value, f"params{jax.tree_util.keystr(path)}")
        value = value.astype(jnp.float32)
        return _store(value, dtype, None) if narrow and dtype != jnp.float32 else value

    return jax.tree_util.tree_map_with_path(stored, params, mask)


@jax.custom_vjp
def decode(stored: Float[Array, "..."]) -> Float32[Array, "..."]:
    """The value of one stored leaf, or of a slice of it, in float32; exact.

    What is float16 was made by ``encode``. To be called where a weight is used, such as inside the
    scan over layers: the float32 values then exist a layer at a time.

    The gradient is that of the VALUE, rounded to nearest in the storage dtype: two bytes a weight,
    and in float16 not 2**SHIFT smaller, as the chain rule would have it. It wants a loss scale, as
    every float16 gradient does.
    """
    value = stored.astype(jnp.float32)
    return value * np.float32(2.0**-SHIFT) if stored.dtype == jnp.float16 else value


def _decode_fwd(stored: Array) -> tuple[Array, Array]:
    return decode(stored), jnp.zeros((), stored.dtype)


def _decode_bwd(like: Array, gradient: Array) -> tuple[Array]:
    return (gradient.astype(like.dtype),)


decode.defvjp(_decode_fwd, _decode_bwd)


def apply_updates(stored: Any, updates: Any, key: UInt32[Array, ""]) -> Any:
    """``optax.apply_updates`` for stored parameters: decode, add in float32, round, store.

    Narrow leaves are rounded stochastically. To nearest, an update under half a step of its weight
    is lost however often it comes: in float16 that is up to 2**-11 of the weight, over ten times a
    weight decay of 3e-4 * 0.1, and in bfloat16 2**-8, more than most updates. What is rounded
    stochastically moves by the update on average. A zero update changes no bit.

    Args:
        stored: what ``encode`` made.
        updates: float32, of the same shapes, in units of the values.
        key: bits are a function of (key, leaf, element); see ``stochastic_key``.
    """

    def apply(number: int, leaf: Array, update: Array) -> Array:
        value = decode(leaf) + update
        if leaf.dtype == jnp.float32:
            return value
        width = 16 if leaf.dtype == jnp.bfloat16 else 32
        bits = random_bits(stochastic_key(key, number), leaf.shape, width)
        return _store(value, leaf.dtype, bits)

    return jax.tree.map(apply, numbered(stored), stored, updates)


def apply_gradients(
    optimizer: optax.GradientTransformation,
    stored: Any,
    state: Any,
    grads: Any,
    *,
    scale: float | Array = 1.0,
    seed: int | Array = 0,
    step: int | Array,
    fused: Callable[..., Any] | None = None,
) -> tuple[Any, Any, Float32[Array, ""]]:
    """An optimizer's step on stored parameters, in the float32 memory of one layer.

    The gradient is made float32 and scaled, ``optimizer`` makes updates of it, and the updates are
    added; to stacked leaves, those of three axes or more, by slices of their leading axis, one
    after the other and in place. Left to XLA, a whole leaf's float32 values would not stay out of
    memory: what rounding reads more than once is written out, on CPUs and on GPUs, at four bytes a
    parameter each.

    Args:
        optimizer: any chain of transformations whose result for an element depends on nothing
            outside its row (the last axis), but for what they are given as extra arguments: the
            ``grad_norm`` of the whole gradient, and whether it is ``finite``, as
            ``jfp4.optim.clip_by_norm`` and ``skip_not_finite`` take them. ``part`` is a number that
            tells slices apart.
        stored: what ``encode`` made.
        state: the optimizer's, by its ``init`` on the parameters.
        grads: gradients of the values, of ``stored``'s shapes, in any float dtypes; those of stacks
            may be ``jfp4.ops.slices.Slices``.
        scale: what they are multiplied by, such as the reciprocal of the loss scale.
        seed: the bits that parameters are rounded by are a function of (seed, step, element).
        step: likewise.
        fused: another way to take the step of a leaf, ``fused(number, (leaf, state), grad, norm,
            finite)``, which returns the new leaf and state, or None where it cannot.

    Returns:
        The stored parameters, the state, and the global norm of the scaled gradient.

    Raises:
        ValueError: ``grads`` is another tree than ``stored``, or a gradient is not of its
            parameter's shape.
    """
    _check_same_tree(grads, stored)
    optimizer = optax.with_extra_args_support(optimizer)
    norm, finite = norm_and_finite(grads)
    norm = norm * scale
    leaves = jax.tree.leaves(stored)
    structure = jax.tree.structure(stored)

    def alone(number: int, leaf: Any) -> Any:
        """The tree with one leaf in it, so that masks by path find what they know."""
        return jax.tree.unflatten(
            structure, [leaf if i == number else None for i in range(len(leaves))]
        )

    def init_shapes(number: int, shape: tuple[int, ...]) -> Any:
        value = jax.ShapeDtypeStruct(shape, jnp.float32)
        return jax.eval_shape(optimizer.init, alone(number, value))

    def take_step(number: int, i: int | Array, held: Any, grad: Array) -> Any:
        leaf, state = held
        part = stochastic_key(number, i)
        updates, state = optimizer.update(
            alone(number, grad.astype(jnp.float32) * scale),
            state,
            alone(number, decode(leaf)),
            grad_norm=norm,
            finite=finite,
            part=part,
        )
        new = apply_updates(alone(number, leaf), updates, stochastic_key(seed, step, part))
        return jax.tree.leaves(new)[0], state

    new_state = state
    all_grads = jax.tree.leaves(grads, is_leaf=is_slices)
    for number, (leaf, grad) in enumerate(zip(leaves, all_grads, strict=True)):
        if grad.shape != leaf.shape:
            raise ValueError(
                f"grads has {grad.shape} in place {number}; expected {leaf.shape}, as stored"
            )
        # What of the state is this leaf's: what its init makes of this leaf alone.
        shapes = init_shapes(number, leaf.shape)
        held = (leaf, _where_not_none(shapes, state, None))
        taken = None if fused is None else fused(number, held, grad, norm, finite)
        grad = grad.stack() if taken is None and is_slices(grad) else grad
        if taken is not None:
            held = taken
        elif leaf.ndim < 3:
            held = take_step(number, 0, held, grad)
        else:
            slices = init_shapes(number, leaf.shape[1:])
            stacked = (True, jax.tree.map(lambda a, b: a.shape != b.shape, shapes, slices))
            held = update_by_slices(functools.partial(take_step, number), held, stacked, grad)
        leaves[number], own = held
        new_state = _where_not_none(shapes, own, new_state)
    return jax.tree.unflatten(structure, leaves), new_state, norm


def _check_same_tree(grads: Any, stored: Any) -> None:
    structure: Any = jax.tree.structure(stored)
    if jax.tree.structure(grads, is_leaf=is_slices) == structure:
        return
    found, expected = (
        {
            jax.tree_util.keystr(path)
            for path, _ in jax.tree.leaves_with_path(tree, is_leaf=is_slices)
        }
        for tree in (grads, stored)
    )
    apart = [f"without {path}" for path in sorted(expected - found)]
    apart += [f"with {path}" for path in sorted(found - expected)]
    raise ValueError(
        f"grads is another tree than stored: {', '.join(apart[:4]) or 'in other containers'}; "
        "expected a gradient in each parameter's place"
    )


def _where_not_none(shapes: Any, tree: Any, otherwise: Any) -> Any:
    """``tree`` where ``shapes`` has leaves, and ``otherwise`` (None, or a tree) where it has none.

    Both trees may have whole branches where ``shapes`` has None.
    """
    if otherwise is None:
        otherwise = jax.tree.map(lambda _: None, shapes, is_leaf=lambda x: x is None)
    return jax.tree.map(
        lambda s, a, b: b if s is None else a,
        shapes,
        tree,
        otherwise,
        is_leaf=lambda x: x is None,
    )


def _store(value: Array, dtype: Any, bits: Array | None) -> Array:
    factor = 2.0**SHIFT if dtype == jnp.float16 else 1.0
    return round_to_dtype(value * np.float32(factor), dtype, bits)
