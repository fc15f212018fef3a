"""Requests: the reads or writes of one unit, several under way at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

__all__ = ["Requests"]


class Requests:
    """Threads that issue requests beside the one that waits for them, which issues the first itself.

    Args:
        num_at_once: of each caller.
    """

    def __init__(self, num_at_once: int) -> None:
        self._threads = ThreadPoolExecutor(num_at_once - 1, "superpipe-disk") if num_at_once > 1 else None

    def run(self, requests: Sequence[Callable[[], None]]) -> None:
        """Do all of them; when it returns or raises, none is under way.

        Raises:
            OSError: the first that failed.
        """
        if self._threads is None:
            for request in requests:
                request()
            return
        others = [_submitted(self._threads, request) for request in requests[1:]]
        try:
            for request in requests[:1]:
                request()
        finally:
            wait(others)
        for other in others:
            other.result()

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown()


def _submitted(threads: ThreadPoolExecutor, request: Callable[[], None]) -> Future[None]:
    """Let a pool issue a request; when the interpreter ends, pools end first, and the request is issued here."""
    try:
        return threads.submit(request)
    except RuntimeError:
        issued: Future[None] = Future()
        try:
            request()
        except OSError as error:
            issued.set_exception(error)
        else:
            issued.set_result(None)
        return issued
