"""What every test of this repository runs under."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# Some examples train a model: the time of one says nothing about the code.
settings.register_profile("repository", deadline=None)
settings.load_profile("repository")

# Threads of several workers on few cores only fight, and the order of a sum depends on their number.
torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests marked `gpu` out where there is none: deselected, so that the closing line counts them."""
    if torch.cuda.is_available():
        return
    out = [item for item in items if item.get_closest_marker("gpu")]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
