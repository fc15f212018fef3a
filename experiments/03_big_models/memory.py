"""How much memory a process takes beyond what it held before. Linux only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Memory:
    """Peaks of this process in the scope of :meth:`measure`, bytes."""

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Count from here until the scope ends."""
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident set counts from here
        self.before, self.peak_anonymous = _status("RssAnon"), 0
        stop = threading.Event()
        sampler = threading.Thread(target=self._sample, args=(stop,), daemon=True)
        sampler.start()
        yield
        stop.set()
        sampler.join()
        self.peak_resident = _status("VmHWM")

    def _sample(self, stop: threading.Event) -> None:
        while not stop.wait(2e-3):
            self.peak_anonymous = max(self.peak_anonymous, _status("RssAnon"))

    def shares(self, num_bytes: int) -> dict[str, float]:
        """Peaks above what was held before, bytes, and the first as a share of the bytes at hand."""
        anonymous, resident = self.peak_anonymous - self.before, self.peak_resident - self.before
        return {"anonymous_bytes": anonymous, "resident_bytes": resident, "share": anonymous / num_bytes}


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this kernel does not tell {name} of a process")
