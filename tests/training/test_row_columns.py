"""Row weights, label probabilities and margins: naive references, any micro-batch split, and bad values."""

# ruff: noqa: E741 - the papers' w and l

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, List, Value
from tests.training.test_objectives import assert_alike, context, select, train, train_naively
from torch.nn import functional as F
from transformers import AutoTokenizer

from simpo import OBJECTIVES, PreferenceConfig, PreferenceTrainer, Responses, SimpoError
from simpo.data.sources import load_rows
from simpo.packing.batching import RowSizes, StepPlan
from simpo.training.batches import ComparisonRows, PlanSampler, rows_digest

WEIGHTS = [0.5, 3.0, 1.0, 1e-3, 7.25]
PROBABILITIES = [1.0, 0.0, 0.5, 0.9, 0.35]
MARGINS = [0.0, 0.25, 1.5, 10.0, 0.1]
BETAS = [0.1, 2.0, 0.5, 1.0, 1e-3]
ONE, TWO, FOUR = 1000, 60, 30  # max_batch_tokens: 5 rows of 20 tokens in 1, 2 and 4 or more micro-batches


def with_columns(rows: Dataset, **columns) -> Dataset:
    """Return tokenized rows with these extra columns, as the data layer produces them."""
    extras = [json.dumps(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
    return rows.remove_columns("extra").add_column("extra", extras)


def halves(y: Responses) -> tuple[Responses, Responses]:
    return select(y, slice(0, None, 2)), select(y, slice(1, None, 2))


@pytest.mark.parametrize("budget", [ONE, TWO, FOUR])
@pytest.mark.parametrize("name", ["simpo", "dpo", "kto", "listwise", "nca"])
def test_weights_are_normalized_over_the_step(name, budget, make_trainer, make_model, pairs, naive_responses):
    rows, model, row = pairs(5), make_model("gpt2"), OBJECTIVES[name]
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)

    def loss(y: Responses, mismatched: Responses):
        w, l = halves(y)
        values = context(row, mismatched)
        if values:
            values = {"z_ref": row.beta * ((weights * mismatched.ratio).sum() / weights.sum()).clamp(min=0)}
        return (weights * row.loss(w, l, **values)).sum() / weights.sum()

    expected = train_naively(rows, model, naive_responses, loss)
    settings = {"objective": name, "row_columns": ["weight"], "max_batch_tokens": max(budget, 45)}
    assert_alike(train(make_trainer, with_columns(rows, weight=WEIGHTS), model, **settings), expected)


def soft(margin: torch.Tensor) -> torch.Tensor:
    p = torch.tensor(PROBABILITIES, dtype=torch.float64)
    return -p * F.logsigmoid(margin) - (1 - p) * F.logsigmoid(-margin)


def soft_sppo(w: Responses, l: Responses) -> torch.Tensor:
    p = torch.tensor(PROBABILITIES, dtype=torch.float64)
    return (w.ratio - (p - 0.5) / 0.1) ** 2 + (l.ratio - (1 - p - 0.5) / 0.1) ** 2


MARGIN = torch.tensor(MARGINS, dtype=torch.float64)
CHANGED = {
    "label_probability": {
        "simpo": ({"beta": 2.0}, lambda w, l: soft(2 * (w.avg - l.avg) - 1)),
        "dpo": ({"beta": 0.1}, lambda w, l: soft(0.1 * (w.ratio - l.ratio))),
        "cpo": ({"beta": 0.1}, lambda w, l: soft(0.1 * (w.logp - l.logp)) - w.logp),
        "sppo": ({"beta": 0.1}, soft_sppo),
    },
    "margin": {
        "simpo": ({"beta": 2.0}, lambda w, l: F.softplus(1 + MARGIN - 2 * (w.avg - l.avg))),
        "alphapo": (
            {"alpha": 0.0, "beta": 2.0, "gamma": 0.5},
            lambda w, l: F.softplus(0.5 + MARGIN - 2 * (w.avg - l.avg)),
        ),
        "repo": ({"gamma": 0.4}, lambda w, l: torch.relu(0.4 + MARGIN - (w.avg - l.avg))),
    },
}
BETA = torch.tensor(BETAS, dtype=torch.float64)
CHANGED["beta"] = {
    "simpo": ({"gamma_beta_ratio": 0.3}, lambda w, l: F.softplus(-BETA * (w.avg - l.avg - 0.3))),
    "bco": ({}, lambda w, l: F.softplus(-BETA * w.ratio) + F.softplus(BETA * l.ratio)),
    "chi_po": ({"r_max": 1e4}, lambda w, l: F.softplus(-BETA * (w.ratio.exp() + w.ratio - l.ratio.exp() - l.ratio))),
}
VALUES = {"label_probability": PROBABILITIES, "margin": MARGINS, "beta": BETAS}
CASES = [
    (column, name, budget)
    for column in ("label_probability", "margin")
    for name in CHANGED[column]
    for budget in (ONE, TWO, FOUR)
]
CASES += [("beta", "simpo", ONE), ("beta", "bco", TWO), ("beta", "chi_po", FOUR)]


@pytest.mark.parametrize(("column", "name", "budget"), CASES)
def test_pair_columns_match_the_naive_loss(column, name, budget, make_trainer, make_model, pairs, naive_responses):
    rows, model = pairs(5), make_model("gpt2")
    settings, formula = CHANGED[column][name]
    expected = train_naively(rows, model, naive_responses, lambda y, _: formula(*halves(y)).mean())
    values = with_columns(rows, **{column: VALUES[column]})
    found = train(
        make_trainer, values, model, objective=name, row_columns=[column], max_batch_tokens=budget, **settings
    )
    assert_alike(found, expected)


def test_simpos_hinge_uses_the_margin(make_trainer, pairs):
    rows = with_columns(pairs(5), margin=MARGINS)
    trainer = make_trainer(rows, link="hinge", row_columns=["margin"])
    found = trainer.score_rows(rows)
    expected = [max(0.0, 1 - (m - 1.0 - extra)) for m, extra in zip(found["rewards/margins"], MARGINS, strict=True)]
    assert found["loss"].tolist() == pytest.approx(expected, abs=1e-9)


def test_logged_rewards_use_each_rows_beta(make_trainer, pairs):
    rows = with_columns(pairs(5), beta=BETAS)
    found, plain = (make_trainer(rows, beta=1.0, row_columns=names).score_rows(rows) for names in (["beta"], None))
    expected = [beta * reward for beta, reward in zip(BETAS, plain["rewards/chosen"], strict=True)]
    assert found["rewards/chosen"].tolist() == pytest.approx(expected, rel=1e-12)


def test_weights_probabilities_and_margins_together_on_two_ranks(make_trainer, pairs):
    """The contributions of two ranks add up to the result of one process."""
    rows = with_columns(pairs(5), weight=WEIGHTS, label_probability=PROBABILITIES, margin=MARGINS)
    trainer = make_trainer(rows, row_columns=["weight", "label_probability", "margin"], max_batch_tokens=45)
    rows, model = trainer.train_dataset, trainer.model.eval()
    sizes, found = RowSizes.of("packed", *[torch.full((5,), 20).numpy()] * 4), {}
    for world in (1, 2):
        plan = StepPlan(sizes, 5, 45, world, weights=trainer.row_weights(rows))
        found[world] = [
            trainer.compute_loss(model, ComparisonRows(rows)[item]).item()
            for rank in range(world)
            for step in PlanSampler(plan, lambda: 0, rank)
            for item in step
        ]
    assert sum(found[2]) == pytest.approx(sum(found[1]), rel=0, abs=1e-12)
    scores = trainer.score_rows(rows)
    assert scores["weight"].tolist() == [1.0] * 5  # held-out rows have equal weights
    expected = sum(w * loss for w, loss in zip(WEIGHTS, scores["loss"], strict=True)) / sum(WEIGHTS)
    assert sum(found[1]) == pytest.approx(expected, abs=1e-12)


def test_rows_with_weight_zero_are_dropped_and_counted(config, pairs):
    rows = with_columns(pairs(3), weight=[1, 0, 2.5])
    prepared = PreferenceTrainer.prepare(rows, None, config(row_columns=["weight"]), "train")
    assert prepared.dataset["weight"][:] == [1.0, 2.5]
    assert prepared.report.dropped == {"weight 0": 1}
    assert prepared.report.examples["weight 0"] == ["made up:1"]
    with pytest.raises(SimpoError, match="train: weight: 0 in every row"):
        rows = with_columns(pairs(2), weight=[0, 0])
        PreferenceTrainer.prepare(rows, None, config(row_columns=["weight"]), "train")


def test_unnamed_columns_change_nothing(make_trainer, make_model, pairs):
    plain, model = pairs(4), make_model("gpt2")
    others = with_columns(plain, weight=[9, 1, 1, 1], label_probability=[0, 0, 0, 0], margin=[5, 5, 5, 5])
    losses = [make_trainer(rows, model=copy.deepcopy(model)).score_rows(rows)["loss"] for rows in (plain, others)]
    assert losses[0].tolist() == losses[1].tolist()
    report = PreferenceTrainer.prepare(others, None, PreferenceConfig(use_cpu=True), "train").report
    assert any("margin column is not used" in notice for notice in report.notices)


def test_held_out_rows_may_lack_the_columns(make_trainer, pairs):
    rows, plain = with_columns(pairs(4), weight=[1, 2, 3, 4], margin=[0, 1, 2, 3]), pairs(3, seed=1)
    trainer = make_trainer(rows, eval_dataset=plain, row_columns=["weight", "margin"])
    expected = make_trainer(plain, model=copy.deepcopy(trainer.model)).score_rows(plain)["loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.mean(), abs=1e-9)
    with pytest.raises(SimpoError, match="made up:2: margin is missing"):
        trainer.evaluate(with_columns(plain, margin=[1, 2, None]))


def test_different_values_make_a_different_run(config, pairs):
    digests = set()
    for weights in ([1, 2], [1, 3]):
        rows = with_columns(pairs(2), weight=weights)
        prepared = PreferenceTrainer.prepare(rows, None, config(row_columns=["weight"]), "train")
        digests.add(rows_digest(prepared.dataset))
    assert len(digests) == 2


# ---- rejected input ----


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("weight", -0.5, "weight must be >= 0, not -0.5"),
        ("weight", None, "weight is missing"),
        ("weight", math.nan, "weight: nan is not a finite number"),
        ("weight", math.inf, "weight: inf is not a finite number"),
        ("weight", True, "weight: True is not a finite number"),
        ("weight", "much", "weight: 'much' is not a finite number"),
        ("label_probability", 1.01, r"label_probability must be in \[0, 1\], not 1.01"),
        ("label_probability", -0.01, r"label_probability must be in \[0, 1\], not -0.01"),
        ("label_probability", math.nan, "label_probability: nan is not a finite number"),
        ("margin", -1, "margin must be >= 0, not -1"),
        ("margin", None, "margin is missing"),
        ("beta", 0, "beta must be > 0, not 0"),
    ],
)
@pytest.mark.parametrize("tokenized", [True, False])
def test_bad_values_are_reported_with_file_and_row(
    column, value, message, tokenized, config, pairs, chat_world, tmp_path
):
    if tokenized:
        rows, tokenizer, place = with_columns(pairs(3), **{column: [1, value, 0.5]}), None, "made up:1"
    else:
        path, tokenizer = tmp_path / "pairs.jsonl", AutoTokenizer.from_pretrained(chat_world / "model")
        answers = [{"prompt": f"{n}?", "chosen": "Yes.", "rejected": "No."} for n in range(3)]
        path.write_text(
            "".join(json.dumps(a | {column: v}) + "\n" for a, v in zip(answers, [1, value, 0.5], strict=True))
        )
        rows, place = load_rows(str(path), split="train"), "pairs.jsonl:2"
    with pytest.raises(SimpoError, match=f"{place}: {message}") as error:
        PreferenceTrainer.prepare(rows, tokenizer, config(row_columns=[column]), "train")
    assert "\n" not in str(error.value)


