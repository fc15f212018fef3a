"""A script that closes nothing of what it attached ends as any other: its work is done, its exit status its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Updates of this size are under way for a good while when the script has nothing left to do.
SCRIPT = """
import sys
import torch
from lightning_superpipe import attach

torch.set_num_threads(1)
model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(6)])
optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
pipe = attach(model, optimizer, device="cpu", k=2, store=sys.argv[1], update="after_backward")
for _ in range(2):
    model(torch.ones(1, 1024)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""
WITHOUT = "import lightning_superpipe.session as composer; composer.close_at_exit = lambda session: None\n"
IN_THE_MIDDLE = """
model[3].register_forward_pre_hook(lambda *_: 1 / 0)
model(torch.ones(1, 1024))
"""
IN_A_CHILD = """
import os
if not (child := os.fork()):
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


def run(script: str, store: str = "host") -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-W", "ignore", "-c", script, store]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)


@pytest.mark.parametrize(("store", "end"), [("host", IN_A_CHILD), ("disk", "")])
def test_script_that_closes_nothing_ends_well(store: str, end: str) -> None:
    ran = run(SCRIPT + end, store)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_script_that_raises_shows_its_own_error_alone() -> None:
    ran = run(SCRIPT + IN_THE_MIDDLE, "disk")
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_threads_that_the_interpreter_stops_would_abort_it() -> None:
    # One that waits inside torch for the interpreter's lock takes the process with it; one between two calls does not.
    script = SCRIPT.replace("1024", "2048")  # updates go on for long after the script's end
    assert any(run(WITHOUT + script).returncode < 0 for _ in range(6))
