"""Where a measurement comes from: device, versions, commit and date."""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax")
MEASURED = ("jfp4", "train", "cuda_ffi", "CMakeLists.txt", "benchmarks/*.py")
"""What a measurement depends on."""


def provenance() -> dict[str, Any]:
    """Device, processor features, versions, commit (with "+changes" if not clean), and date."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def commit() -> str:
    """The commit that is measured: from git, or JFP4_COMMIT where there is no repository.

    Raises:
        ValueError: if JFP4_COMMIT is set but names none.
    """
    named = os.environ.get("JFP4_COMMIT")
    if named is not None:
        if not named.strip():
            raise ValueError(f"JFP4_COMMIT must be the measured commit, not {named!r}")
        return named
    head = _git("rev-parse", "--short=12", "HEAD")
    return head + ("+changes" if _git("status", "--porcelain", "--", *MEASURED) else "")


def results(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """What a benchmark has written, in the order of its files' names, but for quick looks."""
    found = (json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-*.json")))
    return [result for result in found if not result.get("quick")]


def flags_of(source: dict[str, Any]) -> str:
    """What XLA was asked for in a measurement, to be added to where it comes from; or nothing."""
    flags = source.get("xla_flags", "")
    return f"; `XLA_FLAGS={flags}`" if flags else ""


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _cpu() -> str:
    names = {
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    return ", ".join(sorted(names))


def cpu_has(feature: str) -> bool:
    """Whether the processor reports an instruction set extension, such as "avx512_vnni"."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return feature in flags.split()
