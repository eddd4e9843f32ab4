"""Reward models against the definition, one sequence and one pair at a time, and loaded by plain transformers."""

from __future__ import annotations

import itertools
import json
import logging
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tests.training_runs import GradientRecorder
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2ForSequenceClassification,
)

from simpo import SimpoError, cli
from simpo.judging.protocol import Answers
from simpo.judging.registry import make_scorer
from simpo.judging.settings import JudgeOptions
from simpo.models.reward import choose_padding, load_reward_model
from simpo.models.settings import ModelArguments
from simpo.runs.results import read_results
from simpo.training.batches import rows_digest
from simpo.training.reward import RewardConfig, RewardTrainer

QUIET = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
PLAIN = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0}


@pytest.fixture
def rankings(random_comparisons):
    """Pairs and rankings of up to five responses, some tied, with a ``margin`` column for the pairs."""
    found = random_comparisons((9, (3, 7)), (2, (1, 4, 2, 5, 3)), (14, (5, 2)), (3, (6, 2, 4)))
    scores = [None, [5.0, 3.0, 3.0, 1.0, -2.0], None, [1.0, 0.5, 0.0]]
    return Dataset.from_dict(
        {
            "prompt_ids": [c.prompt_ids for c in found],
            "response_ids": [c.response_ids for c in found],
            "scores": scores,
            "where": [f"made up:{row}" for row in range(len(found))],
            "extra": [
                json.dumps({"margin": row / 2, "chosen_score": 2 + row, "rejected_score": 1}) for row in range(4)
            ],
        }
    )


@pytest.fixture
def make_reward_trainer(tmp_path, make_model):
    def make(rows, *, model=None, callbacks=None, **settings):
        model = make_model("gpt2", kind=GPT2ForSequenceClassification, num_labels=1) if model is None else model
        args = RewardConfig(**QUIET | PLAIN | {"output_dir": str(tmp_path)} | settings)
        return RewardTrainer(model, args, rows, callbacks=callbacks)

    return make


def naive_pairs(model, row):
    """Return the rewards of every ordered pair in a row and the differences of their scores."""
    rewards = []
    for response in row["response_ids"]:
        hidden = model.transformer(torch.tensor([row["prompt_ids"] + response]), use_cache=False)[0]
        rewards.append(model.score(hidden[0, -1]).squeeze())
    scores = row["scores"] or [1.0, 0.0]
    for i, j in itertools.combinations(range(len(rewards)), 2):
        if scores[i] > scores[j]:
            yield rewards[i], rewards[j], scores[i] - scores[j]


def naive_loss(model, rows, *, margin=lambda row, gap: 0.0, centre=0.0):
    losses = []
    for row in rows:
        pairs = [
            -F.logsigmoid(chosen - rejected - margin(row, gap)) + centre * (chosen + rejected) ** 2
            for chosen, rejected, gap in naive_pairs(model, row)
        ]
        losses.append(sum(pairs) / len(pairs))
    return sum(losses) / len(losses)


def gap_of_scores(row, gap):
    """Return the margin: from the column for a pair, from the scores for a ranking."""
    extra = json.loads(row["extra"])
    return gap if row["scores"] else extra["chosen_score"] - extra["rejected_score"]


CASES = [
    ({}, {}),
    ({"center_rewards_coefficient": 0.3}, {"centre": 0.3}),
    ({"margin": "scores"}, {"margin": gap_of_scores}),
]


@pytest.mark.parametrize(("settings", "terms"), CASES)
@pytest.mark.parametrize("path", ["packed", "padded"])
@pytest.mark.parametrize("budget", [500, 45])
def test_losses_and_gradients_match_the_definition(settings, terms, path, budget, make_reward_trainer, rankings):
    gradients = GradientRecorder()
    trainer = make_reward_trainer(
        rankings,
        callbacks=[gradients],
        forward_path=path,
        max_batch_tokens=budget,
        per_device_train_batch_size=4,
        max_steps=1,
        logging_steps=1,
        **settings,
    )
    loss = naive_loss(trainer.model, rankings, **terms)
    parameters = dict(trainer.model.named_parameters())
    expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    trainer.train()
    assert trainer.path == path
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-9)
    for name, exact in zip(parameters, expected, strict=True):
        torch.testing.assert_close(gradients.steps[0][name], exact, rtol=1e-9, atol=1e-9)
    assert gradients.steps[0]["score.weight"].abs().max() > 1e-3


@pytest.mark.parametrize(("margin", "is_reported"), [("none", True), ("column", False)])
def test_an_unused_margin_is_reported(margin, is_reported, rankings, tmp_path):
    args = RewardConfig(**QUIET, output_dir=str(tmp_path), margin=margin)
    prepared = RewardTrainer.prepare(rankings.select([0, 2]), None, args, "train")
    assert any("the margin column is not used" in notice for notice in prepared.report.notices) == is_reported
    plain = RewardTrainer.prepare(
        rankings.remove_columns("extra"), None, RewardConfig(**QUIET, output_dir=str(tmp_path)), "train"
    )
    assert not any("margin" in notice for notice in plain.report.notices)


