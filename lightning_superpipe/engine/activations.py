"""What becomes of the activations that autograd saves in a unit's call: kept, recomputed, or moved to the host.

A policy never changes a number. Where a call cannot be recomputed it is kept, and said once by name; where the user
named that very unit, it is an error.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_superpipe.engine.containers import take_apart
from lightning_superpipe.engine.micro_batches import MicroBatches, SplitError, why_not_split
from lightning_superpipe.engine.offload import Offload
from lightning_superpipe.engine.recompute import Repeatable
from lightning_superpipe.engine.side_effects import signature, why_not_again
from lightning_superpipe.engine.swap import owner_of
from lightning_superpipe.engine.unit import Unit
from lightning_superpipe.errors import ConfigError, SuperpipeWarning, UnsupportedError

if TYPE_CHECKING:
    from lightning_superpipe.engine.engine import Engine

__all__ = ["Activations", "Choice", "Policy", "choose_policies"]

Call = Callable[..., Any]
_WILDCARDS = frozenset("*?[")


class Policy(str, Enum):
    """What happens to saved activations of one unit."""

    KEEP = "keep"
    """Autograd keeps them on the device."""
    RECOMPUTE = "recompute"
    """Only the unit's inputs are kept; the rest is computed again in backward."""
    OFFLOAD = "offload"
    """They go to the host and come back for backward."""


class Choice(NamedTuple):
    """The policy of one unit, whether the user named that very unit, and whether the user left it open."""

    policy: Policy = Policy.KEEP
    is_explicit: bool = False
    is_open: bool = False


def choose_policies(wish: str | Mapping[str, str], names: Sequence[str], *, micro_batches: int = 1) -> list[Choice]:
    """Return the choice of each unit for a configuration's ``activations``.

    Raises:
        ConfigError: a pattern matches no unit.

    >>> [choice.policy.value for choice in choose_policies({"h.*": "recompute"}, ["wte", "h.0", "h.1"])]
    ['keep', 'recompute', 'recompute']
    """
    patterns = dict(wish) if isinstance(wish, Mapping) else {"*": wish}
    automatic = Policy.KEEP if micro_batches == 1 else Policy.RECOMPUTE
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"activations: {pattern!r} matches no unit. Units are {', '.join(map(repr, names[:8]))}"
                f"{', ...' if len(names) > 8 else ''}."
            )
    choices = []
    for name in names:
        found = next((each for each in patterns if fnmatchcase(name, each)), None)
        policy = "keep" if found is None else patterns[found]
        chosen = automatic if policy == "auto" else Policy(policy)
        is_explicit = found is not None and policy != "auto" and not _WILDCARDS & set(found)
        choices.append(Choice(chosen, is_explicit, is_open=policy == "auto" and micro_batches == 1))
    return choices


