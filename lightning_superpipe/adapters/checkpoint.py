"""Reading and writing checkpoints without a second copy in memory; the format stays Lightning's.

Lightning serialises a checkpoint into memory before it writes the file, and reads a file into memory before it copies
the weights out: each time the host must hold all of it twice.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from humanize import naturalsize

from lightning_superpipe.errors import SuperpipeError

if TYPE_CHECKING:
    _Base: Any
else:
    _Base = object

__all__ = ["CheckpointMixin"]

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


class CheckpointMixin(_Base):  # type: ignore[misc]  # both namespaces' TorchCheckpointIO, which share no class
    """Writes to a draft in the same folder that then replaces the file: a failed save leaves the old file whole.

    Files elsewhere than on local disks, and files in torch's old format, are left to the base class.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            SuperpipeError: the file could not be written; one of the same name from before is as it was.
        """
        local = _local(path)
        if local is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        draft = local.with_name(f".superpipe-{secrets.token_hex(4)}.tmp")  # no name that a search for checkpoints finds
        try:
            local.parent.mkdir(parents=True, exist_ok=True)
            _write(checkpoint, draft)
            os.replace(draft, local)
        except (OSError, RuntimeError) as error:
            reason = _os_error(error)
            if reason is None:
                raise
            raise SuperpipeError(_refusal(local, reason)) from error
        finally:
            _remove(draft)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Read a checkpoint; its tensors are pages of the file until somebody writes to them."""
        local = _local(path)
        if local is None or not local.is_file() or not zipfile.is_zipfile(local):
            options = {} if map_location is None else {"map_location": map_location}
            return super().load_checkpoint(path, weights_only=weights_only, **options)
        return torch.load(local, map_location or "cpu", weights_only=weights_only, mmap=True)


def _local(path: str | Path) -> Path | None:
    """The path on a local disk; None for a URL.

    >>> _local("file:///tmp/a.ckpt"), _local("s3://bucket/a.ckpt")
    (PosixPath('/tmp/a.ckpt'), None)
    """
    text = os.fspath(path).removeprefix("file://")
    return None if "://" in text else Path(text).expanduser()


def _write(checkpoint: dict[str, Any], draft: Path) -> None:
    with open(draft, "xb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())  # a crash of the machine after the replacement must not find an empty file


def _remove(draft: Path) -> None:
    with contextlib.suppress(OSError):  # it replaced the file, or was never made
        draft.unlink()


def _os_error(error: BaseException) -> OSError | None:
    """The operating system's error behind one; torch's writer raises its own on top."""
    return next((each for each in _chain(error) if isinstance(each, OSError)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _refusal(path: Path, reason: OSError) -> str:
    message = f"the checkpoint {str(path)!r} could not be written: {reason.strerror or reason}. "
    if path.is_file():
        message += "The file of that name from before is untouched. "
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if reason.errno in _FORBIDDEN:
        advice = f"Allow writing in {str(folder)!r}, or choose another folder"
    elif reason.errno in _FULL:
        left = naturalsize(shutil.disk_usage(folder).free, binary=True)
        advice = f"The disk has {left} left: make room, save less (save_weights_only=True), or choose another folder"
    elif reason.errno in _NO_FOLDER:
        advice = f"Something else stands where a file or folder is needed below {str(folder)!r}: choose another folder"
    else:
        advice = "Choose another folder"
    return f"{message}{advice}: Trainer(default_root_dir=...) or ModelCheckpoint(dirpath=...)."
