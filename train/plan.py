"""What memory a run takes, against what the device has, before anything is allocated."""

import contextlib
import dataclasses
import math
import re
import unittest.mock
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import psutil
from jax.extend.core import Var
from jax.stages import Compiled, Lowered
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

from jfp4.models import llama
from jfp4.models.llama import attention_implementation
from jfp4.ops.cross_entropy import chunk_size
from train.config import TrainConfig
from train.deterministic import fix_order_of_attention
from train.host import total_memory
from train.placement import Placement
from train.step import Trainer

GIB = 2.0**30

Attention = Literal["xla", "cudnn"]
"""What computes attention."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of a train step on one device.

    Attributes:
        parameters: number of parameters.
        saved: bytes of a checkpoint, which all devices together make.
        weights: bytes of the master weights.
        optimizer: bytes of the optimizer's state.
        prepared: bytes of the weights' codes, which stand while gradients are computed.
        gradients: bytes of the gradient, and of the sum of those before it where a step has
            several microbatches.
        activations: bytes of everything else that the step needs at its peak.
        device_bytes: what the device has.
        device: the device's name.
        compiled: whether the compiler said so, for this machine's default device, with the
            back end that is asked for; otherwise it is an estimate from shapes, made where all
            but the activations already exceed the device.
    """

    parameters: int
    saved: int
    weights: int
    optimizer: int
    prepared: int
    gradients: int
    activations: int
    device_bytes: int
    device: str
    compiled: bool

    @property
    def total(self) -> int:
        """Peak bytes of a step."""
        return self.fixed + self.activations

    @property
    def fixed(self) -> int:
        """Bytes that the batch has no part in."""
        return self.weights + self.optimizer + self.prepared + self.gradients

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
            ("weights' codes", self.prepared),
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


def compiler_options(config: TrainConfig, placement: Placement) -> dict[str, str | bool]:
    """What a configuration asks of XLA on a mesh.

    Of GPUs: an order in which what is sent goes on beside what is computed. XLA's own is the one
    of least memory, and has each collective waited for as soon as it begins. This one has them
    begin as late as it dares, at most two at a time.
    """
    options: dict[str, str | bool] = {}
    if config.deterministic:
        options["xla_gpu_exclude_nondeterministic_ops"] = True
    if placement.mesh.size > 1 and placement.mesh.devices.flat[0].platform == "gpu":
        options["xla_gpu_enable_latency_hiding_scheduler"] = True
        options["xla_gpu_experimental_parallel_collective_overlap_limit"] = "2"
    return options


def make_plan(trainer: Trainer) -> tuple[Plan, Compiled | None]:
    """Plans a run's memory from abstract shapes: no array is made.

    Returns:
        The plan, and the compiled step, or None where the estimate already showed that it does
        not fit: compiling what cannot run would only keep the user waiting.

    Raises:
        UserError: the mesh does not divide a weight, or a weight would be whole on every device.
    """
    plan, state, placement = sizes(trainer), trainer.abstract_state(), trainer.placement
    if plan.fixed > plan.device_bytes:
        rows = trainer.config.batch_size // placement.shards
        own = dataclasses.replace(trainer.config, batch_size=rows)
        activations = estimated_activations(on_cpu(own), attention_implementation(own.llama))
        return dataclasses.replace(plan, activations=activations), None
    with placement.in_force():
        options = compiler_options(trainer.config, placement)
        compiled = lowered_step(trainer).compile(compiler_options=options)
    placement.check_divided(state, compiled.input_shardings[0][0])
    memory: Any = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    # The compiler's temporaries hold the codes and the gradient too, though not always all of
    # them at once.
    rest = max(peak - plan.weights - plan.optimizer, 0)
    prepared = min(plan.prepared, rest)
    gradients = min(plan.gradients, rest - prepared)
    plan = dataclasses.replace(
        plan,
        prepared=prepared,
        gradients=gradients,
        activations=rest - prepared - gradients,
        compiled=True,
    )
    return plan, compiled


def sizes(trainer: Trainer) -> Plan:
    """What is known of a plan before anything is compiled: all but the activations."""
    state, mesh = trainer.abstract_state(), trainer.placement.mesh
    device_bytes, device = device_memory()
    return Plan(
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        saved=_bytes((state.params, state.stats, state.opt_state, state.loss_scale)),
        weights=_held(state.params) + _held(state.stats),
        optimizer=_held((state.opt_state, state.loss_scale)),
        prepared=_bytes(jax.eval_shape(trainer.prepare, state.params, state.stats))
        // (mesh.size // mesh.shape["data"]),
        gradients=_held(state.params) * min(trainer.config.optimizer.accumulation, 2),
        activations=0,
        device_bytes=device_bytes,
        device=device,
        compiled=False,
    )


