"""Strict dtype promotion: an operation that mixes dtypes by accident fails here."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_dtype_promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield
