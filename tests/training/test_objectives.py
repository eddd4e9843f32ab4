"""Every objective end to end: training steps on pairs, rankings and single responses, and rejected settings."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value
from torch.nn import functional as F

from simpo import OBJECTIVES, Responses, SimpoError
from simpo.training.batches import MISMATCHED_IDS, MISMATCHED_REF_LOGP, REF_LOGPS, OrderedPairs
from simpo.training.preference import wpo_weights
from simpo.training.reference import with_mismatched

MAX_LENGTH = 2048
RATE = 1e-3


def select(y: Responses, index) -> Responses:
    return Responses(y.logp[index], y.length[index], None if y.ref_logp is None else y.ref_logp[index])


def train(make_trainer, rows, model, **settings):
    """Train with plain SGD, all rows in every step; return logged losses and weights."""
    model = copy.deepcopy(model)
    trainer = make_trainer(
        rows,
        model=model,
        optimizers=(torch.optim.SGD(model.parameters(), lr=RATE), None),
        **{"per_device_train_batch_size": len(rows), "max_steps": 2, "logging_steps": 1} | settings,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


def train_naively(rows, model, naive_responses, loss):
    """Train by the definition with ``loss(responses, mismatched)``; the reference is the initial model."""
    rows = with_mismatched(rows, MAX_LENGTH, "")
    policy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(policy.parameters(), lr=RATE)
    losses = []
    prompts, responses = rows["prompt_ids"][:], rows["response_ids"][:]
    mismatched = [[ids] for ids in rows[MISMATCHED_IDS]]
    with torch.no_grad():
        ref_logp = naive_responses(model, prompts, responses).logp
        ref_mismatched = naive_responses(model, prompts, mismatched).logp
    for _ in range(2):
        y = replace(naive_responses(policy, prompts, responses), ref_logp=ref_logp)
        with torch.no_grad():
            other = replace(naive_responses(policy, prompts, mismatched), ref_logp=ref_mismatched)
        value = loss(y, other)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses, policy


def assert_alike(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=0, abs=1e-9)
    for (name, weight), other in zip(found[1].named_parameters(), expected[1].parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-9, msg=name)


def context(row, mismatched: Responses) -> dict:
    """Return the context KTO needs: its reference point."""
    return {"z_ref": row.beta * mismatched.ratio.mean().clamp(min=0)} if "z_ref" in row.needs else {}


def pair_loss(name: str):
    row = OBJECTIVES[name]

    def loss(y: Responses, mismatched: Responses):
        return row.loss(select(y, slice(0, None, 2)), select(y, slice(1, None, 2)), **context(row, mismatched)).mean()

    return loss


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_by_its_formula(name, make_trainer, make_model, pairs, naive_responses):
    rows, model = pairs(5), make_model("gpt2")
    expected = train_naively(rows, model, naive_responses, pair_loss(name))
    assert_alike(train(make_trainer, rows, model, objective=name, max_batch_tokens=45), expected)
    assert expected[0][0] != expected[0][1]
    if name in ("dpo", "kto"):
        beside = {"precompute_ref_log_probs": False, "max_batch_tokens": 1000}
        assert_alike(train(make_trainer, rows, model, objective=name, **beside), expected)


@pytest.mark.parametrize("path", ["packed", "padded"])
def test_dpo_loss_is_ln_2_while_policy_equals_reference(path, make_trainer, make_model, pairs):
    rows = pairs(4)
    trainer = make_trainer(rows, eval_dataset=rows, objective="dpo", forward_path=path)
    assert trainer.score_rows(rows)["loss"] == pytest.approx([math.log(2)] * 4, abs=1e-9)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-9)


def test_in_half_precision_the_reference_is_rounded_like_the_policy(make_trainer, make_model, pairs):
    rows, model = pairs(4), make_model("gpt2", torch.float32, std=0.1)
    trainer = make_trainer(rows, model=model, objective="dpo", bf16=True, learning_rate=0.0, logging_steps=1)
    assert trainer.score_rows(rows)["loss"] == pytest.approx([math.log(2)] * 4, abs=1e-3)
    exact = make_trainer(rows, model=make_model("gpt2", torch.float32, std=0.1), reference_cache=None)
    assert not torch.equal(exact.response_logps(rows), trainer.response_logps(rows))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


# ---- rankings ----


@pytest.fixture
def rankings(random_comparisons, as_dataset):
    """Rankings of two, three and four responses; some of the latter are tied."""
    rows = as_dataset(random_comparisons((5, (3, 4)), (2, (2, 5, 3)), (7, (4, 1, 6, 2)), (3, (5, 2))))
    scores = [[2.0, 1.0], [5.0, 1.0, 1.0], [4.0, 3.0, 3.0, 0.5], None]
    return rows.add_column("scores", scores, feature=List(Value("float64")))


def plackett_luce(rewards, couples):
    """Return the Plackett-Luce loss of one ranking given its (better, worse) pairs in ``couples``."""
    terms = []
    for number in dict.fromkeys(better for better, _ in couples):
        rivals = [number, *(worse for better, worse in couples if better == number)]
        terms.append(-torch.log_softmax(rewards[rivals], dim=0)[0])
    return torch.stack(terms).sum()


@pytest.mark.parametrize("name", ["simpo", "cpo", "dpo", "kto", "listwise", "listwise_dpo"])
def test_a_ranking_is_the_mean_over_its_ordered_pairs(name, rankings, make_trainer, make_model, naive_responses):
    row, model = OBJECTIVES[name], make_model("gpt2")
    starts = [0, 2, 5, 9]
    ordered = [[(0, 1)], [(0, 1), (0, 2)], [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)], [(0, 1)]]

    def loss(y: Responses, mismatched: Responses):
        values, losses = context(row, mismatched), []
        for start, couples in zip(starts, ordered, strict=True):
            better, worse = ([start + couple[side] for couple in couples] for side in (0, 1))
            if name.startswith("listwise"):
                losses.append(plackett_luce(row.reward(select(y, slice(start, None))), couples))
                continue
            losses.append(row.pair(select(y, better), select(y, worse), **values).mean())
            anchor = row.anchor(select(y, [start]))
            if anchor is not None:
                losses[-1] = losses[-1] + anchor[0]
        return torch.stack(losses).mean()

    expected = train_naively(rankings, model, naive_responses, loss)
    for budget in (30, 1000):
        assert_alike(train(make_trainer, rankings, model, objective=name, max_batch_tokens=budget), expected)


@pytest.mark.parametrize("name", ["listwise_nca", "info_nca"])
def test_scored_responses_train_by_the_formula(name, rankings, make_trainer, make_model, naive_responses):
    """Responses, including tied ones, are weighted by the softmax of the scores; a pair without scores is hard."""
    model = make_model("gpt2")
    scores = [[2.0, 1.0], [5.0, 1.0, 1.0], [4.0, 3.0, 3.0, 0.5], [0.0, -math.inf]]

    def loss(y: Responses, mismatched: Responses):
        losses = []
        for rewards, own in zip((0.3 * y.ratio).split([2, 3, 4, 2]), scores, strict=True):
            p = torch.tensor([math.exp((score - own[0]) / 1.5) for score in own], dtype=torch.float64)
            p = p / p.sum()
            if name == "info_nca":
                losses.append(-(p * rewards.log_softmax(0)).sum())
            else:
                losses.append(-(p * F.logsigmoid(rewards) + F.logsigmoid(-rewards) / len(own)).sum())
        return torch.stack(losses).mean()

    expected = train_naively(rankings, model, naive_responses, loss)
    for budget in (30, 1000):
        settings = {"objective": name, "beta": 0.3, "score_temperature": 1.5, "max_batch_tokens": budget}
        assert_alike(train(make_trainer, rankings, model, **settings), expected)


def test_ranking_metrics_are_means_over_ordered_pairs(rankings, make_trainer, naive_responses):
    trainer = make_trainer(rankings)
    found = trainer.score_rows(rankings)
    avg = naive_responses(trainer.model, rankings["prompt_ids"][:], rankings["response_ids"][:]).avg[2:5].tolist()
    rewards = [2 * value for value in avg]  # for the second row, whose first response beats both others
    assert found["rewards/chosen"][1] == pytest.approx(rewards[0])
    assert found["rewards/rejected"][1] == pytest.approx((rewards[1] + rewards[2]) / 2)
    assert found["rewards/margins"][1] == pytest.approx(rewards[0] - (rewards[1] + rewards[2]) / 2)
    assert found["rewards/accuracies"][1] == np.mean([rewards[0] > rewards[1], rewards[0] > rewards[2]])


@pytest.mark.parametrize("scores", [[1.0, 1.0], [1.0, 2.0], [3.0], [float("nan"), 1.0]])
def test_tokenized_scores_must_rank_the_responses(scores, make_trainer, pairs):
    rows = pairs(2).add_column("scores", [[2.0, 1.0], scores], feature=List(Value("float64")))
    with pytest.raises(SimpoError, match="train row 1: "):
        make_trainer(rows)


# ---- KTO ----


@pytest.fixture
def judged(pairs):
    """Labeled single responses."""
    rows = pairs(6, responses=1)
    return rows.add_column("label", [True, False, False, True, True, False])


def test_single_responses_train_by_the_formula(judged, make_trainer, make_model, naive_responses):
    row, model, label = OBJECTIVES["kto"], make_model("gpt2"), torch.tensor(judged["label"][:])

    def loss(y: Responses, mismatched: Responses):
        losses = row.with_hyperparameters(lam_w=1.5).unpaired(y, label, **context(row, mismatched))
        return (losses + 0.1 * torch.where(label, -y.avg, 0)).mean()

    expected = train_naively(judged, model, naive_responses, loss)
    for settings in ({"max_batch_tokens": 45}, {"precompute_ref_log_probs": False}):
        settings |= {"objective": "kto", "lam_w": 1.5, "sft_weight": 0.1}
        assert_alike(train(make_trainer, judged, model, **settings), expected)


def test_single_responses_have_their_own_metrics(judged, make_trainer, make_model, naive_responses):
    label, other = np.array(judged["label"][:]), make_model("gpt2", std=0.2)
    rows = with_other_reference(judged, other, naive_responses)
    trainer = make_trainer(rows, objective="kto", learning_rate=0.0, per_device_train_batch_size=6, logging_steps=1)
    y = naive_responses(trainer.model, rows["prompt_ids"][:], rows["response_ids"][:]).logp.detach().numpy()
    rewards = 0.1 * (y - np.array(rows[REF_LOGPS][:])[:, 0])
    found = trainer.score_rows(rows)
    assert set(found) == {"loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "weight"}
    np.testing.assert_allclose(found["rewards/chosen"], np.where(label, rewards, np.nan))
    np.testing.assert_allclose(found["logps/rejected"], np.where(label, np.nan, y))
    trainer.train()
    evaluated = {name.removeprefix("eval_"): value for name, value in trainer.evaluate(rows).items()}
    for metrics in (trainer.state.log_history[0], evaluated):
        assert metrics["rewards/chosen"] == pytest.approx(rewards[label].mean())
        assert metrics["rewards/rejected"] == pytest.approx(rewards[~label].mean())
        assert "rewards/margins" not in metrics


def with_other_reference(rows: Dataset, reference, naive_responses) -> Dataset:
    """Return ``rows`` with another reference's log-probabilities, so that the first reference point is not 0."""
    rows = with_mismatched(rows, MAX_LENGTH, "")
    prompts, responses = rows["prompt_ids"][:], rows["response_ids"][:]
    with torch.no_grad():
        logps = naive_responses(reference, prompts, responses).logp.split([len(several) for several in responses])
        mismatched = naive_responses(reference, prompts, [[ids] for ids in rows[MISMATCHED_IDS]]).logp.tolist()
    rows = rows.add_column(REF_LOGPS, [part.tolist() for part in logps], feature=List(Value("float64")))
    return rows.add_column(MISMATCHED_REF_LOGP, mismatched, feature=Value("float64"))


