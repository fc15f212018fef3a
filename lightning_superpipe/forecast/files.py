"""A workload of which a part lies in files, as the options say."""

from __future__ import annotations

from typing import NamedTuple

from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.host_memory import choose_for, need_beside_files, stored_kinds
from lightning_superpipe.planning.disk_tier import with_files
from lightning_superpipe.planning.host_budget import HostNeed
from lightning_superpipe.planning.workload import Speeds, Workload

__all__ = ["InFiles", "in_files"]


class InFiles(NamedTuple):
    """What files make of a step.

    Attributes:
        workload: with the bytes that cross to and from files.
        host: what is left in host memory.
        remarks: what has to be said of it.
    """

    workload: Workload
    host: HostNeed
    remarks: tuple[str, ...] = ()


def in_files(workload: Workload, config: SuperpipeConfig, need: HostNeed, speeds: Speeds) -> InFiles:
    """Return what becomes of a workload when a part of it lies in files.

    Args:
        need: of host memory, without files.
        speeds: of the machine; without rates of a disk files take no time.
    """
    # Gradients go by mappings, when the system wants it; reads and writes of activations are not simulated.
    kinds = stored_kinds(config) - {"gradients", "activations"}
    if not kinds:
        return InFiles(workload, need)
    sizes = [unit.weight_bytes for unit in workload.units]
    files = choose_for(config, need, sizes, trains=workload.trains)
    remarks = [f"files: {files.describe(len(workload.units))}"]
    if speeds.disk_read is None:
        remarks.append("files take no time, for the profile has no disk (superpipe profile disk=FOLDER)")
    host = need_beside_files(config, need, sizes, files)
    return InFiles(with_files(workload, kinds, files.in_memory, ring=files.ring), host, tuple(remarks))
