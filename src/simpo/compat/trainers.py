"""Drop-in versions of TRL's trainers and the paper's ``SimPOTrainer`` (princeton-nlp/SimPO), and their configs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from simpo.compat.base import (
    PortedConfig,
    PortedPreferenceTrainer,
    PortedTrainer,
    TRLKeys,
    add_prompts,
    tokenizer_for,
    unsupported,
    without_effect,
)
from simpo.config import check_values, setting
from simpo.data.rows import DataReport
from simpo.data.tokenizing import Prepared, is_feedback, prepare
from simpo.errors import SimpoError
from simpo.training import configs, reward, sft
from simpo.training.preference import PreferenceConfig

logger = logging.getLogger(__name__)

# TRL's loss_type -> our objective.
_OBJECTIVES = {
    "sigmoid": "dpo", "ipo": "ipo", "sigmoid_norm": "dpo_norm", "nca_pair": "nca", "bco_pair": "bco",
    "sppo_hard": "sppo", "apo_zero": "apo_zero", "apo_down": "apo_down",
}  # fmt: skip
_SFT = "sft"
_DIVERGENCES = {"js_divergence": "js", "forward_kl": "forward_kl", "alpha_divergence": "alpha"}
# CPO's loss_type -> our objective; TRL's reference-free "hinge" and "ipo" have no counterpart.
_CPO_OBJECTIVES = {"simpo": "simpo", "alphapo": "alphapo", "sigmoid": "cpo"}
_CPO_LENGTH = 512
_PAPER_LENGTHS = {"max_length": 512, "max_prompt_length": 128}
# Constructor arguments, in the original's order.
_DATA = ("args", "data_collator", "train_dataset", "eval_dataset", "processing_class")
_WITH_REFERENCE = (
    "model", "ref_model", *_DATA, "compute_metrics", "callbacks", "optimizers", "quantization_config",
    "peft_config", "tokenizer",
)  # fmt: skip
_WITHOUT_REFERENCE = (
    "model", *_DATA, "model_init", "callbacks", "optimizers", "preprocess_logits_for_metrics", "peft_config",
    "compute_metrics", "tokenizer",
)  # fmt: skip
_UNPAIRING_BATCH = 1000  # pairs; within a batch, all chosen responses come before the rejected ones, as in TRL


@dataclass
class _ReferenceKeys(TRLKeys, PreferenceConfig):  # type: ignore[misc, valid-type]
    """Keys shared by TRL's configurations with a reference model."""

    precompute_ref_log_probs: bool = setting(
        False, "Has no effect here: reference log-probabilities are always computed once."
    )
    precompute_ref_batch_size: int | None = without_effect(None, "max_batch_tokens bounds each forward pass")
    beta: float = setting(0.1, "Scale of the reward.")  # type: ignore[assignment]
    sync_ref_model: bool = unsupported(False, "the reference is always the initial model")
    ref_model_mixup_alpha: float = without_effect(0.6, "it belongs to sync_ref_model")
    ref_model_sync_steps: int = without_effect(512, "it belongs to sync_ref_model")

    def __post_init__(self) -> None:
        self.precompute_ref_log_probs = True
        loss_type, self.loss_type = self.loss_type, None  # the objective replaces it
        super().__post_init__()
        self.loss_type = loss_type


