"""Quantisation beside the speed of a copy: bytes read once and written once, over device time.

``python -m benchmarks.quantize`` holds every output to the XLA path's, bit for bit, times both and
a copy of as many bytes by turns in one process, and writes results/quantize-DEVICE.json.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

import jfp4
from benchmarks.gemm import WEIGHTS, hold_torch, result_of
from benchmarks.timing import (
    Contender,
    Log,
    Side,
    contest,
    main,
    markdown,
    measure,
    rotating,
    sets_of,
)
from jfp4.ops import ffi
from jfp4.ops.ffi import Backend, Layout
from jfp4.ops.outliers import quantize_compensated, thresholds

ROWS = (2048, 8192, 16384)
WIDTHS = (4096, 5120, 11008, 13824)
LARGE = 2 << 30
"""Bytes of the copy whose speed stands for the device's."""

LO, HI = np.float32(-2.326), np.float32(2.326)
"""The quantiles of a standard normal distribution at 0.01 and 0.99."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to quantise a tensor.

    Attributes:
        kernels: what this library's kernels compute.
        xla: the same outputs as XLA compiles them.
        dtype: of the tensor.
        factors: whether the functions also take a factor a row and one a column.
    """

    kernels: Callable[..., Any]
    xla: Callable[..., Any]
    dtype: str = "bfloat16"
    factors: bool = False


def _rows(x: Array, *, both: bool = False, clamp: bool = False, packed: bool = False) -> Any:
    want: tuple[Layout, ...] = ("packed",) if packed else ("codes",)
    want += ("codes_t",) if both else ()
    outliers = (jnp.asarray(LO), jnp.asarray(HI)) if clamp else None
    q = ffi.quantize_rows(x, format="e2m1", want=want, outliers=outliers)
    return [part for part in q if part is not None]


def _rows_xla(x: Array, *, both: bool = False, clamp: bool = False, packed: bool = False) -> Any:
    if clamp:
        q = quantize_compensated(x, jnp.asarray(LO), jnp.asarray(HI), 1)
    else:
        q = jfp4.quantize(x, 1)
    if packed:
        return jfp4.pack(q.codes), q.scale
    return (q.codes, q.codes.T, q.scale) if both else (q.codes, q.scale)


def _columns(w: Array) -> Any:
    q = ffi.quantize_columns(w, format="e2m1", want=("codes", "codes_t"))
    return q.codes, q.codes_t, q.scale


def _columns_xla(w: Array) -> Any:
    q = jfp4.quantize(w, 0)
    return q.codes, q.codes.T, q.scale


def _gradient(dy: Array, row_factor: Array, col_factor: Array) -> Any:
    amax = ffi.gradient_amax(dy, col_factor, row_factor)
    return ffi.quantize_gradient(dy, col_factor, row_factor, *amax, format="e5m2")


def _gradient_xla(dy: Array, row_factor: Array, col_factor: Array) -> Any:
    dy = dy.astype(jnp.float32)
    by_row = jfp4.quantize(dy * col_factor, 1, format="e5m2")
    by_column = jfp4.quantize(dy * row_factor, 0, format="e5m2")
    return by_row.codes, by_row.scale, by_column.codes.T, by_column.scale


def _case(**options: Any) -> Case:
    return Case(functools.partial(_rows, **options), functools.partial(_rows_xla, **options))


ACTIVATIONS = {
    "token": _case(),
    "token, both layouts": _case(both=True),
    "token, clamped": _case(clamp=True),
    "token, clamped, both layouts": _case(clamp=True, both=True),
    "token, packed": _case(packed=True),
    "gradient, for both products": Case(_gradient, _gradient_xla, factors=True),
}
THRESHOLDS = Case(thresholds, thresholds)
CHANNELS = {
    "channel, both layouts": Case(_columns, _columns_xla),
    "channel, both layouts, float32": Case(_columns, _columns_xla, dtype="float32"),
}


def run(log: Log, quick: bool) -> dict[str, Any]:
    """Every case at every size."""
    sizes = [(m, k) for m in ROWS for k in WIDTHS]
    weights = list(WEIGHTS)
    options: dict[str, Any] = {"calls": 6, "rounds": 5}
    if quick:
        sizes, weights, options = (
            [(2048, 5120), (16384, 5120)],
            weights[:1],
            {"calls": 4, "rounds": 3},
        )
    copies = {"copy": copy_side(LARGE), "clone": copy_side(LARGE, clone=True)}
    large = measure(copies, **options)
    speed = max(2e-9 * LARGE / t["ms"] for t in large.values())
    log.say(f"copy: {speed:.2f} TB/s")
    asked = [(name, case, s) for name, case in ACTIVATIONS.items() for s in sizes]
    asked += [(name, case, s) for name, case in CHANNELS.items() for s in weights]
    asked += [("thresholds", THRESHOLDS, s) for s in sizes]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiling = [compiled(pool, case, size) for _, case, size in asked]
    log.say(f"{2 * len(asked)} functions compiled")
    lines = [
        measured(log, options, speed, *line, *functions)
        for line, functions in zip(asked, compiling, strict=True)
    ]
    of_samples = len(sizes)
    return {
        "copy TB/s": speed,
        "copies": large,
        "quantise": lines[:-of_samples],
        "thresholds": lines[-of_samples:],
    }


