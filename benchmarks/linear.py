"""A linear layer, forward and backward: recipes on this library's kernels, on XLA, and BF16.

``python -m benchmarks.linear`` compares each recipe's results with XLA's, times all by turns in one
process, and writes results/linear-DEVICE.json. "Products" are the recipe's one or three FP8
products alone, on codes that are there already. They draw more power than among quantisers, and run
at a lower clock for it: what they take within a layer is its breakdown's.
"""

import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

import jfp4
from benchmarks.gemm import result_of
from benchmarks.timing import (
    Contender,
    Log,
    Side,
    contest,
    geomean,
    main,
    markdown,
    rotating,
    sets_of,
)
from jfp4.ops.ffi import Backend
from jfp4.ops.linear import quantize_activation
from jfp4.ops.prepare import quantize_weight_both
from jfp4.qtensor import QTensor

ROWS = (16384, 8192, 2048)
WEIGHTS = {
    "13B": ((5120, 5120), (5120, 13824), (13824, 5120)),
    "7B": ((4096, 4096), (4096, 11008), (11008, 4096)),
}
RECIPES = ("fp4", "fp4_cast", "fp8")
ROUNDING = 2.0**-5
"""Bound on the error's norm over the result's: sums of E5M2 products on Hopper's tensor cores."""

Operands = tuple[Array, Array, Array]
"""x [m, k], w [k, n], dy [m, n]."""


def run(log: Log, quick: bool) -> dict[str, Any]:
    """Layers of both models; all recipes where there are most rows."""
    # As many rounds as a line has sides: there each comes after each other one once.
    options = {"calls": 3, "rounds": 3} if quick else {"calls": 4, "rounds": 8}
    lines = []
    for model, weights in WEIGHTS.items():
        for m in ROWS[: 1 if model == "7B" else None]:
            everything = model == "13B" and m == ROWS[0]
            for k, n in weights:
                for forward in (True, False):
                    lines.append(
                        line(
                            log,
                            (m, k, n),
                            RECIPES if everything and not quick else RECIPES[:1],
                            xla=m == ROWS[0],
                            forward=forward,
                            options=options,
                        )
                        | {"model": model}
                    )
                if quick:
                    return {"layers": lines, "speed-ups": speed_ups(lines)}
    (m, (k, n)) = ROWS[0], WEIGHTS["13B"][1]
    float32 = [
        line(log, (m, k, n), RECIPES[:1], True, forward, options, jnp.float32)
        for forward in (True, False)
    ]
    return {"layers": lines, "float32 weights": float32, "speed-ups": speed_ups(lines)}


