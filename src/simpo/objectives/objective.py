"""An objective: its functions, its hyperparameters, and the responses that it is given."""

from __future__ import annotations

import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

# ---- Hyperparameters as a function's keyword-only signature declares them: names, types, defaults, bounds.


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


# ---- What an objective sees of a response: its log-probability and its length.


# How far from 0 an average log-probability is at least, for its odds: less than one that has not been rounded to 0.
_CERTAIN = 1e-12


@dataclass(frozen=True)
class Responses:
    """Log-probabilities of ``B`` responses.

    Attributes:
        logp: ``[B]`` sum over the scored tokens of ``log pi(y_t | x, y_<t)``, in nats.
        length: ``[B]`` number of scored tokens ``|y|``, the end-of-turn token included.
        ref_logp: ``[B]`` the same sum under the reference policy, for objectives that need one.
    """

    logp: Tensor
    length: Tensor
    ref_logp: Tensor | None = None

    @property
    def avg(self) -> Tensor:
        """``[B]`` average log-probability of a token, ``logp / |y|``: SimPO's reward over beta (eq. 4)."""
        return self.logp / self.length

    @property
    def ratio(self) -> Tensor:
        """``[B]`` ``log pi(y|x) - log pi_ref(y|x)``.

        Raises:
            ValueError: there is no ``ref_logp``.
        """
        if self.ref_logp is None:
            raise ValueError("this objective compares the policy with a reference, and ref_logp is missing")
        return self.logp - self.ref_logp

    @property
    def avg_ratio(self) -> Tensor:
        """``[B]`` ``ratio / |y|``: the log-ratio of an average token.

        Raises:
            ValueError: there is no ``ref_logp``.
        """
        return self.ratio / self.length

    @property
    def log_odds(self) -> Tensor:
        """``[B]`` ``log(p / (1 - p))`` of the geometric-mean token probability ``p = exp(avg)`` (ORPO, eq. 4).

        Stable over the whole range: ``1 - exp(avg)`` is taken by ``expm1`` near ``avg = 0`` and by ``log1p``
        far from it, and neither branch feeds an infinite gradient into the other. An average that rounds to 0, where
        odds and slope are infinite, is taken for ``-1e-12``.
        """
        avg = self.avg
        avg = avg - (avg + _CERTAIN).clamp(min=0).detach()  # the slope with respect to it stays 1
        near_zero = avg > -math.log(2.0)
        # each branch gets a harmless argument where the other one is taken: 0 * inf would be NaN in backward
        small = torch.where(near_zero, avg, torch.full_like(avg, -1.0))
        large = torch.where(near_zero, torch.full_like(avg, -1.0), avg)
        log_one_minus_p = torch.where(near_zero, (-torch.expm1(small)).log(), torch.log1p(-large.exp()))
        return avg - log_one_minus_p


OBJECTIVES: dict[str, Objective] = {}


"""The table, by name; :mod:`simpo.objectives.preference` fills it."""


@dataclass(frozen=True)
class Spelling:
    """Another way to say a hyperparameter, e.g. SimPO's absolute ``gamma`` for ``gamma_beta_ratio``.

    Attributes:
        of: the hyperparameter that it stands for.
        convert: from the value and the other hyperparameters to that hyperparameter's value.
    """

    of: str
    convert: Callable[[float, Mapping[str, Any]], float] = lambda value, values: value


