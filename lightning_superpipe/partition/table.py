"""What streams and what stays, as a table for people: rows that outlive the model, totals, and whether it pays."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import humanize
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_superpipe.partition.anchors import is_lazy, num_bytes
from lightning_superpipe.partition.rule import Partition

__all__ = ["UnitRow", "UnitTable", "unit_table"]

_UNIT = "unit"
_BUFFER = "buffer"


class UnitRow(NamedTuple):
    """One unit, anchor or buffer.

    Attributes:
        name: of the unit's module, the anchor's parameter, or the buffer.
        num_parameters: elements; of a unit those that stream with it; of a lazy parameter none yet.
        num_bytes: bytes of these elements.
        role: ``"unit"``, ``"anchor: <reason>"`` or ``"buffer"``.
    """

    name: str
    num_parameters: int
    num_bytes: int
    role: str


@dataclass(frozen=True)
class UnitTable:
    """Units in order of registration, then anchors, then buffers; holds no tensors.

    Attributes:
        rows: one per unit, anchor and buffer; sizes count each parameter once.
        k: units on the device at once, if known: the last lines then say what the slots need.
    """

    rows: tuple[UnitRow, ...]
    k: int | None = None

    def __iter__(self) -> Iterator[UnitRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def largest(self) -> UnitRow:
        """The largest unit: every slot is as large."""
        return max(self._units, key=lambda row: row.num_bytes, default=UnitRow("none", 0, 0, _UNIT))

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the parameters in units."""
        return sum(row.num_bytes for row in self._units)

    @property
    def anchor_bytes(self) -> int:
        """Bytes of the parameters that have a permanent device copy."""
        return sum(row.num_bytes for row in self.rows if row.role not in (_UNIT, _BUFFER))

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(row.num_bytes for row in self.rows if row.role == _BUFFER)

    @property
    def share_streamed(self) -> float:
        """Part of the parameters' bytes that streams, 0 to 1."""
        return self.streamed_bytes / max(self.streamed_bytes + self.anchor_bytes, 1)

    @property
    def _units(self) -> list[UnitRow]:
        return [row for row in self.rows if row.role == _UNIT]

    @property
    def _slots(self) -> int:
        """Slots that would be allocated; two if k is not known, the fewest that let copies overlap with compute."""
        return min(self.k or 2, len(self._units))

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("name", no_wrap=True)
        table.add_column("parameters", justify="right")
        table.add_column("bytes", justify="right")
        table.add_column("role", no_wrap=True)
        for row in self.rows:
            table.add_row(row.name, f"{row.num_parameters:,}", _size(row.num_bytes), row.role)
        # Far wider than any table: names are for copying into `units=`, so none may be folded or cut.
        console = Console(file=io.StringIO(), width=10_000, color_system=None, markup=False, force_jupyter=False)
        with console.capture() as capture:
            console.print(table)
        lines = [line.rstrip() for line in capture.get().splitlines()]
        return "\n".join([*filter(None, lines), "", self._totals(), self._window(), *self._hints()])

    def _totals(self) -> str:
        total = self.streamed_bytes + self.anchor_bytes
        num_buffers = sum(row.role == _BUFFER for row in self.rows)
        num_anchors = len(self.rows) - len(self._units) - num_buffers
        return (
            f"{_count(len(self._units), 'unit')}: {_size(self.streamed_bytes)} of {_size(total)} stream "
            f"({self.share_streamed:.1%}). On the device for good: {_count(num_anchors, 'anchor')} "
            f"({_size(self.anchor_bytes)}), {_count(num_buffers, 'buffer')} ({_size(self.buffer_bytes)})."
        )

    def _window(self) -> str:
        share = self.largest.num_bytes / max(self.streamed_bytes + self.anchor_bytes, 1)
        window = f"k x {share:.1%}" if self.k is None else f"{self._slots} x {share:.1%} = {self._slots * share:.1%}"
        return f"Largest unit {self.largest.name!r}: k x largest / total = {window}"

    def _hints(self) -> Iterator[str]:
        """Say when the window would hold as much as the whole model."""
        needed = self._slots * self.largest.num_bytes + self.anchor_bytes
        total = self.streamed_bytes + self.anchor_bytes
        if needed >= total:
            smaller = ", or a smaller k" if self._slots > 2 else ""
            yield (
                f"Streaming cannot pay: {_count(self._slots, 'slot')} of this size and the anchors take "
                f"{_size(needed)}, all parameters together {_size(total)}. Name smaller units (units=...){smaller}."
            )


def unit_table(root: nn.Module, partition: Partition, k: int | None = None) -> UnitTable:
    """Return the table of a partition.

    Args:
        root: the model that was divided, with its own parameters in place.
        partition: what it was divided into; parameters found to be anchors later may have been added.
        k: units on the device at once, if known.
    """
    reasons = partition.anchors
    units = []
    for unit in partition.units:
        streamed = [parameter for parameter in unit.module.parameters() if id(parameter) not in reasons]
        units.append(_row(unit.name, streamed, _UNIT))
    anchors = [
        _row(name, [parameter], f"anchor: {reasons[id(parameter)]}")
        for name, parameter in root.named_parameters()
        if id(parameter) in reasons
    ]
    buffers = [_row(name, [buffer], _BUFFER) for name, buffer in root.named_buffers()]
    return UnitTable((*units, *anchors, *buffers), k)


def _row(name: str, tensors: Iterable[Tensor], role: str) -> UnitRow:
    """Return a row that counts the tensors; lazy ones have no elements yet."""
    ready = [tensor for tensor in tensors if not is_lazy(tensor)]
    return UnitRow(name, sum(tensor.numel() for tensor in ready), sum(map(num_bytes, ready)), role)


def _size(num_bytes: int) -> str:
    return humanize.naturalsize(num_bytes, binary=True)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
