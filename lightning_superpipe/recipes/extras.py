"""Optional packages, imported where they are needed and named where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from lightning_superpipe.errors import UnsupportedError

__all__ = ["require"]


def require(name: str) -> ModuleType:
    """Import an optional package.

    Raises:
        UnsupportedError: it is not installed.

    >>> require("json").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"this recipe needs {error.name}, which is not installed: pip install 'lightning_superpipe[recipes]'."
        ) from error
