"""Evaluation, logs, reproducibility, precision, dropout, and rejected settings."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from benchmarks.architectures import build, toy_config
from datasets import DatasetDict
from transformers import ProgressCallback, TrainerCallback

from simpo import OBJECTIVES, PreferenceTrainer, SimpoError
from simpo.models.adapters import disable_dropout
from simpo.packing.model import state_of
from simpo.training.preference import NAMES


def naive_metrics(naive_pairs, model, rows, beta: float = 2.0, gamma: float = 1.0) -> dict[str, np.ndarray]:
    """Return every metric of every row from averages computed by the model's own forward."""
    with torch.no_grad():
        chosen, rejected = (averages.double().numpy() for averages in naive_pairs(model, rows))
    return {
        "loss": np.log1p(np.exp(-(beta * chosen - beta * rejected - gamma))),
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/accuracies": (chosen > rejected).astype(float),
        "rewards/margins": beta * (chosen - rejected),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }


@pytest.mark.parametrize("path", ["packed", "padded"])
@pytest.mark.parametrize(("batch_size", "budget"), [(1, 1000), (3, 1000), (4, 50), (11, 1000), (64, 60)])
def test_evaluation_averages_every_row_exactly_once(batch_size, budget, path, make_trainer, pairs, naive_pairs):
    rows = pairs(11, seed=3)
    trainer = make_trainer(
        None,
        eval_dataset=rows,
        per_device_eval_batch_size=batch_size,
        max_batch_tokens=max(budget, 80) if path == "padded" else budget,
        forward_path=path,
    )
    seen = []
    compute_loss = trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        seen.extend(r for r, w in zip(inputs.rows, inputs.packed.weights.tolist(), strict=True) if w)
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    found = trainer.evaluate()
    assert sorted(seen) == list(range(11))
    for name, values in naive_metrics(naive_pairs, trainer.model, rows).items():
        assert found[f"eval_{name}"] == pytest.approx(values.mean(), rel=1e-5, abs=1e-6), name


def test_several_datasets_can_be_evaluated(make_trainer, pairs, naive_pairs):
    data = {"one": pairs(5, seed=1), "two": pairs(3, seed=2)}
    trainer = make_trainer(None, eval_dataset=data, per_device_eval_batch_size=2)
    found = trainer.evaluate()
    for name, rows in data.items():
        expected = naive_metrics(naive_pairs, trainer.model, rows)["loss"].mean()
        assert found[f"eval_{name}_loss"] == pytest.approx(expected, rel=1e-5)


def test_scores_are_in_row_order(make_trainer, pairs, naive_pairs):
    rows = pairs(11, seed=3)
    trainer = make_trainer(pairs(2), per_device_eval_batch_size=4, max_batch_tokens=40)
    found = trainer.score_rows(rows)
    for name, values in naive_metrics(naive_pairs, trainer.model, rows).items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("settings", [{}, {"beta": 5.0, "gamma_beta_ratio": 0.1}, {"gamma": 3.0}])
def test_the_first_log_averages_over_the_step(settings, make_trainer, make_model, pairs, naive_pairs):
    """Means over the step's pairs before its update, whatever the micro-batches."""
    rows = pairs(6)
    trainer = make_trainer(
        rows, per_device_train_batch_size=6, max_batch_tokens=60, logging_steps=1, max_steps=2, **settings
    )
    trainer.train()
    beta = settings.get("beta", 2.0)
    gamma = settings.get("gamma", beta * settings.get("gamma_beta_ratio", 0.5))
    expected = naive_metrics(naive_pairs, make_model("gpt2"), rows, beta, gamma)
    first = trainer.state.log_history[0]
    assert set(NAMES) <= first.keys()
    for name, values in expected.items():
        assert first[name] == pytest.approx(values.mean(), rel=1e-5, abs=1e-6), name


def test_a_log_averages_everything_since_the_previous_one(make_trainer, make_model, pairs, naive_pairs):
    """All pairs count equally, also those in a short step; ``loss`` is transformers' mean over steps."""
    rows = pairs(10)
    trainer = make_trainer(rows, per_device_train_batch_size=4, logging_steps=3, learning_rate=0.0, num_train_epochs=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2  # one epoch each
    expected = naive_metrics(naive_pairs, make_model("gpt2"), rows)
    for entry in logs:
        for name in set(NAMES) - {"loss"}:
            assert entry[name] == pytest.approx(expected[name].mean(), rel=1e-5, abs=1e-6), name


def test_evaluation_during_training_does_not_affect_the_training_log(make_trainer, make_model, pairs, naive_pairs):
    rows = pairs(6)
    trainer = make_trainer(
        rows,
        eval_dataset=pairs(5, seed=9),
        per_device_eval_batch_size=5,
        per_device_train_batch_size=6,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.0,
        max_steps=2,
    )
    modes, compute_loss = [], trainer.compute_loss

    def watched(model, *args, **kwargs):
        modes.append(model.training)
        return compute_loss(model, *args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    assert modes == [True, False, True, False]
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    expected = naive_metrics(naive_pairs, make_model("gpt2"), rows)
    assert entry["rewards/margins"] == pytest.approx(expected["rewards/margins"].mean(), rel=1e-5)
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 2


def test_sums_are_logged_without_length_normalization(make_trainer, pairs, monkeypatch):
    rows = pairs(5, seed=3)
    averages = make_trainer(rows).score_rows(rows)
    monkeypatch.setattr(type(OBJECTIVES["simpo"]), "average_logps", False)
    sums = make_trainer(rows).score_rows(rows)
    for k, name in enumerate(("logps/chosen", "logps/rejected")):
        lengths = [len(row["response_ids"][k]) for row in rows]
        np.testing.assert_allclose(sums[name], averages[name] * lengths, rtol=1e-5)


# ---- reproducibility and precision ----


def weights_after_training(make_trainer, make_model, rows, *, name="gpt2", **settings):
    trainer = make_trainer(
        rows,
        model=make_model(name, torch.float32, std=0.1),
        per_device_train_batch_size=6,
        learning_rate=1e-3,
        max_batch_tokens=80,
        logging_steps=1,
        **settings,
    )
    trainer.train()
    return trainer.model.state_dict(), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"forward_path": "padded"}])
