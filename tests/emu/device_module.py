"""``torch.emu``: what torch looks up by the device's name, as it does ``torch.cuda``."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def is_available() -> bool:
    """Whether there is a device: always, once loaded."""
    return True


def is_initialized() -> bool:
    """Whether the device has been started: always."""
    return True


def _lazy_init() -> None:
    """Start the device: nothing to do."""


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    """One device, emu:0."""
    return 1


def current_device() -> int:
    """Index of the current device."""
    return 0


def set_device(device: torch.device | int | str) -> None:
    """Choose the current device: there is one."""


def device(device: torch.device | int | str | None = None) -> contextlib.AbstractContextManager[None]:
    """Choose the current device within a ``with`` block: there is one."""
    return contextlib.nullcontext()


def synchronize(device: torch.device | int | str | None = None) -> None:
    """Wait for the device: work is done when a call returns."""


def current_stream(device: torch.device | int | str | None = None) -> torch.Stream:
    """Return the stream of this thread."""
    return torch.accelerator.current_stream()


def get_rng_state(device: torch.device | int | str = "emu") -> Tensor:
    """Return the state of the generator: the host's, as host and device share one."""
    return torch.get_rng_state()


def set_rng_state(new_state: Tensor, device: torch.device | int | str = "emu") -> None:
    """Set the state of the generator shared with the host."""
    torch.set_rng_state(new_state)


def manual_seed(seed: int) -> None:
    """Seed the device: nothing to do, ``torch.manual_seed`` seeds the generator shared with the host."""


def manual_seed_all(seed: int) -> None:
    """Seed all devices: see :func:`manual_seed`."""


def get_amp_supported_dtype() -> list[torch.dtype]:
    """List the dtypes that ``torch.autocast("emu")`` may cast to."""
    return [torch.bfloat16, torch.float16]
