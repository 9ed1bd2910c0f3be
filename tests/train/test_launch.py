"""The launcher: what it starts, again or not, and what it says; of programs that only end."""

import errno
import functools
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from train import launch
from train.errors import UserError
from train.rundir import ENDED

# Stands for train.main: writes down its flags, and ends by the statuses in a file, one a start.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
run_dir = Path(next(f for f in sys.argv if f.startswith("--run_dir=")).split("=")[1])
number = next((f[-1] for f in sys.argv if f.startswith("--process_id=")), "0")
with (run_dir / f"starts{number}").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
starts = len((run_dir / f"starts{number}").read_text().splitlines())
(run_dir / "config.json").touch()
status = json.loads((run_dir / "statuses").read_text())[number][starts - 1]
if status < 0:
    os.kill(os.getpid(), -status)
if status == 99:
    signal.pause()
if status == 97:  # hangs, and hears nothing
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (run_dir / "hangs").touch()
    time.sleep(30)
if status == 98:
    time.sleep(1)
    status = 143
sys.exit(status)
"""

# Launches a program in the place of train.main.
LAUNCHED = """
import signal, subprocess, sys
from train import launch
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)  # which tests in the background, or under nohup, ignore
program, *flags = sys.argv[1:]
class Popen(subprocess.Popen):
    def __init__(self, command, **options):
        super().__init__([sys.executable, program, *command[3:]], **options)
launch.subprocess.Popen = Popen
sys.exit(launch.main(flags))
"""

# Writes down the signals that arrive in the second after the first, and ends with a given status.
LISTENING = """
import signal, sys, time
received = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: received.append(signal.Signals(number).name))
print("listening", flush=True)
while not received:
    time.sleep(0.05)
end = time.monotonic() + 1
while time.monotonic() < end:
    time.sleep(0.05)
print(*received, flush=True)
sys.exit(int(sys.argv[-1]))
"""


# A run that only waits, in the place of what train.main does.
WAITING = """
import os, sys, time
from train import main
def wait(config):
    assert "JFP4_LAUNCHER" not in os.environ
    print("waiting", flush=True)
    time.sleep(60)
main.run = wait
sys.exit(main.main(sys.argv[1:]))
"""

ROOT = Path(__file__).parents[2]


@pytest.fixture
def launched(tmp_path, monkeypatch, capfd):
    """Launches a program that ends so; gives the status, each start's flags, and what was said."""
    (tmp_path / "program.py").write_text(PROGRAM)
    started = None

    class Popen(launch.subprocess.Popen):
        def __init__(self, command, **options):
            assert command[:3] == [sys.executable, "-m", "train.main"]
            super().__init__([sys.executable, tmp_path / "program.py", *command[3:]], **options)
            started()

    monkeypatch.setattr(launch, "PAUSE", 0.0)

    def run(statuses, *flags, as_it_starts=lambda: None):
        nonlocal started
        started = as_it_starts
        (tmp_path / "statuses").write_text(json.dumps(statuses))
        monkeypatch.setattr(launch.subprocess, "Popen", Popen)
        status = launch.main([f"--run_dir={tmp_path}", *flags])
        starts = [
            [json.loads(line) for line in path.read_text().splitlines()]
            for path in sorted(tmp_path.glob("starts*"))
        ]
        return status, starts, capfd.readouterr().err

    return run


def test_what_is_killed_starts_again_and_resumes(launched):
    status, (starts,), said = launched({"0": [-9, 1, 0]}, "--lr=1")
    assert status == 0
    assert [start[1:] for start in starts] == [["--lr=1"], *[["--lr=1", "--resume"]] * 2]
    assert "launch: process 0 of 1 here ended by SIGKILL" in said
    assert "launch: starting again, 2 of at most 10 times" in said


def test_a_mistake_does_not_start_again(launched):
    status, (starts,), _ = launched({"0": [2]})
    assert status == 2 and len(starts) == 1


def test_a_mistake_of_one_that_ends_others_is_what_is_told(launched):
    # So that both are found ended at once.
    status, (_, starts), said = launched(
        {"0": [1], "1": [2]}, "--processes=2", as_it_starts=lambda: time.sleep(1)
    )
    assert status == 2 and len(starts) == 1
    assert "process 1 of 2 here ended with status 2" in said


def test_what_was_interrupted_is_not_done_and_does_not_start_again(launched):
    # By a signal to another host: this launcher has received none. The second saves for longer.
    status, (first, second), said = launched({"0": [143], "1": [98]}, "--processes=2")
    assert status == 143 and len(first) == len(second) == 1
    assert "ended" not in said


def test_no_more_than_so_many_times(launched):
    status, (starts,), _ = launched({"0": [1, 1, 1]}, "--restarts=1")
    assert status == 1 and len(starts) == 2


