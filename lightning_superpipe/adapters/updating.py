"""The promise about gradients in loops whose front end wraps the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning_superpipe.session import Session

__all__ = ["updating"]


@contextmanager
def updating(sessions: Iterable[Session], optimizer: Any) -> Iterator[None]:
    """Scope of a backward pass and the step after it, see :meth:`Pipe.updating`.

    Args:
        sessions: of all models; those without parameters of the optimizer are left alone.
        optimizer: torch's own, or a front end's around it.
    """
    own = getattr(optimizer, "optimizer", optimizer)
    with ExitStack() as scopes:
        for session in sessions:
            scopes.enter_context(session.updating_in_backward(own, lends=False))
        yield
