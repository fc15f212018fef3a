"""What a disk refused, said so that the user can act."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from humanize import naturalsize

__all__ = ["Advice", "flush", "os_error", "refusal"]

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


class Advice(NamedTuple):
    """What a front end's users may write instead."""

    elsewhere: str
    less: str


def os_error(error: BaseException) -> OSError | None:
    """The operating system's error behind one; torch's writer raises its own on top."""
    return next((each for each in _chain(error) if isinstance(each, OSError)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def refusal(path: Path, reason: OSError, advice: Advice) -> str:
    """The message about a checkpoint, a file or a folder, that could not be written."""
    message = f"the checkpoint {str(path)!r} could not be written: {reason.strerror or reason}. "
    if path.exists():
        message += "What has that name from before is untouched. "
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if reason.errno in _FORBIDDEN:
        todo = f"Allow writing in {str(folder)!r}, or choose another folder"
    elif reason.errno in _FULL:
        left = naturalsize(shutil.disk_usage(folder).free, binary=True)
        todo = f"The disk has {left} left: make room, save less ({advice.less}), or choose another folder"
    elif reason.errno in _NO_FOLDER:
        todo = f"Something else stands where a file or folder is needed below {str(folder)!r}: choose another folder"
    else:
        todo = "Choose another folder"
    return f"{message}{todo}: {advice.elsewhere}."


def flush(path: Path) -> None:
    """Bring a file or the names in a folder to the disk: a crash of the machine must not find them empty."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
