"""A run that was stopped, however it was, ends bit for bit like one that was not."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import (
    TINY,
    assert_same_arrays,
    interrupt_at,
    lines_of,
    one_error,
    saved_arrays,
    write_text,
)

from train import loop
from train.batches import batches
from train.checkpoint import Checkpoints
from train.config import CheckpointConfig, program
from train.main import STOPPED
from train.step import Trainer

ROOT = Path(__file__).parents[2]


def assert_same_run(run_dir, unbroken):
    assert_same_arrays(saved_arrays(run_dir, 12), saved_arrays(unbroken, 12))
    for name in ("metrics.jsonl", "health.jsonl"):
        assert timeless(lines_of(run_dir, name)) == timeless(lines_of(unbroken, name))


def timeless(lines):
    measured = ("tokens_per_s", "peak_bytes")
    return [{k: v for k, v in line.items() if k not in measured} for line in lines]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(
    runs, unbroken, tmp_path, capsys, monkeypatch, number
):
    run_dir = tmp_path / "run"
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7, number)
        assert runs.tiny(run_dir) == STOPPED
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    output = capsys.readouterr().out
    assert output == f"saved step 7; go on with {program()} --run_dir={run_dir} --resume\n"
    assert [line["step"] for line in lines_of(run_dir)] == list(range(1, 8))
    assert (run_dir / "loss.png").exists()
    assert (run_dir / "checkpoints" / "7").is_dir()
    assert runs.resume(run_dir) == 0
    output, errors = capsys.readouterr()
    assert output.startswith("done: validation loss ")
    assert "\ngoing on from step 7\n" in errors
    assert_same_run(run_dir, unbroken)


def test_a_run_stopped_at_each_step_and_by_steps_not_logged(runs, unbroken, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        assert runs.tiny(run_dir) == STOPPED
    for step in (2, 8, 11):
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            assert runs.resume(run_dir) == STOPPED
        assert len(lines_of(run_dir)) == step
    assert runs.resume(run_dir) == 0
    assert_same_run(run_dir, unbroken)


def test_a_signal_before_the_first_step(runs, unbroken, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    real = loop.interrupts

    @contextmanager
    def at_once(**options):
        with real(**options) as received:
            signal.raise_signal(signal.SIGTERM)
            yield received

    with monkeypatch.context() as patch:
        patch.setattr(loop, "interrupts", at_once)
        assert runs.tiny(run_dir) == STOPPED
    assert lines_of(run_dir) == []
    assert runs.resume(run_dir) == 0
    assert not (run_dir / "metrics-1.jsonl").exists()
    assert_same_run(run_dir, unbroken)


# Kills its process at the given audit event of a file of the given checkpoint: nothing is flushed.
KILLED = """
import os, signal, sys
event, part = sys.argv[1:3]
def kill(happened, args):
    if happened == event and part in str(args[0]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
from train.main import main
sys.exit(main(sys.argv[3:]))
"""


def killed(compiled, event, part, *flags):
    command = [sys.executable, "-c", KILLED, event, part, *flags]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | compiled, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_kill_while_saving(runs, unbroken, compiled_once, tmp_path):
    run_dir = tmp_path / "run"
    # Everything of checkpoint 8 is written, and it is about to be put in its place.
    first = (*TINY, f"--data={runs.text}", f"--run_dir={run_dir}")
    killed(compiled_once, "os.rename", "checkpoints/8.", *first)
    assert not (run_dir / "checkpoints" / "8").exists()
    assert lines_of(run_dir)[-1]["step"] >= 8
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    # Checkpoint 12 has its directory and nothing in it.
    killed(compiled_once, "os.mkdir", "checkpoints/12.", f"--run_dir={run_dir}", "--resume")
    assert [line["step"] for line in lines_of(run_dir)] == list(range(1, 13))
    assert runs.resume(run_dir) == 0
    assert_same_run(run_dir, unbroken)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["12", "8"]


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    runs, unbroken, tmp_path, monkeypatch, capsys
):
    run_dir = tmp_path / "run"

    def lost(*args, **kwargs):
        yield from itertools.islice(batches(*args, **kwargs), 3)
        raise KeyboardInterrupt  # as a second Ctrl-C does: nothing is saved

    with monkeypatch.context() as patch:
        patch.setattr(loop, "batches", lost)
        assert runs.tiny(run_dir) == 130
    assert "stopped at once" in capsys.readouterr().err
    lost_lines = (run_dir / "metrics.jsonl").read_bytes()
    assert len(lines_of(run_dir)) == 3
    assert runs.resume(run_dir) == 0
    assert_same_run(run_dir, unbroken)
    said = (
        f"warning: {run_dir} has steps but no checkpoint: beginning again at step 0; their log is "
        "kept in metrics-1.jsonl"
    )
    assert said in capsys.readouterr().err.splitlines()
    assert (run_dir / "metrics-1.jsonl").read_bytes() == lost_lines


def test_a_finished_run_that_saved_nothing_keeps_every_log(runs, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert runs.tiny(run_dir, "--checkpoint.every=0") == 0
    logs = {name: (run_dir / name).read_bytes() for name in ("metrics.jsonl", "health.jsonl")}
    (run_dir / "health-1.jsonl").touch()  # a name that is not free
    capsys.readouterr()
    assert runs.resume(run_dir) == 0
    assert "beginning again at step 0; their log is kept in metrics-2" in capsys.readouterr().err
    for name, content in logs.items():
        assert (run_dir / name.replace(".", "-2.")).read_bytes() == content
    assert len(lines_of(run_dir)) == 12


def test_a_finished_run_stays_as_it_is(runs, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert runs.tiny(run_dir) == 0
    before = (run_dir / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert runs.resume(run_dir) == 0
    assert capsys.readouterr().out == f"done already, at step 12; see {run_dir}/loss.png\n"
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def stopped(runs, run_dir, monkeypatch, *flags):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        assert runs.tiny(run_dir, *flags) == STOPPED
    return run_dir


def test_what_changes_no_parameter_may_change(runs, unbroken, tmp_path, monkeypatch):
    run_dir = stopped(runs, tmp_path / "run", monkeypatch)
    copy = tmp_path / "copy.txt"
    copy.write_bytes(runs.text.read_bytes())
    free = ("--eval_every=3", "--eval_batches=1", "--log.every=2", "--log.health_every=0")
    saves = ("--checkpoint.every=6", "--checkpoint.keep=1", f"--data={copy}")
    assert runs.resume(run_dir, *free, *saves) == 0
    assert_same_arrays(saved_arrays(run_dir, 12), saved_arrays(unbroken, 12))
    losses = [line["loss"] for line in lines_of(run_dir)]
    assert losses == [line["loss"] for line in lines_of(unbroken)]
    assert [line["step"] for line in lines_of(run_dir) if "valid_loss" in line] == [4, 6, 9, 12]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["12"]


def test_a_run_goes_on_with_another_remat(runs, unbroken, tmp_path, monkeypatch):
    run_dir = stopped(runs, tmp_path / "run", monkeypatch)
    assert runs.resume(run_dir, "--model.remat=full") == 0
    assert json.loads((run_dir / "config.json").read_text())["config"]["llama"]["remat"] == "full"
    found, wanted = saved_arrays(run_dir, 12), saved_arrays(unbroken, 12)
    assert {name: a.shape for name, a in found.items()} == {n: a.shape for n, a in wanted.items()}
    found, wanted = (np.array([line["loss"] for line in lines_of(r)]) for r in (run_dir, unbroken))
    np.testing.assert_array_equal(found[:5], wanted[:5])
    # Rounding parts the runs by less than a tenth of what batches differ by.
    np.testing.assert_allclose(found, wanted, atol=0.1 * np.mean(np.abs(np.diff(wanted))))


def test_run_dir_may_be_spelt_with_a_hyphen(runs, unbroken, tmp_path, monkeypatch):
    run_dir = stopped(runs, tmp_path / "run", monkeypatch)
    assert runs(f"--run-dir={run_dir}", "--resume") == 0
    assert_same_run(run_dir, unbroken)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--lr=0.001"], "lr (0.003, now 0.001)"),
        (["--steps=20"], "steps (12, now 20)"),
        (["--seed=1", "--batch_size=4"], "batch_size (2, now 4), seed (0, now 1)"),
        (["--model.num_layers=3"], "model.num_layers (2, now 3)"),
        (["--optimizer.beta2=0.9"], "optimizer.beta2 (0.95, now 0.9)"),
        (["--recipe=fp4_cast"], "recipe (fp4, now fp4_cast)"),
        (["--recipe.occ_alpha=0.9"], "recipe.occ_alpha (0.99, now 0.9)"),
    ],
)
def test_what_changes_parameters_is_refused_by_name(runs, unbroken, capsys, flags, named):
    before = {path: path.read_bytes() for path in unbroken.rglob("*") if path.is_file()}
    assert runs.resume(unbroken, *flags) == 2
    error = one_error(capsys)
    assert "holds a run with another configuration: " in error and named in error
    assert "choose another --run_dir, or give the same flags" in error
    assert {path: path.read_bytes() for path in unbroken.rglob("*") if path.is_file()} == before


def test_other_data_is_refused(runs, unbroken, tmp_path, capsys):
    other = write_text(tmp_path / "other.txt", first=1)
    before = (unbroken / "config.json").read_bytes()
    assert runs.resume(unbroken, f"--data={other}") == 2
    assert "began with other data or another tokenizer" in one_error(capsys)
    assert (unbroken / "config.json").read_bytes() == before


def test_a_checkpoint_of_another_model_is_refused(runs, unbroken, tiny_config, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken, run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    wider = dataclasses.replace(tiny_config().llama, mlp_dim=96)
    state = Trainer(tiny_config(llama=wider)).abstract_state()
    with closing(Checkpoints(run_dir, CheckpointConfig())) as checkpoints:
        checkpoints.save(9, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state))
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert runs.resume(run_dir) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.count("error: ") == 1
    error = errors.splitlines()[-1]
    assert error.startswith("error: checkpoint 9 is of another model: params/layers/mlp/down_proj")
    assert "has shape (2, 96, 32), this model's (2, 64, 32); give the flags of the run" in error
    assert (run_dir / "metrics.jsonl").read_bytes() == before
