"""TRL's ``SFTTrainer`` and ``RewardTrainer`` with their configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from simpo.compat.keys import TRLKeys, unsupported, without_effect
from simpo.compat.trainer import PortedTrainer, with_prompts
from simpo.config import setting
from simpo.data.rows import DataReport
from simpo.data.tokenizing import Prepared
from simpo.errors import SimpoError
from simpo.training import configs, reward, sft

# The arguments of the constructors, in their order.
_DATA = ("model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class")
_METRICS = ("compute_metrics", "callbacks", "optimizers", "optimizer_cls_and_kwargs", "preprocess_logits_for_metrics")
_LOADING = ("quantization_config", "peft_config")

_TOKENIZER = "change the tokenizer, and pass it as processing_class"


@dataclass
class SFTConfig(TRLKeys, configs.SFTConfig):  # type: ignore[misc, valid-type]
    """TRL's keys with TRL's defaults (1.16)."""

    learning_rate: float = setting(2e-5, "Peak learning rate.")
    dataset_text_field: str = setting("text", "Column of texts, all of which is trained on.")
    completion_only_loss: bool | None = setting(None, "Train on completions only (default: where there are any).")
    assistant_only_loss: bool = setting(False, "Train on the assistant's turns of a conversation only.")
    loss_type: str = setting("nll", "nll.")
    packing: bool = unsupported(
        False, "rows are never padded here, and the batch size is the number of rows in a step; leave it out"
    )
    packing_strategy: str = without_effect("bfd", "it belongs to packing")
    eval_packing: bool | None = unsupported(None, "rows are never padded here; leave it out")
    shuffle_dataset: bool = unsupported(False, "rows are drawn in a new order in every epoch; leave it out")
    dataset_kwargs: dict[str, Any] | str | None = unsupported(
        None, "pass a data set that is not tokenized, or one with prompt_ids and response_ids"
    )
    chat_template_path: str | None = unsupported(None, _TOKENIZER)
    eos_token: str | None = unsupported(None, _TOKENIZER)

    def __post_init__(self) -> None:
        if self.loss_type not in ("nll", "chunked_nll"):
            raise SimpoError(f"loss_type: {self.loss_type!r} is not supported by SFTConfig, which has nll")
        super().__post_init__()


class SFTTrainer(PortedTrainer, sft.SFTTrainer):
    """TRL's ``SFTTrainer``: its arguments, in its order, with an :class:`SFTConfig`.

    As in TRL, all tokens of a text or conversation are trained on; of ``{prompt, completion}`` those of the completion,
    and with ``assistant_only_loss`` those of the assistant's turns.
    """

    config_class = SFTConfig
    arguments = (*_DATA, "compute_loss_func", *_METRICS, *_LOADING, "formatting_func")
    text_column = "completion"

    def adapt(self, config: Any, given: dict[str, Any]) -> None:
        """Write what ``formatting_func`` returns for every row as its text."""
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
                raise SimpoError(f"assistant_only_loss: {label} has texts instead of conversations; leave it out")
            return _prepare_texts(dataset, tokenizer, args, label)
        prepared = super().prepare(dataset, tokenizer, args, label)
        completions = "completion" in dataset.column_names and args.completion_only_loss is not False
        if completions or args.assistant_only_loss:
            return prepared
        if prepared.report.split:
            raise SimpoError(
                f"{label}: the chat template renders earlier answers differently from the last, so a conversation "
                "becomes several rows; set assistant_only_loss=True"
            )
        rows = prepared.dataset.remove_columns("scored")
        return replace(prepared, dataset=rows.map(_scored_from_second_token, batched=True))


def _formatted(rows: Any, function: Callable[[dict[str, Any]], str], name: str) -> Any:
    if rows is None:
        return None
    if isinstance(rows, dict):
        return {key: _formatted(part, function, name) for key, part in rows.items()}
    return rows.map(lambda row: {name: function(row)}, remove_columns=rows.column_names)


def _scored_from_second_token(columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Rows whose prompt is their first token, so that all others are scored."""
    whole = [[*p, *r[0]] for p, r in zip(columns["prompt_ids"], columns["response_ids"], strict=True)]
    return {"prompt_ids": [ids[:1] for ids in whole], "response_ids": [[ids[1:]] for ids in whole]}


def _prepare_texts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, label: str) -> Prepared:
    """Tokenize whole texts, special tokens included, with EOS at the end; cut to ``max_length``."""
    name, end = args.dataset_text_field, str(tokenizer.eos_token or "")
    rows, outcomes = [], []
    for number, text in enumerate(dataset[name]):
        where = f"{label} row {number}"
        if not isinstance(text, str):
            raise SimpoError(f"{where}: {name}: a {type(text).__name__} instead of text")
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
    """TRL's keys with TRL's defaults (1.16). The column ``margin`` is used where the training data have it."""

    learning_rate: float = setting(1e-4, "Peak learning rate.")
    chat_template_path: str | None = unsupported(None, _TOKENIZER)
    eos_token: str | None = unsupported(None, _TOKENIZER)


class RewardTrainer(PortedTrainer, reward.RewardTrainer):
    """TRL's ``RewardTrainer``: its arguments, in its order, with a :class:`RewardConfig`."""

    config_class = RewardConfig
    arguments = (*_DATA, *_METRICS, *_LOADING)

    def adapt(self, config: Any, given: dict[str, Any]) -> None:
        """Use the column ``margin`` where the training data have it."""
        if given["train_dataset"] is not None and "margin" in given["train_dataset"].column_names:
            config.margin = "column"

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """As in the base class, but texts without a prompt are divided between words: TRL tokenizes them whole."""
        return super().prepare(with_prompts(dataset, whole_words=True), tokenizer, args, label)
