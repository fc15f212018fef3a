"""What a run did: recordings of single steps, reports of whole runs, live memory, machine profiles, and pictures."""

from __future__ import annotations

from lightning_superpipe.observe.files import write_recording
from lightning_superpipe.observe.identity import Identity, Room, identify
from lightning_superpipe.observe.live_bytes import LiveBytes
from lightning_superpipe.observe.machine import MachineProfile
from lightning_superpipe.observe.measure import measure_machine
from lightning_superpipe.observe.pictures import draw_memory, draw_timeline
from lightning_superpipe.observe.profiles import cached_profile, find_profile, keep_profile, shipped_names
from lightning_superpipe.observe.rates import (
    ComputeRate,
    CopyRate,
    DiskRate,
    DiskRoute,
    MemoryRate,
    Route,
    UpdateRate,
    Work,
)
from lightning_superpipe.observe.report import PeakBytes, Report, StepCounters
from lightning_superpipe.observe.trace import Lane, MemorySample, Recorder, Recording, Span

__all__ = [
    "ComputeRate",
    "CopyRate",
    "DiskRate",
    "DiskRoute",
    "Identity",
    "Lane",
    "LiveBytes",
    "MachineProfile",
    "MemoryRate",
    "MemorySample",
    "PeakBytes",
    "Recorder",
    "Recording",
    "Report",
    "Room",
    "Route",
    "Span",
    "StepCounters",
    "UpdateRate",
    "Work",
    "cached_profile",
    "draw_memory",
    "draw_timeline",
    "find_profile",
    "identify",
    "keep_profile",
    "measure_machine",
    "shipped_names",
    "write_recording",
]
