"""Who updates a unit, where and when. Today: the user's own optimizer, on the host, after backward."""

from lightning_superpipe.optimizer.fused import choose_fused, unfused_state

__all__ = ["choose_fused", "unfused_state"]
