"""Several processes of one run: killed, interrupted, late, and come back as fewer or more."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import assert_same_arrays, lines_of, saved_arrays

from train import processes
from train.config import parse
from train.errors import UserError
from train.launch import _meeting
from train.main import STOPPED

pytestmark = pytest.mark.timeout(900)  # of several runs
ROOT = Path(__file__).parents[2]
DEVICES = 4
BUSY = 300  # seconds for a run to compile and come to its end, on a machine with other work
FLAGS = (
    "--model.num_layers=1",
    "--model.embed_dim=32",
    "--model.mlp_dim=64",
    "--model.num_heads=2",
    "--model.num_kv_heads=2",
    "--batch_size=4",
    "--seq_len=16",
    "--steps=24",
    "--eval_every=24",
    "--eval_batches=2",
    "--checkpoint.every=4",
    "--log.every=1",
    "--log.health_every=0",
    "--mesh=fsdp=2,tensor=2",
)

# Kills its process when it opens a file of the given checkpoint.
KILLED = """
import os, signal, sys
part = sys.argv[1]
def kill(event, args):
    if event in ("open", "os.mkdir", "os.rename") and part in str(args[0]):
        os.kill(os.getpid(), signal.SIGKILL)
if part:
    sys.addaudithook(kill)
from train.main import main
sys.exit(main(sys.argv[2:]))
"""

# Joins as SLURM's only process, in every environment that is given, and prints the devices it sees.
JOINED = """
import json, os, sys
import jax
from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES  # public nowhere
from train import processes
from train.config import parse
before = dict(os.environ)
for environment in map(json.loads, sys.argv[1:]):
    os.environ.clear()
    os.environ.update(before | environment)
    with processes.joined(parse(["--coordinator=auto"])):
        print(CUDA_VISIBLE_DEVICES.value)
    jax.config.update("jax_cuda_visible_devices", "all")
"""
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}

# Its disk is full when it writes the line of step 6, of which the other processes know nothing.
FULL = """
import errno, os, sys
from train.main import main
from train.metrics import RunLog
write = RunLog.step
def step(self, line):
    if line["step"] == 6:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write(self, line)
