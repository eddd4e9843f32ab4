"""Messages of conversations: read from a cell of any data set, checked."""

from __future__ import annotations

from typing import Any

from simpo.data.rows import BadRow

Message = dict[str, Any]

# Whose messages an assistant's message answers.
ASKING = ("user", "tool")


def read_messages(value: object, name: str) -> list[Message]:
    """Check messages (a lone text is the assistant's) and leave out null fields, which Arrow adds.

    Args:
        value: text, one message or a list of messages.
        name: what the reason calls it, e.g. ``"chosen"``.

    Raises:
        BadRow: it is something else, or empty.
    """
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name} has no messages")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRow(f"{name} holds something other than messages (role and content)")
        if not isinstance(message.get("content"), str):
            raise BadRow(f"{name} has a message whose content is {kind_of(message.get('content'))}, not text")
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def read_opening(prompt: str | list[Message] | None) -> list[Message]:
    """Messages of a prompt, which is the user's message if it is text.

    Raises:
        BadRow: a list of something other than messages.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [] if prompt is None else read_messages(prompt, "prompt")


def check_text_or_messages(value: object, name: str) -> None:
    """Look at the type of a cell only.

    Raises:
        BadRow: it is neither text nor a message nor a list.
    """
    if not isinstance(value, str | list | dict):
        raise BadRow(f"{name} is {kind_of(value)}, not text or messages")


def kind_of(value: object) -> str:
    """The type of a cell, for reasons."""
    return "null" if value is None else type(value).__name__
