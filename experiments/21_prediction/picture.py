"""Draws predicted against measured step times from the committed results, for light and for dark pages."""

from __future__ import annotations

from typing import Any

from bench import errors
from results_file import FOLDER, newest

from lightning_superpipe.observe.canvas import Canvas, canvas

MARKERS = {"keep": "o", "recompute": "s", "offload": "^", "mixed": "D", "half recompute": "v"}
HEIGHT_PX = 330.0
BAND = 0.1  # of the measured time


def draw(dark: bool) -> None:
    """Draw the picture for a light or a dark page."""
    states = newest("grid")
    name = "prediction-dark.svg" if dark else "prediction.svg"
    rows = [(index, row) for index, state in enumerate(states) for row in state["rows"]]
    with canvas(HEIGHT_PX, left_px=72, right_px=230, bottom_px=64, dark=dark) as page:
        longest = 1.1 * max(max(row["measured_ms"], row["predicted_ms"]) for _, row in rows)
        page.time_axis(longest)
        page.axes.set_ylim(0, longest)
        page.axes.set_yticks(page.axes.get_xticks(), page.axes.get_xticklabels())
        page.title(
            "Predicted against measured time of a step (emulated link)",
            f"{len(rows)} settings; each model's from one profiled run; the band is 10 % wide on each side",
        )
        theme = page.theme
        span = [0.0, longest]
        page.axes.fill_between(span, [0, (1 - BAND) * longest], [0, (1 + BAND) * longest], color=theme.faint, zorder=0)
        page.axes.plot(span, span, color=theme.muted, linewidth=1.0, zorder=1)
        colors = theme.unit_colors(len(states))
        for index, row in rows:
            page.axes.plot(
                [row["measured_ms"]],
                [row["predicted_ms"]],
                MARKERS[row["policy"]],
                color=colors[index],
                markersize=6,
                markeredgecolor=theme.background,
                markeredgewidth=0.6,
            )
        _legend(page, states, colors)
        _, y_px = page.px_per_unit()
        page.text(longest, -44 / y_px, "measured; upwards: predicted", color=theme.muted, ha="right")
        page.save(FOLDER / name)


def _legend(page: Canvas, states: list[dict[str, Any]], colors: list[Any]) -> None:
    right = page.axes.get_xlim()[1]
    height, ink = page.plot_px[1] - 10, page.theme.ink
    for state, color in zip(states, colors, strict=True):
        worst = max(abs(errors(row)[0]) for row in state["rows"])
        _key(page, right, height, "o", color, f"{state['name']} (at most {worst:.0%} off)")
        height -= 19
    height -= 10
    for name, marker in MARKERS.items():
        _key(page, right, height, marker, ink, name)
        height -= 19


def _key(page: Canvas, right: float, height: float, marker: str, color: Any, name: str) -> None:
    x_px, y_px = page.px_per_unit()
    page.axes.plot([right + 16 / x_px], [height / y_px], marker, color=color, markersize=6, clip_on=False)
    page.text(right + 28 / x_px, height / y_px, name, color=page.theme.ink)


if __name__ == "__main__":
    for is_dark in (False, True):
        draw(is_dark)
