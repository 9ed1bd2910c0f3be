"""The picture of a run, or of several: training and validation loss by tokens."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Okabe and Ito, "Color Universal Design" (2008), less yellow, which is faint on white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_UNITS = ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)"))
_DPI = 100
_MAX_SMOOTHED_POINTS = 600  # About one a pixel; more would not be seen.
_RAW: dict[str, Any] = {"linewidth": 0.6, "alpha": 0.3}
_SMOOTHED: dict[str, Any] = {"linewidth": 1.8}
_VALID: dict[str, Any] = {
    "linewidth": 1.0,
    "linestyle": "--",
    "marker": "o",
    "markersize": 5,
    "markerfacecolor": "white",
}

_Array = npt.NDArray[np.float64]


def save_loss_plot(
    path: str | os.PathLike[str], runs: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Draws the losses of runs as a PNG of 900 x 550 pixels; it appears whole or not at all.

    A thin line is the training loss of each step and a thick one its running median over 4% of the
    steps; circles are validation losses. The y axis starts from the loss after 2% of the steps, so
    that the fall from the initial loss, and any spike or divergence above, leave the picture
    instead of flattening the rest of it. Losses that are not finite are gaps in the lines.

    Args:
        path: The file to write or replace.
        runs: By name, the lines of a run's metrics in order of steps: "tokens" seen so far, "loss"
            in nats a token and, where an evaluation ran, "valid_loss" in the same unit.

    Raises:
        OSError: The file cannot be written; nothing is left behind.
    """
    figure = _draw(runs)
    path = Path(path)
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        figure.savefig(partial, format="png")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _draw(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    # A Figure with its own canvas, as pyplot would keep it alive in a global list.
    figure = Figure(figsize=(9.0, 5.5), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    most_tokens = max((line["tokens"] for lines in runs.values() for line in lines), default=0)
    unit, unit_name = next(((u, name) for u, name in _UNITS if most_tokens >= u), (1.0, ""))

    tops, bottoms = [], []
    for (tokens, loss, valid_tokens, valid), color in zip(
        map(_series, runs.values()), _colors(len(runs)), strict=True
    ):
        centers, smoothed = running_median(loss)
        # A lone step has no line to draw.
        marker = "." if len(loss) == 1 else ""
        axes.plot(tokens / unit, loss, color=color, zorder=1, **_RAW)
        axes.plot(
            tokens[centers] / unit, smoothed, color=color, zorder=2, marker=marker, **_SMOOTHED
        )
        axes.plot(valid_tokens / unit, valid, color=color, zorder=3, **_VALID)

        settled = smoothed[centers >= len(loss) // 50]
        settled = settled[np.isfinite(settled)]
        finite = loss[np.isfinite(loss)]
        if len(settled):
            # Not above where it began: a run that explodes at once must not set the scale.
            tops.append(min(settled[0], finite[0]))
        bottoms += [*finite, *valid[np.isfinite(valid)]]

    if tops and max(tops) > min(bottoms):
        margin = 0.04 * (max(tops) - min(bottoms))
        axes.set_ylim(min(bottoms) - margin, max(tops) + margin)
    if not bottoms:
        axes.text(0.5, 0.5, "no finite loss", transform=axes.transAxes, ha="center", color="gray")
    axes.set_xlabel(f"tokens seen{unit_name}")
    axes.set_xmargin(0.01)
    axes.set_ylabel("loss (nats a token)")
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _add_legend(figure, list(runs))
    return figure


def running_median(values: _Array) -> tuple[npt.NDArray[np.int64], _Array]:
    """The median of the finite values around points spread over a sequence.

    The window reaches 2% of the sequence to either side. It is cut off at the end, and kept
    symmetric at the start, where a one-sided window would flatten the steep fall of a loss.

    Returns:
        Positions in ``values``, rising, the first and the last among them; and the median at each,
        NaN where its window has no finite value.
    """
    num_points = min(len(values), _MAX_SMOOTHED_POINTS)
    centers = np.linspace(0, max(len(values) - 1, 0), num_points).astype(np.int64)
    medians = np.full(num_points, np.nan)
    for i, center in enumerate(centers):
        half = min(len(values) // 50, int(center))
        window = values[center - half : center + half + 1]
        window = window[np.isfinite(window)]
        if len(window):
            medians[i] = np.median(window)
    return centers, medians


def _series(lines: Sequence[Mapping[str, Any]]) -> tuple[_Array, _Array, _Array, _Array]:
    """Tokens and loss of each step, and tokens and loss of each evaluation; NaN if not finite."""
    evaluated = [line for line in lines if line.get("valid_loss") is not None]
    tokens = np.array([line["tokens"] for line in lines], np.float64)
    loss = np.array([line["loss"] for line in lines], np.float64)
    valid_tokens = np.array([line["tokens"] for line in evaluated], np.float64)
    valid = np.array([line["valid_loss"] for line in evaluated], np.float64)
    loss[~np.isfinite(loss)] = np.nan
    valid[~np.isfinite(valid)] = np.nan
    return tokens, loss, valid_tokens, valid


def _colors(count: int) -> list[Any]:
    """As many colours, told apart with any colour vision."""
    if count <= len(_COLORS):
        return list(_COLORS[:count])
    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0, 0.9, count)]


def _add_legend(figure: Figure, names: Sequence[str]) -> None:
    """Says beside the axes what colours and line styles stand for."""
    entries = [
        (Line2D([], [], color=color, linewidth=3), name)
        for name, color in zip(names, _colors(len(names)), strict=True)
    ]
    entries += [
        (Line2D([], [], color="0.3", **_RAW), "training, each step"),
        (Line2D([], [], color="0.3", **_SMOOTHED), "training, running\nmedian of 4% of steps"),
        (Line2D([], [], color="0.3", **_VALID), "validation"),
    ]
    many = len(names) > 16
    legend = figure.legend(
        handles=[handle for handle, _ in entries],
        labels=[str(i) for i in range(len(entries))],
        loc="outside right upper",
        frameon=False,
        fontsize=6 if many else 9,
    )
    # Set afterwards and as plain text: a name may start with "_" or hold "$", which labels do not
    # take literally.
    for text, (_, label) in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)
        text.set_text(
            "\n".join(textwrap.fill(part, 40 if many else 26) for part in label.split("\n"))
        )
