"""What a step of llama13b would take on meshes of many GPUs, from a step compiled for them.

``python -m benchmarks.scaling`` measures nothing on a network: it compiles, counts the bytes that
every device sends, and writes results/scaling.json. The time that these bytes take is a model,
whose constants are below and in the result.
"""

import argparse
import json
import math
import sys
from typing import Any

from benchmarks.provenance import RESULTS, commit
from jfp4.sharding import parse_mesh
from train.collectives import summary
from train.config import parse
from train.rehearsal import Rehearsal, rehearse

HOST = 8
"""GPUs of one host."""

INSIDE, BETWEEN = 450e9, 50e9
"""Bytes a second that a GPU can send: over NVLink in its host (an H200's), and over its own 400
gigabit network adapter to other hosts."""

REACHED = 0.8
"""Share of these that collectives reach; assumed, not measured."""

TOKENS = 100e9
"""Tokens of the run whose cost is reckoned."""

MESHES = ("fsdp=64", "fsdp=8,tensor=8", "data=16,fsdp=64", "data=16,fsdp=8,tensor=8")

SEQUENCES = 8
"""A GPU's sequences a step, and those of a microbatch, which GPUs along tensor share: as in the
measured run on one GPU."""


def main() -> int:
    """Compiles every mesh, and writes the result; returns the exit status."""
    argparse.ArgumentParser(prog="python -m benchmarks.scaling").parse_args()
    measured = json.loads((RESULTS / "run-llama13b-fp4-nvidia-h200.json").read_text())
    result = {
        "model": "llama13b",
        "commit": commit(),
        "constants": {
            "GPUs a host": HOST,
            "NVLink, bytes a second": INSIDE,
            "network, bytes a second": BETWEEN,
            "share reached": REACHED,
            "tokens a second of one GPU": measured["tokens_per_s"],
            "tokens": TOKENS,
        },
        "meshes": [
            row(mesh, comm, measured["remat"], measured["tokens_per_s"])
            for mesh in MESHES
            for comm in ("float32", "bfloat16", "fp8")
        ],
    }
    (RESULTS / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


def row(mesh: str, grad_comm: str, remat: str, tokens_per_s: float) -> dict[str, Any]:
    """A mesh's bytes, collectives and modelled times; with the remat of what was measured."""
    print(f"{mesh}, gradients in {grad_comm}: compiling", file=sys.stderr, flush=True)
    sizes = parse_mesh(mesh)
    devices = math.prod(sizes.values())
    config = parse(
        [
            f"--mesh={mesh}",
            f"--grad_comm={grad_comm}",
            "--model=llama13b",
            f"--batch_size={SEQUENCES * devices}",
            f"--optimizer.accumulation={sizes.get('tensor', 1)}",
            "--seq_len=2048",
            "--optimizer.master=bfloat16",
            "--optimizer.first_moment=e4m3",
            "--optimizer.second_moment=float16",
            f"--model.remat={remat}",
        ]
    )
    found = rehearse(config)
    tokens = SEQUENCES * devices * config.seq_len
    inside, between = sent(found)
    seconds = {
        "compute": tokens / devices / tokens_per_s,
        "inside": inside / (INSIDE * REACHED),
        "between": between / (BETWEEN * REACHED),
    }
    together = sum(seconds.values())
    overlapped = max(seconds.values())
    return {
        "mesh": mesh,
        "grad_comm": grad_comm,
        "devices": found.devices,
        "tokens a step": tokens,
        "state bytes": found.state_bytes,
        "work bytes": found.work_bytes,
        "collectives": summary(found.collectives),
        "sent inside": inside,
        "sent between": between,
        "seconds": seconds,
        "days": [TOKENS / tokens * time / 86400 for time in (overlapped, together)],
        "GPU hours": [TOKENS / tokens * time / 3600 * devices for time in (overlapped, together)],
    }


def sent(found: Rehearsal) -> tuple[float, float]:
    """Bytes that a device sends in a step inside its host, and between hosts.

    A ring that visits more than one host crosses between two of them with all that it sends.
    """
    crossing = [c for c in found.collectives if len({device // HOST for device in c.group}) > 1]
    between = sum(c.sent for c in crossing)
    return sum(c.sent for c in found.collectives) - between, between


if __name__ == "__main__":
    sys.exit(main())
