"""What a sweep varies: keys of a recipe, each with values to try or a range to draw from."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from simpo.config.coercion import describe, nearest
from simpo.errors import SimpoError

# One value of every axis, as text: what is written behind --key.
Values = dict[str, str]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_WIDE = 10  # from this ratio on, a range is drawn from on a logarithmic scale
_EDGE = 0.1  # share of a range that counts as its end


class Axis(Protocol):
    """A key that is varied."""

    @property
    def key(self) -> str:
        """The recipe's."""

    def suggest(self, trial: Any) -> str:
        """The value of an Optuna trial."""

    def probes(self) -> tuple[str, ...]:
        """Values that must be usable if all are."""

    def edge(self, value: str) -> str | None:
        """Which end of what is tried ``value`` lies at: smallest or largest; None for neither."""

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Choices:
    """Values to try, as they are written."""

    key: str
    values: tuple[str, ...]

    def suggest(self, trial: Any) -> str:
        """The value of an Optuna trial."""
        return trial.suggest_categorical(self.key, list(self.values))

    def probes(self) -> tuple[str, ...]:
        """All of them."""
        return self.values

    def edge(self, value: str) -> str | None:
        """Which end of the values, if they are numbers and more than one."""
        numbers = numbers_of(self.values)
        if len(set(numbers)) < 2:
            return None
        return {min(numbers): "smallest", max(numbers): "largest"}.get(float(value))

    def __str__(self) -> str:
        return f"{self.key} {', '.join(self.values)}"


@dataclass(frozen=True)
class Range:
    """Numbers between two ends; on a logarithmic scale where these are positive and a factor of ten apart."""

    key: str
    low: str
    high: str
    whole: bool

    @property
    def logarithmic(self) -> bool:
        """Whether ratios count, not differences."""
        return float(self.low) > 0 and float(self.high) / float(self.low) >= _WIDE

    def suggest(self, trial: Any) -> str:
        """The value of an Optuna trial."""
        if self.whole:
            return str(trial.suggest_int(self.key, int(self.low), int(self.high), log=self.logarithmic))
        return repr(trial.suggest_float(self.key, float(self.low), float(self.high), log=self.logarithmic))

    def probes(self) -> tuple[str, ...]:
        """Both ends."""
        return self.low, self.high

    def edge(self, value: str) -> str | None:
        """Which end, if it is within a tenth of the range."""
        scale = math.log if self.logarithmic else float
        low, high, found = (scale(float(number)) for number in (self.low, self.high, value))
        share = (found - low) / (high - low)
        if share <= _EDGE:
            return "smallest"
        return "largest" if share >= 1 - _EDGE else None

    def __str__(self) -> str:
        return f"{self.key} {self.low} to {self.high}{' (logarithmic)' if self.logarithmic else ''}"


def numbers_of(values: Sequence[str]) -> list[float]:
    """The values as numbers; empty if one is none."""
    with suppress(ValueError):
        return [float(value) for value in values]
    return []


def read_axes(given: Mapping[str, Sequence[str]], annotations: Mapping[str, Any]) -> tuple[Axis, ...]:
    """The axes among the options of a command line: ``A,B,C`` are values to try, ``LOW..HIGH`` is a range.

    Args:
        given: what stands behind every ``--key``; a value that starts with a bracket is JSON and no axis.
        annotations: the keys that recipes have, and what fits them.

    Raises:
        SimpoError: an unknown key, a value that comes twice, or a range that is empty or of a key without numbers.
    """
    return tuple(_axis(key, texts[0], annotations) for key, texts in given.items() if _varies(texts))


def _varies(texts: Sequence[str]) -> bool:
    if len(texts) != 1 or texts[0].startswith(("[", "{")):
        return False
    return "," in texts[0] or _RANGE.fullmatch(texts[0]) is not None


def _axis(key: str, text: str, annotations: Mapping[str, Any]) -> Axis:
    if key not in annotations:
        raise SimpoError(f"--{key}: unknown key{nearest(key, annotations)}")
    if key == "output_dir":
        raise SimpoError("--output_dir: the sweep has one folder, and every trial its own in there; name one")
    found = _RANGE.fullmatch(text)
    if found is not None:
        return _range(key, found[1], found[2], describe(annotations[key]))
    values = tuple(value.strip() for value in text.split(","))
    for number, value in enumerate(values):
        if not value:
            raise SimpoError(f"--{key}: {text!r} has an empty value; write {key} as A,B,C")
        if any(value == other or _number(value) == _number(other) for other in values[:number]):
            raise SimpoError(f"--{key}: {value} comes twice")
    return Choices(key, values)


def _number(value: str) -> float:
    """``value`` as a number; NaN, which is equal to nothing, if it is none."""
    with suppress(ValueError):
        return float(value)
    return math.nan


def _range(key: str, low: str, high: str, kind: str) -> Range:
    whole = "a whole number" in kind
    if not whole and "a number" not in kind:
        raise SimpoError(f"--{key}: takes {kind}, which has no ranges; write the values as A,B,C")
    if float(low) >= float(high):
        raise SimpoError(f"--{key}: {low} to {high} is empty; write the smaller number first")
    if whole and not (low.lstrip("+-").isdigit() and high.lstrip("+-").isdigit()):
        raise SimpoError(f"--{key}: {low} to {high} are not whole numbers")
    return Range(key, low, high, whole)


def combinations(axes: Sequence[Axis]) -> Iterator[Values]:
    """Every combination of the axes' probes: of a grid, its trials; the last axis changes first."""
    for values in itertools.product(*(axis.probes() for axis in axes)):
        yield dict(zip((axis.key for axis in axes), values, strict=True))


def one_at_a_time(axes: Sequence[Axis]) -> Iterator[Values]:
    """Every probe of each axis, combined with the first ones of the others."""
    first = {axis.key: axis.probes()[0] for axis in axes}
    for axis in axes:
        for value in axis.probes():
            yield first | {axis.key: value}


def shown(values: Mapping[str, str]) -> str:
    """``learning_rate 3e-7, beta 2``."""
    return ", ".join(f"{key} {value}" for key, value in values.items())
