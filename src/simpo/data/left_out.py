"""What a row says and a chat template leaves out: counted, or a bad row where somebody's words would be lost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from simpo.data.chat_template import NO_SYSTEM_ROLE, SENTINEL, ChatTemplate
from simpo.data.context import Context
from simpo.data.messages import REASONING, Message, split_reasoning
from simpo.data.rows import BadRow

_USUAL_KEYS = {"role", "content", "tool_calls", "tool_call_id", *REASONING}


def left_out(
    template: ChatTemplate,
    prompt: str,
    asked: Sequence[Message],
    conversations: Sequence[Sequence[Message]],
    context: Context,
) -> tuple[str, ...]:
    """Status entries for what a row says and the template never reads, or leaves out of the prompt.

    Args:
        template: renders.
        prompt: the rendered prompt of the last answer.
        asked: its messages.
        conversations: all messages of the row, in each of its conversations.
        context: the row's.

    Raises:
        BadRow: what a user, a tool or the system said is not in the prompt.
    """
    found = [f"column {name!r}, which has no effect" for name in context.without_effect]
    found += [f"variable {name!r}, which the chat template never reads" for name in template.unread(context.kwargs)]
    if context.tools and not template.reads_tools:
        found.append("tools, which the chat template does not render")
    for place, message in enumerate(asked):
        if message["role"] == "assistant":
            found += _of_earlier_answer(template, prompt, message)
        elif not _is_rendered(template, prompt, asked, place, context):
            if message["role"] == "system" and not template.has_system_role:
                raise BadRow(NO_SYSTEM_ROLE)
            raise BadRow(f"the chat template leaves out a message of role {message['role']!r}")
    for messages in conversations:
        found += _unread_keys(template, messages, context)
    return tuple(f"ignored: {what}" for what in dict.fromkeys(found))


def _of_earlier_answer(template: ChatTemplate, prompt: str, message: Message) -> Iterator[str]:
    thought, content = split_reasoning(message)
    if thought and thought not in prompt:
        yield "reasoning of earlier turns, which the chat template drops"
    if content.strip() not in prompt:
        yield "content of earlier answers, which the chat template drops"
    if message.get("tool_calls") and not template.renders_calls:
        yield "tool calls, which the chat template does not render"


def _is_rendered(
    template: ChatTemplate, prompt: str, messages: Sequence[Message], place: int, context: Context
) -> bool:
    """Whether the content of a message is in the prompt, as it is or in a form of the template's own."""
    content = messages[place]["content"].strip()
    if content in prompt or json.dumps(content, ensure_ascii=False)[1:-1] in prompt:
        return True
    return template.shows(_replaced(messages, place, {**messages[place], "content": SENTINEL}), [SENTINEL], context)


def _unread_keys(template: ChatTemplate, messages: Sequence[Message], context: Context) -> Iterator[str]:
    """Of the messages' keys without a usual meaning those that change nothing in the rendered text."""
    for place, message in enumerate(messages):
        for key, value in message.items():
            if key in _USUAL_KEYS or value in ("", [], {}):
                continue
            without = _replaced(messages, place, {name: item for name, item in message.items() if name != key})
            try:
                unread = template.render(without, context) == template.render(messages, context)
            except BadRow:
                unread = False
            if unread:
                yield f"{key!r} of a message, which the chat template never reads"


def _replaced(messages: Sequence[Message], place: int, message: Message) -> list[Message]:
    return [*messages[:place], message, *messages[place + 1 :]]
