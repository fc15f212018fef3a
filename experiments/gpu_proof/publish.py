"""Writes results into pages and pictures: nothing is typed by hand, and an emulation never reaches the first page.

Run from the repository: ``python experiments/gpu_proof/publish.py FOLDER`` with a folder that prove.py wrote. Tables go
between the markers ``<!-- gpu_proof: begin -->`` and ``<!-- gpu_proof: end -->`` of README.md beside this script; the
comparison, if a GPU measured it, also into the repository's README.md; pictures go into the folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from experiments.gpu_proof.pictures import draw_sweep  # noqa: E402
from experiments.gpu_proof.result import Grid, StageResult, load_results  # noqa: E402
from experiments.gpu_proof.stages import STAGES, grids  # noqa: E402
from lightning_superpipe.errors import SuperpipeError  # noqa: E402
from lightning_superpipe.sweeps.files import replacing  # noqa: E402

BEGIN, END = "<!-- gpu_proof: begin -->", "<!-- gpu_proof: end -->"
_SWEEP = "Peak device memory against step time for every window"
_FIRST_PAGE = ("sweep", "peers", "headroom")


def main(words: Sequence[str]) -> int:
    """Publish a folder of results; return 1 with a sentence where that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what prove.py wrote")
    parser.add_argument("--page", type=Path, default=HERE / "README.md", help="page for all tables")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="first page, for figures of a GPU")
    options = parser.parse_args(words)
    try:
        results = load_results(options.folder, STAGES)
        pictures = draw_sweep(results, options.folder)[:1]
        pages = {options.page: results}
        if not results[0].emulated:
            pages[options.readme] = [result for result in results if result.stage in _FIRST_PAGE]
        for path, shown in pages.items():
            images = [f"![{_SWEEP}]({_relative(picture, path)})" for picture in pictures]
            write_between(path, "\n\n".join(filter(None, [*images, page(shown, _link(options.folder, path))])))
            print(f"written: {path}")
    except SuperpipeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def page(results: Sequence[StageResult], source: str) -> str:
    """Return the tables of results as Markdown, below a line that says where they come from."""
    if not results:
        return ""
    about = results[0]
    machine = ", ".join(f"{name} {value}" for name, value in about.machine.items())
    versions = ", ".join(f"{name} {value}" for name, value in about.versions.items())
    head = f"**{about.label}**, {about.date[:10]}. {machine}. {versions}. Seed {about.seed}. Raw samples: {source}."
    return "\n\n".join([head, *(_section(result) for result in results)])


def _section(result: StageResult) -> str:
    parts = [f"`{result.command}`, stage `{result.stage}`, {result.seconds:.0f} s."]
    parts += [markdown(grid, result.label) for grid in grids(result)]
    if result.problem:
        parts.append(f"Not whole: {_escaped(result.problem)}.")
    return "\n\n".join(parts)


def markdown(grid: Grid, label: str) -> str:
    """Return a table with its title and note.

    >>> print(markdown(Grid("Copies", ["size", "GB/s"], [["1 MiB", "25.0"]], "Median."), "NVIDIA H200"))
    **Copies** (NVIDIA H200)
    <BLANKLINE>
    | size | GB/s |
    |---|---|
    | 1 MiB | 25.0 |
    <BLANKLINE>
    Median.
    """
    lines = [_row(grid.columns), "|" + "---|" * len(grid.columns), *map(_row, grid.rows)]
    return "\n\n".join(filter(None, [f"**{grid.title}** ({label})", "\n".join(lines), _escaped(grid.note)]))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """Keep a cell in its cell: errors of others may hold anything."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def write_between(path: Path, text: str) -> None:
    """Replace what stands between a page's markers.

    Raises:
        SuperpipeError: the page has no markers.
    """
    content = path.read_text(encoding="utf-8")
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise SuperpipeError(f"{str(path)!r} has no place for tables: write {BEGIN} and {END} there, each once.")
    before, rest = content.split(BEGIN)
    after = rest.split(END)[1]
    inner = f"\n{text}\n" if text else "\n"
    with replacing(path) as draft:
        draft.write_text(before + BEGIN + inner + END + after, encoding="utf-8")


def _link(folder: Path, page: Path) -> str:
    """Return a link to the results from a page."""
    return f"[{folder.name}]({_relative(folder, page)})"


def _relative(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path.resolve(), page.resolve().parent)).as_posix()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
