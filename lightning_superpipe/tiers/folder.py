"""The folder of a disk tier: where it is, who may use it, and how much room it has."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import psutil
from humanize import naturalsize

from lightning_superpipe.config import Disk
from lightning_superpipe.errors import BudgetError, SuperpipeError, SuperpipeWarning, UnsupportedError
from lightning_superpipe.tiers.direct_file import BLOCK

__all__ = ["DRAFT", "MANIFEST", "Folder"]

MANIFEST = "manifest.json"
DRAFT = f"{MANIFEST}.draft"
_LOCK = "lock"
_OWN = "superpipe-"
_SUFFIX = ".bytes"
_PASSING = ".passing.bytes"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_IN_MEMORY = ("tmpfs", "ramfs")


class _Mount(NamedTuple):
    kind: str
    point: str


class Folder:
    """A folder that one run uses at a time.

    Args:
        options: ``folder`` and ``keep`` say where, and whether anything stays.
        trains: steps will change what is in the files. Only that is kept, and only that needs a folder in which no run
            has kept anything; what does not train leaves such files alone.

    Attributes:
        path: it exists and is locked.
        keeps: something stays in it.

    Raises:
        UnsupportedError: another run uses it, it holds what a run has kept, or nothing can be written there.
    """

    def __init__(self, options: Disk, *, trains: bool = True) -> None:
        self._is_own, self._trains = options.folder is None, trains
        self.keeps = options.keep and trains
        self.path = _own_folder() if options.folder is None else Path(options.folder).expanduser()
        try:
            self._has_made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            self._take()
        except BaseException:
            os.close(self._lock)
            raise
        if options.folder is not None and (kind := _mount_of(self.path).kind) in _IN_MEMORY:
            warnings.warn(
                f"disk.folder={options.folder!r} is on {kind}, which is memory itself: nothing is saved. Choose a "
                "folder on a disk.",
                SuperpipeWarning,
                stacklevel=2,
            )

    def _take(self) -> None:
        """Lock the folder, and clear away what a killed run has left."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            raise UnsupportedError(
                f"the folder {str(self.path)!r} is in use by another run (process {holder}): two would write over each "
                "other. Wait for its end, or choose another disk.folder."
            ) from error
        has_kept = (self.path / MANIFEST).exists()
        if has_kept and self._trains:
            raise UnsupportedError(
                f"the folder {str(self.path)!r} holds weights and states that a run has kept: open them with "
                f"lightning_superpipe.open_kept, then remove the folder or choose another disk.folder."
            )
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        # Without a manifest all is of a run that was killed; nobody can tell what is whole.
        for left in (*self.path.glob(f"*{_PASSING if has_kept else _SUFFIX}"), self.path / DRAFT):
            left.unlink(missing_ok=True)

    def file(self, kind: str) -> Path:
        """Return the path of a kind's file; one that does not stay gets no name that something kept may have."""
        return self.path / f"{kind}{_SUFFIX if self.keeps else _PASSING}"

    def require(self, num_bytes: int) -> None:
        """Raise unless the disk has so many bytes left.

        Raises:
            BudgetError: with the numbers.
        """
        free = shutil.disk_usage(self.path).free
        if num_bytes > free:
            raise self.full(num_bytes)

    def refused(self, error: OSError) -> SuperpipeError:
        """Return the error that a file could not be made, or tried out."""
        return self.full(BLOCK, error) if error.errno in _FULL else self._unusable(error)

    def _unusable(self, error: OSError) -> UnsupportedError:
        return UnsupportedError(
            f"the disk store cannot use the folder {str(self.path)!r}: {error.strerror or error}. Choose another "
            "disk.folder."
        )

    def full(self, num_bytes: int, refused: OSError | None = None) -> BudgetError:
        """Return the error that the disk has no room for so many bytes.

        Args:
            refused: what the system said; a limit of files or of a user may be below what the disk has.
        """
        free = shutil.disk_usage(self.path).free
        said = "" if refused is None else f" (the system says: {refused.strerror or refused})"
        return BudgetError(
            f"the disk store needs {_size(num_bytes)} more in {str(self.path)!r}, and the disk has {_size(free)} left"
            f"{said}. Make room, choose a disk.folder on a larger disk, put fewer kinds there "
            "(store={'states': 'disk'}), or set disk.undo=False, which halves the need."
        )

    def close(self) -> None:
        """Unlock the folder, and remove it unless something is kept or somebody else made it."""
        if not self.keeps:
            (self.path / _LOCK).unlink(missing_ok=True)
            if self._has_made or self._is_own:
                with contextlib.suppress(OSError):  # somebody has put files of theirs there
                    self.path.rmdir()
        os.close(self._lock)


def _own_folder() -> Path:
    """A new folder on a real disk."""
    temporary = Path(tempfile.gettempdir())
    if _mount_of(temporary).kind in _IN_MEMORY:
        temporary = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_superpipe"
        temporary.mkdir(parents=True, exist_ok=True)
    for left in temporary.glob(f"{_OWN}*/{_LOCK}"):
        with contextlib.suppress(OSError):  # somebody else's, or gone by now
            _clear_away(left)
    return Path(tempfile.mkdtemp(prefix=_OWN, dir=temporary))


def _clear_away(lock: Path) -> None:
    """Remove a folder of its own that a killed run has left; its files went with the process.

    Raises:
        OSError: it is in use, or something else is in it.
    """
    if not lock.read_text().strip():  # a run that has made its folder a moment ago, and will lock it
        return
    descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if {path.name for path in lock.parent.iterdir()} == {_LOCK}:
            lock.unlink()
            lock.parent.rmdir()
    finally:
        os.close(descriptor)


def _mount_of(path: Path) -> _Mount:
    """The file system that a path is on."""
    place = str(path.absolute())
    mounts = [_Mount(each.fstype, each.mountpoint) for each in psutil.disk_partitions(all=True)]
    around = [each for each in mounts if Path(place).is_relative_to(each.point)]
    return max(around, key=lambda each: len(each.point), default=_Mount("", "/"))


def _size(num_bytes: int) -> str:
    return f"{naturalsize(num_bytes, binary=True)} ({num_bytes} bytes)"
