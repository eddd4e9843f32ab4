"""Rows of the tiny world: demonstrations, prompts and preference pairs, made from a seed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from random import Random

from simpo.atomic import write_text
from simpo.errors import SimpoError
from simpo.world.answers import draw_answer
from simpo.world.judge import judge
from simpo.world.questions import draw_question

Row = dict[str, str]

_TRIES = 50  # in vain before the questions count as used up


def make_sft(count: int, seed: int) -> list[Row]:
    """``count`` demonstrations ``{prompt, completion}`` on training questions; as in real data, not all are good."""
    rng = _rng("sft", seed)
    questions = (draw_question(rng, held_out=False) for _ in range(count))
    return [{"prompt": question.prompt, "completion": draw_answer(question, rng)} for question in questions]


def make_prompts(count: int, seed: int, *, held_out: bool = False) -> list[Row]:
    """``count`` rows ``{prompt}``, no two alike.

    Raises:
        SimpoError: the world has not so many questions on that side.
    """
    rng = _rng("prompts", seed)
    prompts: dict[str, None] = {}
    in_vain = 0
    while len(prompts) < count and in_vain < _TRIES:
        before = len(prompts)
        prompts[draw_question(rng, held_out=held_out).prompt] = None
        in_vain = 0 if len(prompts) > before else in_vain + 1
    if len(prompts) < count:
        raise SimpoError(f"count: {count:,} different prompts asked for, the tiny world has about {len(prompts):,}")
    return [{"prompt": prompt} for prompt in prompts]


def make_pairs(count: int, seed: int, *, held_out: bool = False, length_bias: float = 0.0) -> list[Row]:
    """``count`` off-policy pairs ``{prompt, chosen, rejected}`` of answers that differ in score and in length.

    Args:
        count: rows; a question may come more than once.
        seed: the same seed gives the same rows.
        held_out: questions of the held-out side.
        length_bias: from 0 to 1, the share of pairs whose longer answer is chosen whatever its quality; of the others
            the judge chooses the better.

    Raises:
        SimpoError: ``length_bias`` is out of bounds.
    """
    if not 0 <= length_bias <= 1:
        raise SimpoError(f"length_bias: {length_bias} is not a share; give a number from 0 to 1")
    rng = _rng("pairs", seed)
    return [_pair(rng, held_out, length_bias) for _ in range(count)]


def write_sft(path: Path, count: int, seed: int) -> None:
    """Write :func:`make_sft` as JSON lines."""
    _write(path, make_sft(count, seed))


def write_prompts(path: Path, count: int, seed: int, *, held_out: bool = False) -> None:
    """Write :func:`make_prompts` as JSON lines."""
    _write(path, make_prompts(count, seed, held_out=held_out))


def write_pairs(path: Path, count: int, seed: int, *, held_out: bool = False, length_bias: float = 0.0) -> None:
    """Write :func:`make_pairs` as JSON lines."""
    _write(path, make_pairs(count, seed, held_out=held_out, length_bias=length_bias))


def _pair(rng: Random, held_out: bool, length_bias: float) -> Row:
    question = draw_question(rng, held_out=held_out)
    scores: dict[str, float] = {}
    while len({len(answer) for answer in scores}) < 2 or len(set(scores.values())) < 2:
        scores = {answer: judge(question.prompt, answer) for answer in (draw_answer(question, rng) for _ in range(2))}
    by_length = rng.random() < length_bias
    rejected, chosen = sorted(scores, key=len if by_length else scores.__getitem__)
    return {"prompt": question.prompt, "chosen": chosen, "rejected": rejected}


def _rng(purpose: str, seed: int) -> Random:
    """What is made for different purposes differs, with the same seed too."""
    return Random(f"{purpose} {seed}")  # noqa: S311 - sampling, not secrets


def _write(path: Path, rows: Iterable[Row]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
