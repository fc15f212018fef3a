"""How much of a device a run may take."""

from __future__ import annotations

import torch

from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.errors import ConfigError
from lightning_superpipe.observe.host_bytes import available_bytes

__all__ = ["device_limit"]

_MARGIN = 20  # a twentieth of what is free stays so: for the kernels' own workspaces and for pieces too small to use


def device_limit(config: SuperpipeConfig, device: torch.device) -> int | None:
    """Return the bytes that a run may take on its device; None where nothing says so.

    That is what the option ``device_memory`` allows; else, and for ``"free"``, what an accelerator has free now, but
    for a margin.

    Raises:
        ConfigError: what is free was asked for, but the device does not say.
    """
    if isinstance(config.device_memory, int):
        return config.device_memory
    free = _free_bytes(device)
    if config.device_memory is None:
        return None if free is None or device.type == "cpu" else free - free // _MARGIN
    if free is None:
        raise ConfigError(
            f"device_memory='free': {str(device)!r} does not say how much is free. Give a size, as '8GiB'."
        )
    return free - free // _MARGIN


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cpu":
        return available_bytes()
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    return int(module.mem_get_info(device)[0])
