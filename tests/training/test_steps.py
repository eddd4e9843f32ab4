"""What makes up an optimizer step: its gradient, its rows, and the number of calls."""

from __future__ import annotations

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from tests.training_runs import GradientRecorder

from simpo.errors import SimpoError
from simpo.training.batches import response_counts, row_sizes


class CountingSGD(torch.optim.SGD):
    calls = 0

    def step(self, *args, **kwargs):
        self.calls += 1
        return super().step(*args, **kwargs)


def watch(trainer):
    """Record the weighted rows of every micro-batch (``seen``, one list per step) and count backward calls."""
    seen, backwards = [], []
    compute_loss, training_step, backward = trainer.compute_loss, trainer.training_step, trainer.accelerator.backward

    def watched_step(*args, **kwargs):
        seen.append([])
        return training_step(*args, **kwargs)

    def watched_loss(model, inputs, *args, **kwargs):
        if model.training:
            seen[-1].append([r for r, w in zip(inputs.rows, inputs.packed.weights.tolist(), strict=True) if w])
        return compute_loss(model, inputs, *args, **kwargs)

    def watched_backward(loss, **kwargs):
        backwards.append(loss.item())
        return backward(loss, **kwargs)

    trainer.training_step, trainer.compute_loss = watched_step, watched_loss
    trainer.accelerator.backward = watched_backward
    return seen, backwards


def flat(step: list[list[int]]) -> list[int]:
    return [row for micro in step for row in micro]


def first_gradients(make_trainer, rows, *, model, **settings):
    gradients = GradientRecorder()
    trainer = make_trainer(rows, model=copy.deepcopy(model), callbacks=[gradients], max_steps=1, **settings)
    seen, backwards = watch(trainer)
    trainer.train()
    (found,) = gradients.steps
    return found, seen[0], backwards


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("gpt2")


SPLITS = {
    "one micro-batch": ({"per_device_train_batch_size": 10, "max_batch_tokens": 200}, 1),
    "two": ({"per_device_train_batch_size": 10, "max_batch_tokens": 100}, 2),
    "five": ({"per_device_train_batch_size": 10, "max_batch_tokens": 40}, 5),
    "padded": ({"per_device_train_batch_size": 10, "max_batch_tokens": 400, "forward_path": "padded"}, None),
}


@pytest.mark.parametrize("split", SPLITS)
def test_the_gradient_does_not_depend_on_the_split(split, make_trainer, pairs, model, naive_losses):
    """It equals the gradient of the mean loss over pairs by the definition."""
    settings, micro_batches = SPLITS[split]
    rows = pairs(10)
    naive = copy.deepcopy(model)
    naive_losses(naive, rows).mean().backward()
    found, seen, backwards = first_gradients(make_trainer, rows, model=model, **settings)
    assert sorted(flat(seen)) == list(range(10))
    assert micro_batches in (None, len(seen))
    assert len(backwards) == len(seen)
    assert found.keys() == dict(naive.named_parameters()).keys()
    for name, parameter in naive.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-9, msg=name)
    assert max(gradient.abs().max() for gradient in found.values()) > 1e-3


@pytest.mark.parametrize(("per_device", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_accumulation_is_equivalent_to_batch_size(per_device, accumulation, make_trainer, pairs, model, naive_losses):
    """However 8 pairs per step are configured: the same rows, gradients, loss and number of steps."""
    rows = pairs(20)
    gradients = GradientRecorder()
    trainer = make_trainer(
        rows,
        model=copy.deepcopy(model),
        callbacks=[gradients],
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.0,
        logging_steps=1,
    )
    seen, _ = watch(trainer)
    trainer.train()
    assert [len(flat(step)) for step in seen] == [8, 8, 4]
    assert trainer.state.global_step == 3
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for step, found, logged in zip(seen, gradients.steps, losses, strict=True):
        naive = copy.deepcopy(model)
        loss = naive_losses(naive, rows.select(flat(step))).mean()  # including the incomplete last step
        loss.backward()
        assert logged == pytest.approx(loss.item(), rel=1e-6)
        for name, parameter in naive.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({"beta": 5.0, "gamma": 0.3}, lambda c, r: -torch.nn.functional.logsigmoid(5 * (c - r) - 0.3)),
        ({"link": "hinge"}, lambda c, r: torch.relu(1 - (2 * (c - r) - 1))),
        (
            {"label_smoothing": 0.2, "beta": 2.0},
            lambda c, r: -0.8 * (2 * (c - r) - 1).sigmoid().log() - 0.2 * (1 - 2 * (c - r)).sigmoid().log(),
        ),
        ({"sft_weight": 0.7}, lambda c, r: -torch.nn.functional.logsigmoid(2 * (c - r) - 1) - 0.7 * c),
    ],
)
def test_the_configured_objective_is_differentiated(settings, loss, make_trainer, pairs, model, naive_pairs):
    rows = pairs(6)
    naive = copy.deepcopy(model)
    loss(*naive_pairs(naive, rows)).mean().backward()
    found, _, _ = first_gradients(
        make_trainer, rows, model=model, per_device_train_batch_size=6, max_batch_tokens=60, **settings
    )
    for name, parameter in naive.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-9, msg=name)


