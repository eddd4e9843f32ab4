"""The load-balancing loss and expert load equal those of the model's own forward, with each token counted once."""

from __future__ import annotations

import sys

import pytest
import torch
from benchmarks.architectures import build, comparisons

from simpo.errors import SimpoError
from simpo.packing.layout import PackedBatch
from simpo.packing.model import choose_path, policy_logprobs, state_of
from simpo.packing.routing import balance_weight, record_routing


def unique_logits(model, rows):
    """Return the router logits of every prompt and response by layer, from the model's own forward."""
    layers = None
    for row in rows:
        for place, response in enumerate(row.response_ids):
            ids = torch.tensor([row.prompt_ids + response])
            found = model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
            found = [logits.flatten(0, -2)[0 if place == 0 else len(row.prompt_ids) :] for logits in found]
            layers = [[] for _ in found] if layers is None else layers
            for layer, logits in zip(layers, found, strict=True):
                layer.append(logits)
    return tuple(torch.cat(layer) for layer in layers)


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "path"), [("mixtral", "packed"), ("qwen3_next", "cached"), ("qwen3_moe", "padded")])
def test_loss_load_and_gradients_match_the_models_own(name, path, checkpointing, float64_everywhere):
    model, rows = build(name, torch.float64), comparisons()
    logits = unique_logits(model, rows)
    own = sys.modules[type(model).__module__].load_balancing_loss_func
    expected = own(logits, model.num_experts, model.num_experts_per_tok)
    chosen = torch.stack([layer.topk(model.num_experts_per_tok).indices.flatten().bincount() for layer in logits])
    batch = PackedBatch.build(rows)
    choose_path(model, batch)
    if checkpointing:
        model.gradient_checkpointing_enable()
    with record_routing(model, batch) as routing:
        logps = policy_logprobs(model, batch, path=path)
    found = routing.loss()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert routing.max_load() == pytest.approx((chosen.amax(1) * model.num_experts / chosen.sum(1)).mean().item())
    wanted = gradients(expected + policy_logprobs(model, batch, path=path).mean(), model)
    for a, b in zip(gradients(found + logps.mean(), model), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_for_one_sequence_it_equals_the_models_own_auxiliary_loss():
    model, row = build("mixtral", output_router_logits=True, router_aux_loss_coef=0.5), comparisons()[-1]
    ids = torch.tensor([row.prompt_ids + row.response_ids[0]])
    choose_path(model, PackedBatch.build([row]))
    with record_routing(model, PackedBatch.build([row])) as routing:
        policy_logprobs(model, PackedBatch.build([row]))
    torch.testing.assert_close(routing.loss(), model(ids, labels=ids).aux_loss)
    assert balance_weight(model) == 0.5


def test_separate_rows_give_the_same_loss():
    """If padding changes a model's results, every response gets its own forward."""
    model, rows = build("qwen3_moe"), comparisons()
    batch = PackedBatch.build(rows)
    choose_path(model, batch)
    with record_routing(model, batch) as together:
        policy_logprobs(model, batch, path="padded")
    state_of(model).separate_rows = True
    with record_routing(model, batch) as alone:
        policy_logprobs(model, batch, path="padded")
    torch.testing.assert_close(alone.loss(), together.loss())


def test_nothing_is_recorded_without_experts_or_gradients():
    batch = PackedBatch.build(comparisons())
    with record_routing(build("llama"), batch) as routing:
        assert routing is None
    model = build("mixtral")
    with torch.no_grad(), record_routing(model, batch) as routing:
        assert routing is None
    assert balance_weight(model) == 0  # output_router_logits is off


def test_a_loss_that_cannot_be_computed_is_rejected():
    with pytest.raises(SimpoError, match=r"^output_router_logits: .*JetMoeForCausalLM"):
        balance_weight(build("jetmoe", output_router_logits=True, router_aux_loss_coef=0.1))
