"""Imports run one way, files and functions stay small, importing does nothing: kept so over the syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lightning_superpipe"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "manager", "managers", "misc", "common"}
FRAMEWORKS = {"lightning", "pytorch_lightning", "accelerate", "transformers", "diffusers", "peft", "hydra", "omegaconf"}

# What each part of the package may import of ours, besides itself. Parts that are not named here (the package's
# `__init__`, the thin `pytorch_lightning` namespace, the demo) stand outside: they may import anything, and nothing
# may import them.
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "option_checks": {"errors"},
    "config": {"errors", "option_checks"},
    "planning": {"errors"},
    "tiers": {"errors", "config"},
    "observe": {"errors", "config", "option_checks", "planning"},
    "partition": {"errors", "config"},
    "engine": {"errors", "config", "planning", "tiers", "observe", "partition"},
    "optimizer": {"errors", "config", "planning", "tiers", "observe", "partition", "engine"},
    "host_memory": {"errors", "config", "planning", "tiers", "observe", "partition", "engine", "optimizer"},
    "accounts": {"planning", "tiers", "observe", "engine", "optimizer", "host_memory"},
    "at_exit": set(),
    "moving": set(),
    "aside": {"config", "planning", "knobs", "moving", "rewind", "tuning"},
    "rewind": {"errors", "engine"},
    "promotions": {"errors", "engine"},
    "device_memory": {"errors", "config", "observe"},
    "tuning": {"errors", "config", "planning", "observe", "engine", "knobs", "profiling", "rewind"},
    "construction": {"config", "planning", "observe", "engine", "profiling", "tuning"},
    "knobs": {"errors", "config", "planning", "engine"},
    "profiling": {"errors", "planning", "observe", "engine"},
    "guard": {"errors", "engine", "optimizer", "rewind", "tuning"},
    "session": {
        *("errors", "config", "planning", "tiers", "observe", "partition", "engine", "optimizer", "host_memory"),
        *(
            "accounts",
            "aside",
            "at_exit",
            "construction",
            "device_memory",
            "guard",
            "knobs",
            "profiling",
            "promotions",
            "rewind",
            "tuning",
        ),
    },
    "forecast": {
        *("errors", "config", "planning", "observe", "partition", "engine", "optimizer", "host_memory", "knobs"),
        "session",
    },
    "adapters": {"session", "config", "errors", "guard", "moving", "observe"},
    "recipes": {"errors"},  # modules and data that know nothing of streaming
    "app": {*("adapters", "forecast", "session", "config", "option_checks", "errors", "observe", "planning", "sweeps")},
    "sweeps": {"errors", "config", "option_checks", "observe"},
}
MAY_KNOW_FRAMEWORKS = {"adapters", "app", "recipes"}
TORCH_FREE = {"planning", "errors"}
# Of the tiers the engine may know the contract, not a file behind it.
TIER_CONTRACT = {f"{PACKAGE}.tiers", f"{PACKAGE}.tiers.base"}


class Import(NamedTuple):
    """One imported module, dotted, and where."""

    module: str
    line: int
    at_import: bool  # runs when the file is imported: not inside a function, not under TYPE_CHECKING


def sources(*folders: str) -> Iterator[Path]:
    """Every Python file of the repository's own below the folders."""
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The part a module of ours belongs to: `engine` for `lightning_superpipe.engine.slots`, else the module's name."""
    return module.removeprefix(PACKAGE).lstrip(".").split(".")[0] or "__init__"


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or path.is_dir()


def imports(text: str, module: str, is_package: bool = False) -> list[Import]:
    """Every module that the text imports; `from package import name` counts as the module `name`, if it is one."""
    found: list[Import] = []

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, node.module] if node.module else parents)
            names = {full if is_module(full := f"{base}.{alias.name}") else base for alias in node.names}
            found.extend(Import(name, node.lineno, at_import) for name in sorted(names))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, False)
            for child in node.orelse:
                visit(child, at_import)
        else:
            inner = at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                visit(child, inner)

    visit(ast.parse(text), True)
    return found


def reason_against(name: str, part: str) -> str | None:
    """Why a module of this part may not import the named module; None if it may."""
    top, target = name.split(".")[0], part_of(name)
    if part not in LAYERS:
        return None
    if name == PACKAGE:
        return "the package itself imports every part"
    if top == PACKAGE and target != part and target not in LAYERS[part]:
        return f"{part} may import of ours: {', '.join(sorted(LAYERS[part])) or 'nothing'}"
    if part == "engine" and target == "tiers" and name not in TIER_CONTRACT:
        return "the engine knows no concrete tier"
    if top in FRAMEWORKS and part not in MAY_KNOW_FRAMEWORKS:
        return "only adapters know frameworks"
    if top == "torch" and part in TORCH_FREE:
        return f"{part} is pure Python"
    return None


