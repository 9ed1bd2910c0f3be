"""Kernels by the targets that compute them: CUDA on a GPU, the host's handlers elsewhere."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfp4.ops import ffi

ON_GPU = jax.default_backend() == "gpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, saying so, where there is none."""
    if not ON_GPU:
        skip = pytest.mark.skip(reason=f"needs an NVIDIA GPU; JAX sees {jax.default_backend()}")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "host"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The back end under test, in force."""
    if request.param == "host" and ON_GPU:
        pytest.skip("on a GPU, arrays are not the host handlers' to read")
    if request.param == "host" and (why := ffi.missing("host")):
        pytest.skip(why)
    with ffi.backend(request.param):
        yield request.param


@pytest.fixture
def poisoned() -> Callable[..., Any]:
    """Runs a function whose outputs are written over bytes of 0xA5, and then over 0x5A.

    The poison is donated, so that the outputs take its place: a byte that a kernel left unwritten
    would keep it, and differ from what is expected in one of the two results at least.
    """

    def run(f: Callable[..., Any], *args: Any) -> list[Any]:
        step = jax.jit(lambda poison, *args: f(*args), donate_argnums=0, keep_unused=True)
        results = []
        for byte in (0xA5, 0x5A):
            filled = functools.partial(_filled, byte=byte)
            poison = jax.tree.map(filled, jax.eval_shape(f, *args))
            places = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(poison) if x.size}
            results.append(jax.block_until_ready(step(poison, *args)))
            leaves = [x for x in jax.tree.leaves(results[-1]) if x.size]
            assert {x.unsafe_buffer_pointer() for x in leaves} == places
        return results

    return run


def _filled(shape: jax.ShapeDtypeStruct, byte: int) -> jax.Array:
    pattern = np.full(shape.size * shape.dtype.itemsize, byte, np.uint8)
    return jnp.array(pattern.view(shape.dtype).reshape(shape.shape))
