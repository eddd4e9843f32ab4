"""TRL's DPO, KTO, ORPO, reward and SFT trainers against ours: keys, ids, losses, TRL's own scripts, rejections."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import logging
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification

from simpo import SimpoError, compat

trl = pytest.importorskip("trl")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL warns that the module is experimental
    orpo, cpo = (pytest.importorskip(f"trl.experimental.{name}") for name in ("orpo", "cpo"))

KINDS = ("DPO", "KTO", "ORPO", "Reward", "SFT")
# Intended differences: no cache while training, columns and losses stay visible, the reference is computed once, and
# an overlong prompt keeps its end.
INTENDED_DIFFERENCES = {"use_cache", "remove_unused_columns", "logging_nan_inf_filter"}
INTENDED_DIFFERENCES_OF = {
    "DPO": {"precompute_ref_log_probs", "label_smoothing", "pad_to_multiple_of", "truncation_mode"},
    "KTO": {"precompute_ref_log_probs", "pad_to_multiple_of"},
    "ORPO": {"beta"},
    "Reward": {"pad_to_multiple_of"},
    "SFT": {"pad_to_multiple_of", "truncation_mode"},
}


def trl_classes(kind: str):
    source = {"ORPO": orpo, "CPO": cpo}.get(kind, trl)
    return getattr(source, f"{kind}Config"), getattr(source, f"{kind}Trainer")


def our_classes(kind: str):
    return getattr(compat, f"{kind}Config"), getattr(compat, f"{kind}Trainer")


@pytest.fixture(autouse=True)
def own_reference_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))


@pytest.fixture
def train_both(tmp_path, quiet, opt, tokenizer):
    """``train_both(kind, rows, **settings)``: TRL's trainer and ours after training the same model in the same way."""

    def train(kind, dataset, *, model=opt, **settings):
        same = {"output_dir": str(tmp_path / "out"), "gradient_checkpointing": False, "learning_rate": 1e-3}
        same |= {"per_device_train_batch_size": 4, "num_train_epochs": 1}
        trained = []
        for config, trainer in (trl_classes(kind), our_classes(kind)):
            args = config(**quiet | same | settings)
            given = {"args": args, "processing_class": copy.deepcopy(tokenizer), "train_dataset": dataset}
            if kind in ("DPO", "KTO"):  # TRL would otherwise look it up by the model's name
                given["ref_model"] = copy.deepcopy(model)
            trained.append(trainer(model=copy.deepcopy(model), **given))
            trained[-1].train()
        return trained

    return train


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_losses(theirs, ours) -> None:
    one, other = losses_of(theirs), losses_of(ours)
    assert other[0] == pytest.approx(one[0], rel=1e-5)
    assert other == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_exists_with_the_same_default(kind):
    theirs, ours = (config("unused", use_cpu=True) for config in (trl_classes(kind)[0], our_classes(kind)[0]))
    names = [field.name for field in dataclasses.fields(theirs)]
    differing = {name for name in names if getattr(theirs, name) != getattr(ours, name)}
    assert differing == INTENDED_DIFFERENCES | INTENDED_DIFFERENCES_OF[kind]


@pytest.mark.parametrize("kind", [*KINDS, "CPO"])
def test_every_argument_exists_in_the_same_position(kind):
    (_, theirs), (_, trainer) = trl_classes(kind), our_classes(kind)
    names = [*inspect.signature(theirs).parameters]
    older = [] if kind in ("Reward", "SFT") else ["tokenizer"]
    assert [*inspect.signature(trainer).parameters] == [*names, *older]
    assert [*inspect.signature(trainer.__init__).parameters] == ["self", *names, *older]

    class Derived(trainer):
        def __init__(self, own, *given, **named):
            super().__init__(*given, **named)

    assert [*inspect.signature(Derived).parameters] == ["own", "given", "named"]
    before = [None] * names.index("data_collator")
    for made in (lambda: trainer(*before, object()), lambda: Derived("own", *before, object())):
        with pytest.raises(SimpoError, match="data_collator"):
            made()
    with pytest.raises(TypeError, match="reward_funcs"):
        trainer(reward_funcs=[])


