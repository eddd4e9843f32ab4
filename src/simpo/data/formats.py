"""Reads comparisons, conversations, judged responses and prompts from rows, and flags suspect rows.

:mod:`simpo.data.shapes` converts other tools' rows to these columns first. Unused columns are carried through. Columns
that match no known shape raise :class:`simpo.data.rows.UnknownShape`, bad values :class:`simpo.data.rows.BadRow`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from simpo.data.messages import (
    CONTEXT_COLUMNS,
    IMAGE,
    IMAGE_IN_TEXT,
    PROMPTING_ROLES,
    ROLES,
    TRAIN,
    Context,
    Message,
    Response,
    apply_context,
    drop_train_key,
    is_transcript,
    kind_of,
    read_messages,
    split_transcripts,
)
from simpo.data.rows import BadRow, UnknownShape, columns_of, other_columns
from simpo.data.shapes import ASKED_COLUMNS, read_label, texts_of

COMPARISON_SHAPES = (
    "{prompt, chosen, rejected} (strings or message lists), "
    "{chosen, rejected} (transcripts or message lists), {prompt, responses, scores}"
)
CONVERSATION_SHAPES = "{messages} (a conversation), {prompt, completion} (strings or message lists)"
FEEDBACK_SHAPES = "{prompt, completion, label} (strings or message lists, with true or false, or 1 or 0)"
PROMPT_SHAPES = f"{COMPARISON_SHAPES}, {{messages}}, {{prompt}} (a string or messages)"


@dataclass(frozen=True)
class Comparison:
    """One prompt and its responses, best first."""

    prompt: str | list[Message]  # text, or the messages up to and including the one to answer
    # Texts if the prompt is text, otherwise assistant messages: at least two, one if it is judged on its own, or none
    # if only the prompt is needed.
    responses: tuple[Response, ...]
    where: str  # where the row comes from, e.g. `"train.jsonl:12"`
    extra: dict[str, Any] = field(default_factory=dict)  # the row's other columns
    scores: tuple[float, ...] | None = None  # K-wise rows: one per response, in the same order; None for pairs
    label: bool | None = None  # whether a response that is judged on its own is desirable
    context: Context = field(default_factory=Context)  # tools, variables for the chat template, and images


@dataclass(frozen=True)
class Conversation(Comparison):
    """A prompt and the turns that follow it; the assistant's turns are trained on.

    ``prompt`` holds the messages before the first turn that is trained on. ``responses`` holds the one text after a
    text prompt, otherwise the messages that follow, the first and last of which are the assistant's.
    """

    unanswered: int = 0  # number of messages dropped after the last one that is trained on
    scored: tuple[int, ...] = ()  # indices of the `responses` that are trained on; empty for text


def is_comparison(row: Mapping[str, Any]) -> bool:
    """Whether a row's column names are those of a comparison."""
    columns = set(row)
    return {"chosen", "rejected"} <= columns or {"prompt", "responses", "scores"} <= columns


def read_comparison(row: Mapping[str, Any], where: str, roles: Collection[str] = ROLES) -> Comparison:
    """Read a comparison from a row; the responses of a K-wise row are sorted by descending score.

    ``roles`` lists the roles that messages may have.
    """
    if not is_comparison(row):
        columns, hint = set(row), ""
        if {"prompt", "completion", "label"} <= columns:
            hint = " (unpaired feedback, not comparisons: use objective: kto)"
        elif {"prompt", "responses"} <= columns:
            hint = " (responses without scores to rank them by: use simpo annotate, then simpo pair)"
        elif {"prompt", "completion"} <= columns or "messages" in columns:
            hint = " (data for supervised fine-tuning, not comparisons: use simpo sft)"
        raise UnknownShape(f"no recognized shape: columns {columns_of(row)}{hint}")
    scores, used = None, ("prompt", "chosen", "rejected")
    if {"chosen", "rejected"} <= set(row):
        prompt, responses = _read_responses(row.get("prompt"), (row["chosen"], row["rejected"]), used[1:], roles)
    else:
        ranked, scores = _ranked(row["responses"], row["scores"])
        prompt, responses = _read_responses(row["prompt"], ranked, ("a response",) * len(ranked), roles)
        used = ("prompt", "responses", "scores")
    prompt, answers, context = apply_context(row, prompt, responses)
    extra = other_columns(row, *used, *CONTEXT_COLUMNS)
    return Comparison(prompt, tuple(answers), where, extra, scores, context=context)


