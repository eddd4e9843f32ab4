"""``PreferenceConfig``, ``SFTConfig`` and ``RewardConfig``: the settings of each kind of training.

They are separate from the trainers, which take seconds to import, so that ``--help`` and errors in recipes are fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, get_args

import torch

from simpo.config import setting
from simpo.errors import SimpoError, check_all
from simpo.objectives import OBJECTIVES, Mixture, Objective, Responses
from simpo.training.settings import TrainingSettings

_DEFAULT = "simpo"
_SIMPO_ONLY = ("gamma_beta_ratio", "gamma", "link")  # one of them implies SimPO
_SIMPO_BETA = 1.0  # the paper's values are 2 to 10; those of DPO and its relatives are 0.01 to 0.5


@dataclass
class SFTConfig(TrainingSettings):
    """Configuration of supervised fine-tuning.

    All keys of ``transformers.TrainingArguments`` and of :class:`~simpo.training.settings.TrainingSettings`. Learning
    rate and schedule are those of the models that the paper starts from (2e-5, cosine, one epoch).
    """

    learning_rate: float = setting(2e-5, "Peak learning rate; the paper's is 2e-5.")

    def _check(self) -> None:
        if self.truncation == "paper":
            raise SimpoError("truncation: 'paper' is about pairs; use 'prompt' or 'drop'")
        super()._check()


@dataclass
class RewardConfig(TrainingSettings):
    """Configuration of a reward model.

    All keys of ``transformers.TrainingArguments`` and of :class:`~simpo.training.settings.TrainingSettings`.
    """

    learning_rate: float = setting(1e-5, "Peak learning rate.")
    margin: Literal["none", "column", "scores"] = setting(
        "none", "By how much a reward has to win: by 0, by the pairs' column margin, or by the scores' difference."
    )
    center_rewards_coefficient: float | None = setting(
        None, "Weight of (chosen + rejected)**2, which centers rewards on 0, for example 0.01.", least=0
    )

    def _check(self) -> None:
        if self.truncation == "paper":
            raise SimpoError("truncation: 'paper' cuts responses, whose ends are rewarded; use 'prompt' or 'drop'")
        super()._check()


def _hyperparameter(name: str) -> Any:
    """The field of ``PreferenceConfig`` for a hyperparameter, whose meaning the objectives define."""
    uses: dict[str, list[str]] = {}  # by meaning: the same name may mean different things to different objectives
    for row in OBJECTIVES.values():
        if name in row.hyperparameters:
            known = row.hyperparameters[name]
            uses.setdefault(known.help, []).append(f"{row.name} {known.default}")
        elif name in row.spellings:
            uses.setdefault(f"Another way to give {row.spellings[name].of}.", []).append(row.name)
    return setting(None, " ".join(f"{text.removesuffix('.')} ({', '.join(rows)})." for text, rows in uses.items()))


@dataclass
class PreferenceConfig(TrainingSettings):
    """Configuration of a preference run.

    All keys of ``transformers.TrainingArguments``, those of :class:`~simpo.training.settings.TrainingSettings`, and the
    hyperparameters of the objectives (``beta``, ``gamma_beta_ratio``, ...), where None stands for the objective's own
    default.

    Pairs per optimizer step are ``per_device_train_batch_size * gradient_accumulation_steps * world_size``, as
    everywhere in transformers; the first two are folded into one, because micro-batches are cut by
    ``max_batch_tokens``.
    """

    learning_rate: float = setting(1e-6, "Peak learning rate; the paper's are 3e-7 to 1e-6.")

    objective: dict[str, float] | str | None = setting(
        None,
        f"The loss: one of {', '.join(OBJECTIVES)} (default: simpo), or several with weights: {{dpo: 1, bco: 0.2}}.",
    )
    loss_type: str | None = setting(None, "Alias for link (in the paper's recipes) or objective (in TRL's).")
    sft_weight: float = setting(
        0.0, "Weight of an SFT term: the chosen response's average negative log-probability.", least=0
    )
    kl_weight: float = setting(
        0.0, "Weight of KL(policy || start model), exact, mean over the response tokens.", least=0
    )
    wpo_weights: bool = setting(
        False, "Weigh every pair by how likely the policy is to answer like this (WPO, arXiv 2406.11827)."
    )
    ld_alpha: float | None = setting(
        None,
        "Weight of the log-probabilities of tokens beyond the shorter response's length (LD-DPO, arXiv 2409.06411).",
        least=0,
        most=1,
    )
    precompute_ref_log_probs: bool | None = setting(
        None, "Compute the reference's log-probabilities once and keep them (default: true); false: at every step."
    )
    reference_cache: str | None = setting(None, "Folder for the reference's log-probabilities (default: in HF_HOME).")
    paper_tokenization: bool = setting(False, "Score the assistant header with the response, as the paper's code does.")

    row_columns: list[str] | None = setting(
        None,
        "Columns of the data that change the loss of their row: weight (all objectives), label_probability (those with "
        "label_smoothing: the probability that chosen is better), margin (added to gamma), beta.",
    )

    beta: float | None = _hyperparameter("beta")
    gamma_beta_ratio: float | None = _hyperparameter("gamma_beta_ratio")
    gamma: float | None = _hyperparameter("gamma")
    link: Literal["sigmoid", "hinge"] | None = _hyperparameter("link")
    label_smoothing: float | None = _hyperparameter("label_smoothing")
    tau: float | None = _hyperparameter("tau")
    length_normalized: bool | None = _hyperparameter("length_normalized")
    lam: float | None = _hyperparameter("lam")
    lam_w: float | None = _hyperparameter("lam_w")
    lam_l: float | None = _hyperparameter("lam_l")
    desirable_weight: float | None = _hyperparameter("desirable_weight")
    undesirable_weight: float | None = _hyperparameter("undesirable_weight")
    alpha: float | None = _hyperparameter("alpha")
    delta: float | None = _hyperparameter("delta")
    r_max: float | None = _hyperparameter("r_max")
    score_temperature: float | None = _hyperparameter("score_temperature")
    divergence: Literal["js", "forward_kl", "alpha"] | None = _hyperparameter("divergence")

    @property
    def row(self) -> Objective:
        """The chosen objective with its default hyperparameters."""
        return Mixture.of(self.objective) if isinstance(self.objective, dict) else OBJECTIVES[str(self.objective)]

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """All hyperparameters of the objective, defaults filled in."""
        return self.row.resolve(self._given_hyperparameters)

    @property
    def _given_hyperparameters(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in hyperparameter_names() if getattr(self, name) is not None}

    def _reject(self) -> None:
        check_all(super()._reject, self._reject_guess)

    def _reject_guess(self) -> None:
        """Reject keys that do not make clear which objective is meant."""
        if self.objective is not None or self.loss_type is not None:
            return
        if any(getattr(self, key) is not None for key in _SIMPO_ONLY):
            return
        beta = self.beta
        if isinstance(beta, int | float) and 0 < beta < _SIMPO_BETA:
            raise SimpoError(
                f"objective: not given, and beta {beta:g} is on DPO's scale (SimPO's is 2 to 10); write objective: "
                f"dpo or kto with it, orpo with lam: {beta:g} or ipo with tau: {beta:g} in its place, or simpo"
            )
        found = "precompute_ref_log_probs" if self.precompute_ref_log_probs is not None else None
        if beta is None and self.label_smoothing:
            found = found or "label_smoothing"
        if found:
            raise SimpoError(f"objective: not given, and {found} is not only SimPO's; write objective: dpo, or simpo")

    def _check(self) -> None:
        check_all(self._check_objective, super()._check)

    def _check_objective(self) -> None:
        mixed = isinstance(self.objective, dict)
        if not mixed and self.objective not in (None, *OBJECTIVES):
            raise SimpoError(f"objective: {self.objective!r} is unknown; there are {', '.join(OBJECTIVES)}")
        if mixed and self.loss_type is not None:
            raise SimpoError("loss_type: not with a mixture of objectives; leave it out")
        self._resolve_loss_type()
        self.objective = _DEFAULT if self.objective is None else self.objective
        self.precompute_ref_log_probs = self.precompute_ref_log_probs is not False
        try:
            self.row.resolve(self._given_hyperparameters)
        except ValueError as error:
            raise SimpoError(str(error)) from error
        self._check_row_columns()
        if self.wpo_weights and not self.row.adds_up_pairs:
            raise SimpoError(f"wpo_weights: objective {self.row.name!r} has no loss of a pair to weigh; leave it out")
        if self.ld_alpha is not None and (not self.row.needs_reference or "z_ref" in self.row.needs):
            raise SimpoError(f"ld_alpha: objective {self.row.name!r} compares no sums with a reference's; leave it out")
        if self.ld_alpha is not None and self.sft_weight:
            raise SimpoError("ld_alpha: the SFT term of sft_weight takes all tokens alike; leave one of them out")
        if self.sft_weight and self._has_anchor(self.hyperparameters):
            weighted = "lam" in self.row.hyperparameters and not self._has_anchor(self.hyperparameters | {"lam": 0.0})
            remedy = ", or set lam: 0" if weighted else ""
            raise SimpoError(
                f"sft_weight: objective {self.row.name!r} has a term on the chosen response already; leave sft_weight "
                f"out{remedy}"
            )

    def _check_row_columns(self) -> None:
        objective = self.row.with_hyperparameters(**self.hyperparameters)
        for name in self.row_columns or ():
            takers = [row.name for row in OBJECTIVES.values() if name in row.row_columns]
            if not takers:
                known = ", ".join(OBJECTIVES[_DEFAULT].row_columns)
                raise SimpoError(f"row_columns: {name!r} is unknown; there are {known}")
            if name not in objective.row_columns:
                link = f" with link {self.link!r}" if self.objective in takers else ""
                raise SimpoError(
                    f"row_columns: {name} is not defined for objective {objective.name!r}{link}; it is for "
                    f"{', '.join(takers)}"
                )
        if "label_probability" in (self.row_columns or ()) and self.label_smoothing:
            raise SimpoError("label_smoothing: row_columns has label_probability, which replaces it; leave one out")

    def _has_anchor(self, hyperparameters: dict[str, Any]) -> bool:
        """Whether the objective has a term on the chosen response alone that is not 0."""
        response = Responses(torch.tensor([-1.0]), torch.tensor([1.0]), torch.tensor([-1.0]))
        anchor = self.row.with_hyperparameters(**hyperparameters).anchor(response)
        return anchor is not None and bool(anchor.any())

    def _resolve_loss_type(self) -> None:
        """Read ``loss_type`` as the objective, or as the link of one."""
        given, self.loss_type = self.loss_type, None
        if given is None:
            return
        if given in OBJECTIVES:
            if self.objective not in (None, given):
                raise SimpoError(f"loss_type {given!r} and objective {self.objective!r} disagree; give one of them")
            self.objective = given
            return
        assert not isinstance(self.objective, dict)
        with_link = (row.hyperparameters["link"] for row in OBJECTIVES.values() if "link" in row.hyperparameters)
        links = dict.fromkeys(chain.from_iterable(get_args(known.type) for known in with_link))
        if given not in links:
            known = ", ".join((*OBJECTIVES, *links))
            raise SimpoError(f"loss_type: {given!r} is neither an objective nor a link; there are {known}")
        if self.objective is None and not any(getattr(self, key) is not None for key in _SIMPO_ONLY):
            raise SimpoError(
                f"loss_type: {given!r} by itself may mean DPO's or SimPO's; add objective: dpo, or objective: simpo "
                "with gamma_beta_ratio"
            )
        name = self.objective or _DEFAULT
        keys = OBJECTIVES[name].hyperparameters
        if given == "sigmoid" and "link" not in keys and "label_smoothing" in keys:
            return  # the only link of this objective
        if "link" not in keys:
            raise SimpoError(f"loss_type: {given!r} is neither an objective nor a link of objective {name!r}")
        if self.link not in (None, given):
            raise SimpoError(f"loss_type {given!r} and link {self.link!r} disagree; give one of them")
        self.link = given  # type: ignore[assignment]


def hyperparameter_names() -> list[str]:
    """Every name by which some objective's hyperparameter can be given."""
    return list(dict.fromkeys(name for row in OBJECTIVES.values() for name in (*row.hyperparameters, *row.spellings)))
