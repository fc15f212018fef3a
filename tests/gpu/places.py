"""Where a test of this folder runs, and what it may ask of the device there."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from tests.parity.probe import Device

__all__ = ["CUDA", "EMU", "Place", "on_both"]


class Place(NamedTuple):
    """A device with a memory of its own."""

    name: Device

    @property
    def device(self) -> torch.device:
        """The device."""
        return torch.device(self.name, 0)

    @property
    def is_gpu(self) -> bool:
        """Whether compute and copies run beside each other here."""
        return self.name == "cuda"

    def used_bytes(self) -> int:
        """Bytes that tensors hold on the device, once everything that nobody holds is gone."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.synchronize()
        return self.held_bytes()

    def held_bytes(self) -> int:
        """Bytes that tensors hold now; for use inside a step."""
        if self.is_gpu:
            torch._C._cuda_clearCublasWorkspaces()  # tens of megabytes a thread that has multiplied matrices
            return torch.cuda.memory_allocated()
        from tests.emu import used_bytes

        return used_bytes()

    @contextlib.contextmanager
    def capped(self, num_bytes: int) -> Iterator[None]:
        """Let allocations fail that would bring the device to more than about so many bytes."""
        if not self.is_gpu:
            from tests.emu import capacity

            with capacity(num_bytes):
                yield
            return
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(num_bytes / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


EMU, CUDA = Place("emu"), Place("cuda")

on_both = pytest.mark.parametrize(
    "place", [pytest.param(EMU, marks=pytest.mark.emu), pytest.param(CUDA, marks=pytest.mark.gpu)], ids=["emu", "cuda"]
)
