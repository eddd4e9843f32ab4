"""Parameters of slow tests: ``make test`` runs a sample, and ``make soak`` the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], *, kept: Collection[Any]) -> list[Any]:
    """Return all ``values`` for ``pytest.mark.parametrize``; ``make test`` only runs those in ``kept``.

    A tuple contains the values for several parameters.
    """
    values = list(values)
    assert kept and all(value in values for value in kept)
    return [value if value in kept else _exhaustive(value) for value in values]


def _exhaustive(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.exhaustive)
