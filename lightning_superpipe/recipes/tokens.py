"""Tokenizers: a model's own, or one token for each byte."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_superpipe.errors import ConfigError
from lightning_superpipe.recipes.extras import locate, require

__all__ = ["END", "PLAIN_TEMPLATE", "byte_tokenizer", "load_tokenizer"]

END = "<|end|>"
"""End of a text, token 0 of the byte tokenizer; a zero byte in a text has no token and is dropped."""

# For tokenizers that bring no chat template: the role on a line of its own, then the message; answers end with the
# end-of-text token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '' if loop.first else '\n' }}{{ message.role + ':\n' + message.content }}"
    "{{ eos_token if message.role == 'assistant' else '' }}{% endfor %}"
    "{{ '\nassistant:\n' if add_generation_prompt else '' }}"
)


def load_tokenizer(name: str | None, added: Sequence[str] = ()) -> Any:
    """Return the tokenizer of a folder or hub name; None gives one token for each byte.

    Args:
        name: folder or hub name.
        added: special tokens that the tokenizer of bytes has in addition; a pretrained one has its own.

    Raises:
        ConfigError: there is none, or it has no token to pad with.
    """
    if name is None:
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(list(added), special_tokens=True)
        return tokenizer
    name = locate(name)
    try:
        tokenizer = require("transformers").AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        found = f" It has {', '.join(sorted(path.name for path in Path(name).iterdir()))}." if _is_folder(name) else ""
        raise ConfigError(
            f"tokenizer={name!r}: no tokenizer can be read there.{found} Give a folder that a tokenizer's "
            "save_pretrained wrote, a name on the hub (which needs a network), or null for bytes."
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"tokenizer={name!r} has neither a padding nor an end-of-text token: give it one.")
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked and never learned
    return tokenizer


def byte_tokenizer() -> Any:
    """Return a tokenizer whose token for a byte is the byte's value.

    >>> byte_tokenizer()("né" + END)["input_ids"]
    [110, 195, 169, 0]
    """
    tokenizers, transformers = require("tokenizers"), require("transformers")
    names = require("transformers.convert_slow_tokenizer").bytes_to_unicode()  # a printable name of each byte
    tokens = {END if byte == 0 else name: byte for byte, name in names.items()}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(tokens, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        chat_template=PLAIN_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _is_folder(name: str) -> bool:
    return Path(name).is_dir()
