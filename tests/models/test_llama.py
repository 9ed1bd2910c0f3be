"""The decoder against an independent NumPy one in float64, and what must not change its result."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

import jfp4
from jfp4 import sharding
from jfp4.models.config import MODELS, LlamaConfig
from jfp4.models.llama import (
    INIT_STD,
    MLP,
    REMAT,
    Attention,
    Llama,
    attention_implementation,
    by_layers,
    rotary_angles,
    rotate,
    split_params,
)
from jfp4.nn import CalibrationStat, Linear, Prepared
from jfp4.ops.slices import is_slices
from jfp4.recipe import RECIPES, Recipe

U = 2.0**-24  # float32's unit roundoff
QUICK = {"xla_backend_optimization_level": 0}  # to compile
change = dataclasses.replace
TINY = LlamaConfig(
    vocab_size=64,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=48,
    dtype="float32",
)
FP4 = Recipe(occ_alpha=0.95)
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 9)).astype(np.int32)


def make(config=TINY, recipe="bf16", scale=1):
    """A model with weights from NumPy, which spares compiling initialisers.

    ``scale`` multiplies its projections; if it is not 1, the norms' scales are not either.
    """
    model = nnx.eval_shape(lambda: Llama(config, "bf16", rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "scale":
            value = np.ones(v.shape) if scale == 1 else rng.uniform(0.5, 1.5, v.shape)
        else:
            value = rng.normal(size=v.shape) * 0.02 * scale
        v.set_value(jnp.asarray(value, jnp.float32))
    return model if recipe == "bf16" else jfp4.convert(model, recipe)


call = nnx.jit(lambda model, tokens: model(tokens))
rounded = jax.jit(lambda w: jfp4.quantize(w, 0).dequantize())


def loss_of(model, tokens):
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def gradient_function(config, recipe, prepared=False):
    """Parameters, and the pure function of them that gives loss, statistics and gradients."""
    graph, params, rest = split_params(make(config, recipe, scale=5))

    def loss(params, codes):
        model = nnx.merge(graph, params, rest, copy=True)
        nnx.update(model, codes)
        return loss_of(model, TOKENS), nnx.state(model, CalibrationStat)

    def function(params):
        codes = nnx.State({})
        if prepared:
            model = nnx.merge(graph, params, rest, copy=True)
            model.prepare()
            codes = nnx.state(model, Prepared)
        return jax.value_and_grad(loss, has_aux=True)(params, codes)

    return params, function


@functools.cache
def results(recipe, prepared=False, **kwargs):
    """Loss, statistics and gradients of the tiny model as configured by ``kwargs``."""
    params, function = gradient_function(change(TINY, **kwargs), recipe, prepared)
    (loss, stats), grads = jax.jit(function, compiler_options=QUICK)(params)
    pure = nnx.to_pure_dict(grads), nnx.to_pure_dict(stats)
    return float(loss), *(jax.tree.map(np.asarray, tree) for tree in pure)


def primitives(jaxpr):
    """Names of all primitives in a jaxpr and in those inside it."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


# ------------------------------------------------------------------------- the whole, in NumPy


def numpy_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def numpy_rotate(x, theta):
    """``x`` [s, e]: coordinate i and i + e/2 are one complex number."""
    half = x.shape[-1] // 2
    z = x[:, :half] + 1j * x[:, half:]
    frequency = theta ** (-2.0 * np.arange(half) / x.shape[-1])
    z = z * np.exp(1j * np.arange(len(x))[:, None] * frequency)
    return np.concatenate([z.real, z.imag], axis=-1)


def numpy_silu(x):
    return x / (1 + np.exp(-x))


