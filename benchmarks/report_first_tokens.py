"""What docs/results.md says of larger models' first tokens, from first_tokens-*.json."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.report_runs import ROUNDED
from benchmarks.timing import markdown


def section(results: list[dict[str, Any]], noise: float) -> str:
    """A section on the first tokens of a large model; nothing where it was not trained.

    Args:
        results: of benchmarks.first_tokens, one a machine.
        noise: standard deviation over seeds of llama60m's validation loss, nats a token.
    """
    groups = by_group(results)
    if not groups:
        return ""
    rows = [_row(run, runs[0]) for runs in groups.values() for run in runs]
    head = ["run", "device", "tokens", "a step", "learning rate", "warm-up", "highest loss",
            "training loss", "validation", "less the first row's", "clipped", "skipped", "tokens/s",
            "peak GiB"]  # fmt: skip
    commits = ", ".join(dict.fromkeys(run["commit"] for r in results for run in r["runs"]))
    speeds = [run["tokens_per_s"] for runs in groups.values() for run in runs]
    # Of before it was kept, and could be nothing else.
    roundings = {run.get("rounding", "nearest") for runs in groups.values() for run in runs}
    rounded = " or ".join(ROUNDED[rounding] for rounding in sorted(roundings))
    narrow = (
        f", but llama7b's in BF16, rounded stochastically, and in E4M3 and FP16, rounded {rounded}"
        if "llama7b" in groups
        else ""
    )
    lower = (
        "\nllama7b has a third of that rate with a longer warm-up as well: the highest loss says "
        "how far it rose\nbefore it fell."
        if "llama7b, longer warm-up" in groups
        else ""
    )
    shared = "Runs without a speed shared their GPU with others. " if None in speeds else ""
    jax = ", ".join(dict.fromkeys(run["versions"]["jax"] for r in results for run in r["runs"]))
    return f"""## First tokens of larger models

Runs of one model have the same initial weights and the same batches in the same order, **one seed
alone**: how far another seed would move them was not measured at these sizes; llama60m's BF16 runs
above have a standard deviation of {noise:.4f}. The learning rate was not searched: llama130m has
what was best for llama60m in BF16, and larger models the paper's, 3e-4, with batches far smaller
than the paper's four million tokens.{lower}
Weights and moments are in float32{narrow}.
Training loss is the mean over the last twentieth of the steps, the highest a mean over few;
validation is on all whole batches of the split **with the recipe's own forward**, FP4's in FP4. So
few tokens tell how runs begin, not how they end: the paper's have 100 billion.
{shared}jax {jax}; commit {commits}.

{markdown(head, rows)}

{_lessons(groups)}

![training loss over the first tokens](first_tokens.png)

"""


def by_group(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of every group, first the one that the others are held against."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in (run for result in results for run in result["runs"]):
        groups.setdefault(run["group"], []).append(run)
    for runs in groups.values():
        runs.sort(key=lambda run: (run["recipe"] != "bf16", run["dtype"] != "bfloat16"))
    return groups


def _row(run: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    gap = run["valid_loss"] - reference["valid_loss"]
    peak = run["peak_bytes"]
    return [
        f"{run['model']}, {run['variant']}",
        run["device"],
        f"{run['tokens'] / 1e6:.1f} million",
        " x ".join(f"{n:,}" for n in run["batch_size, seq_len"]),
        f"{run['lr']:g}",
        f"{run['steps'] * run['warmup_share']:.0f} of {run['steps']}",
        f"{max(run['curve']):.1f}",
        f"{run['train_loss']:.4f}",
        f"{run['valid_loss']:.4f}",
        "—" if run is reference else f"{gap:+.4f} ({gap / reference['valid_loss']:+.2%})",
        f"{run['clipped']:.1%}",
        str(run["skipped"]),
        "—" if run["tokens_per_s"] is None else f"{run['tokens_per_s']:,.0f}",
        "—" if peak is None else f"{peak / 2**30:.1f}",
    ]


def _lessons(groups: dict[str, list[dict[str, Any]]]) -> str:
    lines = []
    for model, runs in groups.items():
        by = {(run["recipe"], run["dtype"]): run for run in runs}
        for (recipe, dtype), run in by.items():
            if recipe == "fp4" and dtype == "bfloat16" and ("bf16", dtype) in by:
                lines.append(f"- {model}: {_fp4_words(run, by['bf16', dtype])}")
            if dtype == "float16" and (recipe, "bfloat16") in by:
                lines.append(f"- {model}, {recipe}: {_fp16_words(run, by[recipe, 'bfloat16'])}")
    return "\n".join(lines)


def _fp4_words(fp4: dict[str, Any], bf16: dict[str, Any]) -> str:
    pairs = zip(fp4["validations"], bf16["validations"], strict=False)  # one may have diverged
    gaps = [f"{a - b:+.4f} at {tokens / 1e6:.1f}" for (tokens, a), (_, b) in pairs]
    train = fp4["train_loss"] - bf16["train_loss"]
    words = (
        f"validation loss in fp4 less that in bf16 is {', '.join(gaps)} million tokens; training "
        f"loss ends {train:+.4f} apart."
    )
    if None in (fp4["tokens_per_s"], bf16["tokens_per_s"]):
        return words
    faster = fp4["tokens_per_s"] / bf16["tokens_per_s"]
    return f"{words} fp4 has {faster:.2f} times the tokens a second."


def _fp16_words(fp16: dict[str, Any], bf16: dict[str, Any]) -> str:
    first, lowest, last = fp16["loss_scale"]
    gap = fp16["valid_loss"] - bf16["valid_loss"]
    return (
        f"computed in float16 with a dynamic loss scale it ends {gap:+.4f} from bfloat16 in "
        f"validation; the scale went from {first:,.0f} to {last:,.0f}, at the lowest "
        f"{lowest:,.0f}, and {fp16['skipped']} of {fp16['steps']:,} steps were skipped, their "
        "gradient not being finite."
    )


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Training loss by tokens, a panel a model, and points where it was validated."""
    groups = by_group(results)
    figure = Figure(figsize=(5 * len(groups) + 1, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (model, runs) in zip(panels, groups.items(), strict=True):
        for run in runs:
            curve, millions = run["curve"], run["tokens"] / 1e6
            x = [millions * (i + 0.5) / len(curve) for i in range(len(curve))]
            (line,) = axes.plot(x, curve, label=f"{run['variant']}, training", linewidth=1)
            axes.plot(
                *zip(*((tokens / 1e6, loss) for tokens, loss in run["validations"]), strict=True),
                "o",
                color=line.get_color(),
                markersize=4,
                label=f"{run['variant']}, validation",
            )
        axes.set_xlabel("tokens, millions")
        axes.set_ylabel("loss, nats a token")
        axes.set_title(f"{model}, one seed")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Software": None})
