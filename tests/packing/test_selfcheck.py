"""Models that cannot share prompts, and models that only look as if they could."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as hf
from benchmarks.architectures import build
from packaging.version import Version
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaModel, LlamaRotaryEmbedding

from simpo.errors import SimpoError
from simpo.packing import selfcheck
from simpo.packing.attention import install, uninstall
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.model import _LANGUAGE_MODEL, choose_path, policy_logprobs, prepare_policy, state_of
from simpo.packing.scoring import score_answers, score_responses
from simpo.packing.selfcheck import rows_to_check

THROUGH_THE_CACHE = ["mamba", "falcon", "bloom", "stablelm", "lfm2"]


def gradients(logps, model):
    weight = torch.randn(logps.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(logps)
    return torch.autograd.grad(
        (logps * weight).sum(), list(model.parameters()), materialize_grads=True, allow_unused=True
    )


def assert_exact(model, comparisons, naive_logprobs):
    """Require log-probabilities and gradients equal to the model's own, to 1e-9."""
    expected = naive_logprobs(model, comparisons)
    found = policy_logprobs(model, PackedBatch.build(comparisons))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for (name, _), a, b in zip(
        model.named_parameters(), gradients(found, model), gradients(expected, model), strict=True
    ):
        assert (a - b).abs().max() <= 1e-9 * max(1.0, b.abs().max()), name


@pytest.mark.parametrize("name", THROUGH_THE_CACHE)
def test_sharing_through_the_cache_is_exact_and_logged_once(
    name, make_model, comparisons, naive_logprobs, caplog, float64_everywhere
):
    model = make_model(name)
    own = model.config._attn_implementation
    with caplog.at_level(logging.WARNING, "simpo"):
        assert_exact(model, comparisons, naive_logprobs)
        policy_logprobs(model, PackedBatch.build(comparisons[:1]))
        score_responses(model, comparisons)
    assert (state_of(model).path, state_of(model).fused_head) == ("cached", True)
    assert model.config._attn_implementation == own
    logged = [record.message for record in caplog.records if record.name.startswith("simpo")]
    assert len(logged) == 1
    assert type(model).__name__ in logged[0]
    assert "cache" in logged[0]


@pytest.fixture
def fp32_products():
    """PyTorch's precision setting for fp32 products, restored after the test."""
    yield torch.backends.cuda.matmul
    torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize("common", ["tf32", "none"])
@pytest.mark.parametrize("own", ["tf32", "none"])
def test_the_check_uses_full_fp32_even_if_a_run_allows_tf32(common, own, make_model, comparisons, fp32_products):
    """TF32 rounding exceeds the fp32 tolerance; on a GPU, torch_compile made the packed path fail the check."""
    torch.backends.fp32_precision = common
    fp32_products.fp32_precision = own
    before = fp32_products.fp32_precision
    model, seen = make_model("llama", torch.float32), set()
    model.get_input_embeddings().register_forward_hook(lambda *_: seen.add(fp32_products.fp32_precision))
    assert choose_path(model, PackedBatch.build(comparisons)) == "packed"
    assert seen == {"ieee"}
    assert fp32_products.fp32_precision == before == ("tf32" if "tf32" in (common, own) else "none")


OLD = Version(hf.__version__) < Version("5.23")


@pytest.mark.parametrize(
    "name",
    ["electra", pytest.param("rembert", marks=pytest.mark.skipif(OLD, reason="this version's decoder is not causal"))],
)
def test_a_layer_between_hidden_states_and_the_output_layer_is_supported(
    name, comparisons, naive_logprobs, float64_everywhere
):
    """The output layer's input and the hidden states have different sizes."""
    model = build(name, torch.float64, embedding_size=32, output_embedding_size=32, input_embedding_size=32)
    assert_exact(model, comparisons, naive_logprobs)
    assert not state_of(model).fused_head


