"""One step of a model, played on stand-ins: the work and the memory of each unit's forward and backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lightning_superpipe.engine.offload import MIN_BYTES
from lightning_superpipe.observe.live_bytes import LiveBytes
from lightning_superpipe.observe.rates import Work

__all__ = ["Operation", "Part", "Tape", "UnitTape"]

_STAND_INS = "meta"  # where the storage of a stand-in is, whatever device it claims
_ATTENTION = {  # torch knows how to count the kernels of CUDA only; those of the CPU take the same arguments
    "_scaled_dot_product_flash_attention_for_cpu": "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "_scaled_dot_product_flash_attention_backward",
}


_WORKS = dict.fromkeys(("bernoulli", "bernoulli_", "native_dropout", "rand_like", "normal_", "uniform_"), Work.RANDOM)
_WORKS |= dict.fromkeys(
    ("gelu", "gelu_backward", "silu", "silu_backward", "tanh", "sigmoid", "exp", "_softmax", "_log_softmax", "softplus")
    + ("pow", "erf", "sin", "cos", "log", "mish", "elu", "rsqrt"),
    Work.FUNCTION,
)


class Operation(NamedTuple):
    """One operation on the device.

    Attributes:
        dtype: of its largest input or output.
        num_flops: of its products; 0 where it has none.
        num_bytes: read and written.
        work: what it does with single elements.
    """

    dtype: str
    num_flops: int
    num_bytes: int
    work: Work = Work.PLAIN


@dataclass
class Part:
    """What ran between two boundaries of a step.

    Attributes:
        operations: and how often each ran.
        peak_bytes: most that was alive, of all that the step had made.
        unfreed_bytes: likewise, if nothing that autograd holds had been let go meanwhile.
    """

    operations: Counter[Operation] = field(default_factory=Counter)
    peak_bytes: int = 0
    unfreed_bytes: int = 0

    def add(self, other: Part) -> None:
        """Take what ran in another part for this one's."""
        self.operations += other.operations
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        self.unfreed_bytes = max(self.unfreed_bytes, other.unfreed_bytes)


@dataclass
class UnitTape:
    """One unit in the step.

    Attributes:
        name: of the module.
        forward, backward: its work.
        begin_bytes: alive when its forward began.
        end_bytes: alive when the next unit's forward began, or at the end of its own where there is none.
        inner_bytes: of what its forward left, what nothing but its own backward needs: outputs do not count.
        saved_bytes: of what autograd saved inside and offloading would move: no weights, nothing small.
    """

    name: str
    forward: Part = field(default_factory=Part)
    backward: Part = field(default_factory=Part)
    begin_bytes: int = 0
    end_bytes: int = 0
    inner_bytes: int = 0
    saved_bytes: int = 0


