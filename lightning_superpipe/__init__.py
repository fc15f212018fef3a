"""Train and run models larger than the device's memory: layers stream through a window of ``k`` units.

Importing this package registers the strategy ``"superpipe"`` with Lightning's Trainer, and with ``pytorch_lightning``'s
where that was imported before.
"""

import sys

from lightning_superpipe.adapters.fabric import FabricSuperpipeStrategy
from lightning_superpipe.adapters.lightning import SuperpipeStrategy
from lightning_superpipe.config import Adversary, Link, SuperpipeConfig
from lightning_superpipe.errors import SuperpipeError

if "pytorch_lightning" in sys.modules:  # importing the second namespace unasked would cost seconds
    import lightning_superpipe.pytorch_lightning  # noqa: F401  # registers itself

__version__ = "0.1.0"

__all__ = [
    "Adversary",
    "FabricSuperpipeStrategy",
    "Link",
    "SuperpipeConfig",
    "SuperpipeError",
    "SuperpipeStrategy",
    "__version__",
]
