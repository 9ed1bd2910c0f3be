"""A prepared weight: the same bits for fewer quantisations, in as few bytes as it can be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfp4
from jfp4.ops import ffi
from jfp4.ops.gemm import gemm
from jfp4.ops.linear import linear
from jfp4.ops.prepare import prepare as prepare_eagerly
from jfp4.ops.quantize import quantize
from jfp4.qtensor import PackedQTensor
from jfp4.recipe import RECIPES, Recipe

M, K, N = 24, 35, 42
_rng = np.random.default_rng(0)
X = _rng.normal(size=(M, K)).astype(np.float32)
W = _rng.normal(size=(K, N)).astype(np.float32)
DY = _rng.normal(size=(M, N)).astype(np.float32)

change = dataclasses.replace
prepare = jax.jit(prepare_eagerly, static_argnums=1)
CAST = RECIPES["fp4_cast"]
SWITCHES = {
    "fp4": RECIPES["fp4"],
    "fp4_cast": CAST,
    "fp8": RECIPES["fp8"],
    "e3m0": change(CAST, w_format="e3m0"),
    "tensor": change(CAST, w_scale="tensor"),
    "shift": change(CAST, w_shift="midrange"),
    "residual": Recipe(occ_compensation="residual"),
    "bfloat16 gradient": Recipe(grad_format=None),
}


# Every switch by both back ends and in both dtypes, which take turns.
TURNS = (("xla", "float32"), ("host", "bfloat16")), (("xla", "bfloat16"), ("host", "float32"))


@pytest.mark.parametrize(
    ("name", "path", "dtype"),
    [(name, *case) for i, name in enumerate(SWITCHES) for case in TURNS[i % 2]],
)
def test_the_results_have_the_same_bits(name, path, dtype):
    if path == "host" and (why := ffi.missing("host")):
        pytest.skip(why)
    recipe = SWITCHES[name]

    def run(x, w, prepared):
        y, vjp = jax.vjp(lambda x, w: linear(x, w, recipe, prepared=prepared), x, w)
        return y, *vjp(DY.astype(y.dtype))

    x, w = X.astype(jnp.dtype(dtype)), W.astype(jnp.dtype(dtype))
    with jfp4.backend(path):
        prepared = prepare(w, recipe)
        got = jax.jit(run)(x, w, prepared)
        alone = jax.jit(lambda x, w, p: linear(x, w, recipe, prepared=p))(x, w, prepared)
        expected = jax.jit(run)(x, w, None)
    for one, other in zip((*got, alone), (*expected, expected[0]), strict=True):
        assert one.dtype == other.dtype
        # Sums over shifts and residuals are XLA's to order, as it likes in each program.
        summed = recipe.w_shift is not None or recipe.occ_compensation == "residual"
        unit = 2.0**-7 if one.dtype == jnp.bfloat16 else 2.0**-18  # 64 roundings of float32
        largest = np.abs(np.asarray(other, np.float32)).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=summed * unit * largest)
    assert np.any(got[2])  # the gradient reaches w


@pytest.mark.parametrize("name", SWITCHES)
def test_bytes_of_both_layouts(name):
    """Half a byte a weight in each layout, rows filled up; a byte where codes are not packed."""
    recipe = SWITCHES[name]
    prepared = jax.eval_shape(lambda w: prepare_eagerly(w, recipe), W)
    packed = recipe.w_format != "e4m3" and recipe.w_shift is None
    codes = N * 18 + K * 21 if packed else 2 * K * N
    scales = 2 * 4 * (1 if recipe.w_scale == "tensor" else N)
    shifts = 0 if recipe.w_shift is None else 2 * 4 * N
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(prepared))
    assert total == codes + scales + shifts
    assert isinstance(prepared.fprop, PackedQTensor) == packed
    # Contiguous along each product's contraction.
    if packed:
        assert prepared.fprop.packed.shape == (N, 18) and prepared.dgrad.packed.shape == (K, 21)


def test_nothing_is_quantised_or_kept_again():
    prepared = prepare(W, CAST)

    def kept(x, w, prepared):
        return jax.tree.leaves(jax.vjp(lambda x, w: linear(x, w, CAST, prepared=prepared), x, w)[1])

    jaxpr = jax.make_jaxpr(kept)(X, W, prepared)
    outputs = {id(v) for v in jaxpr.jaxpr.outvars}
    dgrad = jaxpr.jaxpr.invars[-2]
    assert dgrad.aval.shape == (K, 21) and id(dgrad) in outputs
    of_w = [v.aval for v in jaxpr.jaxpr.outvars if v.aval.shape in ((K, N), (N, K))]
    assert of_w == []  # neither w, which no slope reads, nor codes in bytes
    # One operand is rounded to codes where two were.
    rounds = [
        str(jax.make_jaxpr(lambda *v: linear(*v[:2], CAST, prepared=v[2]))(X, W, p)).count(
            "new_dtype=float8_e4m3fn"
        )
        for p in (None, prepared)
    ]
    unpacked = str(jax.make_jaxpr(prepared.fprop.unpack)()).count("new_dtype=float8_e4m3fn")
    assert rounds == [2, 1 + unpacked]


def test_another_weight_is_refused():
    for w, recipe in ((W[:, 1:], CAST), (W.T, CAST), (W, RECIPES["fp8"])):
        with pytest.raises(
            ValueError, match=r"prepared has shape .*; expected \(35, 42\) in 'e2m1b3'"
        ):
            linear(X, W, CAST, prepared=prepare(w, recipe))
    expected = r"expected \(35, 42\) in 'e2m1b3' with no shift and a scale of \(1, 42\), those of w"
    for name, found in (
        ("shift", r"a shift and .* \(1, 42\)"),
        ("tensor", r"no shift .* \(1, 1\)"),
    ):
        other = prepare(W, SWITCHES[name])
        # Also where it is one of the two that does not fit.
        for p in (other, change(other, fprop=prepare(W, CAST).fprop)):
            with pytest.raises(ValueError, match=rf"prepared has .* with {found}; {expected}"):
                linear(X, W, CAST, prepared=p)
    with pytest.raises(ValueError, match=r"no shift .*; expected .* with a shift and a scale"):
        linear(X, W, SWITCHES["shift"], prepared=prepare(W, CAST))
    with pytest.raises(ValueError, match="nothing to prepare"):
        prepare(W, RECIPES["bf16"])
    with pytest.raises(TypeError, match="int32"):
        prepare(jnp.ones((2, 2), jnp.int32), CAST)


@pytest.mark.parametrize("path", ["host", "xla"])
def test_codes_multiply_a_prepared_weight_as_they_are_packed(path):
    if path == "host" and (why := ffi.missing("host")):
        pytest.skip(why)
    prepared = prepare(W, CAST)
    x = quantize(X, 1)
    with jfp4.backend(path):
        lowered = jax.jit(gemm).lower(PackedQTensor.pack(x), prepared.fprop)
        y = lowered.compile()(PackedQTensor.pack(x), prepared.fprop)
    assert ("jfp4_packed_gemm" in lowered.as_text()) == (path == "host")
    np.testing.assert_array_equal(y, gemm(x, quantize(W, 0)))