@pytest.mark.parametrize(("name", "settings"), [("cpmant", {}), ("bert", {"is_decoder": False})])
def test_a_model_that_sees_its_targets_is_rejected(name, settings, comparisons):
    with pytest.raises(SimpoError, match=r"^model: \w+ is not causal"):
        policy_logprobs(build(name, **settings), PackedBatch.build(comparisons))


def test_outputs_that_do_not_match_the_tokens_are_rejected(make_model, comparisons, monkeypatch):
    model = make_model("gpt2")
    own = type(model.transformer).forward

    def longer(self, input_ids=None, **kwargs):
        return own(self, input_ids=torch.cat([input_ids[:, :1], input_ids], dim=1), **kwargs)

    monkeypatch.setattr(type(model.transformer), "forward", longer)
    with pytest.raises(SimpoError, match=r"^model: GPT2LMHeadModel returns \d+ outputs for \d+ tokens"):
        policy_logprobs(model, PackedBatch.build(comparisons))


def test_reasons_are_logged_once(make_model, comparisons, caplog):
    """The trainer repeats the check in its own precision, but does not repeat reasons."""
    model = make_model("bloom")
    with caplog.at_level(logging.WARNING, "simpo"):
        choose_path(model, PackedBatch.build(comparisons))
        choose_path(model, PackedBatch.build(comparisons))
    assert len(state_of(model).reasons) == 1
    assert len(caplog.records) == 1


def test_nothing_is_logged_for_shareable_models(make_model, comparisons, caplog):
    with caplog.at_level(logging.WARNING, "simpo"):
        policy_logprobs(make_model("llama"), PackedBatch.build(comparisons))
    assert not caplog.records


def test_a_row_too_long_to_check_is_logged(make_model, caplog):
    """The check materializes logits, which may take at most 2 GiB for the longest row."""
    model = make_model("llama")
    limit = 2**31 // (4 * model.config.vocab_size)
    lengths = [5] * 20 + [limit, limit + 1]
    with caplog.at_level(logging.WARNING, "simpo"):
        assert rows_to_check(model, lengths[:-1])[-2:] == [15, 20]
        assert not caplog.records
        assert rows_to_check(model, lengths) == [*range(16), 20]
    assert f"row 21, {limit + 1} tokens" in caplog.text


# ---- models that ignore part of the layout ----


class _Forgetful(LlamaAttention):
    def forward(self, *args, **kwargs):
        kwargs.pop("attention_layout", None)
        return super().forward(*args, **kwargs)


class ForgetfulLlama(hf.LlamaForCausalLM):
    """One of three layers does not pass the layout on."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1].self_attn.__class__ = _Forgetful


class _WithoutWindow:
    def __init__(self, config):
        self.__dict__["config"] = config

    def __getattr__(self, name):
        return None if name == "sliding_window" else getattr(self.__dict__["config"], name)


class WindowlessMistral(hf.MistralForCausalLM):
    """The window is applied in the mask only; the attention function does not receive it."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.config = _WithoutWindow(config)


class _LookingBack(LlamaMLP):
    def forward(self, x):
        return super().forward(x + 0.5 * torch.nn.functional.pad(x, (0, 0, 1, -1)))


