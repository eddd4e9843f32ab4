"""Comparisons and conversations, recognized by the columns of a row and their types."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from simpo.data.context import CONTEXT_COLUMNS, Context, read_context
from simpo.data.messages import (
    ASKING,
    TRAIN,
    Message,
    check_text_or_messages,
    is_whole_transcript,
    kind_of,
    read_messages,
    read_opening,
    split_transcripts,
    without_train,
)
from simpo.data.rows import BadRow, UnknownShape, columns_of, other_columns

# A response is the text that follows a string prompt, or the assistant's message that ends a conversation.
Response = str | Message


SHAPES = (
    "{prompt, chosen, rejected} (strings or message lists), "
    "{chosen, rejected} (transcripts or message lists), {prompt, responses, scores}"
)


@dataclass(frozen=True)
class Comparison:
    """One prompt and its responses, best first.

    Attributes:
        prompt: text, or the messages up to the one that is answered.
        responses: one text each if the prompt is text, else one assistant message each; at least two, one where it is
            judged alone, or none where only the prompt is asked for.
        extra: the row's other columns.
        where: where the row comes from, e.g. ``"train.jsonl:12"``.
        scores: of a K-wise row, in the order of ``responses``; None of a pair.
        context: tools and variables for the chat template.
    """

    prompt: str | list[Message]
    responses: tuple[Response, ...]
    where: str
    extra: dict[str, Any] = field(default_factory=dict)
    scores: tuple[float, ...] | None = None
    context: Context = field(default_factory=Context)


def recognise(row: Mapping[str, Any], where: str) -> Comparison:
    """Turn a row of any known shape into a comparison.

    Raises:
        UnknownShape: its columns are of no known shape.
        BadRow: its columns are, but their values are not.
    """
    check_shape(row)
    if {"chosen", "rejected"} <= set(row):
        prompt, responses = read_responses(row.get("prompt"), (row["chosen"], row["rejected"]), ("chosen", "rejected"))
        used, scores = ("prompt", "chosen", "rejected"), None
    else:
        prompt, responses, scores = _ranking(row)
        used = ("prompt", "responses", "scores")
    prompt, found, context = read_context(row, prompt, responses)
    return Comparison(prompt, tuple(found), where, other_columns(row, *used, *CONTEXT_COLUMNS), scores, context)


def check_shape(row: Mapping[str, Any]) -> None:
    """Look at a row's column names only.

    Raises:
        UnknownShape: they are of no known shape.
    """
    if not is_comparison(row):
        raise UnknownShape(f"no recognised shape: columns {columns_of(row)}{_hint(set(row))}")


def is_comparison(row: Mapping[str, Any]) -> bool:
    """Whether a row's column names are those of a comparison."""
    columns = set(row)
    return {"chosen", "rejected"} <= columns or {"prompt", "responses", "scores"} <= columns


def _hint(columns: set[str]) -> str:
    if {"prompt", "completion", "label"} <= columns:
        return " (unpaired feedback, not comparisons: objective kto)"
    if {"prompt", "responses"} <= columns:
        return " (responses without scores, which say how they are ranked)"
    if {"prompt", "completion"} <= columns or "messages" in columns:
        return " (data for supervised fine-tuning, not comparisons: simpo sft)"
    return ""


def _ranking(row: Mapping[str, Any]) -> tuple[str | list[Message], tuple[Response, ...], tuple[float, ...]]:
    """K-wise rows: the responses sorted by score, the highest first; ties keep their order."""
    responses, scores = row["responses"], row["scores"]
    if not isinstance(responses, list) or not isinstance(scores, list):
        raise BadRow("responses and scores are not lists")
    if len(responses) != len(scores):
        raise BadRow("as many scores as responses are needed")
    if len(responses) < 2:
        raise BadRow("fewer than two responses")
    if not all(is_number(score) for score in scores):
        raise BadRow("a score is not a number")
    if min(scores) == max(scores):
        raise BadRow("all scores are equal")
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    ranked = tuple(responses[index] for index in order)
    prompt, ordered = read_responses(row["prompt"], ranked, ("a response",) * len(ranked))
    return prompt, ordered, tuple(float(scores[index]) for index in order)


def is_number(score: object) -> bool:
    """Whether a cell is a finite number that a float can hold."""
    return isinstance(score, int | float) and not isinstance(score, bool) and abs(score) <= sys.float_info.max


