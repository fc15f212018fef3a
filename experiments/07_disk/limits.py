"""A limit on this process's memory: a control group where one can be made, else the size of its data. Linux only."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

_ROOT = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


def limit_memory(num_bytes: int) -> str:
    """Limit this process from now on; return by what.

    A control group counts all pages, those of files too, and takes those back. ``RLIMIT_DATA`` counts private writable
    memory as it is reserved, whether it is used or not, and no pages of files.
    """
    try:
        return _limit_by_group(num_bytes)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))
        return f"RLIMIT_DATA, for no control group can be made here ({error.strerror})"


def run_worker(*arguments: str) -> Any:
    """Run a script in a process of its own, which may limit itself; return what its last line says, as JSON."""
    command = [sys.executable, "-W", "ignore", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, errors = process.communicate()
    _remove_group(process.pid)
    if process.returncode:
        raise SystemExit(f"a worker ended with {process.returncode} (-9: killed for its memory): {errors[-2000:]}")
    return json.loads(out.splitlines()[-1])


def _remove_group(pid: int) -> None:
    """Remove the control group that a process had made, once it is gone."""
    for folder in _parents():
        if (group := folder / _name(pid)).exists():
            group.rmdir()


def _limit_by_group(num_bytes: int) -> str:
    error = OSError(0, "there is none")
    for folder in _parents():
        for file in ("memory.limit_in_bytes", "memory.max"):
            group = folder / _name(os.getpid())
            try:
                group.mkdir(exist_ok=True)
                (group / file).write_text(str(num_bytes))
                (group / "cgroup.procs").write_text(str(os.getpid()))
                return f"control group ({file})"
            except OSError as reason:
                error = reason
                if group.exists():
                    group.rmdir()
    raise error


def _parents() -> list[Path]:
    """Groups below which one may be made, this process's own first (its parents may allow what it does not)."""
    lines = _OWN_GROUP.read_text().splitlines()
    own = [_ROOT / "memory" / line.partition(":memory:")[2].strip("/") for line in lines if ":memory:" in line]
    own += [_ROOT / line.partition("::")[2].strip("/") for line in lines if line.startswith("0::")]
    return [folder for group in own for folder in (group, *group.parents) if folder.is_relative_to(_ROOT)]


def _name(pid: int) -> str:
    return f"superpipe-limit-{pid}"
