"""Binding: twins stand in a unit's modules while it runs, host parameters at all other times."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_superpipe.engine.anchors import Anchors, BoundBuffer
from lightning_superpipe.engine.catalog import Catalog
from lightning_superpipe.engine.unit import Unit

__all__ = ["Binding"]


class Binding:
    """Puts twins, and device copies of anchors and buffers, into modules and takes them out."""

    def __init__(self, anchors: Anchors, catalog: Catalog) -> None:
        self._anchors, self._catalog = anchors, catalog
        self._buffers: dict[int, list[BoundBuffer]] = {}

    def bind(self, unit: Unit) -> None:
        """Put twins into a unit's modules."""
        if not unit.is_bound:
            unit.bind(self._anchors.twin if self._anchors.have_copies else None)
            self._buffers[unit.index] = self._anchors.bind_buffers(unit.module.modules())

    def unbind(self, unit: Unit) -> None:
        """Put the host parameters back."""
        if unit.is_bound:
            unit.unbind(self._catalog.host_of)
            self._anchors.unbind_buffers(self._buffers.pop(unit.index, []))

    def host_state(self, module: nn.Module) -> dict[str, Any]:
        """A module's parameters and buffers as they are on the host, whatever is bound now."""
        self._anchors.flush_buffers()
        parameters = {name: self._host_parameter(held) for name, held in module._parameters.items()}
        buffers = {name: self._anchors.host_buffer(held) for name, held in module._buffers.items()}
        return {"_parameters": parameters, "_buffers": buffers}

    def _host_parameter(self, held: nn.Parameter | None) -> nn.Parameter | None:
        host = self._catalog.host_of(held)
        return held if host is None else host
