"""Processes of tests that need one of their own, forked from one that has imported the libraries.

A fresh interpreter imports torch, Lightning and transformers for longer than most tests run. A process forked from one
that has done so starts at once, with modules in it and nothing else: no thread, no device, nothing of another test. Its
program then runs and ends as any does. A test about imports, or about a bare start, takes `subprocess`.
"""

from __future__ import annotations

import atexit
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["CONTEXT", "Ended", "run_code", "run_module"]

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = (
    "lightning_superpipe.adapters.lightning",
    "accelerate",
    "transformers.trainer",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
SECONDS = 240  # on two busy cores

# For tests that kill what they started. Not "fork": a copy of a process with threads may hang, and this one has many.
CONTEXT: Any = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(list(IMPORTED))


class Ended(NamedTuple):
    """How a process ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def run_code(code: str, *words: str, folder: Path, seconds: int = SECONDS) -> Ended:
    """Run a program in a folder, as ``python -c`` does; after so many seconds it is killed."""
    return _run({"code": code, "words": ["-c", *words]}, folder, seconds)


def run_module(name: str, *words: str, folder: Path, seconds: int = SECONDS) -> Ended:
    """Run a module in a folder, as ``python -m`` does; after so many seconds it is killed."""
    return _run({"module": name, "words": [name, *words]}, folder, seconds)


def _run(order: dict[str, Any], folder: Path, seconds: int) -> Ended:
    with tempfile.TemporaryDirectory() as name:
        out, errors = Path(name, "out"), Path(name, "errors")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        around = {"folder": str(folder), "environment": environment, "path": [str(folder), *sys.path]}
        order = {**order, **around, "seconds": seconds, "out": str(out), "errors": str(errors)}
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        returncode = int(server.stdout.readline())
        return Ended(returncode, out.read_text(), errors.read_text())


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The process that others are forked from; it ends when its input does."""
    command = [sys.executable, "-c", SERVER, *IMPORTED]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)
    return server


# A forked child leaves the loop and goes on to the end of this program, so that its interpreter ends as any does.
SERVER = """
import gc, importlib, json, os, runpy, signal, sys, types
for name in sys.argv[1:]:
    importlib.import_module(name)
gc.freeze()  # what is imported stays shared with the children
while line := sys.stdin.readline():
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
signal.alarm(order["seconds"])
os.chdir(order["folder"])
os.environ.clear()
os.environ.update(order["environment"])
for number, path in ((0, os.devnull), (1, order["out"]), (2, order["errors"])):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
sys.argv[:], sys.path[:] = order["words"], order["path"]
if "module" in order:
    runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
else:
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(order["code"], "<string>", "exec"), sys.modules["__main__"].__dict__)
"""