@pytest.mark.parametrize("budget", [1000, 40, 20])
def test_the_reference_point_covers_the_whole_step(budget, make_trainer, make_model, pairs, naive_responses):
    """4 pairs in 1, 2 and 4 micro-batches, against the definition."""
    model, reference = make_model("gpt2", std=0.2), make_model("gpt2")
    rows = pairs(4)
    shorter = with_mismatched(rows, MAX_LENGTH, "").map(lambda row: {MISMATCHED_IDS: row[MISMATCHED_IDS][:3]})
    rows = with_other_reference(shorter, reference, naive_responses)
    prompts, responses = rows["prompt_ids"][:], rows["response_ids"][:]
    other = naive_responses(model, prompts, [[ids] for ids in rows[MISMATCHED_IDS]]).logp
    ratio = (other - torch.tensor(rows[MISMATCHED_REF_LOGP][:], dtype=torch.float64)).mean()
    assert ratio > 0
    trainer = make_trainer(
        rows, model=model, objective="kto", per_device_train_batch_size=4, max_batch_tokens=budget, logging_steps=1
    )
    count = []
    before_step = trainer.before_step
    trainer.before_step = lambda m, batches: (count.append(len(batches)), before_step(m, batches))
    ref_logp = torch.tensor([logp for logps in rows[REF_LOGPS] for logp in logps], dtype=torch.float64)
    y = replace(naive_responses(model, prompts, responses), ref_logp=ref_logp)
    expected = (
        OBJECTIVES["kto"].loss(select(y, slice(0, None, 2)), select(y, slice(1, None, 2)), z_ref=0.1 * ratio).mean()
    )
    trainer.train()
    assert count == [{1000: 1, 40: 2, 20: 4}[budget]]
    assert trainer._context["z_ref"].item() == pytest.approx(0.1 * ratio.item(), abs=1e-9)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-9)


