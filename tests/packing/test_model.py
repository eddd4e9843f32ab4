"""The packed path against the model's own forward, one sequence at a time: log-probabilities and all gradients."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers as hf

from simpo.packing import attention
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.model import policy_forward, policy_logprobs, prepare_policy, state_of

SHAREABLE = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt2", "gpt_neox", "mixtral",
    "gpt_oss", "cohere", "granite",
]  # fmt: skip


def outcome(logps: torch.Tensor, model) -> dict[str, torch.Tensor]:
    """Return log-probabilities, and the gradients of all parameters for a random weighting of them."""
    weight = torch.randn(logps.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(logps)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad((logps * weight).sum(), parameters, materialize_grads=True, allow_unused=True)
    return {"log-probabilities": logps.detach()} | dict(zip(names, gradients, strict=True))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Require differences below ``tolerance``, relative to the largest entry if that exceeds 1."""
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        worst = (found[name] - exact).abs().max().item()
        assert worst <= tolerance * max(1.0, exact.abs().max().item()), f"{name}: {worst:.2g}"
    moved = [name for name, gradient in expected.items() if gradient.abs().max() > 1e-4]
    assert len(moved) > len(expected) / 2  # otherwise the comparison proves nothing


def check(model, comparisons, naive_logprobs, tolerance: float) -> None:
    expected = outcome(naive_logprobs(model, comparisons), model)
    found = outcome(policy_logprobs(model, PackedBatch.build(comparisons)), model)
    assert_same(found, expected, tolerance)


@pytest.mark.parametrize("name", SHAREABLE)
def test_packed_equals_one_sequence_at_a_time(name, make_model, comparisons, naive_logprobs, float64_everywhere):
    model = make_model(name)
    check(model, comparisons, naive_logprobs, 1e-9)
    assert (state_of(model).path, state_of(model).fused_head, state_of(model).reasons) == ("packed", True, [])


@pytest.mark.parametrize("name", SHAREABLE)
def test_packed_equals_one_sequence_at_a_time_in_fp32(name, make_model, comparisons, naive_logprobs):
    model = make_model(name, torch.float32, std=0.1)
    check(model, comparisons, naive_logprobs, 1e-5)
    assert state_of(model).path == "packed"


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "mamba"])
@pytest.mark.parametrize("path", ["auto", "padded"])
def test_responses_are_the_sums_of_their_tokens(
    name, path, make_model, comparisons, naive_logprobs, float64_everywhere
):
    model = make_model(name)
    responses = [response for comparison in comparisons for response in comparison.response_ids]
    tokens = naive_logprobs(model, comparisons)
    found = policy_forward(model, PackedBatch.build(comparisons), path=path)
    expected = torch.stack([part.sum() for part in tokens.split([len(response) for response in responses])])
    torch.testing.assert_close(found.logp, expected, rtol=0, atol=1e-9)
    assert found.length.tolist() == [len(response) for response in responses]


