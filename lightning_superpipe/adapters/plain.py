"""``attach(model, optimizer, k=2)``: any loop in plain PyTorch streams; ``close()`` gives everything back."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_superpipe.adapters.checks import remarks
from lightning_superpipe.adapters.materialize import refuse_meta
from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.errors import SuperpipeWarning
from lightning_superpipe.moving import bring_home
from lightning_superpipe.observe.identity import default_device
from lightning_superpipe.observe.report import Report
from lightning_superpipe.observe.trace import Recording
from lightning_superpipe.observe.unit_profile import UnitProfile
from lightning_superpipe.session import (
    FusedChoice,
    OutOfDeviceMemory,
    Session,
    UnitTable,
    sparsely_differentiated,
    wants_fused,
)

__all__ = ["Pipe", "attach"]


class Pipe:
    """A model that streams while somebody's loop calls it; made by :func:`attach`.

    Each call of the model is a step, and so is each call of its ``generate``. Parameters, gradients and optimizer
    states are on the host all the time, or up to the step before which the run steps aside, where ``step_aside=True``
    allows that; inputs belong on :attr:`device`, where outputs are.

    Attributes:
        model: the module that was given.
        device: where it computes.
    """

    def __init__(
        self, model: nn.Module, optimizers: tuple[Optimizer, ...], config: SuperpipeConfig, device: torch.device
    ) -> None:
        self.model, self.device, self._optimizers = model, device, optimizers
        refuse_meta(model)
        bring_home(model, optimizers)
        self._session = Session(model, config, device, trains=True, owns_root=True, optimizers=optimizers)
        self._fused = FusedChoice()
        self._session.on_aside = self._fused.give_back
        try:
            self._session.attend(optimizers)
        except BaseException:
            self._session.close()
            raise
        for optimizer in optimizers if wants_fused(config.fused_optimizer, device, scales=False) else ():
            self._fused.choose(optimizer, sparse=sparsely_differentiated(model))
        for remark in remarks(self._session):
            warnings.warn(remark, SuperpipeWarning, stacklevel=3)

    @property
    def units(self) -> UnitTable:
        """Units and anchors of the model, as a table that prints."""
        return self._session.units

    @property
    def recording(self) -> Recording | None:
        """The step that ``record_step`` named; None before it is over."""
        return self._session.recording

    def updating(self, optimizer: Optimizer) -> AbstractContextManager[None]:
        """Scope of a backward pass and the step after it, a promise that nobody looks at gradients in between.

        Each unit is then updated as soon as its gradients are home, beside the rest of backward, to the same bits::

            with pipe.updating(optimizer):
                loss.backward()
                optimizer.step()

        Clipping, scaling and accumulating look at gradients, or add to them: leave the scope out there. It does nothing
        for optimizers that cannot be split, and for ``update="at_once"``.

        Raises:
            SuperpipeError: from the backward pass, where a unit gets gradients twice before one step.
        """
        return self._session.updating_in_backward(optimizer, lends=False)

    def report(self) -> Report:
        """What streaming cost and saved so far, or until :meth:`close`."""
        return self._session.report()

    def unit_profile(self) -> UnitProfile | None:
        """What the first steps took, by unit, as far as predictions need it; None before six steps."""
        return self._session.unit_profile()

    def close(self) -> None:
        """Give the model back as it was, on the host, with its current weights. Closing twice does no harm."""
        try:
            self._session.close()
        finally:
            self._fused.give_back()
            bring_home(self.model, self._optimizers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_own = kind is torch.OutOfMemoryError and self._session.streams(self.model)  # of the loop's own
        said = self._session.guard.refuse(str(error)) if is_own else ""
        self.close()
        if said:
            raise OutOfDeviceMemory(said) from error


def attach(
    model: nn.Module,
    *optimizers: Optimizer,
    device: torch.device | str | None = None,
    config: SuperpipeConfig | None = None,
    **options: Any,
) -> Pipe:
    """Stream a model through a window of units; the loop that calls it stays as it is.

    ::

        with attach(model, optimizer, k=4, k_prime=2) as pipe:
            for x, y in batches:
                loss = loss_of(model(x.to(pipe.device)), y.to(pipe.device))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            print(pipe.report())

    Args:
        model: what the loop calls. Whatever of it is on a device is brought to the host.
        optimizers: of its parameters; may be left out, the update runs on the host anyway.
        device: where to compute; None takes the machine's accelerator, or the CPU, which emulates one.
        config: all options at once; or give them one by one as ``options``.
        options: fields of :class:`~lightning_superpipe.SuperpipeConfig`, such as ``k=4, k_prime=2``.

    Raises:
        ConfigError: an option is unknown or impossible.
        PartitionError, UnsupportedError: the model cannot be streamed, or not as asked.
        BudgetError: the window does not fit ``device_memory``, or the training the host.
    """
    chosen = SuperpipeConfig.from_options(**options) if config is None else config
    return Pipe(model, optimizers, chosen, default_device() if device is None else torch.device(device))