def test_a_step_can_have_a_single_pair(make_trainer, make_model, pairs, naive_responses):
    rows, model, reference = pairs(3), make_model("gpt2", std=0.2), make_model("gpt2")
    rows = with_other_reference(rows, reference, naive_responses)
    trainer = make_trainer(
        rows, model=model, objective="kto", per_device_train_batch_size=1, learning_rate=0.0, logging_steps=1
    )
    points, before_step = [], trainer.before_step

    def watched(model, batches):
        before_step(model, batches)
        points.append((batches[0].rows[0], trainer._context["z_ref"].item()))

    trainer.before_step = watched
    trainer.train()
    other = naive_responses(model, rows["prompt_ids"][:], [[ids] for ids in rows[MISMATCHED_IDS]]).logp.tolist()
    for row, point in points:
        assert point == pytest.approx(0.1 * max(other[row] - rows[row][MISMATCHED_REF_LOGP], 0), abs=1e-9)
    assert sorted(row for row, _ in points) == [0, 1, 2]


def test_held_out_rows_share_one_reference_point(make_trainer, make_model, pairs, naive_responses):
    """It does not depend on the evaluation batch size."""
    rows = with_other_reference(pairs(7), make_model("gpt2", std=0.2), naive_responses)
    found = [
        make_trainer(pairs(2), objective="kto", per_device_eval_batch_size=size).score_rows(rows)["loss"]
        for size in (1, 3, 7)
    ]
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=0, atol=1e-12)


