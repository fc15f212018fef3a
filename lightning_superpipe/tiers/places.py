"""The places of one session: a tier for each kind of bytes, as the options say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superpipe.config import STORED_KINDS, Disk, SuperpipeConfig
from lightning_superpipe.tiers.base import Tier
from lightning_superpipe.tiers.disk import DiskTier
from lightning_superpipe.tiers.folder import Folder
from lightning_superpipe.tiers.host import HostSlab, HostTier
from lightning_superpipe.tiers.kept import keep, named_tensors
from lightning_superpipe.tiers.requests import Requests

__all__ = ["DiskTraffic", "Places"]

_UNDONE = ("weights", "states")  # what an update changes


class DiskTraffic(NamedTuple):
    """Bytes read from and written to files.

    Attributes:
        read: by requests; what the system pages in where somebody looks at a mapping is not known.
        written: by requests, and by the engine through mappings (gradients, what moves into files), each time it writes
            them: the system writes such pages back once at most.
    """

    read: int = 0
    written: int = 0


class Places(Tier):
    """Host memory, but for the kinds that ``store`` puts into files.

    Args:
        pin: page-lock what is in host memory.
        trains: steps will change weights and states.

    Raises:
        UnsupportedError: the folder of the files cannot be used.
    """

    def __init__(self, config: SuperpipeConfig, *, pin: bool, trains: bool) -> None:
        self._host = HostTier(pin=pin)
        self._disks: dict[str, DiskTier] = {}
        self._folder: Folder | None = None
        kinds = [kind for kind in STORED_KINDS if config.is_on_disk(kind)]
        if kinds:
            self._open(kinds, config.disk_options, trains=trains)

    def _open(self, kinds: list[str], options: Disk, *, trains: bool) -> None:
        self._folder = Folder(options, trains=trains)
        self._requests = Requests(options.requests)
        try:
            for kind in kinds:
                undoes = trains and kind in _UNDONE
                self._disks[kind] = DiskTier(kind, self._folder, self._requests, options, with_undo=undoes)
        except BaseException:
            self.close()
            raise

    @property
    def disks(self) -> dict[str, DiskTier]:
        """The kinds in files."""
        return self._disks

    @property
    def can_undo(self) -> bool:  # type: ignore[override]
        return any(disk.can_undo for disk in self._disks.values())

    @property
    def traffic(self) -> DiskTraffic:
        """What the engine has read and written."""
        files = [disk.file for disk in self._disks.values()]
        return DiskTraffic(sum(file.num_read_bytes for file in files), sum(file.num_written_bytes for file in files))

    def keep(self, root: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        """Let the files stay, with a manifest of what is in them, where the options ask for that.

        Raises:
            BudgetError: the disk has no room for what was in memory.
        """
        if self._folder is not None and self._folder.keeps:
            named = named_tensors(root, optimizers)
            keep(self._folder.path, [(self._disks[kind], named[kind]) for kind in named if kind in self._disks])

    def part(self, kind: str, *, pin: bool | None = None) -> Tier:
        return self._disks.get(kind) or self._host.part(kind, pin=pin)

    def allocate(self, num_bytes: int, *, changes: bool = True) -> HostSlab:
        return self._host.allocate(num_bytes, changes=changes)

    def commit(self) -> None:
        for disk in self._disks.values():
            disk.commit()

    def undo(self) -> None:
        for disk in self._disks.values():
            disk.undo()

    @property
    def allocated_bytes(self) -> int:
        return self._host.allocated_bytes + sum(disk.allocated_bytes for disk in self._disks.values())

    @property
    def memory_bytes(self) -> int:
        return self._host.memory_bytes

    def holds(self, tensor: Tensor) -> bool:
        return self._host.holds(tensor) or any(disk.holds(tensor) for disk in self._disks.values())

    def close(self) -> None:
        self._host.close()
        for disk in self._disks.values():
            disk.close()
        if self._folder is not None:
            self._requests.close()
            self._folder.close()
            self._folder = None
