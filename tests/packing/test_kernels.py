"""Attention over a packed batch: the definition against a dense mask, and kernels against the definition."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.nn.attention import varlen as torch_varlen

from simpo.packing import attention as kernels
from simpo.packing.attention import AttentionStyle, UnsupportedAttentionError, by_segment, shared_prefix_attention
from simpo.packing.layout import AttentionLayout, Span

LAYOUT = AttentionLayout((Span(5, (3, 9)), Span(1, (1, 2, 1)), Span(12, (4,))))
HEADS, WIDTH, SCALE = 4, 16, 0.3
STYLES = {
    "plain": {},
    "window": {"window": 4},
    "window of one": {"window": 1},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "all": {"window": 4, "softcap": 1.5, "sinks": True},
}
every_style = pytest.mark.parametrize("style", STYLES)
every_grouping = pytest.mark.parametrize("kv_heads", [4, 2, 1])


def inputs(kv_heads: int, dtype=torch.float64, layout=LAYOUT) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, layout.total, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (HEADS, kv_heads, kv_heads)
    ]


def style_of(name: str, dtype=torch.float64) -> AttentionStyle:
    settings = dict(STYLES[name])
    if settings.get("sinks"):
        settings["sinks"] = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=dtype, requires_grad=True)
    return AttentionStyle(SCALE, **settings)


def dense(query, key, value, layout, style):
    """Apply one softmax per query and head over its visible keys, which a loop over tokens determines."""
    places = []  # (comparison, part, position)
    for c, span in enumerate(layout.spans):
        places += [(c, 0, i) for i in range(span.prompt)]
        for k, size in enumerate(span.responses):
            places += [(c, k + 1, span.prompt + i) for i in range(size)]
    window = style.window or len(places)
    rows = []
    for i, (c, part, position) in enumerate(places):
        seen = [
            j
            for j, (other, kind, place) in enumerate(places)
            if other == c and kind in (0, part) and position - window < place <= position
        ]
        heads = []
        for h in range(query.shape[1]):
            group = h * key.shape[1] // query.shape[1]
            scores = key[0, group, seen] @ query[0, h, i] * style.scale
            if style.softcap is not None:
                scores = style.softcap * torch.tanh(scores / style.softcap)
            if style.sinks is not None:
                scores = torch.cat([scores, style.sinks[h : h + 1]])
            heads.append(torch.softmax(scores, dim=0)[: len(seen)] @ value[0, group, seen])
        rows.append(torch.stack(heads))
    return torch.stack(rows)[None]


def with_gradients(kernel, tensors, layout, style):
    output = kernel(*tensors, layout, style)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(output)
    wanted = tensors if style.sinks is None else [*tensors, style.sinks]
    return [output, *torch.autograd.grad((output * weight).sum(), wanted)]


@every_style
@every_grouping
def test_by_segment_equals_the_dense_definition(style, kv_heads):
    tensors, chosen = inputs(kv_heads), style_of(style)
    found = with_gradients(by_segment, tensors, LAYOUT, chosen)
    for a, b in zip(found, with_gradients(dense, tensors, LAYOUT, chosen), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@every_style
@every_grouping
def test_flex_equals_by_segment(style, kv_heads):
    """Forward only, because FlexAttention has no backward on a CPU."""
    with torch.no_grad():
        chosen = style_of(style, torch.float32)
        tensors = [tensor.detach() for tensor in inputs(kv_heads, torch.float32)]
        found = kernels.flex(*tensors, LAYOUT, chosen)
        torch.testing.assert_close(found, by_segment(*tensors, LAYOUT, chosen), rtol=1e-5, atol=1e-5)


def documented_varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """Stand in for ``varlen_attn`` as documented: per sequence, bottom-right aligned, ``(left, right)`` windows."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.is_contiguous()
    assert enable_gqa or query.shape[1] == key.shape[1] or not kernels._GROUPED
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    starts, ends = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert (starts[-1], ends[-1]) == (len(query), len(key))
    left, right = window_size
    outputs = []
    for n in range(len(starts) - 1):
        q, k, v = query[starts[n] : starts[n + 1]], key[ends[n] : ends[n + 1]], value[ends[n] : ends[n + 1]]
        assert len(q) <= max_q
        assert len(k) <= max_k
        at = torch.arange(len(k) - len(q), len(k))[:, None]
        other = torch.arange(len(k))
        seen = torch.ones(len(q), len(k), dtype=torch.bool)
        if left >= 0:
            seen &= other >= at - left
        if right >= 0:
            seen &= other <= at + right
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