def test_margins_can_come_from_a_column(make_reward_trainer, rankings):
    pairs = rankings.select([0, 2])
    trainer = make_reward_trainer(pairs, margin="column", max_steps=1, logging_steps=1, per_device_train_batch_size=2)
    expected = naive_loss(trainer.model, pairs, margin=lambda row, _: json.loads(row["extra"])["margin"])
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-9)


@torch.no_grad()
def test_held_out_scores_cover_every_pair(make_reward_trainer, rankings):
    trainer = make_reward_trainer(rankings, max_batch_tokens=45)
    trainer.model.eval()
    scores = trainer.score_rows(rankings)
    for number, row in enumerate(rankings):
        pairs = [(chosen - rejected).item() for chosen, rejected, _ in naive_pairs(trainer.model, row)]
        found = scores["pair_margins"][number]
        assert found[: len(pairs)] == pytest.approx(pairs, abs=1e-9)
        assert all(map(math.isnan, found[len(pairs) :])) and len(found) == 9
        assert scores["rewards/margins"][number] == pytest.approx(sum(pairs) / len(pairs), abs=1e-9)
        assert scores["rewards/accuracies"][number] == pytest.approx(sum(x > 0 for x in pairs) / len(pairs))
    lengths = [len(ids) for ids in rankings[3]["response_ids"]]
    assert scores["pair_length_differences"][3][:3].tolist() == [a - b for a, b in itertools.combinations(lengths, 2)]
    assert scores["loss"].mean() == pytest.approx(naive_loss(trainer.model, rankings).item(), abs=1e-9)


@pytest.mark.parametrize(
    ("rows", "margin", "extra", "message"),
    [
        ([0], "column", {}, "made up:0: margin: column needs a number in the column margin"),
        ([0], "column", {"margin": "much"}, "needs a number in the column margin"),
        ([0], "column", {"margin": -0.5}, "margin: must be at least 0, not -0.5"),
        ([0], "scores", {"margin": 1}, "needs a number in the columns chosen_score and rejected_score"),
        ([0], "scores", {"score_chosen": 1, "score_rejected": 2}, "margin: must be at least 0, not -1"),
        ([1], "column", {"margin": 1}, "more than two responses; set margin: scores"),
    ],
)
def test_missing_margins_are_reported(rows, margin, extra, message, make_reward_trainer, rankings):
    rows = rankings.select(rows).map(lambda _: {"extra": json.dumps(extra)})
    with pytest.raises(SimpoError, match=message):
        make_reward_trainer(rows, margin=margin)


def test_margins_are_part_of_the_runs_identity(make_reward_trainer, rankings):
    """The same tokens with different margins are different data."""
    other = rankings.select([0]).map(lambda _: {"extra": json.dumps({"margin": 3.0})})
    digests = [
        rows_digest(make_reward_trainer(rows, margin="column").train_dataset) for rows in (rankings.select([0]), other)
    ]
    assert digests[0] != digests[1]


def test_untrainable_models_and_rows_are_rejected(make_model, make_reward_trainer, rankings, tmp_path):
    with pytest.raises(SimpoError, match="GPT2LMHeadModel is not a reward model; load it with AutoModelForSequence"):
        make_reward_trainer(rankings, model=make_model("gpt2"))
    feedback = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "label": [True]})
    with pytest.raises(SimpoError, match="reward models need comparisons, but these rows are labeled"):
        RewardTrainer.prepare(feedback, None, RewardConfig(str(tmp_path), use_cpu=True), "train")
    for settings, message in (
        ({"truncation": "paper"}, "truncation: 'paper'"),
        ({"center_rewards_coefficient": -1.0}, "center_rewards_coefficient: must be at least 0"),
    ):
        with pytest.raises(SimpoError, match=message):
            RewardConfig(str(tmp_path), use_cpu=True, **settings)


# ---- text, from the command line ----

ROWS = [
    Answers("p", "What is 1 and 2?", ("It is 3.", "I would say 11, 1.")),
    Answers("q", "What is 3 and 4?", ("It is 7.",)),
]


@pytest.fixture(scope="module")
def train_reward(chat_world, tmp_path_factory):
    """``train_reward(*options)``: a folder written by ``simpo reward``."""

    def train(*options: str):
        folder = tmp_path_factory.mktemp("reward")
        recipe = folder / "recipe.yaml"
        recipe.write_text(
            f"model_name_or_path: {chat_world / 'model'}\ndataset_name: {chat_world / 'train.jsonl'}\n"
            f"eval_dataset_name: {chat_world / 'test.jsonl'}\noutput_dir: {folder / 'run'}\n"
            "learning_rate: 1e-2\nnum_train_epochs: 2\nmax_length: 64\nsave_strategy: 'no'\nreport_to: none\n"
        )
        assert cli.main(["reward", str(recipe), *options]) == 0
        return folder / "run"

    return train


@pytest.fixture(scope="module")
def trained(train_reward):
    return train_reward()


