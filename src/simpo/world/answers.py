"""Answers as people write them: good, rambling, incomplete, evasive or wrong."""

from __future__ import annotations

from random import Random

from simpo.world.questions import Part, Question

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
