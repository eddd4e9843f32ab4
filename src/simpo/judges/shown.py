"""The answers that judges are shown: as they are, or without the thinking that they begin with."""

from __future__ import annotations

from collections.abc import Callable

from simpo.results import Metric
from simpo.thinking import split_thinking


class Shown:
    """Gives the text of an answer that judges are shown, and counts the thinking in all answers."""

    def __init__(self, strip_thinking: bool) -> None:
        self._strip = strip_thinking
        self._answers = self._thinking = self._endless = 0

    def __call__(self, answer: str) -> str:
        """The answer, or what follows its thinking."""
        thinking, rest = split_thinking(answer)
        self._answers += 1
        self._thinking += bool(thinking)
        self._endless += bool(thinking) and not rest
        return rest if self._strip else answer

    def metrics(self, name: str, say: Callable[[str], None]) -> list[Metric]:
        """How many answers had thinking, how many of them nothing else, and from how many it was removed; or nothing.

        Args:
            name: what the figures' names begin with.
            say: gets a line if there was thinking.
        """
        if not self._thinking:
            return []
        done = "judges are not shown it" if self._strip else "judges are shown it: --strip_thinking removes it"
        say(f"note: {self._thinking:,} of {self._answers:,} answers begin with thinking; {done}")
        counts = {"with_thinking": self._thinking, "without_end_of_thinking": self._endless}
        counts |= {"stripped_of_thinking": self._thinking * self._strip}
        return [Metric(f"{name}answers_{key}", count, n=self._answers) for key, count in counts.items()]
