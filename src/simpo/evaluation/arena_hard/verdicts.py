"""Verdicts in a judge's words, and the battles that they count as."""

from __future__ import annotations

import re
from typing import Literal

from simpo.thinking import after_thinking

Version = Literal["v0.1", "v2"]

_MARKED = re.compile(r"\[\[([AB<>=]+)\]\]")
_LOOSELY_MARKED = re.compile(r"\[([AB<>=]+)\]")
_STRONG = 3  # battles that a strong verdict counts as
# What each verdict is worth to the answer that is shown first.
_WORTH = {"A>>B": (1.0, _STRONG), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, _STRONG)}
_OTHER_WAY_ROUND = {"B<<A": "A>>B", "B<A": "A>B", "B=A": "A=B", "A<B": "B>A", "A<<B": "B>>A"}


def read_verdict(text: str, version: Version) -> str | None:
    """One of ``A>>B``, ``A>B``, ``A=B``, ``B>A`` and ``B>>A``; None where the judge gave none.

    v0.1 takes the verdict in double brackets if there is one only, or the same one several times. v2 takes the last, in
    any case, in single brackets where there is none in double ones, and written either way round. What the judge wrote
    while it was thinking does not count.
    """
    text = after_thinking(text) or ""
    if version == "v0.1":
        found = set(_MARKED.findall(text))
        return found.pop() if len(found) == 1 and found <= _WORTH.keys() else None
    matches = _MARKED.findall(text.upper()) or _LOOSELY_MARKED.findall(text.upper())
    last = matches[-1] if matches else ""
    verdict = _OTHER_WAY_ROUND.get(last, last)
    return verdict if verdict in _WORTH else None


def battles(first: str | None, second: str | None, version: Version) -> list[float]:
    """What a prompt's games are worth to the model, a number in [0, 1] for each battle.

    Args:
        first: verdict of the game in which the baseline is shown first.
        second: of the one in which the model is.
        version: v0.1 counts a game whose counterpart has no verdict, v2 does not.
    """
    if version == "v2" and (first is None or second is None):
        return []
    return [1 - share for share in _shares(first)] + _shares(second)


def _shares(verdict: str | None) -> list[float]:
    if verdict is None:
        return []
    share, count = _WORTH[verdict]
    return [share] * count
