"""The answers that judges are shown: as they are, or without the thinking that they begin with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from simpo.results import Metric
from simpo.thinking import split_thinking


def shown_answers(
    answers: Sequence[str], *, strip_thinking: bool, name: str, say: Callable[[str], None]
) -> tuple[list[str], list[Metric]]:
    """What judges are shown of answers, and figures about thinking in them; none where there is none.

    Args:
        answers: as they were given.
        strip_thinking: whether to leave thinking out.
        name: what the figures' names begin with.
        say: gets a line if there is thinking.
    """
    parts = [split_thinking(answer) for answer in answers]
    thinking = sum(bool(thought) for thought, _ in parts)
    if not thinking:
        return list(answers), []
    empty = sum(bool(thought) and not answer for thought, answer in parts)
    done = "which judges are not shown" if strip_thinking else "which judges are shown too: --strip_thinking removes it"
    say(f"note: {thinking:,} of {len(answers):,} answers begin with thinking, {done}; {empty:,} never end it")
    counts = {"answers_with_thinking": thinking, "answers_without_end_of_thinking": empty}
    counts |= {"answers_stripped_of_thinking": thinking * strip_thinking}
    metrics = [Metric(f"{name}{key}", count, n=len(answers)) for key, count in counts.items()]
    return [answer for _, answer in parts] if strip_thinking else list(answers), metrics
