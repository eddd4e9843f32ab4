"""``CPOConfig`` and ``CPOTrainer``: TRL's tutorial script, its numbers by the formula, and rejected settings."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, HfArgumentParser, TrainerCallback, TrainingArguments

from simpo import SimpoError
from simpo.compat import CPOConfig, CPOTrainer

SCRIPT = """
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from simpo.compat import CPOConfig, CPOTrainer

model = AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
train_dataset = load_dataset("json", data_files=DATA, split="train")
training_args = CPOConfig(
    output_dir=OUT, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.5, beta=2.0, num_train_epochs=1,
    per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to="none", disable_tqdm=True,
)
trainer = CPOTrainer(ARGUMENTS)
trainer.train()
trainer.save_model(OUT)
messages = [{"role": "user", "content": "What is 1 plus 1?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
"""


@pytest.fixture
def make_trainer(tmp_path, quiet, opt, rows, tokenizer):
    """``make_trainer(**settings)``: a quiet trainer for the tiny OPT; trainer arguments go into ``arguments``."""

    def make(*, arguments=None, **settings):
        pure = {"output_dir": str(tmp_path / "out"), "loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0}
        args = CPOConfig(**quiet | pure | settings)
        given = {"model": opt, "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
        return CPOTrainer(args=args, **given | (arguments or {}))

    return make


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


# ---- the script ----


@pytest.mark.parametrize(
    "arguments",
    [
        "model=model, args=training_args, processing_class=tokenizer, train_dataset=train_dataset",
        "model=model, args=training_args, tokenizer=tokenizer, train_dataset=train_dataset, eval_dataset=train_dataset",
        "MODEL, training_args, None, train_dataset, None, tokenizer",
    ],
)
def test_the_tutorial_script_runs(arguments, model_folder, data_file, tmp_path):
    out = tmp_path / "out"
    names = {"MODEL": model_folder, "DATA": data_file, "OUT": str(out)}
    exec(compile(SCRIPT.replace("ARGUMENTS", arguments), "script", "exec"), names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 2  # 8 pairs, 4 per step
    assert names["answer"].shape[1] == names["inputs"].input_ids.shape[1] + 4
    saved = AutoModelForCausalLM.from_pretrained(out)
    start = AutoModelForCausalLM.from_pretrained(model_folder)
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(saved.get_parameter(name), weight.to(saved.dtype)), name
    assert any(not torch.equal(saved.get_parameter(name), weight) for name, weight in start.named_parameters())
    assert (out / "tokenizer.json").is_file()


def test_trl_parses_its_scripts_with_transformers(tmp_path):
    line = f"--output_dir {tmp_path} --loss_type simpo --beta 2.5 --cpo_alpha 0 --use_cpu --model_init_kwargs"
    (args,) = HfArgumentParser(CPOConfig).parse_args_into_dataclasses([*line.split(), '{"dtype": "float32"}'])
    assert (args.beta, args.cpo_alpha, args.model_init_kwargs) == (2.5, 0.0, {"dtype": "float32"})


# ---- numbers ----


@pytest.mark.parametrize("budget", [None, 200])
@pytest.mark.parametrize("cpo_alpha", [0.0, 1.0])
def test_training_matches_the_formula(cpo_alpha, budget, make_trainer, opt, naive_step):
    """Losses of an epoch's steps, including an incomplete last one, and the weights, whatever the micro-batches."""
    naive = copy.deepcopy(opt).train()
    optimizer = torch.optim.SGD(opt.parameters(), lr=0.01)
    trainer = make_trainer(
        arguments={"optimizers": (optimizer, None)},
        cpo_alpha=cpo_alpha,
        simpo_gamma=0.8,
        max_batch_tokens=budget,
        num_train_epochs=1,
        per_device_train_batch_size=3,
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    pairs = list(trainer.train_dataset)
    steps = [pairs[first : first + 3] for first in range(0, len(pairs), 3)]
    assert len(logged) == len(steps)
    optimizer = torch.optim.SGD(naive.parameters(), lr=0.01)
    for batch, found in zip(steps, logged, strict=True):
        loss = naive_step(naive, batch, beta=2.0, gamma=0.8, sft_weight=cpo_alpha)
        assert found == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, weight in trainer.model.named_parameters():
        torch.testing.assert_close(weight, naive.get_parameter(name), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("cpo_alpha", [0.0, 0.7])
def test_evaluation_matches_the_formula(cpo_alpha, make_trainer, opt, rows, naive_step):
    """As in TRL, the SFT term averages over the tokens of each batch; batches are weighted by their rows."""
    trainer = make_trainer(
        arguments={"eval_dataset": Dataset.from_list(rows)}, cpo_alpha=cpo_alpha, per_device_eval_batch_size=3
    )
    pairs = list(trainer.eval_dataset)
    with torch.no_grad():
        batches = [pairs[first : first + 3] for first in range(0, len(pairs), 3)]
        losses = [naive_step(opt, batch, 2.0, 0.5, cpo_alpha).item() * len(batch) for batch in batches]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / len(pairs), rel=1e-5)


def test_sigmoid_loss_is_cpo(make_trainer, opt, naive_step):
    trainer = make_trainer(loss_type="sigmoid", cpo_alpha=0.5, beta=0.1, per_device_train_batch_size=8, max_steps=1)
    pairs = list(trainer.train_dataset)
    scores = trainer.score_rows(trainer.train_dataset)
    margins = torch.tensor(0.1 * (scores["logps/chosen"] - scores["logps/rejected"]))  # sums
    chosen = -naive_step(opt, pairs, 1.0, 0.0, 1.0).item() + naive_step(opt, pairs, 1.0, 0.0).item()
    trainer.train()
    expected = -F.logsigmoid(margins).mean().item() - 0.5 * chosen
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert (trainer.args.objective, trainer.args.loss_type) == ("cpo", "sigmoid")


# ---- data ----


def test_strings_are_used_unchanged(make_trainer, text_rows, tokenizer):
    """TRL applies the chat template only to conversations; scripts that render themselves pass strings."""
    trainer = make_trainer(arguments={"train_dataset": text_rows})
    for row, ids in zip(text_rows, trainer.train_dataset, strict=True):
        assert tokenizer.decode(ids["prompt_ids"]) == row["prompt"]
        assert tokenizer.decode(ids["response_ids"][0]) == row["chosen"] + tokenizer.eos_token
    assert trainer.processing_class.chat_template == tokenizer.chat_template


# ---- adapters ----


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peft_config_trains_only_an_adapter(checkpointing, make_trainer, opt, tmp_path):
    before = weights_of(opt)
    trainer = make_trainer(
        arguments={"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")},
        learning_rate=1e-2,
        gradient_checkpointing=checkpointing,
        num_train_epochs=1,
    )
    assert isinstance(trainer.model, PeftModel)
    adapter = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if "lora_B" in name}
    trainer.train()
    for name, weight in adapter.items():
        assert not torch.equal(weight, trainer.model.get_parameter(name)), name
    base = trainer.model.unload()
    assert all(torch.equal(base.get_parameter(name), weight) for name, weight in before.items())
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_an_adapter_is_initialized_from_the_seed(make_trainer, opt):
    def start(seed: int) -> dict[str, torch.Tensor]:
        lora = LoraConfig(r=2, target_modules=["q_proj"])
        trainer = make_trainer(arguments={"peft_config": lora, "model": copy.deepcopy(opt)}, seed=seed)
        return weights_of(trainer.model)

    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())
    assert any(not torch.equal(weight, other[name]) for name, weight in first.items())


