"""What a run directory says of its run, and who may write in it."""

import errno
import json
import os
import platform
import subprocess
import sys

import jax
import pytest

from train import rundir
from train.config import parse, to_dict
from train.errors import UserError

FLAGS = ("--steps=7", "--model.mlp_dim=64", "--run_dir=given")


def config(*flags):
    return parse([*FLAGS, *flags])


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "a" / "run"
    rundir.write(path, config(), "abc", device="device", parameters=123, planned_bytes=456)
    return path


def test_config_json_holds_everything(run_dir):
    content = json.loads((run_dir / "config.json").read_text())
    assert content["config"] == json.loads(json.dumps(to_dict(config())))
    assert content["config"]["llama"]["mlp_dim"] == 64
    assert content["data_fingerprint"] == "abc"
    assert (content["device"], content["parameters"]) == ("device", 123)
    assert content["versions"]["python"] == platform.python_version()
    assert content["versions"]["jax"] == jax.__version__
    assert set(rundir.PACKAGES) < set(content["versions"])
    assert [path.name for path in run_dir.iterdir()] == ["config.json"]


def test_a_new_or_empty_directory_may_be_used(tmp_path):
    rundir.check(tmp_path / "none", config())
    rundir.check(tmp_path, config())
    rundir.check_data(tmp_path, "abc")


def refused(run_dir, config):
    with pytest.raises(UserError) as raised:
        rundir.check(run_dir, config)
    return str(raised.value)


def test_a_run_is_not_written_over(run_dir):
    assert refused(run_dir, config()) == (
        f"{run_dir} holds this run already; add --resume, or choose another"
    )
    rundir.check(run_dir, config("--resume"))


def test_another_configuration_is_named(run_dir):
    message = refused(run_dir, config("--resume", "--lr=1", "--recipe.dge_k=7"))
    assert "lr (" in message and ", now 1.0), recipe.dge_k (5.0, now 7.0); choose" in message
    # Also where the run would not go on.
    assert "steps (7, now 8)" in refused(run_dir, parse([*FLAGS, "--steps=8"]))


def test_free_fields_may_change(run_dir):
    free = ("--eval_every=3", "--eval_batches=1", "--log.every=2", "--log.health_every=0")
    more = ("--checkpoint.every=0", "--checkpoint.keep=9", "--data=x", "--tokenizer=bytes")
    model = ("--model.remat=full", "--model.attention=cudnn", "--model.loss_chunk=64")
    rundir.check(run_dir, config("--resume", "--profile=3", *free, *more, *model))
    # What gradients are sent in by default may be said.
    rundir.check(run_dir, config("--resume", "--grad_comm=float32", "--optimizer.max_skipped=3"))
    message = refused(run_dir, config("--resume", "--grad_comm=bfloat16", "--mesh=data=2"))
    assert "another configuration: grad_comm (float32, now bfloat16); choose" in message


def test_nothing_to_resume(tmp_path):
    message = f"{tmp_path} holds no run to resume; leave --resume out to begin one"
    assert refused(tmp_path, config("--resume", f"--run_dir={tmp_path}")) == message


def test_a_directory_of_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    for place in (tmp_path, tmp_path / "thesis.txt"):
        message = f"{place} is in use and holds no run; choose another --run_dir"
        assert refused(place, config()) == message


HOLDS = """
import sys, time
from pathlib import Path
from train import rundir
file = rundir.hold(Path(sys.argv[1]), print)
print("held", flush=True)
time.sleep(60)
"""


def test_a_living_run_keeps_others_out_until_it_is_killed(run_dir):
    command = [sys.executable, "-c", HOLDS, str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        message = f"{run_dir} is written to by process {holder.pid} on {platform.node()}; wait"
        for enter in (rundir.check_free, lambda place: rundir.hold(place, pytest.fail)):
            with pytest.raises(UserError) as raised:
                enter(run_dir)
            assert str(raised.value).startswith(message)
        holder.kill()
    rundir.check_free(run_dir)
    with rundir.hold(run_dir, pytest.fail):
        assert f"process {os.getpid()} on" in (run_dir / "lock").read_text()
        rundir.check(run_dir, config("--resume"))


def test_what_a_killed_beginning_left_may_be_used(tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with rundir.hold(tmp_path, pytest.fail), pytest.raises(KeyboardInterrupt):
        rundir.write(tmp_path, config(), "", device="", parameters=1, planned_bytes=2)
    (tmp_path / rundir.ENDED).touch()
    assert len(list(tmp_path.iterdir())) == 3
    rundir.check(tmp_path, config())


def test_a_file_system_without_locks_is_said(run_dir, monkeypatch):
    def none(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    rundir.check_free(run_dir)
    said = []
    rundir.hold(run_dir, said.append).close()
    (line,) = said
    assert line.startswith(f"warning: {run_dir} cannot be locked (No locks available): see that")


def test_other_data(run_dir):
    rundir.check_data(run_dir, "abc")
    with pytest.raises(UserError, match="began with other data or another tokenizer"):
        rundir.check_data(run_dir, "abd")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config": {}}'])
def test_a_damaged_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert "config.json is damaged (" in refused(tmp_path, config())


def test_space(tmp_path):
    rundir.check_space(tmp_path / "none" / "such", 1)
    with pytest.raises(UserError, match=r"iB free and checkpoints take 1048576.00 GiB; make"):
        rundir.check_space(tmp_path / "none" / "such", 2**50)
    assert list(tmp_path.iterdir()) == []


def test_what_a_save_that_was_cut_off_has_left_counts_as_free(tmp_path, monkeypatch):
    class Disk:
        free = 10

    monkeypatch.setattr("shutil.disk_usage", lambda path: Disk)
    for place, size in (("8.orbax-checkpoint-tmp/default/d", 90), ("4/default", 1000)):
        (tmp_path / "checkpoints" / place).mkdir(parents=True)
        (tmp_path / "checkpoints" / place / "part").write_bytes(bytes(size))
    rundir.check_space(tmp_path, 100)
    with pytest.raises(UserError, match="and checkpoints take"):
        rundir.check_space(tmp_path, 101)


def test_checkpoints_that_are_there_are_counted(tmp_path):
    assert rundir.saved_steps(tmp_path) == []
    for name in ("4", "8", "12.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert rundir.saved_steps(tmp_path) == [4, 8]
