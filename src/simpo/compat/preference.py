"""TRL's preference trainers and the paper's ``SimPOTrainer`` (princeton-nlp/SimPO), with their configurations."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from simpo.compat.keys import PortedConfig, TRLKeys, unsupported, without_effect
from simpo.compat.trainer import PortedPreferenceTrainer, for_rows, with_prompts
from simpo.config import check_values, setting
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
# The objectives of CPO; TRL's reference-free "hinge" and "ipo" have none.
_CPO_OBJECTIVES = {"simpo": "simpo", "alphapo": "alphapo", "sigmoid": "cpo"}
_CPO_LENGTH = 512
_PAPER_LENGTHS = {"max_length": 512, "max_prompt_length": 128}
# The arguments of the constructors, in their order.
_DATA = ("args", "data_collator", "train_dataset", "eval_dataset", "processing_class")
_WITH_REFERENCE = (
    *("model", "ref_model", *_DATA, "compute_metrics", "callbacks", "optimizers", "quantization_config"),
    *("peft_config", "tokenizer"),
)
_WITHOUT_REFERENCE = (
    *("model", *_DATA, "model_init", "callbacks", "optimizers", "preprocess_logits_for_metrics", "peft_config"),
    *("compute_metrics", "tokenizer"),
)
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


class DPOTrainer(PortedPreferenceTrainer):
    """TRL's ``DPOTrainer``: its arguments, in its order, with a :class:`DPOConfig`."""

    config_class = DPOConfig
    arguments = _WITH_REFERENCE


class KTOTrainer(PortedPreferenceTrainer):
    """TRL's ``KTOTrainer``: its arguments, in its order, with a :class:`KTOConfig`. Pairs become single responses."""

    config_class = KTOConfig
    arguments = _WITH_REFERENCE

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Tokenize single responses with labels, or pairs, each of which becomes two."""
        tokenizer = for_rows(dataset, tokenizer, "completion")
        if is_feedback(dataset):
            return super().prepare(dataset, tokenizer, args, label)
        tokenizer = for_rows(dataset, tokenizer, "chosen")
        pairs = prepare(with_prompts(dataset), tokenizer, args.tokenize_settings, label=label)
        singles = pairs.dataset.map(
            _unpaired, batched=True, batch_size=_UNPAIRED_AT_ONCE, remove_columns=pairs.dataset.column_names
        )
        return replace(super().prepare(singles, tokenizer, args, label), report=pairs.report)


class ORPOTrainer(PortedPreferenceTrainer):
    """TRL's ``ORPOTrainer``: its arguments, in its order, with an :class:`ORPOConfig`.

    The likelihood term covers the chosen response, as in the paper; TRL's covers the prompt as well.
    """

    config_class = ORPOConfig
    arguments = _WITHOUT_REFERENCE


@dataclass
class CPOConfig(TRLKeys, PortedConfig):  # type: ignore[misc]
    """TRL's keys with TRL's defaults (1.16, and the keys that older versions had).

    ``simpo_gamma`` is the margin itself, not its ratio to ``beta``. ``cpo_alpha`` is also read as ``sft_weight``.
    """

    beta: float = setting(0.1, "Scale of the reward; SimPO wants 2 to 10.")
    label_smoothing: float = setting(0.0, "Probability that a label is wrong.")
    loss_type: str | None = setting("sigmoid", "simpo, alphapo, or sigmoid, which is CPO.")
    cpo_alpha: float = setting(1.0, "Weight of the SFT term; pure SimPO has 0.", least=0)
    simpo_gamma: float = setting(0.5, "SimPO's target margin, absolute.", least=0)
    alpha: float | None = setting(0.0, "AlphaPO's exponent; 0 is SimPO.")

    def __post_init__(self) -> None:
        for key, is_set, trls in (
            ("gamma", self.gamma not in (None, self.simpo_gamma), "simpo_gamma, the margin itself"),
            ("gamma_beta_ratio", self.gamma_beta_ratio is not None, "simpo_gamma, the margin itself"),
            ("sft_weight", self.sft_weight not in (0.0, self.cpo_alpha), "cpo_alpha"),
        ):
            if is_set:
                raise SimpoError(f"{key}: CPOConfig's key is {trls}")
        check_values(self)
        self._set_objective()
        if self.max_length is None:
            logger.warning("max_length is not set: %d, as in TRL", _CPO_LENGTH)
            self.max_length = _CPO_LENGTH
        loss_type, self.loss_type = self.loss_type, None  # the base would read "sigmoid" as the link of SimPO
        super().__post_init__()
        self.loss_type = loss_type

    def _set_objective(self) -> None:
        """Translate TRL's loss_type and hyperparameters to an objective with its hyperparameters."""
        name = _CPO_OBJECTIVES.get(str(self.loss_type))
        if name is None:
            raise SimpoError(
                f"loss_type: {self.loss_type!r} is not supported by CPOConfig, which has {', '.join(_CPO_OBJECTIVES)}; "
                "PreferenceConfig(objective=...) has the others"
            )
        if self.alpha and name == "cpo":
            raise SimpoError("alpha: shapes the reward of loss_type 'simpo' and 'alphapo' only; set it to 0")
        self.objective = "alphapo" if self.alpha else name
        if self.loss_type == "alphapo":
            self.cpo_alpha = 0.0  # as TRL does
        self.sft_weight = self.cpo_alpha
        self.gamma = None if self.objective == "cpo" else self.simpo_gamma
        self.alpha = self.alpha if self.objective == "alphapo" else None
        if self.objective == "cpo":
            self.lam = 0.0  # the SFT term is added to the objective's loss, as a mean over tokens
            self.label_smoothing = self.label_smoothing or None  # type: ignore[assignment]


