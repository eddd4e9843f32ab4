"""Reads messages from conversations and transcripts of any dataset, and the context that applies to all of them.

Anything that cannot be read raises :class:`simpo.data.rows.BadRow`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from simpo.data.rows import BadRow
from simpo.data.settings import RESERVED_KWARGS

Message = dict[str, Any]
# The text that follows a string prompt, or the assistant message that ends a conversation.
Response = str | Message

# Roles whose messages the assistant answers.
PROMPTING_ROLES = ("user", "tool")
# Keys that may hold a message's reasoning; chat templates differ in which one they read.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Roles that are always accepted; a chat template may name others.
ROLES = ("system", "developer", "user", "assistant", "tool")
# The key for whether an assistant message is trained on; chat templates never see it.
TRAIN = "train"
_TRAIN_KEYS = ("weight", "train", "train_on_turn", "training", "loss")
# Placeholder for an image in a message's content: a noncharacter that Unicode reserves for internal use.
IMAGE = "\ufdd0"
# Placeholder that other tools write for an image in text content.
IMAGE_IN_TEXT = "<image>"
_UNSUPPORTED_KEYS = ("images", "image", "videos", "video", "audio", "audios", "train_detail", "training_detail")
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_messages(
    value: object, name: str, *, images: bool = False, roles: Collection[str] | None = None
) -> list[Message]:
    """Validate messages and normalize them.

    Null fields, which Arrow adds, and system messages without content are left out. Content becomes text: text parts
    are joined, and a message with only tool calls or reasoning gets ``""``. Tool calls become ``{"type", "function":
    {"name", "arguments"}, ...}``. The key ``train`` is present if the message has it under any of its names. ``value``
    is a list of messages, one message or text (the assistant's); error messages call it ``name``. With ``images``,
    content may include parts of type ``image``, each of which becomes the character :data:`IMAGE`.

    Raises:
        BadRow: the value cannot be read as messages, or a role is not in ``roles``.
    """
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    items = [value] if isinstance(value, dict) else value if isinstance(value, list) else []
    messages = [message for item in items if (message := _read_message(item, name, images)) is not None]
    if not messages:
        raise BadRow(f"{name} has no messages")
    if roles is not None and (unknown := [message["role"] for message in messages if message["role"] not in roles]):
        raise BadRow(
            f"a message has the role {unknown[0]!r}, which is neither one of {', '.join(ROLES)} nor named in the chat "
            "template"
        )
    return messages


def _read_message(item: object, name: str, images: bool) -> Message | None:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str):
        raise BadRow(f"{name} contains something other than messages with role and content")
    message = {key: value for key, value in item.items() if value is not None and not (key in REASONING and not value)}
    if key := next((key for key in _UNSUPPORTED_KEYS if message.get(key)), None):
        raise BadRow(f"{name} has a message with {key!r}, which is not supported")
    reasoning = {key: _text(message[key], name, key) for key in REASONING if key in message}
    if len(set(reasoning.values())) > 1:
        raise BadRow(f"{name} has a message whose {' and '.join(reasoning)} differ")
    message |= reasoning
    calls = _read_calls(message.pop("tool_calls", None), message.pop("function_call", None), name)
    if calls:
        message["tool_calls"] = calls
    if message["role"] in ("function", "ipython"):  # OpenAI's older name, and Llama 3's
        message["role"] = "tool"
    content = _text(message.get("content"), name, images=images)
    if content is None:
        if message["role"] in ("system", "developer"):
            if not message.get("tools"):
                return None
        elif not (calls or any(map(message.get, REASONING))):
            raise BadRow(f"{name} has a message whose content is null, not text")
        content = ""
    if reasoning and content.lstrip().startswith("<think>"):
        raise BadRow(f"{name} has a message with both {next(iter(reasoning))} and <think>; keep one of them")
    return _normalize_train_key({**message, "content": content}, name)


def _text(content: object, name: str, key: str = "content", *, images: bool = False) -> str | None:
    """Return the text of a message's content (or of another key) with its parts joined; None if there is none.

    With ``images``, parts may be images; each becomes :data:`IMAGE`.
    """
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow(f"{name} has a message whose {key} is {kind_of(content)}, not text")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise BadRow(f"{name} has a message whose content is a list of {kind_of(part)}, not of parts")
        kind = part.get("type", "text")
        if kind == "image" and images:
            if other := next((key for key, value in part.items() if key != "type" and value), None):
                raise BadRow(f"{name} has an image with {other!r}; put the images in the column images, in order")
            texts.append(IMAGE)
            continue
        if kind not in _TEXT_PARTS:
            raise BadRow(f"{name} has a content part of type {kind!r}; only text is supported")
        if not isinstance(part.get("text"), str):
            raise BadRow(f"{name} has a content part without text")
        texts.append(part["text"])
    return "".join(texts) if texts else None


def _read_calls(value: object, legacy: object, name: str) -> list[Message]:
    """Normalize tool calls; ``legacy`` is OpenAI's legacy ``function_call``."""
    value = _from_json(value, f"tool_calls of {name}") or ([{"function": legacy}] if legacy else [])
    if not isinstance(value, list):
        raise BadRow(f"{name} has tool_calls that are {kind_of(value)}, not a list")
    calls = []
    for call in value:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"{name} has a tool call without a function name")
        outer = {key: item for key, item in call.items() if item is not None and "function" in call}
        inner = {key: item for key, item in function.items() if item is not None}
        inner["arguments"] = inner.get("arguments") or {}
        if not isinstance(inner["arguments"], str | dict):
            kind = kind_of(inner["arguments"])
            raise BadRow(f"{name} has tool arguments that are {kind}, not an object or JSON text")
        calls.append({**outer, "type": outer.get("type", "function"), "function": inner})
    return calls


