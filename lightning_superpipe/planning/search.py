"""The search behind a choice: settings in the order of their lower bounds, until no bound beats the best one played."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lightning_superpipe.planning.bounds import StepBounds
from lightning_superpipe.planning.prediction import Prediction
from lightning_superpipe.planning.simulate import simulate, simulate_within
from lightning_superpipe.planning.workload import Setting, Speeds, Workload

__all__ = ["MOST_PARTS", "Search"]

MOST_PARTS = 16
"""Of a batch, where the number is open: kernels for fewer samples take longer than whole batches let one expect."""

_NUM_LEVELS = 9  # counts of units with another policy than to keep are tried at so many levels, then closer
_MOST_MIXES = 100  # up to so many ways to give policies to units are all tried
_WINDOWS = (2, 3, 4, 6, 8)
_MOST_PLAYED_UNITS = 8000  # so many units may be played in all: bounds order settings well, so the best come early
_NO_STALL = 0.01  # of a step
_WORTH_SPLITTING = 0.95  # of the time with fewer micro-batches


class _Found(NamedTuple):
    """The seconds of a setting's steps, and how many units recompute and offload, as far as levels were tried."""

    seconds: float
    setting: Setting
    mix: tuple[int, int] | None


class Search:
    """All settings that are left open, and the fastest of them.

    Args:
        fits: whether a setting keeps within all limits, as counted; with more slots it never begins to fit.
        keeps: whether it does so when played, since copies may be late.
        k, k_prime, resident: as asked for, None where open.
        update, update_on_device: as asked for.
        most_slots: more are not wanted, None for no limit.
        policies: as asked for, of each unit.
        micro_batches: as asked for, None where open: 1, 2, 4 and so on, as far as there are samples.

    Attributes:
        tie: relative; steps that differ less are as good as each other.
        num_simulated: settings played so far.
    """

    tie = 0.005

    def __init__(
        self,
        workload: Workload,
        speeds: Speeds,
        fits: Callable[[Setting], bool],
        keeps: Callable[[Prediction], bool],
        *,
        k: int | None,
        k_prime: int | None,
        resident: int | None,
        policies: Sequence[str | None],
        micro_batches: int | None,
        update: str,
        update_on_device: float,
        most_slots: int | None,
    ) -> None:
        n = self._n = len(workload.units)
        self._most_slots = n if most_slots is None else min(n, most_slots)
        self._workload, self._speeds = workload, speeds
        self._micro_batches = [micro_batches] if micro_batches is not None else _parts(workload.samples)
        self._given: dict[str, Any] = {
            "micro_batches": self._micro_batches[0],
            "update": update,
            "update_on_device": update_on_device,
        }
        self._fits, self._keeps = fits, keeps
        self._k = None if k is None else min(k, n)
        self._k_prime = None if k_prime is None else min(k_prime, n if self._k is None else self._k)
        self._resident, self._policies = resident, list(policies)
        self._most_played = max(20, _MOST_PLAYED_UNITS // max(n, 1))
        self._bounds = StepBounds(workload, speeds)
        self._played: dict[Setting, Prediction] = {}
        self._too_slow: dict[Setting, float] = {}  # and the limits that they do not keep
        self._can_recompute = self._by_saving("recompute")
        self._can_offload = self._by_saving("offload")

    @property
    def num_simulated(self) -> int:
        """How many settings were played."""
        return len(self._played.keys() | self._too_slow.keys())

    def predict(self, setting: Setting) -> Prediction:
        """Play a setting, once."""
        found = self._played.get(setting)
        if found is None:
            found = self._played[setting] = simulate(self._workload, self._speeds, setting)
        return found

    def _seconds(self, setting: Setting, limit_s: float = math.inf) -> float:
        """The time of a step, or the limit if it takes longer than that; infinite if it takes more than is allowed."""
        if setting not in self._played:
            if self._too_slow.get(setting, -math.inf) >= limit_s:
                return limit_s
            found = simulate_within(self._workload, self._speeds, setting, limit_s)
            if found is None:
                self._too_slow[setting] = limit_s
                return limit_s
            self._played[setting] = found
        prediction = self._played[setting]
        return prediction.step_s if self._keeps(prediction) else math.inf

    # -- what there is

    def _by_saving(self, policy: str) -> list[int]:
        """Units that may have a policy, those first for which it pays most; of equal ones those used first.

        What the last units save is in use at the peak anyway, and what the first save has the longest way to go.
        """

        def saves_per_second(index: int) -> float:
            unit = self._workload.units[index]
            saved = unit.activation_bytes - unit.input_bytes if policy == "recompute" else unit.offload_bytes
            return -saved / max(unit.forward_s, 1e-12) if policy == "recompute" else -float(saved > 0)

        last = self._n - 1 if policy == "offload" else self._n
        lowest = self._workload.lowest if self._workload.trains else self._n
        able = [
            index
            for index in range(lowest, last)
            if self._policies[index] is None and policy in self._workload.units[index].policies
        ]
        return sorted(able, key=lambda index: (saves_per_second(index), index))

    def _mix(self, num_recomputed: int, num_offloaded: int) -> tuple[str, ...]:
        """So many units offload, and of the others so many recompute; the rest keeps."""
        policies = [policy or "keep" for policy in self._policies]
        for index in self._can_offload[:num_offloaded]:
            policies[index] = "offload"
        left = [index for index in self._can_recompute if policies[index] == "keep"]
        for index in left[:num_recomputed]:
            policies[index] = "recompute"
        return tuple(policies)

    def _mixes(self) -> Iterator[tuple[tuple[str, ...], tuple[int, int] | None]]:
        """Policies to try, and how many units recompute and offload; None where all there are are tried."""
        open_policies = [self._open_policies(index) for index in range(self._n)]
        if math.prod(len(each) for each in open_policies) <= _MOST_MIXES:
            yield from ((policies, None) for policies in itertools.product(*open_policies))
            return
        recomputes, offloads = len(self._can_recompute), len(self._can_offload)
        for num_offloaded in _levels(offloads):
            for num_recomputed in _levels(recomputes):
                if num_offloaded + num_recomputed <= max(recomputes, offloads):
                    yield self._mix(num_recomputed, num_offloaded), (num_recomputed, num_offloaded)

    def _open_policies(self, index: int) -> list[str]:
        if (asked := self._policies[index]) is not None:
            return [asked]
        others = {"recompute": self._can_recompute, "offload": self._can_offload}
        return ["keep", *(policy for policy, units in others.items() if index in units)]

    def _is_split(self, policies: Sequence[str]) -> bool:
        """Whether micro-batches make a difference under these policies."""
        units = zip(policies, self._workload.units, strict=True)
        return any(policy == "recompute" and unit.splits for policy, unit in units)

    def _least_k(self) -> int:
        if self._k is not None:
            return self._k
        return min(self._n, 1 if self._k_prime is None else self._k_prime)

    def _window(self, num_slots: int) -> Setting:
        """The setting with so many slots, before activations are decided: a small window, the others stay."""
        least = self._least_k()
        k_prime = self._k_prime or 1
        if self._k is not None:
            k = self._k
        elif self._resident is not None:
            k = max(least, num_slots - self._resident)
        else:
            k = min(num_slots, max(least, k_prime + 2))
        return Setting(k=k, k_prime=min(k_prime, k), resident=num_slots - k, **self._given)

    def _slot_range(self) -> tuple[int, int]:
        """The fewest and the most slots that what was asked for allows."""
        least = self._least_k() + (self._resident or 0)
        if self._k is not None and self._resident is not None:
            return min(least, self._n), min(least, self._n)
        return min(least, self._n), max(min(least, self._n), self._most_slots)

    def _with_slots(self, setting: Setting) -> Setting | None:
        """The setting with as many slots as fit; None if the fewest do not."""
        low, high = self._slot_range()

        def sized(num_slots: int) -> Setting:
            window = self._window(num_slots)
            return replace(setting, k=window.k, k_prime=window.k_prime, resident=window.resident)

        if not self._fits(sized(low)):
            return None
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._fits(sized(middle)) else (low, middle - 1)
        return sized(low)

    def _with_fewer_slots(self, setting: Setting) -> Setting | None:
        num_slots = setting.k + setting.resident - 1
        if num_slots < self._slot_range()[0]:
            return None
        window = self._window(num_slots)
        return replace(setting, k=window.k, k_prime=window.k_prime, resident=window.resident)

    # -- the best

    def best(self) -> Setting | None:
        """Return the fastest setting, with no more slots than it needs; None if none fits.

        More micro-batches have to gain more than a little: smaller kernels are slower, and sums come out otherwise.
        """
        best: _Found | None = None
        for parts in self._micro_batches:
            best = self._fastest(parts, math.inf if best is None else best.seconds * _WORTH_SPLITTING) or best
        if best is None:
            return None
        setting = best.setting if best.mix is None else self._closer(best.setting, best.mix)
        return self._smallest_as_fast(self._best_window(setting))

    def _fastest(self, parts: int, limit_s: float) -> _Found | None:
        """Return the fastest setting with so many micro-batches; None if none takes less time than the limit."""
        waiting: list[tuple[float, int, Setting, tuple[int, int] | None]] = []
        for policies, mix in self._mixes():
            if parts > self._micro_batches[0] and not self._is_split(policies):
                continue
            base = replace(self._window(1), activations=policies, micro_batches=parts)
            if (setting := self._with_slots(base)) is not None:
                heapq.heappush(waiting, (self._bounds.seconds(setting), len(waiting), setting, mix))
        best: _Found | None = None
        while waiting and self.num_simulated < self._most_played // 2:
            bound_s, _, setting, mix = heapq.heappop(waiting)
            if best is not None:
                limit_s = best.seconds * (1 - self.tie)
            if bound_s >= limit_s:
                break
            seconds = self._seconds(setting, limit_s)
            if math.isinf(seconds):
                if (smaller := self._with_fewer_slots(setting)) is not None:
                    heapq.heappush(waiting, (self._bounds.seconds(smaller), -self.num_simulated, smaller, mix))
            elif seconds < limit_s:
                best = _Found(seconds, setting, mix)
        return best

    def _closer(self, setting: Setting, mix: tuple[int, int]) -> Setting:
        """Look between the levels at which policies were tried."""
        step = max(_spacing(len(self._can_recompute)), _spacing(len(self._can_offload))) // 2
        while step:
            for change in ((-step, 0), (0, -step), (step, 0), (0, step), (step, -step), (-step, step)):
                other = mix[0] + change[0], mix[1] + change[1]
                if min(other) < 0 or self.num_simulated >= self._most_played:
                    continue
                base = replace(setting, activations=self._mix(*other))
                found = self._with_slots(base)
                limit_s = self.predict(setting).step_s * (1 - self.tie / 5)
                if found is None or self._bounds.seconds(found) >= limit_s:
                    continue
                if self._seconds(found, limit_s) < limit_s:
                    setting, mix = found, other
            step //= 2
        return setting

    def _best_window(self, setting: Setting) -> Setting:
        """Divide the slots between the window and units that stay."""
        if self._k is not None or self._resident is not None:
            return setting
        num_slots = setting.k + setting.resident
        for k in (*_WINDOWS, num_slots):
            for k_prime in (1, 2) if self._k_prime is None else (self._k_prime,):
                if k_prime <= k <= num_slots:
                    other = replace(setting, k=k, k_prime=k_prime, resident=num_slots - k)
                    limit_s = self.predict(setting).step_s * (1 - self.tie / 5)
                    if self._bounds.seconds(other) < limit_s and self._seconds(other, limit_s) < limit_s:
                        setting = other
        return setting

    def _smallest_as_fast(self, setting: Setting) -> Setting:
        """Give back the slots, then the window, that make no difference."""
        limit_s = self.predict(setting).step_s * (1 + self.tie)
        most_s = math.nextafter(limit_s, math.inf)  # who takes longer is given up, and is not as fast
        low, high = self._slot_range()
        high = min(high, setting.k + setting.resident)

        def sized(num_slots: int) -> Setting:
            if self._k is not None or self._resident is not None:
                window = self._window(num_slots)
                return replace(setting, k=window.k, k_prime=window.k_prime, resident=window.resident)
            k = self._n if num_slots == self._n else min(setting.k, num_slots)
            return replace(setting, k=k, k_prime=min(setting.k_prime, k), resident=num_slots - k)

        while low < high:
            middle = (low + high) // 2
            is_fast = self._bounds.seconds(sized(middle)) <= limit_s and self._seconds(sized(middle), most_s) <= limit_s
            low, high = (low, middle) if is_fast else (middle + 1, high)
        setting = sized(low)
        if self._k is None and self._resident is None and low < self._n:
            for k in range(max(2, self._least_k()), min(setting.k, 5)):
                other = replace(setting, k=k, k_prime=min(setting.k_prime, k), resident=low - k)
                if self._seconds(other, most_s) <= limit_s:
                    return other
        return setting

    def whole(self) -> Setting | None:
        """The setting in which every unit stays and keeps what may be kept, if it fits."""
        if self._k not in (None, self._n) or self._resident:
            return None
        k_prime = min(self._k_prime or 1, self._n)
        setting = Setting(k=self._n, k_prime=k_prime, activations=self._mix(0, 0), **self._given)
        return setting if self._fits(setting) else None

    # -- where nothing is the best

    def any_fitting(self) -> Setting | None:
        """Any setting that fits, without playing it; the first in order."""
        for parts in self._micro_batches:
            for policies, _ in self._mixes():
                base = replace(self._window(1), activations=policies, micro_batches=parts)
                if (setting := self._with_slots(base)) is not None:
                    return setting
        return None

    def smallest(self, need: Callable[[Setting], int]) -> Setting:
        """The setting that needs least, whether it fits or not."""
        window = self._window(self._slot_range()[0])
        settings = [
            replace(window, activations=policies, micro_batches=parts)
            for parts in self._micro_batches
            for policies, _ in self._mixes()
        ]
        return min(settings, key=need)

    def reason(self, setting: Setting, *, is_whole: bool) -> str:
        """Say why these slots, in words."""
        if is_whole:
            return "everything fits, so no unit leaves the device, as without streaming"
        step = self.predict(setting)
        if self._k is not None:
            return "as asked"
        waits_s = sum(step.stalls_s[1:])
        if waits_s <= _NO_STALL * step.step_s:
            return "the smallest without stalls"
        waits = f"compute waits for {step.stall_s / step.step_s:.0%} of a step"
        more = self._with_slots(setting)
        most = 0 if more is None else more.k + more.resident
        if setting.k + setting.resident == self._n:
            return f"every unit has a slot, {waits}"
        if most <= setting.k + setting.resident:
            return f"{'all that fits' if most != self._most_slots else 'more need device_memory'}, {waits}"
        return f"more would not be faster, {waits}"


def _parts(samples: int) -> list[int]:
    return [1 << power for power in range(min(samples, MOST_PARTS).bit_length())]


def _spacing(count: int) -> int:
    return max(1, -(-count // (_NUM_LEVELS - 1)))


def _levels(count: int) -> list[int]:
    return sorted({*range(0, count, _spacing(count)), count})
