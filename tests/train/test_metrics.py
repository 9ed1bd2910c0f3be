"""What a run writes beside its checkpoints, line by line."""

import itertools
import json
import struct
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c
from tiny_run import lines_of, saved_arrays

from train import data, loop, metrics
from train.batches import eval_batches
from train.errors import UserError
from train.metrics import ProgressLine, RunLog, _clock
from train.optimizer import schedule
from train.step import Trainer


def events_of(run_dir):
    """Every event of a run, its records' checksums verified."""
    events = []
    for path in sorted((run_dir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime):
        content = path.read_bytes()
        while content:
            size = struct.unpack("<Q", content[:8])[0]
            record = content[12 : 12 + size]
            checksums = struct.pack("<I", masked_crc32c(content[:8])), content[8:12]
            assert checksums[0] == checksums[1]
            assert struct.pack("<I", masked_crc32c(record)) == content[12 + size : 16 + size]
            events.append(Event.FromString(record))
            content = content[16 + size :]
    return events


def scalars_of(run_dir):
    return {
        (value.tag, event.step): value.simple_value
        for event in events_of(run_dir)
        for value in event.summary.value
    }


def test_a_line_for_each_step(unbroken, tiny_config):
    lines = lines_of(unbroken)
    assert [line["step"] for line in lines] == list(range(1, 13))
    promised = {"step", "loss", "tokens", "tokens_per_s", "grad_norm", "lr", "skipped"}
    for line in lines:
        evaluated = {"valid_loss"} if line["step"] % 4 == 0 else set()
        last = {"peak_bytes"} if line["step"] == 12 else set()
        assert line.keys() == promised | evaluated | last
        assert line["tokens"] == 32 * line["step"]
        assert line["lr"] == pytest.approx(float(schedule(tiny_config())(line["step"] - 1)))
        assert line["skipped"] == 0 and line["grad_norm"] > 0 and line["tokens_per_s"] > 0
    assert lines[-1]["loss"] < lines[0]["loss"] == pytest.approx(np.log(512), rel=0.05)
    assert lines[-1]["peak_bytes"] > 2**25


def test_validation_loss_is_of_the_validation_text(unbroken, text, tiny_config):
    corpus = data.load(str(text), seq_len=16, batch_size=2)
    trainer = Trainer(tiny_config())
    arrays = saved_arrays(unbroken, 12)
    paths, structure = jax.tree_util.tree_flatten_with_path(trainer.abstract_state())
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    state = jax.tree.unflatten(structure, [arrays[name] for name in names])
    batches = eval_batches(corpus.valid, seq_len=16, batch_size=2, max_batches=2)
    evaluate = jax.jit(trainer.evaluate)
    losses = [float(evaluate(state.params, state.stats, batch)) for batch in batches]
    assert len(losses) == 2
    assert lines_of(unbroken)[-1]["valid_loss"] == pytest.approx(np.mean(losses), rel=1e-6)


def test_health_has_a_line_for_each_layer(unbroken):
    lines = lines_of(unbroken, "health.jsonl")
    paths = ["attention.o_proj", "attention.qkv_proj", "mlp.down_proj", "mlp.gate_up_proj"]
    assert [(line["step"], line["path"], line["layer"]) for line in lines] == [
        (step, f"layers.{path}", layer) for step in (6, 12) for path in paths for layer in (0, 1)
    ]
    for line in lines:
        measures = line.keys() - {"step", "path", "layer"}
        assert measures == {"clipped", "w_snr_db", "w_zero", "x_snr_db", "x_zero"}
        assert 0 < line["clipped"] < 0.05 and 10 < line["x_snr_db"] < 40


def test_tensorboard_has_every_number(unbroken):
    scalars = scalars_of(unbroken)
    expected = {
        (f"train/{name}", line["step"]): value
        for line in lines_of(unbroken)
        for name, value in line.items()
        if name != "step"
    } | {
        (f"health/{line['path']}.{line['layer']}/{name}", line["step"]): value
        for line in lines_of(unbroken, "health.jsonl")
        for name, value in line.items()
        if name not in ("step", "path", "layer")
    }
    assert scalars.keys() == expected.keys()
    for key, value in expected.items():
        assert scalars[key] == pytest.approx(value, rel=1e-6), key


def test_config_and_plot(unbroken):
    content = json.loads((unbroken / "config.json").read_text())
    assert content["config"]["llama"]["embed_dim"] == 32
    assert content["config"]["quantization"]["x_format"] == "e2m1"
    assert content["versions"]["jax"] == jax.__version__
    assert content["parameters"] == 34976
    png = (unbroken / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")


def line_of(step):
    return {"step": step, "loss": 1 / step, "valid_loss": None}


def test_a_resumed_log_drops_what_came_after_its_checkpoint(tmp_path):
    log = RunLog(tmp_path, 0)
    for step in range(1, 6):
        log.step(line_of(step))
        log.health(step, {"layer": {"x": np.float32([step, 9])}})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    log = RunLog(tmp_path, 3)
    log.step(line_of(4))
    log.close()
    assert lines_of(tmp_path) == [line_of(step) for step in range(1, 5)]
    health = [tuple(line.values()) for line in lines_of(tmp_path, "health.jsonl")]
    assert health == [
        (step, "layer", layer, value) for step in (1, 2, 3) for layer, value in ((0, step), (1, 9))
    ]
    # TensorBoard itself drops what is at or after the step at which a session begins.
    starts = [event.step for event in events_of(tmp_path) if event.session_log.status == 1]
    assert starts == [1, 4]


@pytest.mark.parametrize("torn", ["", "{", '{"step": 3', '{"step": 3, "loss": 0.5}'])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    whole = '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + torn)
    RunLog(tmp_path, 3).close()
    assert (tmp_path / "metrics.jsonl").read_text() == whole


@pytest.mark.parametrize("damaged", ["garbage", "[]", "{}", '{"step": null}'])
def test_a_damaged_line_is_named_and_nothing_dropped(tmp_path, damaged):
    text = f'{{"step": 1}}\n{damaged}\n{{"step": 3}}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is no line of a step; mend or remove"):
        RunLog(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_a_run_that_begins_again_has_empty_logs(tmp_path):
    for start in (0, 0):
        log = RunLog(tmp_path, start)
        log.step(line_of(1))
        log.close()
    assert lines_of(tmp_path) == [line_of(1)]


def test_lines_can_be_read_once_flushed(tmp_path):
    log = RunLog(tmp_path, 0)
    log.step(line_of(1))
    log.step(line_of(2) | {"loss": float("nan")})
    log.flush()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]
    assert scalars_of(tmp_path)["train/loss", 1] == 1
    assert np.isnan(scalars_of(tmp_path)["train/loss", 2])
    log.close()


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
    line = ProgressLine(600, 0)
    line.report(10, 3.14159, 12345.6, 61.4)
    line.say("[saved] /a/b")
    line.close()
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors == "step 10/600  loss 3.1416  12,346 tokens/s  1:01 left\n[saved] /a/b\n"


def test_progress_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    line = ProgressLine(600, 200)
    line.report(300, 3.14159, 12345.6, 61.4)
    line.say("validation")
    line.close()
    errors = capsys.readouterr().err
    assert "300/600" in errors and "loss 3.1416  12,346 tokens/s  1:01 left" in errors
    assert "validation" in errors


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0:00"), (59.6, "1:00"), (3600, "1:00:00"), (90061, "25:01:01"), (float("inf"), "?")],
)
def test_time_left(seconds, shown):
    assert _clock(seconds) == shown


def test_speed_is_that_of_tokens_and_evaluations_do_not_count(runs, tmp_path, monkeypatch):
    ticks = itertools.count(0.0, 2.0)  # two seconds a reading
    clock = SimpleNamespace(perf_counter=lambda: next(ticks), monotonic=time.monotonic)
    monkeypatch.setattr(loop, "time", clock)
    flags = ("--steps=4", "--log.every=1", "--eval_every=2", "--log.health_every=0",
             "--checkpoint.every=0")  # fmt: skip
    assert runs.tiny(tmp_path / "run", *flags) == 0
    lines = lines_of(tmp_path / "run")
    tokens = lines[1]["tokens"] - lines[0]["tokens"]
    assert [line["tokens_per_s"] for line in lines] == [tokens / 2] * 4


def test_what_is_set_aside_has_a_number_that_no_log_has(tmp_path):
    for name in ("metrics", "health", "health-1"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    assert metrics.set_aside(tmp_path) == tmp_path / "metrics-2.jsonl"
    assert (tmp_path / "health-1.jsonl").read_text() == "health-1"
    assert (tmp_path / "health-2.jsonl").read_text() == "health"