def _normalize_train_key(message: Message, name: str) -> Message:
    """Replace the keys that other tools use with the key ``train``."""
    given = {key: message[key] for key in _TRAIN_KEYS if key in message}
    rest = {key: value for key, value in message.items() if key not in given}
    for key, value in given.items():
        if value not in (0, 1) or not isinstance(value, bool | int | float):
            raise BadRow(f"{name} has a message with {key}: {value!r}; only 0 and 1 (false and true) are supported")
    if len(set(map(bool, given.values()))) > 1:
        raise BadRow(f"{name} has a message whose {' and '.join(given)} contradict each other")
    if given and rest["role"] != "assistant":
        if any(given.values()):
            raise BadRow(f"{name} has a {rest['role']} message with {next(iter(given))}; only answers are trained on")
        return rest
    return {**rest, TRAIN: all(given.values())} if given else rest


def drop_train_key(messages: Sequence[Message]) -> list[Message]:
    """Return the messages without the key ``train``."""
    return [{key: value for key, value in message.items() if key != TRAIN} for message in messages]


def reasoning_of(message: Mapping[str, Any]) -> str:
    """Return the reasoning that a message has under a separate key; "" if there is none."""
    return next((text for key in REASONING if isinstance(text := message.get(key), str) and text.strip()), "")


def split_reasoning(message: Message) -> tuple[str, str]:
    """Return the reasoning and content of an assistant message; the reasoning may have its own key or be in tags."""
    content = message["content"]
    if reasoning := reasoning_of(message).strip():
        return reasoning, content
    head, end, rest = content.partition("</think>")
    if not end or (head.lstrip() and "<think>" in head and not head.lstrip().startswith("<think>")):
        return "", content
    return head.rpartition("<think>")[2].strip(), rest.lstrip("\n")


def kind_of(value: object) -> str:
    """Return the type of a cell, for error messages."""
    return "null" if value is None else type(value).__name__


# ---- Transcripts in the style of Anthropic's HH-RLHF: ``\n\nHuman: ... \n\nAssistant: ...`` (arXiv 2204.05862).