# ---- losses ----


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "ipo", "beta": 0.3},
        {"loss_type": ["sigmoid", "apo_zero", "sft"], "loss_weights": [0.8, 0.2, 0.5], "beta": 0.3},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"ld_alpha": 0.4},
    ],
)
def test_dpo_matches_trl(settings, train_both, rows):
    theirs, ours = train_both("DPO", Dataset.from_list(rows), **settings)
    for one, other in zip(theirs.train_dataset, ours.train_dataset, strict=True):
        assert one["prompt_ids"] == other["prompt_ids"]
        assert [one["chosen_ids"], one["rejected_ids"]] == other["response_ids"]
    assert_same_losses(theirs, ours)
    for name in ("rewards/margins", "rewards/accuracies", "logps/chosen", "grad_norm"):
        logged = [trainer.state.log_history[1][name] for trainer in (theirs, ours)]
        # TRL logs beta * ratio for every loss.
        if name[:7] != "rewards" or not {"ipo", "alpha_divergence"} & {*map(str, settings.values())}:
            assert logged[1] == pytest.approx(logged[0], rel=1e-4, abs=1e-6), name


def test_text_pairs_without_a_prompt_match_trl(train_both, text_rows):
    texts = [{name: f"{row['prompt']} {row[name]}" for name in ("chosen", "rejected")} for row in text_rows]
    texts += [{"chosen": "a b", "rejected": "c d"}, {"chosen": "It is a", "rejected": "It is so"}]
    dataset = Dataset.from_list(texts)
    found, expected = compat.base.add_prompts(dataset), dataset.map(trl.extract_prompt)
    names = ["prompt", "chosen", "rejected"]
    assert found.select_columns(names)[:] == expected.select_columns(names)[:]
    transcripts = [{name: f"\n\nHuman: Hi\n\nAssistant: {name}" for name in ("chosen", "rejected")}]
    unsplit = compat.base.add_prompts(Dataset.from_list(transcripts))
    assert unsplit[0] == {"prompt": None, **transcripts[0]}
    prompts = [f"What is {a} plus {a}?" for a in range(4)]
    pairs = [
        {"chosen": f"{prompt} That is {2 * a}.", "rejected": f"{prompt} Sorry."} for a, prompt in enumerate(prompts)
    ]
    assert_same_losses(*train_both("DPO", Dataset.from_list(pairs)))


@pytest.mark.parametrize("paired", [True, False])
def test_kto_matches_trl(paired, train_both, rows):
    """The reference point is estimated from different responses, so later losses differ."""
    dataset = Dataset.from_list(rows)
    if not paired:
        dataset = trl.data_utils.unpair_preference_dataset(dataset)
    theirs, ours = train_both("KTO", dataset, desirable_weight=1.5, undesirable_weight=0.7, max_steps=2)
    for one, other in zip(theirs.train_dataset, ours.train_dataset, strict=True):
        assert (one["prompt_ids"], [one["completion_ids"]]) == (other["prompt_ids"], other["response_ids"])
        assert one["label"] == other["label"]
    assert losses_of(ours)[0] == pytest.approx(losses_of(theirs)[0], rel=1e-5)


def test_rankings_are_not_reduced_to_pairs(quiet, opt, tokenizer, tmp_path):
    rows = Dataset.from_list([{"prompt_ids": [5], "response_ids": [[6], [7], [8]], "where": "made up:0"}])
    args = compat.KTOConfig(str(tmp_path), **quiet)
    with pytest.raises(SimpoError, match="made up:0: 3 ranked responses"):
        compat.KTOTrainer(opt, None, args, train_dataset=rows, processing_class=tokenizer)


