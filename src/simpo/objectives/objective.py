"""Defines responses and the base class of objectives, frozen dataclasses whose fields are hyperparameters."""

# ruff: noqa: E741 - the papers write w and l for the chosen and the rejected response

from __future__ import annotations

import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

# Odds are infinite if a probability rounds to 1, so an average log-probability is kept at least this far below 0.
_MIN_DISTANCE = 1e-12


@dataclass(frozen=True)
class Responses:
    """Log-probabilities of ``B`` responses.

    Attributes:
        logp: ``[B]`` sum of ``log pi(y_t | x, y_<t)`` over the scored tokens, in nats.
        length: ``[B]`` number of scored tokens ``|y|``, including the end-of-turn token.
        ref_logp: ``[B]`` the same sum under the reference model, for objectives that need one.
    """

    logp: Tensor
    length: Tensor
    ref_logp: Tensor | None = None

    def take(self, index: Tensor) -> Responses:
        """Select the responses at these indices, ``[N]``."""
        columns = (self.logp, self.length, self.ref_logp)
        return Responses(*(None if column is None else column.index_select(0, index) for column in columns))

    @property
    def avg(self) -> Tensor:
        """Average log-probability per token, ``logp / |y|``, ``[B]``: SimPO's reward over beta (eq. 4)."""
        return self.logp / self.length

    @property
    def ratio(self) -> Tensor:
        """Log-ratio ``log pi(y|x) - log pi_ref(y|x)``, ``[B]``; raises ``ValueError`` without ``ref_logp``."""
        if self.ref_logp is None:
            raise ValueError("this objective compares the policy with a reference, but ref_logp is missing")
        return self.logp - self.ref_logp

    @property
    def avg_ratio(self) -> Tensor:
        """Average log-ratio per token, ``ratio / |y|``, ``[B]``; raises ``ValueError`` as ``ratio`` does."""
        return self.ratio / self.length

    @property
    def log_odds(self) -> Tensor:
        """Log-odds ``log(p / (1 - p))`` of the geometric-mean token probability ``p = exp(avg)``, ``[B]``.

        ORPO, eq. 4. Stable over the whole range: ``1 - exp(avg)`` is computed with ``expm1`` near ``avg = 0`` and with
        ``log1p`` far from it, and neither branch feeds an infinite gradient into the other. An average that rounds to
        0, where odds and slope are infinite, is replaced by ``-1e-12``.
        """
        avg = self.avg
        avg = avg - (avg + _MIN_DISTANCE).clamp(min=0).detach()  # clamps the value, but keeps the gradient
        near_zero = avg > -math.log(2.0)
        # each branch gets a harmless argument where the other one is used, because 0 * inf would be NaN in backward
        small = torch.where(near_zero, avg, torch.full_like(avg, -1.0))
        large = torch.where(near_zero, torch.full_like(avg, -1.0), avg)
        log_one_minus_p = torch.where(near_zero, (-torch.expm1(small)).log(), torch.log1p(-large.exp()))
        return avg - log_one_minus_p


# ---- Objectives and their hyperparameters.


class Bound(NamedTuple):
    """The allowed values of a hyperparameter: a phrase for error messages, and a test."""

    text: str
    holds: Callable[[Any], bool]


FINITE = Bound("must be finite", math.isfinite)
POSITIVE = Bound("must be > 0", lambda value: value > 0)
NON_NEGATIVE = Bound("must be >= 0", lambda value: value >= 0)
OPEN_UNIT = Bound("must be in (0, 1)", lambda value: 0 < value < 1)
BELOW_HALF = Bound("must be in [0, 0.5)", lambda value: 0 <= value < 0.5)


class Hyperparameter(NamedTuple):
    """A field of an objective: ``name: Annotated[type, bound, help] = default``, where ``bound`` is optional."""

    name: str
    type: Any  # float, bool or a Literal of strings
    default: Any
    bound: Bound | None
    help: str

    def check(self, value: Any) -> None:
        """Raise ``ValueError``, naming the key, unless ``value`` is allowed."""
        if typing.get_origin(self.type) is Literal:
            allowed = typing.get_args(self.type)
            if value not in allowed:
                raise ValueError(f"{self.name}: {value!r} is not one of {', '.join(map(str, allowed))}")
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