def test_file_columns_are_used_or_reported_as_ignored(config, chat_world, tmp_path):
    path, tokenizer = tmp_path / "pairs.csv", AutoTokenizer.from_pretrained(chat_world / "model")
    path.write_text("prompt,chosen,rejected,weight\na?,Yes.,No.,0.5\nb?,No.,Yes.,2\n")
    rows = load_rows(str(path), split="train")
    for columns, ignored in ((["weight"], []), (None, [2])):
        prepared = PreferenceTrainer.prepare(rows, tokenizer, config(row_columns=columns), "train")
        assert list(prepared.report.ignored.values()) == ignored
        assert ("weight" in prepared.dataset.column_names) == (columns is not None)
        assert columns is None or prepared.dataset["weight"][:] == [0.5, 2.0]


def test_rankings_accept_only_weights(config, random_comparisons, as_dataset):
    rows = as_dataset(random_comparisons((5, (3, 4, 2)), (7, (4, 2))))
    rows = rows.add_column("scores", [[3.0, 2.0, 1.0], [2.0, 1.0]], feature=List(Value("float64")))
    rows = with_columns(rows, weight=[1, 2], margin=[1, 2])
    assert PreferenceTrainer.prepare(rows, None, config(row_columns=["weight"]), "train").dataset["weight"][:] == [1, 2]
    with pytest.raises(SimpoError, match=r"made up:0: row_columns: margin .* 3 responses"):
        PreferenceTrainer.prepare(rows, None, config(row_columns=["margin"]), "train")