def numpy_llama(params, config, tokens):
    """The decoder of one sequence, a head and a layer at a time, in float64."""
    c, e = config, config.head_dim
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    x = p["embed"]["embedding"][tokens]
    s, group = len(tokens), c.num_heads // c.num_kv_heads
    for i in range(c.num_layers):
        layer = jax.tree.map(lambda v, i=i: v[i], p["layers"])
        qkv = numpy_norm(x, layer["attention_norm"]["scale"], c.norm_eps)
        qkv = qkv @ layer["attention"]["qkv_proj"]["kernel"]
        heads = []
        for h in range(c.num_heads):
            start = (h // group) * (group + 2)  # of this key head's columns, in heads
            columns = [start + h % group, start + group, start + group + 1]
            q, k, v = (qkv[:, n * e : (n + 1) * e] for n in columns)
            scores = numpy_rotate(q, c.rope_theta) @ numpy_rotate(k, c.rope_theta).T / np.sqrt(e)
            weights = np.exp(np.where(np.tri(s), scores, -np.inf))
            heads.append(weights / weights.sum(axis=1, keepdims=True) @ v)
        x = x + np.concatenate(heads, axis=1) @ layer["attention"]["o_proj"]["kernel"]
        y = numpy_norm(x, layer["mlp_norm"]["scale"], c.norm_eps)
        y = y @ layer["mlp"]["gate_up_proj"]["kernel"]
        x = x + (numpy_silu(y[:, 0::2]) * y[:, 1::2]) @ layer["mlp"]["down_proj"]["kernel"]
    x = numpy_norm(x, p["norm"]["scale"], c.norm_eps)
    return x @ (p["embed"]["embedding"].T if c.tied_head else p["lm_head"]["kernel"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_head": True, "num_kv_heads": 1, "rope_theta": 100.0, "norm_eps": 0.1},
        {"num_kv_heads": 4, "scan_layers": False},
    ],
    ids=["grouped", "tied, one key head", "all heads, unrolled"],
)
def test_the_whole_model_is_numpys(changes):
    config = change(TINY, **changes)
    model = make(config, scale=8)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    got = np.asarray(call(model, TOKENS))
    assert got.dtype == np.float32 and got.shape == (2, 9, 64)
    expected = np.stack([numpy_llama(params, config, t) for t in TOKENS])
    # A product of k terms is off by sqrt(k) U or so of its terms' norm, and so by that of a typical
    # result. Through a residual branch pass two products (48 terms at most) and some twenty
    # roundings of norm, softmax and silu: 2 * 7 + 20 U. There are two branches a layer, and the
    # head; half as much again for the largest of a thousand logits.
    bound = 1.5 * (2 * config.num_layers + 1) * 34 * U * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=bound)
    assert bound < 1e-3 * np.abs(expected).std()


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_is_computed_in_and_logits_are_float32(tied):
    config = change(TINY, dtype="bfloat16", tied_head=tied, num_layers=1)
    logits = call(make(config, scale=8), TOKENS)
    assert logits.shape == (2, 9, 64) and logits.dtype == jnp.float32
    wide = call(make(change(config, dtype="float32"), scale=8), TOKENS)
    # 2**-9 a rounding, and no more than some tens of them.
    assert 2.0**-10 < np.abs(logits - wide).max() / np.abs(wide).max() < 2.0**-4


# ---------------------------------------------------------------------------------- causality


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [("bf16", "float32"), ("bf16", "bfloat16"), (FP4, "bfloat16")],
    ids=["bf16 in float32", "bf16", "fp4"],
)
def test_no_token_changes_a_logit_before_it(recipe, dtype):
    model = make(change(TINY, dtype=dtype), recipe, scale=5)
    if recipe != "bf16":
        call(model, TOKENS)  # so that there are thresholds to clamp at
    model.eval()
    logits = np.asarray(call(model, TOKENS))
    for t in (1, 5, 8):
        tokens = TOKENS.copy()
        tokens[0, t] = (tokens[0, t] + 7) % 64
        changed = np.asarray(call(model, tokens))
        np.testing.assert_array_equal(changed[0, :t], logits[0, :t])
        np.testing.assert_array_equal(changed[1], logits[1])
        assert np.all(np.any(changed[0, t:] != logits[0, t:], axis=-1))


# ------------------------------------------------------------------------------------- rotary


