"""One device of one node: where a strategy's modules, inputs and optimizer states belong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from lightning_superpipe.errors import UnsupportedError

if TYPE_CHECKING:
    _Base: Any
else:
    _Base = object

__all__ = ["HOST", "OneDeviceMixin"]

HOST = torch.device("cpu")


class OneDeviceMixin(_Base):  # type: ignore[misc]  # both namespaces' SingleDeviceStrategy, which share no class
    """Computes on the one device of the trainer, and keeps everything that lasts on the host."""

    _asked_devices: list[torch.device] | None = None
    _trainer_devices: list[torch.device] | None = None
    _keeps_states_home = False

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """What the user asked for; where that is None each trainer fills in its own, so that one may follow another."""
        return self._asked_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        self._trainer_devices = devices

    @property
    def _devices(self) -> list[torch.device]:
        return self._asked_devices or self._trainer_devices or [HOST]

    @property
    def root_device(self) -> torch.device:
        return HOST if self._keeps_states_home else self.compute_device

    @property
    def compute_device(self) -> torch.device:
        """Where the module computes."""
        return self._devices[0]

    @contextlib.contextmanager
    def _at_home(self) -> Iterator[None]:
        """The base class puts new modules and optimizer states on the root device: inside, that is the host."""
        before, self._keeps_states_home = self._keeps_states_home, True
        try:
            yield
        finally:
            self._keeps_states_home = before

    @property
    def num_nodes(self) -> int:
        """Always one."""
        return 1

    @num_nodes.setter
    def num_nodes(self, value: int) -> None:
        if value != 1:
            raise UnsupportedError(
                f"num_nodes={value}: superpipe streams through one device of one node. Use num_nodes=1."
            )

    @property
    def _layer_sync(self) -> None:
        return None

    @_layer_sync.setter
    def _layer_sync(self, value: object) -> None:
        if value is not None:
            raise UnsupportedError("sync_batchnorm=True needs several devices; superpipe uses one. Leave it out.")

    def setup_environment(self) -> None:
        if len(self._devices) > 1:
            raise UnsupportedError(
                f"superpipe streams through one device, but the trainer has {len(self._devices)} "
                f"({', '.join(map(str, self._devices))}). Use Trainer(devices=1), or devices=[i] to pick one."
            )
        super().setup_environment()

    @contextlib.contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Build modules on the host: the device would have to hold all of one."""
        with contextlib.ExitStack() as stack:
            with self._at_home():
                stack.enter_context(super().tensor_init_context(empty_init))
            yield