@dataclass
class DPOConfig(_ReferenceKeys):
    """TRL's keys with TRL's defaults (1.16).

    Several weighted losses become a mixture of objectives. The loss ``sft`` becomes ``sft_weight``, averaged over the
    tokens of a step. ``bco_pair`` shifts rewards as in the paper, unlike TRL.
    """

    loss_type: list[str] = setting(["sigmoid"], f"Any of {', '.join([*_OBJECTIVES, _SFT])}.")  # type: ignore[assignment]
    loss_weights: list[float] | None = setting(None, "One weight per loss (default: 1).")
    f_divergence_type: str = setting("reverse_kl", f"reverse_kl, or, with sigmoid alone, {', '.join(_DIVERGENCES)}.")
    f_alpha_divergence_coef: float = setting(0.5, "For alpha_divergence: 1 minus its order.")
    label_smoothing: float = setting(0.0, "Not supported.")  # type: ignore[assignment]
    use_weighting: bool = unsupported(
        False, "PreferenceConfig(wpo_weights=True) has these weights, capped at 1 unlike TRL's"
    )
    discopop_tau: float = without_effect(0.05, "it belongs to loss_type discopop, which is not supported")
    truncation_mode: Literal["keep_end", "keep_start"] = setting("keep_end", "Which end of an overlong prompt to keep.")

    def __post_init__(self) -> None:
        if self.label_smoothing:
            raise SimpoError(
                "label_smoothing: not supported (TRL's losses with it do not exist here; for cDPO, use "
                "PreferenceConfig(objective='dpo', label_smoothing=...))"
            )
        losses = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        weights = [1.0] * len(losses) if self.loss_weights is None else list(self.loss_weights)
        if len(weights) != len(losses):
            raise SimpoError(f"loss_weights: {len(weights)} for {len(losses)} losses; give one for each loss_type")
        for name in losses:
            if name not in (*_OBJECTIVES, _SFT):
                known = ", ".join((*_OBJECTIVES, _SFT))
                raise SimpoError(f"loss_type: {name!r} is not supported; choose from {known}")
            if losses.count(name) > 1:
                raise SimpoError(f"loss_type: {name!r} is given twice; give it once, with the sum of its loss_weights")
        self._set_objective(dict(zip(losses, weights, strict=True)))
        super().__post_init__()
        self.loss_type = losses

    def _set_objective(self, weights: dict[str, float]) -> None:
        """Translate TRL's losses and hyperparameters into objectives and their hyperparameters."""
        sft_weight = weights.pop(_SFT, 0.0)
        if self.sft_weight not in (0.0, sft_weight):
            raise SimpoError("sft_weight: not a key of DPOConfig; add sft to loss_type and its weight to loss_weights")
        self.sft_weight = sft_weight
        mixture = {_OBJECTIVES[name]: weight for name, weight in weights.items()}
        if not mixture:
            raise SimpoError("loss_type: sft is the only loss; use SFTTrainer")
        if self.f_divergence_type != "reverse_kl":
            if list(mixture) != ["dpo"] or self.f_divergence_type not in _DIVERGENCES:
                raise SimpoError(
                    f"f_divergence_type: {self.f_divergence_type!r} is not supported with {', '.join(weights)}; use "
                    f"reverse_kl or, with sigmoid alone, {', '.join(_DIVERGENCES)}"
                )
            mixture = {"f_dpo": mixture["dpo"]}
            self.divergence = _DIVERGENCES[self.f_divergence_type]  # type: ignore[assignment]
            self.alpha = self._alpha_order if self.divergence == "alpha" else None
        self.objective = mixture if len(mixture) > 1 or set(mixture.values()) != {1.0} else next(iter(mixture))
        if "ipo" in mixture:
            self.tau, self.length_normalized = self.beta, True
        if list(mixture) == ["ipo"]:
            self.beta = None  # type: ignore[assignment]
        if "bco" in mixture:
            logger.warning("bco_pair: rewards are shifted by their running mean, as in the paper; TRL does not do this")
        self.label_smoothing = None  # type: ignore[assignment]

    @property
    def _alpha_order(self) -> float:
        """Order of the alpha divergence."""
        if not 0 < self.f_alpha_divergence_coef < 1:
            raise SimpoError(
                f"f_alpha_divergence_coef: must be in (0, 1), not {self.f_alpha_divergence_coef}; instead of 0, set "
                "f_divergence_type to forward_kl; instead of 1, to reverse_kl"
            )
        return 1 - self.f_alpha_divergence_coef


@dataclass
class KTOConfig(_ReferenceKeys):
    """TRL's keys with TRL's defaults (1.16)."""

    loss_type: str = setting("kto", "Only kto.")  # type: ignore[assignment]
    train_sampling_strategy: str = setting("sequential", "random or sequential.")
    desirable_weight: float = setting(1.0, "Weight of desirable responses.")
    undesirable_weight: float = setting(1.0, "Weight of undesirable responses.")

    def __post_init__(self) -> None:
        if self.loss_type != "kto":
            raise SimpoError(f"loss_type: {self.loss_type!r} is not supported by KTOConfig; use kto")
        if self.sft_weight:
            raise SimpoError("sft_weight: not supported by KTOConfig; use PreferenceConfig(objective='kto')")
        self.objective = "kto"
        super().__post_init__()


@dataclass
class ORPOConfig(TRLKeys, PortedConfig):  # type: ignore[misc]
    """TRL's keys with TRL's defaults (1.16). ``beta`` is the weight of the odds-ratio term."""

    beta: float = setting(0.1, "Weight of the odds-ratio term.")  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.objective, self.lam, self.beta = "orpo", self.beta, None  # type: ignore[assignment]
        super().__post_init__()


