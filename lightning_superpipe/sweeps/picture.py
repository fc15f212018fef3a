"""The picture of a sweep: what a smaller window saves in memory, and what it costs in time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.observe.canvas import FAR_ABOVE, Canvas, Reference, Rgb, canvas
from lightning_superpipe.option_checks import parse_bytes
from lightning_superpipe.sweeps.files import replacing
from lightning_superpipe.sweeps.front import pareto_front
from lightning_superpipe.sweeps.row import Row

__all__ = ["draw_trade_off"]

_HEIGHT_PX = 330.0
_ROOM_PX = 50.0  # above the highest point, for references that leave the chart
_MARKERS = "osD^vP*X"  # by k', smallest first; more values share the last
_MARKER_SIZE = 7.0
_LABEL_PX = (78.0, 15.0)  # room of a point's name
_NAME_PLACES = ((9.0, 11.0), (-9.0, -11.0), (9.0, -11.0), (-9.0, 11.0))  # pixels right and up from the point
_KEY_PX = 19.0


class Point(NamedTuple):
    """One job in the picture; sizes in bytes."""

    row: Row
    k: int
    k_prime: int
    step_ms: float
    peak: int
    color: Rgb
    marker: str


def draw_trade_off(rows: Sequence[Row], path: str | Path, dark: bool = False) -> None:
    """Draw peak device memory against step time: a point for each job, the Pareto front as a line.

    What was known before the run (slots, anchors, gradients) is an outline below the point; the distance is what
    activations take. The ordinary run's bytes are a line, or an arrow if they are far above.

    Args:
        rows: all jobs of the sweep; those without a step time or a peak are left out.
        path: file to write; the ending chooses the format, ``.svg`` for pages.
        dark: for dark pages.

    Raises:
        SuperpipeError: no job has both numbers, or the file cannot be written.
        UnsupportedError: matplotlib is missing.
    """
    drawn = [row for row in rows if row.is_finished and row.peak is not None and row.step_ms is not None]
    if not drawn:
        raise SuperpipeError("no job of the sweep has both a step time and a peak: there is nothing to draw.")
    with canvas(_HEIGHT_PX, left_px=72, right_px=150, bottom_px=84, dark=dark) as page:
        points = _points(drawn, page)
        plain = min((row.step_ms for row in rows if not row.is_streamed and row.step_ms is not None), default=None)
        _set_axes(page, points, _references(drawn), plain)
        page.title(_title(drawn), _setting(drawn))
        _draw_front(page, drawn)
        for point in points:
            _draw_point(page, point)
        _draw_names(page, points, drawn)
        if plain is not None:
            _draw_plain(page, plain)
        _draw_legend(page, points)
        _draw_key(page, has_prediction=any(row.predicted_peak_bytes for row in drawn))
        with replacing(Path(path)) as draft:
            page.save(draft)


def _points(rows: Sequence[Row], page: Canvas) -> list[Point]:
    """Return where each job stands: its colour tells k, its shape k'."""
    windows = [row.window for row in rows]
    ks, k_primes = sorted({k for k, _ in windows}), sorted({k_prime for _, k_prime in windows})
    colors = dict(zip(ks, page.theme.unit_colors(len(ks)), strict=True))
    markers = {k_prime: _MARKERS[min(at, len(_MARKERS) - 1)] for at, k_prime in enumerate(k_primes)}
    return [
        Point(row, k, k_prime, row.step_ms or 0.0, row.peak_device_bytes or 0, colors[k], markers[k_prime])
        for row, (k, k_prime) in zip(rows, windows, strict=True)
    ]


def _title(rows: Sequence[Row]) -> str:
    title = "Peak device memory against step time"
    return f"{title} (emulated link and memory)" if any(row.emulated for row in rows) else title


def _setting(rows: Sequence[Row]) -> str:
    """Say what the jobs have in common."""
    devices = sorted({row.device for row in rows if row.device})
    units, sizes = {row.num_units for row in rows}, {row.num_parameters for row in rows}
    facts = [", ".join(devices)] if devices else []
    if len(units) == 1 and None not in units:
        facts.append(f"{units.pop()} units")
    if len(sizes) == 1 and (size := sizes.pop()) is not None:
        facts.append(f"{size / 1e6:,.1f} M parameters")
    return "; ".join([*facts, "lower and further left is better"])


def _references(rows: Sequence[Row]) -> list[Reference]:
    """Return what peaks are compared with, where all jobs have it in common."""
    found = []
    ordinary = {row.resident_bytes for row in rows if row.resident_bytes}
    if len(ordinary) == 1:
        found.append(Reference("ordinary run: at least", ordinary.pop(), None))
    budgets = {(row.config.get("superpipe") or {}).get("device_memory") for row in rows}
    if len(budgets) == 1 and (budget := budgets.pop()) is not None:
        found.append(Reference("budget:", parse_bytes(budget), (6.0, 4.0)))
    return found


def _set_axes(page: Canvas, points: Sequence[Point], references: list[Reference], plain_ms: float | None) -> None:
    """Both axes begin at zero: half the height is half the memory."""
    highest, smallest = max(point.peak for point in points), min(point.peak for point in points)
    inside = [size for _, size, _ in references if size <= FAR_ABOVE * highest]
    page.time_axis(1.12 * max(plain_ms or 0.0, *(point.step_ms for point in points), 0.0))
    page.byte_axis(max(highest, *inside, 0), room_px=_ROOM_PX)
    page.references(references, smallest, "the smallest peak")
    _, y_px = page.px_per_unit()
    page.text(page.axes.get_xlim()[1], -44 / y_px, "time of a training step", color=page.theme.muted, ha="right")


