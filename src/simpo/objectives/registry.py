"""The table of objectives: what trainers, recipes and documentation know of a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from simpo.objectives import pairwise
from simpo.objectives.hyperparameters import Hyperparameter, read_signature
from simpo.objectives.responses import Responses


@dataclass(frozen=True)
class Spelling:
    """Another way to say a hyperparameter, e.g. SimPO's absolute ``gamma`` for ``gamma_beta_ratio``.

    Attributes:
        of: the hyperparameter that it stands for.
        convert: from the value and the other hyperparameters to that hyperparameter's value.
    """

    of: str
    convert: Callable[[float, Mapping[str, Any]], float]


@dataclass(frozen=True)
class Objective:
    """A row of the table.

    Attributes:
        name: its key in recipes.
        loss: ``loss(w, l, **hyperparameters) -> [B]``.
        implicit_reward: ``implicit_reward(y, *, ...) -> [B]``, with some of the loss's hyperparameters.
        paper: where the formula stands.
        needs_reference: whether the responses must carry ``ref_logp``.
        length_normalized: whether ``logps/*`` are logged as averages over tokens (else sums).
        spellings: other names for hyperparameters.
    """

    name: str
    loss: Callable[..., Tensor]
    implicit_reward: Callable[..., Tensor]
    paper: str
    needs_reference: bool = False
    length_normalized: bool = False
    spellings: Mapping[str, Spelling] = field(default_factory=dict)

    @cached_property
    def hyperparameters(self) -> dict[str, Hyperparameter]:
        """What the loss's signature declares."""
        return read_signature(self.loss)

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

    def reward(self, y: Responses, **hyperparameters: Any) -> Tensor:
        """``[B]`` implicit reward, the one that is logged; takes all of the loss's hyperparameters.

        Raises:
            ValueError: a name that is no hyperparameter of this row.
        """
        for name in hyperparameters:
            if name not in self.hyperparameters:
                raise ValueError(self._unknown(name))
        wanted = read_signature(self.implicit_reward)
        return self.implicit_reward(y, **{k: v for k, v in hyperparameters.items() if k in wanted})

    def _unknown(self, name: str) -> str:
        owners = [row.name for row in OBJECTIVES.values() if name in row.hyperparameters or name in row.spellings]
        known = ", ".join([*self.hyperparameters, *self.spellings])
        belongs = f" (it belongs to {', '.join(owners)})" if owners else ""
        return f"{name} is not a hyperparameter of objective {self.name!r}{belongs}; it has {known}"


def _table(*rows: Objective) -> dict[str, Objective]:
    return {row.name: row for row in rows}


OBJECTIVES: dict[str, Objective] = _table(
    Objective(
        "simpo",
        pairwise.simpo,
        pairwise.simpo_reward,
        paper="Meng, Xia, Chen 2024, arXiv 2405.14734, eq. 6",
        length_normalized=True,
        spellings={"gamma": Spelling("gamma_beta_ratio", lambda gamma, values: gamma / values["beta"])},
    ),
)