def test_orpo_matches_trl(train_both, rows, opt):
    """TRL's likelihood term includes the prompt and is logged separately."""
    theirs, ours = train_both("ORPO", Dataset.from_list(rows), max_steps=1)
    chosen = []
    for row in ours.train_dataset.select(range(4)):
        prompt, response = row["prompt_ids"], row["response_ids"][0]
        logits = opt(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        chosen.append(torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    of_chosen = -torch.cat(chosen).mean().item()
    logged = theirs.state.log_history[0]
    assert losses_of(ours)[0] == pytest.approx(logged["loss"] - logged["nll_loss"] + of_chosen, rel=1e-5)


@pytest.fixture
def reward_model(opt, tokenizer, tmp_path):
    opt.save_pretrained(tmp_path / "opt")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "opt", num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


@pytest.mark.parametrize("margin", [False, True])
def test_reward_training_matches_trl(margin, train_both, rows, reward_model):
    if margin:
        rows = [row | {"margin": 0.25 * number} for number, row in enumerate(rows)]
    settings = {"center_rewards_coefficient": 0.01, "learning_rate": 1e-3}
    theirs, ours = train_both("Reward", Dataset.from_list(rows), model=reward_model, **settings)
    assert_same_losses(theirs, ours)
    names = (("margin", "rewards/margins"), ("accuracy", "rewards/accuracies"))
    for one, other in names:
        assert ours.state.log_history[1][other] == pytest.approx(theirs.state.log_history[1][one], rel=1e-4)


def test_reward_training_on_texts_without_a_prompt_matches_trl(train_both, reward_model):
    """The texts may differ within a word, and one may be a prefix of the other; TRL tokenizes each as a whole."""
    chosen = [f"What is {a} plus 2? It is {a + 2}, as 2 and {a} make 4{a}." for a in range(8)]
    rejected = [text[:-1] + (" Sorry." if place % 2 else "5.") for place, text in enumerate(chosen)]
    rejected[0] = chosen[0] + " Sorry."
    rows = [{"chosen": one, "rejected": other} for one, other in zip(chosen, rejected, strict=True)]
    theirs, ours = train_both("Reward", Dataset.from_list(rows), model=reward_model)
    for one, other in zip(theirs.train_dataset, ours.train_dataset, strict=True):
        texts = [[*other["prompt_ids"], *ids] for ids in other["response_ids"]]
        assert texts == [one["chosen_ids"], one["rejected_ids"]]
    assert_same_losses(theirs, ours)


@pytest.mark.parametrize("shape", ["conversations", "completions", "texts", "everything"])
def test_sft_matches_trl(shape, train_both, rows, tokenizer):
    settings = {}
    if shape == "conversations":
        data = [{"messages": row["prompt"] + row["chosen"] + row["prompt"] + row["rejected"]} for row in rows]
    elif shape == "texts":
        data = [{"text": row["chosen"][0]["content"]} for row in rows]
    else:
        data = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        settings = {"completion_only_loss": False} if shape == "everything" else {}
    theirs, ours = train_both("SFT", Dataset.from_list(data), **settings)
    for one, other in zip(theirs.train_dataset, ours.train_dataset, strict=True):
        assert one["input_ids"] == other["prompt_ids"] + other["response_ids"][0]
    assert_same_losses(theirs, ours)


def test_long_texts_are_truncated_and_counted(quiet, opt, tokenizer, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="simpo")
    args = compat.SFTConfig(str(tmp_path), max_length=8, **quiet)
    data = Dataset.from_list([{"text": "a b c d e f g h i j k l m n o p"}, {"text": "a"}])
    trainer = compat.SFTTrainer(opt, args, train_dataset=data, processing_class=tokenizer)
    assert len(trainer.train_dataset[0]["response_ids"][0]) == 7
    assert "the end of a text" in caplog.text


@pytest.mark.parametrize("key", ["completion_only_loss", "assistant_only_loss"])
def test_texts_cannot_be_trained_on_in_part(key, quiet, opt, tokenizer, tmp_path):
    args = compat.SFTConfig(str(tmp_path), **quiet, **{key: True})
    with pytest.raises(SimpoError, match=f"{key}: train "):
        compat.SFTTrainer(opt, args, train_dataset=Dataset.from_list([{"text": "a b"}]), processing_class=tokenizer)


def test_a_formatting_function_is_applied(quiet, opt, tokenizer, tmp_path):
    data = Dataset.from_list([{"question": "a b", "answer": "c"}, {"question": "d", "answer": "e f"}])
    args = compat.SFTConfig(str(tmp_path), **quiet)
    trainer = compat.SFTTrainer(
        opt,
        args,
        None,
        data,
        processing_class=tokenizer,
        formatting_func=lambda row: f"{row['question']} {row['answer']}",
    )
    row = trainer.train_dataset[0]
    assert row["prompt_ids"] + row["response_ids"][0] == tokenizer("a b c" + tokenizer.eos_token).input_ids


# ---- TRL's own scripts with only the imports changed ----


def with_our_imports(source: str) -> str:
    def split(match: re.Match) -> str:
        indent, names = match[1], [name.strip() for name in match[2].strip("()\n ").split(",") if name.strip()]
        own = [name for name in names if name in compat.__all__]
        rest = [name for name in names if name not in own]
        lines = [f"from simpo.compat import {', '.join(own)}"] * bool(own)
        lines += [f"from trl import {', '.join(rest)}"] * bool(rest)
        return "\n".join(indent + line for line in lines)

    return re.sub(r"^( *)from trl import (\([^)]*\)|.*)$", split, source, flags=re.MULTILINE)


@pytest.mark.parametrize("name", ["dpo", "kto", "reward", "sft"])
def test_trls_own_script_runs(name, model_folder, rows, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    if name == "sft":
        rows = [{"messages": row["prompt"] + row["chosen"]} for row in rows]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = with_our_imports((Path(trl.__file__).parent / "scripts" / f"{name}.py").read_text())
    assert f"from simpo.compat import {name.upper() if name != 'reward' else 'Reward'}Trainer" in source
    arguments = {
        "model_name_or_path": model_folder, "dataset_name": str(folder), "output_dir": str(tmp_path / "out"),
        "max_steps": 2, "report_to": "none", "use_cpu": True, "bf16": False, "logging_steps": 1,
        "per_device_train_batch_size": 2, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    options = [f"--{key}={value}" for key, value in arguments.items()]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    exec(compile(source, name, "exec"), {"__name__": "__main__"})
    assert (tmp_path / "out" / "model.safetensors").is_file()


# ---- rejections by name ----


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("DPO", {"loss_type": "hinge"}, "loss_type: 'hinge' is not supported; choose from sigmoid"),
        ("DPO", {"loss_type": "sft"}, "loss_type: sft is"),
        ("DPO", {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "loss_weights: 1 for 2 losses"),
        ("DPO", {"label_smoothing": 0.1}, "label_smoothing: not supported"),
        ("DPO", {"use_weighting": True}, "use_weighting: not supported"),
        ("DPO", {"ld_alpha": 1.5}, "ld_alpha: "),
        ("DPO", {"sync_ref_model": True}, "sync_ref_model: not supported"),
        ("DPO", {"f_divergence_type": "forward_kl", "loss_type": "ipo"}, "f_divergence_type: 'forward_kl'"),
        ("DPO", {"loss_type": ["sigmoid", "sigmoid"]}, "loss_type: 'sigmoid' is given twice"),
        ("DPO", {"sft_weight": 0.1}, "sft_weight: not a key of DPOConfig; add sft to loss_type"),
        (
            "DPO",
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
            r"f_alpha_divergence_coef: must be in \(0, 1\), not 1\.0",
        ),
        ("KTO", {"sft_weight": 0.1}, "sft_weight: not supported"),
        ("KTO", {"loss_type": "apo_zero_unpaired"}, "loss_type: 'apo_zero_unpaired'"),
        ("ORPO", {"generate_during_eval": True}, "generate_during_eval: not supported"),
        ("SFT", {"packing": True}, "packing: not supported"),
        ("SFT", {"loss_type": "dft"}, "loss_type: 'dft'"),
        ("SFT", {"activation_offloading": True}, "activation_offloading: not supported"),
        ("Reward", {"router_aux_loss_coef": 0.0}, "router_aux_loss_coef: not supported"),
        ("Reward", {"chat_template_path": "x.jinja"}, "chat_template_path: not supported"),
    ],
)
def test_keys_without_a_counterpart_are_rejected(kind, settings, message, quiet, tmp_path):
    with pytest.raises(SimpoError, match=message):
        our_classes(kind)[0](str(tmp_path), **quiet | settings)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("DPO", {"data_collator": print}, "data_collator: not supported"),
        ("DPO", {"quantization_config": {}}, "quantization_config: not supported"),
        ("KTO", {"compute_metrics": print}, "compute_metrics: not supported"),
        ("SFT", {"compute_loss_func": print}, "compute_loss_func: not supported"),
        ("Reward", {"optimizer_cls_and_kwargs": ()}, "optimizer_cls_and_kwargs: not supported"),
        ("SFT", {"args": "a name"}, "args: got a builtins.str; import SFTConfig from simpo.compat"),
    ],
)
def test_arguments_without_a_counterpart_are_rejected(kind, arguments, message, opt):
    with pytest.raises(SimpoError, match=message):
        our_classes(kind)[1](opt, **arguments)


def test_a_reference_model_must_have_the_start_models_weights(opt, tokenizer, rows, quiet, tmp_path, make_model):
    args = compat.DPOConfig(str(tmp_path), **quiet)
    given = {"args": args, "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    compat.DPOTrainer(copy.deepcopy(opt), copy.deepcopy(opt), peft_config=lora, **given)
    other = copy.deepcopy(opt)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    with pytest.raises(SimpoError, match="ref_model: has other weights"):
        compat.DPOTrainer(opt, other, **given)