# ---- models by name ----


def test_a_model_can_be_given_by_name(make_trainer, model_folder, tokenizer):
    fp32 = make_trainer(arguments={"model": model_folder, "processing_class": None})
    assert fp32.model.dtype == torch.float32
    assert fp32.processing_class.get_vocab() == tokenizer.get_vocab()
    options = {"torch_dtype": torch.bfloat16, "revision": "main", "use_cache": False, "device_map": "auto"}
    assert make_trainer(arguments={"model": model_folder}, model_init_kwargs=options).model.dtype == torch.bfloat16


# ---- the configuration ----


def config(**settings) -> CPOConfig:
    pure = {"output_dir": "unused", "use_cpu": True, "loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0}
    return CPOConfig(**pure | settings)


def test_attributes_keep_their_given_values():
    args = config(beta=2.5, simpo_gamma=1.0, cpo_alpha=0.25)
    assert (args.beta, args.simpo_gamma, args.cpo_alpha, args.loss_type) == (2.5, 1.0, 0.25, "simpo")
    assert args.hyperparameters["gamma_beta_ratio"] == pytest.approx(0.4)
    copied = dataclasses.replace(args, beta=5.0)
    assert (copied.beta, copied.hyperparameters["gamma_beta_ratio"]) == (5.0, pytest.approx(0.2))
    assert config(max_length=None).max_length == 512


@pytest.mark.parametrize("given", [{}, {"fp16": False}, {"bf16": False}, {"gradient_checkpointing": False}])
def test_memory_defaults_are_trls(given):
    args = config(**given)
    assert args.bf16 == given.get("bf16", True)
    assert args.gradient_checkpointing == given.get("gradient_checkpointing", True)


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({}, []),
        ({"simpo_gamma": 1.6}, []),
        (
            {"beta": 0.1, "simpo_gamma": 0.05},
            ["beta 0.1 "],
        ),
        ({"beta": 10.0}, ["gamma is 0.05 times beta"]),
        ({"cpo_alpha": 1.0}, ["an SFT term of weight 1"]),
        (
            {"cpo_alpha": 1.0, "gradient_accumulation_steps": 2},
            ["an SFT term of weight 1", "averaged over the chosen tokens of the whole optimizer step"],
        ),
        ({"learning_rate": 2e-5}, ["learning_rate 2e-05"]),
        ({"label_pad_token_id": 0}, ["label_pad_token_id "]),
        ({"padding_value": 1, "max_completion_length": 9}, ["max_completion_length ", "padding_value "]),
        ({"max_length": None}, ["max_length is not set; using 512"]),
    ],
)
def test_warnings_are_logged(settings, messages, caplog):
    with caplog.at_level(logging.WARNING, "simpo"):
        config(**settings)
    assert len(caplog.messages) == len(messages)
    assert all(
        found.startswith(expected) or expected in found
        for found, expected in zip(caplog.messages, messages, strict=True)
    )


