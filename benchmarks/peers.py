"""The peers' trainers as their users run them, on exactly the token ids that simpo gets."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, Trainer, TrainingArguments

from benchmarks.entrants import Entrant
from benchmarks.setting import BETA, GAMMA, Setting, load_comparisons, load_text, training_arguments

IGNORED = -100


# Modules that the trainers below import on construction, by kind of entrant.
MODULES = {
    "trl cpo": ["trl.experimental.cpo"],
    "trl dpo": ["trl.trainer.dpo_trainer"],
    "liger": ["liger_kernel.chunked_loss"],
}


def import_peer(kind: str) -> None:
    """Import the modules this kind of entrant needs ahead of time, so that it starts without delay."""
    for module in MODULES.get(kind, []):
        importlib.import_module(module)


def trl_cpo_trainer(model: Any, entrant: Entrant, setting: Setting, folder: str) -> Any:
    """Build TRL's CPO trainer with the SimPO loss only."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: PLC0415 - may be absent

    args = CPOConfig(
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=BETA,
        simpo_gamma=GAMMA,
        max_length=setting.max_length,
        **_batches(entrant, setting),
        **training_arguments(setting, folder),
    )
    trainer = CPOTrainer(
        model, args=args, train_dataset=Dataset.from_list(load_text(setting)), processing_class=_tokenizer(setting)
    )
    for row, (prompt, chosen, rejected) in zip(trainer.train_dataset, _ids(setting), strict=True):
        for key, response in (("chosen", chosen), ("rejected", rejected)):
            labels = [IGNORED] * len(prompt) + response
            _require_same_ids(row[f"{key}_input_ids"] == prompt + response and row[f"{key}_labels"] == labels, key)
    return trainer


def trl_dpo_trainer(model: Any, entrant: Entrant, setting: Setting, folder: str) -> Any:
    """Build TRL's DPO trainer; the reference is a copy of the model unless it is precomputed."""
    from trl import DPOConfig, DPOTrainer  # noqa: PLC0415 - may be absent

    args = DPOConfig(
        precompute_ref_log_probs=entrant.precomputed,
        use_liger_kernel=entrant.liger,
        max_length=setting.max_length,
        **_batches(entrant, setting),
        **training_arguments(setting, folder),
    )
    trainer = DPOTrainer(
        model,
        ref_model=None if entrant.precomputed else copy.deepcopy(model),
        args=args,
        train_dataset=Dataset.from_list(load_text(setting)),
        processing_class=_tokenizer(setting),
    )
    for row, ids in zip(trainer.train_dataset, _ids(setting), strict=True):
        for key, expected in zip(("prompt", "chosen", "rejected"), ids, strict=True):
            _require_same_ids(row[f"{key}_ids"] == expected, key)
    return trainer


def liger_trainer(model: Any, entrant: Entrant, setting: Setting, folder: str) -> Any:
    """Build transformers' ``Trainer`` on padded pairs with Liger's fused SimPO loss."""
    args = TrainingArguments(
        remove_unused_columns=False, **_batches(entrant, setting), **training_arguments(setting, folder)
    )
    rows = Dataset.from_list([asdict(comparison) for comparison in load_comparisons(setting)])
    return _LigerTrainer(model, args=args, train_dataset=rows, data_collator=_collate)


class _LigerTrainer(Trainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss  # noqa: PLC0415 - may be absent

        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # so that the Trainer averages losses over accumulated micro-batches
        self.fused_loss = LigerFusedLinearSimPOLoss(
            beta=BETA, gamma=GAMMA, alpha=0.0, compute_nll_loss=False, compiled=self.args.device.type == "cuda"
        )

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        labels = inputs.pop("labels")
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        loss, *_ = self.fused_loss(model.lm_head.weight, hidden[:, :-1].contiguous(), labels[:, 1:].contiguous())
        return loss


def _collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad ids, mask and labels to ``[2 B, T]``: all chosen responses, then all rejected ones."""
    ids, labels = [], []
    for rank in (0, 1):
        for row in rows:
            prompt, response = row["prompt_ids"], row["response_ids"][rank]
            ids.append(torch.tensor(prompt + response))
            labels.append(torch.tensor([IGNORED] * len(prompt) + response))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def _batches(entrant: Entrant, setting: Setting) -> dict[str, int]:
    assert entrant.per_device is not None
    return {
        "per_device_train_batch_size": entrant.per_device,
        "gradient_accumulation_steps": setting.pairs_per_step // entrant.per_device,
    }


def _tokenizer(setting: Setting) -> Any:
    return AutoTokenizer.from_pretrained(setting.folder)


def _ids(setting: Setting) -> list[tuple[list[int], list[int], list[int]]]:
    return [(row.prompt_ids, *row.response_ids) for row in load_comparisons(setting)]


def _require_same_ids(same: bool, key: str) -> None:
    """Raise if TRL's own tokenization differs from the token ids given to simpo."""
    if not same:
        raise RuntimeError(f"TRL tokenizes {key} differently")
