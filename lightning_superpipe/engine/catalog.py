"""Which tensor is what: host parameters, their twins, and parameters that turn out to be read outside their unit."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superpipe.engine.anchors import Anchors
from lightning_superpipe.engine.pending import unfenced
from lightning_superpipe.engine.unit import Unit

__all__ = ["Catalog", "Promotion"]


class Promotion(NamedTuple):
    """A streamed parameter that became an anchor in mid-run."""

    unit_name: str
    num_bytes: int
    function: str


class Catalog:
    """Finds the role of a tensor by identity.

    A streamed parameter that is an operand outside its unit becomes an anchor (:meth:`promote`).

    Attributes:
        split: optimizers that leave the units' part of their steps to others.
    """

    def __init__(self, root: nn.Module, anchors: Anchors) -> None:
        self._root = weakref.ref(root)
        self._anchors = anchors
        self._hosts: dict[int, tuple[Unit, int]] = {}
        self._twins: dict[int, tuple[weakref.ref[Unit], int]] = {}
        self._buffers: dict[int, Tensor] = {}
        self._by_address: dict[int, Tensor] | None = None
        self._stale_units: dict[int, Unit] = {}
        self._promotions: list[Promotion] = []
        self.split: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def add(self, unit: Unit) -> None:
        """Enter a unit's host parameters, after each of its scans."""
        self._hosts.update((id(host), (unit, index)) for index, host in enumerate(unit.parameters))

    def add_twin(self, twin: nn.Parameter, unit: Unit, index: int) -> None:
        self._twins[id(twin)] = (weakref.ref(unit), index)

    def remove(self, unit: Unit) -> None:
        """Forget a unit's tensors, before a scan or for good."""
        for host in unit.parameters:
            self._hosts.pop(id(host), None)
        for twin in unit.twins:
            self._twins.pop(id(twin), None)

    def unit_of_twin(self, tensor: object) -> tuple[Unit, int] | None:
        """The unit and index of a twin; None for any other tensor."""
        found = self._twins.get(id(tensor))
        unit = found[0]() if found is not None else None
        return None if found is None or unit is None else (unit, found[1])

    def unit_of_host(self, tensor: object) -> tuple[Unit, int] | None:
        """The unit and index of a streamed host parameter; None for any other tensor."""
        return self._hosts.get(id(tensor))

    def written_by(self, optimizer: Optimizer) -> list[Unit] | None:
        """The units that a step of an optimizer changes; None for one that may write to what it was not given."""
        if type(optimizer).__module__.partition(".")[0] != "torch":
            return None
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        found = (self._hosts.get(id(p)) for p in parameters if p.requires_grad or p.grad is not None)
        return list({one[0].index: one[0] for one in found if one is not None}.values())

    def host_of(self, tensor: object) -> nn.Parameter | None:
        """The host parameter of a twin, be it a unit's or an anchor's; None for any other tensor."""
        found = self.unit_of_twin(tensor)
        return self._anchors.host_of(tensor) if found is None else found[0].parameters[found[1]]

    def is_anchor(self, tensor: Tensor) -> bool:
        """Whether a tensor is an anchor's host parameter."""
        return id(tensor) in self._anchors.reasons and tensor.device.type == "cpu"

    def is_buffer(self, value: object) -> bool:
        """Whether a value is a host buffer of the module."""
        return id(value) in self._buffers

    def lowest_trained(self, units: Sequence[Unit]) -> int:
        """The first unit with anything to train: backward needs none below, unless anchors down there are trained."""
        root = self._root()
        if root is None or any(p.requires_grad for p in root.parameters() if id(p) in self._anchors.reasons):
            return 0
        trained = (unit.index for unit in units if any(p.requires_grad for p in unit.parameters))
        return next(trained, len(units))

    # -- reads and writes outside units

    def survey(self) -> None:
        """Look at the module's tensors afresh: a step begins."""
        root = self._root()
        self._by_address = None
        self._buffers = {} if root is None else {id(b): b for b in root.buffers() if b.device.type == "cpu"}

    def operand(self, tensor: Tensor) -> Tensor:
        """Return what an operation outside units must get for an anchor or a buffer; other tensors as they are."""
        if not self._anchors.have_copies or tensor.device.type != "cpu":
            return tensor
        if isinstance(tensor, nn.Parameter):
            return self._anchors.twin(tensor) if id(tensor) in self._anchors.reasons else tensor
        return self._anchors.buffer_twin(tensor) if id(tensor) in self._buffers else tensor

    def promote(self, unit: Unit, parameter: Tensor, function: str) -> None:
        """Make a streamed parameter an anchor from the next step on.

        The unit goes on with its twin until then: a recomputation must save what the forward saved, and the gradients
        of one step must meet in one place (test: inner_step).
        """
        if id(parameter) not in self._anchors.reasons:
            self._anchors.reasons[id(parameter)] = f"read outside its unit by {function}"
            self._promotions.append(Promotion(unit.name, parameter.nbytes, function))
            self._stale_units[unit.index] = unit

    def promote_unit(self, unit: Unit, function: str) -> None:
        """Make all of a unit's parameters anchors."""
        for host in unit.parameters:
            self.promote(unit, host, function)

    def take_stale_units(self) -> list[Unit]:
        """Units to be scanned again because some of their parameters became anchors."""
        units, self._stale_units = list(self._stale_units.values()), {}
        return units

    def take_promotions(self) -> list[Promotion]:
        """What became an anchor since the last call."""
        promotions, self._promotions = self._promotions, []
        return promotions

    def written(self, tensor: Tensor) -> None:
        """Note that the bytes of a host parameter may have changed without a trace."""
        streamed = self._hosts.get(id(tensor))
        if streamed is not None:
            streamed[0].distrust()
        if id(tensor) in self._anchors.reasons:
            self._anchors.invalidate()

    def graph_tensors(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Replace host parameters by the twins that stand for them in autograd's graph."""
        return tuple(self._graph_tensor(tensor) for tensor in tensors)

    def _graph_tensor(self, tensor: Tensor) -> Tensor:
        streamed = self._hosts.get(id(tensor))
        if streamed is not None:
            return streamed[0].twin(streamed[1])
        if isinstance(tensor, nn.Parameter) and id(tensor) in self._anchors.reasons and self._anchors.have_copies:
            return self._anchors.twin(tensor)
        return tensor

    def host_of_storage(self, address: int) -> Tensor | None:
        """The host parameter or buffer whose storage starts at an address; None if there is none."""
        return self.host_addresses().get(address)

    def host_addresses(self) -> Mapping[int, Tensor]:
        """All host parameters and buffers, by the address of their storage."""
        if self._by_address is None:
            root = self._root()
            bound: list[Tensor] = [] if root is None else [*root.parameters(), *root.buffers()]
            hosts = [(self.host_of(tensor), tensor) for tensor in bound]  # a unit may be running
            tensors = [tensor if host is None else host for host, tensor in hosts]
            with unfenced():  # where they are is known while they are updated
                self._by_address = {t.untyped_storage().data_ptr(): t for t in tensors if t.layout is torch.strided}
        return self._by_address

    def clear(self) -> None:
        self._hosts.clear()
        self._twins.clear()
        self._buffers.clear()
        self._by_address = None
        self._stale_units.clear()
