"""``simpo merge``: the merged model reproduces the adapter on its base, and every mistake is a one-line error."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo import cli
from simpo.models.loading import load_model
from simpo.models.settings import ModelArguments

TEXTS = ["Which color is grass?", "Grass is green.", "What does a dog do?"] * 4


@pytest.fixture(scope="module")
def base(tmp_path_factory, write_chat_model):
    """A tiny chat model."""
    folder = tmp_path_factory.mktemp("base") / "model"
    write_chat_model(folder, TEXTS, 128)
    return folder


def write_adapter(base, folder, **settings):
    """Write a random adapter for ``base`` with its own tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    given = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"} | settings
    get_peft_model(model, LoraConfig(**given)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template += "{# the adapter's own #}"
    tokenizer.save_pretrained(folder)
    return folder


def logps(model, ids):
    with torch.no_grad():
        return torch.log_softmax(model.eval()(ids).logits.float(), dim=-1)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True, "lora_alpha": 3}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}],
)
def test_the_merged_model_reproduces_the_adapter(settings, base, tmp_path, capsys):
    """Compared with peft's own loading of the adapter, in plain transformers."""
    adapter, merged = write_adapter(base, tmp_path / "adapter", **settings), tmp_path / "merged"
    assert cli.main(["merge", str(adapter), f"--output_dir={merged}"]) == 0
    assert f"next:  simpo chat {merged}" in capsys.readouterr().out
    names = {path.name for path in merged.iterdir()}
    assert names >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"}
    assert not [name for name in names if name.startswith("adapter")]
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float64)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), adapter
    ).double()
    ids = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = logps(theirs, ids)
    torch.testing.assert_close(logps(plain, ids), expected, rtol=0, atol=1e-5)
    with theirs.disable_adapter():
        assert (logps(theirs, ids) - expected).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(merged).chat_template.endswith("{# the adapter's own #}")


def test_the_dtype_of_the_weights_is_kept_with_a_single_rounding(base, tmp_path):
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(base).save_pretrained(half)
    adapter, merged = write_adapter(half, tmp_path / "adapter"), tmp_path / "merged"
    assert cli.main(["merge", str(adapter), f"--output_dir={merged}"]) == 0
    found = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    whole = load_model(ModelArguments(str(adapter))).merge_and_unload()
    for (name, parameter), exact in zip(found.named_parameters(), whole.parameters(), strict=True):
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, exact.to(torch.bfloat16)), name


def test_the_dtype_of_the_saved_weights_can_be_chosen(base, tmp_path):
    adapter, merged = write_adapter(base, tmp_path / "adapter"), tmp_path / "merged"
    assert cli.main(["merge", str(adapter), f"--output_dir={merged}", "--save_dtype=bfloat16"]) == 0
    found = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    whole = load_model(ModelArguments(str(adapter))).merge_and_unload()
    for (name, parameter), exact in zip(found.named_parameters(), whole.parameters(), strict=True):
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, exact.to(torch.bfloat16)), name


def test_the_model_card_describes_the_merge(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "adapter")
    (adapter / "README.md").write_text(
        "---\nlibrary_name: peft\ntags:\n- simpo\n---\n# adapter\n\nHeld-out pairs: 0.7\n"
    )
    assert cli.main(["merge", str(adapter), f"--output_dir={tmp_path / 'merged'}"]) == 0
    card = (tmp_path / "merged/README.md").read_text()
    assert "library_name: transformers" in card and "- simpo" in card and "Held-out pairs: 0.7" in card
    assert "`adapter` merged into `model`" in card
    assert str(tmp_path) not in card


def test_mistakes_give_a_one_line_error_and_leave_nothing_behind(base, tmp_path, capsys):
    adapter = write_adapter(base, tmp_path / "adapter")
    lost = write_adapter(base, tmp_path / "lost")
    config = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/model"}))
    tied = tmp_path / "tied"
    model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=True)
    model.save_pretrained(tied)
    AutoTokenizer.from_pretrained(base).save_pretrained(tied)
    half_tied = write_adapter(tied, tmp_path / "half-tied", target_modules=["lm_head"])
    (tmp_path / "there").mkdir()
    for given, folder, message in [
        (base, "merged", "is not an adapter: it has no adapter_config.json"),
        (adapter, "there", "already exists; choose a new folder"),
        (lost, "merged", "is an adapter whose base model is missing: there is no folder '/nowhere/model'"),
        (half_tied, "merged", "which share their weights in this model"),
        (tmp_path / "nothing", "merged", "there is no folder"),
    ]:
        assert cli.main(["merge", str(given), f"--output_dir={tmp_path / folder}"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "merged").exists()
    assert not list((tmp_path / "there").iterdir())
