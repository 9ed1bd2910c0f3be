"""Writes docs/results.md, the tables of docs/kernels.md, docs/scaling.md and README, and pictures.

``python -m benchmarks.report`` measures nothing; every measurement it prints was written by a
benchmark to benchmarks/results/. ``--check`` writes nothing and fails if a text that is there is
out of date.
"""

import json
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import (
    report_first_tokens,
    report_kernels,
    report_meshes,
    report_runs,
    train_step,
)
from benchmarks.provenance import RESULTS, ROOT, flags_of, results

README = ROOT / "README.md"
DOC, PICTURE = ROOT / "docs/results.md", ROOT / "docs/loss.png"
FIRST_PICTURE = ROOT / "docs/first_tokens.png"
FEW = 0.05
"""A share of steps that is called few."""
SCALING = ROOT / "docs/scaling.md"
KERNELS, KERNELS_PICTURE = ROOT / "docs/kernels.md", ROOT / "docs/kernels.png"
BY_DEVICE = (
    "gemm", "quantize", "linear", "train_step", "run", "resume", "first_tokens", "mesh", "cpu",
)  # fmt: skip
"""Benchmarks that write a file a device, or a version."""


def main() -> int:
    """Writes the documents, or compares them; returns the exit status."""
    loss = json.loads((RESULTS / "loss.json").read_text())
    scaling = json.loads((RESULTS / "scaling.json").read_text())
    found = {name: results(name) for name in BY_DEVICE}
    tables = {"results": loss_table(loss), "kernels": report_kernels.readme(found)}
    measured = {"measurements": report_kernels.measurements(found)}
    wanted = {
        DOC: document(loss, found),
        README: fill(README.read_text(), tables),
        SCALING: fill(
            SCALING.read_text(),
            {"mesh": report_meshes.measured(found["mesh"]), "scaling": scaling_tables(scaling)},
        ),
        KERNELS: fill(KERNELS.read_text(), measured),
    }
    if "--check" in sys.argv[1:]:
        stale = [str(path) for path, text in wanted.items() if path.read_text() != text]
        if stale:
            print(f"error: {', '.join(stale)} out of date; run benchmarks.report", file=sys.stderr)
        return 2 if stale else 0
    for path, text in wanted.items():
        path.write_text(text)
    draw(loss, PICTURE)
    if firsts := found["first_tokens"]:
        report_first_tokens.draw(firsts, FIRST_PICTURE)
    report_kernels.draw(found, KERNELS_PICTURE)
    return 0


def fill(text: str, bodies: dict[str, str]) -> str:
    """The text with each body between its two comments, where it has them."""
    for name, body in bodies.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin in text:
            head, _, rest = text.partition(begin)
            text = f"{head}{begin}\n{body}\n{end}{rest.partition(end)[2]}"
    return text


