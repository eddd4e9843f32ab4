"""The search space of a sweep: keys of a recipe, each with values to try or a range to draw from."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from simpo.config.coercion import describe, nearest
from simpo.errors import SimpoError

# One value for every axis, as it is written on the command line.
Values = dict[str, str]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_LOGARITHMIC_FROM = 10  # ratio of a range's ends
_EDGE = 0.1  # share of a range that counts as its end


@dataclass(frozen=True)
class Choices:
    """A key with values to try."""

    key: str
    values: tuple[str, ...]

    def suggest(self, trial: Any) -> str:
        """The value of an Optuna trial."""
        return trial.suggest_categorical(self.key, list(self.values))

    @property
    def probes(self) -> tuple[str, ...]:
        """Values that are checked before anything runs: all of them."""
        return self.values

    def edge(self, value: str) -> str | None:
        """Whether ``value`` is the ``smallest`` or ``largest`` of several numbers; None for neither."""
        numbers = {_number(choice) for choice in self.values}
        if len(numbers) < 2 or any(map(math.isnan, numbers)):
            return None
        return {min(numbers): "smallest", max(numbers): "largest"}.get(float(value))

    def __str__(self) -> str:
        return f"{self.key} {', '.join(self.values)}"


@dataclass(frozen=True)
class Range:
    """A key with numbers between two ends, on a logarithmic scale if they are positive and a factor of ten apart."""

    key: str
    low: str
    high: str
    whole: bool

    @property
    def logarithmic(self) -> bool:
        """Whether the scale is logarithmic."""
        return float(self.low) > 0 and float(self.high) / float(self.low) >= _LOGARITHMIC_FROM

    def suggest(self, trial: Any) -> str:
        """The value of an Optuna trial."""
        if self.whole:
            return str(trial.suggest_int(self.key, int(self.low), int(self.high), log=self.logarithmic))
        return repr(trial.suggest_float(self.key, float(self.low), float(self.high), log=self.logarithmic))

    @property
    def probes(self) -> tuple[str, ...]:
        """Values that are checked before anything runs: both ends."""
        return self.low, self.high

    def edge(self, value: str) -> str | None:
        """Whether ``value`` is within a tenth of the ``smallest`` or ``largest`` end; None for neither."""
        scale = math.log if self.logarithmic else float
        low, high, found = (scale(float(number)) for number in (self.low, self.high, value))
        share = (found - low) / (high - low)
        if share <= _EDGE:
            return "smallest"
        return "largest" if share >= 1 - _EDGE else None

    def __str__(self) -> str:
        return f"{self.key} {self.low} to {self.high}{' (logarithmic)' if self.logarithmic else ''}"


Axis = Choices | Range


def read_axes(options: Mapping[str, Sequence[str]], annotations: Mapping[str, Any]) -> tuple[Axis, ...]:
    """The axes among the options of a command line: ``A,B,C`` are values to try, ``LOW..HIGH`` is a range.

    ``options`` are the values after every ``--key``; a value that starts with a bracket is JSON and no axis.
    ``annotations`` are the keys of recipes with their types.
    """
    axes: list[Axis] = []
    for key, values in options.items():
        if len(values) != 1 or values[0].startswith(("[", "{")):
            continue
        match = _RANGE.fullmatch(values[0])
        if match is None and "," not in values[0]:
            continue
        if key not in annotations:
            raise SimpoError(f"--{key}: unknown key{nearest(key, annotations)}")
        if key == "output_dir":
            raise SimpoError("--output_dir: the sweep has one folder, with a folder for every trial in it; name one")
        if match is None:
            axes.append(_choices(key, values[0]))
        else:
            axes.append(_range(key, match[1], match[2], describe(annotations[key])))
    return tuple(axes)


def _choices(key: str, text: str) -> Choices:
    values = tuple(value.strip() for value in text.split(","))
    for number, value in enumerate(values):
        if not value:
            raise SimpoError(f"--{key}: {text!r} has an empty value; write {key} as A,B,C")
        if any(value == other or _number(value) == _number(other) for other in values[:number]):
            raise SimpoError(f"--{key}: {value} comes twice")
    return Choices(key, values)


def _range(key: str, low: str, high: str, kind: str) -> Range:
    whole = "a whole number" in kind
    if not whole and "a number" not in kind:
        raise SimpoError(f"--{key}: takes {kind}, which has no ranges; write the values as A,B,C")
    if float(low) >= float(high):
        raise SimpoError(f"--{key}: {low} to {high} is empty; write the smaller number first")
    if whole and not (low.lstrip("+-").isdigit() and high.lstrip("+-").isdigit()):
        raise SimpoError(f"--{key}: {low} to {high} are not whole numbers")
    return Range(key, low, high, whole)


def _number(value: str) -> float:
    """``value`` as a number, or NaN, which equals nothing."""
    with suppress(ValueError):
        return float(value)
    return math.nan


def combinations(axes: Sequence[Axis]) -> Iterator[Values]:
    """Every combination of the axes' probes; the last axis changes first. For a grid these are the trials."""
    for values in itertools.product(*(axis.probes for axis in axes)):
        yield dict(zip((axis.key for axis in axes), values, strict=True))


def one_at_a_time(axes: Sequence[Axis]) -> Iterator[Values]:
    """Every probe of each axis, combined with the first probes of the others."""
    first = {axis.key: axis.probes[0] for axis in axes}
    for axis in axes:
        for value in axis.probes:
            yield first | {axis.key: value}


def format_values(values: Mapping[str, str]) -> str:
    """``learning_rate 3e-7, beta 2``."""
    return ", ".join(f"{key} {value}" for key, value in values.items())
