"""What nobody closes is closed before the interpreter ends: threads that it stops in the middle of a copy abort it."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import weakref
from typing import Protocol

__all__ = ["close_at_exit"]

_log = logging.getLogger("lightning_superpipe")


class _Closable(Protocol):
    def abort(self) -> None: ...

    def close(self) -> None: ...


_open: weakref.WeakSet[_Closable] = weakref.WeakSet()


def close_at_exit(session: _Closable) -> None:
    """Close a session when the process ends, if it is alive and open then: its script may end without a word."""
    _register()
    _open.add(session)


@functools.cache
def _register() -> None:
    atexit.register(_close_all, os.getpid())


def _close_all(process: int) -> None:
    if os.getpid() != process:  # a forked child has none of the threads that would have to end
        return
    for session in list(_open):
        try:
            session.abort()
            session.close()
        except Exception as error:
            _log.error("superpipe: at the end of the process: %s", error)
