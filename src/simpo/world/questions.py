"""The questions of the tiny world: ten kinds, written from a seed and read back from their text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise, permutations
from random import Random

from simpo.errors import SimpoError

_LARGEST = 12
_WORDS = (
    *("ant", "bag", "bus", "cow", "cup", "dog", "fan", "hat"),
    *("jam", "key", "map", "owl", "pig", "sun", "tub", "web"),
)
_ORDINALS = ("first", "second", "third")
_TASTES = {
    "food": ("bread", "rice", "soup", "fish"),
    "colour": ("red", "green", "blue", "white"),
    "sport": ("golf", "judo", "chess", "rugby"),
    "metal": ("gold", "iron", "zinc", "silver"),
}
_NAMES = ("Abo", "Bima", "Cedo", "Dulu", "Etta", "Fira", "Gomo", "Hani")


@dataclass(frozen=True)
class Part:
    """One thing that a question asks for.

    Attributes:
        lead: how a statement of it begins, as in ``"the sum"`` of "The sum is 7."
        value: its words, as in ``("7",)`` or ``("d", "o", "g")``.
        mistakes: other values that somebody might give.
    """

    lead: str
    value: tuple[str, ...]
    mistakes: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Question:
    """A prompt with what it asks for, part by part."""

    kind: str
    prompt: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class _Kind:
    pattern: re.Pattern[str]
    draw: Callable[[Random], str]
    parts: Callable[..., tuple[Part, ...]]


def read_question(prompt: str) -> Question:
    """The question whose text is ``prompt``: the answer is worked out from the words, nothing is looked up.

    Raises:
        SimpoError: no question of the world reads like that.
    """
    for name, kind in _KINDS.items():
        if (match := kind.pattern.fullmatch(prompt)) and (parts := kind.parts(*match.groups())):
            return Question(name, prompt, parts)
    raise SimpoError(f"prompt {prompt[:80]!r}: not a question of the tiny world; give one of simpo.world.questions")


def is_held_out(prompt: str) -> bool:
    """Whether a question belongs to the held-out quarter.

    Its words decide, whatever their order: "7 plus 5" and "5 plus 7" are never on different sides.
    """
    words = sorted(re.findall(r"\w+", prompt.casefold()))
    return sha256(" ".join(words).encode()).digest()[0] < 64


def draw_question(rng: Random, *, held_out: bool) -> Question:
    """A random question of the training or of the held-out side, every kind being equally likely."""
    kind = _KINDS[rng.choice(KINDS)]
    while is_held_out(prompt := kind.draw(rng)) != held_out:
        pass
    return read_question(prompt)


def _number(value: int, *mistakes: int) -> tuple[tuple[str, ...], ...]:
    """A number as a value, then its mistakes: the given ones, or its neighbours."""
    others = mistakes or (value - 2, value - 1, value + 1, value + 2)
    return tuple((str(number),) for number in (value, *others) if number >= 0)


def _in_pairs(asked: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Two by two what is asked for; nothing if it is twice the same."""
    pairs = [asked[:2], asked[2:]]
    return pairs if pairs[0] != pairs[1] else []


def _part(lead: str, values: Sequence[tuple[str, ...]]) -> Part:
    """The first of ``values`` is right; those that differ from it are mistakes."""
    value, *others = values
    return Part(lead, value, tuple(dict.fromkeys(other for other in others if other != value)))


def _sums(*numbers: str) -> tuple[Part, ...]:
    pairs = _in_pairs(numbers)
    return tuple(_part(f"{left} plus {right}", _number(int(left) + int(right))) for left, right in pairs)


def _draw_sums(rng: Random) -> str:
    pairs = rng.sample([(left, right) for left in range(6) for right in range(6)], 2)
    return f"What is {' and '.join(f'{left} plus {right}' for left, right in pairs)}?"


def _differences(*numbers: str) -> tuple[Part, ...]:
    pairs = _in_pairs(numbers)
    if any(int(left) < int(right) for left, right in pairs):
        return ()
    return tuple(_part(f"{left} minus {right}", _number(int(left) - int(right))) for left, right in pairs)


def _draw_differences(rng: Random) -> str:
    pairs = rng.sample([(left, right) for left in range(8) for right in range(left + 1)], 2)
    return f"What is {' and '.join(f'{left} minus {right}' for left, right in pairs)}?"


def _comparison(relation: str, left: str, right: str) -> tuple[Part, ...]:
    smaller, larger = sorted((int(left), int(right)))
    if smaller == larger:
        return ()
    values = (larger, smaller) if relation == "larger" else (smaller, larger)
    return (_part(f"the {relation}", _number(*values)),)


def _draw_comparison(rng: Random) -> str:
    left, right = rng.sample(range(_LARGEST + 1), 2)
    return f"Which is {rng.choice(('larger', 'smaller'))}, {left} or {right}?"


