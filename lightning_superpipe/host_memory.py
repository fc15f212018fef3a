"""Host memory of one session: what its training will need, asked before anything is allocated, and what it holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_superpipe.config import STORED_KINDS, SuperpipeConfig
from lightning_superpipe.engine.staging import NUM_BUFFERS
from lightning_superpipe.engine.wire import Wire
from lightning_superpipe.observe.host_bytes import HostBytes, available_bytes, storage_bytes
from lightning_superpipe.optimizer.masters import MASTER, wants_master
from lightning_superpipe.optimizer.state_size import missing_state_bytes
from lightning_superpipe.partition import UnitTable
from lightning_superpipe.planning.budget import MemoryNeed
from lightning_superpipe.planning.disk_tier import FileChoice, choose_files, with_files
from lightning_superpipe.planning.host_budget import HostNeed
from lightning_superpipe.planning.workload import Workload
from lightning_superpipe.tiers import Tier, is_mapped

__all__ = ["choose_for", "files_for", "held_bytes", "host_limit", "host_need", "need_beside_files", "require_host"]
__all__ += ["need_of_run", "stored_kinds", "training_bytes", "unit_sizes", "with_store"]

_MASTER_BYTES = torch.float32.itemsize
_ADAMW_STATES = 2


def host_need(
    root: nn.Module,
    optimizers: Sequence[Optimizer],
    config: SuperpipeConfig,
    device_need: MemoryNeed,
    wire: Wire,
) -> HostNeed:
    """What a training takes on the host without files; optimizers that are not known yet count nothing but masters.

    Args:
        config: says whether parameters of 2 bytes get float32 masters.
        device_need: tells the sizes of units on the link, and whether anything is trained.
    """
    with_masters = config.master_weights is not None
    present = [parameter for parameter in root.parameters() if not nn.parameter.is_lazy(parameter)]
    weights = sum(map(_dense_bytes, (*present, *root.buffers())))
    staging = NUM_BUFFERS * device_need.slot_bytes + device_need.gradient_bytes if wire.dtype is not None else 0
    if not device_need.trains:
        return HostNeed(weights, staging, held=weights)
    trained = [parameter for parameter in present if parameter.requires_grad]
    gradients, has_gradients = (
        sum(parameter.nbytes for parameter in trained),
        sum(parameter.nbytes for parameter in trained if parameter.grad is not None),
    )
    states = storage_bytes(_state_tensors(optimizers))
    missing = sum(missing_state_bytes(optimizer, with_masters=with_masters) for optimizer in optimizers)
    have_master = {
        id(parameter) for optimizer in optimizers for parameter, state in optimizer.state.items() if MASTER in state
    }
    masters = sum(
        _MASTER_BYTES * parameter.numel()
        for parameter in trained
        if with_masters and wants_master(parameter) and id(parameter) not in have_master
    )
    held = weights + has_gradients + states
    return HostNeed(weights, staging, gradients, states + missing, masters, held=held)


def need_of_run(
    root: nn.Module,
    optimizers: Sequence[Optimizer],
    config: SuperpipeConfig,
    device_need: MemoryNeed,
    wire: Wire,
    units: UnitTable,
    files: FileChoice,
) -> HostNeed:
    """What is known of a run's need of host memory, beside files."""
    need = host_need(root, optimizers, config, device_need, wire)
    return need_beside_files(config, need, unit_sizes(units), files)


def require_host(need: HostNeed, config: SuperpipeConfig) -> None:
    """Make sure that the host can hold what is known of a training.

    Args:
        need: beside files.

    Raises:
        BudgetError: it cannot.
    """
    limit = config.host_memory if isinstance(config.host_memory, int) else None
    need.check(available=available_bytes(), limit=limit)


def with_store(
    workload: Workload, config: SuperpipeConfig, units: UnitTable, files: FileChoice, need: HostNeed
) -> Workload:
    """Return a workload with what its store means: the part in files, and host memory for what is on its way.

    Args:
        units: of the module, those of the workload among them.
        need: of host memory, beside files.
    """
    rows = [row for row in units if row.role == "unit"]
    sizes = {row.name: row.num_bytes for row in rows}
    stay = {row.name for index, row in enumerate(rows) if index in files.in_memory}
    names = [unit.name for unit in workload.units]
    stored = with_files(
        workload,
        stored_kinds(config),
        {place for place, name in enumerate(names) if name in stay},
        ring=files.ring,
        sizes=[sizes[name] for name in names],
    )
    return replace(stored, staging_bytes=need.staging + need.undo)