class DPOTrainer(PortedPreferenceTrainer):
    """TRL's ``DPOTrainer``, with the same arguments in the same order and a :class:`DPOConfig`."""

    config_class = DPOConfig
    arguments = _WITH_REFERENCE


class KTOTrainer(PortedPreferenceTrainer):
    """TRL's ``KTOTrainer``, with the same arguments in the same order and a :class:`KTOConfig`. Splits pairs."""

    config_class = KTOConfig
    arguments = _WITH_REFERENCE

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Tokenize labeled single responses, or pairs, each of which becomes two rows."""
        tokenizer = tokenizer_for(dataset, tokenizer, "completion")
        if is_feedback(dataset):
            return super().prepare(dataset, tokenizer, args, label)
        tokenizer = tokenizer_for(dataset, tokenizer, "chosen")
        pairs = prepare(add_prompts(dataset), tokenizer, args.tokenize_settings, label=label)
        singles = pairs.dataset.map(
            _split_pairs, batched=True, batch_size=_UNPAIRING_BATCH, remove_columns=pairs.dataset.column_names
        )
        return replace(super().prepare(singles, tokenizer, args, label), report=pairs.report)


class ORPOTrainer(PortedPreferenceTrainer):
    """TRL's ``ORPOTrainer``, with the same arguments in the same order and an :class:`ORPOConfig`.

    The likelihood term covers the chosen response, as in the paper; TRL's also covers the prompt.
    """

    config_class = ORPOConfig
    arguments = _WITHOUT_REFERENCE


@dataclass
class CPOConfig(TRLKeys, PortedConfig):  # type: ignore[misc]
    """TRL's keys with TRL's defaults (1.16), including keys from older versions.

    ``simpo_gamma`` is the margin itself, not its ratio to ``beta``. ``cpo_alpha`` sets ``sft_weight``.
    """

    beta: float = setting(0.1, "Scale of the reward; use 2 to 10 for SimPO.")
    label_smoothing: float = setting(0.0, "Probability that a label is wrong.")
    loss_type: str | None = setting("sigmoid", "simpo, alphapo, or sigmoid (CPO).")
    cpo_alpha: float = setting(1.0, "Weight of the SFT term; 0 for pure SimPO.", least=0)
    simpo_gamma: float = setting(0.5, "SimPO's target margin (absolute).", least=0)
    alpha: float | None = setting(0.0, "AlphaPO's exponent; 0 is SimPO.")

    def __post_init__(self) -> None:
        for key, is_set, trl_key in (
            ("gamma", self.gamma not in (None, self.simpo_gamma), "simpo_gamma, the margin itself"),
            ("gamma_beta_ratio", self.gamma_beta_ratio is not None, "simpo_gamma, the margin itself"),
            ("sft_weight", self.sft_weight not in (0.0, self.cpo_alpha), "cpo_alpha"),
        ):
            if is_set:
                raise SimpoError(f"{key}: not a key of CPOConfig; set {trl_key}")
        check_values(self)
        self._set_objective()
        if self.max_length is None:
            logger.warning("max_length is not set; using %d, as in TRL", _CPO_LENGTH)
            self.max_length = _CPO_LENGTH
        loss_type, self.loss_type = self.loss_type, None  # the base class would read "sigmoid" as SimPO's link
        super().__post_init__()
        self.loss_type = loss_type

    def _set_objective(self) -> None:
        """Translate TRL's loss_type and hyperparameters into an objective and its hyperparameters."""
        name = _CPO_OBJECTIVES.get(str(self.loss_type))
        if name is None:
            raise SimpoError(
                f"loss_type: {self.loss_type!r} is not supported by CPOConfig; use {', '.join(_CPO_OBJECTIVES)}, or "
                "PreferenceConfig(objective=...) for other objectives"
            )
        if self.alpha and name == "cpo":
            raise SimpoError("alpha: only applies to loss_type 'simpo' and 'alphapo'; set it to 0")
        self.objective = "alphapo" if self.alpha else name
        if self.loss_type == "alphapo":
            self.cpo_alpha = 0.0  # as TRL does
        self.sft_weight = self.cpo_alpha
        self.gamma = None if self.objective == "cpo" else self.simpo_gamma
        self.alpha = self.alpha if self.objective == "alphapo" else None
        if self.objective == "cpo":
            self.lam = 0.0  # the SFT term comes from sft_weight instead, as a mean over tokens
            self.label_smoothing = self.label_smoothing or None  # type: ignore[assignment]


