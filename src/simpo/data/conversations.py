"""Conversations for supervised fine-tuning, recognised by the columns of a row and their types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from simpo.data.messages import ASKING, Message, check_text_or_messages, kind_of, read_messages, read_opening
from simpo.data.rows import BadRow, UnknownShape, columns_of, other_columns

CONVERSATION_SHAPES = "{messages} (a conversation), {prompt, completion} (strings or message lists)"
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """A prompt and what follows it, of which the assistant's turns are learnt.

    Attributes:
        prompt: text, or the messages before the first turn that is learnt.
        completion: text if the prompt is text, else messages, the first and the last of them the assistant's.
        where: where the row comes from, e.g. ``"train.jsonl:12"``.
        extra: the row's other columns.
        unanswered: how many messages stood after the assistant's last one.
    """

    prompt: str | list[Message]
    completion: str | list[Message]
    where: str
    extra: dict[str, Any] = field(default_factory=dict)
    unanswered: int = 0


def recognise_conversation(row: Mapping[str, Any], where: str) -> Conversation:
    """Turn a row of any known shape into a conversation; ``messages`` counts where there are other columns too.

    Raises:
        UnknownShape: its columns are of no known shape.
        BadRow: its columns are, but their values are not.
    """
    check_conversation_shape(row)
    if "messages" in row:
        messages = read_conversation(row["messages"])
        prompt = messages[: _first_answer(messages)]
        completion, unanswered = _answered(prompt, messages[len(prompt) :])
        return Conversation(prompt, completion, where, other_columns(row, "messages"), unanswered)
    extra = other_columns(row, "prompt", "completion")
    for name in ("prompt", "completion"):
        check_text_or_messages(row[name], name)
    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        return Conversation(row["prompt"], row["completion"], where, extra)
    prompt = read_opening(row["prompt"])
    completion, unanswered = _answered(prompt, read_messages(row["completion"], "completion"))
    return Conversation(prompt, completion, where, extra, unanswered)


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


def _first_answer(messages: list[Message]) -> int:
    found = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
    if found is None:
        raise BadRow("no assistant's message")
    if not found:
        raise BadRow("the conversation starts with the assistant's message")
    return found


def _answered(prompt: list[Message], rest: list[Message]) -> tuple[list[Message], int]:
    """What follows a prompt up to the assistant's last message, and how many messages are left out after it."""
    _check_roles([*prompt, *rest])
    if rest[0]["role"] != "assistant":
        raise BadRow("completion does not start with the assistant's message")
    asking = [*prompt[-1:], *rest]
    for before, message in zip(asking, rest, strict=False):
        if message["role"] == "assistant" and before["role"] not in ASKING:
            raise BadRow("an assistant's message does not follow a user's or a tool's")
    last = max(i for i, message in enumerate(rest) if message["role"] == "assistant")
    return rest[: last + 1], len(rest) - last - 1