def test_the_same_seed_gives_identical_weights(settings, make_trainer, make_model, pairs):
    runs = [weights_after_training(make_trainer, make_model, pairs(14), **settings) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    for name, weight in runs[0][0].items():
        assert torch.equal(weight, runs[1][0][name]), name
    other = weights_after_training(make_trainer, make_model, pairs(14), seed=7, **settings)[0]
    assert any(not torch.equal(weight, other[name]) for name, weight in runs[0][0].items())


def test_row_order_has_its_own_seed(make_trainer, make_model, pairs):
    runs = [weights_after_training(make_trainer, make_model, pairs(14), seed=seed, data_seed=3)[0] for seed in (1, 2)]
    assert all(torch.equal(weight, runs[1][name]) for name, weight in runs[0].items())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bf16_trains_like_fp32(name, make_trainer, make_model, pairs):
    start = make_model(name, torch.float32, std=0.1).state_dict()
    exact = weights_after_training(make_trainer, make_model, pairs(12), name=name)
    rounded = weights_after_training(make_trainer, make_model, pairs(12), name=name, bf16=True)
    assert rounded[1] == pytest.approx(exact[1], abs=1e-2)
    assert rounded[1] != exact[1]  # it is really a different precision
    assert {weight.dtype for weight in rounded[0].values()} == {torch.float32}
    assert all(not torch.equal(weight, start[name]) for name, weight in rounded[0].items())


@pytest.mark.parametrize("path", ["auto", "padded"])
def test_training_lowers_the_loss(path, make_trainer, make_model, pairs):
    _, losses = weights_after_training(
        make_trainer, make_model, pairs(4), forward_path=path, num_train_epochs=12, name="llama"
    )
    assert losses[-1] < losses[0] / 2


# ---- dropout ----


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gpt_neox", "bloom", "falcon"])
@pytest.mark.parametrize("disabled", [True, False])
def test_disable_dropout_makes_training_deterministic(name, disabled, make_trainer, make_model, pairs):
    rows = pairs(4)
    trainer = make_trainer(
        rows,
        model=make_model(name, torch.float32, dropout=0.3),
        disable_dropout=disabled,
        per_device_train_batch_size=4,
    )
    (batch,) = next(iter(trainer.get_train_dataloader()))["micro_batches"]
    trainer.model.train()
    with torch.no_grad():
        first, second = (trainer.compute_loss(trainer.model, batch).item() for _ in range(2))
    assert (first == second) == disabled


def test_disable_dropout_reaches_every_module(make_model):
    model = make_model("opt", torch.float32, dropout=0.3)
    assert {layer.dropout for layer in model.model.decoder.layers} == {0.3}
    disable_dropout(model)
    assert all(module.p == 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert {layer.dropout for layer in model.model.decoder.layers} == {0.0}
    assert {layer.self_attn.dropout for layer in model.model.decoder.layers} == {0.0}


@pytest.mark.parametrize("name", ["gpt_bigcode", "seed_oss", "starcoder2", "phimoe", "mixtral"])
def test_disable_dropout_knows_every_configuration_key(name):
    """``attn_dropout``, ``residual_dropout``, and the jitter noise of routers."""
    drops = dict.fromkeys(["attn_pdrop", "residual_dropout", "router_jitter_noise"], 0.3)
    model = build(name, **{key: value for key, value in drops.items() if hasattr(toy_config(name), key)})
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)
        disable_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)


