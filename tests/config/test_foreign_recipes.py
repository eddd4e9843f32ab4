"""Recipes from other toolkits: one error lists all edits, and the edited recipe trains what the original describes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from simpo.cli.training import parse
from simpo.errors import SimpoError
from simpo.training.preference import PreferenceConfig
from simpo.training.reward import RewardConfig
from simpo.training.sft import SFTConfig

# A recipe with a toolkit's keys, the keys named in the error, the edits it asks for, and the resulting training.
LLAMA_FACTORY = """
model_name_or_path: org/model
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj, v_proj
pref_beta: 2.5
pref_loss: simpo
simpo_gamma: 0.5
pref_ftx: 0.1
dataset: dpo_en_demo
template: qwen3_nothink
cutoff_len: 1024
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/simpo
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
flash_attn: auto
val_size: 0.1
include_num_input_tokens_seen: true
"""
AXOLOTL = """
base_model: org/model
model_type: LlamaForCausalLM
load_in_8bit: true
chat_template: llama3
rl: simpo
rl_beta: 2.0
simpo_gamma: 1.0
cpo_alpha: 0.0
datasets:
  - path: org/pairs
    type: chat_template.default
dataset_prepared_path:
val_set_size: 0.0
output_dir: ./out
sequence_len: 4096
sample_packing: false
adapter: lora
lora_model_dir:
lora_r: 32
lora_alpha: 16
lora_target_linear: true
wandb_project:
wandb_name: mine
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_torch
lr_scheduler: linear
learning_rate: 0.0002
bf16: auto
evals_per_epoch: 4
special_tokens:
  pad_token: <pad>
"""
HANDBOOK = """
model_name_or_path: org/model
torch_dtype: null
dataset_mixture:
  datasets:
    - id: org/pairs
      split: train_prefs
      weight: 1.0
  test_split_size: 100