@pytest.mark.parametrize("style", ["plain", "window", "window of one"])
@every_grouping
def test_varlen_equals_by_segment(style, kv_heads, monkeypatch):
    monkeypatch.setattr(torch_varlen, "varlen_attn", documented_varlen_attn)
    tensors, chosen = inputs(kv_heads), style_of(style)
    found = with_gradients(kernels.varlen, tensors, LAYOUT, chosen)
    for a, b in zip(found, with_gradients(by_segment, tensors, LAYOUT, chosen), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# ---- the check before a kernel is used ----


def leaking(query, key, value, layout, style):
    """Treat a comparison as one causal sequence, so that the second response sees the first."""
    whole = AttentionLayout(tuple(Span(span.prompt, (sum(span.responses),)) for span in layout.spans))
    return by_segment(query, key, value, whole, style)


def top_left(query, key, value, layout, style):
    """Align the causal mask top-left, so that a response sees the start of its prompt but not itself."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1)[:, :, layout.index.key_index] for states in (key, value))
    queries = query.split(layout.query_sizes, 2)
    keys, values = key.split(layout.key_sizes, 2), value.split(layout.key_sizes, 2)
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=style.scale)
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def windowless(query, key, value, layout, style):
    return by_segment(query, key, value, layout, AttentionStyle(style.scale, None, style.softcap, style.sinks))


def sinkless(query, key, value, layout, style):
    return by_segment(query, key, value, layout, AttentionStyle(style.scale, style.window, style.softcap))


def half_a_gradient(query, key, value, layout, style):
    """Compute the right forward but drop the gradient of half the keys."""
    kept = torch.arange(key.shape[2])[:, None] % 2 == 0
    return by_segment(query, torch.where(kept, key, key.detach()), value, layout, style)


def not_a_number(query, key, value, layout, style):
    return by_segment(query, key, value, layout, style) * float("nan")


def broken(query, key, value, layout, style):
    raise RuntimeError("no such kernel on this device")


def agrees(kernel, dtype=torch.float32, window=16, softcap=None, sinks=False) -> bool:
    style = AttentionStyle(0.25, window, softcap)
    return kernels._is_correct(kernel, torch.device("cpu"), dtype, (4, 2, 16), style, sinks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "softcap", "sinks"), [(None, None, False), (16, None, False), (16, 2.0, True)])
def test_the_definition_passes_its_own_check(dtype, window, softcap, sinks, caplog):
    kernels._is_correct.cache_clear()
    with caplog.at_level(logging.WARNING, "simpo"):
        assert agrees(by_segment, dtype, window, softcap, sinks)
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kernel", "named"),
    [
        (leaking, "output, d_query, d_key, d_value"),
        (top_left, "output"),
        (windowless, "output"),
        (sinkless, "output"),
        (half_a_gradient, "has wrong d_key;"),
        (not_a_number, "output"),
        (broken, "no such kernel on this device"),
    ],
)
def test_a_wrong_kernel_is_rejected_and_reported_once(kernel, named, dtype, caplog):
    kernels._is_correct.cache_clear()
    with caplog.at_level(logging.WARNING, "simpo"):
        assert not agrees(kernel, dtype, sinks=kernel is sinkless)
        assert not agrees(kernel, dtype, sinks=kernel is sinkless)
    (record,) = caplog.records
    assert kernel.__name__ in record.message
    assert named in record.message


@pytest.mark.parametrize(
    ("dtype", "style", "expected"),
    [
        (torch.bfloat16, {}, "varlen"),
        (torch.float16, {"window": 4}, "varlen"),
        (torch.float32, {}, None),  # float32 and float64 always use the definition
        (torch.bfloat16, {"softcap": 2.0}, "flex"),
        (torch.float32, {"sinks": torch.zeros(HEADS)}, "flex"),
        (torch.bfloat16, {"dropout": 0.1}, None),
    ],
)
def test_the_kernel_depends_on_dtype_and_style(dtype, style, expected, monkeypatch):
    assert kernels.choose_kernel(*inputs(2, dtype), AttentionStyle(SCALE, **style)) is None  # on a CPU
    monkeypatch.setattr(kernels, "_DEVICE", "cpu")
    monkeypatch.setattr(kernels, "_is_correct", lambda *_: True)
    kernel = kernels.choose_kernel(*inputs(2, dtype), AttentionStyle(SCALE, **style))
    assert (kernel and kernel.__name__) == expected
    monkeypatch.setattr(kernels, "_is_correct", lambda *_: False)
    assert kernels.choose_kernel(*inputs(2, dtype), AttentionStyle(SCALE, **style)) is None


def test_the_check_uses_a_window_shorter_than_the_sample(monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "_DEVICE", "cpu")
    monkeypatch.setattr(kernels, "_is_correct", lambda *arguments: asked.append(arguments[4].window))
    for window in (None, 4, 4096):
        kernels.choose_kernel(*inputs(2, torch.bfloat16), AttentionStyle(SCALE, window))
    assert asked == [None, 4, 24]


@pytest.mark.parametrize(
    "arguments", [{"is_causal": False}, {"position_bias": torch.zeros(1)}, {"head_mask": torch.ones(1)}]
)
def test_unsupported_arguments_are_rejected(arguments):
    with pytest.raises(UnsupportedAttentionError):
        shared_prefix_attention(torch.nn.Identity(), *inputs(2), None, layout=LAYOUT, **arguments)


def test_shapes_that_do_not_match_the_layout_are_rejected():
    query, key, value = inputs(2)
    with pytest.raises(UnsupportedAttentionError, match="packed batch of 38 tokens"):
        shared_prefix_attention(torch.nn.Identity(), query[:, :, 1:], key, value, None, layout=LAYOUT)


def test_dropout_applies_to_attention_weights():
    """Remaining weights are scaled up, also in the special path, so the mean does not change."""
    for style in ({}, {"softcap": 50.0}):
        query, key, value = (tensor.detach() for tensor in inputs(4))
        torch.manual_seed(0)
        dropped = AttentionStyle(SCALE, dropout=0.5, **style)
        mean = torch.stack([by_segment(query, key, value, LAYOUT, dropped) for _ in range(200)]).mean(0)
        exact = by_segment(query, key, value, LAYOUT, AttentionStyle(SCALE, **style))
        assert (mean - exact).abs().mean() < 0.07
        assert not torch.equal(by_segment(query, key, value, LAYOUT, dropped), exact)
