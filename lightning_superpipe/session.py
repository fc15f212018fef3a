"""The composer: a module and a configuration become units, an engine and a report."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_superpipe import host_memory as host
from lightning_superpipe.accounts import counters_of, finish_recording, kept_bytes, make_report, static_bytes
from lightning_superpipe.aside import AsideRule, move_as_it_fits
from lightning_superpipe.at_exit import close_at_exit
from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.construction import make_tuner
from lightning_superpipe.device_memory import device_limit
from lightning_superpipe.engine.backend import is_separate
from lightning_superpipe.engine.choices import may_pin, memory_need, wire_of
from lightning_superpipe.engine.construction import make_engine
from lightning_superpipe.engine.follower import TRAIN
from lightning_superpipe.engine.swap import refuse_streamed
from lightning_superpipe.guard import StepGuard
from lightning_superpipe.knobs import first_setting, refuse_announced
from lightning_superpipe.observe.host_bytes import HostBytes
from lightning_superpipe.observe.meter import Meter
from lightning_superpipe.observe.profiles import known_machine
from lightning_superpipe.observe.report import Report, StepCounters
from lightning_superpipe.observe.trace import Recording
from lightning_superpipe.observe.unit_profile import UnitProfile
from lightning_superpipe.optimizer import (
    FusedChoice,
    Masters,
    ShareChoice,
    make_stage,
    optimizers_of,
    sparsely_differentiated,
    wants_fused,
)
from lightning_superpipe.partition import UnitTable, partition, unit_table
from lightning_superpipe.planning.budget import refuse_updates
from lightning_superpipe.planning.host_budget import HostNeed
from lightning_superpipe.planning.workload import Setting
from lightning_superpipe.promotions import report_promotions
from lightning_superpipe.rewind import OutOfDeviceMemory
from lightning_superpipe.tiers import Places
from lightning_superpipe.tuning import Tuner

__all__ = ["FusedChoice", "OutOfDeviceMemory", "Session", "UnitTable", "sparsely_differentiated", "wants_fused"]

_log = logging.getLogger("lightning_superpipe")


class Session:
    """One module streamed on one device, from setup to teardown.

    Args:
        root: the module; it stays as it is but for the class of its parts, which :meth:`close` restores.
        device: where it computes.
        trains: gradients will come; evaluation needs no room for them.
        owns_root: the root itself is called (not only its parts): each call outside :meth:`step` is a step by itself.
        optimizers: those that are known already; :meth:`attend` is called with all.
        tell: says something to the user; None logs it.

    Attributes:
        is_asked: a front end asks :meth:`steps_aside` by itself; else each call of the root does.
        on_aside: called before everything moves to the device.

    Raises:
        PartitionError, UnsupportedError: the module cannot be streamed, or not as asked, or streams already.
        BudgetError: the window does not fit ``device_memory``, or the training the host.
    """

    def __init__(
        self,
        root: nn.Module,
        config: SuperpipeConfig,
        device: torch.device,
        *,
        trains: bool,
        owns_root: bool = False,
        optimizers: Iterable[Optimizer] = (),
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.config, self.device, self.trains = config, device, trains
        refuse_streamed(root)
        if owns_root:
            refuse_announced(config)
        found = partition(root, config.units)
        self._wire = wire_of(root, config)
        need = memory_need(root, found, self._wire, trains=trains)
        limit = device_limit(config, device)
        budget = None if config.device_memory is None else limit
        start = first_setting(config, need, budget)
        self.units: UnitTable = unit_table(root, found, k=start.k)
        self._need, self._budget, self._root, self._of = need, budget, root, weakref.ref(root)
        self._optimizers = list(optimizers)
        self._files = host.files_for(root, self._optimizers, config, need, self._wire, self.units)
        host.require_host(self._host_need(), self.config)
        # What is cast on the way is copied from staging memory: its masters need no page lock.
        self._tier = Places(config, pin=may_pin(config, device) and self._wire.dtype is None, trains=trains)
        scope = self._call_scope if owns_root else None
        try:
            self._engine = make_engine(
                root, found, start, config, device, tier=self._tier, wire=self._wire, scope=scope, files=self._files
            )
        except BaseException:
            self._tier.close()
            raise
        self._masters = Masters() if config.master_weights is not None else None
        self._updates = make_stage(self._engine, config, self._masters, self._tier, self._files)
        self._machine = functools.cache(partial(known_machine, device, is_emulated=config.link is not None))
        is_open = config.update_on_device == "auto"
        self._tell = tell or _log.info
        self._share = ShareChoice(self._updates, device, is_open=is_open, machine=self._machine, tell=self._tell)
        self._meter = Meter(device, self._static_bytes, lambda: self._engine.gradients.in_flight_bytes)
        self._owns_root = owns_root
        self._tuner = self._make_tuner(start, limit)
        self._aside = AsideRule(config, self._tuner, self._ordinary_bytes, self._tell)
        self.on_aside: Callable[[], None] = lambda: None
        self._backward_scope = contextlib.ExitStack()
        self._num_steps = 0
        self._is_step_open = self._is_in_scope = self._is_counted = self.is_asked = False
        self._at_step_start = self._last_step = StepCounters()
        self._final_report: Report | None = None
        self.guard = StepGuard(root, self._engine, self._updates, self._tuner, self._drop_step)
        if trains:
            self.guard.watch()
        self.recording: Recording | None = None
        close_at_exit(self)

    def _make_tuner(self, start: Setting, limit: int | None) -> Tuner:
        return make_tuner(
            self._engine,
            self._meter,
            self.config,
            start,
            trains=self.trains and not (self._owns_root and not self._optimizers),
            need=self._need,
            limit=limit,
            optimizers=lambda: self._optimizers,
            kept_bytes=lambda: kept_bytes(self._engine, self._updates, self._need),
            with_store=lambda found: host.with_store(found, self.config, self.units, self._files, self._host_need()),
            host_limit=lambda: host.host_limit(self.config, self._held()),
            machine=self._machine,
            tell=self._tell,
        )

    def _ordinary_bytes(self) -> tuple[int, int, int]:
        return host.training_bytes(self._root, self._optimizers, has_gradients=self._num_steps > 0)

    def _held(self) -> HostBytes:
        scratch = 0 if self._masters is None else self._masters.scratch_bytes
        return host.held_bytes(self._root, self._optimizers, self._tier, scratch_bytes=scratch)

    def _host_need(self) -> HostNeed:
        return host.need_of_run(
            self._root, self._optimizers, self.config, self._need, self._wire, self.units, self._files
        )

    # -- steps

    @contextlib.contextmanager
    def _call_scope(self, kind: str) -> Iterator[Callable[[Any], None] | None]:
        """Scope of one call of the root by a loop that opens no steps; the calls inside a ``generate`` share one."""
        is_between = not (self._is_in_scope or self.is_asked or self.guard.attempts.is_open)
        if self._is_in_scope or (is_between and self.steps_aside(is_safe=lambda: False)):
            yield None
            return
        mode = TRAIN if torch.is_grad_enabled() and kind == "call" else kind
        with self.guard.call(trains=mode == TRAIN), self.step(mode):
            is_followed = mode == TRAIN and self._is_counted  # nobody tells us when backward begins
            yield partial(self._meter.follow, since=torch.autograd._get_sequence_nr()) if is_followed else None  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def step(self, mode: str, *, is_undisturbed: bool = False) -> Iterator[None]:
        """Scope of a step, see :meth:`Engine.step`."""
        self._finish_step()
        if mode == TRAIN:
            self._begin_training_step(is_undisturbed=is_undisturbed)
        else:
            self._is_counted = self._tuner.begin_pass(is_undisturbed=is_undisturbed)
        self._is_in_scope = True
        try:
            with self._counting(), self._engine.step(mode, is_undisturbed=is_undisturbed):
                yield
        finally:
            self._is_in_scope = False
        if mode != TRAIN:
            self._tuner.end_pass()
        else:
            need = self._need.total(self.k + self.num_resident)
            report_promotions(self._engine.catalog.take_promotions(), need_bytes=need, budget_bytes=self._budget)

    def begin_backward(self, *, is_undisturbed: bool) -> None:
        """A backward pass outside :meth:`step` begins; user hooks may have run since the step."""
        self.guard.attempts.note_backward()
        if not is_undisturbed:
            self._engine.invalidate()
        self._backward_scope.enter_context(self._counting())

    def end_backward(self) -> None:
        """The backward pass is over."""
        self._backward_scope.close()

    def _begin_training_step(self, *, is_undisturbed: bool) -> None:
        self._tuner.begin_training()
        is_recorded = self._num_steps == self.config.record_step
        update = "at_once" if self._updates is None else self._updates.kind
        self._is_counted = self._tuner.begin_step(
            self._num_steps, is_recorded=is_recorded, is_undisturbed=is_undisturbed, update=update
        )
        spare = None if self._budget is None else self._budget - self._meter.peak.total
        self._share.settle(self._tuner.settled(), spare)
        if self._tuner.is_new and self._updates is not None:
            self._updates.suspend()  # if the device has no room for this step, it can be repeated
        if is_recorded:
            self._engine.lanes.start_recording()
            self._meter.recorder = self._engine.lanes.recorder
        self._num_steps += 1
        self._is_step_open, self._at_step_start = True, counters_of(self._engine, self._tier.traffic)
        self._engine.gradients.on_handed_over = self._meter.leave_out if self._is_counted else None
        self._engine.gradients.on_leaving = self._meter.set_apart if self._is_counted else None

    def _finish_step(self) -> None:
        """Close the books of the training step before, if one is open."""
        self._backward_scope.close()  # left open where a backward pass raised
        if not self._is_step_open:
            return
        self._is_step_open = False
        self._meter.sample()
        self._tuner.end_step(self._num_steps - 1)
        self._last_step = counters_of(self._engine, self._tier.traffic) - self._at_step_start
        if self._meter.recorder is not None:
            self._meter.recorder = None
            ordinary = sum(self._ordinary_bytes())
            self.recording = finish_recording(self._engine, self._tuner.setting, ordinary, self._budget)

    def unit_profile(self) -> UnitProfile | None:
        """What the first steps took, by unit; None before they are over."""
        if self._final_report is not None:
            return self._final_profile
        return self._tuner.profile()

    def _counting(self) -> contextlib.AbstractContextManager[None]:
        return self._meter.counting() if self._is_counted else contextlib.nullcontext()

    def _drop_step(self) -> int:
        """The step in progress has failed and counts as not begun; return how many have."""
        self.abort()
        self._is_counted = False
        if self._is_step_open:
            self._is_step_open, self._num_steps, self._meter.recorder = False, self._num_steps - 1, None
        return self._num_steps

    # -- what front ends ask

    @property
    def k(self) -> int:
        """Most units on the device at once, beside those that stay."""
        return self._tuner.setting.k

    @property
    def k_prime(self) -> int:
        """Units moved per transfer."""
        return self._tuner.setting.k_prime

    @property
    def num_resident(self) -> int:
        """Units that stay on the device."""
        return self._tuner.setting.resident

    @property
    def is_emulated(self) -> bool:
        """Whether this device is the host itself, so that streaming saves nothing real."""
        return not is_separate(self.device)

    def attend(self, optimizers: Iterable[Optimizer]) -> None:
        """Take those of these optimizers that hold parameters of the module as its own: their states count in the
        report, their steps are split.
        """
        self._optimizers = optimizers_of(self._root, optimizers)
        if self._optimizers:
            self._tuner.begin_training()
        host.require_host(self._host_need(), self.config)
        if self.trains:
            self._engine.gradients.homes.reserve(self._root.parameters())
        if self._updates is not None:
            self._updates.attend(self._optimizers)
            if self._updates.device is not None and self._updates.device.share:
                self._need = replace(self._need, update_bytes=self._updates.device.need_bytes)
                refuse_updates(self.k + self.num_resident, self._need, self._budget)

    def updating_in_backward(self, optimizer: Optimizer, *, lends: bool) -> contextlib.AbstractContextManager[None]:
        """Scope of a step whose closure runs the last backward pass before it, with nobody looking at gradients.

        Args:
            lends: nobody looks at them behind the step either, up to the next one's backward.
        """
        if not self.is_open or self._updates is None or (self._tuner.is_new and self.guard.attempts.is_open):
            return contextlib.nullcontext()  # a plan's first steps may have to be repeated
        return self._updates.announced(optimizer, lends=lends)

    @property
    def is_open(self) -> bool:
        """Whether the module streams."""
        return self._final_report is None

    def streams(self, model: nn.Module) -> bool:
        """Whether a module streams in this session."""
        return self.is_open and self.is_of(model)

    def is_of(self, model: nn.Module) -> bool:
        """Whether this is a module's session, open or closed."""
        return self._of() is model

    def abort(self) -> None:
        """Put the model in order after an exception."""
        if self.is_open:
            self._backward_scope.close()
            self._engine.abort()

    # -- where everything fits

    def steps_aside(self, *, is_safe: Callable[[], bool]) -> bool:
        """Between two steps: close the session, with everything on the device, if the ordinary run fits there.

        Args:
            is_safe: returns whether nobody can hold tensors that this would leave behind on the host.

        Raises:
            OutOfDeviceMemory: there is less room than was known; the session is closed, all is on the host.
        """
        need = self._aside.due(self._num_steps, is_safe=is_safe) if self.is_open else None
        if need is None:
            return False
        root, optimizers = self._root, self._optimizers
        self.close()
        self.on_aside()
        move_as_it_fits(root, optimizers, self.device, need)
        said = f"{need}: from step {self._num_steps} on the run goes on as without superpipe"
        self._final_report = replace(self.report(), plan=f"{self.report().plan}\n{said}")
        self._tell(f"superpipe: {said}.")
        return True

    def close(self) -> None:
        """Give the model back as it was, with its current weights. The report stays; nothing of the model does."""
        if self._final_report is not None:
            return
        self._finish_step()
        self._final_profile = self.unit_profile()
        self._tuner.close()
        try:
            if self._updates is not None:
                self._updates.close()
            self._tier.keep(self._root, self._optimizers)
        finally:
            self._end()

    def _end(self) -> None:
        self._final_report = self.report()
        self.guard.close()
        self._engine.close()
        del self._updates, self._share, self._aside, self._engine, self._meter, self._tuner
        del self._root, self._optimizers, self._tier, self.guard

    # -- report

    def report(self) -> Report:
        """What streaming cost and saved so far."""
        if self._final_report is not None:
            return self._final_report
        return make_report(
            self._engine,
            self._updates,
            self._tier.traffic,
            root=self._root,
            optimizers=self._optimizers,
            setting=self._tuner.setting,
            need=self._need,
            peak=self._meter.peak,
            host=self._held(),
            num_steps=self._num_steps,
            last_step=self._last_step,
            sees_loop=self._meter.sees_all or not self._owns_root,
            plan="\n".join(filter(None, (self._tuner.plan, self._share.plan)))
            + self._files.remark(len(self._engine.units), is_used=bool(self._tier.disks)),
            endurance_tb=self.config.disk_options.endurance_tb,
        )

    def _static_bytes(self) -> tuple[int, int]:
        return static_bytes(self._engine, self._updates, self._need)
