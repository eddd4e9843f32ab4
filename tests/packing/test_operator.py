"""Attention as a custom operator against the same attention through autograd."""

from __future__ import annotations

import pytest
import torch

from simpo.packing.attention import AttentionStyle, by_segment, by_segment_operator
from simpo.packing.layout import AttentionLayout, Span

LAYOUT = AttentionLayout((Span(5, (3, 9)), Span(1, (1, 2, 1)), Span(12, (4,))))
STYLES = {
    "plain": {},
    "window": {"window": 4},
    "softcap": {"softcap": 1.5},
    "sinks and window": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64), "window": 4},
}


def states(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, LAYOUT.total, 16) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def outcome(attention, style: str, dtype: torch.dtype) -> list[torch.Tensor]:
    settings = dict(STYLES[style])
    inputs = [tensor.requires_grad_() for tensor in states(dtype)]
    if "sinks" in settings:
        settings["sinks"] = settings["sinks"].to(dtype).requires_grad_()
        inputs.append(settings["sinks"])
    output = attention(*inputs[:3], LAYOUT, AttentionStyle(0.3, **settings))
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(output)
    return [output, *torch.autograd.grad((output * weight).sum(), inputs)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_the_operator_equals_by_segment(style, dtype):
    found, expected = outcome(by_segment_operator, style, dtype), outcome(by_segment, style, dtype)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert len(found) == (5 if "sinks" in style else 4)


@pytest.mark.parametrize("style", STYLES)
def test_the_operator_passes_pytorchs_opcheck(style):
    """Schema, autograd registration and fake tensors, with static and dynamic sizes."""
    settings = STYLES[style]
    inputs = [tensor.requires_grad_() for tensor in states()]
    arguments = (
        *inputs,
        settings.get("sinks"),
        list(LAYOUT.index),
        0.3,
        settings.get("window"),
        settings.get("softcap"),
    )
    found = torch.library.opcheck(torch.ops.simpo.attention_by_segment.default, arguments)
    assert set(found.values()) == {"SUCCESS"}


def test_the_index_encodes_the_layout():
    assert AttentionLayout.of_index(LAYOUT.index) == LAYOUT
