"""``SimPOConfig`` and ``SimPOTrainer``: the paper's defaults, losses, tokens and truncation."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from datasets import Dataset

from simpo import SimpoError
from simpo.compat import SimPOConfig, SimPOTrainer


@pytest.fixture
def make_trainer(tmp_path, quiet, opt, text_rows, tokenizer):
    """``make_trainer(**settings)``: a quiet trainer for the tiny OPT on strings, as in the paper's script."""

    def make(*, arguments=None, **settings):
        sizes = {"output_dir": str(tmp_path / "out"), "max_length": 200, "max_prompt_length": 150}
        args = SimPOConfig(**quiet | sizes | settings)
        given = {"model": opt, "args": args, "train_dataset": text_rows, "tokenizer": tokenizer}
        return SimPOTrainer(**given | (arguments or {}))

    return make


def test_defaults_match_the_papers_code(caplog):
    with caplog.at_level(logging.WARNING, "simpo"):
        args = SimPOConfig("unused", use_cpu=True)
    assert args.hyperparameters == {"beta": 2.0, "gamma_beta_ratio": 0.25, "link": "sigmoid", "label_smoothing": 0.0}
    assert (args.learning_rate, args.num_train_epochs, args.max_length, args.max_prompt_length) == (5e-5, 3.0, 512, 128)
    assert (args.lr_scheduler_type, args.warmup_steps, args.bf16, args.gradient_checkpointing) == (
        "linear",
        0,
        False,
        False,
    )
    assert (args.sft_weight, args.loss_type) == (0.0, "sigmoid")
    starts = [message.split()[0] for message in caplog.messages]
    assert starts == ["max_length", "max_prompt_length", "learning_rate"]


def test_every_argument_has_its_position_in_the_papers_code():
    """Its ``tokenizer`` has since been renamed to ``processing_class``; both names work."""
    assert [*inspect.signature(SimPOTrainer).parameters] == [
        "model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class", "model_init",
        "callbacks", "optimizers", "preprocess_logits_for_metrics", "peft_config", "compute_metrics", "tokenizer",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "beta", "gamma"), [({}, 2.0, 0.5), ({"beta": 10.0, "gamma_beta_ratio": 0.3}, 10.0, 3.0)]
)
@pytest.mark.parametrize("sft_weight", [0.0, 0.3])
def test_the_loss_matches_its_formula(sft_weight, settings, beta, gamma, make_trainer, opt, naive_step):
    trainer = make_trainer(
        sft_weight=sft_weight, per_device_train_batch_size=8, max_batch_tokens=200, max_steps=1, **settings
    )
    with torch.no_grad():
        expected = naive_step(opt, list(trainer.train_dataset), beta, gamma, sft_weight).item()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_key_without_effect_is_logged(caplog):
    with caplog.at_level(logging.WARNING, "simpo"):
        SimPOConfig("unused", use_cpu=True, max_length=8, max_prompt_length=4, learning_rate=1e-6, max_target_length=4)
    assert [message.split()[0] for message in caplog.messages] == ["max_target_length"]


def test_the_hinge_loss_matches_its_formula(make_trainer):
    trainer = make_trainer(loss_type="hinge")
    scores = trainer.score_rows(trainer.train_dataset)
    expected = (1 - (scores["rewards/margins"] - 0.5)).clip(min=0)
    assert scores["loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.args.loss_type == "hinge"
    with pytest.raises(SimpoError, match="label_smoothing"):
        make_trainer(loss_type="hinge", label_smoothing=0.1)


def test_rendered_strings_are_not_rendered_again(make_trainer, rows, tokenizer):
    """The paper's script applies the template itself: the prompt without the assistant header, the response with it."""
    rendered = [
        {
            "prompt": tokenizer.apply_chat_template(row["prompt"], tokenize=False),
            "chosen": tokenizer.apply_chat_template(row["chosen"], tokenize=False).removeprefix(tokenizer.bos_token),
            "rejected": tokenizer.apply_chat_template(row["rejected"], tokenize=False).removeprefix(
                tokenizer.bos_token
            ),
        }
        for row in rows
    ]
    from_strings = make_trainer(arguments={"train_dataset": Dataset.from_list(rendered)}).train_dataset
    for text, ids in zip(rendered, from_strings, strict=True):
        assert tokenizer.decode(ids["prompt_ids"]) == text["prompt"]
        assert tokenizer.decode(ids["response_ids"][0]) == text["chosen"]
    from_conversations = make_trainer(arguments={"train_dataset": Dataset.from_list(rows)}).train_dataset
    for one, other in zip(from_strings, from_conversations, strict=True):
        assert (one["prompt_ids"], one["response_ids"]) == (other["prompt_ids"], other["response_ids"])


def test_truncation_matches_the_papers(make_trainer, tokenizer):
    long = [{"prompt": "p " * 40, "chosen": "c " * 40, "rejected": "No."}]
    trainer = make_trainer(arguments={"train_dataset": Dataset.from_list(long)}, max_length=40, max_prompt_length=25)
    (row,) = trainer.train_dataset
    prompt, chosen, rejected = (tokenizer(text).input_ids for text in (long[0]["prompt"], "c " * 40, "No."))
    assert row["prompt_ids"] == prompt[-25:]
    assert row["response_ids"] == [chosen[:15], [*rejected, tokenizer.eos_token_id]]


def test_a_model_by_name_with_the_scripts_keywords(make_trainer, model_folder):
    """Uses the ``model_init_kwargs`` from the paper's script."""
    options = {
        "revision": "main",
        "trust_remote_code": False,
        "torch_dtype": torch.bfloat16,
        "use_cache": True,
        "device_map": None,
        "quantization_config": None,
        "attn_implementation": "sdpa",
    }
    trainer = make_trainer(arguments={"model": model_folder}, model_init_kwargs=options, max_steps=1)
    assert trainer.model.dtype == torch.bfloat16
    assert trainer.train().metrics["train_loss"] > 0