EPOCHS = {
    # settings other than 4 pairs per step, number of rows -> rows in each step
    "complete": ({}, 8, [4, 4]),
    "incomplete last step": ({}, 10, [4, 4, 2]),
    "fewer rows than a step": ({}, 3, [3]),
    "two epochs": ({"num_train_epochs": 2}, 10, [4, 4, 2, 4, 4, 2]),
    "sequential": ({"train_sampling_strategy": "sequential"}, 10, [4, 4, 2]),
    "drop last": ({"dataloader_drop_last": True}, 10, [4, 4]),
    "drop last, sequential": (
        {"dataloader_drop_last": True, "train_sampling_strategy": "sequential", "num_train_epochs": 2},
        10,
        [4, 4, 4, 4],
    ),
    "max steps within an epoch": ({"max_steps": 2}, 10, [4, 4]),
    "max steps beyond an epoch": ({"max_steps": 5}, 10, [4, 4, 2, 4, 4]),
    "half an epoch": ({"num_train_epochs": 0.5}, 16, [4, 4]),
    "a worker": ({"dataloader_num_workers": 1, "num_train_epochs": 2}, 10, [4, 4, 2, 4, 4, 2]),
    "a persistent worker": (
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "num_train_epochs": 2},
        10,
        [4, 4, 2, 4, 4, 2],
    ),
}


