"""Kernels that give the same numbers twice: a run is compared with another run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Read when the first matrix product of the process is made.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warns)