class CPOTrainer(PortedPreferenceTrainer):
    """TRL's ``CPOTrainer``, with the same arguments in the same order and a :class:`CPOConfig`."""

    config_class = CPOConfig
    arguments = _WITHOUT_REFERENCE


@dataclass
class SimPOConfig(PortedConfig):
    """The paper's keys with the defaults of its code, including ``TrainingArguments``' learning rate of 5e-5.

    Truncation and the scoring of assistant headers follow that code.
    """

    learning_rate: float = setting(5e-5, "Peak learning rate; the paper uses 3e-7 to 1e-6.")
    logging_steps: float = setting(500, "Optimizer steps between logs.")
    max_length: int | None = setting(  # type: ignore[assignment]
        None, "Maximum length of prompt plus response, in tokens (default: 512)."
    )
    max_prompt_length: int | None = setting(None, "Length to which overlong prompts are cut (default: 128).")
    max_target_length: int | None = without_effect(None, "it limits encoder-decoder models only")
    truncation: Literal["prompt", "drop", "paper"] = setting("paper", "How overlong rows are handled.")
    paper_tokenization: bool = setting(True, "Score the assistant header with the response.")
    beta: float = setting(2.0, "Scale of the reward.")
    gamma_beta_ratio: float = setting(0.25, "Target margin divided by beta.")
    label_smoothing: float = setting(0.0, "Probability that a label is wrong.")
    loss_type: str | None = setting("sigmoid", "The link: sigmoid or hinge.")

    def __post_init__(self) -> None:
        for key, length in _PAPER_LENGTHS.items():
            if getattr(self, key) is None:
                logger.warning("%s is not set; using %d, as in the paper's code", key, length)
                setattr(self, key, length)
        loss_type = self.loss_type
        super().__post_init__()
        self.loss_type = loss_type


class SimPOTrainer(PortedPreferenceTrainer):
    """The paper's ``SimPOTrainer``, with the same arguments in the same order and a :class:`SimPOConfig`."""

    config_class = SimPOConfig
    arguments = _WITHOUT_REFERENCE


