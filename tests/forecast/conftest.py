"""A machine that was measured for the tests, in little time."""

from __future__ import annotations

import pytest
import torch

from lightning_superpipe.observe import MachineProfile, measure_machine


@pytest.fixture(scope="session")
def small_machine() -> MachineProfile:
    """This machine by tiny measurements."""
    return measure_machine(
        torch.device("cpu"),
        copy_bytes=[1 << 12, 1 << 20],
        num_parameters=1 << 16,
        threads=[1],
        widths=[32, 128],
        memory_bytes=[1 << 12, 1 << 20],
        num_samples=2,
    )
