"""Directories that programs write: they appear whole, or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from train.errors import UserError


def check_new(out: Path) -> None:
    """Raises UserError where there is something in the way of ``--out``."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out={out} exists and is not empty; give another, or remove it")


@contextlib.contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """Gives a directory beside ``out`` that takes its name at the end, or is removed on failure.

    Raises:
        UserError: an OSError, which is taken for one of writing.
    """
    partial = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        try:
            yield partial
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"--out={out} cannot be written ({error.strerror}); make room, or give another"
        ) from error
