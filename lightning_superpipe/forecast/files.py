"""A workload of which a part lies in files, as the options say."""

from __future__ import annotations

from typing import NamedTuple

from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.host_memory import choose_for, need_beside_files, stored_kinds, unit_sizes, with_store
from lightning_superpipe.partition import UnitTable
from lightning_superpipe.planning.disk_tier import FileChoice
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


def in_files(workload: Workload, config: SuperpipeConfig, units: UnitTable, need: HostNeed, speeds: Speeds) -> InFiles:
    """Return what becomes of a workload when a part of it lies in files.

    Args:
        units: of the module.
        need: of host memory, without files.
        speeds: of the machine; without rates of a disk files take no time.
    """
    if not stored_kinds(config):
        return InFiles(with_store(workload, config, units, FileChoice(), need), need)
    sizes = unit_sizes(units)
    files = choose_for(config, need, sizes, trains=workload.trains)
    remarks = [f"files: {files.describe(len(workload.units))}"]
    if speeds.disk_read is None:
        remarks.append("files take no time, for the profile has no disk (superpipe profile disk=FOLDER)")
    host = need_beside_files(config, need, sizes, files)
    return InFiles(with_store(workload, config, units, files, host), host, tuple(remarks))
