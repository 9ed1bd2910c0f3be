"""``python -m train.export``: what a run has trained, in the files of Hugging Face's Llama.

A file of weights a layer, in safetensors, their index, config.json, and the tokenizer and what it
is where the run has one of its own. Weights are the master weights: what reads these files computes
without the recipe, and so in more bits than the model was trained in.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from safetensors.numpy import save

from jfp4.models.config import LlamaConfig
from train.config import run_program
from train.errors import UserError
from train.progress import progress
from train.tokenizer import EOD
from train.trained import config_of, load_model, tokenizer_of
from train.whole import check_new, written_whole

Tensors = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes the model of a run for programs that read Hugging Face's Llama."""

    run_dir: str
    """Run directory of train.main."""

    out: str
    """Directory to write; it must not exist or be empty."""

    step: int | None = None
    """Step of the checkpoint; None takes the newest."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What weights are written in, rounded to nearest."""


def export(config: Config) -> str:
    """Writes the files; returns what to tell the user.

    Raises:
        UserError: there is no such run, or no longer the data that its tokenizer is in, the
            directory is not empty, its disk has no room, or a weight is no finite number of the
            dtype.
    """
    out, dtype = Path(config.out).resolve(), jnp.dtype(config.dtype)
    check_new(out)
    model = load_model(config.run_dir, config.step)
    about = config_of(config.run_dir)
    tokenizer = tokenizer_of(about)
    state = nnx.state(model, nnx.Param)
    count = sum(leaf.size for leaf in jax.tree.leaves(state))
    weights: dict[str, str] = {}
    files = model.config.num_layers + 1
    with written_whole(out) as directory, progress("writing", files) as advance:
        for i, tensors in enumerate(_files(nnx.to_pure_dict(state), model.config), 1):
            name = f"model-{i:05}-of-{files:05}.safetensors"
            cast = {key: _cast(key, x, dtype) for key, x in tensors.items()}
            # Its own save_file keeps a file from all but its owner.
            (directory / name).write_bytes(save(cast, metadata={"format": "pt"}))
            weights |= dict.fromkeys(tensors, name)
            advance(1)
        index = {"metadata": {"total_size": count * dtype.itemsize}, "weight_map": weights}
        _write(directory / "model.safetensors.index.json", index)
        described = _described(model.config, config.dtype, about["seq_len"], tokenizer.eod)
        _write(directory / "config.json", described)
        if tokenizer.name != "bytes":
            shutil.copy(tokenizer.name, directory / "tokenizer.json")
            # Without it a Llama's own tokenizer would be made of that file.
            described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOD}
            _write(directory / "tokenizer_config.json", described)
    bytes_alone = f"bytes, {tokenizer.eod} ending a text"
    ids = bytes_alone if tokenizer.name == "bytes" else "those of tokenizer.json"
    return f"{out}: {count:,} parameters in {config.dtype}; token ids are {ids}"


def _files(params: Any, c: LlamaConfig) -> Iterator[Tensors]:
    """Tensors of each file, by their names there: of every layer, and of what is outside of them.

    There a matrix is [out, in], and queries, keys and values, and gate and up, have one each.
    """
    for i in range(c.num_layers):
        block = jax.tree.map(lambda stack, i=i: np.asarray(stack[i]), params["layers"])
        attention, mlp = block["attention"], block["mlp"]
        group = c.num_heads // c.num_kv_heads
        qkv = attention["qkv_proj"]["kernel"].reshape(c.embed_dim, c.num_kv_heads, -1, c.head_dim)
        q, k, v = np.split(qkv, (group, group + 1), axis=2)
        gate_up = mlp["gate_up_proj"]["kernel"].reshape(c.embed_dim, -1, 2)
        matrices = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": attention["o_proj"]["kernel"],
            "mlp.gate_proj": gate_up[..., 0],
            "mlp.up_proj": gate_up[..., 1],
            "mlp.down_proj": mlp["down_proj"]["kernel"],
        }
        yield {
            f"model.layers.{i}.input_layernorm.weight": block["attention_norm"]["scale"],
            f"model.layers.{i}.post_attention_layernorm.weight": block["mlp_norm"]["scale"],
        } | {
            f"model.layers.{i}.{name}.weight": matrix.reshape(len(matrix), -1).T
            for name, matrix in matrices.items()
        }
    outside = {
        "model.embed_tokens.weight": np.asarray(params["embed"]["embedding"]),
        "model.norm.weight": np.asarray(params["norm"]["scale"]),
    }
    if not c.tied_head:
        outside["lm_head.weight"] = np.asarray(params["lm_head"]["kernel"]).T
    yield outside


def _cast(name: str, x: npt.NDArray[Any], dtype: Any) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(x.astype(dtype))
    if not np.isfinite(cast.astype(np.float32)).all():
        raise UserError(f"{name} has what is no finite number in {dtype}; choose another --dtype")
    return cast


def _described(c: LlamaConfig, dtype: str, seq_len: int, eod: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.embed_dim,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": seq_len,
        "tie_word_embeddings": c.tied_head,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": eod,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main(args: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit status: 0, or 2 after a mistake of the user's."""
    return run_program(export, Config, args, "python -m train.export")


if __name__ == "__main__":
    sys.exit(main())