def _split_pairs(columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Split a batch of pairs into labeled single responses, chosen ones first."""
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


# ---- Supervised fine-tuning and reward models.

# Constructor arguments, in the original's order.
_SUPERVISED = ("model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class")
_METRICS = ("compute_metrics", "callbacks", "optimizers", "optimizer_cls_and_kwargs", "preprocess_logits_for_metrics")
_LOADING = ("quantization_config", "peft_config")

_TOKENIZER = "change the tokenizer, and pass it as processing_class"


@dataclass
class SFTConfig(TRLKeys, configs.SFTConfig):  # type: ignore[misc, valid-type]
    """TRL's keys with TRL's defaults (1.16)."""

    learning_rate: float = setting(2e-5, "Peak learning rate.")
    dataset_text_field: str = setting("text", "Column of texts to train on in full.")
    completion_only_loss: bool | None = setting(None, "Train on completions only (default: if there are any).")
    assistant_only_loss: bool = setting(False, "Train only on the assistant turns of a conversation.")
    loss_type: str = setting("nll", "Only nll.")
    packing: bool = unsupported(
        False, "nothing is padded, and the batch size is the number of rows in a step; leave it out"
    )
    packing_strategy: str = without_effect("bfd", "it belongs to packing")
    eval_packing: bool | None = unsupported(None, "nothing is padded; leave it out")
    shuffle_dataset: bool = unsupported(False, "rows are reshuffled every epoch; leave it out")
    dataset_kwargs: dict[str, Any] | str | None = unsupported(
        None, "pass an untokenized dataset, or one with prompt_ids and response_ids"
    )
    chat_template_path: str | None = unsupported(None, _TOKENIZER)
    eos_token: str | None = unsupported(None, _TOKENIZER)

    def __post_init__(self) -> None:
        if self.loss_type not in ("nll", "chunked_nll"):
            raise SimpoError(f"loss_type: {self.loss_type!r} is not supported by SFTConfig; use nll")
        super().__post_init__()


class SFTTrainer(PortedTrainer, sft.SFTTrainer):
    """TRL's ``SFTTrainer``, with the same arguments in the same order and an :class:`SFTConfig`.

    As in TRL, the loss covers every token of a text or conversation, only the completion of ``{prompt, completion}``
    rows, and only the assistant turns with ``assistant_only_loss``.
    """

    config_class = SFTConfig
    arguments = (*_SUPERVISED, "compute_loss_func", *_METRICS, *_LOADING, "formatting_func")
    text_column = "completion"

    def adapt(self, config: Any, given: dict[str, Any]) -> None:
        """Replace every row with the text that ``formatting_func`` returns for it."""
        if given["formatting_func"] is not None:
            for name in ("train_dataset", "eval_dataset"):
                given[name] = _formatted(given[name], given["formatting_func"], config.dataset_text_field)

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Tokenize texts, conversations or completions, and mark the tokens that TRL trains on."""
        if "prompt_ids" in dataset.column_names or tokenizer is None:
            return super().prepare(dataset, tokenizer, args, label)
        if args.completion_only_loss and "completion" not in dataset.column_names:
            raise SimpoError(f"completion_only_loss: {label} has no column completion; leave it out")
        if args.dataset_text_field in dataset.column_names and "prompt" not in dataset.column_names:
            if args.assistant_only_loss:
                raise SimpoError(f"assistant_only_loss: {label} has texts, not conversations; leave it out")
            return _prepare_texts(dataset, tokenizer, args, label)
        prepared = super().prepare(dataset, tokenizer, args, label)
        completion_only = "completion" in dataset.column_names and args.completion_only_loss is not False
        if completion_only or args.assistant_only_loss:
            return prepared
        if prepared.report.split:
            raise SimpoError(
                f"{label}: the chat template renders earlier answers differently from the last one, so a conversation "
                "becomes several rows; set assistant_only_loss=True"
            )
        rows = prepared.dataset.remove_columns("scored")
        return replace(prepared, dataset=rows.map(_score_all_but_first_token, batched=True))


def _formatted(rows: Any, function: Callable[[dict[str, Any]], str], name: str) -> Any:
    if rows is None:
        return None
    if isinstance(rows, dict):
        return {key: _formatted(part, function, name) for key, part in rows.items()}
    return rows.map(lambda row: {name: function(row)}, remove_columns=rows.column_names)


def _score_all_but_first_token(columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Shrink each row's prompt to its first token, so that all other tokens are scored."""
    whole = [[*p, *r[0]] for p, r in zip(columns["prompt_ids"], columns["response_ids"], strict=True)]
    return {"prompt_ids": [ids[:1] for ids in whole], "response_ids": [[ids[1:]] for ids in whole]}


def _prepare_texts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, label: str) -> Prepared:
    """Tokenize whole texts with special tokens, append EOS, and cut to ``max_length``."""
    name, end = args.dataset_text_field, str(tokenizer.eos_token or "")
    rows, outcomes = [], []
    for number, text in enumerate(dataset[name]):
        where = f"{label} row {number}"
        if not isinstance(text, str):
            raise SimpoError(f"{where}: {name}: expected text, got {type(text).__name__}")
        ids = tokenizer(text if text.endswith(end) else text + end).input_ids
        status = ["cut: the end of a text"] if len(ids) > args.max_length else []
        ids = ids[: args.max_length]
        if len(ids) < 2:
            status.append("dropped: a single token, so there is nothing to predict")
        else:
            rows.append({"prompt_ids": ids[:1], "response_ids": [ids[1:]], "where": where})
        outcomes.append((where, status))
    if not rows:
        raise SimpoError(f"{label}: {name}: all texts are empty")
    return Prepared(Dataset.from_list(rows), DataReport.of(label, outcomes, noun="texts"))


@dataclass
class RewardConfig(TRLKeys, configs.RewardConfig):  # type: ignore[misc, valid-type]
    """TRL's keys with TRL's defaults (1.16). A ``margin`` column in the training data is used as the margin."""

    learning_rate: float = setting(1e-4, "Peak learning rate.")
    chat_template_path: str | None = unsupported(None, _TOKENIZER)
    eos_token: str | None = unsupported(None, _TOKENIZER)


class RewardTrainer(PortedTrainer, reward.RewardTrainer):
    """TRL's ``RewardTrainer``, with the same arguments in the same order and a :class:`RewardConfig`."""

    config_class = RewardConfig
    arguments = (*_SUPERVISED, *_METRICS, *_LOADING)

    def adapt(self, config: Any, given: dict[str, Any]) -> None:
        """Use the ``margin`` column if the training data has one."""
        if given["train_dataset"] is not None and "margin" in given["train_dataset"].column_names:
            config.margin = "column"

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Split prompts off between words, unlike the base class, because TRL tokenizes these texts whole."""
        return super().prepare(add_prompts(dataset, whole_words=True), tokenizer, args, label)
