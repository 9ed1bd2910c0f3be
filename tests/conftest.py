"""Settings that every test shares."""

import pytest
from hypothesis import settings

settings.register_profile("jfp4", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("jfp4")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first, so that none keeps a worker busy when others have ended."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