def plain_rewards(folder, model) -> list[float]:
    """Compute rewards with plain transformers in one padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": response}], tokenize=False
        )
        for row in ROWS
        for response in row.responses
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    with torch.no_grad():
        return model.eval()(**batch).logits[:, 0].tolist()


def test_plain_transformers_gives_the_same_rewards(trained):
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    assert model.config.num_labels == 1
    scores = make_scorer(f"reward:{trained}", JudgeOptions(dtype="float32")).score(ROWS)
    assert plain_rewards(trained, model) == pytest.approx(list(itertools.chain(*scores)), abs=1e-5)


def test_the_results_report_its_quality(trained):
    metrics = {(m.name, m.stage): m for m in read_results(trained / "results.json").metrics}
    after = metrics["eval_rewards/accuracies", "after"]
    assert metrics["eval_loss", "after"].value < 0.4 < metrics["eval_loss", "before"].value
    assert after.n == 8 and after.low > 0.5 and after.method == "Wilson 95%"
    assert metrics["eval_rewards/accuracies/chosen_shorter", "after"].n == 8
    assert metrics["eval_rewards/accuracies/chosen_longer", "after"].value is None
    assert metrics["eval_brier", "after"].value < metrics["eval_brier", "before"].value
    bins = [metric.n for (name, stage), metric in metrics.items() if "calibration/" in name and stage == "after"]
    assert len(bins) == 5 and sum(bins) == 8
    assert "text-classification" in (trained / "README.md").read_text()


def test_a_finished_run_is_left_alone_and_a_reward_model_can_be_trained_further(trained, train_reward, capsys):
    before = (trained / "model.safetensors").read_bytes()
    assert cli.main(["reward", str(trained.parent / "recipe.yaml")]) == 0
    assert "finished" in capsys.readouterr().out
    assert (trained / "model.safetensors").read_bytes() == before
    further = train_reward("--model_name_or_path", str(trained), "--max_steps", "1")
    printed = capsys.readouterr().out
    assert "random score head" not in printed and "LOAD REPORT" not in printed
    assert read_results(further / "results.json").command == "reward"


def test_an_adapter_includes_its_score_head(chat_world, train_reward, tmp_path):
    folder = train_reward("--use_peft", "true", "--lora_r", "4", "--learning_rate", "0.05")
    base = AutoModelForSequenceClassification.from_pretrained(chat_world / "model", num_labels=1)
    plain = PeftModel.from_pretrained(base, folder)
    scores = make_scorer(f"reward:{folder}", JudgeOptions(dtype="float32")).score(ROWS)
    flat = list(itertools.chain(*scores))
    assert plain_rewards(folder, plain) == pytest.approx(flat, abs=1e-5)
    assert scores[0][0] > scores[0][1]
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]
    assert cli.main(["merge", str(folder), "--output_dir", str(tmp_path / "merged")]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert plain_rewards(tmp_path / "merged", merged) == pytest.approx(flat, abs=1e-5)
    assert "text-classification" in (tmp_path / "merged" / "README.md").read_text()


def test_which_models_load_as_reward_models(chat_world, trained, caplog, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # as commands set it
    language_model = ModelArguments(str(chat_world / "model"))
    with pytest.raises(SimpoError, match=r"is not a reward model: its files contain no score\.weight"):
        load_reward_model(language_model)
    with caplog.at_level(logging.WARNING):
        model = load_reward_model(language_model, new_head=True)
    assert "with a random score head" in caplog.text and "MISSING" not in caplog.text
    assert "not sharded" not in caplog.text
    source = AutoModelForCausalLM.from_pretrained(chat_world / "model").state_dict()
    assert all(torch.equal(value, source[name]) for name, value in model.state_dict().items() if name in source)
    with pytest.raises(SimpoError, match="load_in_4bit: not supported"):
        load_reward_model(ModelArguments(str(trained), use_peft=True, load_in_4bit=True))
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], base_model_name_or_path="somewhere")
    adapter.save_pretrained(tmp_path)
    with pytest.raises(SimpoError, match="is an adapter for a language model; merge it first: simpo merge"):
        load_reward_model(ModelArguments(str(tmp_path)), new_head=True)


def test_a_language_models_name_loads_it_with_a_random_reward_head(chat_world, rankings, tmp_path):
    trainer = RewardTrainer(str(chat_world / "model"), RewardConfig(**QUIET, output_dir=str(tmp_path)), rankings)
    assert isinstance(trainer.model, GPT2ForSequenceClassification)
    assert trainer.model.config.num_labels == 1


def test_padding_is_not_the_end_of_turn(chat_world, make_model, caplog):
    model = make_model("gpt2", kind=GPT2ForSequenceClassification, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(chat_world / "model")
    choose_padding(model, tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert not caplog.records
    tokenizer.pad_token = tokenizer.eos_token
    with caplog.at_level(logging.WARNING, "simpo"):
        choose_padding(model, tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.bos_token_id
    assert "pads with" in caplog.text
    tokenizer.bos_token = tokenizer.unk_token = tokenizer.pad_token = tokenizer.eos_token
    tokenizer.extra_special_tokens = []
    choose_padding(model, tokenizer)
    assert model.config.pad_token_id is None
