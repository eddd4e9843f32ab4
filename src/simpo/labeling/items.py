"""Items to judge: a prompt with two answers to compare, or several to rank, from files of answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from simpo.data.messages import Message, context_of
from simpo.errors import SimpoError
from simpo.evaluation.answers import Record, read_answer_file
from simpo.evaluation.compare import all_pairs, read_matched
from simpo.runs.lines import read_lines


@dataclass(frozen=True)
class Item:
    """One thing to judge."""

    id: str  # of the pair, as `simpo compare` and `simpo pair` name pairs, or of the prompt
    prompt: str | list[Message]  # text or messages
    # Two or more answers, in the order of the file; never in the order in which they are shown.
    responses: tuple[str, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)  # tools and template variables that belong to the prompt

    @property
    def is_tie(self) -> bool:
        """Whether both answers are the same text, about which nobody needs to be asked."""
        return len(set(self.responses)) == 1

    def row(self) -> dict[str, Any]:
        """The item as a row of a file."""
        return {"id": self.id, "prompt": self.prompt, **self.columns, "responses": list(self.responses)}


def load_items(path: Path) -> list[Item]:
    """The items whose rows are in a file."""
    return [
        Item(row["id"], row["prompt"], tuple(row["responses"]), context_of(row).columns) for row in read_lines(path)
    ]


_MOST = 9  # answers to rank; there are nine number keys
# Why an answer or a prompt is not shown: the end of the metric's name.
REPEATED, TOO_FEW = "answers_the_same_as_another_one", "prompts_fewer_than_two_different_answers"
IDENTICAL = "pairs_of_identical_answers"


def items_of_two(a: Path, b: Path) -> tuple[list[Item], Counter[str]]:
    """Every answer in file ``a`` against every answer in ``b`` to the same prompt, as ``simpo compare`` pairs them.

    Returns the items, including those that are ties, and the number of those.
    """
    pairs, _ = all_pairs(read_matched(a, b))
    items = [Item(pair.id, pair.prompt, (pair.a, pair.b), pair.context.columns) for pair in pairs]
    ties = sum(item.is_tie for item in items)
    if ties == len(items):
        raise SimpoError(f"{a} and {b}: all answers are identical; there is nothing to judge")
    return items, Counter({IDENTICAL: ties} if ties else {})


def items_of_one(path: Path, *, pairs: bool) -> tuple[list[Item], Counter[str]]:
    """The different answers to every prompt of a file, to be compared or ranked.

    ``pairs`` asks about every two answers instead of a ranking. Returns the items, and how many answers and prompts are
    left out, by reason.
    """
    records = read_answer_file(path)
    items: list[Item] = []
    dropped: Counter[str] = Counter()
    for record in records.values():
        responses = list(dict.fromkeys(record["responses"]))
        dropped[REPEATED] += len(record["responses"]) - len(responses)
        if len(responses) < 2:
            dropped[TOO_FEW] += 1
        elif pairs:
            items += _all_two(record, responses)
        elif len(responses) > _MOST:
            raise SimpoError(
                f"{path}: prompt {record['id']}: {len(responses)} answers, and at most {_MOST} can be ranked; compare "
                "them in pairs with --pairs true, or sample fewer"
            )
        else:
            items.append(Item(record["id"], record["prompt"], tuple(responses), context_of(record).columns))
    if not items:
        most = max(len(record["responses"]) for record in records.values())
        what = "one answer to every prompt" if most == 1 else "no prompt with two different answers"
        raise SimpoError(f"{path}: {what}; sample several with --n 2, or name a second file with --against")
    return items, +dropped


def _all_two(record: Record, responses: Sequence[str]) -> list[Item]:
    columns = context_of(record).columns
    return [
        Item(f"{record['id']}/{i}-{j}", record["prompt"], (a, b), columns)
        for (i, a), (j, b) in combinations(enumerate(responses), 2)
    ]
