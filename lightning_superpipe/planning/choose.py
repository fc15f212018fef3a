"""The choice of all knobs that the user left open: by simulation, under limits of device and host memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from humanize import naturalsize

from lightning_superpipe.errors import BudgetError, PlanError
from lightning_superpipe.planning.disk_work import DiskWork
from lightning_superpipe.planning.margin import activation_margin
from lightning_superpipe.planning.need import device_need, host_use, num_slots
from lightning_superpipe.planning.prediction import PeakBytes, Prediction
from lightning_superpipe.planning.search import Search
from lightning_superpipe.planning.workload import Setting, Speeds, Workload

__all__ = ["Asked", "Choice", "Limits", "choose", "needed_bytes"]


@dataclass(frozen=True)
class Limits:
    """What a plan may take.

    Attributes:
        device_bytes: on the device; None sets no limit.
        host_bytes: on the host, all kinds together; None likewise.
    """

    device_bytes: int | None = None
    host_bytes: int | None = None


@dataclass(frozen=True)
class Asked:
    """What the user has decided; None leaves it open.

    Attributes:
        k, k_prime, resident: as in :class:`Setting`.
        activations: a policy for each unit, or None where it is open; empty leaves all open.
        micro_batches: parts of a batch inside units that recompute.
        update, update_on_device: as in :class:`Setting`.
        most_slots: where a limit of memory does not say so: more are not wanted.
    """

    k: int | None = None
    k_prime: int | None = None
    resident: int | None = None
    activations: tuple[str | None, ...] = ()
    micro_batches: int | None = 1
    update: str = "after_backward"
    update_on_device: float = 0.0
    most_slots: int | None = None


@dataclass(frozen=True)
class Choice:
    """A setting, what it will take, and why it was chosen.

    Attributes:
        setting: all knobs.
        prediction: of a step.
        need: device bytes by kind, each at its worst, with room for larger batches.
        limits: that it keeps.
        reason: for ``k``, in words.
        num_units: of the model.
        fits_whole: all units, with all that they keep, have room on the device.
        num_simulated: settings that were simulated to find it.
    """

    setting: Setting
    prediction: Prediction
    need: PeakBytes
    limits: Limits
    reason: str
    num_units: int
    fits_whole: bool
    num_simulated: int

    def explain(self) -> str:
        """Return three lines: the knobs with the reason, what becomes of activations, and what a step will take."""
        return "\n".join((self._window(), self._activations(), self._cost()))

    def _window(self) -> str:
        setting = self.setting
        line = f"k={setting.k}: {self.reason}"
        if setting.k_prime > 1:
            line += f", k_prime={setting.k_prime}"
        if setting.resident:
            room = "" if self.limits.device_bytes is None else f" in the spare {_size(self._resident_bytes)}"
            line += f"; {setting.resident} of {self.num_units} units stay resident{room}"
        return line

    @property
    def _resident_bytes(self) -> int:
        return self.setting.resident * self.need.slots // (self.setting.k + self.setting.resident)

    def _activations(self) -> str:
        policies = [self.setting.policy(index) for index in range(self.num_units)]
        counts = {policy: policies.count(policy) for policy in dict.fromkeys(policies)}
        if len(counts) == 1:
            line = f"activations: all {self.num_units} units {policies[0]} theirs"
        else:
            line = "activations: " + ", ".join(f"{count} units {policy}" for policy, count in counts.items())
        if self.setting.micro_batches > 1:
            line += f", in {self.setting.micro_batches} micro-batches"
        on_device = f", {self.setting.update_on_device:.0%} of the units on the device"
        return f"{line}; update {self.setting.update}{on_device if self.setting.update_on_device else ''}"

    def _cost(self) -> str:
        step, limit = self.prediction, self.limits.device_bytes
        allowed = "" if limit is None else f" of {_size(limit)}"
        return (
            f"predicted: {1e3 * step.step_s:.4g} ms a step ({step.busiest} alone takes {1e3 * step.bound_s:.4g} ms), "
            f"{_size(step.peak.total)}{allowed} on the device, {_size(step.host.total)} on the host"
            + (f"; files: {step.disk}" if step.disk != DiskWork() else "")
        )


def needed_bytes(workload: Workload, setting: Setting) -> PeakBytes:
    """Return the device bytes to allow for a setting, with the margin on activations."""
    return _with_margin(device_need(workload, setting), activation_margin(workload.batch_bytes))


def _with_margin(need: PeakBytes, margin: float) -> PeakBytes:
    return need._replace(activations=need.activations + int(margin * need.activations))


def choose(workload: Workload, speeds: Speeds, limits: Limits | None = None, asked: Asked | None = None) -> Choice:
    """Return the fastest setting that fits; of equally fast ones that which takes the least memory.

    Where a limit is given and everything fits, that is a plan in which all units stay on the device. Equal arguments
    give the same choice.

    Raises:
        PlanError: what was asked for is impossible.
        BudgetError: nothing that was asked for fits; the message says what would.

    Cost: at most a second for 200 units, two where they lie in files.

    >>> from lightning_superpipe.planning.workload import Curve, UnitWork
    >>> unit = UnitWork("h", 10, 10, forward_s=1.5, backward_s=3.0, activation_bytes=5, forward_bytes=5)
    >>> link = Speeds(h2d=Curve.steady(10.0), d2h=Curve.steady(10.0))
    >>> print(choose(Workload((unit,) * 8), link, Limits(device_bytes=100)).explain())
    k=2: the smallest without stalls
    activations: all 8 units keep theirs; update after_backward
    predicted: 3.8e+04 ms a step (compute alone takes 3.6e+04 ms), 65 Bytes of 100 Bytes on the device, 160 Bytes \
