"""A bench: host memory where a part of a step works on a unit's bytes from files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superpipe.engine.fetching import Buffer
from lightning_superpipe.engine.lanes import Event
from lightning_superpipe.engine.pending import unfenced
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.optimizer.ledger import Ledger
from lightning_superpipe.optimizer.separable import Member
from lightning_superpipe.optimizer.stand_ins import StandIn
from lightning_superpipe.tiers import StoredSlab

__all__ = ["Bench", "StepOn"]

StepOn = Callable[[Optimizer, Sequence[dict[str, Any]], Sequence[StandIn]], list[dict[str, Any]]]


class Bench:
    """One unit's weights and states: read, updated, and written by three threads, one after the other.

    Whatever the part changes is a stand-in: views of a buffer for what lies in files, copies of the rest (counters). So
    nothing changes before :meth:`publish`.

    Args:
        some: what is updated.
        states: slab of the states; None where none are in files yet.
        step_on: runs the step, see :func:`stand_ins.step_on`.
        can_undo: the step may be undone; otherwise what is in memory is changed where it is.
    """

    def __init__(
        self, unit: Unit, some: Sequence[Member], states: StoredSlab | None, step_on: StepOn, *, can_undo: bool
    ) -> None:
        self.unit, self._states, self._step_on, self._can_undo = unit, states, step_on, can_undo
        stored = {id(parameter) for parameter in unit.in_slab()}
        # Adapters stay in memory: the frozen weights beside them are neither read nor written for their sake.
        self.writes_weights = any(id(member.parameter) in stored for member in some)
        self._weights = unit.stored if self.writes_weights else None
        self._num_weight_bytes = 0 if self._weights is None else self._weights.room_bytes
        in_slab = set(range(len(unit.parameters))) - set(unit.strays())
        self._in_file = in_slab if self._weights is not None else set()
        self._buffer: Buffer | None = None
        self._free: Event | None = None
        self._members: Sequence[Member] = ()
        self._stand_ins: list[StandIn] = []
        self._made: list[dict[str, Any]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._changed: list[nn.Parameter] = []

    @property
    def room_bytes(self) -> int:
        """Bytes of the buffer that it needs."""
        return self._num_weight_bytes + (0 if self._states is None else self._states.room_bytes)

    def take(self, buffer: Buffer, until: Event) -> None:
        """Use a buffer, once what used it before is over, until an event."""
        self._buffer, self._free, buffer.free_after = buffer, buffer.free_after, until

    # -- the three threads

    def fetch(self) -> None:
        """Read weights and states."""
        if self._free is not None:
            with contextlib.suppress(Exception):  # its own waiters are told
                self._free.synchronize()
        for slab, memory in self._pieces():
            slab.fetch(memory)

    def narrow(
        self, optimizer: Optimizer, groups: Sequence[dict[str, Any]], some: Sequence[Member]
    ) -> Callable[[], None]:
        """Return the step on stand-ins and the gradients of now; to be called once the bytes are there."""
        self._members = some
        self._stand_ins = [self._stand_in(optimizer, member) for member in some]

        def step() -> None:
            before = [each.parameter._version for each in self._stand_ins]
            self._made = self._step_on(optimizer, groups, self._stand_ins)
            after = [each.parameter._version for each in self._stand_ins]
            self._changed = [
                member.parameter
                for member, *versions in zip(some, before, after, strict=True)
                if len(set(versions)) > 1
            ]

        return step

    def publish(self, optimizer: Optimizer, ledger: Ledger) -> None:
        """Write weights and states; let what is in memory follow.

        Raises:
            TransferError: a write failed.
        """
        for slab, memory in self._pieces():
            slab.store(memory)
        with unfenced(), torch.no_grad():
            for original, copy in self._copies:
                ledger.note(partial(_put_back, original, original.clone()))
                original.copy_(copy)
            for (_, parameter), made in zip(self._members, self._made, strict=True):
                for name, value in made.items():
                    state = optimizer.state[parameter]
                    ledger.note(partial(_put_entry, state, name, state.get(name)))
                    state[name] = value
            if self._changed:  # graphs that hold an old version must know, as without files
                torch.autograd.graph.increment_version(self._changed)
        self._buffer = None

    # -- stand-ins

    def _pieces(self) -> list[tuple[StoredSlab, Tensor]]:
        """The slabs, and their parts of the buffer."""
        assert self._buffer is not None, "take() comes first"
        pieces = []
        if self._weights is not None:
            pieces.append((self._weights, self._buffer.piece(0, self._num_weight_bytes)))
        if self._states is not None:
            pieces.append((self._states, self._buffer.piece(self._num_weight_bytes, self._states.room_bytes)))
        return pieces

    def _stand_in(self, optimizer: Optimizer, member: Member) -> StandIn:
        with unfenced(), torch.no_grad():
            parameter = member.parameter
            gradient = parameter.grad
            assert gradient is not None, "members have gradients"
            state = optimizer.state.get(parameter, {})
            entries = {
                name: self._entry(value) if isinstance(value, Tensor) else value for name, value in state.items()
            }
            return StandIn(member.group, self._weight(parameter), gradient, entries)

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        index = next((i for i in self._in_file if self.unit.parameters[i] is parameter), None)
        if index is None or not parameter.numel():
            return self._copy(parameter.data)
        assert self._buffer is not None, "take() comes first"
        return _view(self._buffer.slab.bytes, self.unit.host_offsets[index], parameter)

    def _entry(self, value: Tensor) -> Tensor:
        slab = self._states
        if slab is None or not value.numel() or not 0 <= (at := _offset_in(slab, value)) < slab.num_bytes:
            return self._copy(value)
        assert self._buffer is not None, "take() comes first"
        return _view(self._buffer.slab.bytes, self._num_weight_bytes + at, value)

    def _copy(self, original: Tensor) -> Tensor:
        if not self._can_undo:
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
