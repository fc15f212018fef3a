"""Reading and writing checkpoints without a second copy in memory; the format stays Lightning's.

Lightning serialises a checkpoint into memory before it writes the file, and reads a file into memory before it copies
the weights out: each time the host must hold all of it twice.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.serialization import config as serialization

from lightning_superpipe.adapters.disk import Advice, os_error, refusal
from lightning_superpipe.errors import SuperpipeError

if TYPE_CHECKING:
    _Base: Any
else:
    _Base = object

__all__ = ["CheckpointMixin", "own_memory", "reading_pages"]

_WRITTEN_BY_TORCH = {".bin", ".pkl", ".pt", ".pth"}
_ADVICE = Advice("Trainer(default_root_dir=...) or ModelCheckpoint(dirpath=...)", "save_weights_only=True")


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
            reason = os_error(error)
            if reason is None:
                raise
            raise SuperpipeError(refusal(local, reason, _ADVICE)) from error
        finally:
            _remove(draft)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Read a checkpoint; its tensors are pages of the file until somebody writes to them."""
        local = _local(path)
        if local is None or not local.is_file() or not zipfile.is_zipfile(local):
            options = {} if map_location is None else {"map_location": map_location}
            return super().load_checkpoint(path, weights_only=weights_only, **options)
        return torch.load(local, map_location or "cpu", weights_only=weights_only, mmap=True)


def reading_pages(folder: str | Path | None) -> contextlib.AbstractContextManager[Any]:
    """Scope in which ``torch.load`` maps files instead of reading them; not where files of the old format lie."""
    written = [] if folder is None else [each for each in Path(folder).glob("*") if each.suffix in _WRITTEN_BY_TORCH]
    if not all(map(zipfile.is_zipfile, written)):
        return contextlib.nullcontext()
    options: Any = serialization  # a module for type checkers, an object since it was imported
    scope: contextlib.AbstractContextManager[Any] = options.patch({"load.mmap": True})
    return scope


def own_memory(optimizers: Iterable[Any]) -> None:
    """Bring loaded states from the pages of a file into memory, one tensor at a time: the file may be written again."""
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            optimizer.state[parameter] = tree_map_only(Tensor, torch.clone, state)


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