RunLog.step = step
sys.exit(main(sys.argv[2:]))
"""


class Group:
    """Starts processes that share four devices, and sees to their end."""

    def __init__(self, compiled, text):
        self.compiled, self.text = compiled, text

    def start(self, processes, run_dir, *flags, killed_at=None):
        """Starts them; of the last one, ``killed_at`` is the checkpoint in which it dies."""
        meeting = _meeting(processes) if processes > 1 else [[]]
        return [
            self._start(
                f"--run_dir={run_dir}",
                *own,
                *flags,
                devices=DEVICES // processes,
                killed_at=killed_at if number == processes - 1 else None,
            )
            for number, own in enumerate(meeting)
        ]

    def _start(self, *flags, devices, killed_at, program=KILLED):
        environment = self.compiled | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
        }
        part = f"checkpoints/{killed_at}" if killed_at else ""
        command = [sys.executable, "-c", program, part, *FLAGS, f"--data={self.text}", *flags]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, processes, run_dir, *flags):
        """Runs to the end; returns what the first process said."""
        with ended(self.start(processes, run_dir, *flags)) as running:
            outputs = [process.communicate()[0] for process in running]
        codes = [process.returncode for process in running]
        assert codes == [0] * processes, "\n".join(outputs)
        return outputs[0]


@contextmanager
def ended(running):
    """No process outlives the test."""
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def group(compiled_once, text):
    return Group(compiled_once, text)


@pytest.fixture(scope="module")
def two(group, tmp_path_factory):
    """The unbroken run of two processes, of which the second comes late."""
    run_dir = tmp_path_factory.mktemp("processes") / "unbroken"
    first, second = _meeting(2)
    early = group._start(f"--run_dir={run_dir}", *first, devices=2, killed_at=None)
    with ended([early]):
        lines = iter(early.stdout.readline, "")
        assert any(line.startswith("waiting for all 2 processes at 127.0.0.1:") for line in lines)
        # The other one has yet to start its interpreter: this one does wait for seconds.
        late = group._start(f"--run_dir={run_dir}", *second, devices=2, killed_at=None)
        with ended([late]):
            said, more = early.communicate()[0], late.communicate()[0]
    assert early.returncode == late.returncode == 0, said + more
    assert "done: validation loss" in said and "done:" not in more
    return run_dir


def losses(run_dir):
    return [line["loss"] for line in lines_of(run_dir)]


@pytest.mark.slow
def test_one_process_writes(two):
    assert [line["step"] for line in lines_of(two)] == list(range(1, 25))
    assert len(list((two / "tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_killed_in_a_save_the_others_stop_and_the_bits_go_on(group, two, tmp_path):
    run_dir = tmp_path / "run"
    with ended(group.start(2, run_dir, killed_at=12)) as running:
        killed, _ = running[1].communicate(timeout=BUSY)
        began = time.monotonic()
        said, _ = running[0].communicate(timeout=60)
        assert time.monotonic() - began < 60
    assert running[1].returncode == -signal.SIGKILL, killed
    assert running[0].returncode not in (0, -signal.SIGKILL)
    # Of the two that notice, the collective that fails and the coordinator, whichever is first.
    assert "process 0 of 2 stops" in said or "another task died" in said, said
    assert not (run_dir / "checkpoints" / "12").exists()
    group.run(2, run_dir, "--resume")
    assert_same_arrays(saved_arrays(run_dir, 24), saved_arrays(two, 24))
    assert losses(run_dir) == losses(two)


@pytest.mark.slow
def test_sigterm_to_one_of_four_saves_on_all_and_one_goes_on_elsewhere(group, two, tmp_path):
    run_dir = tmp_path / "run"
    with ended(group.start(4, run_dir, "--checkpoint.host_gib=0.00001")) as running:
        lines = iter(running[0].stdout.readline, "")
        said = list(itertools.takewhile(lambda line: not line.startswith("step 5/"), lines))
        assert running[0].poll() is None, "".join(said)
        running[3].send_signal(signal.SIGTERM)
        said = "".join(process.communicate(timeout=60)[0] for process in running)
    assert [process.returncode for process in running] == [STOPPED] * 4, said
    # A single command would not go on with it.
    go_on = "to go on, start all processes again with the same flags and --resume"
    stopped = int(re.search(rf"saved step (\d+); {go_on}\n", said)[1])
    assert 5 <= stopped < 24
    group.run(1, run_dir, "--resume", "--mesh=data=2,fsdp=2")
    # Sums in other orders part the runs by less than a tenth of what batches differ by: a batch
    # left out, or taken twice, would show at every later step.
    found, wanted = np.array(losses(run_dir)), np.array(losses(two))
    tolerance = 0.1 * np.mean(np.abs(np.diff(wanted)))
    np.testing.assert_allclose(found, wanted, atol=tolerance)
    assert np.max(np.abs(found[stopped + 1 :] - wanted[stopped:-1])) > 5 * tolerance


@pytest.mark.slow
def test_a_profile_is_the_first_process_s(group, tmp_path):
    run_dir = tmp_path / "run"
    said = group.run(2, run_dir, "--profile=2")
    assert f"traced 2 steps into {run_dir}/profile" in said
    assert len([*run_dir.rglob("*.xplane.pb")]) == 1
    assert len([*run_dir.rglob("perfetto_trace.json.gz")]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--data=none", "data none does not exist"),
        ("--mesh=data=2,fsdp=2", "mesh (fsdp=2,tensor=2, now data=2,fsdp=2); expected the flags"),
    ],
)
def test_a_mistake_of_one_is_told_by_all(group, tmp_path, flag, message):
    first, second = _meeting(2)
    flags = (f"--run_dir={tmp_path}/run",)
    one = group._start(*flags, *first, devices=2, killed_at=None)
    other = group._start(*flags, *second, flag, devices=2, killed_at=None)
    with ended([one, other]) as running:
        outputs = [process.communicate(timeout=BUSY)[0] for process in running]
    assert [process.returncode for process in running] == [2, 2], outputs
    for said in outputs:
        assert f"error: process 1: {message}" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_one_alone_cannot_write_is_told_at_once(group, tmp_path):
    first, second = _meeting(2)
    flags = (f"--run_dir={tmp_path}/run",)
    one = group._start(*flags, *first, devices=2, killed_at=None, program=FULL)
    other = group._start(*flags, *second, devices=2, killed_at=None)
    with ended([one, other]):
        said, _ = one.communicate(timeout=BUSY)
        other.communicate(timeout=60)
    assert one.returncode == 2 and other.returncode not in (0, 2)
    # Nothing follows it, such as how the runtime aborts.
    message = f"cannot write to {tmp_path}/run: No space left on device; make room and add --resume"
    assert said.splitlines()[-1] == f"error: {message}"


class Exit(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def alone(monkeypatch):
    """Joins processes that do not exist; gives what they were to be joined by."""
    given = {}

    def missing(key, timeout_ms):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")

    def end(status):
        raise Exit(status)

    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **options: given.update(options)
    )
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: given.update(parted=True))
    monkeypatch.setattr(processes.multihost, "get_barrier_sync_fn", lambda: missing)
    monkeypatch.setattr(os, "_exit", end)
    return given


JOINING = ("--coordinator=host0:7654", "--num_processes=2", "--process_id=0")


def test_a_mistake_that_others_do_not_meet_ends_the_process_at_once(alone, capsys, monkeypatch):
    with pytest.raises(Exit) as ended, processes.joined(parse(JOINING)):
        raise UserError("metrics.jsonl:2 is no line of a step")
    assert ended.value.args == (2,) and "parted" not in alone
    assert capsys.readouterr().err.endswith("error: metrics.jsonl:2 is no line of a step\n")
    # And where all of them come there, they part in order.
    monkeypatch.setattr(processes.multihost, "get_barrier_sync_fn", lambda: lambda **options: None)
    with pytest.raises(SystemExit) as ended, processes.joined(parse(JOINING)):
        raise UserError("no such data")
    assert ended.value.code == 2 and alone["parted"]


def test_a_first_process_that_is_slow_at_the_end_is_waited_for(alone):
    with processes.joined(parse(JOINING)):
        pass
    assert alone["parted"] and alone["shutdown_timeout_seconds"] == processes.MEETING


def test_what_decides_the_collectives_is_the_same_in_all_processes(monkeypatch):
    told = []
    monkeypatch.setattr(processes, "of_first", lambda make: told.append(make()) or told[0])
    processes.check_same(parse(["--mesh=fsdp=4", "--eval_every=4", "--run_dir=a"]))
    own = ("--mesh=fsdp=4", "--eval_every=4", "--run_dir=b", "--data=x", "--profile=3", *JOINING)
    processes.check_same(parse(own))
    other = ("--checkpoint.every=5", "--log.every=2", "--backend=xla", "--eval_every=5")
    with pytest.raises(UserError) as raised:
        processes.check_same(parse(["--mesh=data=2,fsdp=2", *other]))
    assert str(raised.value) == (
        "backend (None, now xla), checkpoint.every (100, now 5), eval_every (4, now 5), "
        "log.every (10, now 2), mesh (fsdp=4, now data=2,fsdp=2); expected the flags of process 0"
    )


def test_what_is_waited_for_is_told_before_it_is_too_late_to_speak():
    flags = ("--coordinator=host0:7654", "--num_processes=4", "--process_id=2")
    rest = "; XLA aborts this one if they are not there within 600 seconds"
    assert processes._awaited(parse(flags)) == (
        f"all 4 processes at host0:7654, this one being process 2{rest}"
    )
    assert processes._awaited(parse(["--coordinator=auto"])).endswith(f"cluster tells of{rest}")


def test_a_process_has_all_devices_unless_slurm_runs_several_on_its_host():
    cases = [
        ({}, "all"),
        ({"SLURM_NTASKS_PER_NODE": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, "all"),
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "1"}, "all"),
        ({"JAX_LOCAL_DEVICE_IDS": "2,3"}, "2,3"),
        ({"SLURM_NTASKS_PER_NODE": "8"}, "0"),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2),1"}, "0"),
    ]
    address = _meeting(1)[0][0].partition("=")[2]
    place = SLURM | {"JAX_COORDINATOR_ADDRESS": address, "PYTHONPATH": str(ROOT)}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        [sys.executable, "-c", JOINED, *(json.dumps(environment) for environment, _ in cases)],
        cwd=ROOT,
        env=clean | place,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [devices for _, devices in cases]
