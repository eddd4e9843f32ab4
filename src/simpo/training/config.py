"""The configuration of a preference run: the objective and its hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass, replace
from typing import Any

from simpo.data.settings import TokenizeSettings
from simpo.errors import SimpoError
from simpo.objectives import OBJECTIVES, Objective
from simpo.training.settings import TrainingSettings


@dataclass
class PreferenceSettings(TrainingSettings):
    """Everything of :class:`PreferenceConfig` but the objectives' hyperparameters, which the registry declares."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate; the paper's are 3e-7 to 1e-6."})

    objective: str = field(default="simpo", metadata={"help": "The loss: a row of the table of objectives."})
    loss_type: str | None = field(
        default=None, metadata={"help": "Alias for link (in the paper's recipes) or objective (in TRL's)."}
    )
    sft_weight: float = field(
        default=0.0, metadata={"help": "Weight of an SFT term: the chosen response's average negative log-probability."}
    )
    paper_tokenization: bool = field(
        default=False, metadata={"help": "Score the assistant header with the response, as the paper's code does."}
    )

    @property
    def row(self) -> Objective:
        """The chosen objective."""
        return OBJECTIVES[self.objective]

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The objective's hyperparameters, all of them, defaults filled in."""
        given = {name: getattr(self, name) for name in hyperparameter_names() if getattr(self, name) is not None}
        return self.row.resolve(given)

    @property
    def tokenize_settings(self) -> TokenizeSettings:
        """What the data layer needs to know."""
        return replace(super().tokenize_settings, paper_tokenization=self.paper_tokenization)

    def _resolve_loss_type(self) -> None:
        if self.loss_type is None:
            return
        if self.loss_type in OBJECTIVES:
            self.objective = self.loss_type
        elif getattr(self, "link", None) in (None, self.loss_type):
            self.link = self.loss_type
        else:
            raise SimpoError(f"loss_type {self.loss_type!r} and link {self.link!r} disagree; give one of them")
        self.loss_type = None

    def _check(self) -> None:
        self._resolve_loss_type()
        if self.objective not in OBJECTIVES:
            raise SimpoError(f"objective: {self.objective!r} is unknown; there are {', '.join(OBJECTIVES)}")
        try:
            self.hyperparameters  # noqa: B018 - resolving is the check
        except ValueError as error:
            raise SimpoError(str(error)) from error
        if not self.sft_weight >= 0:
            raise SimpoError(f"sft_weight: must be >= 0, not {self.sft_weight}")
        super()._check()


def hyperparameter_names() -> list[str]:
    """Every name under which some objective's hyperparameter can be given."""
    return list(_hyperparameter_types())


def _hyperparameter_types() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in OBJECTIVES.values():
        found |= {name: parameter.type for name, parameter in row.hyperparameters.items()}
        found |= {name: row.hyperparameters[spelling.of].type for name, spelling in row.spellings.items()}
    return found


def _help(name: str) -> str:
    rows = [
        f"{row.name} (default {row.hyperparameters[name].default})" if name in row.hyperparameters else row.name
        for row in OBJECTIVES.values()
        if name in row.hyperparameters or name in row.spellings
    ]
    return "Hyperparameter of " + ", ".join(rows) + "."


PreferenceConfig = make_dataclass(
    "PreferenceConfig",
    [
        (name, kind | None, field(default=None, metadata={"help": _help(name)}))
        for name, kind in _hyperparameter_types().items()
    ],
    bases=(PreferenceSettings,),
)
PreferenceConfig.__module__ = __name__  # so that it pickles
PreferenceConfig.__doc__ = """Configuration of a preference run.

All keys of ``transformers.TrainingArguments``, those of :class:`~simpo.training.settings.TrainingSettings` and
:class:`PreferenceSettings`, and the hyperparameters of the
objectives (``beta``, ``gamma_beta_ratio``, ...), whose names, types and defaults the registry declares; None stands for
the objective's own default.

Pairs per optimizer step are ``per_device_train_batch_size * gradient_accumulation_steps * world_size``, as everywhere
in transformers; the first two are folded into one, because micro-batches are cut by ``max_batch_tokens``.

Raises:
    SimpoError: a value that is out of bounds, unknown or contradictory; the message names the key.
"""
