"""Gradients go home: each twin's gradient leaves the device as soon as it is final, and adds to the host's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_superpipe.engine.arrivals import Arrivals, drop
from lightning_superpipe.engine.casting import add_into, cast_into
from lightning_superpipe.engine.homes import Homes
from lightning_superpipe.engine.host_lane import HostLane, Past
from lightning_superpipe.engine.landings import Landings
from lightning_superpipe.engine.lanes import Copy, Event, Label, Lanes, now
from lightning_superpipe.observe.trace import Lane
from lightning_superpipe.tiers import Tier

__all__ = ["GradientReturn", "accumulate"]


class _Shipment(NamedTuple):
    """One gradient on its way: from the device, into memory on the host, to its parameter.

    Attributes:
        target: where its copy goes: where it stays (``home``), or where it lands (``landing``) to be cast or added.
    """

    parameter: nn.Parameter
    gradient: Tensor
    home: Tensor | None = None
    landing: Tensor | None = None

    @property
    def target(self) -> Tensor:
        if self.landing is not None:
            return self.landing
        assert self.home is not None, "a gradient goes somewhere"
        return self.home


class GradientReturn:
    """Moves gradients from twins to host parameters, in the order in which autograd finishes them.

    The gradients of one unit travel together: a copy and a hand-over between threads per tensor would cost more than
    the bytes of a small one.

    Args:
        limit_bytes: gradients waiting on the device for their copy; above it backward waits for the oldest.
        tier: gives the host memory that gradients live in.
        pin: page-lock what gradients land in.

    Attributes:
        on_handed_over: called with each gradient that came home without a copy, for those who measure.
        on_leaving: called with each gradient whose copy home is about to start, for those who measure.
        on_home: called with a unit, some of its parameters and the event after which their gradients are complete.
        may_lend: says whether the gradients of a unit will be used up soon, so that their memory is only lent.
        homes: the memory of gradients.
        arrivals: what waits for an optimizer, so that clipping is hidden.
    """

    def __init__(self, lanes: Lanes, tier: Tier, *, limit_bytes: int, pin: bool) -> None:
        self._lanes = lanes
        self._host = HostLane()
        self._home_tier = tier.part("gradients")
        self.homes = Homes(self._home_tier)
        self.arrivals = Arrivals()
        # Autograd's own memory would hold what belongs into files.
        self._hands_over = lanes.shares_memory and self._home_tier.is_memory
        self._landings = Landings(tier.part("wire", pin=pin))
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._shipped: set[int] = set()
        self._batch: list[_Shipment] = []
        self._batch_label: Label | None = None
        self.on_handed_over: Callable[[Tensor], None] | None = None
        self.on_leaving: Callable[[Tensor], None] | None = None
        self.in_flight_bytes = 0
        self.peak_in_flight_bytes = 0
        self.on_home: Callable[[int, list[nn.Parameter], Event], None] | None = None
        self.may_lend: Callable[[int], bool] | None = None

    def add_group(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let the gradients of these parameters share one slab, taken when the first of them arrives."""
        self.homes.add_group(parameters)

    def ship(self, parameter: nn.Parameter, gradient: Tensor, label: Label) -> None:
        """Send one final gradient home, with others of its unit; see :meth:`flush` and :meth:`finish`.

        Gradients that user code must see at once (tensor hooks, ``create_graph``) and those that no lane can carry
        (sparse) are waited for.
        """
        if _needs_care(parameter, gradient):
            self.finish()
            accumulate(parameter, gradient.to(parameter.device, parameter.dtype))
            return
        if self._batch_label != label:
            self.flush()
        if self._hands_over:
            self._hand_over(parameter, gradient, label)
            return
        self._make_room(gradient.nbytes)
        is_first = parameter.grad is None and id(parameter) not in self._shipped
        home = self._home_for(parameter, gradient, label) if is_first else None
        lands = home is None or home.dtype is not gradient.dtype
        self._shipped.add(id(parameter))
        self._count(gradient.nbytes)
        self._batch.append(_Shipment(parameter, gradient, home, self._landings.take(gradient) if lands else None))
        self._batch_label = label

    def _home_for(self, parameter: nn.Parameter, gradient: Tensor, label: Label) -> Tensor:
        lent = None
        if self.may_lend is not None and (self.homes.has_loan(label.unit) or self.may_lend(label.unit)):
            lent = self.homes.lend(label.unit, parameter, gradient)
        home = self.homes.claim(parameter, gradient) if lent is None else lent
        drop(home)  # whatever was to be done to last step's
        return home

    def flush(self) -> None:
        """Start the copies of all gradients shipped so far: their unit has finished its backward."""
        batch, label = self._batch, self._batch_label
        if label is None:
            return
        self._batch, self._batch_label = [], None
        parameters = [shipment.parameter for shipment in batch]
        if self._hands_over:
            del batch  # who is told finds gradients that nobody else holds
            self._lanes.hand_over(Lane.D2H, self.in_flight_bytes, label=label)
            self._count(-self.in_flight_bytes)
            self._tell_handed_over(parameters)
            self._tell(label, parameters, Past())
            return
        if self.on_leaving is not None:
            for shipment in batch:
                self.on_leaving(shipment.gradient)
        copies = [Copy(shipment.target, shipment.gradient) for shipment in batch]
        done = self._lanes.d2h(copies, after=[self._lanes.compute_event()], label=label)
        # The job holds the device gradients until their copies are done: autograd may reuse the memory after that only
        # (test_gradient_is_held_until_its_copy_is_done).
        landed = self._host.submit(partial(self._publish, batch, label), after=done)
        del batch
        self._tell(label, parameters, landed)

    def _tell(self, label: Label, parameters: list[nn.Parameter], landed: Event) -> None:
        if self.on_home is not None:
            self.on_home(label.unit, parameters, landed)

    def finish(self) -> None:
        """Block until every gradient shipped so far is complete on the host.

        Raises:
            TransferError: a copy failed.
        """
        self.flush()
        try:
            self._host.wait()
        finally:
            self._shipped.clear()
            self.in_flight_bytes = 0  # also where a copy failed and nothing was published

    def _hand_over(self, parameter: nn.Parameter, gradient: Tensor, label: Label) -> None:
        """Do what autograd does without us; a second copy in the same memory would only cost time."""
        accumulate(parameter, gradient.to(parameter.dtype))
        self._batch_label = label
        self._batch.append(_Shipment(parameter, gradient))
        self._count(gradient.nbytes)

    def _tell_handed_over(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            if self.on_handed_over is not None and parameter.grad is not None:
                self.on_handed_over(parameter.grad)

    def _publish(self, batch: Sequence[_Shipment], label: Label) -> None:
        start = now()
        num_bytes = 0
        with torch.no_grad():
            for shipment in batch:
                num_bytes += shipment.gradient.nbytes
                _deliver(shipment)
                if self.on_home is None:
                    self.arrivals.note(shipment.parameter)
                if shipment.landing is not None:
                    self._landings.give_back(shipment.landing)
        self._count(-num_bytes)
        if not self._home_tier.is_memory:
            self._home_tier.note_written(sum(each.numel() * each.itemsize for each, *_ in batch))
        if self._lanes.recorder is not None:
            self._lanes.recorder.span(Lane.HOST, label.name, label.unit, start, now(), num_bytes)

    def _make_room(self, num_bytes: int) -> None:
        def has_room() -> bool:
            return not self.in_flight_bytes or self.in_flight_bytes + num_bytes <= self._limit_bytes

        if not has_room():
            self.flush()
            self._host.wait(has_room)

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self.in_flight_bytes += num_bytes
            self.peak_in_flight_bytes = max(self.peak_in_flight_bytes, self.in_flight_bytes)

    def close(self) -> None:
        """Finish what is under way and give the memory back; errors are dropped."""
        self.flush()
        self._host.close()
        self.homes.clear()
        self._landings.clear()


def _deliver(shipment: _Shipment) -> None:
    """Give a landed gradient to its parameter, in the parameter's dtype."""
    parameter, arrived = shipment.parameter, shipment.target
    if parameter.grad is not None and parameter.grad.dtype is arrived.dtype:
        parameter.grad.add_(arrived)
    elif parameter.grad is not None:
        add_into(parameter.grad, arrived)
    elif shipment.landing is None:
        parameter.grad = shipment.home
    else:
        home = shipment.home
        if home is None:  # the user has dropped the one that this should have been added to
            home = torch.empty_strided(arrived.size(), arrived.stride(), dtype=parameter.dtype)
        cast_into(home, arrived)
        parameter.grad = home


def accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Do to a host parameter what autograd's AccumulateGrad would do, its hooks included."""
    for hook in _hooks(parameter, "_backward_hooks"):
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    if parameter.grad is None:
        parameter.grad = gradient if gradient.requires_grad else gradient.detach()
    elif parameter.grad.is_sparse and not gradient.is_sparse:
        parameter.grad = gradient + parameter.grad  # torch adds sparse to dense, not dense to sparse
    elif torch.is_grad_enabled() or parameter.grad.is_sparse or gradient.is_sparse:
        parameter.grad = parameter.grad + gradient
    else:
        parameter.grad.add_(gradient)
    for hook in _hooks(parameter, "_post_accumulate_grad_hooks"):
        hook(parameter)


def _hooks(parameter: nn.Parameter, name: str) -> list[Callable[..., Any]]:
    return list((getattr(parameter, name, None) or {}).values())


def _needs_care(parameter: nn.Parameter, gradient: Tensor) -> bool:
    return (
        gradient.layout is not torch.strided
        or gradient.requires_grad
        or type(gradient) is not Tensor
        or not gradient.numel()
        or (parameter.grad is not None and (parameter.grad.is_sparse or parameter.grad.requires_grad))
        or bool(_hooks(parameter, "_backward_hooks"))
        or bool(_hooks(parameter, "_post_accumulate_grad_hooks"))
    )
