"""A train step at the width of the 7B and 13B models: BF16, FP8 and FP4 by turns.

``python -m benchmarks.train_step`` writes results/train_step-DEVICE.json. The steps are the
trainer's own, of models with the full width and some of their layers, written out, so that three
states fit and nothing is recomputed; the fewer the layers, the more counts the head, which is never
quantised. Weights and moments are kept in what the README keeps them in for models that large.
Where the time goes is read from the profiler's trace.
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from benchmarks.timing import Event, Log, Side, main, markdown, measure
from jfp4.models.config import MODELS, LlamaConfig
from jfp4.recipe import RECIPES as PRESETS
from train.config import OptimizerConfig, TrainConfig
from train.placement import Placement
from train.plan import compiler_options, lowered_step
from train.step import Trainer

SEQUENCES, LENGTH = 8, 2048
LAYERS = {"llama13b": 6, "llama7b": 8}
RECIPES = ("bf16", "fp8", "fp4")
OPTIMIZER = OptimizerConfig(master="bfloat16", first_moment="e4m3", second_moment="float16")

PARTS: dict[str, str] = {
    "optimizer": r"op:.*\boptimizer\b|kernel:.*AdamW",
    "attention": r"kernel:.*(fmha|flash|sdpa|cudnn)",
    "quantise": r"kernel:.*(RowsKernel|TransposeKernel|StripKernel|\w*AmaxKernel|\w*TileKernel|"
    r"ThresholdsKernel|Any\w*Kernel)",
    "norm": r"kernel:.*RmsNorm",
    "GeMM": r"kernel:.*(GemmKernel|gemm|nvjet|cutlass|cublas)",
}
"""Parts of a step, each by what its kernels are called or where in the program they come from; the
first that matches counts."""


def run(log: Log, quick: bool) -> dict[str, Any]:
    """All recipes at both widths, with nothing recomputed."""
    steps = []
    for model in list(LAYERS)[: 1 if quick else None]:
        line = log.attempt(model, functools.partial(step_times, log, model))
        if line is not None:
            steps.append(line)
    return {"optimizer": dataclasses.asdict(OPTIMIZER), "steps": steps}


def step_times(log: Log, model: str) -> dict[str, Any]:
    """Times the recipes' steps by turns."""
    llama = dataclasses.replace(
        MODELS[model], num_layers=LAYERS[model], remat="none", scan_layers=False
    )
    configs = {
        recipe: TrainConfig(
            model=model, recipe=recipe, batch_size=SEQUENCES, seq_len=LENGTH, steps=1000, lr=1e-4,
            llama=llama, quantization=PRESETS[recipe], optimizer=OPTIMIZER,
        )
        for recipe in RECIPES
    }  # fmt: skip
    compiled = {recipe: CompiledStep(config) for recipe, config in configs.items()}
    scopes = {recipe: scopes_of(step.hlo) for recipe, step in compiled.items()}
    times = measure(
        {recipe: step.side() for recipe, step in compiled.items()},
        calls=2,
        rounds=4,
        wall=False,
        label=lambda side, event: part_of(event, scopes[side]),
    )
    for result in times.values():
        result |= without_scopes(result.pop("parts"))
    flops, tokens = arithmetic(llama, LENGTH) * SEQUENCES * LENGTH, SEQUENCES * LENGTH
    for recipe, result in times.items():
        seconds = 1e-3 * result["ms"]
        result |= {"tokens_per_s": tokens / seconds, "tflops": 1e-12 * flops / seconds}
        result["temp_bytes"] = compiled[recipe].temp_bytes
        shares = ", ".join(f"{k} {v:.1f}" for k, v in result["parts"].items())
        log.say(
            f"{model}, {recipe}: {result['ms']:.1f} ms, {result['tflops']:.0f} "
            f"TFLOP/s, {times['bf16']['ms'] / result['ms']:.2f}x BF16 ({shares})"
        )
    return {"model": model, "layers": LAYERS[model], "tokens": tokens, "times": times}