class LookingBackLlama(hf.LlamaForCausalLM):
    """Every token also reads the previous token, outside attention (like RWKV's token shift or a short convolution)."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[2].mlp.__class__ = _LookingBack


class _CountingPositions(LlamaModel):
    def forward(self, input_ids=None, position_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, **kwargs)


class CountingLlama(hf.LlamaForCausalLM):
    """Counts positions itself and ignores those it is given."""

    def __init__(self, config):
        super().__init__(config)
        self.model.__class__ = _CountingPositions


class StrictLlama(hf.LlamaForCausalLM):
    """The backbone rejects unknown arguments."""

    def __init__(self, config):
        super().__init__(config)
        forward = self.model.forward

        def strict(
            input_ids=None,
            attention_mask=None,
            position_ids=None,
            past_key_values=None,
            inputs_embeds=None,
            use_cache=None,
        ):
            return forward(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache)

        self.model.forward = strict


@pytest.mark.parametrize(
    ("kind", "base", "path", "reason"),
    [
        (ForgetfulLlama, "llama", "cached", "2 attention calls in 3 layers"),
        (WindowlessMistral, "mistral", "cached", "sliding windows"),
        (LookingBackLlama, "llama", "padded", "differ"),
        (CountingLlama, "llama", "padded", "differ"),
        (StrictLlama, "llama", "cached", "fails on such a batch"),
    ],
)
def test_models_that_ignore_part_of_the_layout_lose_the_packed_path(
    kind, base, path, reason, make_model, comparisons, naive_logprobs, float64_everywhere
):
    model = make_model(base, kind=kind)
    assert_exact(model, comparisons, naive_logprobs)
    assert state_of(model).path == path
    assert reason in state_of(model).reasons[0]


def test_a_missing_window_is_detected_even_if_the_sample_is_shorter(make_model, random_comparisons):
    model = make_model("mistral", kind=WindowlessMistral, sliding_window=64)
    assert choose_path(model, PackedBatch.build(random_comparisons((3, (2, 2))))) == "cached"
    model = make_model("mistral", sliding_window=64)
    assert choose_path(model, PackedBatch.build(random_comparisons((3, (2, 2))))) == "packed"


# ---- deep half-precision models whose own rounding exceeds the tolerance ----


def deep(kind=hf.LlamaForCausalLM, logit_scale=2.5):
    """Build 32 layers in bf16; ``logit_scale`` multiplies the logits, and thus all rounding errors."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = kind(hf.LlamaConfig(vocab_size=1003, num_hidden_layers=32, initializer_range=0.12, **sizes)).bfloat16()
    with torch.no_grad():
        model.lm_head.weight.mul_(logit_scale)
    return model.eval()


def test_rounding_in_a_deep_model_is_not_an_error(random_comparisons, monkeypatch):
    batch = PackedBatch.build(random_comparisons((60, (21, 9)), (5, (12, 30)), (40, (12, 30))))
    # far below the model's rounding error, which depends on the processor
    monkeypatch.setitem(selfcheck._TOLERANCE, torch.bfloat16, (1e-4, 1e-3))
    monkeypatch.setattr(selfcheck, "_MAX_RELAXATION", 1)
    for most, path in ((1, "cached"), (1e4, "packed")):
        monkeypatch.setattr(selfcheck, "_MAX_RELAXATION", most)
        model = deep()
        model.set_attn_implementation("eager")  # rounds differently from the packed path
        assert choose_path(model, batch) == path


@pytest.mark.parametrize("kind", [LookingBackLlama, CountingLlama])
def test_an_error_is_detected_despite_a_deep_models_rounding(kind, random_comparisons):
    batch = PackedBatch.build(random_comparisons((60, (21, 9)), (5, (12, 30)), (40, (12, 30))))
    assert choose_path(deep(kind), batch) == "padded"


def test_the_rounding_estimate_matches_a_change_in_the_order_of_operations(random_comparisons):
    """It is slightly larger than the difference between the model's own two attention implementations."""
    model = deep(logit_scale=1)
    batch = PackedBatch.build(random_comparisons((60, (61, 39)), (5, (12, 30))))
    prepare_policy(model)
    with torch.no_grad():
        estimate = selfcheck._rounding(model, batch, _LANGUAGE_MODEL).mean()
        outputs = {}
        for attention in ("sdpa", "eager"):
            model.set_attn_implementation(attention)
            outputs[attention] = selfcheck.naive_logprobs(model, batch)
    actual = (outputs["sdpa"] - outputs["eager"]).abs().mean()
    assert actual < estimate < 3 * actual


# ---- output layers that are not just a matrix product ----


