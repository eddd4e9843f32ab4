"""The number that a text ends in.

Source: Cobbe et al., Training Verifiers to Solve Math Word Problems (arXiv 2110.14168); its answers end in ``#### N``.
"""

from __future__ import annotations

import re
from decimal import Decimal

from simpo.errors import SimpoError
from simpo.thinking import after_thinking

_NUMBER = re.compile(r"(?<![\d.])-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_MARK = "####"


def final_number(text: str) -> Decimal | None:
    """The number after the last ``####`` or, where nothing is marked so, the last number; None without any.

    Thousands' commas and dollar signs do not count, and neither do numbers in the model's thinking.
    """
    text = after_thinking(text) or ""
    marked = _NUMBER.findall(text.rpartition(_MARK)[2]) if _MARK in text else []
    found = marked[:1] or _NUMBER.findall(text)[-1:]
    return Decimal(found[0].replace(",", "").replace("$", "")) if found else None


def reference_number(answer: str, where: str) -> Decimal:
    """The number that a row's reference answer ends in.

    Raises:
        SimpoError: it has none.
    """
    found = final_number(answer) if _MARK in answer else None
    if found is None:
        raise SimpoError(f"{where}: answer: no number after {_MARK}")
    return found
