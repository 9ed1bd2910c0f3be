"""The measured part of docs/kernels.md, its picture, and the README's table of kernels.

Sections whose results are not there are left out.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.provenance import flags_of
from benchmarks.timing import markdown

Results = Mapping[str, Sequence[dict[str, Any]]]
"""By benchmark, one entry a device."""

COLORS = {
    "products": "tab:blue",
    "quantise": "tab:orange",
    "thresholds": "tab:red",
    "XLA": "tab:gray",
    "copies": "tab:brown",
    "gaps": "gainsboro",
}


def measurements(results: Results) -> str:
    """The measured part of docs/kernels.md."""
    sections = [
        *(section for r in results["gemm"] for section in (products(r), few_rows(r))),
        *(quantisation(r) for r in results["quantize"]),
        *(layers(r) for r in results["linear"]),
    ]
    return _paragraphs(sections) or "Not measured yet."


def readme(results: Results) -> str:
    """What the README says of speed: one line a device and kind of product, layer or train step."""
    rows = []
    for r in results["gemm"]:
        device = r["provenance"]["device"]
        ratio = {name: value["geomean"] for name, value in r["ratios"].items()}
        rows += [
            [device, "product of codes with scales, over BF16", _mean(ratio["jfp4 over BF16"])],
            [
                device,
                "the same, over the best FP8 product",
                _mean(ratio["jfp4 over the best FP8"]),
            ],
            [
                device,
                "the same, over cuBLASLt's without scales a row",
                _mean(ratio["jfp4 over one scale"]),
            ],
            [
                device,
                "packed product of up to 64 rows, over FP8 with scales a row",
                _mean(ratio["packed over FP8"]),
            ],
            [
                device,
                "the same, over cuBLASLt's without scales a row",
                _mean(ratio["packed over one scale"]),
            ],
        ]
    for r in results["linear"]:
        for label, means in r["speed-ups"].items():
            if "fp4" in means:
                rows.append(
                    [r["provenance"]["device"], f"{label}, fp4 over BF16", _times(means["fp4"])]
                )
    for r in results["train_step"]:
        device = r["provenance"]["device"]
        for line in r["steps"]:
            width = line["model"].removeprefix("llama").upper()
            ratio = line["times"]["bf16"]["ms"] / line["times"]["fp4"]["ms"]
            rows.append([device, f"{width} width, a train step, fp4 over BF16", _times(ratio)])
    return markdown(["device", "what", "speed-up"], rows) if rows else "Not measured yet."


def source(results: dict[str, Any]) -> str:
    """Where numbers come from, in a sentence."""
    origin = results["provenance"]
    names = ("jax", "torch", "nvidia-cublas")
    versions = ", ".join(f"{n} {origin['versions'][n]}" for n in names if n in origin["versions"])
    where = f"{origin['device']}; {versions}; commit {origin['commit']}, {origin['date']}"
    return f"{where}{flags_of(origin)}."


# ----------------------------------------------------------------------------------- products


def products(r: dict[str, Any]) -> str:
    """Rates of products of byte codes."""
    ratios = r["ratios"]
    text = f"""### Products of codes

TFLOP/s, medians of device time, all sides by turns in one process, on E2M1 codes of Gaussian
tensors; "BF16" multiplies the tensors themselves, "BF16, codes" the codes. Only this library's
sides and those with row-wise scales compute the whole result; "over FP8" is over the better of
"XLA FP8" and "torch, row-wise".
{source(r)}

{_rates(r["codes"], _ratio_columns(ratios))}

In the geometric mean the product is {_mean(ratios["jfp4 over the best FP8"]["geomean"])} the better
of these two, {_mean(ratios["jfp4 over one scale"]["geomean"])} cuBLASLt's with one scale for all,
which computes less, and {_mean(ratios["jfp4 over BF16"]["geomean"])} BF16; promoted,
{_mean(ratios["jfp4, promoted over BF16"]["geomean"])} BF16. {_spread(r["codes"])}"""
    if r["gradients"]:
        text += f"\n\nE5M2 codes of a gradient times E2M1 codes:\n\n{_rates(r['gradients'], {})}"
    return text


def few_rows(r: dict[str, Any]) -> str:
    """Times of packed products."""
    names = _names(r["packed"])
    rivals = ("FP8", "one scale", "BF16")
    over = {f"over {rival}": r["ratios"][f"packed over {rival}"] for rival in rivals}
    rows = [
        [
            _shape(line),
            *(
                _number(1e3 * line["times"][n]["ms"], 1) if n in line["times"] else ""
                for n in names
            ),
            *(_times(ratio["by shape"].get(_shape(line))) for ratio in over.values()),
        ]
        for line in r["packed"]
    ]
    means = " and ".join(f"{_mean(r['geomean'])} {n}" for n, r in over.items() if r["geomean"])
    return f"""### Packed products

