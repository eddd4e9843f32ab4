"""The configuration: defaults, hyperparameters, and rejection of bad settings by name."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from importlib.util import find_spec
from typing import get_type_hints

import pytest
from transformers import TrainingArguments

from simpo import OBJECTIVES, PreferenceConfig, SimpoError
from simpo.training.configs import hyperparameter_names


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (2.0, 0.5)),
        ({"gamma_beta_ratio": 0.3}, (2.0, 0.3)),
        ({"gamma": 1.0}, (2.0, 0.5)),
        ({"beta": 10.0, "gamma": 3.0}, (10.0, 0.3)),
        ({"beta": 10.0, "gamma_beta_ratio": 0.3}, (10.0, 0.3)),
        ({"beta": 2.5, "gamma": 0}, (2.5, 0.0)),
    ],
)
def test_gamma_can_be_given_directly_or_as_a_ratio(given, expected, config):
    found = config(**given).hyperparameters
    assert (found["beta"], found["gamma_beta_ratio"]) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta": 0.0}, "beta must be > 0"),
        ({"beta": "abc"}, "beta: 'abc' is not a number"),
        ({"beta": float("nan")}, "beta must be > 0, not nan"),
        ({"gamma_beta_ratio": -1.0}, "gamma_beta_ratio must be >= 0"),
        ({"gamma": -1.0}, "gamma must be >= 0"),
        ({"gamma": 1.0, "gamma_beta_ratio": 0.5}, "gamma and gamma_beta_ratio"),
        ({"label_smoothing": 0.5, "objective": "simpo"}, "label_smoothing must be in"),
        ({"link": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss_type": "hinge", "gamma": 1.0, "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss_type": "hinge", "link": "sigmoid"}, "loss_type: 'hinge' contradicts link 'sigmoid'"),
        ({"objective": "no such"}, "objective: 'no such' is unknown; choose from simpo"),
        ({"sft_weight": -0.1}, "sft_weight"),
        ({"sft_weight": float("nan")}, "sft_weight"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: not supported"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: not supported"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: must be at least 1"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size: must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: must be at least 1"),
        ({"max_batch_tokens": 0}, "max_batch_tokens: must be at least 1"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({"forward_path": "fast"}, "forward_path"),
        ({"truncation": "much"}, "truncation"),
        ({"max_length": 0}, "max_length"),
    ],
)
def test_bad_values_are_reported_by_name(given, message, config):
    with pytest.raises(SimpoError, match=message):
        config(**given)


def test_an_unknown_key_is_rejected(config):
    with pytest.raises(TypeError, match="gama"):
        config(gama=1.0)


def test_several_gpus_without_a_launcher_are_rejected(config, monkeypatch):
    """``DataParallel`` would split packed batches; the error explains how to launch instead."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(SimpoError, match=r"2 GPUs .*torchrun --nproc_per_node 2"):
        config()


@pytest.mark.parametrize(("per_device", "accumulation"), [(8, 1), (2, 4), (1, 1)])
def test_accumulation_steps_are_folded_into_the_batch_size(per_device, accumulation, config):
    args = config(per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation)
    assert args.train_batch_size == args.per_device_train_batch_size == per_device * accumulation
    assert args.gradient_accumulation_steps == 1
    for same in (dataclasses.replace(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert (same.per_device_train_batch_size, same.gradient_accumulation_steps) == (per_device * accumulation, 1)


def test_loss_types_of_the_paper_and_peers_are_accepted(config):
    assert config(loss_type="hinge", gamma_beta_ratio=0.5).hyperparameters["link"] == "hinge"
    args = config(loss_type="simpo")
    assert (args.objective, args.hyperparameters["link"]) == ("simpo", "sigmoid")


def test_incompatible_transformers_settings_are_overridden(config):
    args = config(remove_unused_columns=True, logging_nan_inf_filter=True)
    assert not args.remove_unused_columns
    assert not args.logging_nan_inf_filter


def test_every_objective_hyperparameter_is_a_config_key():
    keys = {field.name for field in dataclasses.fields(PreferenceConfig)}
    hints = get_type_hints(PreferenceConfig)
    for row in OBJECTIVES.values():
        assert {*row.hyperparameters, *row.aliases} <= set(hyperparameter_names()) <= keys
        kinds = {name: known.type for name, known in row.hyperparameters.items()}
        kinds |= {name: row.hyperparameters[alias.of].type for name, alias in row.aliases.items()}
        for name, kind in kinds.items():
            assert hints[name] == kind | None


def test_the_configuration_is_serializable(config):
    """Trainer writes it into every checkpoint, and loggers read it as a dictionary."""
    args = config(beta=2.5)
    assert args.to_dict()["beta"] == 2.5
    assert '"beta": 2.5' in args.to_json_string()
    assert pickle.loads(pickle.dumps(args)).hyperparameters == args.hyperparameters


@pytest.mark.parametrize(
    ("given", "objective"),
    [
        ({"loss_type": "ipo"}, "ipo"),
        ({"loss_type": "orpo", "objective": "orpo"}, "orpo"),
        ({"loss_type": "sigmoid", "objective": "dpo"}, "dpo"),
        ({"loss_type": "sigmoid", "objective": "simpo"}, "simpo"),
        ({"loss_type": "sigmoid", "gamma_beta_ratio": 0.5}, "simpo"),
        ({"loss_type": "hinge", "gamma": 0.5}, "simpo"),
        ({}, "simpo"),
    ],
)
def test_loss_type_maps_to_an_objective(given, objective, config):
    args = config(**given)
    assert args.objective == dataclasses.replace(args).objective == objective


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"loss_type": "sigmoid", "beta": 0.01},
            "loss_type: 'sigmoid' alone .* add objective: dpo, or objective: simpo",
        ),
        ({"loss_type": "hinge"}, "loss_type: 'hinge' alone"),
        (
            {"loss_type": "hinge", "objective": "dpo"},
            "loss_type: 'hinge' is neither an objective nor a link of objective 'dpo'",
        ),
        ({"loss_type": "aot", "objective": "ipo"}, "loss_type: 'aot' is neither an objective nor a link; choose from"),
        ({"loss_type": "kto_pair"}, "loss_type: 'kto_pair' is neither an objective nor a link; choose from simpo"),
        ({"loss_type": "ipo", "objective": "dpo"}, "loss_type: 'ipo' contradicts objective 'dpo'"),
        ({"kl_weight": -1.0}, "kl_weight: must be at least 0, not -1.0"),
        ({"kl_weight": float("inf")}, "kl_weight: must be finite, not inf"),
        ({"objective": "orpo", "sft_weight": 0.1}, "sft_weight: objective 'orpo' already has .* leave sft_weight out$"),
        ({"objective": "cpo", "sft_weight": 0.1}, "sft_weight: objective 'cpo' already has .*or set lam: 0"),
        ({"objective": "dpo", "gamma_beta_ratio": 0.5}, "gamma_beta_ratio is not a hyperparameter of objective 'dpo'"),
    ],
)
def test_incompatible_settings_are_reported_by_name(given, message, config):
    with pytest.raises(SimpoError, match=message):
        config(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"beta": 0.1},
        {"beta": 0.01, "label_smoothing": 0.1},
        {"label_smoothing": 0.1},
        {"precompute_ref_log_probs": True},
        {"precompute_ref_log_probs": False, "beta": 2.0},
    ],
)
def test_an_ambiguous_objective_must_be_given_explicitly(given, config):
    with pytest.raises(SimpoError, match=r"^objective: not given, and .*add objective: dpo"):
        config(**given)
    for objective in ("simpo", "dpo"):
        assert config(**given, objective=objective).objective == objective