def read_responses(
    prompt: object, responses: Sequence[object], names: Sequence[str]
) -> tuple[str | list[Message], tuple[Response, ...]]:
    """A prompt and its responses, from cells of any accepted kind.

    Args:
        prompt: text, messages or None, where the responses hold it.
        responses: text, messages that follow the prompt, or whole conversations.
        names: what each response is called in messages.

    Raises:
        BadRow: they are not such, or have no prompt in common.
    """
    for response, name in zip(responses, names, strict=True):
        check_text_or_messages(response, name)
    if prompt is not None and not isinstance(prompt, str | list):
        raise BadRow(f"prompt is {kind_of(prompt)}, not text or messages")
    texts = tuple(response for response in responses if isinstance(response, str))
    if len(texts) < len(responses) or isinstance(prompt, list):
        return _conversation(prompt, responses, names)
    # Where the responses are whole transcripts, the prompt only names what they share.
    if prompt is not None and not all(map(is_whole_transcript, texts)):
        return prompt, texts
    split = split_transcripts(texts)
    if split is None:
        raise BadRow("no prompt column, and the transcripts share no '\\n\\nAssistant:'")
    return split


def _conversation(
    prompt: str | list[Message] | None, responses: Sequence[object], names: Sequence[str]
) -> tuple[list[Message], tuple[Message, ...]]:
    """Message lists: the prompt is what the whole conversations share, then one assistant turn each."""
    opening = read_opening(prompt)
    endings = [read_messages(response, name) for response, name in zip(responses, names, strict=True)]
    for ending, name in zip(endings, names, strict=True):
        if not ending[-1].get(TRAIN, True):
            raise BadRow(f"{name} ends with a message that is not trained on (weight 0 or train false)")
    endings, opening = [without_train(ending) for ending in endings], without_train(opening)
    conversations = [_whole(prompt, opening, ending) for ending in endings]
    for conversation, name in zip(conversations, names, strict=True):
        if conversation[-1]["role"] != "assistant":
            raise BadRow(f"{name} does not end with the assistant's message")
    shared = _shared_length(conversations)
    if any(len(conversation) != shared + 1 for conversation in conversations):
        raise BadRow("the conversations differ in more than their last message")
    if not shared or conversations[0][shared - 1]["role"] not in ASKING:
        raise BadRow("the prompt does not end with a user message")
    return conversations[0][:shared], tuple(conversation[-1] for conversation in conversations)


def _whole(prompt: object, opening: list[Message], messages: list[Message]) -> list[Message]:
    """The whole conversation, of which ``messages`` are the end or all."""
    if messages[: len(opening)] == opening:
        return messages
    if messages[0]["role"] == "assistant" or opening[-1]["role"] == "system":
        return opening + messages
    if isinstance(prompt, str):
        # UltraFeedback-binarized: the text next to the transcripts only names what they share.
        return messages
    raise BadRow("the conversations do not start with the prompt")


def _shared_length(conversations: Sequence[list[Message]]) -> int:
    """Number of leading messages that all share, their last ones excepted."""
    shortest = min(len(conversation) for conversation in conversations) - 1
    first = conversations[0]
    return next((i for i in range(shortest) if any(other[i] != first[i] for other in conversations)), shortest)


# ---- Conversations for supervised fine-tuning, recognised by the columns of a row and their types.


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
        return _read_row(row, [], read_conversation(row["messages"]), where, extra)
    extra = other_columns(row, "prompt", "completion", *CONTEXT_COLUMNS)
    for name in ("prompt", "completion"):
        check_text_or_messages(row[name], name)
    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        prompt, rest, context = read_context(row, row["prompt"], [row["completion"]])
        if isinstance(prompt, str):
            return Conversation(prompt, rest[0], where, extra, context=context)
        return Conversation(prompt, rest, where, extra, scored=(0,), context=context)
    return _read_row(row, read_opening(row["prompt"]), read_messages(row["completion"], "completion"), where, extra)


def _read_row(
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
    raise UnknownShape(f"no recognised shape: columns {columns_of(row)}{_shape_hint(columns)}")


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


def _shape_hint(columns: set[str]) -> str:
    if {"prompt", "completion", "label"} <= columns:
        return " (unpaired feedback, not only what is to be learnt)"
    if {"chosen", "rejected"} <= columns or {"prompt", "responses", "scores"} <= columns:
        return " (comparisons: simpo train)"
    return ""


def _check_roles(messages: list[Message]) -> None:
    for message in messages:
        if message["role"] not in _ROLES:
            raise BadRow(f"a message's role is {message['role']!r}, not one of {', '.join(_ROLES)}")
