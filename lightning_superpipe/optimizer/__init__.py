"""Who updates a unit, where and when: the user's own optimizer, on the host, split by units where that is exact."""

from lightning_superpipe.optimizer.fused import FusedChoice, sparsely_differentiated, wants_fused
from lightning_superpipe.optimizer.stage import UpdateStage

__all__ = ["FusedChoice", "UpdateStage", "sparsely_differentiated", "wants_fused"]
