"""Configurations parse, and scripts of clusters start what there is."""

import re
import shlex
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from jfp4.sharding import parse_mesh
from train.config import parse
from train.errors import UserError
from train.launch import USER_ERROR
from train.main import STOPPED

ROOT = Path(__file__).parents[1]
SBATCH = ROOT / "deploy/train.sbatch"
DOCKERFILE = ROOT / "deploy/Dockerfile"
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


def slurm(tmp_path, srun, scontrol="exit 0", **environment):
    """How the script is run under stand-ins of SLURM's commands, for subprocess."""
    for name, body in {"srun": srun, "scontrol": f'echo scontrol "$@"\n{scontrol}'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    return dict(
        env={"PATH": path, "SLURM_JOB_ID": "7", **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


PRINT = 'printf "%s\\n" "$@"'
"""A srun that prints what it was to start."""


def test_slurm(tmp_path):
    given = ["--config=configs/gpu64-fsdp-tensor.toml", "--run_dir=/runs/a b"]
    done = subprocess.run(["bash", SBATCH, *given], check=True, **slurm(tmp_path, PRINT))
    options, _, program = done.stdout.partition("python\n")
    assert options.split() == ["--kill-on-bad-exit=0", "--label"]
    assert program.splitlines() == ["-m", "train.launch", "--coordinator=auto", *given]
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in SBATCH.read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    devices = int(asked["nodes"]) * int(asked["gpus-per-node"])
    assert asked.pop("ntasks-per-node") == "1"
    # To the tasks and not to the script, which is to outlive them; it queues what may be queued.
    assert asked["signal"] == "TERM@600" and "requeue" in asked
    assert devices == mesh_devices(ROOT / "configs/gpu64-fsdp-tensor.toml")


def test_slurm_takes_the_python_of_a_virtual_environment(tmp_path):
    done = subprocess.run(["bash", SBATCH], check=True, **slurm(tmp_path, PRINT, VENV="/a b/v"))
    assert done.stdout.splitlines()[2:4] == ["/a b/v/bin/python", "-m"]


@pytest.mark.parametrize("scontrol", ["exit 0", "exit 1"])
@pytest.mark.parametrize("status", [0, 1, USER_ERROR, STOPPED])
def test_slurm_queues_again_what_was_interrupted_alone(tmp_path, status, scontrol):
    done = subprocess.run(["bash", SBATCH], **slurm(tmp_path, f"exit {status}", scontrol))
    assert done.returncode == status
    assert done.stdout == ("scontrol requeue 7\n" if status == STOPPED else "")
    assert ("not queued again" in done.stderr) == (status == STOPPED and scontrol == "exit 1")


def test_slurm_does_not_queue_a_cancelled_job_again(tmp_path):
    """SLURM then signals the script as well, whose tasks may yet end as interrupted."""
    running = tmp_path / "running"
    srun = f"touch {shlex.quote(str(running))}; sleep 0.5; exit {STOPPED}"
    script = subprocess.Popen(["bash", SBATCH], **slurm(tmp_path, srun))
    while not running.exists():
        assert script.poll() is None
        time.sleep(0.01)
    script.send_signal(signal.SIGTERM)
    output, _ = script.communicate()  # until the last of them has closed it
    assert script.returncode == -signal.SIGTERM and output == ""


def read_jobset():
    return yaml.safe_load((ROOT / "deploy/jobset.yaml").read_text())


def test_jobset():
    jobset = read_jobset()
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    (job,) = jobset["spec"]["replicatedJobs"]
    hosts = job["template"]["spec"]["completions"]
    assert job["template"]["spec"]["parallelism"] == hosts
    assert job["template"]["spec"]["completionMode"] == "Indexed"
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "train.launch"]
    flags = [flag.replace("$(JOB_COMPLETION_INDEX)", str(hosts - 1)) for flag in container["args"]]
    config = parse([flag for flag in flags if not flag.startswith("--restarts")])
    # The first pod's name in the JobSet's own domain.
    address = f"{jobset['metadata']['name']}-{job['name']}-0-0.{jobset['metadata']['name']}"
    port = container["ports"][0]["containerPort"]
    assert config.coordinator == f"{address}:{port}"
    assert (config.num_processes, config.process_id) == (hosts, hosts - 1)
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert hosts * gpus == mesh_devices(ROOT / config.config)
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert volumes == mounts.keys()
    shared = {volume["name"]: volume.get("emptyDir") for volume in pod["volumes"]}["shm"]
    assert mounts["shm"] == "/dev/shm" and shared["medium"] == "Memory"
    for path in (config.data, config.run_dir):
        assert any(path.startswith(mount + "/") for mount in mounts.values())


def job_failure(template, exit_code=None, condition=None):
    """The reason and message with which a Job of Kubernetes fails for such a pod."""
    (container,) = template["template"]["spec"]["containers"]
    for number, rule in enumerate(template["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        if codes is not None:
            assert codes["containerName"] == container["name"] and codes["operator"] == "In"
        if codes is not None and exit_code in codes["values"]:
            what = f"Container trainer for pod a/b failed with exit code {exit_code}"
        elif {"type": condition, "status": "True"} in conditions:
            what = f"Pod a/b has condition {condition}"
        else:
            continue
        return "PodFailurePolicy", f"{what} matching FailJob rule at index {number}"
    assert template["backoffLimit"] == 0
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


@pytest.mark.parametrize(
    ("failure", "action"),
    [
        (dict(exit_code=1), "RestartJobSet"),
        (dict(exit_code=128 + signal.SIGABRT), "RestartJobSet"),
        (dict(exit_code=USER_ERROR), "FailJobSet"),
        (dict(exit_code=USER_ERROR, condition="DisruptionTarget"), "FailJobSet"),
        (dict(exit_code=STOPPED), "RestartJobSetAndIgnoreMaxRestarts"),
        (dict(condition="DisruptionTarget"), "RestartJobSetAndIgnoreMaxRestarts"),
        (
            dict(exit_code=128 + signal.SIGKILL, condition="DisruptionTarget"),
            "RestartJobSetAndIgnoreMaxRestarts",
        ),
    ],
)
def test_jobset_starts_again_what_may_do_better(failure, action):
    jobset = read_jobset()
    template = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert template["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    reason, message = job_failure(template, **failure)
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    taken = "RestartJobSet"  # where no rule fits
    for rule in reversed(policy["rules"]):
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            taken = rule["action"]
    assert taken == action


def test_dockerfile():
    """What is copied is there and enough to install; kernels are built and not shadowed."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    builds, runs = (number for number, line in enumerate(lines) if line[0] == "FROM")
    builder, image = lines[builds][1], lines[runs][1]
    version, system = re.fullmatch(r"nvidia/cuda:([\d.]+)-devel-(\w+)\.04", builder).groups()
    assert image == f"{system.replace('ubuntu', 'ubuntu:')}.04"
    minimum = re.search(r"JFP4_CUDA_MINIMUM ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())[1]
    assert [*map(int, version.split("."))] >= [*map(int, minimum.split("."))]
    extra = f"cuda{version.partition('.')[0]}"
    assert f"-c constraints.txt '.[{extra}]'" in text

    def copied(part):
        paths = [line[1:-1] for line in part if line[0] == "COPY" and "--from=build" not in line]
        return {path for line in paths for path in line}

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert extra in project["project"]["optional-dependencies"]
    needed = {"pyproject.toml", "constraints.txt", "CMakeLists.txt", "cuda_ffi", ".gitignore"}
    needed |= {project["project"]["readme"], *project["project"]["license-files"]}
    needed |= {*project["tool"]["scikit-build"]["wheel"]["packages"]}
    assert copied(lines[builds:runs]) == needed and copied(lines[runs:]) == {"configs"}
    assert all((ROOT / path).exists() for path in needed)
    container = read_jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    name = container["containers"][0]["image"]
    assert f"docker build -f deploy/Dockerfile -t REGISTRY/{name} ." in text


def mesh_devices(path):
    devices = 1
    for size in parse_mesh(parse([f"--config={path}"]).mesh).values():
        devices *= size
    return devices


def test_examples_in_scripts_parse():
    text = SBATCH.read_text()
    begin = text.index("`sbatch") + 1
    example = text[begin : text.index("`", begin)].replace("\\\n#", "")
    words = shlex.split(example)
    assert words[:2] == ["sbatch", "deploy/train.sbatch"] and parse(words[2:]).batch_size == 512
