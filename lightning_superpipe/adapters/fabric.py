"""``Fabric(strategy="superpipe")``: the user's loop stays, each call of the model is a step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from torch import nn
from torch.optim import Optimizer

from lightning_superpipe.adapters.checkpoint import CheckpointMixin
from lightning_superpipe.adapters.materialize import materialize
from lightning_superpipe.adapters.updating import updating
from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.errors import SuperpipeError, UnsupportedError
from lightning_superpipe.observe.report import Report
from lightning_superpipe.session import Session

__all__ = ["FabricSuperpipeStrategy", "SuperpipeCheckpointIO"]

_HOST = torch.device("cpu")


class SuperpipeCheckpointIO(CheckpointMixin, TorchCheckpointIO):
    """Reads and writes ordinary checkpoint files, without a second copy in memory."""


class FabricSuperpipeStrategy(SingleDeviceStrategy):
    """Streams every module that Fabric sets up, each through its own window.

    Args:
        config: all options at once; or give them one by one as ``options``.
        options: fields of :class:`~lightning_superpipe.SuperpipeConfig`, such as ``k=4, k_prime=2``.
    """

    def __init__(
        self,
        *,
        config: SuperpipeConfig | None = None,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: Any = None,
        precision: Any = None,
        **options: Any,
    ) -> None:
        self.config = SuperpipeConfig.from_options(**options) if config is None else config
        super().__init__(_HOST, accelerator, checkpoint_io or SuperpipeCheckpointIO(), precision)
        # Fabric fills this in, but only where it exists.
        self.parallel_devices = parallel_devices
        self._sessions: list[Session] = []
        self._optimizers: list[Optimizer] = []

    @property
    def root_device(self) -> torch.device:
        return self.parallel_devices[0] if self.parallel_devices else _HOST

    def setup_environment(self) -> None:
        if self.parallel_devices and len(self.parallel_devices) > 1:
            raise UnsupportedError(
                f"superpipe streams through one device, but Fabric has {len(self.parallel_devices)}. Use devices=1."
            )
        super().setup_environment()

    def module_init_context(self, empty_init: bool | None = None) -> Any:
        """Build modules on the host: the device would have to hold all of one."""
        return self.precision.module_init_context()

    def module_to_device(self, module: nn.Module) -> None:
        """Parameters stay on the host; only what tells the module where it computes changes."""
        _update_properties(module, device=self.root_device)

    def setup_module(self, module: nn.Module) -> nn.Module:
        materialize(module)
        self._sessions.append(Session(module, self.config, self.root_device, trains=True, owns_root=True))
        self._attend()
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Split the optimizer's steps by the units of its modules, whichever of them is set up first."""
        self._optimizers.append(optimizer)
        self._attend()
        return super().setup_optimizer(optimizer)

    def _attend(self) -> None:
        for session in self._sessions:
            session.attend(self._optimizers)

    def updating(self, optimizer: Any) -> AbstractContextManager[None]:
        """Scope of a backward pass and the step after it, a promise that nobody touches gradients in between.

        ::

            with fabric.strategy.updating(optimizer):
                fabric.backward(loss)
                optimizer.step()

        As :meth:`Pipe.updating`; it does nothing where gradients are scaled.
        """
        scales = getattr(self.precision, "scaler", None) is not None
        return nullcontext() if scales else updating(self._sessions, optimizer)

    def report(self, index: int = 0) -> Report:
        """What streaming cost and saved, for the module that was set up as number ``index``.

        Raises:
            SuperpipeError: no such module.
        """
        if index >= len(self._sessions):
            raise SuperpipeError(f"module {index} was asked for, but {len(self._sessions)} were set up.")
        return self._sessions[index].report()

    def teardown(self) -> None:
        """Give all modules back as they were, with their current weights."""
        while self._sessions:
            self._sessions.pop().close()
        self._optimizers.clear()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        if "superpipe" not in strategy_registry:
            strategy_registry.register("superpipe", cls, description="Streams layers between host and device memory")


FabricSuperpipeStrategy.register_strategies(STRATEGY_REGISTRY)
