"""Flags to configuration, mistakes to one line, and back from config.json."""

import dataclasses
import errno
import json
import re
import sys
from pathlib import Path

import pytest

from jfp4.models.config import MODELS
from jfp4.recipe import RECIPES
from train import rundir
from train.config import (
    OptimizerConfig,
    TrainConfig,
    default_run_dir,
    differences,
    from_dict,
    parse,
    program,
    report_error,
    to_dict,
)
from train.errors import UserError


def test_no_flags_give_the_defaults():
    assert parse([]) == TrainConfig()


def test_presets_come_first_whatever_the_order():
    config = parse(["--model.num_layers=3", "--recipe.dge_k=7", "--model=llama1b", "--recipe=fp4"])
    assert config.llama == dataclasses.replace(MODELS["llama1b"], num_layers=3)
    assert config.quantization == dataclasses.replace(RECIPES["fp4"], dge_k=7.0)
    assert parse(["--recipe", "bf16"]).quantization == RECIPES["bf16"]


def test_values_may_follow_a_space_and_hyphens_do():
    config = parse(["--batch-size", "4", "--optimizer.clip-norm=None", "--model", "llama60m"])
    assert (config.batch_size, config.optimizer.clip_norm) == (4, None)
    assert config.llama == MODELS["llama60m"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_json_brings_a_configuration_back(model, recipe):
    flags = [f"--model={model}", f"--recipe={recipe}", "--optimizer.clip_norm=None"]
    config = parse([*flags, "--backend=xla"])
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model=llama6m"], "model='llama6m' is unknown; did you mean llama60m or llama5m?"),
        (["--model=gpt"], f"model='gpt' is unknown; there are {', '.join(MODELS)}"),
        (["--recipe=fp44"], "recipe='fp44' is unknown; did you mean fp4 or fp8? there are bf16"),
        (["--stps=3"], "unknown argument '--stps=3'; did you mean --steps? see python -m"),
        (["--model.layers=3"], "unknown argument '--model.layers=3'; did you mean --model."),
        (["extra"], "unknown argument 'extra'; see python -m train.main --help"),
        (["--steps=many"], "--steps: invalid literal for int() with base 10: 'many'"),
        (["--lr"], "Missing value for argument '--lr'"),
        (["--backend=gpu"], "invalid choice 'gpu' for argument '--backend'. Expected one of"),
        (["--model.dtype=float8"], "Expected one of ('bfloat16', 'float16', 'float32')"),
        (["--recipe.x_format=e9m9"], "invalid choice 'e9m9' for argument '--recipe.x_format'"),
        (["--model.num_heads=3"], "embed_dim=256 and num_heads=3; expected an even number"),
        (["--recipe.w_format=e4m3"], "the estimator is for 4-bit weights: set dge_k to None"),
        (
            ["--recipe=bf16", "--recipe.dge_k=10"],
            "--recipe.dge_k=10.0 changes nothing, since x_format and w_format are None",
        ),
        (
            ["--recipe=bf16", "--recipe.skip", "mlp"],
            "--recipe.skip=('mlp',) changes nothing, since x_format and w_format are None",
        ),
        (
            ["--recipe=fp4_cast", "--recipe.dge_cap=2"],
            "--recipe.dge_cap=2.0 changes nothing, since dge_k is None",
        ),
        (
            ["--recipe.occ_alpha=None", "--recipe.occ_sample=64"],
            "--recipe.occ_sample=64 changes nothing, since occ_alpha is None",
        ),
        (["--batch_size=3", "--optimizer.accumulation=2"], "a multiple of optimizer.accumulation"),
        (["--resume"], "--resume needs to know which run: give --run_dir"),
        (["--data="], "data=''; expected \"pystdlib\" or a path"),
        (["--steps=0"], "steps=0; expected a positive number"),
        (["--seq_len=-1"], "seq_len=-1; expected a positive number"),
        (["--eval_every=0"], "eval_every=0; expected"),
        (["--eval_batches=0"], "eval_batches=0; expected"),
        (["--lr=0"], "lr=0.0; expected > 0"),
        (["--lr=nan"], "lr=nan; expected > 0"),
        (["--lr=inf"], "lr=inf; expected > 0 and finite"),
        (["--checkpoint.host_gib=inf"], "checkpoint.host_gib=inf; expected > 0, finite, or None"),
        (["--seed=-1"], "seed=-1; expected 0 <= seed < 2**31"),
        (["--optimizer.warmup=1.5"], "optimizer.warmup=1.5; expected a share"),
        (["--optimizer.final_lr=-1"], "optimizer.final_lr=-1.0; expected a share"),
        (["--optimizer.weight_decay=-1"], "optimizer.weight_decay=-1.0; expected >= 0"),
        (["--optimizer.beta1=1"], "optimizer.beta1=1.0; expected"),
        (["--optimizer.beta2=-0.5"], "optimizer.beta2=-0.5; expected"),
        (["--optimizer.eps=0"], "optimizer.eps=0.0; expected > 0"),
        (["--optimizer.eps=inf"], "optimizer.eps=inf; expected > 0 and finite"),
        (["--optimizer.weight_decay=inf"], "optimizer.weight_decay=inf; expected >= 0 and finite"),
        (["--optimizer.clip_norm=0"], "optimizer.clip_norm=0.0; expected > 0 or None"),
        (
            ["--optimizer.accumulation=512", "--optimizer.master=bfloat16"],
            "optimizer.accumulation=512; expected <= 256 with optimizer.master=bfloat16",
        ),
        (
            ["--recipe=bf16", "--grad_comm=fp8"],
            "grad_comm=fp8; expected float32 or bfloat16 with recipe=bf16, which quantises nothing",
        ),
        (
            ["--grad_comm=fp8"],
            "--grad_comm=fp8 changes nothing, since mesh=None sums no gradients over devices",
        ),
        (
            ["--grad_comm=bfloat16", "--mesh=fsdp=1,tensor=2"],
            "--grad_comm=bfloat16 changes nothing, since mesh=fsdp=1,tensor=2 sums no gradients",
        ),
        (
            ["--optimizer.rounding=nearest"],
            "--optimizer.rounding=nearest changes nothing, since both moments are float32",
        ),
        (["--optimizer.accumulation=0"], "optimizer.accumulation=0; expected >= 1"),
        (["--optimizer.max_skipped=0"], "optimizer.max_skipped=0; expected >= 1"),
        (["--checkpoint.every=-1"], "checkpoint.every=-1; expected >= 0"),
        (["--checkpoint.keep=0"], "checkpoint.keep=0; expected >= 1"),
        (["--log.every=0"], "log.every=0; expected >= 1"),
        (["--log.health_every=-1"], "log.health_every=-1; expected >= 0"),
    ],
)
def test_mistakes_say_what_and_how_to_mend_it(capsys, args, message):
    with pytest.raises(UserError) as raised:
        parse(args)
    assert report_error(raised.value) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith("error: ") and errors.count("\n") == 1
    assert message in errors


