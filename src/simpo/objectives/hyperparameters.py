"""Hyperparameters as a function's keyword-only signature declares them: names, types, defaults, bounds."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor


@dataclass(frozen=True)
class Bound:
    """The values that a hyperparameter may take: a phrase for the user and the test behind it."""

    text: str
    holds: Callable[[Any], bool]


Finite = Annotated[float, Bound("must be finite", math.isfinite)]
Positive = Annotated[float, Bound("must be > 0", lambda value: value > 0)]
NonNegative = Annotated[float, Bound("must be >= 0", lambda value: value >= 0)]
Smoothing = Annotated[float, Bound("must be in [0, 0.5)", lambda value: 0 <= value < 0.5)]

Context = Tensor | float
"""Of a keyword-only parameter that is computed from the batch, such as KTO's ``z_ref``: no hyperparameter."""


@dataclass(frozen=True)
class Hyperparameter:
    """One keyword-only parameter of an objective.

    Attributes:
        name: as in the signature and in recipes.
        type: ``float``, ``bool``, ``int`` or a ``Literal`` of strings.
        default: what holds when a recipe says nothing.
        bound: the values allowed, where there is a limit.
    """

    name: str
    type: Any
    default: Any
    bound: Bound | None = None

    def check(self, value: Any) -> None:
        """Raise ``ValueError`` naming the key if ``value`` is not one that this hyperparameter may take."""
        if typing.get_origin(self.type) is Literal:
            allowed = typing.get_args(self.type)
            if value not in allowed:
                raise ValueError(f"{self.name}: {value!r} is not one of {', '.join(map(repr, allowed))}")
            return
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if self.type is float and not number:
            raise ValueError(f"{self.name}: {value!r} is not a number")
        if self.type is bool and not isinstance(value, bool):
            raise ValueError(f"{self.name}: {value!r} is not true or false")
        if number and math.isinf(value):
            raise ValueError(f"{self.name} must be finite, not {value!r}")
        if self.bound is not None and not self.bound.holds(value):  # NaN fails every bound
            raise ValueError(f"{self.name} {self.bound.text}, not {value!r}")


def read_signature(function: Callable[..., Any]) -> dict[str, Hyperparameter]:
    """The hyperparameters of ``function``, by name, in their order: its keyword-only parameters but ``Context``."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint, bound = hints[parameter.name], None
        if hint == Context:
            continue
        if typing.get_origin(hint) is Annotated:
            hint, *marks = typing.get_args(hint)
            bound = next((mark for mark in marks if isinstance(mark, Bound)), None)
        found[parameter.name] = Hyperparameter(parameter.name, hint, parameter.default, bound)
    return found
