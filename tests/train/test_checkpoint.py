"""Checkpoints of a small state, kept, restored, and refused."""

import errno
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import psutil
import pytest
from tiny_run import interrupt_at, lines_of, saved_arrays

from train import checkpoint
from train.checkpoint import Checkpoints, parts
from train.config import CheckpointConfig
from train.errors import UserError
from train.main import STOPPED
from train.step import TrainState

ROOT = Path(__file__).parents[2]


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


def test_what_cannot_be_read_is_said_to_be(tmp_path):
    state = state_of(3)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(3, state)
    damaged = tmp_path / "checkpoints" / "3"
    (damaged / "default" / "_METADATA").unlink()
    with (
        opened(tmp_path) as checkpoints,
        pytest.raises(UserError, match=rf"checkpoint 3 cannot be read.* move {damaged} elsewhere"),
    ):
        checkpoints.restore(3, abstract(state))


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


def test_a_save_may_take_hours(tmp_path):
    """Each ends a run that it is too short for."""
    with opened(tmp_path) as checkpoints:
        assert checkpoints._manager._options.async_options.timeout_secs >= 4 * 3600


def test_what_was_cut_off_is_not_a_checkpoint(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1))
        checkpoints.save(2, state_of(2))
    saved = tmp_path / "checkpoints"
    (saved / "2").rename(saved / "2.orbax-checkpoint-tmp")
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(3, state_of(3))
    assert sorted(entry.name for entry in saved.iterdir()) == ["1", "3"]


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
    assert runs.tiny(tmp_path / "other", "--checkpoint.every=0") == STOPPED
    assert kept(tmp_path / "other") == [5]


def test_lines_are_on_disk_before_the_checkpoint_after_them(runs, tmp_path, monkeypatch):
    """On disk, and not with the system alone, which may end too."""
    found, last = [], {}
    save, fsync = Checkpoints.save, os.fsync

    def synced(file):
        if os.path.samestat(os.fstat(file), os.stat(tmp_path / "run" / "metrics.jsonl")):
            last["step"] = lines_of(tmp_path / "run")[-1]["step"]
        fsync(file)

    def look(self, step, state):
        found.append((step, last.get("step")))
        save(self, step, state)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Checkpoints, "save", look)
    interrupt_at(monkeypatch, 11)
    assert runs.tiny(tmp_path / "run", "--checkpoint.every=2", "--eval_every=5") == STOPPED
    assert found == [(step, step) for step in (2, 4, 6, 8, 10, 11)]


def test_parts_are_as_large_as_may_be_and_no_larger():
    assert list(parts([4, 4, 4, 9, 1, 7, 3], 8)) == [
        slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6), slice(6, 7)
    ]  # fmt: skip
    assert list(parts([9], 8)) == [slice(0, 1)]


def test_a_state_larger_than_the_host_may_hold_is_written_part_by_part(tmp_path, monkeypatch):
    handler = ocp.type_handlers.ArrayHandler
    serialize, begun = handler.serialize, []

    async def watched(self, values, infos, args=None):
        writes = await serialize(self, values, infos, args)
        begun.append((sum(value.nbytes for value in values), writes))
        for _, earlier in begun[:-1]:
            assert all(write.result(timeout=0) is None for write in earlier)
        return writes

    monkeypatch.setattr(handler, "serialize", watched)
    params = {f"kernel {i}": jnp.arange(2.0 ** (8 + i)) + i for i in range(9)}
    state = TrainState(jnp.int32(1), params, {}, ())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    most = 2**17 + 2**12  # more than any array but the last
    with opened(tmp_path, host_gib=most / 2**30) as checkpoints:
        assert checkpoints.in_parts(state)
        checkpoints.save(1, state)
        # Training may go on, in the same memory: everything is on disk.
        assert sum(nbytes for nbytes, _ in begun) == size
        assert len(begun) > 2 and sum(nbytes > most for nbytes, _ in begun) == 1
        restored = checkpoints.restore(1, abstract(state))
    assert_same_state(restored, state)


def test_a_state_that_the_host_may_hold_is_copied_and_written_later(tmp_path):
    with opened(tmp_path) as checkpoints:
        assert 0 < checkpoints.host_bytes < psutil.virtual_memory().available
        assert not checkpoints.in_parts(state_of(1))
    with opened(tmp_path, host_gib=2**-30 * 340) as checkpoints:
        assert not checkpoints.in_parts(state_of(1, size=16))
        assert checkpoints.in_parts(state_of(1, size=17))


def test_processes_of_one_host_share_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("train.checkpoint.free_memory", lambda: 2**30)
    for sharers in (1, 8):
        with closing(Checkpoints(tmp_path, CheckpointConfig(), sharers)) as checkpoints:
            assert checkpoints.host_bytes == 2**28 // sharers


# Saves 256 MiB that cannot be compressed, and prints by how much the process grew.
SAVES = """
import sys
from pathlib import Path
import jax, psutil
from train.checkpoint import Checkpoints, parts
from train.config import CheckpointConfig
from train.plan import peak_bytes
from train.step import TrainState
bits = jax.jit(lambda key: jax.random.bits(key, (2**23,), "uint32"))
params = {str(i): bits(jax.random.key(i)) for i in range(8)}
state = jax.block_until_ready(TrainState(jax.numpy.int32(1), params, {}, ()))
checkpoints = Checkpoints(Path(sys.argv[1]), CheckpointConfig(host_gib=float(sys.argv[2])))
checkpoints.save(1, TrainState(jax.numpy.int32(1), {"0": jax.numpy.ones(2**20)}, {}, ()))
checkpoints.wait()
before = psutil.Process().memory_info().rss
checkpoints.save(2, state)
checkpoints.close()
print(peak_bytes() - before)
"""


@pytest.mark.slow
def test_saving_in_parts_takes_little_memory_of_the_host(tmp_path):
    # What is freed goes back at once, so that the allocator keeps nothing that would count.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    grown = {}
    for host_gib in (2, 2**-5):
        command = [sys.executable, "-c", SAVES, str(tmp_path / str(host_gib)), str(host_gib)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        grown[host_gib] = int(done.stdout)
    assert grown[2] > 256 * 2**20  # a copy of all
    assert grown[2**-5] < 128 * 2**20  # parts of 32 MiB, and what is made of them


def test_what_a_process_holds_counts_every_device_of_its_own():
    """Replicas too: each is fetched."""
    place = SimpleNamespace(addressable_devices=range(4), shard_shape=lambda shape: (2, 8))
    leaf = SimpleNamespace(shape=(4, 8), dtype=np.dtype(np.float32), sharding=place)
    assert checkpoint._held(leaf) == 2 * 8 * 4 * 4