@pytest.mark.parametrize(
    ("flags", "sent"),
    [
        ([], "float32"),
        (["--optimizer.master=bfloat16"], "bfloat16"),
        (["--optimizer.master=bfloat16", "--recipe=bf16"], "bfloat16"),
        (["--optimizer.master=float16"], "float32"),
        (["--optimizer.master=bfloat16", "--grad_comm=float32", "--mesh=data=2"], "float32"),
        (["--grad_comm=fp8", "--mesh=fsdp=-1"], "fp8"),
        (["--grad_comm=float32"], "float32"),
    ],
)
def test_gradients_are_sent_as_they_are_kept_or_as_is_said(flags, sent):
    assert parse(flags).gradients_sent_in == sent


def flags_of(config, prefix=""):
    renamed = {"llama": "model", "quantization": "recipe"}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from flags_of(value, f"{renamed.get(field.name, field.name)}.")
        else:
            yield f"--{prefix}{field.name}"


def test_help_explains_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    explained = {}
    entry = []
    for line in output.splitlines():
        text = line.strip("│╭╮╰╯ ")
        if not text.strip("-─"):  # a rule
            entry = []
        elif text.startswith("--"):
            entry = explained.setdefault(text.split()[0].strip(","), [])
        entry.append(text)
    assert set(explained) == set(flags_of(TrainConfig()))
    for flag, lines in explained.items():
        words = " ".join(lines)
        assert "(default: " in words, flag
        # What is left without names, types and the default is a sentence.
        rest = re.sub(r"--\S+|\(default.*|\b[A-Z]{3,}\b|\{.*?\}", "", words)
        assert len(re.findall(r"[a-z]+", rest)) >= 2, flag


def test_every_field_is_given_once_and_frozen():
    config = TrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3
    with pytest.raises(UserError, match=r"optimizer\.eps=-1"):
        OptimizerConfig(eps=-1)


def test_differences_name_fields_as_flags_do():
    old = to_dict(parse(["--recipe.skip", "a", "b"]))
    new = to_dict(parse(["--recipe.skip", "a", "--model.mlp_dim=64", "--lr=1", "--log.every=2"]))
    assert differences(old, json.loads(json.dumps(old))) == []
    assert differences(old, new) == [
        "model.mlp_dim (688, now 64)",
        "log.every (10, now 2)",
        f"lr ({TrainConfig().lr}, now 1.0)",
        "recipe.skip (('a', 'b'), now ('a',))",
    ]