def test_rotary_is_complex_multiplication():
    length, e, theta = 300, 16, 500.0
    x = np.random.default_rng(1).normal(size=(1, length, 3, e)).astype(np.float32)
    sin_cos = rotary_angles(length, e, theta)
    assert [(v.shape, v.dtype) for v in sin_cos] == [((length, 1, e // 2), jnp.float32)] * 2
    got = np.asarray(rotate(jnp.asarray(x), sin_cos), np.float64)
    expected = np.stack([numpy_rotate(x[0, :, h].astype(np.float64), theta) for h in range(3)], 1)
    # The wavelength is off by 4 U (a quotient, a power, another quotient), the angle by as much of
    # itself; sine, cosine and the turn by 4 U more.
    half = np.abs(x[..., : e // 2]) + np.abs(x[..., e // 2 :])
    size = np.concatenate([half, half], axis=-1)[0]
    bound = (4 * np.arange(length)[:, None, None] + 4) * U * size
    assert np.all(np.abs(got[0] - expected) <= bound)


def test_rotary_keeps_position_zero_and_lengths():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 7, 3, 8)), jnp.float32)
    y = rotate(x, rotary_angles(7, 8, 1e4))
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    assert np.all(np.any(y[:, 1:] != x[:, 1:], axis=-1))
    np.testing.assert_allclose(
        np.sum(np.square(y), axis=-1), np.sum(np.square(x), axis=-1), rtol=16 * U
    )
    narrow = rotate(x.astype(jnp.bfloat16), rotary_angles(7, 8, 1e4))
    assert narrow.dtype == jnp.bfloat16
    wide = rotate(x.astype(jnp.bfloat16).astype(jnp.float32), rotary_angles(7, 8, 1e4))
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


def test_rotary_products_depend_on_the_distance_alone():
    length, e = 64, 16
    rng = np.random.default_rng(3)
    q, k = (rng.normal(size=e).astype(np.float32) for _ in range(2))
    angles = rotary_angles(length, e, 100.0)
    q_at, k_at = (
        np.asarray(rotate(jnp.broadcast_to(v, (1, length, 1, e)), angles), np.float64)[0, :, 0]
        for v in (q, k)
    )
    scores = q_at @ k_at.T
    # As above, for both: an angle is off by 4 U of itself, and it is at most ``length``.
    bound = 2 * (4 * length + 4) * U * 2 * np.linalg.norm(q) * np.linalg.norm(k)
    spread = [np.ptp(np.diagonal(scores, d)) for d in range(-length + 1, length)]
    assert max(spread) <= 2 * bound
    assert np.std(scores[0]) > 1000 * bound
    # And on its sign.
    assert abs(scores[0, 5] - scores[5, 0]) > 1000 * bound


# ------------------------------------------------------------------------------ attention, MLP


def test_grouped_attention_is_attention_with_repeated_heads():
    group = TINY.num_heads // TINY.num_kv_heads
    grouped = Attention(TINY, rngs=nnx.Rngs(0))
    every = Attention(change(TINY, num_kv_heads=TINY.num_heads), rngs=nnx.Rngs(1))
    heads = np.asarray(grouped.qkv_proj.kernel[...]) * 10
    heads = heads.reshape(TINY.embed_dim, TINY.num_kv_heads, group + 2, TINY.head_dim)
    repeated = np.stack(
        [
            np.stack([heads[:, h // group, n] for n in (h % group, group, group + 1)], axis=1)
            for h in range(TINY.num_heads)
        ],
        axis=1,
    )
    grouped.qkv_proj.kernel[...] = jnp.asarray(heads.reshape(TINY.embed_dim, -1))
    every.qkv_proj.kernel[...] = jnp.asarray(repeated.reshape(TINY.embed_dim, -1))
    every.o_proj.kernel[...] = grouped.o_proj.kernel[...]
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, 9, TINY.embed_dim)), jnp.float32)
    angles = rotary_angles(9, TINY.head_dim, 1e4)
    got, expected = (np.asarray(attention(x, angles)) for attention in (grouped, every))
    # The same sums, perhaps in another order: of 32 terms, then 8, 9 and 32.
    np.testing.assert_allclose(got, expected, rtol=0, atol=32 * U * np.abs(expected).max())


def test_swiglu_is_numpys():
    mlp = MLP(TINY, rngs=nnx.Rngs(0))
    x = np.random.default_rng(5).normal(size=(2, 9, TINY.embed_dim)).astype(np.float32)
    w, down = (
        np.asarray(v.kernel[...], np.float64) * 10 for v in (mlp.gate_up_proj, mlp.down_proj)
    )
    mlp.gate_up_proj.kernel[...] = jnp.asarray(w, jnp.float32)
    mlp.down_proj.kernel[...] = jnp.asarray(down, jnp.float32)
    gate, up = x @ w[:, 0::2], x @ w[:, 1::2]
    y = numpy_silu(gate) * up
    got = np.asarray(mlp(jnp.asarray(x)), np.float64)
    # Sums of k terms are within k U of their magnitudes; silu has a slope of 1.1 at most, and it
    # and the product take six roundings.
    sums = TINY.embed_dim * U * (np.abs(x) @ np.abs(w))
    error = 1.1 * sums[..., 0::2] * np.abs(up) + sums[..., 1::2] * np.abs(gate) + 6 * U * np.abs(y)
    bound = (error + (TINY.mlp_dim + 1) * U * np.abs(y)) @ np.abs(down)
    assert np.all(np.abs(got - y @ down) <= bound) and bound.max() < 1e-3 * np.abs(got).max()


def test_attention_implementation(monkeypatch):
    assert attention_implementation(TINY) == "xla"
    for asked in ("xla", "cudnn"):
        assert attention_implementation(change(TINY, attention=asked)) == asked
    narrow = change(TINY, dtype="bfloat16")
    assert attention_implementation(narrow) == "xla"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention_implementation(narrow) == "cudnn"
    assert attention_implementation(TINY) == "xla"
    for width, expected in ((136, "cudnn"), (256, "cudnn"), (12, "xla"), (264, "xla")):
        other = change(narrow, embed_dim=width * narrow.num_heads)
        lost = pytest.warns(UserWarning, match=f"computed by XLA: .* these have {width}$")
        with lost if expected == "xla" else contextlib.nullcontext():
            assert attention_implementation(other) == expected


# ------------------------------------------------------------------------- scan, remat, states

VARIANTS = {
    "unrolled": {"scan_layers": False},
    "codes": {"remat": "codes"},
    "products": {"remat": "products"},
    "qkv": {"remat": "qkv"},
    "full": {"remat": "full"},
}


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("bf16", "unrolled"), ("bf16", "full"), *(("fp4", name) for name in VARIANTS)],
)
def test_scan_and_remat_change_nothing(recipe, name):
    """The same operations on the same numbers; float32 may add them up in another order."""
    recipe = FP4 if recipe == "fp4" else recipe
    loss, grads, stats = results(recipe)
    other, other_grads, other_stats = results(recipe, **VARIANTS[name])
    assert other == pytest.approx(loss, rel=4 * U)
    for got, expected in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads), strict=True):
        # A code that fell the other way would be an eighth of an element off.
        np.testing.assert_allclose(got, expected, rtol=0, atol=64 * U * np.abs(expected).max())
        assert np.abs(expected).max() > 0
    assert len(jax.tree.leaves(stats)) == (8 if recipe == FP4 else 0)
    for got, expected in zip(jax.tree.leaves(other_stats), jax.tree.leaves(stats), strict=True):
        assert got.shape == (TINY.num_layers,) and np.all(np.isfinite(got))
        np.testing.assert_allclose(got, expected, rtol=16 * U)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_by_layers_are_the_stacks(remat):
    config = change(TINY, scan_layers=False, remat=remat)
    params, function = gradient_function(config, FP4)
    loss, expected = jax.jit(function, compiler_options=QUICK)(params)
    same, found = jax.jit(lambda p: function(by_layers(p)), compiler_options=QUICK)(params)
    assert same[0] == loss[0]
    stacks = [leaf for leaf in jax.tree.leaves(found, is_leaf=is_slices) if is_slices(leaf)]
    assert len(stacks) == 6  # four weights and two norms
    whole = jax.tree.map(lambda x: x.stack() if is_slices(x) else x, found, is_leaf=is_slices)
    for a, b in zip(*map(jax.tree.leaves, (whole, expected)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_remat_recomputes():
    """Of 12 code products a layer, full recomputes all of fprop whose result is looked at again.

    That is three of four, since nothing needs what down_proj gave, and two with qkv_proj's kept;
    and the quantisers of all four, of both operands, or of one where weights are prepared. With
    the codes and products saved, the two products of attention are left.
    """
    counts, prepared_counts = {}, {}
    quantiser = re.compile(r"convert_element_type\[\s*new_dtype=float8_e4m3fn")
    for remat in ("none", *REMAT):
        for prepared, found in ((False, counts), (True, prepared_counts)):
            params, function = gradient_function(change(TINY, remat=remat), FP4, prepared)
            jaxpr = jax.make_jaxpr(function)(params)
            names = list(primitives(jaxpr.jaxpr))
            text = str(jaxpr)
            found[remat] = (
                text.count("platform_index"),  # one each time codes are multiplied
                len(quantiser.findall(text)),
                names.count("dot_general"),
            )
    # Each product of codes is there twice: for CPUs and TPUs, and for GPUs.
    attention, head = 2 + 4, 1 + 2
    again = {"none": (0, 0), "codes": (0, 0), "products": (0, 4), "qkv": (2, 4), "full": (3, 4)}
    for remat, (products, quantisers) in again.items():
        dots = 2 * (12 + products) + attention + (0 if remat == "none" else 2) + head
        assert counts[remat] == (12 + products, 8 + 2 * quantisers, dots), remat
        assert prepared_counts[remat] == (12 + products, 8 + quantisers, dots), remat


def test_layers_are_a_loop_and_keep_their_own_statistics():
    model = make(recipe=FP4, scale=5)
    blocks = []
    for i in range(TINY.num_layers):
        graph, state = nnx.split(model.layers)
        blocks.append(nnx.merge(graph, jax.tree.map(lambda v, i=i: v[i], state)))

    @nnx.jit
    def loop(model, blocks, tokens):
        x = model.embed(tokens)
        for block in blocks:
            x = block(x, rotary_angles(tokens.shape[1], TINY.head_dim, TINY.rope_theta))
        return model.lm_head(model.norm(x))

    expected = loop(model, blocks, TOKENS)
    got = call(model, TOKENS)
    np.testing.assert_allclose(got, expected, rtol=0, atol=64 * U * np.abs(expected).max())
    stats = dict(nnx.to_flat_state(nnx.state(model.layers, CalibrationStat)))
    assert len(stats) == 8
    for i, block in enumerate(blocks):
        for path, v in nnx.to_flat_state(nnx.state(block, CalibrationStat)):
            np.testing.assert_allclose(stats[path][i], v[...], rtol=16 * U)
    for v in stats.values():
        assert v[0] != v[1]


def test_eval_reaches_the_stacked_layers_and_writes_nothing():
    model = make(change(TINY, num_layers=1), FP4, scale=5)
    call(model, TOKENS)
    kept = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, CalibrationStat)))
    model.eval()
    first = call(model, TOKENS // 2)
    after = nnx.to_pure_dict(nnx.state(model, CalibrationStat))
    jax.tree.map(np.testing.assert_array_equal, after, kept)
    model.train()
    assert np.any(call(model, TOKENS // 2) != first)
    after = nnx.to_pure_dict(nnx.state(model, CalibrationStat))
    assert all(a != b for a, b in zip(*map(jax.tree.leaves, (after, kept)), strict=True))


def test_health_of_every_layer():
    model = make(change(TINY, remat="codes"), FP4, scale=5)
    model.set_attributes(Linear, monitor=True)
    call(model, TOKENS)
    seen = {
        ".".join(path): v.get_value()
        for path, v in nnx.to_flat_state(nnx.state(model, nnx.Intermediate))
    }
    names = ("attention.o_proj", "attention.qkv_proj", "mlp.down_proj", "mlp.gate_up_proj")
    assert set(seen) == {f"layers.{name}.health" for name in names}
    for name in names:
        (measures,) = seen[f"layers.{name}.health"]
        block, part = name.split(".")
        kernel = getattr(getattr(model.layers, block), part).kernel
        for i in range(TINY.num_layers):
            w = np.asarray(kernel[i], np.float64)
            snr = 10 * np.log10(np.sum(w**2) / np.sum((w - np.asarray(rounded(kernel[i]))) ** 2))
            assert float(measures["w_snr_db"][i]) == pytest.approx(snr, abs=1e-3)
            assert 0.01 < measures["clipped"][i] < 0.1 + 1e-6


# ------------------------------------------------------------------- weights prepared, loaded


@pytest.mark.parametrize("remat", ["none", "full"])
def test_prepared_weights_change_no_bit(remat):
    expected, got = results(FP4, remat=remat), results(FP4, prepared=True, remat=remat)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_every_quantised_layer_is_prepared():
    every = change(FP4, skip=())
    model = make(recipe=every)
    nnx.jit(lambda model: model.prepare())(model)
    unpacked = jax.jit(lambda q: q.unpack().dequantize())
    found = {path[:-1]: v.get_value() for path, v in nnx.to_flat_state(nnx.state(model, Prepared))}
    layers = {path: v for path, v in nnx.iter_modules(model) if isinstance(v, Linear)}
    assert found.keys() == layers.keys() and len(found) == 5
    for path, layer in layers.items():
        kernels, weights = layer.kernel[...], found[path]
        if kernels.ndim == 2:
            kernels, weights = jax.tree.map(lambda v: v[None], (kernels, weights))
        for i, w in enumerate(kernels):
            weight = jax.tree.map(lambda v, i=i: v[i], weights)
            for q in (weight.fprop, weight.dgrad):
                np.testing.assert_array_equal(unpacked(q), rounded(w))
    changed = make(recipe=every, scale=3)
    before = call(changed, TOKENS)
    nnx.update(changed, nnx.state(model, Prepared))
    assert np.any(call(changed, TOKENS) != before)  # they are looked at


def halved(params):
    """Parameters of twice the float16 that is stored."""
    return jax.tree.map(lambda v: v.astype(jnp.float32) * 2, params)


@pytest.mark.parametrize(("remat", "tied"), [("none", False), ("codes", True), ("full", False)])
def test_parameters_are_loaded_where_they_are_used(remat, tied):
    """A stored form whose decoding is exact: the same loss, and gradients by the chain rule."""
    model = make(change(TINY, remat=remat, tied_head=tied), FP4, scale=5)
    graph, params, rest = split_params(model)
    stored = jax.tree.map(lambda v: (v / 2).astype(jnp.float16), params)
    model.load = halved
    loading = split_params(model)[0]

    def gradient(graph, params):
        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            return model.loss(TOKENS[:, :-1], TOKENS[:, 1:])

        def prepared_loss(params, codes):
            model = nnx.merge(graph, params, rest, copy=True)
            nnx.update(model, codes)
            return model.loss(TOKENS[:, :-1], TOKENS[:, 1:])

        model = nnx.merge(graph, params, rest, copy=True)
        model.prepare()
        codes = nnx.state(model, Prepared)
        return (*jax.value_and_grad(prepared_loss)(params, codes), loss(params))

    run = jax.jit(gradient, static_argnums=0, compiler_options=QUICK)
    loss, grads, again = run(loading, stored)
    expected, wide, _ = run(graph, halved(stored))
    assert float(loss) == float(expected) == float(again)
    for got, full in zip(jax.tree.leaves(grads), jax.tree.leaves(wide), strict=True):
        assert got.dtype == jnp.float16
        # Rounded once; where the embedding is the head as well, each part of it and their sum.
        roundings = 3 if tied else 1
        largest = 2 * np.abs(full).max()
        np.testing.assert_allclose(
            got, 2 * full, rtol=0, atol=(roundings * 2.0**-11 + 64 * U) * largest
        )


def shapes(jaxpr):
    """Dtype and shape of everything that a jaxpr computes, inside as well."""
    for equation in jaxpr.eqns:
        yield from ((str(v.aval.dtype), v.aval.shape) for v in equation.outvars)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from shapes(inner)


@pytest.mark.parametrize("remat", REMAT)
def test_no_decoded_copy_of_all_layers_is_made(remat):
    model = make(change(TINY, remat=remat, dtype="bfloat16"), FP4)
    model.load = halved
    graph, params, rest = split_params(model)
    stored = jax.tree.map(lambda v: v.astype(jnp.float16), params)

    def loss(params):
        model = nnx.merge(graph, params, rest, copy=True)
        model.prepare()
        return model.loss(TOKENS[:, :-1], TOKENS[:, 1:])

    made = set(shapes(jax.make_jaxpr(jax.grad(loss))(stored).jaxpr))
    layers = [v.shape for v in jax.tree.leaves(stored["layers"]) if v.ndim == 3]
    assert len(layers) == 4
    for shape in layers:
        assert ("float32", shape[1:]) in made and ("float16", shape) in made
        assert not {("float32", shape), ("bfloat16", shape)} & made


# --------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("tied", [False, True])
def test_loss_is_that_of_the_logits(tied):
    model = make(change(TINY, tied_head=tied), scale=8)
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    logits = np.asarray(call(model, inputs), np.float64)
    log_sum = np.log(np.sum(np.exp(logits), axis=-1))
    own = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    loss = nnx.jit(lambda model: model.loss(inputs, targets))
    for chunk in (None, 1, 5):
        model.config = change(model.config, loss_chunk=chunk)
        # 16 tokens in another order, each the difference of two numbers after some roundings.
        bound = 32 * U * np.mean(np.abs(log_sum) + np.abs(own))
        assert float(loss(model)) == pytest.approx(np.mean(log_sum - own), abs=bound)


def test_a_quantised_head_takes_all_tokens_at_once():
    every = change(FP4, skip=())
    model = make(recipe=every, scale=8)
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    loss = nnx.jit(lambda model: model.loss(inputs, targets))
    expected = jax.jit(
        lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
    )
    logits = call(make(recipe=every, scale=8), inputs)
    assert float(loss(model)) == pytest.approx(float(expected(logits)), rel=32 * U)
    assert np.all(np.isfinite(model.lm_head.lo[...]))  # it has calibrated
    model.config = change(model.config, loss_chunk=15)
    with pytest.raises(ValueError, match="loss_chunk=15 with 16 tokens and a quantised lm_head"):
        model.loss(inputs, targets)
    model.config = change(model.config, loss_chunk=16)
    loss(model)


# --------------------------------------------------------------------------------- parameters

AXES = {
    "embed.embedding": ("vocab", "embed"),
    "layers.attention_norm.scale": ("layers", "embed"),
    "layers.attention.qkv_proj.kernel": ("layers", "embed", "heads"),
    "layers.attention.o_proj.kernel": ("layers", "heads", "embed"),
    "layers.mlp_norm.scale": ("layers", "embed"),
    "layers.mlp.gate_up_proj.kernel": ("layers", "embed", "mlp"),
    "layers.mlp.down_proj.kernel": ("layers", "mlp", "embed"),
    "norm.scale": ("embed",),
    "lm_head.kernel": ("embed", "vocab"),
}


def parameters(name, recipe="fp4"):
    """Shapes of the parameters of a named size, made without memory, and their metadata."""
    model = nnx.eval_shape(lambda: Llama(MODELS[name], recipe, rngs=nnx.Rngs(0)))
    return {".".join(path): v for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("llama5m", 4.484e6),
        ("llama60m", 58.1e6),
        ("llama130m", 134e6),
        ("llama400m", 393e6),
        ("llama1b", 1.345e9),
        ("llama7b", 6.738e9),
        ("llama13b", 13.016e9),
    ],
)
def test_number_of_parameters(name, total):
    c = MODELS[name]
    got = sum(int(np.prod(v.shape)) for v in parameters(name).values())
    d, kv_dim = c.embed_dim, c.embed_dim // c.num_heads * c.num_kv_heads
    attention = d * d + 2 * d * kv_dim + d * d  # q, k and v, o
    layer = attention + 3 * d * c.mlp_dim + 2 * d
    assert got == c.num_layers * layer + d + (1 if c.tied_head else 2) * c.vocab_size * d
    assert got == pytest.approx(total, rel=2e-3)
    named = float(name[5:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    assert got == pytest.approx(named, rel=0.35 if name == "llama1b" else 0.11)


@pytest.mark.parametrize("name", ["llama5m", "llama13b"])
def test_every_parameter_names_its_axes(name):
    c, found = MODELS[name], parameters(name)
    sizes = {
        "layers": {c.num_layers},
        "vocab": {c.vocab_size},
        "embed": {c.embed_dim},
        "heads": {c.embed_dim, c.head_dim * (c.num_heads + 2 * c.num_kv_heads)},
        "mlp": {c.mlp_dim, 2 * c.mlp_dim},
    }
    expected = {k: v for k, v in AXES.items() if k != "lm_head.kernel" or not c.tied_head}
    assert {path: v.get_metadata("out_sharding") for path, v in found.items()} == expected
    for v in found.values():
        axes = v.get_metadata("out_sharding")
        assert len(axes) == len(v.shape) and v.dtype == jnp.float32
        assert all(n in sizes[a] for n, a in zip(v.shape, axes, strict=True))


def initial(config, recipe="fp4", seed=0):
    return Llama(config, recipe, rngs=nnx.Rngs(seed))


def test_initial_values():
    config = change(TINY, embed_dim=64, mlp_dim=160, num_layers=4, vocab_size=256)
    state = nnx.to_flat_state(nnx.state(initial(config), nnx.Param))
    values = {".".join(path): np.asarray(v[...]) for path, v in state}
    for path, v in values.items():
        if path.endswith("scale"):
            assert np.all(v == 1)
            continue
        small = "o_proj" in path or "down_proj" in path
        std = INIT_STD / np.sqrt(2 * config.num_layers) if small else INIT_STD
        # Within four standard errors: of a deviation 1 / sqrt(2 n), of a mean 1 / sqrt(n).
        assert np.std(v) == pytest.approx(std, rel=4 / np.sqrt(2 * v.size)), path
        assert abs(np.mean(v)) < 4 * std / np.sqrt(v.size)
        if path.startswith("layers"):
            assert all(np.any(v[i] != v[j]) for i in range(4) for j in range(i))
    other = initial(config, seed=1)
    assert np.any(other.embed.embedding[...] != values["embed.embedding"])


def test_a_tied_head_is_the_embedding():
    tied, untied = make(change(TINY, tied_head=True)), make()
    assert tied.lm_head is None and "lm_head" not in nnx.state(tied)
    assert untied.lm_head.kernel.shape == (32, 64)
    before = call(tied, TOKENS)
    unused = next(i for i in range(64) if i not in TOKENS)
    for model in (tied, untied):
        model.embed.embedding[...] = model.embed.embedding[...].at[unused].multiply(3)
    after = call(tied, TOKENS)
    # Sums of 32 terms, each three times what it was but for a rounding.
    bound = 32 * U * np.abs(after).max()
    np.testing.assert_allclose(after[..., unused], 3 * before[..., unused], rtol=0, atol=bound)
    rest = np.arange(64) != unused
    np.testing.assert_array_equal(after[..., rest], before[..., rest])
    np.testing.assert_array_equal(call(untied, TOKENS), call(make(), TOKENS))


# -------------------------------------------------------------------------------------- recipes


def test_embedding_and_head_are_not_quantised_unless_asked():
    def quantised(recipe):
        return {
            ".".join(path): layer.recipe
            for path, layer in nnx.iter_modules(nnx.eval_shape(lambda: initial(TINY, recipe)))
            if isinstance(layer, Linear)
        }

    blocks = {
        f"layers.{name}"
        for name in ("attention.qkv_proj", "attention.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }
    assert quantised("fp4") == dict.fromkeys(blocks, RECIPES["fp4"])
    assert quantised("bf16") == {}
    every = change(FP4, skip=())
    assert quantised(every) == dict.fromkeys({*blocks, "lm_head"}, every)
    assert set(quantised(change(FP4, skip=("*mlp*",)))) == {*sorted(blocks)[:2], "lm_head"}


def test_recipes_share_initial_values():
    """Two recipes are compared from the same start."""
    one, other = (nnx.to_pure_dict(nnx.state(initial(TINY, r), nnx.Param)) for r in ("bf16", "fp4"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_fp4_overfits_a_batch():
    model = initial(TINY)
    optimizer = nnx.Optimizer(model, optax.adam(0.02), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: loss_of(m, TOKENS))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[0] == pytest.approx(np.log(64), abs=0.05)  # knows nothing yet
    assert losses[-1] < 0.5


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "tokens",
    [
        np.zeros(3, np.int32),
        np.zeros((1, 2, 3), np.int32),
        np.zeros((2, 3), np.float32),
        np.zeros((2, 0), np.int32),
    ],
    ids=["vector", "three axes", "floats", "none"],
)
def test_errors_describe_the_tokens(tokens):
    with pytest.raises(ValueError, match=r"tokens is (int32|float32)\[.*\]; expected \[b, s\] int"):
        make()(tokens)
    with pytest.raises(
        ValueError, match=r"targets is (int32|float32)\[.*\]; expected \[b, s\] int"
    ):
        make().loss(TOKENS, tokens)


def test_a_list_is_no_array_of_tokens():
    for name, arguments in (("tokens", ([[1]], TOKENS)), ("targets", (TOKENS, [[1]]))):
        with pytest.raises(ValueError, match=rf"{name} is a list; expected an array \[b, s\]"):
            make().loss(*arguments)


@pytest.mark.parametrize("recipe", ["bf16", "fp4"])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32])
def test_what_is_no_token_is_nan_and_no_other_token(recipe, dtype):
    """Negative ids, such as a loader's padding, would count from the vocabulary's end."""
    model = make(recipe=recipe)
    tokens = TOKENS.astype(dtype)
    assert np.all(np.isfinite(call(model, tokens)))
    for wrong in {np.iinfo(dtype).min, np.iinfo(dtype).max, -1} - {0}:
        with np.errstate(over="ignore"):
            tokens[0, 1] = np.int64(wrong).astype(dtype)
        assert np.all(np.isnan(call(model, tokens)[0, 1]))


@pytest.mark.parametrize("recipe", [FP4, change(FP4, skip=())], ids=["plain", "quantised head"])
def test_targets_are_the_tokens_own(recipe):
    model = make(recipe=recipe)
    for other in (TOKENS[:, :1], TOKENS[:1], TOKENS.T, TOKENS.reshape(1, -1)):
        with pytest.raises(
            ValueError, match=r"targets has shape .* and tokens .*; expected the same"
        ):
            model.loss(TOKENS, other)


def test_an_unknown_recipe_is_an_error():
    with pytest.raises(ValueError, match="recipe='fp5'"):
        initial(TINY, "fp5")


@pytest.mark.parametrize(
    ("names", "rows"), [(sharding.AXES, 4), (sharding.AXES, 3), (("x", "y", "z"), 3)]
)
def test_a_mesh_divides_the_sequences_or_says_that_it_does_not(names, rows):
    model = make()
    tokens = jax.ShapeDtypeStruct((rows, 8), jnp.int32)
    mesh = AbstractMesh((2, 2, 1), names, axis_types=(AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        if names == sharding.AXES and rows % 4:
            with pytest.raises(ValueError, match=r"tokens has 3 sequences, which .* divides by 4"):
                jax.eval_shape(model, tokens)
        else:
            assert jax.eval_shape(model, tokens).shape == (rows, 8, TINY.vocab_size)
