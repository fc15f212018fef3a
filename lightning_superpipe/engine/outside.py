"""What the watches ask: reads of, and writes to, host tensors outside unit calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_superpipe.engine.anchors import Anchors
from lightning_superpipe.engine.backend import hooks_are_allowed, is_on_host, storage_address
from lightning_superpipe.engine.catalog import Catalog
from lightning_superpipe.engine.residency import Residency
from lightning_superpipe.engine.tokens import SavedTensors
from lightning_superpipe.engine.wire import Wire

__all__ = ["Outside"]


class Outside:
    """Answers for one engine; see :class:`~lightning_superpipe.engine.watch.WatchHost`.

    Args:
        wire: which dtype host tensors have on the device.
        recover: puts the model back in order after a backward pass that raised.
    """

    def __init__(
        self,
        wire: Wire,
        anchors: Anchors,
        catalog: Catalog,
        residency: Residency,
        saved: SavedTensors,
        recover: Callable[[], None],
    ) -> None:
        self._wire, self._device = wire, residency.lanes.device
        self._anchors, self._catalog, self._residency, self._saved = anchors, catalog, residency, saved
        self.recover = recover

    def read_outside(self, tensor: Tensor, function: str) -> Tensor:
        """Return what an operation must get for an operand; a streamed parameter becomes an anchor."""
        streamed = self._catalog.unit_of_host(tensor)
        if streamed is None:
            return self._catalog.operand(tensor)
        unit, index = streamed
        self._catalog.promote(unit, tensor, function)
        if not hooks_are_allowed():
            return self._catalog.operand(tensor)
        self._residency.require(unit)
        return unit.twin(index)

    def is_buffer(self, value: object) -> bool:
        """Whether a value is a host buffer that has a device copy."""
        return self._anchors.have_copies and self._catalog.is_buffer(value)

    def mixes(self, operands: Sequence[Tensor]) -> bool:
        """Whether an operation has operands that are on the device, or made there, and others that are the host's."""
        if self._anchors.is_separate:
            here = self._device.type
            return any(each.device.type == here for each in operands) and any(map(is_on_host, operands))
        made_there = self._wire.dtype is not None and any(each.dtype is self._wire.dtype for each in operands)
        return made_there and any(self._wire.casts(each) and self._is_host_tensor(each) for each in operands)

    def _is_host_tensor(self, tensor: Tensor) -> bool:
        address = storage_address(tensor) if is_on_host(tensor) else None
        return address is not None and self._catalog.host_of_storage(address) is not None

    def may_be_written(self, tensor: Tensor) -> None:
        """User code takes an alias through which it may write: nothing may read the tensor meanwhile."""
        if self._catalog.unit_of_host(tensor) is not None or self._catalog.is_anchor(tensor):
            self._residency.fence_host_reads()
            self._anchors.fence_host_reads()
            self._catalog.written(tensor)

    def bring_home(self, tensor: Tensor) -> None:
        """An in-place operation has written to the device copy of a host tensor."""
        streamed = self._catalog.unit_of_host(tensor)
        if streamed is not None:
            self._residency.copy_back(streamed[0])
        self._anchors.bring_home(tensor)

    def twins_for(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Replace host parameters by the twins that are in the graph."""
        return self._catalog.graph_tensors(tensors)

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """Hooks for tensors saved by operations outside units."""
        return self._saved.saving()

    def host_of_storage(self, address: int) -> Tensor | None:
        """The host parameter or buffer whose storage starts at an address."""
        return self._catalog.host_of_storage(address)
