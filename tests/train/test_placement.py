"""Where the state's leaves lie, and what is refused; on meshes that need no devices."""

import dataclasses
from itertools import islice

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jfp4.models.config import MODELS
from jfp4.sharding import AXES
from train.batches import batches
from train.config import OptimizerConfig, TrainConfig
from train.errors import UserError
from train.placement import Placement, check, place
from train.step import Trainer


def placement(*sizes):
    return Placement(AbstractMesh(sizes, AXES))


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


@pytest.fixture(scope="module")
def large():
    """llama13b with narrow moments, which no machine of the tests could hold."""
    optimizer = OptimizerConfig(first_moment="e4m3", second_moment="float16")
    config = TrainConfig(model="llama13b", llama=MODELS["llama13b"], optimizer=optimizer)
    return config, jax.eval_shape(Trainer(config).init)


def test_the_optimizers_state_lies_as_its_weight(large):
    _, state = large
    shardings = by_path(placement(1, 8, 8).state(state))
    kernel = "layers/mlp/down_proj/kernel/value"
    rows = P(None, ("tensor", "fsdp"), None)
    assert shardings[f"params/{kernel}"].spec == rows
    for moment in ("mu", "nu"):
        for part in ("codes", "exponents"):
            assert shardings[f"opt_state/inner_state/1/0/{moment}/{kernel}/{part}"].spec == rows
    assert shardings["params/norm/scale/value"].spec == P()
    assert shardings["step"].spec == P()


def test_exponents_that_are_too_few_are_whole(large):
    _, state = large
    shardings = by_path(placement(1, 1, 64).state(state))
    kernel = "opt_state/inner_state/1/0/mu/layers/mlp/gate_up_proj/kernel/value"
    # 27,648 columns: 64 parts of 432, but 216 blocks.
    assert shardings[f"{kernel}/codes"].spec == P(None, "fsdp", "tensor")
    assert shardings[f"{kernel}/exponents"].spec == P(None, "fsdp")


def test_a_device_of_64_holds_a_64th(large):
    _, state = large
    for sizes in ((1, 64, 1), (1, 8, 8)):
        shardings = placement(*sizes).state(state)
        held = jax.tree.map(lambda leaf, s: np.prod(s.shard_shape(leaf.shape)), state, shardings)
        total = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(state))
        assert 1 / 64 <= sum(jax.tree.leaves(held)) / total < 1.01 / 64


def test_a_weight_that_is_whole_is_named(large):
    _, state = large
    placed = placement(1, 8, 1)
    shardings = placed.state(state)
    placed.check_divided(state, shardings)
    whole = NamedSharding(placed.mesh, P())
    wrong = jax.tree_util.tree_map_with_path(
        lambda path, s: whole if "qkv_proj" in str(path) and "params" in str(path) else s, shardings
    )
    with pytest.raises(UserError) as refusal:
        placed.check_divided(state, wrong)
    name = "params/layers/attention/qkv_proj/kernel/value [40, 5120, 15360]"
    assert f"whole on every device along fsdp=8 are {name}; expected" in str(refusal.value)


def test_a_model_that_the_mesh_does_not_divide():
    llama = dataclasses.replace(MODELS["llama60m"], num_kv_heads=2)
    with pytest.raises(UserError, match=r"model\.num_kv_heads=2; expected a multiple of .*=4"):
        check(placement(1, 1, 4), llama, 8)
    small = dict(vocab_size=50257, embed_dim=8, num_heads=2, num_kv_heads=2)
    odd = TrainConfig(llama=dataclasses.replace(MODELS["llama60m"], **small))
    with pytest.raises(UserError) as refusal:
        placement(1, 16, 1).state(jax.eval_shape(Trainer(odd).init))
    assert "mesh=data=1,fsdp=16,tensor=1: embed.embedding has axes vocab 50257, embed 8" in str(
        refusal.value
    )


def test_a_batch_that_the_mesh_does_not_divide():
    with pytest.raises(UserError, match=r"accumulation=6; expected .* data x fsdp, 4"):
        check(placement(2, 2, 1), MODELS["llama60m"], 6)


def test_a_mesh_of_other_devices_than_there_are():
    with pytest.raises(UserError, match=r"mesh='fsdp=3' has 3 devices and there are"):
        place("fsdp=3", MODELS["llama60m"], 6)


def test_parts_of_a_batch_make_up_the_batch():
    tokens = np.arange(1000)
    arguments = dict(seq_len=4, batch_size=6, seed=3, start_step=5)
    whole = islice(batches(tokens, **arguments), 60)
    parts = [batches(tokens, **arguments, rows=rows) for rows in ([0, 1], [2, 3, 4], [5])]
    for batch, *rows in zip(whole, *parts, strict=False):
        np.testing.assert_array_equal(np.concatenate(rows), batch)


def test_rows_are_put_where_they_belong():
    one = Placement()
    assert one.rows(6) == list(range(6))
    batch = np.arange(24, dtype=np.int32).reshape(6, 4)
    np.testing.assert_array_equal(one.put(batch, 6), batch)
