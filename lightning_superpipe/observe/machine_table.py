"""A machine profile for people: a few short tables."""

from __future__ import annotations

from collections.abc import Iterator

from humanize import naturalsize
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from lightning_superpipe.observe.machine import MachineProfile
from lightning_superpipe.observe.rates import DiskRoute, Route, Work

__all__ = ["profile_tables"]

_WAYS = {Route.H2D: "to it", Route.D2H: "from it", Route.BOTH: "both ways"}
_WORKS = {Work.PLAIN: "reading and writing", Work.FUNCTION: "exponentials", Work.RANDOM: "random numbers"}


def profile_tables(profile: MachineProfile) -> Group:
    """Return what ``rich`` prints of a profile."""
    return Group(*_lines(profile), *_tables(profile))


def _lines(profile: MachineProfile) -> Iterator[str]:
    machine, room = profile.identity, profile.room
    emulated = ", emulated: device and host are one memory" if profile.emulated else ""
    yield f"{machine.device or profile.device} ({profile.device}{emulated}), {machine.num_cores} cores"
    if profile.note:
        yield f"{profile.note}: {', '.join(profile.sources)}"
    if room.device_total:
        yield (
            f"Device memory: {_size(room.device_free)} free of {_size(room.device_total)}. "
            f"Host memory: {_size(room.host_free)} free of {_size(room.host_total)}."
        )
    if profile.why_not_pinned and not profile.emulated:
        yield f"No page-locked memory ({profile.why_not_pinned}): copies count as pageable ones."
    if profile.use_s:
        yield (
            f"An operation takes {1e6 * profile.launch_s:.1f} us at least, the engine {1e6 * profile.use_s:.0f} us for "
            "each use of a unit."
        )


def _tables(profile: MachineProfile) -> Iterator[RenderableType]:
    if profile.copies:
        yield _copies(profile)
    if profile.computes or profile.memory:
        rows = [
            [f"{rate.dtype} products", f"{rate.num_flops / 1e9:.3g} GFLOP", f"{rate.tflop_s:.3g} TFLOP/s"]
            for rate in profile.computes
        ]
        rows += [[_WORKS[rate.work], _size(rate.num_bytes), f"{rate.gb_s:.3g} GB/s"] for rate in profile.memory]
        yield _table("On the device", ["work", "size", "speed"], rows)
    if profile.updates:
        rows = [[rate.dtype, str(rate.num_threads), f"{rate.parameters_per_s / 1e9:.2f}"] for rate in profile.updates]
        yield _table("AdamW on the host", ["dtype", "threads", "10^9 parameters/s"], rows)
    if profile.disks:
        rows = [
            [_size(rate.num_bytes), "read" if rate.route is DiskRoute.READ else "written", f"{rate.gb_s:.2f}"]
            + ["yes" if rate.direct else "no: the page cache may have answered"]
            for rate in profile.disks
        ]
        yield _table("Files", ["size", "", "GB/s", "direct"], rows)


def _copies(profile: MachineProfile) -> Table:
    rates = {(copy.pinned, copy.route, copy.num_bytes): f"{copy.gb_s:.1f}" for copy in profile.copies}
    kinds = [
        (pinned, route) for pinned in (True, False) for route in Route if (pinned, route) in {k[:2] for k in rates}
    ]
    columns = ["size", *(f"{'pinned' if pinned else 'pageable'} {_WAYS[route]}" for pinned, route in kinds)]
    sizes = sorted({copy.num_bytes for copy in profile.copies})
    rows = [[_size(size), *(rates.get((*kind, size), "-") for kind in kinds)] for size in sizes]
    return _table("Copies between host and device, GB/s", columns, rows)


def _table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _size(num_bytes: int) -> str:
    return naturalsize(num_bytes, binary=True)
