"""Found by Hydra as ``hydra_plugins.lightning_superpipe_configs``: any Hydra app may write ``superpipe: balanced``.

Hydra loads it for every app of the environment, so it imports nothing that takes time; torch and Lightning least.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

__all__ = ["SuperpipeSearchPath"]

_PACKAGE = "lightning_superpipe"


class SuperpipeSearchPath(SearchPathPlugin):
    """Adds the groups of this package behind those of the app, which win where both have a file."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folder of the groups: inside the package, or beside it where the package is a checkout."""
        found = importlib.util.find_spec(_PACKAGE)  # finds, imports nothing
        for package in (found.submodule_search_locations or []) if found else []:
            for folder in (Path(package, "configs"), Path(package).parent / "configs"):
                if (folder / "superpipe" / "default.yaml").exists():
                    search_path.append(provider=_PACKAGE, path=f"file://{folder}")
                    return
