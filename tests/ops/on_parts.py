"""Operations on meshes of eight devices, as a program of its own: it needs as many.

Prints a JSON object: of layers, in how many places values and their gradient differ from those of
one device, and how far the weights' gradients do, in units of what they may; of operations, what
the divided program sends, and in how many places each result differs.
"""

import contextlib
import functools
import json
import math
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jfp4
from jfp4.models.embedding import look_up
from jfp4.models.head import loss_of_parts
from jfp4.ops import ffi
from jfp4.ops.cross_entropy import cross_entropy
from jfp4.ops.exchange import sum_of_parts
from jfp4.ops.outliers import thresholds
from jfp4.ops.quantize import quantize_both, quantize_gradient
from jfp4.ops.rms_norm import rms_norm, rms_norm_of_stream
from jfp4.ops.slices import Slices
from jfp4.qtensor import PackedQTensor
from train.collectives import collectives
from train.rehearsal import partitioned

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
M, K, N = 512, 64, 128
RECIPES = {
    "fp4": jfp4.Recipe(occ_sample=1000),
    "exact": jfp4.Recipe(occ_sample=None, grad_format="e4m3"),
    "fp8": jfp4.RECIPES["fp8"],
    "tensor": jfp4.Recipe(x_scale="tensor", w_scale="tensor"),
}

rng = np.random.default_rng(0)
# Magnitudes over four binades: scales differ, and a wrong one shows.
x = jnp.asarray(rng.normal(size=(M, K)) * 2.0 ** rng.integers(-2, 3, (M, 1)), jnp.bfloat16)
w1 = jnp.asarray(rng.normal(size=(K, N)) * 2.0 ** rng.integers(-2, 3, (1, N)), jnp.float32)
w2 = jnp.asarray(rng.normal(size=(N, K)), jnp.float32)
dy = jnp.asarray(rng.normal(size=(M, N)), jnp.bfloat16)


def two_layers(recipe):
    """Column parallel, then row parallel: as the MLP of a Llama."""

    def loss(x, w1, w2, dz):
        z = jfp4.linear(jax.nn.relu(jfp4.linear(x, w1, recipe)), w2, recipe)
        return jnp.sum((z * dz).astype(jnp.float32)), z

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)


def make_mesh(sizes, kind=AxisType.Auto):
    return jax.make_mesh(sizes, AXES, (kind,) * 3)


def places(mesh):
    batch, columns, rows = P(BATCH), P("fsdp", "tensor"), P(("tensor", "fsdp"))
    return [NamedSharding(mesh, spec) for spec in (batch, columns, rows, batch)]


