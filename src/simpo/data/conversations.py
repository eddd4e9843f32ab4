"""Conversations for supervised fine-tuning, recognised by the columns of a row and their types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from simpo.data.context import CONTEXT_COLUMNS, Context, read_context
from simpo.data.messages import (
    ASKING,
    TRAIN,
    Message,
    check_text_or_messages,
    kind_of,
    read_messages,
    read_opening,
    without_train,
)
from simpo.data.rows import BadRow, UnknownShape, columns_of, other_columns

CONVERSATION_SHAPES = "{messages} (a conversation), {prompt, completion} (strings or message lists)"
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """A prompt and what follows it, of which the assistant's turns are learnt.

    Attributes:
        prompt: text, or the messages before the first turn that is learnt.
        completion: text if the prompt is text, else messages, the first and the last of them the assistant's.
        scored: positions of the messages of the completion that are learnt; none if it is text.
        where: where the row comes from, e.g. ``"train.jsonl:12"``.
        extra: the row's other columns.
        unanswered: how many messages stood after the last one that is learnt.
        context: tools and variables for the chat template.
    """

    prompt: str | list[Message]
    completion: str | list[Message]
    where: str
    extra: dict[str, Any] = field(default_factory=dict)
    unanswered: int = 0
    scored: tuple[int, ...] = ()
    context: Context = field(default_factory=Context)


def recognise_conversation(row: Mapping[str, Any], where: str) -> Conversation:
    """Turn a row of any known shape into a conversation; ``messages`` counts where there are other columns too.

    Raises:
        UnknownShape: its columns are of no known shape.
        BadRow: its columns are, but their values are not.
    """
    check_conversation_shape(row)
    if "messages" in row:
        extra = other_columns(row, "messages", *CONTEXT_COLUMNS)
        return _conversation(row, [], read_conversation(row["messages"]), where, extra)
    extra = other_columns(row, "prompt", "completion", *CONTEXT_COLUMNS)
    for name in ("prompt", "completion"):
        check_text_or_messages(row[name], name)
    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        prompt, rest, context = read_context(row, row["prompt"], [row["completion"]])
        if isinstance(prompt, str):
            return Conversation(prompt, rest[0], where, extra, context=context)
        return Conversation(prompt, rest, where, extra, scored=(0,), context=context)
    return _conversation(row, read_opening(row["prompt"]), read_messages(row["completion"], "completion"), where, extra)


def _conversation(
    row: Mapping[str, Any], prompt: list[Message], rest: list[Message], where: str, extra: dict[str, Any]
) -> Conversation:
    """Messages before the first answer that is learnt, and those up to the last one."""
    if prompt and rest[0]["role"] != "assistant":
        raise BadRow("completion does not start with the assistant's message")
    messages = [*prompt, *rest]
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
    _check_roles(messages)
    if first is None:
        raise BadRow("no assistant's message")
    if not first and not prompt:
        raise BadRow("the conversation starts with the assistant's message")
    for before, message in pairwise(messages[max(0, len(prompt) - 1) :]):
        if message["role"] == "assistant" and before["role"] not in ASKING:
            raise BadRow("an assistant's message does not follow a user's or a tool's")
    learnt = [
        i
        for i, message in enumerate(messages)
        if i >= len(prompt) and message["role"] == "assistant" and message.get(TRAIN, True)
    ]
    if not learnt:
        raise BadRow("no answer is trained on: every one has weight 0 or train false")
    messages = without_train(messages)
    end = learnt[-1] + 1
    opening, following, context = read_context(row, messages[: learnt[0]], messages[learnt[0] : end])
    scored = tuple(i - learnt[0] for i in learnt)
    return Conversation(opening, following, where, extra, len(messages) - end, scored, context)


def check_conversation_shape(row: Mapping[str, Any]) -> None:
    """Look at a row's column names only.

    Raises:
        UnknownShape: they are of no known shape.
    """
    columns = set(row)
    if "messages" in columns or ({"prompt", "completion"} <= columns and "label" not in columns):
        return
    raise UnknownShape(f"no recognised shape: columns {columns_of(row)}{_hint(columns)}")


def read_conversation(value: object) -> list[Message]:
    """The messages of a cell that holds a whole conversation.

    Raises:
        BadRow: it does not, or a role is unknown.
    """
    if not isinstance(value, list):
        raise BadRow(f"messages is {kind_of(value)}, not a list of messages")
    messages = read_messages(value, "messages")
    _check_roles(messages)
    return messages


def _hint(columns: set[str]) -> str:
    if {"prompt", "completion", "label"} <= columns:
        return " (unpaired feedback, not only what is to be learnt)"
    if {"chosen", "rejected"} <= columns or {"prompt", "responses", "scores"} <= columns:
        return " (comparisons: simpo train)"
    return ""


def _check_roles(messages: list[Message]) -> None:
    for message in messages:
        if message["role"] not in _ROLES:
            raise BadRow(f"a message's role is {message['role']!r}, not one of {', '.join(_ROLES)}")
