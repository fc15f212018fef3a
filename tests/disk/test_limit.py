"""A training state three times as large as the memory of the process trains to the bits of the ordinary run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_training_state_of_three_times_the_memory_limit_trains_to_the_same_bits(tmp_path: Path) -> None:
    # Without a control group the limit is one of reserved private memory, see experiments/07_disk/limits.py.
    command = [sys.executable, "experiments/07_disk/bench.py", "--stages", "limit", "--out", str(tmp_path)]
    blocks = 72 if torch.version.cuda is None else 96  # a build for GPUs takes 170 MiB more of the limit
    command += ["--blocks", str(blocks), "--steps", "2", "--folder", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(next(tmp_path.glob("*.json")).read_text())["limit"]
    assert found["state_bytes"] >= 3 * found["limit_bytes"]
    assert found["is_equal"]
    assert found["tensors_compared"] == blocks * 2 * 4  # weight, two states and a counter of each matrix
    assert found["plain"]["own_bytes"] > found["limit_bytes"], "the ordinary run would not have fitted"
