"""Anchors: host tensors with a permanent device copy - shared parameters, parameters outside units, all buffers.

Gradients and optimizer states of anchors stay on the host, and so does the authoritative value: nothing of the model
ever becomes a mixed-device object. On the CPU host and device memory are one, so there is nothing to copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_superpipe.engine.backend import is_separate, raw_tensors
from lightning_superpipe.engine.casting import write_home
from lightning_superpipe.engine.lanes import Copy, Event, Label, Lanes
from lightning_superpipe.engine.twins import release_memory
from lightning_superpipe.engine.wire import Wire

__all__ = ["Anchors", "BoundBuffer"]


@dataclass
class _AnchorTwin:
    """One parameter's device copy and what it was made of."""

    host: nn.Parameter
    twin: nn.Parameter
    stamp: tuple[object, ...] | None
    twin_version: int


@dataclass
class _BufferTwin:
    """One buffer's device copy; ``is_dirty`` while the device has a value that the host has not seen."""

    host: Tensor
    twin: Tensor
    host_version: int
    twin_version: int
    is_dirty: bool = False


@dataclass(frozen=True)
class BoundBuffer:
    """A buffer whose device copy is in its module now."""

    module: nn.Module
    name: str
    copy: _BufferTwin


class Anchors:
    """Device copies of everything that is not streamed.

    Args:
        reasons: id of each anchor parameter and why it is one; grows in mid-run (see :meth:`promote`).
        make_twin: returns a new device parameter without memory for a host parameter.
        wire: which dtype each has on the device.

    Attributes:
        have_copies: False where the device is the host and dtypes stay: then anchors are used as they are.
    """

    def __init__(
        self,
        device: torch.device,
        lanes: Lanes,
        reasons: dict[int, str],
        make_twin: Callable[[nn.Parameter], nn.Parameter],
        wire: Wire | None = None,
    ) -> None:
        self.reasons = reasons
        self.is_separate = is_separate(device)
        self._wire = wire or Wire()
        self.have_copies = self.is_separate or self._wire.dtype is not None
        self.epoch = 0
        self.num_copied_back = 0
        self._device, self._lanes, self._make_twin = device, lanes, make_twin
        self._twins: dict[int, _AnchorTwin] = {}
        self._host_of: dict[int, nn.Parameter] = {}
        self._buffers: dict[int, _BufferTwin] = {}
        self.last_copy: Event | None = None

    @property
    def num_bytes(self) -> int:
        """Device bytes of all copies made so far."""
        parameters = sum(copy.twin.nbytes for copy in self._twins.values())
        return parameters + sum(copy.twin.nbytes for copy in self._buffers.values())

    def host_of(self, tensor: object) -> nn.Parameter | None:
        """The host parameter whose device copy a tensor is; None for strangers."""
        return self._host_of.get(id(tensor))

    def addresses(self) -> set[int]:
        """Addresses of the storages of all device copies."""
        twins = [copy.twin for copy in self._twins.values()] + [copy.twin for copy in self._buffers.values()]
        return {twin.untyped_storage().data_ptr() for twin in twins}

    # -- parameters

    def twin(self, parameter: nn.Parameter) -> nn.Parameter:
        """The device copy of a parameter, up to date."""
        copy = self._twins.get(id(parameter))
        if copy is None:
            copy = self._twins[id(parameter)] = self._make(parameter)
        elif copy.stamp != self._stamp(parameter) or copy.twin._version != copy.twin_version:
            self._refresh(copy)
        if copy.twin.requires_grad != parameter.requires_grad:
            with raw_tensors():
                copy.twin.requires_grad_(parameter.requires_grad)
        return copy.twin

    def fence_host_reads(self) -> None:
        """Block until no copy reads host memory: the host may be about to write there."""
        if self.last_copy is not None:
            self.last_copy.synchronize()
            self.last_copy = None

    def bring_home(self, tensor: Tensor) -> None:
        """The user has written to the device copy of a host tensor: parameters go home now, buffers at a flush."""
        if (parameter := self._twins.get(id(tensor))) is not None:
            self._refresh(parameter)
        if (buffer := self._buffers.get(id(tensor))) is not None:
            buffer.is_dirty = True

    def invalidate(self) -> None:
        """Copy every anchor afresh at its next use: writes through ``.data`` leave no other trace."""
        for copy in self._twins.values():
            copy.stamp = None
        for buffer in self._buffers.values():
            buffer.host_version = -1

    def _stamp(self, parameter: nn.Parameter) -> tuple[object, ...]:
        return (self.epoch, parameter._version, parameter.data_ptr())

    def _make(self, host: nn.Parameter) -> _AnchorTwin:
        twin = self._make_twin(host)
        with raw_tensors():
            twin.data = self._like(host.data)
        self._host_of[id(twin)] = host
        self._copy_in(twin.data, host.data)
        return _AnchorTwin(host, twin, self._stamp(host), twin._version)

    def _refresh(self, copy: _AnchorTwin) -> None:
        with raw_tensors():
            if copy.twin._version != copy.twin_version and copy.twin.size() == copy.host.size():
                write_home(copy.host.data, copy.twin.data)  # the user wrote to the copy
                self.num_copied_back += 1
            else:
                if copy.twin.size() != copy.host.size() or copy.twin.stride() != copy.host.stride():
                    copy.twin.data = self._like(copy.host.data)
                self._copy_in(copy.twin.data, copy.host.data)
                if copy.stamp is not None and copy.stamp[1] != copy.host._version:
                    torch.autograd.graph.increment_version(copy.twin)  # an old graph must raise, as it does without us
            copy.stamp, copy.twin_version = self._stamp(copy.host), copy.twin._version

    def _like(self, host: Tensor) -> Tensor:
        dtype = self._wire.dtype_of(host)
        return torch.empty_strided(host.size(), host.stride(), dtype=dtype, device=self._device)

    def _copy_in(self, target: Tensor, source: Tensor) -> None:
        with raw_tensors():
            label = Label("P", -1, "anchors")
            source = self._wire.converted(source)
            arrival = self._lanes.h2d([Copy(target, source)], after=[self._lanes.compute_event()], label=label)
            self._lanes.compute_waits(arrival, -1)
            self.last_copy = arrival

    # -- buffers

    def bind_buffers(self, modules: Iterable[nn.Module]) -> list[BoundBuffer]:
        """Put device copies of the modules' host buffers in their place."""
        bound: list[BoundBuffer] = []
        if not self.have_copies:
            return bound
        for module in modules:
            for name, buffer in module._buffers.items():
                if buffer is not None and self._needs_copy(buffer):
                    copy = self._buffer(buffer)
                    module._buffers[name] = copy.twin
                    bound.append(BoundBuffer(module, name, copy))
        return bound

    def unbind_buffers(self, bound: list[BoundBuffer]) -> None:
        """Put the host buffers back; values that a training call changed go home at the next flush."""
        for module, name, copy in ((b.module, b.name, b.copy) for b in bound):
            held = module._buffers.get(name)
            if held is copy.twin:
                # BatchNorm's kernels change running statistics without touching the version.
                copy.is_dirty |= module.training or copy.twin._version != copy.twin_version
                module._buffers[name] = copy.host
            elif isinstance(held, Tensor):
                module._buffers[name] = held.to("cpu")

    def flush_buffers(self) -> None:
        """Bring changed buffers home."""
        for copy in self._buffers.values():
            if copy.is_dirty:
                with raw_tensors():
                    write_home(copy.host.data, copy.twin)  # not a write by the user: its version stays
                copy.is_dirty, copy.host_version, copy.twin_version = False, copy.host._version, copy.twin._version

    def buffer_twin(self, buffer: Tensor) -> Tensor:
        """The device copy of a host buffer, up to date; itself, if the device can use it as it is."""
        return self._buffer(buffer).twin if self._needs_copy(buffer) else buffer

    def host_buffer(self, held: Tensor | None) -> Tensor | None:
        """The host buffer whose device copy a tensor is; any other tensor itself."""
        return next((copy.host for copy in self._buffers.values() if copy.twin is held), held)

    def _needs_copy(self, buffer: Tensor) -> bool:
        return buffer.device.type == "cpu" and (self.is_separate or self._wire.casts(buffer))

    def _buffer(self, buffer: Tensor) -> _BufferTwin:
        copy, dtype = self._buffers.get(id(buffer)), self._wire.dtype_of(buffer)
        with raw_tensors():
            if copy is None or copy.twin.size() != buffer.size() or copy.twin.dtype != dtype:
                twin = buffer.to(self._device, dtype, copy=True)
                copy = self._buffers[id(buffer)] = _BufferTwin(buffer, twin, buffer._version, twin._version)
            elif copy.host_version != buffer._version and not copy.is_dirty:
                copy.twin.copy_(buffer)
                copy.host_version, copy.twin_version = buffer._version, copy.twin._version
        return copy

    def close(self) -> None:
        """Bring buffers home and drop all copies; graphs that still hold a twin keep a one-element tensor."""
        self.flush_buffers()
        for copy in self._twins.values():
            release_memory(copy.twin, copy.host.size())
        self._twins.clear()
        self._host_of.clear()
        self._buffers.clear()
