"""CPU: the integer product beside float32's, an FP4 train step beside BF16's, XLA beside the host.

``python -m benchmarks.cpu`` measures both sides of each pair by turns, in one process, and writes
medians to results/cpu-jaxVERSION.json.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.provenance import RESULTS, cpu_has, provenance
from jfp4.ops import ffi
from jfp4.ops.gemm import code_sums, gemm
from jfp4.ops.quantize import quantize, quantize_both
from train.config import parse
from train.step import Trainer

M, K, N = 1024, 2048, 2048
PRODUCT_ROUNDS, STEP_ROUNDS = 31, 9


def main() -> int:
    """Measures, prints and writes; returns the exit status."""
    argparse.ArgumentParser(prog="python -m benchmarks.cpu").parse_args()
    if jax.default_backend() != "cpu":
        print("error: this measures CPUs; set JAX_PLATFORMS=cpu", file=sys.stderr)
        return 2
    results = {
        "provenance": provenance() | {"vnni": cpu_has("avx512_vnni") or cpu_has("avx_vnni")},
        "product": product(),
        "step": step(),
    }
    out = RESULTS / f"cpu-jax{jax.__version__}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    return 0


def product() -> dict[str, Any]:
    """E2M1 codes of random tensors, multiplied as int8, against the float32 product."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((M, K), np.float32), rng.standard_normal((K, N), np.float32)
    a, (b, b_t) = quantize(jnp.asarray(x), 1), quantize_both(jnp.asarray(w), 0)
    a8, b8 = ((2 * q.codes.astype(jnp.float32)).astype(jnp.int8) for q in (a, b))
    dot = functools.partial(lax.dot, preferred_element_type=jnp.int32)
    exact = np.asarray(a.codes, np.float64) @ np.asarray(b.codes, np.float64)
    if not np.array_equal(np.asarray(code_sums(a, b), np.float64), exact):
        raise AssertionError("the integer product is not float64's")
    sides = {
        "float32": jitted(jnp.matmul, jnp.asarray(x), jnp.asarray(w)),
        "int8": jitted(dot, a8, b8),
        "codes to sums": jitted(code_sums, a, b),
    }
    if not ffi.missing("host"):
        with ffi.backend("host"):  # in the layout that its quantiser writes
            sides["host"] = jitted(lambda a, b_t: gemm(a, b_t.T), a, b_t)
    seconds = by_turns(sides, PRODUCT_ROUNDS)
    return {
        "m, k, n": [M, K, N],
        "ms": {name: 1e3 * s for name, s in seconds.items()},
        "int8 over float32": seconds["float32"] / seconds["int8"],
        "sums equal float64's": True,
    }


def step() -> dict[str, Any]:
    """A train step of llama5m at the trainer's defaults, by recipe."""
    sides: dict[str, tuple[str, ffi.Backend]] = {"bf16": ("bf16", "xla"), "fp4": ("fp4", "xla")}
    if not ffi.missing("host"):
        sides["fp4, host"] = ("fp4", "host")
    timed = {}
    for side, (recipe, backend) in sides.items():
        with ffi.backend(backend):
            trainer = Trainer(parse([f"--recipe={recipe}"]))
            state = jax.jit(trainer.init)()
            rng = np.random.default_rng(0)
            batch = jnp.asarray(rng.integers(0, 257, trainer.batch_shape().shape), jnp.int32)
            timed[side] = jitted(trainer.step, state, batch)
    seconds = by_turns(timed, STEP_ROUNDS)
    return {
        "model": "llama5m",
        "batch_size, seq_len": [trainer.config.batch_size, trainer.config.seq_len],
        "ms": {name: 1e3 * s for name, s in seconds.items()},
        "fp4 over bf16": seconds["bf16"] / seconds["fp4"],
    }


def jitted(f: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """``f`` compiled, bound to its arguments and run once."""
    compiled = jax.jit(f).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    return lambda: jax.block_until_ready(compiled(*args))


def by_turns(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each side; every round runs all of them, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    sys.exit(main())
