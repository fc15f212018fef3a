"""One training step of a model as plain figures that depend on no machine: played once, planned for many."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_superpipe.config import SuperpipeConfig
from lightning_superpipe.engine.choices import memory_need, wire_of
from lightning_superpipe.engine.layout import slot_bytes_of, trained_bytes_of
from lightning_superpipe.engine.micro_batches import why_not_split
from lightning_superpipe.engine.side_effects import why_not_again
from lightning_superpipe.engine.wire import Wire
from lightning_superpipe.errors import UnsupportedError
from lightning_superpipe.forecast.stand_in import StandIn
from lightning_superpipe.forecast.tape import Part, Tape, UnitTape
from lightning_superpipe.host_memory import host_need
from lightning_superpipe.optimizer.device import refuse_whole_steps
from lightning_superpipe.optimizer.scratch import NUM_SETS, kernel_bytes_of, scratch_bytes_of
from lightning_superpipe.optimizer.state_size import missing_state_bytes
from lightning_superpipe.partition import Partition, UnitSpec, UnitTable, partition, unit_table
from lightning_superpipe.planning.budget import KeptBytes, MemoryNeed
from lightning_superpipe.planning.host_budget import HostNeed

__all__ = ["PlayedStep", "PlayedUnit", "play"]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
Step = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class PlayedUnit:
    """One unit's part of a step.

    Attributes:
        tape: its work and memory.
        weight_bytes, gradient_bytes: of its slot, and of the gradients that go home.
        num_trained: parameters that are updated on the host.
        update_dtype: in which that happens.
        policies: what may become of its activations.
        splits: whether its batch may be split.
    """

    tape: UnitTape
    weight_bytes: int
    gradient_bytes: int
    num_trained: int
    update_dtype: str
    policies: tuple[str, ...]
    splits: bool


@dataclass(frozen=True)
class PlayedStep:
    """One training step of a model, for one batch.

    Attributes:
        units: in order of execution; units that the step does not call are not there.
        turn: between the last unit's forward and its backward.
        table: units and anchors, with their bytes.
        need: device bytes of slots, anchors and gradients.
        host: bytes in host memory.
        samples, tokens: in the batch; tokens are 0 where it holds none.
        undisturbed: nobody writes to weights between steps.
        remarks: what had to be assumed.
        kept: device bytes beside slots; those of updates whether there are some or not.
        num_trained_outside: parameters outside units that are updated on the host, in the loop's own thread.
    """

    units: tuple[PlayedUnit, ...]
    turn: Part
    table: UnitTable
    need: MemoryNeed
    host: HostNeed
    samples: int
    tokens: int
    undisturbed: bool
    remarks: tuple[str, ...]
    kept: KeptBytes
    num_trained_outside: int = 0


def play(
    module: nn.Module,
    batch: Any,
    config: SuperpipeConfig,
    *,
    step: Step | None = None,
    optimizer: MakeOptimizer | None = None,
    precision: str = "32-true",
) -> PlayedStep:
    """Play one step, forward and backward, without memory for weights and without computing anything.

    Args:
        module: on any device, the meta device included; it stays as it is.
        batch: of real tensors.
        config: units, wire dtype and masters count.
        step: returns the loss of a module and a batch; None takes ``training_step``, or the module's call.
        optimizer: makes one from parameters; None takes ``configure_optimizers``, or AdamW.
        precision: of the Trainer, such as ``"bf16-mixed"``.

    Raises:
        PartitionError, UnsupportedError: the module cannot be streamed, or not be played.
    """
    wire, half = wire_of(module, config), _true_dtype(precision)
    found = partition(module, config.units, is_abstract=True)
    need = memory_need(module, found, wire, trains=True)
    stand_ins = StandIn(wire.dtype or half)
    copied = stand_ins.of_module(module)
    inside = {unit.name: copied.get_submodule(unit.name) for unit in found.units}
    again = {name: why_not_again(unit.modules(), ()) is None for name, unit in inside.items()}
    tape, values = Tape(inside), stand_ins.of_batch(batch)
    with _quiet(), tape.recording(copied):
        _run(copied, values, step or _default_step(copied), precision)
    optimizers, remarks = _optimizers(module, optimizer)
    if config.update_on_device != "auto":
        refuse_whole_steps(optimizers, config.update_on_device)
    masters = config.master_weights is not None
    host = host_need(module, optimizers, config, need, wire)
    if not all(isinstance(each, Optimizer) and missing_state_bytes(each, with_masters=masters) for each in optimizers):
        remarks += ("an optimizer of a class that is not known here counts no states",)
    specs = {unit.name: unit for unit in found.units}
    units = tuple(_played(each, specs[each.name], found, wire, masters, again[each.name]) for each in tape.units)
    samples, tokens = _counts(batch)
    return PlayedStep(
        units=units,
        turn=tape.turn,
        table=unit_table(module, found),
        need=need,
        host=host,
        samples=samples,
        tokens=tokens,
        undisturbed=hasattr(module, "training_step"),
        remarks=remarks,
        num_trained_outside=sum(p.numel() for p in module.parameters() if p.requires_grad and id(p) in found.anchors),
        kept=_kept_bytes(found, need, optimizers, with_masters=masters),
    )


def _kept_bytes(found: Partition, need: MemoryNeed, optimizers: list[Optimizer], *, with_masters: bool) -> KeptBytes:
    units = [[p for p in spec.module.parameters() if id(p) not in found.anchors] for spec in found.units]
    scratch = max((scratch_bytes_of(unit, optimizers, with_masters=with_masters) for unit in units), default=0)
    return KeptBytes(need.anchor_bytes, NUM_SETS * scratch, max(map(kernel_bytes_of, units), default=0))


def _run(copied: nn.Module, batch: Any, step: Step, precision: str) -> None:
    casts = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    scope = contextlib.nullcontext() if casts is None else torch.autocast("cpu", casts, cache_enabled=False)
    try:
        with scope, torch.enable_grad():
            loss = step(copied, batch)
        loss.backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise UnsupportedError(
            f"the step of {type(copied).__name__} cannot be played without running it ({type(error).__name__}: "
            f"{first}). Hand over step=, a function (module, batch) -> loss that needs no Trainer and looks at no "
            "values of activations; or measure with `superpipe bench`."
        ) from error


def _default_step(module: nn.Module) -> Step:
    """What a loop would call: Lightning's step, or the module itself with a loss among its outputs."""
    if hasattr(module, "training_step"):
        return _lightning_step
    return _plain_step