def test_one_that_dies_ends_the_others(launched):
    # The second would wait for ever, as one does in a collective.
    status, (first, second), said = launched({"0": [-9, 0], "1": [99, 0]}, "--processes=2")
    assert status == 0 and len(first) == len(second) == 2
    for number, starts in enumerate((first, second)):
        for start in starts:
            assert "--num_processes=2" in start and f"--process_id={number}" in start
            assert sum(flag.startswith("--coordinator=127.0.0.1:") for flag in start) == 1
    assert "ended by SIGKILL" in said


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 143), (signal.SIGHUP, 143), (signal.SIGHUP, 0)],
    ids=["Ctrl-C", "closed", "closed as it is done"],
)
def test_a_signal_to_all_in_the_terminal_reaches_the_run_once(tmp_path, number, status):
    (tmp_path / "program.py").write_text(LISTENING)
    command = [sys.executable, "-c", LAUNCHED, tmp_path / "program.py"]
    command += [f"--run_dir={tmp_path}", str(status)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, process_group=0
    ) as launcher:
        try:
            assert launcher.stdout.readline() == "listening\n"
            for _ in range(2):  # which is one request
                os.killpg(
                    launcher.pid, number
                )  # as a terminal does at Ctrl-C, or when it is closed
            assert launcher.communicate(timeout=30)[0] == "SIGTERM\n"
        finally:
            launcher.kill()  # or what did not end would be waited for
    assert launcher.returncode == status


def test_a_second_signal_ends_what_hangs(launched, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "SAME_REQUEST", 0.1)

    def signals():
        while not (tmp_path / "hangs").exists():
            time.sleep(0.05)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    began = time.monotonic()
    thread = threading.Thread(target=signals)
    status, (starts,), said = launched({"0": [97]}, as_it_starts=thread.start)
    thread.join()
    assert status == 130 and len(starts) == 1 and time.monotonic() - began < 20
    assert "launch: asked again to end: killing what still runs\n" in said


@pytest.mark.skipif(sys.platform != "linux", reason="a process dies with another on Linux alone")
def test_a_run_dies_with_its_launcher(tmp_path):
    (tmp_path / "program.py").write_text(WAITING)
    command = [sys.executable, "-c", LAUNCHED, tmp_path / "program.py", f"--run_dir={tmp_path}/run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout.readline() == "waiting\n"
        launcher.kill()
        began = time.monotonic()
        assert launcher.stdout.read() == ""  # ends with the last that could write there
        assert time.monotonic() - began < 20


MEETING = ("--coordinator=host:1", "--num_processes=2", "--process_id=0")


def test_one_that_ends_tells_the_launchers_of_other_hosts(launched, tmp_path):
    file = tmp_path / ENDED
    status, (starts,), said = launched({"0": [2]}, *MEETING)
    assert file.read_text() == f"the launcher on {platform.node()} has ended, with status 2"
    # Another's does not start again; and what the first one told stays.
    status, (starts,), said = launched(
        {"0": [2, -9, 0]}, *MEETING, as_it_starts=lambda: file.write_text("told")
    )
    assert status == -9 and len(starts) == 2
    assert "launch: not starting again: told\n" in said
    assert file.read_text() == "told"


def test_a_full_disk_has_room_to_tell_that_one_has_ended(launched, tmp_path, monkeypatch):
    def full(path, text):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    launch._Others(tmp_path / "run").tell("told")
    assert launch._Others(tmp_path / "run").ended() == "the launcher on another host has ended"


def test_what_was_told_of_an_earlier_start_does_not_count(launched, tmp_path):
    file = tmp_path / ENDED
    file.write_text("told")
    os.utime(file, (time.time() - 2 * launch.LATE,) * 2)
    status, (starts,), _ = launched({"0": [-9, 0]}, *MEETING)
    assert status == 0 and len(starts) == 2
    assert file.read_text().endswith("with status 0")


def test_who_has_no_others_tells_nobody(launched, tmp_path):
    (tmp_path / "auto.toml").write_text('coordinator = "auto"\n')
    for flags in ((), ("--processes=1",)):
        assert launched({"0": [2, 2]}, *flags)[0] == 2
        assert not (tmp_path / ENDED).exists()
    assert launch._meets_others([f"--config={tmp_path}/auto.toml"])
    assert launch._meets_others(["--config=none"])  # which nobody knows


def test_a_run_dir_that_cannot_be_read(launched, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(UserError, match=r"^--run_dir=r cannot be read \(Permission denied\)"):
        launch.launch(["--run_dir=r"], None, 0)


def test_a_signal_between_two_attempts_ends_it(launched, monkeypatch):
    say = launch._say

    def interrupted(message):
        say(message)
        if "starting again" in message:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(launch, "_say", interrupted)
    status, (starts,), _ = launched({"0": [1, 0]})
    assert status == 1 and len(starts) == 1


def test_a_signal_while_a_process_starts_is_handed_on(launched):
    status, *_ = launched(
        {"0": [99]}, as_it_starts=functools.partial(signal.raise_signal, signal.SIGTERM)
    )
    assert status == -signal.SIGTERM


def test_what_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with launch._Terminated():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, before)


def test_it_wants_a_run_dir_and_one_way_to_meet(capsys):
    assert launch.main(["--lr=1"]) == 2
    assert "--run_dir=None; expected a directory" in capsys.readouterr().err
    assert launch.main(["--run_dir=r", "--processes=2", "--coordinator=h:1"]) == 2
    assert "--processes=2 with --coordinator; expected one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "expected"), [("--processes=0", ">= 1"), ("--restarts=-1", ">= 0")]
)
def test_numbers_that_start_nothing(capsys, flag, expected):
    assert launch.main(["--run_dir=r", flag]) == 2
    assert capsys.readouterr().err == f"error: {flag}; expected {expected}\n"


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with launch._Terminated():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
