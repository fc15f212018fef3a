"""Where measurements are kept: one file for each part, so that a run can be taken up where it ended."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from datetime import date
from pathlib import Path
from typing import Any

from lightning_superpipe.observe.trace import software_versions

__all__ = ["ALLOCATOR", "newest", "rewrite", "save", "with_steady_allocator"]

FOLDER = Path(__file__).resolve().parent / "results"

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_ARENA_MAX": "1"}
"""The host's allocator keeps what it got: else freed tensors go back to the system, and steps pay for new pages."""


def with_steady_allocator() -> None:
    """Start this program again with those variables, unless they are set."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1"})


def save(part: str, name: str, state: dict[str, Any]) -> Path:
    """Write the numbers of one part, with the command, the machine and the versions."""
    FOLDER.mkdir(exist_ok=True)
    machine = {"cores": os.cpu_count(), "device": "cpu (emulated link)", "platform": platform.platform()}
    path = FOLDER / f"{part}-{_slug(name)}-{platform.machine()}-{os.cpu_count()}cores-{date.today()}.json"
    head = {
        "command": " ".join(["python", f"experiments/21_prediction/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": machine,
        "versions": software_versions(),
        "environment": ALLOCATOR,
    }
    path.write_text(json.dumps({**head, "name": name, **state}, indent=1) + "\n", encoding="utf-8")
    return path


def newest(part: str) -> list[dict[str, Any]]:
    """Return the newest file of each name in a part."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in _newest(part).values()]


def rewrite(part: str, state: dict[str, Any]) -> None:
    """Put a state in place of what ``newest`` has returned of that name: command, machine and date stay."""
    _newest(part)[state["name"]].write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def _newest(part: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(FOLDER.glob(f"{part}-*.json"), key=lambda path: (path.stem[-10:], path.name)):
        found[json.loads(path.read_text(encoding="utf-8"))["name"]] = path
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