def _ranked(responses: object, scores: object) -> tuple[list[Any], tuple[float, ...]]:
    """Sort responses and their scores by descending score; ties keep their order."""
    if not isinstance(responses, list) or not isinstance(scores, list):
        raise BadRow("responses and scores are not lists")
    if len(responses) != len(scores):
        raise BadRow("responses and scores differ in number")
    if len(responses) < 2:
        raise BadRow("fewer than two responses")
    if not all(map(is_number, scores)):
        raise BadRow("a score is not a number")
    if min(scores) == max(scores):
        raise BadRow("all scores are equal")
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return [responses[index] for index in order], tuple(float(scores[index]) for index in order)


def is_number(score: object) -> bool:
    """Whether a cell is a finite number within the range of a float."""
    return isinstance(score, int | float) and not isinstance(score, bool) and abs(score) <= sys.float_info.max


def read_feedback(row: Mapping[str, Any], where: str, roles: Collection[str] = ROLES) -> Comparison:
    """Read a prompt, its one response and the response's label; ``roles`` lists the roles that messages may have."""
    used = ("prompt", "completion", "label")
    if not set(used) <= set(row):
        raise UnknownShape(f"no recognized shape: columns {columns_of(row)}")
    label = read_label(row["label"])
    if label is None:
        raise BadRow("label is neither true nor false (1 or 0)")
    prompt, responses = _read_responses(row["prompt"], (row["completion"],), ("completion",), roles)
    prompt, answers, context = apply_context(row, prompt, responses)
    extra = other_columns(row, *used, *CONTEXT_COLUMNS)
    return Comparison(prompt, tuple(answers), where, extra, label=label, context=context)


def _read_responses(
    prompt: object, responses: Sequence[Any], names: Sequence[str], roles: Collection[str]
) -> tuple[str | list[Message], tuple[Response, ...]]:
    """Read a prompt and its responses.

    ``prompt`` is None if the responses contain it. A response is text, messages that follow the prompt, or a whole
    conversation; ``names`` holds what error messages call each response.
    """
    for response, name in zip(responses, names, strict=True):
        _check_text_or_messages(response, name)
    if prompt is not None and not isinstance(prompt, str | list):
        raise BadRow(f"prompt is {kind_of(prompt)}, not text or messages")
    texts = tuple(response for response in responses if isinstance(response, str))
    if len(texts) < len(responses) or isinstance(prompt, list):
        return _split_conversations(prompt, responses, names, roles)
    # If the responses are whole transcripts, the prompt only repeats what they have in common.
    if prompt is not None and not all(map(is_transcript, texts)):
        if is_transcript(prompt) and any(text.lstrip().startswith(prompt.strip()) for text in texts):
            raise BadRow("one response repeats the prompt's transcript, but another one does not")
        return prompt, texts
    split = split_transcripts(texts)
    if split is None:
        raise BadRow(
            "no prompt column, and the transcripts share no '\\n\\nAssistant:'; if another column has the prompt, "
            "rename it with column_mapping"
        )
    return split


def _check_text_or_messages(value: object, name: str) -> None:
    if not isinstance(value, str | list | dict):
        raise BadRow(f"{name} is {kind_of(value)}, not text or messages")