Microseconds a product; weights are taken from memory, not from the cache.
"Over FP8" is over torch's with scales a row, which computes the same; "over one scale" over
cuBLASLt's that has one for all. In the geometric mean of up to 64 rows
{means}. {_spread(r["packed"])}
{source(r)}

{markdown(["m x k x n", *names, *over], rows)}"""


def _ratio_columns(ratios: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        "over FP8": ratios["jfp4 over the best FP8"]["by shape"],
        "over BF16": ratios["jfp4 over BF16"]["by shape"],
    }


def _rates(lines: list[dict[str, Any]], ratios: dict[str, dict[str, float]]) -> str:
    names = _names(lines)
    rows = [
        [
            _shape(line),
            *(_number(line["tflops"].get(name), 0) for name in names),
            *(_times(by_shape.get(_shape(line))) for by_shape in ratios.values()),
        ]
        for line in lines
    ]
    return markdown(["m x k x n", *names, *ratios], rows)


def _names(lines: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line["times"]))


# ------------------------------------------------------------------------------- quantisation


def quantisation(r: dict[str, Any]) -> str:
    """Speeds of quantising, a table a number of rows."""
    lines, speed = r["quantise"], r["copy TB/s"]
    cases = list(dict.fromkeys(line["name"] for line in lines))
    activations = [name for name in cases if not name.startswith("channel")]
    sizes = [tuple(line["size"]) for line in lines if line["name"] == activations[0]]
    tables = []
    for m in sorted({m for m, _ in sizes}, reverse=True):
        tables.append(_speeds(lines, activations, [s for s in sizes if s[0] == m]))
    weights = [name for name in cases if name not in activations]
    if weights:
        tables.append(
            _speeds(lines, weights, [tuple(x["size"]) for x in lines if x["name"] == weights[0]])
        )
    thresholds = [
        [
            _shape(line, "size"),
            *(_number(line["us"].get(who), 1) for who in ("kernels", "XLA")),
        ]
        for line in r["thresholds"]
    ]
    return f"""### Quantisation

TB/s of bytes read once and written once, and the share of a copy's speed, {speed:.2f} TB/s; XLA's
speed for the same outputs in brackets. Every output has the XLA path's bits. {_copy_of_little(r)}
{_spread(lines)}
{source(r)}

{_paragraphs(tables)}

Thresholds, microseconds:

