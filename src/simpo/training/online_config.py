"""``OnlineConfig``: the settings of training a model on its own answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from simpo.config import setting
from simpo.errors import SimpoError, check_all
from simpo.generation.settings import SamplingSettings
from simpo.objectives import OBJECTIVES, Objective
from simpo.objectives.policy_gradient import POLICY_GRADIENTS, KLEstimator, PolicyGradient
from simpo.objectives.ppo import PPO
from simpo.training.configs import PreferenceConfig, hyperparameter_names

_GRADIENT_KEYS = (
    *("kl_coef", "kl_in", "kl_estimator", "kl_target", "kl_horizon", "clip_low", "clip_high", "entropy_coef"),
    *("normalize_scores", "score_clip", "whiten_advantages", "ptx_weight", "ptx_dataset_name", "ptx_batch_size"),
)
_PPO_KEYS = ("value_model", "value_learning_rate", *(field.name for field in fields(PPO)))
_KL_COEF, _KL_HORIZON = 0.05, 10_000
_EVALUATION_BETA = 0.1  # for the implied reward where there is no KL coefficient


@dataclass
class OnlineConfig(PreferenceConfig):
    """Configuration of training a model on its own answers, which an annotator scores.

    All keys of :class:`~simpo.training.configs.PreferenceConfig`; ``objective`` can also be a policy gradient. A step
    has as many prompts as it has pairs there. A rollout consists of the answers to the prompts of ``sync_every`` steps,
    or, with several passes, of ``sync_every / rollout_epochs`` steps.
    """

    objective: str | None = setting(
        "rloo",
        f"A policy gradient ({', '.join(POLICY_GRADIENTS)}) or a preference objective ({', '.join(OBJECTIVES)}).",
    )
    sync_every: int = setting(
        1, "Optimizer steps between rollouts: 1 is on-policy, a larger number semi-online (arXiv 2506.21495).", least=1
    )
    rollout_epochs: int = setting(1, "Passes over the answers of a rollout; must divide sync_every.", least=1)
    num_generations: int = setting(4, "Answers to every prompt.", least=1)
    temperature: float = setting(1.0, "Divides the logits; policy gradients are unbiased at 1.")
    top_p: float = setting(1.0, "Draw from the smallest set of tokens with this probability; 1 is off.")
    top_k: int = setting(0, "Draw from this many likeliest tokens; 0 is off.")
    max_new_tokens: int | None = setting(None, "Longest answer in tokens (default: half of max_length).")
    generation_batch_size: int | None = setting(
        None, "Answers generated together by a process (default: 32 on a CPU, 64 on a GPU)."
    )
    unfinished_score: float | None = setting(
        None, "Score of an answer that max_new_tokens cut off (default: the annotator's)."
    )
    max_missing_scores: float = setting(
        0.1,
        "Share of a rollout's answers that the annotator may leave without a score; more is an error.",
        least=0,
        most=1,
    )
    pairs: Literal["best_worst", "all"] = setting(
        "best_worst", "Preference objectives: the answers to a prompt that are compared."
    )
    soft_labels: bool = setting(
        False,
        "Preference objectives: an answer is preferred with probability sigmoid(difference of the scores), as in the "
        "Bradley-Terry model, instead of always; needs num_generations: 2.",
    )

    kl_coef: float | None = setting(
        None, f"Policy gradients: weight of KL(policy || start model), per answer (default: {_KL_COEF}).", least=0
    )
    kl_in: Literal["reward", "loss"] | None = setting(
        None, "Policy gradients: the KL as a penalty on rewards (default: reinforce, rloo) or a term of the loss."
    )
    kl_estimator: KLEstimator | None = setting(
        None,
        "Policy gradients: k1, k2, k3 (Schulman 2020) or, in the loss, exact (default: k1 in rewards, k3 in the loss).",
    )
    kl_target: float | None = setting(
        None,
        "Policy gradients: change kl_coef so that the KL of an answer stays near this, in nats (default: fixed).",
        above=0,
    )
    kl_horizon: int | None = setting(
        None,
        f"With kl_target: answers in which kl_coef changes by a factor of at most e**0.2 (default: {_KL_HORIZON}).",
        above=0,
    )
    clip_low: float | None = setting(
        None, "Policy gradients: ratios are clipped below 1 - clip_low (0.2; gspo 3e-4).", above=0
    )
    clip_high: float | None = setting(
        None, "Policy gradients: ratios are clipped above 1 + clip_high (0.2; gspo 4e-4).", above=0
    )
    whiten_advantages: bool | None = setting(
        None, "Policy gradients: scale a rollout's advantages to mean 0, variance 1 (default: true for ppo)."
    )
    normalize_scores: bool = setting(
        False, "Policy gradients: scale scores so that those of the first rollout have mean 0 and standard deviation 1."
    )
    score_clip: float | None = setting(
        None, "Policy gradients: scores, after normalize_scores, are kept within -score_clip and score_clip.", above=0
    )
    entropy_coef: float = setting(
        0.0, "Policy gradients: weight of the entropy of a token, exact, in the loss.", least=0
    )
    ptx_weight: float | None = setting(
        None,
        "Policy gradients: weight of the loss on ptx_dataset_name, per token, added to every step (PPO-ptx).",
        above=0,
    )
    ptx_dataset_name: str | None = setting(None, "With ptx_weight: hub id, file or folder of demonstrations.")
    ptx_batch_size: int | None = setting(
        None, "With ptx_weight: demonstrations of a step on each device (default: as many as prompts).", least=1
    )

    value_model: str | None = setting(
        None, "ppo: reward model that the value function starts from (default: a new layer on the policy's states)."
    )
    value_learning_rate: float | None = setting(None, "ppo: of the value function (default: learning_rate).", above=0)
    value_weight: float | None = setting(None, f"ppo: weight of the value loss (default: {PPO.value_weight}).", above=0)
    value_clip: float | None = setting(
        None, f"ppo: a value may differ by this from that of the rollout (default: {PPO.value_clip}).", above=0
    )
    discount: float | None = setting(
        None, f"ppo: discount of later rewards, gamma (default: {PPO.discount:g}).", least=0, most=1
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
        """PPO's hyperparameters; None for another objective."""
        values = {field.name: getattr(self, field.name) for field in fields(PPO)}
        return PPO(**{key: value for key, value in values.items() if value is not None}) if self._is_ppo else None

    @property
    def _is_ppo(self) -> bool:
        return self.gradient is not None and self.gradient.baseline == "value"

    @property
    def row(self) -> Objective:
        """The preference objective; for a policy gradient DPO, whose implied reward is that of the KL-regularized task.

        Only evaluations on held-out pairs use DPO then.
        """
        return OBJECTIVES["dpo"] if self.gradient is not None else super().row

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """As in the base class; for a policy gradient those of DPO, with ``kl_coef`` for ``beta``."""
        if self.gradient is None:
            return super().hyperparameters
        return self.row.resolve({"beta": self.kl_coef or _EVALUATION_BETA})

    @property
    def sampling(self) -> SamplingSettings:
        """The sampling settings of answers; the trainer sets the seed and the size of a chunk."""
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
        if self.objective is not None and self.objective not in (*POLICY_GRADIENTS, *OBJECTIVES):
            known = ", ".join((*POLICY_GRADIENTS, *OBJECTIVES))
            raise SimpoError(f"objective: {self.objective!r} is unknown; there are {known}")
        if self.precompute_ref_log_probs:
            raise SimpoError("precompute_ref_log_probs: answers are not known before training; leave it out")
        if self.row_columns:
            raise SimpoError("row_columns: answers that are sampled have no such columns; leave it out")
        if self.ld_alpha is not None:
            raise SimpoError(
                "ld_alpha: it is defined for the pairs of a data set, not for sampled answers; leave it out"
            )
        if self.gradient is None:
            super()._check_objective()
            if "z_ref" in self.row.needs:
                raise SimpoError(f"objective: {self.objective} needs answers to other prompts; use simpo loop")
            if set_keys := self._set_among(_GRADIENT_KEYS):
                names = ", ".join(POLICY_GRADIENTS)
                raise SimpoError(f"{set_keys[0]}: only policy gradients ({names}) use it; leave it out")
            if self.num_generations < 2:
                raise SimpoError(f"num_generations: {self.num_generations} answer cannot be compared; set 2 or more")
            self._check_soft_labels()
        else:
            keys = (*hyperparameter_names(), "loss_type", "sft_weight", "kl_weight", "wpo_weights", "soft_labels")
            set_keys = [key for key in keys if getattr(self, key)]
            if set_keys:
                raise SimpoError(
                    f"{set_keys[0]}: only preference objectives use it, not {self.objective}; leave it out"
                )
        if self._is_ppo and self.fp16:
            raise SimpoError("fp16: not with ppo, whose value function's gradients it would scale; use bf16")
        if not self._is_ppo and (set_keys := self._set_among(_PPO_KEYS)):
            raise SimpoError(f"{set_keys[0]}: only ppo has a value function, not {self.objective}; leave it out")
        self.precompute_ref_log_probs = False

    def _set_among(self, keys: tuple[str, ...]) -> list[str]:
        defaults = {field.name: field.default for field in fields(self)}
        return [key for key in keys if getattr(self, key) != defaults[key]]

    def _check_soft_labels(self) -> None:
        if not self.soft_labels:
            return
        if "label_probability" not in self.row.row_columns:
            raise SimpoError(f"soft_labels: {self.objective} has no label probability; leave it out")
        if self.label_smoothing:
            raise SimpoError("label_smoothing: soft_labels replaces it; leave one out")
        if self.num_generations != 2:  # the best and the worst of more are no random pair
            raise SimpoError(f"soft_labels: is for two answers, and num_generations is {self.num_generations}; set 2")

    def _check_rollouts(self) -> None:
        if self.rollout_epochs > 0 and self.sync_every % self.rollout_epochs:
            raise SimpoError(f"rollout_epochs: {self.rollout_epochs} does not divide sync_every, {self.sync_every}")
        if self.max_new_tokens >= self.max_length:  # type: ignore[operator]
            raise SimpoError(
                f"max_new_tokens: {self.max_new_tokens} leave no room for a prompt in max_length {self.max_length}"
            )
        if self.unfinished_score is not None and not math.isfinite(self.unfinished_score):
            raise SimpoError(f"unfinished_score: must be finite, not {self.unfinished_score}")

    def _check_gradient(self) -> None:
        gradient = self.gradient
        if gradient is None:
            return
        if self.num_generations < 2 and gradient.baseline not in ("batch", "value"):
            raise SimpoError(
                f"num_generations: the baseline of {self.objective} is the other answers to a prompt, and there is "
                "only 1; set 2 or more, or objective: reinforce or ppo"
            )
        self.kl_coef = _KL_COEF if self.kl_coef is None else self.kl_coef
        self.kl_in = self.kl_in or ("reward" if gradient.normalization in ("sum", "tokens") else "loss")
        self.kl_estimator = self.kl_estimator or ("k1" if self.kl_in == "reward" else "k3")
        if self.whiten_advantages is None:
            self.whiten_advantages = self._is_ppo
        check_all(self._check_kl, self._check_ptx)

    def _check_kl(self) -> None:
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise SimpoError("kl_estimator: the gradient of k1 is 0 on average; in the loss use k2, k3 or exact")
        if self.kl_in == "reward" and self.kl_estimator == "exact":
            raise SimpoError(
                "kl_estimator: the exact KL of a token's distribution does not depend on the token that was drawn, so "
                "that as a reward it would not keep the token near the start model; use k1, or kl_in: loss"
            )
        if self.kl_target is None and self.kl_horizon is not None:
            raise SimpoError("kl_horizon: only an adaptive coefficient has one; set kl_target, or leave it out")
        if self.kl_target is not None and not self.kl_coef:
            raise SimpoError("kl_target: changes kl_coef by a factor, and 0 stays 0; set kl_coef above 0")
        if self.kl_target is not None and self.kl_horizon is None:
            self.kl_horizon = _KL_HORIZON

    def _check_ptx(self) -> None:
        given = self._set_among(("ptx_weight", "ptx_dataset_name", "ptx_batch_size"))
        if given and not (self.ptx_weight and self.ptx_dataset_name):
            raise SimpoError(f"{given[0]}: give ptx_weight and ptx_dataset_name together, or leave it out")