dataset_num_proc: 12
beta: 0.05
do_eval: true
evaluation_strategy: "no"
gradient_accumulation_steps: 2
hub_model_id: zephyr
learning_rate: 5.0e-7
log_level: info
lr_scheduler_type: inverse_sqrt
max_length: 1024
max_prompt_length: 512
output_dir: data/zephyr
per_device_train_batch_size: 8
warmup_ratio: 0.1
"""
TRL = """
model_name_or_path: org/model
dataset_name: org/pairs
loss_type: [sigmoid]
beta: 0.1
rpo_alpha: 1.0
ref_model: org/other
output_dir: out
use_logits_to_keep: true
f_divergence_type: reverse_kl
"""
OPEN_INSTRUCT = """
model_name_or_path: org/model
use_flash_attn: true
dataset_mixer_list: [org/pairs, 1.0]
dpo_loss_type: dpo_norm
dpo_beta: 5
max_seq_length: 2048
output_dir: out
lora_target: all
"""


def settings(config):
    return {
        "objective": config.objective,
        **config.hyperparameters,
        "sft_weight": config.sft_weight,
        "learning_rate": config.learning_rate,
        "pairs": config.per_device_train_batch_size,
        "epochs": config.num_train_epochs,
        "scheduler": str(getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)),
        "max_length": config.max_length,
    }


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text):
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        return "recipe.yaml"

    return write


def mistakes(argv, kind=PreferenceConfig):
    """Return key -> message for every mistake in the error."""
    with pytest.raises(SimpoError) as caught:
        parse([*argv, "--use_cpu"], kind)
    assert "\n" not in str(caught.value)
    found = [re.sub(r"^recipe\.yaml:\d+: ", "", mistake) for mistake in caught.value.args]
    assert all(mistake in str(caught.value) for mistake in found)
    return {key: message for key, _, message in (mistake.partition(":") for mistake in found)}


def edited(text, removed, added):
    """Return ``text`` without the top-level ``removed`` keys and their contents, and with ``added``."""
    blocks = re.findall(r"^\S.*\n(?:[ \t].*\n)*", text, re.MULTILINE)
    return "".join(block for block in blocks if block.split(":")[0] not in removed) + added


CASES = {
    "llama-factory": (
        LLAMA_FACTORY,
        {"dataset", "template", "max_samples", "val_size", "include_num_input_tokens_seen", "dataset_name"},
        "dataset_name: org/pairs\ndataset_train_split: 'train[:1000]'\n",
        {"objective": "simpo", "beta": 2.5, "gamma_beta_ratio": 0.2, "sft_weight": 0.1, "learning_rate": 5e-6}
        | {"pairs": 8, "epochs": 3, "scheduler": "cosine", "max_length": 1024},
    ),
    "axolotl": (
        AXOLOTL,
        {"load_in_8bit", "chat_template", "datasets", "bf16", "evals_per_epoch", "special_tokens", "dataset_name"},
        "dataset_name: org/pairs\n",
        {"objective": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5, "sft_weight": 0, "learning_rate": 2e-4}
        | {"pairs": 8, "epochs": 4, "scheduler": "linear", "max_length": 4096},
    ),
    "alignment-handbook dpo": (
        HANDBOOK,
        {"objective"},
        "objective: dpo\n",
        {"objective": "dpo", "beta": 0.05, "learning_rate": 5e-7, "pairs": 16, "scheduler": "inverse_sqrt"}
        | {"max_length": 1024},
    ),
    "alignment-handbook orpo": (
        HANDBOOK.replace("beta: 0.05\n", "beta: 0.05\noptim: adamw_torch\n"),
        {"objective"},
        "objective: orpo\nlam: 0.05\n",
        {"objective": "orpo", "lam": 0.05},
    ),
    "trl": (
        TRL,
        {"loss_type", "rpo_alpha", "ref_model", "objective"},
        "objective: dpo\nsft_weight: 1.0\n",
        {"objective": "dpo", "beta": 0.1, "sft_weight": 1.0},
    ),
    "open-instruct": (
        OPEN_INSTRUCT,
        {"dataset_mixer_list", "dataset_name"},
        "dataset_name: org/pairs\nuse_peft: true\n",
        {"objective": "dpo_norm", "beta": 5.0, "max_length": 2048},
    ),
}


@pytest.mark.parametrize(("text", "named", "added", "trained"), CASES.values(), ids=CASES)
def test_one_error_lists_every_edit(text, named, added, trained, recipe):
    found = mistakes([recipe(text)])
    assert set(found) == named
    replaced = {"beta"} if "lam:" in added else set()
    _, _, config = parse([recipe(edited(text, named | replaced, added)), "--use_cpu"], PreferenceConfig)
    assert settings(config).items() >= trained.items()


def test_the_error_says_what_to_write(recipe):
    found = mistakes([recipe(LLAMA_FACTORY)]) | mistakes([recipe(AXOLOTL)])
    for key, ours in {
        "dataset": "dataset_name",
        "datasets": "dataset_mixture",
        "template": "chat_template",
        "val_size": "eval_dataset_name",
        "evals_per_epoch": "eval_steps",
        "max_samples": "dataset_train_split",
        "load_in_8bit": "load_in_4bit",
    }.items():
        assert ours in found[key], key


def test_adapter_defaults_match_llama_factory(recipe):
    text = edited(LLAMA_FACTORY, CASES["llama-factory"][1], "dataset_name: org/pairs\n")
    model, _, config = parse([recipe(text), "--use_cpu"], PreferenceConfig)
    assert (model.use_peft, model.lora_r, model.lora_alpha) == (True, 8, 16)
    assert (model.lora_target_modules, config.dataset_num_proc) == (["q_proj", "v_proj"], 16)
    model, _, _ = parse([recipe(text + "lora_alpha: 4\nquantization_bit: 4\n"), "--use_cpu"], PreferenceConfig)
    assert (model.lora_alpha, model.load_in_4bit) == (4, True)


@pytest.mark.parametrize(
    ("kind", "stage", "objective"),
    [(PreferenceConfig, "kto", "kto"), (SFTConfig, "sft", None), (RewardConfig, "rm", None)],
)
def test_a_stage_corresponds_to_a_command(kind, stage, objective, recipe):
    text = f"stage: {stage}\nmodel: m\ndataset_name: d\noutput_dir: out\n"
    _, _, config = parse([recipe(text), "--use_cpu"], kind)
    assert getattr(config, "objective", None) == objective
    other = SFTConfig if kind is PreferenceConfig else PreferenceConfig
    command = {"kto": "train", "sft": "sft", "rm": "reward"}[stage]
    assert f"simpo {command}" in mistakes([recipe(text)], other)["stage"]


@pytest.mark.parametrize(
    ("line", "unclear"),
    [
        ("ref_model: org/other", True),
        ("rpo_alpha: 1.0", True),
        ("cpo_alpha: 1.0", True),
        ("orpo_alpha: 0.1", True),
        ("dpo_beta: 0.1", True),
        ("f_divergence_type: reverse_kl", True),
        ("ref_model: null", False),
        ("cpo_alpha: 0.0", False),
        ("reference_free: false", False),
        ("cpo_alpha: 1.0\nloss_type: simpo", False),
        ("cpo_alpha: 1.0\nsimpo_gamma: 1.0", False),
        ("ref_model: x\nrl: dpo", False),
    ],
)
def test_keys_of_another_objective_require_an_objective(line, unclear, recipe):
    """Otherwise, once they are removed as their own errors ask, SimPO would be trained."""
    text = f"model: m\ndataset_name: d\noutput_dir: out\n{line}\nno_such_key: 1\n"
    assert ("objective" in mistakes([recipe(text)])) == unclear


def test_a_missing_objective_is_a_single_error(recipe):
    """A beta on the scale of DPO's is another reason for the same edit."""
    path = recipe("model: m\ndataset_name: d\noutput_dir: out\nref_model: org/other\nbeta: 0.1\nuse_cpu: true\n")
    with pytest.raises(SimpoError) as caught:
        parse([path], PreferenceConfig)
    assert sum("objective: not given" in mistake for mistake in caught.value.args) == 1


