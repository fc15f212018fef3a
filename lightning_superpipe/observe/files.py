"""The files that show one recorded step."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_superpipe.observe.pictures import draw_memory, draw_timeline
from lightning_superpipe.observe.trace import Recording

__all__ = ["write_recording"]


def write_recording(recording: Recording, folder: Path) -> list[Path]:
    """Write ``trace.json`` for Perfetto, ``recording.json``, and pictures for light and dark pages.

    Returns:
        The files, those to look at first.
    Raises:
        OSError: the folder cannot be written.
        UnsupportedError: matplotlib is missing; the JSON files are written.
    """
    trace, data = folder / "trace.json", folder / "recording.json"
    trace.write_text(json.dumps(recording.to_chrome_trace()), encoding="utf-8")
    recording.save(data)
    pictures = []
    for name, draw in (("memory", draw_memory), ("timeline", draw_timeline)):
        for suffix, dark in (("", False), ("-dark", True)):
            pictures.append(folder / f"{name}{suffix}.svg")
            draw(recording, pictures[-1], dark=dark)
    return [*pictures, trace, data]
