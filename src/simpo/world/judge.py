"""Answers of the tiny world (good, wrong, incomplete, rambling), and an exact judge of any text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random

from simpo.errors import SimpoError
from simpo.world.questions import Part, Question, read_question

# ---- Answers as people write them: good, rambling, incomplete, evasive or wrong.


_OPENINGS = ("That is a good question.", "Let me think about it.", "Thank you for asking me that.")


_CLOSINGS = ("I hope that this helps you.", "Please ask me again at any time.", "That is all that I can say about it.")


_EVASIONS = ("I do not know.", "That is hard to say.", "Please ask somebody else.")


def full_answer(question: Question) -> str:
    """The plain answer: every part, nothing else."""
    return _statements(question.parts)


def draw_answer(question: Question, rng: Random) -> str:
    """An answer as it may stand in real data: about half are right, and about half are plain."""
    fault = rng.choices(("none", "mistake", "gap"), weights=(13, 4, 3))[0]
    if fault == "none":
        core = full_answer(question)
    elif fault == "mistake":
        core = _mistaken(question, rng)
    elif len(question.parts) > 1:
        core = _statements(question.parts[:1])
    else:
        core = rng.choice(_EVASIONS)
    return _rambling(core, rng) if rng.random() < 0.5 else core


def _mistaken(question: Question, rng: Random) -> str:
    """The plain answer with one part wrong."""
    parts = list(question.parts)
    number = rng.randrange(len(parts))
    part = parts[number]
    parts[number] = Part(part.lead, rng.choice(part.mistakes), ())
    return _statements(parts)


def _rambling(core: str, rng: Random) -> str:
    """The same, with an opening, a repetition or a closing around it."""
    return " ".join(
        rng.choice(
            (
                (rng.choice(_OPENINGS), core),
                (core, rng.choice(_CLOSINGS)),
                (rng.choice(_OPENINGS), core, rng.choice(_CLOSINGS)),
                (core, core, rng.choice(_CLOSINGS)),
            )
        )
    )


def _statements(parts: tuple[Part, ...] | list[Part]) -> str:
    return " ".join(f"{part.lead[0].upper()}{part.lead[1:]} is {' '.join(part.value)}." for part in parts)


Prompt = str | Sequence[Mapping[str, str]]


_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|\n+")  # not within "7.5"


_BETWEEN = re.compile(r",|\band\b|(?<=\w)-(?=\w)")


_LEADS = "it|they|the answer"


def judge(prompt: Prompt, answer: str) -> float:
    """How good an answer is, from 0 to 10.

    A sentence such as "The sum is 7.", "It is 7." or, alone, "7." states a part of the answer; any other says nothing.

    - Every part stated, every statement right: 6, and up to 4 more for brevity (the length in characters of the plain
      answer over that of this one).
    - Some parts stated, all statements right: up to 5: the stated share times that brevity.
    - No part stated, or one of the statements is wrong: 0.

    Raises:
        SimpoError: the prompt is not a question of the world. No answer raises.
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
    """Whether all parts are stated and every statement is right, however long the answer is.

    Raises:
        SimpoError: the prompt is not a question of the world.
    """
    question = _question(prompt)
    return _stated(question, answer) == len(question.parts)


def _question(prompt: Prompt) -> Question:
    """The question of a prompt, or of the last message of a conversation."""
    if isinstance(prompt, str):
        return read_question(prompt)
    if not prompt or not isinstance(prompt[-1].get("content"), str):
        raise SimpoError("prompt: no message with a text; give a question of the tiny world")
    return read_question(prompt[-1]["content"])


def _stated(question: Question, answer: str) -> int:
    """The number of parts that ``answer`` states, 0 if it states one of them wrongly."""
    sentences = [words for part in _SENTENCE_END.split(answer.casefold()) if (words := " ".join(part.split()))]
    right = set()
    for sentence in sentences:
        for number, part in enumerate(question.parts):
            value = _value(sentence, part, alone=len(question.parts) == 1, bare=len(sentences) == 1)
            if value == part.value:
                right.add(number)
            elif value is not None:
                return 0
    return len(right)


def _value(sentence: str, part: Part, *, alone: bool, bare: bool) -> tuple[str, ...] | None:
    """What a sentence says ``part`` is, None if it says nothing about it."""
    lead = re.escape(part.lead.casefold())
    leads = f"(?:{lead}|{_LEADS})" if alone else lead
    if match := re.fullmatch(f"{leads} (?:is|are) (.*)", sentence):
        said = match[1]
    elif alone and bare:
        said = sentence
    else:
        return None
    return tuple(_BETWEEN.sub(" ", said).split())
