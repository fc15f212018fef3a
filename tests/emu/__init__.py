"""A second device without hardware, for tests: see README.md in this folder.

``from tests.emu import DEVICE`` builds and loads the device; where that cannot be done the importing test file is
skipped with the reason, as :class:`EmuUnavailable` is a ``unittest.SkipTest``. The functions load it when called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.emu.device import (
    EmuUnavailable,
    capacity,
    is_loaded,
    load,
    peak_bytes,
    pinned_bytes,
    reset_peak,
    set_capacity,
    used_bytes,
)

if TYPE_CHECKING:
    import torch

    from tests.emu.accelerator import EmuAccelerator, accelerator_for

    DEVICE: torch.device

__all__ = [
    "DEVICE",
    "EmuAccelerator",
    "EmuUnavailable",
    "accelerator_for",
    "capacity",
    "is_loaded",
    "load",
    "peak_bytes",
    "pinned_bytes",
    "reset_peak",
    "set_capacity",
    "used_bytes",
]


def __getattr__(name: str) -> Any:
    # torch knows the word "emu" only once the device is loaded, so DEVICE cannot be made before.
    if name == "DEVICE":
        return load()
    # Lightning takes seconds to import, and most tests need neither.
    if name in ("EmuAccelerator", "accelerator_for"):
        from tests.emu import accelerator

        return getattr(accelerator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
