"""Networks of the transformers library: from a local folder, a hub name, or only a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_superpipe.errors import ConfigError
from lightning_superpipe.recipes.extras import locate, require

__all__ = ["make_network", "recompute_activations"]

_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


def make_network(
    kind: str,
    *,
    pretrained: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    changes: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Make a network with pretrained or with fresh weights.

    Args:
        kind: the transformers class that chooses the architecture, such as ``"AutoModelForCausalLM"``.
        pretrained: folder or hub name with weights, or ``pkg://PACKAGE/FOLDER`` of an installed package.
        config: fresh weights instead: ``model_type`` and options of that architecture's configuration.
        dtype: of the weights in memory; ``"auto"`` keeps that of the file.
        changes: options of the configuration that the task decides, such as ``num_labels``.

    Raises:
        ConfigError: neither or both sources are given, the folder holds no model, or there is no such architecture.
    """
    if (pretrained is None) == (config is None):
        raise ConfigError(
            f"pretrained={pretrained!r} and config={config!r}: give exactly one, a folder or hub name with weights, or "
            "a configuration for fresh weights such as {model_type: llama, num_hidden_layers: 4}."
        )
    transformers = require("transformers")
    if pretrained is not None:
        return _load(getattr(transformers, kind), locate(pretrained), dtype, changes or {})
    options = {**(config or {}), **(changes or {})}
    try:
        made = transformers.AutoConfig.for_model(**options)
        network: nn.Module = getattr(transformers, kind).from_config(made, dtype=None if dtype == "auto" else dtype)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"config={options!r} makes no {kind}: {_first_line(error)} It needs `model_type` and options of that "
            "architecture's configuration class in transformers."
        ) from error
    return network


def _load(auto_class: Any, pretrained: str, dtype: str, changes: Mapping[str, Any]) -> nn.Module:
    """Read a network from a folder or from the hub; on the meta device its configuration alone."""
    if torch.get_default_device().type == "meta":
        return _load_shape(auto_class, pretrained, dtype, changes)
    _refuse_incomplete(Path(pretrained))
    try:
        network: nn.Module = auto_class.from_pretrained(pretrained, dtype=dtype, **changes)
    except Exception as error:  # of the network, of the file system, of whatever format the weights have
        raise ConfigError(
            f"pretrained={pretrained!r} cannot be read: {_first_line(error)} Give a folder that save_pretrained wrote, "
            "or a name on the hub (which needs a network)."
        ) from error
    return network.train()  # transformers loads for evaluation, and Lightning leaves modules as they are


def _load_shape(auto_class: Any, pretrained: str, dtype: str, changes: Mapping[str, Any]) -> nn.Module:
    """Make a network like the one in a folder or on the hub, without its weights."""
    options = {name: value for name, value in changes.items() if name != "ignore_mismatched_sizes"}
    try:
        config = require("transformers").AutoConfig.from_pretrained(pretrained, **options)
        network: nn.Module = auto_class.from_config(config, dtype=config.dtype if dtype == "auto" else dtype)
    except Exception as error:  # of the configuration, of the file system
        raise ConfigError(
            f"pretrained={pretrained!r} has no configuration to read: {_first_line(error)} Give a folder that "
            "save_pretrained wrote, or a name on the hub (which needs a network)."
        ) from error
    return network


def _refuse_incomplete(folder: Path) -> None:
    """Raise ConfigError for a folder without a configuration or weights; a hub name is no folder."""
    if not folder.is_dir():
        return
    if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        raise ConfigError(f"pretrained={str(folder)!r} holds no config.json: it is not a folder of a saved model.")
    if not any(path for pattern in _WEIGHT_PATTERNS for path in folder.glob(pattern)):
        found = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise ConfigError(
            f"pretrained={str(folder)!r} holds no weights ({' or '.join(_WEIGHT_PATTERNS)}); it has {found}. "
            "Copy the weights there, or start from fresh ones with `config`."
        )


def recompute_activations(network: nn.Module) -> None:
    """Keep only the input of each block in forward, else activations may be larger than all the rest."""
    network_: Any = network
    enable = getattr(network, "activation_checkpointing_enable", None) or network_.gradient_checkpointing_enable
    enable()


def _first_line(error: Exception) -> str:
    """The first sentence of a message, ended by a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:") + "."
