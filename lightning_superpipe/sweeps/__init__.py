"""Many jobs side by side: one row of results each, kept from being run twice, shown as a table and a picture."""

from __future__ import annotations

from lightning_superpipe.sweeps.record import record_job
from lightning_superpipe.sweeps.report import SweepReport, print_report
from lightning_superpipe.sweeps.row import JobResult, Row, Status

__all__ = ["JobResult", "Row", "Status", "SweepReport", "print_report", "record_job"]
