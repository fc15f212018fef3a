"""What a run did: recordings of single steps, reports of whole runs, live memory, and pictures of both."""

from __future__ import annotations

from lightning_superpipe.observe.files import write_recording
from lightning_superpipe.observe.live_bytes import LiveBytes
from lightning_superpipe.observe.pictures import draw_memory, draw_timeline
from lightning_superpipe.observe.report import PeakBytes, Report, StepCounters
from lightning_superpipe.observe.trace import Lane, MemorySample, Recorder, Recording, Span

__all__ = [
    "Lane",
    "LiveBytes",
    "MemorySample",
    "PeakBytes",
    "Recorder",
    "Recording",
    "Report",
    "Span",
    "StepCounters",
    "draw_memory",
    "draw_timeline",
    "write_recording",
]
