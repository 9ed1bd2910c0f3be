"""Traces of a run's steps."""

import gzip
import json

import pytest


@pytest.mark.parametrize("steps", [2, 100], ids=["in the middle", "to the end"])
def test_a_profile_holds_the_steps_that_were_asked_for(runs, tmp_path, capsys, steps):
    assert runs.tiny(tmp_path / "run", f"--profile={steps}") == 0
    folder = tmp_path / "run" / "profile"
    assert f"traced {min(steps, 7)} steps into {folder}" in capsys.readouterr().err
    assert list(folder.rglob("*.xplane.pb"))  # TensorBoard's
    (perfetto,) = folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    traced = {e["args"]["step_num"] for e in events if e.get("name") == "train"}
    assert traced == {str(step) for step in range(6, 13)[:steps]}


def test_a_run_too_short_for_a_trace_says_so(runs, tmp_path, capsys):
    assert runs.tiny(tmp_path / "run", "--profile=2", "--steps=4") == 0
    assert "warning: nothing traced: that begins after 5 steps" in capsys.readouterr().err


def test_no_profile_unless_asked(unbroken):
    assert not (unbroken / "profile").exists()
