"""The run directory: what it is of, and whether a run may begin or go on in it."""

import errno
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from train.config import TrainConfig, differences, sent_in, to_dict
from train.errors import UserError

CONFIG, LOCK = "config.json", "lock"

ENDED = "ended"
"""By this file the launcher that ends first tells those of other hosts; a run removes it."""

_PARTIAL = CONFIG + ".partial"
_BEFORE_A_RUN = {LOCK, ENDED, _PARTIAL}
"""What a run may leave that was killed, or refused, before it had begun."""

PACKAGES = ("jfp4", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

FREE = ("resume", "plan", "backend", "run_dir", "data", "tokenizer", "eval_every", "eval_batches",
        "log", "checkpoint", "config", "mesh", "coordinator", "num_processes", "process_id",
        "profile")  # fmt: skip
"""Fields that may change when a run goes on: they change no parameter, but for the order in which
float32 numbers are added (data goes by content)."""

FREE_OF_MODEL = ("remat", "loss_chunk", "attention")
"""Fields of the model that may change too: they say how it is computed, within rounding, and no
shape of it. Another mesh may need others."""

FREE_OF_OPTIMIZER = ("max_skipped",)
"""The optimizer's: when a run gives up."""


def check(run_dir: Path, config: TrainConfig) -> None:
    """Refuses a directory in which this run must not write; writes nothing.

    Raises:
        UserError: it holds another run, or this one without ``resume``; or there is nothing to
            resume.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        if config.resume:
            raise UserError(f"{run_dir} holds no run to resume; leave --resume out to begin one")
        if run_dir.exists() and (not run_dir.is_dir() or set(os.listdir(run_dir)) - _BEFORE_A_RUN):
            raise UserError(f"{run_dir} is in use and holds no run; choose another --run_dir")
        return
    found = differences(_identity(read(run_dir)["config"]), _identity(to_dict(config)))
    if found:
        raise UserError(
            f"{run_dir} holds a run with another configuration: {', '.join(found)}; choose "
            "another --run_dir, or give the same flags"
        )
    if not config.resume:
        raise UserError(f"{run_dir} holds this run already; add --resume, or choose another")


def check_free(run_dir: Path) -> None:
    """Refuses a directory that a living run holds; writes nothing.

    Raises:
        UserError: it does, and which process that is.
    """
    try:
        with (run_dir / LOCK).open() as file:
            _lock(file)
    except BlockingIOError:
        raise _in_use(run_dir) from None
    except OSError:
        pass  # no such file, or no such locks: ``hold`` says so


def hold(run_dir: Path, say: Callable[[str], None]) -> IO[str]:
    """Makes the directory, and keeps every other run out of it while the file returned is open.

    The system closes it with the process, however that ends: what was killed leaves nothing to
    clear away. Where a file system has no locks ``say`` is told.

    Raises:
        UserError: another process holds it.
        OSError: it cannot be written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / LOCK).open("a")
    try:
        _lock(file, alone=True)
    except BlockingIOError:
        file.close()
        raise _in_use(run_dir) from None
    except OSError as error:
        reason = error.strerror
        say(f"warning: {run_dir} cannot be locked ({reason}): see that no other run writes to it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def _lock(file: IO[str], *, alone: bool = False) -> None:
    """Locks a file, for this process alone or among readers; BlockingIOError if another has."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        raise OSError(errno.ENOLCK, "this system has no such locks") from None
    fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)


def _in_use(run_dir: Path) -> UserError:
    holder = (run_dir / LOCK).read_text().strip() or "another process"
    return UserError(f"{run_dir} is written to by {holder}; wait, or choose another --run_dir")


def check_data(run_dir: Path, fingerprint: str) -> None:
    """Refuses to go on with other text than the run began with.

    Raises:
        UserError: the fingerprints differ.
    """
    if (run_dir / CONFIG).is_file() and read(run_dir)["data_fingerprint"] != fingerprint:
        raise UserError(
            f"{run_dir} began with other data or another tokenizer (their fingerprints differ); "
            "give the same --data"
        )


def check_space(run_dir: Path, needed: int) -> None:
    """Refuses to begin where the checkpoints would not fit.

    What a save that was cut off has left counts as free: the run removes it before it saves.

    Args:
        run_dir: the run directory, which need not exist.
        needed: bytes.

    Raises:
        UserError: its disk has less free.
    """
    place = run_dir.absolute()
    while not place.exists():
        place = place.parent
    cut_off = (run_dir / "checkpoints").glob("*.orbax-checkpoint-tmp*/**/*")
    left = sum(file.stat().st_size for file in cut_off if file.is_file())
    free = shutil.disk_usage(place).free + left
    if free < needed:
        raise UserError(
            f"the disk of {run_dir} has {_size(free)} free and checkpoints take {_size(needed)}; "
            "make room, or choose another --run_dir"
        )


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of the complete checkpoints in the run directory, ascending."""
    place = run_dir / "checkpoints"
    entries = place.iterdir() if place.is_dir() else ()
    return sorted(int(entry.name) for entry in entries if entry.name.isdigit())


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def read(run_dir: Path) -> dict[str, Any]:
    """Reads config.json.

    Raises:
        UserError: it is not one that ``write`` wrote.
    """
    path = run_dir / CONFIG
    try:
        content = json.loads(path.read_text())
        return {name: content[name] for name in ("config", "data_fingerprint")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); choose another --run_dir") from None


def write(
    run_dir: Path,
    config: TrainConfig,
    fingerprint: str,
    *,
    device: str,
    parameters: int,
    planned_bytes: int,
) -> None:
    """Makes the directory and writes config.json: all settings, resolved, and all versions."""
    run_dir.mkdir(parents=True, exist_ok=True)
    content = {
        "config": to_dict(config),
        "data_fingerprint": fingerprint,
        "parameters": parameters,
        "planned_bytes": planned_bytes,
        "device": device,
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
    }
    partial = run_dir / _PARTIAL
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, run_dir / CONFIG)


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    same = {name: value for name, value in config.items() if name not in FREE}
    for group, free in (("llama", FREE_OF_MODEL), ("optimizer", FREE_OF_OPTIMIZER)):
        fields = same.get(group, {})
        same[group] = {name: value for name, value in fields.items() if name not in free}
    same["grad_comm"] = sent_in(same.get("grad_comm"), same["optimizer"].get("master"))
    return same


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return None
