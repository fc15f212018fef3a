"""Device memory as the driver counts it, for all processes, without starting CUDA in this one."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["DriverView"]


class DriverView:
    """What NVML knows of the first visible device; every answer is None where there is no NVML.

    Needs the package ``nvidia-ml-py`` (module ``pynvml``).
    """

    def __init__(self) -> None:
        self._nvml, self._device = _open()

    @property
    def used_bytes(self) -> int | None:
        """Bytes in use on the device now, by everybody, contexts and reserved memory included."""
        if self._nvml is None:
            return None
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._device).used)

    @property
    def driver(self) -> str | None:
        """The driver's version."""
        return None if self._nvml is None else str(self._nvml.nvmlSystemGetDriverVersion())


def _open() -> tuple[Any, Any]:
    try:
        import pynvml
    except ImportError:
        return None, None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        pynvml.nvmlInit()
        if visible.isdigit():
            return pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(visible))
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(visible)
    except pynvml.NVMLError:
        return None, None
