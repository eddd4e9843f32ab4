"""The exact judge on answers whose scores are known by hand."""

import pytest

from simpo.errors import SimpoError
from simpo.world.questions import correct, judge

# For each kind: a prompt, its plain answer, a wrong answer, and for two-part questions the plain answer's first part.
CASES = {
    "sums": (
        "What is 3 plus 4, and what is 2 plus 2?",
        "3 plus 4 is 7. 2 plus 2 is 4.",
        "3 plus 4 is 7. 2 plus 2 is 5.",
    ),
    "differences": (
        "What is 7 minus 4, and what is 5 minus 5?",
        "7 minus 4 is 3. 5 minus 5 is 0.",
        "7 minus 4 is 2. 5 minus 5 is 0.",
    ),
    "comparison": ("Which is smaller, 10 or 9?", "The smaller number is 9.", "The smaller number is 10."),
    "order": ("Sort 10, 9, 2.", "The order is 2, 9, 10.", "The order is 10, 2, 9."),
    "reverse": (
        "Reverse the list dog, sun, map.",
        "The reversed list is map, sun, dog.",
        "The reversed list is dog, sun, map.",
    ),
    "choice": ("Which word comes second in dog, sun, map, owl?", "The second word is sun.", "The second word is map."),
    "count": ("How often does dog occur in dog, sun, dog?", "The count is 2.", "The count is 3."),
    "sequence": ("Continue 3, 5, 7.", "The next numbers are 9 and 11.", "The next numbers are 8 and 9."),
    "spelling": (
        "Spell dog and sun.",
        "The word dog is spelled d o g. The word sun is spelled s u n.",
        "The word dog is spelled d g o. The word sun is spelled s u n.",
    ),
    "tastes": (
        "What are Abo's favorite food and Hani's favorite metal?",
        "Abo's favorite food is fish. Hani's favorite metal is gold.",
        "Abo's favorite food is fish. Hani's favorite metal is zinc.",
    ),
}
TWO_PARTS = ("sums", "differences", "spelling", "tastes")
kinds = pytest.mark.parametrize(("prompt", "plain", "wrong"), CASES.values(), ids=CASES)


@kinds
def test_a_plain_answer_scores_10(prompt, plain, wrong):
    assert judge(prompt, plain) == 10
    assert correct(prompt, plain)


@kinds
def test_a_wrong_answer_scores_0_whatever_surrounds_it(prompt, plain, wrong):
    for answer in (wrong, f"{plain} {wrong}", f"{wrong} {plain}", f"I hope this helps. {wrong}"):
        assert judge(prompt, answer) == 0
        assert not correct(prompt, answer)


@kinds
def test_brevity_counts_but_a_long_right_answer_stays_right(prompt, plain, wrong):
    helpful = f"Let me think. {plain} I hope that this helps."
    assert judge(prompt, helpful) == pytest.approx(6 + 4 * len(plain) / len(helpful))
    repeated = " ".join([plain] * 3)
    assert judge(prompt, repeated) == pytest.approx(6 + 4 * len(plain) / len(repeated))
    assert correct(prompt, repeated)
    assert 6 < judge(prompt, plain + " ☃\u202e" * 5000) < 6.02


@pytest.mark.parametrize("kind", TWO_PARTS)
def test_half_an_answer_scores_less_than_the_longest_right_one(kind):
    prompt, plain, _ = CASES[kind]
    halves = [f"{half.removesuffix('.')}." for half in plain.split(". ")]
    for half in halves:
        assert judge(prompt, half) == 2.5
        assert not correct(prompt, half)
        repeated = " ".join([half] * 3)
        assert judge(prompt, repeated) == pytest.approx(2.5 * len(plain) / len(repeated))
    assert judge(prompt, " ".join(reversed(halves))) == 10


@kinds
@pytest.mark.parametrize(
    "empty",
    ["", " ", "\n\n", ".", "?!", "I do not know.", "\ud800", "\x00\x1b[2J", "😀" * 9, "is", "The", "It is", "<|end|>"],
)
def test_text_without_an_answer_scores_0(prompt, plain, wrong, empty):
    assert judge(prompt, empty) == 0
    assert not correct(prompt, empty)


@kinds
def test_neither_the_prompt_nor_another_answer_helps(prompt, plain, wrong):
    assert judge(prompt, prompt) == 0
    assert judge(prompt, prompt * 3) == 0
    assert judge(prompt, plain.removesuffix(".")) == 10
    others = [answer for other, answer, _ in CASES.values() if other != prompt]
    assert judge(prompt, " ".join(others)) == 0
    assert judge(prompt, " ".join([*others, plain])) < 7


def test_listing_every_answer_scores_0():
    prompt = "How often does dog occur in dog, sun, dog?"
    numbers = [str(number) for number in range(9)]
    for answer in (
        " ".join(numbers),
        ", ".join(numbers),
        ". ".join(numbers),
        "\n".join(numbers),
        " ".join(f"The count is {number}." for number in numbers),
        "The count is " + " or ".join(numbers) + ".",
        "The count is 2 or not.",
        "The count is not 2.",
        "The count is 2.5",
    ):
        assert judge(prompt, answer) == 0


@pytest.mark.parametrize(
    "answer", ["The order is 2, 9 and 10.", "They are 2 9 10.", "the  ORDER is 2-9-10!", "2 9 10", "2, 9, 10."]
)
def test_other_wordings_of_the_same_answer_are_accepted(answer):
    assert correct("Sort 10, 9, 2.", answer)


@pytest.mark.parametrize(
    "answer", ["The word dog is d o g.", "The word dog is spelled d-o-g.", "the word dog is d, o, g"]
)
def test_other_spellings_of_a_word_are_accepted(answer):
    assert judge("Spell dog and sun.", f"{answer.removesuffix('.')}. The word sun is spelled s u n.") > 9


def test_a_conversations_question_is_its_last_message():
    conversation = [
        {"role": "user", "content": "Sort 3, 2, 1."},
        {"role": "assistant", "content": "The order is 1, 2, 3."},
        {"role": "user", "content": "Continue 3, 5, 7."},
    ]
    assert judge(conversation, "The next numbers are 9 and 11.") == 10
    assert not correct(conversation, "The order is 1, 2, 3.")


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "Who are you?",
        "Sort 10, 9, 2",
        "Sort 10 9 2.",
        "Sort 10, 9, 2. Thanks.",
        "What is 3 minus 4, and what is 2 minus 2?",
        "What is 3 plus 4, and what is 3 plus 4?",
        "Which is larger, 7 or 07?",
        "Continue 3, 5, 8.",
        "Continue 5, 5.",
        "Spell dog and dog.",
        "Spell dog and xyz.",
        [],
        [{"role": "user"}],
        [{"role": "user", "content": "hello"}],
    ],
)
def test_other_questions_give_a_one_line_error(prompt):
    with pytest.raises(SimpoError, match="tiny world") as caught:
        judge(prompt, "7")
    assert "\n" not in str(caught.value)