class CPOTrainer(PortedPreferenceTrainer):
    """TRL's ``CPOTrainer``: its arguments, in its order, with a :class:`CPOConfig`."""

    config_class = CPOConfig
    arguments = _WITHOUT_REFERENCE


@dataclass
class SimPOConfig(PortedConfig):
    """The paper's keys with the defaults of its code, including the learning rate of 5e-5 of ``TrainingArguments``.

    Truncation and scoring of assistant headers follow that code.
    """

    learning_rate: float = setting(5e-5, "Peak learning rate; the paper's are 3e-7 to 1e-6.")
    logging_steps: float = setting(500, "Optimizer steps between logs.")
    max_length: int | None = setting(  # type: ignore[assignment]
        None, "Longest prompt with response, in tokens (512 if not set)."
    )
    max_prompt_length: int | None = setting(None, "Length that overlong prompts are cut to (128 if not set).")
    max_target_length: int | None = without_effect(None, "it limits encoder-decoder models only")
    truncation: Literal["prompt", "drop", "paper"] = setting("paper", "How overlong rows are handled.")
    paper_tokenization: bool = setting(True, "Score the assistant header with the response.")
    beta: float = setting(2.0, "Scale of the reward.")
    gamma_beta_ratio: float = setting(0.25, "Target margin over beta.")
    label_smoothing: float = setting(0.0, "Probability that a label is wrong.")
    loss_type: str | None = setting("sigmoid", "The link: sigmoid or hinge.")

    def __post_init__(self) -> None:
        for key, length in _PAPER_LENGTHS.items():
            if getattr(self, key) is None:
                logger.warning("%s is not set: %d, as in the paper's code", key, length)
                setattr(self, key, length)
        loss_type = self.loss_type
        super().__post_init__()
        self.loss_type = loss_type


class SimPOTrainer(PortedPreferenceTrainer):
    """The paper's ``SimPOTrainer``: its arguments, in its order, with a :class:`SimPOConfig`."""

    config_class = SimPOConfig
    arguments = _WITHOUT_REFERENCE


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
