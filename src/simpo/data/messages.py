"""Messages of conversations and of transcripts: read from a cell of any data set, checked, in one form."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from simpo.data.rows import BadRow

Message = dict[str, Any]


# Whose messages an assistant's message answers.
ASKING = ("user", "tool")


# Keys under which a message's reasoning is stored; chat templates read one or another of them.
REASONING = ("reasoning_content", "thinking", "reasoning")


# Says of an assistant's message whether it is trained on; never part of what a chat template gets.
TRAIN = "train"


_TRAIN_KEYS = ("weight", "train", "train_on_turn", "training")


_UNSUPPORTED = ("images", "image", "videos", "video", "audio", "audios", "train_detail", "training_detail")


_TEXT_PARTS = ("text", "input_text", "output_text")


def read_messages(value: object, name: str) -> list[Message]:
    """Check messages (a lone text is the assistant's) and bring them into one form.

    Null fields, which Arrow adds, and system messages without content are left out. Content is text: parts of text are
    joined, and a message with tool calls or reasoning and no content has ``""``. Tool calls are
    ``{"type", "function": {"name", "arguments"}, ...}``. ``train`` is there if the message says whether it is trained
    on.

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
    found = [message for item in value if (message := _read_message(item, name)) is not None]
    if not found:
        raise BadRow(f"{name} has no messages")
    return found


def _read_message(item: object, name: str) -> Message | None:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str):
        raise BadRow(f"{name} holds something other than messages (role and content)")
    message = {key: value for key, value in item.items() if value is not None and not (key in REASONING and not value)}
    if key := next((key for key in _UNSUPPORTED if message.get(key)), None):
        raise BadRow(f"{name} has a message with {key!r}, which is not supported")
    thoughts = {key: _text(message[key], name, key) for key in REASONING if key in message}
    if len(set(thoughts.values())) > 1:
        raise BadRow(f"{name} has a message whose {' and '.join(thoughts)} differ")
    message |= thoughts
    calls = _read_calls(message.pop("tool_calls", None), message.pop("function_call", None), name)
    if calls:
        message["tool_calls"] = calls
    if message["role"] == "function":  # OpenAI's older name
        message["role"] = "tool"
    content = _text(message.get("content"), name)
    if content is None:
        if message["role"] in ("system", "developer") and not message.get("tools"):
            return None
        if message["role"] not in ("system", "developer") and not (calls or any(map(message.get, REASONING))):
            raise BadRow(f"{name} has a message whose content is null, not text")
        content = ""
    if thoughts and content.lstrip().startswith("<think>"):
        raise BadRow(f"{name} has a message with {next(iter(thoughts))} whose content has <think> too; leave one out")
    return _with_train({**message, "content": content}, name)


def _text(content: object, name: str, key: str = "content") -> str | None:
    """Text of a message's content (or of another key), of which the parts are joined; None if there is none."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow(f"{name} has a message whose {key} is {kind_of(content)}, not text")
    texts = [_part(part, name) for part in content]
    return "".join(texts) if texts else None


def _part(part: object, name: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise BadRow(f"{name} has a message whose content is a list of {kind_of(part)}, not of parts")
    kind = part.get("type", "text")
    if kind not in _TEXT_PARTS:
        raise BadRow(f"{name} has a content part of type {kind!r}; only text is supported")
    if not isinstance(part.get("text"), str):
        raise BadRow(f"{name} has a content part without text")
    return part["text"]


def _read_calls(value: object, older: object, name: str) -> list[Message]:
    """Tool calls in one form; ``older`` is what OpenAI's ``function_call`` was."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise BadRow(f"{name} has tool_calls that are text and not JSON") from error
    calls = value or ([{"function": older}] if older else [])
    if not isinstance(calls, list):
        raise BadRow(f"{name} has tool_calls that are {kind_of(calls)}, not a list")
    return [_read_call(call, name) for call in calls]


def _read_call(call: object, name: str) -> Message:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{name} has a tool call without the name of a function")
    outer = {key: item for key, item in call.items() if item is not None and "function" in call}
    inner = {key: item for key, item in function.items() if item is not None}
    if not inner.get("arguments"):
        inner["arguments"] = {}
    if not isinstance(inner["arguments"], str | dict):
        raise BadRow(
            f"{name} has tool arguments that are {kind_of(inner['arguments'])}, not an object or its JSON text"
        )
    return {**outer, "type": outer.get("type", "function"), "function": inner}