Compiled = concurrent.futures.Future[jax.stages.Compiled]


def compiled(
    pool: concurrent.futures.Executor, case: Case, size: tuple[int, int]
) -> tuple[Compiled, Compiled]:
    """The case by kernels and by XLA, being compiled."""
    operands = functools.partial(_operands, size=size, dtype=case.dtype, factors=case.factors)
    shapes = jax.eval_shape(operands, jax.random.key(0))

    def by(backend: Backend, f: Callable[..., Any]) -> jax.stages.Compiled:
        with jfp4.backend(backend):
            return jax.jit(f).lower(*shapes).compile()

    return pool.submit(by, "cuda", case.kernels), pool.submit(by, "xla", case.xla)


def measured(
    log: Log,
    options: dict[str, int],
    speed: float,
    name: str,
    case: Case,
    size: tuple[int, int],
    by_kernels: Compiled,
    by_xla: Compiled,
) -> dict[str, Any]:
    """One case at one size."""
    nbytes = size[0] * size[1] * jnp.dtype(case.dtype).itemsize
    keys = jax.random.split(jax.random.key(sum(size)), sets_of(nbytes))
    sets = [_operands(key, size, case.dtype, case.factors) for key in keys]
    shapes = by_xla.result().out_info
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((sets[0], shapes)))
    contenders = {
        "kernels": Contender(lambda: rotating(by_kernels.result(), sets), same_as_xla),
        "XLA": Contender(lambda: rotating(by_xla.result(), sets)),
    }
    if case is not THRESHOLDS:
        contenders["copy"] = Contender(lambda: copy_side(moved // 2))
    label = f"{name} {size[0]} x {size[1]}"
    times = contest(log, label, contenders, **options, wall=moved > 1 << 28)
    us = {who: 1e3 * t["ms"] for who, t in times.items()}
    log.say(f"{label}: " + ", ".join(f"{who} {t:.1f} us" for who, t in us.items()))
    result = {"name": name, "size": list(size), "us": us, "times": times}
    if case is THRESHOLDS:
        return result  # of a sample: no bytes to speak of
    rates = {who: 1e-6 * moved / t for who, t in us.items()}
    shares = {who: rate / speed for who, rate in rates.items()}
    return result | {"bytes": moved, "TB/s": rates, "share of the copy": shares}


# -------------------------------------------------------------------------------- contenders


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _operands(key: Array, size: tuple[int, int], dtype: str, factors: bool) -> tuple[Array, ...]:
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], size, jnp.bfloat16).astype(dtype)
    if not factors:
        return (x,)
    row = jax.random.uniform(keys[1], (size[0], 1), jnp.float32, 0.1, 1)
    return x, row, jax.random.uniform(keys[2], (1, size[1]), jnp.float32, 0.1, 1)


@functools.cache
def _buffer() -> Any:
    torch: Any = importlib.import_module("torch")
    return torch.randint(0, 256, (2, LARGE), dtype=torch.uint8, device="cuda")


def copy_side(nbytes: int, clone: bool = False) -> Side:
    """A device to device copy of so many bytes, from another place at each call."""
    torch: Any = importlib.import_module("torch")
    source, target = _buffer()
    count = sets_of(nbytes)

    def call(i: int) -> Any:
        place = slice((i % count) * nbytes, (i % count + 1) * nbytes)
        return source[place].clone() if clone else target[place].copy_(source[place])

    return Side(call, lambda _: torch.cuda.synchronize(), hold_torch())


def same_as_xla(side: Side, built: Mapping[str, Side]) -> float:
    """A check that every output has the bits of the XLA path's."""
    wrong = [int(n) for n in _wrong(result_of(side), result_of(built["XLA"]))]
    if any(wrong):
        raise AssertionError(f"{wrong} elements of the outputs differ from the XLA path's")
    return 0.0


@jax.jit
def _wrong(got: Any, expected: Any) -> list[Array]:
    def bits(x: Array) -> Array:
        return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").reshape(-1)

    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return [jnp.sum(bits(a) != bits(b), dtype=jnp.int32) for a, b in pairs]


# ----------------------------------------------------------------------------------- numbers


def table(results: dict[str, Any]) -> str:
    """Speed by case, as a share of the copy's."""
    rows = [
        [
            line["name"],
            " x ".join(map(str, line["size"])),
            *(f"{line['us'].get(who, float('nan')):.1f}" for who in ("kernels", "XLA", "copy")),
            f"{line.get('TB/s', {}).get('kernels', float('nan')):.2f}",
            f"{line.get('share of the copy', {}).get('kernels', float('nan')):.0%}",
        ]
        for line in results["quantise"] + results["thresholds"]
    ]
    head = ["case", "size", "us", "XLA, us", "copy, us", "TB/s", "of the copy"]
    return f"copy: {results['copy TB/s']:.2f} TB/s\n" + markdown(head, rows)


if __name__ == "__main__":
    sys.exit(main("quantize", run, table))
