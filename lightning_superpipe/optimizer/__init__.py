"""Who updates a unit, where and when. Today: the user's own optimizer, on the host, after backward."""

from lightning_superpipe.optimizer.fused import FusedChoice, sparsely_differentiated, wants_fused

__all__ = ["FusedChoice", "sparsely_differentiated", "wants_fused"]
