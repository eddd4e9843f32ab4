"""Parameters of slow tests: ``make test`` takes a sample of them, and ``make soak`` the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], *, kept: Collection[Any]) -> list[Any]:
    """All ``values`` for ``pytest.mark.parametrize``, of which ``make test`` takes those in ``kept``.

    A tuple has the values of several parameters.
    """
    values = list(values)
    assert kept and all(value in values for value in kept)
    return [value if value in kept else _exhaustive(value) for value in values]


def _exhaustive(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.exhaustive)