@pytest.mark.parametrize("given", [{}, {"beta": 2.0}, {"beta": 0.1, "gamma": 0.1}, {"beta": 0.5, "link": "sigmoid"}])
def test_simpo_is_inferred_when_nothing_else_is_possible(given, config):
    assert config(**given).objective == dataclasses.replace(config(**given)).objective == "simpo"


def test_the_reference_is_precomputed_by_default(config):
    assert config(objective="dpo").precompute_ref_log_probs is True
    assert config(objective="dpo", precompute_ref_log_probs=False).precompute_ref_log_probs is False


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("include_num_input_tokens_seen", True),
        ("include_num_input_tokens_seen", "non_padding"),
        ("include_for_metrics", ["inputs"]),
        ("label_names", ["labels"]),
        ("prediction_loss_only", True),
        ("batch_eval_metrics", True),
        ("eval_do_concat_batches", False),
        ("eval_use_gather_object", True),
        ("average_tokens_across_devices", False),
        ("bf16_full_eval", True),
        ("fp16_full_eval", True),
        ("torch_empty_cache_steps", 10),
        ("save_on_each_node", True),
        ("do_predict", True),
        ("accelerator_config", {"split_batches": True}),
    ],
)
def test_keys_a_packed_trainer_cannot_honor_are_rejected_by_name(key, value, config):
    with pytest.raises(SimpoError, match=rf"^{key}: not supported \("):
        config(**{key: value})
    with pytest.raises(SimpoError, match=rf"\(1\) auto_find_batch_size: .*\(2\) {key}: "):
        config(**{key: value, "auto_find_batch_size": True})


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "paged_adamw_32bit", "adamw_8bit"])
def test_a_missing_optimizer_package_is_reported_at_once(name, config):
    with pytest.raises(SimpoError, match=f"optim: {name} needs bitsandbytes"):
        config(optim=name)


def test_disabled_keys_are_not_rejected(config):
    args = config(include_num_input_tokens_seen=False, include_for_metrics=[], label_names=[])
    assert dataclasses.replace(args).max_length == args.max_length


def test_an_objective_with_its_own_anchor_rejects_sft_weight(config, monkeypatch):
    class Anchored(type(OBJECTIVES["simpo"])):
        name = "anchored"

        def anchor(self, w):
            return -w.avg

    monkeypatch.setitem(OBJECTIVES, "anchored", Anchored())
    with pytest.raises(SimpoError, match=r"objective 'anchored' already has a term .* leave sft_weight out$"):
        config(objective="anchored", sft_weight=0.1)


def test_sft_and_kl_weights_can_be_added_to_an_objective(config):
    assert config(objective="cpo", lam=0.0, sft_weight=0.1).sft_weight == 0.1
    assert config(objective="dpo", sft_weight=0.1, kl_weight=0.2).kl_weight == 0.2


def test_a_single_process_cannot_shard(config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # set by the configuration and restored afterwards
    with pytest.raises(SimpoError, match="fsdp: there is only one process"):
        config(fsdp=True)
