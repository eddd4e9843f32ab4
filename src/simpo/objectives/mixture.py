"""Combines objectives into a weighted sum, which is an objective itself."""

# ruff: noqa: D102, E741 - the base class documents the methods; the papers write w and l for chosen and rejected

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from simpo.objectives.objective import OBJECTIVES, Hyperparameter, Objective, Responses


@dataclass(frozen=True)
class Mixture(Objective):
    """The weighted sum of the losses of its parts, ``[B]``.

    A part's hyperparameter is called ``part.name`` (``dpo.beta``); a plain ``name`` sets it in every part that has it.
    The logged reward is that of :attr:`leading`.
    """

    parts: tuple[Objective, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> Mixture:
        """Build a mixture from names and weights; raises ``ValueError`` for unknown names or weights not above 0."""
        for name, weight in weights.items():
            if name not in OBJECTIVES:
                raise ValueError(f"objective: {name!r} is unknown; choose from {', '.join(OBJECTIVES)}")
            if not 0 < weight < math.inf:
                raise ValueError(f"objective: the weight of {name} must be above 0 and finite, not {weight}")
        if not weights:
            raise ValueError("objective: the mixture is empty; write {name: weight, ...}")
        return cls(tuple(OBJECTIVES[name] for name in weights), tuple(weights.values()))

    @property
    def name(self) -> str:  # type: ignore[override]
        return " + ".join(f"{weight:g} {part.name}" for part, weight in zip(self.parts, self.weights, strict=True))

    @property
    def paper(self) -> str:  # type: ignore[override]
        return "; ".join(part.paper for part in self.parts)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(need for part in self.parts for need in part.needs))

    @property
    def leading(self) -> Objective:
        """The part whose rewards are logged: the one that needs their mean (BCO) if there is one, else the first."""
        return next((part for part in self.parts if "reward_shift" in part.needs), self.parts[0])

    @property
    def average_logps(self) -> bool:  # type: ignore[override]
        return self.leading.average_logps

    @property
    def takes_unpaired(self) -> bool:  # type: ignore[override]
        return all(part.takes_unpaired for part in self.parts)

    @property
    def averages_pairs(self) -> bool:
        return all(part.averages_pairs for part in self.parts)

    def part_that_needs(self, need: str) -> Objective:
        return next(part for part in self.parts if need in part.needs)

    # ---- Formulas.

    def pair(self, w: Responses, l: Responses, **context: Any) -> Tensor:
        return self._sum(lambda part: part.pair(w, l, **_needed(part, context)))

    def comparisons(self, y: Responses, pairs: Any, **context: Any) -> Tensor:
        return self._sum(lambda part: part.comparisons(y, pairs, **_needed(part, context)))

    def anchor(self, w: Responses) -> Tensor | None:
        return self._sum(lambda part: part.anchor(w))

    def unpaired(self, y: Responses, label: Tensor, **context: Any) -> Tensor:
        return self._sum(lambda part: part.unpaired(y, label, **_needed(part, context)))

    def implicit_reward(self, y: Responses) -> Tensor:
        return self.leading.implicit_reward(y)

    def _sum(self, compute: Callable[[Objective], Tensor | None]) -> Any:
        """Sum ``compute`` over the parts, weighted, skipping those that return None; None if all do."""
        results = [(weight, compute(part)) for part, weight in zip(self.parts, self.weights, strict=True)]
        terms = [weight * result for weight, result in results if result is not None]
        return sum(terms[1:], terms[0]) if terms else None

    # ---- Hyperparameters.

    @cached_property
    def hyperparameters(self) -> dict[str, Hyperparameter]:
        return {
            f"{part.name}.{name}": parameter._replace(name=f"{part.name}.{name}")
            for part in self.parts
            for name, parameter in part.hyperparameters.items()
        }

    def resolve(self, given: Mapping[str, Any]) -> dict[str, Any]:
        for name in given:
            if not any(name in (*part.hyperparameters, *part.aliases) for part in self.parts):
                raise ValueError(f"{name} is not a hyperparameter of {' or '.join(p.name for p in self.parts)}")
        resolved: dict[str, Any] = {}
        for part in self.parts:
            own = {key: value for key, value in given.items() if key in (*part.hyperparameters, *part.aliases)}
            resolved |= {f"{part.name}.{name}": value for name, value in part.resolve(own).items()}
        return resolved

    def with_hyperparameters(self, **hyperparameters: Any) -> Mixture:
        parts = []
        for part in self.parts:
            start = f"{part.name}."
            own = {key.removeprefix(start): value for key, value in hyperparameters.items() if key.startswith(start)}
            parts.append(part.with_hyperparameters(**own))
        return replace(self, parts=tuple(parts))

    @property
    def row_columns(self) -> tuple[str, ...]:
        return tuple(name for name in self.parts[0].row_columns if all(name in p.row_columns for p in self.parts))

    def with_row_columns(self, **columns: Tensor | None) -> Mixture:
        return replace(self, parts=tuple(part.with_row_columns(**columns) for part in self.parts))


def _needed(part: Objective, context: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in context.items() if name in part.needs}
