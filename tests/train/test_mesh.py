"""A run on eight devices, however they are laid out, is the run on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from on_meshes import MESHES, ROWS, SEQ

pytestmark = pytest.mark.timeout(900)  # whichever test comes first waits for the losses
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def losses():
    flag = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("on_meshes.py")],
        env=os.environ | {"XLA_FLAGS": flag, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def differences(losses, case):
    return [abs(a - b) for a, b in zip(losses[case], losses["one device"], strict=True)]


def bounds(losses):
    """What the losses of a right reduction may differ by, at each step.

    The first: each token's loss is the same but for roundings of its own, and any two orders of
    summing t of them differ by at most 2 (t - 1) units roundoff, relatively. Later ones: a code may
    fall on the other side of a rounding, and from then on the runs part. How fast they do is
    measured on one device, in three runs with the rows of every batch in another order, which
    changes the sums over a batch, and in three of weights that begin as far off as sums over the
    model's width are in another order. Twice the largest difference seen is what another order
    may make.
    """
    first = losses["one device"][0] * 2 * (ROWS * SEQ - 1) * 2.0**-24
    others = [
        differences(losses, case) for case in losses if case.startswith(("order", "rounding"))
    ]
    assert len(others) == 6
    largest = max(map(max, others))
    return [first, *[2 * largest] * (len(losses["one device"]) - 1)]


@pytest.mark.slow
@pytest.mark.parametrize("case", [*MESHES, "written out"])
def test_losses_are_those_of_one_device(losses, case):
    found = differences(losses, case)
    assert all(a <= b for a, b in zip(found, bounds(losses), strict=True)), found


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_codes_of_the_first_step_are_those_of_one_device(losses, mesh):
    found = losses[f"{mesh}, codes"]
    assert len(found) == 20 and set(found) == {0}


@pytest.mark.slow
@pytest.mark.parametrize(("comm", "least"), [("bfloat16", 6), ("fp8", 100)])
def test_gradients_in_few_bits_change_less_than_a_wrong_reduction(losses, comm, least):
    found, wrong = differences(losses, comm), differences(losses, "half")
    assert found[0] <= bounds(losses)[0]  # before any gradient
    assert sum(found) < sum(wrong) / 4
    # And they were sent so: no order of float32's sums does as much in one step.
    assert found[1] > least * max(differences(losses, f"order {i}")[1] for i in range(3))


@pytest.mark.slow
def test_a_reduction_over_half_of_the_devices_breaks_every_bound(losses):
    found = differences(losses, "half")
    assert all(a > 2 * b for a, b in zip(found, bounds(losses), strict=True)), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "parts"),
    [("data=8", 1), ("fsdp=8", 8), ("tensor=8", 8), ("data=2,fsdp=2,tensor=2", 4)],
)
def test_a_device_holds_its_part_of_the_state(losses, mesh, parts):
    # Besides, whole, the scales of norms and some counters.
    assert 0 <= losses[f"{mesh} holds"] - 1 / parts < 0.004
