"""Docstrings of the standard library: labelled text, questions and answers that every machine has."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from lightning_superpipe.errors import ConfigError
from lightning_superpipe.recipes.text import is_held_out, source_files, standard_library

__all__ = ["PACKAGES", "Docstring", "read_docstrings", "write_chats"]

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
"""The packages with most docstrings of those that every distribution of Python has."""

_MOST_CHARACTERS = 200  # of a summary; few are longer


class Docstring(NamedTuple):
    """What a function, method or class says of itself.

    Attributes:
        package: the topmost package or module, such as ``asyncio``.
        name: dotted, such as ``asyncio.queues.Queue.put``.
        signature: name and arguments, such as ``put(self, item)``.
        summary: its first paragraph on one line.
    """

    package: str
    name: str
    signature: str
    summary: str

    @property
    def is_held_out(self) -> bool:
        """Whether it is kept from training, which its own name decides."""
        return is_held_out(self.name)


def read_docstrings(packages: Collection[str] = PACKAGES, root: Path | None = None) -> list[Docstring]:
    """Read the documented functions and classes of some packages, in a fixed order, each text once.

    Args:
        packages: topmost packages or modules.
        root: the folder that holds them; None takes the library of the running Python.

    Raises:
        ConfigError: one of the packages documents nothing, or is not there.
    """
    root = standard_library() if root is None else root
    found: dict[str, Docstring] = {}
    for name in source_files(root):
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if module.split(".")[0] not in packages:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old code has odd escapes in its strings
            tree = ast.parse((root / name).read_bytes())
        for docstring in _documented(tree, module):
            found.setdefault(docstring.summary, docstring)
    if missing := sorted(set(packages) - {docstring.package for docstring in found.values()}):
        raise ConfigError(f"packages={missing}: {str(root)!r} has no docstrings of them. Name others.")
    return list(found.values())


def write_chats(folder: Path, packages: Collection[str] = PACKAGES) -> tuple[Path, Path]:
    """Write questions about the standard library and their answers as JSON lines of chats.

    Returns:
        The file to train on, and that of held-out ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    docstrings = read_docstrings(packages)
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, is_out in zip(paths, (False, True), strict=True):
        chats = (_chat(docstring) for docstring in docstrings if docstring.is_held_out == is_out)
        text = "".join(json.dumps(chat) + "\n" for chat in chats)
        if not path.exists() or path.read_text(encoding="utf-8") != text:  # `datasets` reads changed files anew
            path.write_text(text, encoding="utf-8")
    return paths


def _chat(docstring: Docstring) -> dict[str, list[dict[str, str]]]:
    question = f"What does {docstring.signature} of {docstring.package} do?"
    turns = (("user", question), ("assistant", docstring.summary))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _documented(node: ast.AST, name: str) -> Iterator[Docstring]:
    """Yield what is documented below a node, depth first."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        full = f"{name}.{child.name}"
        summary = " ".join((ast.get_docstring(child) or "").split("\n\n")[0].split())
        if 20 <= len(summary) <= _MOST_CHARACTERS and summary.isascii():
            arguments = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
            yield Docstring(name.split(".")[0], full, child.name + arguments, summary)
        yield from _documented(child, full)
