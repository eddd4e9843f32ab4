"""Questions are parsed back from their text and never occur on both sides of the split."""

import re
from collections import Counter
from random import Random

import pytest

from simpo.world.questions import (
    KINDS,
    correct,
    draw_answer,
    draw_question,
    full_answer,
    is_held_out,
    judge,
    read_question,
)


@pytest.fixture(scope="module")
def questions():
    rng = Random(1)
    return [draw_question(rng, held_out=held_out) for held_out in (False, True) for _ in range(3000)]


def test_every_question_is_parsed_back(questions):
    for question in questions:
        assert read_question(question.prompt) == question
    assert {question.kind for question in questions} == set(KINDS)
    assert len(KINDS) >= 6


def test_kinds_are_equally_likely(questions):
    drawn = Counter(question.kind for question in questions)
    assert max(drawn.values()) < 1.3 * min(drawn.values())


def test_every_listed_mistake_is_wrong(questions):
    for question in questions:
        assert judge(question.prompt, full_answer(question)) == 10
        for part in question.parts:
            assert part.mistakes
            assert part.value not in part.mistakes
            assert len(set(part.mistakes)) == len(part.mistakes)


def test_answers_are_computed_right(questions):
    """All kinds except the facts, computed in another way: from the positions of words in the prompt."""
    ordinals = ["first", "second", "third", "fourth"]
    naive = {
        "sums": lambda text: [[str(int(a) + int(b))] for a, b in re.findall(r"(\d) plus (\d)", text)],
        "differences": lambda text: [[str(int(a) - int(b))] for a, b in re.findall(r"(\d) minus (\d)", text)],
        "comparison": lambda text: [[str((max if "larger" in text else min)(map(int, re.findall(r"\d+", text))))]],
        "order": lambda text: [sorted(re.findall(r"\d+", text), key=int)],
        "reverse": lambda text: [re.findall(r"\w+", text)[:2:-1]],
        "choice": lambda text: [[re.findall(r"\w+", text)[-4:][ordinals.index(text.split()[3])]]],
        "count": lambda text: [[str(re.findall(r"\w+", text)[6:].count(text.split()[3]))]],
        "sequence": lambda text: [[str(n) for n in continued(*map(int, re.findall(r"\d+", text)[-2:]))]],
        "spelling": lambda text: [list(text.split()[1]), list(text[:-1].split()[3])],
    }

    def continued(last_but_one, last):
        return 2 * last - last_but_one, 3 * last - 2 * last_but_one

    checked = Counter()
    for question in questions:
        if question.kind in naive:
            assert [list(part.value) for part in question.parts] == naive[question.kind](question.prompt)
            checked[question.kind] += 1
    assert set(checked) == set(naive) == set(KINDS) - {"tastes"}


def test_tastes_are_consistent_facts(questions):
    told = {}
    for question in questions:
        if question.kind == "tastes":
            for part in question.parts:
                assert told.setdefault(part.subject, part.value) == part.value
    assert len(told) == 4 * 8


def test_sides_share_no_question_in_any_order(questions):
    sides = {held_out: set() for held_out in (False, True)}
    for question in questions:
        sides[is_held_out(question.prompt)].add(tuple(sorted(re.findall(r"\w+", question.prompt.lower()))))
    assert not sides[False] & sides[True]
    assert len(sides[True]) > 700
    assert is_held_out("Reverse the list dog, sun, map.") == is_held_out("Reverse the list map, dog, sun.")


def test_demonstrations_leave_room_for_improvement(questions):
    """About two thirds are right, and half of those ramble."""
    rng = Random(2)
    answers = [(question.prompt, draw_answer(question, rng)) for question in questions]
    right = [judge(prompt, answer) for prompt, answer in answers if correct(prompt, answer)]
    assert len(right) / len(answers) == pytest.approx(0.65, abs=0.03)
    assert sum(score == 10 for score in right) / len(right) == pytest.approx(0.5, abs=0.03)
    assert any(0 < judge(prompt, answer) < 5 for prompt, answer in answers)
