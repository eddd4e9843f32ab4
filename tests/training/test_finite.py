"""Non-finite losses and gradients: the run stops before the optimizer step and names the row."""

from __future__ import annotations

import copy

import pytest
import torch

from simpo import SimpoError

POISON = 60  # a token that only one row has


@pytest.fixture
def rows(random_comparisons, as_dataset):
    """Eight pairs; the chosen response in row 5 contains the poisoned token."""
    comparisons = random_comparisons(*[(3, (4, 5))] * 8)
    for comparison in comparisons:
        for ids in (comparison.prompt_ids, *comparison.response_ids):
            ids[:] = [token if token != POISON else 3 for token in ids]
    comparisons[5].response_ids[0][1] = POISON
    return as_dataset(comparisons)


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def poison(model, kind):
    """Make the poisoned token's embedding, or the gradient that flows back through it, NaN."""

    def hook(module, arguments, output):
        poisoned = (arguments[0] == POISON)[..., None]
        if not poisoned.any():
            return output
        bad = torch.full_like(output, float("nan")) if kind == "loss" else _BadGradient.apply(output)
        return torch.where(poisoned, bad, output)

    model.get_input_embeddings().register_forward_hook(hook)
    return model


@pytest.mark.parametrize("path", ["packed", "padded"])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_the_row_is_named_and_the_weights_are_unchanged(kind, path, max_grad_norm, make_trainer, make_model, rows):
    start = make_model("llama", torch.float32)
    model = copy.deepcopy(start)
    trainer = make_trainer(
        rows,
        model=model,
        per_device_train_batch_size=4,
        max_batch_tokens=60,
        train_sampling_strategy="sequential",
        learning_rate=0.1,
        forward_path=path,
        max_grad_norm=max_grad_norm,
    )
    poison(model, kind)
    with pytest.raises(SimpoError, match=rf"step 2: the {kind} is not finite; rows: made up:5; nothing was updated"):
        trainer.train()
    assert trainer.state.global_step == 1
    good = copy.deepcopy(start)
    make_trainer(
        rows.select(range(4)),
        model=good,
        per_device_train_batch_size=4,
        max_batch_tokens=60,
        train_sampling_strategy="sequential",
        learning_rate=0.1,
        forward_path=path,
        max_grad_norm=max_grad_norm,
        num_train_epochs=1,
    ).train()
    for (name, found), expected in zip(model.named_parameters(), good.parameters(), strict=True):
        assert found.isfinite().all(), name
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=name)


def test_if_every_row_is_affected_the_model_is_suspected(make_trainer, make_model, pairs):
    model = make_model("gpt2", torch.float32)
    trainer = make_trainer(pairs(3), model=model, per_device_train_batch_size=3, max_steps=1)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(float("nan"))
    with pytest.raises(SimpoError, match="all rows of the step: check the model"):
        trainer.train()