def test_mismatched_responses_come_from_other_prompts_and_are_used_once(random_comparisons, as_dataset):
    comparisons = random_comparisons(*[(4, (3, 2))] * 9)
    prompts = [comparisons[number].prompt_ids for number in (0, 0, 0, 1, 2, 2, 3, 4, 4)]
    rows = as_dataset([replace(c, prompt_ids=p) for c, p in zip(comparisons, prompts, strict=True)])
    found = with_mismatched(rows, MAX_LENGTH, "")
    responses = {tuple(ids): row for row, c in enumerate(comparisons) for ids in c.response_ids}
    partners = [responses[tuple(ids)] for ids in found[MISMATCHED_IDS]]
    assert sorted(partners) == list(range(9))
    assert all(prompts[row] != prompts[partner] for row, partner in enumerate(partners))
    assert found[MISMATCHED_IDS][:] == with_mismatched(rows, MAX_LENGTH, "")[MISMATCHED_IDS][:]


def test_mismatched_responses_fit_into_the_length_limit(random_comparisons, as_dataset):
    rows = as_dataset(random_comparisons((2, (9, 9)), (8, (2, 2)), (3, (3, 3))))
    found = with_mismatched(rows, 11, "")
    assert [len(ids) for ids in found[MISMATCHED_IDS]] == [2, 3, 2]  # the response of 9 tokens fits nowhere
    with pytest.raises(
        SimpoError, match="train: max_length 10 leaves no room for a response to another prompt in made up:1"
    ):
        with_mismatched(rows, 10, "train")
    same = as_dataset([replace(c, prompt_ids=[5]) for c in random_comparisons((1, (2, 2)), (1, (3, 3)))])
    with pytest.raises(SimpoError, match="eval: all prompts are the same"):
        with_mismatched(same, 9, "eval")