def written(run_dir, *flags):
    rundir.write(
        run_dir, parse(flags), "fingerprint", device="device", parameters=1, planned_bytes=2
    )
    return run_dir


def test_flags_that_can_only_be_on_are_off_in_a_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('resume = false\nplan = false\n"model.scan_layers" = false\n')
    config = parse([f"--config={file}"])
    assert (config.resume, config.plan, config.llama.scan_layers) == (False, False, False)


def test_a_file_of_flags_names_no_other(tmp_path):
    file = tmp_path / "outer.toml"
    file.write_text('config = "base.toml"\nsteps = 3\n')
    with pytest.raises(UserError, match=r"outer.toml: it names another, base.toml; expected flags"):
        parse([f"--config={file}"])


def test_resume_takes_the_flags_of_the_run(tmp_path):
    flags = ["--model=llama60m", "--recipe=fp4_cast", "--model.no_scan_layers", "--steps=7"]
    run_dir = written(tmp_path / "run", *flags, "--recipe.skip", "a", "b")
    config = parse([f"--run_dir={run_dir}", "--resume"])
    expected = parse([*flags, "--recipe.skip", "a", "b"])
    assert config == dataclasses.replace(expected, resume=True, run_dir=str(run_dir))
    assert parse([f"--run-dir={run_dir}", "--resume"]) == config
    # A switch away from the default stays a flag when the run's own default is the switched one.
    assert parse([*flags, f"--run_dir={run_dir}", "--resume"]) == config
    assert parse([f"--run_dir={run_dir}", "--resume", "--model.scan_layers"]).llama.scan_layers
    # Another preset is that preset, not the run's fields.
    other = parse([f"--run_dir={run_dir}", "--resume", "--model=llama5m"])
    assert other.llama == MODELS["llama5m"] and other.steps == 7


def test_what_changes_nothing_may_be_kept_or_meant_for_what_a_file_says(tmp_path):
    # As a run of another mesh may be gone on with, or one that began before they were refused.
    kept = dataclasses.replace(
        parse(["--mesh=data=2", "--grad_comm=fp8"]),
        mesh=None,
        optimizer=OptimizerConfig(rounding="nearest"),
    )
    rundir.write(tmp_path, kept, "", device="", parameters=1, planned_bytes=2)
    again = ["--grad_comm=fp8", "--optimizer.rounding=nearest"]
    for flags in ([], again):
        config = parse([f"--run_dir={tmp_path}", "--resume", *flags])
        assert (config.grad_comm, config.optimizer.rounding) == ("fp8", "nearest")
    file = tmp_path / "mesh.toml"
    file.write_text('mesh = "data=2"\n"optimizer.first_moment" = "e4m3"\n')
    assert parse([f"--config={file}", *again]).gradients_sent_in == "fp8"


def test_a_run_directory_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(UserError, match=r"^--run_dir=\S* cannot be read: Permission denied; allow"):
        parse([f"--run_dir={tmp_path}", "--resume"])


def test_resume_does_not_trace_again(tmp_path):
    run_dir = written(tmp_path / "run", "--profile=3")
    assert parse([f"--run_dir={run_dir}", "--resume"]).profile == 0
    assert parse([f"--run_dir={run_dir}", "--resume", "--profile=2"]).profile == 2


def test_without_resume_the_run_is_not_looked_at(tmp_path):
    run_dir = written(tmp_path / "run", "--steps=7")
    assert parse([f"--run_dir={run_dir}"]).steps == TrainConfig().steps


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config": {"steps": 3}}', '{"config": 3}'])
def test_a_damaged_config_is_said_to_be(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json is damaged \(.*\); choose another"):
        parse([f"--run_dir={tmp_path}", "--resume"])


def test_default_run_dir():
    assert str(default_run_dir(parse(["--recipe=fp8"]), "20250102-030405")) == (
        "runs/llama5m-fp8-20250102-030405"
    )


def test_the_program_is_named_by_a_python_that_has_it(tmp_path, monkeypatch):
    bins = [tmp_path / name / "bin" for name in ("active", "other")]
    for folder in bins:
        folder.mkdir(parents=True)
        (folder / "python").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(bins[0]))
    monkeypatch.setattr(sys, "executable", str(bins[0] / "python3"))
    assert program() == "python -m train.main"
    monkeypatch.setattr(sys, "executable", str(bins[1] / "python3"))
    assert program() == f"{bins[1]}/python3 -m train.main"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program() == f"{bins[1]}/python3 -m train.main"


def test_files_that_help_names_are_there(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    named = re.findall(r"configs/\S+\.toml", capsys.readouterr().out)
    assert named and all((Path(__file__).parents[2] / name).is_file() for name in named)