def need_beside_files(config: SuperpipeConfig, need: HostNeed, sizes: Sequence[int], files: FileChoice) -> HostNeed:
    """What is left in host memory of a need, where kinds of bytes live in files.

    Args:
        sizes: weights of each unit, bytes.
        files: what stays, and how many buffers there are.
    """
    if not (kinds := stored_kinds(config)):
        return need
    return need.with_files(
        kinds,
        streamed=sum(sizes),
        largest=max(sizes),
        num_buffers=files.ring,
        undo=config.disk_options.undo,
        kept=sum(sizes[unit] for unit in files.in_memory),
    )


def files_for(
    root: nn.Module,
    optimizers: Sequence[Optimizer],
    config: SuperpipeConfig,
    device_need: MemoryNeed,
    wire: Wire,
    units: UnitTable,
) -> FileChoice:
    """Choose what the options leave open about files; optimizers that are not known yet count as AdamW."""
    if not stored_kinds(config):
        return FileChoice()
    need = host_need(root, optimizers, config, device_need, wire)
    if not optimizers:
        need = replace(need, states=_ADAMW_STATES * max(need.gradients, need.masters))
    return choose_for(config, need, unit_sizes(units), trains=device_need.trains)


def choose_for(config: SuperpipeConfig, need: HostNeed, sizes: Sequence[int], *, trains: bool) -> FileChoice:
    """Choose as the options allow, see :func:`choose_files`.

    Args:
        need: of host memory, without files.
        sizes: weights of each unit, bytes.
    """
    options = config.disk_options
    return choose_files(
        need,
        stored_kinds(config),
        sizes,
        ring=None if options.ring == "auto" else options.ring,
        undo=options.undo and trains,
        limit=config.host_memory if isinstance(config.host_memory, int) else None,
    )


def stored_kinds(config: SuperpipeConfig) -> set[str]:
    """Kinds of bytes that lie in files."""
    return {kind for kind in STORED_KINDS if config.is_on_disk(kind)}


def unit_sizes(units: UnitTable) -> list[int]:
    """Bytes of each unit's weights, by its index."""
    return [row.num_bytes for row in units if row.role == "unit"]


def host_limit(config: SuperpipeConfig, held: HostBytes) -> int:
    """Return the bytes that all kinds may take on the host together, those that are held included."""
    return config.host_memory if isinstance(config.host_memory, int) else available_bytes() + held.total


def held_bytes(root: nn.Module, optimizers: Iterable[Optimizer], tier: Tier, *, scratch_bytes: int) -> HostBytes:
    """Measure what a session holds: the tier's slabs, and the memory of tensors that lie elsewhere.

    Args:
        scratch_bytes: memory for casts that no tier knows.
    """
    parameters = [parameter for parameter in root.parameters() if not nn.parameter.is_lazy(parameter)]
    gradients = [grad for parameter in parameters if (grad := parameter.grad) is not None]  # threads take them away
    return HostBytes(
        weights=_with_strays(tier.part("weights"), [*parameters, *root.buffers()]),
        staging=tier.part("wire").allocated_bytes + scratch_bytes,
        gradients=_with_strays(tier.part("gradients"), gradients),
        states=_with_strays(tier.part("states"), _state_tensors(optimizers)),
    )


def training_bytes(root: nn.Module, optimizers: Iterable[Optimizer], *, has_gradients: bool) -> tuple[int, int, int]:
    """Return the bytes of a whole model's weights, gradients and optimizer states, as an ordinary run holds them."""
    parameters = [parameter for parameter in root.parameters() if not nn.parameter.is_lazy(parameter)]
    weights = sum(map(_dense_bytes, (*parameters, *root.buffers())))
    gradients = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad) if has_gradients else 0
    return weights, gradients, sum(tensor.nbytes for tensor in _state_tensors(optimizers))


def _with_strays(tier: Tier, tensors: Sequence[Tensor]) -> int:
    with torch._C.DisableTorchFunctionSubclass():  # addresses need not wait for updates under way
        strays = [each for each in tensors if each.layout is torch.strided and not tier.holds(each)]
    return tier.memory_bytes + storage_bytes([each for each in strays if not is_mapped(each)])


def _dense_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor; those of a sparse one, which does not stream, count nothing."""
    return tensor.nbytes if tensor.layout is torch.strided else 0


def _state_tensors(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """What optimizers keep for their parameters; most keep a dict for each."""
    entries: list[Any] = [state for optimizer in optimizers for state in optimizer.state.values()]
    values = [value for state in entries for value in (state.values() if isinstance(state, dict) else [state])]
    return [value for value in values if isinstance(value, Tensor)]
