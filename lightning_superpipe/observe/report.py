"""What a run held on the device, moved and waited for: numbers that print as a table and are logged as metrics."""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass
from io import StringIO

from humanize import metric, naturalsize
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from lightning_superpipe.observe.host_bytes import HostBytes
from lightning_superpipe.planning.disk_work import DiskWork
from lightning_superpipe.planning.prediction import PeakBytes

__all__ = ["PeakBytes", "Report", "StepCounters"]

_LEFT_OUT = "the peak is without what the loop computes outside the model, such as a loss: no device counts"
_TABLE_WIDTH, _NAME_WIDTH = 100, 22


@dataclass(frozen=True)
class StepCounters:
    """Traffic of one step or of many; counters add and subtract.

    Attributes:
        num_loads: units copied to the device.
        num_plan_misses: loads on demand because the model left the plan.
        h2d_bytes: bytes copied from host to device.
        d2h_bytes: bytes copied from device to host.
        stall_seconds: time that compute waited for copies.
        disk_read_bytes: bytes read from files of the disk store.
        disk_written_bytes: bytes written to them: by updates, and by weights and states that moved there.

    >>> (StepCounters(num_loads=9, h2d_bytes=90) - StepCounters(num_loads=4, h2d_bytes=40)).h2d_bytes
    50
    """

    num_loads: int = 0
    num_plan_misses: int = 0
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    stall_seconds: float = 0.0
    disk_read_bytes: int = 0
    disk_written_bytes: int = 0

    def __add__(self, other: StepCounters) -> StepCounters:
        """Return both together."""
        return StepCounters(*(mine + more for mine, more in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: StepCounters) -> StepCounters:
        """Return what came after ``other`` was counted."""
        return StepCounters(*(mine - less for mine, less in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Report:
    """What streaming cost and saved; ``print`` it, or log ``as_metrics()``.

    Attributes:
        k: most units on the device at once.
        k_prime: units moved per transfer.
        num_resident: units that stayed on the device beside those.
        num_units: units of the model.
        num_steps: training steps so far.
        peak: device bytes by kind at the peak.
        resident_bytes: what the ordinary run would hold on the device at least: weights, gradients, states.
        num_parameters: of the model, elements.
        host: bytes held in host memory by kind, measured.
        last_step: traffic of the last step.
        total: traffic since the run began.
        device: such as ``"cuda:0"``.
        emulated: the link or the device memory was emulated.
        unit_overhead_us: what the engine adds to a unit's forward or backward, microseconds.
        endurance_tb: what may be written in the drive's life, 10^12 bytes; None if not known.
        sees_loop: the peak holds what the user's loop computes itself, such as a loss, and not the model's calls and
            their backward alone.
        num_on_device: units that are updated on the device.
        micro_batches: parts of a batch inside units that recompute.
        plan: what ``auto`` chose, and why; empty where nothing was chosen.
    """

    k: int
    k_prime: int
    num_resident: int
    num_units: int
    num_steps: int
    peak: PeakBytes
    resident_bytes: int
    num_parameters: int
    host: HostBytes
    last_step: StepCounters
    total: StepCounters
    device: str
    emulated: bool
    unit_overhead_us: float
    sees_loop: bool = True
    num_on_device: int = 0
    micro_batches: int = 1
    plan: str = ""
    endurance_tb: float | None = None

    @property
    def peak_device_bytes(self) -> int:
        """Most bytes on the device at once, all kinds."""
        return self.peak.total

    @property
    def host_bytes(self) -> int:
        """Bytes held in host memory, all kinds."""
        return self.host.total

    @property
    def num_loads(self) -> int:
        """Units copied to the device, in total."""
        return self.total.num_loads

    @property
    def num_plan_misses(self) -> int:
        """Loads on demand, in total."""
        return self.total.num_plan_misses

    @property
    def h2d_bytes(self) -> int:
        """Bytes copied from host to device, in total."""
        return self.total.h2d_bytes

    @property
    def d2h_bytes(self) -> int:
        """Bytes copied from device to host, in total."""
        return self.total.d2h_bytes

    @property
    def drive_life_per_step(self) -> float | None:
        """Share of the drive's life that the last step's writes cost; None if its endurance is not known."""
        written = DiskWork(written_bytes=self.last_step.disk_written_bytes)
        return None if self.endurance_tb is None else written.life(self.endurance_tb)

    @property
    def disk_read_bytes(self) -> int:
        """Bytes read from the disk store, in total."""
        return self.total.disk_read_bytes

    @property
    def disk_written_bytes(self) -> int:
        """Bytes written to the disk store, in total."""
        return self.total.disk_written_bytes

    @property
    def stall_seconds(self) -> float:
        """Time that compute waited for copies, in total."""
        return self.total.stall_seconds

    def as_metrics(self, prefix: str = "superpipe/") -> dict[str, float]:
        """Return all numbers by name, for a logger: totals under their own names, the last step as ``last_step_*``."""
        sizes = {f"peak_{kind}_bytes": size for kind, size in self.peak._asdict().items()}
        sizes |= {f"host_{kind}_bytes": size for kind, size in self.host._asdict().items()}
        last = {f"last_step_{name}": count for name, count in asdict(self.last_step).items()}
        names = (
            "k",
            "k_prime",
            "num_resident",
            "num_on_device",
            "micro_batches",
            "num_units",
            "num_steps",
            "num_parameters",
            "peak_device_bytes",
            "resident_bytes",
            "host_bytes",
        )
        own = {name: getattr(self, name) for name in (*names, "unit_overhead_us", "emulated")}
        return {prefix + name: float(value) for name, value in {**own, **sizes, **asdict(self.total), **last}.items()}

    def __rich__(self) -> Group:
        """Return the report for a rich console, in colour."""
        left_out = [] if self.sees_loop else [Text(_LEFT_OUT, style="dim")]
        plan = [Text(self.plan)] if self.plan else []
        return Group(
            self._headline(), *plan, self._memory_table(), *left_out, self._host_table(), self._traffic_table()
        )

    def __str__(self) -> str:
        """Return the report as plain text, at most 100 columns."""
        console = Console(file=StringIO(), width=_TABLE_WIDTH, color_system=None, force_jupyter=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())

    def _headline(self) -> Text:
        where = f"{self.device} (emulated link and memory)" if self.emulated else self.device
        window = f"k={self.k} of {self.num_units} units, k'={self.k_prime}"
        window += f", {self.num_resident} resident" if self.num_resident else ""
        window += f", {self.num_on_device} updated on the device" if self.num_on_device else ""
        window += f", batches in {self.micro_batches} parts" if self.micro_batches > 1 else ""
        return Text.assemble(("superpipe", "bold"), f" on {where}: {window}, {self.num_steps} steps")

    def _memory_table(self) -> Table:
        """Return the peak by kind beside what the ordinary run would hold."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("memory", min_width=_NAME_WIDTH)
        table.add_column("bytes", justify="right")
        table.add_column("of the ordinary run", justify="right")
        for kind, size in self.peak._asdict().items():
            table.add_row(f"  {kind}", _size(size), self._share(size), style="dim")
        table.add_row("device peak", _size(self.peak.total), self._share(self.peak.total), style="bold")
        table.add_row("ordinary run, at least", _size(self.resident_bytes), "")
        return table

    def _host_table(self) -> Table:
        """Return what the host holds by kind, and for each parameter."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("host memory", min_width=_NAME_WIDTH)
        table.add_column("bytes", justify="right")
        table.add_column("per parameter", justify="right")
        shares = self.host.per(self.num_parameters)
        for (kind, size), share in zip(self.host._asdict().items(), shares, strict=True):
            table.add_row(f"  {kind}", _size(size), f"{share:.2f}", style="dim")
        table.add_row("host", _size(self.host_bytes), f"{sum(shares):.2f}", style="bold")
        return table

    def _traffic_table(self) -> Table:
        """Return the counters of the last step beside their totals."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("traffic", min_width=_NAME_WIDTH)
        table.add_column("last step", justify="right")
        table.add_column("total", justify="right")
        last, total = self.last_step, self.total
        table.add_row("loads", f"{last.num_loads:,}", f"{total.num_loads:,}")
        table.add_row("plan misses", f"{last.num_plan_misses:,}", f"{total.num_plan_misses:,}")
        table.add_row("host to device", _size(last.h2d_bytes), _size(total.h2d_bytes))
        table.add_row("device to host", _size(last.d2h_bytes), _size(total.d2h_bytes))
        if total.disk_read_bytes or total.disk_written_bytes:
            table.add_row("read from disk", _size(last.disk_read_bytes), _size(total.disk_read_bytes))
            table.add_row("written to disk", _size(last.disk_written_bytes), _size(total.disk_written_bytes))
            life = self.drive_life_per_step
            table.add_row("drive life", "not known (disk.endurance_tb)" if life is None else f"{life:.2e}", "")
        table.add_row("stall", metric(last.stall_seconds, "s"), metric(total.stall_seconds, "s"))
        table.add_row("engine, each unit", metric(self.unit_overhead_us / 1e6, "s"), "")
        return table

    def _share(self, size: int) -> str:
        """Return ``size`` as a share of the ordinary run."""
        return f"{size / self.resident_bytes:.1%}" if self.resident_bytes else ""


def _size(num_bytes: int) -> str:
    return naturalsize(num_bytes, binary=True)
