"""Fused log-probabilities against ``log_softmax``, forward and backward."""

from __future__ import annotations

import pytest
import torch

from simpo.packing.logprobs import Head, fused_logprobs

ROWS, WIDTH, VOCABULARY = 7, 8, 37
CHUNKS = {"one row at a time": 1, "three rows": 3 * VOCABULARY * 8, "kept logits": None}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 3.0},
}


def inputs(dtype=torch.float64, *, bias: bool = False, frozen: tuple[str, ...] = (), **style):
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (ROWS, WIDTH), "weight": (VOCABULARY, WIDTH)} | ({"bias": (VOCABULARY,)} if bias else {})
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(name not in frozen)
        for name, shape in shapes.items()
    }
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return tensors, targets, style


def naive(tensors, targets, style):
    logits = tensors["hidden"] @ tensors["weight"].T
    if "bias" in tensors:
        logits = logits + tensors["bias"]
    logits = logits * style.get("scale", 1.0)
    if "softcap" in style:
        logits = style["softcap"] * torch.tanh(logits / style["softcap"])
    return torch.log_softmax(logits, dim=-1)[torch.arange(len(targets)), targets]


def fused(tensors, targets, style, chunk_bytes):
    head = Head(tensors["weight"], tensors.get("bias"), **style)
    return fused_logprobs(tensors["hidden"], head, targets, chunk_bytes=chunk_bytes)


def gradients(logps, tensors, **options):
    wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]
    weight = torch.linspace(-1, 2, len(logps), dtype=torch.float64).to(logps)
    return torch.autograd.grad((logps * weight).sum(), wanted, **options)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    ("head", "frozen"),
    [(head, frozen) for head in HEADS for frozen in ((), ("weight",), ("hidden",))]
    + [("all", ("weight", "bias")), ("bias", ("bias",))],
)
def test_log_probabilities_equal_log_softmax(head, chunk, frozen):
    tensors, targets, style = inputs(frozen=frozen, **HEADS[head])
    expected, found = naive(tensors, targets, style), fused(tensors, targets, style, CHUNKS[chunk])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    pairs = list(zip(gradients(found, tensors), gradients(expected, tensors), strict=True))
    assert len(pairs) == len(tensors) - len(frozen)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("head", HEADS)
def test_gradients_pass_gradcheck(head, chunk):
    tensors, targets, style = inputs(**HEADS[head])

    def function(*values):
        return fused(dict(zip(tensors, values, strict=True)), targets, style, CHUNKS[chunk])

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=False)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("head", ["plain", "all"])
def test_a_second_backward_gives_the_same_gradients(head, chunk):
    tensors, targets, style = inputs(**HEADS[head])
    logps = fused(tensors, targets, style, CHUNKS[chunk])
    first = gradients(logps, tensors, retain_graph=True)
    second = gradients(logps, tensors)
    expected = gradients(naive(tensors, targets, style), tensors)
    for a, b, c in zip(first, second, expected, strict=True):
        torch.testing.assert_close(a, c, rtol=0, atol=1e-9)
        torch.testing.assert_close(b, c, rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("head", ["plain", "all"])
def test_bf16_is_close_to_fp32(head, chunk):
    tensors, targets, style = inputs(torch.bfloat16, **HEADS[head])
    exact = {name: tensor.detach().float().requires_grad_() for name, tensor in tensors.items()}
    expected, found = naive(exact, targets, style), fused(tensors, targets, style, CHUNKS[chunk])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)
    for a, b in zip(gradients(found, tensors), gradients(expected, exact), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() <= 0.02 * b.norm()


def test_chunks_are_summed_in_fp32():
    """A bf16 weight's gradient is as accurate from many chunks as from one; in bf16, 1 + 1000 * 2**-10 would stay 1."""
    rows, width, vocabulary = 1000, 4, 8
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(rows, width, generator=generator).to(torch.bfloat16)
    weight = torch.randn(vocabulary, width, generator=generator).to(torch.bfloat16).requires_grad_()
    targets = torch.zeros(rows, dtype=torch.long)
    (found,) = torch.autograd.grad(fused_logprobs(hidden, Head(weight), targets, chunk_bytes=1).sum(), weight)
    exact = weight.detach().float().requires_grad_()
    logps = torch.log_softmax(hidden.float() @ exact.T, dim=-1)[:, 0]
    (expected,) = torch.autograd.grad(logps.sum(), exact)
    assert ((found.float() - expected).abs() <= 0.01 * expected.abs().max()).all()


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("head", ["plain", "all"])
def test_autocast_uses_bf16_products_only(head, chunk):
    """Everything else is fp32, and gradients have the dtypes of the inputs."""
    tensors, targets, style = inputs(torch.float32, **HEADS[head])
    rounded = {name: tensor.detach().bfloat16().double().requires_grad_() for name, tensor in tensors.items()}
    expected = naive(rounded, targets, style)
    with torch.autocast("cpu", torch.bfloat16):
        found = fused(tensors, targets, style, CHUNKS[chunk])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.1)
    for a, b in zip(gradients(found, tensors), gradients(expected, rounded), strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b).norm() <= 0.02 * b.norm()


def test_extreme_logits_stay_finite():
    tensors, targets, style = inputs(torch.float32)
    large = {name: (tensor.detach() * 100).requires_grad_() for name, tensor in tensors.items()}
    logps = fused(large, targets, style, 1)
    torch.testing.assert_close(logps, naive(large, targets, style), rtol=1e-5, atol=1e-2)
    assert all(gradient.isfinite().all() for gradient in gradients(logps, large))


def test_no_token_by_vocabulary_tensor_is_saved():
    """Backward needs only the inputs, one number per row, and the logits of one chunk."""
    tensors, targets, style = inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda t: t):
        logps = fused(tensors, targets, style, 1)
    assert (ROWS, VOCABULARY) not in saved
    assert logps.grad_fn.kept.shape == (1, VOCABULARY)
    assert fused(tensors, targets, style, CHUNKS["three rows"]).grad_fn.kept.shape == (1, VOCABULARY)
    assert fused(tensors, targets, style, 6 * VOCABULARY * 8).grad_fn.kept.shape == (3, VOCABULARY)  # chunks of 4 and 3
    assert fused(tensors, targets, style, None).grad_fn.kept.shape == (ROWS, VOCABULARY)
