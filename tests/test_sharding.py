"""The mesh's flag, and the table from logical axes to its axes."""

import pytest
from jax.sharding import PartitionSpec as P

from jfp4.sharding import AXES, mesh_shape, parse_mesh, weight_spec

SIZES = {"data": 2, "fsdp": 4, "tensor": 8}


def test_sizes_and_the_rest():
    assert parse_mesh("data=2, fsdp=-1") == {"data": 2, "fsdp": -1}
    assert mesh_shape(parse_mesh("fsdp=4,data=2,tensor=2"), 16) == (2, 4, 2)
    assert mesh_shape(parse_mesh("data=2,fsdp=-1"), 16) == (2, 8, 1)
    assert mesh_shape({}, 1) == (1, 1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("expert=2", "'expert=2' in 'expert=2'; expected AXIS=SIZE of data, fsdp, tensor"),
        ("data", "'data' in 'data'; expected AXIS=SIZE"),
        ("data=2,data=4", "data twice in 'data=2,data=4'"),
        ("data=0", "'data=0' in 'data=0'; expected a positive size, or -1"),
        ("data=two", "expected a positive size, or -1"),
        ("data=--1", "expected a positive size, or -1"),
        ("data=²", "expected a positive size, or -1"),
        ("data=-1,fsdp=-1", "'data=-1,fsdp=-1' has more than one -1"),
    ],
)
def test_a_mesh_that_is_none(text, message):
    with pytest.raises(ValueError) as refusal:
        parse_mesh(text)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "devices", "message"),
    [
        ("data=2,fsdp=4", 16, "'data=2,fsdp=4' has 8 devices and there are 16"),
        ("data=3,fsdp=-1", 8, "'data=3,fsdp=-1' has 3 devices or a multiple and there are 8"),
    ],
)
def test_other_devices_than_there_are(text, devices, message):
    with pytest.raises(ValueError) as refusal:
        mesh_shape(parse_mesh(text), devices)
    assert message in str(refusal.value)


def test_an_axis_that_there_is_not():
    with pytest.raises(ValueError, match="axis 'model' is unknown; expected data, fsdp, tensor"):
        mesh_shape({"data": 4, "model": 2}, 4)


@pytest.mark.parametrize(
    ("names", "shape", "spec"),
    [
        (("vocab", "embed"), (512, 64), P(("tensor", "fsdp"), None)),
        (("embed", "vocab"), (64, 512), P("fsdp", "tensor")),
        (("layers", "embed", "heads"), (3, 64, 192), P(None, "fsdp", "tensor")),
        (("layers", "heads", "embed"), (3, 64, 64), P(None, ("tensor", "fsdp"), None)),
        (("layers", "embed"), (3, 64), P()),
        (("embed",), (64,), P()),
        # Rows that eight times four do not divide: fsdp divides the columns.
        (("vocab", "embed"), (24, 64), P("tensor", "fsdp")),
    ],
)
def test_a_weights_axes(names, shape, spec):
    found = weight_spec(names, shape, SIZES)
    # However a single axis is written, by itself or in a tuple.
    assert [a if isinstance(a, tuple) or a is None else (a,) for a in found] == [
        a if isinstance(a, tuple) or a is None else (a,) for a in spec
    ]


def test_a_weight_that_is_not_divided():
    with pytest.raises(ValueError) as refusal:
        weight_spec(("vocab", "embed"), (250, 64), SIZES)
    message = "axes vocab 250, embed 64 under data=2, fsdp=4, tensor=8; expected lengths"
    assert message in str(refusal.value)


def test_layers_are_never_divided():
    for axis in AXES:
        sizes = dict.fromkeys(AXES, 1) | {axis: 2}
        assert weight_spec(("layers", "embed", "mlp"), (2, 64, 64), sizes)[0] is None
