"""Where bytes live. One file per tier; each hands out memory through the interface in ``base.py``."""

from lightning_superpipe.tiers.base import Slab, StoredSlab, Tier
from lightning_superpipe.tiers.direct_file import padded
from lightning_superpipe.tiers.disk import DiskTier
from lightning_superpipe.tiers.folder import Folder
from lightning_superpipe.tiers.host import HostTier
from lightning_superpipe.tiers.kept import Kept, open_kept
from lightning_superpipe.tiers.mapped import is_mapped, map_safetensors
from lightning_superpipe.tiers.pages import trim_heap
from lightning_superpipe.tiers.places import DiskTraffic, Places

__all__ = ["DiskTier", "DiskTraffic", "Folder", "HostTier", "Kept", "Places", "Slab", "StoredSlab", "Tier", "is_mapped"]
__all__ += ["map_safetensors", "open_kept", "padded", "trim_heap"]