def _draw_front(page: Canvas, rows: Sequence[Row]) -> None:
    """Draw the stairs below which no job is, up to the upper and the right edge."""
    front = [(row.step_ms or 0.0, float(row.peak_device_bytes or 0)) for row in reversed(pareto_front(rows))]
    times = [front[0][0], *(step_ms for step_ms, _ in front), page.axes.get_xlim()[1]]
    sizes = [_ceiling(page), *(size for _, size in front), front[-1][1]]
    page.axes.plot(times, sizes, color=page.theme.muted, linewidth=1.4, drawstyle="steps-post", zorder=1.5)


def _ceiling(page: Canvas) -> float:
    """Return up to where lines may go without crossing the names of references."""
    _, y_px = page.px_per_unit()
    return page.axes.get_ylim()[1] - 0.6 * _ROOM_PX / y_px


def _draw_point(page: Canvas, point: Point) -> None:
    """Draw the measured peak filled, the predicted one as outline below it."""
    style: dict[str, Any] = {"marker": point.marker, "markersize": _MARKER_SIZE, "linestyle": "none", "clip_on": False}
    predicted = point.row.predicted_peak_bytes
    if predicted is not None:
        page.axes.plot([point.step_ms] * 2, [predicted, point.peak], color=point.color, linewidth=0.8, zorder=2)
        page.axes.plot(
            [point.step_ms], [predicted], markeredgecolor=point.color, markerfacecolor=page.theme.background, **style
        )
    page.axes.plot(
        [point.step_ms], [point.peak], color=point.color, markeredgecolor=page.theme.background, zorder=3, **style
    )


def _draw_names(page: Canvas, points: Sequence[Point], rows: Sequence[Row]) -> None:
    """Name the points of the front, from the smallest on, beside them where no name or point is in the way."""
    (x_px, y_px), on_front = page.px_per_unit(), {id(row) for row in pareto_front(rows)}
    taken = [(point.step_ms * x_px, point.peak * y_px) for point in points]
    for point in sorted((point for point in points if id(point.row) in on_front), key=lambda point: point.peak):
        for right, up in _NAME_PLACES:
            x, y = point.step_ms * x_px + right, point.peak * y_px + up
            left = x if right > 0 else x - _LABEL_PX[0]
            if any(-9 < at - left < _LABEL_PX[0] and abs(height - y) < 0.7 * _LABEL_PX[1] for at, height in taken):
                continue
            name, side = f"k={point.k}, k'={point.k_prime}", "left" if right > 0 else "right"
            page.text(x / x_px, y / y_px, name, color=page.theme.ink, ha=side)
            taken += [(left + step * _LABEL_PX[0] / 4, y) for step in range(5)]
            break


def _draw_plain(page: Canvas, step_ms: float) -> None:
    """Draw how long a step of the ordinary run takes."""
    (x_px, y_px), low = page.px_per_unit(), page.axes.get_ylim()[0]
    page.axes.plot(
        [step_ms] * 2, [low, _ceiling(page)], color=page.theme.muted, linewidth=1.0, linestyle=(0, (1.5, 2.5))
    )
    page.text(step_ms + 5 / x_px, low + 10 / y_px, "ordinary run", color=page.theme.muted)


def _draw_legend(page: Canvas, points: Sequence[Point]) -> None:
    """List beside the chart which colour is which k, and which shape which k'."""
    (x_px, y_px), right = page.px_per_unit(), page.axes.get_xlim()[1]
    ink = page.theme.ink
    colors = {f"k = {point.k}": (point.color, "o") for point in sorted(points, key=lambda point: point.k)}
    shapes = {f"k' = {point.k_prime}": (ink, point.marker) for point in sorted(points, key=lambda each: each.k_prime)}
    height = page.plot_px[1] - 10
    for group in (colors, shapes):
        for name, (color, marker) in group.items():
            spot = [right + 28 / x_px], [height / y_px]
            page.axes.plot(*spot, marker, color=color, markersize=_MARKER_SIZE, clip_on=False)
            page.text(right + 42 / x_px, height / y_px, name, color=ink)
            height -= _KEY_PX
        height -= _KEY_PX / 2


def _draw_key(page: Canvas, *, has_prediction: bool) -> None:
    """Say below the chart what filled, outlined and the line mean."""
    (x_px, y_px), muted, low = page.px_per_unit(), page.theme.muted, -70.0
    style: dict[str, Any] = {
        "linestyle": "none",
        "markersize": _MARKER_SIZE,
        "markeredgecolor": muted,
        "clip_on": False,
    }
    page.axes.plot([6 / x_px], [low / y_px], "o", markerfacecolor=muted, **style)
    page.text(18 / x_px, low / y_px, "measured peak", color=muted)
    page.axes.plot([124 / x_px, 152 / x_px], [low / y_px] * 2, color=muted, linewidth=1.4, clip_on=False)
    page.text(160 / x_px, low / y_px, "no job is both smaller and faster", color=muted)
    if has_prediction:
        page.axes.plot([372 / x_px], [low / y_px], "o", markerfacecolor="none", **style)
        page.text(384 / x_px, low / y_px, "planned before the run; activations come on top", color=muted)
