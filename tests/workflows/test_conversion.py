"""``simpo recipe --from``: what each toolkit's recipe must train, and which gaps are listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpo.cli.recipe import recipe
from simpo.cli.training import parse
from simpo.errors import SimpoError
from simpo.workflows.conversion import CONFIGS, convert

LLAMA_FACTORY = """
### model
model_name_or_path: org/model
stage: dpo
finetuning_type: lora
lora_target: all
pref_beta: 0.2
pref_loss: orpo
dataset: dpo_en_demo
template: qwen3
cutoff_len: 1024
overwrite_cache: true
plot_loss: true
output_dir: saves/orpo
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
neftune_noise_alpha: 5
"""
AXOLOTL = """
base_model: org/model
rl: ipo
rl_beta: 0.3
chat_template: llama3
special_tokens: {pad_token: "<|pad|>"}
datasets:
  - path: org/pairs
    split: train_prefs
    type: chat_template.default
    field_messages: conversation
val_set_size: 0.05
sequence_len: 4096
sample_packing: true
adapter: qlora
lora_r: 32
micro_batch_size: 2
num_epochs: 2
evals_per_epoch: 4
saves_per_epoch: 0.5
learning_rate: 2e-5
wandb_project:
output_dir: ./out
plugins: [axolotl.integrations.liger.LigerPlugin]
"""
HANDBOOK = """
model_name_or_path: org/model
torch_dtype: null
dataset_mixture:
  datasets:
    - {id: org/pairs, split: train_prefs, columns: [chosen, rejected], weight: 0.5}
  test_split_size: 100
