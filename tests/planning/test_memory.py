"""Predicted memory and FLOPs against the allocator's own record, PyTorch's counter and real optimizers."""

from __future__ import annotations

import copy
from dataclasses import astuple, fields, replace

import pytest
import torch
import transformers as hf
from benchmarks.architectures import VOCABULARY, toy_config
from benchmarks.plan_accuracy import Run, config_of, make_model, make_rows, peak_bytes, predicted, train
from datasets import Dataset
from packaging.version import Version
from tests.sampled import sampled
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers.training_args import OptimizerNames

from simpo.errors import SimpoError
from simpo.models.loading import load_model
from simpo.models.settings import ModelArguments
from simpo.packing.layout import PackedBatch, TokenizedComparison
from simpo.packing.model import policy_logprobs
from simpo.planning.memory import _STATES, Cost, Tracer, _trace, measure_resident_memory, measure_step
from simpo.planning.model import Blueprint
from simpo.planning.search import Choice, Planner
from simpo.planning.settings import PlanSettings
from simpo.training.batches import comparisons_of

_SIZES = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model(path, layers=5, hidden=64, vocabulary=500)
    return path


@pytest.fixture(scope="module")
def rows():
    return make_rows(4, 2, vocabulary=500)


@pytest.mark.parametrize(
    "run",
    [
        Run("LoRA", model={"use_peft": True}, config={"max_batch_tokens": 4096, "gradient_checkpointing": True}),
        Run("weighted pairs", config={"max_batch_tokens": 4096, "wpo_weights": True}),
        Run("reward model", "reward", config={"bf16": True, "optim": "sgd"}),
    ],
    ids=lambda run: run.name,
)
def test_peak_memory_of_a_run_is_predicted(run, folder, rows) -> None:
    measured = peak_bytes(lambda: train(run, folder, rows, steps=2))
    assert predicted(run, folder, rows).total == pytest.approx(measured, rel=0.05)


_EXPERTS = hf.Qwen3MoeConfig(moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, head_dim=16, **_SIZES)
_CONVOLUTIONS = hf.Lfm2Config(layer_types=["conv", "conv", "full_attention"] * 2, **_SIZES)


@pytest.mark.parametrize(
    ("config", "checkpointing"),
    [(_EXPERTS, False), (_CONVOLUTIONS, False), (_CONVOLUTIONS, True)],
    ids=["experts", "convolutions", "convolutions, checkpointing"],
)
def test_peak_memory_with_other_kinds_of_layers_is_predicted(config, checkpointing, rows, tmp_path) -> None:
    """Experts in fp32, and layers with state, whose batches are computed through a cache."""
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    run = Run("SimPO", config={"max_batch_tokens": 4096, "gradient_checkpointing": checkpointing})
    measured = peak_bytes(lambda: train(run, tmp_path, rows, steps=2))
    assert predicted(run, tmp_path, rows).total == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    "name",
    sampled(["bamba", "jamba", "falcon_h1", "nemotron_h", "mamba2"], kept=("bamba", "nemotron_h", "mamba2")),
)
def test_layers_of_a_hybrid_model_can_be_left_out(name) -> None:
    """Configurations list the types of their layers or derive them, from an interval for example."""
    types = {"layer_types": ["linear_attention", "mlp", "full_attention", "linear_attention"] * 2}
    if name == "nemotron_h" and Version(hf.__version__) < Version("5.23"):
        pytest.skip("keeps less in its cache than its layers need")
    more = {"bamba": {"attn_layer_indices": [1, 5]}, "nemotron_h": types}.get(name, {})
    config = toy_config(name, **({} if name == "nemotron_h" else {"num_hidden_layers": 8}) | more)
    config.dtype = torch.float32
    batch = PackedBatch.build([TokenizedComparison([3] * 50, [[4] * 40, [5] * 30])])
    blueprint = Blueprint(ModelArguments("toy"), config, torch.float32)
    assert max(map(len, blueprint.layer_groups())) > 2
    found = measure_step(blueprint, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Blueprint, "layer_groups", lambda self: [[number] for number in range(8)])
        whole = measure_step(blueprint, batch)
    assert found.cost == whole.cost
    assert found.cost.attention > 0 or name == "mamba2"
    assert max(found.peaks.values()) == pytest.approx(max(whole.peaks.values()), rel=1e-3)


@pytest.mark.parametrize("name", ["minimax", "recurrent_gemma", "rwkv"])
def test_models_whose_prompts_cannot_be_shared_are_planned_with_padding(name, tmp_path, caplog) -> None:
    toy_config(name).save_pretrained(tmp_path)
    rows = make_rows(2, 2, vocabulary=VOCABULARY, longest=8)
    auto, padded = (predicted(Run("", config={"forward_path": path}), tmp_path, rows) for path in ("auto", "padded"))
    assert auto == padded
    assert sum("pads batches" in record.message for record in caplog.records) == 1


def test_a_model_that_cannot_be_traced_gives_a_one_line_error(tmp_path) -> None:
    toy_config("xmod").save_pretrained(tmp_path)
    with pytest.raises(SimpoError, match=r"^model_name_or_path: "):
        predicted(Run(""), tmp_path, make_rows(2, 2, vocabulary=VOCABULARY, longest=8))


