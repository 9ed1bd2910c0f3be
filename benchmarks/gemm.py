"""The product of codes beside BF16's and the FP8 products of XLA and PyTorch (cuBLASLt).

``python -m benchmarks.gemm`` checks each contender against exact sums, times them by turns in one
process, and writes results/gemm-DEVICE.json. All multiply the same codes, E2M1 of Gaussian
tensors; BF16 multiplies the tensors themselves (and, in "BF16, codes", the codes: how much power
operands draw depends on their bits, and so does the clock).
"""

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

import jfp4
from benchmarks.timing import (
    HELD,
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
from jfp4.ops import ffi
from jfp4.ops.ffi import Backend
from jfp4.qtensor import QTensor

ROWS = (2048, 8192, 16384)
FEW_ROWS = (1, 16, 64, 256)
PACKED_ROWS = 64
"""The most for which the packed product is meant."""
WEIGHTS = (
    (5120, 5120),
    (5120, 13824),
    (13824, 5120),
    (4096, 4096),
    (4096, 11008),
    (11008, 4096),
)
GRADIENTS = ((16384, 5120, 5120), (16384, 13824, 5120))
FP8 = ("torch, row-wise", "XLA FP8")
ONE_SCALE = "torch, one scale"
"""What is asked for less, and so compared apart: no scale a row, nor a column."""

BF16_ROUNDING, FP8_ROUNDING = 2.0**-8, 2.0**-5
"""Bounds on the error's norm over the result's: of a cast to bfloat16, and of sums that keep 13
fractional bits where products differ widely in magnitude, as those of E5M2 do."""

Operands = tuple[QTensor, QTensor, Array, Array]
"""Codes of x [m, k] and of w, transposed [n, k]; then x and w themselves, in bfloat16."""


def run(log: Log, quick: bool) -> dict[str, Any]:
    """Every product at every shape."""
    rows, weights = ((16384, 2048), WEIGHTS[:1]) if quick else (ROWS, WEIGHTS)
    few, gradients = ((1, 64), GRADIENTS[:1]) if quick else (FEW_ROWS, GRADIENTS)
    # As many rounds as products of codes have sides: there each comes after each other one once.
    options = {"calls": 4, "rounds": 3} if quick else {"calls": 6, "rounds": 8}
    lines = functools.partial(table_of, log, options)
    large = lines(codes_contenders, [(m, k, n) for k, n in weights for m in rows])
    packed = lines(packed_contenders, [(m, k, n) for k, n in weights for m in few])
    # For more rows jfp4's product of bytes is the one to use.
    fewest = [line for line in packed if line["m, k, n"][0] <= PACKED_ROWS]
    return {
        "codes": large,
        "gradients": lines(gradient_contenders, gradients),
        "packed": packed,
        "ratios": {
            "jfp4 over the best FP8": ratios(large, "jfp4", FP8),
            "jfp4 over one scale": ratios(large, "jfp4", (ONE_SCALE,)),
            "jfp4 over BF16": ratios(large, "jfp4", ("BF16",)),
            "jfp4, promoted over BF16": ratios(large, "jfp4, promoted", ("BF16",)),
            "packed over FP8": ratios(fewest, "jfp4, packed", FP8),
            "packed over one scale": ratios(fewest, "jfp4, packed", (ONE_SCALE,)),
            "packed over BF16": ratios(fewest, "jfp4, packed", ("BF16",)),
        },
    }


def table_of(
    log: Log,
    options: dict[str, int],
    contenders: Callable[..., dict[str, Contender]],
    shapes: Sequence[tuple[int, int, int]],
) -> list[dict[str, Any]]:
    """One kind of product, a line a shape."""
    lines = []
    for m, k, n in shapes:
        label = f"{m} x {k} x {n}"
        times = contest(log, label, contenders(m, k, n), **options)
        rates = {name: 2e-9 * m * k * n / result["ms"] for name, result in times.items()}
        log.say(f"{label}: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()))
        lines.append({"m, k, n": [m, k, n], "tflops": rates, "times": times})
    return lines


# -------------------------------------------------------------------------------- contenders


def codes_contenders(m: int, k: int, n: int) -> dict[str, Contender]:
    """Byte codes, E2M1 on both sides."""
    sets = operands(m, k, n, "e2m1", sets_of((m + n) * k))
    scaled, plain = (exact(sets[0], scaled=scaled) for scaled in (True, False))
    return {
        "jfp4": Contender(lambda: jfp4_side(sets), equal(scaled)),
        "jfp4, promoted": Contender(lambda: jfp4_side(sets, promote=True), equal(scaled)),
        "XLA FP8": Contender(lambda: xla_side(sets), close(plain)),
        "XLA FP8, scales": Contender(lambda: jfp4_side(sets, "xla"), close(scaled)),
        "torch, row-wise": Contender(lambda: torch_side(sets, row_wise=True), close(scaled)),
        ONE_SCALE: Contender(lambda: torch_side(sets, row_wise=False), close(plain)),
        "BF16": Contender(lambda: bf16_side(sets)),
        "BF16, codes": Contender(lambda: bf16_side(sets, codes=True), close(plain)),
    }


def gradient_contenders(m: int, k: int, n: int) -> dict[str, Contender]:
    """E5M2 codes against E2M1 ones, as in dgrad."""
    sets = operands(m, k, n, "e5m2", sets_of((m + n) * k))
    scaled, plain = (exact(sets[0], scaled=scaled) for scaled in (True, False))
    row_wise = close(scaled, FP8_ROUNDING)
    return {
        "jfp4": Contender(lambda: jfp4_side(sets), row_wise),
        "jfp4, promoted": Contender(lambda: jfp4_side(sets, promote=True), row_wise),
        "XLA FP8": Contender(lambda: xla_side(sets), close(plain, FP8_ROUNDING)),
        "torch, row-wise": Contender(lambda: torch_side(sets, row_wise=True), row_wise),
        "BF16": Contender(lambda: bf16_side(sets)),
    }


def packed_contenders(m: int, k: int, n: int) -> dict[str, Contender]:
    """Few rows: bound by the bytes of the weight, of which packed codes have half."""
    sets = operands(m, k, n, "e2m1", sets_of(n * k // 2))
    scaled, plain = (exact(sets[0], scaled=scaled) for scaled in (True, False))
    return {
        "jfp4, packed": Contender(lambda: packed_side(sets), equal(scaled)),
        "jfp4": Contender(lambda: jfp4_side(sets), equal(scaled)),
        "torch, row-wise": Contender(lambda: torch_side(sets, row_wise=True), close(scaled)),
        ONE_SCALE: Contender(lambda: torch_side(sets, row_wise=False), close(plain)),
        "BF16": Contender(lambda: bf16_side(sets)),
    }


def operands(m: int, k: int, n: int, format: str, count: int) -> list[Operands]:
    """Sets of random operands, enough that none is in the cache when its turn comes."""
    keys = jax.random.split(jax.random.key(m + 3 * k + 5 * n), (count, 2))
    return [(*xw[::2], *xw[1::2]) for xw in (_pair(m, k, n, format, *key) for key in keys)]


def _pair(m: int, k: int, n: int, format: str, x_key: Array, w_key: Array) -> tuple[Any, ...]:
    return (*_activation(x_key, (m, k), format), *_weight(w_key, (k, n)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _activation(key: Array, shape: tuple[int, int], format: str) -> tuple[QTensor, Array]:
    x = jax.random.normal(key, shape, jnp.bfloat16)
    return jfp4.quantize(x, 1, format=format), x


@functools.partial(jax.jit, static_argnums=1)
def _weight(key: Array, shape: tuple[int, int]) -> tuple[QTensor, Array]:
    w = jax.random.normal(key, shape, jnp.bfloat16)
    return jfp4.quantize(w, 0).T, w


def jfp4_side(sets: list[Operands], backend: Backend = "cuda", promote: bool = False) -> Side:
    """The library's product, by one of its back ends."""

    @jax.jit
    def product(a: QTensor, bt: QTensor) -> Array:
        return jfp4.gemm(a, bt.T, out_dtype=jnp.bfloat16, promote=promote)

    with jfp4.backend(backend):
        compiled = product.lower(*sets[0][:2]).compile()
    return rotating(compiled, [s[:2] for s in sets])


def packed_side(sets: list[Operands]) -> Side:
    """The library's product of packed operands."""
    pack = jax.jit(lambda q: (jfp4.pack(q.codes), q.scale))
    packed = [(*pack(a), *pack(b)) for a, b, _, _ in sets]

    @jax.jit
    def product(a: Array, a_scale: Array, b: Array, b_scale: Array) -> Array:
        return ffi.packed_gemm(a, a_scale, b, b_scale.T, out_dtype=jnp.bfloat16)

    return rotating(product.lower(*packed[0]).compile(), packed)


def xla_side(sets: list[Operands]) -> Side:
    """XLA's FP8 dot of the codes alone, both contiguous along the contraction."""
    product = functools.partial(
        lax.dot_general, dimension_numbers=_TN, preferred_element_type=jnp.bfloat16
    )
    codes = [(a.codes, b.codes) for a, b, _, _ in sets]
    return rotating(jax.jit(product).lower(*codes[0]).compile(), codes)


_TN = (((1,), (1,)), ((), ()))


def bf16_side(sets: list[Operands], codes: bool = False) -> Side:
    """XLA's BF16 product: of the tensors, or of their codes."""
    pairs = [(x, w) for _, _, x, w in sets]
    if codes:
        pairs = [(a.codes.astype(x.dtype), b.codes.T.astype(x.dtype)) for a, b, x, _ in sets]
    return rotating(jax.jit(jnp.matmul).lower(*pairs[0]).compile(), pairs)


def torch_side(sets: list[Operands], row_wise: bool) -> Side:
    """PyTorch's FP8 product, which is cuBLASLt's, with its fast accumulation."""
    torch: Any = importlib.import_module("torch")
    one = torch.ones((), device="cuda")
    dtypes = {"e2m1": torch.float8_e4m3fn, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

    def arguments(a: QTensor, b: QTensor, rows: int) -> tuple[Any, ...]:
        short = ((0, rows - a.shape[0]), (0, 0))
        codes, scale = jnp.pad(a.codes, short), jnp.pad(a.scale, short)
        x, w = to_torch(codes, dtypes[a.format]), to_torch(b.codes, dtypes[b.format]).t()
        scales = (to_torch(scale), to_torch(b.scale).t()) if row_wise else (one, one)
        return x, w, *scales

    def product(x: Any, w: Any, x_scale: Any, w_scale: Any) -> Any:
        return torch._scaled_mm(
            x, w, scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    m = sets[0][0].shape[0]
    try:
        product(*arguments(*sets[0][:2], m))
        rows = m
    except RuntimeError:
        rows = -(-m // 16) * 16  # some of its kernels want whole tiles of 16 rows
    tensors = [arguments(a, b, rows) for a, b, _, _ in sets]
    return Side(
        lambda i: product(*tensors[i % len(tensors)])[:m],
        lambda _: torch.cuda.synchronize(),
        hold_torch(),
    )


@functools.cache
def hold_torch() -> Side:
    """``timing.hold`` in PyTorch's stream."""
    torch: Any = importlib.import_module("torch")
    x = torch.zeros(HELD, dtype=torch.uint8, device="cuda")
    return Side(lambda _: torch.amax(x, dim=1), lambda _: torch.cuda.synchronize())


def to_torch(x: Array, dtype: Any = None) -> Any:
    """The same memory as a tensor of PyTorch; float8 goes as bytes."""
    torch: Any = importlib.import_module("torch")
    if dtype is None:
        return torch.from_dlpack(x)
    return torch.from_dlpack(lax.bitcast_convert_type(x, jnp.uint8)).view(dtype)


# ---------------------------------------------------------------------------------- checking


def exact(operands: Operands, *, scaled: bool) -> Float[Array, "m n"]:
    """The product in bfloat16 after exact sums; a corner of those is held to float64's.

    Products of codes are exact in bfloat16, and their sums in float32 while they stay below 2**24
    units of the smallest; E5M2's are rounded, far less than on FP8 tensor cores.
    """
    a, b = operands[:2]
    sums, y = _exact(a, b, scaled)
    corner, rounding = 128, 2.0**-14 if a.format == "e5m2" else 0
    float64 = (
        np.asarray(a.codes[-corner:], np.float64) @ np.asarray(b.codes[-corner:], np.float64).T
    )
    got = np.asarray(sums[-corner:, -corner:], np.float64)
    if np.linalg.norm(got - float64) > rounding * np.linalg.norm(float64):
        raise AssertionError("the reference's sums are not float64's")
    return y


@functools.partial(jax.jit, static_argnums=2)
def _exact(a: QTensor, b: QTensor, scaled: bool) -> tuple[Array, Array]:
    # Without the barrier XLA sees float8 behind the conversions and multiplies that.
    x, w = lax.optimization_barrier(tuple(q.codes.astype(jnp.bfloat16) for q in (a, b)))
    sums = lax.dot_general(x, w, dimension_numbers=_TN, preferred_element_type=jnp.float32)
    return sums, (sums * a.scale * b.scale.T if scaled else sums).astype(jnp.bfloat16)


def equal(expected: Array) -> Callable[..., float]:
    """A check that every element is the expected one."""

    def check(side: Side, _: Any) -> float:
        wrong = int(_wrong(result_of(side), expected))
        if wrong:
            raise AssertionError(f"{wrong} of {expected.size} elements are not exact")
        return 0.0

    return check


def close(expected: Array, bound: float = BF16_ROUNDING) -> Callable[..., float]:
    """A check of the error's norm over the expected result's, which it returns."""

    def check(side: Side, _: Any) -> float:
        error = float(_distance(result_of(side), expected))
        if not error <= bound:
            raise AssertionError(f"relative error {error:.1e}, over {bound:.1e}")
        return error

    return check


def result_of(side: Side) -> Any:
    """What a call of the side computes, in arrays of JAX."""
    y = side.call(0)
    side.wait(y)
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.from_dlpack(x), y)


@jax.jit
def _wrong(y: Array, expected: Array) -> Array:
    return jnp.sum(y != expected, dtype=jnp.int32)


@jax.jit
def _distance(y: Array, expected: Array) -> Array:
    y, expected = y.astype(jnp.float32), expected.astype(jnp.float32)
    return jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)


# ----------------------------------------------------------------------------------- numbers


def ratios(lines: list[dict[str, Any]], side: str, rivals: Sequence[str]) -> dict[str, Any]:
    """A side's rate over the best of its rivals, shape by shape and in the geometric mean."""
    by_shape = {}
    for line in lines:
        rates = line["tflops"]
        best = max((rates[rival] for rival in rivals if rival in rates), default=None)
        if best is not None and side in rates:
            by_shape[" x ".join(map(str, line["m, k, n"]))] = rates[side] / best
    return {"geomean": geomean(by_shape.values()) if by_shape else None, "by shape": by_shape}


def table(results: dict[str, Any]) -> str:
    """Rates by shape."""
    parts = []
    for key in ("codes", "gradients", "packed"):
        if lines := results[key]:
            names = list(dict.fromkeys(name for line in lines for name in line["tflops"]))
            cells = [
                [
                    " x ".join(map(str, line["m, k, n"])),
                    *(f"{line['tflops'].get(name, float('nan')):.1f}" for name in names),
                ]
                for line in lines
            ]
            parts.append(f"{key}, TFLOP/s\n" + markdown(["m x k x n", *names], cells))
    for key, ratio in results["ratios"].items():
        if ratio["geomean"] is not None:
            parts.append(f"{key}: {ratio['geomean']:.3f}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main("gemm", run, table))
