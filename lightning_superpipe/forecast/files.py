"""A workload of which a part lies in files, as the options say."""

from __future__ import annotations

from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.host_memory import choose_for, stored_kinds
from lightning_superpipe.planning.disk_tier import with_files
from lightning_superpipe.planning.host_budget import HostNeed
from lightning_superpipe.planning.workload import Speeds, Workload

__all__ = ["in_files"]


def in_files(
    workload: Workload, config: SuperpipeConfig, need: HostNeed, speeds: Speeds
) -> tuple[Workload, tuple[str, ...]]:
    """Return a workload with the bytes that cross to and from files, and what has to be said of it.

    Args:
        need: of host memory, without files.
        speeds: of the machine; without rates of a disk files take no time.
    """
    kinds = stored_kinds(config) - {"gradients", "activations"}  # by mappings, when the system wants it
    if not kinds:
        return workload, ()
    files = choose_for(config, need, [unit.weight_bytes for unit in workload.units], trains=workload.trains)
    remarks = [f"files: {files.describe(len(workload.units))}"]
    if speeds.disk_read is None:
        remarks.append("files take no time, for the profile has no disk (superpipe profile disk=FOLDER)")
    return with_files(workload, kinds, files.in_memory), tuple(remarks)
