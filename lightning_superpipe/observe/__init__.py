"""What a run did: recordings of single steps, reports of whole runs, live memory, machine profiles, and pictures."""

from __future__ import annotations

from lightning_superpipe.observe.files import write_recording
from lightning_superpipe.observe.live_bytes import LiveBytes
from lightning_superpipe.observe.machine import CopyRate, MachineProfile, Route, UpdateRate
from lightning_superpipe.observe.measure import measure_machine
from lightning_superpipe.observe.pictures import draw_memory, draw_timeline
from lightning_superpipe.observe.report import PeakBytes, Report, StepCounters
from lightning_superpipe.observe.trace import Lane, MemorySample, Recorder, Recording, Span

__all__ = [
    "CopyRate",
    "Lane",
    "LiveBytes",
    "MachineProfile",
    "MemorySample",
    "PeakBytes",
    "Recorder",
    "Recording",
    "Report",
    "Route",
    "Span",
    "StepCounters",
    "UpdateRate",
    "draw_memory",
    "draw_timeline",
    "measure_machine",
    "write_recording",
]
