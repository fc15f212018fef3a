"""The words of the command line: ``superpipe plan experiment=...`` is short for ``mode=plan experiment=...``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from lightning_superpipe.app.groups import GROUPS, group_options
from lightning_superpipe.app.modes import MODES
from lightning_superpipe.errors import ConfigError
from lightning_superpipe.option_checks import nearest

__all__ = ["help_text", "overrides_of"]

_WITH_VALUE = frozenset(
    ("-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir")
    + ("-c", "--cfg", "-i", "--info", "--experimental-rerun")
)

_SHORT = {"k": "superpipe.k", "k_prime": "superpipe.k_prime", "batch_size": "data.batch_size"}

_HELP = """\
superpipe: train models larger than your device's memory, as a Hydra application.

  superpipe MODE experiment=NAME [group=option ...] [key=value ...]

Modes
{modes}
  report FOLDER  table and picture of a sweep
  profile        Measure this machine; keep it for plan. [device=cuda] [disk=FOLDER] [output=FILE.json] [--again]

Groups
{groups}

Short words: k and k_prime for superpipe.k and superpipe.k_prime, batch_size for data.batch_size.

Examples
  superpipe plan experiment=NAME k=2                what would stream, in which order; nothing runs
  superpipe plan experiment=NAME device=MACHINE     time and memory for a table of windows on any machine
  superpipe train experiment=NAME superpipe=off     the same without streaming
  superpipe -m experiment=NAME superpipe.k=1,2,4    a sweep; then: superpipe report multirun/NAME
  superpipe train experiment=NAME --cfg job         the whole configuration; runs nothing

Results go to outputs/DAY/TIME, of sweeps to multirun/NAME. Hydra's own flags: superpipe --hydra-help.
HYDRA_FULL_ERROR=1 shows where an error happened."""


def overrides_of(words: Sequence[str]) -> list[str]:
    """Return the command line as Hydra takes it.

    Raises:
        ConfigError: a word is no mode.

    >>> overrides_of(["-m", "bench", "k=1,2", "batch_size=8"])
    ['-m', 'mode=bench', 'superpipe.k=1,2', 'data.batch_size=8']
    """
    return list(_translated(words))


def _translated(words: Sequence[str]) -> Iterator[str]:
    before = ""
    for word in words:
        is_override = "=" in word or word.startswith(("-", "~", "+")) or before in _WITH_VALUE
        if not is_override and word not in MODES:
            raise ConfigError(
                f"{word!r} is no mode: {nearest(word, [*MODES, 'report', 'profile'])} (Values are given as key=value.)"
            )
        key, equals, value = word.partition("=")
        yield f"{_SHORT.get(key, key)}{equals}{value}" if is_override else f"mode={word}"
        before = word


def help_text() -> str:
    """Return what ``superpipe --help`` prints."""
    modes = "\n".join(f"  {mode:<14} {(function.__doc__ or '').splitlines()[0]}" for mode, function in MODES.items())
    groups = "\n".join(
        f"  {group:<14} {meaning}\n{_indented(group_options(group))}" for group, meaning in GROUPS.items()
    )
    return _HELP.format(modes=modes, groups=groups)


def _indented(names: list[str]) -> str:
    return textwrap.fill(", ".join(names) or "-", 100, initial_indent=" " * 17, subsequent_indent=" " * 17)
