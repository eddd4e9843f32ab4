"""Adapters: adding, training through the packed path, continuing, rejecting bad ones, and the reference policy."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Llama4TextConfig

from simpo import score_responses
from simpo.errors import SimpoError
from simpo.models.adapters import add_adapter, disable_dropout
from simpo.models.checkpoint import model_digest
from simpo.models.loading import load_model, load_tokenizer
from simpo.models.settings import ModelArguments
from simpo.packing.layout import PackedBatch
from simpo.packing.model import policy_forward, policy_logprobs, state_of
from simpo.training.reference import swapped_weights, trained_weights
from simpo.training.sharding import prepare_sharding

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def bases(make_model, tmp_path_factory):
    """``bases(name)``: the folder of a tiny float64 model with all weights random."""
    folder = tmp_path_factory.mktemp("bases")

    def base(name: str, **changes) -> Path:
        path = folder / "-".join([name, *map(str, changes.values())])
        if not path.exists():
            make_model(name, **changes).save_pretrained(path)
        return path

    return base


def arguments(base, **changes) -> ModelArguments:
    return ModelArguments(str(base), **{"dtype": "float64", "use_peft": True, "lora_r": 4} | changes)


def adapted(base, **changes) -> PeftModel:
    """A model with an adapter whose weights are all random rather than at their initial values. No dropout."""
    torch.manual_seed(1)
    model = load_model(arguments(base, **changes))
    disable_dropout(model)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, dtype=torch.float64))
    return model


def trained(model) -> dict:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save(model, folder) -> Path:
    model.save_pretrained(folder)
    return folder


# ---- new adapters ----


def test_a_new_adapter_leaves_outputs_unchanged_and_is_the_only_thing_trained(bases, comparisons):
    base = bases("llama")
    torch.manual_seed(0)
    model = load_model(arguments(base, dtype="bfloat16", lora_r=None))
    assert isinstance(model, PeftModel)
    layers = {name.split(".lora_")[0] for name in trained(model)}
    assert all(".lora_" in name for name in trained(model))
    assert len(layers) == 3 * 7  # every linear layer in three blocks, but not the output layer
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}
    assert model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (16, 32, 0.05, False)
    with torch.no_grad():
        found = score_responses(model, comparisons).logp
        expected = score_responses(load_model(ModelArguments(str(base), dtype="bfloat16")), comparisons)
    assert torch.equal(found, expected.logp)


def test_keys_and_defaults_match_trl(bases):
    trl = pytest.importorskip("trl")
    theirs = {field.name: field.default for field in dataclasses.fields(trl.ModelConfig)}
    ours = {field.name: field.default for field in dataclasses.fields(ModelArguments)}
    names = [name for name in ours if "lora" in name or "bit" in name or name in ("use_peft", "use_bnb_nested_quant")]
    assert set(names) <= theirs.keys()
    config = load_model(ModelArguments(str(bases("llama")), use_peft=True)).peft_config["default"]
    quantization = ModelArguments("", load_in_4bit=True).quantization
    for name in names:
        if ours[name] is not None:
            assert ours[name] == theirs[name], name
        elif theirs[name] is not None:
            found = quantization[name] if name in quantization else getattr(config, {"lora_r": "r"}.get(name, name))
            assert found == theirs[name], name


@pytest.mark.parametrize(
    ("name", "settings", "fused"),
    [
        ("llama", {}, True),
        ("llama", {"use_rslora": True, "lora_alpha": 3}, True),
        ("gpt2", {}, True),  # its layers are Conv1D
        ("mistral", {"lora_target_modules": ["q_proj", "lm_head"]}, False),
        ("mistral", {"lora_modules_to_save": ["lm_head", "embed_tokens"]}, False),
        ("gemma2", {"lora_target_modules": ["v_proj", "down_proj"]}, True),
    ],
)
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_the_packed_path_matches_the_naive_forward(
    name, settings, fused, checkpointing, bases, comparisons, naive_logprobs, float64_everywhere
):
    """Forward and backward, also with both kinds of activation checkpointing in torch."""
    model = adapted(bases(name), **settings)
    batch = PackedBatch.build(comparisons)
    parameters = trained(model)
    weights = torch.linspace(-1, 1, int(batch.lengths.sum()), dtype=torch.float64)
    expected = naive_logprobs(model, comparisons)
    exact = torch.autograd.grad((expected * weights).sum(), list(parameters.values()))
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    model.train()
    found = policy_logprobs(model, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert (state_of(model).path, state_of(model).fused_head) == ("packed", fused)
    (found * weights).sum().backward()
    for (key, parameter), gradient in zip(parameters.items(), exact, strict=True):
        assert gradient.abs().max() > 1e-6, key
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-9, msg=key)
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def test_an_adapter_that_cannot_be_merged_gives_one_warning(bases, caplog, recwarn):
    """The warning is ours; peft's own warnings are suppressed."""
    base = bases("llama", tie_word_embeddings=True)
    for given, warnings in (({"lora_modules_to_save": ["lm_head"]}, 1), ({"lora_target_modules": ["q_proj"]}, 0)):
        caplog.clear()
        load_model(arguments(base, **given))
        assert caplog.text.count("which share their weights in this model: it can be used, but not merged") == warnings
    assert not [warning for warning in recwarn if "tie" in str(warning.message)]


