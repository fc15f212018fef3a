"""The engine: streams a module's units through slots while somebody else's loop calls the module.

It knows no framework. A front end opens a step scope around each training or evaluation step; everything else hangs on
the calls of the swapped modules and on autograd. Outside such a scope units still load on demand, so that any code may
call the model at any time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Container, Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_superpipe.engine.activations import Activations, Choice
from lightning_superpipe.engine.anchors import Anchors
from lightning_superpipe.engine.backend import graph_task_id, is_separate
from lightning_superpipe.engine.binding import Binding
from lightning_superpipe.engine.calls import RootScope
from lightning_superpipe.engine.casts import Casts
from lightning_superpipe.engine.catalog import Catalog
from lightning_superpipe.engine.census import Probes
from lightning_superpipe.engine.changeover import change_over
from lightning_superpipe.engine.fetching import FetchRing
from lightning_superpipe.engine.follower import TRAIN, Follower
from lightning_superpipe.engine.gradients import GradientReturn
from lightning_superpipe.engine.graph_end import call_at_end
from lightning_superpipe.engine.installation import Installation
from lightning_superpipe.engine.lanes import Label, Lanes, Mark, now
from lightning_superpipe.engine.layout import trained_bytes_of
from lightning_superpipe.engine.offload import Offload
from lightning_superpipe.engine.outside import Outside
from lightning_superpipe.engine.residency import Residency, Staging
from lightning_superpipe.engine.staging import WireStaging
from lightning_superpipe.engine.tokens import SavedTensors
from lightning_superpipe.engine.traded_slots import make_slots
from lightning_superpipe.engine.twins import make_twin
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.engine.watch import EvalWatch, TrainWatch
from lightning_superpipe.engine.window import Window
from lightning_superpipe.engine.wire import Wire
from lightning_superpipe.planning import Action, Op, spread
from lightning_superpipe.planning.workload import Setting
from lightning_superpipe.tiers import Tier

__all__ = ["Engine", "Window"]


class Engine:
    """Streams the units of one module.

    Args:
        root: the module; its parameters stay on the host, as its own ``nn.Parameter`` objects.
        units: name and module of each unit, in registration order.
        anchors: id of each parameter that is not streamed, and why.
        lanes, tier: how bytes move, and where they live.
        pin: page-lock what gradients land in.
        root_scope: the root is called itself, not only its children: opens the scope of a step around each call.
        choices: what becomes of each unit's saved activations; None keeps all.
        micro_batches: parts of a batch inside units that recompute.
        wire: the dtype of what crosses the link, where it is not the parameters' own.

    Attributes:
        is_open: False once closed; what is left of graphs then computes with host parameters.
        lone_dtype: the dtype of all streamed parameters on the device; None if there are several.
        watch: the mode that is active between unit calls of the step in progress.
        probes: of those who measure.
    """

    def __init__(
        self,
        root: nn.Module,
        units: Sequence[tuple[str, nn.Module]],
        anchors: dict[int, str],
        window: Window,
        *,
        lanes: Lanes,
        tier: Tier,
        pin: bool = False,
        root_scope: RootScope | None = None,
        choices: Sequence[Choice] | None = None,
        micro_batches: int = 1,
        wire: Wire | None = None,
    ) -> None:
        self.lanes, self.device, self.wire = lanes, lanes.device, wire or Wire()
        self.is_separate = is_separate(self.device)
        self.is_open = True
        self.watch: TrainWatch | EvalWatch | None = None
        self._tier = tier
        self._lock = threading.RLock()
        self._graphs: set[int] = set()
        self._calls: list[Unit] = []
        self._is_in_step = self._is_evaluation = False
        self._in_backward: Unit | None = None
        self._backward_start: Mark | None = None
        self._own_seconds, self._num_uses = 0.0, 0
        self._is_compiled = any(_is_compiled(module) for module in root.modules())
        self.anchors = Anchors(self.device, lanes, anchors, self._make_anchor_twin, self.wire)
        self.catalog = Catalog(root, self.anchors)
        self.probes = Probes()
        self.binding = Binding(self.anchors, self.catalog)
        self.units = [
            Unit(i, name, module, anchors, self._make_twin, wire=self.wire) for i, (name, module) in enumerate(units)
        ]
        slot_bytes = max(unit.num_bytes for unit in self.units)
        num_slots = window.k + window.num_resident
        wires, weights = tier.part("wire", pin=pin), tier.part("weights")
        self.slots = make_slots(lanes, tier, num_slots, slot_bytes, poison=window.poison, seed=window.slot_seed)
        self.casts = Casts(self.device)
        self.note_dtypes()
        keep = spread(range(len(self.units)), window.num_resident)
        self.follower = Follower(len(self.units), num_slots, window.k_prime, keep)
        fetches = None if weights.is_memory else FetchRing(wires, window.num_fetches, lanes)
        staging = Staging(WireStaging(wires), fetches)
        self.residency = Residency(
            self.units, self.slots, lanes, self.follower, self.casts, self.binding.unbind, staging
        )
        trained = max(trained_bytes_of(unit.module, anchors, self.wire) for unit in self.units)
        self.gradients = GradientReturn(lanes, tier, limit_bytes=2 * trained, pin=pin)
        self.saved = SavedTensors(self)
        self.outside = Outside(self.wire, self.anchors, self.catalog, self.residency, self.saved, self.recover)
        choices = choices or [Choice()] * len(self.units)
        offload = Offload(lanes, tier.part("activations"), tier.part("wire"), self.staying)
        self.activations = Activations(self, choices, offload, num_parts=micro_batches)
        self._installation = Installation(self, root, tier, window.in_memory, root_scope=root_scope)

    def _make_twin(self, unit: Unit, index: int) -> nn.Parameter:
        label = Label("G", unit.index, unit.name)
        twin = make_twin(unit.parameters[index], self.device, self, label, dtype=unit.dtypes[index])
        self.catalog.add_twin(twin, unit, index)
        return twin

    def _make_anchor_twin(self, host: nn.Parameter) -> nn.Parameter:
        return make_twin(host, self.device, self, Label("G", -1, "anchors"), dtype=self.wire.dtype_of(host))

    def staying(self) -> Container[int]:
        """Addresses of what is on the device for good, where device and host are two; else of all of the host's."""
        return self.anchors.addresses() if self.is_separate else self.catalog.host_addresses()

    # -- uses

    def use(self, unit: Unit, op: Op) -> None:
        """Make sure that a unit is loaded, has arrived and is bound; do what the plan moves before this use."""
        with self._lock:
            self.probes.last_use = op.value, unit
            if graph_task_id() != -1:
                self.enlist_graph()
            elif self._graphs:
                self.recover()
            if op is Op.BACKWARD and unit is self._in_backward and unit.is_bound:
                self.casts.fill(unit)
                return
            start = now() - self.lanes.stall_seconds
            if unit is not self._in_backward:
                self._end_backward_span()
                self.gradients.flush()  # those of the unit before
                if op is Op.BACKWARD:
                    self.activations.offload.reached(unit)
            self._in_backward = unit if op is Op.BACKWARD else None
            if not unit.num_active:
                self._prepare(unit)
            if unit.parameters:
                self._follow(Action(op, unit.index), unit)
                self.residency.require(unit)
            self.binding.bind(unit)
            self._num_uses += 1
            self._own_seconds += now() - self.lanes.stall_seconds - start
            if op is Op.BACKWARD and self._backward_start is None and self.lanes.recorder is not None:
                self._backward_start = self.lanes.mark()

    def _end_backward_span(self) -> None:
        """Another unit takes over, or backward is over: a unit's backward ends when the next one begins."""
        start, self._backward_start = self._backward_start, None
        if start is not None and self._in_backward is not None:
            self.lanes.compute_span(Op.BACKWARD.value, self._in_backward.index, start)

    def use_in_backward(self, unit: Unit) -> None:
        """Backward needs a unit: a token is unpacked, or the gradient of its output is there."""
        if unit is not self._in_backward:
            self.probes.end_backward_of(self._in_backward)
        self.use(unit, Op.BACKWARD)

    def _prepare(self, unit: Unit) -> None:
        if not self._is_in_step and graph_task_id() == -1:
            unit.distrust()  # outside steps anything may have written to the host since
            if not unit.is_current():
                self._installation.rescan(unit)

    def _follow(self, use: Action, unit: Unit) -> None:
        if self._is_in_step and not unit.num_active:
            was_absent, deviations = unit.slot is None, self.follower.num_deviations
            self.residency.move(self.follower.before(use, self.residency.resident), needed=unit)
            self.residency.look_ahead()
            if was_absent and unit.slot is not None and self.follower.num_deviations > deviations:
                self.residency.num_plan_misses += 1  # the plan that asked for it was made too late to help

    def enter(self, unit: Unit) -> None:
        """A unit's call begins."""
        unit.num_active += 1
        self._calls.append(unit)

    def leave(self, unit: Unit, op: Op) -> None:
        """A unit's call has ended, one way or the other."""
        start = now()
        with self._lock:
            unit.num_active -= 1
            if self._calls:
                self._calls.pop()
            if not unit.num_active:
                if op is Op.FORWARD:
                    self.binding.unbind(unit)
                    self.residency.copy_back(unit)
                    self.residency.part_with_stashed(unit)
                    if self._is_in_step:
                        self.residency.move(self.follower.after(Action(op, unit.index)))
                        self.residency.look_ahead()
                self.casts.let_go(unit, is_evaluation=self._is_evaluation)
                self.probes.boundary(op.value, unit.index)
            caller = self._calls[-1] if self._calls else None
            if caller is not None and caller.parameters and caller.slot is None:  # it was spilled by its callee
                self.residency.require(caller)
                self.binding.bind(caller)
        self._own_seconds += now() - start

    def note_saved(self, tensor: Tensor) -> None:
        """Autograd saves a tensor that is no weight."""
        if self.probes.census is not None and self._calls and graph_task_id() == -1:
            self.probes.census.save(self._calls[0].index, tensor)

    # -- steps

    def adopt(self, setting: Setting, order: Sequence[int]) -> None:
        """Use another setting from the next step on, see :func:`change_over`."""
        change_over(self, setting, order)

    @contextlib.contextmanager
    def step(self, mode: str, *, is_undisturbed: bool = False) -> Iterator[None]:
        """Scope of one training step (its forward, at least) or one evaluation step.

        Args:
            mode: ``"train"``, or any name for steps whose forwards follow the same order.
            is_undisturbed: no user code that could write weights has run since the last step, so what is on the
                device may be used again.
        """
        self._begin(mode, is_undisturbed)
        self.watch = None if self._is_compiled else self._make_watch(mode)
        try:
            with self.watch or contextlib.nullcontext():
                yield
        finally:
            self.watch = None
            self._end_scope(mode)

    def note_dtypes(self) -> None:
        """Units were scanned: their parameters may have other dtypes."""
        dtypes = {dtype for unit in self.units for dtype in unit.dtypes}
        self.lone_dtype: torch.dtype | None = dtypes.pop() if len(dtypes) == 1 else None

    def _make_watch(self, mode: str) -> TrainWatch | EvalWatch | None:
        if mode == TRAIN:
            return TrainWatch(self.outside)
        return EvalWatch(self.outside) if self.anchors.have_copies else None

    def _begin(self, mode: str, is_undisturbed: bool) -> None:
        self.recover()
        self.follower.end()
        promoted = self.catalog.take_stale_units()
        for unit in self.units:
            # Only between steps: a graph may hold tokens of this scan, and functional_call changes modules for a call.
            if unit in promoted or not unit.is_current():
                self._installation.rescan(unit)
        self._installation.adopt(self.units)
        if not is_undisturbed:
            self.invalidate()
        self.catalog.survey()
        self.residency.drop_stale()
        if not self.follower.knows(mode):
            self.follower.lowest = self.catalog.lowest_trained(self.units)
        self._is_in_step, self._is_evaluation = True, mode != TRAIN
        resident = self.residency.resident()
        self.residency.move(self.follower.begin(mode, resident, next_is_same=is_undisturbed))
        self.residency.look_ahead()

    def _end_scope(self, mode: str) -> None:
        self._abort_calls()
        self.casts.sweep()
        self.anchors.flush_buffers()
        if mode != TRAIN:
            self._is_in_step = self._is_evaluation = False
            self.follower.end()
            self.fence_host_reads()  # the user may write to host parameters as soon as we return

    def fence_host_reads(self) -> None:
        """Block until no copy reads host memory."""
        self.residency.fence_host_reads()
        self.anchors.fence_host_reads()

    def invalidate(self) -> None:
        """Load everything afresh at its next use."""
        for unit in self.units:
            if not unit.num_active:
                unit.distrust()
        self.anchors.invalidate()

    # -- backward

    def enlist_graph(self) -> None:
        """Let the running backward pass end with everything as its caller expects it."""
        task = graph_task_id()
        if task != -1 and task not in self._graphs:
            self._graphs.add(task)
            if not self._is_in_step:
                self.invalidate()
            call_at_end(self, task)

    def receive_gradient(self, host: nn.Parameter, gradient: Tensor, label: Label) -> None:
        """Autograd has finished a gradient: send it home."""
        self.enlist_graph()
        if self.slots.of(gradient) is not None:
            gradient = gradient.clone()  # a custom backward gave the weight itself
        self.gradients.ship(host, gradient, label)

    def end_graph(self, task: int) -> None:
        """A backward pass is over: host parameters are in the modules, gradients are complete on the host."""
        with self._lock:
            if task not in self._graphs:
                return  # it raised, and recover() was first
            self._graphs.discard(task)
            if self._graphs:
                return
            self.probes.end_backward_of(self._in_backward)
            self._end_backward_span()
            self._in_backward = None
            for unit in self.units:
                if not unit.num_active:
                    self.binding.unbind(unit)
            self.activations.offload.end_graph()
            self.gradients.finish()
            self.anchors.flush_buffers()
            self.probes.boundary("home")

    def recover(self) -> None:
        """Put the model in order after a backward pass that raised: autograd did not call its end."""
        with self._lock:  # autograd's thread may be about it: its gradients are still on their way then
            if self._graphs:
                self._graphs = set(list(self._graphs)[:1])
                self.end_graph(next(iter(self._graphs)))

    def _abort_calls(self) -> None:
        """No unit is running: whatever a raised exception left behind is put back."""
        self._calls.clear()
        for unit in self.units:
            unit.num_active = 0
            if not self._graphs:
                self.binding.unbind(unit)

    def abort(self) -> None:
        """Put everything back after an exception that ended the step."""
        self.recover()
        self._abort_calls()
        self._is_in_step = self._is_evaluation = False
        self.follower.end()
        self.activations.offload.settle()

    # -- what watches, tokens, owners and the update stage ask

    def units_by_need(self) -> list[Unit]:
        """All units, those first that the next training step is expected to need first."""
        return [self.units[index] for index in self.follower.first_needed()]

    def unit_of_twin(self, tensor: Tensor) -> tuple[Unit, int] | None:
        return self.catalog.unit_of_twin(tensor)

    def is_anchor(self, tensor: Tensor) -> bool:
        return self.catalog.is_anchor(tensor)

    def overhead_us(self) -> float:
        """Mean time that the engine itself takes per use of a unit, waiting not included, in microseconds."""
        return self._own_seconds / max(self._num_uses, 1) * 1e6

    def close(self) -> None:
        """Give the model back as it was, with the current weights; release all that was allocated."""
        if not self.is_open:
            return
        self.abort()
        self.is_open = False
        self._installation.remove()
        self.activations.offload.close()
        self.lanes.close()
        self.residency.close()
        self.gradients.close()
        self.anchors.close()
        self.catalog.clear()
        self._tier.close()


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