# ---- mixtures of experts ----


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_load_balancing_loss_is_added_and_logged(weight, make_trainer, make_model, pairs):
    """Added wherever the model's own forward adds it, and logged in any case."""
    model = make_model("mixtral", torch.float32, output_router_logits=True, router_aux_loss_coef=weight)
    trainer = make_trainer(pairs(6), model=model, num_train_epochs=1, logging_steps=1, max_batch_tokens=60)
    (batch, *_) = next(iter(trainer.get_train_dataloader()))["micro_batches"]
    loss, metrics = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    objective = (metrics[:, 0] * batch.packed.weights).sum() / batch.step_weight
    logged = trainer._routing.take(lambda sums: sums)
    added = weight * logged["router/aux_loss"] * float(batch.packed.weights.sum()) / batch.step_weight
    assert loss.item() == pytest.approx(objective.item() + added, rel=1e-5)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["router/aux_loss"] > 0
    assert 1 <= entry["router/max_load"] <= model.config.num_local_experts


# ---- models without prompt sharing ----


@pytest.mark.parametrize(("name", "separately"), [("mamba", False), ("stablelm", False), ("bloom", True)])
def test_a_fallback_trains_to_the_same_weights(name, separately, make_trainer, make_model, pairs, naive_losses, caplog):
    rows = pairs(4)
    start = make_model(name)
    naive = copy.deepcopy(start)
    naive_losses(naive, rows).mean().backward()
    torch.optim.SGD(naive.parameters(), lr=0.1).step()
    model = copy.deepcopy(start)
    with caplog.at_level(logging.WARNING, "simpo"):
        trainer = make_trainer(
            rows,
            model=model,
            optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
            per_device_train_batch_size=4,
            max_batch_tokens=80,
            max_steps=1,
        )
        trainer.train()
    # Bloom's mask overflows in float64 for left-padded rows
    assert (trainer.path, state_of(model).separate_comparisons) == ("cached", separately)
    assert len([record for record in caplog.records if "cache" in record.message]) == 1
    for (key, found), expected in zip(model.named_parameters(), naive.parameters(), strict=True):
        # 1e-6, because the model's internal fp32 computations are kept here
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=key)
        assert not torch.equal(found, start.get_parameter(key)) or found.grad is None or not found.grad.any()


def test_a_saved_model_is_an_ordinary_model(make_trainer, make_model, pairs, tmp_path):
    import transformers as hf

    trainer = make_trainer(pairs(4), model=make_model("llama", torch.float32), per_device_train_batch_size=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(trainer.model.eval().generate(ids, **options), loaded.generate(ids, **options))


# ---- rejected input ----


@pytest.mark.parametrize(("responses", "message"), [(1, "one response"), (3, "3 responses")])
def test_rows_that_cannot_be_ranked_are_rejected(responses, message, make_trainer, pairs):
    from datasets import concatenate_datasets

    rows = concatenate_datasets([pairs(2), pairs(1, responses=responses), pairs(1)])
    with pytest.raises(SimpoError, match=f"train row 2 has {message}"):
        make_trainer(rows)
    with pytest.raises(SimpoError, match="eval row 2"):
        make_trainer(pairs(2), eval_dataset=rows)


def test_missing_arguments_are_reported(make_trainer, pairs, config, make_model):
    from datasets import Dataset

    with pytest.raises(SimpoError, match="train_dataset"):
        make_trainer(None).train()
    with pytest.raises(SimpoError, match="eval_dataset"):
        make_trainer(pairs(2)).evaluate()
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(SimpoError, match="processing_class"):
        PreferenceTrainer(make_model("gpt2"), config(), text)


def test_other_dataset_types_work_or_say_what_to_pass(pairs, config, make_model):
    rows = pairs(4)
    listed = PreferenceTrainer(make_model("gpt2"), config(), rows.to_list(), {"held out": pairs(2, seed=1).to_list()})
    assert listed.train_dataset["response_ids"][:] == rows["response_ids"][:]
    split = DatasetDict(train=rows, test=rows)
    for given, message in (
        (split, "^train_dataset: a DatasetDict with the splits 'train', 'test'; pass one"),
        (rows.to_iterable_dataset(), "^train_dataset: a streaming dataset; load"),
        (rows.to_pandas(), "^train_dataset: a DataFrame; pass a datasets.Dataset"),
    ):
        with pytest.raises(SimpoError, match=message):
            PreferenceTrainer(make_model("gpt2"), config(), given)
    assert set(PreferenceTrainer(make_model("gpt2"), config(), rows, split).eval_dataset) == {"train", "test"}


def test_scored_rows_equal_predict_without_its_callback(make_trainer, pairs):
    """Trackers log what ``on_predict`` passes to them, and reopen a run that has been closed."""

    class Recorder(TrainerCallback):
        predictions = 0

        def on_predict(self, *args, **kwargs):
            self.predictions += 1

    recorder, rows = Recorder(), pairs(5)
    trainer = make_trainer(rows, callbacks=[recorder], disable_tqdm=False, per_device_eval_batch_size=2)
    found = trainer.score_rows(rows)
    (bar,) = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ProgressCallback)]
    assert recorder.predictions == 0 and bar.prediction_bar is None
    metrics = trainer.predict(rows).metrics
    assert recorder.predictions == 1
    assert found["loss"].mean() == pytest.approx(metrics["test_loss"], abs=1e-12)
    assert found["rewards/margins"].mean() == pytest.approx(metrics["test_rewards/margins"], abs=1e-12)