def _read_opening(prompt: str | list[Message] | None, roles: Collection[str]) -> list[Message]:
    """Return a prompt as messages; text becomes a user message."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [] if prompt is None else read_messages(prompt, "prompt", images=True, roles=roles)


def _split_conversations(
    prompt: str | list[Message] | None, responses: Sequence[object], names: Sequence[str], roles: Collection[str]
) -> tuple[list[Message], tuple[Message, ...]]:
    """Split conversations into the messages that they share and the one assistant message that ends each of them."""
    opening = _read_opening(prompt, roles)
    endings = [
        read_messages(response, name, images=True, roles=roles) for response, name in zip(responses, names, strict=True)
    ]
    for ending, name in zip(endings, names, strict=True):
        if not ending[-1].get(TRAIN, True):
            raise BadRow(f"{name} ends with a message that is not trained on (weight 0 or train false)")
    opening = drop_train_key(opening)
    conversations = [_whole_conversation(prompt, opening, drop_train_key(ending)) for ending in endings]
    for conversation, name in zip(conversations, names, strict=True):
        if conversation[-1]["role"] != "assistant":
            raise BadRow(f"{name} does not end with an assistant message")
    first = conversations[0]
    shared = min(map(len, conversations)) - 1
    shared = next((i for i in range(shared) if any(other[i] != first[i] for other in conversations)), shared)
    if any(len(conversation) != shared + 1 for conversation in conversations):
        raise BadRow("the conversations differ in more than their last message")
    if not shared or first[shared - 1]["role"] not in PROMPTING_ROLES:
        raise BadRow("the prompt does not end with a user message")
    return first[:shared], tuple(conversation[-1] for conversation in conversations)


def _whole_conversation(prompt: object, opening: list[Message], messages: list[Message]) -> list[Message]:
    """Return the whole conversation; ``messages`` may be all of it, or only what follows ``opening``."""
    if messages[: len(opening)] == opening:
        return messages
    if messages[0]["role"] == "assistant" or opening[-1]["role"] == "system":
        return opening + messages
    if isinstance(prompt, str):
        # UltraFeedback-binarized: the prompt only repeats what the conversations have in common.
        return messages
    raise BadRow("the conversations do not start with the prompt")


def read_conversation(row: Mapping[str, Any], where: str, roles: Collection[str] = ROLES) -> Conversation:
    """Read a conversation from a row; ``messages`` takes precedence over other columns.

    ``roles`` lists the roles that messages may have.
    """
    columns = set(row)
    if "messages" in columns:
        extra = other_columns(row, "messages", *CONTEXT_COLUMNS)
        return _split_turns(row, [], _read_dialogue(row["messages"], roles), where, extra)
    if not {"prompt", "completion"} <= columns or "label" in columns:
        hint = " (comparisons: use simpo train)" if is_comparison(row) else ""
        if {"prompt", "completion", "label"} <= columns:
            hint = " (unpaired feedback, which includes undesirable responses)"
        raise UnknownShape(f"no recognized shape: columns {columns_of(row)}{hint}")
    extra = other_columns(row, "prompt", "completion", *CONTEXT_COLUMNS)
    for name in ("prompt", "completion"):
        _check_text_or_messages(row[name], name)
    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        prompt, rest, context = apply_context(row, row["prompt"], [row["completion"]])
        if isinstance(prompt, str):
            return Conversation(prompt, tuple(rest), where, extra, context=context)
        return Conversation(prompt, tuple(rest), where, extra, context=context, scored=(0,))
    completion = read_messages(row["completion"], "completion", images=True, roles=roles)
    return _split_turns(row, _read_opening(row["prompt"], roles), completion, where, extra)


def _read_dialogue(value: object, roles: Collection[str]) -> list[Message]:
    """Read the messages of a cell that holds a whole conversation."""
    if not isinstance(value, list):
        raise BadRow(f"messages is {kind_of(value)}, not a list of messages")
    return read_messages(value, "messages", images=True, roles=roles)


def _split_turns(
    row: Mapping[str, Any], prompt: list[Message], rest: list[Message], where: str, extra: dict[str, Any]
) -> Conversation:
    """Split messages before the first and after the last answer that is trained on."""
    if prompt and rest[0]["role"] != "assistant":
        raise BadRow("completion does not start with an assistant message")
    messages = [*prompt, *rest]
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None:
        raise BadRow("no assistant message")
    if not first and not prompt:
        raise BadRow("the conversation starts with an assistant message")
    for before, message in pairwise(messages[max(0, len(prompt) - 1) :]):
        if message["role"] == "assistant" and before["role"] not in PROMPTING_ROLES:
            raise BadRow("an assistant message does not follow a user or tool message")
    learned = [
        i
        for i, message in enumerate(messages)
        if i >= len(prompt) and message["role"] == "assistant" and message.get(TRAIN, True)
    ]
    if not learned:
        raise BadRow("no answer to train on: all of them have weight 0 or train false")
    messages = drop_train_key(messages)
    start, end = learned[0], learned[-1] + 1
    opening, following, context = apply_context(row, messages[:start], messages[start:end])
    return Conversation(
        *(opening, tuple(following), where, extra),
        context=context,
        unanswered=len(messages) - end,
        scored=tuple(i - start for i in learned),
    )


def read_prompt(
    row: Mapping[str, Any], where: str, roles: Collection[str] = ROLES, *, images: bool = False
) -> Comparison:
    """Read the prompt of a row, as a comparison without responses; images make a bad row unless ``images`` is set.

    The columns of a comparison take precedence, then ``messages``, then ``prompt``. ``roles`` lists the roles that
    messages may have.
    """
    if is_comparison(row):
        comparison = read_comparison(row, where, roles)
        _check_images(comparison.context, images)
        return replace(comparison, responses=(), scores=None)
    if "messages" in row:
        name, messages = "messages", _read_dialogue(row["messages"], roles)
        asking = [i for i, message in enumerate(messages) if message["role"] in PROMPTING_ROLES]
        if not asking:
            raise BadRow("no user message")
        value: Any = drop_train_key(messages[: asking[-1] + 1])
    elif "prompt" in row:
        name, value = "prompt", row["prompt"]
        if isinstance(value, list):
            value = drop_train_key(read_messages(value, "prompt", images=True, roles=roles))
            if value[-1]["role"] not in PROMPTING_ROLES:
                raise BadRow("the prompt does not end with a user message")
        elif not isinstance(value, str):
            raise BadRow(f"prompt is {kind_of(value)}, not text or messages")
    else:
        raise UnknownShape(f"no recognized shape: columns {columns_of(row)}")
    prompt, _, context = apply_context(row, value)
    _check_images(context, images)
    return Comparison(prompt, (), where, other_columns(row, name, *CONTEXT_COLUMNS), context=context)


def _check_images(context: Context, accepted: bool) -> None:
    if context.images and not accepted:
        raise BadRow("the prompt has images, but answers are sampled for text only; remove the row")


# ---- Rows that are used even though they are probably faulty, and question columns that are not used.

# Score columns of a pair, whose difference reward models can use as a margin.
SCORE_COLUMNS = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))
# Columns in which public datasets rate the chosen response; the columns for the rejected one are named alike.
_RATING = re.compile(r"(?=.*(?:score|rating|reward)).*chosen")
_SERIALIZED_LIST = re.compile(r"""\s*\[\s*(["']).*\1\s*\]\s*""", re.DOTALL)
# In characters. Many good answers begin by repeating a shorter prompt, such as a greeting.
_MIN_PROMPT_LENGTH = 20


def suspicions(row: Mapping[str, Any], content: Comparison, options: Collection[str] = ()) -> Iterator[str]:
    """Yield status entries (:meth:`simpo.data.rows.DataReport.of`) for anything suspect in a row, read as ``content``.

    ``options`` are the chat template's variables, which belong in a row's ``chat_template_kwargs``.
    """
    for name, value in content.extra.items():
        if name in options and value is not None:
            yield f"ignored: column {name!r}, a variable of the chat template that belongs in chat_template_kwargs"
    has_turns = isinstance(content, Conversation)
    following = _texts(content.responses)
    openings = [text.lstrip() for text in (following[:1] if has_turns else following)]
    for name in ASKED_COLUMNS:
        # Messages may include an answer, which is only missed if answers are read.
        unread = name == "prompt" or (name in content.extra and (openings or isinstance(row[name], str)))
        question_texts = list(texts_of(row.get(name))) if unread else []
        if question_texts and _any_missing(question_texts, [*_texts(content.prompt), *following]):
            yield f"ignored: column {name!r}, which does not occur in the conversation"
    asked = _texts(content.prompt, "user")
    if not all(text.strip() for text in asked):
        yield "suspect: a user message is empty"
    if isinstance(content.prompt, str) and all(map(_SERIALIZED_LIST.fullmatch, [content.prompt, *openings])):
        yield "suspect: prompt and answers are lists serialized as text"
    question = asked[-1].replace(IMAGE, "").strip() if asked else ""
    if len(question) >= _MIN_PROMPT_LENGTH and openings and all(text.startswith(question) for text in openings):
        yield "suspect: every answer starts with the whole prompt, which is scored as part of it"
    for better in () if has_turns else filter(_RATING.match, row):
        worse = better.replace("chosen", "rejected")
        scores = [row[name] for name in (better, worse) if is_number(row.get(name))]
        if len(scores) == 2 and scores[0] <= scores[1]:
            yield f"suspect: {better} is not higher than {worse}"


def _any_missing(given: list[str], texts: list[str]) -> bool:
    """Whether any of the ``given`` texts is missing from the ``texts`` that were read from its row.

    A transcript prompt occurs in none of them, but contains some.
    """
    read = [words for text in texts if (words := _normalize_whitespace(text))]
    joined = " ".join(read)
    for text in given:
        words = _normalize_whitespace(text)
        contains_some = is_transcript(text) and any(part in words for part in read)
        if words not in joined and not contains_some:
            return True
    return False


def _normalize_whitespace(text: str) -> str:
    return " ".join(text.replace(IMAGE_IN_TEXT, " ").replace(IMAGE, " ").split())


def _texts(items: str | Sequence[Response], *roles: str) -> list[str]:
    """Return one text, or those of several answers or messages, as a list; ``roles`` selects messages by role."""
    responses = [items] if isinstance(items, str) else items
    messages = [{"content": item} if isinstance(item, str) else item for item in responses]
    return [message["content"] for message in messages if not roles or message.get("role") in (None, *roles)]
