"""TRL's ``DPOTrainer``, ``KTOTrainer`` and ``ORPOTrainer`` with their configurations."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from simpo.compat.base import for_rows
from simpo.compat.keys import PortedConfig, TRLKeys, unsupported, without_effect
from simpo.compat.trainer import PortedPreferenceTrainer
from simpo.config import setting
from simpo.data.tokenizing import Prepared, is_feedback, prepare
from simpo.errors import SimpoError
from simpo.training.preference import PreferenceConfig

logger = logging.getLogger(__name__)

# TRL's loss_type -> our objective. What TRL adds to several of them is in DPOConfig.
_OBJECTIVES = {
    **{"sigmoid": "dpo", "ipo": "ipo", "sigmoid_norm": "dpo_norm", "nca_pair": "nca", "bco_pair": "bco"},
    **{"sppo_hard": "sppo", "apo_zero": "apo_zero", "apo_down": "apo_down"},
}
_SFT = "sft"
_DIVERGENCES = {"js_divergence": "js", "forward_kl": "forward_kl", "alpha_divergence": "alpha"}
_UNPAIRED_AT_ONCE = 1000  # pairs; their chosen responses come before their rejected ones, as in TRL


@dataclass
class _ReferenceKeys(TRLKeys, PreferenceConfig):  # type: ignore[misc, valid-type]
    """The keys that TRL's configurations with a reference model share."""

    precompute_ref_log_probs: bool = setting(
        False, "Has no effect here: log-probabilities of the reference are computed once."
    )
    precompute_ref_batch_size: int | None = without_effect(None, "max_batch_tokens bounds a forward")
    beta: float = setting(0.1, "Scale of the reward.")  # type: ignore[assignment]
    sync_ref_model: bool = unsupported(False, "the reference is always the model that training starts from")
    ref_model_mixup_alpha: float = without_effect(0.6, "it belongs to sync_ref_model")
    ref_model_sync_steps: int = without_effect(512, "it belongs to sync_ref_model")

    def __post_init__(self) -> None:
        self.precompute_ref_log_probs = True
        loss_type, self.loss_type = self.loss_type, None  # the objective is set
        super().__post_init__()
        self.loss_type = loss_type


@dataclass
class DPOConfig(_ReferenceKeys):
    """TRL's keys with TRL's defaults (1.16).

    Several losses with weights are a mixture of objectives; the loss ``sft`` is ``sft_weight``, over the tokens of a
    step. ``bco_pair`` has a reward shift here, as in the paper.
    """

    loss_type: list[str] = setting(["sigmoid"], f"Any of {', '.join([*_OBJECTIVES, _SFT])}.")  # type: ignore[assignment]
    loss_weights: list[float] | None = setting(None, "One for each loss (default: 1).")
    f_divergence_type: str = setting("reverse_kl", f"reverse_kl, or, with sigmoid alone, {', '.join(_DIVERGENCES)}.")
    f_alpha_divergence_coef: float = setting(0.5, "For alpha_divergence: one minus its order.")
    label_smoothing: float = setting(0.0, "Not supported.")  # type: ignore[assignment]
    use_weighting: bool = unsupported(
        False, "PreferenceConfig(wpo_weights=True) has these weights, which are at most 1, unlike TRL's"
    )
    discopop_tau: float = without_effect(0.05, "it belongs to loss_type discopop, which is not supported")
    truncation_mode: Literal["keep_end", "keep_start"] = setting("keep_end", "Which end of an overlong prompt stays.")

    def __post_init__(self) -> None:
        if self.label_smoothing:
            raise SimpoError(
                "label_smoothing: not supported (TRL applies it to losses that simpo does not have; "
                "PreferenceConfig(objective='dpo', label_smoothing=...) is cDPO)"
            )
        losses = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        weights = [1.0] * len(losses) if self.loss_weights is None else list(self.loss_weights)
        if len(weights) != len(losses):
            raise SimpoError(f"loss_weights: {len(weights)} for {len(losses)} losses; give one for each loss_type")
        for name in losses:
            if name not in (*_OBJECTIVES, _SFT):
                known = ", ".join((*_OBJECTIVES, _SFT))
                raise SimpoError(f"loss_type: {name!r} is not supported; there are {known}")
            if losses.count(name) > 1:
                raise SimpoError(f"loss_type: {name!r} is given twice; give it once, with the sum of its loss_weights")
        self._set_objective(dict(zip(losses, weights, strict=True)))
        super().__post_init__()
        self.loss_type = losses

    def _set_objective(self, weights: dict[str, float]) -> None:
        """Translate TRL's losses and hyperparameters to objectives with their hyperparameters."""
        sft_weight = weights.pop(_SFT, 0.0)
        if self.sft_weight not in (0.0, sft_weight):
            raise SimpoError("sft_weight: DPOConfig's key is loss_type, with 'sft' in it, and its loss_weights")
        self.sft_weight = sft_weight
        found = {_OBJECTIVES[name]: weight for name, weight in weights.items()}
        if not found:
            raise SimpoError("loss_type: sft is the only loss; use SFTTrainer")
        if self.f_divergence_type != "reverse_kl":
            if list(found) != ["dpo"] or self.f_divergence_type not in _DIVERGENCES:
                raise SimpoError(
                    f"f_divergence_type: {self.f_divergence_type!r} is not supported with {', '.join(weights)}; there "
                    f"are reverse_kl and, with sigmoid alone, {', '.join(_DIVERGENCES)}"
                )
            found = {"f_dpo": found["dpo"]}
            self.divergence = _DIVERGENCES[self.f_divergence_type]  # type: ignore[assignment]
            self.alpha = self._order if self.divergence == "alpha" else None
        self.objective = found if len(found) > 1 or set(found.values()) != {1.0} else next(iter(found))
        if "ipo" in found:
            self.tau, self.length_normalized = self.beta, True
        if list(found) == ["ipo"]:
            self.beta = None  # type: ignore[assignment]
        if "bco" in found:
            logger.warning("bco_pair: rewards are shifted by their running mean, as in the paper; TRL has no shift")
        self.label_smoothing = None  # type: ignore[assignment]

    @property
    def _order(self) -> float:
        """The order of the alpha divergence."""
        if not 0 < self.f_alpha_divergence_coef < 1:
            raise SimpoError(
                f"f_alpha_divergence_coef: must be in (0, 1), not {self.f_alpha_divergence_coef}; for 0 set "
                "f_divergence_type to forward_kl, for 1 to reverse_kl"
            )
        return 1 - self.f_alpha_divergence_coef


