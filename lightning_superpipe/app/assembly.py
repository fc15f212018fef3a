"""A configuration becomes objects: module, data, and a trainer with strategy, callbacks and loggers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_superpipe.config import nearest
from lightning_superpipe.errors import ConfigError

__all__ = ["Parts", "assemble", "build", "build_module", "group_options", "ordinary_strategy"]

_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")
_MISSING = re.compile(r"missing \d+ required .*")


class Parts(NamedTuple):
    """What a run is made of."""

    module: L.LightningModule
    data: L.LightningDataModule
    trainer: L.Trainer


def ordinary_strategy() -> str:
    """Return the strategy of ``superpipe=off``: Lightning's own choice."""
    return "auto"


def assemble(config: DictConfig, added: Iterable[L.Callback] = (), **trainer_arguments: Any) -> Parts:
    """Return module, data and trainer of a configuration, the same ones for the same seed.

    Args:
        config: the composed configuration.
        added: callbacks in addition to those of the configuration.
        trainer_arguments: instead of those of the configuration.

    Raises:
        ConfigError: model or data are missing, or a constructor does not know an argument.
    """
    _require(config, "model", "data")
    module = build_module(config)
    data = build(config.data, "data")
    chosen: dict[str, Any] = {
        "strategy": build(config.superpipe, "superpipe"),
        "logger": _build_each(config.logger, "logger") or False,
        "default_root_dir": config.output_dir,
    }
    chosen["callbacks"] = _build_each(config.callbacks, "callbacks") + list(added)
    chosen["enable_checkpointing"] = any(isinstance(one, L.pytorch.callbacks.Checkpoint) for one in chosen["callbacks"])
    chosen["enable_progress_bar"] = any(isinstance(one, L.pytorch.callbacks.ProgressBar) for one in chosen["callbacks"])
    return Parts(module, data, build(config.trainer, "trainer", **{**chosen, **trainer_arguments}))


def build_module(config: DictConfig) -> L.LightningModule:
    """Seed everything and return the module; its optimizer and schedule are handed to it if it takes them."""
    _require(config, "model")
    if config.machine.num_threads is not None:
        torch.set_num_threads(config.machine.num_threads)
    if config.machine.float32_matmul_precision is not None:
        torch.set_float32_matmul_precision(config.machine.float32_matmul_precision)
    L.seed_everything(config.seed, workers=True, verbose=False)
    made = {"optimizer": build(config.optimizer, "optimizer") if config.optimizer else None}
    made["scheduler"] = build(config.scheduler, "scheduler") if config.scheduler else None
    module: L.LightningModule = build(config.model, "model", optional=made)
    return module


def build(node: DictConfig, key: str, *, optional: Mapping[str, Any] | None = None, **arguments: Any) -> Any:
    """Return the object that a node describes; with ``_partial_: true``, what makes it.

    Args:
        node: with ``_target_`` and its arguments.
        key: where the node stands, for messages.
        optional: arguments to hand over if the target names them.
        arguments: others to hand over, instead of those of the node.

    Raises:
        ConfigError: there is no such target, a library is not installed, or it does not take an argument.
    """
    if "_target_" not in node:
        raise ConfigError(f"`{key}` has no `_target_`, the class to make it of. Choose one of: {group_options(key)}.")
    try:
        make = instantiate(node, _partial_=True, _convert_="all")
        if node.get("_partial_"):
            return make
        more = {name: value for name, value in (optional or {}).items() if value is not None}
        return make(**arguments, **{name: value for name, value in more.items() if _takes(make.func, name)})
    except ModuleNotFoundError as error:
        raise ConfigError(f"`{key}` needs a library that is not installed: {error}") from error
    except TypeError as error:
        raise _explained(error, make, key) from error


def group_options(group: str) -> str:
    """Return the files of a configuration group as a list in words."""
    if not GlobalHydra.instance().is_initialized():
        return "(unknown)"
    return ", ".join(GlobalHydra.instance().config_loader().get_group_options(group)) or "(none)"


def _build_each(nodes: Mapping[str, DictConfig | None] | None, key: str) -> list[Any]:
    """Return the objects of a group whose members have names; null leaves one out."""
    return [build(node, f"{key}.{name}") for name, node in (nodes or {}).items() if node]


def _require(config: DictConfig, *groups: str) -> None:
    """Raise ConfigError where a group was not chosen, with what there is."""
    missing = [group for group in groups if not config.get(group)]
    if missing:
        choices = "; ".join(f"{group}: {group_options(group)}" for group in missing)
        raise ConfigError(
            f"nothing says which {' and '.join(missing)} to use. Choose a whole recipe with experiment=NAME "
            f"({group_options('experiment')}), or {' '.join(f'{group}=NAME' for group in missing)} ({choices})."
        )


def _takes(target: Any, name: str) -> bool:
    """Whether a callable takes an argument; of a class also where its constructor hands options on to a base's."""
    constructors = [vars(base)["__init__"] for base in getattr(target, "__mro__", ()) if "__init__" in vars(base)]
    for function in constructors or [target]:
        parameters = inspect.signature(function).parameters
        if name in parameters:
            return True
        if all(one.kind is not one.VAR_KEYWORD for one in parameters.values()):
            return False
    return False


def _explained(error: TypeError, make: Any, key: str) -> Exception:
    """Return the error as one about the configuration where it is about the arguments, else itself."""
    target = make.func
    known = [name for name in inspect.signature(target).parameters if name not in ("self", "args", "kwargs")]
    unexpected = _UNEXPECTED.search(str(error))
    if unexpected and unexpected[1] in make.keywords:
        name = unexpected[1]
        return ConfigError(f"`{key}.{name}`: {target.__name__} takes no {name!r}: {nearest(name, known)}")
    missing = _MISSING.search(str(error))
    if missing:
        return ConfigError(f"`{key}`: {target.__name__} is not complete: {missing[0]}.")
    return error
