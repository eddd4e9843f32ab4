"""Multimodal models trained on text: loaded by their class, vision parts frozen, saved and reloaded."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tests.forked import run_ranks
from transformers import AutoTokenizer

from simpo import cli
from simpo.models.adapters import freeze_parts_unused_by_text, parts_unused_by_text
from simpo.models.loading import load_model
from simpo.models.settings import ModelArguments
from simpo.packing.layout import PackedBatch
from simpo.packing.model import policy_logprobs, state_of

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
QWEN_VISION |= {"patch_size": 8}
QWEN_TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 2}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
GEMMA = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
TOWER = ["model.vision_tower", "model.multi_modal_projector"]


def llava(text):
    return hf.LlavaConfig(
        text_config=text | {"model_type": "llama"},
        vision_config=VISION | {"model_type": "clip_vision_model"},
        image_token_index=5,
    )


def mistral3(text):
    return hf.Mistral3Config(
        text_config=text | {"model_type": "mistral", "head_dim": 8},
        vision_config=VISION | {"model_type": "pixtral", "head_dim": 8},
        image_token_index=5,
    )


def gemma3(text):
    return hf.Gemma3Config(
        text_config=text | GEMMA,
        vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=5,
    )


def qwen2_5_vl(text):
    return hf.Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": ROPE},
        vision_config=QWEN_VISION | {"fullatt_block_indexes": [0]},
        **QWEN_TOKENS,
    )


def llava_next(text):
    return hf.LlavaNextConfig(
        text_config=text | {"model_type": "llama"},
        vision_config=VISION | {"model_type": "clip_vision_model"},
        image_token_index=5,
    )


KINDS = {
    llava: (hf.LlavaForConditionalGeneration, TOWER),
    llava_next: (hf.LlavaNextForConditionalGeneration, ["model.image_newline", *TOWER]),
    mistral3: (hf.Mistral3ForConditionalGeneration, TOWER),
    gemma3: (hf.Gemma3ForConditionalGeneration, TOWER),
    qwen2_5_vl: (hf.Qwen2_5_VLForConditionalGeneration, ["model.visual"]),
}


@pytest.fixture(scope="module")
def write(chat_world, tmp_path_factory):
    """``write(kind)``: the folder of a tiny random model of that kind with the chat world's tokenizer."""
    folder = tmp_path_factory.mktemp("vision")
    tokenizer = AutoTokenizer.from_pretrained(chat_world / "model")

    def make(kind):
        path = folder / kind.__name__
        if not path.exists():
            special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            torch.manual_seed(0)
            model = KINDS[kind][0](kind(TEXT | special | {"vocab_size": len(tokenizer)}))
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn_like(parameter)
                    parameter.copy_(parameter + 0.05 * noise if parameter.dim() == 1 else 0.2 * noise)
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        return path

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_text_reaches_everything_but_the_vision_parts(kind, write, random_comparisons, naive_logprobs, caplog):
    """Determined from the gradients of the model's own forward."""
    folder = write(kind)
    model = load_model(ModelArguments(str(folder), dtype="float64"))
    assert type(model) is KINDS[kind][0]
    assert list(parts_unused_by_text(model)) == KINDS[kind][1]
    comparisons = random_comparisons((11, (7, 5)), (3, (4, 2)))
    expected = naive_logprobs(model, comparisons)
    expected.sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    freeze_parts_unused_by_text(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == reached
    assert "text does not use it: " + ", ".join(KINDS[kind][1]) in caplog.text
    found = policy_logprobs(model, PackedBatch.build(comparisons))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert state_of(model).path == "packed"


def options(chat_world, folder, output, *more) -> list[str]:
    named = [f"--model_name_or_path={folder}", f"--dataset_name={chat_world / 'train.jsonl'}", f"--output_dir={output}"]
    return ["train", "--objective=simpo", "--max_steps=2", "--learning_rate=1e-2", *named, *more]


@pytest.mark.parametrize("kind", [mistral3, qwen2_5_vl])
def test_a_trained_model_is_saved_sampled_and_loaded_by_plain_transformers(kind, write, chat_world, tmp_path):
    folder, output = write(kind), tmp_path / "out"
    assert cli.main(options(chat_world, folder, output)) == 0
    before, after = load_file(folder / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert not [name for name in changed if "vision" in name or "visual" in name or "projector" in name]
    plain = hf.AutoModelForImageTextToText.from_pretrained(output)
    ids = torch.tensor([[9, 10, 11, 12]])
    with torch.no_grad():
        torch.testing.assert_close(load_model(str(output))(ids).logits, plain(ids).logits)
    sample = ["sample", str(output), str(chat_world / "test.jsonl"), f"--output_dir={tmp_path / 's'}"]
    assert cli.main([*sample, "--max_new_tokens=4"]) == 0


@pytest.mark.parametrize("modules", [[], ["--lora_target_modules", "q_proj", "v_proj"]])
def test_an_adapter_is_added_to_the_language_model_only(modules, write, chat_world, tmp_path):
    """Both kinds of vision tower have layers with these names."""
    output = tmp_path / "out"
    assert cli.main(options(chat_world, write(llava), output, "--use_peft=true", "--lora_r=4", *modules)) == 0
    names = load_file(output / "adapter_model.safetensors")
    assert len(names) == 2 * 2 * (2 if modules else 7)
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    assert cli.main(["merge", str(output), f"--output_dir={tmp_path / 'merged'}"]) == 0
    assert json.loads((tmp_path / "merged/config.json").read_text())["model_type"] == "llava"


@pytest.mark.slow
def test_two_processes_train_with_activation_checkpointing(write, chat_world, tmp_path):
    """DDP waits for a gradient of every trained parameter and cannot detect unused ones under checkpointing."""
    settings = ["--gradient_checkpointing=true", "--ddp_backend=gloo", "--report_to=none"]
    both = options(chat_world, write(gemma3), tmp_path / "two", "--per_device_train_batch_size=4", *settings)
    done = run_ranks(2, cli.main, both, folder=tmp_path)
    assert done.codes == [0, 0], done.stderr
    alone = options(chat_world, write(gemma3), tmp_path / "one", "--per_device_train_batch_size=8", *settings[:1])
    assert cli.main(alone) == 0
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
