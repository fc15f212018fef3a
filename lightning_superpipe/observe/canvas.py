"""The look that all pictures share: colours for light and dark pages, a figure of fixed size, axes without junk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from humanize import naturalsize

from lightning_superpipe.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FAR_ABOVE", "MARGIN_PX", "WIDTH_PX", "Canvas", "Reference", "Rgb", "Theme", "blend", "canvas"]

Rgb = tuple[float, float, float]

WIDTH_PX = 900
_PX_PER_INCH = 96  # of CSS: the SVG's points become these pixels on a page
_POINTS_PER_PX = 72 / _PX_PER_INCH
MARGIN_PX = 16
_TITLE_PX = 66
FAR_ABOVE = 2.0
"""A reference this many times the peak leaves the chart instead of flattening it."""
_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_FONTS = ["Inter", "Helvetica Neue", "Segoe UI", "Roboto", "Arial", "DejaVu Sans"]


@dataclass(frozen=True)
class Theme:
    """Colours of one kind of page.

    Attributes:
        background: of the page and between neighbouring bars.
        ink: titles and text.
        muted: secondary text and axes.
        faint: grid lines.
        stall: hatching of lost time.
        kinds: slots, anchors, gradients, activations.
        unit_range: part of the perceptual map that stands out from the background.
    """

    background: str
    ink: str
    muted: str
    faint: str
    stall: str
    kinds: tuple[str, str, str, str]
    unit_range: tuple[float, float]

    @classmethod
    def of(cls, dark: bool) -> Theme:
        """Return the theme for a dark or a light page."""
        return _DARK if dark else _LIGHT

    def unit_colors(self, num_units: int) -> list[Rgb]:
        """Return a colour for each unit along a perceptual map, in order."""
        from matplotlib import colormaps

        low, high = self.unit_range
        steps = [low + (high - low) * unit / max(num_units - 1, 1) for unit in range(num_units)]
        colors = [colormaps["viridis"](step) for step in steps]
        return [(float(red), float(green), float(blue)) for red, green, blue, _ in colors]

    def readable_on(self, fill: Rgb) -> str:
        """Return black or white, whichever is easier to read on ``fill``."""
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in fill]  # of sRGB
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        return "#000000" if luminance > 0.22 else "#ffffff"


_LIGHT = Theme(
    background="#ffffff",
    ink="#1f2328",
    muted="#656d76",
    faint="#e6e8eb",
    stall="#d1242f",
    kinds=("#3d6fb4", "#9aa4b1", "#e0893f", "#5fa893"),
    unit_range=(0.06, 0.90),
)
_DARK = Theme(
    background="#0d1117",
    ink="#e6edf3",
    muted="#8d96a0",
    faint="#21262d",
    stall="#ff7b72",
    kinds=("#4272b5", "#768390", "#d18039", "#4c9a85"),
    unit_range=(0.22, 0.97),
)


class Reference(NamedTuple):
    """Bytes that the peak is compared with."""

    name: str
    size: int
    dashes: tuple[float, ...] | None  # None is a solid line


@dataclass(frozen=True)
class Canvas:
    """A figure with one set of axes; positions are CSS pixels, so that text and gaps keep their size.

    Attributes:
        figure: the whole picture.
        axes: the plot.
        theme: its colours.
        left_px: where the plot begins.
        plot_px: width and height of the plot.
    """

    figure: Figure
    axes: Axes
    theme: Theme
    left_px: float
    plot_px: tuple[float, float]

    def px_per_unit(self) -> tuple[float, float]:
        """Return pixels per data unit along x and y; call it after the limits are set."""
        (left, right), (bottom, top) = self.axes.get_xlim(), self.axes.get_ylim()
        return self.plot_px[0] / (right - left), self.plot_px[1] / (top - bottom)

    def title(self, title: str, subtitle: str) -> None:
        """Write a title and a muted line below it at the upper left."""
        left, height = MARGIN_PX / WIDTH_PX, self.figure.get_figheight() * _PX_PER_INCH
        for text, top_px, size, color, weight in (
            (title, 14, 11.5, self.theme.ink, "bold"),
            (subtitle, 37, 9.0, self.theme.muted, "normal"),
        ):
            self.figure.text(left, 1 - top_px / height, text, size=size, color=color, weight=weight, va="top")

    def time_axis(self, duration_ms: float) -> None:
        """Give x round ticks in milliseconds, the unit written once."""
        ticks = _round_ticks(duration_ms, most=8)
        self.axes.set_xlim(0, duration_ms)
        self.axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks[:-1]] + [f"{ticks[-1]:,g} ms"])

    def byte_axis(self, highest: float, room_px: float) -> None:
        """Give y round ticks up to ``highest`` bytes, the binary unit written once, and empty room above."""
        exponent = max(0, min(4, int(math.log2(max(highest, 1.0)) // 10)))
        scale = 1024**exponent
        ticks = _round_ticks(highest / scale, most=5)
        labels = [f"{tick:,g}" for tick in ticks[:-1]] + [f"{ticks[-1]:,g} {_BYTE_UNITS[exponent]}"]
        self.axes.set_ylim(0, highest * self.plot_px[1] / (self.plot_px[1] - room_px))
        self.axes.set_yticks([tick * scale for tick in ticks], labels)
        self.axes.grid(axis="y", color=self.theme.faint, linewidth=0.8)

    def bar(self, left: float, low: float, width: float, height: float, *, fill: str | Rgb, edge: str | Rgb) -> None:
        """Draw a filled box with an edge inside it, in data units."""
        from matplotlib.patches import Rectangle

        box = Rectangle((left, low), width, height, facecolor=fill, edgecolor=edge, linewidth=0.75, clip_on=False)
        self.axes.add_patch(box)

    def hatch(self, left: float, low: float, width: float, height: float) -> None:
        """Draw a hatched box: lost time."""
        from matplotlib.patches import Rectangle

        color = self.theme.stall
        box = Rectangle((left, low), width, height, fill=False, edgecolor=color, hatch="//////", linewidth=0)
        box.set_clip_on(False)
        self.axes.add_patch(box)

    def text(
        self, x: float, y: float, text: str, *, color: str, ha: str = "left", weight: str = "normal", size: float = 9
    ) -> None:
        """Write one line, centred on y, in data units; ``size`` in points."""
        self.axes.text(x, y, text, color=color, ha=ha, va="center_baseline", size=size, weight=weight)

    def arrow(self, x: float, low: float, high: float) -> None:
        """Draw an upward arrow that may leave the plot, in data units."""
        style = {"arrowstyle": "-|>", "color": self.theme.ink, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", (x, high), (x, low), arrowprops=style, annotation_clip=False)

    def row_label(self, y: float, name: str, note: str) -> None:
        """Name a row at the left edge of the picture, with a muted note below the name."""
        x_px, _ = self.px_per_unit()
        x = self.axes.get_xlim()[0] + (MARGIN_PX - self.left_px) / x_px
        self.text(x, y - 8, name, color=self.theme.ink, weight="bold")
        self.text(x, y + 8, note, color=self.theme.muted)

    def references(self, references: Sequence[Reference], peak_bytes: int, peak_name: str = "this peak") -> None:
        """Draw what a peak is compared with: a line where it fits the chart, else an arrow that leaves it."""
        (x_px, y_px), (left, right) = self.px_per_unit(), self.axes.get_xlim()
        top, ink, arrow_px = self.axes.get_ylim()[1], self.theme.ink, 16.0
        for name, size, dashes in references:
            label = f"{name} {naturalsize(size, binary=True)}"
            if size <= top:
                self.axes.plot([left, right], [size, size], color=ink, linewidth=1.2, linestyle=(0, dashes))
                crowded = any(0 < other - size < 22 / y_px for _, other, _ in references)
                self.text(right, size + (-10 if crowded else 10) / y_px, label, color=ink, ha="right")
                continue
            self.arrow(left + arrow_px / x_px, top - 22 / y_px, top + 12 / y_px)
            text = f"{label}, {size / peak_bytes:.1f} times {peak_name}"
            self.text(left + (arrow_px + 10) / x_px, top - 8 / y_px, text, color=ink)
            arrow_px += 350

    def save(self, path: str | Path) -> None:
        """Write the picture; the ending of the path chooses the format (``.svg`` for pages)."""
        is_svg = Path(path).suffix == ".svg"
        undated = {"Date": None, "Creator": None} if is_svg else None  # equal recordings give equal files
        self.figure.savefig(path, facecolor=self.theme.background, metadata=undated)


@contextmanager
def canvas(plot_height_px: float, *, left_px: float, right_px: float, bottom_px: float, dark: bool) -> Iterator[Canvas]:
    """Provide an empty picture 900 pixels wide, untouched by matplotlib settings of the caller.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "pictures need matplotlib, which is not installed: pip install 'lightning_superpipe[plots]'."
        ) from error
    theme = Theme.of(dark)
    height = plot_height_px + _TITLE_PX + bottom_px
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # Text stays text: small files, searchable, in the page's own font; a fixed salt makes equal files.
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "superpipe", "font.size": 9.0})
        matplotlib.rcParams.update({"font.sans-serif": _FONTS, "hatch.linewidth": 0.9, "axes.unicode_minus": False})
        figure = Figure(figsize=(WIDTH_PX / _PX_PER_INCH, height / _PX_PER_INCH), dpi=_PX_PER_INCH)
        plot_width_px = WIDTH_PX - left_px - right_px
        axes = figure.add_axes(
            (left_px / WIDTH_PX, bottom_px / height, plot_width_px / WIDTH_PX, plot_height_px / height)
        )
        axes.set_facecolor("none")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors=theme.muted, labelsize=9.0, pad=6)
        axes.set_axisbelow(True)
        yield Canvas(figure, axes, theme, left_px, (plot_width_px, plot_height_px))


def blend(color: Rgb, background: str, amount: float) -> Rgb:
    """Return ``color`` over ``background`` with opacity ``amount``.

    >>> blend((1.0, 0.0, 0.0), "#ffffff", 0.5)
    (1.0, 0.5, 0.5)
    """
    below = [int(background[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (amount * top + (1 - amount) * low for top, low in zip(color, below, strict=True))
    return red, green, blue


def _round_ticks(highest: float, most: int) -> list[float]:
    """Return round numbers from 0 to ``highest``, about ``most`` of them."""
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(0, highest)
    return [float(tick) for tick in ticks if 0 <= tick <= highest]
