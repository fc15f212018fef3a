"""What the README shows runs, and prints what it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.processes import run_code, run_module

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "experiments/README.md", "experiments/gpu_proof/README.md")
]
README = (ROOT / "README.md").read_text()
SECONDS = 240  # for one block, on two busy cores

# `<!-- run -->` above a python block: it is executed. A text block that follows is what it prints.
BLOCK = re.compile(r"(<!-- run -->\n)?```python\n(.*?)```\n(?:\n?```text\n(.*?)```\n)?", re.DOTALL)


class Block(NamedTuple):
    """One python block of the README."""

    line: int
    code: str
    runs: bool
    output: str | None


# `<!-- run: FILE -->` above a bash block: it reads that file. Runs are cut to a few steps; nothing else is changed.
COMMANDS = re.compile(r"<!-- run(?:: (\S+))? -->\n```bash\n(.*?)```\n", re.DOTALL)
SWEEP = ["debug=tiny", "model.config.n_layer=2"]
SHORT = {"report": [], "plan": [], "profile": [], "-m": SWEEP, "experiment=language_model": SWEEP}
CHATS = [{"prompt": f"What is {n} and {n}?", "completion": f"{2 * n}."} for n in range(40)]

BLOCKS = [
    Block(README.count("\n", 0, found.start(2)) + 1, found[2], found[1] is not None, found[3])
    for found in BLOCK.finditer(README)
]
FIRST = next(block for block in BLOCKS if block.runs)


def run_fresh(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code as a reader does, who has imported nothing yet."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )


def test_the_readme_has_blocks_to_run() -> None:
    assert sum(block.runs for block in BLOCKS) >= 6
    assert README.count("<!-- run") == sum(block.runs for block in BLOCKS) + len(COMMANDS.findall(README))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 30)
@pytest.mark.parametrize("block", [block for block in BLOCKS if block.runs], ids=lambda block: f"line{block.line}")
def test_a_python_block_runs_and_prints_what_it_says(block: Block, tmp_path: Path) -> None:
    ran = run_fresh(block.code, tmp_path) if block == FIRST else run_code(block.code, folder=tmp_path, seconds=SECONDS)
    assert ran.returncode == 0, ran.stderr[-4000:]
    if block.output is not None:
        assert ran.stdout == block.output


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize(("file", "commands"), COMMANDS.findall(README), ids=["modes", "own data", "before", "sweep"])
def test_a_block_of_commands_runs(file: str, commands: str, tmp_path: Path) -> None:
    if file:
        (tmp_path / file).write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    for line in commands.splitlines():
        program, mode, *words = shlex.split(line, comments=True)
        assert program == "superpipe"
        words = [mode, *words, *SHORT.get(mode, ["debug=tiny"])]
        ran = run_module("lightning_superpipe", *words, folder=tmp_path, seconds=SECONDS)
        assert ran.returncode == 0, f"{line}\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line{block.line}")
def test_every_python_block_is_python(block: Block) -> None:
    assert compile(block.code, f"README.md:{block.line}", "exec") is not None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_make_target_and_file_that_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    files = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    assert named <= targets
    assert [name for name in files if not (document.parent / name).exists()] == []
