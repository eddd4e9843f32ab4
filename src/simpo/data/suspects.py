"""Rows that are used although they probably contain a mistake, and columns of questions that are not used."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from simpo.data.formats import Comparison, Conversation, is_number
from simpo.data.messages import IMAGE, IMAGE_IN_TEXT, Message, Response, is_transcript
from simpo.data.shapes import ASKED_COLUMNS, texts_of

# Columns of a pair's scores, of which reward models can take the margin.
SCORE_COLUMNS = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))
# Columns in which public data sets rate the chosen response; those of the rejected one are named alike.
_RATING = re.compile(r"(?=.*(?:score|rating|reward)).*chosen")
_LIST = re.compile(r"""\s*\[\s*(["']).*\1\s*\]\s*""", re.DOTALL)
# Characters. Many good answers begin with a shorter prompt, such as a greeting.
_LONG = 20


def suspicions(row: Mapping[str, Any], content: Comparison | Conversation, options: Collection[str] = ()) -> list[str]:
    """Status entries (:meth:`simpo.data.rows.DataReport.of`) for what is suspect in a row, read as ``content``.

    ``options`` are variables of the chat template, which a row has in ``chat_template_kwargs``.
    """
    lost = [name for name, value in content.extra.items() if name in options and value is not None]
    return [
        *(
            f"ignored: column {name!r}, a variable of the chat template; put it into chat_template_kwargs"
            for name in lost
        ),
        *_suspicions(row, content),
    ]


def _suspicions(row: Mapping[str, Any], content: Comparison | Conversation) -> Iterator[str]:
    answers = [content.completion] if isinstance(content, Conversation) else content.responses
    openings = [text.lstrip() for text in map(_text, answers)]
    for name in ASKED_COLUMNS:
        # Messages that are not read as the prompt may also hold the answer, if one is wanted.
        unread = name == "prompt" or (name in content.extra and (openings or isinstance(row[name], str)))
        given = list(texts_of(row.get(name))) if unread else []
        if given and _any_lost(given, [*_texts(content), *openings]):
            yield f"ignored: column {name!r}, which does not occur in the conversation"
    asked = [content.prompt] if isinstance(content.prompt, str) else _contents(content.prompt, "user")
    if not all(text.strip() for text in asked):
        yield "suspect: a user message is empty"
    if isinstance(content.prompt, str) and all(map(_LIST.fullmatch, [content.prompt, *openings])):
        yield "suspect: prompt and answers are lists that were written as text"
    question = asked[-1].replace(IMAGE, "").strip() if asked else ""
    if len(question) >= _LONG and openings and all(text.startswith(question) for text in openings):
        yield "suspect: every answer begins with the whole prompt, which is scored with it"
    if isinstance(content, Comparison):
        for better in filter(_RATING.match, row):
            worse = better.replace("chosen", "rejected")
            scores = [row[name] for name in (better, worse) if is_number(row.get(name))]
            if len(scores) == 2 and scores[0] <= scores[1]:
                yield f"suspect: {better} is not above {worse}"


def _any_lost(given: list[str], texts: list[str]) -> bool:
    """Whether one of the ``given`` texts does not occur in the ``texts`` that were read from its row.

    A prompt that is a transcript occurs in none of them, but contains some.
    """
    read = [words for text in texts if (words := _words(text))]
    joined = " ".join(read)
    for text in given:
        words = _words(text)
        contains_some = is_transcript(text) and any(part in words for part in read)
        if words not in joined and not contains_some:
            return True
    return False


def _words(text: str) -> str:
    return " ".join(text.replace(IMAGE_IN_TEXT, " ").replace(IMAGE, " ").split())


def _texts(content: Comparison | Conversation) -> list[str]:
    """The texts of the prompt, and of the conversation that follows it."""
    found = [content.prompt] if isinstance(content.prompt, str) else _contents(content.prompt)
    completion = getattr(content, "completion", [])
    return found + ([completion] if isinstance(completion, str) else _contents(completion))


def _contents(messages: list[Message], *roles: str) -> list[str]:
    return [message["content"] for message in messages if not roles or message["role"] in roles]


def _text(answer: Response | list[Message]) -> str:
    """The text of an answer: a string, a message, or the first of several messages."""
    if isinstance(answer, list):
        answer = answer[0]
    return answer if isinstance(answer, str) else answer["content"]