def layer_violations(text: str, module: str, is_package: bool = False) -> list[str]:
    """Every import by which a module breaks the order of the layers, with its line and the reason."""
    return [
        f"{module}:{line} imports {name}: {reason}"
        for name, line, _ in imports(text, module, is_package)
        if (reason := reason_against(name, part_of(module)))
    ]


def test_imports_run_one_way() -> None:
    guilty = [
        line
        for path in sources(PACKAGE)
        for line in layer_violations(path.read_text(), module_name(path), path.name == "__init__.py")
    ]
    assert guilty == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("planning.lower", "import torch"),
        ("planning.lower", "from lightning_superpipe.config import SuperpipeConfig"),
        ("planning.lower", "def late():\n    from torch import nn"),
        ("engine.slots", "import lightning"),
        ("engine.slots", "from transformers.utils import logging"),
        ("engine.slots", "from lightning_superpipe.tiers.host import HostTier"),
        ("engine.slots", "from lightning_superpipe.adapters import lightning"),
        ("engine.slots", "from ..session import Session"),
        ("engine.slots", "from lightning_superpipe import SuperpipeStrategy"),
        ("tiers.host", "from lightning_superpipe.engine.lanes import Lanes"),
        ("adapters.lightning", "from lightning_superpipe.engine.lanes import Lanes"),
        ("session", "from lightning_superpipe import adapters"),
    ],
)
def test_an_import_against_the_order_is_found(module: str, text: str) -> None:
    assert len(layer_violations(text, f"{PACKAGE}.{module}")) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("planning.lower", "from lightning_superpipe.planning.actions import Plan"),
        ("planning.check", "from .actions import Plan"),
        ("engine.slots", "from lightning_superpipe.tiers.base import Tier"),
        ("adapters.lightning", "import lightning\nfrom lightning_superpipe.session import Session"),
        ("demo", "from lightning_superpipe import SuperpipeStrategy\nimport transformers"),
    ],
)
def test_an_import_along_the_order_is_allowed(module: str, text: str) -> None:
    assert layer_violations(text, f"{PACKAGE}.{module}") == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module_name(path): [
            found.module
            for found in imports(path.read_text(), module_name(path), path.name == "__init__.py")
            if found.at_import and found.module.startswith(f"{PACKAGE}.")
        ]
        for path in sources(PACKAGE)
    }
    finished: set[str] = set()

    def circle(module: str, trail: tuple[str, ...]) -> tuple[str, ...]:
        if module in trail:
            return trail[trail.index(module) :] + (module,)
        if module in finished:
            return ()
        found = next((ring for name in graph.get(module, []) if (ring := circle(name, trail + (module,)))), ())
        finished.add(module)
        return found

    assert [ring for module in graph if (ring := circle(module, ()))] == []


def test_every_part_of_the_package_has_its_place_in_the_order() -> None:
    outside = {"__init__", "__main__", "demo", "pytorch_lightning", "configs"}
    assert {part_of(module_name(path)) for path in sources(PACKAGE)} - outside <= set(LAYERS)


def test_files_and_functions_stay_small() -> None:
    large = []
    for path in sources(PACKAGE, "configs", "experiments", "tests"):
        text, name = path.read_text(), path.relative_to(ROOT)
        if (lines := len(text.splitlines())) > MAX_FILE_LINES:
            large.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    large.append(f"{name}:{node.lineno} {node.name}: {length} lines")
    assert large == []


def test_module_names_say_what_is_inside() -> None:
    assert [str(path.relative_to(ROOT)) for path in sources(PACKAGE, "tests") if path.stem in VAGUE_NAMES] == []


def test_every_folder_is_a_package_and_is_packaged() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    moved = {ROOT / place: package for package, place in setuptools["package-dir"].items()}
    code = {path.parent for path in sources(PACKAGE)}
    groups = {path.parent for kind in ("*.py", "*.yaml") for path in (ROOT / "configs").rglob(kind)}

    def packaged(folder: Path) -> str:
        place = next((place for place in moved if folder.is_relative_to(place)), ROOT)
        return ".".join([*filter(None, [moved.get(place)]), *folder.relative_to(place).parts])

    names = {packaged(folder) for folder in code | groups} | {"hydra_plugins"}  # a namespace, of several distributions
    assert sorted(setuptools["packages"]) == sorted(names)
    assert [str(folder) for folder in code | groups if not (folder / "__init__.py").exists()] == []
    assert (ROOT / PACKAGE / "py.typed").exists()


IMPORT_PROBE = """
import sys, threading
import lightning, torch
before, modules = threading.enumerate(), set(sys.modules)
import lightning_superpipe
assert threading.enumerate() == before, threading.enumerate()
assert not torch.cuda.is_initialized()
new = {name.split(".")[0] for name in set(sys.modules) - modules}
assert not new & {"pytorch_lightning", "accelerate", "transformers", "datasets", "peft", "matplotlib"}, new
"""


def test_importing_the_package_starts_no_thread_and_prints_nothing() -> None:
    ran = subprocess.run([sys.executable, "-c", IMPORT_PROBE], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr
