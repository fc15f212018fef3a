"""The error of a device without room: ours and torch's in one."""

from __future__ import annotations

import torch

from lightning_superpipe.errors import BudgetError

__all__ = ["OutOfDeviceMemory"]


class OutOfDeviceMemory(BudgetError, torch.OutOfMemoryError):
    """The device has no room, and less would not do; whoever catches torch's error meets it."""
