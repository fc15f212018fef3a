from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.app.conftest import _own_logging, superpipe

__all__ = ["_own_logging", "superpipe"]


@pytest.fixture(scope="package", autouse=True)
def quick_collections() -> Iterator[None]:
    """Leave the objects of the libraries out of the garbage collection after each job: it takes most of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
