"""The emulated device as a Lightning accelerator."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from lightning.pytorch.accelerators import Accelerator

from tests.emu import device as emu


class _EmuDevices:
    """What both packages, ``lightning`` and ``pytorch_lightning``, ask of an accelerator."""

    def setup_device(self, device: torch.device) -> None:
        if device.type != "emu":
            raise ValueError(f"got device {device}, EmuAccelerator drives emu:0")

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        return {"used_bytes": emu.used_bytes(), "peak_bytes": emu.peak_bytes()}

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> int:
        if devices not in (1, "1", "auto", -1, "-1", [0]):
            raise ValueError(f"got devices={devices!r}, there is one emulated device: use devices=1")
        return 1

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        return [emu.load()]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "emu"


class EmuAccelerator(_EmuDevices, Accelerator):
    """For ``Trainer(accelerator=EmuAccelerator(), devices=1)`` and Fabric of the package ``lightning``."""


@functools.cache
def accelerator_for(namespace: str) -> type[Accelerator]:
    """Return the accelerator class of ``"lightning"`` or ``"pytorch_lightning"``."""
    if namespace == "lightning":
        return EmuAccelerator
    if namespace != "pytorch_lightning":
        raise ValueError(f"got namespace {namespace!r}, allowed are 'lightning' and 'pytorch_lightning'")
    from pytorch_lightning.accelerators import Accelerator as PytorchLightningAccelerator

    bases = (_EmuDevices, PytorchLightningAccelerator)
    return cast("type[Accelerator]", type("PytorchLightningEmuAccelerator", bases, {}))