class Tape:
    """Records one step; enter :meth:`recording`, run forward and backward inside, read the attributes afterwards.

    Args:
        units: modules by name; those that are called appear in ``units``.

    Attributes:
        units: in order of execution.
    """

    def __init__(self, units: Mapping[str, nn.Module]) -> None:
        self.units: list[UnitTape] = []
        self._modules = units
        self._by_name: dict[str, UnitTape] = {}
        self._live = LiveBytes(_STAND_INS, "cpu")
        self._part = self._between = Part()  # what runs before a unit's forward belongs to it, after the last: the turn
        self._depth = 0
        self._is_backward = False
        self._weights: set[int] = set()
        self._given: set[int] = set()
        self._entered = 0
        self._gradients: list[Tensor] = []

    @property
    def turn(self) -> Part:
        """What ran after the last unit's forward, until the first backward of a unit."""
        return self._between

    @contextmanager
    def recording(self, root: nn.Module) -> Iterator[None]:
        """Scope of the step of a model that the units are part of."""
        self._weights = {_address(each) for each in (*root.parameters(), *root.buffers())}
        handles = [
            handle
            for name, module in self._modules.items()
            for handle in (
                module.register_forward_pre_hook(self._entering(name), with_kwargs=True),
                module.register_forward_hook(self._leaving(name), always_call=False),
            )
        ]
        handles += [
            parameter.register_post_accumulate_grad_hook(self._take_gradient)  # type: ignore[no-untyped-call]
            for parameter in root.parameters()
            if parameter.requires_grad
        ]
        try:
            with _Watch(self._note), self._live:
                yield
                self._close_part()
        finally:
            for handle in handles:
                handle.remove()
            self._gradients.clear()

    def _note(self, operation: Operation) -> None:
        self._part.operations[operation] += 1

    def _switch(self, part: Part) -> None:
        """Go on with another part."""
        self._close_part()
        self._part = part

    def _close_part(self) -> None:
        self._part.peak_bytes = max(self._part.peak_bytes, self._live.take_recent_peak())
        self._part.unfreed_bytes = max(self._part.unfreed_bytes, self._live.take_recent_unfreed())

    # -- forward

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._depth += 1
            if self._is_backward or self._depth > 1:  # recomputed by the model's own checkpoint: work of backward
                return
            now = self._live.current_bytes
            if self.units:
                self.units[-1].end_bytes = now
            tape = self._by_name.get(name)
            if tape is None:
                tape = self._by_name[name] = UnitTape(name, begin_bytes=now if self.units else 0)
                self.units.append(tape)
            self._given = self._weights | {_address(leaf) for leaf in _tensors((args, kwargs))}
            self._entered = now
            self._switch(tape.forward)
            tape.forward.add(self._between)
            self._saving = torch.autograd.graph.saved_tensors_hooks(self._packing(tape), lambda value: value)
            self._saving.__enter__()

        return enter

    def _leaving(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, outputs: Any) -> None:
            self._depth -= 1
            if self._is_backward or self._depth:
                return
            self._saving.__exit__()
            tape = self._by_name[name]
            tape.end_bytes = self._live.current_bytes
            made = {_address(leaf): leaf.untyped_storage().nbytes() for leaf in _tensors(outputs)}
            kept = sum(num_bytes for address, num_bytes in made.items() if address not in self._given)
            tape.inner_bytes += tape.end_bytes - self._entered - kept
            self._between = Part()
            self._switch(self._between)
            for leaf in _tensors(outputs):
                if leaf.requires_grad:
                    leaf.register_hook(self._returning(name))  # type: ignore[no-untyped-call]

        return leave

    def _packing(self, tape: UnitTape) -> Callable[[Tensor], Tensor]:
        saved: set[int] = set()

        def pack(tensor: Tensor) -> Tensor:
            key = _address(tensor)
            num_bytes = tensor.untyped_storage().nbytes()
            if key not in saved and key not in self._weights and num_bytes >= MIN_BYTES:
                saved.add(key)
                self._live.note_saved(tensor)
                tape.saved_bytes += num_bytes
            return tensor

        return pack

    # -- backward

    def _returning(self, name: str) -> Callable[[Tensor], None]:
        def begin(gradient: Tensor) -> None:
            part = self._by_name[name].backward
            if self._part is not part:
                self._is_backward = True
                self._gradients.clear()  # those of the unit before are on their way home
                self._switch(part)

        return begin

    def _take_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None, "torch calls this with a gradient"
        self._gradients.append(parameter.grad)
        parameter.grad = None


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells of each operation that computes something on stand-ins."""

    def __init__(self, note: Callable[[Operation], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._note = note

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(result))
        known = {_address(tensor) for tensor in inputs}
        is_view = not func._schema.is_mutable and outputs and all(_address(each) in known for each in outputs)
        if outputs and not is_view and any(_is_stand_in(each) for each in outputs):
            largest = max((*inputs, *outputs), key=lambda tensor: tensor.numel() * tensor.is_floating_point())
            moved = sum(tensor.nbytes for tensor in (*inputs, *outputs))
            num_flops = _flops(func, args, kwargs or {}, result)
            work = _WORKS.get(func.overloadpacket.__name__, Work.PLAIN)
            self._note(Operation(str(largest.dtype).removeprefix("torch."), num_flops, moved, work))
        return result


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Operations of the products in one call, as torch counts them."""
    packet = func.overloadpacket
    if (name := packet.__name__) in _ATTENTION:
        packet = getattr(torch.ops.aten, _ATTENTION[name])
        if name.endswith("backward"):
            return int(flop_registry[packet](*args[:4], out_val=result))
        return int(flop_registry[packet](*args[:3], out_val=result))
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=result))


def _tensors(values: Any) -> Iterator[Tensor]:
    yield from (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _is_stand_in(tensor: Tensor) -> bool:
    return tensor.untyped_storage().device.type == _STAND_INS


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
