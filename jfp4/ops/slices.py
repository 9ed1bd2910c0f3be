"""Stacks of arrays, worked through one slice of their leading axis after the other."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slices:
    """A stack as its slices, for what is made one at a time: nothing is copied to be stacked.

    With more than four slices XLA's copy takes, on an H200, two and a half times as long as its
    bytes would, and both stand meanwhile.

    Attributes:
        each: the slices, arrays of one shape and dtype; one at least.
    """

    each: tuple[Array, ...]

    @classmethod
    def of(cls, stack: Array) -> "Slices":
        """The slices of an array's leading axis."""
        # Not by indices, whose gradients would each be filled up with zeros, and added.
        parts = lax.split(stack, [1] * stack.shape[0])
        return cls(tuple(lax.squeeze(part, [0]) for part in parts))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stack."""
        return len(self.each), *self.each[0].shape

    def stack(self) -> Array:
        """The stack as one array."""
        return jnp.stack(self.each)


def is_slices(x: Any) -> bool:
    """Whether ``x`` is ``Slices``: what is a leaf where trees have stacks as leaves."""
    return isinstance(x, Slices)


def scan_written_out(f: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: Any) -> Any:
    """``lax.scan(f, init, xs, unroll=True)``, where stacks in ``xs`` may be ``Slices``.

    Raises:
        ValueError: ``xs`` has no slices.
        TypeError: ``f`` changes the shapes or dtypes of what it carries.
    """
    leaves, tree = jax.tree.flatten(xs, is_leaf=is_slices)
    slices = [leaf if is_slices(leaf) else Slices.of(leaf) for leaf in leaves]
    if not slices or not slices[0].each:
        raise ValueError("xs has no slices; expected one at least")
    step, carry, made = jax.jit(f), init, []  # traced once for all
    for own in zip(*(s.each for s in slices), strict=True):
        old, (carry, out) = carry, step(carry, jax.tree.unflatten(tree, own))
        if _types(carry) != _types(old):
            raise TypeError(f"f makes {_types(carry)} of {_types(old)}; expected the same")
        made.append(out)
    return carry, jax.tree.map(lambda *own: jnp.stack(own), *made)


def _types(tree: Any) -> Any:
    return jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree)


def update_by_slices(step: Callable[..., Any], held: Any, stacked: Any, *inputs: Array) -> Any:
    """Replaces ``held`` by what ``step`` makes of it, in the working memory of one slice.

    The slice to be worked on is carried along, and the next one is read from what was just written.
    So data flow alone orders all reads and writes of a stack, and no compiler has a reason to copy
    one, as they do where several kernels read a buffer that one of them also writes.

    Args:
        step: ``step(i, held, *inputs)`` of slice i returns the new ``held`` of it.
        held: a tree of arrays.
        stacked: a tree of booleans: which of ``held`` are stacks of slices, all of one length. The
            others are given to every slice as they are; what the last one makes of them is kept.
        inputs: stacks that are read alone.

    Returns:
        The new ``held``; under ``jax.jit`` with donated arguments in its own memory.
    """
    arrays, tree = jax.tree.leaves(held), jax.tree.structure(held)
    is_stack = jax.tree.leaves(stacked)
    length = inputs[0].shape[0]

    def read(stacks: list[Array], i: Array | int) -> list[Array]:
        return [
            lax.dynamic_index_in_dim(x, i, keepdims=False) if stack else x
            for x, stack in zip(stacks, is_stack, strict=True)
        ]

    def body(i: Array, carry: tuple[list[Array], list[Array]]) -> tuple[list[Array], list[Array]]:
        stacks, parts = carry
        # What is not stacked, such as a count, is the same for every slice.
        old = [part if stack else x for x, part, stack in zip(arrays, parts, is_stack, strict=True)]
        read_alone = [lax.dynamic_index_in_dim(x, i, keepdims=False) for x in inputs]
        new = jax.tree.leaves(step(i, jax.tree.unflatten(tree, old), *read_alone))
        stacks = [
            lax.dynamic_update_index_in_dim(x, part, i, 0) if stack else part
            for x, part, stack in zip(stacks, new, is_stack, strict=True)
        ]
        return stacks, read(stacks, jnp.minimum(i + 1, length - 1))

    stacks, _ = lax.fori_loop(0, length, body, (arrays, read(arrays, 0)))
    return jax.tree.unflatten(tree, stacks)
