"""The linear layer on kernels: the XLA path's results and the oracle's, under every transform."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfp4.ops import ffi
from jfp4.ops import reference as ref
from jfp4.ops.linear import linear, save_codes
from jfp4.recipe import RECIPES, get_recipe

M, K, N = 256, 384, 320
ROUNDING = 2.0**-5
"""Of a result's norm: 13 fractional bits where the products' magnitudes span more."""

_rng = np.random.default_rng(0)
X = _rng.normal(size=(M, K)).astype(np.float32)
X[:, ::16] *= 8
W = (_rng.normal(size=(K, N)) * np.linspace(0.02, 0.08, N)).astype(np.float32)
DY = _rng.normal(size=(M, N)).astype(np.float32)


def step(x, w, dy, recipe):
    """y, dx and dw."""
    y, vjp = jax.vjp(lambda x, w: linear(x, w, recipe), x, w)
    return y, *vjp(dy.astype(y.dtype))


def on(backend, f, *args):
    """The function compiled for a back end."""
    with ffi.backend(backend):
        return jax.jit(f)(*args)


def distance(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def oracle(recipe):
    r = get_recipe(recipe)
    config = ref.LinearConfig(
        x_fmt=r.x_format,
        w_fmt=r.w_format,
        grad_fmt=r.grad_format,
        dge_k=r.dge_k,
        occ_alpha=r.occ_alpha,
        sample_size=r.occ_sample,
    )
    return ref.linear(X, W, DY, config)


@pytest.mark.parametrize("recipe", ["fp4", "fp4_cast", "fp8"])
def test_layer_is_the_xla_paths_and_the_oracles(backend, recipe):
    f = functools.partial(step, recipe=recipe)
    kernels, xla = jax.jit(f)(X, W, DY), on("xla", f, X, W, DY)
    for got, other, exact in zip(kernels, xla, oracle(recipe), strict=True):
        assert got.dtype == other.dtype
        assert distance(got, exact) <= ROUNDING and distance(got, other) <= ROUNDING


def test_a_cast_forward_is_the_oracles_to_the_last_bit(backend):
    """E2M1 on both sides: exact sums, then two float32 products."""
    (qx, sx, _), (qw, sw, _) = ref.quantize(X, 1, "e2m1"), ref.quantize(W, 0, "e2m1")
    expected = ref.sums(qx, qw).astype(np.float32) * sx * sw
    y = jax.jit(linear, static_argnames="recipe")(X, W, recipe="fp4_cast")
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compute_dtypes(backend, dtype):
    x = jnp.asarray(X, dtype)
    f = functools.partial(step, recipe="fp4")
    kernels, xla = jax.jit(f)(x, W, DY), on("xla", f, x, W, DY)
    assert [v.dtype for v in kernels] == [dtype, dtype, "float32"]
    for got, other in zip(kernels, xla, strict=True):
        assert distance(got, other) <= ROUNDING


def test_repetition_changes_nothing(backend):
    f = jax.jit(functools.partial(step, recipe="fp4"))
    first = f(X, W, DY)
    for _ in range(3):
        same(f(X, W, DY), first)


def test_vmap_is_a_loop(backend):
    f = functools.partial(step, recipe="fp4")
    x, w, dy = (np.stack([v, v[::-1], -v]) for v in (X, W, DY))
    together = jax.jit(jax.vmap(f))(x, w, dy)
    for i in range(3):
        alone = jax.jit(f)(x[i], w[i], dy[i])
        for got, expected in zip(together, alone, strict=True):
            assert distance(got[i], expected) <= ROUNDING


def test_remat_changes_nothing(backend):
    def loss(x, w, layer):
        return jnp.sum(layer(x, w) * DY)

    layer = functools.partial(linear, recipe="fp4")
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    plain = gradient(X, W, layer)
    same(gradient(X, W, jax.checkpoint(layer)), plain)
    same(gradient(X, W, jax.checkpoint(layer, policy=save_codes)), plain)


def test_scan_over_layers(backend):
    """Weights that a loop slices out of a stack are not aligned as arrays are."""
    w = np.stack([W[:, :K] if K <= N else np.pad(W, ((0, 0), (0, K - N))) for _ in range(3)])

    def body(x, w):
        return jnp.tanh(linear(x, w, "fp4")), None

    looped = jax.jit(lambda x: jax.lax.scan(body, x, w)[0])(X)
    unrolled = jax.jit(lambda x: jax.lax.scan(body, x, w, unroll=3)[0])(X)
    assert distance(looped, unrolled) <= ROUNDING


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["fp4", "fp4_cast"])
def test_cuda_graphs_change_nothing(recipe):
    f = functools.partial(step, recipe=recipe)
    results = []
    with ffi.backend("cuda"):
        for captured in ("", "FUSION,CUSTOM_CALL"):
            options = {
                "xla_gpu_enable_command_buffer": captured,
                "xla_gpu_graph_min_graph_size": 1,
            }
            compiled = jax.jit(f).lower(X, W, DY).compile(compiler_options=options)
            # From the second run on a captured graph is replayed, with other outputs.
            results += [compiled(X, W, DY) for _ in range(4)]
    for result in results[1:]:
        same(result, results[0])


@pytest.mark.gpu
def test_kernels_are_what_runs():
    served = ffi.backends()
    assert {s.path for s in served.operations.values()} == {"cuda"}, str(served)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "bf16"])
def test_what_a_compiled_layer_calls(backend, recipe):
    """Each tensor is quantised once, for all of its products, and none is transposed."""
    text = jax.jit(functools.partial(step, recipe=recipe)).lower(X, W, DY).compile().as_text()
    calls = collections.Counter(re.findall(r'custom_call_target="jfp4_(\w+)"', text))
    quantizers = {
        "quantize_rows": 1,
        "quantize_columns": 1,
        "quantize_gradient": 1,
        "gradient_amax": 1,
    }
    assert calls == quantizers | {"gemm": 3} | ({"thresholds": 1} if recipe == "fp4" else {})
    assert " transpose(" not in text


def same(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