def document(loss: dict[str, Any], found: Mapping[str, list[dict[str, Any]]]) -> str:
    """The whole of docs/results.md."""
    study, source = loss["study"], loss["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
    tokens = loss["runs"][0]["tokens"]
    parts = "".join(
        (
            report_first_tokens.section(found["first_tokens"], noise(loss)),
            *map(train_steps, found["train_step"]),
            report_runs.large(found["run"]),
            report_runs.resumed(found["resume"]),
        )
    )
    return f"""# Results

Written by `python -m benchmarks.report` from `benchmarks/results/`; no measurement here is typed.

## What each part of the method costs and brings

{study["model"]}, {tokens / 1e6:.1f} million tokens of technical documents under a 32,000-token
byte-level BPE ({study["steps"]:,} steps of {study["batch_size"]} x {study["seq_len"]:,}), AdamW, 5%
warm-up, cosine to 10%, clipping at a global norm of 1. {study["seeds"]} seeds; a seed is the same
initial weights and the same data order in every row. Losses are in nats a token on all whole
batches of the validation split, **with the recipe's own forward** (the FP4 rows are evaluated in
FP4, with running thresholds and means). On {source["device"]}; {versions}; commit
{source["commit"]}.

The learning rate is BF16's best, found first:

{sweep_table(loss["sweep"])}

{sweep_sentence(loss["sweep"])}

{loss_table(loss)}

The gap is to BF16 with the same seed, mean ± standard deviation over seeds. Clipped is the share of
steps, past the first tenth, whose gradient norm exceeded the clipping threshold.

![training loss](loss.png)

## What it teaches

{lessons(loss)}

{parts}## CPU

{cpu_tables(found["cpu"])}
"""


def train_steps(results: dict[str, Any]) -> str:
    """A section on the train step's speed and its parts."""
    source, state = results["provenance"], results["optimizer"]
    layers = " or ".join(
        f"{step['layers']} layers ({step['model'].removeprefix('llama').upper()})"
        for step in results["steps"]
    )
    return f"""## A train step by recipe

Of models with the full width and {layers}, written out, nothing recomputed,
{results["steps"][0]["tokens"]:,} tokens in sequences of {train_step.LENGTH:,}; weights in
{state["master"]}, moments in {state["first_moment"]} and {state["second_moment"]}, rounded
{report_runs.ROUNDED[state["rounding"]]}; the recipes by turns, medians. TFLOP/s are of the model's
arithmetic, whatever it is computed in. On {source["device"]}; jax {source["versions"]["jax"]};
commit {source["commit"]}{flags_of(source)}. Such steps run at the power that the GPU is
allowed, so GPUs of one kind differ in all recipes alike.

{train_step.table(results)}

"""


def scaling_tables(scaling: dict[str, Any]) -> str:
    """What a step sends on each mesh, what it would take, and the constants behind it."""
    rows = [
        [
            f"`{mesh['mesh']}`",
            mesh["grad_comm"],
            f"{mesh['devices']:,}",
            f"{mesh['state bytes'] / 2**30:.1f}",
            f"{mesh['work bytes'] / 2**30:.1f}",
            f"{mesh['sent inside'] / 2**30:.1f}",
            f"{mesh['sent between'] / 2**30:.1f}",
            "{compute:.2f}, {inside:.2f}, {between:.2f}".format(**mesh["seconds"]),
            " to ".join(f"{days:,.1f}" for days in mesh["days"]),
            " to ".join(f"{hours:,.0f}" for hours in mesh["GPU hours"]),
        ]
        for mesh in scaling["meshes"]
    ]
    head = ["mesh", "gradients", "GPUs", "state, GiB", "other, GiB", "sent in host, GiB",
            "between, GiB", "seconds: compute, in host, between", "days",
            "GPU hours"]  # fmt: skip
    kinds = dict.fromkeys(kind for mesh in scaling["meshes"] for kind in mesh["collectives"])
    counted = [
        [
            f"`{mesh['mesh']}`",
            mesh["grad_comm"],
            *(
                f"{n:,}, {sent / 2**30:.1f}"
                for n, sent in (mesh["collectives"].get(kind, (0, 0)) for kind in kinds)
            ),
        ]
        for mesh in scaling["meshes"]
    ]
    constants = [[name, f"{value:,.4g}"] for name, value in scaling["constants"].items()]
    return f"""{_markdown(head, rows)}

Collectives a step, and the GiB that a device sends for them:

{_markdown(["mesh", "gradients", *kinds], counted)}

The constants, of commit {scaling["commit"]}:

{_markdown(["constant", "value"], constants)}"""


def sweep_table(sweep: list[dict[str, Any]]) -> str:
    """Validation loss by learning rate."""
    rates = sorted({result["lr"] for result in sweep})
    by = {(result["variant"], result["lr"]): result["valid_loss"] for result in sweep}
    variants = list(dict.fromkeys(result["variant"] for result in sweep))
    return _markdown(
        ["peak learning rate, seed 0", *(f"{rate:g}" for rate in rates)],
        [[v, *(f"{by[v, rate]:.4f}" for rate in rates)] for v in variants],
    )


def sweep_sentence(sweep: list[dict[str, Any]]) -> str:
    """What BF16's sweep leaves open: the minimum of the parabola through its best three."""
    points = sorted((r["lr"], r["valid_loss"]) for r in sweep if r["variant"] == "bf16")
    i = min(range(len(points)), key=lambda j: points[j][1])
    best = f"BF16's best of these is {points[i][0]:g}"
    if i in (0, len(points) - 1):
        return f"{best}, at the edge of what was tried."
    (a, fa), (b, fb), (c, fc) = ((math.log2(lr), loss) for lr, loss in points[i - 1 : i + 2])
    left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
    vertex = b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right)
    slope = (fc - fa) / (c - a)
    curve = ((fc - fb) / (c - b) - (fb - fa) / (b - a)) / (c - a)
    gain = fb - (fb + slope * (vertex - b) + curve * (vertex - b) ** 2)
    return (
        f"{best}; the parabola through it and its neighbours has its minimum at {2**vertex:.2g}, "
        f"{gain:.4f} nats lower, which is what a finer sweep could have found."
    )


