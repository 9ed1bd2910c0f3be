"""Exported models against Hugging Face's Llama, in float64 and of its tensors alone."""

import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors

from train import prepare
from train.export import main
from train.tokenizer import EOD, load
from train.trained import load_model

FLAGS = (
    "--recipe=bf16",  # no recipe, and no narrow dtype: what the exported weights are computed with
    "--model.dtype=float32",
    "--steps=3",
    "--checkpoint.every=1",
    "--checkpoint.keep=2",
)
TEXTS = (
    "Two  spaces and\n\n\ta tab.",
    " led by a space",
    "caf\u00e9 \u6f22\u5b57",
    "the end, the end",
)


@pytest.fixture(scope="module", params=[(), ("--model.no_tied_head",)], ids=["tied", "untied"])
def run_dir(request, runs, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    assert runs.tiny(run_dir, *FLAGS, *request.param) == 0
    return run_dir


def exported(run_dir, out, *flags):
    assert main([f"--run_dir={run_dir}", f"--out={out}", *flags]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = {}
    for name in sorted(set(index["weight_map"].values())):
        found = safetensors.load_file(out / name)
        assert all(index["weight_map"][key] == name for key in found)
        tensors |= found
    assert tensors.keys() == index["weight_map"].keys()
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    assert sum(x.nbytes for x in tensors.values()) == index["metadata"]["total_size"]
    return tensors, json.loads((out / "config.json").read_text())


def rotate_half(x):
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([-second, first], axis=-1)


def huggingface_llama(tensors, c, ids):
    """LlamaForCausalLM of one sequence: [s] to [s, vocab_size]."""
    w = {name: x.astype(np.float64) for name, x in tensors.items()}
    heads, groups, e = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    s = len(ids)

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + c["rms_norm_eps"]) * w[name]

    inverse = c["rope_theta"] ** (-np.arange(0, e, 2) / e)
    angles = np.tile(np.arange(s)[:, None] * inverse, 2)
    cos, sin = np.cos(angles), np.sin(angles)
    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"

        def linear(x, name, layer=layer):
            return x @ w[f"{layer}.{name}.weight"].T

        y = norm(x, f"{layer}.input_layernorm.weight")
        q = linear(y, "self_attn.q_proj").reshape(s, heads, e).transpose(1, 0, 2)
        k = linear(y, "self_attn.k_proj").reshape(s, groups, e).transpose(1, 0, 2)
        v = linear(y, "self_attn.v_proj").reshape(s, groups, e).transpose(1, 0, 2)
        q, k = (z * cos + rotate_half(z) * sin for z in (q, k))
        k, v = (np.repeat(z, heads // groups, axis=0) for z in (k, v))
        scores = np.where(np.tri(s), q @ k.transpose(0, 2, 1) / np.sqrt(e), -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        y = (p / p.sum(-1, keepdims=True)) @ v
        x = x + linear(y.transpose(1, 0, 2).reshape(s, -1), "self_attn.o_proj")
        y = norm(x, f"{layer}.post_attention_layernorm.weight")
        gate = linear(y, "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, "mlp.up_proj"), "mlp.down_proj")
    name = "model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "model.norm.weight") @ w[name].T


@pytest.mark.slow
def test_the_model_is_the_runs(run_dir, tmp_path):
    tensors, config = exported(run_dir, tmp_path / "out", "--dtype=float32")
    assert ("lm_head.weight" in tensors) is not config["tie_word_embeddings"]
    assert config["eos_token_id"] == 256 and config["max_position_embeddings"] == 16
    ids = np.random.default_rng(0).integers(0, 257, 16)
    found = np.asarray(load_model(run_dir)(jnp.asarray(ids)[None])[0], np.float64)
    expected = huggingface_llama(tensors, config, ids)
    # As in tests/models/test_llama.py: 64 units roundoff of float32, of the largest.
    np.testing.assert_allclose(found, expected, rtol=0, atol=64 * 2.0**-24 * np.abs(expected).max())


@pytest.mark.slow
def test_transformers_reads_it(run_dir, tmp_path):
    """The library whose files these are, where it is installed with PyTorch."""
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    exported(run_dir, tmp_path / "out", "--dtype=float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, 257, (2, 16))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    found = np.asarray(load_model(run_dir)(jnp.asarray(ids)))
    # Both are off by as much as the test above allows one.
    bound = 128 * 2.0**-24 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


def test_weights_are_rounded_once(run_dir, tmp_path):
    wide, _ = exported(run_dir, tmp_path / "wide", "--dtype=float32", "--step=2")
    narrow, config = exported(run_dir, tmp_path / "narrow", "--step=2")
    assert config["torch_dtype"] == "bfloat16" and narrow.keys() == wide.keys()
    for name, x in narrow.items():
        np.testing.assert_array_equal(x, wide[name].astype(ml_dtypes.bfloat16))


def test_a_weight_that_the_dtype_does_not_have(run_dir, tmp_path, capsys, monkeypatch):
    model = load_model(run_dir)
    model.norm.scale[...] = 1e6 * model.norm.scale[...]
    monkeypatch.setattr("train.export.load_model", lambda *_: model)
    assert main([f"--run_dir={run_dir}", f"--out={tmp_path}/out", "--dtype=float16"]) == 2
    message = "model.norm.weight has what is no finite number in float16; choose another --dtype"
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_data_that_is_no_longer_there_is_not_taken_for_bytes(run_dir, tmp_path, capsys):
    moved = shutil.copytree(run_dir, tmp_path / "run")
    about = json.loads((moved / "config.json").read_text())
    about["config"]["data"] = "gone"
    (moved / "config.json").write_text(json.dumps(about))
    assert main([f"--run_dir={moved}", f"--out={tmp_path}/out"]) == 2
    assert "data=gone of the run is not there" in capsys.readouterr().err


@pytest.fixture(scope="module")
def of_shards(run_dir, tmp_path_factory):
    """What is exported of a run on shards, and their tokenizer.json."""
    at = tmp_path_factory.mktemp("of_shards")
    (at / "text.txt").write_text("\n\n".join(TEXTS))
    shards, moved = at / "shards", shutil.copytree(run_dir, at / "run")
    assert prepare.main([f"--data={at}/text.txt", f"--out={shards}", "--vocab_size=300"]) == 0
    about = json.loads((moved / "config.json").read_text())
    about["config"]["data"] = str(shards)
    (moved / "config.json").write_text(json.dumps(about))
    exported(moved, at / "out")
    return at / "out", shards / "tokenizer.json"


def test_the_tokenizer_of_shards_goes_along(of_shards):
    out, own = of_shards
    assert (out / "tokenizer.json").read_bytes() == own.read_bytes()
    described = json.loads((out / "tokenizer_config.json").read_text())
    assert described == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOD}
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == load(str(own)).eod


def test_transformers_reads_the_tokenizer(of_shards):
    """The ids of a text are the trainer's, where that library is installed."""
    transformers = pytest.importorskip("transformers")
    out, own = of_shards
    read, ours = transformers.AutoTokenizer.from_pretrained(out), load(str(own))
    assert (read.eos_token, read.eos_token_id) == (EOD, ours.eod)
    for text in TEXTS:
        ids = read(text)["input_ids"]
        assert ids == ours.encode(text).tolist() and read.decode(ids) == text


def test_what_cannot_be_written(run_dir, tmp_path, capsys):
    (tmp_path / "there").write_text("")
    for flags, message in (
        ([f"--out={tmp_path}"], "exists and is not empty"),
        ([f"--out={tmp_path}/there/out"], "cannot be written (Not a directory)"),
        ([f"--out={tmp_path}/out", "--step=1"], "step=1 is not among the checkpoints"),
        ([f"--out={tmp_path}/out", "--dtype=float8"], "invalid choice 'float8'"),
    ):
        assert main([f"--run_dir={run_dir}", *flags]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