def differences(found, wanted):
    """In how many places two trees differ, a leaf at a time; NaN is equal to itself."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    arrays = [[np.asarray(a, np.float32) for a in pair] for pair in pairs]
    return [int((a != b)[~(np.isnan(a) & np.isnan(b))].sum()) for a, b in arrays]


def bounds():
    """What dw1 and dw2 may differ by where their float32 sums are in another order.

    Any two orders of t terms differ by at most ``2 (t - 1)`` units roundoff of the sum of their
    magnitudes. Rounding to nearest at most doubles a magnitude, of either factor, and the
    estimator's slope is at most 3.
    """
    wide = [np.asarray(a, np.float64) for a in (x, w1, w2, dy[:, :K])]
    hidden = np.maximum(wide[0] @ wide[1], 0)
    back = np.abs(wide[3]) @ np.abs(wide[2]).T
    sums = [np.abs(wide[0]).T @ back, hidden.T @ np.abs(wide[3])]
    return [2 * (M - 1) * 2.0**-24 * 2 * 2 * 3 * s for s in sums]


def layers(results, backend):
    """Values and gradients of two layers, wherever arrays lie and whoever decides it."""
    for name, recipe in RECIPES.items():
        of_recipe(results, backend, name, recipe, every_mode=name == "fp4")


def of_recipe(results, backend, name, recipe, *, every_mode):
    operands = x, w1, w2, dy[:, :K]
    step = two_layers(recipe)
    (_, z), (dx, *dws) = jax.jit(step)(*operands)

    def run(case, mesh, fn, arrays):
        with jfp4.backend(backend), jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            (_, found_z), (found_dx, *found_dws) = jax.jit(fn)(*arrays)
        off = [
            float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)) / bound))
            for a, b, bound in zip(found_dws, dws, bounds(), strict=True)
        ]
        results[f"{name}, {case}"] = differences((found_z, found_dx), (z, dx)), off

    def put(mesh, arrays):
        with jax.set_mesh(mesh):
            return [jax.device_put(a, p) for a, p in zip(arrays, places(mesh), strict=True)]

    mesh = make_mesh((2, 2, 2))
    run("automatic", mesh, step, put(mesh, operands))
    if not every_mode:
        return
    run("no mesh in force", None, step, put(mesh, operands))
    run("placed nowhere", mesh, step, [np.asarray(a) for a in operands])

    def second_of_two(*arrays):
        return jax.tree.map(lambda a: a[1], jax.vmap(step)(*arrays))

    apart = [NamedSharding(mesh, P(None, *place.spec)) for place in places(mesh)]
    twice = [jax.device_put(jnp.stack([a, a]), p) for a, p in zip(operands, apart, strict=True)]
    run("vmap", mesh, second_of_two, twice)

    mesh = make_mesh((2, 2, 2), AxisType.Explicit)
    run("explicit", mesh, step, put(mesh, operands))
    run("explicit, no mesh in force", None, step, put(mesh, operands))
    weights_alone = [np.asarray(operands[0]), *put(mesh, operands)[1:]]
    run("explicit, no mesh in force, x nowhere", None, step, weights_alone)

    # In a caller's own shard_map every shard is a tensor: so each is given the same rows.
    mesh = make_mesh((8, 1, 1))
    eight = [jnp.concatenate([a] * 8) for a in (x, dy[:, :K])]
    for checked in (False, True):

        def own(x, w1, w2, dz, checked=checked):
            (loss, z), (dx, *dws) = step(x, w1, w2, dz)
            if checked:  # the gradient of what all shards share is their sum
                dws = [jax.lax.pcast(dw / 8, "data", to="varying") for dw in dws]
            return jax.tree.map(lambda a: a[None], ((loss, z), (dx, *dws)))

        specs = {"in_specs": (P("data"), P(), P(), P("data")), "out_specs": P("data")}
        mapped = jax.shard_map(own, mesh=mesh, check_vma=checked, **specs)

        def last(x, w1, w2, dz, mapped=mapped):
            return jax.tree.map(lambda a: a[7], mapped(x, w1, w2, dz))

        run(f"shard_map, checked {checked}", None, last, [eight[0], w1, w2, eight[1]])


def operations(results, backend):
    """What each operation sends, and that it gives what one device does."""
    a, (b, _) = jfp4.quantize(x, 1), quantize_both(w1, 0)
    packed = PackedQTensor.pack(b, axis=0)
    mesh = make_mesh((2, 2, 2))
    nothing = P()

    def run(case, fn, specs, out, *arrays):
        wanted = jax.jit(fn)(*arrays)
        leaves, tree = jax.tree.flatten(arrays)
        put = [
            jax.device_put(leaf, NamedSharding(mesh, s))
            for leaf, s in zip(leaves, specs, strict=True)
        ]
        out = jax.tree.map(lambda s: NamedSharding(mesh, s), out)
        with jfp4.backend(backend), jax.set_mesh(mesh):
            jitted = jax.jit(
                lambda *leaves: fn(*jax.tree.unflatten(tree, leaves)), out_shardings=out
            )
            lowered = jitted.lower(*put)
            sent = collectives(partitioned(lowered))
            found = lowered.compile()(*put)
        results[case] = [[c.kind, c.bytes, len(c.group)] for c in sent], differences(found, wanted)

    gemm = functools.partial(jfp4.gemm, out_dtype=jnp.bfloat16)
    both = P(BATCH)
    run("gemm, data", gemm, (both, both, nothing, nothing), both, a, b)
    columns = P(None, "tensor")
    run("gemm, columns", gemm, (nothing, nothing, columns, columns), columns, a, b)
    run("gemm, rows", gemm, (columns, nothing, P("tensor"), nothing), nothing, a, b)
    run("gemm, fsdp", gemm, (both, both, P("fsdp", "tensor"), columns), P(BATCH, "tensor"), a, b)
    run(
        "gemm, fsdp, packed",
        gemm,
        (both, both, P("tensor", "fsdp"), columns),
        P(BATCH, "tensor"),
        a,
        packed,
    )
    run(
        "gemm, rows, packed",
        gemm,
        (columns, nothing, P(None, "tensor"), nothing),
        nothing,
        a,
        packed,
    )
    t, g = jfp4.quantize(x, 1).T.unscaled(), jfp4.quantize(dy, 0, format="e4m3")
    run("gemm, gradient", gemm, (P(None, BATCH), nothing, both, nothing), P("fsdp"), t, g)
    run("gemm, gradient, whole", gemm, (P(None, BATCH), nothing, both, nothing), nothing, t, g)
    run("quantize, data", lambda x: quantize_both(x, 1), (both,), None, x)
    run("quantize, tensor", lambda x: quantize_both(x, 1), (P(BATCH, "tensor"),), None, x)
    run(
        "gradient",
        lambda *v: quantize_gradient(*v, format="e5m2"),
        (both, nothing, both),
        None,
        dy,
        jnp.ones((1, N)),
        jnp.ones((M, 1)),
    )
    run("thresholds", lambda x: thresholds(x, sample=1000), (P(BATCH, "tensor"),), None, x)
    broken = x.at[100, 3].set(jnp.nan)
    run(
        "thresholds, NaN", lambda x: thresholds(x, sample=None), (P(BATCH, "tensor"),), None, broken
    )

    # Of numbers whose sums are exact, in any order.
    def norm(x, added, scale, dy):
        y, vjp = jax.vjp(lambda *v: rms_norm_of_stream(v[:2], v[2], epsilon=0.0), x, added, scale)
        return y, vjp((dy, dy))

    signs, whole_dy = jnp.sign(x), jnp.round(dy[:, :K])
    specs = (both, both, nothing, both)
    run("norm", norm, specs, None, 2 * signs, -signs, jnp.ones(K), whole_dy)

    # What nobody divides is gathered, in silence.
    one = jnp.ones((1, 1), jnp.float32)

    def bare(a, b):
        return ffi.gemm(a.codes, one, b.codes.T, one, out_dtype=jnp.float32)

    if backend != "xla":
        run("a bare call", bare, (both, both, nothing, nothing), both, a, b)


def explicit(results, backend):
    """Operations on explicit axes along which plain JAX computes too; every sum is exact."""
    mesh = make_mesh((2, 2, 2), AxisType.Explicit)
    whole_dy = np.round(np.asarray(dy, np.float32))

    def norm(x, scale):
        return rms_norm(x, scale, epsilon=0.0)

    def stream(x, scale):
        return rms_norm_of_stream((2 * x, -x), scale, epsilon=0.0)

    def gradients(fn, argnums):
        def loss(*arrays):
            return sum(jnp.sum(y * whole_dy[:, : y.shape[1]]) for y in jax.tree.leaves(fn(*arrays)))

        return jax.grad(loss, argnums)

    def run(case, fn, specs, *arrays):
        wanted = jax.jit(fn)(*arrays)
        put = [
            jax.device_put(a, NamedSharding(mesh, spec))
            for a, spec in zip(arrays, specs, strict=True)
        ]
        with jfp4.backend(backend):
            results[f"{case}, no mesh in force"] = differences(jax.jit(fn)(*put), wanted)
            with jax.set_mesh(mesh):
                results[case] = differences(jax.jit(fn)(*put), wanted)

    for name, fn in (("norm", norm), ("stream", stream)):
        operands = jnp.sign(x), jnp.ones(K)
        of_both = gradients(fn, (0, 1))
        run(f"{name}, columns divided", of_both, (P("data", "tensor"), P()), *operands)
        run(f"{name}, scale divided", of_both, (P("data"), P("tensor")), *operands)

    def layer(x, w, bias):
        return jfp4.linear(x, w, "fp4", bias=bias)

    def gradient(x, w, dy):
        return jax.vjp(lambda w: jfp4.linear(x, w, "fp4"), w)[1](dy)[0]

    for kind in (AxisType.Auto, AxisType.Explicit):
        each = make_mesh((2, 2, 2), kind)
        at = [
            NamedSharding(each, spec)
            for spec in (P(BATCH), P("fsdp", "tensor"), P(BATCH, "tensor"))
        ]
        put = [jax.device_put(a, place) for a, place in zip((x, w1, dy), at, strict=True)]
        with jfp4.backend(backend), jax.set_mesh(each):
            lowered = jax.jit(gradient, out_shardings=at[1]).lower(*put)
        sent = [[c.kind, c.bytes, len(c.group)] for c in collectives(partitioned(lowered))]
        results[f"gradient, {kind.name}"] = sorted(sent)

    specs = P("data"), P(None, "tensor"), P()
    run("bias of columns", gradients(layer, (0, 2)), specs, x, w1, jnp.ones(N))

    def experts(x):
        return jax.vmap(functools.partial(thresholds, sample=1000))(x)

    run("thresholds of experts", experts, (P("data"),), jnp.stack([x, 2 * x, -x, x]))

    # Without a slope, which kernels round in each part. XLA's CPU sums no bfloat16 in a shard_map.
    exact = jfp4.Recipe(occ_sample=1000, dge_k=None)

    def of_expert(x, w, dy):
        return jax.vjp(lambda w: jfp4.linear(x, w, exact), w)[1](dy)[0]

    specs = P("data", "fsdp"), P("data", "fsdp", "tensor"), P("data", "fsdp", "tensor")
    of_all = (jnp.sign(x), w1, jnp.sign(dy))
    of_each = [jnp.stack([a, 2 * a, -a, a]).astype(jnp.float32) for a in of_all]
    run("gradients of experts", jax.vmap(of_expert), specs, *of_each)


def exchanged(results, backend):
    """Gradients summed in each way: how far off, in units of what they may be, and what is sent."""
    mesh, parts, rows, columns = make_mesh((2, 2, 2)), 4, 64, 512
    stack = rng.normal(size=(parts, rows, columns)) * 2.0 ** rng.integers(
        -12, 3, (1, rows, columns)
    )
    stack = np.asarray(stack, np.float32)

    def off(x):
        """What quantising may do to each element."""
        scale = np.max(np.abs(x), axis=-1, keepdims=True) / 448
        return np.maximum(np.abs(x) * 2.0**-4, scale * 2.0**-10)

    def worst(*partial_sums):
        """What adding such sums, quantised, may do; and what float32 does besides."""
        return sum(off(x) for x in partial_sums) + 2.0**-20 * sum(np.abs(x) for x in partial_sums)

    wide = stack.astype(np.float64)
    # Over all four at once, and once more where the sum is gathered; or first over fsdp, to each of
    # two its rows, and then over data. A sum that is quantised may itself be off.
    whole = worst(*wide)
    fsdp = [worst(*wide[i : i + 2]) for i in (0, 2)]
    pairs = [np.abs(wide[i : i + 2].sum(0)) + own for i, own in zip((0, 2), fsdp, strict=True)]
    scattered = sum(fsdp) + worst(*pairs)
    cases = {
        "whole": (P(), whole + off(np.abs(wide.sum(0)) + whole)),
        "scattered": (P("fsdp"), scattered + off(np.abs(wide.sum(0)) + scattered)),
    }
    put = jax.device_put(stack, NamedSharding(mesh, P(BATCH)))
    # Each of four parts is rounded to bfloat16, and so is each of three sums on the way.
    in_bfloat16 = 4 * 2.0**-8 * np.abs(wide).sum(0)
    for case, (spec, in_fp8) in cases.items():
        for comm in ("float32", "bfloat16", "fp8"):
            bound = in_bfloat16 if comm == "bfloat16" else in_fp8
            with jax.set_mesh(mesh), jfp4.grad_comm(comm):
                lowered = jax.jit(sum_of_parts, out_shardings=NamedSharding(mesh, spec)).lower(put)
            sent = [[c.kind, c.bytes, len(c.group)] for c in collectives(partitioned(lowered))]
            errors = np.abs(np.asarray(lowered.compile()(put), np.float64) - wide.sum(0))
            results[f"{case}, {comm}"] = sent, float(np.max(errors / bound))
    odd = rows - 2  # which four devices do not divide
    with jax.set_mesh(mesh), jfp4.grad_comm("fp8"):
        few = jax.device_put(stack[:, :odd], NamedSharding(mesh, P(BATCH)))
        found = jax.jit(sum_of_parts)(few)
    errors = np.abs(np.asarray(found, np.float64) - wide.sum(0)[:odd])
    results["odd rows"] = float(np.max(errors / cases["whole"][1][:odd]))
    broken = put.at[1, 3, 5].set(jnp.inf)
    with jax.set_mesh(mesh), jfp4.grad_comm("fp8"):
        found = np.asarray(jax.jit(sum_of_parts)(broken))
    results["infinity"] = np.isnan(found).sum(axis=1).tolist()

    # Of a layer whose gradient's columns, every other one, are 2**-20 of the others.
    def dw(x, w, dy):
        return jax.vjp(lambda w: jfp4.linear(x, w, "fp4"), w)[1](dy)[0]

    uneven = dy * jnp.asarray(2.0 ** (-20 * (np.arange(N) % 2)), dy.dtype)
    exact = np.asarray(jax.jit(dw)(x, w1, uneven), np.float64)
    mesh = make_mesh((8, 1, 1))
    by_batch, whole = NamedSharding(mesh, P(BATCH)), NamedSharding(mesh, P())
    with jax.set_mesh(mesh), jfp4.grad_comm("fp8"), jfp4.backend(backend):
        given = (jax.device_put(a, s) for a, s in ((x, by_batch), (w1, whole), (uneven, by_batch)))
        errors = np.asarray(jax.jit(dw, out_shardings=whole)(*given)) - exact
    results["uneven"] = [
        float(np.linalg.norm(errors[:, i::2]) / np.linalg.norm(exact[:, i::2])) for i in (0, 1)
    ]


def without_kernels(results, backend):
    """Gradients whose products XLA alone computes: how far off, and what is sent."""
    recipes = {
        "bfloat16": jfp4.Recipe(grad_format=None, dge_k=None, occ_sample=1000),
        "residual": jfp4.Recipe(occ_compensation="residual", dge_k=None, occ_sample=1000),
    }
    operands = [a.astype(jnp.float32) for a in (x, w1, dy)]
    wide_x, wide_w, wide_dy = (np.abs(np.asarray(a, np.float64)) for a in operands)
    # Any two orders of the sums, of which a few additions are the parts': see bounds().
    magnitudes = [(N + 4) * wide_dy @ wide_w.T, (M + 4) * wide_x.T @ wide_dy]
    allowed = [2 * 2.0**-24 * 2 * 2 * s for s in magnitudes]
    specs = P(BATCH), P(None, "tensor"), P(BATCH, "tensor")
    for name, recipe in recipes.items():

        def gradients(x, w, dy, recipe=recipe):
            return jax.vjp(lambda x, w: jfp4.linear(x, w, recipe), x, w)[1](dy)

        wanted = [np.asarray(v, np.float64) for v in jax.jit(gradients)(*operands)]
        cases = [(AxisType.Auto, comm) for comm in ("float32", "bfloat16", "fp8")]
        for kind, comm in (*cases, (AxisType.Explicit, "bfloat16")):
            mesh = make_mesh((2, 2, 2), kind)
            places = [NamedSharding(mesh, spec) for spec in specs]
            put = [jax.device_put(a, p) for a, p in zip(operands, places, strict=True)]
            with jax.set_mesh(mesh), jfp4.grad_comm(comm), jfp4.backend(backend):
                lowered = jax.jit(gradients, out_shardings=tuple(places[:2])).lower(*put)
                found = [np.asarray(v, np.float64) for v in lowered.compile()(*put)]
            sent = [[c.kind, c.bytes, len(c.group)] for c in collectives(partitioned(lowered))]
            errors = [np.abs(a - b) for a, b in zip(found, wanted, strict=True)]
            results[f"{name}, {comm}, {kind.name}"] = (
                # Besides thresholds, largest magnitudes and scales.
                [c for c in sent if c[1] >= K * N // 2],
                [float(np.max(e / bound)) for e, bound in zip(errors, allowed, strict=True)],
                float(np.linalg.norm(errors[1]) / np.linalg.norm(wanted[1])),
            )


def embedding(results):
    """The gradient of a bfloat16 table: how far off, in units of what it may be."""
    mesh, rows, width = make_mesh((2, 2, 2)), 64, 32
    draw = np.random.default_rng(2)
    ids = draw.integers(0, 6, (4, 2, 3000))  # so many places that bfloat16 would lose most of them
    given = draw.integers(1, 9, (*ids.shape, width))
    sums = np.zeros((rows, width))
    np.add.at(sums, ids, given.astype(np.float64))
    table = jnp.asarray(draw.normal(size=(rows, width)), jnp.bfloat16)
    specs = P(("tensor", "fsdp")), P(BATCH), P(BATCH)
    operands = table, jnp.asarray(ids), jnp.asarray(given, jnp.bfloat16)
    places = [NamedSharding(mesh, spec) for spec in specs]
    put = [jax.device_put(a, place) for a, place in zip(operands, places, strict=True)]

    def gradient(table, ids, dy):
        return jax.vjp(lambda table: look_up(table, ids, dy.dtype), table)[1](dy)[0]

    # The table's own rounding; one more of each part and on the way; two in E4M3.
    roundings = {"float32": 2.0**-8, "bfloat16": 4 * 2.0**-8, "fp8": 2.1 * 2.0**-4}
    for comm, bound in roundings.items():
        with jax.set_mesh(mesh), jfp4.grad_comm(comm):
            found = np.asarray(jax.jit(gradient, out_shardings=places[0])(*put), np.float64)
        results[f"embedding, {comm}"] = float(np.max(np.abs(found - sums)[:6] / sums[:6]) / bound)
        assert not found[6:].any()


def head(results):
    """The gradient of a bfloat16 head, off from float32's by so many times its own rounding."""
    mesh, d, v = make_mesh((2, 2, 2)), 32, 64
    draw = np.random.default_rng(3)
    # So that no logit is rounded, in whatever order it is added up.
    x = jnp.asarray(draw.integers(-1, 2, (4, 128, d)), jnp.bfloat16)
    w = jnp.asarray(draw.integers(-4, 5, (d, v)) / 4, jnp.bfloat16)
    targets = jnp.asarray(draw.integers(0, v, (4, 128)))
    specs = P(BATCH), P(("tensor", "fsdp")), P(BATCH)
    places = [NamedSharding(mesh, spec) for spec in specs]
    put = [jax.device_put(a, p) for a, p in zip((x, w, targets), places, strict=True)]

    def gradient(x, w, targets):
        return jax.grad(lambda w: loss_of_parts(None, x, w, targets))(w)

    def whole(w):
        return cross_entropy(x.reshape(-1, d), w, targets.reshape(-1))

    wanted = np.asarray(jax.grad(whole)(w.astype(jnp.float32)), np.float64)
    for comm in ("float32", "bfloat16"):
        with jax.set_mesh(mesh), jfp4.grad_comm(comm):
            found = np.asarray(jax.jit(gradient, out_shardings=places[1])(*put), np.float64)
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        results[f"head, {comm}"] = float(error / 2.0**-9)