def test_experts_get_adapters_too(bases, comparisons, naive_logprobs, tmp_path):
    model = adapted(bases("mixtral"), dtype="float32", lora_dropout=0.0).eval()
    assert any("experts" in name for name in trained(model))
    with torch.no_grad():
        found = policy_logprobs(model, PackedBatch.build(comparisons))
        torch.testing.assert_close(found, naive_logprobs(model, comparisons), rtol=0, atol=1e-3)
        again = load_model(str(save(model, tmp_path / "adapter"))).eval()
        assert torch.equal(policy_logprobs(again, PackedBatch.build(comparisons)), found)


# ---- the reference policy ----


def losses_of(model, batch):
    y = policy_forward(model, batch)
    return (y.logp * torch.linspace(-1, 1, len(y.logp))).sum()


@pytest.mark.parametrize("start", ["new", "continued"])
def test_the_reference_is_the_policy_at_the_start_of_training(start, bases, comparisons):
    """The base model for a new adapter; for a continued adapter, the adapter as it was, never the base model."""
    base = bases("llama")
    batch = PackedBatch.build(comparisons)
    model = adapted(base) if start == "continued" else load_model(arguments(base, lora_dropout=0))
    with torch.no_grad():
        expected = policy_forward(model, batch).logp
        bare = score_responses(load_model(ModelArguments(str(base), dtype="float64")), comparisons).logp
    assert torch.equal(expected, bare) == (start == "new")
    names = list(model.state_dict())
    weights = trained_weights(model)
    optimizer = torch.optim.SGD(trained(model).values(), lr=1e-3)
    for _ in range(2):
        losses_of(model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        moved = policy_forward(model, batch).logp
    before = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    model.train()
    with swapped_weights(model, weights):
        found = policy_forward(model, batch).logp
        assert not found.requires_grad
        assert not model.training
    assert torch.equal(found, expected)
    assert model.training
    assert (moved - expected).abs().max() > 1e-3
    with torch.no_grad():
        assert torch.equal(policy_forward(model, batch).logp, moved)
    assert list(model.state_dict()) == names
    after = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    assert all(after[name][0] is before[name][0] and after[name][1] == before[name][1] for name in before)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_computing_the_reference_between_forward_and_backward_leaves_gradients_unchanged(
    autocast, checkpointing, bases, comparisons
):
    """Nothing that autograd or autocast stored for the policy is confused with the reference."""
    batch = PackedBatch.build(comparisons)
    model = adapted(bases("llama"), dtype="float32")
    for parameter in trained(model).values():
        parameter.data = parameter.data.float()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()

    def gradients(interrupt: bool):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = losses_of(model, batch)
            if interrupt:
                with swapped_weights(model, start):
                    seen.append(policy_forward(model, batch).logp)
        return torch.autograd.grad(loss, list(trained(model).values()))

    seen: list = []
    start = trained_weights(model)
    policy_forward(model, batch)  # runs the self-check first
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected_start = policy_forward(model, batch).logp
        for parameter in trained(model).values():
            parameter.mul_(0.5)
    expected = gradients(interrupt=False)
    for found, exact in zip(gradients(interrupt=True), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=0)
    assert torch.equal(seen[0], expected_start)


# ---- continuing and rejecting adapters ----


def test_a_continued_adapter_keeps_its_own_settings(bases, comparisons, tmp_path):
    model = adapted(bases("llama"), lora_target_modules=["q_proj", "v_proj"], lora_alpha=7)
    folder = save(model, tmp_path / "adapter")
    for given in ({"use_peft": False, "lora_r": None}, {}, {"lora_target_modules": ["v_proj", "q_proj"]}):
        again = load_model(arguments(folder, **given)).eval()
        assert trained(again).keys() == trained(model).keys()
        with torch.no_grad():
            found, expected = (score_responses(m, comparisons).logp for m in (again, model))
        assert torch.equal(found, expected)
    for given, message in [
        ({"lora_r": 8}, "lora_r: .*adapter with 4, which cannot change; leave lora_r out"),
        ({"lora_target_modules": ["all-linear"]}, "lora_target_modules: .*adapter with q_proj, v_proj,"),
    ]:
        with pytest.raises(SimpoError, match=message):
            load_model(arguments(folder, **given))


def test_the_base_models_tokenizer_is_used_if_the_adapter_has_none(chat_world, tmp_path, caplog):
    base = chat_world / "model"
    folder = save(load_model(ModelArguments(str(base), use_peft=True)), tmp_path / "adapter")
    assert load_tokenizer(str(folder)).get_vocab() == load_tokenizer(str(base)).get_vocab()
    assert "has no tokenizer; using its base model's" in caplog.text


def another_base(folder, bases):
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(bases("llama", num_hidden_layers=2))
    (folder / "adapter_config.json").write_text(json.dumps(config))


def wider_base(folder, bases):
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(bases("llama", hidden_size=64))
    (folder / "adapter_config.json").write_text(json.dumps(config))


def other_kind_of_base(folder, bases):
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(bases("gpt2"))
    (folder / "adapter_config.json").write_text(json.dumps(config))


def no_base(folder, bases):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/model"}))


def unnamed_base(folder, bases):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))