@pytest.mark.parametrize("sharded", [False, True])
def test_checkpoints_of_comparisons_and_of_whole_batches(sharded, rows, monkeypatch) -> None:
    """Compared with a trace of all comparisons through all layers."""
    blueprint = Blueprint(ModelArguments("toy"), _CONVOLUTIONS, torch.float32, checkpointed_share=1.0)
    batch = PackedBatch.build(comparisons_of(rows, range(4)))
    monkeypatch.setattr("simpo.packing.cached.is_sharded", lambda model: sharded)
    actual = _trace(blueprint, batch, range(6))
    costs = [actual.pop(field.name) for field in fields(Cost)]
    step = measure_step(replace(blueprint, sharded=sharded), batch)
    assert max(step.peaks.values()) == pytest.approx(max(actual.values()), rel=0.1)
    assert astuple(step.cost) == pytest.approx(costs, rel=0.15)


def test_flops_match_pytorchs_counter(folder, rows) -> None:
    batch = PackedBatch.build(comparisons_of(rows, [0, 1]))
    step = measure_step(Blueprint.read(ModelArguments(str(folder)), checkpointed_share=0.5), batch)

    model = load_model(str(folder))
    for layer in model.model.layers[1::2]:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda *a, **k: torch.utils.checkpoint.checkpoint(
            *a, use_reentrant=False, **k
        )
    policy_logprobs(model, batch)  # run the self-check first, so that it is not counted
    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
            sdpa_backward_flop_count(g, q, k, v)
        ),
        aten.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1],
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        policy_logprobs(model.train(), batch).sum().backward()
    assert step.cost.flops == counter.get_total_flops()


def test_a_deep_model_is_extrapolated_from_a_few_layers(folder, rows, monkeypatch) -> None:
    batch = PackedBatch.build(comparisons_of(rows, [0, 1]))
    blueprint = Blueprint.read(ModelArguments(str(folder)), checkpointed_share=0.5)
    assert max(map(len, blueprint.layer_groups())) > 2
    found = measure_step(blueprint, batch)
    each_layer = [[number] for number in range(5)]
    monkeypatch.setattr(Blueprint, "layer_groups", lambda self: each_layer)  # measure all of them
    whole = measure_step(blueprint, batch)
    assert found.cost == whole.cost
    assert max(found.peaks.values()) == pytest.approx(max(whole.peaks.values()), rel=1e-3)


def test_all_paged_optimizers_are_known() -> None:
    paged = {name.value for name in OptimizerNames if name.value.startswith("paged_")}
    assert paged == {name for name in _STATES if name.startswith("paged_")}
    assert all(_STATES[name][0] == 0 for name in paged)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_optimizer_states_and_step_memory(name, foreach, dtype, folder) -> None:
    """Compared with what a real optimizer stores and allocates; for all weights at once where possible, as on a GPU."""
    arguments = ModelArguments(str(folder), dtype=dtype)
    kept = measure_resident_memory(Blueprint.read(arguments, optimizer=name, cuda=foreach))
    model = load_model(arguments)
    arguments = hf.TrainingArguments(str(folder / "out"), optim=name, report_to=[])
    kind, options = hf.Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    if name not in ("adamw_torch_fused", "adafactor"):
        options["foreach"] = foreach
    optimizer = kind(copy.deepcopy(model).parameters(), **options)
    for weight in optimizer.param_groups[0]["params"]:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    stored = (
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    )
    # plus the step counters, one per weight
    assert kept.states == pytest.approx(sum(value.nbytes for value in stored), rel=0.01, abs=1000)
    with Tracer() as tracer:
        optimizer.step()
    # one by one, PyTorch still holds the previous weight's temporary tensor
    assert kept.update == pytest.approx(tracer.peaks[""], rel=0.02 if foreach else 0.15, abs=4000)


def test_processes_share_the_optimizer_step(folder) -> None:
    rows = Dataset.from_dict({"prompt_ids": [[3, 3]] * 2, "response_ids": [[[3], [4]]] * 2})
    parts = ModelArguments(str(folder)), None, config_of(Run("", config={"optim": "adamw_torch"}, processes=2), folder)
    planner = Planner(parts, PlanSettings(gpu="H100", gpus=2), rows)
    whole, shared = (planner.estimate(Choice(4096, 0.0, sharding)) for sharding in ("ddp", "fsdp"))
    assert whole.peak_phase == shared.peak_phase == "the optimizer step"
    assert shared.memory["activations"] == whole.memory["activations"] / 2


def test_memory_of_4_bit_weights(folder) -> None:
    """Linear layers take half a byte per weight, plus a 4-byte scale per 64 weights; everything else is fp32."""
    arguments = ModelArguments(str(folder), use_peft=True, lora_r=2, load_in_4bit=True)
    kept = measure_resident_memory(Blueprint.read(arguments))
    linear = 5 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    adapter = 5 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert kept.gradients == 4 * adapter
    buffers = kept.weights - linear * (0.5 + 4 / 64) - 4 * (2 * 500 * 64 + 11 * 64 + adapter)
    assert 0 <= buffers < 200  # rotary frequencies