_CUE = re.compile(r"\n\n(Human|Assistant):")
_LOOSE_CUE = re.compile(r"(?:\A|\n)\s*(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def split_transcripts(transcripts: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
    """Split transcripts at the last assistant cue that they share.

    Returns:
        The prompt up to and including the cue, and the rest of each transcript, unchanged; ``None`` if they share no
        cue.
    """
    shared = os.path.commonprefix(list(transcripts))  # noqa: RUF071 - texts, not paths
    ends = [cue.end() for cue in _cue_pattern(transcripts[0]).finditer(shared) if cue[1] == "Assistant"]
    if not ends:
        return None
    responses = tuple(text[ends[-1] :] for text in transcripts)
    if any(re.search(r"\n\s*Human:", response) for response in responses):
        raise BadRow("the transcripts differ in more than their last answer")
    return transcripts[0][: ends[-1]], responses


def is_transcript_prompt(prompt: str) -> bool:
    """Whether a prompt is a transcript that ends where the assistant should answer."""
    return is_transcript(prompt) and re.search(r"\n\s*Assistant:\s*\Z", prompt) is not None


def is_transcript(text: str) -> bool:
    """Whether a text starts with a human turn and contains an assistant turn."""
    return re.match(r"\s*Human:", text) is not None and re.search(r"\n\s*Assistant:", text) is not None


def transcript_turns(prompt: str) -> list[Message]:
    """Return the messages of a transcript prompt (see :func:`is_transcript_prompt`) without the empty last turn."""
    pieces = _cue_pattern(prompt).split(prompt)
    messages = zip(pieces[1::2], pieces[2::2], strict=True)
    return [{"role": _ROLES[name], "content": text.strip()} for name, text in messages][:-1]


def _cue_pattern(transcript: str) -> re.Pattern[str]:
    """Return the pattern that starts a turn: after an empty line as in HH-RLHF, otherwise after any line break."""
    for cue in (_CUE, _LOOSE_CUE):
        start, *rest = cue.split(transcript)
        names = rest[::2]
        expected = ["Human", "Assistant"] * len(names)
        if len(names) > 1 and not start.strip() and names == expected[: len(names)]:
            return cue
    return _CUE


# ---- What applies to a whole conversation: system message, tools, images, and variables of the chat template.

# Columns that are applied, and thus are not among a row's other columns.
IMAGE_COLUMNS = ("images", "image")
CONTEXT_COLUMNS = ("system", "tools", "chat_template_kwargs", *IMAGE_COLUMNS)
_UNSUPPORTED_MEDIA = ("video", "videos", "audio", "audios")
# Columns that affect training in other toolkits but have no effect here.
_COLUMNS_WITHOUT_EFFECT = (
    "weight", "sample_weight", "label_probability", "functions", "documents", "context", "history",
    "custom_system_prompt", *REASONING,
)  # fmt: skip


@dataclass(frozen=True)
class Context:
    """The input of a chat template in addition to the messages."""

    tools: list[Any] | None = None  # JSON schemas of the tools that may be called; None if there are none
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # the row's variables for the template
    without_effect: tuple[str, ...] = ()  # the row's columns that have a meaning elsewhere but no effect here
    images: tuple[Any, ...] = ()  # the images as given in the row, in the order in which messages refer to them

    @property
    def columns(self) -> dict[str, Any]:
        """The columns that store tools and variables, so that written rows can be read again."""
        values = {"tools": self.tools, "chat_template_kwargs": dict(self.kwargs)}
        return {name: value for name, value in values.items() if value}


def apply_context(
    row: Mapping[str, Any], prompt: str | list[Message], following: Sequence[Response] = ()
) -> tuple[str | list[Message], Any, Context]:
    """Apply a row's columns to its prompt.

    ``following`` holds texts if the prompt is text, otherwise messages. Returns the prompt, with the system message;
    what follows it, as messages if the prompt has become messages; and the context.
    """
    if media := next((name for name in _UNSUPPORTED_MEDIA if row.get(name)), None):
        raise BadRow(f"column {media!r}: only text and images are supported")
    context = _context(row)
    system, tools, rest = row.get("system"), context.tools, following
    if not isinstance(system, str | None):
        raise BadRow(f"system is {kind_of(system)}, not text")
    if not isinstance(prompt, str):
        prompt, rest = as_messages(prompt, rest)
        prompt, tools = _extract_tools(prompt, tools)
        rest, tools = _extract_tools(rest, tools)
    if system:
        prompt, rest = as_messages(prompt, rest)
        first = prompt[0]
        if first["role"] not in ("system", "developer"):
            prompt = [{"role": "system", "content": system}, *prompt]
        elif first["content"] in ("", system):
            prompt = [{**first, "content": system}, *prompt[1:]]
        else:
            raise BadRow("the column system differs from the conversation's system message")
    images = images_of(row)
    if images or isinstance(prompt, list):
        prompt, rest = as_messages(prompt, rest)
        prompt, rest = _place_images(prompt, rest, len(images))
    without_effect = tuple(name for name in _COLUMNS_WITHOUT_EFFECT if row.get(name) not in (None, [], {}, ""))
    return prompt, rest, replace(context, tools=tools, without_effect=without_effect, images=tuple(images))


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """Return a row's images as given; raise BadRow if several columns have some."""
    columns = [value for name in IMAGE_COLUMNS if (value := row.get(name)) not in (None, [], "")]
    if len(columns) > 1:
        raise BadRow(f"columns {' and '.join(IMAGE_COLUMNS)} both have images; keep one of them")
    return [] if not columns else columns[0] if isinstance(columns[0], list) else columns


def _place_images(
    prompt: list[Message], rest: Sequence[Message], count: int
) -> tuple[list[Message], Sequence[Message]]:
    """Return the prompt's messages and those that follow, with an :data:`IMAGE` for each of ``count`` images.

    Content parts of type ``image`` already have it. If there are none, it replaces every ``<image>`` in user messages;
    without those, all images go to the beginning of the first user message.

    Raises:
        BadRow: an answer contains an image, or the number of placeholders is not the number of images.
    """
    messages = [*prompt, *rest]
    if any(message["role"] == "assistant" and IMAGE in message["content"] for message in messages):
        raise BadRow("an assistant message contains an image; answers must be text")
    places = sum(message["content"].count(IMAGE) for message in messages)
    asking = [message["content"] for message in messages if message["role"] == "user"]
    if count and asking and not places:
        if places := sum(content.count(IMAGE_IN_TEXT) for content in asking):
            asking = [content.replace(IMAGE_IN_TEXT, IMAGE) for content in asking]
        else:
            places, asking[0] = count, IMAGE * count + asking[0]
        written = iter(asking)
        messages = [
            {**message, "content": next(written)} if message["role"] == "user" else message for message in messages
        ]
    if places != count:
        raise BadRow(f"the number of images ({count}) does not match the placeholders in the messages ({places})")
    return messages[: len(prompt)], messages[len(prompt) :]


def as_messages(prompt: str | list[Message], following: Sequence[Response]) -> tuple[list[Message], list[Message]]:
    """Return a prompt and what follows it as messages; a transcript is split into its turns."""
    if not isinstance(prompt, str):
        return prompt, [message for message in following if isinstance(message, dict)]
    texts = [str(text) for text in following]
    opening: list[Message] = [{"role": "user", "content": prompt}]
    if is_transcript_prompt(prompt):
        opening, texts = transcript_turns(prompt), [text.strip() for text in texts]
        if opening[-1]["role"] != "user":
            raise BadRow("the prompt does not end with a user message")
    return opening, [{"role": "assistant", "content": text} for text in texts]


def context_of(row: Mapping[str, Any]) -> Context:
    """Read an answered prompt's context from its row; images make a bad row, because judges do not see them."""
    if images_of(row):
        raise BadRow("images: judges only see text; remove the row")
    return _context(row)


def _context(row: Mapping[str, Any]) -> Context:
    """Read the context of a prompt, apart from system message and images, from the columns of its row."""
    tools = _read_tools(row.get("tools"))
    kwargs = _from_json(row.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise BadRow(f"chat_template_kwargs is {kind_of(kwargs)}, not a mapping")
    if reserved := sorted(RESERVED_KWARGS & set(kwargs)):
        raise BadRow(f"chat_template_kwargs has {reserved[0]!r}, which is not a variable of the template")
    return Context(tools, kwargs)


def _read_tools(value: object) -> list[Any] | None:
    """Read tools from a cell: a list of JSON schemas, each an object or JSON text, or the whole list as JSON text."""
    schemas = _from_json(value, "tools")
    if not schemas:
        return None
    if not isinstance(schemas, list):
        raise BadRow(f"tools is {kind_of(schemas)}, not a list of JSON schemas")
    tools = [_from_json(tool, "tools") for tool in schemas]
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools has an entry that is not a JSON schema")
    return tools


def _from_json(value: object, name: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise BadRow(f"{name} is text that is not JSON") from error


def _extract_tools(messages: list[Message], tools: list[Any] | None) -> tuple[list[Message], list[Any] | None]:
    """Take out the tools that some datasets store in the system message; return the messages and all tools."""
    for message in messages:
        message_tools = _read_tools(message.get("tools"))
        if message_tools is not None and tools not in (None, message_tools):
            raise BadRow("the tools in a message differ from the column tools")
        tools = message_tools or tools
    kept = [message for message in messages if message["content"] or "tools" not in message]
    return [{key: value for key, value in message.items() if key != "tools"} for message in kept], tools