def not_json(folder, bases):
    (folder / "adapter_config.json").write_text("{")


def no_weights(folder, bases):
    (folder / ADAPTER).unlink()


def broken_weights(folder, bases):
    (folder / ADAPTER).write_bytes(b"nothing")


def fewer_weights(folder, bases):
    weights = load_file(folder / ADAPTER)
    weights.pop(max(weights))
    save_file(weights, folder / ADAPTER)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (another_base, "the adapter belongs to another model than .* is unexpected"),
        (wider_base, r"the adapter belongs to another model than .* has shape \[.*\] instead of \[.*\]"),
        (other_kind_of_base, "the adapter belongs to another model: .*q_proj"),
        (no_base, "is an adapter whose base model is missing: there is no folder '/nowhere/model'"),
        (unnamed_base, "does not name its base model"),
        (not_json, "cannot be loaded"),
        (no_weights, "adapter_model.safetensors cannot be read"),
        (broken_weights, "adapter_model.safetensors cannot be read"),
        (fewer_weights, "the adapter belongs to another model than .* is missing"),
    ],
)
def test_an_unusable_adapter_gives_a_one_line_error(damage, message, bases, tmp_path):
    folder = save(adapted(bases("llama"), lora_target_modules=["q_proj"]), tmp_path / "adapter")
    damage(folder, bases)
    with pytest.raises(SimpoError, match=message) as error:
        load_model(ModelArguments(str(folder)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_peft": False}, "lora_r: applies only to adapters; set use_peft: true"),
        ({"use_peft": False, "lora_r": None, "load_in_4bit": True}, "load_in_4bit: applies only to adapters"),
        ({"lora_target_modules": ["no_such_layer"]}, "use_peft: cannot add an adapter to this model .*no_such_layer"),
        (
            {"lora_target_modules": ["q_proj", "proj"]},
            "lora_target_modules: no suitable layer has a name ending in 'proj'",
        ),
        (
            {"lora_modules_to_save": ["lm_haed"]},
            "lora_modules_to_save: no suitable layer has a name ending in 'lm_haed'",
        ),
        ({"lora_r": 0}, "lora_r: must be at least 1 and at most 16384, not 0"),
        ({"lora_r": 10**9}, "lora_r: must be at least 1 and at most 16384, not 1000000000"),
        ({"lora_alpha": 0}, "lora_alpha: must be at least 1, not 0"),
        ({"lora_dropout": -0.1}, "lora_dropout: must be at least 0 and below 1, not -0.1"),
        ({"lora_dropout": 1.0}, "lora_dropout: must be at least 0 and below 1, not 1.0"),
        ({"use_bnb_nested_quant": True}, "use_bnb_nested_quant: applies only to 4-bit models; set load_in_4bit"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type: applies only to 4-bit models"),
    ],
)
def test_invalid_settings_give_a_one_line_error(given, message, bases):
    with pytest.raises(SimpoError, match=message):
        load_model(arguments(bases("llama"), **given))


def test_an_adapter_that_does_not_fit_into_memory_is_a_one_line_error(bases):
    model = load_model(ModelArguments(str(bases("llama"))))
    with pytest.raises(SimpoError, match="use_peft: cannot add an adapter to this model"):
        add_adapter(model, {"lora_r": 10**14})


@pytest.mark.parametrize("change", [{"r": 10**14}, {"r": 5}, {"rank_pattern": {"q_proj": 10**14}}])
def test_ranks_that_the_weights_do_not_have_are_found_before_memory_is_allocated(bases, tmp_path, change):
    folder = save(adapted(bases("llama")), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(SimpoError, match=f"{max(4, change.get('r', 10**14)):,}.* at most rank 4;"):
        load_model(str(folder))


def test_dropout_on_experts_is_rejected(bases):
    with pytest.raises(SimpoError, match=r"lora_dropout != 0\.\); set lora_dropout: 0"):
        load_model(arguments(bases("mixtral")))


def test_a_non_standard_router_gets_no_adapter(tmp_path, caplog):
    """Llama 4's router is a linear layer whose forward returns two tensors."""
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "intermediate_size_mlp": 48, "num_local_experts": 2}
    AutoModelForCausalLM.from_config(Llama4TextConfig(**sizes)).save_pretrained(tmp_path)
    adapted = load_model(ModelArguments(str(tmp_path), use_peft=True))
    names = {name.rpartition(".")[2] for name in adapted.base_model.targeted_module_names}
    assert {"q_proj", "o_proj", "gate_proj"} <= names and "router" not in names
    assert any("router" in record.message for record in caplog.records)
    adapted(input_ids=torch.tensor([[3, 4, 5]]))
    asked = ModelArguments(str(tmp_path), use_peft=True, lora_target_modules=["q_proj", "router"])
    with pytest.raises(SimpoError, match="lora_target_modules: no suitable layer has a name ending in 'router'"):
        load_model(asked)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_loading_in_4_bits_requires_bitsandbytes(bases, tmp_path):
    """This also applies to an adapter's base model."""
    folder = save(adapted(bases("llama")), tmp_path / "adapter")
    for given in (
        arguments(bases("llama"), load_in_4bit=True),
        ModelArguments(str(folder), load_in_4bit=True),
    ):
        with pytest.raises(SimpoError, match=r"^load_in_4bit: bitsandbytes is not installed"):
            load_model(given)


# ---- adapters from other tools ----


def test_a_named_adapter_is_trained_saved_and_resumed(bases, make_trainer, pairs, tmp_path):
    """It is saved where every tool looks for an adapter, and resumes to identical bits."""

    def named() -> PeftModel:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(bases("gpt2"), dtype=torch.float64)
        return get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", fan_in_fan_out=True), adapter_name="sft")

    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 1e-2}
    through = make_trainer(pairs(4), model=named(), **saves)
    through.train()
    checkpoints = Path(through.args.output_dir)
    assert (checkpoints / "checkpoint-1" / ADAPTER).is_file()
    shutil.rmtree(checkpoints / "checkpoint-2")
    resumed = make_trainer(pairs(4), model=named(), **saves)
    resumed.train(resume_from_checkpoint=True)
    expected, found = trained(through.model), trained(resumed.model)
    assert len(expected) == 4  # A and B of two layers
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.items())
    resumed.save_model(str(tmp_path / "final"))
    again = load_model(ModelArguments(str(tmp_path / "final"), dtype="float64"))
    for name, parameter in trained(again).items():
        assert torch.equal(parameter, expected[name.replace(".default.", ".sft.")].to(parameter.dtype))