def test_single_responses_accept_only_weights(config):
    row = {"prompt_ids": [5, 6], "response_ids": [[7]], "weight": 2.0, "beta": 0.2}
    rows = Dataset.from_list([row | {"label": n > 0, "where": f"made up:{n}"} for n in range(2)])
    bco = {"objective": "bco"}
    prepared = PreferenceTrainer.prepare(rows, None, config(**bco, row_columns=["weight"]), "train")
    assert prepared.dataset["weight"][:] == [2, 2]
    with pytest.raises(SimpoError, match=r"made up:0: row_columns: beta .* single response"):
        PreferenceTrainer.prepare(rows, None, config(**bco, row_columns=["beta"]), "train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"objective": "ipo", "row_columns": ["label_probability"]},
            "label_probability .* 'ipo', only by simpo",
        ),
        ({"objective": "kto", "row_columns": ["label_probability"]}, "label_probability .* 'kto'"),
        ({"link": "hinge", "row_columns": ["label_probability"]}, "label_probability .* 'simpo' with link 'hinge'"),
        ({"objective": "dpo", "row_columns": ["margin"]}, "margin .* 'dpo', only by simpo, alphapo, repo"),
        ({"objective": "kto", "row_columns": ["beta"]}, "beta is not supported by objective 'kto'"),
        ({"objective": "listwise", "row_columns": ["beta"]}, "beta is not supported by objective 'listwise'"),
        ({"objective": {"dpo": 1, "simpo": 1}, "row_columns": ["margin"]}, "margin .* '1 dpo \\+ 1 simpo'"),
        ({"row_columns": ["weights"]}, "'weights' is unknown; choose from weight, label_probability, margin"),
        (
            {"objective": "dpo", "label_smoothing": 0.1, "row_columns": ["label_probability"]},
            "label_smoothing: .*label_probability",
        ),
    ],
)
def test_objectives_reject_columns_they_cannot_use(settings, message, config):
    with pytest.raises(SimpoError, match=message):
        config(**settings)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_accepts_weights(name, config):
    assert config(objective=name, row_columns=["weight"]).row_columns == ["weight"]


@pytest.mark.parametrize("name", [name for name, row in OBJECTIVES.items() if "label_probability" in row.row_columns])
def test_a_label_probability_equals_one_minus_label_smoothing(name):
    y = [Responses(*torch.rand(3, 4, dtype=torch.float64).neg()) for _ in range(2)]
    w, l = (replace(side, length=-10 * side.length) for side in y)
    soft = OBJECTIVES[name].with_row_columns(label_probability=torch.full((4,), 0.8, dtype=torch.float64))
    torch.testing.assert_close(soft.pair(w, l), OBJECTIVES[name].with_hyperparameters(label_smoothing=0.2).pair(w, l))