{markdown(["size", "kernel", "XLA"], thresholds)}"""


def _copy_of_little(r: dict[str, Any]) -> str:
    """What a copy itself makes of the fewest bytes that there are."""
    copied = [line for line in r["quantise"] if "copy" in line["us"]]
    if not copied:
        return ""
    line = min(copied, key=lambda line: line["bytes"])
    share = 1e-6 * line["bytes"] / line["us"]["copy"] / r["copy TB/s"]
    case = f'"{line["name"]}" at {_shape(line, "size")}'
    return f"A copy of as many bytes as {case} moves has {share:.0%} itself."


def _speeds(lines: list[dict[str, Any]], names: list[str], sizes: Sequence[tuple[int, ...]]) -> str:
    by = {(line["name"], tuple(line["size"])): line for line in lines}

    def cell(line: dict[str, Any] | None) -> str:
        if line is None or "kernels" not in line["TB/s"]:
            return ""
        rate, share = line["TB/s"]["kernels"], line["share of the copy"]["kernels"]
        return f"{rate:.2f}, {share:.0%} ({_number(line['TB/s'].get('XLA'), 2)})"

    head = ["scale", *(" x ".join(map(str, size)) for size in sizes)]
    return markdown(head, [[n, *(cell(by.get((n, size))) for size in sizes)] for n in names])


# -------------------------------------------------------------------------------------- layers


def layers(r: dict[str, Any]) -> str:
    """Times of linear layers, and where fp4's goes."""
    both = [line for line in r["layers"] if not line["forward"]]
    kinds = list(both[0].get("fp4 by kind", {})) if both else []
    breakdown = [
        [_shape(line), *(_number(line["fp4 by kind"][kind], 3) for kind in kinds)]
        for line in both
        if "fp4 by kind" in line
    ]
    means = [
        f"- {label}: " + "; ".join(f"{name} {_times(value)}" for name, value in values.items())
        for label, values in r["speed-ups"].items()
    ]
    text = f"""### Linear layers

Milliseconds, BF16 activations and weights; "products" are fp4's FP8 products alone, on codes that
are there already, and the limit their share of fp4's time. Alone they draw more power than among
quantisers, and run at a lower clock for it: what they take within a layer is in the last table.
{_spread(r["layers"])} {source(r)}

Forward:

{_milliseconds([line for line in r["layers"] if line["forward"]])}

Forward and backward:

{_milliseconds(both)}

Speed-ups over BF16, geometric means at the most rows:

{_lines(means)}

Where fp4's time goes, forward and backward, in milliseconds:

![fp4's time by kind of kernel, over BF16's](kernels.png)

{markdown(["m x k x n", *kinds], breakdown)}"""
    of_float32 = r.get("float32 weights", [])
    for forward, what in ((True, "forward"), (False, "forward and backward")):
        if lines := [line for line in of_float32 if line["forward"] == forward]:
            text += f"\n\nWith float32 weights, {what}:\n\n{_milliseconds(lines)}"
    return text


def _milliseconds(lines: list[dict[str, Any]]) -> str:
    names = _names(lines)
    rows = [
        [
            _shape(line),
            *(_number(line["ms"].get(name), 3) for name in names),
            _times(line.get("speed-up", {}).get("fp4")),
            f"{line['share of the limit']:.0%}" if "share of the limit" in line else "",
        ]
        for line in lines
    ]
    return markdown(["m x k x n", *names, "speed-up", "limit"], rows)


def draw(results: Results, path: Path) -> bool:
    """Stacked bars: what fp4's time consists of, beside BF16's. Returns whether there is one."""
    lines = [
        line
        for r in results["linear"][:1]
        for line in r["layers"]
        if not line["forward"] and {"fp4", "bf16"} <= line["ms"].keys() and "fp4 by kind" in line
    ]
    if not lines:
        return False
    figure = Figure(figsize=(9, 0.5 + 0.55 * len(lines)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, line in enumerate(lines):
        left = 0.0
        for kind, ms in line["fp4 by kind"].items():
            share = ms / line["ms"]["bf16"]
            label = kind if i == 0 else None
            axes.barh(i, share, left=left, color=COLORS[kind], label=label)
            left += share
    axes.axvline(1, color="black", linewidth=1, label="BF16")
    axes.set_yticks(range(len(lines)), [_shape(line) for line in lines])
    axes.invert_yaxis()
    axes.set_xlabel("time of an fp4 layer, forward and backward, over BF16's")
    figure.legend(loc="outside right upper")
    figure.savefig(path, metadata={"Software": None})
    return True


# --------------------------------------------------------------------------------------- cells


def _spread(lines: Sequence[dict[str, Any]]) -> str:
    """How far apart the quartiles of a number's calls are."""
    spreads = [t["spread"] for line in lines for t in line["times"].values() if "spread" in t]
    if not spreads:
        return ""
    return (
        f"The quartiles of a number's calls are {statistics.median(spreads):.1%} of it apart, in "
        f"the median of all numbers, and {max(spreads):.0%} at most."
    )


def _lines(parts: Sequence[str]) -> str:
    return "\n".join(parts)


def _paragraphs(parts: Sequence[str]) -> str:
    return "\n\n".join(parts)


def _shape(line: dict[str, Any], key: str = "m, k, n") -> str:
    return " x ".join(map(str, line[key]))


def _number(value: float | None, digits: int) -> str:
    return "" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _mean(value: float | None) -> str:
    # So close to 1, or to what is aimed at, that two digits would not tell on which side.
    return "" if value is None else f"{value:.3f}x"