def _order(*numbers: str) -> tuple[Part, ...]:
    return (_part("the order", [tuple(sorted(numbers, key=int)), *permutations(numbers)]),)


def _draw_order(rng: Random) -> str:
    return f"Sort {' '.join(map(str, rng.sample(range(_LARGEST + 1), 3)))}."


def _reverse(*words: str) -> tuple[Part, ...]:
    return (_part("the reverse", [words[::-1], *permutations(words)]),)


def _draw_reverse(rng: Random) -> str:
    return f"Reverse {' '.join(rng.sample(_WORDS, 3))}."


def _choice(ordinal: str, *words: str) -> tuple[Part, ...]:
    right = words[_ORDINALS.index(ordinal)]
    return (_part(f"the {ordinal}", [(word,) for word in (right, *words)]),)


def _draw_choice(rng: Random) -> str:
    return f"What is the {rng.choice(_ORDINALS)} of {' '.join(rng.sample(_WORDS, 3))}?"


def _count(word: str, words: str) -> tuple[Part, ...]:
    return (_part("the count", _number(words.split().count(word))),)


def _draw_count(rng: Random) -> str:
    pair = rng.sample(_WORDS, 2)
    return f"How often is {pair[0]} in {' '.join(rng.choices(pair, k=rng.randint(2, 4)))}?"


def _sequence(sequence: str) -> tuple[Part, ...]:
    numbers = [int(number) for number in sequence.split()]
    step = numbers[1] - numbers[0]
    if step < 1 or any(after - before != step for before, after in pairwise(numbers)):
        return ()
    last = numbers[-1]
    values = [(str(last + pace), str(last + 2 * pace)) for pace in (step, step + 1, step + 2)]
    return (_part("the sequel", values),)


def _draw_sequence(rng: Random) -> str:
    start, step, given = rng.randint(0, _LARGEST), rng.randint(1, 2), rng.randint(2, 5)
    return f"Continue {' '.join(str(start + step * number) for number in range(given))}."


def _spelling(*words: str) -> tuple[Part, ...]:
    if len(set(words)) < len(words):
        return ()
    return tuple(_part(f"the word {word}", [tuple(word), *permutations(word)]) for word in words)


def _draw_spelling(rng: Random) -> str:
    return f"Spell {' and '.join(rng.sample(_WORDS, 2))}."


def _tastes(*asked: str) -> tuple[Part, ...]:
    """``asked`` is what and whose, twice. Everybody's tastes are fixed facts of the world."""
    parts = []
    for what, whose in _in_pairs(asked):
        options = _TASTES[what]
        right = options[sha256(f"{what} of {whose}".encode()).digest()[0] % len(options)]
        parts.append(_part(f"the {what} of {whose}", [(option,) for option in (right, *options)]))
    return tuple(parts)


def _draw_tastes(rng: Random) -> str:
    pairs = rng.sample([(what, whose) for what in _TASTES for whose in _NAMES], 2)
    return f"What is the {' and the '.join(f'{what} of {whose}' for what, whose in pairs)}?"


_NUMBER, _WORD = r"(\d{1,3})", f"({'|'.join(_WORDS)})"
_TASTE = f"({'|'.join(_TASTES)}) of ({'|'.join(_NAMES)})"


def _kind(pattern: str, draw: Callable[[Random], str], parts: Callable[..., tuple[Part, ...]]) -> _Kind:
    return _Kind(re.compile(pattern), draw, parts)


_KINDS = {
    "sums": _kind(r"What is (\d) plus (\d) and (\d) plus (\d)\?", _draw_sums, _sums),
    "differences": _kind(r"What is (\d) minus (\d) and (\d) minus (\d)\?", _draw_differences, _differences),
    "comparison": _kind(rf"Which is (larger|smaller), {_NUMBER} or {_NUMBER}\?", _draw_comparison, _comparison),
    "order": _kind(rf"Sort {_NUMBER} {_NUMBER} {_NUMBER}\.", _draw_order, _order),
    "reverse": _kind(rf"Reverse {_WORD} {_WORD} {_WORD}\.", _draw_reverse, _reverse),
    "choice": _kind(rf"What is the ({'|'.join(_ORDINALS)}) of {_WORD} {_WORD} {_WORD}\?", _draw_choice, _choice),
    "count": _kind(rf"How often is {_WORD} in ([a-z]{{3}}(?: [a-z]{{3}}){{1,3}})\?", _draw_count, _count),
    "sequence": _kind(r"Continue (\d{1,3}(?: \d{1,3}){1,4})\.", _draw_sequence, _sequence),
    "spelling": _kind(rf"Spell {_WORD} and {_WORD}\.", _draw_spelling, _spelling),
    "tastes": _kind(rf"What is the {_TASTE} and the {_TASTE}\?", _draw_tastes, _tastes),
}
KINDS = tuple(_KINDS)
