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
def compiled_once(tmp_path_factory):
    """A directory in which jax keeps what it compiles from now on, for other processes too."""
    directory = tmp_path_factory.mktemp("compiled")
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    compilation_cache.reset_cache()
    yield directory
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
