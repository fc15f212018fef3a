"""The profile of this machine: measured in a few seconds, kept for the next time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.observe import MachineProfile, cached_profile, identify, keep_profile, measure_machine
from lightning_superpipe.observe.identity import default_device, num_cores
from lightning_superpipe.session import Session

__all__ = ["kept_profile", "machine_profile", "profile_machine"]

_MIB = 1 << 20
_NUM_STEPS = 30  # of the engine: the first ones, which allocate, hardly count


@dataclass(frozen=True)
class _Sizes:
    """How much is measured; see :func:`measure_machine`."""

    widths: tuple[int, ...]
    memory_bytes: tuple[int, ...]
    copy_bytes: tuple[int, ...] = (1 << 16, 1 * _MIB, 16 * _MIB, 128 * _MIB)
    num_parameters: int = 1 << 24
    disk_bytes: tuple[int, ...] = (1 * _MIB, 16 * _MIB, 64 * _MIB)


# Products and sweeps from those that hardly start to those that are as fast as it gets.
_HOST = _Sizes(widths=(64, 256, 1024), memory_bytes=(1 << 14, 1 * _MIB, 64 * _MIB))
_ACCELERATOR = _Sizes(widths=(256, 1024, 4096, 8192), memory_bytes=(1 << 16, 64 * _MIB, 512 * _MIB))


def profile_machine(
    device: torch.device | str | None = None,
    *,
    disk: str | Path | None = None,
    num_samples: int = 3,
    say: Callable[[str], None] = lambda words: None,
) -> MachineProfile:
    """Measure copies, updates, compute, memory and the engine on this machine; a few seconds.

    Args:
        device: where models compute; None takes the machine's accelerator, or the CPU.
        disk: a folder on a disk to measure as well.
        num_samples: of each figure.
        say: called with a few words whenever something else is measured.

    Raises:
        torch.OutOfMemoryError: the device has less than a gigabyte free.
        SuperpipeError: the folder cannot be written.
    """
    where = default_device() if device is None else torch.device(device)
    sizes = _HOST if where.type == "cpu" else _ACCELERATOR
    threads = sorted({count for count in (1, 2, 4, 8) if count < num_cores()} | {num_cores()})
    profile = measure_machine(
        where,
        copy_bytes=sizes.copy_bytes,
        num_parameters=sizes.num_parameters,
        threads=threads,
        widths=sizes.widths,
        memory_bytes=sizes.memory_bytes,
        disk=None if disk is None else Path(disk),
        disk_bytes=sizes.disk_bytes,
        num_samples=num_samples,
        say=say,
    )
    say("the engine")
    return replace(profile, use_s=_engine_seconds(where))


def machine_profile(
    device: torch.device | str | None = None,
    *,
    again: bool = False,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> MachineProfile:
    """Return the profile of this machine: the one that was kept, or a new one, which is kept.

    Args:
        device: as for :func:`profile_machine`.
        again: measure even if a profile was kept.
        folder: where profiles are kept; None takes the user's cache, or the folder that ``SUPERPIPE_CACHE`` names.
        say: as for :func:`profile_machine`.

    Warns:
        SuperpipeWarning: a profile that was kept is corrupt or no longer holds, or the new one cannot be kept.
    """
    where = default_device() if device is None else torch.device(device)
    kept = None if again else cached_profile(identify(where), folder)
    if kept is not None:
        return kept
    profile = profile_machine(where, say=say)
    keep_profile(profile, folder)
    return profile


def kept_profile(device: torch.device | str | None = None) -> MachineProfile | None:
    """Return the profile that was kept of this machine, and still holds; None without one. Measures nothing."""
    return cached_profile(identify(default_device() if device is None else torch.device(device)))


def _engine_seconds(device: torch.device) -> float:
    """Return what the engine takes for each use of a unit: it is the same for units of any size."""
    module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(8)))
    inputs = torch.ones(1, 8, device=device)
    session = Session(module, SuperpipeConfig(k=2), device, trains=True, owns_root=True)
    try:
        for _ in range(_NUM_STEPS):
            module(inputs).sum().backward()
            module.zero_grad()
        return session.report().unit_overhead_us / 1e6
    finally:
        session.close()
