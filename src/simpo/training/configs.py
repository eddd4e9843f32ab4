"""``PreferenceConfig``, ``SFTConfig``, ``RewardConfig``, ``OnlineConfig``: the settings of each kind of training.

Kept apart from the trainers, which take seconds to import, so that ``--help`` and recipe errors are fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from simpo.config import setting
from simpo.errors import SimpoError, check_all
from simpo.generation.settings import EngineSettings, SamplingSettings
from simpo.objectives import OBJECTIVES, Mixture, Objective, Responses
from simpo.objectives.policy_gradient import POLICY_GRADIENTS, KLEstimator, PolicyGradient
from simpo.objectives.ppo import PPO
from simpo.training.settings import TrainingSettings

_LINKS = ("sigmoid", "hinge")
_DEFAULT = "simpo"
_SIMPO_ONLY = ("gamma_beta_ratio", "gamma", "link")  # any of these implies SimPO
_MIN_SIMPO_BETA = 1.0  # the paper uses 2 to 10 for SimPO; DPO and its relatives use 0.01 to 0.5


@dataclass
class SFTConfig(TrainingSettings):
    """Configuration of supervised fine-tuning.

    Accepts all keys of ``transformers.TrainingArguments`` and :class:`~simpo.training.settings.TrainingSettings`. The
    default learning rate and schedule are those of the paper's initial models (2e-5, cosine, one epoch).
    """

    learning_rate: float = setting(2e-5, "Peak learning rate; the paper uses 2e-5.")


@dataclass
class RewardConfig(TrainingSettings):
    """Configuration of reward model training.

    Accepts all keys of ``transformers.TrainingArguments`` and :class:`~simpo.training.settings.TrainingSettings`.
    """

    learning_rate: float = setting(1e-5, "Peak learning rate.")
    margin: Literal["none", "column", "scores"] = setting(
        "none", "Margin by which the chosen reward has to win: 0, the pair's margin column, or the score difference."
    )
    center_rewards_coefficient: float | None = setting(
        None, "Weight of (chosen + rejected)**2, which centers rewards around 0; for example 0.01.", least=0
    )


def _hyperparameter(name: str) -> Any:
    """Return the ``PreferenceConfig`` field for a hyperparameter, with its help text taken from the objectives."""
    uses: dict[str, list[str]] = {}  # by help text: a name may mean different things to different objectives
    for row in OBJECTIVES.values():
        if name in row.hyperparameters:
            known = row.hyperparameters[name]
            uses.setdefault(known.help, []).append(f"{row.name} {known.default}")
        elif name in row.aliases:
            uses.setdefault(f"Another way to give {row.aliases[name].of}.", []).append(row.name)
    return setting(None, " ".join(f"{text.removesuffix('.')} ({', '.join(rows)})." for text, rows in uses.items()))


@dataclass
class PreferenceConfig(TrainingSettings):
    """Configuration of a preference run.

    Accepts all keys of ``transformers.TrainingArguments`` and :class:`~simpo.training.settings.TrainingSettings`, and
    the objectives' hyperparameters (``beta``, ``gamma_beta_ratio``, ...), where None means the objective's default.

    An optimizer step takes ``per_device_train_batch_size * gradient_accumulation_steps * world_size`` pairs, as always
    in transformers; the first two are merged into one, because ``max_batch_tokens`` sets the size of micro-batches.
    """

    truncates_as_paper = True
    learning_rate: float = setting(1e-6, "Peak learning rate; the paper uses 3e-7 to 1e-6.")

    objective: dict[str, float] | str | None = setting(
        None,
        f"The loss: {', '.join(OBJECTIVES)} (default: simpo), or a weighted mixture such as {{dpo: 1, bco: 0.2}}.",
    )
    loss_type: str | None = setting(None, "Alias for link (as in the paper's recipes) or objective (as in TRL).")
    sft_weight: float = setting(
        0.0, "Weight of an SFT term: the chosen response's average negative log-probability.", least=0
    )
    kl_weight: float = setting(
        0.0, "Weight of the exact KL(policy || initial model), averaged over the response tokens.", least=0
    )
    wpo_weights: bool = setting(
        False, "Weight every pair by how likely its responses are under the policy (WPO, arXiv 2406.11827)."
    )
    ld_alpha: float | None = setting(
        None,
        "Weight of the log-probabilities of tokens beyond the shorter response's length (LD-DPO, arXiv 2409.06411).",
        least=0,
        most=1,
    )
    precompute_ref_log_probs: bool | None = setting(
        None, "Compute the reference log-probabilities once and store them (default: true), or at every step (false)."
    )
    reference_cache: str | None = setting(None, "Folder for stored reference log-probabilities (default: in HF_HOME).")
    paper_tokenization: bool = setting(False, "Score the assistant header with the response, as the paper's code does.")

    row_columns: list[str] | None = setting(
        None,
        "Data columns that set a row's loss: weight (all objectives), label_probability (objectives with "
        "label_smoothing; the probability that chosen is better), margin (added to gamma), beta.",
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
        """The configured objective with its default hyperparameters."""
        return Mixture.of(self.objective) if isinstance(self.objective, dict) else OBJECTIVES[str(self.objective)]

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """All hyperparameters of the objective, with defaults filled in."""
        return self.row.resolve(self._given_hyperparameters)

    @property
    def _given_hyperparameters(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in hyperparameter_names() if getattr(self, name) is not None}

    def _reject(self) -> None:
        check_all(super()._reject, self._reject_ambiguous_objective)

    def _reject_ambiguous_objective(self) -> None:
        """Reject keys that leave open which objective is meant."""
        if any(getattr(self, key) is not None for key in ("objective", "loss_type", *_SIMPO_ONLY)):
            return
        beta = self.beta
        if isinstance(beta, int | float) and 0 < beta < _MIN_SIMPO_BETA:
            raise SimpoError(
                f"objective: not given, and beta {beta:g} looks like DPO's (SimPO uses 2 to 10); add objective: dpo, "
                f"kto or simpo, or replace beta with objective: orpo with lam: {beta:g}, or ipo with tau: {beta:g}"
            )
        ambiguous = {
            "precompute_ref_log_probs": self.precompute_ref_log_probs is not None,
            "label_smoothing": beta is None and self.label_smoothing,
        }
        for key in (key for key, given in ambiguous.items() if given):
            raise SimpoError(f"objective: not given, and {key} does not imply one; add objective: dpo, or simpo")

    def _check(self) -> None:
        check_all(self._check_objective, super()._check)

    def _check_objective(self) -> None:
        mixed = isinstance(self.objective, dict)
        if not mixed and self.objective not in (None, *OBJECTIVES):
            raise SimpoError(f"objective: {self.objective!r} is unknown; choose from {', '.join(OBJECTIVES)}")
        if mixed and self.loss_type is not None:
            raise SimpoError("loss_type: cannot be combined with a mixture of objectives; leave it out")
        self._resolve_loss_type()
        self.objective = _DEFAULT if self.objective is None else self.objective
        self.precompute_ref_log_probs = self.precompute_ref_log_probs is not False
        try:
            self.row.resolve(self._given_hyperparameters)
        except ValueError as error:
            raise SimpoError(str(error)) from error
        self._check_row_columns()
        if self.wpo_weights and not self.row.averages_pairs:
            raise SimpoError(f"wpo_weights: objective {self.row.name!r} has no per-pair loss to weight; leave it out")
        if self.ld_alpha is not None and (not self.row.needs_reference or "z_ref" in self.row.needs):
            raise SimpoError(
                f"ld_alpha: objective {self.row.name!r} does not compare a pair's log-ratios; leave it out"
            )
        if self.ld_alpha is not None and self.sft_weight:
            raise SimpoError("ld_alpha: sft_weight adds a term that weights all tokens equally; leave one of them out")
        if self.sft_weight and self._has_anchor(self.hyperparameters):
            weighted = "lam" in self.row.hyperparameters and not self._has_anchor(self.hyperparameters | {"lam": 0.0})
            remedy = ", or set lam: 0" if weighted else ""
            raise SimpoError(
                f"sft_weight: objective {self.row.name!r} already has a term on the chosen response; leave sft_weight "
                f"out{remedy}"
            )

    def _check_row_columns(self) -> None:
        objective = self.row.with_hyperparameters(**self.hyperparameters)
        for name in self.row_columns or ():
            takers = [row.name for row in OBJECTIVES.values() if name in row.row_columns]
            if not takers:
                known = ", ".join(OBJECTIVES[_DEFAULT].row_columns)
                raise SimpoError(f"row_columns: {name!r} is unknown; choose from {known}")
            if name not in objective.row_columns:
                link = f" with link {self.link!r}" if self.objective in takers else ""
                raise SimpoError(
                    f"row_columns: {name} is not supported by objective {objective.name!r}{link}, only by "
                    f"{', '.join(takers)}"
                )
        if "label_probability" in (self.row_columns or ()) and self.label_smoothing:
            raise SimpoError("label_smoothing: label_probability in row_columns replaces it; leave one of them out")

    def _has_anchor(self, hyperparameters: dict[str, Any]) -> bool:
        """Return whether the objective has a nonzero term on the chosen response alone."""
        response = Responses(torch.tensor([-1.0]), torch.tensor([1.0]), torch.tensor([-1.0]))
        anchor = self.row.with_hyperparameters(**hyperparameters).anchor(response)
        return anchor is not None and bool(anchor.any())

    def _resolve_loss_type(self) -> None:
        """Interpret ``loss_type`` as an objective, or as the link of one."""
        given, self.loss_type = self.loss_type, None
        if given is None:
            return
        if given in OBJECTIVES:
            if self.objective not in (None, given):
                raise SimpoError(
                    f"loss_type: {given!r} contradicts objective {self.objective!r}; leave one of them out"
                )
            self.objective = given
            return
        assert not isinstance(self.objective, dict)
        if given not in _LINKS:
            known = ", ".join((*OBJECTIVES, *_LINKS))
            raise SimpoError(f"loss_type: {given!r} is neither an objective nor a link; choose from {known}")
        if self.objective is None and not any(getattr(self, key) is not None for key in _SIMPO_ONLY):
            raise SimpoError(
                f"loss_type: {given!r} alone could mean DPO or SimPO; add objective: dpo, or objective: simpo with "
                "gamma_beta_ratio"
            )
        name = self.objective or _DEFAULT
        keys = OBJECTIVES[name].hyperparameters
        if "link" in keys:
            if self.link not in (None, given):
                raise SimpoError(f"loss_type: {given!r} contradicts link {self.link!r}; leave one out")
            self.link = given  # type: ignore[assignment]
        elif given != "sigmoid" or "label_smoothing" not in keys:  # sigmoid is the only link
            raise SimpoError(f"loss_type: {given!r} is neither an objective nor a link of objective {name!r}")


def hyperparameter_names() -> list[str]:
    """Return every name under which a hyperparameter of some objective can be set."""
    return list(dict.fromkeys(name for row in OBJECTIVES.values() for name in (*row.hyperparameters, *row.aliases)))


# ---- Online training, on the model's own answers.

_PTX_KEYS = ("ptx_weight", "ptx_dataset_name", "ptx_batch_size")
_GRADIENT_KEYS = (
    "kl_coef", "kl_in", "kl_estimator", "kl_target", "kl_horizon", "clip_low", "clip_high", "entropy_coef",
    "normalize_scores", "score_clip", "whiten_advantages", *_PTX_KEYS,
)  # fmt: skip
_PPO_KEYS = ("value_model", "value_learning_rate", *(field.name for field in fields(PPO)))
_KL_COEF, _KL_HORIZON = 0.05, 10_000
_EVALUATION_BETA = 0.1  # for the implicit reward if there is no KL coefficient


@dataclass
class OnlineConfig(EngineSettings, PreferenceConfig):
    """Configuration of online training, on the model's own answers scored by an annotator.

    Accepts all keys of :class:`~simpo.training.configs.PreferenceConfig`; ``objective`` can also be a policy gradient.
    A step takes as many prompts as it would take pairs there. A rollout answers the prompts of ``sync_every`` steps
    or, with several passes over it, of ``sync_every / rollout_epochs`` steps.
    """

    objective: str | None = setting(
        "rloo",
        f"A policy gradient ({', '.join(POLICY_GRADIENTS)}) or a preference objective ({', '.join(OBJECTIVES)}).",
    )
    sync_every: int = setting(
        1, "Optimizer steps between rollouts: 1 is on-policy, more is semi-online (arXiv 2506.21495).", least=1
    )
    rollout_epochs: int = setting(1, "Passes over the answers of a rollout; must divide sync_every.", least=1)
    num_generations: int = setting(4, "Answers to sample per prompt.", least=1)
    temperature: float = setting(1.0, "Sampling temperature; policy gradients are only unbiased at 1.")
    top_p: float = setting(1.0, "Sample from the smallest set of tokens with this total probability; 1 disables it.")
    top_k: int = setting(0, "Sample from this many most likely tokens; 0 disables it.")
    max_new_tokens: int | None = setting(None, "Maximum answer length in tokens (default: half of max_length).")
    generation_batch_size: int | None = setting(
        None, "Answers each process generates at a time (default: 32 on a CPU, 64 on a GPU, 1024 with vLLM)."
    )
    unfinished_score: float | None = setting(
        None, "Score for an answer cut off by max_new_tokens (default: the annotator's score)."
    )
    max_missing_scores: float = setting(
        0.1, "Share of a rollout's answers the annotator may leave unscored; more is an error.", least=0, most=1
    )
    pairs: Literal["best_worst", "all"] = setting(
        "best_worst", "Preference objectives: which answers to a prompt form pairs."
    )
    soft_labels: bool = setting(
        False,
        "Preference objectives: prefer an answer with probability sigmoid(score difference), as in the Bradley-Terry "
        "model, instead of always; needs num_generations: 2.",
    )

    kl_coef: float | None = setting(
        None, f"Policy gradients: weight of KL(policy || initial model), per answer (default: {_KL_COEF}).", least=0
    )
    kl_in: Literal["reward", "loss"] | None = setting(
        None, "Policy gradients: apply the KL as a penalty on rewards (default: reinforce, rloo) or as a loss term."
    )
    kl_estimator: KLEstimator | None = setting(
        None,
        "Policy gradients: k1, k2, k3 (Schulman 2020) or, in the loss, exact (default: k1 in rewards, k3 in the loss).",
    )
    kl_target: float | None = setting(
        None,
        "Policy gradients: adapt kl_coef to keep the KL per answer near this value, in nats (default: fixed kl_coef).",
        above=0,
    )
    kl_horizon: int | None = setting(
        None,
        f"With kl_target: number of answers over which kl_coef changes at most e**0.2-fold (default: {_KL_HORIZON}).",
        above=0,
    )
    clip_low: float | None = setting(
        None, "Policy gradients: clip ratios below 1 - clip_low (default: 0.2; gspo 3e-4).", above=0
    )
    clip_high: float | None = setting(
        None, "Policy gradients: clip ratios above 1 + clip_high (default: 0.2; gspo 4e-4).", above=0
    )
    whiten_advantages: bool | None = setting(
        None, "Policy gradients: scale a rollout's advantages to mean 0 and variance 1 (default: true for ppo)."
    )
    normalize_scores: bool = setting(
        False, "Policy gradients: scale scores so that the first rollout has mean 0 and standard deviation 1."
    )
    score_clip: float | None = setting(
        None, "Policy gradients: clip scores to [-score_clip, score_clip], after normalize_scores.", above=0
    )
    entropy_coef: float = setting(0.0, "Policy gradients: weight of the exact entropy per token in the loss.", least=0)
    ptx_weight: float | None = setting(
        None,
        "Policy gradients: weight of the per-token loss on ptx_dataset_name, added to every step (PPO-ptx).",
        above=0,
    )
    ptx_dataset_name: str | None = setting(None, "With ptx_weight: hub id, file or folder of demonstrations.")
    ptx_batch_size: int | None = setting(
        None, "With ptx_weight: demonstrations per step and device (default: as many as prompts).", least=1
    )

    value_model: str | None = setting(
        None, "ppo: reward model to initialize the value function from (default: a new head on the policy)."
    )
    value_learning_rate: float | None = setting(
        None, "ppo: learning rate of the value function (default: learning_rate).", above=0
    )
    value_weight: float | None = setting(None, f"ppo: weight of the value loss (default: {PPO.value_weight}).", above=0)
    value_clip: float | None = setting(
        None, f"ppo: how far a value may move from its estimate in the rollout (default: {PPO.value_clip}).", above=0
    )
    discount: float | None = setting(
        None, f"ppo: discount factor gamma of later rewards (default: {PPO.discount:g}).", least=0, most=1
    )
    gae_lambda: float | None = setting(
        None, f"ppo: 0 trusts the value function, 1 the rewards (default: {PPO.gae_lambda}).", least=0, most=1
    )
    whiten_rewards: bool = setting(False, "ppo: divide a rollout's token rewards by their standard deviation.")

    @property
    def gradient(self) -> PolicyGradient | None:
        """The policy gradient with its hyperparameters; None for a preference objective."""
        row = POLICY_GRADIENTS.get(str(self.objective))
        values = {key: getattr(self, key) for key in ("clip_low", "clip_high") if getattr(self, key) is not None}
        return None if row is None else replace(row, **values)

    @property
    def ppo(self) -> PPO | None:
        """PPO's hyperparameters; None for any other objective."""
        values = {field.name: getattr(self, field.name) for field in fields(PPO)}
        given = {key: value for key, value in values.items() if value is not None}
        return PPO(**given) if self.objective == "ppo" else None

    @property
    def row(self) -> Objective:
        """The preference objective; for a policy gradient, DPO, used only to evaluate held-out pairs.

        DPO's implicit reward is that of the KL-regularized task.
        """
        return OBJECTIVES["dpo"] if self.gradient is not None else super().row

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """All hyperparameters of the objective; for a policy gradient those of DPO, with ``kl_coef`` as ``beta``."""
        if self.gradient is None:
            return super().hyperparameters
        return self.row.resolve({"beta": self.kl_coef or _EVALUATION_BETA})

    @property
    def sampling(self) -> SamplingSettings:
        """The settings for sampling answers; the trainer sets the seed and chunk size."""
        return SamplingSettings(
            n=self.num_generations,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_new_tokens,
            chunk_size=self.generation_batch_size,
        )

    def _check(self) -> None:
        if self.max_new_tokens is None:
            self.max_new_tokens = max(1, self.max_length // 2)
        check_all(super()._check, self._check_rollouts, self._check_gradient, lambda: self.sampling)

    def _check_objective(self) -> None:
        known = (*POLICY_GRADIENTS, *OBJECTIVES)
        if self.objective is not None and self.objective not in known:
            raise SimpoError(f"objective: {self.objective!r} is unknown; choose from {', '.join(known)}")
        for key in ("precompute_ref_log_probs", "row_columns", "ld_alpha"):
            if (value := getattr(self, key)) not in (None, []) and value is not False:  # ld_alpha: 0 counts as set
                raise SimpoError(f"{key}: applies to the rows of a dataset, not to sampled answers; leave it out")
        if self.gradient is None:
            super()._check_objective()
            if "z_ref" in self.row.needs:
                raise SimpoError(f"objective: {self.objective} needs answers to other prompts; use simpo loop")
            self._refuse(_GRADIENT_KEYS, f"only policy gradients ({', '.join(POLICY_GRADIENTS)}) use it; leave it out")
            if self.num_generations < 2:
                raise SimpoError(f"num_generations: {self.num_generations} leaves nothing to compare; set 2 or more")
            self._check_soft_labels()
        else:
            keys = (*hyperparameter_names(), "loss_type", "sft_weight", "kl_weight", "wpo_weights", "soft_labels")
            used = [key for key in keys if getattr(self, key)]
            self._refuse(used, f"only preference objectives use it, not {self.objective}; leave it out")
        if self.objective == "ppo" and self.fp16:
            raise SimpoError("fp16: cannot be used with ppo, whose value gradients would be loss-scaled; use bf16")
        if self.objective != "ppo":
            self._refuse(_PPO_KEYS, f"applies only to ppo, not to {self.objective}; leave it out")
        self.precompute_ref_log_probs = False

    def _refuse(self, keys: Iterable[str], reason: str) -> None:
        """Raise :class:`SimpoError` for the first of ``keys`` that differs from its default."""
        defaults = {field.name: field.default for field in fields(self)}
        for key in keys:
            if getattr(self, key) != defaults[key]:
                raise SimpoError(f"{key}: {reason}")

    def _check_soft_labels(self) -> None:
        if not self.soft_labels:
            return
        if "label_probability" not in self.row.row_columns:
            raise SimpoError(f"soft_labels: {self.objective} does not support label probabilities; leave it out")
        if self.label_smoothing:
            raise SimpoError("label_smoothing: soft_labels replaces it; leave one of them out")
        if self.num_generations != 2:  # the best and the worst of more answers are not a random pair
            raise SimpoError(f"soft_labels: needs num_generations: 2, not {self.num_generations}")

    def _check_rollouts(self) -> None:
        self.check_engine(self.max_length)
        if self.rollout_epochs > 0 and self.sync_every % self.rollout_epochs:
            raise SimpoError(f"rollout_epochs: {self.rollout_epochs} does not divide sync_every, {self.sync_every}")
        if self.max_new_tokens >= self.max_length:  # type: ignore[operator]
            raise SimpoError(
                f"max_new_tokens: {self.max_new_tokens} leaves no room for a prompt in max_length {self.max_length}"
            )
        if self.unfinished_score is not None and not math.isfinite(self.unfinished_score):
            raise SimpoError(f"unfinished_score: must be finite, not {self.unfinished_score}")

    def _check_gradient(self) -> None:
        if (gradient := self.gradient) is None:
            return
        if self.num_generations < 2 and gradient.baseline not in ("batch", "value"):
            raise SimpoError(
                f"num_generations: {self.objective} needs other answers to the same prompt as its baseline; set 2 or "
                "more, or objective: reinforce or ppo"
            )
        self.kl_coef = _KL_COEF if self.kl_coef is None else self.kl_coef
        self.kl_in = self.kl_in or ("reward" if gradient.normalization in ("sum", "tokens") else "loss")
        self.kl_estimator = self.kl_estimator or ("k1" if self.kl_in == "reward" else "k3")
        if self.whiten_advantages is None:
            self.whiten_advantages = self.objective == "ppo"
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise SimpoError("kl_estimator: k1 has zero gradient in expectation; in the loss use k2, k3 or exact")
        if self.kl_in == "reward" and self.kl_estimator == "exact":
            raise SimpoError(
                "kl_estimator: the exact KL does not depend on which token was sampled, so as a reward it would not "
                "keep the policy near the initial model; use k1, or kl_in: loss"
            )
        if self.kl_target is None and self.kl_horizon is not None:
            raise SimpoError("kl_horizon: applies only to an adaptive kl_coef; set kl_target, or leave it out")
        if self.kl_target is not None and not self.kl_coef:
            raise SimpoError("kl_target: cannot adapt a kl_coef of 0, which it multiplies; set kl_coef above 0")
        if self.kl_target is not None and self.kl_horizon is None:
            self.kl_horizon = _KL_HORIZON
        if not (self.ptx_weight and self.ptx_dataset_name):
            self._refuse(_PTX_KEYS, "give ptx_weight and ptx_dataset_name together, or leave it out")
