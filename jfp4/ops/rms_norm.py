"""RMSNorm, and with it the residual stream that it reads: one pass forward and one back."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfp4.ops import ffi
from jfp4.ops.partition import WHOLE, Part, Place, Rule, varying_alike
from jfp4.ops.quantize import check_float, kernel_input
from jfp4.ops.rounding import round_to_dtype


def rms_norm(
    x: Float[Array, "*b d"], scale: Float[Array, " d"], *, epsilon: float
) -> Float[Array, "*b d"]:
    """``x * (scale / sqrt(mean(x^2) + epsilon))``, the mean over the last axis (arXiv 1910.07467).

    In float32, rounded once to ``x``'s dtype; so are the gradients, each to its operand's. Back
    ends differ by float32's roundings: of sums in another order, and of the root.

    Args:
        x: of any floating-point dtype.
        scale: likewise.
        epsilon: added to the mean.

    Raises:
        TypeError: ``x`` or ``scale`` is not an array of floats.
        ValueError: ``scale`` does not have a number for each element of ``x``'s last axis.
    """
    _check(x, scale)
    return _alone(epsilon, *varying_alike((x, scale)))


def rms_norm_of_stream(
    terms: Sequence[Float[Array, "*b d"]], scale: Float[Array, " d"], *, epsilon: float
) -> tuple[Float[Array, "*b d"], Float[Array, "*b d"]]:
    """A residual stream, the sum of its terms, and its ``rms_norm``.

    The stream goes on beside what the norm feeds. So its gradient comes back from both, and the two
    are added in the pass that makes the one of them.

    Args:
        terms: one array, or two of the same shape and dtype.
        scale: as in ``rms_norm``.
        epsilon: added to the mean.

    Returns:
        The sum, rounded to the terms' dtype, and the norm of what it is rounded to.

    Raises:
        TypeError: as ``rms_norm``.
        ValueError: as ``rms_norm``; or terms that are not one or two, or differ in shape or dtype.
    """
    for x in terms:
        check_float(x)
    kinds = [f"{x.dtype}{list(x.shape)}" for x in terms]
    if len(terms) not in (1, 2) or len(set(kinds)) > 1:
        raise ValueError(f"terms are {', '.join(kinds) or 'none'}; expected one, or two alike")
    _check(terms[0], scale)
    return _of_stream(epsilon, *varying_alike((tuple(terms), scale)))


def _check(x: Array, scale: Array) -> None:
    check_float(x)
    check_float(scale, "scale")
    if x.ndim == 0 or scale.shape != x.shape[-1:]:
        raise ValueError(
            f"scale has shape {scale.shape} and x {x.shape}; expected a number for each element "
            "of x's last axis"
        )


# ------------------------------------------------------------------------------------ derivatives


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _alone(epsilon: float, x: Array, scale: Array) -> Array:
    return _forward(epsilon, x, None, scale)[1]


def _alone_forward(epsilon: float, x: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return _alone(epsilon, x, scale), (x, scale)


def _alone_backward(epsilon: float, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, scale = saved
    dx, dscale = _backward(epsilon, x, scale, dy, None)
    return Place.of(x, scale).put(dx), Place.of(scale, x).put(dscale)


_alone.defvjp(_alone_forward, _alone_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_stream(epsilon: float, terms: tuple[Array, ...], scale: Array) -> tuple[Array, Array]:
    return _forward(epsilon, terms[0], terms[1] if len(terms) > 1 else None, scale)


def _of_stream_forward(
    epsilon: float, terms: tuple[Array, ...], scale: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array, tuple[Place, ...]]]:
    stream, y = _of_stream(epsilon, terms, scale)
    places = tuple(Place.of(x, scale) for x in terms)
    return (stream, y), (stream, scale, places)


def _of_stream_backward(
    epsilon: float,
    saved: tuple[Array, Array, tuple[Place, ...]],
    gradients: tuple[Array, Array],
) -> tuple[tuple[Array, ...], Array]:
    stream, scale, places = saved
    dstream, dy = gradients
    dx, dscale = _backward(epsilon, stream, scale, dy, dstream)
    dterms = tuple(place.put(dx) for place in places)
    return dterms, Place.of(scale, stream).put(dscale)


_of_stream.defvjp(_of_stream_forward, _of_stream_backward)


# ----------------------------------------------------------------------------------------- passes


def _forward(epsilon: float, x: Array, added: Array | None, scale: Array) -> tuple[Array, Array]:
    """The sum, and its norm."""

    def kernel(part: Part, x: Array, added: Array | None, scale: Array) -> tuple[Array, Array]:
        total, y = ffi.rms_norm(_rows(x), scale, added=jax.tree.map(_rows, added), epsilon=epsilon)
        return x if total is None else total.reshape(x.shape), y.reshape(x.shape)

    def xla(part: Part, x: Array, added: Array | None, scale: Array) -> tuple[Array, Array]:
        wide = x.astype(jnp.float32)
        if added is not None:
            # A cast alone XLA may leave out, and go on with a sum that is not rounded yet.
            wide = wide + added.astype(jnp.float32)
            if x.dtype.itemsize < 4:
                wide = round_to_dtype(wide, x.dtype).astype(jnp.float32)
        y = wide * (lax.rsqrt(_mean_square(wide, epsilon)) * scale)
        return x if added is None else wide.astype(x.dtype), y.astype(x.dtype)

    names = _names(x)
    rule = Rule((names, names, "1"), (names, names))
    return _by(kernel, x)(xla, x, added, scale.astype(jnp.float32), rule=rule)


def _backward(
    epsilon: float, x: Array, scale: Array, dy: Array, dstream: Array | None
) -> tuple[Array, Array]:
    """The gradients by what is normalised, that of its other uses added, and by the scale."""
    names = _names(x)
    of_rows = names.split()[:-1]

    def kernel(
        part: Part, x: Array, scale: Array, dy: Array, dstream: Array | None
    ) -> tuple[Array, Array]:
        dx, dscale = ffi.rms_norm_gradient(
            _rows(x), scale, _rows(dy), dsum=jax.tree.map(_rows, dstream), epsilon=epsilon
        )
        return dx.reshape(x.shape), part.sum(dscale, *of_rows)

    def xla(
        part: Part, x: Array, scale: Array, dy: Array, dstream: Array | None
    ) -> tuple[Array, Array]:
        wide, wide_dy = x.astype(jnp.float32), dy.astype(jnp.float32)
        square = _mean_square(wide, epsilon)
        inverse, h = lax.rsqrt(square), wide_dy * scale
        along = jnp.mean(h * wide, axis=-1, keepdims=True) / square
        dx = inverse * (h - wide * along)
        if dstream is not None:
            dx = dx + dstream.astype(jnp.float32)
        dscale = jnp.sum(wide_dy * (wide * inverse), axis=tuple(range(x.ndim - 1)))
        return dx.astype(x.dtype), part.sum(dscale, *of_rows)

    rule = Rule((names, "1", names, names), (names, "1"))
    dx, dscale = _by(kernel, x)(xla, x, scale.astype(jnp.float32), dy, dstream, rule=rule)
    return dx, dscale.astype(scale.dtype)


def _by(kernel: Callable[..., tuple[Array, Array]], x: Array) -> Callable[..., tuple[Array, Array]]:
    """What computes by the path that serves ``x``; see ``ffi.dispatch``."""
    fits = x.size > 0 and x.shape[-1] <= ffi.NORM_COLUMNS and kernel_input(x).dtype == x.dtype
    if fits and ffi.kernel_platforms():
        return functools.partial(ffi.dispatch, kernel)
    # Its own sums XLA divides as well as any rule would.
    return lambda xla, *operands, rule: xla(WHOLE, *operands)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _mean_square(x: Array, epsilon: float) -> Array:
    return jnp.mean(x * x, axis=-1, keepdims=True) + epsilon


def _names(x: Array) -> str:
    """The factors of ``x``'s axes; its rows are never divided."""
    return " ".join([*(f"x{i}" for i in range(x.ndim - 1)), "1"])
