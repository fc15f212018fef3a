"""Pictures of one recorded step: what each lane did, and what the device held."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from humanize import naturalsize

from lightning_superpipe.errors import SuperpipeError
from lightning_superpipe.observe.canvas import FAR_ABOVE, Canvas, Reference, Rgb, blend, canvas
from lightning_superpipe.observe.trace import Lane, MemorySample, Recording, Span, rows_of

__all__ = ["draw_memory", "draw_timeline"]

_LANE_PX, _LANE_GAP_PX, _PHASES_PX = 34.0, 12.0, 26.0
_JOBS = {
    **{Lane.COMPUTE: "busy", Lane.H2D: "weights in,", Lane.D2H: "gradients out,", Lane.HOST: "updates,"},
    **{Lane.READ: "from files,", Lane.WRITE: "to files,"},
}
_NUMBERS = {4: "four", 5: "five", 6: "six"}
_PHASES = {"F": "forward", "B": "backward"}
_GRADIENT_WORK = frozenset("BG")  # tinted, where work on weights is solid
_TINT = 0.35
_INDEX_PX, _DIGIT_PX = 11.0, 6.0
_NO_UNIT = (0.5, 0.5, 0.5)
_KINDS = ("slots", "anchors", "gradients", "activations")

_MEMORY_PX = 270.0
_LABEL_PX = 18.0


class Phase(NamedTuple):
    """A run of forwards, or of backwards, on the compute lane."""

    name: str
    start_ms: float
    end_ms: float


def draw_timeline(recording: Recording, path: str | Path, dark: bool = False) -> None:
    """Draw the lanes of a step: units by colour, work on gradients tinted, stalls hatched, time in ms.

    Args:
        recording: the step; it must hold spans.
        path: file to write; the ending chooses the format, ``.svg`` for pages.
        dark: for dark pages.

    Raises:
        SuperpipeError: the recording holds no spans.
        UnsupportedError: matplotlib is missing.
    """
    if not recording.spans or not recording.duration_s:
        raise SuperpipeError("the recording holds no spans: only a step that ran (record_step=...) has a timeline.")
    lanes = recording.lanes
    height = _PHASES_PX + len(lanes) * (_LANE_PX + _LANE_GAP_PX)
    with canvas(height, left_px=136, right_px=28, bottom_px=70, dark=dark) as page:
        page.axes.set_ylim(height, 0)
        page.axes.set_yticks([])
        page.time_axis(recording.duration_s * 1e3)
        page.axes.grid(axis="x", color=page.theme.faint, linewidth=0.8)
        waits = f"compute waits {recording.stall_seconds * 1e3:,.1f} of {recording.duration_s * 1e3:,.1f} ms"
        page.title(_title(f"One step on {_NUMBERS[len(lanes)]} lanes", recording), f"{_setting(recording)}; {waits}")
        _draw_phases(page, _phases(recording), line_y=18, text_y=8)
        for place, lane in enumerate(lanes):
            _draw_lane(page, recording, lane, top_px=_PHASES_PX + place * (_LANE_PX + _LANE_GAP_PX))
        _draw_key(page, len(recording.unit_names))
        page.save(path)


def draw_memory(recording: Recording, path: str | Path, dark: bool = False) -> None:
    """Draw device memory over a step, stacked by kind, against the budget and the ordinary run.

    A reference far above the peak leaves the chart as an arrow with its bytes.

    Args:
        recording: the step; it must hold memory samples.
        path: file to write; the ending chooses the format, ``.svg`` for pages.
        dark: for dark pages.

    Raises:
        SuperpipeError: the recording holds no samples, or only empty ones.
        UnsupportedError: matplotlib is missing.
    """
    peak = recording.peak
    if peak is None or not peak.total or not recording.duration_s:
        raise SuperpipeError("the recording holds no memory samples: only a step that ran (record_step=...) has them.")
    with canvas(_MEMORY_PX, left_px=72, right_px=190, bottom_px=66, dark=dark) as page:
        page.time_axis(recording.duration_s * 1e3)
        references = _references(recording)
        inside = [size for _, size, _ in references if size <= FAR_ABOVE * peak.total]
        room_px = 26 if len(inside) == len(references) else 50  # above the highest line, for labels and arrows
        page.byte_axis(max([peak.total, *inside]), room_px)
        page.title(_title("Device memory over one step", recording), _setting(recording))
        _draw_areas(page, recording)
        _draw_peak(page, peak)
        page.references(references, peak.total)
        _, y_px = page.px_per_unit()
        _draw_phases(page, _phases(recording), line_y=-34 / y_px, text_y=-46 / y_px)
        page.save(path)


def _title(text: str, recording: Recording) -> str:
    return f"{text} (emulated link and memory)" if recording.emulated else text


def _setting(recording: Recording) -> str:
    return f"{len(recording.unit_names)} units on {recording.device}, k = {recording.k}, k' = {recording.k_prime}"


def _phases(recording: Recording) -> list[Phase]:
    """Return the runs of forwards and of backwards on the compute lane, in order."""
    work = [span for span in recording.lane(Lane.COMPUTE) if span.name in _PHASES]
    runs = [(name, list(run)) for name, run in groupby(work, key=lambda span: span.name)]
    return [Phase(_PHASES[name], run[0].start_s * 1e3, run[-1].end_s * 1e3) for name, run in runs]


def _draw_phases(page: Canvas, phases: list[Phase], line_y: float, text_y: float) -> None:
    """Write "forward" and "backward" beside lines as long as each took; ``y`` in data units."""
    x_px, y_px = page.px_per_unit()
    for name, start, end in phases:
        path = [(start, line_y - 3 / y_px), (start, line_y + 3 / y_px), (start, line_y)]
        path += [(end, line_y), (end, line_y - 3 / y_px), (end, line_y + 3 / y_px)]
        page.axes.plot(*zip(*path, strict=True), color=page.theme.muted, linewidth=0.9, clip_on=False)
        if (end - start) * x_px > 64:
            page.text((start + end) / 2, text_y, name, color=page.theme.muted, ha="center")


def _draw_lane(page: Canvas, recording: Recording, lane: Lane, top_px: float) -> None:
    """Draw one lane with its name and how busy it was; spans that overlap share its height."""
    spans = sorted(recording.lane(lane), key=lambda span: span.is_stall)  # stalls lie above the work around them
    rows = rows_of(spans, slack_s=recording.duration_s / page.plot_px[0])  # a pixel of overlap is no overlap
    row_px = _LANE_PX / (max(rows, default=0) + 1)
    num_units = len(recording.unit_names)
    colors = page.theme.unit_colors(num_units)
    index_px = 4 + _DIGIT_PX * len(str(num_units - 1))  # as wide as the last, so that equal bars look equal
    for span, row in zip(spans, rows, strict=True):
        color = colors[span.unit] if 0 <= span.unit < len(colors) else _NO_UNIT
        _draw_bar(page, span, color, top_px + row * row_px, row_px, index_px)
    busy = recording.busy_seconds(lane) / recording.duration_s
    page.row_label(top_px + _LANE_PX / 2, lane.value, f"{_JOBS[lane]} {busy:.0%}")


def _draw_bar(page: Canvas, span: Span, color: Rgb, top_px: float, height_px: float, index_px: float) -> None:
    """Draw one span, with the index of its unit if that many pixels are free."""
    x_px, _ = page.px_per_unit()
    start, width = span.start_s * 1e3, span.seconds * 1e3
    gap = min(1.0, 0.2 * width * x_px) / x_px  # between neighbours, less where bars are thin
    box = (start + gap / 2, top_px, width - gap, height_px - 1)
    if span.is_stall:
        page.hatch(*box)
        return
    fill = blend(color, page.theme.background, _TINT) if span.name in _GRADIENT_WORK else color
    page.bar(*box, fill=fill, edge=color)
    if span.unit >= 0 and index_px < width * x_px and height_px > _INDEX_PX:
        middle, ink = top_px + height_px / 2, page.theme.readable_on(fill)
        page.text(start + width / 2, middle, str(span.unit), color=ink, ha="center", size=7.5)


def _draw_key(page: Canvas, num_units: int) -> None:
    """Say below the chart what solid, tinted and hatched mean, and which colours are early units."""
    (x_px, _), theme, top = page.px_per_unit(), page.theme, page.plot_px[1] + 38
    colors = theme.unit_colors(24)
    tinted = blend(colors[8], theme.background, _TINT)
    page.bar(0, top, 22 / x_px, 12, fill=colors[8], edge=colors[8])
    page.text(29 / x_px, top + 6, "weights", color=theme.muted)
    page.bar(100 / x_px, top, 22 / x_px, 12, fill=tinted, edge=colors[8])
    page.text(129 / x_px, top + 6, "gradients", color=theme.muted)
    page.hatch(212 / x_px, top, 22 / x_px, 12)
    page.text(241 / x_px, top + 6, "compute waits", color=theme.muted)
    for place, color in enumerate(colors):
        page.bar((page.plot_px[0] - 150 + 5 * place) / x_px, top, 5 / x_px, 12, fill=color, edge=color)
    page.text((page.plot_px[0] - 157) / x_px, top + 6, "unit 0", color=theme.muted, ha="right")
    page.text((page.plot_px[0] - 23) / x_px, top + 6, str(num_units - 1), color=theme.muted)


def _references(recording: Recording) -> list[Reference]:
    references = [Reference("ordinary run: at least", recording.resident_bytes, None)]
    if recording.budget_bytes is not None:
        references.append(Reference("budget:", recording.budget_bytes, (6.0, 4.0)))
    return references


def _draw_areas(page: Canvas, recording: Recording) -> None:
    """Stack the kinds; a sample holds until the next one."""
    times = [sample.time_s * 1e3 for sample in recording.samples]
    times.append(max(recording.duration_s * 1e3, times[-1]))
    low = [0.0] * len(times)
    for kind, color in zip(_KINDS, page.theme.kinds, strict=True):
        sizes = [float(getattr(sample, kind)) for sample in recording.samples]
        high = [below + size for below, size in zip(low, [*sizes, sizes[-1]], strict=True)]
        page.axes.fill_between(times, low, high, step="post", color=color, linewidth=0)
        low = high


def _draw_peak(page: Canvas, peak: MemorySample) -> None:
    """Mark the peak, and list beside the chart the bytes of each kind there, near the height of its band."""
    (x_px, y_px), right, theme = page.px_per_unit(), page.axes.get_xlim()[1], page.theme
    top, moment = float(peak.total), peak.time_s * 1e3
    page.axes.plot([moment, right], [top, top], color=theme.muted, linewidth=0.8)
    page.axes.plot([moment], [top], "o", color=theme.ink, markersize=4.5, clip_on=False)
    below, height = 0.0, float("-inf")
    for kind, color in zip(_KINDS, theme.kinds, strict=True):
        size = getattr(peak, kind)
        height = max((below + size / 2) * y_px, height + _LABEL_PX, _LABEL_PX / 2)
        below += size
        page.bar(right + 14 / x_px, (height - 5) / y_px, 10 / x_px, 10 / y_px, fill=color, edge=color)
        page.text(right + 30 / x_px, height / y_px, kind, color=theme.ink)
        page.text(right + 174 / x_px, height / y_px, _size(size), color=theme.muted, ha="right")
    height = max(top * y_px, height + _LABEL_PX)
    page.text(right + 14 / x_px, height / y_px, "peak", color=theme.ink, weight="bold")
    page.text(right + 174 / x_px, height / y_px, _size(peak.total), color=theme.ink, weight="bold", ha="right")


def _size(num_bytes: int) -> str:
    return naturalsize(num_bytes, binary=True)
