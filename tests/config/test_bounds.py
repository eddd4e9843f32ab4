"""Bounds and choices are declared with the setting and checked in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest

from simpo.config import check_values, setting, setting_of
from simpo.errors import CombinedError


@dataclass
class Settings:
    count: int | None = setting(1, "A count.", least=1)
    share: float = setting(0.5, "A share.", above=0, most=1)
    probability: float = setting(0.0, "A probability.", least=0, below=1)
    kind: Literal["a", "b"] | None = setting("a", "A kind.")
    either: Literal["off"] | float = setting("off", "A number, or off.")
    same: float = setting_of(dataclass(type("Other", (), {"__annotations__": {"x": float}, "x": 2.0})), "x")

    def __post_init__(self) -> None:
        check_values(self)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("count", value) for value in (0, -1, 1.5, True, "2", math.inf)],
        *[("share", value) for value in (0, 1.0001, -0.5, math.nan, math.inf, None)],
        *[("probability", value) for value in (1, -1e-9)],
        *[("kind", value) for value in ("c", 1)],
    ],
)
def test_the_error_names_the_key_and_the_value(key: str, value: Any) -> None:
    if value is None:
        assert Settings(**{key: value}).share is None
        return
    with pytest.raises(CombinedError) as caught:
        Settings(**{key: value})
    assert str(caught.value).startswith(f"{key}: ") and str(value) in str(caught.value)


def test_values_within_the_bounds_are_accepted() -> None:
    for key, value in (
        ("count", None),
        ("count", np.int64(3)),
        ("share", np.float32(1)),
        ("kind", None),
        ("either", 3),
    ):
        assert getattr(Settings(**{key: value}), key) == value
    assert Settings().same == 2.0


def test_all_mistakes_are_reported_together() -> None:
    with pytest.raises(CombinedError) as caught:
        Settings(count=0, share=2, kind="z")  # type: ignore[arg-type]
    assert [mistake.partition(":")[0] for mistake in caught.value.args] == ["count", "share", "kind"]
