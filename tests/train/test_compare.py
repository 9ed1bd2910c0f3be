"""Summaries against numbers worked out by hand, and the program on good and bad runs."""

import json
import math
import struct
import subprocess
import sys
from dataclasses import asdict

import pytest

from jfp4.recipe import RECIPES
from train.compare import differing_fields, main, read_metrics, summarize
from train.errors import UserError


def write_run(
    path, losses, valid=None, *, planned=None, peak_bytes=None, fingerprint="ab" * 16, **config
):
    """Writes a run of 512 tokens a step, at 100, 200, ... tokens a second."""
    path.mkdir(parents=True)
    config = {
        "model": "llama5m",
        "recipe": "bf16",
        "seed": 0,
        "steps": planned or len(losses),
        "batch_size": 8,
        "seq_len": 64,
        "llama": {"embed_dim": 256, "remat": "none"},
    } | config
    recorded = {"config": config, "data_fingerprint": fingerprint, "versions": {}, "device": "cpu"}
    (path / "config.json").write_text(json.dumps(recorded))
    lines = []
    for step, loss in enumerate(losses, start=1):
        line = {"step": step, "loss": loss, "tokens": 512 * step, "tokens_per_s": 100.0 * step}
        line |= {"grad_norm": 1.0, "lr": 1e-3, "skipped": step // 20}
        if valid and step in valid:
            line["valid_loss"] = valid[step]
        lines.append(line)
    if peak_bytes is not None:
        lines[-1]["peak_bytes"] = peak_bytes
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def cells(output, name):
    """The cells of the row of a run."""
    return next(line.split() for line in output.splitlines() if line.split()[:1] == [name])


def test_summary(tmp_path):
    losses = [9.0] * 38 + [2.0, 3.0]
    run = summarize(
        write_run(
            tmp_path / "fp4",
            losses,
            {20: 5.0, 40: 2.75},
            peak_bytes=3 * 2**30,
            recipe="fp4",
            seed=7,
            planned=100,
        )
    )
    assert (run.name, run.recipe, run.seed) == ("fp4", "fp4", 7)
    assert (run.steps, run.planned_steps, run.tokens) == (40, 100, 20480)
    assert run.train_loss == 2.5  # 5% of 40 steps are the last two
    assert (run.valid_loss, run.valid_step) == (2.75, 40)
    assert run.tokens_per_s == 2050  # between 2000 and 2100
    assert run.peak_bytes == 3 * 2**30
    assert run.skipped == 2
    assert run.data_fingerprint == "ab" * 16
    assert run.config["batch_size"] == 8


def test_summary_of_a_short_run_without_evaluation_or_memory(tmp_path):
    run = summarize(write_run(tmp_path / "a", [3.0, 2.0]))
    assert run.train_loss == 2.0
    assert (run.valid_loss, run.valid_step, run.peak_bytes) == (None, None, None)


def test_peak_may_be_null(tmp_path):
    path = write_run(tmp_path / "a", [3.0])
    text = (path / "metrics.jsonl").read_text().replace('"lr"', '"peak_bytes": null, "lr"')
    (path / "metrics.jsonl").write_text(text)
    assert summarize(path).peak_bytes is None


def test_a_loss_that_is_not_finite_is_kept(tmp_path):
    path = write_run(tmp_path / "a", [3.0, math.inf, math.nan])
    assert [line["loss"] for line in read_metrics(path)][:2] == [3.0, math.inf]
    assert math.isnan(summarize(path).train_loss)


def test_a_torn_last_line_is_left_out(tmp_path):
    path = write_run(tmp_path / "a", [3.0, 2.0, 1.0])
    content = (path / "metrics.jsonl").read_bytes()
    whole = len(content) - 1
    (path / "metrics.jsonl").write_bytes(content[:whole])
    assert len(read_metrics(path)) == 3  # Only the line's end is missing.
    for cut in (whole - 1, content.rindex(b"\n", 0, whole) + 2):
        (path / "metrics.jsonl").write_bytes(content[:cut])
        assert [line["step"] for line in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize(
    ("number", "text", "message"),
    [
        (2, '{"step": 2, "lo', "metrics.jsonl:2 is not JSON"),
        (3, '{"step": 3, "lo', "metrics.jsonl:3 is not JSON"),  # It has an end, so is not torn.
        (1, "", "metrics.jsonl:1 is not JSON"),
        (2, "[1, 2]", "metrics.jsonl:2 has no number 'step'"),
        (2, '{"step": 2, "loss": null, "tokens": 1}', "metrics.jsonl:2 has no number 'loss'"),
        (3, '{"step": 2, "loss": 1.0}', "metrics.jsonl:3 has no number 'tokens'"),
    ],
)
def test_any_other_bad_line_is_named(tmp_path, number, text, message):
    path = write_run(tmp_path / "a", [3.0, 2.0, 1.0]) / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[number - 1] = text
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=f"a/{message}"):
        read_metrics(path.parent)


def test_table_takes_the_gap_of_validation_losses(tmp_path, capsys):
    a = write_run(tmp_path / "a", [9.0, 5.0], {2: 4.0}, peak_bytes=3 * 2**29)
    b = write_run(tmp_path / "b", [9.0, 6.0], {1: 8.0, 2: 4.1}, recipe="fp4")
    assert main([str(a), str(b), f"--out={tmp_path}/curves.png"]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    for row in (
        "a bf16 0 2 1,024 5.0000 4.0000 +0.0000 +0.00 150 1.50 0",
        "b fp4 0 2 1,024 6.0000 4.1000 +0.1000 +2.50 150 — 0",
    ):
        assert " ".join(cells(output, row[0])) == row
    assert "Gap: validation loss less that of a;" in output
    assert "mean of the last 5% of steps, at least one" in output
    content = (tmp_path / "curves.png").read_bytes()
    assert content.startswith(b"\x89PNG") and struct.unpack(">II", content[16:24]) == (900, 550)


def test_table_takes_the_gap_of_training_losses_if_one_run_has_no_other(tmp_path, capsys):
    a = write_run(tmp_path / "a", [9.0, 5.0], {2: 4.0})
    b = write_run(tmp_path / "b", [9.0, 4.0])
    assert main([str(a), str(b), f"--out={tmp_path}/curves.png"]) == 0
    output = capsys.readouterr().out
    assert cells(output, "b")[5:9] == ["4.0000", "—", "-1.0000", "-20.00"]
    assert "Gap: training loss less that of a, as b has no validation loss" in output


def test_numbers_are_never_cut_off_and_columns_line_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    name = "llama130m-fp4-20250101-120000" * 2
    a = write_run(tmp_path / "a", [123456.5], planned=1_000_000)
    b = write_run(tmp_path / name, [math.nan], planned=1_000_000)
    assert main([str(a), str(b), f"--out={tmp_path}/curves.png"]) == 0
    output = capsys.readouterr().out
    assert "1/1000000" in cells(output, "a") and "123456.5000" in cells(output, "a")
    assert cells(output, name)[5:9] == ["nan", "—", "nan", "nan"]
    rows = [line for line in output.splitlines() if "1/1000000" in line]
    assert len({len(row) for row in rows}) == 1
    assert len({row.index("1/1000000") for row in rows}) == 1
    assert "\x1b" not in output


def test_runs_of_one_name_are_told_apart(tmp_path, capsys):
    a = write_run(tmp_path / "x" / "fp4", [2.0])
    b = write_run(tmp_path / "y" / "fp4", [1.0])
    assert main([str(a), str(b), f"--out={tmp_path}/curves.png"]) == 0
    output = capsys.readouterr().out
    assert cells(output, str(a))[5] == "2.0000"
    assert cells(output, str(b))[5] == "1.0000"


def test_a_table_row_keeps_names_that_look_like_markup(tmp_path, capsys):
    assert main([str(write_run(tmp_path / "[red]", [2.0])), f"--out={tmp_path}/curves.png"]) == 0
    assert cells(capsys.readouterr().out, "[red]")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"fingerprint": "cd" * 16}, "data_fingerprint (abababababab, cdcdcdcdcdcd)"),
        ({"seed": 1}, "seed (0, 1)"),
        ({"batch_size": 16, "seq_len": 32}, "batch_size x seq_len (8 x 64, 16 x 32)"),
        ({"planned": 3}, "steps (2, 2/3)"),
        ({"model": "llama60m"}, "model (llama5m, llama60m)"),
        ({"llama": {"embed_dim": 512, "remat": "none"}}, None),
        ({"valid": {1: 3.0}}, "step of the last evaluation (2, 1)"),
        ({"eval_batches": 4}, "eval_batches (None, 4)"),
    ],
)
def test_runs_that_do_not_compare_are_warned_of(tmp_path, capsys, change, expected):
    a = write_run(tmp_path / "a", [3.0, 2.0], {2: 3.0})
    b = write_run(tmp_path / "b", [3.0, 2.0], **{"valid": {2: 3.0}} | change)
    assert main([str(a), str(b), f"--out={tmp_path}/curves.png"]) == 0
    expected = expected or "model (llama5m embed_dim=256, llama5m embed_dim=512)"
    warning = f"warning: gaps mean little: the runs differ in {expected}\n"
    assert capsys.readouterr().err == warning


