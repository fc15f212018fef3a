"""What this experiment writes down: the numbers, and where they come from."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from lightning_superpipe.observe.trace import software_versions


def write_down(path: Path, script: str, disk_folder: Path | None, result: dict[str, Any]) -> None:
    """Write a result with its command, machine and versions; not the folder on the disk, which is the machine's own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    given = [word for word in sys.argv[1:] if word not in ("--folder", str(disk_folder))]
    content = {
        "command": " ".join(["python", f"experiments/07_disk/{script}", *given]),
        "machine": {"cores": os.cpu_count(), "memory_bytes": memory, "platform": platform.platform()},
        "versions": software_versions(),
        **result,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
