"""What docs/scaling.md says of train steps measured on several GPUs, from mesh-*.json."""

import re
from typing import Any

from benchmarks import mesh, report_runs
from benchmarks.provenance import flags_of

CASE = ("model", "recipe", "mesh", "grad_comm", "overlap")

CHANGES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"grad_comm": "float32"}, "gradients in {grad_comm} instead of float32"),
    ({"grad_comm": "bfloat16"}, "gradients in {grad_comm} instead of bfloat16"),
    ({"overlap": False}, "collectives beside computation, instead of in XLA's own order,"),
)
"""What a case is held against, and what then is different."""

WIDTHS = ("float32", "bfloat16", "fp8")
"""Gradients from the widest to the narrowest."""


def measured(results: list[dict[str, Any]]) -> str:
    """A part a machine; that nothing was measured, where there is none."""
    if not results:
        return "Nothing yet on more than one GPU; `python -m benchmarks.mesh` measures it."
    return "\n\n".join([_how(results), *map(_part, results)])


def _how(results: list[dict[str, Any]]) -> str:
    # Of before it was kept, and could be nothing else.
    roundings = {result.get("rounding", "nearest") for result in results}
    rounded = " or ".join(report_runs.ROUNDED[rounding] for rounding in sorted(roundings))
    return f"""A GPU has {mesh.SEQUENCES} sequences of {mesh.LENGTH:,} tokens a step. Models are
whole: llama1b with weights and moments in float32, llama7b with weights in BF16, rounded
stochastically, and moments in E4M3 and FP16, rounded {rounded}; layers are written out, and nothing
is recomputed.
Along data and fsdp each GPU has sequences of its own, so twice as many GPUs have twice the batch;
along tensor they share that same larger batch, each computing its part of every product. Over one
GPU stand the tokens a second of all GPUs over those of one with its {mesh.SEQUENCES} sequences.
What is sent is counted in the compiled program, a GPU's bytes a step by the ring algorithms. The
time of collectives is that of the first GPU's trace, waiting for the others included; alone is the
part of it in which that GPU computes nothing."""


def _part(result: dict[str, Any]) -> str:
    source = result["provenance"]
    parts = [
        f"{result['devices']} x {source['device']} of one host; jax {source['versions']['jax']}; "
        f"commit {source['commit']}{_nccl(source)}{flags_of(source)}:",
        mesh.table(result),
        sentences(result),
    ]
    missing = [*result["left_out"], *result["errors"]]
    if missing:
        parts.append(f"Not measured: {'; '.join(missing)}.")
    return "\n\n".join(part for part in parts if part)


def _nccl(source: dict[str, Any]) -> str:
    # NCCL_VERSION and the names of packages are what a container says of itself.
    asked = {k: v for k, v in source["nccl"].items() if re.match(r"NCCL_(?!VERSION$)", k)}
    return "".join(f"; `{name}={value}`" for name, value in asked.items())


def sentences(result: dict[str, Any]) -> str:
    """What each of ``CHANGES`` does to the speed, a line for each pair of cases it tells apart."""
    by = {tuple(case[name] for name in CASE): case for case in result["cases"]}
    lines = []
    for case in result["cases"]:
        for change, words in CHANGES:
            changed = case | change
            other = by.get(tuple(changed[name] for name in CASE))
            wider = WIDTHS.index(changed["grad_comm"]) <= WIDTHS.index(case["grad_comm"])
            if other is not None and other is not case and wider:
                faster = case["tokens_per_s"] / other["tokens_per_s"] - 1
                lines.append(
                    f"- {case['model']}, {case['recipe']}, `{case['mesh']}`: "
                    f"{words.format_map(case)} change the "
                    f"speed by {faster:+.1%}."
                )
    return "\n".join(lines)
