"""Where bytes live. One file per tier; each hands out memory through the interface in ``base.py``."""

from lightning_superpipe.tiers.base import Slab, Tier
from lightning_superpipe.tiers.host import HostTier

__all__ = ["HostTier", "Slab", "Tier"]
