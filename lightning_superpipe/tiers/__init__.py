"""Where bytes live. One file per tier; every tier hands out memory through :class:`~lightning_superpipe.tiers.base.Tier`."""

from lightning_superpipe.tiers.base import Slab, Tier
from lightning_superpipe.tiers.host import HostTier

__all__ = ["HostTier", "Slab", "Tier"]
