"""The composer: a module and a configuration become units, an engine and a report."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from humanize import naturalsize
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superpipe.config import STORED_KINDS, Adversary, Disk, SuperpipeConfig
from lightning_superpipe.engine.activations import choose_policies
from lightning_superpipe.engine.backend import is_separate
from lightning_superpipe.engine.choices import make_lanes, memory_need, wire_of
from lightning_superpipe.engine.engine import Engine, Window
from lightning_superpipe.engine.follower import TRAIN
from lightning_superpipe.engine.swap import owner_of
from lightning_superpipe.errors import BudgetError, SuperpipeWarning, UnsupportedError
from lightning_superpipe.host_memory import held_bytes, host_need
from lightning_superpipe.observe.host_bytes import available_bytes
from lightning_superpipe.observe.meter import Meter
from lightning_superpipe.observe.report import Report, StepCounters
from lightning_superpipe.observe.trace import Recording
from lightning_superpipe.optimizer import FusedChoice, Masters, make_stage, sparsely_differentiated, wants_fused
from lightning_superpipe.partition import Partition, UnitTable, partition, unit_table
from lightning_superpipe.planning.budget import choose_k, choose_residents
from lightning_superpipe.tiers import Places

__all__ = ["FusedChoice", "Session", "UnitTable", "sparsely_differentiated", "wants_fused"]

_MARGIN = 10  # a tenth more activations than measured
_NUM_COUNTED_STEPS = 2  # the first allocates what later steps use again; the second is like all others


class Session:
    """One module streamed on one device, from setup to teardown.

    Args:
        root: the module; it stays as it is but for the class of its parts, which :meth:`close` restores.
        device: where it computes.
        trains: gradients will come; evaluation needs no room for them.
        owns_root: the root itself is called (not only its parts): each call outside :meth:`step` is a step by itself.
        optimizers: those that are known already; :meth:`attend` is called with all.

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
    ) -> None:
        self.config, self.device, self.trains = config, device, trains
        _refuse_streamed(root)
        if config.update == "in_backward" and owns_root:
            raise UnsupportedError(
                "update='in_backward' needs a loop that announces its steps: Lightning's Trainer with automatic "
                "optimization. Use update='after_backward', which is exact as well and hides the update under the next "
                "forward."
            )
        found = partition(root, config.units)
        self._wire = wire_of(root, config)
        need = memory_need(root, found, self._wire, trains=trains)
        budget = config.device_memory if isinstance(config.device_memory, int) else None
        self.k = choose_k(None if config.k == "auto" else config.k, need, budget, k_prime=config.k_prime)
        self.k_prime = min(config.k_prime, self.k)
        asked = 0 if config.resident == "auto" else config.resident
        self.num_resident = choose_residents(asked, self.k, need, budget, need.total(self.k))
        self.units: UnitTable = unit_table(root, found, k=self.k)
        self._need, self._budget, self._root = need, budget, root
        self._optimizers = list(optimizers)
        self._require_host()
        # What is cast on the way is copied from staging memory: its masters need no page lock.
        self._tier = Places(config, pin=_may_pin(config, device) and self._wire.dtype is None, trains=trains)
        try:
            self._tier.part("weights").reserve(self.units.streamed_bytes)
            self._engine = self._make_engine(root, found, owns_root)
        except BaseException:
            self._tier.close()
            raise
        self._masters = Masters() if config.master_weights is not None else None
        self._updates = make_stage(self._engine, config, self._masters, self._tier)
        self._meter = Meter(device, self._static_bytes, lambda: self._engine.gradients.in_flight_bytes)
        self._backward_scope = contextlib.ExitStack()
        self._owns_root = owns_root
        self._num_steps = 0
        self._is_step_open = self._is_in_scope = False
        self._at_step_start = self._last_step = StepCounters()
        self._final_report: Report | None = None
        self.recording: Recording | None = None

    def _make_engine(self, root: nn.Module, found: Partition, owns_root: bool) -> Engine:
        hostile = self.config.adversary or Adversary(poison=False, shuffle_slots=False)
        seed = hostile.seed if hostile.shuffle_slots else None
        ring = (self.config.disk or Disk()).ring
        window = Window(self.k, self.k_prime, hostile.poison, seed, self.num_resident, num_fetches=ring)
        names = [unit.name for unit in found.units]
        return Engine(
            root,
            [(unit.name, unit.module) for unit in found.units],
            found.anchors,
            window,
            lanes=make_lanes(self.config, self.device, hostile),
            tier=self._tier,
            pin=_may_pin(self.config, self.device),
            root_scope=self._call_scope if owns_root else None,
            choices=choose_policies(self.config.activations, names, micro_batches=self.config.micro_batches),
            micro_batches=self.config.micro_batches,
            wire=self._wire,
        )

    def _require_host(self) -> None:
        """Raise if the host cannot hold what is known of this training."""
        with_masters = self.config.master_weights is not None
        need = host_need(self._root, self._optimizers, self._need, self._wire, with_masters=with_masters)
        kinds = {kind for kind in STORED_KINDS if self.config.is_on_disk(kind)}
        if kinds:
            sizes = {"streamed": self.units.streamed_bytes, "largest": self.units.largest.num_bytes}
            need = need.with_files(kinds, **sizes, num_buffers=(self.config.disk or Disk()).ring)
        limit = self.config.host_memory if isinstance(self.config.host_memory, int) else None
        need.check(available=available_bytes(), limit=limit)

    # -- steps

    @contextlib.contextmanager
    def _call_scope(self, kind: str) -> Iterator[Callable[[Any], None] | None]:
        """Scope of one call of the root by a loop that opens no steps; the calls inside a ``generate`` share one."""
        if self._is_in_scope:
            yield None
            return
        mode = TRAIN if torch.is_grad_enabled() and kind == "call" else kind
        with self.step(mode):
            is_followed = mode == TRAIN and self._is_counted()  # nobody tells us when backward begins
            yield partial(self._meter.follow, since=torch.autograd._get_sequence_nr()) if is_followed else None  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def step(self, mode: str, *, is_undisturbed: bool = False) -> Iterator[None]:
        """Scope of a step, see :meth:`Engine.step`."""
        self._finish_step()
        if mode == TRAIN:
            self._begin_training_step()
        with self._counting(mode), self._engine.step(mode, is_undisturbed=is_undisturbed), self._scope():
            yield
        if mode == TRAIN:
            self._report_promotions()

    @contextlib.contextmanager
    def _scope(self) -> Iterator[None]:
        self._is_in_scope = True
        try:
            yield
        finally:
            self._is_in_scope = False

    def begin_backward(self, *, is_undisturbed: bool) -> None:
        """A backward pass outside :meth:`step` begins; user hooks may have run since the step."""
        if not is_undisturbed:
            self._engine.invalidate()
        self._backward_scope.enter_context(self._counting(TRAIN))

    def end_backward(self) -> None:
        """The backward pass is over."""
        self._backward_scope.close()

    def _begin_training_step(self) -> None:
        if self._num_steps == _NUM_COUNTED_STEPS and self.config.resident == "auto":
            self._use_spare_memory()
        if self._num_steps == self.config.record_step:
            self._engine.lanes.start_recording()
            self._meter.recorder = self._engine.lanes.recorder
        self._num_steps += 1
        self._is_step_open, self._at_step_start = True, self._counters()
        is_counted = self._is_counted()
        self._engine.on_boundary = self._meter.sample if is_counted else None
        self._engine.gradients.on_handed_over = self._meter.leave_out if is_counted else None

    def _use_spare_memory(self) -> None:
        """Let units stay in what the first steps left of the budget."""
        peak = self._meter.peak
        used = peak.total + peak.activations // _MARGIN
        count = choose_residents(None, self.k, self._need, self._budget, used)
        if count:
            self.num_resident += count
            self._engine.keep_resident(count)

    def _finish_step(self) -> None:
        """Close the books of the training step before, if one is open."""
        self._backward_scope.close()  # left open where a backward pass raised
        if not self._is_step_open:
            return
        self._is_step_open = False
        self._meter.sample()
        self._last_step = self._counters() - self._at_step_start
        if self._num_steps == 1:
            self._keep_within_budget()
        if self._meter.recorder is not None:
            self._meter.recorder = None
            self.recording = self._engine.lanes.stop_recording().finish(
                unit_names=[unit.name for unit in self._engine.units],
                k=self.k,
                k_prime=self.k_prime,
                device=str(self.device),
                emulated=self.is_emulated,
                resident_bytes=sum(self._training_state()),
                budget_bytes=self._budget,
            )

    def _keep_within_budget(self) -> None:
        """Let units recompute from the second step on, where the first one's activations were more than allowed."""
        if self.config.activations != "auto" or self._budget is None:
            return
        took, left = self._meter.peak.activations, self._budget - self._need.total(self.k)
        if took > left:
            self._engine.activations.recompute_all()
            warnings.warn(
                f"activations took {naturalsize(took, binary=True)} in the first step, but device_memory leaves "
                f"{naturalsize(max(left, 0), binary=True)} for them: from now on units recompute theirs in backward. "
                "Set activations to 'recompute' to begin with it, or to 'keep' to allow more.",
                SuperpipeWarning,
                stacklevel=2,
            )

    def _is_counted(self) -> bool:
        return self._num_steps <= _NUM_COUNTED_STEPS or self._meter.recorder is not None

    def _counting(self, mode: str) -> contextlib.AbstractContextManager[None]:
        return self._meter.counting() if mode == TRAIN and self._is_counted() else contextlib.nullcontext()

    def _report_promotions(self) -> None:
        promotions = self._engine.catalog.take_promotions()
        if not promotions:
            return
        num_bytes = sum(promotion.num_bytes for promotion in promotions)
        names = ", ".join(sorted({promotion.unit_name for promotion in promotions})[:8])
        message = (
            f"{len(promotions)} parameters ({naturalsize(num_bytes, binary=True)}) of units {names} are read outside "
            f"their unit (by {promotions[0].function}): from now on they have a permanent copy on the device."
        )
        extra = self._need.total(self.k + self.num_resident) + num_bytes
        if self._budget is not None and extra > self._budget:
            raise BudgetError(
                f"{message} That makes {naturalsize(extra, binary=True)}, but device_memory allows "
                f"{naturalsize(self._budget, binary=True)}. Read them inside a module's own forward, or allow more."
            )
        warnings.warn(message, SuperpipeWarning, stacklevel=2)

    # -- what front ends ask

    @property
    def is_emulated(self) -> bool:
        """Whether this device is the host itself, so that streaming saves nothing real."""
        return not is_separate(self.device)

    def attend(self, optimizers: Iterable[Optimizer]) -> None:
        """Take those of these optimizers that hold parameters of the module as its own: their states count in the
        report, their steps are split.
        """
        own = {id(parameter) for parameter in self._root.parameters()}
        self._optimizers = [
            optimizer
            for optimizer in optimizers
            if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])
        ]
        self._require_host()
        if self._updates is not None:
            self._updates.attend(self._optimizers)

    def updating_in_backward(self, optimizer: Optimizer) -> contextlib.AbstractContextManager[None]:
        """Scope of a step whose closure runs the last backward pass before it, with nobody looking at gradients."""
        return contextlib.nullcontext() if self._updates is None else self._updates.announced(optimizer)

    def streams(self, model: nn.Module) -> bool:
        """Whether this is the session of a module."""
        return self._final_report is None and self._root is model

    def invalidate(self) -> None:
        """User code may have written to weights: load everything afresh."""
        self._engine.invalidate()

    def abort(self) -> None:
        """Put the model in order after an exception."""
        self._backward_scope.close()
        self._engine.abort()

    def close(self) -> None:
        """Give the model back as it was, with its current weights. The report stays; nothing of the model does."""
        if self._final_report is not None:
            return
        self._finish_step()
        try:
            if self._updates is not None:
                self._updates.close()
            self._tier.keep(self._root, self._optimizers)
        finally:
            self._end()

    def _end(self) -> None:
        self._final_report = self.report()
        self._engine.close()
        del self._updates, self._engine, self._meter, self._root, self._optimizers, self._tier

    # -- report

    def report(self) -> Report:
        """What streaming cost and saved so far."""
        if self._final_report is not None:
            return self._final_report
        num_slots = self.k + self.num_resident
        static = self._need.total(num_slots) - self._need.gradient_bytes
        peak = self._meter.peak
        if not peak.total:
            slots = num_slots * self._need.slot_bytes
            peak = peak._replace(slots=slots, anchors=static - slots)
        weights, gradients, states = self._training_state()
        scratch = 0 if self._masters is None else self._masters.scratch_bytes
        return Report(
            k=self.k,
            k_prime=self.k_prime,
            num_resident=self.num_resident,
            num_units=len(self._engine.units),
            num_steps=self._num_steps,
            peak=peak,
            resident_bytes=weights + gradients + states,
            num_parameters=sum(p.numel() for p in self._root.parameters() if not nn.parameter.is_lazy(p)),
            host=held_bytes(self._root, self._optimizers, self._tier, scratch_bytes=scratch),
            last_step=self._last_step,
            total=self._counters(),
            device=str(self.device),
            emulated=self.is_emulated,
            endurance_tb=None if self.config.disk is None else self.config.disk.endurance_tb,
            sees_loop=self._meter.sees_all or not self._owns_root,
            unit_overhead_us=self._engine.overhead_us(),
        )

    def _counters(self) -> StepCounters:
        residency, lanes = self._engine.residency, self._engine.lanes
        return StepCounters(
            num_loads=residency.num_loads,
            num_plan_misses=residency.num_plan_misses,
            h2d_bytes=lanes.h2d_bytes,
            d2h_bytes=lanes.d2h_bytes,
            stall_seconds=lanes.stall_seconds,
            disk_read_bytes=self._tier.traffic.read,
            disk_written_bytes=self._tier.traffic.written,
        )

    def _static_bytes(self) -> tuple[int, int]:
        anchors = self._engine.anchors.num_bytes if self._engine.anchors.have_copies else self._need.anchor_bytes
        return self._engine.slots.num_bytes, anchors

    def _training_state(self) -> tuple[int, int, int]:
        """Bytes of weights, gradients and optimizer states of the whole model."""
        parameters = [p for p in self._root.parameters() if not nn.parameter.is_lazy(p)]
        weights = sum(p.nbytes for p in parameters) + sum(b.nbytes for b in self._root.buffers())
        gradients = sum(p.nbytes for p in parameters if p.requires_grad) if self._num_steps else 0
        states = (
            value for optimizer in self._optimizers for state in optimizer.state.values() for value in _values(state)
        )
        return weights, gradients, sum(value.nbytes for value in states if isinstance(value, Tensor))


def _refuse_streamed(root: nn.Module) -> None:
    """Two engines would bind the same modules, each over the other's copies."""
    name = next((name for name, module in root.named_modules() if owner_of(module) is not None), None)
    if name is not None:
        part = f"its part {name!r}" if name else f"this {type(root).__name__}"
        raise UnsupportedError(
            f"the model streams already ({part}): end that first, by pipe.close(), accelerator.free_memory(), "
            "fabric.strategy.teardown() or the end of the Trainer's run."
        )


def _may_pin(config: SuperpipeConfig, device: torch.device) -> bool:
    return config.pin_memory is not False and device.type == "cuda"


def _values(state: Any) -> list[Any]:
    """What an optimizer keeps for one parameter; most keep a dict."""
    return list(state.values()) if isinstance(state, dict) else [state]