def every_third(comparisons: list[TokenizedComparison]) -> list[TokenizedComparison]:
    """Score tokens 0, 3, 6, ... of every other response, and all but the first token of the rest.

    A response of one token is scored.
    """

    def mask(k: int, length: int) -> list[bool]:
        return [place % 3 == 0 if k % 2 else place > 0 or length == 1 for place in range(length)]

    return [
        TokenizedComparison(c.prompt_ids, c.response_ids, [mask(k, len(ids)) for k, ids in enumerate(c.response_ids)])
        for c in comparisons
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("path", ["packed", "padded"])
def test_masked_responses_match_the_naive_forward(
    name, path, make_model, comparisons, naive_logprobs, float64_everywhere
):
    model, masked = make_model(name), every_third(comparisons)
    marks = torch.tensor([mark for comparison in masked for mask in comparison.scored for mark in mask])
    exact = naive_logprobs(model, masked)[marks]
    batch = PackedBatch.build(masked)
    found = policy_logprobs(model, batch, path=path)
    assert_same(outcome(found, model), outcome(exact, model), 1e-9)
    assert state_of(model).path == "packed"
    responses = policy_forward(model, batch, path=path)
    lengths = [sum(mask) for comparison in masked for mask in comparison.scored]
    assert responses.length.tolist() == lengths
    sums = torch.stack([part.sum() for part in exact.split(lengths)])
    torch.testing.assert_close(responses.logp, sums, rtol=0, atol=1e-9)


def test_comparisons_do_not_see_each_other(make_model, comparisons):
    """Bit for bit: a response's log-probabilities do not depend on the tokens of other responses or comparisons."""
    model = make_model("llama", torch.float32)
    before = policy_logprobs(model, PackedBatch.build(comparisons))
    changed = copy.deepcopy(comparisons)
    changed[0].response_ids[0][:] = changed[0].response_ids[0][::-1]
    changed[2].prompt_ids[:] = changed[2].prompt_ids[::-1]
    after = policy_logprobs(model, PackedBatch.build(changed))
    own = PackedBatch.build(comparisons).response_of
    touched = (own == 0) | (own == 5) | (own == 6)
    assert torch.equal(before[~touched], after[~touched])
    assert (before[own >= 5][:9] != after[own >= 5][:9]).all()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "gpt2", "opt"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(name, reentrant, make_model, comparisons, float64_everywhere):
    batch = PackedBatch.build(comparisons)
    model = make_model(name).train()
    expected = outcome(policy_logprobs(model, batch), model)
    calls = []
    attention = next(module for module in model.modules() if type(module).__name__.endswith("Attention"))
    attention.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    logps = policy_logprobs(model, batch)
    weight = torch.randn(logps.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (logps * weight).sum().backward()  # reentrant checkpoints do not allow autograd.grad
    found = {"log-probabilities": logps.detach()} | {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    assert len(calls) == 2  # once more in backward
    assert_same(found, expected, 1e-9)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "qwen2"])
def test_generate_after_a_packed_step_is_transformers_own(name, make_model, comparisons):
    model = make_model(name, torch.float32)
    policy_forward(model, PackedBatch.build(comparisons)).avg.sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert state_of(model).path == "packed"
    assert model.config._attn_implementation == "simpo_sdpa"
    own = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="sdpa")
    own.load_state_dict(model.state_dict())
    ids = torch.tensor([[0, 0, 0, 7, 8, 9, 10, 11], [5, 6, 7, 8, 9, 10, 11, 12]])
    mask = (ids != 0).long()
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20, "output_logits": True}
    options |= {"return_dict_in_generate": True, "eos_token_id": None}
    found, expected = model.eval().generate(ids, **options), own.eval().generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


def test_generate_works_with_the_models_own_eager_attention(make_model, comparisons):
    own = make_model("gemma2", torch.float32).eval()
    model = copy.deepcopy(own)
    policy_forward(model, PackedBatch.build(comparisons))
    assert model.config._attn_implementation == "simpo_eager"
    ids = torch.tensor([comparisons[0].prompt_ids])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12}
    assert torch.equal(model.generate(ids, **options), own.generate(ids, **options))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_bound_model_can_be_saved_and_loaded(name, make_model, comparisons, tmp_path):
    model = make_model(name, torch.float32)
    before = policy_logprobs(model, PackedBatch.build(comparisons))
    model.save_pretrained(tmp_path)
    assert "simpo" not in (tmp_path / "config.json").read_text()
    own = model.config._attn_implementation.removeprefix("simpo_")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=own)
    assert "simpo" not in loaded.config._attn_implementation
    assert loaded.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(policy_logprobs(loaded, PackedBatch.build(comparisons)), before, rtol=0, atol=0)


def test_a_copy_of_a_bound_model_is_independent(make_model, comparisons, naive_logprobs, float64_everywhere):
    model = make_model("llama")
    before = policy_logprobs(model, PackedBatch.build(comparisons))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.9)
    found = policy_logprobs(twin, PackedBatch.build(comparisons))
    torch.testing.assert_close(found, naive_logprobs(twin, comparisons), rtol=0, atol=1e-9)
    assert (found - before).abs().max() > 1e-2
    assert torch.equal(policy_logprobs(model, PackedBatch.build(comparisons)), before)