@dataclass(frozen=True)
class Objective:
    """A row of the table.

    A loss is a pair term plus, for some rows, an anchor term on the chosen response. With more than two ranked
    responses the pair term runs over all ordered pairs and the anchor once, on the best. The signatures of these two
    declare the row's hyperparameters.

    The attributes are functions as their papers have them. They are called as :attr:`loss`, :attr:`pair`,
    :attr:`anchor`, :attr:`unpaired` and :attr:`reward`, each of which takes any of the row's hyperparameters by keyword
    (and ``z_ref`` where :attr:`needs_z_ref`), hands on what its function uses, fills in defaults, and raises
    ``ValueError`` at a name that the row does not have.

    Attributes:
        name: its key in recipes.
        pair_term: ``pair_term(w, l, *, ...) -> [B]``.
        implicit_reward: ``implicit_reward(y, *, ...) -> [B]``, the reward that is logged.
        paper: where the formula stands.
        anchor_term: ``anchor_term(w, *, ...) -> [B]``, or None.
        unpaired_term: ``unpaired_term(y, label, *, ...) -> [B]`` for single responses with a bool label ``[B]``, or
            None where the row needs pairs.
        needs_reference: whether the responses must carry ``ref_logp``.
        length_normalized: whether ``logps/*`` are logged as averages over tokens (else sums).
        spellings: other names for hyperparameters.
    """

    name: str
    pair_term: Callable[..., Tensor]
    implicit_reward: Callable[..., Tensor]
    paper: str
    anchor_term: Callable[..., Tensor] | None = None
    unpaired_term: Callable[..., Tensor] | None = None
    needs_reference: bool = False
    length_normalized: bool = False
    spellings: Mapping[str, Spelling] = field(default_factory=dict)

    @cached_property
    def hyperparameters(self) -> dict[str, Hyperparameter]:
        """What the signatures of pair and anchor term declare."""
        anchor = {} if self.anchor_term is None else read_signature(self.anchor_term)
        return read_signature(self.pair_term) | anchor

    @property
    def needs_z_ref(self) -> bool:
        """Whether the terms take ``z_ref``, KTO's reference point of the step."""
        return "z_ref" in self._keywords

    @cached_property
    def loss(self) -> Callable[..., Tensor]:
        """``loss(w, l, **hyperparameters) -> [B]``: pair term plus anchor term."""
        pair, anchor = self.pair, self.anchor
        if anchor is None:
            return pair

        def loss(w: Responses, l: Responses, **values: Any) -> Tensor:  # noqa: E741
            return pair(w, l, **values) + anchor(w, **values)

        loss.__signature__ = inspect.signature(pair)  # type: ignore[attr-defined]
        return loss

    @cached_property
    def pair(self) -> Callable[..., Tensor]:
        """``pair(w, l, **hyperparameters) -> [B]``."""
        return self._called_with_all(self.pair_term)

    @cached_property
    def anchor(self) -> Callable[..., Tensor] | None:
        """``anchor(w, **hyperparameters) -> [B]``, or None."""
        return None if self.anchor_term is None else self._called_with_all(self.anchor_term)

    @cached_property
    def unpaired(self) -> Callable[..., Tensor] | None:
        """``unpaired(y, label, **hyperparameters) -> [B]``, ``label`` ``[B]`` bool, or None."""
        return None if self.unpaired_term is None else self._called_with_all(self.unpaired_term)

    @cached_property
    def reward(self) -> Callable[..., Tensor]:
        """``reward(y, **hyperparameters) -> [B]``: the implicit reward, the one that is logged."""
        return self._called_with_all(self.implicit_reward)

    def resolve(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All hyperparameters of this row, from those ``given`` and the defaults.

        Raises:
            ValueError: an unknown name (with the row that has it, if one does), a hyperparameter given in two
                spellings, a value out of bounds, or a combination that the loss refuses.
        """
        values = {name: parameter.default for name, parameter in self.hyperparameters.items()}
        values |= {name: value for name, value in given.items() if name in values}
        for name, value in given.items():
            if name in self.spellings:
                spelling = self.spellings[name]
                if spelling.of in given:
                    raise ValueError(f"{name} and {spelling.of} say the same thing; give one of them")
                replace(self.hyperparameters[spelling.of], name=name).check(value)
                values[spelling.of] = None  # filled below, when what it is converted with has been checked
            elif name not in values:
                raise ValueError(self._unknown(name))
        for name, value in values.items():
            if value is not None:
                self.hyperparameters[name].check(value)
        for name in given.keys() & self.spellings.keys():
            spelling = self.spellings[name]
            values[spelling.of] = spelling.convert(given[name], values)
        pair = Responses(torch.tensor([-1.0]), torch.tensor([1.0]), torch.tensor([-1.0]))
        self.loss(pair, pair, **values)
        return values

    def _called_with_all(self, term: Callable[..., Tensor]) -> Callable[..., Tensor]:
        own = inspect.signature(term)
        keywords = self._keywords
        uses = [name for name in own.parameters if name in keywords]

        @functools.wraps(term)
        def call(*responses: Any, **values: Any) -> Tensor:
            for name in values:
                if name not in keywords:
                    raise ValueError(self._unknown(name))
            return term(*responses, **{name: values.get(name, keywords[name].default) for name in uses})

        positional = [p for p in own.parameters.values() if p.kind is not p.KEYWORD_ONLY]
        call.__signature__ = own.replace(parameters=[*positional, *keywords.values()])  # type: ignore[attr-defined]
        return call

    @cached_property
    def _keywords(self) -> dict[str, inspect.Parameter]:
        """The keyword-only parameters that pair and anchor term declare."""
        terms = [term for term in (self.pair_term, self.anchor_term) if term is not None]
        found = [p for term in terms for p in inspect.signature(term).parameters.values()]
        return {p.name: p for p in found if p.kind is p.KEYWORD_ONLY}

    def _unknown(self, name: str) -> str:
        owners = [row.name for row in OBJECTIVES.values() if name in row.hyperparameters or name in row.spellings]
        known = ", ".join([*self.hyperparameters, *self.spellings]) or "none"
        belongs = f" (it belongs to {', '.join(owners)})" if owners else ""
        return f"{name} is not a hyperparameter of objective {self.name!r}{belongs}; it has {known}"
