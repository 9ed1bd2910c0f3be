"""The loss of a run on other text: every token once, in the recipe's forward or without it."""

import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from train import prepare
from train.batches import Tokens
from train.documents import Documents
from train.evaluate import Config, evaluate, main, total_loss
from train.trained import load_model

FLAGS = ("--steps=3", "--eval_every=3", "--eval_batches=1000", "--checkpoint.every=3")


@pytest.fixture(scope="module")
def run_dir(runs, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("evaluated") / "run"
    assert runs.tiny(run_dir, *FLAGS) == 0
    return run_dir


def logits(model, tokens):
    """Of each token but the last, computed with its window alone."""
    windows = [tokens[i : i + 16] for i in range(0, len(tokens) - 1, 16)]
    windows[-1] = windows[-1][: (len(tokens) - 1) % 16 or 16]
    return np.concatenate([np.asarray(model(jnp.asarray(w)[None])[0], np.float64) for w in windows])


@pytest.mark.parametrize("length", [2, 16, 17, 49, 60])  # a rest alone, windows alone, and both
@pytest.mark.parametrize("quantize", [True, False])
def test_every_token_counts_once(run_dir, length, quantize):
    model = load_model(run_dir, quantize=quantize)
    ids = np.random.default_rng(length).integers(0, 257, length, np.int32)
    z = logits(model, ids)
    z -= z.max(-1, keepdims=True)
    expected = np.log(np.exp(z).sum(-1)) - z[np.arange(length - 1), ids[1:]]
    found = total_loss(model, Tokens([ids.astype(np.uint16)]), seq_len=16, batch_size=2)
    # Logits are rounded to bfloat16 in either, and may be to neighbours; their losses are float32.
    assert found == pytest.approx(expected.sum(), rel=2.0**-8)


def test_without_the_recipe_the_loss_is_another(run_dir, text):
    fp4, bf16 = (
        evaluate(Config(str(run_dir), str(text), quantize=quantize)) for quantize in (True, False)
    )
    assert fp4.nats != bf16.nats and fp4.tokens == bf16.tokens


def test_the_run_s_own_validation(run_dir, text):
    """The trainer's figure is of whole batches of it."""
    loss = evaluate(Config(str(run_dir)))
    documents = Documents(str(text))
    assert loss.text_bytes == documents.text_bytes["valid"]
    assert loss.tokens == loss.text_bytes + documents.counts["valid"] - 1
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert loss.nats / loss.tokens == pytest.approx(lines[-1]["valid_loss"], rel=0.01)


def test_all_of_a_text_and_of_shards_validation(run_dir, text, tmp_path, capsys):
    assert main([f"--run_dir={run_dir}", f"--data={text}"]) == 0
    size = text.stat().st_size
    printed = capsys.readouterr().out
    # One document, which training cuts in two.
    assert f"; {size:,} tokens, {size:,} bytes" in printed
    nats, perplexity, bits = (float(printed.split()[i].strip(",")) for i in (0, 5, 6))
    assert perplexity == pytest.approx(math.exp(nats), rel=1e-3)
    assert bits == pytest.approx(nats / math.log(2), abs=2e-4)
    shards = tmp_path / "shards"
    assert prepare.main([f"--data={text}", f"--out={shards}", "--tokenizer=bytes"]) == 0
    meta = json.loads((shards / "meta.json").read_text())
    found, own = (evaluate(Config(str(run_dir), data)) for data in (str(shards), None))
    assert found == own and found.text_bytes == meta["text_bytes"]["valid"]


def test_mistakes(run_dir, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("")
    words = tmp_path / "words"
    words.mkdir()
    for name in ("train.txt", "valid.txt"):
        (words / name).write_text("a word and another, " * 9)
    prepare.main([f"--data={words}", f"--out={tmp_path}/shards", "--vocab_size=300"])
    moved = shutil.copytree(run_dir, tmp_path / "run")
    about = json.loads((moved / "config.json").read_text())
    other, wider = (shutil.copytree(run_dir, tmp_path / name) for name in ("other", "wider"))
    for copy, changes in (
        (moved, {"data": "gone"}),
        (other, {"data": str(words)}),
        (
            wider,
            {"data": f"{tmp_path}/shards", "llama": about["config"]["llama"] | {"vocab_size": 200}},
        ),
    ):
        changed = about | {"config": about["config"] | changes}
        (copy / "config.json").write_text(json.dumps(changed))
    for flags, message in (
        ([f"--data={tmp_path}/one.txt"], "holds no text"),
        ([f"--data={tmp_path}/shards"], "was prepared with another tokenizer than bytes"),
        (["--step=7"], "step=7 is not among the checkpoints"),
        (["--batch_size=0"], "--batch_size=0; expected at least 1"),
        (["--seq_len=-1"], "--seq_len=-1; expected at least 1"),
        ([f"--run_dir={moved}"], "data=gone of the run is not there"),
        ([f"--run_dir={other}"], "began with other data or another tokenizer"),
        (
            [f"--run_dir={wider}", f"--data={words}"],
            "and the run's model a vocabulary of 200",
        ),
        (["--data=" + "x" * 300], "cannot be read (File name too long)"),
    ):
        assert main([f"--run_dir={run_dir}", *flags]) == 2
        assert message in capsys.readouterr().err
