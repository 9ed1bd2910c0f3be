"""Layers of several axes: those of a matrix, and what Flax's attention has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jfp4
from jfp4.nn import Linear, LinearGeneral, convert
from jfp4.recipe import Recipe

SHAPES = [(16, (4, 6)), ((4, 4), 24), ((4, 4), (2, 3, 4)), (16, 24)]


def pair(contracted, features, **kwargs):
    """A layer of these axes and one of the matrix, of the same parameters, in bfloat16."""
    contracted, features = (
        axes if isinstance(axes, tuple) else (axes,) for axes in (contracted, features)
    )
    general = LinearGeneral(
        contracted, features, axis=tuple(range(-len(contracted), 0)), rngs=nnx.Rngs(0), **kwargs
    )
    matrix = Linear(int(np.prod(contracted)), int(np.prod(features)), rngs=nnx.Rngs(0), **kwargs)
    general.bias[...] = jnp.arange(general.bias[...].size, dtype=jnp.float32).reshape(features)
    matrix.kernel[...] = general.kernel[...].reshape(matrix.kernel.shape)
    matrix.bias[...] = general.bias[...].reshape(-1)
    return general, matrix, contracted, features


@pytest.mark.parametrize(("contracted", "features"), SHAPES, ids=str)
@pytest.mark.parametrize(
    "recipe", ["fp4", "bf16", Recipe(occ_alpha=0.95, x_shift="mean")], ids=["fp4", "bf16", "mean"]
)
def test_it_is_the_layer_of_the_matrix(contracted, features, recipe):
    general, matrix, contracted, features = pair(contracted, features, recipe=recipe)
    x = jax.random.normal(jax.random.key(1), (3, 5, *contracted))
    dy = jax.random.normal(jax.random.key(2), (3, 5, *features))

    def loss(layer, x, dy):
        return jnp.sum(layer(x) * dy)

    flat = x.reshape(3, 5, -1), dy.reshape(3, 5, -1)
    gradients = nnx.grad(loss, argnums=(0, 1))
    if recipe != "bf16":
        general.prepare()
        matrix.prepare()
    (dlayer, dx), (dmatrix, dflat) = gradients(general, x, dy), gradients(matrix, *flat)
    assert dlayer["kernel"][...].shape == (*contracted, *features) and dx.shape == x.shape
    for one, other in zip(jax.tree.leaves((dlayer, dx)), jax.tree.leaves((dmatrix, dflat)),
                          strict=True):  # fmt: skip
        np.testing.assert_array_equal(one.reshape(other.shape), other)
    for layer in (general, matrix):
        layer.eval()
    y = general(2 * x)
    assert y.shape == dy.shape
    np.testing.assert_array_equal(y.reshape(flat[1].shape), matrix(2 * flat[0]))


def test_attention_is_converted():
    def made():
        return nnx.MultiHeadAttention(num_heads=2, in_features=16, decode=False, rngs=nnx.Rngs(0))

    model = made()
    kernel = model.query.kernel
    assert convert(model, "fp4") is model and model.query.kernel is kernel
    names = ("query", "key", "value", "out")
    assert all(type(getattr(model, name)) is LinearGeneral for name in names)
    x = jax.random.normal(jax.random.key(0), (2, 8, 16))
    calls = []
    whole = jfp4.nn.linear

    def counted(x, w, *args, **kwargs):
        calls.append((x.shape, w.shape))
        return whole(x, w, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jfp4.nn, "linear", counted)
        y = model(x)
    assert calls == [((2, 8, 16), (16, 16))] * 4 and np.any(y != made()(x))
    convert(model, "bf16")
    np.testing.assert_array_equal(model(x), made()(x))


@pytest.mark.parametrize(
    "argument",
    [{"axis": -2}, {"axis": 1}, {"axis": -1, "batch_axis": {0: 3}}],
    ids=str,
)
def test_other_axes_are_refused_by_name(argument):
    words = r"axis=\(.*\), batch_axis=\{.*\}; expected the last axes, \(-1,\), and no batch_axis$"
    with pytest.raises(ValueError, match=f"^{words}"):
        LinearGeneral(4, 8, rngs=nnx.Rngs(0), **argument)

    class Model(nnx.Module):
        def __init__(self):
            self.inner = nnx.LinearGeneral(4, 8, rngs=nnx.Rngs(0), **argument)

    model = Model()
    with pytest.raises(ValueError, match=f"^inner: {words}"):
        convert(model, "fp4")
    assert type(model.inner) is nnx.LinearGeneral
    convert(model, "bf16")  # which is what it was


def test_an_input_of_another_shape_is_refused():
    general, *_ = pair((4, 4), 24)
    for shape in ((3, 16), (4,), (3, 4, 5)):
        with pytest.raises(ValueError, match=r"inputs has shape .*; expected \[..., 4, 4\]"):
            general(jnp.ones(shape))
