"""Documents say what results say."""

import json
import sys

import pytest

from benchmarks import report, report_runs
from benchmarks.provenance import RESULTS, results


def test_documents_are_written_from_the_results_that_are_there(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report", "--check"])
    assert report.main() == 0


def test_a_document_that_is_out_of_date_is_named(monkeypatch, tmp_path, capsys):
    old = tmp_path / "README.md"
    old.write_text(report.README.read_text().replace("1.", "9."))
    monkeypatch.setattr(report, "README", old)
    monkeypatch.setattr(sys, "argv", ["report", "--check"])
    assert report.main() == 2
    assert f"error: {old} out of date" in capsys.readouterr().err


def test_quick_looks_are_no_results(tmp_path):
    for name, quick in (("b", False), ("a", True), ("c", False)):
        found = {"device": name} | ({"quick": True} if quick else {})
        (tmp_path / f"gemm-{name}.json").write_text(json.dumps(found))
    assert [found["device"] for found in results("gemm", tmp_path)] == ["b", "c"]


def test_what_a_sweep_leaves_open():
    # A parabola over the binary logarithm of the rate, its minimum at a quarter: 2**0.25 = 1.19.
    sweep = [
        {"variant": "bf16", "lr": 2.0**i, "valid_loss": (i - 0.25) ** 2 + 1} for i in (-1, 0, 1)
    ]
    assert "minimum at 1.2, 0.0625 nats lower" in report.sweep_sentence(sweep)


def test_words_that_the_numbers_no_longer_bear_out_are_refused():
    loss = json.loads((RESULTS / "loss.json").read_text())
    for result in loss["sweep"]:
        result["valid_loss"] = 1.0 + result["lr"] * (result["variant"] == "fp4")
    with pytest.raises(ValueError, match="no longer says that the gap falls as the learning rate"):
        report.lessons(loss)


def test_a_plan_is_held_against_what_was_used():
    (run, *_) = results("run")
    run = run | {"planned_bytes": 1.1 * run["peak_bytes"]}
    assert "+10.00%" in report_runs.large([run])
