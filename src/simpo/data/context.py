"""What a row says about its whole conversation: the system message, tools, and variables of the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from simpo.data.messages import Message, is_transcript, kind_of, turns
from simpo.data.rows import BadRow
from simpo.data.settings import RESERVED_KWARGS

# Columns that are applied, and so are not among a row's other columns.
CONTEXT_COLUMNS = ("system", "tools", "chat_template_kwargs")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Columns that mean something to other toolkits' training and have no effect here.
_WITHOUT_EFFECT = ("weight", "sample_weight", "label_probability", "functions", "documents", "context", "history")


@dataclass(frozen=True)
class Context:
    """What a chat template gets in addition to the messages.

    Attributes:
        tools: JSON schemas of the tools that may be called; None if there are none.
        kwargs: the row's own variables for the template.
        without_effect: names of the row's columns that have a usual meaning and no effect.
    """

    tools: list[Any] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    without_effect: tuple[str, ...] = ()

    @property
    def columns(self) -> dict[str, Any]:
        """The columns that say this, so that written rows can be read again."""
        found = {"tools": self.tools, "chat_template_kwargs": dict(self.kwargs)}
        return {name: value for name, value in found.items() if value}


def read_context(
    row: Mapping[str, Any], prompt: str | list[Message], following: Sequence[str | Message] = ()
) -> tuple[str | list[Message], Any, Context]:
    """Apply a row's columns to its prompt.

    Args:
        row: all columns.
        prompt: text or messages, as they were read.
        following: what follows the prompt: texts if the prompt is text, else messages.

    Returns:
        The prompt, with the system message; what follows it, as messages if the prompt has become a list of them; and
        the context.

    Raises:
        BadRow: a column that cannot be applied.
    """
    if media := next((name for name in _MEDIA if row.get(name)), None):
        raise BadRow(f"column {media!r}: only text is supported")
    tools = read_tools(row.get("tools"))
    system, rest = row.get("system"), following
    if not isinstance(system, str | None):
        raise BadRow(f"system is {kind_of(system)}, not text")
    if not isinstance(prompt, str):
        prompt, rest = as_messages(prompt, rest)
        prompt, tools = _own_tools(prompt, tools)
        rest, tools = _own_tools(rest, tools)
    if system:
        prompt, rest = as_messages(prompt, rest)
        prompt = _with_system(prompt, system)
    without_effect = tuple(name for name in _WITHOUT_EFFECT if row.get(name) not in (None, [], {}, ""))
    return prompt, rest, replace(context_of(row), tools=tools, without_effect=without_effect)


def context_of(row: Mapping[str, Any]) -> Context:
    """The context that a row's columns give a prompt that has its system message.

    Raises:
        BadRow: a column that cannot be applied.
    """
    return Context(read_tools(row.get("tools")), _read_kwargs(row.get("chat_template_kwargs")))


def as_messages(prompt: str | list[Message], following: Sequence[str | Message]) -> tuple[list[Message], list[Message]]:
    """Messages of a prompt and of what follows it; a transcript becomes its turns.

    Raises:
        BadRow: a transcript that does not end with a user's message.
    """
    if not isinstance(prompt, str):
        return prompt, [message for message in following if isinstance(message, dict)]
    texts = [str(text) for text in following]
    opening = [{"role": "user", "content": prompt}]
    if is_transcript(prompt):
        opening, texts = turns(prompt), [text.strip() for text in texts]
        if opening[-1]["role"] != "user":
            raise BadRow("the prompt does not end with a user message")
    return opening, [{"role": "assistant", "content": text} for text in texts]


def read_tools(value: object) -> list[Any] | None:
    """Tools from a cell: a list of JSON schemas, each an object or its JSON text, or the JSON text of the list.

    Raises:
        BadRow: it is something else.
    """
    found = _from_json(value, "tools")
    if not found:
        return None
    if not isinstance(found, list):
        raise BadRow(f"tools is {kind_of(found)}, not a list of JSON schemas")
    tools = [_from_json(tool, "tools") for tool in found]
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools has an entry that is not a JSON schema")
    return tools


def _read_kwargs(value: object) -> dict[str, Any]:
    found = _from_json(value, "chat_template_kwargs") or {}
    if not isinstance(found, dict):
        raise BadRow(f"chat_template_kwargs is {kind_of(found)}, not a mapping")
    if reserved := sorted(RESERVED_KWARGS & set(found)):
        raise BadRow(f"chat_template_kwargs has {reserved[0]!r}, which is not a variable of the template")
    return found


def _from_json(value: object, name: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise BadRow(f"{name} is text that is not JSON") from error


def _own_tools(messages: list[Message], tools: list[Any] | None) -> tuple[list[Message], list[Any] | None]:
    """Messages without the tools that some data sets store in the system message, and all tools."""
    for message in messages:
        own = read_tools(message.get("tools"))
        if own is not None and tools not in (None, own):
            raise BadRow("tools of a message differ from the column tools")
        tools = own or tools
    kept = [message for message in messages if message["content"] or "tools" not in message]
    return [{key: value for key, value in message.items() if key != "tools"} for message in kept], tools


def _with_system(messages: list[Message], system: str) -> list[Message]:
    first = messages[0]
    if first["role"] not in ("system", "developer"):
        return [{"role": "system", "content": system}, *messages]
    if first["content"] not in ("", system):
        raise BadRow("the column system differs from the conversation's system message")
    return [{**first, "content": system}, *messages[1:]]
