"""What a training step changes beside weights, so that a step that failed can be as if it had not been."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_superpipe.engine.shortage import OutOfDeviceMemory

__all__ = ["Attempts", "OutOfDeviceMemory", "Rewind", "Undone", "let_go_of_memory"]


class Undone(NamedTuple):
    """How far the state before a step could be had back.

    Attributes:
        updated: names of units that had been updated already, in backward.
        had_gradients: there were gradients before its backward, which they have been added to since.
    """

    updated: Sequence[str]
    had_gradients: bool

    @property
    def is_repeatable(self) -> bool:
        """Whether the step can be run again as if nothing had happened."""
        return not self.updated and not self.had_gradients

    def require_repeatable(self, reason: str) -> None:
        """Raise unless the step can be run again as if nothing had happened.

        Raises:
            OutOfDeviceMemory: it cannot; says why, and what to do.
        """
        advice = "Take a smaller batch, or allow less on the device: a smaller k or resident, activations='recompute'."
        if self.updated:
            raise OutOfDeviceMemory(
                f"the device ran out of memory in backward: {reason} {len(self.updated)} units had been updated by "
                f"then ({self.updated[0]!r} first), so the step cannot be repeated, and weights are not those of a "
                f"finished step: go on from the last checkpoint. {advice} With update='after_backward' it could have "
                "been."
            )
        if self.had_gradients:
            raise OutOfDeviceMemory(
                f"the device ran out of memory in backward: {reason} Gradients of earlier batches had been there, and "
                "some have been added to, so the step cannot be repeated exactly. Weights, buffers and random numbers "
                f"are those of the last finished step, gradients are gone. {advice}"
            )


class Rewind:
    """The state of a module and of all generators of random numbers before a step.

    Attributes:
        has_backward_begun: since then.
        had_gradients: there were some when it began, to which it has added.

    Cost: a copy of the module's buffers.
    """

    def __init__(self, root: nn.Module, device: torch.device) -> None:
        self._device = device
        self._trained = [parameter for parameter in root.parameters() if parameter.requires_grad]
        self._buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in root.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._host, self._python = torch.get_rng_state(), random.getstate()
        self._on_device = _device_module(device).get_rng_state(device) if _draws(device) else None
        numpy = sys.modules.get("numpy")
        self._numpy: Any = None if numpy is None else numpy.random.get_state()
        self.has_backward_begun = self.had_gradients = False

    def note_backward(self) -> None:
        """A backward pass begins."""
        if not self.has_backward_begun:
            self.has_backward_begun = True
            self.had_gradients = any(parameter.grad is not None for parameter in self._trained)

    @property
    def is_past(self) -> bool:
        """Whether a backward pass has begun since, and all its gradients have been given up."""
        return self.has_backward_begun and all(parameter.grad is None for parameter in self._trained)

    def restore(self) -> None:
        """Put all back; gradients that a backward pass has touched are gone, as ``zero_grad`` leaves them."""
        torch.set_rng_state(self._host)
        random.setstate(self._python)
        if self._on_device is not None:
            _device_module(self._device).set_rng_state(self._on_device, self._device)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        with torch.inference_mode(False), torch.no_grad():
            for module, name, buffer, value in self._buffers:
                module._buffers[name] = buffer
                if buffer.size() == value.size():
                    buffer.copy_(value)
                else:
                    buffer.data = value.clone()
        if self.has_backward_begun:
            for parameter in self._trained:
                parameter.grad = None


class Attempts:
    """What was before the forward and the backward that run now, and before the whole step that they are part of."""

    def __init__(self, root: nn.Module, device: torch.device) -> None:
        self._root, self._device = root, device
        self._now: Rewind | None = None
        self._last_finished: Rewind | None = None

    def begin(self) -> None:
        """A forward and a backward begin that may have to be undone."""
        if self._last_finished is not None and self._last_finished.is_past:
            self._last_finished = None
        self._now = Rewind(self._root, self._device)
        self._last_finished = self._last_finished or self._now

    @property
    def is_open(self) -> bool:
        """Whether something has begun that is not over."""
        return self._now is not None

    def end(self) -> None:
        """A whole step is over."""
        self._now = self._last_finished = None

    def note_backward(self) -> None:
        """A backward pass begins."""
        for rewind in (self._now, self._last_finished):
            if rewind is not None:
                rewind.note_backward()

    def restore(self, updated: Sequence[str], *, whole_step: bool) -> Undone:
        """Put back what was before, and say how far that went.

        Args:
            updated: names of units that have been updated since.
            whole_step: undo the batches accumulated before as well; done too where this one cannot be repeated.
        """
        undone = Undone(updated, had_gradients=self._now is None or self._now.had_gradients)
        rewind = self._last_finished if whole_step or not undone.is_repeatable else self._now
        if rewind is not None:
            rewind.restore()
        self.end()
        let_go_of_memory(self._device)
        return undone


def let_go_of_memory(device: torch.device) -> None:
    """Give what is held for nothing back to the device."""
    gc.collect()
    if device.type != "cpu" and hasattr(_device_module(device), "empty_cache"):
        _device_module(device).empty_cache()


def _device_module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _draws(device: torch.device) -> bool:
    """Whether a device has a generator of its own."""
    return device.type != "cpu" and hasattr(_device_module(device), "get_rng_state")
