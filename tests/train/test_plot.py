"""The picture's size, scale, colours and legend, and runs that are odd to draw."""

import math
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest

from train import plot
from train.plot import running_median, save_loss_plot


def lines(*losses, valid=None):
    """Metrics of steps of 1000 tokens; `valid` gives validation losses by step."""
    return [
        {"step": step, "tokens": 1000 * step, "loss": loss}
        | ({"valid_loss": valid[step]} if valid and step in valid else {})
        for step, loss in enumerate(losses, start=1)
    ]


def falling(count=200):
    return [3 + 4 * math.exp(-step / 20) for step in range(count)]


def test_picture_is_a_png_of_the_stated_size(tmp_path):
    save_loss_plot(tmp_path / "loss.png", {"fp4": lines(*falling(), valid={100: 3.1, 200: 3.0})})
    content = (tmp_path / "loss.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (900, 550)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_picture_depends_on_each_thing_it_shows(tmp_path):
    base = {"a": lines(3.0, 2.0, 1.5), "b": lines(3.0, 2.0, 1.0, valid={2: 2.5, 3: 1.2})}
    variants = [
        base,
        base | {"a": lines(3.0, 2.1, 1.5)},
        base | {"b": lines(3.0, 2.0, 1.0, valid={2: 2.5, 3: 1.3})},
        {"a": base["a"], "c": base["b"]},
    ]
    contents = set()
    for runs in [*variants, base]:  # The last is the first again, and gives the same bytes.
        save_loss_plot(tmp_path / "loss.png", runs)
        contents.add((tmp_path / "loss.png").read_bytes())
    assert len(contents) == len(variants)


@pytest.mark.parametrize(
    "runs",
    [
        {},
        {"a": []},
        {"a": lines(math.nan, math.inf, valid={2: math.nan})},
        {"a": lines(5.0)},
        {"a": lines(1e300, 4.0, -math.inf, 2.0)},
        {"a": lines(*[3.0] * 100)},
        {"_a": lines(2.0, 1.0), "$x_{$": lines(2.0, 1.0), "n" * 200: lines(2.0, 1.0)},
        {f"run {i}": lines(2.0, 1.0 + i) for i in range(20)},
    ],
    ids=["no run", "no step", "nan", "one step", "huge", "constant", "names", "many"],
)
def test_odd_runs_are_drawn_without_a_warning(tmp_path, runs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_loss_plot(tmp_path / "loss.png", runs)
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_spike_at_the_start_does_not_set_the_scale():
    calm = plot._draw({"a": lines(*falling())})
    spiked = falling()
    spiked[1] = 500.0
    low, high = plot._draw({"a": lines(*spiked)}).axes[0].get_ylim()
    assert (low, high) == calm.axes[0].get_ylim()
    # The running median 2% into the run, step 4 of 200, is the loss there.
    bottom, top = falling()[-1], falling()[4]
    np.testing.assert_allclose(
        (low, high), (bottom - 0.04 * (top - bottom), top + 0.04 * (top - bottom))
    )


def test_the_scale_holds_every_run_but_not_a_divergence():
    worse = [loss + 2 for loss in falling()]
    _, high = plot._draw({"a": lines(*falling()), "b": lines(*worse)}).axes[0].get_ylim()
    assert high > worse[4]
    diverged = [7.0, *[1e4] * 199]
    _, high = plot._draw({"a": lines(*falling()), "b": lines(*diverged)}).axes[0].get_ylim()
    assert 7 < high < 8


def test_each_run_has_its_own_colour_and_the_legend_names_it():
    for count in (3, 12):
        names = [f"run{i}" for i in range(count)]
        figure = plot._draw({name: lines(2.0, 1.0, valid={2: 1.0}) for name in names})
        drawn = [str(line.get_color()) for line in figure.axes[0].lines]
        assert len(set(drawn)) == count
        for raw, smoothed, valid in zip(drawn[::3], drawn[1::3], drawn[2::3], strict=True):
            assert raw == smoothed == valid
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        assert legend[:count] == names
        assert any("median of 4% of steps" in text for text in legend)


def test_axes_name_units_and_the_legend_is_beside_them():
    figure = plot._draw({"a": lines(*falling(2000))})
    figure.canvas.draw()
    axes = figure.axes[0]
    assert axes.get_xlabel() == "tokens seen (millions)"
    assert axes.get_ylabel() == "loss (nats a token)"
    np.testing.assert_allclose(axes.lines[0].get_xdata()[[0, -1]], [0.001, 2.0])
    assert figure.legends[0].get_window_extent().x0 > axes.get_window_extent().x1


def test_running_median():
    # Two of 100 to either side: the window is symmetric at the start and cut off at the end.
    values = np.arange(100.0)
    values[50] = 1e6
    values[70] = np.nan
    centers, medians = running_median(values)
    assert list(centers) == list(range(100))
    assert list(medians[:3]) == [0, 1, 2]
    assert medians[50] == 51  # of 48, 49, 1e6, 51, 52
    assert medians[70] == 70  # of 68, 69, 71, 72
    assert list(medians[-3:]) == [97, 97.5, 98]


def test_running_median_of_a_long_run_keeps_both_ends():
    centers, medians = running_median(np.full(5000, 2.0))
    assert len(centers) == 600 and (centers[0], centers[-1]) == (0, 4999)
    assert (np.diff(centers) > 0).all()
    assert (medians == 2).all()


def test_running_median_of_nothing_finite():
    assert [len(part) for part in running_median(np.array([]))] == [0, 0]
    assert np.isnan(running_median(np.full(3, np.inf))[1]).all()


def test_failure_leaves_nothing_behind_and_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    path.write_bytes(b"before")

    def fail(self: Path, target: Path) -> None:
        raise OSError("no room")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no room"):
        save_loss_plot(path, {"a": lines(2.0, 1.0)})
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
