"""``python -m train.main``: trains a Llama."""

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jfp4.ops import ffi
from train.config import TrainConfig, default_run_dir, parse, program, report_error
from train.errors import UserError, mendable
from train.interrupts import end_with_launcher

COMPILATION_CACHE = Path("~/.cache/jfp4/xla").expanduser()
"""Where what accelerators run is kept compiled; JAX_COMPILATION_CACHE_DIR chooses another place."""

STOPPED = 128 + signal.SIGTERM
"""Exit status, of every process, where a signal ended the run before its last step, and it was
saved: what starts jobs again is not to take it for done."""

UNUSED = 4
"""A vocabulary so many times what the tokenizer has is taken for a mistake."""

SHARE_ALONE, SHARE_OF_MESH = "0.95", "0.9"
"""Of a GPU's memory that a run takes as it begins; a mesh's collectives have buffers beside it."""


def main(args: Sequence[str] | None = None) -> int:
    """Parses, builds and runs; returns the exit status.

    That is 0 of a run that is done, ``STOPPED`` of one that was interrupted and saved, 130 of one
    that was stopped at once, and 2 after a mistake of the user's.
    """
    end_with_launcher()
    try:
        return run(parse(sys.argv[1:] if args is None else args))
    except UserError as error:
        return report_error(error)
    except KeyboardInterrupt:
        # While compiling, or a second time: the first one while training saves and ends well.
        print("stopped at once; --resume goes on from the last checkpoint, if any", file=sys.stderr)
        return 130


def run(config: TrainConfig) -> int:
    """Runs a configuration; every check comes before the first byte is written.

    Raises:
        UserError: a mistake that the user can mend.
    """
    claim_memory(SHARE_ALONE if config.mesh is None else SHARE_OF_MESH)
    # Imported late, so that a mistyped flag is answered at once.
    from train import processes, rehearsal

    if config.plan and rehearsal.devices_of(config) is not None:
        # A rehearsal needs no other process, nor the cluster that the run is for.
        config = dataclasses.replace(config, coordinator=None, num_processes=None, process_id=None)
    backend = contextlib.nullcontext() if config.backend is None else ffi.backend(config.backend)
    with processes.joined(config), backend:
        return _run(config)


def claim_memory(share: str) -> None:
    """Has XLA, before it begins, take this share of a GPU, where the environment says nothing.

    By itself it takes three quarters, which is not the whole GPU that a plan counts on.
    """
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name; both are an error
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", share)