@pytest.mark.parametrize(
    ("key", "value", "objective"),
    [("rl", "dpo", "dpo"), ("rl", "orpo", "orpo"), ("pref_loss", "sigmoid", "dpo"), ("trainer_type", "simpo", "simpo")],
)
def test_objective_names_of_other_toolkits(key, value, objective, recipe):
    text = f"{key}: {value}\nmodel_name: m\ndataset_path: d\nsave_path: out\n"
    assert parse([recipe(text), "--use_cpu"], PreferenceConfig)[2].objective == objective
    assert "'grpo'" in mistakes([recipe(text.replace(value, "grpo"))])[key]


def test_ipo_from_other_toolkits_is_length_normalized(recipe):
    text = "rl: ipo\nmodel: m\ndataset_name: d\noutput_dir: out\ntau: 0.2\n"
    found = parse([recipe(text), "--use_cpu"], PreferenceConfig)[2]
    assert found.hyperparameters == {"tau": 0.2, "length_normalized": True}
    # Their beta is our tau: an error rather than a guess.
    with pytest.raises(SimpoError, match=r"beta is not a hyperparameter of objective 'ipo' .*tau"):
        parse([recipe(text.replace("tau", "rl_beta")), "--use_cpu"], PreferenceConfig)


def test_openrlhf_flags_are_translated(tmp_path):
    argv = "--pretrain org/model --dataset_name org/pairs --max_len 1024 --micro_train_batch_size 2 --beta 2"
    argv += f" --objective simpo --save_path {tmp_path}"
    argv += " --lr_scheduler linear --l2 0.1 --packing_samples --lr_warmup_ratio 0.03"
    model, _, config = parse([*argv.split(), "--use_cpu"], PreferenceConfig)
    assert (model.model_name_or_path, config.max_length, config.per_device_train_batch_size) == ("org/model", 1024, 2)
    assert (config.weight_decay, config.warmup_steps, config.objective) == (0.1, 0.03, "simpo")


# As in open-instruct's configs/train_configs/dpo: no objective or beta is given, and one key is given twice.
UNSAID = """
model_name_or_path: org/model
gradient_checkpointing: true
tokenizer_name: org/model
use_slow_tokenizer: true
dataset_name: org/pairs
max_seq_length: 2048
num_epochs: 3
gradient_checkpointing: true
with_tracking: true
checkpointing_steps: 1000
keep_last_n_checkpoints: 3
output_dir: out
use_cpu: true
"""


