"""``auto``: a run begins with a small window, is measured, and changes over to the setting that was chosen for it.

The chosen setting is measured as well. Where a step is slower or larger than predicted, that is said, and the choice is
made again from the newer measurements; what has been tried once is not tried again.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from humanize import naturalsize

from lightning_superpipe.config import STORED_KINDS, SuperpipeConfig
from lightning_superpipe.engine.engine import Engine
from lightning_superpipe.engine.shortage import OutOfDeviceMemory
from lightning_superpipe.errors import BudgetError, SuperpipeWarning
from lightning_superpipe.knobs import asked_of
from lightning_superpipe.observe.machine import MachineProfile
from lightning_superpipe.observe.unit_profile import UnitProfile
from lightning_superpipe.planning.budget import MemoryNeed
from lightning_superpipe.planning.choose import Asked, Choice, Limits, choose
from lightning_superpipe.planning.compare import missed
from lightning_superpipe.planning.fall_back import knobs, shortage, smaller
from lightning_superpipe.planning.workload import Setting
from lightning_superpipe.profiling import Profiler

__all__ = ["Tuner"]

_NUM_COUNTED_STEPS = 2  # the first allocates what later steps use again; the second is like all others
_NUM_COUNTED_WITH_FILES = 3  # the second one's update is the first that reads states, up to the third step's end
_NUM_TIMED_STEPS = 3
_MOST_MORE_STEPS = 64  # where none of those was followed by an update
_MOST_PLANS = 4  # tried in one run
_NUM_NEW_STEPS = 2  # under another plan may have to be repeated, so units are updated behind them
_NOTHING_SMALLER = (
    "The step has not happened: weights, buffers and random numbers are those of the last finished one. Take a smaller "
    "batch, mark smaller units (units=...), or leave k, resident and activations to 'auto'."
)


class _Outcome(NamedTuple):
    """What a setting turned out to take."""

    step_s: float
    peak_bytes: int


class Tuner:
    """Chooses the knobs that the configuration leaves open, between steps of one kind.

    Args:
        setting: that the run begins with; activation policies count in the order of registration.
        trains: training steps are measured; else passes without training are, until :meth:`begin_training`.
        need: device bytes that were known before the first step.
        limit: device bytes; None for any number.
        host_limit: returns the host bytes that all may take.
        machine: returns what was measured of the machine; None where nothing was.
        emulated: the device is the host.
        tell: says something to the user.

    Attributes:
        setting: in force.
        choice: the last one; None before the first, and where nothing is open.
        plan: what was told of it.
    """

    def __init__(
        self,
        engine: Engine,
        profiler: Profiler,
        config: SuperpipeConfig,
        setting: Setting,
        *,
        trains: bool,
        need: MemoryNeed,
        limit: int | None,
        host_limit: Callable[[], int],
        machine: Callable[[], MachineProfile | None],
        emulated: bool,
        tell: Callable[[str], None],
    ) -> None:
        self._engine, self._profiler, self._config = engine, profiler, config
        self._need, self._is_undisturbed = need, False
        self._trains, self._num_passes, self._num_more, self._machine = trains, 0, 0, machine
        self._limit, self._host_limit, self._emulated, self._tell = limit, host_limit, emulated, tell
        self.setting = self._start = setting
        self.choice: Choice | None = None
        self.plan = ""
        self._order: Sequence[int] = range(len(engine.units))
        self._since = self._next = 0
        self._has_fallen_back = False
        self._measured: UnitProfile | None = None
        has_files = any(map(config.is_on_disk, STORED_KINDS))
        self._num_counted = self._num_warm = _NUM_COUNTED_WITH_FILES if has_files else _NUM_COUNTED_STEPS
        self._tried: dict[Setting, _Outcome] = {}
        self._is_over = not self._is_anything_open()

    def begin_training(self) -> None:
        """Training steps follow, where passes without training were planned for: begin anew."""
        if self._trains:
            return
        self._trains = True
        self._profiler.begin_training()
        if replace(self.setting, update=self._start.update) != self._start:
            self._engine.adopt(self._start, self._order)
            self.setting = self._start
        self.choice, self._measured, self._tried = None, None, {}
        self._since = self._next = self._num_more = 0
        self._num_counted, self._is_over = self._num_warm, not self._is_anything_open()

    # -- which steps are measured

    def begin_step(self, index: int, *, is_recorded: bool, is_undisturbed: bool, update: str) -> bool:
        """A step begins: choose, if all is known by now; return whether its bytes are counted.

        Args:
            is_recorded: the recorder is needed for something else.
            is_undisturbed: nobody could write to weights since the last step.
            update: the kind that this run has.
        """
        self._has_fallen_back = self._has_fallen_back and index == self._since
        self._next = index
        self._is_undisturbed, self.setting = is_undisturbed, replace(self.setting, update=update)
        if index == self._timed().stop and self._waits_for_update(index):
            self._num_more += 1
        if index == self._timed().stop:
            self._profiler.end_timing()
            self._measured = self._measure()
            if not self._is_over:
                self._decide(index)
        is_counted = self._since <= index < self._since + self._num_counted or is_recorded
        self._profiler.begin_step(counts=is_counted, times=index in self._timed())
        return is_counted

    def _timed(self) -> range:
        """Steps whose times are taken: behind those that are counted, and not where a recording is wanted."""
        first, record = self._since + self._num_counted, self._config.record_step
        if record is not None and first <= record < first + _NUM_TIMED_STEPS:
            first = record + 1
        return range(first, first + _NUM_TIMED_STEPS + self._num_more)

    def _waits_for_update(self, index: int) -> bool:
        """Whether one more step is timed, because gradients accumulate and nothing was updated so far."""
        is_free = index != self._config.record_step and self._num_more < _MOST_MORE_STEPS
        return self._trains and is_free and self._profiler.lacks_update

    def profile(self) -> UnitProfile | None:
        """What was measured last; None before."""
        return self._measured

    def settled(self) -> UnitProfile | None:
        """What was measured under the setting that the run stays with; None while that is open."""
        return self._measured if self._is_over else None

    def _measure(self) -> UnitProfile | None:
        machine = None if self._is_over else self._machine()
        found = self._profiler.profile(self.setting, emulated=self._emulated, machine=machine)
        if found is None:
            return None
        stay = self._is_undisturbed or found.num_passes > 1
        return replace(found, workload=replace(found.workload, undisturbed=stay))

    def begin_pass(self, *, is_undisturbed: bool) -> bool:
        """A pass without training begins: measure it where nothing else will run; return whether bytes are counted."""
        if self._trains or self._is_over:
            self._profiler.note_disturbance()
            return False
        self._num_passes += 1
        return self.begin_step(
            self._num_passes - 1, is_recorded=False, is_undisturbed=is_undisturbed, update=self.setting.update
        )

    def end_pass(self) -> None:
        """It is over."""
        if not self._trains:
            self._profiler.note_home()
            self._profiler.end_step()

    def end_step(self, index: int) -> None:
        """A step is over, all of it."""
        self._profiler.end_step()
        if index == 0 and self._config.activations == "auto" and self._config.device_memory is not None:
            self._keep_within_limit()

    def _keep_within_limit(self) -> None:
        """Let units recompute from the second step on, where the first one's activations were more than allowed."""
        assert self._limit is not None, "an amount is allowed"
        took, left = self._profiler.peak.activations, self._limit - self._need.total(self.setting.k)
        if took <= left:
            return
        self._engine.activations.recompute_all()
        self.setting = replace(self.setting, activations=self._engine.activations.policies())
        warnings.warn(
            f"activations took {_size(took)} ({took} bytes) in the first step, but device_memory leaves "
            f"{max(left, 0)} bytes for them: from now on units recompute theirs in backward. Set activations to "
            "'recompute' to begin with it, or to 'keep' to allow more.",
            SuperpipeWarning,
            stacklevel=2,
        )

    def close(self) -> None:
        """Measure no more."""
        self._profiler.close()

    # -- what is open

    def _is_anything_open(self) -> bool:
        asked = self._asked(self._order)
        return None in (asked.k, asked.resident, asked.micro_batches, *asked.activations)

    def _asked(self, order: Sequence[int]) -> Asked:
        return asked_of(
            self._config,
            self.setting,
            self._engine.activations,
            order,
            has_limit=self._limit is not None,
            shares_memory=self._emulated,
        )

    # -- the choice

    def _decide(self, index: int) -> None:
        if (profile := self._measured) is None:
            self._is_over = True
            return
        self._order = profile.indices
        self._tried[self.setting] = _Outcome(statistics.median(profile.step_s), profile.peak.total)
        if self.choice is not None and not self._has_missed(profile, self.choice):
            self._is_over = True
            return
        limits = Limits(self._limit, self._host_limit())
        try:
            choice = choose(profile.workload, profile.speeds, limits, self._asked(profile.indices))
        except BudgetError as error:
            self._is_over = True
            self.plan = f"no plan was found, the run goes on with k={self.setting.k}: {error}"
            warnings.warn(self.plan, SuperpipeWarning, 2)
            return
        wanted = self._by_registration(choice.setting)
        if wanted != self.setting and (wanted in self._tried or len(self._tried) >= _MOST_PLANS):
            self._settle(index)
            return
        self.choice = choice
        self._say(choice.explain())
        if wanted == self.setting:
            self._is_over = True
            self._has_missed(profile, choice)
        else:
            self._change(wanted, index)

    def _by_registration(self, setting: Setting) -> Setting:
        """The same setting with its policies in the order of registration; units that are not used keep theirs."""
        policies = list(self._engine.activations.policies())
        for place, unit in enumerate(self._order):
            policies[unit] = setting.policy(place)
        return replace(setting, activations=tuple(policies))

    def _has_missed(self, profile: UnitProfile, choice: Choice) -> bool:
        """Whether steps take more than predicted; if so it is said."""
        found = "; ".join(missed(profile.step_s, profile.peak.total, choice.prediction, self._limit))
        if found:
            self._tell(f"superpipe: {found}.")
        return bool(found)

    def _settle(self, index: int) -> None:
        """Take the fastest of what was tried that fits, for good."""
        self._is_over = True
        fits = {
            setting: outcome
            for setting, outcome in self._tried.items()
            if self._limit is None or outcome.peak_bytes <= self._limit
        }
        best = min(fits or self._tried, key=lambda setting: self._tried[setting].step_s)
        self._say(
            f"{knobs(best)}, k_prime={best.k_prime}: the fastest of {len(self._tried)} plans "
            f"tried, {1e3 * self._tried[best].step_s:.4g} ms a step"
        )
        if best != self.setting:
            self._change(best, index)

    def _change(self, setting: Setting, index: int) -> None:
        try:
            self._engine.adopt(setting, self._order)
        except torch.OutOfMemoryError as error:
            self._is_over = True
            self._tell(
                f"superpipe: the device has no room for {setting.k + setting.resident} slots ({error}); the run goes "
                f"on with {self.setting.k + self.setting.resident}."
            )
            return
        self.setting, self._since, self._num_counted, self._num_more = setting, index, _NUM_NEW_STEPS, 0

    # -- out of memory

    @property
    def is_new(self) -> bool:
        """Whether the step that has begun is one of the first under a setting that replaced another."""
        is_first = self._since <= self._next < self._since + _NUM_NEW_STEPS
        return (self._since > 0 and is_first) or self._has_fallen_back

    def fall_back(self, index: int, reason: str, where: str) -> None:
        """The device had no room for a step: use the next smaller setting from this one on.

        Args:
            index: of the step.
            reason: what the device said.
            where: what ran last, in words.

        Raises:
            OutOfDeviceMemory: none is left; the message says what was tried, and what to do.
        """
        before = self.setting
        if not self._shrink(index):
            raise OutOfDeviceMemory(f"{self._shortage(before, reason, where)} {_NOTHING_SMALLER}")
        self._tell(
            f"superpipe: {self._shortage(before, reason, where)} The step is repeated with {knobs(self.setting)}."
        )

    def refusal(self, reason: str, where: str, index: int | None) -> str:
        """Return what to say of a step that is not repeated here; the next one gets a smaller setting, if one is left.

        Args:
            index: of the step; None for a pass that trains nothing.
        """
        before = self.setting
        said = self._shortage(before, reason, where, trains=index is not None)
        if index is None:
            return f"{said} Take a smaller batch, a smaller k, or device_memory to plan for less."
        if not self._shrink(index):
            return f"{said} {_NOTHING_SMALLER}"
        return (
            f"{said} What it has changed is undone: weights, buffers, states and random numbers are those of the last "
            "finished step, gradients are gone. Only whole steps that Lightning's automatic optimization or the "
            "Trainer of transformers hand over are repeated; here the batch is the loop's own. The plan is now "
            f"{knobs(self.setting)}: run the step again from its first forward, or take a smaller batch."
        )

    def _shortage(self, setting: Setting, reason: str, where: str, *, trains: bool = True) -> str:
        return shortage(setting, self._need, self._limit, reason, where, trains=trains)

    def _shrink(self, index: int) -> bool:
        """Change over to the next smaller setting; False if none is left."""
        self._profiler.drop()
        activations, config = self._engine.activations, self._config
        units = range(len(self._engine.units))
        can = [unit for unit in units if activations.is_open(unit) and "recompute" in activations.possible(unit)]
        may_split = [unit for unit in units if activations.splits(unit)] if config.micro_batches == "auto" else []
        setting = smaller(
            self.setting,
            opens_k=config.k == "auto",
            opens_resident=config.resident == "auto",
            may_recompute=can,
            may_split=may_split,
            num_units=len(units),
        )
        if setting is None:
            return False
        self._is_over = self._is_over or self.choice is not None
        self._engine.adopt(setting, self._order)
        self.setting, self._since, self._num_counted, self._num_more = setting, index, self._num_warm, 0
        self._has_fallen_back = True
        return True

    def _say(self, plan: str) -> None:
        self.plan = plan
        self._tell(f"superpipe: {plan}")


def _size(num_bytes: int) -> str:
    return naturalsize(num_bytes, binary=True)