def test_the_error_points_to_an_adapter_in_a_subfolder(bases, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(bases("llama"))
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"), adapter_name="sft").save_pretrained(tmp_path)
    with pytest.raises(SimpoError, match=rf"only contains an adapter; name its folder: {tmp_path / 'sft'}$"):
        load_model(str(tmp_path))
    load_model(str(tmp_path / "sft"))


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_adapters_that_add_token_embeddings_are_rejected_by_name(kind, bases, make_trainer, pairs):
    """Packed batches bypass them, so the model would silently train without them."""
    base = AutoModelForCausalLM.from_pretrained(bases("gpt2"))
    model = get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(SimpoError, match=r"^model: (PROMPT|PREFIX)_TUNING is not supported"):
        make_trainer(pairs(4), model=model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("whole", [[], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_an_adapter_with_new_tokens_is_continued_saved_and_reloaded(tied, whole, bases, tmp_path):
    """As peft stores it, with or without ``modules_to_save``."""
    if tied and "lm_head" in whole:
        return
    base = AutoModelForCausalLM.from_pretrained(bases("llama", tie_word_embeddings=tied), dtype=torch.float64)
    base.resize_token_embeddings(65, mean_resizing=False)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=whole or None)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save(model, tmp_path / "first")
    ids = torch.tensor([[3, 60, 61, 64, 7]])
    for name in ("first", "second"):
        folder = tmp_path / name
        again = load_model(ModelArguments(str(folder), dtype="float64")).eval()
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
        if name == "first":
            save(again, tmp_path / "second")


def test_new_tokens_need_both_input_and_output_embeddings(bases, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(bases("llama", tie_word_embeddings=False))
    base.resize_token_embeddings(65, mean_resizing=False)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", modules_to_save=["embed_tokens"]))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(SimpoError, match="was trained with 65 tokens and the model has 61, but the adapter lacks"):
        load_model(str(tmp_path))


def test_the_attention_softcap_is_kept(bases):
    """Transformers 5.17 would load Gemma 2 with an attention implementation that ignores it."""
    assert load_model(str(bases("gemma2"))).config._attn_implementation == "eager"


def test_other_adapter_types_are_rejected(bases, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(bases("llama"))
    prompts = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    folder = save(get_peft_model(base, prompts), tmp_path / "adapter")
    with pytest.raises(SimpoError, match=r"is not a LoRA adapter \([A-Z0-9_]+\); use one"):
        load_model(str(folder))


def test_an_adapters_digest_includes_its_base_model(bases, tmp_path):
    """The same adapter on a base model with different weights is a different model."""
    base = shutil.copytree(bases("llama"), tmp_path / "base")
    folder = save(adapted(base), tmp_path / "adapter")
    first = model_digest(ModelArguments(str(folder)))
    assert model_digest(ModelArguments(str(folder))) == first
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert model_digest(ModelArguments(str(folder))) != first


def test_sharding_a_4_bit_base_model_is_rejected(bases):
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    model = adapted(bases("llama"))
    model.get_base_model().is_loaded_in_4bit = True  # as set by bitsandbytes, which needs a GPU
    try:
        with pytest.raises(SimpoError, match="fsdp: sharding a base model in 4 bits is not supported"):
            prepare_sharding(accelerator, model)
    finally:
        accelerator.state.distributed_type = DistributedType.NO


def test_a_checkpoint_of_a_different_model_is_reported(make_trainer, make_model, bases, pairs, tmp_path):
    rows, step = pairs(4), {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(rows, model=adapted(bases("gpt2")), **step).train()
    whole = make_trainer(rows, model=make_model("gpt2"), max_steps=2)
    with pytest.raises(SimpoError, match="is an adapter, this run trains a full model"):
        whole.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    wider = make_trainer(rows, model=adapted(bases("gpt2"), lora_r=8), max_steps=2)
    with pytest.raises(SimpoError, match=r"belongs to another model \(.* has shape \[4, .*\] instead of \[8, .*\]\)"):
        wider.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    shutil.rmtree(tmp_path / "checkpoint-1")
    make_trainer(rows, model=make_model("gpt2"), **step).train()
    adapter = make_trainer(rows, model=adapted(bases("gpt2")), max_steps=2)
    with pytest.raises(SimpoError, match="is a full model, this run trains an adapter"):
        adapter.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
