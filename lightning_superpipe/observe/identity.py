"""Which machine this is: what a measured figure depends on, and what makes an old one stale."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

__all__ = ["Identity", "Room", "default_device", "identify", "num_cores", "room_of"]

_CPU_FACTS = Path("/proc/cpuinfo")
_DRIVERS = ("/sys/module/nvidia/version", "/sys/module/amdgpu/version")


@dataclass(frozen=True)
class Identity:
    """What figures depend on.

    Attributes:
        device: its product name; that of the processor where the device is emulated.
        driver: its version; empty where there is none.
        torch: version.
        cpu: the processor's product name.
        num_cores: that this process may use.
    """

    device: str = ""
    driver: str = ""
    torch: str = ""
    cpu: str = ""
    num_cores: int = 0

    @property
    def key(self) -> str:
        """Part of a file's name: the hardware, without what may be updated on it.

        >>> Identity("Some GPU 24GB", "1.2", "2.13.0", "Some CPU", 8).key
        'some-gpu-24gb-some-cpu-8'
        """
        return re.sub(r"[^a-z0-9]+", "-", f"{self.device} {self.cpu} {self.num_cores}".lower()).strip("-")

    def differences(self, other: Identity) -> str:
        """Return what differs, in words; empty if nothing does.

        >>> Identity(torch="2.12").differences(Identity(torch="2.13"))
        "torch is '2.13', was '2.12'"
        """
        mine, theirs = asdict(self), asdict(other)
        return ", ".join(
            f"{name} is {theirs[name]!r}, was {mine[name]!r}" for name in mine if mine[name] != theirs[name]
        )


@dataclass(frozen=True)
class Room:
    """Memory of a machine, bytes; 0 where it is not known.

    Attributes:
        device_total, device_free: of the device; of the host where the device is emulated.
        host_total, host_free: of the host.
    """

    device_total: int = 0
    device_free: int = 0
    host_total: int = 0
    host_free: int = 0


def default_device() -> torch.device:
    """The machine's accelerator with its current index, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else torch.device(found.type, torch.accelerator.current_device_index())


def identify(device: torch.device) -> Identity:
    """Return the identity of this machine with one of its devices."""
    cpu = _cpu_name()
    is_host = device.type == "cpu"
    return Identity(
        device=cpu if is_host else _device_name(device),
        driver="" if is_host else _driver(),
        torch=torch.__version__,
        cpu=cpu,
        num_cores=num_cores(),
    )


def room_of(device: torch.device) -> Room:
    """Return the memory of this machine, total and free now."""
    host = psutil.virtual_memory()
    total, free = int(host.total), int(host.available)
    module = None if device.type == "cpu" else torch.get_device_module(device)
    if module is None or not hasattr(module, "mem_get_info"):
        return Room(total, free, total, free)
    device_free, device_total = module.mem_get_info(device)
    return Room(int(device_total), int(device_free), total, free)


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device_name(device: torch.device) -> str:
    module = torch.get_device_module(device)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type


def _cpu_name() -> str:
    if _CPU_FACTS.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", _CPU_FACTS.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _driver() -> str:
    return next((Path(path).read_text().strip() for path in _DRIVERS if Path(path).exists()), "")
