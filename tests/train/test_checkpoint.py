"""Checkpoints of a small state, kept, restored, and refused."""

import errno
import os
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import interrupt_at, lines_of, saved_arrays

from train.checkpoint import Checkpoints
from train.config import CheckpointConfig
from train.errors import UserError
from train.step import TrainState


def state_of(step, size=8):
    return TrainState(
        step=jnp.int32(step),
        params={"kernel": jnp.arange(size * 4.0).reshape(4, size) + step},
        stats={"lo": jnp.full(2, -jnp.inf)},
        opt_state=({"mu": jnp.ones(size) * step}, jnp.array(True), ()),
    )


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def opened(path, **options):
    return closing(Checkpoints(path, CheckpointConfig(**options)))


def kept(path):
    return sorted(int(each.name) for each in (path / "checkpoints").iterdir())


def assert_same_state(restored, state):
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_what_is_restored_is_what_was_saved(tmp_path):
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(3, state_of(3))
        checkpoints.wait()
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() == 3
        restored = checkpoints.restore(3, abstract(state_of(0)))
    assert_same_state(restored, state_of(3))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


def test_the_newest_are_kept(tmp_path):
    with opened(tmp_path, keep=3) as checkpoints:
        for step in (2, 4, 6, 8, 10):
            checkpoints.save(step, state_of(step))
    assert kept(tmp_path) == [6, 8, 10]
    with opened(tmp_path, keep=1) as checkpoints:
        checkpoints.save(11, state_of(11))
    assert kept(tmp_path) == [11]


def test_a_step_is_saved_once(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(5, state_of(5))
        checkpoints.save(5, state_of(5))
    assert kept(tmp_path) == [5]


def test_steps_that_reuse_the_memory_do_not_reach_what_is_being_saved(tmp_path, monkeypatch):
    handed = []
    state = state_of(1, size=2**20)
    expected = np.array(state.params["kernel"])
    advance = jax.jit(
        lambda state: jax.tree.map(lambda leaf: leaf * 0 if leaf.ndim else leaf, state),
        donate_argnums=0,
    )
    with opened(tmp_path) as checkpoints:
        save = checkpoints._manager.save
        monkeypatch.setattr(
            checkpoints._manager,
            "save",
            lambda step, args: handed.extend(args.item.values()) or save(step, args=args),
        )
        checkpoints.save(1, state)
        # A view would stand in the way of the reuse, or be overwritten by it.
        for leaf, array in zip(jax.tree.leaves(state), handed, strict=True):
            assert not np.shares_memory(np.asarray(leaf), np.asarray(array))
        for _ in range(5):
            state = advance(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        restored = checkpoints.restore(1, abstract(state))
    np.testing.assert_array_equal(restored.params["kernel"], expected)


def test_another_model_is_refused_by_name(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(3, state_of(3))
    larger = abstract(state_of(3, size=9))
    other = TrainState(larger.step, larger.params | {"scale": larger.step}, {}, ())
    with opened(tmp_path) as checkpoints:
        with pytest.raises(
            UserError,
            match=r"checkpoint 3 is of another model: params/kernel has shape \(4, 8\), this "
            r"model's \(4, 9\); give the flags of the run it is of, or another run_dir",
        ):
            checkpoints.restore(3, larger)
        narrow = TrainState(other.step, {"scale": larger.step}, {}, ())
        with pytest.raises(UserError, match=r"params/scale has shape none, this model's \(\)"):
            checkpoints.restore(3, narrow)


def test_a_full_disk_is_an_os_error_and_leaves_the_one_before(tmp_path, monkeypatch):
    class Full:
        free = 100

    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1))
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda path: Full)
            with pytest.raises(OSError, match="No space left on device") as raised:
                checkpoints.save(2, state_of(2))
        assert raised.value.errno == errno.ENOSPC
        checkpoints.save(3, state_of(3))
    assert kept(tmp_path) == [1, 3]


def test_a_failed_write_is_an_os_error(tmp_path, monkeypatch):
    message = "RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28']"

    def fail(*args, **kwargs):
        raise ValueError(message)

    with opened(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
        with pytest.raises(OSError) as raised:
            checkpoints.wait()
        assert raised.value.errno == errno.ENOSPC
        assert raised.value.strerror == os.strerror(errno.ENOSPC)
        message = "another mistake"
        with pytest.raises(ValueError, match="another mistake"):
            checkpoints.wait()
        monkeypatch.undo()


def test_what_was_cut_off_is_not_a_checkpoint(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1))
        checkpoints.save(2, state_of(2))
    saved = tmp_path / "checkpoints"
    (saved / "2").rename(saved / "2.orbax-checkpoint-tmp")
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, state_of(2))
    assert kept(tmp_path) == [1, 2]


def test_a_run_keeps_the_newest_and_all_of_its_state(unbroken):
    assert kept(unbroken) == [8, 12]
    arrays = saved_arrays(unbroken, 12)
    assert arrays["step"] == 12
    parameters = [name for name in arrays if name.startswith("params/")]
    for name in parameters:
        for moment in ("mu", "nu"):
            found = [other for other in arrays if other.endswith(name.replace("params", moment, 1))]
            assert len(found) == 1 and arrays[found[0]].shape == arrays[name].shape
    assert sum(name.startswith("stats/") for name in arrays) == 8


def test_a_run_that_saves_only_when_interrupted(runs, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    assert runs.tiny(run_dir, "--checkpoint.every=0") == 0
    assert kept(run_dir) == []
    assert len(lines_of(run_dir)) == 12

    interrupt_at(monkeypatch, 5)
    assert runs.tiny(tmp_path / "other", "--checkpoint.every=0") == 0
    assert kept(tmp_path / "other") == [5]


def test_lines_are_on_disk_before_the_checkpoint_after_them(runs, tmp_path, monkeypatch):
    found = []
    save = Checkpoints.save

    def look(self, step, state):
        found.append((step, lines_of(tmp_path / "run")[-1]["step"]))
        save(self, step, state)

    monkeypatch.setattr(Checkpoints, "save", look)
    interrupt_at(monkeypatch, 11)
    assert runs.tiny(tmp_path / "run", "--checkpoint.every=2", "--eval_every=5") == 0
    assert found == [(step, step) for step in (2, 4, 6, 8, 10, 11)]
