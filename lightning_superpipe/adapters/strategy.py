"""What the strategies of all Lightning namespaces share: it imports none of them.

``lightning`` and ``pytorch_lightning`` are complete copies of each other with classes of their own, so each gets a thin
class made of this mixin and its own ``SingleDeviceStrategy``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_superpipe.adapters.checkpoint import own_memory
from lightning_superpipe.adapters.checks import (
    holds_copies,
    refuse_foreign,
    remarks,
    runs_undisturbed,
    turns_undisturbed,
)
from lightning_superpipe.adapters.devices import HOST, OneDeviceMixin
from lightning_superpipe.adapters.gradient_readers import gradient_readers, refuse_in_backward
from lightning_superpipe.adapters.materialize import materialize
from lightning_superpipe.adapters.ordinary import OrdinarySteps, ordinary_steps
from lightning_superpipe.adapters.repeat import LightningNotes, repeated_if_too_large
from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.moving import bring_home
from lightning_superpipe.observe.report import Report
from lightning_superpipe.observe.trace import Recording
from lightning_superpipe.observe.unit_profile import UnitProfile
from lightning_superpipe.session import FusedChoice, Session, UnitTable, sparsely_differentiated, wants_fused

__all__ = ["SuperpipeMixin"]


class SuperpipeMixin(OneDeviceMixin):
    """A single-device strategy that streams the module.

    Everything of the trainer's stays: the module's parameters, gradients and optimizer states are ordinary tensors on
    the host (or on the device, once the run has stepped aside), so checkpoints, clipping, schedulers, callbacks and
    loggers need no support here.

    Args:
        config: all options at once; or give them one by one as ``options``.
        options: fields of :class:`~lightning_superpipe.SuperpipeConfig`, such as ``k=4, k_prime=2``.
    """

    strategy_name = "superpipe"
    _checkpoint_io: Any
    _checkpoint_io_class: ClassVar[Callable[[], Any]]
    _set_device: ClassVar[Callable[..., None]]
    _tell: ClassVar[Callable[[str], None]]

    def __init__(
        self,
        *,
        config: SuperpipeConfig | None = None,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        **options: Any,
    ) -> None:
        self.config = _merged(config, options)
        super().__init__(HOST, accelerator, checkpoint_io, precision_plugin)
        self._asked_devices = parallel_devices
        self._session: Session | None = None
        self._last_session: Session | None = None
        self._ordinary: OrdinarySteps | None = None
        self._fused = FusedChoice()
        self._said: set[str] = set()
        self._updates_in_backward = False

    # -- what users ask

    @property
    def units(self) -> UnitTable:
        """Units and anchors of the module, as a table that prints.

        Raises:
            SuperpipeError: the strategy has not seen a module yet.
        """
        return self._any_session().units

    def report(self) -> Report:
        """What streaming cost and saved, so far or in the last run.

        Raises:
            SuperpipeError: nothing has run yet.
        """
        return self._any_session().report()

    def unit_profile(self) -> UnitProfile | None:
        """What the first training steps took, by unit, as far as predictions need it; None before six steps."""
        return self._any_session().unit_profile()

    @property
    def recording(self) -> Recording | None:
        """The step that ``record_step`` named; None before it is over."""
        return self._any_session().recording

    def _any_session(self) -> Session:
        session = self._session or self._last_session
        if session is None:
            raise SuperpipeError("nothing has run yet: call trainer.fit, validate, test or predict first.")
        return session

    def _say(self, message: str) -> None:
        """Tell the user something, once."""
        if message not in self._said:
            self._said.add(message)
            type(self)._tell(message)

    # -- life cycle

    def setup(self, trainer: Any) -> None:
        refuse_foreign(trainer)
        with self._at_home():
            super().setup(trainer)
        if trainer.training:  # otherwise the optimizers are those of an earlier fit
            self._choose_update(trainer)
            self._choose_fused()

    def _choose_update(self, trainer: Any) -> None:
        self._require_session().attend(self.optimizers)
        readers = list(gradient_readers(trainer))
        refuse_in_backward(self.config.update, readers)
        self._updates_in_backward = self.config.update in ("auto", "in_backward") and not readers

    def model_to_device(self) -> None:
        """Let the module know where it computes; its parameters stay on the host."""
        assert self.model is not None, "the trainer connects a module before setup"
        type(self)._set_device(self.model, device=self.compute_device)
        for module in self.model.modules():
            if any(base.__module__.startswith("torchmetrics.") for base in type(module).__mro__):
                module.to(self.compute_device)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        self._close()
        materialize(model)
        trainer = getattr(self.lightning_module, "_trainer", None)
        trains = trainer is None or bool(trainer.training)
        session = self._open(model, self.config, trains=trains)
        if remark := "; ".join(remarks(session)):
            self._say(f"superpipe: {remark}.")
        return model

    def _open(self, model: nn.Module, config: SuperpipeConfig, *, trains: bool) -> Session:
        self._session = Session(model, config, self.compute_device, trains=trains, tell=self._say)
        self._session.on_aside = self._fused.give_back
        return self._session

    def teardown(self) -> None:
        try:
            self._close()
        finally:
            self._fused.give_back()
            super().teardown()

    def _close(self) -> None:
        if self._ordinary is not None:
            self._ordinary.close()
            self._ordinary = None
        if self._session is not None:
            self._last_session, self._session = self._session, None
            self._last_session.close()  # may tell of an update that has failed: whatever comes then, it is over

    def _step_aside_if_all_fits(self) -> None:
        """Let the ordinary run go on, where it fits and nobody else can hold what moves to the device then."""
        session, module = self._session, self.lightning_module
        if session is None:
            return
        self._ordinary = ordinary_steps(
            session,
            module,
            self.optimizers,
            is_safe=lambda: runs_undisturbed(module) and not holds_copies(module),
            stream_again=self._stream_again,
            tell=self._say,
        )
        if self._ordinary is not None:
            self._last_session, self._session, self._updates_in_backward = session, None, False

    def _stream_again(self) -> Session:
        self._ordinary = None
        bring_home(self.model, self.optimizers)
        session = self._open(self.model, replace(self.config, step_aside=False), trains=True)
        self._choose_update(self.lightning_module.trainer)
        self._choose_fused()
        return session

    def on_exception(self, exception: BaseException) -> None:
        if self._session is not None and type(exception) is torch.OutOfMemoryError:
            exception.add_note(self._session.guard.refuse(str(exception)))
        elif self._session is not None:
            self._session.abort()
        super().on_exception(exception)

    def _require_session(self) -> Session:
        assert self._session is not None, "setup makes a session"
        return self._session

    # -- steps

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._session is None:
            with nullcontext() if self._ordinary is None else self._ordinary.call():
                return super().training_step(*args, **kwargs)
        with self._session.guard.call(trains=True), self._step("train"):
            return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._step("validate"):
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._step("test"):
            return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._step("predict"):
            return super().predict_step(*args, **kwargs)

    def _step(self, mode: str) -> contextlib.AbstractContextManager[None]:
        if self._session is None:
            return nullcontext()
        return self._session.step(mode, is_undisturbed=runs_undisturbed(self.lightning_module))

    # `backward` itself is never overridden: users patch it (and so do Lightning's own tests).

    def pre_backward(self, closure_loss: Tensor) -> None:
        if self._session is not None:
            self._session.begin_backward(is_undisturbed=turns_undisturbed(self.lightning_module))
        super().pre_backward(closure_loss)

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        if self._session is not None:
            self._session.end_backward()

    # -- optimizers and checkpoints

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        module = self.lightning_module
        is_live = self._session is not None or self._ordinary is not None
        if is_live and module is not None and module.automatic_optimization:  # else the closure is no whole step
            self._step_aside_if_all_fits()
            closure = partial(self._repeating, closure)
        scope: contextlib.AbstractContextManager[None] = nullcontext()
        if (session := self._session) is not None and self._updates_in_backward:
            scope = session.updating_in_backward(optimizer, lends=runs_undisturbed(module))
        with scope:
            return super().optimizer_step(optimizer, closure, *args, **kwargs)

    def _repeating(self, closure: Callable[[], Any]) -> Any:
        notes = partial(LightningNotes, self.lightning_module)
        if self._ordinary is not None:
            result = self._ordinary.run(closure, notes)
        else:
            result = repeated_if_too_large(self._require_session(), closure, notes)
        if self._session is not None:
            self._session.guard.attempts.end()
        return result

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        materialize(self.lightning_module)  # Lightning loads before it calls setup
        super().load_model_state_dict(checkpoint, strict)

    def _choose_fused(self) -> None:
        scales = getattr(self.precision_plugin, "scaler", None) is not None
        wanted = wants_fused(self.config.fused_optimizer, self.compute_device, scales=scales)
        for optimizer in self.optimizers if wanted else []:
            if self._fused.choose(optimizer, sparse=sparsely_differentiated(self.model)):
                self._say(
                    f"{type(optimizer).__name__} updates on the host with torch's fused kernel, which is 6-20 times "
                    "faster than the loop over tensors; pass fused=False to the optimizer to keep the loop."
                )

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        inner = getattr(optimizer, "_optimizer", optimizer)
        return self._fused.users_state(inner, super().optimizer_state(optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        self._fused.give_back()
        with self._at_home() if self._ordinary is None else nullcontext():
            super().load_optimizer_state_dict(checkpoint)
        own_memory(self.optimizers)
        self._choose_fused()

    @property
    def checkpoint_io(self) -> Any:
        # Wrapping plugins (AsyncCheckpointIO) take an inner one only where the user gave them none.
        if self._checkpoint_io is None:
            self._checkpoint_io = type(self)._checkpoint_io_class()
        elif hasattr(self._checkpoint_io, "checkpoint_io"):
            self._checkpoint_io.checkpoint_io = type(self)._checkpoint_io_class()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, plugin: Any) -> None:
        self._checkpoint_io = plugin

    # -- copies

    def __getstate__(self) -> dict[str, Any]:
        # Trainers are pickled and deep-copied; a session belongs to one module in one process.
        return {**super().__getstate__(), "_session": None, "_last_session": None, "_ordinary": None}

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        if cls.strategy_name not in strategy_registry:
            description = "Streams layers, gradients and optimizer states between host and device memory"
            strategy_registry.register(cls.strategy_name, cls, description=description)


def _merged(config: SuperpipeConfig | None, options: dict[str, Any]) -> SuperpipeConfig:
    if config is None:
        return SuperpipeConfig.from_options(**options)
    if options:
        raise TypeError(f"give either config= or single options ({', '.join(options)}), not both.")
    return config
