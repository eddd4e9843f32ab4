"""Models with their own code: every command runs it only with permission, and says so."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from simpo import cli

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class {0}Config(LlamaConfig):
    model_type = "simpo_test_{0}"


class {0}ForCausalLM(LlamaForCausalLM):
    config_class = {0}Config
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory, write_chat_model):
    """A tiny chat model with its configuration and class in a file next to it."""
    folder = tmp_path_factory.mktemp("remote") / "model"
    write_chat_model(folder, ["Which color is grass?", "Grass is green.", "What does a dog do?"] * 4, 128)
    (folder / "code_of_toy.py").write_text(CODE.format("Toy"))
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "code_of_toy.ToyConfig", "AutoModelForCausalLM": "code_of_toy.ToyForCausalLM"}
    changes = {"model_type": "simpo_test_Toy", "architectures": ["ToyForCausalLM"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """A folder with pairs, answers, and an adapter for the model."""
    folder = tmp_path_factory.mktemp("files")
    pair = {"prompt": "Which color is grass?", "chosen": "Grass is green.", "rejected": "What?"}
    (folder / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 4)
    answers = {"id": "0", "prompt": pair["prompt"], "responses": [pair["chosen"], pair["rejected"]]}
    (folder / "answers.jsonl").write_text(json.dumps(answers) + "\n")
    base = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
    torch.manual_seed(0)
    adapter = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapter.save_pretrained(folder / "adapter")
    return folder


COMMANDS = {
    "train": "train --model_name_or_path={model} --dataset_name={files}/pairs.jsonl --objective=simpo --max_steps=1",
    "sft": "sft --model_name_or_path={model} --dataset_name={files}/sft.jsonl --max_steps=1",
    "sample": "sample {model} {files}/pairs.jsonl --max_new_tokens=2",
    "chat": "chat {model}",
    "merge": "merge {files}/adapter",
    "inspect": "inspect {files}/pairs.jsonl --model={model}",
    "annotate": "annotate {files}/answers.jsonl --annotator=logp:{model}",
    "compare": "compare {model} {model} --prompts={files}/pairs.jsonl --judge=logp:{model} --max_new_tokens=2",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_models_code_only_runs_with_permission(name, model, files, tmp_path, capsys, monkeypatch):
    messages = [{"role": "user", "content": "Which color is grass?"}, {"role": "assistant", "content": "Green."}]
    (files / "sft.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 4)
    monkeypatch.setattr("builtins.input", lambda prompt="": "/exit")
    given = COMMANDS[name].format(model=model, files=files).split()
    if name != "chat":
        given.append(f"--output_dir={tmp_path / 'out'}")
    refused = cli.main(given)
    output = capsys.readouterr()
    if name == "inspect":  # the tokenizer has no code; what the model can read is in its configuration
        assert "trust_remote_code" in output.out
    else:
        assert refused == 2
        assert "trust_remote_code" in output.err.splitlines()[-1]
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert cli.main([*given, "--trust_remote_code", *(["true"] if name in ("train", "sft") else [])]) == 0
    assert "trust_remote_code" not in capsys.readouterr().out