def _lightning_step(module: Any, batch: Any) -> Tensor:
    outputs = module.training_step(batch, 0)
    loss: Tensor = outputs["loss"] if isinstance(outputs, dict) else outputs
    return loss


def _plain_step(module: Any, batch: Any) -> Tensor:
    outputs = (
        module(**batch) if isinstance(batch, dict) else module(*batch if isinstance(batch, list | tuple) else [batch])
    )
    loss = outputs.get("loss") if isinstance(outputs, dict) else getattr(outputs, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack([leaf.float().mean() for leaf in leaves]).sum()


def _optimizers(module: nn.Module, make: MakeOptimizer | None) -> tuple[list[Optimizer], tuple[str, ...]]:
    """Return the optimizers that the module's own parameters will have, and what had to be assumed."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if make is not None or not trained:
        return ([make(trained)] if make is not None and trained else []), ()
    configure: Any = getattr(module, "configure_optimizers", None)
    if configure is not None:
        try:
            with _quiet():
                made = configure()
            found = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Optimizer)]
            if found:
                return found, ()
        except Exception as error:  # of code that expects a Trainer
            return [torch.optim.AdamW(trained)], (f"AdamW, for configure_optimizers needs a Trainer ({error})",)
    return [torch.optim.AdamW(trained)], ("AdamW, for nobody named an optimizer",)


def _played(tape: UnitTape, spec: UnitSpec, found: Partition, wire: Wire, masters: bool, repeats: bool) -> PlayedUnit:
    trained = [p for p in spec.module.parameters() if p.requires_grad and id(p) not in found.anchors]
    dtype = torch.float32 if masters else next((p.dtype for p in trained), torch.float32)
    return PlayedUnit(
        tape=tape,
        weight_bytes=slot_bytes_of(spec.module, found.anchors, wire, is_abstract=True),
        gradient_bytes=trained_bytes_of(spec.module, found.anchors, wire, is_abstract=True),
        num_trained=sum(parameter.numel() for parameter in trained),
        update_dtype=str(dtype).removeprefix("torch."),
        policies=("keep", "recompute", "offload") if repeats else ("keep", "offload"),
        splits=repeats and why_not_split(list(spec.module.modules())) is None,
    )


def _true_dtype(precision: str) -> torch.dtype | None:
    return {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision)


def _counts(batch: Any) -> tuple[int, int]:
    """Return samples and tokens of a batch: rows of its first tensor, entries of its largest table of integers."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    tables = [tensor.numel() for tensor in tensors if tensor.dim() > 1 and not tensor.is_floating_point()]
    return (len(tensors[0]) if tensors else 1), max(tables, default=0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what libraries say about a step outside a Trainer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