def _run(config: TrainConfig) -> int:
    import jax

    from train import collectives, data, loop, placement, plan, processes, rehearsal, rundir
    from train.step import Trainer

    def say(message: str) -> None:
        if processes.is_first():
            print(message, file=sys.stderr, flush=True)

    processes.check_same(config)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run_dir = Path(
        processes.of_first(lambda: str(config.run_dir or default_run_dir(config, stamp)))
    )
    if jax.default_backend() != "cpu" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(COMPILATION_CACHE))
    if config.plan and rehearsal.devices_of(config) not in (None, jax.device_count()):
        say(f"{config.model} in {config.recipe} on {config.mesh}: dividing the step")
        rehearsal.rehearse(config).show()
        return 0
    if config.llama.attention == "cudnn" and jax.default_backend() != "gpu":
        raise UserError(
            f"--model.attention=cudnn on {jax.default_backend()}; expected auto or xla: cuDNN is "
            "for NVIDIA's GPUs"
        )
    rows = config.batch_size // config.optimizer.accumulation
    placed = placement.place(config.mesh, config.llama, rows)

    def serve() -> str:
        try:
            with placed.in_force():
                whole = "tensor" in (config.quantization.x_scale, config.quantization.w_scale)
                return f"{ffi.backends()}{'; scales of whole tensors by xla' if whole else ''}"
        except (RuntimeError, ValueError) as error:
            raise UserError(str(error)) from None

    served, *_ = processes.agreed(serve)
    try:
        trainer = Trainer(config, placed)
    except ValueError as error:  # flags that are right by themselves and do not go together
        raise UserError(str(error)) from None
    if config.plan:
        say(f"{config.model} in {config.recipe}: compiling")
        planned, step_fn = plan.make_plan(trainer)
        if processes.is_first():
            planned.show()
            for line in collectives.described(step_fn):
                print(line)
        return 0 if planned.fits else 2

    def check() -> str:
        with mendable(f"--run_dir={run_dir} cannot be read"):
            rundir.check_free(run_dir)
            rundir.check(run_dir, config)
            check_room()
        return ""

    def check_room() -> None:
        sizes = plan.sizes(trainer)
        if sizes.fixed > sizes.device_bytes:
            return  # which says more of the matter
        every, saved = config.checkpoint.every, sizes.saved
        # One more than is kept, since the oldest goes when the newest is there; some may be there.
        more = config.checkpoint.keep + 1 - len(rundir.saved_steps(run_dir)) if every else 1
        try:
            rundir.check_space(run_dir, max(more, 1) * saved)
        except UserError as error:
            if every:
                raise
            say(f"warning: an interrupt could not be saved: {error}")

    corpora = []

    def load() -> str:
        corpus = data.load(
            config.data,
            config.tokenizer,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            valid_sequences=placed.shards,
            share=(jax.process_index(), jax.process_count()),
        )
        if corpus.tokenizer.vocab_size > config.llama.vocab_size:
            raise UserError(
                f"the tokenizer {corpus.tokenizer.name} has {corpus.tokenizer.vocab_size:,} ids "
                f"and {config.model} a vocabulary of {config.llama.vocab_size:,}; set "
                "--model.vocab_size"
            )
        if UNUSED * corpus.tokenizer.vocab_size < config.llama.vocab_size:
            say(
                f"warning: the tokenizer {corpus.tokenizer.name} has "
                f"{corpus.tokenizer.vocab_size:,} ids, and {config.model} a vocabulary of "
                f"{config.llama.vocab_size:,}; train.prepare learns a tokenizer of the data"
            )
        if processes.is_first():
            rundir.check_data(run_dir, corpus.fingerprint)
        corpora.append(corpus)
        return corpus.fingerprint

    processes.of_first(check)
    if len(set(processes.agreed(load))) > 1:
        raise UserError("processes differ in what --data holds; expected the same for all")
    (corpus,) = corpora
    if corpus.split:
        say(corpus.split)
    if config.quantization.quantizes:
        say(served)
    if config.mesh is None and jax.local_device_count() > 1:
        devices = jax.local_device_count()
        say(f"warning: one of {devices} devices is used; --mesh=fsdp={devices} would use all")
    mesh = "" if config.mesh is None else f" on {placed}"
    say(f"{config.model} in {config.recipe}{mesh}: compiling")
    planned, step_fn = plan.make_plan(trainer)

    def check_fits() -> str:
        if not planned.fits:
            planned.show()
            raise UserError(
                f"{config.model} takes {planned.total / plan.GIB:.1f} GiB, "
                f"{planned.fixed / plan.GIB:.1f} of them whatever the batch, and {planned.device} "
                f"has {planned.device_bytes / plan.GIB:.1f}; choose a smaller --model or "
                "--batch_size, or --optimizer.master=bfloat16, --optimizer.first_moment=e4m3, "
                "--optimizer.second_moment=float16, --model.remat=full or a --mesh of more devices"
            )
        return ""

    processes.agreed(check_fits)  # hosts may differ in memory
    assert step_fn is not None
    for line in collectives.described(step_fn):
        say(line)

    held = contextlib.ExitStack()

    def prepare_run_dir() -> str:
        held.enter_context(rundir.hold(run_dir, say))
        (run_dir / rundir.ENDED).unlink(missing_ok=True)  # all are here: it is of an earlier start
        rundir.check(run_dir, config)  # again: another run may have begun there since
        rundir.write(
            run_dir,
            config,
            corpus.fingerprint,
            device=planned.device,
            parameters=planned.parameters,
            planned_bytes=planned.total,
        )
        return ""

    with mendable(f"cannot write to {run_dir}", " and add --resume"), held:
        processes.of_first(prepare_run_dir)
        say(
            f"{planned.parameters:,} parameters, {len(corpus.train):,} training tokens; "
            f"writing to {run_dir}"
        )
        with placed.in_force():
            outcome = loop.train(config, run_dir, corpus, trainer, step_fn)
    status = STOPPED if outcome.interrupted else 0
    if not processes.is_first():
        return status
    if outcome.interrupted and jax.process_count() > 1:
        # No one command does it, and what process and mesh they are of is told by flags again.
        again = "start all processes again with the same flags and --resume"
        print(f"saved step {outcome.step}; to go on, {again}")
    elif outcome.interrupted:
        print(f"saved step {outcome.step}; go on with {program()} --run_dir={run_dir} --resume")
    elif outcome.valid_loss is None:
        print(f"done already, at step {outcome.step}; see {run_dir}/loss.png")
    else:
        print(
            f"done: validation loss {outcome.valid_loss:.4f} nats a token; see {run_dir}/loss.png"
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