class Alias(NamedTuple):
    """Another name for the hyperparameter ``of``, for example SimPO's absolute ``gamma`` for ``gamma_beta_ratio``.

    ``convert`` takes the given value and the other hyperparameters, and returns the value of ``of``.
    """

    of: str
    convert: Callable[[float, Mapping[str, Any]], float] = lambda value, values: value


@dataclass(frozen=True)
class Objective(ABC):
    """A loss and an implicit reward; the fields of a subclass are its hyperparameters.

    A loss is a pair term plus, for some objectives, an anchor term on the chosen response alone. For rankings of more
    than two responses, the pair term is averaged over all ordered pairs, and the anchor applies once, to the best
    response. Subclasses define :meth:`pair`, :meth:`implicit_reward` and, if they have an anchor, :meth:`anchor`.
    :meth:`resolve` checks the bounds; the constructor does not, because the formulas are defined beyond them.

    Class attributes:
        name: key in recipes.
        paper: source of the formula.
        needs: what a batch must provide besides log-probabilities. ``"reference"`` arrives as ``Responses.ref_logp``;
            anything else, such as KTO's ``"z_ref"``, as a keyword argument of :meth:`pair` and :meth:`unpaired`.
        average_logps: whether ``logps/*`` are logged as averages over tokens (otherwise as sums).
        takes_unpaired: whether it can train on single labeled responses.
        aliases: other names for hyperparameters.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    average_logps: ClassVar[bool] = False
    takes_unpaired: ClassVar[bool] = False
    aliases: ClassVar[Mapping[str, Alias]] = {}

    @abstractmethod
    def pair(self, w: Responses, l: Responses, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the pair terms ``[B]`` of ``B`` chosen and rejected responses."""

    def comparisons(self, y: Responses, pairs: Any, **context: Any) -> Tensor:
        """Compute the pair terms ``[C]`` of ``C`` comparisons, each averaged over its ordered pairs.

        Args:
            y: all ``R`` responses of the comparisons.
            pairs: indices of the ``N`` pairs (:class:`simpo.training.batches.OrderedPairs`).
            context: what the batch provides, as for :meth:`pair`.
        """
        return pairs.mean(self.pair(y.take(pairs.better), y.take(pairs.worse), **context))

    def anchor(self, w: Responses) -> Tensor | None:
        """Compute the terms ``[B]`` on the chosen responses alone; None if the objective has no such term."""
        return None

    def unpaired(self, y: Responses, label: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the losses ``[B]`` of single responses with a bool ``label`` ``[B]``: whether each is desirable.

        Raises:
            ValueError: the objective compares responses and has no loss for a single one.
        """
        raise ValueError(f"{self.name} has no loss for single responses")

    @abstractmethod
    def implicit_reward(self, y: Responses) -> Tensor:
        """Compute the rewards ``[B]`` that the loss implies."""

    def loss(self, w: Responses, l: Responses, **values: Any) -> Tensor:
        """Compute losses ``[B]``: the pair term, plus the anchor term if there is one.

        ``values`` override hyperparameters of this objective, and supply what the batch provides.
        """
        context = {name: values.pop(name) for name in self.needs if name in values}
        objective = self.with_hyperparameters(**values)
        losses, anchor = objective.pair(w, l, **context), objective.anchor(w)
        return losses if anchor is None else losses + anchor

    def reward(self, y: Responses, **values: Any) -> Tensor:
        """Compute the implicit rewards ``[B]``, for logging; ``values`` as in :meth:`loss`."""
        hyperparameters = {name: value for name, value in values.items() if name not in self.needs}
        return self.with_hyperparameters(**hyperparameters).implicit_reward(y)

    def part_that_needs(self, need: str) -> Objective:
        """Return the objective, or the part of a mixture, that needs ``need``, one of :attr:`needs`."""
        return self

    @property
    def row_columns(self) -> tuple[str, ...]:
        """The data columns that can change the loss of a row."""
        columns = ["weight"]
        if "label_smoothing" in self.hyperparameters and getattr(self, "link", "sigmoid") == "sigmoid":
            columns.append("label_probability")
        if {"gamma", "gamma_beta_ratio"} & self.hyperparameters.keys():
            columns.append("margin")
        # Not for KTO, whose reference point contains beta, nor for listwise rewards, which do not belong to pairs.
        if "beta" in self.hyperparameters and "z_ref" not in self.needs and self.averages_pairs:
            columns.append("beta")
        return tuple(columns)

    @property
    def averages_pairs(self) -> bool:
        """Whether a comparison's loss is the mean over its pairs, so that pairs can be weighted."""
        return type(self).comparisons is Objective.comparisons

    def with_row_columns(
        self, *, label_probability: Tensor | None = None, margin: Tensor | None = None, beta: Tensor | None = None
    ) -> Objective:
        """Return the objective with per-pair values, for :meth:`pair` and, if ``beta`` is given, :meth:`reward`.

        Args:
            label_probability: ``[B]`` probability that the chosen response is better; replaces ``1 - label_smoothing``.
            margin: ``[B]`` target margin in addition to ``gamma``.
            beta: ``[B]`` replaces ``beta``; ``gamma_beta_ratio`` stays the same.
        """
        changed: dict[str, Any] = {} if beta is None else {"beta": beta}
        if label_probability is not None:
            changed["label_smoothing"] = 1 - label_probability
        if margin is not None and hasattr(self, "gamma_beta_ratio"):
            scale = self.beta if beta is None else beta  # type: ignore[attr-defined]
            changed["gamma_beta_ratio"] = self.gamma_beta_ratio + margin / scale  # type: ignore[attr-defined]
        elif margin is not None:
            changed["gamma"] = self.gamma + margin  # type: ignore[attr-defined]
        return replace(self, **changed)

    def with_hyperparameters(self, **hyperparameters: Any) -> Objective:
        """Return the objective with these hyperparameters; raises ``ValueError`` for unknown names."""
        for name in hyperparameters:
            if name not in self.hyperparameters:
                raise ValueError(self._unknown(name))
        return replace(self, **hyperparameters)

    @property
    def needs_reference(self) -> bool:
        """Whether the responses must carry ``ref_logp``."""
        return "reference" in self.needs

    @cached_property
    def hyperparameters(self) -> dict[str, Hyperparameter]:
        """The fields as hyperparameters, by name."""
        hints = typing.get_type_hints(type(self), include_extras=True)
        parameters = {}
        for field in fields(self):
            kind, *bound, help_text = typing.get_args(hints[field.name])
            default = getattr(self, field.name)
            parameters[field.name] = Hyperparameter(field.name, kind, default, bound[0] if bound else None, help_text)
        return parameters

    def resolve(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Merge the ``given`` hyperparameters, under any of their names, with the defaults, and check them.

        Raises:
            ValueError: an unknown name (the message lists the objectives that have it), a hyperparameter given under
                two names, a value out of bounds, or a combination that the objective rejects.
        """
        values = {name: known.default for name, known in self.hyperparameters.items()}
        aliased = {name: self.aliases[name] for name in given if name in self.aliases}
        for name, value in given.items():
            if name in values:
                values[name] = value
            elif name not in aliased:
                raise ValueError(self._unknown(name))
        for name, alias in aliased.items():
            if alias.of in given:
                raise ValueError(f"{name} and {alias.of} set the same hyperparameter; give only one of them")
            self.hyperparameters[alias.of]._replace(name=name).check(given[name])
        for name, value in values.items():
            self.hyperparameters[name].check(value)
        for name, alias in aliased.items():  # conversions need checked values
            values[alias.of] = alias.convert(given[name], values)
        self.with_hyperparameters(**values)
        return values

    def _unknown(self, name: str) -> str:
        owners = [row.name for row in OBJECTIVES.values() if name in row.hyperparameters or name in row.aliases]
        names = ", ".join([*self.hyperparameters, *self.aliases]) or "none"
        belongs = f" (it belongs to {', '.join(owners)})" if owners else ""
        return f"{name} is not a hyperparameter of objective {self.name!r}{belongs}; it has {names}"


OBJECTIVES: dict[str, Objective] = {}
"""All objectives by name, with their default hyperparameters; the modules that define objectives fill it."""
