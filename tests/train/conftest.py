"""Runs of a tiny model, which share one compilation."""

import dataclasses

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny_run import TINY, Runs, write_text

from train.config import TrainConfig, parse


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "code.txt")


@pytest.fixture(scope="session")
def compiled_once(tmp_path_factory, worker_id):
    """Has jax keep what it compiles from now on; the environment by which other processes do, too.

    The workers of a session share it. With a limit to its size, however large, jax locks it, so
    that none reads what another has half written.
    """
    directory = tmp_path_factory.getbasetemp() / "compiled"
    if worker_id != "master":
        directory = directory.parents[1] / "compiled"
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_compilation_cache_max_size": 2**40,
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield {name.upper(): str(value) for name, value in settings.items()}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def runs(text, compiled_once):
    return Runs(text)


@pytest.fixture(scope="session")
def unbroken(runs, tmp_path_factory):
    """A run from start to end, to read from and not to write to."""
    run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    assert runs.tiny(run_dir) == 0
    return run_dir


@pytest.fixture(scope="session")
def tiny_config():
    """The tiny configuration as an object; keywords replace fields."""
    config = parse(TINY)

    def make(**changes) -> TrainConfig:
        return dataclasses.replace(config, **changes)

    return make