# ---- KL ----


def naive_kl(policy, reference, row) -> torch.Tensor:
    """Return the KL summed over the vocabulary, averaged over response tokens."""
    found = []
    for response in row["response_ids"]:
        ids = torch.tensor([row["prompt_ids"] + response])
        p, q = (
            torch.log_softmax(model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1], -1)
            for model in (policy, reference)
        )
        found.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(found).mean()


@pytest.mark.parametrize("name", ["simpo", "dpo"])
def test_kl_term_matches_the_definition(name, make_trainer, make_model, pairs, naive_responses):
    """Averaged over the tokens of both responses, with its gradient; 0 before the first step."""
    rows, model, kls = pairs(4), make_model("gpt2"), []
    policy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(policy.parameters(), lr=RATE)
    losses = []
    for _ in range(2):
        with torch.no_grad():
            ref_logp = naive_responses(model, rows["prompt_ids"][:], rows["response_ids"][:]).logp
        y = replace(naive_responses(policy, rows["prompt_ids"][:], rows["response_ids"][:]), ref_logp=ref_logp)
        kl = torch.stack([naive_kl(policy, model, row) for row in rows]).mean()
        loss = pair_loss(name)(y, y) + 3.0 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        kls.append(kl.item())
    model.zero_grad()
    trained = copy.deepcopy(model)
    trainer = make_trainer(
        rows,
        model=trained,
        objective=name,
        kl_weight=3.0,
        optimizers=(torch.optim.SGD(trained.parameters(), lr=RATE), None),
        per_device_train_batch_size=4,
        max_steps=2,
        logging_steps=1,
        max_batch_tokens=45,
    )
    assert trainer.score_rows(rows)["kl"] == pytest.approx(0, abs=1e-9)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["kl"] for entry in logs] == pytest.approx(kls, abs=1e-9)
    assert kls[1] > 1e-6
    assert_alike(([entry["loss"] for entry in logs], trained), (losses, policy))


def naive_alignments(policy, rows):
    """Return for each response ``[R]`` the mean of ``log p(token) - log sum_v p(v)**2`` over its tokens."""
    found = []
    for row in rows:
        for response in row["response_ids"]:
            logits = policy(torch.tensor([row["prompt_ids"] + response])).logits[0, len(row["prompt_ids"]) - 1 : -1]
            tokens = logits.log_softmax(-1)[range(len(response)), response]
            found.append((tokens - logits.softmax(-1).square().sum(-1).log()).mean())
    return torch.stack(found).detach()


@pytest.mark.parametrize("budget", [45, 1000])
@pytest.mark.parametrize("settings", [{"objective": "dpo"}, {"objective": "simpo", "sft_weight": 0.3}])
def test_wpo_weights_match_the_definition(settings, budget, make_trainer, make_model, pairs, naive_responses):
    rows, model = pairs(5), make_model("gpt2", std=0.5)
    policy, objective = copy.deepcopy(model), OBJECTIVES[settings["objective"]]
    optimizer, losses, means = torch.optim.SGD(policy.parameters(), lr=RATE), [], []
    prompts, responses = rows["prompt_ids"][:], rows["response_ids"][:]
    with torch.no_grad():
        ref_logp = naive_responses(model, prompts, responses).logp
    for _ in range(2):
        y = replace(naive_responses(policy, prompts, responses), ref_logp=ref_logp)
        w, l = select(y, slice(0, None, 2)), select(y, slice(1, None, 2))  # noqa: E741
        aligned = naive_alignments(policy, rows)
        weights = (aligned[::2].exp() * aligned[1::2].exp()).clamp(max=1)
        assert weights.min() < 0.9
        loss = (weights * objective.pair(w, l) - settings.get("sft_weight", 0) * w.avg).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        means.append(weights.mean().item())
    trained = copy.deepcopy(model)
    trainer = make_trainer(
        rows,
        model=trained,
        optimizers=(torch.optim.SGD(trained.parameters(), lr=RATE), None),
        wpo_weights=True,
        per_device_train_batch_size=5,
        max_steps=2,
        logging_steps=1,
        max_batch_tokens=budget,
        **settings,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["wpo/weight"] for entry in logs] == pytest.approx(means, abs=1e-9)
    assert_alike(([entry["loss"] for entry in logs], trained), (losses, policy))


