"""What memory a run takes, against what the device has, before anything is allocated."""

import dataclasses
import math
from typing import Any

import jax
import psutil
from jax.stages import Compiled
from rich.console import Console
from rich.table import Table

from train.step import Trainer

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of a train step on one device.

    Attributes:
        parameters: number of parameters.
        weights: bytes of the master weights.
        optimizer: bytes of the optimizer's state.
        gradients: bytes of the gradient.
        activations: bytes of everything else that the step needs at its peak.
        device_bytes: what the device has.
        device: the device's name.
        compiled: whether the compiler said so; otherwise it is an estimate from shapes, made
            where weights, state and gradient alone already exceed the device.
    """

    parameters: int
    weights: int
    optimizer: int
    gradients: int
    activations: int
    device_bytes: int
    device: str
    compiled: bool

    @property
    def total(self) -> int:
        """Peak bytes of a step."""
        return self.weights + self.optimizer + self.gradients + self.activations

    @property
    def fits(self) -> bool:
        """Whether the device holds it."""
        return self.total <= self.device_bytes

    def table(self) -> Table:
        """The plan as a table for people."""
        source = "from the compiled step" if self.compiled else "estimated from shapes"
        table = Table(title=f"Memory of a train step, {source}")
        table.add_column("what")
        table.add_column("GiB", justify="right")
        table.add_column("bytes", justify="right")
        for what, size in (
            ("weights", self.weights),
            ("optimizer state", self.optimizer),
            ("gradients", self.gradients),
            ("activations and workspace", self.activations),
            ("together", self.total),
            (f"{self.device} has", self.device_bytes),
        ):
            table.add_row(what, f"{size / GIB:.2f}", f"{size:,}")
        table.caption = f"{self.parameters:,} parameters\nThe run " + (
            "fits"
            if self.fits
            else f"is {(self.total - self.device_bytes) / GIB:.2f} GiB too large"
        )
        return table

    def show(self) -> None:
        """Prints the table on stdout."""
        Console(width=80).print(self.table())


def make_plan(trainer: Trainer) -> tuple[Plan, Compiled | None]:
    """Plans a run's memory from abstract shapes: no array is made.

    Returns:
        The plan, and the compiled step, or None where the estimate already showed that it does
        not fit: compiling what cannot run would only keep the user waiting.
    """
    state = trainer.abstract_state()
    weights = _bytes(state.params) + _bytes(state.stats)
    device_bytes, device = device_memory()
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    fixed = Plan(
        parameters=parameters,
        weights=weights,
        optimizer=_bytes((state.opt_state, state.loss_scale)),
        gradients=_bytes(state.params),
        activations=_estimated_activations(trainer),
        device_bytes=device_bytes,
        device=device,
        compiled=False,
    )
    if fixed.total - fixed.activations > device_bytes:
        return fixed, None
    compiled = jax.jit(trainer.step, donate_argnums=0).lower(state, trainer.batch_shape()).compile()
    memory: Any = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    # The compiler's temporaries hold the gradient too, though not always all of it at once.
    rest = max(peak - weights - fixed.optimizer, 0)
    gradients = min(fixed.gradients, rest)
    plan = dataclasses.replace(
        fixed, gradients=gradients, activations=rest - gradients, compiled=True
    )
    return plan, compiled


def device_memory() -> tuple[int, str]:
    """Bytes that the default device can give this process, and its name."""
    device = jax.devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]), device.device_kind
    return int(psutil.virtual_memory().total), "this machine"


def peak_bytes() -> int | None:
    """Peak bytes in use so far: of the device where it counts them, else of the process."""
    device = jax.devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", 0)) or _peak_resident()


def _peak_resident() -> int | None:
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _estimated_activations(trainer: Trainer) -> int:
    """Bytes kept for the backward, by counting what each layer saves a token.

    Eight streams of the embedding width and four of the MLP's in the compute dtype, codes of
    the four products' inputs at a byte, and the logits in float32 with their gradient.
    """
    c, model = trainer.config, trainer.config.llama
    tokens = c.batch_size // c.optimizer.accumulation * c.seq_len
    width = 4 if model.dtype == "float32" else 2
    streams = 8 * model.embed_dim + 4 * model.mlp_dim
    codes = 3 * model.embed_dim + model.mlp_dim if c.quantization.quantizes else 0
    kept = {"none": streams * width + codes, "codes": codes + streams * width // 2, "full": 0}
    a_layer = kept[model.remat] + model.embed_dim * width
    return tokens * (a_layer * model.num_layers + 8 * model.vocab_size)
