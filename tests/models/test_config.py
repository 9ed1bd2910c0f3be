"""LlamaConfig: what it refuses, and the named sizes."""

import dataclasses

import pytest

from jfp4.models.config import MODELS, LlamaConfig


@pytest.mark.parametrize(
    "field", ["vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "mlp_dim"]
)
@pytest.mark.parametrize("value", [0, -2, 512.0])
def test_sizes_are_positive(field, value):
    with pytest.raises(ValueError, match=f"^{field}={value}; expected a positive"):
        LlamaConfig(**{field: value})


@pytest.mark.parametrize("field", ["rope_theta", "norm_eps"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_bases_are_positive(field, value):
    with pytest.raises(ValueError, match=f"^{field}={value}; expected a positive"):
        LlamaConfig(**{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embed_dim": 20}, r"embed_dim=20 and num_heads=8; .* even number"),
        ({"embed_dim": 24}, r"embed_dim=24 and num_heads=8; .* even number"),  # 3 a head
        ({"num_heads": 3, "num_kv_heads": 1}, r"embed_dim=512 and num_heads=3"),
        ({"num_kv_heads": 3}, r"num_heads=8 and num_kv_heads=3; .* divide"),
        ({"num_kv_heads": 16}, r"num_heads=8 and num_kv_heads=16"),
    ],
)
def test_heads_divide(fields, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**fields)


def test_head_dim():
    assert LlamaConfig(embed_dim=48, num_heads=4, num_kv_heads=2).head_dim == 12


def test_is_a_frozen_key():
    config = LlamaConfig()
    assert hash(config) == hash(LlamaConfig()) and config != LlamaConfig(num_layers=9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 1


def test_named_sizes():
    """Depth, width, heads and MLP width; those of Llama itself where the name is one of its."""
    shapes = {
        name: (c.num_layers, c.embed_dim, c.num_heads, c.num_kv_heads, c.mlp_dim, c.vocab_size)
        for name, c in MODELS.items()
    }
    assert shapes == {
        "llama5m": (6, 256, 4, 2, 688, 512),
        "llama60m": (8, 512, 8, 8, 1376, 32000),
        "llama130m": (12, 768, 12, 12, 2048, 32000),
        "llama400m": (24, 1024, 16, 16, 3072, 32000),
        "llama1b": (24, 2048, 16, 16, 5504, 32000),
        "llama7b": (32, 4096, 32, 32, 11008, 32000),
        "llama13b": (40, 5120, 40, 40, 13824, 32000),
    }
    assert [name for name, c in MODELS.items() if c.tied_head] == ["llama5m"]
    for c in MODELS.values():
        assert (c.rope_theta, c.norm_eps, c.dtype) == (10000.0, 1e-5, "bfloat16")
        assert (c.remat, c.attention) == ("none", "auto")
        assert c.head_dim in (64, 128)


@pytest.mark.parametrize("field", ["dtype", "remat", "attention"])
def test_choices_are_held_to(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}='code'; expected one of .*"):
        LlamaConfig(**{field: "code"})
