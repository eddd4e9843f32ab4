"""FLOP counts against PyTorch's own counter, forward and backward."""

from __future__ import annotations

import pytest
import torch
from benchmarks.arithmetic import Forward, Product, Shape, necessary_flops, packed_forward, padded_forward
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from simpo.packing import logprobs
from simpo.packing.layout import PackedBatch, PaddedRows, TokenizedComparison
from simpo.packing.model import choose_path, policy_logprobs

COMPARISONS = [
    TokenizedComparison([1, 2, 3, 4], [[5, 6, 7], [8, 9]]),
    TokenizedComparison([1, 2], [[3], [4, 5, 6, 7, 8]]),
]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    choose_path(model, PackedBatch.build(COMPARISONS))  # run the self-check first, so that it is not counted
    return model


def counted(function) -> int:
    """Return PyTorch's count for the forward and backward of ``function``, with attention as explicit products."""
    in_place = {torch.ops.aten.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        function().sum().backward()
    # some versions of transformers compute rotary angles, a few numbers per token, with a matrix product
    angles = (sum(found.values()) for name, found in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - sum(angles)


def expected(model: LlamaForCausalLM, forward: Forward) -> int:
    return forward.flops(Shape.of(model.config))


def test_packed_flops_with_kept_logits_match_pytorch(model) -> None:
    batch = PackedBatch.build(COMPARISONS)
    found = counted(lambda: policy_logprobs(model, batch, path="packed"))
    assert found == expected(model, packed_forward(COMPARISONS))


@pytest.mark.parametrize(("rows", "unit"), [(1, 2), (4, 8), (6, 12)])
def test_packed_flops_with_recomputed_logits_match_pytorch(rows, unit, model, monkeypatch) -> None:
    monkeypatch.setattr(logprobs, "CPU_CHUNK", 128 * unit)
    monkeypatch.setattr(logprobs, "MEBIBYTE", unit)  # a chunk has 128 units, and a row takes 4 * 61 bytes
    batch = PackedBatch.build(COMPARISONS)
    found = counted(lambda: policy_logprobs(model, batch, path="packed"))
    assert found == expected(model, packed_forward(COMPARISONS, chunk_rows=rows))


def test_padded_flops_with_scored_logits_match_pytorch(model) -> None:
    batch = PackedBatch.build(COMPARISONS)
    found = counted(lambda: policy_logprobs(model, batch, path="padded"))
    assert found == expected(model, padded_forward(COMPARISONS, all_logits=False))


def test_padded_flops_with_all_logits_match_pytorch(model) -> None:
    rows = PaddedRows.unpack(PackedBatch.build(COMPARISONS))
    found = counted(lambda: model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits)
    assert found == expected(model, padded_forward(COMPARISONS, all_logits=True))


def test_recomputation_costs_one_more_head_product(model) -> None:
    shape = Shape.of(model.config)
    kept, again = packed_forward(COMPARISONS), packed_forward(COMPARISONS, chunk_rows=0)
    assert again.flops(shape) - kept.flops(shape) == Product(11, 24, 61).flops


def test_sharing_saves_the_cost_of_the_prompt() -> None:
    shape = Shape(hidden=8, layers=3, heads=2, kv_heads=1, head_size=4, intermediate=16, vocabulary=32)
    alike = [TokenizedComparison(list(range(9)), [[1, 2], [3, 4]])]
    packed, padded = packed_forward(alike), padded_forward(alike, all_logits=False)
    assert (packed.tokens, padded.tokens) == (13, 22)
    assert padded.scored == packed.scored == 4
    assert packed.flops(shape) < padded.flops(shape) < padded_forward(alike, all_logits=True).flops(shape)


def test_pairs_hidden_by_a_causal_mask_are_not_necessary() -> None:
    """Counts visible query-key pairs one by one."""
    shape = Shape(hidden=8, layers=3, heads=2, kv_heads=1, head_size=4, intermediate=16, vocabulary=32)
    forward = packed_forward(COMPARISONS)
    visible = sum(
        key <= query + keys - queries
        for _, queries, keys in forward.segments
        for query in range(queries)
        for key in range(keys)
    )
    square = sum(queries * keys for _, queries, keys in forward.segments)
    per_pair = 3 * 2 * 2 * shape.heads * shape.head_size * shape.layers  # passes; products; a multiply and an add
    assert necessary_flops(COMPARISONS, shape) == forward.flops(shape) - (square - visible) * per_pair
    assert visible == 28 + 2 * 4 + 3 + 6 + 5 * 2 + 15  # 7 and 3 in causal segments; 2 and 5 after prompts of 4 and 2
