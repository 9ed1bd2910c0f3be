"""Attention's gradients in a fixed order: what is asked of cuDNN, seen without a GPU."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from train.deterministic import fix_order_of_attention


@pytest.fixture
def lowered(monkeypatch):
    """Two equal layers of attention and their gradients, lowered for a GPU with cuDNN."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)

    def loss(x):
        for _ in range(2):
            x = jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation="cudnn")
        return jnp.sum(x.astype(jnp.float32))

    x = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)
    return jax.jit(jax.grad(loss)).trace(x).lower(lowering_platforms=("cuda",))


def configs(lowered):
    """Each call of cuDNN's, by its name and what it is told."""
    calls = re.findall(
        r'custom_call @__cudnn\$(\w+)\(.*?backend_config = "(.*?)"', lowered.as_text()
    )
    return [(name, json.loads(config.replace(r"\22", '"'))) for name, config in calls]


def test_every_layer_s_backward_is_told_and_nothing_else_changes(lowered):
    before = configs(lowered)
    fix_order_of_attention(lowered)
    after = configs(lowered)
    assert [name for name, _ in after] == ["fmhaSoftmax"] * 2 + ["fmhaSoftmaxBackward"] * 2
    for (name, config), (_, told) in zip(before, after, strict=True):
        if name == "fmhaSoftmaxBackward":
            config["cudnn_fmha_backend_config"]["force_deterministic"] = True
        assert told == config


def test_a_program_without_cudnn_is_left_alone():
    lowered = jax.jit(jnp.sin).lower(1.0)
    text = lowered.as_text()
    fix_order_of_attention(lowered)
    assert lowered.as_text() == text
    assert lowered.compile()(0.0) == 0
