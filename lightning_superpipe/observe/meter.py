"""Device bytes by kind while a step runs: from the allocator where it keeps counts, else counted by operation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from lightning_superpipe.observe.live_bytes import LiveBytes
from lightning_superpipe.observe.report import PeakBytes
from lightning_superpipe.observe.trace import Recorder

__all__ = ["Boundary", "Meter"]


class Boundary(NamedTuple):
    """What the device held, beside slots, anchors and gradients on their way, when some compute was over.

    Attributes:
        name: ``"F"`` or ``"B"`` of a unit, ``"turn"`` where backward begins, ``"home"`` where it ends, else empty.
        unit: its index; -1 where there is none.
        peak_bytes: the most since the boundary before; gradients of the unit itself count where the device's allocator
            does not keep the counts.
        held_bytes: now.
        unfreed_bytes: as ``peak_bytes``, if nothing that autograd holds had been let go since the boundary before; the
            same as ``peak_bytes`` where the device's allocator keeps the counts.
    """

    name: str
    unit: int
    peak_bytes: int
    held_bytes: int
    unfreed_bytes: int = 0


class Meter:
    """Finds the peak, and feeds the memory curve of a recorded step.

    Args:
        device: whose memory is measured.
        static: returns (slots, anchors) in bytes as they are now.
        gradients: returns the bytes of gradients waiting on the device.

    Attributes:
        peak: the most so far.
        step_peak: the most since somebody set it to nothing.
        trail: where each look is noted; None notes none.
    """

    def __init__(
        self, device: torch.device, static: Callable[[], tuple[int, int]], gradients: Callable[[], int]
    ) -> None:
        self._device, self._static, self._gradients = device, static, gradients
        self._live: LiveBytes | None = None
        self._allocator = _allocator_of(device)
        self._base = self._allocator.memory_allocated(device) if self._allocator else 0
        self.peak = self.step_peak = PeakBytes()
        self.recorder: Recorder | None = None
        self.trail: list[Boundary] | None = None
        if self._allocator:
            self._allocator.reset_peak_memory_stats(device)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what operations create inside (devices without an allocator's counts only). Enter it per scope."""
        if self._allocator is not None:
            yield
            return
        if self._live is None:
            self._live = LiveBytes(self._device.type)
        with self._live:
            yield
        self.sample()

    @property
    def sees_all(self) -> bool:
        """Whether the device keeps counts itself, so that nothing is left out, wherever it is allocated."""
        return self._allocator is not None

    def follow(self, outputs: Any, since: int) -> None:
        """Count in the backward pass of these outputs as well, see :meth:`LiveBytes.follow`."""
        if self._live is not None:
            self._live.follow(outputs, since)

    def leave_out(self, tensor: torch.Tensor) -> None:
        """A tensor has become the host's, in the same memory: it is no longer the device's."""
        if self._live is not None:
            self._live.leave_out(tensor)

    def set_apart(self, tensor: torch.Tensor) -> None:
        """A gradient is on its way home: it is no part of what compute takes."""
        if self._live is not None:
            self._live.set_apart(tensor)

    def note_saved(self, tensor: torch.Tensor) -> None:
        """Autograd holds a tensor from now on, which may have to stay beyond its use."""
        if self._live is not None:
            self._live.note_saved(tensor)

    def counts(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's memory is part of what is measured."""
        return self._live is None or self._live.counts(tensor)

    def sample(self, name: str = "", unit: int = -1) -> None:
        """Look at the memory now, when the compute of that name and unit is over."""
        slots, anchors = self._static()
        gradients = self._gradients()
        peak_of_rest, rest = self._rest(slots, anchors, gradients)
        peak = PeakBytes(slots, anchors, gradients, max(0, peak_of_rest))
        self.peak = max(self.peak, peak, key=lambda each: each.total)
        self.step_peak = max(self.step_peak, peak, key=lambda each: each.total)
        if self.trail is not None:
            most, now_held = (peak_of_rest, rest) if self._live is None else self._live.take_recent_rest()
            unfreed = most if self._live is None else self._live.take_recent_unfreed()
            self.trail.append(Boundary(name, unit, max(0, most), max(0, now_held), max(0, unfreed)))
        if self.recorder is not None:
            now = self.recorder.now()
            for activations in (peak_of_rest, rest):  # first the spike since the last look
                self.recorder.sample(now, slots, anchors, gradients, max(0, activations))

    def _rest(self, slots: int, anchors: int, gradients: int) -> tuple[int, int]:
        """Bytes that are neither slots nor anchors nor waiting gradients: the most since the last look, and now."""
        known = slots + anchors + gradients
        if self._allocator is not None:
            most = self._allocator.max_memory_allocated(self._device) - self._base - known
            if self.trail is not None:
                self._allocator.reset_peak_memory_stats(self._device)
            return most, self._allocator.memory_allocated(self._device) - self._base - known
        if self._live is None:
            return 0, 0
        return self._live.take_recent_peak() - gradients, self._live.current_bytes - gradients


def _allocator_of(device: torch.device) -> Any:
    """The device's module if its allocator keeps counts; None otherwise."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    return module if hasattr(module, "max_memory_allocated") else None
