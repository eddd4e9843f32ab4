"""``torch_compile``: same results, and no recompilation after the first batches."""

from __future__ import annotations

import random

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import varlen as torch_varlen

from simpo.errors import SimpoError
from simpo.models.devices import compile_layers
from simpo.packing import attention as kernels
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.model import policy_logprobs, prepare_policy, state_of


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(make_trainer, make_model, rows, *, name="llama", steps=4, **settings):
    model = make_model(name, torch.float32, std=0.1, num_hidden_layers=2)
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": steps,
        "learning_rate": 1e-2,
        "logging_steps": 1,
    } | settings
    trainer = make_trainer(rows, model=model, **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {key: value.clone() for key, value in trainer.model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"torch_compile_backend": "aot_eager", "gradient_checkpointing": True},
        {"torch_compile_backend": "eager", "forward_path": "padded"},
    ],
    ids=str,
)
def test_compiled_training_gives_the_same_results(settings, make_trainer, make_model, pairs):
    rows = pairs(16)
    plain = {key: value for key, value in settings.items() if key != "torch_compile_backend"}
    exact, expected = train(make_trainer, make_model, rows, **plain)
    assert not counters["stats"]
    losses, weights = train(make_trainer, make_model, rows, **settings)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert losses == pytest.approx(exact, rel=1e-5)
    for key, tensor in expected.items():
        torch.testing.assert_close(weights[key], tensor, rtol=1e-4, atol=1e-5)


def random_batch(draw: random.Random) -> PackedBatch:
    def ids(longest: int) -> list[int]:
        return [draw.randint(3, 60) for _ in range(draw.randint(1, longest))]

    shapes = [draw.choice([1, 2, 2, 4]) for _ in range(draw.randint(1, 6))]
    return PackedBatch.build([TokenizedComparison(ids(30), [ids(20) for _ in range(k)]) for k in shapes])


@pytest.mark.slow
def test_nothing_is_recompiled_after_the_first_batches(make_model, make_trainer, pairs):
    model = make_model("mistral", torch.float32, std=0.1, num_hidden_layers=2)
    make_trainer(pairs(2), model=model, torch_compile_backend="eager")
    draw = random.Random(0)
    graphs = []
    for _ in range(500):
        policy_logprobs(model, random_batch(draw)).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[10] == graphs[-1] < 5


def test_a_kernel_with_integer_tensor_arguments_compiles_once(make_model, monkeypatch):
    """A custom operator with varlen_attn's signature stands in for it here, because varlen_attn needs a GPU."""

    @torch.library.custom_op(
        "simpo_tests::varlen",
        mutates_args=(),
        schema="(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, SymInt m, SymInt n, float scale) -> Tensor",
    )
    def operator(q, k, v, cu_q, cu_k, max_q, max_k, scale):
        seen.append((cu_q.tolist(), max_q, max_k))
        return q * scale

    operator.register_fake(lambda q, *_: torch.empty_like(q))
    seen: list[tuple[list[int], int, int]] = []
    monkeypatch.setattr(torch_varlen, "varlen_attn", lambda *args, scale, **_: operator(*args, scale))
    monkeypatch.setattr(kernels, "_DEVICE", "cpu")
    model = make_model("mistral", torch.bfloat16, std=0.1, num_hidden_layers=2)
    state_of(prepare_policy(model)).path = "packed"  # the stand-in would fail the self-check
    for layer in model.model.layers:
        layer.compile(backend="eager", dynamic=True, fullgraph=True)
    draw, graphs = random.Random(0), []
    for _ in range(40):
        batch = random_batch(draw)
        with torch.no_grad():
            policy_logprobs(model, batch)
        *_, (starts, *longest) = seen
        assert starts == batch.layout.index.cu_seqlens_q.tolist()
        assert longest == [max(batch.layout.query_sizes), max(batch.layout.key_sizes)]
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[10] == graphs[-1] < 5


def test_a_model_without_compilable_layers_is_an_error(make_trainer, pairs):
    trainer = make_trainer(pairs(2))
    with pytest.raises(
        SimpoError, match=r"^torch_compile: Linear has no layers that can be compiled; set it to false$"
    ):
        compile_layers(torch.nn.Linear(2, 2), trainer.args, trainer.accelerator)
