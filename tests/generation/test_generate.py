"""Sampled tokens against transformers' unpadded ``generate``, and log-probabilities against ``score_responses``."""

import copy
import logging

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from simpo import TokenizedComparison, score_responses
from simpo.generation.engine import TransformersEngine, ignored_settings
from simpo.generation.settings import SamplingSettings
from simpo.world.pairs import make_model as make_world_model
from simpo.world.pairs import make_tokenizer

PROMPTS = [[5, 6, 7], [9] * 11, [4], [8, 3, 8, 3, 8, 3]]


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer without a chat template and with EOS 1, so that a model with 61 tokens can sample all others."""
    tokenizer = make_tokenizer(["a few words"])
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(params=["llama", "gpt2", "mistral", "opt", "gemma2", "falcon"])
def model(request, make_model):
    return make_model(request.param, torch.float32, std=0.15)


def settings(**changes):
    return SamplingSettings(**{"max_new_tokens": 12} | changes)


def test_greedy_answers_match_unpadded_generation(model, tokenizer):
    engine = TransformersEngine(model, tokenizer)
    found = engine.generate(PROMPTS, settings(temperature=0), seed=0)
    model.eval()
    for prompt, sampled in zip(PROMPTS, found, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=engine.stop_ids, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert sampled.ids == expected
        assert sampled.finished == (expected[-1] in engine.stop_ids)


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.5, "top_k": 7}, {"temperature": 0}, {"temperature": 1.7}])
def test_log_probabilities_are_the_models_own(model, tokenizer, changes):
    found = TransformersEngine(model, tokenizer).generate(PROMPTS, settings(**changes), seed=3)
    comparisons = [TokenizedComparison(p, [s.ids]) for p, s in zip(PROMPTS, found, strict=True)]
    model.eval()
    with torch.no_grad():
        scored = score_responses(model, comparisons)
    assert torch.allclose(torch.tensor([s.logp for s in found]), scored.logp, atol=1e-4)
    # the same model after packed forwards
    assert TransformersEngine(model, tokenizer).generate(PROMPTS, settings(**changes), seed=3) == found


def test_rows_end_at_their_own_stop_token(make_model, tokenizer):
    model = make_model("llama", torch.float32, std=0.05)
    engine = TransformersEngine(model, tokenizer)
    found = engine.generate([[5, 6]] * 400, settings(temperature=1.0, top_p=1.0), seed=0)
    lengths = {len(sampled.ids) for sampled in found if sampled.finished}
    assert len(lengths) > 5
    for sampled in found:
        assert sampled.finished == (sampled.ids[-1] in engine.stop_ids)
        assert sampled.finished or len(sampled.ids) == 12
        assert not set(sampled.ids[:-1]) & set(engine.stop_ids)


def test_tokens_are_sampled_with_their_probabilities(make_model, tokenizer):
    """Temperature, top-k and top-p for the first token in closed form, with 20,000 samples."""
    model = make_model("llama", torch.float32, std=0.2)
    chosen = settings(temperature=0.7, top_p=0.8, top_k=9, max_new_tokens=1)
    draws = TransformersEngine(model, tokenizer).generate([[5, 6, 7]] * 20_000, chosen, seed=1)
    frequency = torch.bincount(torch.tensor([sampled.ids[0] for sampled in draws]), minlength=61) / len(draws)
    model.eval()
    with torch.no_grad():
        scores = model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.7
    best = scores.topk(9)
    p = torch.softmax(best.values, dim=-1)
    keep = p.cumsum(0) - p < 0.8
    expected = torch.zeros(61).index_put((best.indices[keep],), p[keep] / p[keep].sum())
    assert (frequency[expected == 0] == 0).all()
    assert torch.allclose(frequency, expected, atol=0.015)


def test_the_seed_determines_the_responses(make_model, tokenizer):
    engine = TransformersEngine(make_model("llama", torch.float32), tokenizer)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = engine.generate(PROMPTS, settings(), seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert engine.generate(PROMPTS, settings(), seed=5) == first
    assert engine.generate(PROMPTS, settings(), seed=6) != first


def test_the_checkpoints_sampling_settings_are_reported_and_not_used(make_model, tokenizer, caplog):
    model = make_model("llama", torch.float32)
    plain = TransformersEngine(model, tokenizer).generate(PROMPTS, settings(), seed=5)
    own = model.generation_config
    own.update(repetition_penalty=5.0, min_p=0.4, suppress_tokens=[3], temperature=9.0)
    engine = TransformersEngine(model, tokenizer)
    logged = [record.getMessage() for record in caplog.records if record.name == "simpo.generation.engine"]
    assert len(logged) == 1 and "repetition_penalty 5.0" in logged[0] and "temperature" not in logged[0]
    assert set(ignored_settings(own)) == {"repetition_penalty 5.0", "min_p 0.4", "suppress_tokens [3]"}
    assert engine.generate(PROMPTS, settings(), seed=5) == plain
    assert model.generation_config is own and model.training


def test_stop_tokens_come_from_template_tokenizer_and_checkpoint(make_model):
    tokenizer = make_tokenizer(["a few words"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|user|>' }}{% endfor %}"
    model = make_model("llama", torch.float32)
    model.generation_config.eos_token_id = [40, 41]
    end = tokenizer.convert_tokens_to_ids("<|user|>")
    assert TransformersEngine(model, tokenizer).stop_ids == sorted([tokenizer.eos_token_id, end, 40, 41])


def test_an_adapter_samples_from_its_own_distribution(make_model, tokenizer):
    model = make_model("llama", torch.float32, std=0.15)
    base = TransformersEngine(model, tokenizer).generate(PROMPTS, settings(), seed=3)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    found = TransformersEngine(adapted, tokenizer).generate(PROMPTS, settings(), seed=3)
    assert found != base
    with torch.no_grad():
        scored = score_responses(
            adapted.eval(), [TokenizedComparison(p, [s.ids]) for p, s in zip(PROMPTS, found, strict=True)]
        )
    assert torch.allclose(torch.tensor([s.logp for s in found]), scored.logp, atol=1e-4)


def test_a_model_in_training_mode_samples_the_same(tokenizer):
    """With dropout and gradient checkpointing, as a trainer leaves it."""
    model = make_world_model(tokenizer, seed=0)
    engine = TransformersEngine(model, tokenizer)
    plain = engine.generate(PROMPTS, settings(), seed=3)
    model.train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    score_responses(model, [TokenizedComparison(PROMPTS[0], [[5, 6]])]).logp.sum().backward()
    assert engine.generate(PROMPTS, settings(), seed=3) == plain
    assert model.training


# ---- models whose answers depend on padding or on other prompts in a batch ----

_SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 1}
_DECODER = _SIZES | {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24, "factor": 4.0}
_LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
_CHUNKED = {"attention_chunk_size": 16, "no_rope_layers": [1, 0], "num_local_experts": 2}
_RECURRENT = {"num_hidden_layers": 3, "head_dim": 8}  # two recurrent layers and one attention layer
DEPENDENT = {  # and which prompts can be generated together
    "phi3": (hf.Phi3Config, {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 24}, "equal"),
    "llama": (hf.LlamaConfig, {"rope_parameters": _DYNAMIC, "max_position_embeddings": 24}, "equal"),
    "llama4": (hf.Llama4TextConfig, _CHUNKED | {"head_dim": 8, "intermediate_size_mlp": 48}, "equal"),
    "minimax": (hf.MiniMaxConfig, {"head_dim": 8, "num_local_experts": 2, "block_size": 16}, None),
    "recurrent_gemma": (hf.RecurrentGemmaConfig, _RECURRENT | {"lru_width": 32, "attention_window_size": 8}, "equal"),
    "rwkv": (hf.RwkvConfig, {"attention_hidden_size": 32, "context_length": 128}, "none"),
}
# short ones, one that crosses 24 tokens while being answered, and one that starts beyond
MIXED = [*PROMPTS, list(range(10, 30)), list(range(5, 40)), [6, 7, 8]]


@pytest.mark.parametrize("name", DEPENDENT)
@pytest.mark.parametrize("changes", [{"temperature": 0}, {"temperature": 1.0, "top_p": 1.0}])
def test_answers_equal_those_of_each_prompt_alone(name, changes, tokenizer, caplog):
    kind, changed, together = DEPENDENT[name]
    base = _SIZES if name == "rwkv" else _DECODER
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(kind(**base | changed)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    untouched = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING, "simpo"):
        engine = TransformersEngine(model, tokenizer)
        found = engine.generate(MIXED, settings(**changes), seed=5)
        assert engine.generate(MIXED, settings(**changes), seed=5) == found
    if together is not None:
        logged = [record.message for record in caplog.records if type(model).__name__ in record.message]
        assert len(logged) == 1
        assert ("of equal length" if together == "equal" else "one at a time") in logged[0]
    for prompt, sampled in zip(MIXED, found, strict=True):
        alone = copy.deepcopy(untouched)
        # force the sampled tokens, so that log-probabilities refer to the same tokens
        step = iter(sampled.ids)
        scores = []

        def force(ids, logits, scores=scores, step=step):
            scores.append(logits.log_softmax(-1))
            return torch.full_like(logits, float("-inf")).index_fill_(1, torch.tensor([next(step)]), 0.0)

        again = alone.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=len(sampled.ids),
            eos_token_id=engine.stop_ids,
            pad_token_id=0,
            logits_processor=hf.LogitsProcessorList([force]),
        )[0, len(prompt) :].tolist()
        assert again == sampled.ids
        logps = torch.cat(scores)
        assert logps.gather(1, torch.tensor(again)[:, None]).sum().item() == pytest.approx(
            sampled.logp, abs=1e-5, rel=1e-6
        )
        if changes["temperature"] == 0:
            assert logps.argmax(1).tolist() == sampled.ids


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "mixtral", "gemma3", "bloom", "mamba", "lfm2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_models_generate_in_one_batch(name, dtype, make_model, tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "simpo"):
        TransformersEngine(make_model(name, dtype, std=0.1), tokenizer).generate(PROMPTS, settings(), seed=0)
    assert not [record for record in caplog.records if "prompts are processed" in record.message]


def test_answers_to_one_prompt_differ_without_batching(tokenizer):
    torch.manual_seed(0)
    model = hf.RwkvForCausalLM(hf.RwkvConfig(**_SIZES, attention_hidden_size=32, context_length=128)).eval()
    found = TransformersEngine(model, tokenizer).generate([[5, 6, 7]] * 4, settings(temperature=1.0), seed=1)
    assert len({tuple(sampled.ids) for sampled in found}) == 4
