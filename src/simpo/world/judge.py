"""Answers of the tiny world (good, wrong, incomplete, rambling), and an exact judge of any text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random

from simpo.errors import SimpoError
from simpo.world.questions import Part, Question, Value, read_question

# ---- Answers like those in real data: good, rambling, incomplete, evasive or wrong.

_OPENINGS = ("That is a good question.", "Let me think about it.", "Thank you for asking me that.")
_CLOSINGS = ("I hope that this helps you.", "Please ask me again at any time.", "That is all that I can say about it.")
_EVASIONS = ("I do not know.", "That is hard to say.", "Please ask somebody else.")


def full_answer(question: Question) -> str:
    """The plain answer: every part, nothing else."""
    return " ".join(part.statement(part.value) for part in question.parts)


def draw_answer(question: Question, rng: Random) -> str:
    """An answer like those in real data: about two in three are right, and half of all are plain."""
    fault = rng.choices(("none", "mistake", "gap"), weights=(13, 4, 3))[0]
    if fault == "none":
        core = full_answer(question)
    elif fault == "mistake":
        wrong = rng.randrange(len(question.parts))
        values = [rng.choice(part.mistakes) if n == wrong else part.value for n, part in enumerate(question.parts)]
        core = " ".join(part.statement(value) for part, value in zip(question.parts, values, strict=True))
    elif len(question.parts) > 1:
        core = question.parts[0].statement(question.parts[0].value)
    else:
        core = rng.choice(_EVASIONS)
    if rng.random() >= 0.5:
        return core
    rambling = (
        (rng.choice(_OPENINGS), core),
        (core, rng.choice(_CLOSINGS)),
        (rng.choice(_OPENINGS), core, rng.choice(_CLOSINGS)),
        (core, core, rng.choice(_CLOSINGS)),
    )
    return " ".join(rng.choice(rambling))


# ---- The judge.

Prompt = str | Sequence[Mapping[str, str]]

_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|\n+")  # not within "7.5"
_SEPARATORS = re.compile(r",|\band\b|(?<=\w)-(?=\w)")


def judge(prompt: Prompt, answer: str) -> float:
    """Score an answer from 0 to 10.

    A sentence such as "The order is 2, 9, 10.", "They are 2, 9, 10." or, alone, "2, 9, 10." states a part of the
    answer. Any other sentence states nothing.

    - Every part stated, every statement right: 6, and up to 4 more for brevity (the length in characters of the plain
      answer over that of this one).
    - Some parts stated, all statements right: up to 5: the stated share times that brevity.
    - No part stated, or one of the statements is wrong: 0.

    Args:
        prompt: a question of the world, or messages the last of which is one.
        answer: any text; none raises.
    """
    question = _question(prompt)
    stated = _stated(question, answer)
    if not stated:
        return 0.0
    brevity = min(1.0, len(full_answer(question)) / len(answer))
    if stated == len(question.parts):
        return 6.0 + 4.0 * brevity
    return 5.0 * brevity * stated / len(question.parts)


def correct(prompt: Prompt, answer: str) -> bool:
    """Whether all parts are stated and every statement is right, however long the answer is."""
    question = _question(prompt)
    return _stated(question, answer) == len(question.parts)


def _question(prompt: Prompt) -> Question:
    if isinstance(prompt, str):
        return read_question(prompt)
    if not prompt or not isinstance(prompt[-1].get("content"), str):
        raise SimpoError("prompt: the last message has no text; give a question of the tiny world")
    return read_question(prompt[-1]["content"])


def _stated(question: Question, answer: str) -> int:
    """The number of parts that ``answer`` states, or 0 if it states one of them wrongly."""
    sentences = [words for part in _SENTENCE_END.split(answer.casefold()) if (words := " ".join(part.split()))]
    only_part = len(question.parts) == 1
    right = set()
    for sentence in sentences:
        for number, part in enumerate(question.parts):
            value = _value(sentence, part, only_part=only_part, only_sentence=len(sentences) == 1)
            if value == part.value:
                right.add(number)
            elif value is not None:
                return 0
    return len(right)


def _value(sentence: str, part: Part, *, only_part: bool, only_sentence: bool) -> Value | None:
    """The value that a sentence states for ``part``, or None if it does not mention it."""
    subject = re.escape(part.subject.casefold())
    if only_part:
        subject = f"(?:{subject}|it|they|the answer)"
    if match := re.fullmatch(f"{subject} (?:is|are)(?: spelled)? (.*)", sentence):
        said = match[1]
    elif only_part and only_sentence:
        said = sentence
    else:
        return None
    return tuple(_SEPARATORS.sub(" ", said).split())
