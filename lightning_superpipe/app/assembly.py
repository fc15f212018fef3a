"""A configuration becomes objects: module, data, and a trainer with strategy, callbacks and loggers."""

from __future__ import annotations

import inspect
import re
import reprlib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from omegaconf import DictConfig

from lightning_superpipe.app.groups import group_options
from lightning_superpipe.errors import ConfigError
from lightning_superpipe.option_checks import nearest

__all__ = [
    "Parts",
    "assemble",
    "build",
    "build_module",
    "build_without_memory",
    "first_batch",
    "ordinary_strategy",
]

_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


class Parts(NamedTuple):
    """What a run is made of."""

    module: L.LightningModule
    data: L.LightningDataModule
    trainer: L.Trainer


def ordinary_strategy(**_options: Any) -> str:
    """Return the strategy of ``superpipe=off``: Lightning's own choice. Options of streaming mean nothing to it."""
    return "auto"


def assemble(config: DictConfig, added: Iterable[L.Callback] = (), **trainer_arguments: Any) -> Parts:
    """Return module, data and trainer of a configuration, the same ones for the same seed.

    Args:
        config: the composed configuration.
        added: callbacks in addition to those of the configuration.
        trainer_arguments: instead of those of the configuration.

    Raises:
        ConfigError: model or data are missing, or a constructor refuses its arguments.
    """
    _require(config, "model", "data")
    callbacks = [*_build_each(config.callbacks, "callbacks"), *added]
    chosen = {
        "strategy": build(config.superpipe, "superpipe"),
        "logger": _build_each(config.logger, "logger") or False,
        "callbacks": callbacks,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in callbacks),
        "default_root_dir": config.output_dir,
        **trainer_arguments,
    }
    trainer = build(config.trainer, "trainer", **chosen)
    module = build_module(config)
    return Parts(module, build(config.data, "data"), trainer)


def build_module(config: DictConfig) -> L.LightningModule:
    """Seed everything and return the module; its optimizer and schedule are handed to it if it takes them.

    Raises:
        ConfigError: there is no model, or its constructor refuses its arguments.
    """
    _require(config, "model")
    machine = config.machine
    if machine.num_threads is not None:
        torch.set_num_threads(machine.num_threads)
    if machine.float32_matmul_precision is not None:
        torch.set_float32_matmul_precision(machine.float32_matmul_precision)
    L.seed_everything(config.seed, workers=True, verbose=False)
    makers = {key: build(config[key], key) for key in ("optimizer", "scheduler") if config[key]}
    module: L.LightningModule = build(config.model, "model", optional=makers)
    return module


def build_without_memory(config: DictConfig) -> L.LightningModule:
    """Return the module on the meta device, however large it is; one that cannot be made there is made on the host.

    Raises:
        ConfigError: there is no model, or its constructor refuses its arguments.
    """
    try:
        with torch.device("meta"):
            module = build_module(config)
            module.configure_model()
    except (RuntimeError, NotImplementedError):  # of a constructor that looks at values
        module = build_module(config)
        module.configure_model()
    return module


def first_batch(config: DictConfig) -> Any:
    """Return the first batch of training.

    Raises:
        ConfigError: the data's constructor refuses its arguments, or there is no batch.
    """
    data: L.LightningDataModule = build(config.data, "data")
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()), None)
    if batch is None:
        raise ConfigError("`data`: training has no batch to look at. Use more data, or a smaller batch_size.")
    return batch


def build(node: DictConfig, key: str, *, optional: Mapping[str, Any] | None = None, **arguments: Any) -> Any:
    """Return the object that a node describes; with ``_partial_: true``, what makes it.

    Args:
        node: with ``_target_`` and its arguments.
        key: where the node stands, for messages.
        optional: arguments to hand over if the target takes them.
        arguments: others to hand over, instead of those of the node.

    Raises:
        ConfigError: there is no target, a library is not installed, or the target refuses its arguments.
    """
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise ConfigError(f"`{key}` has no `_target_`, the class to make it of: {node}")
    make = instantiate(node, _partial_=True, _convert_="all")
    if node.get("_partial_"):
        return partial(_call, make, key)
    arguments |= {name: value for name, value in (optional or {}).items() if _takes(make.func, name)}
    return _call(make, key, **arguments)


def _call(make: Any, key: str, *arguments: Any, **options: Any) -> Any:
    """Return what a node makes; a refusal names the node."""
    try:
        return make(*arguments, **options)
    except ModuleNotFoundError as error:
        raise ConfigError(f"`{key}` needs a library that is not installed: {error}") from error
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(_refusal(error, make, key)) from error


def _build_each(nodes: Mapping[str, DictConfig | None] | None, key: str) -> list[Any]:
    """Return the objects of a group whose members have names; null leaves one out."""
    return [build(node, f"{key}.{name}") for name, node in (nodes or {}).items() if node]


def _require(config: DictConfig, *groups: str) -> None:
    """Raise ConfigError where a group was not chosen, with what there is."""
    missing = [group for group in groups if not config.get(group)]
    if missing:
        known = {group: ", ".join(group_options(group)) or "none" for group in (*missing, "experiment")}
        choices = " and ".join(f"{group}=NAME with one of: {known[group]}" for group in missing)
        raise ConfigError(
            f"nothing says which {' and '.join(missing)} to use. Choose a whole recipe, experiment=NAME with one of: "
            f"{known['experiment']}; or {choices}."
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


def _refusal(error: Exception, make: Any, key: str) -> str:
    """Return why a target refuses its arguments: an unknown one with the nearest it takes, else its own words."""
    name = make.func.__name__
    unexpected = _UNEXPECTED.search(str(error))
    if unexpected and unexpected[1] in make.keywords:
        taken = [one for one in inspect.signature(make.func).parameters if one not in ("self", "args", "kwargs")]
        return f"`{key}.{unexpected[1]}`: {name} takes no {unexpected[1]!r}: {nearest(unexpected[1], taken)}"
    if isinstance(error, ConfigError):
        return f"`{key}`: {error}"
    given = ", ".join(f"{argument}={reprlib.repr(value)}" for argument, value in make.keywords.items())
    return f"`{key}`: {name}({given}) is refused: {error}"