class Activations:
    """Runs the calls of units in forward under their policies.

    Args:
        choices: one per unit.
        num_parts: micro-batches inside units that recompute; above 1 they were asked for, and stay.

    Raises:
        UnsupportedError: the batch of a unit that recomputes cannot be split.
        ConfigError: a unit that was named cannot do what was asked.
    """

    def __init__(self, engine: Engine, choices: Sequence[Choice], offload: Offload, *, num_parts: int) -> None:
        self._engine = weakref.ref(engine)
        self._choices = list(choices)
        self._num_parts, self._are_parts_asked_for = num_parts, num_parts > 1
        self._splitters: dict[int, MicroBatches] = {}
        self._unsplit: set[int] = set()  # units that turned out to couple samples
        self._said: set[tuple[int, str]] = set()
        self.offload = offload
        for unit, choice in zip(engine.units, choices, strict=True):
            if choice.policy is Policy.RECOMPUTE:
                self._check(unit)

    def _check(self, unit: Unit) -> None:
        modules = list(unit.module.modules())
        if self._num_parts > 1 and (reason := why_not_split(modules)) is not None:
            raise MicroBatches(unit.name, self._num_parts).refusal(reason)
        if (reason := why_not_again(modules, ())) is not None:
            self._keep(unit, reason)

    def policies(self) -> tuple[str, ...]:
        """What becomes of each unit's activations."""
        return tuple(choice.policy.value for choice in self._choices)

    def is_open(self, unit: int) -> bool:
        """Whether the user left it open what becomes of a unit's activations."""
        return self._choices[unit].is_open

    def possible(self, unit: int) -> tuple[str, ...]:
        """What may become of a unit's activations, as far as is known by now."""
        engine = self._require_engine()
        refuses = any(index == unit for index, _ in self._said)
        if refuses or why_not_again(engine.units[unit].module.modules(), ()) is not None:
            return (Policy.KEEP.value, Policy.OFFLOAD.value)
        return tuple(policy.value for policy in Policy)

    def splits(self, unit: int) -> bool:
        """Whether a unit's batch may be split, as far as is known by now."""
        modules = list(self._require_engine().units[unit].module.modules())
        return unit not in self._unsplit and why_not_split(modules) is None

    def adopt(self, policies: Sequence[str], num_parts: int) -> None:
        """Let units do something else from now on, where the user left it open.

        Args:
            policies: of each unit; empty leaves them as they are.
            num_parts: micro-batches inside units that recompute, if none were asked for.
        """
        if not self._are_parts_asked_for and num_parts != self._num_parts:
            self._num_parts = num_parts
            self._splitters.clear()
        if policies:
            self._choices = [
                choice._replace(policy=Policy(policy)) if choice.is_open else choice
                for choice, policy in zip(self._choices, policies, strict=True)
            ]

    def recompute_all(self) -> None:
        """Let every unit that keeps recompute from now on."""
        self._choices = [
            each._replace(policy=Policy.RECOMPUTE) if each.policy is Policy.KEEP else each for each in self._choices
        ]

    def run(self, unit: Unit, module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a unit's outermost call in forward, with gradients.

        Args:
            module: that is called: the unit's root, or a part of it.
            call: computes the output.
        """
        policy = self._choices[unit.index].policy
        self.offload.boundary()
        if policy is Policy.KEEP:
            return call(*args, **kwargs)
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            self._keep(unit, "a checkpoint or saved-tensor hooks of your own are around it, and they decide")
        elif policy is Policy.OFFLOAD:
            with self.offload.saving(unit):
                return call(*args, **kwargs)
        elif (reason := self._why_not_recompute(unit, module, args, kwargs)) is not None:
            self._keep(unit, reason)
        else:
            return self._recompute(unit, call, args, kwargs)
        return call(*args, **kwargs)

    # -- recomputation

    def _why_not_recompute(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any) -> str | None:
        if module is not unit.module:
            return f"a part of it ({type(module).__name__}) is called by itself"
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "it runs inside a torch.func transform"
        if unit.has_foreign_weights(self._require_engine().catalog.host_of):
            return "it runs with other weights than its own"
        if unit.has_own_storage:
            return "somebody holds its parameters beyond its call"
        return why_not_again(unit.module.modules(), take_apart((args, kwargs))[0])

    def _recompute(self, unit: Unit, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        modules = list(unit.module.modules())

        def run(*args: Any, **kwargs: Any) -> Any:
            again = self._again(unit)
            repeatable = Repeatable(self._device, modules, call, _watched_weights(unit), again)
            output = repeatable.run(args, kwargs)
            if repeatable.reason is not None:
                self._keep(unit, repeatable.reason)
            return output

        if self._num_parts == 1 or not (self._are_parts_asked_for or self.splits(unit.index)):
            return run(*args, **kwargs)
        splitter = self._splitters.setdefault(unit.index, MicroBatches(unit.name, self._num_parts))
        try:
            return splitter.run(modules, run, call, args, kwargs)
        except SplitError as error:
            if self._are_parts_asked_for:
                raise
            self._keep_whole(unit, error)
        return run(*args, **kwargs)

    @property
    def _device(self) -> torch.device:
        return self._require_engine().device

    def _require_engine(self) -> Engine:
        engine = self._engine()
        assert engine is not None, "units are called through their engine"
        return engine

    def _again(self, unit: Unit) -> Call:
        """A call of the unit in backward. Graphs hold it, so it holds the module weakly."""
        own, module_ref, name, sealed = weakref.ref(self), weakref.ref(unit.module), unit.name, self._seal(unit)

        def again(*args: Any, **kwargs: Any) -> Any:
            activations, module = own(), module_ref()
            if activations is None or module is None or owner_of(module) is None:
                raise UnsupportedError(
                    f"the activations of unit {name!r} must be recomputed, but its module or its session is gone. Call "
                    "backward before, or use activations='keep'."
                )
            if (changed := _difference(sealed, activations._seal(unit_of(activations, module)))) is not None:
                raise UnsupportedError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{changed} of unit {name!r} changed between its forward and its backward, so its activations "
                    f"cannot be recomputed. Use activations={{{name!r}: 'keep', ...}}."
                )
            return module(*args, **kwargs)

        def unit_of(activations: Activations, module: nn.Module) -> Unit:
            return next(unit for unit in activations._require_engine().units if unit.module is module)

        return again

    def _seal(self, unit: Unit) -> tuple[object, ...]:
        """What must be as it was when the unit is called again."""
        weights = (unit.settled_stamp(), *(site.parameter._version for site in unit.anchor_sites))
        attributes, buffers = signature(unit.module.modules(), self._host_buffer)
        return weights, buffers, attributes

    def _host_buffer(self, held: Tensor) -> Tensor:
        host = self._require_engine().anchors.host_buffer(held)
        assert host is not None, "a buffer was asked about"
        return host

    def _keep_whole(self, unit: Unit, error: SplitError) -> None:
        """A unit gets its whole batch from now on: that it be split was chosen, and nobody's wish."""
        self._unsplit.add(unit.index)
        warnings.warn(f"unit {unit.name!r} gets its whole batch: {error}", SuperpipeWarning, stacklevel=2)

    def _keep(self, unit: Unit, reason: str) -> None:
        """Say why a unit keeps what it should not; refuse it where the user named the unit."""
        policy, is_explicit, _ = self._choices[unit.index]
        if is_explicit:
            raise ConfigError(
                f"activations: unit {unit.name!r} cannot {policy.value}: {reason}. Use 'keep' for it, or name it by a "
                "pattern such as '*', so that it may keep."
            )
        if (unit.index, reason) in self._said:
            return
        self._said.add((unit.index, reason))
        warnings.warn(
            f"activations: unit {unit.name!r} keeps what it should {policy.value}: {reason}.",
            SuperpipeWarning,
            stacklevel=2,
        )


def _watched_weights(unit: Unit) -> Callable[[], str | None]:
    """Return who says, after a call, what the call did to its weights that forbids to repeat it."""
    before = unit.bound_versions()

    def found() -> str | None:
        if unit.bound_versions() != before:
            return "its forward changes its weights"
        return "it hands out its parameters" if unit.gives_out_twins() else None

    return found


def _difference(sealed: tuple[object, ...], now: tuple[object, ...]) -> str | None:
    names = ("weights", "buffers", "attributes")
    return next((name for name, one, other in zip(names, sealed, now, strict=True) if one != other), None)