def test_trls_own_defaults_are_used_and_logged(caplog):
    with caplog.at_level(logging.WARNING, "simpo"):
        args = CPOConfig("unused", use_cpu=True, loss_type="simpo")
    assert args.hyperparameters["beta"] == 0.1
    assert args.hyperparameters["gamma_beta_ratio"] == pytest.approx(5.0)
    assert args.sft_weight == 1.0
    assert [message.split()[0] for message in caplog.messages] == ["beta", "gamma", "an"]


@pytest.mark.parametrize("settings", [{"loss_type": "alphapo"}, {"loss_type": "simpo", "cpo_alpha": 0.0}])
def test_alpha_selects_alphapo(settings):
    args = config(alpha=0.25, beta=2.5, simpo_gamma=0.5, **settings)
    assert args.objective == "alphapo"
    expected = {"alpha": 0.25, "beta": 2.5, "gamma_beta_ratio": 0.2, "label_smoothing": 0.0}
    assert args.hyperparameters == pytest.approx(expected)
    assert args.sft_weight == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "hinge"}, "loss_type: 'hinge'"),
        ({"loss_type": "ipo"}, "loss_type: 'ipo'"),
        ({"loss_type": "no such"}, "loss_type: 'no such'"),
        ({"loss_type": "sigmoid", "alpha": 0.1}, "alpha: only applies to loss_type"),
        ({"generate_during_eval": True}, "generate_during_eval: not supported"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder: not supported"),
        ({"gamma_beta_ratio": 0.5}, "gamma_beta_ratio: not a key of CPOConfig; set simpo_gamma"),
        ({"gamma": 1.0}, "gamma: not a key of CPOConfig; set simpo_gamma"),
        ({"sft_weight": 0.1}, "sft_weight: not a key of CPOConfig; set cpo_alpha"),
        ({"beta": 0.0}, "beta must be > 0"),
        ({"cpo_alpha": -1.0}, "cpo_alpha: must be at least 0, not -1"),
        ({"simpo_gamma": float("nan")}, "simpo_gamma: must be finite, not nan"),
        ({"truncation_mode": "middle"}, "truncation_mode"),
        ({"max_length": 100, "max_prompt_length": 100}, "max_prompt_length: 100 leaves no room"),
    ],
)
def test_unsupported_keys_are_rejected(settings, message):
    with pytest.raises(SimpoError, match=message) as caught:
        config(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ({"model": None}, {}, "model: missing; pass a model"),
        ({"data_collator": list}, {}, "data_collator: not supported"),
        ({"model_init": list}, {}, "model_init: not supported"),
        ({"preprocess_logits_for_metrics": list}, {}, "preprocess_logits_for_metrics: not supported"),
        ({"compute_metrics": list}, {}, "compute_metrics: not supported"),
        ({"peft_config": {"r": 2}}, {}, "peft_config: got a dict; pass"),
        ({"processing_class": None}, {}, "processing_class: .*the model has no name"),
        ({"tokenizer": "given twice"}, {}, "tokenizer: the older name"),
        ({}, {"model_init_kwargs": {"dtype": "float32"}}, "model_init_kwargs: the model is already loaded"),
        ({"model": "x"}, {"model_init_kwargs": {"max_memory": {}}}, "model_init_kwargs: 'max_memory' is not supported"),
        ({"model": "no/such/folder"}, {}, "no folder 'no/such/folder'"),
    ],
)
def test_unsupported_arguments_are_rejected(arguments, settings, message, make_trainer):
    with pytest.raises(SimpoError, match=message) as caught:
        make_trainer(arguments=arguments, **settings)
    assert "\n" not in str(caught.value)


def test_unsupported_models_are_rejected(make_trainer, opt):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    adapted = make_trainer(arguments={"peft_config": lora}).model
    with pytest.raises(SimpoError, match="peft_config: the model already has an adapter"):
        make_trainer(arguments={"model": adapted, "peft_config": lora})
    opt.is_loaded_in_4bit = True
    with pytest.raises(SimpoError, match="peft_config: not supported for quantized models"):
        make_trainer(arguments={"peft_config": lora})


def test_another_configuration_class_is_rejected(opt, tmp_path):
    with pytest.raises(
        SimpoError, match=r"args: got a transformers.*TrainingArguments; import CPOConfig from simpo.compat"
    ):
        CPOTrainer(opt, TrainingArguments(str(tmp_path), use_cpu=True))


def test_callbacks_are_called(make_trainer):
    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, *args, **kwargs):
            self.steps += 1

    count = Count()
    trainer = make_trainer(arguments={"callbacks": [count]}, per_device_train_batch_size=4, num_train_epochs=1)
    trainer.train()
    assert count.steps == 2
    assert not Path(trainer.args.output_dir, "checkpoint-2").exists()