def loss_table(loss: dict[str, Any]) -> str:
    """Validation loss and its gap to BF16, a row a variant."""
    rows = []
    for variant, runs in _by_variant(loss).items():
        gaps = _gaps(loss, variant)
        gap = "—" if variant == "bf16" else f"{_spread(gaps, '+.4f')} ({_percent(loss, gaps)})"
        rows.append(
            [
                variant,
                _spread([run["valid_loss"] for run in runs], ".4f"),
                gap,
                f"{statistics.mean(run['grad_norm'] for run in runs):.2f}",
                f"{statistics.mean(run['clipped'] for run in runs):.1%}",
                str(sum(run["skipped"] for run in runs)),
            ]
        )
    return _markdown(
        ["recipe", "validation loss", "gap to BF16", "median gradient norm", "clipped", "skipped"],
        rows,
    )


def lessons(loss: dict[str, Any]) -> str:
    """What the numbers say, worded by their signs and sizes.

    Raises:
        ValueError: they no longer say it.
    """
    runs_of = _by_variant(loss)
    gap = {variant: statistics.mean(_gaps(loss, variant)) for variant in runs_of}
    norm = {
        variant: statistics.mean(run["grad_norm"] for run in runs)
        for variant, runs in runs_of.items()
    }
    by_rate = gaps_by_rate(loss["sweep"])
    clipped = max(run["clipped"] for variant in ("cast + OCC", "fp4") for run in runs_of[variant])
    _expect(
        {
            "DGE moves the loss by more than the cast costs": abs(
                gap["cast + DGE"] - gap["fp4_cast"]
            )
            > abs(gap["fp4_cast"]),
            "clipping acts on few steps": clipped < FEW,
            "the gap falls as the learning rate rises": by_rate == sorted(by_rate, reverse=True),
        }
    )
    lines = [
        f"BF16 itself moves by {noise(loss):.4f} nats (standard deviation) from seed to seed; "
        "differences with a standard deviation are of runs with the same seed.",
        f"FP8 with the same scaling is {_apart(loss, 'fp8', 'bf16')} from BF16.",
        f"The bare cast to FP4 is {_apart(loss, 'fp4_cast', 'bf16')}, and with outliers clamped "
        f"and compensated {_apart(loss, 'cast + OCC', 'bf16')}.",
        f"DGE moves the loss by {_apart(loss, 'cast + DGE', 'fp4_cast')} without OCC and by "
        f"{_apart(loss, 'fp4', 'cast + OCC')} with it. That is larger than the whole cost of "
        "the cast, so it cannot be a better gradient of the rounding alone: DGE multiplies every "
        "weight's gradient by a slope that changes from step to step, and the median gradient "
        f"norm goes from {norm['cast + OCC']:.2f} to {norm['fp4']:.2f}. Clipping acts on few "
        "steps here, so it is not what makes the difference; what remains is that the estimator "
        "damps and perturbs the updates, which a short run at this learning rate rewards.",
        f"The sweep shows it: fp4 less bf16, with one seed, is {_gap_words(loss['sweep'])}. The "
        "gap falls as the learning rate rises: fp4 stands higher rates than BF16 does.",
        _closing(loss),
        f"The mean shift moves the loss of fp4 by {_apart(loss, 'fp4 + mean shift', 'fp4')}.",
    ]
    if gap["fp4"] < 0:
        lines.append(
            "So fp4 ending below BF16 says that DGE changes the optimiser, NOT that four bits "
            "are better than sixteen. The comparison that isolates the number format is the one "
            f"without DGE: {_apart(loss, 'cast + OCC', 'bf16')} nats. Longer runs, in which BF16 "
            "is no longer limited by its updates, are needed before anything else is concluded; "
            "the paper's own, over 100 billion tokens, end with FP4 0.06 to 0.10 above BF16."
        )
    return "\n".join(f"- {line}" for line in lines)


def noise(loss: dict[str, Any]) -> float:
    """Standard deviation over seeds of BF16's validation loss, nats a token."""
    return statistics.stdev([run["valid_loss"] for run in _by_variant(loss)["bf16"]])


def _closing(loss: dict[str, Any]) -> str:
    by_variant, millions = _by_variant(loss), loss["runs"][0]["tokens"] / 1e6
    curves = (_mean_curve(by_variant[variant]) for variant in ("fp4", "bf16"))
    gaps = [a - b for a, b in zip(*curves, strict=True)]
    lowest = min(range(len(gaps)), key=lambda i: gaps[i])
    _expect({"fp4's lead is largest just after the warm-up": lowest < 0.2 * len(gaps)})
    return (
        f"And the picture shows when: in training loss fp4's lead is largest, {gaps[lowest]:+.2f}, "
        f"at {millions * (lowest + 0.5) / len(gaps):.1f} million tokens, just after the warm-up, "
        f"and by the end it is {gaps[-1]:+.2f}: BF16 loses its ground there and is still making "
        "it up."
    )


