"""Plans for devices that this machine does not have."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import pytest
from tiny_run import TINY

from train import rehearsal
from train.collectives import summary
from train.config import parse
from train.errors import UserError
from train.main import main
from train.rehearsal import Rehearsal, devices_of, rehearse
from train.step import Trainer

ROOT = Path(__file__).parents[2]
FLAGS = (*TINY, "--batch_size=4", "--model.num_kv_heads=2")


def test_devices_of_a_mesh():
    assert devices_of(parse([])) is None
    assert devices_of(parse(["--mesh=data=2,fsdp=-1"])) is None
    assert devices_of(parse(["--mesh=data=2,fsdp=8"])) == 16


def test_what_is_left_open_cannot_be_rehearsed():
    with pytest.raises(UserError, match="mesh=fsdp=-1; expected every size"):
        rehearse(parse(["--mesh=fsdp=-1"]))


def test_a_mesh_that_does_not_fit_is_told_in_one_line():
    with pytest.raises(UserError, match=r"^batch_size / optimizer.accumulation=4; expected a"):
        rehearse(parse([*FLAGS, "--mesh=data=8"]))


@pytest.mark.parametrize(
    ("status", "said"), [(-9, ""), (-9, "error: slow"), (1, ""), (1, "--xla_flag=1 of XLA's own")]
)
def test_one_that_was_killed_is_told(monkeypatch, status, said):
    killed = subprocess.CompletedProcess([], returncode=status, stdout="", stderr=said)
    monkeypatch.setattr(rehearsal.subprocess, "run", lambda *args, **options: killed)
    with pytest.raises(
        UserError, match=rf"^mesh=data=4: .* status {status}; expected memory for 4"
    ):
        rehearse(parse([*FLAGS, "--mesh=data=4"]))


@pytest.mark.slow
def test_layers_that_are_written_out_send_what_scanned_ones_do():
    """The gradients of single layers lie where their stack's do, and are moved nowhere."""
    scanned, written = (
        summary(rehearse(parse([*FLAGS, "--mesh=data=2,fsdp=2,tensor=2", *flags])).collectives)
        for flags in ((), ("--model.no_scan_layers",))
    )
    assert written == scanned


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "comm"),
    [
        ("--optimizer.master=float32", "float32"),
        ("--optimizer.master=bfloat16", "bfloat16"),
        ("--grad_comm=fp8", "fp8"),
    ],
)
def test_data_parallel_sends_each_gradient_once(flag, comm):
    """As it is told, or as gradients are kept."""
    # Without outliers, samples of which are sent as well.
    found = rehearse(parse([*FLAGS, "--recipe=fp4_cast", "--mesh=data=4", flag]))
    assert found.devices == 4
    sent = Counter((c.kind, c.bytes) for c in found.collectives for _ in range(c.times))
    matrices = [
        weight.shape[-2:]
        for weight in jax.tree.leaves(Trainer(parse(FLAGS)).abstract_state().params)
        for _ in range(weight.shape[0] if weight.ndim == 3 else 1)
        if weight.ndim > 1 and weight.shape[-2] > 2
    ]
    assert len(matrices) == 2 * 4 + 1
    matrices.append(max(matrices)[::-1])  # the table, which is the head as well
    expected: Counter[tuple[str, int]] = Counter()
    for rows, columns in matrices:
        if comm != "fp8":
            width = 4 if comm == "float32" else 2
            expected[("all-reduce", width * rows * columns)] += 1
        else:
            for kind in ("all-to-all", "all-gather"):
                expected[(kind, rows * columns)] += 1
                expected[(kind, 4 * rows)] += 1
    assert {key: sent[key] for key in expected} == expected


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["bf16", "fp4"])
def test_fsdp_lays_no_activation_out_anew(recipe):
    """By all-to-all, though the batch has fewer tokens than the MLP's width has columns."""
    flags = (*FLAGS, f"--recipe={recipe}", "--model.mlp_dim=512", "--mesh=fsdp=4")
    found = rehearse(parse(list(flags)))
    assert {c.kind for c in found.collectives} == {"all-gather", "all-reduce", "reduce-scatter"}


@pytest.mark.parametrize(("name", "devices"), [("gpu16-hosts2", 16), ("gpu64-fsdp-tensor", 64)])
def test_a_cluster_s_run_is_planned_without_it(monkeypatch, capsys, name, devices):
    planned = Rehearsal(
        devices, parameters=1, state_bytes=1, work_bytes=1, attention="cudnn", collectives=[]
    )
    monkeypatch.setattr(rehearsal, "rehearse", lambda config: planned)
    assert main(["--plan", f"--config={ROOT}/configs/{name}.toml"]) == 0
    output, errors = capsys.readouterr()
    assert f"on each of {devices} devices" in output and "attention by cudnn" in output
    assert re.fullmatch(r"llama\w+ in fp4 on [a-z=,\d]+: dividing the step\n", errors)


def test_without_the_cluster_every_size_is_needed():
    command = [sys.executable, "-m", "train.main", "--plan", "--config=configs/tpu-slice.toml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    error = done.stderr.splitlines()[-1]
    none = "no cluster of SLURM's or of TPUs is found; elsewhere give HOST:PORT"
    assert error.startswith(f"error: coordinator=auto could not be joined: {none}")
    assert error.endswith("; to plan for it elsewhere, give every size of --mesh")


@pytest.mark.slow
def test_the_program_plans_elsewhere():
    command = [sys.executable, "-m", "train.main", *FLAGS, "--plan", "--mesh=fsdp=4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "A train step on each of 4 devices" in done.stdout
    assert "all-gather, sent" in done.stdout and "reduce-scatter, sent" in done.stdout