def on_cpu(config: TrainConfig) -> TrainConfig:
    """The configuration with an attention that can be traced where cuDNN is not, too."""
    return dataclasses.replace(config, llama=dataclasses.replace(config.llama, attention="xla"))


def lowered_step(trainer: Trainer) -> Lowered:
    """``trainer.step`` of abstract arguments, to be compiled on its mesh, which is in force.

    Its state is donated, and each array where it belongs.
    """
    step = jax.jit(
        trainer.step,
        donate_argnums=0,
        out_shardings=(trainer.shardings, trainer.placement.replicated),
    )
    lowered = step.lower(trainer.abstract_state(), trainer.batch_shape())
    if trainer.config.deterministic:
        fix_order_of_attention(lowered)
    return lowered


def kept_bytes(config: TrainConfig, attention: Attention = "xla") -> int:
    """Bytes that a microbatch's forward keeps for its backward, by JAX's own account of it.

    Not counted is what is there anyway: parameters, statistics, the weights' codes and the batch.
    """
    # Layers written out keep what scanned ones do; of those, copies are told from parameters.
    scanned = dataclasses.replace(config.llama, scan_layers=True)
    trainer = Trainer(dataclasses.replace(config, llama=scanned))
    state, batch = trainer.abstract_state(), trainer.batch_shape()
    prepared = jax.eval_shape(trainer.prepare, state.params, state.stats)
    rows = batch.shape[0] // config.optimizer.accumulation
    batch = jax.ShapeDtypeStruct((rows, *batch.shape[1:]), batch.dtype)

    def residuals(params: Any, prepared: Any, stats: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            return trainer.loss(params, prepared, stats, batch)

        return jax.tree.leaves(jax.vjp(loss, params, has_aux=True)[1])

    with _fused_attention() if attention == "cudnn" else contextlib.nullcontext():
        jaxpr = jax.make_jaxpr(residuals)(state.params, prepared, state.stats, batch).jaxpr
    kept = {v for v in jaxpr.outvars if isinstance(v, Var)} - {*jaxpr.invars, *jaxpr.constvars}
    return _bytes([v.aval for v in kept])


def _fused_attention() -> AbstractContextManager[Any]:
    """Has models keep of attention what cuDNN's does, which cannot be traced without a GPU.

    That is its operands, its result and a number a query; XLA's keeps what it makes of every query
    with every key.
    """

    @jax.custom_vjp
    def fused(q: Array, k: Array, v: Array) -> Array:
        return jnp.exp(q)

    def forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
        y = fused(q, k, v)
        return y, (q, k, v, y, jnp.sum(q, axis=-1, dtype=jnp.float32))

    fused.defvjp(forward, lambda kept, _: kept[:3])
    return unittest.mock.patch.object(llama, "attend", lambda q, k, v, _: fused(q, k, v))


def device_memory() -> tuple[int, str]:
    """Bytes that this process's first device can give it, and its name."""
    device = jax.local_devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]), device.device_kind
    return total_memory(), "this machine"


def peak_bytes() -> int | None:
    """Peak bytes in use so far: of its first device where that counts them, else of the process."""
    device = jax.local_devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", 0)) or _peak_resident()


def _peak_resident() -> int | None:
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux getrusage says the parent's peak where that was higher
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.M)
        if found:
            return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _held(tree: Any) -> int:
    """Bytes of abstract arrays on one device, by their shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def estimated_activations(config: TrainConfig, attention: Attention = "xla") -> int:
    """Bytes that the batch has a part in, from shapes alone, with what computes attention there.

    What is kept for the backward; what a layer would keep whose backward is computed, where remat
    makes it anew; the gradients on their way through it, of gate and up and of the stream; and a
    chunk's logits with their gradient, or all of a head that is quantised.
    """
    model, n = config.llama, config.optimizer.accumulation
    # With a second microbatch weights are prepared, as they are where remat reads them again.
    several = max(n, 2)
    another = dataclasses.replace(
        config,
        batch_size=config.batch_size // n * several,
        optimizer=dataclasses.replace(config.optimizer, accumulation=several),
    )
    bare = dataclasses.replace(model, remat="none")
    one, two = (
        kept_bytes(
            dataclasses.replace(another, llama=dataclasses.replace(bare, num_layers=layers)),
            attention,
        )
        for layers in (1, 2)
    )
    a_layer = two - one if model.remat != "none" else 0
    tokens = config.batch_size // n * config.seq_len
    chunk = chunk_size(tokens, model.vocab_size, model.loss_chunk)
    passing = tokens * (2 * model.mlp_dim + model.embed_dim) * jax.numpy.dtype(model.dtype).itemsize
    kept = kept_bytes(config, attention)
    return kept + a_layer + passing + 8 * chunk * model.vocab_size
