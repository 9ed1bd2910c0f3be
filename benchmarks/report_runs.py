"""What docs/results.md says of runs of large models, from run-*.json and resume-*.json."""

from typing import Any

from benchmarks.timing import markdown

ROUNDED = {"nearest": "to nearest", "stochastic": "stochastically"}
"""How moments are rounded, by the flag."""


def large(runs: list[dict[str, Any]]) -> str:
    """A section on models that fill a GPU; nothing where none was run."""
    if not runs:
        return ""
    rows = [
        [
            f"{run['model']}, {run['recipe']}",
            run["device"],
            "{master}, {first_moment}, {second_moment}, {rounding}".format(**run["optimizer"]),
            run["remat"],
            "scanned" if run["scan_layers"] else "written out",
            " x ".join(str(n) for n in run["batch_size, seq_len"]),
            f"{run['tokens_per_s']:,.0f}",
            f"{run['peak_bytes'] / 2**30:.1f}",
            f"{run['planned_bytes'] / run['peak_bytes'] - 1:+.2%}",
            f"{len(run['loss'])}",
            f"{run['loss'][0]:.2f} to {run['loss'][-1]:.2f}",
        ]
        for run in runs
    ]
    head = ["run", "device", "weights, moments, their rounding", "remat", "layers",
            "tokens a step", "tokens/s", "peak GiB", "plan, off by", "steps", "loss"]  # fmt: skip
    commits = ", ".join(dict.fromkeys(run["commit"] for run in runs))
    return f"""## Large models on one GPU

Whole models, by `python -m train.main`; few steps, which tell speed and memory, not quality. Commit
{commits}.

{markdown(head, rows)}

"""


def resumed(results: list[dict[str, Any]]) -> str:
    """A section on runs that were killed and resumed; nothing where there is none."""
    if not results:
        return ""
    parts = "\n\n".join(_resumed(result) for result in results)
    return f"""## Killed and resumed

By `python -m benchmarks.resume`: a run with `--deterministic` is killed (SIGKILL) in the middle of
a step, some steps after its checkpoint, and resumed. Equal means that loss, gradient norm and
everything else that a step's line of metrics says of it are, to the last bit, those of the process
that was killed, which is what an unbroken run goes on with.

{parts}

"""


def _resumed(result: dict[str, Any]) -> str:
    again, first, second = result["repeated"], result["killed run"], result["resumed run"]
    equal = sum(pair["equal"] for pair in again)
    rows, length = result["batch_size, seq_len"]
    peak = "" if result["peak_bytes"] is None else f", peak {_gib(result['peak_bytes'])}"
    valid = "" if result["valid_loss"] is None else f", validation {result['valid_loss']:.2f}"
    return " ".join(
        (
            f"- {result['model']}, {result['layers']} layers, {result['recipe']}, {rows} x",
            f"{length:,} tokens a step, on {result['device']}: saved after step {result['saved']},",
            f"killed after step {result['killed']}, gone on to step {result['steps']}.",
            f"**{equal} of {len(again)} steps made twice are equal**, the last with loss",
            f"{again[-1]['loss'][0]!r} and {again[-1]['loss'][1]!r}.",
            f"Training loss {result['loss'][0]:.2f} to {result['loss'][-1]:.2f}{valid};",
            f"{result['tokens_per_s']:,.0f} tokens/s{peak}.",
            f"A checkpoint takes {_gib(result['checkpoint_bytes'])}, and the step after it came",
            f"{first['save_seconds']:.0f} s later than steps do;",
            f"the process held at most {_gib(first['host_bytes'])} of host memory, and",
            f"{_gib(second['host_bytes'])} when it was resumed, which took",
            f"{second['start_seconds']:.0f} s to the end of its first step.",
            f"Flags: `{' '.join(result['flags'])}`; moments are rounded",
            # Of before it was kept, and could be nothing else.
            f"{ROUNDED[result.get('rounding', 'nearest')]}.",
            f"jax {result['versions']['jax']}; commit {result['commit']}.",
        )
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
