"""The same script with TRL and with our trainer: settings, ids, losses and metrics of every step."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from simpo.compat import CPOConfig, CPOTrainer
from simpo.training.preference import NAMES

pytest.importorskip("trl")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL warns that the module is experimental
    trl = pytest.importorskip("trl.experimental.cpo")

# Intended differences: no cache while training, columns and losses stay visible, no exponent without AlphaPO.
INTENDED_DIFFERENCES = {"use_cache", "remove_unused_columns", "logging_nan_inf_filter", "alpha"}


@pytest.fixture
def train_both(tmp_path, quiet, opt, tokenizer):
    """``train_both(dataset, **settings)``: TRL's trainer and ours after training the same model in the same way."""

    def train(dataset, *, tokenizer=tokenizer, **settings):
        same = {"output_dir": str(tmp_path), "loss_type": "simpo", "beta": 2.0, "gradient_checkpointing": False}
        trained = []
        for config, trainer in ((trl.CPOConfig, trl.CPOTrainer), (CPOConfig, CPOTrainer)):
            args = config(**quiet | same | {"learning_rate": 1e-3, "eval_strategy": "epoch"} | settings)
            data = {"train_dataset": dataset, "eval_dataset": dataset}
            trained.append(
                trainer(model=copy.deepcopy(opt), args=args, processing_class=copy.deepcopy(tokenizer), **data)
            )
            trained[-1].train()
        return trained

    return train


def check_ids(theirs, ours) -> None:
    for one, other in zip(theirs.train_dataset, ours.train_dataset, strict=True):
        for k, name in enumerate(("chosen", "rejected")):
            assert one[f"{name}_input_ids"] == other["prompt_ids"] + other["response_ids"][k]
            assert one[f"{name}_labels"].count(-100) == len(other["prompt_ids"])


def compared(entry: dict) -> list[str]:
    """Return a log entry's comparable metrics: TRL's evaluation weights a smaller last batch only in the loss."""
    if "eval_loss" in entry:
        return ["eval_loss"]
    return ["train_loss"] if "train_loss" in entry else [*NAMES, "grad_norm", "learning_rate"]


def test_every_key_exists_with_the_same_default():
    theirs, ours = (config("unused", use_cpu=True, loss_type="simpo") for config in (trl.CPOConfig, CPOConfig))
    names = [field.name for field in dataclasses.fields(theirs)]
    assert {name for name in names if getattr(theirs, name) != getattr(ours, name)} == INTENDED_DIFFERENCES


@pytest.mark.parametrize(
    "settings",
    [
        {"cpo_alpha": 0.0, "simpo_gamma": 1.0},
        {"cpo_alpha": 0.0, "label_smoothing": 0.1, "gradient_accumulation_steps": 2},
        {"cpo_alpha": 1.0},
        {"cpo_alpha": 0.3, "beta": 0.1},
        {"cpo_alpha": 0.0, "alpha": 0.25},
    ],
)
def test_training_matches_trl(settings, train_both, rows):
    theirs, ours = train_both(
        Dataset.from_list(rows),
        per_device_train_batch_size=4 // settings.get("gradient_accumulation_steps", 1),
        per_device_eval_batch_size=3,
        num_train_epochs=2,
        **settings,
    )
    check_ids(theirs, ours)
    assert len(theirs.state.log_history) == len(ours.state.log_history) == 4 + 2 + 1
    for entry, (one, other) in enumerate(zip(theirs.state.log_history, ours.state.log_history, strict=True)):
        for name in compared(one):
            assert other[name] == pytest.approx(one[name], rel=1e-4 if entry else 1e-5, abs=1e-6), name


def test_strings_with_a_tokenizer_like_opts_match_trl(train_both, rows, text_rows):
    """BOS and EOS are the same token, the tokenizer prepends it, and there is no template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["</s>", "<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text for row in text_rows for text in row.values()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>")
    spaced = text_rows.map(lambda row: {name: " " + row[name] for name in ("chosen", "rejected")})
    theirs, ours = train_both(spaced, tokenizer=fast, cpo_alpha=0.0, num_train_epochs=1)
    check_ids(theirs, ours)
    assert ours.train_dataset[0]["prompt_ids"][0] == ours.train_dataset[0]["response_ids"][0][-1] == 0
    assert ours.state.log_history[0]["loss"] == pytest.approx(theirs.state.log_history[0]["loss"], rel=1e-5)


def test_text_a_template_writes_after_the_end_of_turn(train_both, rows, tokenizer):
    """TRL scores it and adds an EOS; our responses end with the end-of-turn token."""
    chatml = copy.deepcopy(tokenizer)
    chatml.chat_template = chatml.chat_template.replace("{{ eos_token }}", "{{ eos_token + '\\n' }}")
    theirs, ours = train_both(Dataset.from_list(rows), tokenizer=chatml, max_steps=1)
    tail = [*chatml("\n").input_ids, chatml.eos_token_id]
    for one, other in zip(theirs.train_dataset, ours.train_dataset, strict=True):
        assert one["chosen_input_ids"] == other["prompt_ids"] + other["response_ids"][0] + tail
