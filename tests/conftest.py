"""Settings that every test shares."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("jfp4", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("jfp4")


class Edges(NamedTuple):
    elements: np.ndarray  # float32 [8, 8], a row for each kind of scale
    limits: np.ndarray  # float32 [cases, 2], a lower and an upper threshold


@pytest.fixture
def edges() -> Edges:
    """Where compensation may lose a sign or what is subnormal.

    Elements are zeros of either sign, subnormal, tiny, and so large that their quotients overflow;
    thresholds are zeros, subnormal or hardly normal, of one sign, and crossed.
    """
    tiny = 2.0**-126  # the smallest normal number
    kinds = [
        [0, -0.0, 0.5 * tiny, -0.5 * tiny, 1.5 * tiny, -1.5 * tiny, 2.5 * tiny, -2.5 * tiny],
        [tiny, -tiny, 1e-38, -1e-38, 2.0**-100, -(2.0**-100), 1e-45, -1e-45],
        [1, -1, 0, -0.0, 1e-30, -1e-30, 0.25 * tiny, -tiny],
        [20, -20, 0, -0.0, 1.5 * tiny, -1.5 * tiny, 2.5 * tiny, -2.5 * tiny],
        [3e38, -3e38, 1e30, -1e30, 1, -1, 0, -0.0],
        [3e38, -1.0, 1e30, -tiny, 1e-10, -1e-10, 1e-38, -1e-38],
        [tiny, -1e-30, 0, -0.0, -(2.0**-99), 2.0**-99, 1.75 * tiny, -1.75 * tiny],
        [6, -6, 5, -2.5, 0.25, -0.25, -0.0, 1.7e38],
    ]
    pairs = ((0, 0), (-0.0, 1), (-1, -0.0), (-1, 1), (1.25, 2), (-2, -1.25), (0.5, 1), (1, -1))
    limits = [(lo * unit, hi * unit) for unit in (tiny, 2.0**-100, 1.0) for lo, hi in pairs]
    # The scale is one where this is the format's largest.
    limits += [pair for top in (6, 3.5, 16, 1.5) for pair in ((-tiny, top), (-top, tiny))]
    return Edges(np.float32(kinds), np.float32(limits))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first, so that none keeps a worker busy when others have ended."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