def line(
    log: Log,
    shape: tuple[int, int, int],
    recipes: tuple[str, ...],
    xla: bool,
    forward: bool,
    options: dict[str, int],
    w_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> dict[str, Any]:
    """One layer, forward alone or with its backward."""
    m, k, n = shape
    keys = jax.random.split(jax.random.key(m + 3 * k + 5 * n), sets_of(2 * (m * k + k * n)))
    sets = [_operands(key, m, k, n, jnp.dtype(w_dtype).name) for key in keys]
    step = _forward if forward else _forward_backward
    contenders = {"bf16": Contender(lambda: layer_side(step, sets, "bf16", "xla"))}
    for recipe in recipes:
        build = functools.partial(layer_side, step, sets, recipe)
        contenders[recipe] = Contender(functools.partial(build, "cuda"), near(recipe, sets, step))
        if xla:
            name = f"{recipe}, XLA"
            contenders[name] = Contender(functools.partial(build, "xla"))
    contenders["products"] = Contender(lambda: products_side(sets, forward))
    label = f"{m} x {k} x {n} {'forward' if forward else 'forward and backward'}"
    times = contest(log, label, contenders, **options)
    ms = {name: result["ms"] for name, result in times.items()}
    log.say(f"{label}: " + ", ".join(f"{name} {t:.3f} ms" for name, t in ms.items()))
    result = {"m, k, n": [m, k, n], "forward": forward, "ms": ms, "times": times}
    if "bf16" in ms:
        result["speed-up"] = {name: ms["bf16"] / t for name, t in ms.items()}
    if "fp4" in ms:
        result["fp4 by kind"] = by_kind(times["fp4"].get("kernels", {}), ms["fp4"])
        if "products" in ms:
            result["share of the limit"] = ms["products"] / ms["fp4"]
    return result


# -------------------------------------------------------------------------------- contenders


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _operands(key: Array, m: int, k: int, n: int, w_dtype: str) -> Operands:
    x, w, dy = jax.random.split(key, 3)
    return (
        jax.random.normal(x, (m, k), jnp.bfloat16),
        jax.random.normal(w, (k, n), jnp.dtype(w_dtype)),
        jax.random.normal(dy, (m, n), jnp.bfloat16),
    )


def _forward(x: Array, w: Array, dy: Array, recipe: str) -> Any:
    return jfp4.linear(x, w, recipe)


def _forward_backward(x: Array, w: Array, dy: Array, recipe: str) -> Any:
    y, vjp = jax.vjp(lambda x, w: jfp4.linear(x, w, recipe), x, w)
    return y, *vjp(dy)  # with y, or the compiler would leave the forward product out


def layer_side(
    step: Callable[..., Any], sets: Sequence[Operands], recipe: str, backend: Backend
) -> Side:
    """A layer compiled for a back end."""
    with jfp4.backend(backend):
        compiled = jax.jit(step, static_argnames="recipe").lower(*sets[0], recipe=recipe).compile()
    return rotating(compiled, sets)


def products_side(sets: Sequence[Operands], forward: bool) -> Side:
    """The fp4 recipe's products on operands quantised beforehand, in the layouts that they want."""
    quantized = [_quantized(*args)[: 2 if forward else None] for args in sets]

    @jax.jit
    def products(*operands: QTensor) -> list[Array]:
        pairs = zip(operands[::2], operands[1::2], strict=True)
        return [jfp4.gemm(a, b.T, out_dtype=jnp.bfloat16) for a, b in pairs]

    with jfp4.backend("cuda"):
        return rotating(products.lower(*quantized[0]).compile(), quantized)


@jax.jit
def _quantized(x: Array, w: Array, dy: Array) -> tuple[Any, ...]:
    """Operands of fprop, dgrad and wgrad, both of each contiguous along the contraction."""
    recipe = jfp4.RECIPES["fp4"]
    xq, _ = quantize_activation(x, recipe, jfp4.calibrate(x, recipe))
    wq = quantize_weight_both(w, recipe)
    by_row, by_column = (jfp4.quantize(dy, axis, format="e5m2") for axis in (1, 0))
    return xq, wq.fprop.T, by_row, wq.dgrad.unscaled(), xq.T.unscaled(), by_column.T


def near(recipe: str, sets: Sequence[Operands], step: Callable[..., Any]) -> Callable[..., float]:
    """A check of every result's distance from XLA's, the largest of which it returns."""

    def check(side: Side, built: Mapping[str, Side]) -> float:
        other = built.get(f"{recipe}, XLA") or layer_side(step, sets, recipe, "xla")
        distances = _distances(result_of(side), result_of(other))
        error = max(map(float, distances))
        if not error <= ROUNDING:
            raise AssertionError(f"relative errors {[float(d) for d in distances]}")
        return error

    return check


@jax.jit
def _distances(a: Any, b: Any) -> list[Array]:
    def distance(a: Array, b: Array) -> Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return [distance(*pair) for pair in pairs]


# ----------------------------------------------------------------------------------- numbers

KINDS = {
    "products": re.compile(r"gemm|wgmma|nvjet|cutlass|cublas|xmma", re.IGNORECASE),
    "thresholds": re.compile(r"jfp4.*(threshold|histogram|select)", re.IGNORECASE),
    "quantise": re.compile(r"jfp4", re.IGNORECASE),
    "copies": re.compile(r"mem(cpy|set)", re.IGNORECASE),
}


def by_kind(kernels: Mapping[str, float], total: float) -> dict[str, float]:
    """Milliseconds by what a kernel is for, told by its name.

    What XLA generated is "XLA"; "gaps" is what no kernel accounts for.
    """
    kinds = dict.fromkeys([*KINDS, "XLA"], 0.0)
    for name, ms in kernels.items():
        kind = next((kind for kind, pattern in KINDS.items() if pattern.search(name)), "XLA")
        kinds[kind] += ms
    return kinds | {"gaps": max(0.0, total - sum(kinds.values()))}


def speed_ups(lines: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Geometric means over a model's layers at the most rows: speed-ups, share of the products'."""
    means = {}
    for model in WEIGHTS:
        for forward in (True, False):
            chosen = [
                x
                for x in lines
                if (x["model"], x["forward"], x["m, k, n"][0]) == (model, forward, ROWS[0])
                and "speed-up" in x
            ]
            names = [name for name in (chosen[0]["ms"] if chosen else ()) if name != "bf16"]
            label = f"{model}, {'forward' if forward else 'forward and backward'}"
            means[label] = {
                name: geomean(x["speed-up"][name] for x in chosen)
                for name in names
                if all(name in x["ms"] for x in chosen)
            }
    return means


def table(results: dict[str, Any]) -> str:
    """Milliseconds by layer, and the mean speed-ups."""
    lines = results["layers"] + results.get("float32 weights", [])
    names = list(dict.fromkeys(name for x in lines for name in x["ms"]))
    rows = [
        [
            " x ".join(map(str, x["m, k, n"])),
            "forward" if x["forward"] else "both",
            *(f"{x['ms'][name]:.3f}" if name in x["ms"] else "" for name in names),
            f"{x.get('share of the limit', float('nan')):.0%}",
        ]
        for x in lines
    ]
    parts = [markdown(["m x k x n", "ms", *names, "limit"], rows)]
    for label, means in results["speed-ups"].items():
        parts.append(f"{label}: " + "; ".join(f"{n} {v:.2f}x" for n, v in means.items()))
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main("linear", run, table))
