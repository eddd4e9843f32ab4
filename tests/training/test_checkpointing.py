"""Activation checkpointing of some layers: which layers are recomputed, and training is unchanged."""

from __future__ import annotations

import pytest
import torch

from simpo.errors import SimpoError


def train(make_trainer, make_model, rows, **settings):
    model = make_model("llama", num_hidden_layers=4)
    calls = [0] * 4
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(
            lambda *_, number=number: calls.__setitem__(number, calls[number] + 1)
        )
    trainer = make_trainer(rows, model=model, per_device_train_batch_size=4, learning_rate=1e-2, **settings)
    calls[:] = [0] * 4  # discard the calls made by the self-check
    trainer.train()
    return calls, trainer.model.state_dict()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"gradient_checkpointing": True}, [2, 2, 2, 2]),
        ({"gradient_checkpointing": True, "checkpointed_share": 0.5}, [1, 2, 1, 2]),
        ({"gradient_checkpointing": True, "checkpointed_share": 0.75}, [1, 2, 2, 2]),
        ({"checkpointed_share": 0.5}, [1, 1, 1, 1]),
    ],
    ids=str,
)
def test_only_the_chosen_layers_are_recomputed_and_training_is_unchanged(
    settings, expected, make_trainer, make_model, pairs
):
    rows = pairs(4)
    _, exact = train(make_trainer, make_model, rows)
    calls, weights = train(make_trainer, make_model, rows, **settings)
    assert calls == expected
    for key, tensor in exact.items():
        torch.testing.assert_close(weights[key], tensor, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_an_invalid_share_is_an_error(share, config):
    with pytest.raises(SimpoError, match=r"^checkpointed_share: must be above 0 and at most 1"):
        config(checkpointed_share=share)
