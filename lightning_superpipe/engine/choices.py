"""What an engine is made of, as the options and the device say: its lanes, its wire, and the memory it needs."""

from __future__ import annotations

import torch
from torch import nn

from lightning_superpipe.config import Adversary, SuperpipeConfig
from lightning_superpipe.engine.lanes import Lanes
from lightning_superpipe.engine.layout import slot_bytes_of, trained_bytes_of
from lightning_superpipe.engine.stream_lanes import StreamLanes
from lightning_superpipe.engine.thread_lanes import ThreadLanes
from lightning_superpipe.engine.wire import HALVES, Wire
from lightning_superpipe.errors import ConfigError, UnsupportedError
from lightning_superpipe.partition import Partition
from lightning_superpipe.planning.budget import MemoryNeed

__all__ = ["make_lanes", "may_pin", "memory_need", "wire_of"]


def wire_of(root: nn.Module, config: SuperpipeConfig) -> Wire:
    """The wire dtype of a module.

    Raises:
        UnsupportedError: a parameter has another dtype of 2 bytes, to which the wire dtype would only do harm.
    """
    wire = Wire(None if config.wire_dtype is None else getattr(torch, config.wire_dtype))
    for name, parameter in root.named_parameters():
        if wire.dtype is not None and parameter.dtype in HALVES and parameter.dtype is not wire.dtype:
            raise UnsupportedError(
                f"wire_dtype={config.wire_dtype!r}, but parameter {name!r} is {parameter.dtype}: parameters must be "
                "float32, or of the wire dtype. Leave wire_dtype out, or convert the module first."
            )
    return wire


def memory_need(root: nn.Module, found: Partition, wire: Wire, *, trains: bool) -> MemoryNeed:
    """Device bytes that are known before anything runs."""
    abstract = found.is_abstract
    sizes = {unit.name: slot_bytes_of(unit.module, found.anchors, wire, is_abstract=abstract) for unit in found.units}
    largest = max(sizes, key=lambda name: sizes[name])
    present = [p for p in root.parameters() if not nn.parameter.is_lazy(p)]
    anchors = sum(wire.num_bytes(parameter) for parameter in present if id(parameter) in found.anchors)
    buffers = sum(map(wire.num_bytes, root.buffers()))
    trained = max(trained_bytes_of(unit.module, found.anchors, wire, is_abstract=abstract) for unit in found.units)
    return MemoryNeed(sizes[largest], largest, anchors + buffers, len(sizes), trains=trains, trained_bytes=trained)


def make_lanes(config: SuperpipeConfig, device: torch.device, hostile: Adversary) -> Lanes:
    """Copy threads on the CPU and where a link is emulated, streams on accelerators."""
    emulates = config.link is not None or hostile.max_delay_ms > 0
    if device.type == "mps":
        raise UnsupportedError(
            "streaming to 'mps' saves nothing: that device shares its memory with the host. Use the ordinary strategy."
        )
    if device.type != "cpu" and not (emulates and _copies_synchronously(device)):
        if emulates:
            raise ConfigError(f"a link can be emulated on the CPU only, not on {str(device)!r}: leave `link` out.")
        return StreamLanes(device)
    return ThreadLanes(device, config.link, max_delay_ms=hostile.max_delay_ms, seed=hostile.seed)


def may_pin(config: SuperpipeConfig, device: torch.device) -> bool:
    """Whether host memory may be page-locked: where the device can use that, and nobody forbade it."""
    return config.pin_memory is not False and device.type == "cuda"


def _copies_synchronously(device: torch.device) -> bool:
    """Backends from outside torch that keep their memory on the host have no queue of their own."""
    return device.type not in ("cuda", "xpu", "hpu", "mtia")
