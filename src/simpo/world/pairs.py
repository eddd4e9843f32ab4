"""Built-in preference pairs: short questions with a good answer and a worse one, made from a seed."""

from __future__ import annotations

import json
import random
from pathlib import Path

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_COLOURS = {
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "a lemon": "yellow",
    "a clear sky": "blue",
    "a ripe tomato": "red",
    "a carrot": "orange",
    "chocolate": "brown",
}
_SOUNDS = {"dog": "barks", "cat": "meows", "cow": "moos", "sheep": "bleats", "duck": "quacks", "lion": "roars"}
Row = dict[str, str]

_EVASIONS = ("I do not know.", "Ask somebody else.", "That is hard to say.", "Maybe. Maybe not.")


def make_pairs(train: int, held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """``train`` and ``held_out`` rows ``{prompt, chosen, rejected}`` on questions that the two do not share.

    Three faults make the rejected answer worse: it evades the question, says everything twice, or answers another one.
    The same seed gives the same rows.
    """
    rng = random.Random(seed)  # noqa: S311 - sampling, not secrets
    questions = _questions()
    rng.shuffle(questions)
    cut = len(questions) // 4
    return (
        [_pair(questions[cut:], rng) for _ in range(train)],
        [_pair(questions[:cut], rng) for _ in range(held_out)],
    )


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write ``rows`` as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _pair(questions: list[tuple[str, str]], rng: random.Random) -> Row:
    prompt, chosen = rng.choice(questions)
    fault = rng.choice(("evades", "rambles", "strays"))
    if fault == "evades":
        rejected = rng.choice(_EVASIONS)
    elif fault == "rambles":
        rejected = f"{chosen} {chosen} As I said: {chosen}"
    else:
        rejected = rng.choice([answer for _, answer in questions if answer != chosen])
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _questions() -> list[tuple[str, str]]:
    """All questions, each with its answer."""
    found = [(f"Which colour is {thing}?", f"{thing.capitalize()} is {colour}.") for thing, colour in _COLOURS.items()]
    found += [(f"What does a {animal} do?", f"A {animal} {sound}.") for animal, sound in _SOUNDS.items()]
    for a, left in enumerate(_NUMBERS[:7]):
        for b, right in enumerate(_NUMBERS[:6]):
            answer = f"{left.capitalize()} plus {right} is {_NUMBERS[a + b]}."
            found.append((f"What is {left} plus {right}?", answer))
    return found
