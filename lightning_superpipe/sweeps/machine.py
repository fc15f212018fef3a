"""Where a job ran: figures without their machine say nothing."""

from __future__ import annotations

import os
import platform

from humanize import naturalsize

__all__ = ["describe_machine"]


def describe_machine() -> dict[str, str]:
    """Return system, cores and memory, and the accelerator where there is one, as text by name."""
    from lightning_superpipe.observe.identity import num_cores  # needs torch, which rows are read without

    facts = {"system": f"{platform.system()} {platform.machine()}", "cores": str(num_cores())}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory"] = naturalsize(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), binary=True)
    if accelerator := _accelerator():
        facts["accelerator"] = accelerator
    return facts


def _accelerator() -> str | None:
    import torch  # rows are read without it

    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    assert device is not None, "one is available"
    module = torch.get_device_module(device)
    return str(module.get_device_name()) if hasattr(module, "get_device_name") else device.type
