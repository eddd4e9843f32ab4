"""Packed reward models against their own forward, one sequence at a time: rewards and all gradients."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from simpo.errors import SimpoError
from simpo.packing.layout import PackedBatch
from simpo.packing.model import is_reward_model, reward_forward, state_of
from simpo.packing.scoring import score_answers

KINDS = {
    "llama": hf.LlamaForSequenceClassification,
    "mistral": hf.MistralForSequenceClassification,
    "qwen2": hf.Qwen2ForSequenceClassification,
    "qwen3": hf.Qwen3ForSequenceClassification,
    "gemma2": hf.Gemma2ForSequenceClassification,
    "gemma3": hf.Gemma3TextForSequenceClassification,
    "phi3": hf.Phi3ForSequenceClassification,
    "opt": hf.OPTForSequenceClassification,
    "gpt2": hf.GPT2ForSequenceClassification,
    "gpt_neox": hf.GPTNeoXForSequenceClassification,
    "mixtral": hf.MixtralForSequenceClassification,
    "gpt_oss": hf.GptOssForSequenceClassification,
    "bloom": hf.BloomForSequenceClassification,
    "falcon": hf.FalconForSequenceClassification,
}
FALLBACK = {"bloom", "falcon"}


@pytest.fixture(scope="module")
def make_reward_model(make_model):
    """``make_reward_model(name, dtype)``: a tiny random sequence classifier with one label."""

    def make(name: str, dtype=torch.float64, *, kind=None, **changes):
        return make_model(name, dtype, kind=kind or KINDS[name], num_labels=1, **changes)

    return make


@pytest.fixture(scope="module")
def answers(random_comparisons):
    """Comparisons, one with K = 8; some responses end with the padding token, which can also end a turn."""
    found = random_comparisons((11, (7, 19, 1, 4, 9, 2, 12, 5)), (1, (1, 4, 2)), (23, (9, 1)), (4, (6,)))
    found[0].response_ids[3][-1] = found[2].response_ids[0][-1] = 0
    return found


def naive_rewards(model, comparisons) -> torch.Tensor:
    """Return rewards ``[R]`` at the last token, from the backbone and score head in plain transformers."""
    found = []
    for comparison in comparisons:
        for response in comparison.response_ids:
            ids = torch.tensor([comparison.prompt_ids + response])
            found.append(model.score(model.base_model(input_ids=ids, use_cache=False)[0])[0, -1, 0])
    return torch.stack(found)


def gradients(rewards, model):
    weight = torch.randn(rewards.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(rewards)
    return torch.autograd.grad(
        (rewards * weight).sum(), list(model.parameters()), materialize_grads=True, allow_unused=True
    )


def assert_exact(model, found, comparisons) -> None:
    """Require rewards and gradients equal to the model's own, to 1e-9 (relative if above 1)."""
    expected = naive_rewards(model, comparisons)
    assert expected.detach().std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * max(1.0, expected.abs().max().item()))
    exact = gradients(expected, model)
    assert sum(gradient.abs().max() > 1e-4 for gradient in exact) > len(exact) / 2
    for (name, _), a, b in zip(model.named_parameters(), gradients(found, model), exact, strict=True):
        assert (a - b).abs().max() <= 1e-9 * max(1.0, b.abs().max()), name


@pytest.mark.parametrize("name", KINDS)
def test_rewards_of_eight_answers_to_one_prompt_are_exact(name, make_reward_model, answers, caplog, float64_everywhere):
    model = make_reward_model(name)
    with caplog.at_level(logging.WARNING, "simpo"):
        assert_exact(model, reward_forward(model, PackedBatch.build(answers)), answers)
    path = "cached" if name in FALLBACK else "packed"
    assert (state_of(model).path, state_of(model).fused_head) == (path, True)
    said = [record for record in caplog.records if record.name.startswith("simpo")]
    assert len(said) == (path == "cached")


@pytest.mark.parametrize("path", ["auto", "packed", "padded"])
@pytest.mark.parametrize("budget", [70, 16384])
def test_any_number_of_comparisons_can_be_scored(path, budget, make_reward_model, answers, float64_everywhere):
    model = make_reward_model("qwen2")
    budget = max(budget, 8 * 30) if path == "padded" else budget  # the longest is 8 * (11 + 19)
    assert_exact(model, score_answers(model, answers, max_batch_tokens=budget, path=path), answers)


def test_each_prompt_is_computed_once(make_reward_model, answers):
    model = make_reward_model("llama")
    score_answers(model, answers)  # runs the self-check first
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    score_answers(model, answers)
    assert seen == [sum(answer.packed_length for answer in answers)]


class GatedLlama(hf.LlamaForSequenceClassification):
    """A reward that is not linear in the last hidden state."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits)
        return output


class HeadlessLlama(hf.LlamaForSequenceClassification):
    """An output layer with another name."""

    def __init__(self, config):
        super().__init__(config)
        self.value = self.score
        del self.score

    def forward(self, input_ids=None, **kwargs):
        output = self.model(input_ids=input_ids, use_cache=False)
        return SequenceClassifierOutputWithPast(logits=self.value(output[0])[:, -1])


@pytest.mark.parametrize("kind", [GatedLlama, HeadlessLlama])
def test_unusual_heads_use_the_models_own_forward(kind, make_reward_model, answers, caplog):
    model = make_reward_model("llama", kind=kind)
    with caplog.at_level(logging.WARNING, "simpo"):
        found = score_answers(model, answers)
    assert (state_of(model).path, state_of(model).fused_head) == ("padded", False)
    assert "every response gets its own forward" in caplog.text
    sequences = [torch.tensor([one.prompt_ids + ids]) for one in answers for ids in one.response_ids]
    model.config.pad_token_id = None
    torch.testing.assert_close(found, torch.stack([model(input_ids=ids).logits[0, 0] for ids in sequences]))


class LookingBackMLP(nn.Module):
    """An MLP in which every token also reads the previous token, outside attention."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + 0.5 * nn.functional.pad(x, (0, 0, 1, -1)))


@pytest.mark.parametrize("std", [0.3, 0.0])
def test_a_leak_is_detected_even_with_an_untrained_head(std, make_reward_model, answers, caplog):
    model = make_reward_model("llama", torch.float32)
    model.model.layers[1].mlp = LookingBackMLP(model.model.layers[1].mlp)
    with torch.no_grad():
        model.score.weight.mul_(std)
    with caplog.at_level(logging.WARNING, "simpo"):
        score_answers(model, answers)
    assert state_of(model).path == "padded"
    assert "shared and separate hidden states differ" in caplog.text
    with pytest.raises(SimpoError, match="packed path"):
        score_answers(model, answers, path="packed")


def test_rewards_keep_their_precision_under_autocast(make_reward_model, answers):
    """The head's output is not rounded to bf16."""
    model = make_reward_model("llama", torch.float32, std=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = score_answers(model, answers)
    assert found.dtype == torch.float32
    assert (found != found.bfloat16()).any()
    expected = score_answers(model, answers)
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_models_padding_token_is_kept(make_reward_model, answers):
    model = make_reward_model("llama")
    score_answers(model, answers)
    assert model.config.pad_token_id == 0


def test_which_models_are_reward_models(make_model, make_reward_model):
    assert is_reward_model(make_reward_model("llama"))
    assert not is_reward_model(make_model("llama"))
    assert not is_reward_model(make_model("llama", kind=hf.LlamaForSequenceClassification, num_labels=2))


def test_scoring_nothing_is_an_error(make_reward_model):
    with pytest.raises(ValueError, match="at least one"):
        score_answers(make_reward_model("llama"), [])
