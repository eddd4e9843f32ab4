"""Supervised fine-tuning: the loss is the mean over a step's scored tokens, however the step is split."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from tests.training_runs import GradientRecorder
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from simpo import PreferenceTrainer, SFTConfig, SFTTrainer, SimpoError, cli
from simpo.runs.results import read_results
from simpo.statistics import mean_interval
from simpo.training.batches import scored_tokens


@pytest.fixture
def conversations(random_comparisons):
    """``conversations(n)``: random rows with one response and some scored tokens."""

    def make(rows: int, *, masked: bool = True) -> Dataset:
        generator = torch.Generator().manual_seed(1)
        lengths = [(int(a), (int(b),)) for a, b in torch.randint(1, 15, (rows, 2), generator=generator)]
        comparisons = random_comparisons(*lengths)
        marks = [[torch.rand(len(c.response_ids[0]), generator=generator) < 0.6] for c in comparisons]
        for (mark,) in marks:
            mark[-1] = True
        columns = {
            "prompt_ids": [c.prompt_ids for c in comparisons],
            "response_ids": [c.response_ids for c in comparisons],
            "where": [f"made up:{row}" for row in range(rows)],
        }
        if masked:
            columns["scored"] = [[mark.tolist() for mark in row] for row in marks]
        return Dataset.from_dict(columns)

    return make


@pytest.fixture
def make_sft(tmp_path, make_model):
    def make(rows, *, model=None, callbacks=None, eval_dataset=None, **settings):
        quiet = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "disable_tqdm": True}
        plain = {"save_strategy": "no", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0}
        model = make_model("gpt2") if model is None else model
        args = SFTConfig(**quiet | plain | settings)
        return SFTTrainer(model, args, rows, eval_dataset=eval_dataset, callbacks=callbacks)

    return make


def naive_loss(model, rows) -> torch.Tensor:
    """Return the cross-entropy with labels of -100, one conversation at a time, averaged over all scored tokens."""
    total, count = 0.0, 0
    for row in rows:
        prompt, (response,) = row["prompt_ids"], row["response_ids"]
        marks = row["scored"][0] if "scored" in row else [True] * len(response)
        labels = [-100] * len(prompt) + [token if mark else -100 for token, mark in zip(response, marks, strict=True)]
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
        total = total + F.cross_entropy(logits[:-1], torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")
        count += sum(marks)
    return total / count


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("path", ["packed", "padded"])
@pytest.mark.parametrize("budget", [500, 60])
def test_gradients_and_logs_match_the_definition(masked, path, budget, make_sft, make_model, conversations):
    """Every step of an epoch, including the smaller last one; with learning rate 0 all start from the same weights."""
    rows, gradients = conversations(10, masked=masked), GradientRecorder()
    trainer = make_sft(
        rows,
        callbacks=[gradients],
        per_device_train_batch_size=4,
        max_batch_tokens=budget,
        forward_path=path,
        train_sampling_strategy="sequential",
        learning_rate=0.0,
        logging_steps=1,
    )
    trainer.train()
    assert trainer.state.global_step == 3
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for step, (found, logged) in enumerate(zip(gradients.steps, losses, strict=True)):
        naive = make_model("gpt2")
        loss = naive_loss(naive, rows.select(range(4 * step, min(4 * step + 4, 10))))
        loss.backward()
        assert logged == pytest.approx(loss.item(), rel=1e-6)
        for name, parameter in naive.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-9, msg=name)


def test_evaluation_is_the_mean_over_tokens(make_sft, make_model, conversations):
    rows = conversations(9)
    trainer = make_sft(None, eval_dataset=rows, per_device_eval_batch_size=2, max_batch_tokens=60)
    with torch.no_grad():
        expected = naive_loss(make_model("gpt2"), rows).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    scores = trainer.score_rows(rows)
    np.testing.assert_array_equal(scores["weight"], scored_tokens(rows))
    assert mean_interval(scores["loss"], scores["weight"]).value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("view", [lambda rows: rows, lambda rows: rows.select([5, 2, 2]), lambda rows: rows.shuffle(1)])
@pytest.mark.parametrize("masked", [True, False])
def test_scored_tokens_are_counted(masked, view, conversations):
    rows = view(conversations(8, masked=masked))
    expected = [sum(row["scored"][0]) if masked else len(row["response_ids"][0]) for row in rows]
    np.testing.assert_array_equal(scored_tokens(rows), expected)


def test_packed_training_gives_the_same_weights_as_plain_training(make_sft, make_model, conversations):
    """Three steps of SGD."""
    rows, model = conversations(6), make_model("gpt2")
    naive = copy.deepcopy(model)
    settings = {"per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 0.1}
    make_sft(rows, model=model, train_sampling_strategy="sequential", **settings).train()
    for start in range(0, 6, 2):
        naive_loss(naive, rows.select(range(start, start + 2))).backward()
        with torch.no_grad():
            for parameter in naive.parameters():
                parameter.sub_(0.1 * parameter.grad)
                parameter.grad = None
    for (name, found), expected in zip(model.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9, msg=name)


def test_the_command_trains_on_conversations_and_completions(chat_world, tmp_path, capsys):
    """Conversations and prompt-completion rows in one file; the loss falls, and a card and results are written."""
    rows = [json.loads(line) for line in (chat_world / "sft.jsonl").read_text().splitlines()]
    chat = [
        {"role": role, "content": row[key]}
        for row in rows[:2]
        for role, key in (("user", "prompt"), ("assistant", "completion"))
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows[2:], {"messages": chat}]))
    output = tmp_path / "out"
    options = {
        "model_name_or_path": chat_world / "model",
        "dataset_name": data,
        "eval_dataset_name": chat_world / "sft.jsonl",
        "dataset_test_split": "train",
        "output_dir": output,
        "learning_rate": 1e-2,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
    }
    assert cli.main(["sft", *(f"--{key}={value}" for key, value in options.items())]) == 0
    metrics = {(m.name, m.stage): m for m in read_results(output / "results.json").metrics}
    before, after = (metrics["eval_loss", stage] for stage in ("before", "after"))
    assert after.high < before.low
    assert metrics["eval_perplexity", "after"].value == pytest.approx(np.exp(after.value))
    assert "Held-out conversations" in (output / "README.md").read_text()
    assert "simpo train --model_name_or_path" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("trainer_type", "row"),
    [
        (SFTTrainer, {"prompt": "What is 1 and 1?", "completion": "It is 2."}),
        (PreferenceTrainer, {"prompt": "What is 1 and 1?", "chosen": "It is 2.", "rejected": "No idea."}),
    ],
)
def test_the_saved_model_stops_at_the_end_of_a_turn(trainer_type, row, chat_world, tmp_path, caplog):
    """Even if its generation settings only know another token."""
    model = AutoModelForCausalLM.from_pretrained(chat_world / "model")
    tokenizer = AutoTokenizer.from_pretrained(chat_world / "model")
    model.generation_config.eos_token_id = 7
    args = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 1, "save_strategy": "no"}
    args = trainer_type.config_type(str(tmp_path), **args)
    trainer = trainer_type(model, args, Dataset.from_list([row]), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert saved.eos_token_id == [7, tokenizer.eos_token_id]
    assert any("<|end|>" in line and "eos_token_id" in line for line in caplog.messages)


@pytest.mark.parametrize(("settings", "message"), [({"truncation": "paper"}, "truncation"), ({"beta": 2.0}, "beta")])
def test_settings_for_pairs_are_rejected(settings, message, chat_world, tmp_path, capsys):
    options = {"model_name_or_path": chat_world / "model", "dataset_name": chat_world / "sft.jsonl"}
    options |= {"output_dir": tmp_path / "out"} | settings
    assert cli.main(["sft", *(f"--{key}={value}" for key, value in options.items())]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pairs_are_rejected(chat_world, tmp_path):
    with pytest.raises(SimpoError):
        SFTConfig(truncation="paper")
    options = {"model_name_or_path": chat_world / "model", "dataset_name": chat_world / "train.jsonl"}
    argv = [f"--{key}={value}" for key, value in (options | {"output_dir": tmp_path / "out"}).items()]
    assert cli.main(["sft", *argv]) == 2
