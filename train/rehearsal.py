"""A step for a mesh that this machine does not have: compiled for as many host devices, not run.

A process has the devices that it starts with, so the rehearsal is a process of its own.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.stages import Lowered
from rich.console import Console
from rich.table import Table

from jfp4.sharding import parse_mesh
from train.collectives import Collective, collectives, summary
from train.config import TrainConfig, from_dict, to_dict
from train.errors import UserError

_PASS = "spmd-partitioning"
"""After it every collective is there, in the dtypes of the model; later, CPUs widen bfloat16."""


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What a step takes on each device of a mesh.

    Attributes:
        devices: of the mesh.
        parameters: of the model.
        state_bytes: the state's, on one device; exact.
        work_bytes: of codes, gradients and activations, on one device, estimated from shapes;
            those of activations that ``tensor`` divides are counted whole.
        attention: what computes attention on GPUs, which these are taken for.
        collectives: what a step sends, before a compiler joins any two.
    """

    devices: int
    parameters: int
    state_bytes: int
    work_bytes: int
    attention: str
    collectives: list[Collective]

    def table(self) -> Table:
        """The rehearsal as a table for people."""
        table = Table(title=f"A train step on each of {self.devices} devices, from shapes")
        table.add_column("what")
        table.add_column("number", justify="right")
        table.add_column("GiB", justify="right")
        for what, size in (
            ("state", self.state_bytes),
            ("codes, gradients, activations, at most", self.work_bytes),
        ):
            table.add_row(what, "", f"{size / 2**30:.2f}")
        for kind, (count, sent) in summary(self.collectives).items():
            table.add_row(f"{kind}, sent", f"{count:,}", f"{sent / 2**30:.2f}")
        table.caption = f"{self.parameters:,} parameters, attention by {self.attention} as on GPUs"
        return table

    def show(self) -> None:
        """Prints the table on stdout."""
        Console(width=80).print(self.table())


def devices_of(config: TrainConfig) -> int | None:
    """How many devices the mesh has that is asked for; None where it takes what there is."""
    sizes = {} if config.mesh is None else parse_mesh(config.mesh)
    return None if not sizes or -1 in sizes.values() else math.prod(sizes.values())


def rehearse(config: TrainConfig) -> Rehearsal:
    """Rehearses a step of ``config`` on host devices.

    Raises:
        UserError: the mesh has a -1, or does not divide the model or the batch.
    """
    devices = devices_of(config)
    if devices is None:
        raise UserError(f"mesh={config.mesh}; expected every size, to plan for other devices")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "train.rehearsal"],
        input=json.dumps(to_dict(_alone(config))),
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        if done.returncode > 0 and said:
            raise UserError(said[-1].removeprefix("error: "))
        raise UserError(
            f"mesh={config.mesh}: its rehearsal ended with status {done.returncode}; expected "
            f"memory for {devices} host devices"
        )
    found = json.loads(done.stdout.splitlines()[-1])
    sent = [Collective(**c | {"group": tuple(c["group"])}) for c in found.pop("collectives")]
    return Rehearsal(**found, collectives=sent)


def _alone(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(
        config, backend="xla", plan=False, coordinator=None, num_processes=None, process_id=None
    )


def _rehearse_here(config: TrainConfig) -> Rehearsal:
    from jfp4.models.llama import attention_implementation
    from train.placement import place
    from train.plan import estimated_activations, lowered_step, on_cpu, sizes
    from train.step import Trainer

    attention = attention_implementation(config.llama, "gpu")
    config = on_cpu(config)

    rows = config.batch_size // config.optimizer.accumulation
    placement = place(config.mesh, config.llama, rows)
    trainer = Trainer(config, placement)
    plan = sizes(trainer)
    with placement.in_force():
        sent = collectives(partitioned(lowered_step(trainer)))
    own = dataclasses.replace(config, batch_size=config.batch_size // placement.shards)
    return Rehearsal(
        devices=placement.mesh.size,
        parameters=plan.parameters,
        state_bytes=plan.weights + plan.optimizer,
        work_bytes=plan.prepared + plan.gradients + estimated_activations(own, attention),
        attention=attention,
        collectives=sent,
    )


def partitioned(lowered: Lowered) -> str:
    """The HLO of a program that XLA has divided over a mesh, but not yet made for its devices.

    From then on nothing that is compiled is cached.
    """
    with tempfile.TemporaryDirectory() as folder:
        dumped: dict[str, str | bool] = {
            "xla_dump_to": folder,
            "xla_dump_hlo_pass_re": _PASS,
            "xla_dump_hlo_as_text": True,
        }
        # What is found in the cache is not compiled, and so not dumped.
        jax.config.update("jax_enable_compilation_cache", False)
        lowered.compile(compiler_options=dumped)
        (text,) = Path(folder).glob(f"*after_{_PASS}*.txt")
        return text.read_text()


def main() -> int:
    """Reads a configuration from stdin, and writes its rehearsal to stdout, both as JSON."""
    config = from_dict(json.load(sys.stdin))
    try:
        found: dict[str, Any] = dataclasses.asdict(_rehearse_here(config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