@dataclass
class KTOConfig(_ReferenceKeys):
    """TRL's keys with TRL's defaults (1.16)."""

    loss_type: str = setting("kto", "kto.")  # type: ignore[assignment]
    train_sampling_strategy: str = setting("sequential", "random or sequential.")
    desirable_weight: float = setting(1.0, "Weight of desirable responses.")
    undesirable_weight: float = setting(1.0, "Weight of undesirable responses.")

    def __post_init__(self) -> None:
        if self.loss_type != "kto":
            raise SimpoError(f"loss_type: {self.loss_type!r} is not supported by KTOConfig, which has kto")
        if self.sft_weight:
            raise SimpoError("sft_weight: not supported by KTOConfig; PreferenceConfig(objective='kto') has it")
        self.objective = "kto"
        super().__post_init__()


@dataclass
class ORPOConfig(TRLKeys, PortedConfig):  # type: ignore[misc]
    """TRL's keys with TRL's defaults (1.16). ``beta`` is the weight of the odds ratio."""

    beta: float = setting(0.1, "Weight of the odds ratio.")  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.objective, self.lam, self.beta = "orpo", self.beta, None  # type: ignore[assignment]
        super().__post_init__()


class _WithReference(PortedPreferenceTrainer):
    """Takes what TRL's ``DPOTrainer`` and ``KTOTrainer`` take, in their order; see :class:`PortedPreferenceTrainer`."""

    def __init__(
        self,
        model: PreTrainedModel | str | None = None,
        ref_model: nn.Module | None = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__(
            *(model, args, data_collator, train_dataset, eval_dataset, processing_class, None, callbacks, optimizers),
            peft_config=peft_config,
            compute_metrics=compute_metrics,
            tokenizer=tokenizer,
            ref_model=ref_model,
            quantization_config=quantization_config,
        )


class DPOTrainer(_WithReference):
    """TRL's ``DPOTrainer``: its arguments, in its order, with a :class:`DPOConfig`."""

    config_class = DPOConfig


class KTOTrainer(_WithReference):
    """TRL's ``KTOTrainer``: its arguments, in its order, with a :class:`KTOConfig`. Pairs become single responses."""

    config_class = KTOConfig

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Tokenize single responses with labels, or pairs, each of which becomes two."""
        tokenizer = for_rows(dataset, tokenizer, "completion")
        if is_feedback(dataset):
            return super().prepare(dataset, tokenizer, args, label)
        pairs = prepare(dataset, for_rows(dataset, tokenizer, "chosen"), args.tokenize_settings, label=label)
        singles = pairs.dataset.map(
            _unpaired, batched=True, batch_size=_UNPAIRED_AT_ONCE, remove_columns=pairs.dataset.column_names
        )
        return replace(super().prepare(singles, tokenizer, args, label), report=pairs.report)


class ORPOTrainer(PortedPreferenceTrainer):
    """TRL's ``ORPOTrainer``: its arguments, in its order, with an :class:`ORPOConfig`.

    The likelihood term covers the chosen response, as in the paper; TRL's covers the prompt as well.
    """

    config_class = ORPOConfig


def _unpaired(columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Single responses, ``response_ids`` of one, with labels: the chosen ones first."""
    for number, responses in enumerate(columns["response_ids"]):
        if len(responses) != 2:
            where = columns["where"][number] if "where" in columns else "train_dataset"
            raise SimpoError(f"{where}: {len(responses)} ranked responses; KTOTrainer takes pairs or single responses")
    count = len(columns["prompt_ids"])
    return {
        "prompt_ids": [*columns["prompt_ids"], *columns["prompt_ids"]],
        "response_ids": [[responses[side]] for side in (0, 1) for responses in columns["response_ids"]],
        "label": [True] * count + [False] * count,
        **{name: [*columns[name], *columns[name]] for name in ("where", "extra") if name in columns},
    }
