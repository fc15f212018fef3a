"""Who updates a unit, where and when: the user's own optimizer, on the host, split by units where that is exact."""

from lightning_superpipe.optimizer.choice import make_stage, optimizers_of
from lightning_superpipe.optimizer.device import DeviceUpdates
from lightning_superpipe.optimizer.fused import FusedChoice, sparsely_differentiated, wants_fused
from lightning_superpipe.optimizer.masters import Masters
from lightning_superpipe.optimizer.share import ShareChoice
from lightning_superpipe.optimizer.stage import UpdateStage

__all__ = [
    "DeviceUpdates",
    "FusedChoice",
    "Masters",
    "ShareChoice",
    "UpdateStage",
    "make_stage",
    "optimizers_of",
    "sparsely_differentiated",
    "wants_fused",
]
