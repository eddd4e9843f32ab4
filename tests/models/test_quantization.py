"""QLoRA on a CPU with bitsandbytes' own layers: gradients, killed runs, merging, sampling, and loading by peft."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from tests.training_runs import killed_after_step
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from simpo import cli, score_responses
from simpo.models.loading import load_model
from simpo.models.settings import ModelArguments
from simpo.packing.layout import PackedBatch
from simpo.packing.model import policy_logprobs, state_of

bnb = pytest.importorskip("bitsandbytes")
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def world(chat_world, tmp_path_factory):
    """The chat world's data with a Llama wide enough for 4-bit quantization blocks."""
    folder = tmp_path_factory.mktemp("qlora")
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_text((chat_world / name).read_text())
    tokenizer = AutoTokenizer.from_pretrained(chat_world / "model")
    tokenizer.save_pretrained(folder / "model")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **sizes, **special))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "model")
    return folder


def quantized(world, **changes) -> PeftModel:
    """Return the 4-bit model with an adapter that is no longer at its initial values."""
    name = str(world / "model")
    torch.manual_seed(0)
    model = load_model(ModelArguments(name, use_peft=True, load_in_4bit=True, lora_r=4, lora_dropout=0, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


def replace_by_whole_weights(model) -> int:
    """Replace 4-bit layers with linear layers holding the dequantized weights; return how many."""
    replaced = 0
    for module in list(model.modules()):
        layer = getattr(module, "base_layer", None)
        if isinstance(layer, bnb.nn.Linear4bit):
            whole = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            whole.weight.data = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
            module.base_layer = whole.requires_grad_(False)
            replaced += 1
    return replaced


@pytest.mark.parametrize("changes", [{}, {"bnb_4bit_quant_type": "fp4"}, {"use_bnb_nested_quant": True}])
def test_gradients_equal_those_of_the_dequantized_weights(changes, world, random_comparisons, naive_logprobs):
    """Even after scoring in evaluation mode, for which bitsandbytes repacks weights on some CPUs."""
    comparisons = random_comparisons((11, (7, 19)), (3, (4, 2)))
    model = quantized(world, **changes)
    model.eval()
    with torch.no_grad():
        before = score_responses(model, comparisons).logp
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = policy_logprobs(model, PackedBatch.build(comparisons))
    assert (state_of(model).path, state_of(model).fused_head) == ("packed", True)
    weights = torch.linspace(-0.1, 0.1, len(found))
    gradients = torch.autograd.grad((found * weights).sum(), parameters)
    torch.testing.assert_close(found.sum(), before.sum(), rtol=0, atol=1e-4)
    own = naive_logprobs(model, comparisons)
    assert replace_by_whole_weights(model) == 14
    for expected in (own, naive_logprobs(model, comparisons)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        naive = torch.autograd.grad((expected * weights).sum(), parameters)
        assert max(float(gradient.abs().max()) for gradient in naive) > 0.1
        for gradient, exact in zip(gradients, naive, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-4)


def options(world, output, objective) -> list[str]:
    given = {
        "model_name_or_path": world / "model",
        "dataset_name": world / "train.jsonl",
        "eval_dataset_name": world / "test.jsonl",
        "output_dir": output,
        "objective": objective,
        "use_peft": "true",
        "load_in_4bit": "true",
        "lora_r": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "save_steps": 1,
        "reference_cache": world / "reference",
    }
    return ["train", *(f"--{key}={value}" for key, value in given.items())]


@pytest.mark.parametrize("objective", ["simpo", "dpo"])
def test_a_run_is_resumed_merged_sampled_and_loaded_by_peft(objective, world, tmp_path, capsys):
    uninterrupted, output = tmp_path / "uninterrupted", tmp_path / "run"
    assert cli.main(options(world, uninterrupted, objective)) == 0
    metrics = {one["name"]: one for one in json.loads((uninterrupted / "results.json").read_text())["metrics"]}
    if objective == "dpo":
        assert metrics["train/loss"]["value"] < 0.693
    with killed_after_step(2):
        cli.main(options(world, output, objective))
    assert cli.main(options(world, output, objective)) == 0
    assert (output / ADAPTER).read_bytes() == (uninterrupted / ADAPTER).read_bytes()
    merged = tmp_path / "merged"
    assert cli.main(["merge", str(output), f"--output_dir={merged}"]) == 0
    base = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, output).eval()
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(ids).logits
        for model in (load_model(str(output)), load_model(str(merged))):
            torch.testing.assert_close(model.eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)
    asked = ["sample", str(output), str(world / "test.jsonl"), f"--output_dir={tmp_path / 's'}", "--max_new_tokens=4"]
    assert cli.main(asked) == 0
    capsys.readouterr()
