"""What a run of the trainer says of speed and memory, as a result to be kept.

``python -m benchmarks.large_run RUN_DIR`` reads what ``python -m train.main`` wrote there, and
writes results/run-MODEL-RECIPE-DEVICE.json.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.provenance import RESULTS, commit
from train.compare import read_metrics

SETTLED = 5
"""Steps of a process after which a step takes what every step takes."""


def main() -> int:
    """Reads, writes and prints; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_run")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--commit", default=commit(), help="that the run was made with")
    arguments = parser.parse_args()
    found = result(arguments.run_dir) | {"commit": arguments.commit}
    device = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    out = RESULTS / f"run-{found['model']}-{found['recipe']}-{device}.json"
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"{out}: {found['tokens_per_s']:,.0f} tokens/s, peak {found['peak_bytes'] / 2**30:.1f} GiB"
    )
    return 0


def result(run_dir: Path) -> dict[str, Any]:
    """The run's configuration, speed, memory and losses.

    Raises:
        ValueError: it has no step past the first ``SETTLED``, or did not reach its end.
    """
    about = json.loads((run_dir / "config.json").read_text())
    config, lines = about["config"], read_metrics(run_dir)
    speeds = [line["tokens_per_s"] for line in lines if line["step"] > SETTLED]
    if not speeds or "peak_bytes" not in lines[-1]:
        raise ValueError(
            f"{run_dir} has {len(lines)} steps; expected a whole run of over {SETTLED}"
        )
    return {
        "device": about["device"],
        "versions": about["versions"],
        "parameters": about["parameters"],
        "planned_bytes": about.get("planned_bytes"),  # runs of before it was kept have none
        "model": config["model"],
        "recipe": config["recipe"],
        "optimizer": config["optimizer"],
        "remat": config["llama"]["remat"],
        "scan_layers": config["llama"]["scan_layers"],
        "batch_size, seq_len": [config["batch_size"], config["seq_len"]],
        "tokens_per_s": statistics.median(speeds),
        "peak_bytes": lines[-1]["peak_bytes"],
        "loss": [line["loss"] for line in lines],
        "valid_loss": lines[-1]["valid_loss"],
    }


if __name__ == "__main__":
    sys.exit(main())