class ScaledLogitsLlama(hf.LlamaForCausalLM):
    """Multiplies its logits by a factor that is not in the configuration."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.7
        return output


class _ShiftedLinear(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.arange(self.out_features).to(x) / 20


class ShiftedLlama(hf.LlamaForCausalLM):
    """The output layer does more than a linear layer."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head.__class__ = _ShiftedLinear


@pytest.mark.parametrize("kind", [ScaledLogitsLlama, ShiftedLlama])
def test_an_unusual_output_layer_is_not_fused(
    kind, make_model, comparisons, naive_logprobs, caplog, float64_everywhere
):
    model = make_model("llama", kind=kind)
    with caplog.at_level(logging.WARNING, "simpo"):
        assert_exact(model, comparisons, naive_logprobs)
    assert (state_of(model).path, state_of(model).fused_head) == ("packed", False)
    assert "output layer" in caplog.records[0].message


@pytest.mark.parametrize("path", ["packed", "padded"])
def test_an_unusual_output_layer_is_right_on_a_requested_path(
    path, make_model, comparisons, naive_logprobs, float64_everywhere
):
    """``path`` only decides how comparisons are laid out."""
    model = make_model("llama", kind=ScaledLogitsLlama)
    expected = naive_logprobs(model, comparisons)
    found = policy_logprobs(model, PackedBatch.build(comparisons), path=path)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", THROUGH_THE_CACHE)
def test_requesting_the_packed_path_for_an_unsuitable_model_is_an_error(name, make_model, comparisons):
    """Rather than giving wrong results."""
    with pytest.raises(SimpoError, match="packed"):
        policy_logprobs(make_model(name), PackedBatch.build(comparisons), path="packed")


def test_the_check_leaves_the_model_unchanged(make_model, comparisons):
    model = make_model("llama").train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    choose_path(model, PackedBatch.build(comparisons))
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("own", ["eager", "sdpa", "flex_attention"])
def test_a_rejected_model_gets_its_own_attention_back(own, make_model):
    model = make_model("llama", attn_implementation=own)
    install(model)
    assert model.config._attn_implementation.startswith("simpo_")
    uninstall(model)
    assert model.config._attn_implementation == own


def test_a_compiled_model_keeps_the_check_of_the_original(make_model, comparisons, naive_logprobs, float64_everywhere):
    """``torch_compile: true`` wraps the model; what the check learned about the output layer must not be lost."""
    model = make_model("llama", kind=ScaledLogitsLlama)
    expected = naive_logprobs(model, comparisons)
    batch = PackedBatch.build(comparisons)
    choose_path(model, batch)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(policy_logprobs(compiled, batch, path="packed"), expected, rtol=1e-9, atol=1e-9)
    assert not state_of(model).fused_head


class OwnLlamaAttention(LlamaAttention):
    """An attention class from another module, as in models that ship their own code."""


@pytest.mark.parametrize("own", ["eager", "sdpa"])
def test_without_a_layout_an_inherited_attention_class_is_unaffected(own, make_model):
    model = make_model("llama", attn_implementation=own)
    for layer in model.model.layers:
        layer.self_attn.__class__ = OwnLlamaAttention
    ids = torch.arange(5, 25)[None]
    expected = model(ids).logits
    install(model)
    assert torch.equal(model(ids).logits, expected)


def test_a_model_without_sdpa_keeps_its_softcap_outside_packed_batches(make_model, comparisons, naive_logprobs):
    """Gemma 2 has no sdpa; under flex or flash attention, eager attention replaces it outside packed batches."""
    expected = naive_logprobs(make_model("gemma2", torch.float32, std=0.1), comparisons)
    model = make_model("gemma2", torch.float32, std=0.1, attn_implementation="flex_attention")
    install(model)
    with torch.no_grad():
        torch.testing.assert_close(naive_logprobs(model, comparisons), expected, rtol=0, atol=1e-4)


