"""A user's module that does not always reach the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tests.app.tiny import Tiny


class Ending(Tiny):
    """Ends in its second step: by a crash, or where the file ``stop`` lies in the current folder, as by Ctrl-C."""

    def __init__(self, width: int = 8, crashes: bool = False, *, optimizer: Any) -> None:
        super().__init__(width, optimizer=optimizer)
        self._crashes = crashes

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 1 and self._crashes:
            raise ZeroDivisionError("by the test")
        if batch_idx == 1 and Path("stop").exists():
            raise KeyboardInterrupt
        return super().training_step(batch, batch_idx)
