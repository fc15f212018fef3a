"""A module and data of a user's own, small enough to train in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

NUM_BLOCKS = 4
NUM_SAMPLES = 24


class Tiny(L.LightningModule):
    """Regression through equal blocks."""

    def __init__(self, width: int = 8, *, optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(NUM_BLOCKS)])
        self._make_optimizer = optimizer

    def _loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.blocks(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> list[dict[str, float]]:
        return [{"mean": float(row.mean())} for row in self.blocks(batch[0])]

    def configure_optimizers(self) -> Any:
        return self._make_optimizer(self.parameters())


class TinyData(L.LightningDataModule):
    """Random numbers."""

    def __init__(self, width: int = 8, batch_size: int = 4) -> None:
        super().__init__()
        chance = torch.Generator().manual_seed(0)
        samples = torch.rand(2, NUM_SAMPLES, width, generator=chance)
        self._set, self._batch_size = TensorDataset(*samples), batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._set, batch_size=self._batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._set, batch_size=self._batch_size)

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._set, batch_size=self._batch_size)