def test_a_pairs_weight_is_at_most_1():
    y = Responses(torch.tensor([3.0, -2.0, 1.0, 1.0]), torch.tensor([2.0, 4.0, 2.0, 1.0]))  # averages 1.5, -0.5, 0.5, 1
    weights = wpo_weights(y, OrderedPairs.of(torch.tensor([2, 2])))
    assert weights.tolist() == [1, 1]
    y = Responses(torch.tensor([0.5, -2.0]), torch.tensor([2.0, 4.0]))
    assert wpo_weights(y, OrderedPairs.of(torch.tensor([2]))).item() == pytest.approx(math.exp(0.25 - 0.5))


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("budget", [45, 1000])
def test_tokens_beyond_the_shorter_response_count_less(budget, stored, make_trainer, make_model, pairs):
    """LD-DPO; also, what is stored for the reference is not the same as for DPO."""
    rows, model, alpha = pairs(5), make_model("gpt2", std=0.5), 0.4
    assert any(len(a) != len(b) for a, b in rows["response_ids"])
    policy, rate = copy.deepcopy(model), 0.1
    optimizer, losses = torch.optim.SGD(policy.parameters(), lr=rate), []

    def ratio(row, response):
        ids, start = torch.tensor([row["prompt_ids"] + response]), len(row["prompt_ids"]) - 1
        with torch.no_grad():
            reference = model(ids).logits[0, start:-1].log_softmax(-1)
        found = policy(ids).logits[0, start:-1].log_softmax(-1) - reference
        tokens = found[range(len(response)), response]
        shared = min(map(len, row["response_ids"]))
        return tokens[:shared].sum() + alpha * tokens[shared:].sum()

    for _ in range(2):
        margins = [ratio(row, row["response_ids"][0]) - ratio(row, row["response_ids"][1]) for row in rows]
        loss = -torch.nn.functional.logsigmoid(0.1 * torch.stack(margins)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    settings = {"objective": "dpo", "precompute_ref_log_probs": stored, "max_batch_tokens": budget}
    trained = copy.deepcopy(model)
    if stored:
        make_trainer(rows, model=copy.deepcopy(model), objective="dpo", max_steps=1).train()
    trainer = make_trainer(
        rows,
        model=trained,
        optimizers=(torch.optim.SGD(trained.parameters(), lr=rate), None),
        **{"per_device_train_batch_size": 5, "max_steps": 2, "logging_steps": 1, "ld_alpha": alpha} | settings,
    )
    trainer.train()
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert_alike((logs, trained), (losses, policy))


# ---- rejected settings ----


def test_ld_alpha_requires_pairs_and_a_reference(rankings, pairs, make_trainer):
    with pytest.raises(SimpoError, match=r"ld_alpha: train: .*made up:1, made up:2$"):
        make_trainer(rankings, objective="dpo", ld_alpha=0.5)
    for name, more in (("simpo", {}), ("kto", {}), ("dpo", {"sft_weight": 0.1}), ("dpo", {"ld_alpha": 1.1})):
        with pytest.raises(SimpoError, match="ld_alpha"):
            make_trainer(pairs(2), objective=name, **{"ld_alpha": 0.5} | more)


def test_wpo_weights_require_pairs(judged, make_trainer):
    with pytest.raises(SimpoError, match="wpo_weights: train: "):
        make_trainer(judged, objective="kto", wpo_weights=True)
    for name in ("listwise", {"dpo": 1.0, "listwise": 1.0}):
        with pytest.raises(SimpoError, match=r"wpo_weights: objective .*listwise"):
            make_trainer(judged, objective=name, wpo_weights=True)


def test_single_responses_require_kto(judged, make_trainer, pairs):
    with pytest.raises(SimpoError, match=r"train: objective 'dpo' needs pairs, .* single responses; .* kto, bco$"):
        make_trainer(judged, objective="dpo")
    with pytest.raises(SimpoError, match="train: every row has the label true; both desirable"):
        make_trainer(judged.select([0, 3, 4]), objective="kto")
    with pytest.raises(SimpoError, match="eval_dataset: must hold comparisons or labeled single responses"):
        make_trainer(judged, objective="kto").evaluate(pairs(3))
