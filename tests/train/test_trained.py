"""A model out of a run's directory computes what the run's own evaluation does."""

import logging
import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train.checkpoint import Checkpoints
from train.config import from_dict
from train.errors import UserError
from train.rundir import read
from train.step import Trainer
from train.trained import load_model

FLAGS = ("--optimizer.master=float16", "--steps=3", "--eval_every=3", "--checkpoint.every=2")


@pytest.fixture(scope="module")
def run_dir(runs, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    assert runs.tiny(run_dir, *FLAGS) == 0
    return run_dir


@pytest.mark.parametrize("step", [None, 2])
def test_the_model_is_the_runs(run_dir, step):
    trainer = Trainer(from_dict(read(run_dir)["config"]))
    with closing(Checkpoints(run_dir, trainer.config.checkpoint)) as checkpoints:
        state = checkpoints.restore(step or 3, trainer.abstract_state())
    batch = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 17), np.int32))
    expected = jax.jit(trainer.evaluate)(state.params, state.stats, batch)
    model = load_model(run_dir, step)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {np.dtype("float32")}
    found = nnx.jit(lambda model: model.loss(batch[:, :-1], batch[:, 1:]))(model)
    # The same products; the mean of 32 losses may be added up in another order.
    assert float(found) == pytest.approx(float(expected), rel=2 * 31 * 2.0**-24)


def test_a_sound_checkpoint_is_read_without_a_word(run_dir, caplog, monkeypatch):
    logger = logging.getLogger("absl")
    monkeypatch.setattr(logger, "propagate", True)
    logger.setLevel(logging.WARNING)  # a run of this process has it silent
    load_model(run_dir)
    assert caplog.records == [] and logger.level == logging.WARNING


def test_step_0_is_a_step(run_dir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    (copy / "checkpoints" / "2").rename(copy / "checkpoints" / "0")
    found, expected = (nnx.state(load_model(*of)) for of in ((copy, 0), (run_dir, 2)))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_damaged_checkpoint_is_said_to_be(run_dir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    (copy / "checkpoints" / "3" / "default" / "_METADATA").unlink()
    with pytest.raises(UserError, match=r"^checkpoint 3 cannot be read, or is damaged; "):
        load_model(copy)


def test_what_is_not_there_is_named(run_dir, tmp_path):
    with pytest.raises(UserError, match=r"run_dir=.*nothing holds no run"):
        load_model(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"step=1 is not among the checkpoints of .*: 2, 3"):
        load_model(run_dir, 1)
    shutil.copy(run_dir / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"step=None is not among the checkpoints of .*: none"):
        load_model(tmp_path)
