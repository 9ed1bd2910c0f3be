"""The program: plans, and one line for each mistake, with nothing written."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from tiny_run import TINY, lines_of, one_error

from jfp4.ops import ffi
from train import interrupts, loop, metrics, prepare, processes, rundir
from train.batches import batches
from train.checkpoint import Checkpoints
from train.documents import Documents
from train.errors import UserError
from train.main import SHARE_ALONE, claim_memory, main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def refuses(runs, elsewhere, capsys):
    """Runs the program, which must stop before anything is compiled or written; gives its line."""

    def run(*flags):
        assert runs(*flags) == 2
        assert list(elsewhere.iterdir()) == []
        return one_error(capsys)

    return run


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model=llama5", "model='llama5' is unknown; did you mean llama5m"),
        ("--recipe=pf4", "recipe='pf4' is unknown; did you mean fp4"),
        ("--sead=1", "unknown argument '--sead=1'; did you mean --seed or --steps?"),
        ("--lr=fast", "--lr: could not convert string to float: 'fast'; see"),
        ("--steps=0", "steps=0; expected a positive number"),
        ("--backend=gpu", "invalid choice 'gpu' for argument '--backend'"),
        ("--model.num_kv_heads=3", "expected the second to divide the first"),
        ("--recipe.skip=*", "no layer of the model was chosen"),
        ("--run_dir=", "run_dir=''; expected a directory"),
        ("--resume=true", "--resume=true; expected --resume, without a value"),
        ("--model.tied_head=false", "expected --model.tied_head or --model.no_tied_head, without"),
        ("--recipe.skip=attn", "recipe.skip='attn' is no layer's path; expected a pattern of some"),
        ("--model.attention=cudnn", "--model.attention=cudnn on cpu; expected auto or xla"),
    ],
)
def test_flags(refuses, flag, message):
    assert message in refuses(flag)


def test_chunks_of_a_quantised_head(refuses):
    flags = ("--recipe.skip=*embed*", "--model.no_tied_head", "--model.loss_chunk=64", "--plan")
    assert "loss_chunk=64 with 2048 tokens and a quantised lm_head" in refuses(*flags)


def test_only_switches_are_told_to_have_no_value(refuses):
    assert "unknown argument 'shards'; see" in refuses("--data=shards", "shards")


def tiny(data, *flags):
    return (*TINY, f"--data={data}", "--run_dir=run", *flags)


def test_data_that_is_not_there(refuses):
    assert 'data none does not exist; give "pystdlib", a file' in refuses(*tiny("none"))


def test_data_without_text(refuses, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "directory").mkdir()
    assert "empty.txt holds no text; give files" in refuses(*tiny(tmp_path / "empty.txt"))
    assert "directory holds no text; give files" in refuses(*tiny(tmp_path / "directory"))


def test_too_little_text(refuses, tmp_path):
    (tmp_path / "short.txt").write_text("x" * 30)
    error = refuses(*tiny(tmp_path / "short.txt"))
    assert "training tokens and 33 are needed (2 x 16 + 1); give more text, or a smaller" in error


def test_a_vocabulary_that_the_tokenizer_leaves_unused(runs, elsewhere, text, capsys):
    assert runs(*tiny(text, "--model.vocab_size=4096", "--steps=1")) == 0
    warning = "warning: the tokenizer bytes has 257 ids, and llama5m a vocabulary of 4,096; train"
    assert warning in capsys.readouterr().err


def test_a_vocabulary_larger_than_the_models(refuses, text, tmp_path):
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {"<unk>": 0, "<|endoftext|>": 1} | {f"w{i}": i for i in range(2, 600)},
            unk_token="<unk>",
        )
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    error = refuses(*tiny(text, f"--tokenizer={tmp_path}/tokenizer.json"))
    assert "has 600 ids and llama5m a vocabulary of 512; set --model.vocab_size" in error


@pytest.fixture
def shards(text, tmp_path, capsys):
    prepare.prepare(prepare.Config(data=str(text), out=str(tmp_path / "out"), vocab_size=300))
    capsys.readouterr()
    return tmp_path / "out"


def test_a_damaged_shard(refuses, shards):
    shard = next(path for path in sorted(shards.iterdir()) if path.name.startswith("train"))
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    assert re.search(r"shard .* has SHA-256 .* prepare the data again", refuses(*tiny(shards)))
    shard.write_bytes(content[:-2])
    assert re.search(r"shard .* bytes .* prepare the data again", refuses(*tiny(shards)))


def test_prepared_shards_are_trained_on(runs, shards, tmp_path):
    flags = ("--recipe=fp4", f"--data={shards}", f"--run_dir={tmp_path}/run")
    assert runs(*TINY, *flags) == 0
    assert len(lines_of(tmp_path / "run")) == 12


def test_a_directory_that_holds_a_run(runs, unbroken, text, capsys):
    before = sorted(unbroken.rglob("*"))
    assert runs.tiny(unbroken) == 2
    assert "holds this run already; add --resume, or choose another" in one_error(capsys)
    assert runs.tiny(unbroken, "--seed=3", "--model.mlp_dim=32") == 2
    error = one_error(capsys)
    assert "holds a run with another configuration: model.mlp_dim (64, now 32), seed (0" in error
    assert sorted(unbroken.rglob("*")) == before


def test_a_directory_in_which_a_run_lives(runs, unbroken, tmp_path, text, capsys, monkeypatch):
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "12")
    message = f"error: {run_dir} is written to by process {os.getpid()} on "
    with rundir.hold(run_dir, pytest.fail):
        before = sorted(run_dir.rglob("*"))
        assert runs.resume(run_dir) == 2
        assert last_error(capsys)[0].startswith(message)
        # One that began after this one had looked.
        monkeypatch.setattr(rundir, "check_free", lambda place: None)
        assert runs.resume(run_dir) == 2
        assert last_error(capsys)[0].startswith(message)
        assert sorted(run_dir.rglob("*")) == before
    assert runs.resume(run_dir) == 0


def test_a_run_that_another_began_and_ended_meanwhile(runs, tmp_path, monkeypatch, capsys):
    real = rundir.hold

    def hold(run_dir, say):
        monkeypatch.setattr(rundir, "hold", real)
        assert runs.tiny(run_dir) == 0
        return real(run_dir, say)

    monkeypatch.setattr(rundir, "hold", hold)
    assert runs.tiny(tmp_path / "run") == 2
    assert "holds this run already; add --resume" in last_error(capsys)[0]


def test_a_back_end_that_is_missing(refuses, text):
    if not ffi.missing("cuda"):
        pytest.skip("there is a GPU, and its kernels")
    error = refuses(*tiny(text), "--backend=cuda")
    assert f"the backend asked for, 'cuda', is missing: {ffi.missing('cuda')}" in error


def test_says_what_it_reads_and_what_computes_before_it_compiles(
    elsewhere, text, capsys, monkeypatch
):
    def stop(trainer):
        raise UserError("stopped")

    monkeypatch.setattr("train.plan.make_plan", stop)
    for flags, second in (
        (
            ["--backend=xla"],
            "quantize, thresholds, gemm, packed_gemm, adamw, rms_norm by xla (asked for)",
        ),
        ([], str(ffi.backends())),
        (["--recipe=bf16"], "llama5m in bf16: compiling"),
    ):
        assert main(tiny(text, *flags)) == 2
        split, said, *_ = capsys.readouterr().err.splitlines()
        assert split == str(Documents(str(text))) and said.endswith(second)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, {"XLA_CLIENT_MEM_FRACTION": "0.95"}),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_CLIENT_MEM_FRACTION": "0.5"}),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}),
    ],
    ids=["nothing", "the name", "its older name"],
)
def test_takes_a_gpu_s_memory_unless_the_environment_says_how_much(monkeypatch, said, expected):
    monkeypatch.setattr(os, "environ", dict(said))
    claim_memory(SHARE_ALONE)
    assert os.environ == expected


def test_nothing_to_resume(refuses):
    error = refuses(*tiny("none"), "--resume")
    assert "run holds no run to resume; leave --resume out to begin one" in error


def last_error(capsys):
    """The last line on stderr, the only one that is of a mistake; and what stdout holds."""
    output, errors = capsys.readouterr()
    lines = errors.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "Traceback" not in errors
    return lines[-1], output


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Disk:
    free = 10_000


def test_a_disk_too_small(runs, elsewhere, text, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: Disk)
    assert runs(*tiny(text)) == 2
    error, output = last_error(capsys)
    assert output == "" and "the disk of run has 0.01 MiB free and checkpoints take" in error
    assert "make room, or choose another --run_dir" in error
    assert list(elsewhere.iterdir()) == []


def test_a_disk_that_held_the_run_holds_it_when_resumed(runs, unbroken, tmp_path, monkeypatch):
    """What is free need not have room for the checkpoints that are there already."""
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "12")
    needed = []
    monkeypatch.setattr("train.rundir.check_space", lambda place, size: needed.append(size))
    assert runs.tiny(tmp_path / "new") == runs.resume(run_dir) == 0
    # Two are kept, and a third is written meanwhile.
    assert needed[0] == 3 * (needed[0] - needed[1])


def test_a_disk_too_small_for_an_interrupt_is_said(runs, elsewhere, text, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: Disk)
    assert runs(*tiny(text), "--checkpoint.every=0") == 0
    assert (
        "warning: an interrupt could not be saved: the disk of run has" in capsys.readouterr().err
    )


def test_a_disk_that_fills_while_metrics_are_written(runs, elsewhere, text, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "_write", full_disk)
        assert runs(*tiny(text)) == 2
    error, _ = last_error(capsys)
    message = "cannot write to run: No space left on device; make room and add --resume"
    assert error == f"error: {message}"
    assert runs(*tiny(text), "--resume") == 0


@pytest.mark.skipif(sys.platform == "win32", reason="limits file sizes as POSIX does")
def test_a_file_that_cannot_grow(runs, elsewhere, text, capsys, monkeypatch):
    # Every writer that is real here fails as on a full disk, those in threads included.
    import resource

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = loop._Run._report

    def report(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, unlimited[1]))
        return real(*args)

    monkeypatch.setattr(loop._Run, "_report", report)
    # A file whose buffer cannot be written is closed by and by.
    try:
        assert runs(*tiny(text)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    error, _ = last_error(capsys)
    assert error == "error: cannot write to run: File too large; make room and add --resume"


def test_a_disk_that_fills_between_checkpoints(runs, elsewhere, text, capsys, monkeypatch):
    real = Checkpoints.save

    def save(self, step, state):
        if step == 8:
            monkeypatch.setattr("shutil.disk_usage", lambda path: Disk)
        real(self, step, state)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        assert runs(*tiny(text)) == 2
    monkeypatch.undo()
    os.chdir(elsewhere)
    error, _ = last_error(capsys)
    assert "No space left on device; make room and add --resume" in error
    assert [path.name for path in (elsewhere / "run" / "checkpoints").iterdir()] == ["4"]
    assert runs("--run_dir=run", "--resume") == 0
    assert [line["step"] for line in lines_of("run")] == list(range(1, 13))


def test_a_place_that_cannot_be_written(runs, elsewhere, text, capsys):
    (elsewhere / "file").write_text("")
    assert runs(*TINY, f"--data={text}", "--run_dir=file/run") == 2
    assert "cannot write to file/run: Not a directory" in last_error(capsys)[0]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOENT, "No such file or directory; keep it, where every process sees it,"),
        (errno.EACCES, "Permission denied; allow it"),
    ],
)
def test_a_run_directory_that_is_taken_away(
    runs, elsewhere, text, capsys, monkeypatch, number, message
):
    def gone(*args):
        raise OSError(number, os.strerror(number), "run/metrics.jsonl")

    monkeypatch.setattr(metrics, "_write", gone)
    assert runs(*tiny(text)) == 2
    assert last_error(capsys)[0] == f"error: cannot write to run: {message} and add --resume"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "EIO"), OSError(errno.ESTALE, "ESTALE"), TimeoutError("a save's deadline")],
    ids=["EIO", "ESTALE", "deadline"],
)
def test_what_another_start_may_be_enough_for_is_no_mistake(
    runs, elsewhere, text, monkeypatch, error
):
    def fail(*args):
        raise error

    monkeypatch.setattr(metrics, "_write", fail)
    with pytest.raises(OSError) as raised:
        runs(*tiny(text))
    assert raised.value is error


def test_a_run_directory_that_may_not_be_read(refuses, text, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied", "run/config.json")

    monkeypatch.setattr(rundir, "check", refuse)
    error = refuses(*tiny(text))
    assert error == "error: --run_dir=run cannot be read: Permission denied; allow it\n"


def test_what_launchers_told_of_an_earlier_start_goes(runs, elsewhere, text):
    (elsewhere / "run").mkdir()
    (elsewhere / "run" / rundir.ENDED).touch()
    assert runs(*tiny(text)) == 0
    assert not (elsewhere / "run" / rundir.ENDED).exists()


def test_memory_of_one_host_and_data_of_another_run_are_told_by_all(
    runs, elsewhere, text, tmp_path, unbroken, capsys, monkeypatch
):
    told = []
    agreed = processes.agreed

    def watched(make):
        try:
            return agreed(make)
        except UserError as error:
            told.append(str(error))
            raise

    monkeypatch.setattr(processes, "agreed", watched)
    assert runs("--model=llama13b", "--run_dir=run", f"--data={text}") == 2
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken, run_dir)
    (tmp_path / "other.txt").write_text(text.read_text() * 2)
    assert runs.resume(run_dir, f"--data={tmp_path}/other.txt") == 2
    assert len(told) == 2
    assert re.search(r"GiB, [\d.]+ of them whatever the batch, .*; choose a smaller", told[0])
    assert "--model.remat=full or a --mesh" in told[0] and "began with other data" in told[1]


def test_processes_go_on_from_the_first_one_s_checkpoint(
    runs, unbroken, tmp_path, capsys, monkeypatch
):
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken, run_dir)
    of_first = processes.of_first

    def of_another(make):
        found = of_first(make)
        return "8" if found == "12" else found

    monkeypatch.setattr(processes, "of_first", of_another)
    assert runs.resume(run_dir) == 0
    assert "going on from step 8\n" in capsys.readouterr().err


def test_a_model_too_large_for_the_machine(runs, elsewhere, text, capsys):
    arrays, begun = len(jax.live_arrays()), time.process_time()
    flags = ("--model=llama13b", "--run_dir=run", f"--data={text}")
    assert runs(*flags) == 2
    error, output = last_error(capsys)
    whole = r"llama13b takes \d+\.\d GiB, \d+\.\d of them whatever the batch"
    assert re.search(rf"{whole}, and .* has \d+\.\d; choose", error)
    assert "estimated from shapes" in output
    assert runs(*flags, "--plan") == 2
    output, errors = capsys.readouterr()
    assert errors == "llama13b in fp4: compiling\n" and "estimated from shapes" in output
    assert "GiB too large" in " ".join(output.split())
    assert time.process_time() - begun < 30  # nothing is compiled
    assert len(jax.live_arrays()) == arrays
    assert list(elsewhere.iterdir()) == []


def test_plan(runs, elsewhere, text, capsys):
    assert runs(*tiny(text, "--plan")) == 0
    output, errors = capsys.readouterr()
    assert errors == "llama5m in fp4: compiling\n"
    assert "from the compiled step" in output and "run fits" in output
    rows = re.findall(r"│ (.+?) +│ +[\d.]+ │ +([\d,]+) │", output)
    sizes = {what: int(size.replace(",", "")) for what, size in rows}
    *parts, together, has = sizes.values()
    assert list(sizes)[:5] == [
        "weights", "optimizer state", "weights' codes", "gradients", "activations and workspace"
    ]  # fmt: skip
    # 34,976 parameters and eight thresholds for each of two layers.
    assert "34,976 parameters" in output and parts[0] == 4 * (34_976 + 16)
    assert parts[1] == 8 * 34_976 + 17
    assert sum(parts) == together <= has
    assert list(elsewhere.iterdir()) == []


def poisoned(first, count):
    """Batches, of which some from a step on have a token outside the vocabulary."""

    def read(*args, **kwargs):
        for step, batch in enumerate(batches(*args, **kwargs), start=kwargs["start_step"] + 1):
            yield np.full_like(batch, 10**6) if first <= step < first + count else batch

    return read


def test_a_few_steps_without_a_finite_gradient(runs, elsewhere, text, monkeypatch):
    monkeypatch.setattr(loop, "batches", poisoned(5, 2))
    assert runs(*tiny(text, "--optimizer.max_skipped=3")) == 0
    assert [line["skipped"] for line in lines_of("run")] == [0] * 4 + [1] + [2] * 7
    assert np.isfinite(lines_of("run")[-1]["valid_loss"])


@pytest.mark.parametrize("every", [1, 12])
def test_too_many_steps_without_a_finite_gradient(
    runs, elsewhere, text, capsys, monkeypatch, every
):
    # The report that sees them may come later, when the gradient is finite again.
    monkeypatch.setattr(loop, "batches", poisoned(5, 3))
    flags = ("--optimizer.max_skipped=3", f"--log.every={every}", "--log.health_every=0")
    assert runs(*tiny(text, *flags)) == 2
    error, output = last_error(capsys)
    step = 7 if every == 1 else 8
    assert f"was not finite for 3 steps in a row, up to step {step}, which changed" in error
    assert "lower --lr, or look at run/health.jsonl" in error and output == ""
    assert [line["step"] for line in lines_of("run")] == list(range(1, step + 1))
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["4"]


def test_skipped_steps_in_a_row_are_counted_across_a_resume(runs, elsewhere, text, monkeypatch):
    monkeypatch.setattr(loop, "batches", poisoned(7, 9))
    flags = ("--optimizer.max_skipped=4", "--checkpoint.every=8", "--log.every=1")
    assert runs(*tiny(text, *flags)) == 2
    assert runs("--run_dir=run", "--resume") == 2
    assert lines_of("run")[-1]["step"] == 10


def test_program(text, tmp_path):
    command = [sys.executable, "-m", "train.main"]
    failed = subprocess.run(
        [*command, f"--data={tmp_path}/none", f"--run_dir={tmp_path}/run"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: data ") and failed.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_sigterm_that_arrives_twice_is_one_request(monkeypatch):
    with interrupts.interrupts(alone=True) as received:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM, signal.SIGTERM]
    monkeypatch.setattr(interrupts, "SAME_REQUEST", -1.0)
    with pytest.raises(KeyboardInterrupt), interrupts.interrupts(alone=True) as received:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)


def test_second_signal_ends_at_once():
    with pytest.raises(KeyboardInterrupt), interrupts.interrupts(alone=True) as received:
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
        signal.raise_signal(signal.SIGINT)
