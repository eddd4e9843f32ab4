"""TRL's ``SFTTrainer`` and ``RewardTrainer`` with their configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from simpo.compat.keys import TRLKeys
from simpo.compat.start import for_rows, start
from simpo.config import setting
from simpo.data.rows import DataReport
from simpo.data.tokenizing import Prepared
from simpo.errors import SimpoError
from simpo.training import configs, reward, sft

_TOKENIZER = "change the tokenizer, and give it as processing_class"


@dataclass
class SFTConfig(TRLKeys, configs.SFTConfig):  # type: ignore[misc, valid-type]
    """TRL's keys with TRL's defaults (1.16).

    Raises:
        SimpoError: a value that is out of bounds or not supported; the message names the key.
    """

    unsupported: ClassVar[Mapping[str, str]] = {
        "packing": "rows are never padded here, and a step has as many as the batch size says; leave it out",
        "eval_packing": "rows are never padded here; leave it out",
        "shuffle_dataset": "rows are drawn in a new order in every epoch; leave it out",
        "dataset_kwargs": "give a data set that is not tokenized, or one with prompt_ids and response_ids",
        "chat_template_path": _TOKENIZER,
        "eos_token": _TOKENIZER,
    }
    without_effect: ClassVar[Sequence[tuple[str, Any, str]]] = (("packing_strategy", "bfd", "it belongs to packing"),)

    learning_rate: float = setting(2e-5, "Peak learning rate.")
    dataset_text_field: str = setting("text", "Column of texts, all of which is trained on.")
    completion_only_loss: bool | None = setting(None, "Train on completions only (default: where there are any).")
    assistant_only_loss: bool = setting(False, "Train on the assistant's turns of a conversation only.")
    loss_type: str = setting("nll", "nll.")
    packing: bool = setting(False, "Not supported.")
    packing_strategy: str = setting("bfd", "Has no effect here.")
    eval_packing: bool | None = setting(None, "Not supported.")
    shuffle_dataset: bool = setting(False, "Not supported.")
    dataset_kwargs: dict[str, Any] | str | None = setting(None, "Not supported.")
    chat_template_path: str | None = setting(None, "Not supported.")
    eos_token: str | None = setting(None, "Not supported.")

    def __post_init__(self) -> None:
        if self.loss_type not in ("nll", "chunked_nll"):
            raise SimpoError(f"loss_type: {self.loss_type!r} is not supported by SFTConfig, which has nll")
        super().__post_init__()


class SFTTrainer(sft.SFTTrainer):
    """TRL's ``SFTTrainer``: its arguments, in its order, with an :class:`SFTConfig`.

    As in TRL, all of a text or conversation is trained on; of ``{prompt, completion}`` the completion is, and with
    ``assistant_only_loss`` the assistant's turns.

    Raises:
        SimpoError: an argument that is not supported, named, and what :class:`simpo.SFTTrainer` raises.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | None = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
    ) -> None:
        unsupported = {
            **{"data_collator": data_collator, "compute_loss_func": compute_loss_func},
            **{"compute_metrics": compute_metrics, "optimizer_cls_and_kwargs": optimizer_cls_and_kwargs},
            **{"preprocess_logits_for_metrics": preprocess_logits_for_metrics},
            **{"quantization_config": quantization_config},
        }
        given = {"model": model, "args": args, "processing_class": processing_class, "peft_config": peft_config}
        found = start(SFTConfig, self.load, **given, unsupported=unsupported)
        if formatting_func is not None:
            field_name = found.config.dataset_text_field
            train_dataset, eval_dataset = (
                _formatted(rows, formatting_func, field_name) for rows in (train_dataset, eval_dataset)
            )
        super().__init__(found.model, found.config, train_dataset, eval_dataset, found.tokenizer, callbacks, optimizers)

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
            return _whole_texts(dataset, tokenizer, args, label)
        prepared = super().prepare(dataset, for_rows(dataset, tokenizer, "completion"), args, label)
        completions = "completion" in dataset.column_names and args.completion_only_loss is not False
        if completions or args.assistant_only_loss:
            return prepared
        if prepared.report.split:
            raise SimpoError(
                f"{label}: the chat template renders earlier answers otherwise than the last, so a conversation is "
                "several rows; set assistant_only_loss=True"
            )
        rows = prepared.dataset.remove_columns("scored")
        return replace(prepared, dataset=rows.map(_from_the_first_token, batched=True))


def _formatted(rows: Any, function: Callable[[dict[str, Any]], str], name: str) -> Any:
    if rows is None:
        return None
    if isinstance(rows, dict):
        return {key: _formatted(part, function, name) for key, part in rows.items()}
    return rows.map(lambda row: {name: function(row)}, remove_columns=rows.column_names)


def _from_the_first_token(columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Rows whose prompt is their first token, so that all others are scored."""
    whole = [[*p, *r[0]] for p, r in zip(columns["prompt_ids"], columns["response_ids"], strict=True)]
    return {"prompt_ids": [ids[:1] for ids in whole], "response_ids": [[ids[1:]] for ids in whole]}


def _whole_texts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, label: str) -> Prepared:
    """Texts as the tokenizer reads them, special tokens included, with EOS at the end; cut to ``max_length``."""
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
            status.append("dropped: one token, from which nothing follows")
        else:
            rows.append({"prompt_ids": ids[:1], "response_ids": [ids[1:]], "where": where})
        outcomes.append((where, status))
    if not rows:
        raise SimpoError(f"{label}: {name}: all texts are empty")
    return Prepared(Dataset.from_list(rows), DataReport.of(label, outcomes, noun="texts"))


@dataclass
class RewardConfig(TRLKeys, configs.RewardConfig):  # type: ignore[misc, valid-type]
    """TRL's keys with TRL's defaults (1.16). The column ``margin`` is used where the training data have it.

    Raises:
        SimpoError: a value that is out of bounds or not supported; the message names the key.
    """

    unsupported: ClassVar[Mapping[str, str]] = {"chat_template_path": _TOKENIZER, "eos_token": _TOKENIZER}

    learning_rate: float = setting(1e-4, "Peak learning rate.")
    chat_template_path: str | None = setting(None, "Not supported.")
    eos_token: str | None = setting(None, "Not supported.")


class RewardTrainer(reward.RewardTrainer):
    """TRL's ``RewardTrainer``: its arguments, in its order, with a :class:`RewardConfig`.

    Raises:
        SimpoError: an argument that is not supported, named, and what :class:`simpo.RewardTrainer` raises.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | None = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        unsupported = {
            **{"data_collator": data_collator, "compute_metrics": compute_metrics},
            **{"optimizer_cls_and_kwargs": optimizer_cls_and_kwargs},
            **{"preprocess_logits_for_metrics": preprocess_logits_for_metrics},
            **{"quantization_config": quantization_config},
        }
        given = {"model": model, "args": args, "processing_class": processing_class, "peft_config": peft_config}
        found = start(RewardConfig, self.load, **given, unsupported=unsupported)
        if train_dataset is not None and "margin" in train_dataset.column_names:
            found.config.margin = "column"
        super().__init__(found.model, found.config, train_dataset, eval_dataset, found.tokenizer, callbacks, optimizers)

    @classmethod
    def prepare(cls, dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, args: Any, label: str) -> Prepared:
        """Tokenize pairs; those made of strings without the chat template."""
        return super().prepare(dataset, for_rows(dataset, tokenizer, "chosen"), args, label)
