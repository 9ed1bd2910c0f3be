"""A run that is killed and resumed: what is compared, and the whole program with a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report_runs, resume
from train.errors import UserError

ROOT = Path(__file__).parents[2]

FLAGS = (
    "--model.num_layers=2",
    "--model.scan_layers",
    "--model.embed_dim=32",
    "--model.mlp_dim=64",
    "--model.num_heads=2",
    "--model.num_kv_heads=1",
    "--batch_size=2",
    "--seq_len=16",
    "--eval_batches=2",
    "--checkpoint.host_gib=0.00001",
)


def lines(first, last, **changes):
    return {
        step: {"step": step, "loss": 9.0 - step, "tokens_per_s": step * 1.0, **changes}
        for step in range(first, last + 1)
    }


def test_steps_made_twice_are_compared_but_for_their_speed():
    before, after = lines(1, 8), lines(1, 10, tokens_per_s=5.0)
    found = resume.repeated(before, after, saved=6)
    assert found == [
        {"step": 7, "loss": [2.0, 2.0], "equal": True},
        {"step": 8, "loss": [1.0, 1.0], "equal": True},
    ]
    after[8]["grad_norm"] = 1.0
    assert [pair["equal"] for pair in resume.repeated(before, after, 6)] == [True, False]
    with pytest.raises(UserError, match="no step after 8 was made twice"):
        resume.repeated(before, after, saved=8)


def test_speed_is_that_of_steps_that_compile_and_load_nothing():
    assert resume.speed(lines(1, 20), saved=10) == 13  # of 6 to 10 and 16 to 20
    assert resume.speed(lines(1, 3), saved=2) == 2


@pytest.mark.parametrize("numbers", [(40, 40, 60), (40, 60, 60), (20, 41, 60)])
def test_a_kill_that_no_checkpoint_or_a_later_one_precedes_is_refused(monkeypatch, capsys, numbers):
    flags = [f"--{name}={n}" for name, n in zip(("saved", "killed", "steps"), numbers, strict=True)]
    monkeypatch.setattr(sys, "argv", ["resume", "--run_dir=x", *flags])
    with pytest.raises(SystemExit):
        resume.main()
    assert f"killed={numbers[1]} --steps=60; expected saved < killed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tiny_run_is_killed_and_goes_on_bit_for_bit(tmp_path):
    text = tmp_path / "code.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x * {i * i}\n\n" for i in range(400)))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.resume", *FLAGS, f"--data={text}", "--saved=6",
         "--killed=8", "--steps=10", f"--run_dir={tmp_path / 'run'}", f"--out={tmp_path}"],
        cwd=ROOT,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"), "JFP4_COMMIT": "abc"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("checkpoints go in parts") == 2
    (path,) = tmp_path.glob("resume-llama5m-fp4-*.json")
    found = json.loads(path.read_text())
    # The process may have got a step further before it was killed.
    assert [pair["step"] for pair in found["repeated"]][:2] == [7, 8]
    assert all(pair["equal"] for pair in found["repeated"])
    assert len(found["loss"]) == found["steps"] == 10
    assert found["checkpoint_bytes"] > 0 and found["valid_loss"] > 0
    assert min(run["host_bytes"] for run in (found["killed run"], found["resumed run"])) > 2**26
    assert "steps made twice are equal**" in report_runs.resumed([found])