@pytest.mark.parametrize("case", EPOCHS)
@pytest.mark.parametrize("budget", [40, 1000])
def test_steps_rows_and_backward_calls_are_counted(case, budget, make_trainer, make_model, pairs):
    settings, count, steps = EPOCHS[case]
    model = make_model("gpt2", torch.float32)
    optimizer = CountingSGD(model.parameters(), lr=1e-3)
    trainer = make_trainer(
        pairs(count),
        model=model,
        optimizers=(optimizer, None),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_batch_tokens=budget,
        **settings,
    )
    seen, backwards = watch(trainer)
    output = trainer.train()
    assert [len(flat(step)) for step in seen] == steps
    assert optimizer.calls == trainer.state.global_step == output.global_step == len(steps)
    # rows have 20 tokens, so the small budget fits two per micro-batch
    assert len(backwards) == (sum(-(-size // 2) for size in steps) if budget == 40 else len(steps))
    drops = settings.get("dataloader_drop_last")
    per_epoch = count // 4 if drops else -(-count // 4)
    epochs = [seen[start : start + per_epoch] for start in range(0, len(seen), per_epoch)]
    orders = [[row for step in epoch for row in sorted(flat(step))] for epoch in epochs]
    for epoch in orders:
        assert set(Counter(epoch).values()) == {1}  # each row exactly once per complete epoch:
        assert len(epoch) == count or drops or len(orders[-1]) < count
    if settings.get("train_sampling_strategy") == "sequential":
        assert all(epoch == list(range(len(epoch))) for epoch in orders)
    elif len(orders) > 1:
        assert orders[0][:4] != orders[1][:4]


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_run_trains_on_the_remaining_rows(stop, make_trainer, make_model, pairs, tmp_path):
    """Stopped within the first or second of two epochs; the weights equal those of an uninterrupted run too."""
    rows, settings = pairs(10), {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2}

    def run(resume=None, **changes):
        trainer = make_trainer(rows, model=make_model("gpt2", torch.float32), **settings | changes)
        seen, _ = watch(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return [sorted(flat(step)) for step in seen], trainer.model.state_dict()

    through, weights = run()
    run(save_strategy="steps", save_steps=stop)
    rest, resumed = run(str(tmp_path / f"checkpoint-{stop}"))
    assert rest == through[stop:]
    for name, weight in weights.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0, msg=name)


def test_nothing_to_train_in_a_step_is_an_error(make_trainer, pairs):
    """Fewer rows than a step with ``dataloader_drop_last`` would otherwise be a run of zero steps."""
    with pytest.raises(SimpoError, match="dataloader_drop_last"):
        make_trainer(pairs(3), per_device_train_batch_size=4, dataloader_drop_last=True).train()


def test_no_forward_exceeds_max_batch_tokens(make_trainer, make_model, random_comparisons, as_dataset):
    """Also on the padded path, where all rows in a batch are as wide as the longest."""
    rows = as_dataset(random_comparisons((20, (30, 30)), *[(3, (2, 2))] * 12))
    for path, budget in (("packed", 80), ("padded", 230)):
        model = make_model("gpt2", torch.float32)
        trainer = make_trainer(
            rows, model=model, per_device_train_batch_size=13, max_batch_tokens=budget, forward_path=path
        )
        seen = []
        model.get_input_embeddings().register_forward_pre_hook(lambda _, ids, seen=seen: seen.append(ids[0].numel()))
        trainer.train()
        assert max(seen) <= budget, path


@pytest.mark.parametrize("view", ["whole", "selected", "shuffled", "sliced"])
def test_row_lengths_are_exact(view, random_comparisons, as_dataset):
    """Also for a view of a dataset, whose Arrow table has other rows or an offset."""
    rows = as_dataset(random_comparisons((9, (3, 7)), (1, (1, 4, 2)), (20, (2, 5)), (3, (6,)), (4, (1, 1))))
    rows = {
        "whole": rows,
        "selected": rows.select([3, 1, 1]),
        "shuffled": rows.shuffle(seed=1),
        "sliced": rows.select(range(1, 4)),
    }[view]
    sizes = [(len(row["prompt_ids"]), [len(response) for response in row["response_ids"]]) for row in rows]
    np.testing.assert_array_equal(row_sizes(rows, "packed").lengths, [p + sum(r) for p, r in sizes])
    np.testing.assert_array_equal(row_sizes(rows, "padded").lengths, [len(r) * (p + max(r)) for p, r in sizes])
    cached = [p + len(r) * max(r) for p, r in sizes]
    np.testing.assert_array_equal(row_sizes(rows, "cached").lengths, cached)
    np.testing.assert_array_equal(response_counts(rows), [len(r) for _, r in sizes])


def test_the_default_budget_fits_the_longest_row(make_trainer, make_model, random_comparisons, as_dataset):
    rows = as_dataset(random_comparisons((900, (700, 800)), (3, (2, 2))))
    model = make_model("llama", torch.float32, max_position_embeddings=2048)
    trainer = make_trainer(rows, model=model, per_device_train_batch_size=2, learning_rate=0.0)
    seen, _ = watch(trainer)
    trainer.train()
    assert sorted(flat(seen[0])) == [0, 1]
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_a_row_longer_than_max_batch_tokens_is_reported(make_trainer, random_comparisons, as_dataset):
    rows = as_dataset(random_comparisons((3, (2, 2)), (10, (5, 6)), (3, (2, 2))))
    with pytest.raises(SimpoError, match=r"max_batch_tokens: 20 .*row 1, 21 tokens"):
        make_trainer(rows, max_batch_tokens=20).train()


def test_a_step_takes_two_forward_and_four_backward_flops_per_weight_and_token(make_trainer, pairs, model):
    """Kaplan et al. 2020, arXiv 2001.08361, section 2.1; a pair has 20 tokens because its prompt is shared."""
    trainer = make_trainer(pairs(8), model=model, per_device_train_batch_size=8)
    step = next(iter(trainer.get_train_dataloader()))
    embeddings = {id(weight) for m in model.modules() if isinstance(m, torch.nn.Embedding) for weight in m.parameters()}
    weights = sum(weight.numel() for weight in model.parameters() if id(weight) not in embeddings)
    assert trainer.floating_point_ops(step) == (2 + 4) * weights * 8 * 20