def gaps_by_rate(sweep: list[dict[str, Any]]) -> list[float]:
    """Validation loss of fp4 less that of bf16, by rising learning rate."""
    by = {(result["variant"], result["lr"]): result["valid_loss"] for result in sweep}
    return [by["fp4", lr] - by["bf16", lr] for lr in _rates(sweep)]


def _rates(sweep: list[dict[str, Any]]) -> list[float]:
    return sorted({result["lr"] for result in sweep})


def _gap_words(sweep: list[dict[str, Any]]) -> str:
    pairs = zip(gaps_by_rate(sweep), _rates(sweep), strict=True)
    return ", ".join(f"{gap:+.4f} at {lr:g}" for gap, lr in pairs)


def _expect(said: dict[str, bool]) -> None:
    """Refuses words that the numbers do not bear out."""
    if wrong := [words for words, holds in said.items() if not holds]:
        raise ValueError(f"loss.json no longer says that {' or that '.join(wrong)}; reword lessons")


def cpu_tables(cpus: list[dict[str, Any]]) -> str:
    """The measurements of benchmarks/cpu.py, a row a jax version."""
    rows = []
    for cpu in cpus:
        source, product, step = cpu["provenance"], cpu["product"], cpu["step"]
        rows.append(
            [
                source["versions"]["jax"],
                f"{product['ms']['float32']:.1f}",
                f"{product['ms']['int8']:.1f}",
                *(f"{product['ms'][name]:.1f}" for name in ("codes to sums", "host")),
                *(f"{step['ms'][name]:.0f}" for name in ("bf16", "fp4", "fp4, host")),
            ]
        )
    if not cpus:
        return "Not measured yet."
    source, shape = cpus[0]["provenance"], cpus[0]["product"]["m, k, n"]
    vnni = "with" if source["vnni"] else "without"
    head = ["jax", "float32 product, ms", "int8", "codes, XLA", "codes, host"]
    head += ["bf16 step, ms", "fp4, XLA", "fp4, host"]
    return (
        f"{source['device']}, {source['cores']} cores, {vnni} VNNI. The product is "
        f"{' x '.join(str(n) for n in shape)} on E2M1 codes, its sums equal to float64's; the step "
        "is llama5m's at the trainer's defaults. Medians, both sides by turns in one process.\n\n"
        + _markdown(head, rows)
    )


def draw(loss: dict[str, Any], path: Path) -> None:
    """Training loss by tokens: the mean over seeds, less BF16's at the same tokens."""
    figure = Figure(figsize=(9, 5.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    by_variant = _by_variant(loss)
    reference = _mean_curve(by_variant["bf16"])
    millions = loss["runs"][0]["tokens"] / 1e6
    for variant, runs in by_variant.items():
        curve = _mean_curve(runs)
        x = [millions * (i + 0.5) / len(curve) for i in range(len(curve))]
        axes.plot(x, [c - r for c, r in zip(curve, reference, strict=True)], label=variant)
    axes.set_xlabel("tokens, millions")
    axes.set_ylabel("training loss less BF16's, nats a token")
    axes.set_title(f"{loss['study']['model']}: mean of {loss['study']['seeds']} seeds")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, metadata={"Software": None})


def _mean_curve(runs: list[dict[str, Any]]) -> list[float]:
    return [statistics.mean(points) for points in zip(*(r["curve"] for r in runs), strict=True)]


def _by_variant(loss: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    grouped: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(loss["runs"], key=lambda run: run["seed"]):
        grouped.setdefault(run["variant"], []).append(run)
    return grouped


def _gaps(loss: dict[str, Any], variant: str) -> list[float]:
    runs = _by_variant(loss)
    pairs = zip(runs[variant], runs["bf16"], strict=True)
    return [run["valid_loss"] - reference["valid_loss"] for run, reference in pairs]


def _percent(loss: dict[str, Any], gaps: list[float]) -> str:
    reference = statistics.mean(run["valid_loss"] for run in _by_variant(loss)["bf16"])
    return f"{statistics.mean(gaps) / reference:+.2%}"


def _spread(values: list[float], form: str) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):{form}} ± {spread:.4f}"


def _apart(loss: dict[str, Any], variant: str, other: str) -> str:
    pairs = zip(_gaps(loss, variant), _gaps(loss, other), strict=True)
    return _spread([a - b for a, b in pairs], "+.4f")


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