def test_what_the_recipe_or_the_machine_changes_is_not_warned_of(tmp_path):
    a = write_run(tmp_path / "a", [3.0])
    b = write_run(tmp_path / "b", [2.0], recipe="fp4", llama={"embed_dim": 256, "remat": "codes"})
    assert differing_fields([summarize(a), summarize(b)]) == []


def test_every_difference_is_in_the_one_line(tmp_path):
    a = write_run(tmp_path / "a", [3.0])
    b = write_run(tmp_path / "b", [3.0], seed=1)
    c = write_run(tmp_path / "c", [3.0, 2.0], seed=2)
    fields = differing_fields([summarize(run) for run in (a, b, c)])
    assert fields == ["seed (0, 1, 2)", "steps (1, 2)"]


def test_optimizers_are_compared_field_by_field(tmp_path):
    of_a, of_b = {"warmup": 0.1, "beta1": 0.9}, {"warmup": 0.2, "beta1": 0.9, "accumulation": 2}
    a = write_run(tmp_path / "a", [3.0], lr=1e-3, optimizer=of_a | {"accumulation": 1})
    b = write_run(tmp_path / "b", [3.0], lr=2e-3, optimizer=of_b)
    fields = differing_fields([summarize(run) for run in (a, b)])
    assert fields == ["lr (0.001, 0.002)", "optimizer (warmup=0.1, warmup=0.2)"]


