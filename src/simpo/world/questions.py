"""The tiny world's ten kinds of questions, answers to them, and an exact judge for any text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise, permutations
from random import Random
from typing import Any, NamedTuple

from simpo.errors import SimpoError

_LARGEST = 12
_WORDS = (
    "ant", "bag", "bus", "cow", "cup", "dog", "fan", "hat",
    "jam", "key", "map", "owl", "pig", "sun", "tub", "web",
)  # fmt: skip
_ORDINALS = ("first", "second", "third", "fourth")
_TASTES = {
    "food": ("bread", "rice", "soup", "fish"),
    "color": ("red", "green", "blue", "white"),
    "sport": ("golf", "judo", "chess", "rugby"),
    "metal": ("gold", "iron", "zinc", "silver"),
}
_NAMES = ("Abo", "Bima", "Cedo", "Dulu", "Etta", "Fira", "Gomo", "Hani")

Value = tuple[str, ...]  # the words of an answer, e.g. ("7",) or ("d", "o", "g")


@dataclass(frozen=True)
class Part:
    """One thing a question asks for."""

    subject: str  # the start of a statement, e.g. `"the sum"` in "The sum is 7."
    value: Value  # the right answer
    mistakes: tuple[Value, ...]  # plausible wrong answers
    verb: str = "is"  # between subject and value
    separator: str = ", "  # between the words of the value

    def statement(self, value: Value) -> str:
        """Write a sentence that gives ``value`` as the answer."""
        return f"{self.subject[0].upper()}{self.subject[1:]} {self.verb} {self.separator.join(value)}."


@dataclass(frozen=True)
class Question:
    """A prompt and the parts it asks for."""

    kind: str
    prompt: str
    parts: tuple[Part, ...]


def read_question(prompt: str) -> Question:
    """Parse ``prompt`` as a question of the tiny world; the answer is computed from its words."""
    for name, pattern in _PATTERNS.items():
        if (match := pattern.fullmatch(prompt)) and (parts := _KINDS[name].parts(*match.groups())):
            return Question(name, prompt, tuple(parts))
    raise SimpoError(f"prompt {prompt[:80]!r}: not a question of the tiny world; give one of simpo.world.questions")


def is_held_out(prompt: str) -> bool:
    """Whether a question belongs to the held-out quarter.

    This is decided by a hash of its sorted words, so that "7 plus 5" and "5 plus 7" end up on the same side.
    """
    words = sorted(re.findall(r"\w+", prompt.casefold()))
    return sha256(" ".join(words).encode()).digest()[0] < 64


def draw_question(rng: Random, *, held_out: bool) -> Question:
    """Draw a random training or held-out question; every kind is equally likely."""
    kind = _KINDS[rng.choice(KINDS)]
    while True:
        values = iter(kind.draw(rng))
        prompt = _GAP.sub(lambda gap: str(next(values)), kind.template)  # noqa: B023 - used at once
        if is_held_out(prompt) == held_out:
            return read_question(prompt)


# ---- The parts that each kind asks for; none if the given values do not make a valid question.


def _part(subject: str, values: Iterable[Value], **wording: str) -> Part:
    """Create a part: the first of ``values`` is the right answer, and those that differ from it are mistakes."""
    value, *others = values
    return Part(subject, value, tuple(dict.fromkeys(other for other in others if other != value)), **wording)


def _numbers(value: int, *mistakes: int) -> list[Value]:
    """Return the right number followed by mistakes: the given ones or, without any, its neighbors."""
    others = mistakes or (value - 2, value - 1, value + 1, value + 2)
    return [(str(number),) for number in (value, *others) if number >= 0]


def _sums(*numbers: str) -> list[Part]:
    pairs = [numbers[:2], numbers[2:]]
    if pairs[0] == pairs[1]:
        return []
    return [_part(f"{left} plus {right}", _numbers(int(left) + int(right))) for left, right in pairs]


def _differences(*numbers: str) -> list[Part]:
    pairs = [numbers[:2], numbers[2:]]
    if pairs[0] == pairs[1] or any(int(left) < int(right) for left, right in pairs):
        return []
    return [_part(f"{left} minus {right}", _numbers(int(left) - int(right))) for left, right in pairs]


def _comparison(relation: str, *numbers: str) -> list[Part]:
    smaller, larger = sorted(map(int, numbers))
    if smaller == larger:
        return []
    values = (larger, smaller) if relation == "larger" else (smaller, larger)
    return [_part(f"the {relation} number", _numbers(*values))]


def _order(*numbers: str) -> list[Part]:
    return [_part("the order", [tuple(sorted(numbers, key=int)), *permutations(numbers)])]


def _reverse(*words: str) -> list[Part]:
    return [_part("the reversed list", [words[::-1], *permutations(words)])]


def _choice(ordinal: str, *words: str) -> list[Part]:
    right = words[_ORDINALS.index(ordinal)]
    return [_part(f"the {ordinal} word", [(word,) for word in (right, *words)])]


def _count(word: str, words: str) -> list[Part]:
    return [_part("the count", _numbers(words.split(", ").count(word)))]


def _sequence(sequence: str) -> list[Part]:
    numbers = [int(number) for number in sequence.split(", ")]
    step, last = numbers[1] - numbers[0], numbers[-1]
    if step < 1 or any(after - before != step for before, after in pairwise(numbers)):
        return []
    values = [(str(last + pace), str(last + 2 * pace)) for pace in (step, step + 1, step + 2)]
    return [_part("the next numbers", values, verb="are", separator=" and ")]


def _spelling(*words: str) -> list[Part]:
    if len(set(words)) < len(words):
        return []
    wording = {"verb": "is spelled", "separator": " "}
    return [_part(f"the word {word}", [tuple(word), *permutations(word)], **wording) for word in words]


def _tastes(*names: str) -> list[Part]:
    """Ask for two favorites; ``names`` holds two pairs of person and category. Tastes are fixed facts of the world."""
    pairs = [names[:2], names[2:]]
    parts = []
    for name, category in pairs if pairs[0] != pairs[1] else []:
        options = _TASTES[category]
        right = options[sha256(f"{category} of {name}".encode()).digest()[0] % len(options)]
        parts.append(_part(f"{name}'s favorite {category}", [(option,) for option in (right, *options)]))
    return parts


# ---- The kinds: a template, how its gaps are filled, and the parts of the resulting question.


class _Kind(NamedTuple):
    template: str
    draw: Callable[[Random], Iterable[Any]]
    parts: Callable[..., list[Part]]


# Patterns for the gaps in templates, used to parse a question.
_GAPS = {
    "digit": r"\d",
    "number": r"\d{1,3}",
    "numbers": r"\d{1,3}(?:, \d{1,3}){1,4}",
    "word": "|".join(_WORDS),
    "words": "[a-z]{3}(?:, [a-z]{3}){1,3}",
    "name": "|".join(_NAMES),
    "taste": "|".join(_TASTES),
    "ordinal": "|".join(_ORDINALS),
    "relation": "larger|smaller",
}


def _two_pairs(rng: Random, pairs: Iterable[tuple[Any, Any]]) -> list[Any]:
    return [value for pair in rng.sample(list(pairs), 2) for value in pair]


def _draw_count(rng: Random) -> tuple[str, str]:
    pair = rng.sample(_WORDS, 2)
    return pair[0], ", ".join(rng.choices(pair, k=rng.randint(2, 4)))


def _draw_sequence(rng: Random) -> tuple[str]:
    start, step, given = rng.randint(0, _LARGEST), rng.randint(1, 2), rng.randint(2, 5)
    return (", ".join(str(start + step * number) for number in range(given)),)


_KINDS = {
    "sums": _Kind(
        "What is {digit} plus {digit}, and what is {digit} plus {digit}?",
        lambda rng: _two_pairs(rng, ((left, right) for left in range(6) for right in range(6))),
        _sums,
    ),
    "differences": _Kind(
        "What is {digit} minus {digit}, and what is {digit} minus {digit}?",
        lambda rng: _two_pairs(rng, ((left, right) for left in range(8) for right in range(left + 1))),
        _differences,
    ),
    "comparison": _Kind(
        "Which is {relation}, {number} or {number}?",
        lambda rng: [rng.choice(("larger", "smaller")), *rng.sample(range(_LARGEST + 1), 2)],
        _comparison,
    ),
    "order": _Kind("Sort {number}, {number}, {number}.", lambda rng: rng.sample(range(_LARGEST + 1), 3), _order),
    "reverse": _Kind("Reverse the list {word}, {word}, {word}.", lambda rng: rng.sample(_WORDS, 3), _reverse),
    "choice": _Kind(
        "Which word comes {ordinal} in {word}, {word}, {word}, {word}?",
        lambda rng: [rng.choice(_ORDINALS), *rng.sample(_WORDS, 4)],
        _choice,
    ),
    "count": _Kind("How often does {word} occur in {words}?", _draw_count, _count),
    "sequence": _Kind("Continue {numbers}.", _draw_sequence, _sequence),
    "spelling": _Kind("Spell {word} and {word}.", lambda rng: rng.sample(_WORDS, 2), _spelling),
    "tastes": _Kind(
        "What are {name}'s favorite {taste} and {name}'s favorite {taste}?",
        lambda rng: _two_pairs(rng, ((name, category) for category in _TASTES for name in _NAMES)),
        _tastes,
    ),
}
KINDS = tuple(_KINDS)
_GAP = re.compile(r"\{(\w+)\}")
_PATTERNS = {
    name: re.compile(_GAP.sub(lambda gap: f"({_GAPS[gap[1]]})", re.sub(r"[.?]", r"\\\g<0>", kind.template)))
    for name, kind in _KINDS.items()
}


# ---- Answers like those in real data: good, rambling, incomplete, evasive or wrong.

_OPENINGS = ("That is a good question.", "Let me think about it.", "Thank you for asking me that.")
_CLOSINGS = ("I hope that this helps you.", "Please ask me again at any time.", "That is all that I can say about it.")
_EVASIONS = ("I do not know.", "That is hard to say.", "Please ask somebody else.")


def full_answer(question: Question) -> str:
    """Return the plain answer: every part and nothing else."""
    return " ".join(part.statement(part.value) for part in question.parts)


def draw_answer(question: Question, rng: Random) -> str:
    """Draw an answer like those in real data: about two thirds are right, and half of all answers are plain."""
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

    A part is stated by sentences like "The order is 2, 9, 10." or, for questions with a single part, "They are 2, 9,
    10." or "2, 9, 10." as the only sentence. Other sentences only make the answer longer. Brevity is the length of the
    plain answer divided by that of this one, in characters, at most 1.

    - All parts stated, all statements right: 6 + 4 * brevity.
    - Some parts stated, all statements right: 5 * brevity * share of parts stated.
    - No part stated, or a wrong statement: 0.

    Args:
        prompt: a question of the world, or messages that end with one.
        answer: any text; no text raises an error.
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
    """Whether all parts are stated and all statements are right, regardless of length."""
    question = _question(prompt)
    return _stated(question, answer) == len(question.parts)


def _question(prompt: Prompt) -> Question:
    if isinstance(prompt, str):
        return read_question(prompt)
    if not prompt or not isinstance(prompt[-1].get("content"), str):
        raise SimpoError("prompt: the last message has no text; give a question of the tiny world")
    return read_question(prompt[-1]["content"])


def _stated(question: Question, answer: str) -> int:
    """Count the parts that ``answer`` states; 0 if it gets any of them wrong."""
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
    """Return the value that a sentence states for ``part``, or None if it states none."""
    subject = re.escape(part.subject.casefold())
    if only_part:
        subject = f"(?:{subject}|it|they|the answer)"
    if match := re.fullmatch(f"{subject} (?:is|are)(?: spelled)? (.*)", sentence):
        value = match[1]
    elif only_part and only_sentence:
        value = sentence
    else:
        return None
    return tuple(_SEPARATORS.sub(" ", value).split())
