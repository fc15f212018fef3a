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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put slow tests first, for a worker that begins one last works alone; skip those marked `gpu` without one."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # and otherwise as they were
    if torch.cuda.is_available():
        return
    absent = pytest.mark.skip(reason="needs a CUDA or ROCm device, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(absent)