def test_a_model_with_non_finite_outputs_is_not_judged(make_model, comparisons, caplog):
    model = make_model("llama", torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    assert choose_path(model, PackedBatch.build(comparisons)) == "padded"
    assert "not finite, so nothing could be checked" in caplog.text
    assert "differ by" not in caplog.text
    assert "plain matrix product" not in caplog.text


class Expanded(torch.nn.Linear):
    """Behaves like 4-bit weights: half-precision products whose rounding depends on the number of rows."""

    compute_dtype: torch.dtype | None = None

    def forward(self, hidden):
        product = torch.nn.functional.linear(hidden.bfloat16(), self.weight.bfloat16()).float()
        return product * (1 + 2**-9 * (hidden.shape[-2] % 3 - 1))


@pytest.mark.parametrize(("computes", "path"), [(torch.bfloat16, "packed"), (None, "padded")])
def test_quantized_weights_are_judged_by_their_compute_dtype(computes, path, make_model, comparisons):
    model = make_model("llama", torch.float32, std=0.2)
    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = Expanded
        layer.mlp.down_proj.compute_dtype = computes
    assert choose_path(model, PackedBatch.build(comparisons)) == path


# ---- models whose rows depend on other rows in the batch ----


class _LongestRowRotaryEmbedding(LlamaRotaryEmbedding):
    """Computes frequencies from the longest row in a forward, which the configuration does not reveal."""

    def forward(self, x, position_ids):
        self.attention_scaling = 1.0 if position_ids.max() < 20 else 1.2
        return super().forward(x, position_ids)


class LongestLlama(hf.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.rotary_emb = _LongestRowRotaryEmbedding(config)


class LongestClassifier(hf.LlamaForSequenceClassification):
    def __init__(self, config):
        super().__init__(config)
        self.model.rotary_emb = _LongestRowRotaryEmbedding(config)


@pytest.mark.parametrize("path", ["auto", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_depends_on_the_longest_row_computes_rows_separately(
    make_model, random_comparisons, naive_logprobs, caplog, path, dtype
):
    """The longest row is the last of many, so checking only the first ones would miss it."""
    model = make_model("llama", dtype, kind=LongestLlama).eval()
    rows = random_comparisons(*[(4, (5, 3))] * 20, (15, (9, 4)), (15, (2, 14)), seed=3)
    with caplog.at_level(logging.WARNING, "simpo"):
        found = score_responses(model, rows, path=path).logp
    assert (state_of(model).path, state_of(model).separate_rows) == ("padded", True)
    assert any("gets its own forward" in record.message for record in caplog.records)
    expected = torch.stack([logps.sum() for logps in naive_logprobs(model, rows).split(_sizes(rows))])
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=1e-4)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), parameters),
        torch.autograd.grad((expected * weight).sum(), parameters),
        strict=True,
    ):
        assert (a - b).abs().max() <= 1e-4 * max(1.0, float(b.abs().max()))


def _sizes(rows):
    return [len(response) for row in rows for response in row.response_ids]


def test_a_reward_model_that_depends_on_the_longest_row_computes_rows_separately(make_model, random_comparisons):
    model = make_model("llama", torch.float32, kind=LongestClassifier, num_labels=1).eval()
    rows = random_comparisons((4, (5, 3)), (15, (9, 4)), (15, (2, 14)), (3, (2, 2)))
    with torch.no_grad():
        together = score_answers(model, rows)
        alone = torch.cat(
            [score_answers(model, [TokenizedComparison(r.prompt_ids, [y])]) for r in rows for y in r.response_ids]
        )
    assert (state_of(model).path, state_of(model).separate_rows) == ("padded", True)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "mistral", "mixtral", "gemma3", "opt", "bloom", "falcon", "mamba", "lfm2"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_does_not_count_as_dependence_on_other_rows(make_model, comparisons, name, dtype):
    model = make_model(name, dtype, std=0.1)
    choose_path(model, PackedBatch.build(comparisons))
    assert not state_of(model).separate_rows
