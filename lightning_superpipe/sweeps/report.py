"""What a sweep found: a table of its jobs, what went wrong, and the picture beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from humanize import naturalsize
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from lightning_superpipe.sweeps.files import CorruptRow, read_rows
from lightning_superpipe.sweeps.front import baseline_of, pareto_front, varied_settings
from lightning_superpipe.sweeps.picture import draw_trade_off
from lightning_superpipe.sweeps.row import Row, Status

__all__ = ["SweepReport", "print_report"]

_TABLE_WIDTH = 140
_NUM_SETTINGS, _SETTING_WIDTH = 2, 24
_STATUS_STYLES = {Status.FINISHED: "", Status.REFUSED: "yellow", Status.FAILED: "red"}


@dataclass(frozen=True)
class SweepReport:
    """All jobs of a sweep; ``print`` it.

    Attributes:
        rows: the jobs; those without streaming first, then by k and k'.
        corrupt: files among the rows that could not be read.
    """

    rows: tuple[Row, ...]
    corrupt: tuple[CorruptRow, ...] = ()

    @classmethod
    def of(cls, folder: str | Path) -> SweepReport:
        """Read the folder of a sweep.

        Raises:
            SuperpipeError: it is missing, empty, or no sweep's.
        """
        return cls(*read_rows(Path(folder)))

    @property
    def drawable(self) -> tuple[Row, ...]:
        """Jobs with a place in the picture: step time and peak are known."""
        return tuple(row for row in self.rows if row.is_finished and row.peak is not None)

    def draw(self, folder: Path) -> tuple[Path, ...]:
        """Write the picture for light and for dark pages; return the files, none if there is nothing to draw.

        Raises:
            SuperpipeError: it cannot be written; a picture from before is as it was.
            UnsupportedError: matplotlib is missing.
        """
        if not self.drawable:
            return ()
        paths = folder / "trade_off.svg", folder / "trade_off-dark.svg"
        for path, dark in zip(paths, (False, True), strict=True):
            draw_trade_off(self.rows, path, dark)
        return paths

    def __rich__(self) -> Group:
        """Return the report for a rich console, in colour."""
        return Group(self._headline(), self._table(), *self._remarks())

    def __str__(self) -> str:
        """Return the report as plain text."""
        console = Console(file=StringIO(), width=_TABLE_WIDTH, color_system=None, force_jupyter=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())

    def _headline(self) -> Text:
        counts = [(sum(row.status is status for row in self.rows), status.value) for status in Status]
        text = f"{len(self.rows)} jobs: " + ", ".join(f"{count} {name}" for count, name in counts if count)
        if any(row.emulated for row in self.rows):
            text += " (emulated link and memory)"
        return Text(text, style="bold")

    def _table(self) -> Table:
        """Return one line a job; the Pareto front is marked."""
        varied = varied_settings(self.rows)
        front = {row.fingerprint for row in pareto_front(self.drawable)}
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in ("k", "k'", "peak", "planned", "of ordinary", "step", "over plain", "loads", "stall", "loss"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("status", no_wrap=True)
        differ = any(varied.values())
        if differ:
            table.add_column("and", no_wrap=True)
        for row in self.rows:
            status = "on the front" if row.fingerprint in front else row.status.value
            settings = _settings(varied[row.fingerprint])
            style = "bold" if row.fingerprint in front else _STATUS_STYLES[row.status]
            table.add_row(*self._numbers(row), status, *([settings] if differ else []), style=style)
        return table

    def _numbers(self, row: Row) -> list[str]:
        """Return the cells of a job, empty where a number is unknown."""
        peak, plain = row.peak_device_bytes, baseline_of(row, self.rows) if row.is_streamed else None
        over = row.step_ms / plain.step_ms if row.step_ms and plain is not None and plain.step_ms else None
        return [
            "off" if row.k is None else str(row.k),
            _text(row.k_prime, "{}"),
            "" if peak is None else _size(peak),
            "" if row.predicted_peak_bytes is None else _size(row.predicted_peak_bytes),
            _text(peak / row.resident_bytes if peak is not None and row.resident_bytes else None, "{:.1%}"),
            _text(row.step_ms, "{:,.1f} ms"),
            _text(over, "{:.2f} x"),
            _text(row.num_loads, "{:,}"),
            _text(row.stall_ms, "{:,.1f} ms"),
            _text(row.loss, "{:.6g}"),
        ]

    def _remarks(self) -> list[Text]:
        """Return what the numbers mean and what went wrong, a line each."""
        lines = []
        if any(row.predicted_peak_bytes for row in self.rows):
            lines.append("planned: slots, anchors and gradients, known before the run; activations come on top.")
        if any(row.resident_bytes for row in self.rows):
            lines.append("of ordinary: the peak beside weights, gradients and states of the ordinary run alone.")
        for row in self.rows:
            if row.error is not None:
                lines.append(f"{_name(row)} {row.status.value}: {row.error.strip().splitlines()[-1]}")
        lines += [f"not readable: {path} ({reason})" for path, reason in self.corrupt]
        return [Text(line, style="dim") for line in lines]


def print_report(folder: str | Path, console: Console | None = None) -> tuple[Path, ...]:
    """Print the table of a sweep and draw its picture into its folder.

    Args:
        folder: of the sweep (``hydra.sweep.dir``).
        console: to print on; None is the terminal.

    Returns:
        The pictures, none where no job has both a step time and a peak.
    Raises:
        SuperpipeError: the folder is missing, empty or no sweep's, or a picture cannot be written.
    """
    console = console or Console()
    report = SweepReport.of(folder)
    if console.is_terminal:
        console.print(report)
    else:  # a file has room for whole lines
        print(report, file=console.file)
    pictures = report.draw(Path(folder))
    where = f"pictures: {', '.join(map(str, pictures))}" if pictures else "no picture: no job has a peak."
    console.print(where, soft_wrap=True)
    return pictures


def _settings(varied: Mapping[str, str]) -> str:
    """Return in what a job differs from others, in the width of a column.

    >>> _settings({"model.config.n_layer": "4", "seed": "1", "trainer.max_steps": "9", "logger": "null"})
    'n_layer=4, seed=1, +2'
    """
    shown = [f"{name.split('.')[-1]}={value}"[:_SETTING_WIDTH] for name, value in varied.items()]
    more = [f"+{len(shown) - _NUM_SETTINGS}"] if len(shown) > _NUM_SETTINGS else []
    return ", ".join([*shown[:_NUM_SETTINGS], *more])


def _name(row: Row) -> str:
    return "off" if row.k is None else f"k={row.k}, k'={row.k_prime}"


def _text(value: float | str | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _size(num_bytes: int) -> str:
    return naturalsize(num_bytes, binary=True)
