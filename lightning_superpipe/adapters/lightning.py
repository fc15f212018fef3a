"""``Trainer(strategy="superpipe")`` of the ``lightning`` package."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_superpipe.adapters.strategy import SuperpipeMixin

__all__ = ["SuperpipeStrategy"]


class SuperpipeStrategy(SuperpipeMixin, SingleDeviceStrategy):
    """Streams a LightningModule through its device; see :class:`~lightning_superpipe.SuperpipeConfig` for options.

    >>> SuperpipeStrategy(k=4, k_prime=2).config.k
    4
    """

    _set_device = staticmethod(_update_properties)

    def _say(self, message: str) -> None:
        rank_zero_info(message)


SuperpipeStrategy.register_strategies(StrategyRegistry)
