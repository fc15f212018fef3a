"""A host that has no room: refused with the numbers before anything is lost, in a process with a low limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import run_code

STORY = """
import resource, sys, warnings
import torch
from lightning_superpipe import attach
from lightning_superpipe.errors import BudgetError
from tests.engine.tiny import chain

warnings.simplefilter("ignore")
MIB = 2**20
spare_mib = int(sys.argv[1])
small = chain(2)
with attach(small, device="cpu", k=1):  # so that all that is loaded late is there
    small(torch.ones(4, 8)).sum().backward()
model = chain(8, width=1024)  # 8 x 16 MiB
before = {name: value.clone() for name, value in model.state_dict().items()}
classes = [type(module) for module in model.modules()]
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare_mib * MIB, resource.RLIM_INFINITY))
try:
    attach(model, device="cpu", k=2)
    print("no error")
except BudgetError as error:
    print(type(error).__name__, error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert [type(module) for module in model.modules()] == classes
assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
with attach(model, device="cpu", k=2) as pipe:
    model(torch.ones(4, 1024)).sum().backward()
assert all(parameter.grad is not None for parameter in model.parameters())
print("usable")
"""


@pytest.mark.parametrize("spare_mib", [2, 40])  # less than a slot; room for the slots, and for no unit beside them
def test_a_host_without_room_is_refused_and_the_model_is_as_it_was(spare_mib: int, tmp_path: Path) -> None:
    ran = run_code(STORY, str(spare_mib), folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    told = ran.stdout
    assert told.startswith("BudgetError") and " has no room for " in told and told.endswith("usable\n")
