"""A unit at run time: its host parameters, their twins, and where they sit in its modules."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_superpipe.engine.backend import raw_tensors
from lightning_superpipe.engine.lanes import Copy, Event
from lightning_superpipe.engine.layout import home_in, lay_out
from lightning_superpipe.engine.owners import graph_reference, num_owners
from lightning_superpipe.engine.pending import Pending, unfenced
from lightning_superpipe.engine.sites import Site, derived_attributes, signature
from lightning_superpipe.engine.slots import Slot, storage_key, storage_use_count
from lightning_superpipe.engine.wire import Wire
from lightning_superpipe.partition import is_streamable
from lightning_superpipe.tiers import Slab, StoredSlab, Tier

__all__ = ["Unit"]


class Unit:
    """The smallest thing moved.

    A unit is *loaded* while it owns a slot, *arrived* once compute waits for no copy of it, and *bound* while its
    modules hold twins. Bound implies loaded. ``num_active`` counts its calls on the call stack. ``epoch`` counts the
    optimizer steps that changed it; ``pending`` is the update under way, if there is one, and ``in_slot`` the same if
    it updates the slot itself: the unit *arrives* there with the end of the update's kernels.

    Args:
        index: position among the units, in registration order.
        make_twin: called once per new twin, to hang the gradient's way home on it.
        anchors: ids of parameters that are not streamed; read at each scan.
        wire: which dtype each parameter has on the device.

    Attributes:
        dtypes, offsets, num_bytes: of the parameters on the device.
        host_offsets: in host memory.
        is_mostly_trained: more of its bytes are trained than frozen.
        num_doubts: how often the host's bytes may have been written to without a trace.
    """

    def __init__(
        self,
        index: int,
        name: str,
        module: nn.Module,
        anchors: Container[int],
        make_twin: Callable[[Unit, int], nn.Parameter],
        *,
        wire: Wire | None = None,
    ) -> None:
        self.index, self.name, self.module = index, name, module
        self._wire = wire or Wire()
        self._anchors = anchors
        self._make_twin = make_twin
        self.slot: Slot | None = None
        self.arrival: Event | None = None
        self.num_active = self.num_doubts = self.epoch = 0
        self.is_bound = False
        self.stamp: tuple[object, ...] | Pending | None = None
        self.pending: Pending | None = None
        self.in_slot: Pending | None = None
        self._fetched_stamp: tuple[object, ...] | Pending | None = None
        self._copied_behind: Pending | None = None
        self._slab: Slab | None = None
        self._stays: set[int] = set()
        self.is_mostly_trained = True
        self.scan()

    # -- what belongs to the unit

    def registered(self) -> list[Site]:
        """All places in the unit's modules that hold a parameter now."""
        return [
            Site(module, name, parameter)
            for module in self.module.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    def scan(self) -> None:
        """Read the modules afresh: users prune, parametrise and replace parameters in mid-run."""
        sites = self.registered()
        streamed = {id(s.parameter): s.parameter for s in sites if self._streams(s.parameter)}
        self.parameters: list[nn.Parameter] = list(streamed.values())
        position = {key: index for index, key in enumerate(streamed)}
        self.sites = [(site, position[id(site.parameter)]) for site in sites if id(site.parameter) in position]
        self.anchor_sites = [site for site in sites if id(site.parameter) in self._anchors]
        self._signature = signature(sites)
        self._layouts = [_layout(parameter) for parameter in self.parameters]
        self.dtypes = [self._wire.dtype_of(parameter) for parameter in self.parameters]
        self.is_cast = any(map(self._wire.casts, self.parameters))
        self.offsets, self.num_bytes = lay_out(self.parameters, self._wire)
        self.host_offsets, _ = lay_out(self.parameters)
        self.twins: list[nn.Parameter | None] = [None] * len(self.parameters)
        self._base_references = [0] * len(self.parameters)
        self.versions: list[int] = []
        self.host_versions: list[int] = []
        self.has_own_storage: set[int] = set()
        self._derived = list(derived_attributes(self.module))
        self.rnns = [module for module in self.module.modules() if isinstance(module, nn.RNNBase)]
        owners = [] if hasattr(self.module, "_orig_mod") else [site.module for site in sites]
        self.members = {id(module): module for module in [self.module, *owners]}

    def _streams(self, parameter: nn.Parameter) -> bool:
        return id(parameter) not in self._anchors and is_streamable(parameter)

    def is_current(self) -> bool:
        """Whether modules, parameters and twins are still those of the last scan."""
        if signature(self.registered()) != self._signature:
            return False
        with unfenced():
            return [_layout(parameter) for parameter in self.parameters] == self._layouts

    # -- host bytes

    def reserve(self, tier: Tier) -> None:
        """Take memory for the host bytes, so that a unit travels as one copy."""
        self._stays, self.is_mostly_trained, num_bytes, changes = home_in(tier, self.parameters)
        self._slab = None if num_bytes is None else tier.allocate(num_bytes, changes=changes)

    @property
    def stored(self) -> StoredSlab | None:
        """The slab, where it is not in memory and holds parameters."""
        slab = self._slab
        return slab if isinstance(slab, StoredSlab) and len(self.strays()) < len(self.parameters) else None

    def strays(self) -> list[int]:
        """Parameters whose bytes are not in the unit's slab: at first all, later those with a new ``p.data``."""
        if self._slab is None:
            return list(range(len(self.parameters)))
        base = self._slab.bytes.data_ptr()
        with unfenced():
            return [
                index
                for index, (parameter, offset) in enumerate(zip(self.parameters, self.host_offsets, strict=True))
                if parameter.numel() and parameter.data_ptr() != base + offset
            ]

    def in_slab(self) -> list[nn.Parameter]:
        """Parameters whose bytes are in the slab."""
        strays = set(self.strays())
        return [parameter for index, parameter in enumerate(self.parameters) if index not in strays]

    def homeless(self) -> list[int]:
        """Strays that belong into the slab."""
        return [index for index in self.strays() if index not in self._stays]

    def adopt(self, owners: Mapping[int, int] | None) -> None:
        """Move the bytes of stray host parameters into the slab; the parameter objects stay.

        Args:
            owners: of each storage in the model, how many of the model's tensors share it. Memory with more owners is
                left where it is: somebody's ``p.data = q.data`` means that the two change together. None: move all, as
                ``.to(device)`` would have parted them too.
        """
        slab = self._slab
        if slab is None:
            return
        with raw_tensors():
            for index in self.homeless():
                parameter = self.parameters[index]
                if owners is not None and storage_use_count(parameter) > owners.get(storage_key(parameter), 0) + 1:
                    continue
                home = slab.carve(self.host_offsets[index], parameter.data)
                home.copy_(parameter.data)
                parameter.data = home
                slab.note_written(home.nbytes)

    def copies_to(self, slot: Slot, fetched: Tensor | None = None) -> list[Copy]:
        """What to copy into a slot: the slab at once, and strays piece by piece. Not for units that are cast.

        Args:
            fetched: the slab's bytes, where they have been read into memory.
        """
        strays = self.strays()
        copies = [Copy(self.view(slot, index), self.parameters[index].data) for index in strays]
        if len(strays) < len(self.parameters):
            assert self._slab is not None, "only what has a slab does not stray"
            copies.insert(0, Copy(slot.buffer[: self.num_bytes], self._slab.bytes if fetched is None else fetched))
        return copies

    def host_views(self, fetched: Tensor | None) -> list[Tensor]:
        """Each parameter's host bytes, those of the slab from where they have been read to; strays as they are."""
        views = [parameter.data for parameter in self.parameters]
        if fetched is not None:
            for index in set(range(len(views))) - set(self.strays()):
                start, like = self.host_offsets[index], views[index]
                piece = fetched[start : start + like.nbytes].view(like.dtype)
                views[index] = piece.as_strided(like.size(), like.stride())
        return views

    def current_stamp(self) -> tuple[object, ...] | Pending:
        """Equal stamps mean equal host bytes: optimizer steps so far, and each tensor's version and address.

        Versions alone do not do: fused optimizers leave them as they are (test_fused_steps_inside_one_step). While an
        update is under way it is the stamp itself: copies are queued behind it.
        """
        return self.settled_stamp() if self.pending is None else self.pending

    def settled_stamp(self) -> tuple[object, ...]:
        """The stamp once no update is under way; one that updates the slot has raised the versions beforehand."""
        epoch = self.epoch + (self.pending is not None)
        with unfenced():
            return (epoch, *((p._version, p.data_ptr()) for p in self.parameters))

    def trust(self) -> tuple[object, ...]:
        """Equal returns mean that nothing can have written to the host's bytes in between; no update is under way."""
        return (self.num_doubts, self.settled_stamp())

    def note_fetched(self) -> None:
        """The host bytes are on their way into memory, behind the update under way."""
        self._fetched_stamp = self.current_stamp()

    def is_fetched(self) -> bool:
        """Whether nothing has changed since :meth:`note_fetched`."""
        return self._fetched_stamp == self.current_stamp()

    def note_loaded(self) -> None:
        """The host bytes are on their way into the slot, behind the update under way."""
        self.stamp = self.current_stamp()
        self.versions = self.twin_versions()
        self._copied_behind = self.pending
        if self.pending is None:
            self._note_host_versions()

    def _note_host_versions(self) -> None:
        self.host_versions = [host._version for host in self.parameters]

    def note_written(self, indices: Iterable[int]) -> None:
        """Host bytes of these parameters have been written to: what was read of them before is stale."""
        self._fetched_stamp = None
        self.num_doubts += 1
        if isinstance(self._slab, StoredSlab):
            strays = self.strays()
            self._slab.note_written(sum(self.parameters[index].nbytes for index in indices if index not in strays))

    # -- updates

    def distrust(self) -> None:
        """Anything may have written to the host's bytes, but not while an update of them is under way: it would have
        been waited for.
        """
        self.note_written(())
        if self.pending is None or self.stamp is not self.pending:
            self.stamp = None

    def update_in_slot(self, pending: Pending, arrival: Event) -> None:
        """Let an update change the slot as well, so that nothing has to be loaded afterwards."""
        self.in_slot = self.stamp = self._copied_behind = pending
        self.arrival = arrival

    def settle(self) -> None:
        """Block until no update of the unit is under way.

        Raises:
            What the update raised.
        """
        if self.pending is not None:
            self.pending.settle()

    def note_settled(self, pending: Pending) -> None:
        """The update is done: what was copied behind it is up to date, unless somebody writes from now on."""
        if self.pending is pending:
            self.pending = self.in_slot = None
            self.epoch += 1
            if self._fetched_stamp is pending:
                self._fetched_stamp = self.current_stamp()
            if self.stamp is pending:
                self.stamp = self.current_stamp()
            if self._copied_behind is pending:  # perhaps it has left its slot since
                self._copied_behind = None
                self._note_host_versions()

    # -- twins

    def view(self, slot: Slot, index: int) -> Tensor:
        """The bytes of one parameter in a slot, with the host tensor's sizes and strides."""
        host = self.parameters[index]
        return slot.view(self.dtypes[index], self.offsets[index], host.size(), host.stride())

    def twin(self, index: int) -> nn.Parameter:
        """The device copy of one parameter; made at first use, kept for good."""
        if self.twins[index] is None:
            self.twins[index] = self._make_twin(self, index)
            self._base_references[index] = sys.getrefcount(self.twins[index])
        twin = self.twins[index]
        assert twin is not None
        if twin.requires_grad != self.parameters[index].requires_grad:
            twin.requires_grad_(self.parameters[index].requires_grad)
        return twin

    def point_twins_at(self, slot: Slot) -> None:
        """Let all twins show the bytes in a slot."""
        for index in range(len(self.parameters)):
            if index not in self.has_own_storage:
                self.twin(index).data = self.view(slot, index)

    def num_slot_twins(self) -> int:
        """How many twins point into a slot."""
        return sum(t is not None and i not in self.has_own_storage for i, t in enumerate(self.twins))

    def twin_versions(self) -> list[int]:
        return [twin._version for twin in self.twins if twin is not None]

    # -- binding

    def bind(self, anchor_twin: Callable[[nn.Parameter], nn.Parameter] | None) -> None:
        """Put twins into the modules, where the host parameters still are; anchors' copies too where there are any."""
        for site, index in self.sites:
            if site.holds(site.parameter):
                site.put(self.twin(index))
        if anchor_twin is not None:
            for site in self.anchor_sites:
                if site.holds(site.parameter):
                    site.put(anchor_twin(site.parameter))
        self._flatten_rnns()
        self.is_bound = True

    def bound_versions(self) -> list[int]:
        """Versions of what the unit's modules hold as parameters now."""
        return [site.parameter._version for site in self.registered()]

    def has_foreign_weights(self, host_of: Callable[[object], nn.Parameter | None]) -> bool:
        """Whether somebody (``functional_call``) has put other tensors in place of a bound unit's parameters."""
        places = [(site, self.twins[index]) for site, index in self.sites]
        return any(site.module._parameters.get(site.name) is not twin for site, twin in places) or any(
            not site.holds(site.parameter) and host_of(site.module._parameters.get(site.name)) is not site.parameter
            for site in self.anchor_sites
        )

    def unbind(self, host_of: Callable[[object], nn.Parameter | None]) -> None:
        """Put the host parameters back, wherever a twin still is."""
        for site, index in self.sites:
            held = site.module._parameters.get(site.name)
            if held is self.twins[index] or host_of(held) is site.parameter:
                site.put(site.parameter)
        for site in self.anchor_sites:
            if host_of(site.module._parameters.get(site.name)) is site.parameter:
                site.put(site.parameter)
        for module, name in self._derived:
            held = module.__dict__.get(name)
            if isinstance(held, Tensor) and held.device.type != "cpu":
                with raw_tensors():
                    module.__dict__[name] = held.to("cpu")
        self._flatten_rnns()
        self.is_bound = False

    def _flatten_rnns(self) -> None:
        # Recurrent layers keep a second list of their weights.
        for rnn in self.rnns:
            if "_flat_weights" in rnn.__dict__:
                rnn.__dict__["_flat_weights"] = [getattr(rnn, name, None) for name in rnn._flat_weights_names]

    def stashed_twins(self) -> list[int]:
        """Twins in a slot that somebody outside still holds as objects (``ctx.w = w``, ``cache.append(self.w)``)."""
        return [
            index
            for index in range(len(self.twins))
            if index not in self.has_own_storage and self._foreign_references(index) > 0
        ]

    def gives_out_twins(self) -> bool:
        """Whether somebody beside the modules holds a twin of the unit, which is bound."""
        held = Counter(index for site, index in self.sites if site.holds(self.twins[index]))  # type: ignore[arg-type]
        return not self.rnns and any(self._foreign_references(index) > held[index] for index in held)

    def reclaim_twins(self) -> None:
        """Let twins that nobody holds any more, graphs included, go back to slots."""
        for index in list(self.has_own_storage):
            if self._extra_references(index) == 0:
                self.has_own_storage.discard(index)

    def _extra_references(self, index: int) -> int:
        if self.twins[index] is None:
            return 0
        return sys.getrefcount(self.twins[index]) - self._base_references[index]

    def _foreign_references(self, index: int) -> int:
        extra = self._extra_references(index)
        if extra <= 0:
            return 0
        twin = self.twins[index]
        assert twin is not None
        return extra - (graph_reference() if num_owners(twin) > 1 else 0)


def _layout(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return tensor.size(), tensor.stride(), tensor.dtype