def _with_train(message: Message, name: str) -> Message:
    """The message with what it says about training under one key."""
    given = {key: message[key] for key in _TRAIN_KEYS if key in message}
    rest = {key: value for key, value in message.items() if key not in given}
    for key, value in given.items():
        if value not in (0, 1) or not isinstance(value, bool | int | float):
            raise BadRow(f"{name} has a message with {key}: {value!r}; only 0 and 1 (false and true) are supported")
    if len(set(map(bool, given.values()))) > 1:
        raise BadRow(f"{name} has a message whose {' and '.join(given)} contradict each other")
    if given and rest["role"] != "assistant":
        if any(given.values()):
            raise BadRow(f"{name} has a {rest['role']} message with {next(iter(given))}: only the assistant is trained")
        return rest
    return {**rest, TRAIN: all(given.values())} if given else rest


def without_train(messages: list[Message]) -> list[Message]:
    """Messages without what they say about training."""
    return [{key: value for key, value in message.items() if key != TRAIN} for message in messages]


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The reasoning that a message has under a key of its own; empty if there is none."""
    return next((text for key in REASONING if isinstance(text := message.get(key), str) and text.strip()), "")


def split_reasoning(message: Message) -> tuple[str, str]:
    """Reasoning and content of an assistant's message, whether it stands under a key of its own or within tags."""
    content = message["content"]
    if thought := reasoning_of(message).strip():
        return thought, content
    head, end, rest = content.partition("</think>")
    if not end or (head.lstrip() and "<think>" in head and not head.lstrip().startswith("<think>")):
        return "", content
    return head.rpartition("<think>")[2].strip(), rest.lstrip("\n")


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


# ---- Transcripts as in Anthropic's HH-RLHF: ``\n\nHuman: ... \n\nAssistant: ...`` (arXiv 2204.05862).


_CUE = re.compile(r"\n\n(Human|Assistant):")


_LOOSE_CUE = re.compile(r"(?:\A|\n)\s*(Human|Assistant):")


_ROLES = {"Human": "user", "Assistant": "assistant"}


def split_transcripts(transcripts: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
    """Split transcripts at their last shared assistant cue.

    Returns:
        The prompt, up to and including the cue, and what follows it in each transcript as it stands;
        ``None`` if they share no cue.

    Raises:
        BadRow: another turn of the human follows it.
    """
    shared = os.path.commonprefix(list(transcripts))  # noqa: RUF071 - texts, not paths
    ends = [cue.end() for cue in _cue_of(transcripts[0]).finditer(shared) if cue[1] == "Assistant"]
    if not ends:
        return None
    responses = tuple(text[ends[-1] :] for text in transcripts)
    if any(re.search(r"\n\s*Human:", response) for response in responses):
        raise BadRow("the transcripts differ in more than their last answer")
    return transcripts[0][: ends[-1]], responses


def is_transcript(prompt: str) -> bool:
    """Whether a prompt is a transcript that waits for the assistant."""
    return is_whole_transcript(prompt) and re.search(r"\n\s*Assistant:\s*\Z", prompt) is not None


def is_whole_transcript(text: str) -> bool:
    """Whether a text starts with a turn of the human and has one of the assistant."""
    return re.match(r"\s*Human:", text) is not None and re.search(r"\n\s*Assistant:", text) is not None


def turns(prompt: str) -> list[dict[str, str]]:
    """Messages of a transcript prompt (see :func:`is_transcript`), the empty last turn excepted."""
    pieces = _cue_of(prompt).split(prompt)
    messages = [
        {"role": _ROLES[name], "content": text.strip()} for name, text in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    return messages[:-1]


def _cue_of(transcript: str) -> re.Pattern[str]:
    """How the turns of a transcript begin: as in HH-RLHF, unless only with other white space they alternate."""
    alternating = [cue for cue in (_CUE, _LOOSE_CUE) if _alternates(cue.split(transcript))]
    return alternating[0] if alternating else _CUE


def _alternates(pieces: list[str]) -> bool:
    names = pieces[1::2]
    expected = ["Human", "Assistant"] * len(names)
    return len(names) > 1 and not pieces[0].strip() and names == expected[: len(names)]
