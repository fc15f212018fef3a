"""The strategy for the ``pytorch_lightning`` namespace; importing this module registers it there."""

from lightning_superpipe.adapters.pytorch_lightning import SuperpipeStrategy

__all__ = ["SuperpipeStrategy"]
