"""The exact KL divergence against its definition, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simpo.packing.logprobs import Head, fused_entropy, fused_kl, fused_log_collision

ROWS, WIDTH, VOCABULARY = 7, 8, 37
CHUNKS = {"one row at a time": 1, "three rows": 3 * VOCABULARY * 8, "all rows": None}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 3.0},
}


def tensors(seed=0, *, dtype=torch.float64, rows=ROWS, bias=False, frozen=(), **_):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (rows, WIDTH), "weight": (VOCABULARY, WIDTH)} | ({"bias": (VOCABULARY,)} if bias else {})
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(name not in frozen)
        for name, shape in shapes.items()
    }


def head_of(given, style):
    return Head(given["weight"], given.get("bias"), style.get("scale", 1.0), style.get("softcap"))


def naive(policy, reference, style):
    """Return KL(policy || reference) from the full ``[S, V]`` logits."""
    logps = []
    for given in (policy, {name: tensor.detach() for name, tensor in reference.items()}):
        logits = given["hidden"] @ given["weight"].T
        if "bias" in given:
            logits = logits + given["bias"]
        logits = logits * style.get("scale", 1.0)
        if "softcap" in style:
            logits = style["softcap"] * torch.tanh(logits / style["softcap"])
        logps.append(torch.log_softmax(logits, dim=-1))
    return torch.nn.functional.kl_div(logps[1], logps[0], reduction="none", log_target=True).sum(-1)


def fused(policy, reference, style, chunk):
    heads = head_of(policy, style), head_of(reference, style)
    return fused_kl(policy["hidden"], heads[0], reference["hidden"], heads[1], chunk_bytes=CHUNKS[chunk])


def gradients(divergences, given, **options):
    wanted = [tensor for tensor in given.values() if tensor.requires_grad]
    weight = torch.linspace(-1, 2, len(divergences), dtype=torch.float64).to(divergences)
    return torch.autograd.grad((divergences * weight).sum(), wanted, **options)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    ("head", "frozen"),
    [(head, ()) for head in HEADS] + [("all", ("weight", "bias")), ("plain", ("hidden",)), ("bias", ("bias",))],
)
def test_kl_matches_its_definition(head, frozen, chunk):
    style = HEADS[head]
    policy, reference = tensors(0, frozen=frozen, **style), tensors(1, **style)
    expected, found = naive(policy, reference, style), fused(policy, reference, style, chunk)
    assert (expected > 0.1).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    pairs = list(zip(gradients(found, policy), gradients(expected, policy), strict=True))
    assert len(pairs) == len(policy) - len(frozen)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_gradients_pass_gradcheck(chunk):
    style = HEADS["all"]
    policy, reference = tensors(0, rows=4, **style), tensors(1, rows=4, **style)

    def function(*values):
        return fused(dict(zip(policy, values, strict=True)), reference, style, chunk)

    assert torch.autograd.gradcheck(function, tuple(policy.values()))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_kl_is_zero_when_policy_equals_reference(chunk):
    """The gradient is zero as well, because this is the minimum."""
    policy = tensors(0, **HEADS["all"])
    divergences = fused(policy, policy, HEADS["all"], chunk)
    assert divergences.tolist() == [0.0] * ROWS
    for gradient in gradients(divergences, policy):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_reference_gets_no_gradient(chunk):
    policy, reference = tensors(0), tensors(1)
    fused(policy, reference, {}, chunk).sum().backward()
    assert all(tensor.grad is not None for tensor in policy.values())
    assert all(tensor.grad is None for tensor in reference.values())


def test_the_reference_can_have_a_different_width():
    policy, reference = tensors(0), tensors(1)
    wider = {name: torch.cat([tensor, torch.zeros_like(tensor)], dim=-1) for name, tensor in reference.items()}
    torch.testing.assert_close(fused(policy, wider, {}, "three rows"), naive(policy, reference, {}))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_second_backward_gives_the_same_gradients(chunk):
    policy, reference = tensors(0), tensors(1)
    divergences = fused(policy, reference, {}, chunk)
    for a, b in zip(gradients(divergences, policy, retain_graph=True), gradients(divergences, policy), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_inputs_give_an_fp32_divergence(autocast, chunk):
    """bf16 weights, and bf16 products of fp32 weights; gradients have the weights' dtypes."""
    dtype = torch.float32 if autocast else torch.bfloat16
    policy, reference = tensors(0, dtype=dtype), tensors(1, dtype=dtype)
    exact = {name: tensor.detach().bfloat16().double().requires_grad_() for name, tensor in policy.items()}
    expected = naive(exact, {name: tensor.bfloat16().double() for name, tensor in reference.items()}, {})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = fused(policy, reference, {}, chunk)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
    for a, b in zip(gradients(found, policy), gradients(expected, exact), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= 0.02 * b.norm()


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("head", HEADS)
def test_entropy_matches_its_definition(head, chunk):
    style, policy = HEADS[head], tensors(0, **HEADS[head])
    logits = head_of(policy, style).logits(policy["hidden"], torch.float64)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    found = fused_entropy(policy["hidden"], head_of(policy, style), chunk_bytes=CHUNKS[chunk])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    for a, b in zip(gradients(found, policy), gradients(expected, policy), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("head", HEADS)
def test_log_collision_matches_its_definition(head, chunk):
    style, policy = HEADS[head], tensors(0, **HEADS[head])
    logits = head_of(policy, style).logits(policy["hidden"], torch.float64)
    found = fused_log_collision(policy["hidden"], head_of(policy, style), chunk_bytes=CHUNKS[chunk])
    torch.testing.assert_close(found, logits.softmax(-1).square().sum(-1).log(), rtol=0, atol=1e-9)
    assert not found.requires_grad


class Largest(TorchDispatchMode):
    """Records the number of elements in the largest tensor created."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return result


def test_no_token_by_vocabulary_tensor_is_materialized():
    rows = 100
    policy, reference = tensors(0, rows=rows), tensors(1, rows=rows)
    with Largest() as largest:
        gradients(fused(policy, reference, {}, "three rows"), policy)
    assert largest.elements <= max(3 * VOCABULARY, VOCABULARY * WIDTH, rows * WIDTH) < rows * VOCABULARY
    with Largest() as largest:
        gradients(fused_entropy(policy["hidden"], head_of(policy, {}), chunk_bytes=CHUNKS["three rows"]), policy)
    assert largest.elements <= max(3 * VOCABULARY, VOCABULARY * WIDTH, rows * WIDTH)
    with Largest() as largest:
        fused(policy, reference, {}, "all rows")
    assert largest.elements == rows * VOCABULARY  # proves that the recorder detects it
