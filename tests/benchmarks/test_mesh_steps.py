"""Steps on meshes: what is made of times, and the whole program with a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import mesh, report_meshes
from benchmarks.timing import Event

ROOT = Path(__file__).parents[2]


def case(mesh="data=2", tokens_per_s=180.0, **changes):
    return {
        "model": "llama1b", "recipe": "fp4", "mesh": mesh, "grad_comm": "float32", "overlap": True,
        "devices": 1 if mesh is None else 2, "layers": 24, "tokens": 16, "ms": 10.0,
        "tokens_per_s": tokens_per_s, "state_bytes": 2**30, "temp_bytes": 2**31,
        "collectives": {} if mesh is None else {"all-reduce": [3, 2.0**30]},
        "traced": {"busy_ms": 9.0, "collective_ms": 4.0, "exposed_ms": 1.0, "kernels": {}},
        **changes,
    }  # fmt: skip


def result(*cases):
    source = {"device": "NVIDIA X", "versions": {"jax": "1"}, "commit": "abc", "nccl": {}}
    return {"provenance": source, "devices": 2, "cases": cases, "left_out": [], "errors": []}


def test_a_collective_is_alone_where_nothing_else_goes_on():
    events = [
        Event(0, 10e6, "gemm"),
        Event(4e6, 14e6, "ncclDevKernel_AllReduce_Sum_f32_RING_LL"),
        Event(12e6, 16e6, "ncclDevKernel_SendRecv"),
        Event(15e6, 20e6, "loop_add_fusion_7"),
        Event(15e6, 15.05e6, "brief"),
        Event(30e6, 34e6, "ncclDevKernel_SendRecv"),
    ]
    found = mesh.shares(events, steps=2)
    # From 0 to 20 and from 30 to 34; from 4 to 16 and from 30; from 10 to 15 and from 30.
    assert found["busy_ms"] == pytest.approx(12)
    assert found["collective_ms"] == pytest.approx(8)
    assert found["exposed_ms"] == pytest.approx(4.5)
    assert found["kernels"] == pytest.approx(
        {
            "ncclDevKernel_AllReduce_Sum_f32_RING_LL": 5,
            "gemm": 5,
            "ncclDevKernel_SendRecv": 4,
            "loop_add_fusion": 2.5,
        }
    )


def test_a_case_stands_beside_one_gpu_of_its_own_model_and_recipe():
    cases = (case(None, 100.0), case(None, 50.0, recipe="bf16"), case(tokens_per_s=180.0))
    found = [mesh.over_one(result(*cases), each) for each in cases]
    assert found == [None, None, pytest.approx(1.8)]
    assert mesh.over_one(result(cases[2]), cases[2]) is None
    assert "| 1.800x " in mesh.table(result(*cases))


def test_the_document_says_so_where_nothing_was_measured():
    assert report_meshes.measured([]).startswith("Nothing yet on more than one GPU")


def test_the_document_compares_cases_that_differ_in_one_thing():
    cases = (
        case(None, 100.0),
        case(),
        case(tokens_per_s=189.0, grad_comm="fp8"),
        case(tokens_per_s=180.0, grad_comm="bfloat16"),
        case(tokens_per_s=150.0, overlap=False),
    )
    text = report_meshes.measured([result(*cases) | {"left_out": ["llama7b, fp4"]}])
    assert "2 x NVIDIA X of one host; jax 1; commit abc" in text
    assert "`data=2`: gradients in fp8 instead of float32 change the speed by +5.0%." in text
    assert "`data=2`: gradients in fp8 instead of bfloat16 change the speed by +5.0%." in text
    assert "own order, change the speed by +20.0%." in text
    assert text.count("- llama1b") == 4
    assert text.endswith("Not measured: llama7b, fp4.")


@pytest.mark.slow
def test_a_tiny_model_on_two_host_devices(tmp_path):
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JFP4_COMMIT": "abc"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.mesh", "--quick", f"--out={tmp_path}",
         "--only=bf16"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("mesh-*-quick.json")
    found = json.loads(path.read_text())
    assert found["provenance"]["commit"] == "abc"
    one, two = found["cases"]
    assert (one["mesh"], two["mesh"]) == (None, "fsdp=2")
    assert two["tokens"] == 2 * one["tokens"]
    assert one["collectives"] == {} and sum(n for n, _ in two["collectives"].values()) > 0
    assert two["state_bytes"] < 0.6 * one["state_bytes"]
    assert two["tokens_per_s"] == pytest.approx(two["tokens"] / two["ms"] * 1e3)


def test_one_device_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mesh", "--quick"])
    assert mesh.main() == 2
    assert capsys.readouterr().err == (
        "error: JAX sees 1 cpu device; expected two GPUs or more, or --quick on any two devices\n"
    )
