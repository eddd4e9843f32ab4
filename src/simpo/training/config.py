"""The configuration of a preference run: the objective and its hyperparameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, make_dataclass, replace
from itertools import chain
from typing import Any, get_args

import torch

from simpo.data.settings import TokenizeSettings
from simpo.errors import SimpoError, check_all
from simpo.objectives import OBJECTIVES, Objective, Responses
from simpo.training.settings import TrainingSettings

_DEFAULT = "simpo"
_SIMPO_ONLY = ("gamma_beta_ratio", "gamma", "link")  # whoever gives one of them means SimPO
_SIMPO_BETA = 1.0  # the paper's are 2 to 10; those of DPO and its kin are 0.01 to 0.5


@dataclass
class PreferenceSettings(TrainingSettings):
    """Everything of :class:`PreferenceConfig` but the objectives' hyperparameters, which the registry declares."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate; the paper's are 3e-7 to 1e-6."})

    objective: str | None = field(
        default=None, metadata={"help": "The loss: a row of the table of objectives (default: simpo)."}
    )
    loss_type: str | None = field(
        default=None, metadata={"help": "Alias for link (in the paper's recipes) or objective (in TRL's)."}
    )
    sft_weight: float = field(
        default=0.0, metadata={"help": "Weight of an SFT term: the chosen response's average negative log-probability."}
    )
    kl_weight: float = field(
        default=0.0, metadata={"help": "Weight of KL(policy || start model), exact, mean over the response tokens."}
    )
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the reference's log-probabilities once and keep them (default: true); false: beside "
            "every step."
        },
    )
    reference_cache: str | None = field(
        default=None, metadata={"help": "Folder for the reference's log-probabilities (default: in HF_HOME)."}
    )
    paper_tokenization: bool = field(
        default=False, metadata={"help": "Score the assistant header with the response, as the paper's code does."}
    )

    @property
    def row(self) -> Objective:
        """The chosen objective."""
        return OBJECTIVES[str(self.objective)]

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The objective's hyperparameters, all of them, defaults filled in."""
        given = {name: getattr(self, name) for name in hyperparameter_names() if getattr(self, name) is not None}
        return self.row.resolve(given)

    @property
    def tokenize_settings(self) -> TokenizeSettings:
        """What the data layer needs to know."""
        return replace(super().tokenize_settings, paper_tokenization=self.paper_tokenization)

    def _refuse(self) -> None:
        check_all(super()._refuse, self._refuse_a_guess)

    def _refuse_a_guess(self) -> None:
        """Refuse keys that leave open which objective is meant."""
        if self.objective is not None or self.loss_type is not None:
            return
        if any(getattr(self, key, None) is not None for key in _SIMPO_ONLY):
            return
        beta = getattr(self, "beta", None)
        if isinstance(beta, int | float) and 0 < beta < _SIMPO_BETA:
            raise SimpoError(
                f"objective: not given, and beta {beta:g} is on DPO's scale (SimPO's is 2 to 10); write objective: "
                f"dpo or kto with it, orpo with lam: {beta:g} or ipo with tau: {beta:g} in its place, or simpo"
            )
        found = "precompute_ref_log_probs" if self.precompute_ref_log_probs is not None else None
        if beta is None and getattr(self, "label_smoothing", None):
            found = found or "label_smoothing"
        if found:
            raise SimpoError(f"objective: not given, and {found} is not only SimPO's; write objective: dpo, or simpo")

    def _resolve_loss_type(self) -> None:
        """Read ``loss_type`` as the objective, or as the link of one."""
        given, self.loss_type = self.loss_type, None
        if given in OBJECTIVES:
            if self.objective not in (None, given):
                raise SimpoError(f"loss_type {given!r} and objective {self.objective!r} disagree; give one of them")
            self.objective = given
        elif given is not None:
            self._take_link(given)

    def _take_link(self, link: str) -> None:
        if link not in _links():
            known = ", ".join((*OBJECTIVES, *_links()))
            raise SimpoError(f"loss_type: {link!r} is neither an objective nor a link; there are {known}")
        if self.objective is None and not any(getattr(self, key) is not None for key in _SIMPO_ONLY):
            raise SimpoError(
                f"loss_type: {link!r} alone may mean DPO's or SimPO's; add objective: dpo, or objective: simpo with "
                "gamma_beta_ratio"
            )
        name = self.objective or _DEFAULT
        keys = OBJECTIVES[name].hyperparameters
        if link == "sigmoid" and "link" not in keys and "label_smoothing" in keys:
            return  # the only one that it has
        if "link" not in keys:
            raise SimpoError(f"loss_type: {link!r} is no objective and no link of objective {name!r}")
        given = getattr(self, "link", None)
        if given not in (None, link):
            raise SimpoError(f"loss_type {link!r} and link {given!r} disagree; give one of them")
        self.link = link

    def _check(self) -> None:
        check_all(self._check_objective, super()._check)

    def _check_objective(self) -> None:
        if self.objective not in (None, *OBJECTIVES):
            raise SimpoError(f"objective: {self.objective!r} is unknown; there are {', '.join(OBJECTIVES)}")
        self._resolve_loss_type()
        self.objective = self.objective or _DEFAULT
        self.precompute_ref_log_probs = self.precompute_ref_log_probs is not False
        try:
            self.hyperparameters  # noqa: B018 - resolving is the check
        except ValueError as error:
            raise SimpoError(str(error)) from error
        for key in ("sft_weight", "kl_weight"):
            if not 0 <= getattr(self, key) < math.inf:
                raise SimpoError(f"{key}: must be >= 0 and finite, not {getattr(self, key)}")
        if self.sft_weight and self._has_anchor(self.hyperparameters):
            weighted = "lam" in self.row.hyperparameters and not self._has_anchor(self.hyperparameters | {"lam": 0.0})
            remedy = ", or set lam: 0" if weighted else ""
            raise SimpoError(
                f"sft_weight: objective {self.objective!r} has a term on the chosen response already; leave sft_weight "
                f"out{remedy}"
            )

    def _has_anchor(self, hyperparameters: dict[str, Any]) -> bool:
        """Whether the objective's own term on the chosen response counts."""
        if self.row.anchor is None:
            return False
        response = Responses(torch.tensor([-1.0]), torch.tensor([1.0]), torch.tensor([-1.0]))
        return bool(self.row.anchor(response, **hyperparameters).any())


def _links() -> tuple[str, ...]:
    """Every link that some objective can have."""
    found = (get_args(row.hyperparameters["link"].type) for row in OBJECTIVES.values() if "link" in row.hyperparameters)
    return tuple(dict.fromkeys(chain.from_iterable(found)))


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