def test_binding_keeps_signature_and_outputs(make_model, comparisons):
    model = make_model("llama", torch.float32)
    ids = torch.tensor([comparisons[0].prompt_ids])
    signature, logits = inspect.signature(model.forward), model(ids, labels=ids)
    policy_logprobs(model, PackedBatch.build(comparisons))
    assert inspect.signature(model.forward) == signature
    after = model(ids, labels=ids)
    assert torch.equal(after.logits, logits.logits)
    assert torch.equal(after.loss, logits.loss)


def test_binding_twice_equals_binding_once(make_model):
    model = make_model("llama")
    prepare_policy(model)
    forward, state = model.forward, state_of(model)
    prepare_policy(model)
    assert model.forward == forward
    assert state_of(model) is state


def test_calls_go_through_the_wrapper(make_model, comparisons):
    """DDP and similar wrappers work in their own forward and in hooks."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    model = make_model("llama", torch.float32)
    hooked = []
    model.register_forward_hook(lambda *_: hooked.append(1))
    wrapper = Wrapper(Wrapper(model))
    batch = PackedBatch.build(comparisons)
    policy_forward(model, batch)
    expected, seen = policy_logprobs(model, batch), len(hooked)
    assert torch.equal(policy_logprobs(wrapper, batch), expected)
    assert (wrapper.calls, wrapper.module.calls, len(hooked) - seen) == (1, 1, 1)


def test_adapters_have_exact_gradients(make_model, comparisons, naive_logprobs, float64_everywhere):
    """With peft, the base model stays frozen and ``save_pretrained`` saves an ordinary adapter."""
    import peft

    model = peft.get_peft_model(
        make_model("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, dtype=parameter.dtype) * 0.3)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)

    def gradients(logps):
        return torch.autograd.grad((logps * torch.arange(len(logps))).sum(), list(trained.values()))

    expected = naive_logprobs(model, comparisons)
    found = policy_logprobs(model, PackedBatch.build(comparisons))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert state_of(model).path == "packed"
    for exact, gradient in zip(gradients(expected), gradients(found), strict=True):
        assert exact.abs().max() > 1e-3
        torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-9)


def test_results_stay_right_after_the_attention_is_changed(make_model, comparisons, naive_logprobs, float64_everywhere):
    """``set_attn_implementation`` after the self-check removes our attention."""
    model = make_model("llama")
    batch = PackedBatch.build(comparisons)
    policy_logprobs(model, batch)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(policy_logprobs(model, batch), naive_logprobs(model, comparisons), rtol=0, atol=1e-9)


def test_dropout_follows_the_models_mode(make_model, comparisons):
    model = make_model("llama", torch.float32)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    batch = PackedBatch.build(comparisons)
    with torch.no_grad():
        still = [policy_logprobs(model.eval(), batch) for _ in range(2)]
        noisy = [policy_logprobs(model.train(), batch) for _ in range(2)]
    assert torch.equal(*still)
    assert not torch.equal(*noisy)
    assert model.training


def test_bf16_is_close_to_fp32(make_model, comparisons):
    model = make_model("llama", torch.float32, std=0.1)
    batch = PackedBatch.build(comparisons)
    expected = policy_logprobs(model, batch)
    found = policy_logprobs(copy.deepcopy(model).to(torch.bfloat16), batch)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert (policy_logprobs(model, batch) - expected).abs().max() < 0.1


def test_attention_uses_the_autocast_dtype(make_model, comparisons, monkeypatch):
    """Rotary embeddings in fp32 would leave queries and keys in fp32, which has no fast kernel."""
    model = make_model("llama", torch.float32, std=0.1)
    batch = PackedBatch.build(comparisons)
    policy_logprobs(model, batch)
    seen = set()
    monkeypatch.setattr(attention, "choose_kernel", lambda *states_and_style: seen.add(states_and_style[:3]))
    with torch.autocast("cpu", torch.bfloat16):
        policy_logprobs(model, batch)
    assert {state.dtype for states in seen for state in states} == {torch.bfloat16}
