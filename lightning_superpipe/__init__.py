"""Train and run models larger than the device's memory: layers stream through a window of ``k`` units.

Importing this package registers the strategy ``"superpipe"`` with Lightning's Trainer, and with ``pytorch_lightning``'s
where that was imported before.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_superpipe.adapters.fabric import FabricSuperpipeStrategy
from lightning_superpipe.adapters.lightning import SuperpipeStrategy
from lightning_superpipe.adapters.plain import Pipe, attach
from lightning_superpipe.config import Adversary, Disk, Link, SuperpipeConfig
from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.tiers import Kept, map_safetensors, open_kept

if TYPE_CHECKING:
    from lightning_superpipe.adapters.accelerate import SuperpipeAccelerator, enable
    from lightning_superpipe.adapters.transformers import SuperpipeTrainer, SuperpipeTrainerMixin
    from lightning_superpipe.forecast.machine import machine_profile, profile_machine
    from lightning_superpipe.forecast.plan import plan

if "pytorch_lightning" in sys.modules:  # importing the second namespace unasked would cost seconds
    import lightning_superpipe.pytorch_lightning  # noqa: F401  # registers itself

__version__ = "0.1.0"

__all__ = [
    "Adversary",
    "Disk",
    "FabricSuperpipeStrategy",
    "Kept",
    "Link",
    "Pipe",
    "SuperpipeAccelerator",
    "SuperpipeConfig",
    "SuperpipeError",
    "SuperpipeStrategy",
    "SuperpipeTrainer",
    "SuperpipeTrainerMixin",
    "__version__",
    "attach",
    "enable",
    "machine_profile",
    "map_safetensors",
    "open_kept",
    "plan",
    "profile_machine",
]

_LATE = {  # what needs packages that not everybody has, or that take time to import
    "SuperpipeAccelerator": "adapters.accelerate",
    "enable": "adapters.accelerate",
    "SuperpipeTrainer": "adapters.transformers",
    "SuperpipeTrainerMixin": "adapters.transformers",
    "machine_profile": "forecast.machine",
    "plan": "forecast.plan",
    "profile_machine": "forecast.machine",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lightning_superpipe.{_LATE[name]}"), name)
