"""Chats and completions as tokens, with everything masked that the model is not to learn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_superpipe.errors import ConfigError
from lightning_superpipe.recipes.tokens import PLAIN_TEMPLATE

__all__ = ["MASKED", "Example", "encode", "encode_prompt", "kind_of"]

MASKED = -100
"""The label that losses and metrics leave out."""

_LAYOUTS = {"chat": ("messages",), "completion": ("prompt", "completion")}


class Example(NamedTuple):
    """One record as tokens.

    Attributes:
        input_ids: shape (T,), int64.
        labels: shape (T,): the token itself where it is to be learned, else ``MASKED``.
    """

    input_ids: Tensor
    labels: Tensor


class _Piece(NamedTuple):
    text: str
    is_learned: bool


def kind_of(fields: Sequence[str], source: str) -> str:
    """Return ``"chat"`` or ``"completion"``, by the fields of the records.

    Raises:
        ConfigError: they are neither.

    >>> kind_of(["id", "prompt", "completion"], "a.jsonl")
    'completion'
    """
    for kind, needed in _LAYOUTS.items():
        if set(needed) <= set(fields):
            return kind
    raise ConfigError(
        f"{source!r} has the fields {', '.join(map(repr, fields))}; a chat has 'messages' (a list of objects with "
        "'role' and 'content'), a completion has 'prompt' and 'completion'. Rename the fields."
    )


def encode(record: Mapping[str, Any], kind: str, tokenizer: Any, where: str) -> Example:
    """Return a record as tokens; answers and completions are learned, with the token that ends them.

    Each piece is tokenized for itself: the prompt has the very tokens that it will have in generation.

    Args:
        record: ``messages``, or ``prompt`` and ``completion``.
        kind: see :func:`kind_of`.
        where: names the record in errors.

    Raises:
        ConfigError: a field has a wrong type, nobody answers, or the chat template cannot render it.
    """
    if tokenizer.eos_token is None:
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-text token to end answers with.")
    if kind == "chat":
        pieces = list(_chat_pieces(record["messages"], tokenizer, where))
        start: list[int] = []  # templates write the first token themselves
    else:
        answer = _text(record, "completion", where) + tokenizer.eos_token
        pieces = [_Piece(_text(record, "prompt", where), False), _Piece(answer, True)]
        start = _first_tokens(tokenizer)
    ids, labels = list(start), [MASKED] * len(start)
    for piece in pieces:
        tokens = tokenizer(piece.text, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if piece.is_learned else [MASKED] * len(tokens)
    return Example(torch.tensor(ids), torch.tensor(labels))


def encode_prompt(record: Mapping[str, Any], kind: str, tokenizer: Any, where: str) -> Tensor:
    """Return what comes before the last answer or the completion, shape (T,).

    Raises:
        ConfigError: as :func:`encode`.
    """
    if kind == "completion":
        tokens = tokenizer(_text(record, "prompt", where), add_special_tokens=False)["input_ids"]
        return torch.tensor(_first_tokens(tokenizer) + tokens)
    pieces = list(_chat_pieces(record["messages"], tokenizer, where))[:-1]
    return torch.tensor([t for p in pieces for t in tokenizer(p.text, add_special_tokens=False)["input_ids"]])


def _chat_pieces(messages: Any, tokenizer: Any, where: str) -> Iterator[_Piece]:
    """Yield what stands before each answer, and the answer; what follows the last answer is left out."""
    _check_messages(messages, where)
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:index], tokenizer, where, asks=True)
        after = _render(messages[: index + 1], tokenizer, where, asks=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise ConfigError(
                f"{where}: the tokenizer's chat template changes what it wrote before when answer {index + 1} is "
                "added, so answers cannot be told from prompts. Give the tokenizer a template that only appends."
            )
        yield _Piece(before[len(done) :], False)
        yield _Piece(after[len(before) :], True)
        done = after


def _render(messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str, *, asks: bool) -> str:
    """Apply the tokenizer's chat template, or the plain one."""
    template = tokenizer.chat_template or PLAIN_TEMPLATE
    try:
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=asks
        )
    except Exception as error:  # templates are programs and raise what they like
        raise ConfigError(f"{where}: the tokenizer's chat template refuses it: {error}") from error
    return text


def _check_messages(messages: Any, where: str) -> None:
    """Raise ConfigError unless there are messages with texts and somebody answers."""
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{where}: 'messages' is {messages!r}, but a list of objects with 'role' and 'content'.")
    for number, message in enumerate(messages, 1):
        for field in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(field), str):
                raise ConfigError(f"{where}: message {number} is {message!r}; it needs {field!r}, a text.")
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(repr(message["role"]) for message in messages)
        raise ConfigError(f"{where}: no message has the role 'assistant' (there are {roles}): nothing to learn.")


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    text = record[field]
    if not isinstance(text, str):
        raise ConfigError(f"{where}: {field!r} is {text!r}, but a text is needed.")
    return text


def _first_tokens(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer itself puts before every text."""
    start: list[int] = tokenizer("")["input_ids"]
    return start[:1] if start[:1] == [tokenizer.bos_token_id] else []
