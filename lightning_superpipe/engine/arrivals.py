"""Gradients that have come home and wait for their optimizer: clipping need not read or write them.

``clip_grad_norm_`` reads every gradient for its norm and writes every gradient to scale it, between backward and the
first update, where nothing hides it. Here the thread that brings a gradient home takes its norm, under the backward
pass; ``clip_grad_norm_`` gets that number, and its factor is multiplied in just before the gradient is used. Until then
the gradient is an instance of a subclass, which multiplies before anybody else looks
(:mod:`lightning_superpipe.engine.pending` fences updates in the same way). Numbers are the same to the bit: the
same kernels run on the same tensors, at other times.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_superpipe.engine.pending import Fence, fence_as, unfenced
from lightning_superpipe.errors import SuperpipeError

__all__ = ["Arrivals", "Scaling", "complete_all", "drop", "take"]

_PATIENCE = 3
"""Steps without a question for norms after which gradients are left alone."""


@dataclass
class _Arrival:
    """What is known of a waiting gradient.

    Attributes:
        norm: of the values at ``version``; None where nobody took it.
        factor: what the values are still to be multiplied by.
    """

    owner: Arrivals
    version: int
    norm: Tensor | None
    factor: Tensor | None = None


class Scaling(NamedTuple):
    """A multiplication that a gradient of this version still needs."""

    gradient: Tensor
    factor: Tensor
    version: int

    def run(self) -> None:
        """Multiply.

        Raises:
            SuperpipeError: somebody has written to the gradient since clipping, unseen.
        """
        with unfenced(), torch.no_grad():
            if self.gradient._version != self.version:
                raise SuperpipeError(
                    f"a gradient of {self.gradient.numel()} elements was written to between clipping and the "
                    "optimizer's step by code that torch does not announce (a backward pass outside the model, an "
                    "extension), so that it cannot be clipped as asked: call the step before that, or clip afterwards."
                )
            if self.factor.item() != 1.0:  # 1 changes no bit
                self.gradient.mul_(self.factor)


class Arrivals:
    """Lets gradients wait for an optimizer whose steps are run in parts; all others it leaves alone.

    Attributes:
        num_norms: those that clipping got without a look at the gradient.
    """

    def __init__(self) -> None:
        self._expected = WeakIdKeyDictionary()  # of parameters
        self._order: float | None = None
        self._is_asked = False
        self._patience = 0
        self.num_norms = 0

    def expect(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let gradients of these parameters wait: parts of steps will take them."""
        self._expected.update((parameter, None) for parameter in parameters)
        self._patience = _PATIENCE

    def forget(self) -> None:
        """Expect nothing any more; what waits is ordinary again."""
        complete_all(parameter.grad for parameter in self._expected)
        self._expected.clear()

    def note(self, parameter: nn.Parameter) -> None:
        """A gradient is complete, as far as anybody knows: it waits, and its norm is taken if clipping asks for it."""
        gradient = parameter.grad
        if not self._patience or parameter not in self._expected or type(gradient) is not Tensor:
            return
        norm = None if self._order is None else torch.linalg.vector_norm(gradient, self._order)
        waiting: Any = gradient
        waiting._arrival = _Arrival(self, gradient._version, norm)
        waiting.__class__ = _Waiting

    def norm_of(self, gradient: Tensor, arrival: _Arrival, order: float) -> Tensor | None:
        """Clipping asks for a norm; None if it is not known."""
        self._is_asked, is_known = True, arrival.norm is not None and self._order == order
        self._order = order
        if not is_known or arrival.factor is not None or arrival.version != gradient._version:
            return None
        assert arrival.norm is not None
        self.num_norms += 1
        return arrival.norm.clone()

    def end_step(self) -> None:
        """All gradients of a step have been taken."""
        self._patience = _PATIENCE if self._is_asked else max(0, self._patience - 1)
        if not self._is_asked:
            self._order = None
        self._is_asked = False


def take(gradients: Sequence[Tensor | None]) -> list[Scaling]:
    """The caller uses gradients, and multiplies them itself before it does; nobody else can look meanwhile."""
    with _lock:
        scalings = [_part_with(each) for each in gradients if each is not None]
    return [each for each in scalings if each is not None]


def complete(tensor: Tensor | None) -> None:
    """Let a tensor, if it is a waiting gradient, be an ordinary one with all that was done to it."""
    if type(tensor) is _Waiting:
        with _lock:
            if (scaling := _part_with(tensor)) is not None:
                scaling.run()
            drop(tensor)


def complete_all(tensors: Iterable[Tensor | None]) -> None:
    """Let all of these be ordinary tensors that are not yet."""
    for tensor in tensors:
        complete(tensor)


def drop(tensor: Tensor) -> None:
    """Let a tensor be an ordinary one, whatever was to be done to it: its values are no longer needed."""
    tensor.__dict__.pop("_arrival", None)
    if type(tensor) is _Waiting:
        tensor.__class__ = Tensor  # type: ignore[assignment]


def _part_with(gradient: Tensor) -> Scaling | None:
    """Forget what is known of a gradient; return what is still to be done to it."""
    arrival: _Arrival | None = gradient.__dict__.pop("_arrival", None)
    return None if arrival is None or arrival.factor is None else Scaling(gradient, arrival.factor, arrival.version)


class _Waiting(Fence):
    """A gradient that waits for its optimizer."""

    def settle(self) -> None:
        """Multiply, if that is still to be done."""
        complete(self)

    @classmethod
    def answer(cls, func: Any, args: tuple[Any, ...]) -> Tensor | None:
        """Answer the two questions of clipping without touching the gradient; None for any other."""
        if len(args) != 2 or type(args[0]) is not _Waiting:
            return None
        gradient: Tensor = args[0]
        other: Any = args[1]
        with _lock, unfenced():
            arrival: _Arrival | None = gradient.__dict__.get("_arrival")
            if arrival is None:
                return None
            if func is torch.linalg.vector_norm and type(other) is float:
                return arrival.owner.norm_of(gradient, arrival, other)
            if func is Tensor.mul_ and _is_factor(other, gradient) and arrival.factor is None:
                arrival.factor, arrival.version = other.clone(), gradient._version
                return gradient
        return None


def _is_factor(tensor: Any, gradient: Tensor) -> bool:
    """Whether a tensor is a number, as the factor of clipping is."""
    is_number = type(tensor) is Tensor and tensor.dim() == 0 and not tensor.requires_grad
    return is_number and tensor.dtype is gradient.dtype and tensor.device == gradient.device


_lock = threading.RLock()
fence_as(_Waiting, like=Tensor)
