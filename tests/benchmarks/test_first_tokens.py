"""First tokens of larger models: how the runs are made, and what the document says of them."""

import json
import sys

import pytest

from benchmarks import first_tokens, loss_study, report_first_tokens
from train.errors import UserError


def result(variant, recipe, dtype, losses, **changes):
    return {
        "variant": variant, "group": "llama1b", "model": "llama1b", "recipe": recipe,
        "dtype": dtype, "device": "NVIDIA X", "versions": {"jax": "1"}, "lr": 3e-4, "steps": 40,
        "warmup_share": 0.05,
        "batch_size, seq_len": [8, 2048], "tokens": 2_000_000, "skipped": 0, "clipped": 0.25,
        "curve": [9.0, 8.0, 7.0, 6.0], "train_loss": losses[-1] + 0.5, "valid_loss": losses[-1],
        "validations": [[1_000_000, losses[0]], [2_000_000, losses[1]]], "tokens_per_s": 100.0,
        "peak_bytes": 2**30, "loss_scale": None, "commit": "abc", **changes,
    }  # fmt: skip


def results(*runs):
    return [{"runs": list(runs)}]


BF16 = result("bf16", "bf16", "bfloat16", [7.0, 5.0])
FP4 = result("fp4", "fp4", "bfloat16", [6.5, 5.25], tokens_per_s=150.0)
FP16 = result("fp16", "bf16", "float16", [7.0, 4.0], skipped=3, loss_scale=[65536, 1024, 2048])


def test_runs_of_a_group_differ_in_what_they_are_named_after():
    for run in first_tokens.RUNS:
        others = [other for other in first_tokens.RUNS if other.group == run.group]
        assert len({(r.tokens, r.lr, r.rows, r.length) for r in others}) == 1
        assert len({r.flags for r in others}) == len({r.name for r in others}) == len(others) > 1
        assert run.steps * run.rows * run.length >= run.tokens


def test_the_document_says_gaps_speed_and_skipped_steps(tmp_path):
    assert report_first_tokens.section([], 0.01) == ""
    found = results(FP4, FP16, BF16)
    text = report_first_tokens.section(found, 0.01)
    assert "standard deviation of 0.0100" in text
    assert "less that in bf16 is -0.5000 at 1.0, +0.2500 at 2.0 million tokens" in text
    assert "loss ends +0.2500 apart. fp4 has 1.50 times the tokens a second" in text
    assert "ends -1.0000 from bfloat16" in text
    assert "from 65,536 to 2,048, at the lowest 1,024, and 3 of 40 steps were skipped" in text
    assert "2 of 40 |" in text
    assert "5.2500 | +0.2500 (+5.00%)" in " ".join(text.split())
    assert "third of that rate" not in text
    lower = result(
        "fp4", "fp4", "bfloat16", [6.0, 5.0], group="llama7b, longer warm-up", commit="def"
    )
    text = report_first_tokens.section(results(BF16, lower), 0.01)
    assert "third of that rate with a longer warm-up as well" in text and "commit abc, def" in text
    report_first_tokens.draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_finished_run_is_summed_up_and_not_trained_again(tmp_path, monkeypatch, capsys):
    trained = []

    def train(name, run_dir, flags, gpu):
        trained.append((name, gpu))
        assert "--steps=611" in flags and "--model.num_layers=2" in flags
        config = {
            "model": "llama1b", "recipe": name.rpartition("-")[2], "steps": 611, "batch_size": 8,
            "seq_len": 2048, "llama": {"dtype": "bfloat16"},
            "optimizer": {"clip_norm": 1.0, "warmup": 0.05, "rounding": "nearest"},
        }  # fmt: skip
        about = {"config": config, "device": "NVIDIA X", "versions": {}, "planned_bytes": 1}
        run_dir.mkdir(parents=True)
        (run_dir / "config.json").write_text(json.dumps(about))
        with (run_dir / "metrics.jsonl").open("w") as file:
            for step in range(1, 612):
                line = {"step": step, "loss": 10.0 - step / 100, "tokens": step * 16384,
                        "tokens_per_s": 5.0, "grad_norm": 2.0, "skipped": 0,
                        "lr": 0.1}  # fmt: skip
                line |= {"valid_loss": 4.0} if step in (123, 611) else {}
                file.write(json.dumps(line) + "\n")

    monkeypatch.setattr(first_tokens, "train", train)
    monkeypatch.setattr(first_tokens, "commit", lambda: "abc")
    flags = [f"--runs={tmp_path / 'runs'}", f"--out={tmp_path}", "--only=llama1b", "--data=x",
             "--flags=--model.num_layers=2"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["first_tokens", *flags])
    path = tmp_path / "first_tokens-nvidia-x.json"
    other = {"group": "llama7b", "variant": "fp4", "commit": "def"}
    path.write_text(json.dumps({"runs": [other]}))
    assert first_tokens.main() == 0
    assert first_tokens.main() == 0
    assert trained == [("llama1b-bf16", 0), ("llama1b-fp4", 0)]
    kept, *runs = json.loads(path.read_text())["runs"]
    assert kept == other
    assert [(run["variant"], run["commit"]) for run in runs] == [("bf16", "abc"), ("fp4", "abc")]
    assert runs[0]["validations"] == [[123 * 16384, 4.0], [611 * 16384, 4.0]]
    assert len(runs[0]["curve"]) == loss_study.CURVE_POINTS
    assert runs[0]["clipped"] == 1.0
    assert "validation 4.0000" in capsys.readouterr().out


def test_shared_gpus_tell_no_speed():
    found = results(FP4 | {"tokens_per_s": None}, BF16)
    text = report_first_tokens.section(found, 0.01)
    assert "apart." in text and "times the tokens" not in text
    words = "Runs without a speed shared their GPU"
    assert words in text and words not in report_first_tokens.section(results(FP4, BF16), 0.01)


def test_weights_are_said_to_be_narrow_where_they_are():
    words = "but llama7b's in BF16"
    of_7b = results(FP4 | {"group": "llama7b"}, BF16 | {"group": "llama7b"})
    assert words in report_first_tokens.section(of_7b, 0.01)
    assert words not in report_first_tokens.section(results(FP4, BF16), 0.01)


@pytest.mark.parametrize(("seen", "device"), [(None, "1"), ("", "1"), ("4,6", "6")])
def test_a_run_has_one_of_the_visible_gpus(monkeypatch, seen, device):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert loss_study.visible(1) == device
    if seen:
        with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=4,6; expected 3 GPUs"):
            loss_study.visible(2)


@pytest.mark.parametrize("half", ["metrics.jsonl", "nothing"])
def test_what_was_cut_off_is_not_taken_for_a_run(tmp_path, monkeypatch, capsys, half):
    run_dir = tmp_path / "llama1b-bf16"
    run_dir.mkdir()
    (run_dir / half).write_text('{"step": 1, "loss": 1.0, "tokens": 1}\n')
    flags = [f"--runs={tmp_path}", "--only=llama1b bf16", "--data=x", f"--out={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["first_tokens", *flags])
    assert first_tokens.main() == 2
    assert "llama1b-bf16 was cut off; remove it" in capsys.readouterr().err
