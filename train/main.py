"""``python -m train.main``: trains a Llama."""

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jfp4.ops import ffi
from train.config import PROGRAM, TrainConfig, default_run_dir, parse, report_error
from train.errors import UserError

COMPILATION_CACHE = Path("~/.cache/jfp4/xla").expanduser()
"""Where what accelerators run is kept compiled; JAX_COMPILATION_CACHE_DIR chooses another place."""


def main(args: Sequence[str] | None = None) -> int:
    """Parses, builds and runs; returns the exit status: 0, or 2 after a mistake of the user's."""
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
    with contextlib.nullcontext() if config.backend is None else ffi.backend(config.backend):
        return _run(config)


def _run(config: TrainConfig) -> int:
    # Imported late, so that a mistyped flag is answered at once.
    import jax

    from train import data, loop, plan, rundir
    from train.step import Trainer

    run_dir = Path(config.run_dir or default_run_dir(config, time.strftime("%Y%m%d-%H%M%S")))
    try:
        served = ffi.backends()
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from None
    if jax.default_backend() != "cpu" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(COMPILATION_CACHE))
    trainer = Trainer(config)
    if config.plan:
        planned, _ = plan.make_plan(trainer)
        planned.show()
        return 0 if planned.fits else 2

    rundir.check(run_dir, config)
    corpus = data.load(
        config.data, config.tokenizer, seq_len=config.seq_len, batch_size=config.batch_size
    )
    if corpus.tokenizer.vocab_size > config.llama.vocab_size:
        raise UserError(
            f"the tokenizer {corpus.tokenizer.name} has {corpus.tokenizer.vocab_size:,} ids and "
            f"{config.model} a vocabulary of {config.llama.vocab_size:,}; set --model.vocab_size"
        )
    rundir.check_data(run_dir, corpus.fingerprint)
    if config.quantization.quantizes:
        print(served, file=sys.stderr)
    print(f"{config.model} in {config.recipe}: compiling", file=sys.stderr, flush=True)
    planned, step_fn = plan.make_plan(trainer)
    if not planned.fits or step_fn is None:
        planned.show()
        raise UserError(
            f"{config.model} takes {planned.total / plan.GIB:.1f} GiB and {planned.device} has "
            f"{planned.device_bytes / plan.GIB:.1f}; choose a smaller --model or --batch_size"
        )
    every, saved = config.checkpoint.every, planned.weights + planned.optimizer
    try:
        rundir.check_space(run_dir, (config.checkpoint.keep + 1) * saved if every else saved)
    except UserError as error:
        if every:
            raise
        print(f"warning: an interrupt could not be saved: {error}", file=sys.stderr)
    try:
        rundir.write(
            run_dir,
            config,
            corpus.fingerprint,
            device=planned.device,
            parameters=planned.parameters,
            planned_bytes=planned.total,
        )
        print(
            f"{planned.parameters:,} parameters, {len(corpus.train):,} training tokens; "
            f"writing to {run_dir}",
            file=sys.stderr,
        )
        outcome = loop.train(config, run_dir, corpus, trainer, step_fn)
    except OSError as error:
        raise UserError(
            f"cannot write to {run_dir}: {error.strerror or error}; make room and add --resume"
        ) from error
    if outcome.interrupted:
        print(f"saved step {outcome.step}; go on with {PROGRAM} --run_dir={run_dir} --resume")
    elif outcome.valid_loss is None:
        print(f"done already, at step {outcome.step}; see {run_dir}/loss.png")
    else:
        print(
            f"done: validation loss {outcome.valid_loss:.4f} nats a token; see {run_dir}/loss.png"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