def test_unclear_objectives_and_duplicate_keys_do_not_hide_other_mistakes(recipe):
    with pytest.raises(SimpoError) as caught:
        parse([recipe(UNSAID)], PreferenceConfig)
    named = [re.sub(r"^recipe.yaml:\d+: ", "", mistake).split(":")[0] for mistake in caught.value.args]
    assert named == [
        "gradient_checkpointing", "objective", "tokenizer_name", "with_tracking", "checkpointing_steps",
    ]  # fmt: skip
    assert caught.value.args[0] == "recipe.yaml:9: gradient_checkpointing: already given on line 3"
    kept = [
        line for line in UNSAID.splitlines() if not line.startswith(("gradient", "tokenizer_name", "with_", "check"))
    ]
    _, _, config = parse([recipe("\n".join([*kept, "objective: dpo"]))], PreferenceConfig)
    assert (config.objective, config.num_train_epochs, config.save_total_limit) == ("dpo", 3, 3)


@pytest.mark.parametrize(
    "line, field, expected",
    [
        ("use_lora: true", "use_peft", True),
        ("use_qlora: true\nuse_lora: true", "load_in_4bit", True),
        ("rlhf_type: kto", "objective", "kto"),
        ("train_type: lora", "use_peft", True),
        ("target_modules: all-linear\nuse_peft: true", "lora_target_modules", ["all-linear"]),
        ("max_norm: 0.5", "max_grad_norm", 0.5),
        ("max_ckpt_num: 2", "save_total_limit", 2),
        ("wandb_run_name: mine", "run_name", "mine"),
    ],
)
def test_keys_with_a_counterpart_are_translated(recipe, line, field, expected):
    text = f"model_name_or_path: org/model\ndataset_name: org/pairs\noutput_dir: out\nuse_cpu: true\n{line}\n"
    if "rlhf_type" not in line:
        text += "objective: dpo\n"
    parts = parse([recipe(text)], PreferenceConfig)
    assert [getattr(part, field) for part in parts if hasattr(part, field)] == [expected]


# ---- the paper's own recipes ----

PAPER = """
model_name_or_path: org/model
torch_dtype: null
dataset_mixer:
  org/pairs: 1.0
dataset_splits:
- train_prefs
- test_prefs
preprocessing_num_workers: 12
bf16: true
beta: 2.0
gamma_beta_ratio: 0.5
evaluation_strategy: steps
eval_steps: 400
learning_rate: 6.0e-7
max_length: 2048
max_prompt_length: 1800
output_dir: outputs/simpo
warmup_ratio: 0.1
"""


def paper_tokens(config):
    return config.paper_tokenization, config.truncation, config.auto_insert_empty_system_msg


def test_the_papers_own_recipe_uses_the_papers_tokenization(recipe, caplog):
    _, _, config = parse([recipe(PAPER), "--use_cpu"], PreferenceConfig)
    assert (config.objective, *paper_tokens(config)) == ("simpo", True, "paper", True)
    (notice,) = [message for message in caplog.messages if "paper's own" in message]
    assert "paper_tokenization: true" in notice and "truncation: paper" in notice and "chat_template" in notice


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        (PAPER, ["--truncation", "prompt", "--paper_tokenization", "false"], (False, "prompt", True)),
        (PAPER, ["--dataset_name", "mine", "--objective", "simpo"], (True, "paper", True)),
        (PAPER + "objective: simpo\n", [], (False, "prompt", False)),
        (PAPER.replace("gamma_beta_ratio", "gamma"), [], (False, "prompt", False)),
        (PAPER.replace("gamma_beta_ratio: 0.5", "objective: dpo"), [], (False, "prompt", False)),
        (
            PAPER.replace("preprocessing_num_workers", "dataset_num_proc").replace(
                "evaluation_strategy", "eval_strategy"
            ),
            [],
            (False, "prompt", False),
        ),
    ],
)
def test_paper_tokenization_requires_the_papers_recipe_and_can_be_overridden(text, options, expected, recipe):
    _, _, config = parse([recipe(text), "--use_cpu", *options], PreferenceConfig)
    assert paper_tokens(config) == expected
