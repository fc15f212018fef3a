"""The one schema of all options, shared by every front end and by the configuration files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from lightning_superpipe.errors import ConfigError
from lightning_superpipe.option_checks import check_count, check_dtype, is_number, listed, nearest, parse_bytes

__all__ = [
    "ACTIVATIONS",
    "STORED_KINDS",
    "ActivationChoice",
    "Adversary",
    "Auto",
    "Disk",
    "Link",
    "StoreChoice",
    "SuperpipeConfig",
    "UnitChoice",
    "Update",
    "WireDtype",
]

Auto = Literal["auto"]
Update = Literal["auto", "in_backward", "after_backward", "at_once"]
ACTIVATIONS = ("keep", "recompute", "offload", "auto")
ActivationChoice = str | Mapping[str, str]
WireDtype = Literal["bfloat16", "float16"]
STORED_KINDS = ("weights", "states", "gradients", "activations")
_STORES = ("host", "disk")
_ON_DISK = ("weights", "states")
StoreChoice = str | Mapping[str, str]
UnitChoice = str | Sequence[str] | Callable[[str, nn.Module], bool] | None


@dataclass(frozen=True)
class Link:
    """An emulated link between host and device, for machines without an accelerator.

    Attributes:
        h2d_gb_s: host-to-device bandwidth in 10^9 bytes per second; None copies at memory speed.
        d2h_gb_s: device-to-host bandwidth, likewise.
        latency_ms: fixed cost of each copy in milliseconds.
    """

    h2d_gb_s: float | None = None
    d2h_gb_s: float | None = None
    latency_ms: float = 0.0

    def __post_init__(self) -> None:
        for name in ("h2d_gb_s", "d2h_gb_s"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > 0):
                raise ConfigError(f"link.{name}={value!r}: a bandwidth is positive, or null for memory speed.")
        if not (is_number(self.latency_ms) and self.latency_ms >= 0):
            raise ConfigError(f"link.latency_ms={self.latency_ms!r}: a latency is not negative.")


@dataclass(frozen=True)
class Disk:
    """Files in place of host memory, for the kinds that ``store`` puts on disk.

    Attributes:
        folder: where; None takes a folder of its own below the temporary folder, or below the user's cache where the
            temporary folder is memory itself.
        keep: leave weights and optimizer states in ``folder`` when a training ends, with a checksum for each tensor;
            :func:`lightning_superpipe.open_kept` reads them. Needs ``folder``. Otherwise no file outlives the run.
        ring: buffers in host memory between disk and device, as many for weights that stay from backward to their
            update (each as large as the largest unit), and as many between disk and update (weights and states);
            ``"auto"``: 3, or 2 where ``host_memory`` holds no more. Beyond them it holds whole units.
        requests: reads or writes of one unit under way at once.
        undo: write each update beside the bytes of the step before, so that a step whose read or write fails is undone
            as a whole; files of what is trained are twice as large, no byte more is written. Weights or states that are
            in host memory are copied there until the step is finished. False overwrites all in place.
        endurance_tb: bytes that may be written in the drive's life (its TBW), in 10^12; None if not known.
    """

    folder: str | None = None
    keep: bool = False
    ring: int | Auto = "auto"
    requests: int = 4
    undo: bool = True
    endurance_tb: float | None = None

    def __post_init__(self) -> None:
        if self.folder is not None and not (isinstance(self.folder, str) and self.folder):
            raise ConfigError(f"disk.folder={self.folder!r}: the name of a folder is allowed, or null.")
        for name in ("keep", "undo"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"disk.{name}={getattr(self, name)!r}: allowed are true and false.")
        if self.keep and self.folder is None:
            raise ConfigError("disk.keep=True needs disk.folder: say where the files shall stay.")
        if self.ring != "auto":
            check_count("disk.ring", self.ring, least=2, also="'auto'")
        check_count("disk.requests", self.requests)
        if self.endurance_tb is not None and not (is_number(self.endurance_tb) and self.endurance_tb > 0):
            raise ConfigError(f"disk.endurance_tb={self.endurance_tb!r}: a positive number of 10^12 bytes, or null.")


@dataclass(frozen=True)
class Adversary:
    """Makes timing and memory hostile, so that a missing fence shows as a wrong number. For tests and bug reports.

    Attributes:
        poison: fill device memory with NaN bytes when a unit leaves it.
        shuffle_slots: load each unit into a random free slot.
        max_delay_ms: each copy starts up to this much later (emulated lanes only).
        seed: of the random choices above.
    """

    poison: bool = True
    shuffle_slots: bool = True
    max_delay_ms: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class SuperpipeConfig:
    """What to stream and how.

    Attributes:
        k: most units on the device at once, those in flight included; ``"auto"`` begins with a small window, measures
            five steps (with files six) and changes over to what is fastest within ``device_memory`` and
            ``host_memory``.
        resident: units that stay on the device beside those ``k``, evenly spread; ``"auto"`` keeps what pays within
            ``device_memory``, after the same steps; where ``k`` is given, none without ``device_memory``.
        k_prime: units moved per transfer, ``1 <= k_prime <= k``; only ``k_prime < k`` overlaps copies with compute.
            ``"auto"`` is chosen together with ``k``, and is 1 where ``k`` is given.
        device_memory: bytes that the plan may use on the device (``"8GiB"`` or an integer); ``"free"`` takes what is
            free there when the run begins, but for a margin. None refuses nothing: where ``k`` is ``"auto"``, what an
            accelerator has free limits the choice.
        host_memory: bytes that weights, gradients, optimizer states and staging may take on the host together; None
            takes what is available. A run that needs more is refused; of units in files as many stay here as it holds.
        store: where what is not on the device lives: ``"host"``, ``"disk"`` (weights and optimizer states, masters
            among them, in files; gradients and activations stay in host memory), or a mapping of kinds (``"weights"``,
            ``"states"``, ``"gradients"``, ``"activations"``) to these; kinds it does not name stay on the host.
            Anchors, buffers, and what is trained in mostly frozen units (adapters) are on the host in any case.
        disk: the files of kinds on disk; None takes the defaults.
        wire_dtype: dtype in which parameters cross the link, lie in slots and compute (``"bfloat16"`` or
            ``"float16"``), while those of the module stay float32 masters on the host; None keeps their own. Not equal
            to the run in float32: it equals one whose module is a copy in the wire dtype, made anew from the masters
            before each forward, with gradients cast to float32. As ``module.to(dtype)`` would, this casts
            floating-point buffers too; floating-point inputs of units and of modules around them are cast as well
            (not the batch of a LightningModule's own steps), outputs are not.
        master_weights: ``"float32"``: parameters of 2 bytes are updated in float32, on masters that the optimizer's
            state holds (as ``"master"``), and get the rounded values after each step; None updates them as they are.
        units: class names, module names or patterns, or a callable ``(name, module) -> bool`` that marks the units;
            None finds them.
        activations: what becomes of the activations that autograd saves inside units: ``"keep"``, ``"recompute"`` (in
            backward), ``"offload"`` (to the host and back), or ``"auto"``: keep, but what pays where that exceeds
            ``device_memory``. Or a mapping of unit names or patterns to these, of which the
            first that matches counts: ``{"h.*": "recompute", "*": "keep"}``; units that none matches keep.
        micro_batches: parts that each batch is split into inside the units that recompute, so that weights cross the
            link once for all of them; above 1 ``activations="auto"`` means recompute, and sums are taken in another
            order. ``"auto"`` begins with 1 and lets the choice within ``device_memory`` split where that pays.
        pin_memory: page-lock the host store; ``"auto"`` does so where the device can use it.
        fused_optimizer: use torch's fused CPU kernels where the optimizer left the choice open; ``"auto"`` does so on
            accelerators only, where no choice could be bit-equal to an update on the device.
        update: when the optimizer's step runs, for optimizers that can be split by units (others run as a whole).
            ``"in_backward"``: each unit as soon as its gradients are home, where a loop is known to look at no gradient
            before the step (Lightning's automatic optimization without clipping or hooks that could look, or
            ``pipe.updating``). Where no hook could look afterwards either, ``p.grad`` is None after the step.
            ``"after_backward"``: unit by unit from ``optimizer.step()`` on, under the next forward. ``"at_once"``:
            before ``optimizer.step()`` returns. All are exact. ``"auto"`` takes the first that is possible, but the
            last where device and host are one memory.
        update_on_device: share of the units whose part of the step runs on the device, ``0.0`` to ``1.0``: gradients
            and states go there and come back with the weights, through memory for two units. Those that the next
            forward needs first come first; units that still lie in their slots are updated there and not loaded again.
            Optimizers that cannot be split by units are refused. Off by default, because the kernels of a device and of
            the host may differ in the last place (where they are the same, so are the bits). ``"auto"`` measures the
            first steps, and takes the share under which a simulated step is shortest, if that gains 5 %.
        step_aside: where all that the ordinary run holds fits on the device (weights, gradients, optimizer states and
            activations, with room to spare), let streaming end after the first steps, and that run go on there.
            ``"auto"`` does so where the framework runs the loop and no code of the user's could hold tensors of the
            host, as Lightning's automatic optimization and the Trainer of transformers without own hooks or callbacks;
            True in every loop; False never. Only where ``k``, ``resident`` and ``activations`` are open and nothing
            else asks for streaming, such as files; True is refused beside that.
        record_step: index of the training step whose lanes and memory are recorded; None records none.
        link: emulated link (machines without an accelerator).
        adversary: hostile timing and memory, for tests.

    Raises:
        ConfigError: an option has a wrong type or an impossible value.
    """

    k: int | Auto = "auto"
    k_prime: int | Auto = "auto"
    resident: int | Auto = "auto"
    device_memory: int | str | None = None
    host_memory: int | str | None = None
    store: StoreChoice = "host"
    disk: Disk | None = None
    wire_dtype: WireDtype | None = None
    master_weights: Literal["float32"] | None = None
    units: UnitChoice = None
    activations: ActivationChoice = "auto"
    micro_batches: int | Auto = 1
    pin_memory: bool | Auto = "auto"
    fused_optimizer: bool | Auto = "auto"
    update: Update = "auto"
    update_on_device: float | Auto = 0.0
    step_aside: bool | Auto = "auto"
    record_step: int | None = None
    link: Link | None = None
    adversary: Adversary | None = None

    def __post_init__(self) -> None:
        if self.k_prime != "auto":
            check_count("k_prime", self.k_prime, also="'auto'")
        if self.k != "auto":
            check_count("k", self.k, also="'auto'")
            if self.k_prime != "auto" and self.k_prime > self.k:
                raise ConfigError(
                    f"k_prime={self.k_prime} is larger than k={self.k}: at most k units are on the device, so at most "
                    f"k can move at once. Use 1 <= k_prime <= {self.k}."
                )
        if self.resident != "auto":
            check_count("resident", self.resident, least=0, also="'auto'")
        for name in ("pin_memory", "fused_optimizer", "step_aside"):
            if getattr(self, name) not in (True, False, "auto"):
                raise ConfigError(f"{name}={getattr(self, name)!r}: allowed are true, false and 'auto'.")
        if self.update not in get_args(Update):
            raise ConfigError(f"update={self.update!r}: allowed are {listed(get_args(Update))}.")
        _check_share(self.update_on_device, self.update)
        if self.update_on_device != 0 and any(self.is_on_disk(kind) for kind in ("weights", "states")):
            raise ConfigError(f"update_on_device={self.update_on_device!r} needs store='host': files go by the host.")
        check_dtype("wire_dtype", self.wire_dtype, get_args(WireDtype))
        check_dtype("master_weights", self.master_weights, ("float32",))
        step = self.record_step
        if step is not None and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
            raise ConfigError(f"record_step={step!r}: the index of a training step (0 or more), or null.")
        _check_units(self.units)
        if self.micro_batches != "auto":
            check_count("micro_batches", self.micro_batches, also="'auto'")
        _check_activations(self.activations, self.micro_batches)
        _check_store(self.store)
        for name, nested in _NESTED.items():
            if not isinstance(getattr(self, name), nested | None):
                raise ConfigError(f"{name}={getattr(self, name)!r}: a mapping of {_names(nested)} is allowed, or null.")
        for name in ("device_memory", "host_memory"):
            if getattr(self, name) is not None and (name, getattr(self, name)) != ("device_memory", "free"):
                object.__setattr__(self, name, parse_bytes(getattr(self, name)))
        if self.step_aside is True and (asked := self.needs_streaming):
            options = ", ".join(f"{name}={getattr(self, name)!r}" for name in asked)
            raise ConfigError(
                f"step_aside=True, but only streaming gives what is asked for with {options}. Leave one or the other "
                "out, or set step_aside='auto', which streams where it has to."
            )

    @classmethod
    def from_options(cls, **options: Any) -> SuperpipeConfig:
        """Build a config from keyword options; an unknown name is answered with the nearest known one.

        >>> SuperpipeConfig.from_options(kprime=2)
        Traceback (most recent call last):
        ...
        lightning_superpipe.errors.ConfigError: unknown option 'kprime': did you mean 'k_prime'?
        """
        _check_names(cls, options)
        for name, nested in _NESTED.items():
            if isinstance(options.get(name), Mapping):
                _check_names(nested, options[name], prefix=f"{name}.")
                options[name] = nested(**options[name])
        return cls(**options)

    @property
    def first_micro_batches(self) -> int:
        """Parts of a batch in the first step."""
        return 1 if self.micro_batches == "auto" else self.micro_batches

    @property
    def disk_options(self) -> Disk:
        """Options of files, the defaults where none are given."""
        return self.disk or Disk()

    @property
    def needs_streaming(self) -> list[str]:
        """Options that ask for what an ordinary run does not give.

        >>> SuperpipeConfig(k=2, store={"states": "disk"}).needs_streaming
        ['k', 'store']
        """
        is_asked = {
            **{name: getattr(self, name) != "auto" for name in ("k", "resident", "activations")},
            **{name: getattr(self, name) is not None for name in ("wire_dtype", "master_weights")},
            "micro_batches": self.micro_batches not in (1, "auto"),
            "store": any(map(self.is_on_disk, STORED_KINDS)),
            "update_on_device": self.update_on_device not in (0.0, "auto"),
        }
        return [name for name, asked in is_asked.items() if asked]

    def is_on_disk(self, kind: str) -> bool:
        """Whether ``store`` puts a kind of bytes into files.

        >>> config = SuperpipeConfig(store="disk")
        >>> [kind for kind in STORED_KINDS if config.is_on_disk(kind)]
        ['weights', 'states']
        """
        if isinstance(self.store, str):
            return self.store == "disk" and kind in _ON_DISK
        return self.store.get(kind) == "disk"


_NESTED: dict[str, type[Link] | type[Disk] | type[Adversary]] = {"disk": Disk, "link": Link, "adversary": Adversary}


def _names(schema: type) -> str:
    """Return the schema's options as a list in words."""
    return ", ".join(field.name for field in dataclasses.fields(schema))


def _check_names(schema: type, options: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ConfigError for an option that the schema does not have, with the nearest one it has."""
    known = [field.name for field in dataclasses.fields(schema)]
    for name in options:
        if name not in known:
            hint = nearest(str(name), known, prefix)
            raise ConfigError(f"unknown option {prefix + str(name)!r}: {hint}")


def _check_share(share: Any, update: str) -> None:
    """Raise ConfigError unless ``share`` is a share of units that suits the update, or "auto"."""
    if share != "auto" and not (is_number(share) and 0 <= share <= 1):
        raise ConfigError(f"update_on_device={share!r}: a share of the units from 0.0 to 1.0 is allowed, or 'auto'.")
    if share != 0 and update == "at_once":
        raise ConfigError(
            f"update_on_device={share!r} runs beside the loop, but update='at_once' leaves nothing to run then. Use "
            "update='auto', 'after_backward' or 'in_backward'."
        )


def _check_units(units: Any) -> None:
    """Raise ConfigError unless ``units`` is None, a callable, a name, or a sequence of names."""
    names = [units] if isinstance(units, str) else units
    if names is None or callable(names):
        return
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"units={units!r}: a class name, a module name or pattern, a list of these, or a callable "
            "(name, module) -> bool is allowed; null finds the units."
        )


def _check_activations(choice: Any, micro_batches: int | Auto) -> None:
    """Raise ConfigError unless ``choice`` is a policy, or a mapping of names to policies, that suits micro-batches."""
    policies = list(choice.values()) if isinstance(choice, Mapping) else [choice]
    for policy in policies:
        if policy not in ACTIVATIONS:
            hint = nearest(policy, ACTIVATIONS) if isinstance(policy, str) else "a policy is text."
            raise ConfigError(
                f"activations={choice!r}: {policy!r} is no policy, {hint} Policies are {', '.join(ACTIVATIONS)}, or a "
                "mapping of unit names or patterns to these."
            )
    if isinstance(choice, Mapping) and not (choice and all(isinstance(name, str) and name for name in choice)):
        raise ConfigError(f"activations={choice!r}: a mapping names at least one unit or pattern, as text.")
    if micro_batches != 1 and not {"recompute", "auto"} & set(policies):
        raise ConfigError(
            f"micro_batches={micro_batches!r} splits the batch inside units that recompute, but activations={choice!r} "
            "lets none do so. Use activations='recompute', or micro_batches=1."
        )


def _check_store(store: Any) -> None:
    """Raise ConfigError unless ``store`` is a place, or a mapping of kinds to places."""
    if isinstance(store, Mapping):
        for kind in store:
            if kind not in STORED_KINDS:
                raise ConfigError(f"store={dict(store)!r}: {kind!r} is no kind, {nearest(str(kind), STORED_KINDS)}")
    for place in store.values() if isinstance(store, Mapping) else [store]:
        if not isinstance(place, str) or place not in _STORES:
            raise ConfigError(
                f"store={store!r}: allowed are {listed(_STORES)}, or a mapping of kinds ({', '.join(STORED_KINDS)}) "
                "to these."
            )
