"""Configurations parse, and scripts of clusters start what there is."""

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from jfp4.sharding import parse_mesh
from train.config import parse
from train.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_one_of_the_trainers(path):
    config = parse([f"--config={path}", "--steps=7", "--model.remat=codes"])
    assert config.steps == 7 and config.llama.remat == "codes"  # flags override
    shards = 1
    for axis, size in parse_mesh(config.mesh or "data=1").items():
        shards *= size if axis != "tensor" and size > 0 else 1
    assert config.batch_size % (shards * config.optimizer.accumulation) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mesh = ", "is not TOML"),
        ("[model]\nremat = 'full'", "model = {'remat': 'full'}; expected a flag's value"),
        ("mish = 'data=2'", "unknown argument '--mish=data=2'; did you mean --mesh"),
        ("'model.remat' = 'some'", "invalid choice 'some' for argument '--model.remat'"),
        ("mesh = 'data=2,expert=2'", "mesh='expert=2' in 'data=2,expert=2'; expected AXIS=SIZE"),
    ],
)
def test_a_configuration_that_is_none(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UserError) as refusal:
        parse([f"--config={tmp_path}/c.toml"])
    assert message in str(refusal.value)


def test_true_and_false(tmp_path):
    (tmp_path / "c.toml").write_text('"model.tied_head" = false\n"model.scan_layers" = true\n')
    config = parse([f"--config={tmp_path}/c.toml"])
    assert not config.llama.tied_head and config.llama.scan_layers


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "num_processes=2; expected none without --coordinator=HOST:PORT"),
        (["--coordinator=host"], "coordinator=host; expected HOST:PORT or auto"),
        (["--coordinator=h:1"], "num_processes=None; expected >= 1 with --coordinator"),
        (
            ["--coordinator=h:1", "--num_processes=2", "--process_id=2"],
            "process_id=2; expected 0 to 1, with --num_processes=2",
        ),
    ],
)
def test_processes_that_cannot_meet(flags, message):
    with pytest.raises(UserError) as refusal:
        parse(flags)
    assert message in str(refusal.value)


def test_slurm(tmp_path):
    """The script runs under a stand-in of srun, which prints what it was to start."""
    script = ROOT / "deploy/train.sbatch"
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    given = ["--config=configs/gpu64-fsdp-tensor.toml", "--run_dir=/runs/a b"]
    done = subprocess.run(
        ["bash", script, *given],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    options, _, program = done.stdout.partition("python\n")
    assert options.split() == ["--kill-on-bad-exit=0", "--label"]
    assert program.splitlines() == ["-m", "train.launch", "--coordinator=auto", *given]
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in script.read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    devices = int(asked["nodes"]) * int(asked["gpus-per-node"])
    assert asked.pop("ntasks-per-node") == "1" and asked["signal"] == "TERM@300"
    assert devices == mesh_devices(ROOT / "configs/gpu64-fsdp-tensor.toml")


def test_jobset():
    jobset = yaml.safe_load((ROOT / "deploy/jobset.yaml").read_text())
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    (job,) = jobset["spec"]["replicatedJobs"]
    hosts = job["template"]["spec"]["completions"]
    assert job["template"]["spec"]["parallelism"] == hosts
    assert job["template"]["spec"]["completionMode"] == "Indexed"
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "train.launch"]
    flags = [flag.replace("$(PROCESS_ID)", str(hosts - 1)) for flag in container["args"]]
    config = parse([flag for flag in flags if not flag.startswith("--restarts")])
    # The first pod's name in the JobSet's own domain.
    address = f"{jobset['metadata']['name']}-{job['name']}-0-0.{jobset['metadata']['name']}"
    port = container["ports"][0]["containerPort"]
    assert config.coordinator == f"{address}:{port}"
    assert (config.num_processes, config.process_id) == (hosts, hosts - 1)
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert hosts * gpus == mesh_devices(ROOT / config.config)
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert volumes == mounts.keys()
    for path in (config.data, config.run_dir):
        assert any(path.startswith(mount + "/") for mount in mounts.values())


def mesh_devices(path):
    devices = 1
    for size in parse_mesh(parse([f"--config={path}"]).mesh).values():
        devices *= size
    return devices


def test_examples_in_scripts_parse():
    text = (ROOT / "deploy/train.sbatch").read_text()
    begin = text.index("`sbatch") + 1
    example = text[begin : text.index("`", begin)].replace("\\\n#", "")
    words = shlex.split(example)
    assert words[:2] == ["sbatch", "deploy/train.sbatch"] and parse(words[2:]).batch_size == 512
