"""Steps of training on a GPU, whole."""

import jax
import numpy as np
import pytest

from train.config import parse
from train.plan import make_plan
from train.step import Trainer


@pytest.mark.gpu
@pytest.mark.parametrize(("remat", "dtype"), [("none", "bfloat16"), ("qkv", "float16")])
def test_equal_steps_are_equal_bit_for_bit(remat, dtype):
    """Of layers written out, whose attention is cuDNN's, and with a word that comes often."""
    config = parse(
        [
            "--deterministic",
            "--model.no_scan_layers",
            "--model.num_layers=3",
            "--model.embed_dim=256",
            "--model.num_heads=4",
            "--model.num_kv_heads=4",
            "--model.mlp_dim=512",
            f"--model.remat={remat}",
            f"--model.dtype={dtype}",
            "--batch_size=8",
            "--seq_len=512",
        ]
    )
    trainer = Trainer(config)
    _, step = make_plan(trainer)
    shape = (4, config.batch_size, config.seq_len + 1)
    batches = np.random.default_rng(0).integers(50, size=shape, dtype=np.int32)

    def run():
        state = trainer.placed_init()
        for batch in batches:
            state, metrics = step(state, batch)
        return jax.tree.map(np.asarray, (state, metrics))

    first, second = run(), run()
    assert np.isfinite(first[1]["loss"])
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