class CompiledStep:
    """A configuration's train step, compiled for its mesh; the state is made when it is to run.

    Attributes:
        config: the configuration.
        state_bytes: of the state and the batch on one device.
        temp_bytes: of what the step needs beside them.
        hlo: text of the compiled program.
    """

    def __init__(
        self,
        config: TrainConfig,
        placement: Placement | None = None,
        options: dict[str, str | bool] | None = None,
    ) -> None:
        """Compiles the step and what makes the state, of abstract shapes.

        Args:
            config: of the run.
            placement: where its arrays lie; None is on the first device.
            options: what XLA is asked for; None is what the trainer would ask for.
        """
        self.config = config
        self._placement = Placement() if placement is None else placement
        trainer = Trainer(config, self._placement)
        if options is None:
            options = compiler_options(config, self._placement)
        with self._placement.in_force():
            self._init = jax.jit(trainer.init, out_shardings=trainer.shardings).lower().compile()
            self._step = lowered_step(trainer).compile(compiler_options=options)
        memory: Any = self._step.memory_analysis()
        self.state_bytes = int(memory.argument_size_in_bytes)
        self.temp_bytes = int(memory.temp_size_in_bytes)
        self.hlo = self._step.as_text() or ""

    def side(self) -> Side:
        """The step on a state of its own, which every call replaces, and one batch."""
        c, rows = self.config, self._placement.rows(self.config.batch_size)
        shape = (c.batch_size, c.seq_len + 1)
        batch = np.random.default_rng(0).integers(c.llama.vocab_size, size=shape, dtype=np.int32)
        placed = self._placement.put(batch[rows], c.batch_size)
        state = self._init()

        def call(_: int) -> Any:
            nonlocal state
            state, metrics = self._step(state, placed)
            return metrics

        return Side(call)


def scopes_of(hlo: str) -> dict[str, str]:
    """By name of a kernel, the path of the program that its instruction was compiled from.

    A kernel has its instruction's name, with underscores. The trace itself names no instruction
    where a CUDA graph launched the kernel.
    """
    found = re.finditer(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name=\"([^\"]*)\"", hlo, re.M)
    return {re.sub(r"\W", "_", match[1]): match[2] for match in found}


def part_of(event: Event, scopes: dict[str, str]) -> str:
    """The part of a step that a kernel belongs to; of the rest, where it comes from as well."""
    scope = scopes.get(event.name, "")
    text = f"op:{scope}\nkernel:{event.name}"
    part = next((part for part, pattern in PARTS.items() if re.search(pattern, text)), None)
    return part or f"rest {scope or event.name}"


def without_scopes(parts: dict[str, float], most: int = 40) -> dict[str, dict[str, float]]:
    """Times by part, the rest being one, and what most of the rest's is spent on."""
    rest = {name.removeprefix("rest "): ms for name, ms in parts.items() if name not in PARTS}
    known = {name: ms for name, ms in parts.items() if name in PARTS}
    return {
        "parts": known | {"rest": sum(rest.values())},
        "rest": dict(list(rest.items())[:most]),
    }


def arithmetic(model: LlamaConfig, length: int) -> float:
    """Floating-point operations a token of the model's own arithmetic, forward and backward.

    Products only: a multiplication and an addition for each weight, once forward and twice
    backward; the same for attention's two products, over the half of the positions that causality
    leaves. What is recomputed does not count, nor does the embedding, which multiplies nothing.
    """
    d, heads = model.embed_dim, model.num_heads + 2 * model.num_kv_heads
    layer = d * heads * model.head_dim + d * d + 3 * d * model.mlp_dim
    weights = model.num_layers * layer + d * model.vocab_size
    attention = model.num_layers * d * length
    return 6.0 * (weights + attention)


def table(results: dict[str, Any]) -> str:
    """What is printed last."""
    return markdown(HEAD, list(rows(results)))


HEAD = (
    "width", "recipe", "ms", "tokens/s", "TFLOP/s", "over BF16",
    *PARTS, "rest", "temporary GiB",
)  # fmt: skip


def rows(results: dict[str, Any]) -> Iterable[list[str]]:
    """A row a step: its speed, and the share of its time that each part takes."""
    for line in results["steps"]:
        for recipe, time in line["times"].items():
            share = {part: ms / time["ms"] for part, ms in time["parts"].items()}
            yield [
                line["model"].removeprefix("llama").upper(), recipe,
                f"{time['ms']:.1f}", f"{time['tokens_per_s']:,.0f}", f"{time['tflops']:.0f}",
                f"{line['times']['bf16']['ms'] / time['ms']:.2f}x",
                *(f"{share.get(part, 0):.0%}" for part in (*PARTS, "rest")),
                f"{time['temp_bytes'] / 2**30:.1f}",
            ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("train_step", run, table))
