"""Judges with pickled weights in training: loaded if the recipe allows it, otherwise rejected in one line."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from simpo import cli
from simpo.generation.settings import SamplingSettings
from simpo.models.settings import ModelArguments
from simpo.workflows.loop import LoopRecipe, LoopSettings, _judge_options
from simpo.workflows.pair import PairSettings


@pytest.fixture(scope="module")
def judge(chat_world, tmp_path_factory):
    """The folder of a model with pickled weights."""
    folder = tmp_path_factory.mktemp("judge") / "model"
    shutil.copytree(chat_world / "model", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


COMMANDS = {
    "train": ["--eval_generations=2", "--eval_judge=logp:{judge}", "--eval_strategy=steps", "--eval_steps=1"],
    "online": ["--annotator=logp:{judge}", "--objective=rloo", "--num_generations=2", "--max_new_tokens=4"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_recipes_permission_applies_to_its_judges(command, judge, chat_world, tmp_path, capsys):
    given = [
        command, f"--model_name_or_path={chat_world / 'model'}", f"--dataset_name={chat_world / 'train.jsonl'}",
        f"--eval_dataset_name={chat_world / 'test.jsonl'}", "--max_length=40", "--max_steps=1", "--use_cpu=true",
        "--report_to=none", "--save_strategy=no", "--per_device_train_batch_size=2",
        f"--output_dir={tmp_path / 'run'}", *(option.format(judge=judge) for option in COMMANDS[command]),
    ]  # fmt: skip
    assert cli.main(given) == 2
    error = capsys.readouterr().err
    assert "pytorch_model.bin" in error and "allow_pickle" in error and error.count("\n") == 1
    assert cli.main([*given, "--allow_pickle=true"]) == 0


@pytest.mark.parametrize("allowed", [False, True])
def test_the_recipes_permission_applies_to_a_loops_judges(allowed):
    settings = LoopSettings(prompts="prompts.jsonl", eval_prompts="held-out.jsonl", annotator="logp:judge")
    model, config = ModelArguments("model", allow_pickle=allowed), SimpleNamespace(resume_from_checkpoint=None)
    recipe = LoopRecipe(settings, SamplingSettings(n=2), PairSettings(), model, config)
    assert _judge_options(recipe).allow_pickle == allowed