def test_recipes_are_told_apart_by_what_overrides_have_made_of_them(tmp_path):
    fp4 = json.loads(json.dumps(asdict(RECIPES["fp4"])))
    plain = write_run(tmp_path / "plain", [3.0], recipe="fp4", quantization=fp4)
    other = fp4 | {"dge_k": None, "skip": ["*head*"]}
    ablation = write_run(tmp_path / "ablation", [3.0], recipe="fp4", quantization=other)
    assert summarize(plain).recipe == "fp4"
    assert summarize(ablation).recipe == "fp4 dge_k=None skip=['*head*']"


def test_what_gradients_are_sent_in_is_compared_as_it_was_resolved(tmp_path):
    a = write_run(tmp_path / "a", [3.0], optimizer={"master": "bfloat16"}, grad_comm=None)
    b = write_run(tmp_path / "b", [3.0], optimizer={"master": "bfloat16"}, grad_comm="bfloat16")
    c = write_run(tmp_path / "c", [3.0], optimizer={"master": "bfloat16"}, grad_comm="fp8")
    assert differing_fields([summarize(run) for run in (a, b)]) == []
    assert differing_fields([summarize(run) for run in (a, c)]) == ["grad_comm (bfloat16, fp8)"]


def no_config(run):
    (run / "config.json").unlink()


def no_metrics(run):
    (run / "metrics.jsonl").unlink()


def empty_metrics(run):
    (run / "metrics.jsonl").write_text("")


def torn_first_line(run):
    (run / "metrics.jsonl").write_text('{"step"')


def torn_config(run):
    (run / "config.json").write_text("{")


def list_config(run):
    (run / "config.json").write_text("[]")


def no_seed(run):
    recorded = json.loads((run / "config.json").read_text())
    del recorded["config"]["seed"]
    (run / "config.json").write_text(json.dumps(recorded))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (no_config, "b/config.json cannot be read (No such file or directory)"),
        (no_metrics, "b/metrics.jsonl cannot be read (No such file or directory)"),
        (empty_metrics, "b/metrics.jsonl has no steps yet"),
        (torn_first_line, "b/metrics.jsonl has no steps yet"),
        (torn_config, "b/config.json is not JSON"),
        (list_config, "b/config.json is not that of a run"),
        (no_seed, "b/config.json is not that of a run ('seed' is missing)"),
    ],
)
def test_a_run_that_cannot_be_read_ends_the_program(tmp_path, capsys, harm, message):
    a = write_run(tmp_path / "a", [3.0])
    b = write_run(tmp_path / "b", [3.0])
    harm(b)
    assert main([str(a), str(b), f"--out={tmp_path}/curves.png"]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no run is given"),
        (["{}/none"], "none/config.json cannot be read"),
        (["{}/a", "{}/a/"], "is given twice"),
        (["{}/a", "--out={}/curves.pdf"], "is no .png"),
        (["{}/a", "--out={}/none/curves.png"], "cannot be written (No such file or directory)"),
        (["{}/a", "--oot=x.png"], "unknown argument '--oot=x.png'; did you mean --out?"),
        (["--oot=x.png", "{}/a"], "unknown argument '--oot=x.png'; did you mean --out?"),
    ],
)
def test_flags_that_cannot_be_used(tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", [3.0])
    assert main([arg.format(tmp_path) for arg in args]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_program(tmp_path):
    run = write_run(tmp_path / "a", [3.0])
    command = [sys.executable, "-m", "train.compare", f"--out={tmp_path}/curves.png", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert cells(done.stdout, "a")[5] == "3.0000"
    assert (tmp_path / "curves.png").exists()
    failed = subprocess.run([*command, "none"], capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: none/config.json") and failed.stderr.count("\n") == 1