def optimizer(results, backend):
    """Steps of AdamW, every kind of bits in it: in how many places each leaf differs."""
    leaves = {
        "number": ((), P()),
        "vector": ((1024,), P("tensor")),
        "matrix": ((8, 512), P(("data", "fsdp"), "tensor")),
        "stack": ((3, 16, 512), P(None, "fsdp", "tensor")),
        "four axes": ((2, 4, 6, 256), P(None, "fsdp", "tensor")),
        "slices apart": ((4, 6, 256), P("fsdp", None, "tensor")),
        "rows of any length": ((4, 6, 10), P(None, "tensor")),
        "amid a block": ((4, 384), P(None, "tensor")),
    }
    adamw = jfp4.AdamW(0.01, weight_decay=0.1, seed=3)
    draw = np.random.default_rng(1).normal
    params, *grads = (
        {name: jnp.asarray(draw(size=shape), jnp.float32) for name, (shape, _) in leaves.items()}
        for _ in range(3)
    )

    def steps(mesh, told, sliced=False):
        places = None
        if mesh:
            places = {name: NamedSharding(mesh, spec) for name, (_, spec) in leaves.items()}
        if mesh and AxisType.Explicit in mesh.axis_types:  # where the chain has to do without
            places |= dict.fromkeys(("slices apart", "amid a block"), NamedSharding(mesh, P()))

        def step(stored, state, grads, n):
            if mesh:
                grads = jax.tree.map(jax.device_put, grads, places)
            if sliced:
                grads = jax.tree.map(lambda g: Slices.of(g) if g.ndim >= 3 else g, grads)
            return adamw.step(
                stored, state, grads, seed=5, step=n, shardings=places if told else None
            )

        step = jax.jit(step)
        stored, state = jfp4.master.encode(params, "bfloat16"), adamw.init(params)
        if mesh:
            stored = jax.tree.map(jax.device_put, stored, places)
            state = jax.device_put(state, NamedSharding(mesh, P()))
        for n, g in enumerate(grads):
            stored, state, _ = step(stored, state, g, n)
        _, (adam, *_) = state.inner_state
        return {name: (stored[name], adam.mu[name], adam.nu[name]) for name in leaves}

    with jfp4.backend(backend), jax.set_mesh(jax.make_mesh((1,), AXES[:1])):
        wanted = steps(None, True)
    for case in ("told", "told, slices", "not told", "explicit", "explicit, slices"):
        of, _, sliced = case.partition(", ")
        if backend == "xla" and of == "explicit":  # whose blocks it would not make of a part
            continue
        kind = AxisType.Explicit if of == "explicit" else AxisType.Auto
        mesh = make_mesh((2, 2, 2), kind)
        with warnings.catch_warnings(record=True) as caught, jfp4.backend(backend):
            warnings.simplefilter("always")
            with jax.set_mesh(mesh):
                found = steps(mesh, of == "told", bool(sliced))
        differ = {name: max(differences(found[name], wanted[name])) for name in leaves}
        results[f"adamw, {case}"] = differ, sorted({str(warning.message) for warning in caught})

    # As many numbers as can differ: each leaf's values, or those of either of its moments.
    results["adamw numbers"] = sum(math.prod(shape) for shape, _ in leaves.values())

    # Of a stack alone: what is sent, and what is held besides what is replaced.
    mesh = make_mesh((2, 2, 2))
    place = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    stored = jax.ShapeDtypeStruct((12, 16, 512), jnp.bfloat16, sharding=place)
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=place if leaf.ndim else NamedSharding(mesh, P())
        ),
        jax.eval_shape(adamw.init, jax.ShapeDtypeStruct(stored.shape, jnp.float32)),
    )

    def step(stored, state, grad):
        return adamw.step(stored, state, grad, step=0, shardings=place)[:2]

    grad = jax.ShapeDtypeStruct(stored.shape, jnp.float32, sharding=place)
    with jax.set_mesh(mesh), jfp4.backend(backend):
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(stored, state, grad)
        sent = [[c.kind, c.bytes] for c in collectives(partitioned(lowered))]
        memory = lowered.compile().memory_analysis()
    results["adamw sends"] = sent
    results["adamw holds"] = [memory.alias_size_in_bytes, memory.temp_size_in_bytes]


def main():
    """Runs every case by the backend that is asked for."""
    results = {}
    backend = sys.argv[1]
    layers(results, backend)
    operations(results, backend)
    explicit(results, backend)
    exchanged(results, backend)
    without_kernels(results, backend)
    embedding(results)
    head(results)
    optimizer(results, backend)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
