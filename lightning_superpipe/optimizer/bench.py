"""A bench: host memory where a part of a step works on a unit's bytes from files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superpipe.engine.fetching import FetchRing, Kept, Place
from lightning_superpipe.engine.lanes import now
from lightning_superpipe.engine.pending import unfenced
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.observe.trace import Lane, Recorder
from lightning_superpipe.optimizer.ledger import Ledger
from lightning_superpipe.optimizer.separable import Member
from lightning_superpipe.optimizer.stand_ins import StandIn
from lightning_superpipe.tiers import StoredSlab

__all__ = ["Bench", "StepOn"]

StepOn = Callable[[Optimizer, Sequence[dict[str, Any]], Sequence[StandIn]], list[dict[str, Any]]]


class Bench:
    """One unit's weights and states: read, updated, and written by three threads, one after the other.

    Whatever the part changes is a stand-in: views of a place in memory for what lies in files, copies of the rest
    (counters). So nothing changes before :meth:`publish`.

    Args:
        some: what is updated.
        states: slab of the states; None where none are in files yet.
        step_on: runs the step, see :func:`stand_ins.step_on`.
        fetches: may hold the weights still, from the backward that the update follows.
        can_undo: the step may be undone; otherwise what is in memory is changed where it is.

    Attributes:
        is_in_place: nothing of it is in files, so that all is changed where it is, whether a step is undone or not.
        leaves_weights: all new weights of the unit are in memory once the part has run.
    """

    def __init__(
        self,
        unit: Unit,
        some: Sequence[Member],
        states: StoredSlab | None,
        step_on: StepOn,
        fetches: FetchRing | None,
        *,
        can_undo: bool,
    ) -> None:
        self.unit, self._states, self._step_on = unit, states, step_on
        stored = {id(parameter) for parameter in unit.in_slab()}
        # Adapters stay in memory: the frozen weights beside them are neither read nor written for their sake.
        self.writes_weights = any(id(member.parameter) in stored for member in some)
        self._weights = unit.stored if self.writes_weights else None
        self.is_in_place = self._weights is None and self._states is None
        self._copies_originals = can_undo and not self.is_in_place
        self._num_weight_bytes = 0 if self._weights is None else self._weights.room_bytes
        in_slab = set(range(len(unit.parameters))) - set(unit.strays())
        self._in_file = in_slab if self._weights is not None else set()
        self.leaves_weights = 0 < len(self._in_file) == len(unit.parameters)
        self._fetches = fetches
        self._kept: Kept | None = None
        self._weights_at: Place | None = None
        self._place: Place | None = None
        self._turn = 0
        self._updated: Ledger | None = None
        self._members: Sequence[Member] = ()
        self._entries: list[dict[str, Any] | None] = []
        self._made: list[dict[str, Any]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._changed: list[nn.Parameter] = []

    @property
    def room_bytes(self) -> int:
        """Bytes of the place that it needs."""
        return self._num_weight_bytes + (0 if self._states is None else self._states.room_bytes)

    def note_kept(self) -> None:
        """The gradients are complete: use the weights that backward has left in memory, if they are there then."""
        if self._fetches is not None and self._weights is not None:
            self._kept = self._fetches.kept(self.unit)

    # -- the three threads

    def fetch(self, place: Place, recorder: Recorder | None) -> None:
        """Read weights and states.

        Args:
            place: to work in, until :meth:`publish` has returned.
            recorder: is told of reads, if there is one.
        """
        self._place = self._weights_at = place
        if self._kept is not None and self._fetches is not None and self._fetches.claim(self._kept):
            self._weights_at = self._kept.buffer
        else:
            self._kept = None
        self._turn = self._weights_at.turn
        for slab, memory in self._pieces():
            if self._kept is not None and slab is self._weights:
                continue
            start = now()
            slab.fetch(memory)
            if recorder is not None:
                recorder.span(Lane.READ, "U", self.unit.index, start, now(), memory.numel())

    def give_back(self) -> None:
        """Nothing works here any more."""
        if self._kept is not None and self._fetches is not None and self._weights_at is self._kept.buffer:
            self._fetches.give_back(self._kept)

    def narrow(
        self, optimizer: Optimizer, groups: Sequence[dict[str, Any]], some: Sequence[Member]
    ) -> Callable[[], None]:
        """Return the step on stand-ins and the gradients of now; it runs once the bytes are there."""
        self._members = some
        self._entries = [optimizer.state.get(member.parameter) for member in some]  # users drop them behind the step
        with unfenced():
            gradients = [member.parameter.grad for member in some]

        def step() -> None:
            stand_ins = [self._stand_in(*each) for each in zip(some, gradients, self._entries, strict=True)]
            before = [each.parameter._version for each in stand_ins]
            self._made = self._step_on(optimizer, groups, stand_ins)
            after = [each.parameter._version for each in stand_ins]
            self._changed = [
                member.parameter
                for member, *versions in zip(some, before, after, strict=True)
                if len(set(versions)) > 1
            ]

        return step

    @property
    def has_made_states(self) -> bool:
        """Whether the part has made tensors that are the optimizer's once they are published."""
        return any(isinstance(value, Tensor) for made in self._made for value in made.values())

    def publish(self, optimizer: Optimizer, ledger: Ledger, recorder: Recorder | None) -> None:
        """Write weights and states; let what is in memory follow.

        Raises:
            TransferError: a write failed.
        """
        for slab, memory in self._pieces():
            start = now()
            slab.store(memory)
            if recorder is not None:
                recorder.span(Lane.WRITE, "U", self.unit.index, start, now(), memory.numel())
        with unfenced(), torch.no_grad():
            for original, copy in self._copies:
                ledger.note(partial(_put_back, original, original.clone()))
                original.copy_(copy)
            for (_, parameter), entries, made in zip(self._members, self._entries, self._made, strict=True):
                for name, value in made.items():
                    state = optimizer.state[parameter] if entries is None else entries
                    ledger.note(partial(_put_entry, state, name, state.get(name)))
                    state[name] = value
        if not self.leaves_weights:
            self._raise_versions()

    def note_updated(self, ledger: Ledger) -> None:
        """The part has run: its new weights are in memory, and may be used from there."""
        if self.leaves_weights:
            self._raise_versions()
        self._updated = ledger

    def _raise_versions(self) -> None:
        """Graphs that hold an old version must know, as without files."""
        with unfenced():
            if self._changed:
                torch.autograd.graph.increment_version(self._changed)

    def copy_weights(self, slab: StoredSlab, target: Tensor) -> bool:
        """Copy the updated weights from where they were worked on; return False if they are not there any more.

        Args:
            slab: whose bytes are wanted.
            target: shape (slab.room_bytes,), uint8.
        """
        place, ledger = self._weights_at, self._updated
        if place is None or ledger is None or ledger.has_failed or slab is not self._weights:
            return False
        with place.lock:
            is_there = place.turn == self._turn
            if is_there:
                target.numpy()[...] = place.piece(0, self._num_weight_bytes).numpy()  # one thread; torch would take all
        return is_there

    # -- stand-ins

    def _pieces(self) -> list[tuple[StoredSlab, Tensor]]:
        """The slabs, and their parts of the place."""
        assert self._place is not None and self._weights_at is not None, "fetch() comes first"
        pieces = []
        if self._weights is not None:
            pieces.append((self._weights, self._weights_at.piece(0, self._num_weight_bytes)))
        if self._states is not None:
            pieces.append((self._states, self._place.piece(self._num_weight_bytes, self._states.room_bytes)))
        return pieces

    def _stand_in(self, member: Member, gradient: Tensor | None, entries: dict[str, Any] | None) -> StandIn:
        with unfenced(), torch.no_grad():
            assert gradient is not None, "members have gradients"
            state = {
                name: self._entry(value) if isinstance(value, Tensor) else value
                for name, value in (entries or {}).items()
            }
            return StandIn(member.group, self._weight(member.parameter), gradient, state)

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        index = next((i for i in self._in_file if self.unit.parameters[i] is parameter), None)
        if index is None or not parameter.numel():
            return self._copy(parameter.data)
        assert self._weights_at is not None, "fetch() comes first"
        return _view(self._weights_at.slab.bytes, self.unit.host_offsets[index], parameter)

    def _entry(self, value: Tensor) -> Tensor:
        slab = self._states
        if slab is None or not value.numel() or not 0 <= (at := _offset_in(slab, value)) < slab.num_bytes:
            return self._copy(value)
        assert self._place is not None, "fetch() comes first"
        return _view(self._place.slab.bytes, self._num_weight_bytes + at, value)

    def _copy(self, original: Tensor) -> Tensor:
        if not self._copies_originals:
            return original
        copy = original.clone()
        self._copies.append((original, copy))
        return copy


def _view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    piece = memory[start : start + like.nbytes].view(like.dtype)
    return piece.as_strided(like.size(), like.stride(), piece.storage_offset())


def _offset_in(slab: StoredSlab, tensor: Tensor) -> int:
    return tensor.data_ptr() - slab.bytes.data_ptr()


def _put_back(original: Tensor, values: Tensor) -> None:
    original.copy_(values)


def _put_entry(state: dict[str, Any], name: str, value: Any) -> None:
    if value is None:
        state.pop(name, None)
    else:
        state[name] = value
