"""RMSNorm and its gradients in float64, and what float32's roundings may take from them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfp4.ops.rms_norm import rms_norm, rms_norm_of_stream

EPSILON = 1e-5
DTYPES = ("bfloat16", "float16", "float32")
UNIT = 2.0**-24  # float32's roundoff

# What an operation is given: terms of the stream, or one array where nothing goes on beside the
# norm; the scale; and the gradients of the stream and of the norm.
Operands = tuple[tuple[jax.Array, ...], jax.Array, jax.Array | None, jax.Array]


def case(shape: tuple[int, ...], dtype: str, terms: int, seed: int = 0) -> Operands:
    """Operands of this many terms; with none there is no stream."""
    rng = np.random.default_rng(seed)
    # Rows differ in magnitude, and one is of zeros alone.
    rows = 2.0 ** rng.integers(-3, 4, (*shape[:-1], 1))
    rows.reshape(-1)[1:2] = 0

    def array() -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * rows, dtype)

    given = tuple(array() for _ in range(max(terms, 1)))
    scale = jnp.asarray(rng.normal(size=shape[-1]) + 1, jnp.float32)
    dstream, dy = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    return given, scale, dstream if terms else None, dy


def forward_and_gradients(operands: Operands) -> dict[str, jax.Array]:
    """What the library computes."""
    terms, scale, dstream, dy = operands
    if dstream is None:
        y, vjp = jax.vjp(lambda x, s: rms_norm(x, s, epsilon=EPSILON), terms[0], scale)
        dx, dscale = vjp(dy)
        return {"y": y, "dx": dx, "dscale": dscale}
    (stream, y), vjp = jax.vjp(lambda t, s: rms_norm_of_stream(t, s, epsilon=EPSILON), terms, scale)
    dterms, dscale = vjp((dstream, dy))
    return {"stream": stream, "y": y, "dx": dterms[-1], "dscale": dscale}


def oracle(operands: Operands) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of float64, and a bound on each element's error before it is rounded."""
    terms, scale, dstream, dy = operands
    stream = terms[0] if len(terms) == 1 else terms[0] + terms[1]  # rounded as it is kept
    x, s, g = (np.asarray(a, np.float64) for a in (stream, scale, dy))
    d = x.shape[-1]
    rows = x.size // d
    square = np.mean(x * x, axis=-1, keepdims=True) + np.float64(np.float32(EPSILON))
    inverse, h = square**-0.5, g * s
    along = np.mean(h * x, axis=-1, keepdims=True) / square
    along_most = np.mean(np.abs(h * x), axis=-1, keepdims=True) / square
    dx = inverse * (h - x * along)
    most = inverse * (np.abs(h) + np.abs(x) * along_most)
    if dstream is not None:
        dx = dx + np.asarray(dstream, np.float64)
        most = most + np.abs(np.asarray(dstream, np.float64))
    axes = tuple(range(x.ndim - 1))
    values = {
        "y": x * s * inverse,
        "dx": dx,
        "dscale": np.sum(g * x * inverse, axis=axes),
    }
    # A sum of n terms is off by at most n - 1 units of their magnitudes' sum, and every other
    # operation by one: a handful, of which the root, to two units on GPUs, is one.
    few = 12
    bounds = {
        "y": (d + few) * UNIT * np.abs(values["y"]),
        "dx": (2 * d + few) * UNIT * most,
        "dscale": (rows + d + few) * UNIT * np.sum(np.abs(g * x * inverse), axis=axes),
    }
    if dstream is not None:
        values["stream"], bounds["stream"] = np.asarray(stream, np.float64), 0.0
    return values, bounds


def assert_close(found: dict[str, Any], values: dict[str, Any], bounds: dict[str, Any]) -> None:
    """Holds every result to its bound and one rounding to its dtype."""
    assert found.keys() == values.keys()
    for name, value in values.items():
        kind = jnp.finfo(found[name].dtype)
        rounding = 0.5 * float(kind.eps) * np.abs(value) + float(kind.smallest_subnormal)
        error = np.abs(np.asarray(found[name], np.float64) - value)
        allowed = bounds[name] + (rounding if name != "stream" else 0)
        assert np.all(error <= allowed), (name, float(np.max(error - allowed)))