on the host
    """
    limits, asked = limits or Limits(), asked or Asked()
    _check(workload, asked)
    search = _search(workload, speeds, limits, asked)
    whole = search.whole() if limits.device_bytes is not None else None
    found = search.best() if whole is None else whole
    if found is None:
        raise BudgetError(_refusal(workload, speeds, limits, asked, search))
    return Choice(
        setting=found,
        prediction=search.predict(found),
        need=needed_bytes(workload, found),
        limits=limits,
        reason=search.reason(found, is_whole=found == whole),
        num_units=len(workload.units),
        fits_whole=found == whole,
        num_simulated=search.num_simulated,
    )


def _search(workload: Workload, speeds: Speeds, limits: Limits, asked: Asked) -> Search:
    beside_slots: dict[tuple[tuple[str, ...], int], float] = {}  # slots may take so much; below 0 nothing fits
    margin = activation_margin(workload.batch_bytes)

    def room_for_slots(setting: Setting) -> float:
        if limits.host_bytes is not None and host_use(workload, setting).total > limits.host_bytes:
            return -1
        need = needed_bytes(workload, setting)
        return math.inf if limits.device_bytes is None else limits.device_bytes - (need.total - need.slots)

    def fits(setting: Setting) -> bool:
        key = setting.activations, setting.micro_batches
        if key not in beside_slots:
            beside_slots[key] = room_for_slots(setting)
        return num_slots(workload, setting) * workload.slot_bytes <= beside_slots[key]

    def keeps(prediction: Prediction) -> bool:
        return limits.device_bytes is None or _with_margin(prediction.peak, margin).total <= limits.device_bytes

    return Search(
        workload,
        speeds,
        fits,
        keeps,
        k=asked.k,
        k_prime=asked.k_prime,
        resident=asked.resident,
        policies=asked.activations or (None,) * len(workload.units),
        micro_batches=asked.micro_batches,
        update=asked.update,
        update_on_device=asked.update_on_device,
        most_slots=asked.most_slots,
    )


def _check(workload: Workload, asked: Asked) -> None:
    n = len(workload.units)
    if not n:
        raise PlanError("the workload has no units: there is nothing to choose.")
    if asked.activations and len(asked.activations) != n:
        raise PlanError(f"activations holds {len(asked.activations)} policies for {n} units: one for each is needed.")
    if asked.k is not None and asked.k_prime is not None and asked.k_prime > asked.k:
        raise PlanError(f"k_prime={asked.k_prime} with k={asked.k}: between 1 and k units move at a time.")


def _refusal(workload: Workload, speeds: Speeds, limits: Limits, asked: Asked, search: Search) -> str:
    """Say what the least would be, and which decision of the user's stands against something that fits."""
    least = search.smallest(lambda setting: needed_bytes(workload, setting).total)
    need, host = needed_bytes(workload, least), host_use(workload, least)
    if limits.host_bytes is not None and host.total > limits.host_bytes:
        message = (
            f"training needs {_size(host.total)} ({host.total} bytes) of host memory ("
            f"{_size(host.weights)} of weights, {_size(host.gradients)} of gradients, {_size(host.states)} of "
            f"optimizer states, {_size(host.activations)} of activations); host_memory allows "
            f"{_size(limits.host_bytes)} ({limits.host_bytes} bytes)."
        )
    else:
        kept = f"anchors{' and updates on the device' if asked.update_on_device else ''}"
        message = (
            f"the smallest plan, {_knobs(least)}, needs {_size(need.total)} ({need.total} bytes) of device memory: "
            f"{_size(need.slots)} of slots, {_size(need.anchors)} of {kept}, {_size(need.gradients)} for gradients, "
            f"{_size(need.activations)} for activations; {_size(limits.device_bytes or 0)} "
            f"({limits.device_bytes} bytes) are allowed."
        )
    way = _way_out(workload, speeds, limits, asked)
    return f"{message} {way}"


def _way_out(workload: Workload, speeds: Speeds, limits: Limits, asked: Asked) -> str:
    free: dict[str, Asked] = {}
    if asked.k is not None:
        free[f"k={asked.k}"] = replace(asked, k=None)
    if asked.k_prime is not None and asked.k_prime > 1:
        free[f"k_prime={asked.k_prime}"] = replace(asked, k_prime=None)
    if asked.resident:
        free[f"resident={asked.resident}"] = replace(asked, resident=None)
    if asked.micro_batches is not None and asked.micro_batches > 1:
        free[f"micro_batches={asked.micro_batches}"] = replace(asked, micro_batches=None)
    if any(policy is not None for policy in asked.activations):
        free["activations"] = replace(asked, activations=())
    for name, freer in free.items():
        if (found := _search(workload, speeds, limits, freer).any_fitting()) is not None:
            return f"What you set as {name} forbids what would fit, such as {_knobs(found)}: leave it to 'auto'."
    if len(free) > 1:
        parts = None if asked.micro_batches != 1 else 1
        freest = Asked(micro_batches=parts, update=asked.update, update_on_device=asked.update_on_device)
        if (found := _search(workload, speeds, limits, freest).any_fitting()) is not None:
            return f"What you set as {', '.join(free)} forbids what would fit, such as {_knobs(found)}."
    split = "or" if asked.micro_batches is None else "let the batch be split (micro_batches), or"
    return f"Allow more, take a smaller batch, {split} mark smaller units."


def _knobs(setting: Setting) -> str:
    kinds = set(setting.activations) or {"keep"}
    policy = kinds.pop() if len(kinds) == 1 else "mixed"
    parts = f", micro_batches={setting.micro_batches}" if setting.micro_batches > 1 else ""
    return f"k={setting.k}, k_prime={setting.k_prime}, resident={setting.resident}, activations {policy}{parts}"


def _size(num_bytes: int) -> str:
    return naturalsize(num_bytes, binary=True)
