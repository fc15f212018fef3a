"""``python -m lightning_superpipe.demo``: train, measure, write pictures, generate text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lightning_superpipe.errors import SuperpipeError

__all__ = ["main", "parse"]

_NEEDED = ("transformers", "matplotlib")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; sizes of the network are for tests and stay out of the help."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_superpipe.demo",
        description="A GPT learns the source of Python's standard library, byte by byte, through a window of k units. "
        "The CPU stands in for a device with little memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=_count, default=240, help="training steps")
    parser.add_argument("--batch-size", type=_count, default=2, help="texts in a step")
    parser.add_argument("--k", type=_count, default=2, help="most units on the device at once")
    parser.add_argument("--k-prime", type=_count, default=1, help="units moved per transfer")
    parser.add_argument("--device-memory", default="96MiB", help="memory of the emulated device")
    parser.add_argument("--learning-rate", type=float, default=4e-4, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights, dropout, texts and the sample")
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder for what the run writes")
    for name, default in (("layers", 12), ("width", 384), ("context", 128)):
        parser.add_argument(f"--{name}", type=_count, default=default, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit status."""
    options = parse(arguments)
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"the demo needs {' and '.join(missing)}, which is not installed: pip install 'lightning_superpipe[demo]'.",
            file=sys.stderr,
        )
        return 1
    from lightning_superpipe.demo.job import run

    try:
        run(options, command=["python", "-m", "lightning_superpipe.demo", *(arguments or sys.argv[1:])])
    except (SuperpipeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _count(text: str) -> int:
    """Read an integer of at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small: at least 1 is allowed.")
    return number


if __name__ == "__main__":
    sys.exit(main())
