"""Folders that are written whole or not at all.

A folder is filled under a hidden name, brought to the disk, and only then put in the place of the one from before.
What a kill leaves in the shelter, a hidden folder beside the target, tells how far it came::

    shelter/draft/NAME    being written: worthless
    shelter/whole/NAME    complete and on the disk, about to take its place
    shelter/old/...       replaced or outdated, being deleted
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lightning_superpipe.adapters.disk import Advice, flush, os_error, refusal
from lightning_superpipe.errors import SuperpipeError, SuperpipeWarning

__all__ = ["Shelter"]

_NOTHING = re.compile(r"(?!)")


@dataclass(frozen=True)
class Shelter:
    """Where the folders of one parent are written until they are complete.

    Attributes:
        home: the parent; made if it does not exist.
        place: the hidden folder, on the same disk as ``home``; it exists while somebody saves, and after a kill.
        advice: what users of the front end may write instead, should the disk refuse.
    """

    home: Path
    place: Path
    advice: Advice

    @contextmanager
    def replacing(self, name: str, written: re.Pattern[str] = _NOTHING) -> Iterator[Path]:
        """Give a folder to fill; it takes its place in ``home`` when the scope ends without an exception.

        Args:
            name: of the folder in ``home``.
            written: names of files that a save may write; all others in the folder from before stay in the new one.

        Raises:
            SuperpipeError: the disk refused; the folder of that name from before is as it was.
        """
        target, draft = self.home / name, self.place / "draft" / name
        if target.is_mount():
            raise SuperpipeError(
                f"{str(target)!r} is the root of a disk, which cannot be replaced as a whole: save to a folder in it."
            )
        try:
            with self._locked():
                draft.mkdir(parents=True)
                yield draft
                if target.is_dir():
                    _carry_over(target, draft, written)
                _flush_tree(draft)
                self._publish(draft, target)
        except (OSError, RuntimeError) as error:
            reason = os_error(error)
            if reason is None:
                raise
            raise SuperpipeError(refusal(target, reason, self.advice)) from error

    def _publish(self, draft: Path, target: Path) -> None:
        whole = self.place / "whole" / target.name
        self.home.mkdir(parents=True, exist_ok=True)
        whole.parent.mkdir(exist_ok=True)
        draft.rename(whole)
        flush(whole.parent)
        if target.exists():
            self._put_away(target)
        whole.rename(target)
        flush(self.home)

    def recover(self) -> None:
        """Finish a replacement that a kill interrupted between its two renames; drop what never became complete.

        Does nothing while another process saves, so that a state may be read at any time.
        """
        if self.place.is_dir():
            with suppress(BlockingIOError), self._locked(waits=False):
                pass

    def discard(self, name: str) -> None:
        """Delete a folder of ``home``: a kill leaves all of it or nothing. Says so where the disk refuses."""
        try:
            with self._locked():
                self._put_away(self.home / name)
        except OSError as error:
            message = f"{str(self.home / name)!r} could not be deleted: {error.strerror or error}. Delete it by hand."
            warnings.warn(message, SuperpipeWarning, stacklevel=3)

    @contextmanager
    def _locked(self, *, waits: bool = True) -> Iterator[None]:
        """Scope in which no other process is at work here, with the place in order before and after.

        Raises:
            BlockingIOError: one is, and this one does not wait.
        """
        descriptor = self._lock(waits)
        try:
            self._settle()
            yield
        finally:
            try:
                self._settle()
            finally:
                with suppress(OSError):
                    self.place.rmdir()
                os.close(descriptor)  # and the lock is free, as it is after a kill

    def _lock(self, waits: bool) -> int:
        while True:
            self.place.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.place, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(descriptor)
                raise
            except OSError:  # a disk that knows no locks: one process at a time may use it
                return descriptor
            if os.fstat(descriptor).st_nlink and self.place.exists():
                return descriptor
            os.close(descriptor)  # whoever had the lock has removed the place

    def _settle(self) -> None:
        for whole in sorted(self.place.glob("whole/*")):
            if not (self.home / whole.name).exists():  # else the one from before is there, or a later one
                whole.rename(self.home / whole.name)
                flush(self.home)
        for name in ("draft", "whole", "old"):
            shutil.rmtree(self.place / name, ignore_errors=True)

    def _put_away(self, folder: Path) -> None:
        old = self.place / "old"
        old.mkdir(exist_ok=True)
        folder.rename(old / folder.name)


def _carry_over(old: Path, new: Path, written: re.Pattern[str]) -> None:
    """Link what the user keeps in the old folder into the new one."""
    shutil.copymode(old, new)
    for entry in old.iterdir():
        there = new / entry.name
        if written.fullmatch(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            if not there.exists():
                there.mkdir()
            if there.is_dir():
                _carry_over(entry, there, _NOTHING)
        elif not os.path.lexists(there):
            _link(entry, there)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a disk without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _flush_tree(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            flush(path)