beta: 0.05
max_length: 2048
gradient_checkpointing: true
hub_model_id: mine
output_dir: data/run
warmup_ratio: 0.1
"""
OPEN_INSTRUCT = """
model_name_or_path: org/model
tokenizer_name: org/model
use_slow_tokenizer: true
dataset_mixer: {org/one: 0.5, org/two: 2000}
max_seq_length: 2048
num_epochs: 1
use_lora: false
loss_type: dpo_norm
with_tracking: false
checkpointing_steps: 1000
output_dir: out
"""


@pytest.fixture
def converted(tmp_path):
    """``converted(text, name)``: the conversion of a recipe, and what a command reads from the result."""

    def run(text: str, name: str = "theirs.yaml", *more: str):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        found = convert(path)
        ours = tmp_path / "ours.yaml"
        ours.write_text(found.text(path.name))
        arguments = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", *more]
        return found, parse([str(ours), *arguments], CONFIGS[found.command])

    return run


def test_llama_factory_recipes_are_converted(converted):
    found, (model, _, config) = converted(LLAMA_FACTORY, "theirs.yaml", "--dataset_name", "pairs.jsonl")
    assert (found.toolkit, found.command) == ("LLaMA-Factory", "train")
    assert (config.objective, config.hyperparameters) == ("orpo", {"lam": 0.2})
    assert (model.use_peft, model.lora_target_modules, model.lora_r, model.lora_dropout) == (True, ["all-linear"], 8, 0)
    assert (config.max_length, config.learning_rate, config.per_device_train_batch_size) == (1024, 5e-6, 8)
    assert (config.num_train_epochs, config.lr_scheduler_type, config.warmup_steps) == (3, "linear", 0)  # defaults
    named = [gap.partition(": ")[2].partition(":")[0] for gap in found.gaps[:-1]]
    assert named == ["dataset", "template", "neftune_noise_alpha"]
    assert found.gaps[0].startswith("line 9: ")
    assert found.gaps[-1].startswith("dataset_name is missing")


def test_axolotl_recipes_are_converted(converted):
    found, (model, data, config) = converted(AXOLOTL)
    assert (found.toolkit, found.command) == ("Axolotl", "train")
    assert (config.objective, config.hyperparameters) == ("ipo", {"tau": 0.3, "length_normalized": True})
    expected = {"datasets": [{"id": "org/pairs", "split": "train_prefs"}], "test_split_size": 0.05}
    assert data.dataset_mixture == expected
    assert (model.use_peft, model.load_in_4bit, model.lora_r) == (True, True, 32)
    assert (config.eval_strategy, config.eval_steps) == ("steps", 1 / 8)
    assert config.save_strategy == "epoch"  # "every two epochs" of two epochs is not a fraction below 1
    assert (config.max_length, config.num_train_epochs, config.warmup_steps) == (4096, 2, 0.03)
    named = [gap.partition(": ")[2].partition(":")[0] for gap in found.gaps]
    assert named == ["chat_template", "datasets", "plugins"]
    assert "field_messages" in found.gaps[1]


@pytest.mark.parametrize(
    ("folder", "objective", "hyperparameters"),
    [("dpo", "dpo", {"beta": 0.05, "label_smoothing": 0.0}), ("orpo", "orpo", {"lam": 0.05})],
)
def test_alignment_handbook_recipes_are_converted(folder, objective, hyperparameters, converted):
    found, (_, data, config) = converted(HANDBOOK, f"recipes/{folder}/config.yaml")
    assert (found.toolkit, found.command, found.gaps) == ("alignment-handbook", "train", [])
    assert (config.objective, config.hyperparameters) == (objective, hyperparameters)
    assert data.dataset_mixture["datasets"][0]["weight"] == 0.5
    assert (config.learning_rate, config.warmup_steps, config.num_train_epochs) == (1e-6, 0.1, 3)


def test_open_instruct_recipes_are_converted(converted):
    found, (model, data, config) = converted(OPEN_INSTRUCT)
    assert (found.toolkit, found.command) == ("open-instruct", "train")
    assert (config.objective, config.beta) == ("dpo_norm", 5)
    entries = [{"id": "org/one", "weight": 0.5}, {"id": "org/two", "split": "train[:2000]"}]
    assert data.dataset_mixture == {"datasets": entries}
    assert (config.save_strategy, config.save_steps, config.num_train_epochs) == ("steps", 1000, 1)
    assert not model.use_peft
    assert [gap.split(": ")[1] for gap in found.gaps] == ["dataset_mixer"]


def test_sft_and_reward_recipes_are_converted(converted):
    assert converted(OPEN_INSTRUCT.replace("loss_type: dpo_norm\n", ""))[0].command == "sft"
    assert converted(AXOLOTL.replace("rl: ipo\nrl_beta: 0.3\n", "reward_model: true\n"))[0].command == "reward"
    text = LLAMA_FACTORY.replace("stage: dpo", "stage: rm")
    assert converted(text, "theirs.yaml", "--dataset_name", "pairs.jsonl")[0].command == "reward"


def test_the_command_writes_a_recipe_and_lists_gaps(tmp_path, capsys):
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    theirs.write_text(AXOLOTL)
    recipe(["--from", str(theirs), "--output", str(ours)])
    assert f"next:   simpo train {ours}" in capsys.readouterr().out
    recipe([f"--from={theirs}"])
    assert capsys.readouterr().out == ours.read_text()


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("rows: 3\n", [], "--from: .*theirs.yaml has no key that identifies"),
        (AXOLOTL.replace("ipo", "grpo"), [], "--from: .*: rl: grpo has no counterpart"),
        (LLAMA_FACTORY.replace("dpo\n", "pt\n"), [], "stage: pt has no counterpart"),
        (AXOLOTL + "rl: dpo\n", [], "rl: already given on line 3"),
        (AXOLOTL, ["--objective", "dpo"], "--from: .* leave --objective"),
    ],
)
def test_unusable_input_is_rejected(text, arguments, message, tmp_path):
    path = Path(tmp_path / "theirs.yaml")
    path.write_text(text)
    with pytest.raises(SimpoError, match=message):
        recipe(["--from", str(path), *arguments])


def test_a_setting_or_a_recipe_is_required():
    with pytest.raises(SimpoError, match="--setting: missing"):
        recipe(["--objective", "dpo"])


def test_extra_keys_of_an_axolotl_held_out_set_are_gaps(converted):
    text = AXOLOTL + "test_datasets: [{path: org/held_out, name: english, split: test}]\n"
    found, (_, data, _) = converted(text)
    assert (data.eval_dataset_name, data.dataset_test_split) == ("org/held_out", "test")
    assert any("test_datasets: name english" in gap for gap in found.gaps)


@pytest.mark.parametrize(
    "text",
    [
        LLAMA_FACTORY.replace("pref_loss: orpo", "pref_loss: hinge"),
        OPEN_INSTRUCT.replace("loss_type: dpo_norm", "loss_type: wpo"),
    ],
)
def test_no_default_replaces_a_loss_without_counterpart(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    found = convert(path)
    assert found.command == "train" and "objective" not in found.values
    assert "objective is missing: add it" in found.gaps


def test_values_of_the_wrong_type_are_gaps(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("base_model: m\nnum_epochs: 0\nevals_per_epoch: 2\ndatasets: org/pairs\ntest_datasets: 5\n")
    assert [gap.split(": ")[1] for gap in convert(path).gaps[:2]] == ["datasets", "test_datasets"]
    path.write_text("model_name_or_path: m\nuse_slow_tokenizer: false\ndataset_mixer: [1, 2]\n")
    assert convert(path).gaps[0].startswith("line 3: dataset_mixer: ")
