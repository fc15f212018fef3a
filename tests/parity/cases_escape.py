"""Weights that leave their unit: in outputs, caches, contexts and containers."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from tests.parity.probe import WIDTH, Block, ProbeModule, SquareWeight, probe


class Table(nn.Module):
    """Owns a table of shape (8, WIDTH), as position embeddings do."""

    def __init__(self, num_rows: int = 8) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_rows, WIDTH))


class TableView(Table):
    """Returns the first rows as a view."""

    def forward(self, num_rows: int) -> Tensor:
        return self.table[:num_rows]


@probe()
class ReturnsWeightView(ProbeModule):
    """A unit whose output is a view of its weight: the view outlives the unit's time in the slot."""

    def build(self) -> None:
        self.tables = nn.ModuleList(TableView() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.tables[0](4), self.tables[1](4)
        return cast(Tensor, self.head(self.trunk(x) + first * second))


class TableItself(Table):
    """Returns its Parameter object."""

    def forward(self) -> Tensor:
        return self.table


@probe()
class ReturnsParameter(ProbeModule):
    """A unit that returns its Parameter object."""

    def build(self) -> None:
        self.tables = nn.ModuleList(TableItself(num_rows=4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.tables[0](), self.tables[1]()
        return cast(Tensor, self.head(self.trunk(x) + first * second))


class Opaque:
    """Holds a tensor where no tree traversal looks."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class TableInObject(Table):
    """Returns a view of its table inside an object."""

    def forward(self) -> Opaque:
        return Opaque(self.table[:4])


@probe()
class OpaqueViewOut(ProbeModule):
    """A view of the weight leaves inside an object that is no pytree; it is used after all units went."""

    def build(self) -> None:
        self.tables = nn.ModuleList(TableInObject(num_rows=4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        views = [table() for table in self.tables]
        hidden = self.trunk(x)
        for view in views:
            hidden = hidden * view.value
        return cast(Tensor, self.head(hidden))


class ObjectOutput(Table):
    """Returns an ordinary activation inside an object."""

    def __init__(self) -> None:
        super().__init__(num_rows=4)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Opaque:
        return Opaque(self.linear(x) + self.table)


@probe()
class DataclassOutput(ProbeModule):
    """The output that starts the unit's backward is inside an object: no hook can be put on it from outside."""

    def build(self) -> None:
        self.units = nn.ModuleList(ObjectOutput() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x).value
        return super().forward(x)


class CachesView(SquareWeight):
    """Appends a transposed view of its weight to a list of the caller and uses the first entry."""

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        cache.append(self.weight.t())
        return cast(Tensor, self.linear(x)) @ cache[0]


@probe()
class CrossUnitCache(ProbeModule):
    """The first unit hands a weight view to later ones through a list that it mutates: rebuilding the list loses it."""

    def build(self) -> None:
        self.units = nn.ModuleList(CachesView() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        cache: list[Tensor] = []
        for unit in self.units:
            x = unit(x, cache)
        return super().forward(x)


class CachesParameter(SquareWeight):
    """Appends its Parameter object to a list of the caller and uses the first entry."""

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        cache.append(self.weight)
        return cast(Tensor, self.linear(x)) @ cache[0]


@probe()
class StashesParameter(CrossUnitCache):
    """The Parameter object itself is put where nobody can see it, and later holds another unit's numbers."""

    def build(self) -> None:
        self.units = nn.ModuleList(CachesParameter() for _ in range(3))


class HoldsWeight(torch.autograd.Function):
    """Keeps the weight as an attribute of the context, past all saved-tensor hooks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        return grads[0] @ ctx.weight.t(), x.t() @ grads[0]


class UsesHoldsWeight(SquareWeight):
    """Runs the function above."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.linear(HoldsWeight.apply(x, self.weight)))


@probe()
class ContextAttribute(ProbeModule):
    """A custom Function with `ctx.w = w` neither saves the weight nor asks for it again in backward."""

    def build(self) -> None:
        self.units = nn.ModuleList(UsesHoldsWeight() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x)
        return super().forward(x)


class Bundle(NamedTuple):
    """Output of several tensors."""

    hidden: Tensor
    gate: Tensor | None
    history: dict[str, Tensor]


class ManyArguments(Block):
    """Takes and gives tuples, dicts, flags and None."""

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], *, options: dict[str, Any], gate: Any = None) -> Bundle:  # type: ignore[override]
        hidden = super().forward(x) * options["scale"] + pair[0] * 0.1
        options["history"].append(hidden.detach().mean())
        return Bundle(hidden, gate, {"sum": pair[1] + hidden})


@probe()
class Containers(ProbeModule):
    """Arguments and outputs in tuples, dicts and named tuples keep their identity, and None stays None."""

    def build(self) -> None:
        self.units = nn.ModuleList(ManyArguments() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        history: list[Tensor] = []
        total = x
        for unit in self.units:
            bundle = unit(x, (x, total), options={"scale": 0.5, "history": history})
            assert isinstance(bundle, Bundle) and bundle.gate is None
            x, total = bundle.hidden, bundle.history["sum"]
        self.record("history", torch.stack(history))
        return super().forward(total)


class Passes(Block):
    """Returns its input object untouched in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else x


@probe()
class ReturnsInput(ProbeModule):
    """A unit may return the tensor that it was given: the caller sees the same object."""

    def build(self) -> None:
        self.units = nn.ModuleList(Passes() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            y = unit(x)
            assert self.training or y is x
            x = y
        return super().forward(x)


class InplaceActivation(Block):
    """Overwrites its own activation, and leaves the output open to be overwritten."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu_(self.up(self.norm(x)))
        return cast(Tensor, self.down(hidden))


@probe()
class InplaceActivations(ProbeModule):
    """In-place operations on activations inside a unit and on the output of a unit."""

    def build(self) -> None:
        self.units = nn.ModuleList(InplaceActivation() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            y = unit(x)
            y += x
            x = y.mul_(0.7)
        return super().forward(x)
